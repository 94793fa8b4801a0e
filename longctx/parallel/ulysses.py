"""Ulysses: ranks exchange their parts of a sequence for parts of the heads before attention, and back after it.

    before      every rank holds its tokens of all heads            "b s h d"
    attention   every rank holds all tokens of its heads            "b (u s) (h/u) d"
    after       every rank holds its tokens of all heads again      "b s h d"

The pieces of rank 0, 1, ... come one behind the other. Ranks that hold contiguous pieces of a ring shard, as `SequenceMeta`
cuts it, so get the ring shard itself, positions ascending; and a ring runs on it as if there were no Ulysses. Rank j gets
the j-th share of the query heads and the key heads that serve them.

One operator does the communication; that and ordinary torch around it make everything here differentiable. A message of
queries, keys and values together goes there, one of outputs comes back; the same again in backward, the other way.

Activation checkpointing that keeps `ALL_TO_ALL_OP` sends nothing twice. It then holds, of each layer and beyond what the
ring keeps, the received queries, keys and values (which the ring's backward needs in any case) and the outputs of the
local tokens (with the ring's own, which are other tokens' and heads', twice the outputs of a layer without Ulysses).

Source: Jacobs et al. 2023 (arXiv 2309.14509); with a ring, Fang and Zhao 2024 (arXiv 2405.07719).
"""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.parallel.exchange import get_head_exchange


@torch.library.custom_op(
    "longctx::all_to_all", mutates_args=(), schema='(Tensor message, str exchange, str what="message") -> Tensor'
)
def _all_to_all(message: Tensor, exchange: str, what: str = "message") -> Tensor:
    """Hand `message[j]` to rank j of the `HeadExchange` of that handle; `[i]` of the result came from rank i.

    Collective. The result is contiguous. Its gradient is the same exchange of the gradient. `what` names the message in
    errors and reports.
    """
    return get_head_exchange(exchange).all_to_all(message.contiguous(), what=what)


@_all_to_all.register_fake
def _(message, exchange, what="message"):
    return message.new_empty(message.shape)


def _setup_context(ctx, inputs, output):
    _, ctx.exchange, ctx.what = inputs


def _backward(ctx, grad):
    return ALL_TO_ALL_OP(grad, ctx.exchange, f"backward, gradient of {ctx.what.removeprefix('forward, ')}"), None, None


_all_to_all.register_autograd(_backward, setup_context=_setup_context)

# What activation checkpointing must keep, so that nothing is sent a second time.
ALL_TO_ALL_OP = torch.ops.longctx.all_to_all.default


def to_heads(q: Tensor, k: Tensor, v: Tensor, *, world: int, exchange: str) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of the local tokens -> those of all tokens, for this rank's heads. One message.

    Args:
        q: "b s h d", h a multiple of `world`.
        k, v: "b s hk d", hk a multiple or a divisor of `world`.
        exchange: handle of the `HeadExchange` of `world` ranks.

    Returns:
        q: "b (u s) (h/u) d"; k, v: "b (u s) (max(hk, u)/u) d". Strided, with a unit last stride.
    """
    packed = [x.unflatten(2, (world, -1)).movedim(2, 0) for x in (q, repeat_heads(k, world), repeat_heads(v, world))]
    received = ALL_TO_ALL_OP(
        torch.cat(packed, 3), exchange, "forward, Q/K/V to heads"
    )  # [u, b, s, heads of q, k and v, d]
    whole = received.movedim(0, 1).flatten(1, 2)  # u b s n d -> b (u s) n d
    q, k, v = whole.split([x.shape[3] for x in packed], 2)
    return q, k, v


def repeat_heads(x: Tensor, world: int) -> Tensor:
    """Key heads for `world` ranks: each as often, one copy after the other, as it takes for every rank to have one.

    The gradient of a head is the sum over its copies, in fp32 and rounded once. "b s hk d" -> "b s max(hk, world) d".
    """
    copies = max(1, world // x.shape[2])
    return x if copies == 1 else x.unsqueeze(3).expand(-1, -1, -1, copies, -1).flatten(2, 3)


def to_sequence(out: Tensor, *, world: int, exchange: str) -> Tensor:
    """Outputs of all tokens for this rank's heads -> those of the local tokens: "b (u s) (h/u) d" -> "b s h d"."""
    message = out.unflatten(1, (world, -1)).movedim(1, 0)  # b (u s) n d -> u b s n d
    return ALL_TO_ALL_OP(message, exchange, "forward, output to tokens").movedim(0, 2).flatten(2, 3)


def lse_to_sequence(lse: Tensor, *, world: int, exchange: str) -> Tensor:
    """The same for lse: "b (h/u) (u s)" -> "b h s"."""
    message = lse.unflatten(2, (world, -1)).movedim(2, 0)  # b n (u s) -> u b n s
    return ALL_TO_ALL_OP(message, exchange, "forward, lse to tokens").movedim(0, 1).flatten(1, 2)
