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

from longctx.kernels import Direction, SoftmaxState, block_kind, get_kernel
from longctx.kernels.merge import merge_block
from longctx.kernels.pieces import Piece, PiecewiseAttention, add_gradients, plain_pieces, refuse_softcap
from longctx.masks import KeyRange

log = logging.getLogger(__name__)

_KINDS = ("empty", "full", "causal", "rectangle")
# Head dims above 128 were measured with this version (9.19); older ones are not known to have a backward for them.
_LARGE_HEADS_VERSION = 91900
_NO_SOFTCAP = "torch's interface to it has no softcap"


class CudnnAttention(PiecewiseAttention):
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

    def check_options(self, scale: float, softcap: float) -> None:
        refuse_softcap(self.name, softcap, _NO_SOFTCAP)

    def pieces(self, key_range: KeyRange, sq: int, sk: int) -> Iterator[Piece]:
        """Each full, or causal with as many keys as rows."""
        if key_range.kind != "band":
            assert key_range.kind != "rows" or key_range.rectangle, "select_kernel gives it no other intervals"
            yield from plain_pieces(key_range, sq, sk)
            return
        assert block_kind(key_range) == "causal", "select_kernel gives it no other bands"
        both = min(sq, sk)
        yield Piece(slice(0, both), slice(0, both), KeyRange.causal())
        if sq > sk:
            yield Piece(slice(sk, sq), slice(0, sk), KeyRange.full())

    def attend(self, q, k, v, visible: KeyRange, *, scale, softcap, state, final) -> SoftmaxState:
        if _too_short(q, k):
            return get_kernel("triton").forward(q, k, v, visible, scale=scale, state=state, final=final)
        out, lse = _forward(q, k, v, visible.kind == "band", scale)
        if state is None:
            out = out.to(q.dtype if final else torch.float32, memory_format=torch.contiguous_format)
            return SoftmaxState(out, lse)
        merge_block(state, out, lse)
        return state

    def differentiate(
        self, dout, q, k, v, lse, delta, visible: KeyRange, *, scale, softcap, out, dq_acc, dk_acc, dv_acc, fresh
    ) -> None:
        if _too_short(q, k):
            get_kernel("triton").backward(
                dout, q, k, v, lse, delta, visible, scale=scale, out=out,
                dq_acc=dq_acc, dk_acc=dk_acc, dv_acc=dv_acc, fresh=fresh,
            )  # fmt: skip
            return
        grads = _backward(dout, q, k, v, out, lse, visible.kind == "band", scale)
        add_gradients(dq_acc, dk_acc, dv_acc, grads, fresh)


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
