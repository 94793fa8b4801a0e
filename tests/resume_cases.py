"""Plans that hand a run over to each other: the same samples in the same order, whoever shares them how."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from train_cases import MODEL, full_step

from longctx.checkpoint import TrainState, latest_checkpoint, load_checkpoint
from longctx.checkpoint_saver import save_checkpoint
from longctx.checkpoint_state import EngineState
from longctx.engine import EngineConfig, TrainEngine, build_engine
from longctx.model import ModelConfig
from longctx.optim import OptimConfig
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.plan import ParallelPlan
from longctx.parity import shard_step
from longctx.testing import run_distributed

# A large eps: Adam makes rounding in a gradient near zero as large as the gradient.
OPTIM = OptimConfig(lr=1e-2, warmup_steps=2, gradient_clipping=0.5, eps=1e-3)
STEPS, SAVED_AT = 6, 3
# Micro-batches of a step, over all data-parallel ranks and accumulation steps.
MICRO_BATCHES = 4


@dataclass(frozen=True)
class Place:
    """A plan and what else decides where the state is."""

    plan: ParallelPlan
    zero: int
    dtype: str = "fp32"
    # Parameters below this size stay whole with ZeRO-3.
    keep: int = 0
    is_tied: bool = False
    offload: str = "none"

    @property
    def processes(self) -> tuple[int, int, int]:
        """World size, pp and tp: what a process keeps, once DeepSpeed has heard of it."""
        return self.plan.world_size, self.plan.pp, self.plan.tp

    @property
    def model(self) -> ModelConfig:
        # DualPipeV cuts two stages for each process.
        return replace(MODEL, tie_embeddings=True, num_layers=4) if self.is_tied else MODEL

    def engine(self) -> TrainEngine:
        mesh = ParallelMesh.create(self.plan, device="cpu")
        settings = EngineConfig(
            zero_stage=self.zero,
            dtype=self.dtype,
            micro_batch_size=2,
            accumulation_steps=MICRO_BATCHES // self.plan.dp,
            kernel="reference",
            zero3_keep_elements=self.keep,
            offload=self.offload,
        )
        return build_engine(self.model, settings, OPTIM, mesh, total_steps=STEPS)


def place(zero: int, dtype: str = "fp32", *, keep: int = 0, tied: bool = False, **degrees: Any) -> Place:
    return Place(ParallelPlan(**{"dp": 1} | degrees), zero, dtype, keep, tied)


PLACES = {
    "one-zero0": place(0),
    "one-zero3": place(3),
    "ring2-zero1": place(1, ring=2),
    "dp2-zero0": place(0, dp=2),
    "uly2-zero3": place(3, ulysses=2),
    "dp2-zero2": place(2, dp=2),
    "ring3-zero3": place(3, ring=3, keep=1000),
    "ring3-zero1": place(1, ring=3),
    "dp2ring2-zero1": place(1, dp=2, ring=2),
    "ring2uly2-zero3": place(3, ring=2, ulysses=2),
    "dp4-zero2": place(2, dp=4),
    "ring4-zero0": place(0, ring=4),
    "dp2uly2-zero3": place(3, dp=2, ulysses=2, keep=1000),
    "tp2-zero0": place(0, tp=2),
    "tp2-zero3": place(3, tp=2),
    "pp2-zero1": place(1, pp=2),
    "pp2tp2-zero1": place(1, pp=2, tp=2),
    "dp2tp2-zero2": place(2, dp=2, tp=2),
    "ring2tp2-zero1": place(1, ring=2, tp=2),
    "pp2ring2-zero0": place(0, pp=2, ring=2),
    "ring2tp2-norms-zero2": place(2, ring=2, tp=2, shard_norms=True),
    "ring2-zero2-offload": replace(place(2, ring=2), offload="optimizer"),
    "uly2-zero3-offload": replace(place(3, ulysses=2), offload="all"),
    "bf16-pp2-zero1": place(1, "bf16", pp=2),
    "bf16-ring2-zero1": place(1, "bf16", ring=2),
    "bf16-one-zero2": place(2, "bf16"),
    "bf16-dp2ring2-zero3": place(3, "bf16", dp=2, ring=2),
    "tied-one-zero1": place(1, tied=True),
    "tied-pp2-zero1": place(1, tied=True, pp=2),
    "tied-pp2tp2-zero1": place(1, tied=True, pp=2, tp=2),
    "tied-pp2v-zero1": place(1, tied=True, pp=2, schedule="dualpipev"),
    "tied-ring2-zero3": place(3, tied=True, ring=2),
}


def take_steps(engine: TrainEngine, first: int, last: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    dp = engine.mesh.plan.dp
    taken = []
    for step in range(first, last):
        (flat,) = full_step(step, dp=MICRO_BATCHES, accumulation=1)
        full = [flat[i : i + dp] for i in range(0, MICRO_BATCHES, dp)]
        result = engine.train_step(step, shard_step(full, engine.mesh))
        taken.append((result.loss, result.grad_norm))
    return taken


def straight(rank: int, root: str, names: Sequence[str]) -> dict:
    """Each of these plans by itself, saved on the way."""
    told = {}
    for name in names:
        engine = PLACES[name].engine()
        take_steps(engine, 0, SAVED_AT)
        state = TrainState(step=SAVED_AT, cursor=8 * SAVED_AT)
        fingerprint = asdict(PLACES[name].model)
        save_checkpoint(Path(root) / name, engine, state, fingerprint=fingerprint, keep=1)
        told[name] = (take_steps(engine, SAVED_AT, STEPS), engine.full_state_dict())
    return told


def moved(rank: int, root: str, moves: Sequence[tuple[str, str, str]]) -> dict:
    """Each move (source, target, lost): what the second plan makes of the first one's checkpoint; saved again before it goes on.

    With `lost`, something of the state does not arrive: a moment, the optimizer's count of steps, or a process's weights.
    """
    told = {}
    for source, target, lost in moves:
        engine, fingerprint = PLACES[target].engine(), asdict(PLACES[target].model)
        state = load_checkpoint(latest_checkpoint(Path(root) / source), engine, fingerprint)
        assert state == TrainState(step=SAVED_AT, cursor=8 * SAVED_AT)
        if lost:
            lose(engine, lost, rank)
        else:
            save_checkpoint(Path(root) / f"{source}-to-{target}", engine, state, fingerprint=fingerprint, keep=1)
        told[source, target, lost] = (take_steps(engine, SAVED_AT, STEPS), engine.full_state_dict())
    return told


def lose(engine: TrainEngine, lost: str, rank: int) -> None:
    state = EngineState(engine)
    for own in state.pieces:
        if lost in own.moments:
            own.moments[lost].zero_()
        elif lost == "a rank's weights" and rank == 1:
            own.fp32.mul_(1 + 1e-4)
    if lost == "steps":
        state.steps = 0
    state.publish()


def by_processes(function: Callable, root: Path, work: Iterable, name_of: Callable[[Any], str]) -> dict:
    """Run `function(rank, root, share)` once for each kind of world; the losses, and the parameters of all ranks, of each item.

    Args:
        name_of: the place in `PLACES` at which an item is run.
    """
    shares: dict[tuple[int, int, int], list] = {}
    for item in work:
        shares.setdefault(PLACES[name_of(item)].processes, []).append(item)
    told: dict = {}
    for (world, _, _), share in shares.items():
        ranks = run_distributed(function, str(root), share, world=world, timeout_s=900)
        for item in share:
            parameters: dict = {}
            for of_rank in ranks:
                # A stage of a pipeline has the parameters of its layers.
                parameters |= of_rank[item][1]
            told[item] = (ranks[0][item][0], parameters)
    return told


def largest_difference(ours: tuple, theirs: tuple) -> float:
    """The largest relative difference of a loss, a gradient norm or a parameter."""
    found = [
        abs(a - b) / abs(b)
        for mine, other in zip(ours[0], theirs[0], strict=True)
        for a, b in zip(mine, other, strict=True)
    ]
    for name, expected in theirs[1].items():
        difference = (ours[1][name].double() - expected.double()).norm()
        found.append(float(difference / expected.double().norm()))
    return max(found)
