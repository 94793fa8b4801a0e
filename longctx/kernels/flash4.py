"""Block attention through flash-attn-4 (the package `flash_attn.cute`), where it is installed: its kernels for Hopper.

Like cuDNN it attends to one block on its own, which is then merged into the carried state, and its backward takes out and
lse from the caller: told those of the whole row, it gives the block's part of the whole gradient. It makes delta of out and
dout itself. The package is imported when a block is computed, and by nothing before.

Source: Shah et al. 2024 (arXiv 2407.08608) for the schedule; the interface is that of flash-attn-4 4.0.0b36.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from functools import cache

import torch

from longctx.errors import KernelError
from longctx.kernels import Direction, SoftmaxState, begin_fresh, check_block
from longctx.kernels.merge import merge_block
from longctx.masks import UNBOUNDED, KeyRange

PACKAGE = "flash-attn-4"
# The release whose arguments these calls are written for. Another may order or mean them differently.
KNOWN_VERSIONS = ("4.0.0b36",)
_KINDS = ("empty", "full", "causal", "band", "rectangle")


class FlashAttention4:
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
        return "its softcap is not used here" if softcap else None

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
        if (part := _part(key_range, q, k)) is None:
            return SoftmaxState.empty_like(q) if state is None else state
        rows, keys, window = part
        # Without return_lse it keeps the row sums only of tensors that are to be differentiated.
        out, lse, *_ = _interface()._flash_attn_fwd(
            q[:, rows], k[:, keys], v[:, keys], softmax_scale=scale, return_lse=True, **window
        )
        if state is None and out.shape == q.shape:
            return SoftmaxState(out if final else out.to(torch.float32), lse)
        state = SoftmaxState.empty_like(q) if state is None else state
        merge_block(SoftmaxState(state.out[:, rows], state.lse[:, :, rows]), out, lse)
        return state

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
        if (part := _part(key_range, q, k)) is None:
            if fresh:
                dk_acc.zero_()
                dv_acc.zero_()
            return
        rows, keys, window = part
        dk_part, dv_part = (begin_fresh(acc, keys) if fresh else acc[:, keys] for acc in (dk_acc, dv_acc))
        # Every one of `rows` sees a key of this block, so none has an lse of -inf.
        dq, dk, dv = _interface()._flash_attn_bwd(
            q[:, rows], k[:, keys], v[:, keys], out[:, rows], dout[:, rows], lse[:, :, rows].contiguous(),
            softmax_scale=scale, **window,
        )  # fmt: skip
        dq_acc[:, rows].add_(dq)
        for acc, grad in ((dk_part, dk), (dv_part, dv)):
            if fresh:
                acc.copy_(grad)
            else:
                acc.add_(grad)


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


def _refuse_softcap(softcap: float) -> None:
    if softcap:
        raise KernelError(f"softcap is {softcap}, but kernel 'flash4' is used without; use kernel 'auto'")


def _part(key_range: KeyRange, q: torch.Tensor, k: torch.Tensor) -> tuple[slice, slice, dict] | None:
    """(rows, keys, mask): the smallest rectangle that holds what is seen, and the mask in it; None where nothing is seen.

    flash-attn-4 aligns the last row with the last key: row i of n sees the keys i + m - n - left to i + m - n + right of m.
    In a rectangle cut so that every row sees a key, both are at least 0, which is what it takes for limits.
    """
    sq, sk = q.shape[1], k.shape[1]
    if q.numel() == 0 or k.numel() == 0 or key_range.kind == "empty":
        return None
    if key_range.kind == "full":
        return slice(0, sq), slice(0, sk), {}
    if key_range.kind != "band":
        found = key_range.rectangle
        assert found is not None, "select_kernel gives flash-attn-4 no other intervals than rectangles"
        key_range.bounds(sq, sk)  # refuses intervals of other lengths
        return slice(*found[:2]), slice(*found[2:]), {}
    lo, hi = key_range.lo, key_range.hi
    assert isinstance(lo, int)
    assert isinstance(hi, int)
    # Row i sees [i + lo, i + hi): something if that ends after the first key and begins before the last one's end.
    first_row, last_row = max(0, 1 - hi), min(sq, sk - lo)
    if first_row >= last_row or lo >= hi:
        return None
    first_key, last_key = max(0, first_row + lo), min(sk, last_row - 1 + hi)
    rows, keys = slice(first_row, last_row), slice(first_key, last_key)
    # How far the last row's place among the keys is from its number.
    shift = (last_key - first_key) - (last_row - first_row)
    left = None if lo == -UNBOUNDED else shift - (lo + first_row - first_key)
    right = None if hi == UNBOUNDED else hi + first_row - first_key - 1 - shift
    if left is None and right == 0:
        return rows, keys, {"causal": True}
    return rows, keys, {"window_size_left": left, "window_size_right": right}
