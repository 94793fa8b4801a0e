"""Attention on one device, on a ring and over exchanged heads, and the loss: differentiable functions without parameters."""

from __future__ import annotations

import math
from typing import Literal, overload

from torch import Tensor
from torch._compile import _disable_dynamo

from longctx.calls import agree, check_exchange, check_local, check_ring, over_ranks
from longctx.errors import ShapeError
from longctx.flash import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
)
from longctx.kernels import check_block, check_softcap
from longctx.kernels.sinks import check_sinks
from longctx.layout import SequenceLayout, get_layout
from longctx.masks import AttentionMask, Causal
from longctx.parallel.chunks import keys_of_chunk
from longctx.parallel.loss import linear_cross_entropy
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.schedule import RingSchedule
from longctx.parallel.strategy import ContextStrategy, get_strategy
from longctx.parallel.ulysses import exchanged_attention
from longctx.sequence import SequenceMeta

__all__ = [
    "attention",
    "context_parallel_attention",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "linear_cross_entropy",
    "ring_attention",
    "ulysses_attention",
]

_CAUSAL = Causal()
# Of one process there is one layout: all positions in order.
_WHOLE = get_layout("contiguous")

# torch.compile leaves these functions out (`_disable_dynamo`, which unlike torch.compiler.disable does not load the
# compiler at import): traced, the arithmetic of a schedule would fix one batch's mask in the graph.


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: AttentionMask = ...,
    scale: float | None = ...,
    softcap: float = ...,
    sinks: Tensor | None = ...,
    kernel: str = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: AttentionMask = ...,
    scale: float | None = ...,
    softcap: float = ...,
    sinks: Tensor | None = ...,
    kernel: str = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@_disable_dynamo
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: AttentionMask = _CAUSAL,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    kernel: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over whole sequences on one device. Differentiable in q, k, v and sinks, through out and lse.

    Args:
        q: "b s h d".
        k, v: "b s hk d" with hk dividing h; query head i uses key head i // (h / hk).
        mask: who sees whom; a mask for several sequences needs as many in the batch.
        scale: multiplies q @ k^T. None: 1 / sqrt(d).
        softcap: bends the scores s to softcap * tanh(s / softcap); 0 leaves them. GPU kernels are compiled for its value.
        sinks: [h], floating, a logit for each head that joins the softmax of every row and has no value. None: no sinks.
        kernel: "auto", or a name from `longctx.kernels.kernel_names`.
        return_lse: also return lse, with the sinks in it. Two calls over different keys merge by it, if one has the sinks.

    Returns:
        out: "b s h d" in q's dtype; 0 in rows that see nothing. With `return_lse` also lse: "b h s" fp32, natural log;
        -inf in rows that see nothing (the sink, if there is one).

    Raises:
        ShapeError: shapes, dtypes or devices do not agree, with each other or with the mask; an empty batch or sequence.
        KernelError: the kernel is unknown, or cannot do this; softcap is negative.

    Source: Dao 2023 (arXiv 2307.08691); softcap: Gemma Team 2024 (arXiv 2408.00118), section 2.
    """
    seq_len = q.shape[1] if q.ndim > 1 else 0
    return _attend(
        q,
        k,
        v,
        mask,
        _WHOLE,
        0,
        1,
        seq_len,
        scale,
        softcap,
        sinks,
        kernel,
        return_lse,
        exchange="",
        strategy=get_strategy("relay"),
    )


@over_ranks
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    meta: SequenceMeta,
    mesh: ParallelMesh,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    kernel: str = "auto",
    strategy: str | ContextStrategy | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of this rank's queries to the keys of its whole ring: the rows of `attention` that the rank holds.

    Collective over `mesh.ring`, backward too: every rank of the ring makes the same calls in the same order. What is sent, and
    while what is computed, is up to the strategy, whose `comm_bytes` counts it.

    Args:
        q: "b s h d", this rank's shard, in the order of `meta.positions`; s = meta.local_len, padding included.
        k, v: "b s hk d", likewise.
        meta: where the shard stands in the sequence, and who sees whom; of a whole ring shard, not one cut for Ulysses.
        mesh: holds the ring; must live until the backward pass is done.
        scale, softcap, kernel, return_lse: as in `attention`.
        strategy: "relay", "direct", "gather" (`longctx.parallel.strategy`), "auto", or a strategy itself; None: what the plan
            of `mesh` says. The same on every rank.
        sinks: likewise, the same on every rank. Its gradient is of the local rows, to be summed over the ring like that of
            any parameter.

    Returns:
        As `attention`, for the local rows. A ring of one is the same as `attention`.

    Raises:
        ShapeError: as `attention`; or the shard is not the one that `meta` describes, or `meta` is not of this mesh.
        KernelError: as `attention`.
        PlanError: unknown strategy.
        DistributedError: another rank of the ring died or did not answer in time, or is about to attend differently.

    Source: Liu et al. 2023 (arXiv 2310.01889).
    """
    check_ring(meta, mesh)
    if meta.ulysses_world != 1:
        raise ShapeError(
            f"{mesh.prefix} meta is of a part of a ring shard, cut over {meta.ulysses_world} Ulysses ranks\n"
            "       use context_parallel_attention, which puts the ring shard together first"
        )
    chosen = agree(q, k, v, meta, mesh, strategy, kernel, softcap).strategy
    return _over_ring(q, k, v, meta, mesh, scale, softcap, sinks, kernel, chosen, return_lse)


def _over_ring(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    meta: SequenceMeta,
    mesh: ParallelMesh,
    scale: float | None,
    softcap: float,
    sinks: Tensor | None,
    kernel: str,
    strategy: ContextStrategy,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a whole ring shard."""
    return _attend(
        q,
        k,
        v,
        meta.padded_mask,
        meta.layout,
        meta.ring_rank,
        meta.ring_world,
        meta.padded_len,
        scale,
        softcap,
        sinks,
        kernel,
        return_lse,
        exchange=mesh.ring_handle,
        strategy=strategy,
    )


@over_ranks
def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    meta: SequenceMeta,
    mesh: ParallelMesh,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    kernel: str = "auto",
    strategy: str | ContextStrategy | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over `mesh.ulysses`, around that over `mesh.ring`: the rows of `attention` that the rank holds.

    The ranks of `mesh.ulysses` exchange their tokens of all heads for all tokens of their heads, attend as
    `ring_attention` does on the ring shard that they so get, and exchange the result back: in chunks of their heads, so that
    attention with one hides the messages of its neighbours (`longctx.parallel.ulysses`); how many is what is estimated to be
    fastest, or `ParallelPlan.ulysses_chunks`. Collective over both axes, backward too.
    `longctx.parallel.schedule.ulysses_comm_bytes` counts the messages. Memory while it runs: q, k, v and out once more; they stay
    for the backward pass, or where that costs next to nothing are sent again.

    Args:
        q: "b s h d", this rank's shard, in the order of `meta.positions`; s = meta.local_len, padding included. h is a
            multiple of mesh.ulysses.size.
        k, v: "b s hk d", likewise; hk is a multiple or a divisor of mesh.ulysses.size. Fewer key heads than ranks are
            repeated for the exchange, and their gradients summed.
        meta: where the shard stands in the sequence, and who sees whom.
        mesh: must live until the backward pass is done.
        scale, softcap, kernel, return_lse: as in `attention`.
        strategy: as in `ring_attention`, of the ring inside.
        sinks: likewise, of all heads and the same on every rank. Its gradient is this rank's part, to be summed over both axes
            like that of any parameter.

    Returns:
        As `attention`, for the local rows.

    Raises:
        ShapeError: as `ring_attention`; or the heads cannot be divided.
        KernelError: as `attention`.
        DistributedError: another rank died or did not answer in time, or is about to attend differently.

    Source: Jacobs et al. 2023 (arXiv 2309.14509); around a ring, Fang and Zhao 2024 (arXiv 2405.07719).
    """
    check_ring(meta, mesh)
    axes, world = check_block(q, k, v), mesh.ulysses.size
    # All that can be wrong is said before the first message, with the numbers that the caller knows.
    check_exchange(axes, q, k, meta, mesh)
    softcap = check_softcap(softcap)
    if sinks is not None:
        check_sinks(sinks, q)
        # Rank j attends with the j-th share of the heads.
        sinks = sinks.unflatten(0, (world, -1))[mesh.ulysses.rank]
    chosen, split = agree(q, k, v, meta, mesh, strategy, kernel, softcap)
    if world == 1:
        return _over_ring(q, k, v, meta, mesh, scale, softcap, sinks, kernel, chosen, return_lse)
    schedule = _schedule(meta.padded_mask, meta.layout, meta.ring_rank, meta.ring_world, meta.padded_len)
    out, lse = exchanged_attention(
        q,
        k,
        v,
        plan=chosen.plan(schedule, keys_of_chunk(axes["hk"], world, split.chunks)),
        scheme=chosen.name,
        kernel=kernel,
        scale=_scale(scale, q),
        ring=mesh.ring_handle,
        heads=mesh.head_handle,
        world=world,
        chunks=split.chunks,
        holds=split.holds,
        softcap=softcap,
        sinks=sinks,
        with_lse=return_lse,
    )
    return (out, lse) if return_lse else out


@over_ranks
def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    meta: SequenceMeta,
    mesh: ParallelMesh,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    kernel: str = "auto",
    strategy: str | ContextStrategy | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention as the plan of `mesh` cuts sequences: `ulysses_attention` where `mesh.ulysses` has several ranks, else
    `ring_attention`. Arguments, results and errors are theirs.
    """
    attend = ulysses_attention if max(mesh.ulysses.size, meta.ulysses_world) > 1 else ring_attention
    return attend(  # type: ignore[call-overload]
        q, k, v, meta=meta, mesh=mesh, scale=scale, softcap=softcap, sinks=sinks, kernel=kernel, strategy=strategy,
        return_lse=return_lse,
    )  # fmt: skip


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    layout: SequenceLayout,
    rank: int,
    world: int,
    seq_len: int,
    scale: float | None,
    softcap: float,
    sinks: Tensor | None,
    kernel: str,
    return_lse: bool,
    *,
    exchange: str,
    strategy: ContextStrategy,
) -> Tensor | tuple[Tensor, Tensor]:
    axes = check_block(q, k, v)
    check_local(axes, mask, world, seq_len)
    softcap = check_softcap(softcap)
    if sinks is not None:
        check_sinks(sinks, q)
    schedule = _schedule(mask, layout, rank, world, seq_len)
    out, lse = strategy.attend(
        q,
        k,
        v,
        schedule=schedule,
        exchange=exchange,
        kernel=kernel,
        scale=_scale(scale, q),
        softcap=softcap,
        sinks=sinks,
    )
    return (out, lse) if return_lse else out


def _scale(scale: float | None, q: Tensor) -> float:
    return 1 / math.sqrt(q.shape[3]) if scale is None else float(scale)


def _schedule(mask: AttentionMask, layout: SequenceLayout, rank: int, world: int, seq_len: int) -> RingSchedule:
    """A function of its own, for `longctx check --broken hop` to spoil."""
    return RingSchedule.build(mask, layout, rank, world, seq_len)
