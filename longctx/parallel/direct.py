"""Attention over a ring in which keys go straight to whom they serve, and their gradients straight home.

At step i a rank sends to the rank i ahead only the keys that this one's queries see, as `moves` computes, and attends to
what it got at step i - 1. Backward starts from the block that came last, which was kept or comes again, and goes through the
steps the other way; the gradients of a block are sent to its owner while the next block is computed, and summed there in fp32.
Beside a relay that is half of the keys for half of the hops with zigzag, and far less with windows and packed documents.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longctx.kernels import SoftmaxState, select_kernel, state_dtype
from longctx.kernels.sinks import add_sinks
from longctx.parallel.exchange import RingExchange, Trade
from longctx.parallel.moves import NOT_HELD, Move, Span, unpack_moves
from longctx.parallel.operator import attention_operators
from longctx.parallel.ring import accumulator, backward_kernel, begin_backward, cached_hops

Pair = tuple[Tensor, Tensor]


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hops: Tensor,
    rows: Tensor,
    moves: Tensor,
    pieces: Tensor,
    order: Tensor,
    size: int,
    kernel: str,
    scale: float,
    ring: RingExchange,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse, and the K/V that came last: [2, b, size, hk, d], empty where there is one hop or they are not held.

    Args:
        hops, rows, moves, size: `DirectPlan`; pieces, order: unused, empty.
    """
    todo, routes = cached_hops(hops, rows), unpack_moves(moves)
    # Chosen before the first message: a block that no kernel can do must not leave other ranks waiting.
    kernels = [None if kr.kind == "empty" else select_kernel(kernel, q, kr, softcap) for _, kr in todo]
    last = max((i for i, chosen in enumerate(kernels) if chosen is not None), default=0) if sinks is None else -1
    held = k.new_empty(_held_shape(k, hops, size))
    into = None if size == NOT_HELD else held
    block = (k, v)
    state: SoftmaxState | None = None
    for i, (_, key_range) in enumerate(todo):
        flying = None
        if i + 1 < len(todo):
            flying, coming = _fetch(ring, k, v, routes[i + 1], into if i + 2 == len(todo) else None, "forward", i + 1)
        chosen = kernels[i]
        if chosen is not None:
            state = chosen.forward(q, *block, key_range, scale=scale, softcap=softcap, state=state, final=i == last)
        if flying is not None:
            flying.wait()
            block = (coming[0], coming[1])
    state = SoftmaxState.empty_like(q) if state is None else state
    if sinks is not None:
        add_sinks(state, sinks)
    return state.out.to(q.dtype), state.lse, held


def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    held: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hops: Tensor,
    rows: Tensor,
    moves: Tensor,
    pieces: Tensor,
    order: Tensor,
    size: int,
    kernel: str,
    scale: float,
    ring: RingExchange,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv like q, k, v, contiguous; dsinks [h] of the local rows, empty without sinks."""
    todo, routes = cached_hops(hops, rows), unpack_moves(moves)
    kernels = [None if kr.kind == "empty" else backward_kernel(kernel, q, kr, softcap, dlse) for _, kr in todo]
    last, flying, block, riding = len(todo) - 1, None, held, None
    if last and size == NOT_HELD:
        flying, block = _fetch(ring, k, v, routes[last], None, "backward", last)
    dout, delta, dsinks = begin_backward(q, dout, dlse, out, lse, sinks)
    dq = accumulator(q)
    home = _Home(k)
    if flying is not None:
        flying.wait()

    def attend(i: int, block: Pair | Tensor, grads: Pair | Tensor, fresh: bool) -> None:
        chosen = kernels[i]
        assert chosen is not None, "empty hops have no kernel"
        chosen.backward(
            dout, q, block[0], block[1], lse, delta, todo[i][1], scale=scale, softcap=softcap, out=out,
            dq_acc=dq, dk_acc=grads[0], dv_acc=grads[1], fresh=fresh,
        )  # fmt: skip

    for i in range(last, 0, -1):
        flying = None
        if i > 1:
            flying, coming = _fetch(ring, k, v, routes[i - 1], None, "backward", i - 1)
        grads = ring.buffer("dkv", _block_shape(k, routes[i].receive.size), dq.dtype, k.device)
        if kernels[i] is not None:
            attend(i, block, grads, fresh=True)
        if riding is not None:
            home.add(riding)
        riding = _Riding(ring, k, grads, routes[i], i)
        if flying is not None:
            flying.wait()
            block = coming
    own, fresh = home.accumulators(is_last=riding is None or not riding.span.size)
    if kernels[0] is not None:
        attend(0, (k, v), own, fresh)
    elif fresh:
        for x in own:
            x.zero_()
    dk, dv = home.settle(own, riding)
    return dq.to(q.dtype), dk, dv, dsinks


def _held_shape(k: Tensor, hops: Tensor, size: int) -> tuple[int, ...]:
    return _block_shape(k, size) if hops.shape[0] > 1 and size != NOT_HELD else (0,)


def _num_keys(moves: Sequence[Move]) -> list[int]:
    return [move.receive.size for move in moves]


def _block_shape(k: Tensor, num_keys: int) -> tuple[int, ...]:
    """K and V of so many keys, or their gradients."""
    b, _, hk, d = k.shape
    return (2, b, num_keys, hk, d)


def _fetch(
    ring: RingExchange, k: Tensor, v: Tensor, move: Move, into: Tensor | None, direction: str, hop: int
) -> tuple[Trade, Tensor]:
    """Start sending own keys and values, and receiving what this rank needs of another's."""
    first, last = move.send
    receive = ring.buffer("kv", _block_shape(k, move.receive.size), k.dtype, k.device) if into is None else into
    trade = ring.trade(
        [k[:, first:last], v[:, first:last]],
        [receive[0], receive[1]],
        move.distance,
        room=2 * k.numel() * k.element_size(),
        what=f"{direction}, K/V for hop {hop}",
    )
    return trade, receive


class _Riding:
    """Gradients of one block on their way home, and those of the own keys `span` on their way here."""

    def __init__(self, ring: RingExchange, k: Tensor, grads: Tensor, move: Move, hop: int) -> None:
        dtype = ring.grad_dtype or grads.dtype
        wire = grads.to(dtype)
        self.span: Span = move.send
        self._received = ring.buffer("home", _block_shape(k, self.span.size), dtype, k.device)
        self._trade = ring.trade(
            [wire[0], wire[1]],
            [self._received[0], self._received[1]],
            -move.distance,
            room=2 * k.numel() * dtype.itemsize,
            what=f"backward, dK/dV of hop {hop}",
        )

    def arrived(self) -> Tensor:
        self._trade.wait()
        return self._received


class _Home:
    """The gradients of the own keys and values, summed in fp32 as they come home."""

    def __init__(self, k: Tensor) -> None:
        self._k = k
        self._sum: Pair | None = None

    def _empty(self, dtype: torch.dtype) -> Pair:
        # Two tensors, since both are results of one operator in the end.
        dk, dv = (torch.empty(self._k.shape, dtype=dtype, device=self._k.device) for _ in range(2))
        return dk, dv

    def add(self, riding: _Riding) -> None:
        arrived, (first, last) = riding.arrived(), riding.span
        if first == last:
            return
        if self._sum is None:
            self._sum = self._empty(state_dtype(self._k.dtype))
            for total in self._sum:
                total.zero_()
        for total, part in zip(self._sum, arrived, strict=True):
            total[:, first:last] += part

    def accumulators(self, is_last: bool) -> tuple[Pair, bool]:
        """What the own block's gradients are added to, and whether that holds nothing yet.

        With `is_last` no other part follows: what is the only block's is rounded once, by its kernel.
        """
        if self._sum is not None:
            return self._sum, False
        return self._empty(self._k.dtype if is_last else state_dtype(self._k.dtype)), True

    def settle(self, grads: Pair, riding: _Riding | None) -> Pair:
        """dk, dv in k's dtype: `grads` and the part that comes last, added and rounded in one pass."""
        arrived = riding.arrived() if riding is not None else None
        if arrived is None or riding is None or not riding.span.size:
            return grads[0].to(self._k.dtype), grads[1].to(self._k.dtype)
        first, last = riding.span
        result = self._empty(self._k.dtype)
        for total, own, theirs in zip(result, grads, arrived, strict=True):
            for outside in (slice(0, first), slice(last, None)):
                total[:, outside].copy_(own[:, outside])
            torch.add(own[:, first:last], theirs, out=total[:, first:last])
        return result


DIRECT_ATTENTION = attention_operators("direct", _forward, _backward, _held_shape, _num_keys)
