"""Ulysses: ranks exchange their parts of a sequence for parts of the heads before attention, and back after it.

    before      every rank holds its tokens of all heads            "b s h d"
    attention   every rank holds all tokens of its heads            "b (u s) (h/u) d"
    after       every rank holds its tokens of all heads again      "b s h d"

The pieces of rank 0, 1, ... come one behind the other. Ranks that hold contiguous pieces of a ring shard, as `SequenceMeta`
cuts it, so get the ring shard itself, positions ascending; and a ring runs on it as if there were no Ulysses. Rank j gets
the j-th share of the query heads and the key heads that serve them.

A rank's heads go in chunks: while it attends with one, the queries, keys and values of the next come and the outputs of the
last go. Backward likewise, the gradients of outputs coming and those of queries, keys and values going.

    messages    in 0 | in 1        | out 0, in 2 | out 1 ...      out c-1
    compute          | attention 0 | attention 1 | ...  attention c-1 |

What no attention hides is the first chunk's way in and the last one's way out, 1/c of all. One chunk hides nothing, in as few
messages and calls of the kernel as can be. (Messages beside the projections that make q, k and v hide less: the queries come
last of these and are most of the bytes, and the outputs' way back and both ways of the backward pass have no such neighbour.)

What came stays for the backward pass, more than all else that a layer keeps; or, of long shards, comes again (`holds`).

One operator does all of it, exchange and attention: a compiler sees one opaque node, so messages keep their order, and activation
checkpointing that keeps its results (`ULYSSES_ATTENTION_OP`) computes attention once.

Source: Jacobs et al. 2023 (arXiv 2309.14509); with a ring, Fang and Zhao 2024 (arXiv 2405.07719); heads in chunks, Yao et al.
2024 (arXiv 2408.16978), which chunks the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from longctx.kernels import state_dtype
from longctx.parallel.degrees import possible_chunks
from longctx.parallel.exchange import Rotation
from longctx.parallel.head_exchange import enter_heads
from longctx.parallel.operator import SCHEMES, RingPlan

_RING_ARGUMENTS = (
    "Tensor hops, Tensor rows, Tensor moves, Tensor pieces, Tensor order, SymInt size, SymInt groups, str kernel, float scale,"
    " str exchange, float softcap, Tensor? sinks, str scheme, str heads, SymInt world, SymInt chunks, bool holds"
)


class HeadChunk(NamedTuple):
    """Heads that attend together.

    Args:
        queries: which of a rank's query heads; keys: which of its key heads serve them.
        is_first, is_last: of the chunks that these key heads serve: they come with the first one, and their gradients go
            with the last.
    """

    queries: slice
    keys: slice
    is_first: bool
    is_last: bool


def head_chunks(num_heads: int, num_kv_heads: int, chunks: int) -> list[HeadChunk]:
    """A rank's heads in so many chunks: of whole groups of query heads, or with more chunks than key heads, of parts of them.

    Args:
        chunks: one of `longctx.parallel.degrees.possible_chunks`.
    """
    assert chunks in possible_chunks(num_heads, num_kv_heads, ring=1), f"{chunks} chunks of {num_heads}/{num_kv_heads}"
    q, parts = num_heads // chunks, max(1, chunks // num_kv_heads)
    k = max(1, num_kv_heads // chunks)
    return [
        HeadChunk(
            slice(i * q, (i + 1) * q),
            slice(i // parts * k, (i // parts + 1) * k),
            is_first=i % parts == 0,
            is_last=(i + 1) % parts == 0,
        )
        for i in range(chunks)
    ]


def exchanged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    plan: RingPlan,
    scheme: str,
    kernel: str,
    scale: float,
    ring: str,
    heads: str,
    world: int,
    chunks: int,
    holds: bool = True,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of the local tokens, all heads, by way of this rank's heads of all tokens. Differentiable, collective.

    Args:
        q: "b s h d", h a multiple of `world`.
        k, v: "b s hk d", hk a multiple or a divisor of `world`.
        plan: of the ring inside, for the key heads of one chunk; `scheme`: the name of its strategy.
        ring: handle of the ring's `RingExchange`; heads: of the `HeadExchange` of `world` ranks, at least two.
        chunks: of this rank's heads, one of `longctx.parallel.degrees.possible_chunks`.
        holds: whether q, k, v and out of this rank's heads stay for the backward pass. Else they are sent again, from what
            autograd and the caller keep of the local tokens.
        sinks: [h / world], of this rank's heads.

    Returns:
        out "b s h d" in q's dtype; lse "b h s" fp32, without `with_lse` empty.
    """
    out, lse, _ = ULYSSES_ATTENTION_OP(
        q, repeat_heads(k, world), repeat_heads(v, world), *plan, kernel, scale, ring, softcap, sinks, scheme, heads, world,
        chunks, holds, with_lse,
    )  # fmt: skip
    return out, lse


def repeat_heads(x: Tensor, world: int) -> Tensor:
    """Key heads for `world` ranks: each as often, one copy after the other, as it takes for every rank to have one.

    The gradient of a head is the sum over its copies, in fp32 and rounded once. "b s hk d" -> "b s max(hk, world) d".
    """
    copies = max(1, world // x.shape[2])
    return x if copies == 1 else x.unsqueeze(3).expand(-1, -1, -1, copies, -1).flatten(2, 3)


@torch.library.custom_op(
    "longctx::ulysses_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_RING_ARGUMENTS}, bool with_lse) -> (Tensor, Tensor, Tensor[])",
)
def _ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hops: Tensor,
    rows: Tensor,
    moves: Tensor,
    pieces: Tensor,
    order: Tensor,
    size: int,
    groups: int,
    kernel: str,
    scale: float,
    exchange: str,
    softcap: float,
    sinks: Tensor | None,
    scheme: str,
    heads: str,
    world: int,
    chunks: int,
    holds: bool,
    with_lse: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """out, lse (empty if not asked for), and of each chunk what backward needs: q, k and v packed as they came and out (both empty
    without `holds`), lse, and what the scheme holds. Arguments as `exchanged_attention`; here hk is a multiple of `world`."""
    todo = head_chunks(q.shape[2] // world, k.shape[2] // world, chunks)
    mail = _Mail(heads, world, chunks)
    rest = (hops, rows, moves, pieces, order, size, groups, kernel, scale, exchange, softcap)
    result = q.new_empty(q.shape)
    result_lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]) if with_lse else (0,), dtype=state_dtype(q.dtype))
    kept: list[Tensor] = []

    def send(i: int) -> Rotation:
        parts = [(q, todo[i].queries), *((x, todo[i].keys) for x in (k, v) if todo[i].is_first)]
        return mail.to_heads(parts, "forward, Q/K/V to heads", i)

    coming = send(0)
    leaving: list[_Leaving] = []
    block: tuple[Tensor, Tensor] | None = None
    for i, chunk in enumerate(todo):
        following = send(i + 1) if i + 1 < chunks else None
        whole = _whole(coming.wait())
        mine, block = _unpack(whole, chunk, block)
        out, lse, held = SCHEMES[scheme].forward(mine, *block, *rest, _of(sinks, chunk))
        kept += [whole, out, lse, held] if holds else [q.new_empty(0), q.new_empty(0), lse, held]
        sent = [mail.to_tokens([out], [(result, chunk.queries)], "forward, output to tokens", i)]
        if with_lse:
            target = (result_lse.transpose(1, 2), chunk.queries)
            sent.append(mail.to_tokens([lse.transpose(1, 2)], [target], "forward, lse to tokens", i))
        # What the chunk before sent had this one's attention to hide behind.
        _place(leaving, world)
        leaving = sent
        coming = coming if following is None else following
    _place(leaving, world)
    return result, result_lse, kept


@torch.library.custom_op(
    "longctx::ulysses_attention_backward",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor? dlse, Tensor[] kept, Tensor[] again, {_RING_ARGUMENTS}, SymInt num_kv_heads)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def _ulysses_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    kept: Sequence[Tensor],
    again: Sequence[Tensor],
    hops: Tensor,
    rows: Tensor,
    moves: Tensor,
    pieces: Tensor,
    order: Tensor,
    size: int,
    groups: int,
    kernel: str,
    scale: float,
    exchange: str,
    softcap: float,
    sinks: Tensor | None,
    scheme: str,
    heads: str,
    world: int,
    chunks: int,
    holds: bool,
    num_kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv "b s h d", contiguous; dsinks of this rank's heads, empty without sinks.

    Args:
        again: without `holds` q, k, v and out of the local tokens, all heads.
    """
    todo = head_chunks(dout.shape[2] // world, num_kv_heads // world, chunks)
    mail = _Mail(heads, world, chunks)
    rest = (hops, rows, moves, pieces, order, size, groups, kernel, scale, exchange, softcap)
    dq = dout.new_empty(dout.shape)
    dk, dv = (dout.new_empty(_key_shape(dout, num_kv_heads)) for _ in range(2))
    dsinks: list[Tensor] = []

    def send(i: int) -> list[Rotation]:
        sent = []
        if not holds:
            q, k, v, out = again
            parts = [(q, todo[i].queries), *((x, todo[i].keys) for x in (k, v) if todo[i].is_first)]
            sent.append(mail.to_heads([*parts, (out, todo[i].queries)], "backward, Q/K/V and output to heads", i))
        sent.append(mail.to_heads([(dout, todo[i].queries)], "backward, gradient of output to tokens", i))
        if dlse is not None:
            parts = [(dlse.transpose(1, 2), todo[i].queries)]
            sent.append(mail.to_heads(parts, "backward, gradient of lse to tokens", i))
        return sent

    coming = send(0)
    leaving: list[_Leaving] = []
    block: tuple[Tensor, Tensor] | None = None
    total: list[Tensor] = []
    for i, chunk in enumerate(todo):
        following = send(i + 1) if i + 1 < chunks else []
        arrived = [_whole(flying.wait()) for flying in coming]
        whole, out, lse, held = kept[4 * i : 4 * i + 4]
        if not holds:
            came, n = arrived.pop(0), _size(chunk.queries)
            whole, out = came[:, :, :-n], came[:, :, -n:]
        mine, block = _unpack(whole, chunk, block)
        mine_dlse = arrived[1].transpose(1, 2).contiguous() if dlse is not None else None
        grads = SCHEMES[scheme].backward(
            arrived[0].contiguous(), mine_dlse, out, lse, held, mine, *block, *rest, _of(sinks, chunk)
        )
        dsinks.append(grads[3])
        total = (
            list(grads[1:3])
            if chunk.is_first
            else [x.to(state_dtype(x.dtype)) + y for x, y in zip(total, grads[1:3], strict=True)]
        )
        parts, targets = [grads[0]], [(dq, chunk.queries)]
        if chunk.is_last:
            parts += [x.to(dout.dtype) for x in total]
            targets += [(dk, chunk.keys), (dv, chunk.keys)]
        sent = [mail.to_tokens(parts, targets, "backward, gradient of Q/K/V to heads", i)]
        _place(leaving, world)
        coming, leaving = following, sent
    _place(leaving, world)
    return dq, dk, dv, torch.cat(dsinks)


@_ulysses_attention.register_fake
def _(q, k, v, hops, rows, moves, pieces, order, size, groups, kernel, scale, exchange, softcap, sinks, scheme, heads, world,
      chunks, holds, with_lse):  # fmt: skip
    b, s, _, d = q.shape
    kept = []
    for chunk in head_chunks(q.shape[2] // world, k.shape[2] // world, chunks):
        n, keys = _size(chunk.queries), _size(chunk.keys)
        block = k.new_empty((b, s * world, keys, d))
        kept += [
            q.new_empty((b, s * world, n + 2 * keys * chunk.is_first, d) if holds else (0,)),
            q.new_empty((b, s * world, n, d) if holds else (0,)),
            q.new_empty((b, n, s * world), dtype=state_dtype(q.dtype)),
            k.new_empty(SCHEMES[scheme].held_shape(block, hops, size, groups)),
        ]
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]) if with_lse else (0,), dtype=state_dtype(q.dtype))
    return q.new_empty(q.shape), lse, kept


@_ulysses_attention_backward.register_fake
def _(dout, dlse, kept, again, hops, rows, moves, pieces, order, size, groups, kernel, scale, exchange, softcap, sinks, scheme,
      heads, world, chunks, holds, num_kv_heads):  # fmt: skip
    dsinks = dout.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    dk, dv = (dout.new_empty(_key_shape(dout, num_kv_heads)) for _ in range(2))
    return dout.new_empty(dout.shape), dk, dv, dsinks


def _setup_context(ctx, inputs, output):
    q, k, v, *plan, ctx.size, ctx.groups, ctx.kernel, ctx.scale, ctx.exchange, ctx.softcap, sinks, ctx.scheme, ctx.heads, \
        ctx.world, ctx.chunks, ctx.holds, _ = inputs  # fmt: skip
    ctx.num_kv_heads = k.shape[2]
    ctx.out_like = q.shape, q.dtype, q.device
    ctx.num_kept = len(output[2])
    ctx.save_for_backward(sinks, *plan, *output[2], *(() if ctx.holds else (q, k, v, output[0])))
    ctx.mark_non_differentiable(*output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dout, dlse, _):
    sinks, hops, rows, moves, pieces, order, *saved = ctx.saved_tensors
    kept, again = saved[: ctx.num_kept], saved[ctx.num_kept :]
    if dout is None:
        shape, dtype, device = ctx.out_like
        dout = torch.zeros(shape, dtype=dtype, device=device)
    dq, dk, dv, dsinks = _BACKWARD_OP(
        dout, dlse, kept, again, hops, rows, moves, pieces, order, ctx.size, ctx.groups, ctx.kernel, ctx.scale, ctx.exchange,
        ctx.softcap, sinks, ctx.scheme, ctx.heads, ctx.world, ctx.chunks, ctx.holds, ctx.num_kv_heads,
    )  # fmt: skip
    return dq, dk, dv, *[None] * 11, None if sinks is None else dsinks, *[None] * 6


_ulysses_attention.register_autograd(_differentiate, setup_context=_setup_context)

# What activation checkpointing must keep, so that attention is never computed and no message sent a second time.
ULYSSES_ATTENTION_OP = torch.ops.longctx.ulysses_attention.default
_BACKWARD_OP = torch.ops.longctx.ulysses_attention_backward.default

# A message on its way to the ranks of the tokens, and where its parts go: (tensor "b s (u h) ...", heads of each rank's).
_Leaving = tuple[Rotation, list[tuple[Tensor, slice]]]


class _Mail:
    """The messages of one call, which name their chunk if there are several."""

    def __init__(self, handle: str, world: int, chunks: int) -> None:
        self._handle, self._world, self._chunks = handle, world, chunks

    def to_heads(self, parts: Sequence[tuple[Tensor, slice]], what: str, chunk: int) -> Rotation:
        """Start sending of each tensor "b s (u h) ..." the heads `slice` of every rank's h to that rank."""
        return self._post([x.unflatten(2, (self._world, -1))[:, :, :, n].movedim(2, 0) for x, n in parts], what, chunk)

    def to_tokens(
        self, parts: Sequence[Tensor], targets: list[tuple[Tensor, slice]], what: str, chunk: int
    ) -> _Leaving:
        """Start sending of each tensor "b (u s) n ..." every rank's s to that rank, which puts them into `targets`."""
        return self._post([x.unflatten(1, (self._world, -1)).movedim(1, 0) for x in parts], what, chunk), targets

    def _post(self, parts: list[Tensor], what: str, chunk: int) -> Rotation:
        """Of parts "u b s n ..."."""
        what += f", chunk {chunk + 1} of {self._chunks}" * (self._chunks > 1)
        message = parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, 3)
        return enter_heads(self._handle).all_to_all(message, what=what)


def _whole(received: Tensor) -> Tensor:
    """u b s n ... -> b (u s) n ..., contiguous."""
    return received.movedim(0, 1).flatten(1, 2)


def _place(leaving: Sequence[_Leaving], world: int) -> None:
    """Wait for what came to this rank's tokens, and put it where it goes."""
    for flying, targets in leaving:
        parts = flying.wait().split([_size(n) for _, n in targets], 3)
        for part, (x, n) in zip(parts, targets, strict=True):
            x.unflatten(2, (world, -1))[:, :, :, n].copy_(part.movedim(0, 2))


def _unpack(
    whole: Tensor, chunk: HeadChunk, block: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Queries of the chunk, and the keys and values that serve them: those that came with them or, if none did, `block`."""
    n, keys = _size(chunk.queries), _size(chunk.keys)
    if chunk.is_first:
        block = whole[:, :, n : n + keys], whole[:, :, n + keys :]
    assert block is not None, "the first chunk brings keys"
    return whole[:, :, :n], block


def _of(sinks: Tensor | None, chunk: HeadChunk) -> Tensor | None:
    return None if sinks is None else sinks[chunk.queries]


def _size(heads: slice) -> int:
    return heads.stop - heads.start


def _key_shape(dout: Tensor, num_kv_heads: int) -> tuple[int, ...]:
    b, s, _, d = dout.shape
    return (b, s, num_kv_heads, d)
