"""Attention over a ring in which every rank gathers the keys that it needs and attends to all of them at once.

One call of the kernel for each group of heads: no carried state and no half-empty last wave of a kernel at every hop. The
keys of one group of heads are gathered while the group before is computed, so two groups bound the memory. Only what the
own queries see is sent, in the order of positions, so that what a row sees is one interval again. Backward gathers again
and sends the gradients of each group straight home, where they are summed in fp32: the reduce-scatter of an all-gather.

Source: all-gathered keys with heads in groups, as in Llama 3's context parallelism (arXiv 2407.21783, section 3.3.2).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from longctx.kernels import SoftmaxState, select_kernel
from longctx.kernels.sinks import add_sinks
from longctx.parallel.exchange import RingExchange, Trade
from longctx.parallel.moves import Move
from longctx.parallel.operator import attention_operators
from longctx.parallel.ring import accumulator, backward_kernel, begin_backward, cached_hops
from longctx.parallel.routes import Route, unpack_routes


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
    """out, lse, and nothing that is held.

    Args:
        hops, rows, moves, pieces, order: `GatherPlan`; size: groups of heads, a divisor of the key heads.
    """
    ((_, key_range),) = cached_hops(hops, rows)
    chosen = None if key_range.kind == "empty" else select_kernel(kernel, q, key_range, softcap)
    gathering = _Gathering(ring, k, v, moves, pieces, order, size)
    parts = []
    for group, block in enumerate(gathering.blocks("forward")):
        if chosen is not None:
            heads = _heads(q, group, size)
            state = chosen.forward(
                q[:, :, heads], *block, key_range, scale=scale, softcap=softcap, final=sinks is None
            )  # fmt: skip
            if sinks is not None:
                add_sinks(state, sinks[heads])
            parts.append(SoftmaxState(state.out.to(q.dtype), state.lse))
    if chosen is None:
        parts.append(SoftmaxState.empty_like(q))
        if sinks is not None:
            add_sinks(parts[0], sinks)
        parts[0].out = parts[0].out.to(q.dtype)
    if len(parts) == 1:
        return parts[0].out, parts[0].lse, k.new_empty(0)
    return torch.cat([p.out for p in parts], 2), torch.cat([p.lse for p in parts], 1), k.new_empty(0)


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
    ((_, key_range),) = cached_hops(hops, rows)
    chosen = None if key_range.kind == "empty" else backward_kernel(kernel, q, key_range, softcap, dlse)
    dout, delta, dsinks = begin_backward(q, dout, dlse, out, lse, sinks)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    gathering = _Gathering(ring, k, v, moves, pieces, order, size)
    homecoming: _Homecoming | None = None
    for group, block in enumerate(gathering.blocks("backward")):
        heads = _heads(q, group, size)
        dq_acc = accumulator(q[:, :, heads])
        grads = gathering.gradients(dq_acc.dtype)
        if chosen is None:
            grads.zero_()
        else:
            chosen.backward(
                dout[:, :, heads], q[:, :, heads], *block, lse[:, heads], delta[:, heads], key_range,
                scale=scale, softcap=softcap, out=out[:, :, heads],
                dq_acc=dq_acc, dk_acc=grads[0], dv_acc=grads[1], fresh=True,
            )  # fmt: skip
        dq[:, :, heads] = dq_acc
        if homecoming is not None:
            homecoming.arrive()
        homecoming = _Homecoming(gathering, grads, group)
    assert homecoming is not None, "there is at least one group"
    homecoming.arrive()
    return dq, gathering.dk, gathering.dv, dsinks


def _heads(x: Tensor, group: int, groups: int) -> slice:
    """The heads of x ("b s h d") that belong to that group of heads."""
    share = x.shape[2] // groups
    return slice(group * share, (group + 1) * share)


class _Gathering:
    """The keys and values that a rank needs, group of heads by group of heads."""

    def __init__(
        self, ring: RingExchange, k: Tensor, v: Tensor, moves: Tensor, pieces: Tensor, order: Tensor, groups: int
    ) -> None:
        assert k.shape[2] % groups == 0, f"{k.shape[2]} key heads in {groups} groups"
        self.ring, self.k, self.v, self.groups = ring, k, v, groups
        self.routes = unpack_routes(moves, pieces, order)
        self.num_keys = order.shape[0]
        self.dk, self.dv = torch.empty(k.shape, dtype=k.dtype, device=k.device), torch.empty_like(k)

    def shape(self, num_keys: int) -> tuple[int, ...]:
        """K and V, or their gradients, of so many keys of one group of heads."""
        b, _, hk, d = self.k.shape
        return (2, b, num_keys, hk // self.groups, d)

    def room(self, dtype: torch.dtype) -> int:
        """Bytes that one message has at most, on any rank."""
        return 2 * self.k.numel() // self.groups * dtype.itemsize

    def gradients(self, dtype: torch.dtype) -> Tensor:
        """Where the gradients of the keys of a group go: whatever was there."""
        return self.ring.buffer("gathered gradients", self.shape(self.num_keys), dtype, self.k.device)

    def blocks(self, direction: str) -> Iterator[tuple[Tensor, Tensor]]:
        """K and V of each group, "b g hk/groups d"; those of the next group are on their way when one is handed out."""
        coming = self._fetch(0, direction)
        for group in range(self.groups):
            block = self._arrive(*coming)
            if group + 1 < self.groups:
                coming = self._fetch(group + 1, direction)
            yield block[0], block[1]

    def _fetch(self, group: int, direction: str) -> tuple[Tensor, list[tuple[Trade, Route, Tensor | None]]]:
        heads = _heads(self.k, group, self.groups)
        own = (self.k[:, :, heads], self.v[:, :, heads])
        block = self.ring.buffer("gathered", self.shape(self.num_keys), self.k.dtype, self.k.device)
        trades: list[tuple[Trade, Route, Tensor | None]] = []
        for hop, route in enumerate(self.routes[1:], 1):
            loose = None
            if route.is_loose:
                purpose = f"keys of hop {route.move.distance}"
                loose = self.ring.buffer(purpose, self.shape(route.move.receive.size), self.k.dtype, self.k.device)
            trade = self.ring.trade(
                [x[n, slice(*keys)] for x in own for n in range(len(x)) for keys, _ in route.sent],
                route.parts(block) if loose is None else list(loose.flatten(0, 1)),
                route.move.distance,
                room=self.room(self.k.dtype),
                what=f"{direction}, K/V for hop {hop}, heads {heads.start} to {heads.stop - 1}",
            )
            trades.append((trade, route, loose))
        # After the messages were posted: nothing of the own keys has to wait for them.
        for x, mine in zip(block, own, strict=True):
            self.routes[0].place(x, mine)
        return block, trades

    def _arrive(self, block: Tensor, trades: list[tuple[Trade, Route, Tensor | None]]) -> Tensor:
        for trade, route, loose in trades:
            trade.wait()
            if loose is not None:
                for x, arrived in zip(block, loose, strict=True):
                    route.place(x, arrived)
        return block


class _Homecoming:
    """The gradients of a group of heads on their way to the owners of the keys, and those of the own keys to here."""

    def __init__(self, gathering: _Gathering, grads: Tensor, group: int) -> None:
        self._gathering, self._grads = gathering, grads
        heads = self._heads = _heads(gathering.k, group, gathering.groups)
        ring = gathering.ring
        dtype = ring.grad_dtype or grads.dtype
        self._trades: list[tuple[Trade, Route, Tensor]] = []
        for hop, route in enumerate(gathering.routes[1:], 1):
            purpose = f"home from hop {route.move.distance}"
            received = ring.buffer(purpose, gathering.shape(route.move.send.size), dtype, grads.device)
            leaving = [route.take(x) for x in grads] if route.is_loose else []
            parts = [x[n] for x in leaving for n in range(len(x))] if route.is_loose else route.parts(grads)
            starts = [(keys.first - route.move.send.first, keys.size) for keys, _ in route.sent]
            trade = ring.trade(
                [x.to(dtype) for x in parts],
                [x[n, a : a + size] for x in received for n in range(len(x)) for a, size in starts],
                -route.move.distance,
                room=gathering.room(dtype),
                what=f"backward, dK/dV of hop {hop}, heads {heads.start} to {heads.stop - 1}",
            )
            self._trades.append((trade, route, received))

    def arrive(self) -> None:
        """Wait, and put the sum of all parts into `dk` and `dv` of the gathering."""
        own = self._gathering.routes[0]
        for trade, route, received in self._trades:
            trade.wait()
            for x, arrived in zip(self._grads, received, strict=True):
                route.add_sent(own, x, arrived)
        for total, x in zip((self._gathering.dk, self._gathering.dv), self._grads, strict=True):
            own.collect(x, total[:, :, self._heads])


def _held_shape(k: Tensor, hops: Tensor, size: int) -> tuple[int, ...]:
    return (0,)


def _num_keys(moves: Sequence[Move]) -> list[int]:
    return [sum(move.receive.size for move in moves)]


GATHER_ATTENTION = attention_operators("gather", _forward, _backward, _held_shape, _num_keys)
