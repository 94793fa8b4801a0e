"""Ring attention as an operator: blocks of attention between messages, forward and backward.

Forward: the softmax state stays, keys and values move forward round the ring. Backward: starts from the block of keys
and values that came last and moves backward, and the gradients of each block ride with it, so they end at home. The next
message is always posted before the compute that hides it.

Both are custom operators, so that a compiler sees one opaque node, communication is in a fixed order, and activation
checkpointing can keep the outputs (`RING_ATTENTION_OP`): then nothing is sent twice.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from longctx.errors import KernelError
from longctx.kernels import BlockAttention, SoftmaxState, kernel_names, row_delta, select_kernel, state_dtype
from longctx.kernels.sinks import add_sinks, sink_gradient
from longctx.masks import KeyRange
from longctx.parallel.exchange import Rotation, get_exchange
from longctx.parallel.schedule import CACHED_SCHEDULES, unpack_hops

Hops = list[tuple[int, KeyRange]]

# Kernels whose backward makes delta of out and dout, whatever delta it is given.
_OWN_DELTA = ("cudnn", "flash4")

# Matrix products of a block, each 2 FLOPs for every visible pair, head and element of the head: q k^T and p v; in
# backward q k^T once more, dp, dv, dk and dq.
FORWARD_PRODUCTS = 2
BACKWARD_PRODUCTS = 5


@torch.library.custom_op(
    "longctx::ring_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor hops, Tensor rows, str kernel, float scale, str exchange,"
    " float softcap=0.0, Tensor? sinks=None) -> (Tensor, Tensor, Tensor)",
)
def _ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hops: Tensor,
    rows: Tensor,
    kernel: str,
    scale: float,
    exchange: str,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of local queries to all keys of the ring.

    Args:
        q, k, v: "b s h d", "b s hk d", "b s hk d".
        hops, rows: `pack_hops`.
        kernel: a name for `select_kernel`.
        exchange: the handle of a `RingExchange`; empty for a ring of one.
        softcap: as `BlockAttention`; 0 for none.
        sinks: [h], a logit for each head that joins every row's softmax once.

    Returns:
        out: like q, contiguous. lse: "b h s" fp32, with the sinks in it. held_kv: [2, b, s, hk, d], the block that came last, from which the
        backward pass starts; empty where nothing came.
    """
    ring = get_exchange(exchange)
    todo = cached_hops(hops, rows)
    # Chosen before the first message: a block that no kernel can do must not leave other ranks waiting.
    kernels = [None if kr.kind == "empty" else select_kernel(kernel, q, kr, softcap) for _, kr in todo]
    ring.journal.begin_attention(lambda: attention_flops(q, todo, [k.shape[1]] * len(todo), FORWARD_PRODUCTS))
    message = torch.stack((k, v)) if len(todo) > 1 else k.new_empty(0)
    held = torch.empty_like(message)
    block = (k, v)
    # The sinks join in fp32 what the last block leaves.
    last = max((i for i, chosen in enumerate(kernels) if chosen is not None), default=0) if sinks is None else -1
    state: SoftmaxState | None = None
    for i, (distance, key_range) in enumerate(todo):
        flying = None
        if i + 1 < len(todo):
            into = held if i + 2 == len(todo) else None
            gap = todo[i + 1][0] - distance
            flying = ring.rotate(message, gap, purpose="kv", what=f"forward, K/V for hop {i + 1}", into=into)
        chosen = kernels[i]
        if chosen is not None:
            state = chosen.forward(q, *block, key_range, scale=scale, softcap=softcap, state=state, final=i == last)
        if flying is not None:
            message = flying.wait()
            block = (message[0], message[1])
    state = SoftmaxState.empty_like(q) if state is None else state
    if sinks is not None:
        add_sinks(state, sinks)
    out = state.out.to(q.dtype)
    ring.journal.end_attention()
    return out, state.lse, held


@torch.library.custom_op(
    "longctx::ring_attention_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor held_kv,"
    " Tensor hops, Tensor rows, str kernel, float scale, str exchange, float softcap=0.0, Tensor? sinks=None)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def _ring_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    held_kv: Tensor,
    hops: Tensor,
    rows: Tensor,
    kernel: str,
    scale: float,
    exchange: str,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv like q, k, v, contiguous; dsinks [h] of the local rows, empty without sinks. Uses no more than the inputs and outputs of the forward operator."""
    ring = get_exchange(exchange)
    todo = cached_hops(hops, rows)
    kernels = [None if kr.kind == "empty" else backward_kernel(kernel, q, kr, softcap, dlse) for _, kr in todo]
    ring.journal.begin_attention(lambda: attention_flops(q, todo, [k.shape[1]] * len(todo), BACKWARD_PRODUCTS))
    dout, delta, dsinks = begin_backward(q, dout, dlse, out, lse, sinks)
    dq = accumulator(q)
    message = held_kv
    riding: Rotation | None = None

    def attend(i: int, block_k: Tensor, block_v: Tensor, dk_acc: Tensor, dv_acc: Tensor) -> None:
        chosen = kernels[i]
        assert chosen is not None, "empty hops have no kernel"
        chosen.backward(
            dout,
            q,
            block_k,
            block_v,
            lse,
            delta,
            todo[i][1],
            scale=scale,
            softcap=softcap,
            out=out,
            dq_acc=dq,
            dk_acc=dk_acc,
            dv_acc=dv_acc,
            fresh=True,
        )

    for i in range(len(todo) - 1, 0, -1):
        back = todo[i - 1][0] - todo[i][0]
        coming = None
        if i > 1:
            coming = ring.rotate(message, back, purpose="kv", what=f"backward, K/V for hop {i - 1}")
        grads = None
        if kernels[i] is not None:
            grads = torch.empty(message.shape, dtype=state_dtype(k.dtype), device=k.device)
            attend(i, message[0], message[1], grads[0], grads[1])
        if riding is not None:
            # What later hops found for this block flew here while this hop was computed.
            arrived = riding.wait()
            grads = arrived if grads is None else grads.add_(arrived)
        elif grads is None:
            grads = accumulator(message)
        wire = grads.to(ring.grad_dtype or grads.dtype)
        riding = ring.rotate(wire, back, purpose="grads", what=f"backward, dK/dV after hop {i}")
        if coming is not None:
            message = coming.wait()
    # What is the only block's is rounded once, by its kernel.
    dtype = k.dtype if riding is None else state_dtype(k.dtype)
    dk, dv = (torch.empty(x.shape, dtype=dtype, device=x.device) for x in (k, v))
    if kernels[0] is not None:
        attend(0, k, v, dk, dv)
    else:
        dk.zero_()
        dv.zero_()
    if riding is not None:
        arrived = riding.wait()
        dk += arrived[0]
        dv += arrived[1]
    grads_qkv = dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
    ring.journal.end_attention()
    return *grads_qkv, dsinks


@_ring_attention.register_fake
def _(q, k, v, hops, rows, kernel, scale, exchange, softcap=0.0, sinks=None):
    b, s, h, _ = q.shape
    lse = q.new_empty((b, h, s), dtype=state_dtype(q.dtype))
    held = k.new_empty((2, *k.shape) if hops.shape[0] > 1 else (0,))
    return q.new_empty(q.shape), lse, held


@_ring_attention_backward.register_fake
def _(dout, dlse, q, k, v, out, lse, held_kv, hops, rows, kernel, scale, exchange, softcap=0.0, sinks=None):
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def _setup_context(ctx, inputs, output):
    q, k, v, hops, rows, ctx.kernel, ctx.scale, ctx.exchange, ctx.softcap, sinks = inputs
    out, lse, held = output
    ctx.save_for_backward(q, k, v, out, lse, held, hops, rows, sinks)
    ctx.mark_non_differentiable(held)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse, _):
    q, k, v, out, lse, held, hops, rows, sinks = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv, dsinks = RING_ATTENTION_BACKWARD_OP(
        dout, dlse, q, k, v, out, lse, held, hops, rows, ctx.kernel, ctx.scale, ctx.exchange, ctx.softcap, sinks
    )
    return dq, dk, dv, None, None, None, None, None, None, None if sinks is None else dsinks


_ring_attention.register_autograd(_backward, setup_context=_setup_context)

# What activation checkpointing must keep (out, lse and the held block), so that attention is never computed and its
# messages are never sent a second time.
RING_ATTENTION_OP = torch.ops.longctx.ring_attention.default
RING_ATTENTION_BACKWARD_OP = torch.ops.longctx.ring_attention_backward.default


def attention_flops(q: Tensor, todo: Hops, num_keys: Sequence[int], products: int) -> float:
    """What this rank computes for the pairs that its mask shows, with so many keys at each hop."""
    b, s, h, d = q.shape
    pairs = sum(key_range.pairs(b, s, n) for (_, key_range), n in zip(todo, num_keys, strict=True))
    return 2.0 * products * h * d * pairs


def begin_backward(
    q: Tensor, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, sinks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What every backward pass starts with: dout, contiguous; delta "b h s"; dsinks of the local rows."""
    # Gradients of sums and means come as expanded tensors, whose strides are 0.
    dout = dout.contiguous()
    delta = row_delta(out, dout)
    if dlse is not None:
        # d lse / d score = p, and the scores' gradient is p * (dp - delta).
        delta = delta - dlse.to(delta.dtype)
    dsinks = q.new_empty(0) if sinks is None else sink_gradient(sinks, lse, delta)
    return dout, delta, dsinks


def accumulator(like: Tensor) -> Tensor:
    """Zeros of that shape in the dtype that gradients are summed in, contiguous."""
    return torch.zeros(like.shape, dtype=state_dtype(like.dtype), device=like.device)


def backward_kernel(name: str, q: Tensor, key_range: KeyRange, softcap: float, dlse: Tensor | None) -> BlockAttention:
    """The kernel for one block's backward. A gradient of lse reaches the scores through delta alone."""
    chosen = select_kernel(name, q, key_range, softcap, "backward")
    if dlse is None or chosen.name not in _OWN_DELTA:
        return chosen
    if name != "auto":
        raise KernelError(f"kernel {name!r} computes delta itself, so it has no gradient for lse; use kernel 'auto'")
    refused = []
    for other in kernel_names():
        if other not in _OWN_DELTA:
            try:
                return select_kernel(other, q, key_range, softcap, "backward")
            except KernelError as error:
                refused.append(str(error))
    raise KernelError("no attention kernel has a gradient for lse here\n" + "\n".join(refused))


# table and rows of a schedule -> its hops, whose key ranges remember what they made on each device. The tensors are kept
# with the entry, so no other tensor can come to lie at the same address; they are never written to.
_unpacked: OrderedDict[tuple[int, int], tuple[Tensor, Tensor, Hops]] = OrderedDict()
_unpacked_lock = threading.Lock()


def cached_hops(table: Tensor, rows: Tensor) -> Hops:
    """`unpack_hops`, remembered: the same key ranges for the same tensors."""
    key = (table.data_ptr(), rows.data_ptr())
    with _unpacked_lock:
        if key not in _unpacked:
            _unpacked[key] = (table, rows, unpack_hops(table, rows))
            if len(_unpacked) > CACHED_SCHEDULES:
                _unpacked.popitem(last=False)
        _unpacked.move_to_end(key)
        return _unpacked[key][2]
