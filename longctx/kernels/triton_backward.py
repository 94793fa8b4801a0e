"""Backward block attention in Triton: one kernel for dq, one for dk and dv, so that nothing is added atomically.

Both recompute the probabilities from the final lse of the whole row and add their result into fp32 accumulators that
one program owns; the same inputs give the same bits. The dk/dv kernel works on S^T = K Q^T, so that no result of a matrix
product is ever transposed in registers: Triton 3.4 to 3.7 is reported to miscompile that on Hopper
(flash-linear-attention issues 640, 826, 983).

Source: Dao 2023 (arXiv 2307.08691), algorithm 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from longctx.kernels.tiles import (
    INTERPRETING,
    LOG2_E,
    as_flat_operand,
    as_operand,
    cut_tiles,
    heads_abreast,
    key_interval_args,
    load_tile,
    num_tiles,
    padded,
    place_of,
    row_interval_args,
    row_intervals,
    stride_args,
    tanh_of_scores,
)
from longctx.kernels.tuning import Tile
from longctx.masks import KeyRange

_PLAIN_ARGS = [
    *("LO", "HI", "FIRST", "LAST", "stride_lo", "stride_first"),
    *("sq", "sk", "num_heads", "num_kv_heads", "group", "section"),
]


@triton.jit
def _load_rows(src, start, ROWS: tl.constexpr, USE_DESCRIPTOR: tl.constexpr):
    """[ROWS] values of a flat fp32 array that is padded to whole tiles."""
    if USE_DESCRIPTOR:
        return src.load([start])
    else:
        return tl.load(src + start + tl.arange(0, ROWS))


@triton.jit
def _add_to(ptr, row, end, stride_s, value, D: tl.constexpr, D_PAD: tl.constexpr, FRESH: tl.constexpr):
    """ptr[row, :] += value, [rows, D_PAD], for rows < end; or = value where there is nothing yet."""
    col = tl.arange(0, D_PAD)
    ptrs = ptr + row.to(tl.int64)[:, None] * stride_s + col[None, :]
    ok = (row < end)[:, None] & (col < D)[None, :]
    if not FRESH:
        value += tl.load(ptrs, mask=ok, other=0.0)
    tl.store(ptrs, value, mask=ok)


@triton.jit
def _walk_keys(
    dq, q, do, lse, delta, K, V, batch, kv_head, start, end, sk, row_lo, row_hi, qk_scale,
    stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, HAS_LO: tl.constexpr,
    CHECK_N: tl.constexpr, USE_DESCRIPTOR: tl.constexpr, UPCAST: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """dq of one block of rows over the key tiles of [start, end)."""
    for n in tl.range(start, end, BLOCK_N):
        k = load_tile(
            K, batch, kv_head, n, sk, stride_kb, stride_ks, stride_kh,
            BLOCK_N, D, D_PAD, USE_DESCRIPTOR, CHECK_N, UPCAST,
        )  # fmt: skip
        s = tl.dot(q, k.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if SOFTCAP > 0.0:
            s = tanh_of_scores(s, qk_scale, SOFTCAP, k.dtype == tl.float32)
            unit = SOFTCAP * 1.4426950408889634
        else:
            unit = qk_scale
        p = tl.math.exp2(s * unit - lse[:, None])
        if MASKED:
            # An unseen score may lie far above lse: p may be inf there, and is dropped before it meets anything.
            col = n + tl.arange(0, BLOCK_N)
            visible = col[None, :] < row_hi[:, None]
            if HAS_LO:
                visible = visible & (col[None, :] >= row_lo[:, None])
            p = tl.where(visible, p, 0.0)
        v = load_tile(
            V, batch, kv_head, n, sk, stride_vb, stride_vs, stride_vh,
            BLOCK_N, D, D_PAD, USE_DESCRIPTOR, CHECK_N, UPCAST,
        )  # fmt: skip
        dp = tl.dot(do, v.T, input_precision="ieee")
        ds = p * (dp - delta[:, None])
        if SOFTCAP > 0.0:
            ds *= 1.0 - s * s
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=_PLAIN_ARGS)
def _backward_dq_kernel(
    Q, K, V, DO, LSE2, DELTA2, DQ, LO, HI, stride_lo, scale, qk_scale, sq, sq_pad, sk, num_heads, group, section,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_gb, stride_gs, stride_gh, stride_dqb, stride_dqs, stride_dqh,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KIND: tl.constexpr, HAS_LO: tl.constexpr, HAS_HI: tl.constexpr, EVEN_N: tl.constexpr,
    USE_DESCRIPTOR: tl.constexpr, UPCAST: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    num_m = tl.cdiv(sq, BLOCK_M)
    tile, flat = place_of(tl.program_id(0), tl.num_programs(0), num_m, section)
    m0 = (num_m - 1 - tile) * BLOCK_M
    head = flat % num_heads
    batch = flat // num_heads
    kv_head = head // group

    row = m0 + tl.arange(0, BLOCK_M)
    row_lo, row_hi, first, end, full_lo, full_hi = row_intervals(LO, HI, stride_lo, batch, m0, sq, sk, KIND, BLOCK_M)
    if KIND != "full":  # noqa: SIM102 - the first test is made by the compiler, the second by the GPU
        if first >= end:
            return
    start, a, b = cut_tiles(first, end, full_lo, full_hi, BLOCK_N, False)

    # 32 bits suffice: these arrays hold one number per row and head.
    rows_base = (batch * num_heads + head) * sq_pad + m0
    lse = _load_rows(LSE2, rows_base, BLOCK_M, False)
    delta = _load_rows(DELTA2, rows_base, BLOCK_M, False)
    q = load_tile(
        Q, batch, head, m0, sq, stride_qb, stride_qs, stride_qh, BLOCK_M, D, D_PAD, USE_DESCRIPTOR, True, UPCAST
    )
    do = load_tile(
        DO, batch, head, m0, sq, stride_gb, stride_gs, stride_gh, BLOCK_M, D, D_PAD, USE_DESCRIPTOR, True, UPCAST
    )
    dq = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    if HAS_LO:
        dq = _walk_keys(
            dq, q, do, lse, delta, K, V, batch, kv_head, start, a, sk, row_lo, row_hi, qk_scale,
            stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
            D, D_PAD, BLOCK_N, True, True, False, USE_DESCRIPTOR, UPCAST, SOFTCAP,
        )  # fmt: skip
    dq = _walk_keys(
        dq, q, do, lse, delta, K, V, batch, kv_head, a, b, sk, row_lo, row_hi, qk_scale,
        stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
        D, D_PAD, BLOCK_N, False, HAS_LO, False, USE_DESCRIPTOR, UPCAST, SOFTCAP,
    )  # fmt: skip
    if KIND != "full" or not EVEN_N:
        dq = _walk_keys(
            dq, q, do, lse, delta, K, V, batch, kv_head, b, end, sk, row_lo, row_hi, qk_scale,
            stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
            D, D_PAD, BLOCK_N, True, HAS_LO, not EVEN_N, USE_DESCRIPTOR, UPCAST, SOFTCAP,
        )  # fmt: skip
    dq_base = DQ + batch.to(tl.int64) * stride_dqb + head.to(tl.int64) * stride_dqh
    _add_to(dq_base, row, sq, stride_dqs, dq * scale, D, D_PAD, False)


@triton.jit
def _walk_rows(
    dk, dv, k, v, Q, DO, LSE2, DELTA2, rows_base, batch, head, start, end, sq, col_lo, col_hi, qk_scale,
    stride_qb, stride_qs, stride_qh, stride_gb, stride_gs, stride_gh,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr, HAS_HI: tl.constexpr,
    CHECK_M: tl.constexpr, USE_DESCRIPTOR: tl.constexpr, UPCAST: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys over the tiles of query rows of [start, end), of one query head."""
    for m in tl.range(start, end, BLOCK_M):
        q = load_tile(
            Q, batch, head, m, sq, stride_qb, stride_qs, stride_qh,
            BLOCK_M, D, D_PAD, USE_DESCRIPTOR, CHECK_M, UPCAST,
        )  # fmt: skip
        st = tl.dot(k, q.T, input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        lse = _load_rows(LSE2, rows_base + m, BLOCK_M, USE_DESCRIPTOR)
        if SOFTCAP > 0.0:
            st = tanh_of_scores(st, qk_scale, SOFTCAP, k.dtype == tl.float32)
            unit = SOFTCAP * 1.4426950408889634
        else:
            unit = qk_scale
        pt = tl.math.exp2(st * unit - lse[None, :])
        if MASKED:
            # Rows from sq on need no mask: their lse is +inf.
            row = m + tl.arange(0, BLOCK_M)
            visible = row[None, :] >= col_lo[:, None]
            if HAS_HI:
                visible = visible & (row[None, :] < col_hi[:, None])
            pt = tl.where(visible, pt, 0.0)
        do = load_tile(
            DO, batch, head, m, sq, stride_gb, stride_gs, stride_gh,
            BLOCK_M, D, D_PAD, USE_DESCRIPTOR, CHECK_M, UPCAST,
        )  # fmt: skip
        dv = tl.dot(pt.to(do.dtype), do, dv, input_precision="ieee")
        delta = _load_rows(DELTA2, rows_base + m, BLOCK_M, USE_DESCRIPTOR)
        dpt = tl.dot(v, do.T, input_precision="ieee")
        dst = pt * (dpt - delta[None, :])
        if SOFTCAP > 0.0:
            dst *= 1.0 - st * st
        dk = tl.dot(dst.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=_PLAIN_ARGS)
def _backward_dkdv_kernel(
    Q, K, V, DO, LSE2, DELTA2, DK, DV, LO, HI, stride_lo,
    scale, qk_scale, sq, sq_pad, sk, num_heads, num_kv_heads, group, section,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_gb, stride_gs, stride_gh, stride_dkb, stride_dks, stride_dkh, stride_dvb, stride_dvs, stride_dvh,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KIND: tl.constexpr, HAS_LO: tl.constexpr, HAS_HI: tl.constexpr, EVEN_M: tl.constexpr,
    FRESH: tl.constexpr, USE_DESCRIPTOR: tl.constexpr, UPCAST: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    # Ascending: the first keys of a causal block are seen by the most rows, and long programs should start first.
    num_n = tl.cdiv(sk, BLOCK_N)
    tile, flat = place_of(tl.program_id(0), tl.num_programs(0), num_n, section)
    n0 = tile * BLOCK_N
    kv_head = flat % num_kv_heads
    batch = flat // num_kv_heads

    col = n0 + tl.arange(0, BLOCK_N)
    col_lo, col_hi, first, end, full_lo, full_hi = row_intervals(LO, HI, stride_lo, batch, n0, sk, sq, KIND, BLOCK_N)
    if KIND != "full" and not FRESH:  # noqa: SIM102 - the first test is made by the compiler, the second by the GPU
        if first >= end:
            return
    # The tile that reaches past the last row needs no mask (lse is +inf there), so it counts as a whole one.
    full_hi = tl.where(full_hi == sq, tl.cdiv(sq, BLOCK_M) * BLOCK_M, full_hi)
    start, a, b = cut_tiles(first, end, full_lo, full_hi, BLOCK_M, True)

    k = load_tile(
        K, batch, kv_head, n0, sk, stride_kb, stride_ks, stride_kh, BLOCK_N, D, D_PAD, USE_DESCRIPTOR, True, UPCAST
    )
    v = load_tile(
        V, batch, kv_head, n0, sk, stride_vb, stride_vs, stride_vh, BLOCK_N, D, D_PAD, USE_DESCRIPTOR, True, UPCAST
    )
    dk = tl.zeros([BLOCK_N, D_PAD], tl.float32)
    dv = tl.zeros([BLOCK_N, D_PAD], tl.float32)
    for g in tl.range(0, group, num_stages=1):
        head = kv_head * group + g
        rows_base = (batch * num_heads + head) * sq_pad
        if KIND != "full":
            dk, dv = _walk_rows(
                dk, dv, k, v, Q, DO, LSE2, DELTA2, rows_base,
                batch, head, start, a, sq, col_lo, col_hi, qk_scale,
                stride_qb, stride_qs, stride_qh, stride_gb, stride_gs, stride_gh,
                D, D_PAD, BLOCK_M, True, HAS_HI, not EVEN_M, USE_DESCRIPTOR, UPCAST, SOFTCAP,
            )  # fmt: skip
        dk, dv = _walk_rows(
            dk, dv, k, v, Q, DO, LSE2, DELTA2, rows_base,
            batch, head, a, b, sq, col_lo, col_hi, qk_scale,
            stride_qb, stride_qs, stride_qh, stride_gb, stride_gs, stride_gh,
            D, D_PAD, BLOCK_M, False, HAS_HI, not EVEN_M, USE_DESCRIPTOR, UPCAST, SOFTCAP,
        )  # fmt: skip
        if KIND != "full" and HAS_HI:
            dk, dv = _walk_rows(
                dk, dv, k, v, Q, DO, LSE2, DELTA2, rows_base,
                batch, head, b, end, sq, col_lo, col_hi, qk_scale,
                stride_qb, stride_qs, stride_qh, stride_gb, stride_gs, stride_gh,
                D, D_PAD, BLOCK_M, True, HAS_HI, not EVEN_M, USE_DESCRIPTOR, UPCAST, SOFTCAP,
            )  # fmt: skip
    dk_base = DK + batch.to(tl.int64) * stride_dkb + kv_head.to(tl.int64) * stride_dkh
    dv_base = DV + batch.to(tl.int64) * stride_dvb + kv_head.to(tl.int64) * stride_dvh
    _add_to(dv_base, col, sk, stride_dvs, dv, D, D_PAD, FRESH)
    _add_to(dk_base, col, sk, stride_dks, dk * scale, D, D_PAD, FRESH)


def launch_dq(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse2: torch.Tensor,
    delta2: torch.Tensor,
    key_range: KeyRange,
    *,
    scale: float,
    softcap: float,
    dq_acc: torch.Tensor,
    tile: Tile,
    use_descriptor: bool,
) -> None:
    """Add a block's dq; the block is not empty, lse2 and delta2 come from `prepare_rows`."""
    b, sq, h, d = q.shape
    sk, hk = k.shape[1:3]
    d_pad = padded(d)
    num_m = num_tiles(sq, tile.block_m)
    _backward_dq_kernel[(num_m * h * b,)](
        as_operand(q, tile.block_m, d_pad, use_descriptor),
        as_operand(k, tile.block_n, d_pad, use_descriptor),
        as_operand(v, tile.block_n, d_pad, use_descriptor),
        as_operand(dout, tile.block_m, d_pad, use_descriptor),
        lse2,
        delta2,
        dq_acc,
        scale=scale,
        qk_scale=scale * LOG2_E,
        sq=sq,
        sq_pad=lse2.shape[-1],
        sk=sk,
        num_heads=h,
        group=h // hk,
        section=heads_abreast(num_m, h * b, q.device),
        **stride_args(q=q, k=k, v=v, g=dout, dq=dq_acc),
        D=d,
        D_PAD=d_pad,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        EVEN_N=sk % tile.block_n == 0,
        USE_DESCRIPTOR=use_descriptor,
        UPCAST=INTERPRETING and q.dtype == torch.bfloat16,
        SOFTCAP=float(softcap),
        **row_interval_args(key_range, sq, sk, q.device),
        **tile.options(),
    )


def launch_dkdv(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse2: torch.Tensor,
    delta2: torch.Tensor,
    key_range: KeyRange,
    *,
    scale: float,
    softcap: float,
    dk_acc: torch.Tensor,
    dv_acc: torch.Tensor,
    fresh: bool,
    tile: Tile,
    use_descriptor: bool,
) -> None:
    """Add a block's dk and dv; the block is not empty, lse2 and delta2 come from `prepare_rows`."""
    b, sq, h, d = q.shape
    sk, hk = k.shape[1:3]
    d_pad = padded(d)
    num_n = num_tiles(sk, tile.block_n)
    _backward_dkdv_kernel[(num_n * hk * b,)](
        as_operand(q, tile.block_m, d_pad, use_descriptor),
        as_operand(k, tile.block_n, d_pad, use_descriptor),
        as_operand(v, tile.block_n, d_pad, use_descriptor),
        as_operand(dout, tile.block_m, d_pad, use_descriptor),
        as_flat_operand(lse2, tile.block_m, use_descriptor),
        as_flat_operand(delta2, tile.block_m, use_descriptor),
        dk_acc,
        dv_acc,
        scale=scale,
        qk_scale=scale * LOG2_E,
        sq=sq,
        sq_pad=lse2.shape[-1],
        sk=sk,
        num_heads=h,
        num_kv_heads=hk,
        group=h // hk,
        section=heads_abreast(num_n, hk * b, q.device),
        **stride_args(q=q, k=k, v=v, g=dout, dk=dk_acc, dv=dv_acc),
        D=d,
        D_PAD=d_pad,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        EVEN_M=sq % tile.block_m == 0,
        FRESH=fresh,
        USE_DESCRIPTOR=use_descriptor,
        UPCAST=INTERPRETING and q.dtype == torch.bfloat16,
        SOFTCAP=float(softcap),
        **key_interval_args(key_range, sq, sk, q.device),
        **tile.options(),
    )
