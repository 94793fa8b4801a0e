"""Row-wise companions of block attention: merging a foreign block into the softmax state, and the backward's delta.

Both are bound by memory: on a GPU each is one fused kernel that reads its inputs once and makes no fp32 copy of them.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl

from longctx.kernels import SoftmaxState
from longctx.kernels.tiles import INTERPRETING, num_tiles, padded, stride_args

# Rows per program: 32 rows of 128 fp32 are 16 KB in flight, enough to fill the memory pipe with 4 warps.
_ROWS = 32


def merge_block(state: SoftmaxState, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Fold a block that was attended to on its own into `state`, in place.

    Args:
        state: may be views; what was seen before.
        out: "b s h d", the block's normalised output in any dtype, any strides with a unit last one.
        lse: "b h s", its log sum of exponentials, natural; -inf where the block shows nothing.

    Source: Milakov and Gimelshein 2018 (arXiv 1805.02867), section 3.1.
    """
    b, s, h, d = out.shape
    if out.numel() == 0:
        return
    if not _on_triton(out):
        new = torch.logaddexp(state.lse, lse)
        base = new.masked_fill(new == float("-inf"), 0.0)
        kept, added = (torch.exp(x - base).transpose(1, 2)[..., None] for x in (state.lse, lse))
        state.out.copy_(state.out * kept + out * added)
        state.lse.copy_(new)
        return
    with _device(out):
        _merge_kernel[(num_tiles(s, _ROWS), h, b)](
            state.out, state.lse, out, lse, s,
            **stride_args(o=state.out, x=out),
            stride_lb=state.lse.stride(0), stride_lh=state.lse.stride(1), stride_ls=state.lse.stride(2),
            stride_yb=lse.stride(0), stride_yh=lse.stride(1), stride_ys=lse.stride(2),
            D=d, D_PAD=padded(d), ROWS=_ROWS,
        )  # fmt: skip


def fused_row_delta(out: torch.Tensor, dout: torch.Tensor) -> torch.Tensor:
    """`row_delta` on a GPU: sum over d of out * dout in fp32, "b h s"; any strides with a unit last one."""
    b, s, h, d = out.shape
    delta = torch.empty(b, h, s, dtype=torch.float32, device=out.device)
    if out.numel() == 0:
        return delta.zero_()
    out, dout = (t if t.stride(-1) == 1 or d == 1 else t.contiguous() for t in (out, dout))
    with _device(out):
        _row_delta_kernel[(num_tiles(s, _ROWS), h, b)](
            out, dout, delta, s, h, **stride_args(o=out, g=dout), D=d, D_PAD=padded(d), ROWS=_ROWS
        )
    return delta


def _on_triton(t: torch.Tensor) -> bool:
    half = t.dtype in (torch.float16, torch.bfloat16, torch.float32)
    return half and (t.is_cuda or (INTERPRETING and t.dtype != torch.bfloat16))


def _device(t: torch.Tensor):
    return torch.cuda.device(t.device if t.is_cuda else -1)


@triton.jit(do_not_specialize=["s"])
def _merge_kernel(
    OUT, LSE, X, Y, s,
    stride_ob, stride_os, stride_oh, stride_xb, stride_xs, stride_xh,
    stride_lb, stride_lh, stride_ls, stride_yb, stride_yh, stride_ys,
    D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """OUT, LSE: the state; X, Y: out and lse of the block."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    col = tl.arange(0, D_PAD)
    row_ok = row < s
    ok = row_ok[:, None] & (col < D)[None, :]
    lse_ptrs = LSE + batch * stride_lb + head * stride_lh + row * stride_ls
    old = tl.load(lse_ptrs, mask=row_ok, other=float("-inf"))
    add = tl.load(Y + batch * stride_yb + head * stride_yh + row * stride_ys, mask=row_ok, other=float("-inf"))
    top = tl.maximum(old, add)
    # Rows that neither has seen anything of: -inf - -inf would be nan.
    base = tl.where(top == float("-inf"), 0.0, top)
    kept = tl.exp(old - base)
    added = tl.exp(add - base)
    total = kept + added
    unseen = total == 0.0
    total = tl.where(unseen, 1.0, total)
    out_ptrs = OUT + batch * stride_ob + head * stride_oh + row[:, None] * stride_os + col[None, :]
    x_ptrs = X + batch * stride_xb + head * stride_xh + row[:, None] * stride_xs + col[None, :]
    out = tl.load(out_ptrs, mask=ok, other=0.0)
    x = tl.load(x_ptrs, mask=ok, other=0.0).to(tl.float32)
    tl.store(out_ptrs, out * (kept / total)[:, None] + x * (added / total)[:, None], mask=ok)
    tl.store(lse_ptrs, tl.where(unseen, float("-inf"), base + tl.log(total)), mask=row_ok)


@triton.jit(do_not_specialize=["s", "num_heads"])
def _row_delta_kernel(
    OUT, DOUT, DELTA, s, num_heads,
    stride_ob, stride_os, stride_oh, stride_gb, stride_gs, stride_gh,
    D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    col = tl.arange(0, D_PAD)
    ok = (row < s)[:, None] & (col < D)[None, :]
    out = tl.load(
        OUT + batch * stride_ob + head * stride_oh + row[:, None] * stride_os + col[None, :], mask=ok, other=0.0
    )
    dout = tl.load(
        DOUT + batch * stride_gb + head * stride_gh + row[:, None] * stride_gs + col[None, :], mask=ok, other=0.0
    )
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(DELTA + (batch * num_heads + head) * s + row, delta, mask=row < s)
