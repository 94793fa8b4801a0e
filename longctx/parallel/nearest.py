"""Every way to share processes out to the axes of a plan, and the nearest of them where a plan cannot be used.

The hints of single problems say what would mend that problem; a plan with several needs one that mends them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from longctx.parallel.plan import ParallelPlan

AXES = ("pp", "ring", "ulysses", "tp")


def nearest_plans(
    plan: ParallelPlan, world_size: int, works: Callable[[ParallelPlan], bool], *, count: int = 3
) -> list[ParallelPlan]:
    """The plans on as many processes that work and are the least of a change, nearest first.

    How far two plans are apart is how often degrees were doubled or halved between them; dp counts where it was given, and
    follows from the others where it was not.

    Args:
        works: whether a plan can be used on these processes.
        count: of plans, at most. None that work: none are given.
    """
    near = sorted(splits(plan, world_size), key=lambda other: _distance(plan, other, world_size))
    found: list[ParallelPlan] = []
    for other in near:
        if len(found) == count:
            break
        if works(other):
            found.append(other)
    return found


def changes(plan: ParallelPlan, other: ParallelPlan) -> str:
    """What makes `other` of `plan`, as on a command line."""
    names = ("dp", "context", *AXES, "schedule", "shard_norms", "grad_dtype", "ulysses_chunks")
    changed = {name: getattr(other, name) for name in names if getattr(other, name) != getattr(plan, name)}
    return " ".join(f"--parallel.{name}={str(value).lower()}" for name, value in changed.items())


def splits(plan: ParallelPlan, world_size: int) -> Iterator[ParallelPlan]:
    """`plan` with every way to share `world_size` processes out to the axes; dp is given where `plan` gives it.

    What needs an axis that is gone (a schedule, sharded norms, a dtype on the ring's wire, chunks of heads) is left out with it.
    """
    for tp in _divisors(world_size):
        for ulysses in _divisors(world_size // tp):
            for ring in _divisors(world_size // (tp * ulysses)):
                for pp in _divisors(world_size // (tp * ulysses * ring)):
                    dp = world_size // (tp * ulysses * ring * pp)
                    yield replace(
                        plan,
                        dp=None if plan.dp is None else dp,
                        context=None,
                        pp=pp,
                        ring=ring,
                        ulysses=ulysses,
                        tp=tp,
                        schedule=plan.schedule if pp > 1 else "1f1b",
                        shard_norms=plan.shard_norms and tp > 1,
                        grad_dtype=plan.grad_dtype if ring > 1 else "fp32",
                        ulysses_chunks=plan.ulysses_chunks if ulysses > 1 else None,
                    )


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _distance(plan: ParallelPlan, other: ParallelPlan, world_size: int) -> tuple[float, int, float]:
    """Doublings in all; axes that changed; doublings of the samples of a step."""
    axes = AXES if plan.dp is None else ("dp", *AXES)
    steps = [_doublings(getattr(plan, axis), getattr(other, axis)) for axis in axes]
    replicas = [world_size / math.prod(max(1, getattr(of, axis)) for axis in AXES) for of in (plan, other)]
    # Rounded: sums of the same steps in another order are as far.
    return round(sum(steps), 6), sum(step > 0 for step in steps), round(abs(math.log2(replicas[0] / replicas[1])), 6)


def _doublings(a: int, b: int) -> float:
    return abs(math.log2(max(1, a) / max(1, b)))
