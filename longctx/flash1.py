"""Attention by FlashAttention-1's schedule, for the benchmark: what its successors improved on.

One program a batch and head, and no more: a few long sequences leave most of a GPU idle. The outer loop goes over blocks of
keys, the inner one over blocks of queries, so that every step reads the running output and its statistics from memory,
rescales them and writes them back. The backward has the same loops and reads and writes dq at every step.

Source: Dao et al. 2022 (arXiv 2205.14135), algorithms 1, 2 and 4.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Rows of q and of k a step, forward and backward: as large as leaves the loops next to no spills on sm_90. Not measured
# against others, which would gain little: the schedule is bound by what it reads and writes.
_TILE = {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 8}
_BACKWARD_TILE = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8}
HEAD_DIMS = (16, 32, 64, 128)


@triton.jit
def _rows(base, start, end, D: tl.constexpr, ROWS: tl.constexpr, stride):
    """Addresses of the rows [start, start + ROWS) of one head and which of them are before `end`, [ROWS, D]."""
    row = start + tl.arange(0, ROWS)
    ptrs = base + row.to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :]
    return ptrs, (row < end)[:, None]


@triton.jit
def _scores(q, k, m0, n0, s, qk_scale, IS_CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Scores in base 2, -inf where the mask hides."""
    row, key = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    seen = (key < s)[None, :]
    if IS_CAUSAL:
        seen = seen & (key[None, :] <= row[:, None])
    return tl.where(seen, tl.dot(q, tl.trans(k)) * qk_scale, float("-inf"))


@triton.jit
def _forward_kernel(
    Q, K, V, OUT, M, L, qk_scale, s, num_heads, stride_b, stride_s, stride_h,
    D: tl.constexpr, IS_CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    batch, head = (tl.program_id(0) // num_heads).to(tl.int64), tl.program_id(0) % num_heads
    base = batch * stride_b + head * stride_h
    stats = tl.program_id(0).to(tl.int64) * s
    for n0 in range(0, s, BLOCK_N):
        key_ptrs, keys_ok = _rows(K + base, n0, s, D, BLOCK_N, stride_s)
        k = tl.load(key_ptrs, mask=keys_ok, other=0.0)
        key_ptrs, keys_ok = _rows(V + base, n0, s, D, BLOCK_N, stride_s)
        v = tl.load(key_ptrs, mask=keys_ok, other=0.0)
        first = n0 // BLOCK_M * BLOCK_M if IS_CAUSAL else 0
        for m0 in range(first, s, BLOCK_M):
            ptrs, ok = _rows(Q + base, m0, s, D, BLOCK_M, stride_s)
            x = _scores(tl.load(ptrs, mask=ok, other=0.0), k, m0, n0, s, qk_scale, IS_CAUSAL, BLOCK_M, BLOCK_N)
            row = m0 + tl.arange(0, BLOCK_M)
            # Rows beyond the end: numbers that keep what is computed of them finite.
            m_old = tl.load(M + stats + row, mask=row < s, other=0.0)
            l_old = tl.load(L + stats + row, mask=row < s, other=1.0)
            m_block = tl.max(x, 1)
            # The first block of keys shows every row its first key, so the new maximum is a number.
            m_new = tl.maximum(m_old, m_block)
            p = tl.math.exp2(x - m_new[:, None])
            kept = l_old * tl.math.exp2(m_old - m_new)
            l_new = kept + tl.sum(p, 1)
            out_ptrs, ok = _rows(OUT + base, m0, s, D, BLOCK_M, stride_s)
            out = tl.load(out_ptrs, mask=ok, other=0.0) * (kept / l_new)[:, None]
            out += tl.dot(p.to(v.dtype), v) / l_new[:, None]
            tl.store(out_ptrs, out, mask=ok)
            tl.store(M + stats + row, m_new, mask=row < s)
            tl.store(L + stats + row, l_new, mask=row < s)
        # What these threads wrote is read by others of the program in the next pass.
        tl.debug_barrier()


@triton.jit
def _backward_kernel(
    Q, K, V, OUT, DOUT, M, L, DQ, DK, DV, scale, qk_scale, s, num_heads, stride_b, stride_s, stride_h,
    D: tl.constexpr, IS_CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    batch, head = (tl.program_id(0) // num_heads).to(tl.int64), tl.program_id(0) % num_heads
    base = batch * stride_b + head * stride_h
    stats = tl.program_id(0).to(tl.int64) * s
    for n0 in range(0, s, BLOCK_N):
        key_ptrs, keys_ok = _rows(K + base, n0, s, D, BLOCK_N, stride_s)
        k = tl.load(key_ptrs, mask=keys_ok, other=0.0)
        key_ptrs, keys_ok = _rows(V + base, n0, s, D, BLOCK_N, stride_s)
        v = tl.load(key_ptrs, mask=keys_ok, other=0.0)
        dk = tl.zeros([BLOCK_N, D], tl.float32)
        dv = tl.zeros([BLOCK_N, D], tl.float32)
        first = n0 // BLOCK_M * BLOCK_M if IS_CAUSAL else 0
        for m0 in range(first, s, BLOCK_M):
            ptrs, ok = _rows(Q + base, m0, s, D, BLOCK_M, stride_s)
            q = tl.load(ptrs, mask=ok, other=0.0)
            ptrs, ok = _rows(DOUT + base, m0, s, D, BLOCK_M, stride_s)
            dout = tl.load(ptrs, mask=ok, other=0.0)
            ptrs, ok = _rows(OUT + base, m0, s, D, BLOCK_M, stride_s)
            delta = tl.sum(tl.load(ptrs, mask=ok, other=0.0).to(tl.float32) * dout.to(tl.float32), 1)
            row = m0 + tl.arange(0, BLOCK_M)
            m = tl.load(M + stats + row, mask=row < s, other=0.0)
            l = tl.load(L + stats + row, mask=row < s, other=1.0)
            x = _scores(q, k, m0, n0, s, qk_scale, IS_CAUSAL, BLOCK_M, BLOCK_N)
            p = tl.math.exp2(x - m[:, None]) / l[:, None]
            dv += tl.dot(tl.trans(p.to(dout.dtype)), dout)
            ds = (p * (tl.dot(dout, tl.trans(v)) - delta[:, None]) * scale).to(q.dtype)
            dk += tl.dot(tl.trans(ds), q)
            dq_ptrs, ok = _rows(DQ + base, m0, s, D, BLOCK_M, stride_s)
            tl.store(dq_ptrs, tl.load(dq_ptrs, mask=ok, other=0.0) + tl.dot(ds, k), mask=ok)
        key_ptrs, keys_ok = _rows(DK + base, n0, s, D, BLOCK_N, stride_s)
        tl.store(key_ptrs, dk, mask=keys_ok)
        key_ptrs, keys_ok = _rows(DV + base, n0, s, D, BLOCK_N, stride_s)
        tl.store(key_ptrs, dv, mask=keys_ok)
        tl.debug_barrier()


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, is_causal: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of as many keys as queries, with as many heads.

    Args:
        q, k, v: "b s h d", contiguous, d one of `HEAD_DIMS`.

    Returns:
        out: like q. m, l: fp32 "b h s", the greatest score of each row, in base 2, and the sum of exponentials beside it.
    """
    b, s, h, d = q.shape
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    m = torch.full((b, h, s), float("-inf"), device=q.device)
    l = torch.zeros(b, h, s, device=q.device)
    _forward_kernel[(b * h,)](
        q, k, v, out, m, l, scale * 1.4426950408889634, s, h, *q.stride()[:3],
        D=d, IS_CAUSAL=is_causal, **_TILE,
    )  # fmt: skip
    return out.to(q.dtype), m, l


class Flash1(torch.autograd.Function):
    """`forward`'s out, differentiable: `Flash1.apply(q, k, v, scale, is_causal)`."""

    @staticmethod
    def forward(ctx, q, k, v, scale: float, is_causal: bool):
        out, m, l = forward(q, k, v, scale=scale, is_causal=is_causal)
        ctx.save_for_backward(q, k, v, out, m, l)
        ctx.scale, ctx.is_causal = scale, is_causal
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, m, l = ctx.saved_tensors
        b, s, h, d = q.shape
        dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        _backward_kernel[(b * h,)](
            q, k, v, out, dout.contiguous(), m, l, dq, dk, dv, ctx.scale, ctx.scale * 1.4426950408889634, s, h,
            *q.stride()[:3], D=d, IS_CAUSAL=ctx.is_causal, **_BACKWARD_TILE,
        )  # fmt: skip
        return dq.to(q.dtype), dk, dv, None, None
