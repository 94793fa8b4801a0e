"""Block attention through flash-attn-4 (the package `flash_attn.cute`), where it is installed: its kernels for Hopper.

Like cuDNN it attends to one block on its own, which is then merged into the carried state, and its backward takes out and
lse from the caller: told those of the whole row, it gives the block's part of the whole gradient. It makes delta of out and
dout itself. The package is imported when a block is computed, and by nothing before.

Source: Shah et al. 2024 (arXiv 2407.08608) for the schedule; the interface is that of flash-attn-4 4.0.0b36.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterator
from functools import cache

import torch

from longctx.errors import KernelError
from longctx.kernels import Direction, SoftmaxState
from longctx.kernels.merge import merge_block
from longctx.kernels.pieces import Piece, PiecewiseAttention, add_gradients, plain_pieces, refuse_softcap
from longctx.masks import UNBOUNDED, KeyRange

PACKAGE = "flash-attn-4"
# The release whose arguments these calls are written for. Another may order or mean them differently.
KNOWN_VERSIONS = ("4.0.0b36",)
_KINDS = ("empty", "full", "causal", "band", "rectangle")
_NO_SOFTCAP = "its own is not used here"


class FlashAttention4(PiecewiseAttention):
    """flash-attn-4's kernels for Hopper: fp16 and bf16, head dims that are multiples of 8 up to 256, grouped heads.

    Blocks may be empty, full, a band (causal, windows) or a rectangle; rows with intervals of their own, and a softcap, are
    left to other kernels. Error grows by one 16-bit rounding of a block's part per block; the state itself stays in fp32. The
    backward sums dq in no fixed order.
    """

    name = "flash4"

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
        if (missing := flash4_missing()) is not None:
            return missing
        if device.type != "cuda" or torch.version.hip is not None:
            return "needs an NVIDIA GPU"
        if (capability := torch.cuda.get_device_capability(device)) != (9, 0):
            return f"taken on compute capability 9.0 only, this GPU has {'.'.join(map(str, capability))}"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"{dtype} is not one of float16, bfloat16"
        if head_dim % 8 or not 8 <= head_dim <= 256:
            return f"head dim {head_dim} is not a multiple of 8 up to 256"
        if kind not in _KINDS:
            return f"it knows blocks that are {', '.join(_KINDS)}, not {kind!r}"
        return f"softcap: {_NO_SOFTCAP}" if softcap else None

    def check_options(self, scale: float, softcap: float) -> None:
        refuse_softcap(self.name, softcap, _NO_SOFTCAP)

    def pieces(self, key_range: KeyRange, sq: int, sk: int) -> Iterator[Piece]:
        if key_range.kind == "band":
            yield from _band_piece(key_range, sq, sk)
            return
        assert key_range.kind != "rows" or key_range.rectangle, "select_kernel gives it no other intervals"
        yield from plain_pieces(key_range, sq, sk)

    def attend(self, q, k, v, visible: KeyRange, *, scale, softcap, state, final) -> SoftmaxState:
        # Without return_lse it keeps the row sums only of tensors that are to be differentiated.
        out, lse, *_ = _interface()._flash_attn_fwd(
            q, k, v, softmax_scale=scale, return_lse=True, **_limits(visible, q.shape[1], k.shape[1])
        )
        if state is None:
            return SoftmaxState(out if final else out.to(torch.float32), lse)
        merge_block(state, out, lse)
        return state

    def differentiate(
        self, dout, q, k, v, lse, delta, visible: KeyRange, *, scale, softcap, out, dq_acc, dk_acc, dv_acc, fresh
    ) -> None:
        # Every row of a piece sees a key of this block, so none has an lse of -inf.
        grads = _interface()._flash_attn_bwd(
            q, k, v, out, dout, lse.contiguous(), softmax_scale=scale, **_limits(visible, q.shape[1], k.shape[1])
        )
        add_gradients(dq_acc, dk_acc, dv_acc, grads, fresh)


@cache
def flash4_missing() -> str | None:
    """None if a flash-attn-4 that this code knows is installed, else the reason."""
    # By the package's name: looking for its module would import `flash_attn`, which may be flash-attention 2.
    try:
        version = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return f"{PACKAGE} is not installed"
    if version not in KNOWN_VERSIONS:
        return f"{PACKAGE} {version} is installed, and this code is written for {', '.join(KNOWN_VERSIONS)}"
    return None


def _interface():
    try:
        return importlib.import_module("flash_attn.cute.interface")
    except ImportError as error:
        raise KernelError(f"kernel 'flash4' needs {PACKAGE}, which cannot be imported: {error}") from error


def _band_piece(key_range: KeyRange, sq: int, sk: int) -> Iterator[Piece]:
    """The smallest rectangle of rows and keys that holds what a band shows, with the band as it lies in there."""
    lo, hi = key_range.lo, key_range.hi
    assert isinstance(lo, int)
    assert isinstance(hi, int)
    # Row i sees [i + lo, i + hi): something if that ends after the first key and begins before the last one's end.
    first_row, last_row = max(0, 1 - hi), min(sq, sk - lo)
    if first_row >= last_row or lo >= hi:
        return
    first_key, last_key = max(0, first_row + lo), min(sk, last_row - 1 + hi)
    moved = first_row - first_key
    inside = KeyRange("band", lo if lo == -UNBOUNDED else lo + moved, hi if hi == UNBOUNDED else hi + moved)
    yield Piece(slice(first_row, last_row), slice(first_key, last_key), inside)


def _limits(visible: KeyRange, sq: int, sk: int) -> dict:
    """The mask of a piece in flash-attn-4's words.

    It aligns the last row with the last key: row i of sq sees the keys i + sk - sq - left to i + sk - sq + right of sk. In a
    rectangle cut so that every row sees a key, both are at least 0, which is what it takes for limits.
    """
    if visible.kind == "full":
        return {}
    lo, hi = visible.lo, visible.hi
    left = None if lo == -UNBOUNDED else sk - sq - lo
    right = None if hi == UNBOUNDED else hi - 1 - (sk - sq)
    return {"causal": True} if left is None and right == 0 else {"window_size_left": left, "window_size_right": right}
