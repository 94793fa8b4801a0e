"""How a Ulysses rank's heads are exchanged: more chunks hide more of the messages, and each is one more call of the kernel; what
stays for the backward pass need not come again."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from longctx.errors import PlanError, ShapeError, format_problems
from longctx.parallel.cost import Shape, Split, exchange_estimates, hop_shares, ranked
from longctx.parallel.degrees import chunk_problems, possible_chunks
from longctx.parallel.schedule import RingSchedule
from longctx.parallel.strategy import ContextStrategy, kernel_rates, log_choice, stand_in

# More leave too little work to each call of a kernel.
MAX_CHUNKS = 8


def keys_of_chunk(num_kv_heads: int, ulysses: int, chunks: int) -> int:
    """Key heads that one chunk of a rank's heads sees, of `num_kv_heads` before they are exchanged."""
    return max(1, max(num_kv_heads, ulysses) // ulysses // chunks)


def resolve_split(
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
) -> Split:
    """`chunks` of them, or None: as many as are best; and whether anything stays for the backward pass. By `choose_split`, logged
    once for every kind of call.

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
    chosen, why = choose_split(
        chunks,
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
def choose_split(
    chunks: int | None,
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
) -> tuple[Split, str]:
    """What `exchange_estimates` finds fastest, or hardly slower and holding nothing, and why, as a line for a log; the same on
    every rank.

    Arguments and errors as `resolve_split`; remembered.
    """
    first = RingSchedule.build(schedule.mask, schedule.layout, 0, schedule.world, schedule.seq_len)
    plan = strategy.plan(first, shape.num_kv_heads)
    rates = kernel_rates(first, plan.hops, plan.rows, stand_in(shape, device, dtype), kernel, softcap)
    hops = hop_shares(schedule.mask, schedule.layout, schedule.world, schedule.seq_len)
    if chunks is None:
        possible = [
            n
            for n in possible_chunks(shape.num_heads, shape.num_kv_heads, ring=schedule.world)
            if n <= MAX_CHUNKS and _serves(strategy, schedule, max(1, shape.num_kv_heads // n))
        ]
    else:
        possible = [chunks]
    found = exchange_estimates(shape, hops, rates, ulysses=ulysses, chunks=possible, in_one_node=in_one_node)
    # Among equals the one with fewer calls, which comes first.
    order = ranked(found)
    told = "; ".join(f"{s}: {1e3 * found[s].total:.2f} ms ({1e3 * found[s].exposed:.2f} of it waiting)" for s in order)
    where = "one node" if in_one_node else "several nodes"
    return order[0], (
        f"{order[0]} for {shape.num_heads}/{shape.num_kv_heads} heads of {shape.head_dim} a rank, "
        f"{shape.local_len:_} tokens over {ulysses} ranks, {where}; estimated, forward and backward: {told}"
    )


def _serves(strategy: ContextStrategy, schedule: RingSchedule, num_kv_heads: int) -> bool:
    """Whether the strategy can be had with so many key heads."""
    try:
        strategy.plan(schedule, num_kv_heads)
    except PlanError:
        return False
    return True
