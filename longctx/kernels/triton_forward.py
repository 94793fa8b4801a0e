"""Forward block attention in Triton: the online softmax, continued from the state that earlier blocks left.

One program owns BLOCK_M query rows of one head and walks over the key tiles that any of its rows sees. The fp32 state is
loaded where the accumulators would be zeroed, so carrying it costs its traffic and nothing else.

Source: Dao 2023 (arXiv 2307.08691), algorithm 1; the schedule is what Triton's compiler makes of the plain loop.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from longctx.kernels import SoftmaxState
from longctx.kernels.tiles import (
    INTERPRETING,
    LOG2_E,
    as_operand,
    cut_tiles,
    heads_abreast,
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

# Arguments that change from block to block and gain nothing from a kernel of their own per value.
_PLAIN_ARGS = ["LO", "HI", "stride_lo", "sq", "sk", "num_heads", "group", "section"]


@triton.jit
def _attend(
    acc, l, m, q, K, V, batch, kv_head, start, end, sk, row_lo, row_hi, qk_scale,
    stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, HAS_LO: tl.constexpr,
    CHECK_N: tl.constexpr, USE_DESCRIPTOR: tl.constexpr, UPCAST: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Walk over the key tiles of [start, end); m is a running maximum of log2(e) * score, l the sum beside it."""
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
        if MASKED:
            col = n + tl.arange(0, BLOCK_N)
            visible = col[None, :] < row_hi[:, None]
            if HAS_LO:
                visible = visible & (col[None, :] >= row_lo[:, None])
            s = tl.where(visible, s * unit, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1))
            # A row that has seen nothing yet: -inf - -inf would be nan.
            base = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.math.exp2(s - base[:, None])
            alpha = tl.math.exp2(m - base)
        else:
            m_new = tl.maximum(m, tl.max(s, 1) * unit)
            p = tl.math.exp2(s * unit - m_new[:, None])
            alpha = tl.math.exp2(m - m_new)
        l = l * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        v = load_tile(
            V, batch, kv_head, n, sk, stride_vb, stride_vs, stride_vh,
            BLOCK_N, D, D_PAD, USE_DESCRIPTOR, CHECK_N, UPCAST,
        )  # fmt: skip
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        m = m_new
    return acc, l, m


@triton.jit
def _tile_ptrs(base, batch, head, row, col, stride_b, stride_s, stride_h):
    """Addresses of these rows and columns of one head, [rows, columns]."""
    base += batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    return base + row.to(tl.int64)[:, None] * stride_s + col[None, :]


@triton.jit(do_not_specialize=_PLAIN_ARGS)
def _forward_kernel(
    Q, K, V, OLD, OUT, LSE, LO, HI, stride_lo, qk_scale, sq, sk, num_heads, group, section,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_xb, stride_xs, stride_xh, stride_ob, stride_os, stride_oh, stride_lb, stride_lh,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KIND: tl.constexpr, HAS_LO: tl.constexpr, HAS_HI: tl.constexpr, CARRY: tl.constexpr, FINAL: tl.constexpr,
    EVEN_N: tl.constexpr,
    USE_DESCRIPTOR: tl.constexpr, UPCAST: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    # Row blocks of few heads run side by side, so that their K and V are read from L2; the longest causal ones start first.
    num_m = tl.cdiv(sq, BLOCK_M)
    tile, flat = place_of(tl.program_id(0), tl.num_programs(0), num_m, section)
    m0 = (num_m - 1 - tile) * BLOCK_M
    head = flat % num_heads
    batch = flat // num_heads
    kv_head = head // group

    row = m0 + tl.arange(0, BLOCK_M)
    row_ok = row < sq
    row_lo, row_hi, first, end, full_lo, full_hi = row_intervals(LO, HI, stride_lo, batch, m0, sq, sk, KIND, BLOCK_M)
    # Nothing to add: the state stays as it is.
    if CARRY and not FINAL and KIND != "full":  # noqa: SIM102 - the first test is made by the compiler, the second by the GPU
        if first >= end:
            return
    start, a, b = cut_tiles(first, end, full_lo, full_hi, BLOCK_N, False)

    col = tl.arange(0, D_PAD)
    out_ok = row_ok[:, None] & (col < D)[None, :]
    lse_ptrs = LSE + batch.to(tl.int64) * stride_lb + head.to(tl.int64) * stride_lh + row
    if CARRY:
        m = tl.load(lse_ptrs, mask=row_ok, other=float("-inf")) * 1.4426950408889634
        # The state is normalised: its sum is 1 beside a maximum of lse.
        l = tl.where(m == float("-inf"), 0.0, 1.0)
        # OLD may be OUT, passed twice: were these the addresses stored to below, they would occupy registers in the loops.
        acc = tl.load(_tile_ptrs(OLD, batch, head, row, col, stride_xb, stride_xs, stride_xh), mask=out_ok, other=0.0)
    else:
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    q = load_tile(
        Q, batch, head, m0, sq, stride_qb, stride_qs, stride_qh, BLOCK_M, D, D_PAD, USE_DESCRIPTOR, True, UPCAST
    )
    if HAS_LO:
        acc, l, m = _attend(
            acc, l, m, q, K, V, batch, kv_head, start, a, sk, row_lo, row_hi, qk_scale,
            stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
            D, D_PAD, BLOCK_N, True, True, False, USE_DESCRIPTOR, UPCAST, SOFTCAP,
        )  # fmt: skip
    acc, l, m = _attend(
        acc, l, m, q, K, V, batch, kv_head, a, b, sk, row_lo, row_hi, qk_scale,
        stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
        D, D_PAD, BLOCK_N, False, HAS_LO, False, USE_DESCRIPTOR, UPCAST, SOFTCAP,
    )  # fmt: skip
    if KIND != "full" or not EVEN_N:
        acc, l, m = _attend(
            acc, l, m, q, K, V, batch, kv_head, b, end, sk, row_lo, row_hi, qk_scale,
            stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
            D, D_PAD, BLOCK_N, True, HAS_LO, not EVEN_N, USE_DESCRIPTOR, UPCAST, SOFTCAP,
        )  # fmt: skip

    # Compared with 0, not with > 0: a nan must come out as one.
    unseen = l == 0.0
    l = tl.where(unseen, 1.0, l)
    acc = acc / l[:, None]
    lse = tl.where(unseen, float("-inf"), (m + tl.math.log2(l)) * 0.6931471805599453)
    tl.store(_tile_ptrs(OUT, batch, head, row, col, stride_ob, stride_os, stride_oh), acc, mask=out_ok)
    tl.store(lse_ptrs, lse, mask=row_ok)


def launch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_range: KeyRange,
    *,
    scale: float,
    softcap: float,
    state: SoftmaxState | None,
    final: bool,
    tile: Tile,
    use_descriptor: bool,
) -> SoftmaxState:
    """Launch the forward on a block that is not empty; see `BlockAttention.forward`."""
    b, sq, h, d = q.shape
    sk, hk = k.shape[1:3]
    # The interpreter truncates fp32 to bf16 where a GPU rounds.
    final = final and not (INTERPRETING and q.dtype == torch.bfloat16)
    if state is None or final:
        out = torch.empty(b, sq, h, d, dtype=q.dtype if final else torch.float32, device=q.device)
    else:
        out = state.out
    lse = state.lse if state is not None else torch.empty(b, h, sq, dtype=torch.float32, device=q.device)
    old = state.out if state is not None else out
    d_pad = padded(d)
    num_m = num_tiles(sq, tile.block_m)
    _forward_kernel[(num_m * h * b,)](
        as_operand(q, tile.block_m, d_pad, use_descriptor),
        as_operand(k, tile.block_n, d_pad, use_descriptor),
        as_operand(v, tile.block_n, d_pad, use_descriptor),
        old,
        out,
        lse,
        qk_scale=scale * LOG2_E,
        sq=sq,
        sk=sk,
        num_heads=h,
        group=h // hk,
        section=heads_abreast(num_m, h * b, q.device),
        **stride_args(q=q, k=k, v=v, x=old, o=out),
        stride_lb=lse.stride(0),
        stride_lh=lse.stride(1),
        D=d,
        D_PAD=d_pad,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        CARRY=state is not None,
        FINAL=final,
        EVEN_N=sk % tile.block_n == 0,
        USE_DESCRIPTOR=use_descriptor,
        UPCAST=INTERPRETING and q.dtype == torch.bfloat16,
        SOFTCAP=float(softcap),
        **row_interval_args(key_range, sq, sk, q.device),
        **tile.options(),
    )
    return SoftmaxState(out, lse)
