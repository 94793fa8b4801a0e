"""What of a plan may cross machines: ranks of one machine follow one another, as do those that talk in every layer."""

from __future__ import annotations

from longctx.errors import Problem
from longctx.parallel.plan import ParallelPlan


def node_problems(plan: ParallelPlan, *, node_size: int, world_size: int) -> list[Problem]:
    """What of `plan` would have to talk between machines in every layer; empty if nothing does, or it is allowed.

    tp ranks, and the ulysses ranks around them, are numbered first, so their groups are on one machine where its size is a
    multiple of tp x ulysses. The ring passes keys and values behind attention's work, dp and pp exchange once a step or a
    micro-batch: they may cross.

    Args:
        node_size: processes on each machine.
        world_size: of all machines.
    """
    inner = plan.ulysses * plan.tp
    if plan.allow_across_nodes or node_size >= world_size or node_size % inner == 0:
        return []
    # As much of tp as fits, then as much of ulysses; the ring takes the rest.
    tp = max(t for t in range(1, plan.tp + 1) if plan.tp % t == 0 and node_size % t == 0)
    rest = plan.sp * plan.tp // tp
    ulysses = max(u for u in range(1, plan.ulysses + 1) if rest % u == 0 and node_size % (tp * u) == 0)
    who = f"tp {plan.tp} x ulysses {plan.ulysses} = {inner} processes" if plan.ulysses > 1 else f"tp {plan.tp}: they"
    return [
        Problem(
            f"{who} exchange activations in every layer, but a machine has {node_size}, so some of these messages would "
            "cross machines",
            f"the ring may cross: tp {tp}, ulysses {ulysses}, ring {rest // ulysses} for the same processes; or "
            "parallel.allow_across_nodes = true",
        )
    ]
