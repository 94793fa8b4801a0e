"""Attention over a ring as a pair of operators: how a scheme of communication becomes something torch can differentiate,
compile and checkpoint.

A scheme is two functions, forward and backward. As custom operators they are one opaque node to a compiler, so that
messages keep their order, and activation checkpointing can keep the results of the forward one: then nothing is sent twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    " str kernel, float scale, str exchange, float softcap=0.0, Tensor? sinks=None"
)

# Where these begin among the arguments of either operator.
_FIRST_OF_FORWARD, _FIRST_OF_BACKWARD = 0, 5
# Where they name the hops, the rows of these, the moves and the exchange, counted from the first.
_HOPS, _ROWS, _MOVES, _EXCHANGE = 3, 4, 5, 11


class RingPlan(NamedTuple):
    """What an operator is told of the hops and messages of a rank, beside tensors and numbers of the call; CPU tensors.

    Args:
        hops, rows: `pack_hops`.
        moves, pieces, order, size: as the scheme says; empty and 0 where it has no use for them.
    """

    hops: Tensor
    rows: Tensor
    moves: Tensor
    pieces: Tensor
    order: Tensor
    size: int


class Operators(NamedTuple):
    """The operators of a scheme. `rest` is a `RingPlan`, kernel, scale, exchange, softcap and sinks.

    Args:
        forward: (q, k, v, *rest) -> out, lse, held.
        backward: (dout, dlse, out, lse, held, q, k, v, *rest) -> dq, dk, dv, dsinks.
        held_shape: (k, hops, size) -> the shape of `held`.
    """

    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    held_shape: Callable[[Tensor, Tensor, int], tuple[int, ...]]


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
            "b h s", and what backward needs of the messages, of k's dtype. All contiguous and new. `ring` is the
            `RingExchange` of the handle that the operator gets.
        backward: (dout, dlse, out, lse, held, and the arguments of forward) -> dq, dk, dv, dsinks (empty without sinks).
            dout is contiguous.
        held_shape: (k, hops, size) -> the shape of what is held.
        num_keys: keys of each hop of `hops`, given the moves.
    """
    forward_op = torch.library.custom_op(
        f"longctx::{name}_attention",
        _noted(forward, _FIRST_OF_FORWARD, FORWARD_PRODUCTS, num_keys),
        mutates_args=(),
        schema=f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    )
    backward_op = torch.library.custom_op(
        f"longctx::{name}_attention_backward",
        _noted(backward, _FIRST_OF_BACKWARD, BACKWARD_PRODUCTS, num_keys),
        mutates_args=(),
        schema=f"(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor held, {_ARGUMENTS})"
        " -> (Tensor, Tensor, Tensor, Tensor)",
    )
    registered = Operators(
        getattr(torch.ops.longctx, f"{name}_attention").default,
        getattr(torch.ops.longctx, f"{name}_attention_backward").default,
        held_shape,
    )

    @forward_op.register_fake
    def _(q, k, v, hops, rows, moves, pieces, order, size, kernel, scale, exchange, softcap=0.0, sinks=None):
        b, s, h, _ = q.shape
        lse = q.new_empty((b, h, s), dtype=state_dtype(q.dtype))
        return q.new_empty(q.shape), lse, k.new_empty(held_shape(k, hops, size))

    @backward_op.register_fake
    def _(dout, dlse, out, lse, held, q, k, v, hops, rows, moves, pieces, order, size, kernel, scale, exchange,
          softcap=0.0, sinks=None):  # fmt: skip
        dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks

    def setup_context(ctx, inputs, output):
        *tensors, ctx.size, ctx.kernel, ctx.scale, ctx.exchange, ctx.softcap, sinks = inputs
        ctx.save_for_backward(*output, sinks, *tensors)
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    def differentiate(ctx, dout, dlse, _):
        out, lse, held, sinks, *tensors = ctx.saved_tensors
        # Gradients of sums and means come as expanded tensors, whose strides are 0.
        dout = torch.zeros_like(out) if dout is None else dout.contiguous()
        dq, dk, dv, dsinks = registered.backward(
            dout, dlse, out, lse, held, *tensors, ctx.size, ctx.kernel, ctx.scale, ctx.exchange, ctx.softcap, sinks
        )
        return dq, dk, dv, *[None] * 10, None if sinks is None else dsinks

    forward_op.register_autograd(differentiate, setup_context=setup_context)
    SCHEMES[name] = registered
    return registered


def _relay(q, k, v, hops, rows, moves, pieces, order, size, *rest):
    return RING_ATTENTION_OP(q, k, v, hops, rows, *rest)


def _relay_backward(dout, dlse, out, lse, held, q, k, v, hops, rows, moves, pieces, order, size, *rest):
    return RING_ATTENTION_BACKWARD_OP(dout, dlse, q, k, v, out, lse, held, hops, rows, *rest)


def _relay_holds(k: Tensor, hops: Tensor, size: int) -> tuple[int, ...]:
    return (2, *k.shape) if hops.shape[0] > 1 else (0,)


SCHEMES["relay"] = Operators(_relay, _relay_backward, _relay_holds)


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
