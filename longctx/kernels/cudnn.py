"""Block attention through cuDNN, as torch ships it: the fastest kernels on Hopper, for the blocks that it knows.

cuDNN attends to one block on its own and returns 16-bit out and fp32 lse, which are then merged into the carried state.
Its backward is told the final out and lse of the whole row instead of the block's, which makes its dq, dk and dv the
block's part of the whole gradient.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache

import torch

from longctx.errors import KernelError
from longctx.kernels import Direction, SoftmaxState, begin_fresh, check_block, get_kernel
from longctx.kernels.merge import merge_block
from longctx.masks import KeyRange

log = logging.getLogger(__name__)

_KINDS = ("empty", "full", "causal", "rectangle")
# Head dims above 128 were measured with this version (9.19); older ones are not known to have a backward for them.
_LARGE_HEADS_VERSION = 91900
_NO_SOFTCAP = "torch's interface to it has no softcap"


class CudnnAttention:
    """cuDNN's fused attention: fp16 and bf16, head dims that are multiples of 8 up to 128, and 256 on Hopper.

    Blocks must be empty, causal, or a rectangle: an interval of rows that see one interval of keys. Error grows by one
    16-bit rounding of a block's part per block; the state itself stays in fp32.
    """

    name = "cudnn"

    def supports(
        self,
        *,
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int,
        kind: str,
        softcap: float = 0.0,
        direction: Direction = "forward",
    ) -> str | None:
        if device.type != "cuda" or torch.version.hip is not None:
            return "needs an NVIDIA GPU"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"{dtype} is not one of float16, bfloat16"
        capability, version = torch.cuda.get_device_capability(device), torch.backends.cudnn.version() or 0
        if capability < (8, 0) or version < 90000:
            return f"needs compute capability 8.0 and cuDNN 9.0 or later, this is {capability} with cuDNN {version}"
        if head_dim % 8 or not 8 <= head_dim <= 128:
            if head_dim != 256:
                return f"head dim {head_dim} is not a multiple of 8 up to 128, nor 256"
            if capability[0] not in (9, 10) or version < _LARGE_HEADS_VERSION:
                return (
                    f"head dim 256 needs Hopper or Blackwell with cuDNN 9.19, this is {capability} with cuDNN {version}"
                )
        if kind not in _KINDS:
            return f"it knows blocks that are {', '.join(_KINDS)}, not {kind!r}"
        return _NO_SOFTCAP if softcap else None

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        key_range: KeyRange,
        *,
        scale: float,
        softcap: float = 0.0,
        state: SoftmaxState | None = None,
        final: bool = False,
    ) -> SoftmaxState:
        check_block(q, k, v)
        _refuse_softcap(softcap)
        for rows, keys, is_causal in _parts(key_range, q, k):
            part = q[:, rows], k[:, keys], v[:, keys]
            if _too_short(*part[:2]):
                state = SoftmaxState.empty_like(q) if state is None else state
                part_state = SoftmaxState(state.out[:, rows], state.lse[:, :, rows])
                visible = KeyRange.causal() if is_causal else KeyRange.full()
                get_kernel("triton").forward(*part, visible, scale=scale, state=part_state)
                continue
            out, lse = _forward(*part, is_causal, scale)
            if state is None and out.shape == q.shape:
                out = out.to(q.dtype if final else torch.float32, memory_format=torch.contiguous_format)
                state = SoftmaxState(out, lse)
                continue
            state = SoftmaxState.empty_like(q) if state is None else state
            merge_block(SoftmaxState(state.out[:, rows], state.lse[:, :, rows]), out, lse)
        return SoftmaxState.empty_like(q) if state is None else state

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lse: torch.Tensor,
        delta: torch.Tensor,
        key_range: KeyRange,
        *,
        scale: float,
        softcap: float = 0.0,
        out: torch.Tensor,
        dq_acc: torch.Tensor,
        dk_acc: torch.Tensor,
        dv_acc: torch.Tensor,
        fresh: bool = False,
    ) -> None:
        check_block(q, k, v, dout=dout, out=out)
        _refuse_softcap(softcap)
        parts = list(_parts(key_range, q, k))
        if fresh and not parts:
            dk_acc.zero_()
            dv_acc.zero_()
        for i, (rows, keys, is_causal) in enumerate(parts):
            part = dout[:, rows], q[:, rows], k[:, keys], v[:, keys]
            is_first = fresh and i == 0
            dk_part, dv_part = (begin_fresh(acc, keys) if is_first else acc[:, keys] for acc in (dk_acc, dv_acc))
            if _too_short(*part[1:3]):
                visible = KeyRange.causal() if is_causal else KeyRange.full()
                get_kernel("triton").backward(
                    *part, lse[:, :, rows], delta[:, :, rows], visible, scale=scale, out=out[:, rows],
                    dq_acc=dq_acc[:, rows], dk_acc=dk_part, dv_acc=dv_part, fresh=is_first,
                )  # fmt: skip
                continue
            dq, dk, dv = _backward(*part, out[:, rows], lse[:, :, rows], is_causal, scale)
            # One pass each, without an fp32 copy of the gradient.
            dq_acc[:, rows].add_(dq)
            for acc, grad in ((dk_part, dk), (dv_part, dv)):
                if is_first:
                    acc.copy_(grad)
                else:
                    acc.add_(grad)


def _refuse_softcap(softcap: float) -> None:
    if softcap:
        raise KernelError(f"softcap is {softcap}, but kernel 'cudnn' has none ({_NO_SOFTCAP}); use kernel 'auto'")


def _parts(key_range: KeyRange, q: torch.Tensor, k: torch.Tensor) -> Iterator[tuple[slice, slice, bool]]:
    """(rows, keys, is_causal) of the pieces that a block is made of, each full or causal with as many keys as rows."""
    sq, sk = q.shape[1], k.shape[1]
    if q.numel() == 0 or k.numel() == 0 or key_range.kind == "empty":
        return
    if key_range.kind == "band":
        both = min(sq, sk)
        yield slice(0, both), slice(0, both), True
        if sq > sk:
            yield slice(sk, sq), slice(0, sk), False
    elif key_range.kind == "full":
        yield slice(0, sq), slice(0, sk), False
    else:
        found = key_range.rectangle
        assert found is not None, "select_kernel gives cuDNN no other intervals than rectangles"
        key_range.bounds(sq, sk)  # refuses intervals of other lengths
        first_row, last_row, first_key, last_key = found
        yield slice(first_row, last_row), slice(first_key, last_key), False


def _too_short(q: torch.Tensor, k: torch.Tensor) -> bool:
    if q.shape[1] > 1 and k.shape[1] > 1:
        return False
    _log_short()
    return True


@cache
def _log_short() -> None:
    log.info("blocks of one row or one key: triton (cuDNN refuses length 1)")


def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool, scale: float):
    """out "b s h d" in q's dtype, lse "b h s" fp32."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, True, 0.0, is_causal, False, scale=scale
    )
    return out.transpose(1, 2), lse.reshape(lse.shape[:3]).contiguous()


def _backward(dout, q, k, v, out, lse, is_causal: bool, scale: float):
    """dq, dk, dv "b s h d" in q's dtype."""
    # Dropout's random state: nothing reads it when the probability is 0.
    unused = torch.zeros((), dtype=torch.int64, device=q.device)
    grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *(t.transpose(1, 2) for t in (dout, q, k, v, out)), lse.unsqueeze(-1).contiguous(), unused, unused,
        None, None, None, q.shape[1], k.shape[1], 0.0, is_causal, scale=scale,
    )  # fmt: skip
    return tuple(g.transpose(1, 2) for g in grads)
