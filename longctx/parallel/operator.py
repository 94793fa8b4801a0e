"""Attention over a ring as a pair of operators: how a scheme of communication becomes something torch can differentiate,
compile and checkpoint.

A scheme is two functions, forward and backward. As custom operators they are one opaque node to a compiler, so that
messages keep their order, and activation checkpointing can keep the results of the forward one: then nothing is sent twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longctx.kernels import state_dtype
from longctx.parallel.exchange import get_exchange
from longctx.parallel.moves import Move, unpack_moves
from longctx.parallel.ring import (
    BACKWARD_PRODUCTS,
    FORWARD_PRODUCTS,
    RING_ATTENTION_BACKWARD_OP,
    RING_ATTENTION_OP,
    attention_flops,
    cached_hops,
)

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor hops, Tensor rows, Tensor moves, Tensor pieces, Tensor order, SymInt size,"
    " SymInt groups, str kernel, float scale, str exchange, float softcap=0.0, Tensor? sinks=None"
)

# Where these begin among the arguments of either operator.
_FIRST_OF_FORWARD, _FIRST_OF_BACKWARD = 0, 5
# Where they name the hops, the rows of these, the moves and the exchange, counted from the first.
_HOPS, _ROWS, _MOVES, _EXCHANGE = 3, 4, 5, 12


class RingPlan(NamedTuple):
    """What an operator is told of the hops and messages of a rank, beside tensors and numbers of the call; CPU tensors.

    Args:
        hops, rows: `pack_hops`.
        moves, pieces, order, size: as the scheme says; empty and 0 where it has no use for them.
        groups: of heads, which go through the ring one after the other, so that so many times less of them is in memory at
            a time. A divisor of the key heads.
    """

    hops: Tensor
    rows: Tensor
    moves: Tensor
    pieces: Tensor
    order: Tensor
    size: int
    groups: int = 1


class Operators(NamedTuple):
    """The operators of a scheme. `rest` is a `RingPlan`, kernel, scale, exchange, softcap and sinks.

    Args:
        forward: (q, k, v, *rest) -> out, lse, held.
        backward: (dout, dlse, out, lse, held, q, k, v, *rest) -> dq, dk, dv, dsinks.
        held_shape: (k, hops, size, groups) -> the shape of `held`.
    """

    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    held_shape: Callable[[Tensor, Tensor, int, int], tuple[int, ...]]


# The operators of each scheme by its name, which is how an operator around them is told which to use.
SCHEMES: dict[str, Operators] = {}


def attention_operators(
    name: str,
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]],
    held_shape: Callable[[Tensor, Tensor, int], tuple[int, ...]],
    num_keys: Callable[[Sequence[Move]], list[int]],
) -> Operators:
    """Register a scheme as `longctx::<name>_attention` and with `_backward`, differentiable in q, k, v and sinks.

    Args:
        forward: (q, k, v, hops, rows, moves, pieces, order, size, kernel, scale, ring, softcap, sinks) -> out like q, lse
            "b h s", and what backward needs of the messages, of k's dtype. All contiguous and new. Called for a group of heads
            at a time: q, k and v are views, sinks are of these heads. `ring` is the `RingExchange` of the handle that the
            operator gets.
        backward: (dout, dlse, out, lse, held, and the arguments of forward) -> dq, dk, dv, dsinks (empty without sinks).
            Likewise.
        held_shape: (k, hops, size) -> the shape of what is held of a group of heads.
        num_keys: keys of each hop of `hops`, given the moves.
    """

    def held_of_all(k: Tensor, hops: Tensor, size: int, groups: int) -> tuple[int, ...]:
        first, *rest = held_shape(k[:, :, _share(k, 0, groups)], hops, size)
        return (groups * first, *rest)

    forward_op = torch.library.custom_op(
        f"longctx::{name}_attention",
        _noted(partial(_forward_by_groups, forward), _FIRST_OF_FORWARD, FORWARD_PRODUCTS, num_keys),
        mutates_args=(),
        schema=f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    )
    backward_op = torch.library.custom_op(
        f"longctx::{name}_attention_backward",
        _noted(partial(_backward_by_groups, backward), _FIRST_OF_BACKWARD, BACKWARD_PRODUCTS, num_keys),
        mutates_args=(),
        schema=f"(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor held, {_ARGUMENTS})"
        " -> (Tensor, Tensor, Tensor, Tensor)",
    )
    registered = Operators(
        getattr(torch.ops.longctx, f"{name}_attention").default,
        getattr(torch.ops.longctx, f"{name}_attention_backward").default,
        held_of_all,
    )

    @forward_op.register_fake
    def _(q, k, v, hops, rows, moves, pieces, order, size, groups, kernel, scale, exchange, softcap=0.0, sinks=None):
        b, s, h, _ = q.shape
        lse = q.new_empty((b, h, s), dtype=state_dtype(q.dtype))
        return q.new_empty(q.shape), lse, k.new_empty(held_of_all(k, hops, size, groups))

    @backward_op.register_fake
    def _(dout, dlse, out, lse, held, q, k, v, hops, rows, moves, pieces, order, size, groups, kernel, scale, exchange,
          softcap=0.0, sinks=None):  # fmt: skip
        dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks

    def setup_context(ctx, inputs, output):
        *tensors, ctx.size, ctx.groups, ctx.kernel, ctx.scale, ctx.exchange, ctx.softcap, sinks = inputs
        ctx.save_for_backward(*output, sinks, *tensors)
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    def differentiate(ctx, dout, dlse, _):
        out, lse, held, sinks, *tensors = ctx.saved_tensors
        # Gradients of sums and means come as expanded tensors, whose strides are 0.
        dout = torch.zeros_like(out) if dout is None else dout.contiguous()
        dq, dk, dv, dsinks = registered.backward(
            dout, dlse, out, lse, held, *tensors, ctx.size, ctx.groups, ctx.kernel, ctx.scale, ctx.exchange, ctx.softcap, sinks
        )  # fmt: skip
        return dq, dk, dv, *[None] * 11, None if sinks is None else dsinks

    forward_op.register_autograd(differentiate, setup_context=setup_context)
    SCHEMES[name] = registered
    return registered


def _relay(q, k, v, hops, rows, moves, pieces, order, size, groups, *rest):
    assert groups == 1, "the relay passes all heads on at once"
    return RING_ATTENTION_OP(q, k, v, hops, rows, *rest)


def _relay_backward(dout, dlse, out, lse, held, q, k, v, hops, rows, moves, pieces, order, size, groups, *rest):
    return RING_ATTENTION_BACKWARD_OP(dout, dlse, q, k, v, out, lse, held, hops, rows, *rest)


def _relay_holds(k: Tensor, hops: Tensor, size: int, groups: int) -> tuple[int, ...]:
    return (2, *k.shape) if hops.shape[0] > 1 else (0,)


SCHEMES["relay"] = Operators(_relay, _relay_backward, _relay_holds)


def _share(x: Tensor, part: int, groups: int) -> slice:
    """The heads of x ("b s h d") that belong to that group."""
    each = x.shape[2] // groups
    return slice(part * each, (part + 1) * each)


def _forward_by_groups(
    forward, q, k, v, hops, rows, moves, pieces, order, size, groups, kernel, scale, ring, softcap=0.0, sinks=None
):
    """`forward` of one group of heads after the other."""
    rest = (hops, rows, moves, pieces, order, size, kernel, scale, ring, softcap)
    if groups == 1:
        return forward(q, k, v, *rest, sinks)
    b, s, h, _ = q.shape
    out, lse = q.new_empty(q.shape), q.new_empty((b, h, s), dtype=state_dtype(q.dtype))
    held = []
    for part in range(groups):
        heads, keys = _share(q, part, groups), _share(k, part, groups)
        # K and V once for all hops, which send parts of them.
        block = (x[:, :, keys].contiguous() for x in (k, v))
        out[:, :, heads], lse[:, heads], kept = forward(
            q[:, :, heads], *block, *rest, None if sinks is None else sinks[heads]
        )
        held.append(kept)
    return out, lse, torch.cat(held)


def _backward_by_groups(
    backward, dout, dlse, out, lse, held, q, k, v, hops, rows, moves, pieces, order, size, groups, kernel, scale, ring,
    softcap=0.0, sinks=None,
):  # fmt: skip
    """`backward` of one group of heads after the other: dq, dk and dv in fp32 are of one group at a time."""
    rest = (hops, rows, moves, pieces, order, size, kernel, scale, ring, softcap)
    if groups == 1:
        return backward(dout, dlse, out, lse, held, q, k, v, *rest, sinks)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dsinks = []
    for part, kept in enumerate(held.tensor_split(groups)):
        heads, keys = _share(q, part, groups), _share(k, part, groups)
        dq[:, :, heads], dk[:, :, keys], dv[:, :, keys], mine = backward(
            dout[:, :, heads],
            None if dlse is None else dlse[:, heads],
            out[:, :, heads],
            lse[:, heads],
            kept,
            q[:, :, heads],
            *(x[:, :, keys].contiguous() for x in (k, v)),
            *rest,
            None if sinks is None else sinks[heads],
        )
        dsinks.append(mine)
    return dq, dk, dv, torch.cat(dsinks)


def _noted(
    scheme: Callable[..., Any], first: int, products: int, num_keys: Callable[[Sequence[Move]], list[int]]
) -> Callable[..., Any]:
    """`scheme` with the exchange itself for its handle, and what it computes noted in the journal of that."""

    def operate(*args: Any) -> Any:
        ring = get_exchange(args[first + _EXCHANGE])

        def count() -> float:
            todo = cached_hops(args[first + _HOPS], args[first + _ROWS])
            return attention_flops(args[first], todo, num_keys(unpack_moves(args[first + _MOVES])), products)

        ring.journal.begin_attention(count)
        result = scheme(*args[: first + _EXCHANGE], ring, *args[first + _EXCHANGE + 1 :])
        ring.journal.end_attention()
        return result

    return operate
