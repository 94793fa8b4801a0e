"""Well-known mistakes of parallel training, made on purpose: what `longctx check` must catch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch

from longctx import engine, functional
from longctx.data import ShardedBatch
from longctx.errors import ConfigError, Problem, did_you_mean
from longctx.parallel import tensor
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.plan import ParallelPlan
from longctx.parallel.schedule import RingSchedule
from longctx.shapes import NO_TARGET


@dataclass(frozen=True)
class Twin:
    """One mistake.

    Args:
        what: what is wrong with it.
        needs: the degree of the plan without which it changes nothing: "grad_world", "sp", "ring" or "tp".
    """

    what: str
    needs: str = "sp"


TWINS = {
    "scale": Twin("the loss is the mean over each process's own targets, not over the step's", needs="grad_world"),
    "sp": Twin("the loss is divided by the number of processes that share a sequence, once too often"),
    "positions": Twin("RoPE turns by positions within the shard, not in the whole sequence"),
    "labels": Twin("labels are shifted after the sequence was cut, so that shards' last ones are wrong"),
    "hop": Twin("the last hop of the ring is left out, forward and backward", needs="ring"),
    "tensor": Twin("each tp rank keeps the gradient that its own heads and features give, unsummed", needs="tp"),
}


def twins_of(name: str, plan: ParallelPlan) -> tuple[str, ...]:
    """The twins that `name` asks for: one, or with "all" every one that this plan can have.

    Raises:
        ConfigError: no such twin, or it changes nothing in this plan.
    """
    fitting = tuple(twin for twin in TWINS if twin_problem(twin, plan) is None)
    if name == "all":
        if not fitting:
            raise ConfigError(f"none of the mistakes changes anything in this plan ({plan})\n       use more processes")
        return fitting
    if name not in TWINS:
        raise ConfigError(f"--broken {name}: there is no such mistake: {did_you_mean(name, [*TWINS, 'all'])}")
    problem = twin_problem(name, plan)
    if problem is not None:
        raise ConfigError(f"{problem.what}\n       {problem.hint}")
    return (name,)


def twin_problem(name: str, plan: ParallelPlan) -> Problem | None:
    """Why the mistake would change nothing in this plan; None if it does."""
    needs = TWINS[name].needs
    if getattr(plan, needs) == 1:
        hints = {
            "grad_world": "use --nproc 2 or more, with pp 1 and tp 1",
            "sp": "share sequences, such as by --parallel.ring=2",
            "ring": "use a ring, such as --parallel.ring=2",
            "tp": "share matrices, such as by --parallel.tp=2",
        }
        return Problem(f"--broken {name} changes nothing in this plan ({plan}): {TWINS[name].what}", hints[needs])
    return None


@contextlib.contextmanager
def broken(name: str, mesh: ParallelMesh, batches: list[ShardedBatch]) -> Iterator[list[ShardedBatch]]:
    """Make the mistake inside the body, in this process; yields the batches to train on.

    Args:
        name: of a twin; empty for none.
        batches: right ones; the body uses each once, in order.
    """
    match name:
        case "":
            yield batches
        case "scale":
            counts = iter([max(1, int((batch.labels != NO_TARGET).sum())) for batch in batches])
            with _replaced(engine, "scaled_loss", lambda local_sum, **step: local_sum / next(counts)):
                yield batches
        case "sp":
            right, sp = engine.scaled_loss, mesh.plan.sp
            with _replaced(engine, "scaled_loss", lambda local_sum, **step: right(local_sum, **step) / sp):
                yield batches
        case "positions":
            yield [replace(batch, meta=replace(batch.meta, positions=_counted(batch))) for batch in batches]
        case "labels":
            yield [replace(batch, labels=_shifted(batch)) for batch in batches]
        case "hop":
            build = functional._schedule

            def one_less(*case: Any) -> RingSchedule:
                schedule = build(*case)
                return replace(schedule, hops=schedule.hops[: max(1, len(schedule.hops) - 1)])

            with _replaced(functional, "_schedule", one_less):
                yield batches
        case "tensor":

            def mine(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
                return grad.chunk(mesh.tp.size, 1)[mesh.tp.rank], None

            with (
                _replaced(tensor._Enter, "backward", staticmethod(lambda ctx, grad: (grad, None))),
                _replaced(tensor._Gather, "backward", staticmethod(mine)),
            ):
                yield batches
        case _:
            raise AssertionError(f"no twin {name!r}")


def _counted(batch: ShardedBatch) -> torch.Tensor:
    return torch.arange(batch.tokens.shape[1], device=batch.tokens.device)


def _shifted(batch: ShardedBatch) -> torch.Tensor:
    """Each label the next token of the shard, where there is a target at all."""
    return torch.where(batch.labels == NO_TARGET, NO_TARGET, batch.tokens.roll(-1, -1))


@contextlib.contextmanager
def _replaced(module: ModuleType | type, name: str, value: Any) -> Iterator[None]:
    # What stands there, and not what a class would make of it: a static method stays one.
    before = vars(module)[name]
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
