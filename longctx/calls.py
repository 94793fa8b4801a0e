"""A call of attention over several ranks, before anything is computed: its signature, what it must fulfil, and what the ranks
that share a sequence agree on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol, cast, overload

from torch import Tensor
from torch._compile import _disable_dynamo

from longctx.errors import ShapeError, format_problems
from longctx.kernels import check_block, check_softcap, state_dtype
from longctx.masks import AttentionMask
from longctx.parallel.chunks import resolve_split
from longctx.parallel.cost import Shape, Split
from longctx.parallel.degrees import ulysses_problems
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.schedule import RingSchedule
from longctx.parallel.strategy import ContextStrategy, resolve_strategy
from longctx.sequence import SequenceMeta


class AttentionOverRanks(Protocol):
    """The signature of attention functions on shards: `return_lse` decides what comes back."""

    @overload
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        meta: SequenceMeta,
        mesh: ParallelMesh,
        scale: float | None = ...,
        softcap: float = ...,
        sinks: Tensor | None = ...,
        kernel: str = ...,
        strategy: str | ContextStrategy | None = ...,
        return_lse: Literal[False] = ...,
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        meta: SequenceMeta,
        mesh: ParallelMesh,
        scale: float | None = ...,
        softcap: float = ...,
        sinks: Tensor | None = ...,
        kernel: str = ...,
        strategy: str | ContextStrategy | None = ...,
        return_lse: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...


def over_ranks(function: Callable[..., Tensor | tuple[Tensor, Tensor]]) -> AttentionOverRanks:
    return cast(AttentionOverRanks, _disable_dynamo(function))


class Agreed(NamedTuple):
    """What decides which messages a call sends: the strategy of the ring, and how heads are exchanged."""

    strategy: ContextStrategy
    split: Split


def agree(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    meta: SequenceMeta,
    mesh: ParallelMesh,
    strategy: str | ContextStrategy | None,
    kernel: str,
    softcap: float,
) -> Agreed:
    """What the call will send, and before the first message whether the ranks that share the sequence will send the same.

    Args:
        q, k, v: this rank's, before heads are exchanged.
    """
    axes = check_block(q, k, v)
    check_local(axes, meta.padded_mask, meta.ring_world * meta.ulysses_world, meta.padded_len)
    schedule = RingSchedule.build(meta.padded_mask, meta.layout, meta.ring_rank, meta.ring_world, meta.padded_len)
    ulysses, wire = meta.ulysses_world, mesh.exchange.grad_dtype or state_dtype(k.dtype)
    # What the ring gets once heads are exchanged; fewer key heads than ranks are repeated.
    shape = Shape(
        batch=axes["b"],
        local_len=axes["sq"] * ulysses,
        num_heads=axes["h"] // ulysses,
        num_kv_heads=max(axes["hk"], ulysses) // ulysses,
        head_dim=axes["d"],
        itemsize=k.element_size(),
        grad_itemsize=wire.itemsize,
    )
    chosen = resolve_strategy(
        mesh.plan.strategy if strategy is None else strategy,
        schedule,
        shape,
        q,
        kernel=kernel,
        softcap=check_softcap(softcap),
        in_one_node=mesh.ring_in_one_node,
    )
    split = Split()
    if ulysses > 1:
        split = resolve_split(
            mesh.plan.ulysses_chunks,
            chosen,
            schedule,
            shape,
            q,
            ulysses=ulysses,
            kernel=kernel,
            softcap=softcap,
            in_one_node=mesh.ulysses_in_one_node,
        )
    if mesh.sp.size > 1:
        in_chunks = f", heads in {split}" if ulysses > 1 else ""
        mesh.agreement.check(schedule, q, k, extra=f"{chosen}{in_chunks}")
    return Agreed(chosen, split)


def check_ring(meta: SequenceMeta, mesh: ParallelMesh) -> None:
    """Raise ShapeError unless `meta` is of this process's place on the ring."""
    if (meta.ring_rank, meta.ring_world) != (mesh.ring.rank, mesh.ring.size):
        raise ShapeError(
            f"{mesh.prefix} meta is of ring rank {meta.ring_rank} of {meta.ring_world}, but this process is ring rank "
            f"{mesh.ring.rank} of {mesh.ring.size}\n"
            "       make it with SequenceMeta.of(..., ring_rank=mesh.ring.rank, ring_world=mesh.ring.size)"
        )


def check_exchange(axes: dict[str, int], q: Tensor, k: Tensor, meta: SequenceMeta, mesh: ParallelMesh) -> None:
    """That the shard is this rank's part of one cut for Ulysses, and that its heads can be exchanged.

    Args:
        axes: of `check_block`.

    Raises:
        ShapeError: neither.
    """
    if (meta.ulysses_rank, meta.ulysses_world) != (mesh.ulysses.rank, mesh.ulysses.size):
        raise ShapeError(
            f"{mesh.prefix} meta is of ulysses rank {meta.ulysses_rank} of {meta.ulysses_world}, but this process is "
            f"ulysses rank {mesh.ulysses.rank} of {mesh.ulysses.size}\n"
            "       make it with SequenceMeta.of(..., ulysses_rank=mesh.ulysses.rank, ulysses_world=mesh.ulysses.size)"
        )
    check_local(axes, meta.padded_mask, meta.ring_world * mesh.ulysses.size, meta.padded_len)
    if problems := ulysses_problems(axes["h"], axes["hk"], ulysses=mesh.ulysses.size, ring=meta.ring_world):
        raise ShapeError(format_problems(f"the heads of q {list(q.shape)} and k {list(k.shape)}", problems))


def check_local(axes: dict[str, int], mask: AttentionMask, world: int, seq_len: int) -> None:
    """That tensors with these `axes` (of `check_block`) are a rank's share of `seq_len` over `world` ranks, and fit the mask.

    Raises:
        ShapeError: they are not, or do not.
    """
    if not isinstance(mask, AttentionMask):
        raise ShapeError(f"mask is a {type(mask).__name__}: it must come from longctx.masks, such as Causal()")
    if 0 in axes.values():
        raise ShapeError(f"nothing to attend to: {', '.join(f'{name} = {size}' for name, size in axes.items())}")
    if axes["sq"] != axes["sk"]:
        raise ShapeError(f"q has {axes['sq']} positions but k and v have {axes['sk']}; both are shards of one sequence")
    if axes["sq"] * world != seq_len:
        raise ShapeError(
            f"q, k and v hold {axes['sq']:_} positions each, but a rank's share of {seq_len:_} over a ring of {world} is "
            f"{seq_len // world:_}: the meta is of another sequence, or these are not shards of it"
        )
    if mask.batch is not None and mask.batch != axes["b"]:
        raise ShapeError(
            f"the mask distinguishes {mask.batch} sequences, but the batch of q, k and v has {axes['b']}: "
            "give one list of boundaries for each sequence, or one for all"
        )
