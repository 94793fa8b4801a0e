"""In how many chunks a Ulysses rank's heads are exchanged: more hide more of the messages, and each is one more call of the kernel."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from longctx.errors import PlanError, ShapeError, format_problems
from longctx.parallel.cost import Shape, exchange_estimate, hop_shares
from longctx.parallel.degrees import chunk_problems, possible_chunks
from longctx.parallel.schedule import RingSchedule
from longctx.parallel.strategy import ContextStrategy, kernel_rates, log_choice, stand_in

# More leave too little work to each call of a kernel.
MAX_CHUNKS = 8


def keys_of_chunk(num_kv_heads: int, ulysses: int, chunks: int) -> int:
    """Key heads that one chunk of a rank's heads sees, of `num_kv_heads` before they are exchanged."""
    return max(1, max(num_kv_heads, ulysses) // ulysses // chunks)


def resolve_chunks(
    chunks: int | None,
    strategy: ContextStrategy,
    schedule: RingSchedule,
    shape: Shape,
    q: Tensor,
    *,
    ulysses: int,
    kernel: str = "auto",
    softcap: float = 0.0,
    in_one_node: bool,
) -> int:
    """`chunks` itself; None: what `choose_chunks` finds fastest, logged once for every kind of call.

    Args:
        strategy, schedule: of the ring inside.
        shape: of attention with one rank's heads.
        q: for its device and dtype.

    Raises:
        ShapeError: the heads cannot be exchanged in so many chunks.
        KernelError: no kernel can do the blocks.
    """
    if chunks is not None:
        problems = chunk_problems(
            chunks, shape.num_heads * ulysses, shape.num_kv_heads * ulysses, ulysses=ulysses, ring=schedule.world
        )
        if problems:
            raise ShapeError(format_problems("these heads", problems))
        return chunks
    chosen, why = choose_chunks(
        strategy,
        schedule,
        shape,
        device=q.device,
        dtype=q.dtype,
        ulysses=ulysses,
        kernel=kernel,
        softcap=softcap,
        in_one_node=in_one_node,
    )
    log_choice("ulysses", chosen, schedule, shape, why)
    return chosen


@lru_cache(maxsize=64)
def choose_chunks(
    strategy: ContextStrategy,
    schedule: RingSchedule,
    shape: Shape,
    *,
    device: torch.device,
    dtype: torch.dtype,
    ulysses: int,
    kernel: str = "auto",
    softcap: float = 0.0,
    in_one_node: bool,
) -> tuple[int, str]:
    """The number of chunks that `exchange_estimate` finds fastest, and why, as a line for a log; the same on every rank.

    Arguments and errors as `resolve_chunks`; remembered.
    """
    first = RingSchedule.build(schedule.mask, schedule.layout, 0, schedule.world, schedule.seq_len)
    plan = strategy.plan(first, shape.num_kv_heads)
    rates = kernel_rates(first, plan.hops, plan.rows, stand_in(shape, device, dtype), kernel, softcap)
    hops = hop_shares(schedule.mask, schedule.layout, schedule.world, schedule.seq_len)
    found = {
        n: exchange_estimate(shape, hops, rates, ulysses=ulysses, chunks=n, in_one_node=in_one_node)
        for n in possible_chunks(shape.num_heads, shape.num_kv_heads, ring=schedule.world)
        if n <= MAX_CHUNKS and _serves(strategy, schedule, max(1, shape.num_kv_heads // n))
    }
    # Among equals the one with fewer calls.
    chosen = min(found, key=lambda n: (found[n].total, n))
    told = ", ".join(f"{n} +{1e3 * e.total:.2f} ms ({1e3 * e.exposed:.2f} of it waiting)" for n, e in found.items())
    where = "one node" if in_one_node else "several nodes"
    return chosen, (
        f"{chosen} chunk{'s' * (chosen > 1)} of {shape.num_heads}/{shape.num_kv_heads} heads of {shape.head_dim} a rank, "
        f"{shape.local_len:_} tokens over {ulysses} ranks, {where}; estimated, forward and backward: {told}"
    )


def _serves(strategy: ContextStrategy, schedule: RingSchedule, num_kv_heads: int) -> bool:
    """Whether the strategy can be had with so many key heads."""
    try:
        strategy.plan(schedule, num_kv_heads)
    except PlanError:
        return False
    return True
