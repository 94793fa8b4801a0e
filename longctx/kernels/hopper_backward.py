"""Backward block attention for Hopper in Gluon.

"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from longctx.kernels.gluon_api import (
    describe,
    gl,
    gluon,
    named_barrier_sync,
    tma_load,
    tma_reduce_add,
    tma_store_wait,
)
from longctx.kernels.tiles import LOG2_E, key_interval_args
from longctx.kernels.triton_backward import prepare_rows
from longctx.masks import KeyRange


@gluon.jit
def _opaque(x):
    """`x`, of which the compiler knows nothing: what is computed from it stays where it is, in no loop's preheader."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _next_block(m, head, start, m0, m1):
    """The row block after `m` in the walk over [m0, m1), from `start` round, of one query head after the other."""
    m = gl.where(m + 1 == m1, m0, m + 1)
    return m, gl.where(m == start, head + 1, head)


@gluon.jit
def _load(
    desc_q, desc_do, desc_k, desc_v, desc_lse, desc_delta,
    q_bufs, do_bufs, k_buf, v_buf, lse_bufs, delta_bufs, kv_full, q_full, q_empty, do_full, do_empty,
    batch, kv_head, head, num_heads, sq_pad, n0, start, m0, m1, total, BM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    mbarrier.expect(kv_full, desc_k.block_type.nbytes + desc_v.block_type.nbytes)
    tma_load(desc_k, [batch, kv_head, n0, 0], kv_full, k_buf)
    tma_load(desc_v, [batch, kv_head, n0, 0], kv_full, v_buf)
    m = start
    for t in range(total):
        i = t % STAGES
        ph = (t // STAGES) & 1
        of_rows = (batch * num_heads + head) * sq_pad + m * BM
        mbarrier.wait(q_empty.index(i), ph ^ 1)
        mbarrier.expect(q_full.index(i), desc_q.block_type.nbytes + desc_lse.block_type.nbytes)
        tma_load(desc_q, [batch, head, m * BM, 0], q_full.index(i), q_bufs.index(i))
        tma_load(desc_lse, [of_rows], q_full.index(i), lse_bufs.index(i))
        mbarrier.wait(do_empty.index(i), ph ^ 1)
        mbarrier.expect(do_full.index(i), desc_do.block_type.nbytes + desc_delta.block_type.nbytes)
        tma_load(desc_do, [batch, head, m * BM, 0], do_full.index(i), do_bufs.index(i))
        tma_load(desc_delta, [of_rows], do_full.index(i), delta_bufs.index(i))
        m, head = _next_block(m, head, start, m0, m1)


@gluon.jit
def _reduce_dq(desc_dq, dq_bufs, dq_full, dq_empty, batch, head, start, m0, m1, total, BM: gl.constexpr, D: gl.constexpr, DQ_STAGES: gl.constexpr):
    m = start
    ROWS: gl.constexpr = BM == 128
    for t in range(total):
        j = t % DQ_STAGES
        ph = (t // DQ_STAGES) & 1
        for c in gl.static_range(2):
            mbarrier.wait(dq_full.index(2 * j + c), ph)
            if ROWS:
                tma_reduce_add(desc_dq, [batch, head, m * BM + c * 64, 0], dq_bufs.index(2 * j + c))
            else:
                tma_reduce_add(desc_dq, [batch, head, m * BM, c * (D // 2)], dq_bufs.index(2 * j + c))
        if DQ_STAGES == 1:
            tma_store_wait(1)
            mbarrier.arrive(dq_empty.index(0), count=1)
            tma_store_wait(0)
            mbarrier.arrive(dq_empty.index(1), count=1)
        else:
            # the previous iteration's
            tma_store_wait(2)
            mbarrier.arrive(dq_empty.index(2 * (j ^ 1)), count=1, pred=t > 0)
            mbarrier.arrive(dq_empty.index(2 * (j ^ 1) + 1), count=1, pred=t > 0)
        m, head = _next_block(m, head, start, m0, m1)
    tma_store_wait(0)


@gluon.jit
def _scores(s, t, m, dv, dk, dsa, kc, vc, buffers, row_lo, row_hi, a, b, qk_scale, FIRST: gl.constexpr, CID: gl.constexpr, CONFIG: gl.constexpr):
    """From the scores s (in flight) of row block t: dv += P^T dO (left in flight), and dS^T."""
    (
        q_bufs, do_bufs, k_buf, v_buf, ds_bufs, dq_bufs, lse_bufs, delta_bufs,
        kv_full, q_full, q_empty, do_full, do_empty, dq_full, dq_empty,
    ) = buffers  # fmt: skip
    D_PAD: gl.constexpr = CONFIG[1]
    BM: gl.constexpr = CONFIG[2]
    STAGES: gl.constexpr = CONFIG[3]
    MASKED: gl.constexpr = CONFIG[5] != "full" or not CONFIG[8]
    HAS_HI: gl.constexpr = CONFIG[7]
    SOFTCAP: gl.constexpr = CONFIG[12]
    S_L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16])
    KV_L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D_PAD, 16])
    A_L: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=KV_L, k_width=2)
    CS: gl.constexpr = gl.SliceLayout(0, S_L)
    dt: gl.constexpr = q_bufs.dtype
    i = t % STAGES
    do = do_bufs.index(i)
    z = gl.zeros([64, BM], gl.float32, layout=S_L)
    if CONFIG[11] == 0:
        mbarrier.wait(q_full.index(i), (t // STAGES) & 1)
        s = warpgroup_mma(kc, q_bufs.index(i).permute((1, 0)), z, use_acc=False, is_async=True)
    mbarrier.wait(do_full.index(i), (t // STAGES) & 1)
    dp = warpgroup_mma(vc, do.permute((1, 0)), z, use_acc=False, is_async=True)
    if FIRST:
        s = warpgroup_mma_wait(1, deps=(s, ))
    else:
        # Products end in order: with s, the last block's dk is there too.
        s, dk, dsa = warpgroup_mma_wait(1, deps=(s, dk, dsa))
        mbarrier.arrive(q_empty.index((t + STAGES - 1) % STAGES), count=1)
    lse = lse_bufs.index(i).load(CS)
    if SOFTCAP > 0.0:
        e = gl.exp2(gl.abs(s * (qk_scale * (0.6931471805599453 / SOFTCAP))) * -2.8853900817779268)
        th = (1.0 - e) / (1.0 + e)
        th = gl.where(s < 0.0, -th, th)
        p = gl.exp2(th * (SOFTCAP * 1.4426950408889634) - lse[None, :])
    else:
        p = gl.exp2(s * qk_scale - lse[None, :])
    if MASKED:
        if (m < a) | (m >= b):
            # Opaque: else the compiler computes all of this before the loop and keeps it in registers that the loop needs.
            row = m * BM + _opaque(gl.arange(0, BM, layout=CS))
            visible = row[None, :] >= row_lo[:, None]
            if HAS_HI:
                visible = visible & (row[None, :] < row_hi[:, None])
            p = gl.where(visible, p, 0.0)
    pa = gl.convert_layout(p.to(dt), A_L)
    if SOFTCAP > 0.0:
        p = p * (1.0 - th * th)
    dv = warpgroup_mma(pa, do, dv, is_async=True)
    delta = delta_bufs.index(i).load(CS)
    dp = warpgroup_mma_wait(1, deps=(dp, ))
    ds = (p * (dp - delta[None, :])).to(dt)
    if CONFIG[10]:
        ds_bufs.index(t % 2).slice(CID * 64, 64, dim=0).store(ds)
        fence_async_shared()
        named_barrier_sync(9, 256)
    if CONFIG[11] != 0 or not CONFIG[10]:
        dv = warpgroup_mma_wait(0, deps=(dv, ))
        mbarrier.arrive(do_empty.index(i), count=1)
    return dv, dk, ds


@gluon.jit
def _gradients(t, m, head, ds, dv, dk, kc, buffers, desc_dq, DQ, stride_dqs, batch, scale, CID: gl.constexpr, LAST: gl.constexpr, CONFIG: gl.constexpr):
    """From dS^T of row block t: dk += dS^T Q (left in flight), dq to its buffer; then the next block's scores, in flight."""
    (
        q_bufs, do_bufs, k_buf, v_buf, ds_bufs, dq_bufs, lse_bufs, delta_bufs,
        kv_full, q_full, q_empty, do_full, do_empty, dq_full, dq_empty,
    ) = buffers  # fmt: skip
    D_PAD: gl.constexpr = CONFIG[1]
    BM: gl.constexpr = CONFIG[2]
    STAGES: gl.constexpr = CONFIG[3]
    DQ_STAGES: gl.constexpr = CONFIG[4]
    WITH_DQ: gl.constexpr = CONFIG[10]
    DQM: gl.constexpr = CONFIG[13]
    ROWS: gl.constexpr = BM == 128
    DQ_N: gl.constexpr = D_PAD if ROWS else D_PAD // 2
    DQ_L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DQ_N, 16])
    S_L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16])
    KV_L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D_PAD, 16])
    A_L: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=KV_L, k_width=2)
    i = t % STAGES
    dsa = gl.convert_layout(ds, A_L)
    z = gl.zeros([64, BM], gl.float32, layout=S_L)
    s = warpgroup_mma_init(z)
    if WITH_DQ:
        buf = ds_bufs.index(t % 2)
        dqz = gl.zeros([64, DQ_N], gl.float32, layout=DQ_L)
        if ROWS:
            dq = warpgroup_mma(buf.slice(CID * 64, 64, dim=1).permute((1, 0)), k_buf, dqz, use_acc=False, is_async=True)
        else:
            dq = warpgroup_mma(buf.permute((1, 0)), k_buf.slice(CID * DQ_N, DQ_N, dim=1), dqz, use_acc=False, is_async=True)
    if CONFIG[11] == 0 and WITH_DQ:
        dv = warpgroup_mma_wait(1, deps=(dv, ))
        mbarrier.arrive(do_empty.index(i), count=1)
    dk = warpgroup_mma(dsa, q_bufs.index(i), dk, is_async=True)
    if not LAST and CONFIG[11] == 1:
        n = t + 1
        mbarrier.wait(q_full.index(n % STAGES), (n // STAGES) & 1)
        s = warpgroup_mma(kc, q_bufs.index(n % STAGES).permute((1, 0)), z, use_acc=False, is_async=True)
    if WITH_DQ:
        if LAST or CONFIG[11] != 1:
            dq = warpgroup_mma_wait(1, deps=(dq, ))
        else:
            dq = warpgroup_mma_wait(2, deps=(dq, ))
        if DQM == "storer":
            j = t % DQ_STAGES
            mbarrier.wait(dq_empty.index(2 * j + CID), ((t // DQ_STAGES) & 1) ^ 1)
            dq_bufs.index(2 * j + CID).store(dq * scale)
            fence_async_shared()
            mbarrier.arrive(dq_full.index(2 * j + CID), count=1)
        elif DQM == "red":
            rm = gl.arange(0, 64, layout=gl.SliceLayout(1, DQ_L)) + (m * BM + (CID * 64 if ROWS else 0))
            cd = gl.arange(0, DQ_N, layout=gl.SliceLayout(0, DQ_L)) + (0 if ROWS else CID * DQ_N)
            gl.atomic_add(DQ + head.to(gl.int64) * D_PAD + (rm.to(gl.int64)[:, None] * stride_dqs + cd[None, :]), dq * scale, sem="relaxed")
        elif DQM == "self":
            tma_store_wait(0)
            dq_bufs.index(CID).store(dq * scale)
            fence_async_shared()
            if ROWS:
                tma_reduce_add(desc_dq, [batch, head, m * BM + CID * 64, 0], dq_bufs.index(CID))
            else:
                tma_reduce_add(desc_dq, [batch, head, m * BM, CID * DQ_N], dq_bufs.index(CID))
    if not LAST and CONFIG[11] == 2:
        n = t + 1
        mbarrier.wait(q_full.index(n % STAGES), (n // STAGES) & 1)
        s = warpgroup_mma(kc, q_bufs.index(n % STAGES).permute((1, 0)), z, use_acc=False, is_async=True)
    return s, dv, dk, dsa


@gluon.jit
def _consume(desc_dq, buffers, place, CID: gl.constexpr, CONFIG: gl.constexpr):
    (
        q_bufs, do_bufs, k_buf, v_buf, ds_bufs, dq_bufs, lse_bufs, delta_bufs,
        kv_full, q_full, q_empty, do_full, do_empty, dq_full, dq_empty,
    ) = buffers  # fmt: skip
    DQ, stride_dqs, DK, DV, LO, HI, stride_dks, stride_dvs, scale, qk_scale, batch, head, n0, start, m0, a, b, m1, total, sq, sk = place
    D: gl.constexpr = CONFIG[0]
    D_PAD: gl.constexpr = CONFIG[1]
    BM: gl.constexpr = CONFIG[2]
    STAGES: gl.constexpr = CONFIG[3]
    FRESH: gl.constexpr = CONFIG[9]
    S_L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16])
    KV_L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D_PAD, 16])
    kc = k_buf.slice(CID * 64, 64, dim=0)
    vc = v_buf.slice(CID * 64, 64, dim=0)
    key = n0 + CID * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, S_L))
    row_lo = key * 0
    row_hi = row_lo + sq
    if CONFIG[5] == "band":
        row_lo = key + LO
        row_hi = key + HI
    elif CONFIG[5] == "rows":
        row_lo = gl.load(LO + key, mask=key < sk, other=0)
        row_hi = gl.load(HI + key, mask=key < sk, other=0)
    if not CONFIG[8]:
        row_lo = gl.where(key < sk, row_lo, 1 << 30)
    z = gl.zeros([64, BM], gl.float32, layout=S_L)
    dk = gl.zeros([64, D_PAD], gl.float32, layout=KV_L)
    dv = gl.zeros([64, D_PAD], gl.float32, layout=KV_L)
    mbarrier.wait(kv_full, 0)
    m = start
    if CONFIG[11] == 0:
        for t in range(total):
            dv, dk, ds = _scores(0, t, m, dv, dk, 0, kc, vc, buffers, row_lo, row_hi, a, b, qk_scale, True, CID, CONFIG)
            s, dv, dk, dsa = _gradients(t, m, head, ds, dv, dk, kc, buffers, desc_dq, DQ, stride_dqs, batch, scale, CID, True, CONFIG)
            dk = warpgroup_mma_wait(0, deps=(dk, ))
            mbarrier.arrive(q_empty.index(t % STAGES), count=1)
            m, head = _next_block(m, head, start, m0, m1)
    else:
        dk = warpgroup_mma_init(dk)
        mbarrier.wait(q_full.index(0), 0)
        s = warpgroup_mma(kc, q_bufs.index(0).permute((1, 0)), z, use_acc=False, is_async=True)
        dv, dk, ds = _scores(s, 0, m, dv, dk, 0, kc, vc, buffers, row_lo, row_hi, a, b, qk_scale, True, CID, CONFIG)
        for t in range(1, total):
            s, dv, dk, dsa = _gradients(t - 1, m, head, ds, dv, dk, kc, buffers, desc_dq, DQ, stride_dqs, batch, scale, CID, False, CONFIG)
            m, head = _next_block(m, head, start, m0, m1)
            dv, dk, ds = _scores(s, t, m, dv, dk, dsa, kc, vc, buffers, row_lo, row_hi, a, b, qk_scale, False, CID, CONFIG)
            dk = warpgroup_mma_init(dk)
        s, dv, dk, dsa = _gradients(total - 1, m, head, ds, dv, dk, kc, buffers, desc_dq, DQ, stride_dqs, batch, scale, CID, True, CONFIG)
        dk, dsa = warpgroup_mma_wait(0, deps=(dk, dsa))
    if CONFIG[13] == "self":
        tma_store_wait(0)
    row = n0 + CID * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, KV_L))
    col = gl.arange(0, D_PAD, layout=gl.SliceLayout(0, KV_L))
    ok = (row < sk)[:, None] & (col < D)[None, :]
    off_v = row.to(gl.int64)[:, None] * stride_dvs + col[None, :]
    off_k = row.to(gl.int64)[:, None] * stride_dks + col[None, :]
    dk = dk * scale
    if FRESH:
        gl.store(DV + off_v, dv.to(DV.dtype.element_ty), mask=ok)
        gl.store(DK + off_k, dk.to(DK.dtype.element_ty), mask=ok)
    else:
        gl.store(DV + off_v, gl.load(DV + off_v, mask=ok, other=0.0) + dv, mask=ok)
        gl.store(DK + off_k, gl.load(DK + off_k, mask=ok, other=0.0) + dk, mask=ok)


_PLAIN_ARGS = ["LO", "HI", "stride_lo", "sq", "sq_pad", "sk", "num_heads", "num_kv_heads", "group"]


@gluon.jit(do_not_specialize=_PLAIN_ARGS)
def _backward_kernel(
    desc_q, desc_do, desc_k, desc_v, desc_lse, desc_delta, desc_dq, DQ, DK, DV, LO, HI, stride_lo,
    scale, qk_scale, sq, sq_pad, sk, num_heads, num_kv_heads, group,
    stride_dkb, stride_dks, stride_dkh, stride_dvb, stride_dvs, stride_dvh, stride_dqb, stride_dqs,
    D: gl.constexpr, D_PAD: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, DQ_STAGES: gl.constexpr,
    KIND: gl.constexpr, HAS_LO: gl.constexpr, HAS_HI: gl.constexpr, EVEN_N: gl.constexpr, FRESH: gl.constexpr,
    WITH_DQ: gl.constexpr, PREFETCH: gl.constexpr, SOFTCAP: gl.constexpr, DQM: gl.constexpr, ROT: gl.constexpr,
):  # fmt: skip
    BN: gl.constexpr = 128
    dt: gl.constexpr = desc_q.dtype
    pid = gl.program_id(0)
    num_n = gl.cdiv(sk, BN)
    n0 = pid % num_n * BN
    kv_head = pid // num_n % num_kv_heads
    batch = pid // num_n // num_kv_heads
    head = kv_head * group

    last = gl.minimum(n0 + BN, sk) - 1
    if KIND == "full":
        first, end, full_lo, full_hi = n0 * 0, n0 * 0 + sq, n0 * 0, n0 * 0 + sq
    elif KIND == "band":
        first = gl.minimum(gl.maximum(n0 + LO, 0), sq)
        end = gl.minimum(gl.maximum(last + HI, 0), sq)
        full_lo = gl.maximum(last + LO, 0)
        full_hi = gl.minimum(gl.maximum(n0 + HI, 0), sq)
    else:
        LO += batch.to(gl.int64) * stride_lo
        HI += batch.to(gl.int64) * stride_lo
        first, end = gl.load(LO + n0), gl.load(HI + last)
        full_lo, full_hi = gl.load(LO + last), gl.load(HI + n0)
    # At least one block of rows, if only to find all of it masked: the pipeline needs something to start with.
    m0 = gl.minimum(first, sq - 1) // BM
    m1 = gl.maximum(gl.cdiv(end, BM), m0 + 1)
    # Rows from sq on need no mask: their lse is +inf.
    a = gl.cdiv(full_lo, BM)
    b = gl.where(full_hi == sq, m1, full_hi // BM)
    if not EVEN_N:
        b = gl.where(n0 + BN > sk, 0, b)
    total = (m1 - m0) * group
    start = m0
    if ROT > 0:
        start = m0 + (n0 // BN * ROT) % (m1 - m0)

    KV: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, D_PAD], dt)
    QO: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, D_PAD], dt)
    DS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, BM], dt)
    DQ_N: gl.constexpr = D_PAD if BM == 128 else D_PAD // 2
    DQ_S: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, DQ_N], gl.float32)
    q_bufs = gl.allocate_shared_memory(dt, [STAGES, BM, D_PAD], QO)
    do_bufs = gl.allocate_shared_memory(dt, [STAGES, BM, D_PAD], QO)
    k_buf = gl.allocate_shared_memory(dt, [BN, D_PAD], KV)
    v_buf = gl.allocate_shared_memory(dt, [BN, D_PAD], KV)
    ds_bufs = gl.allocate_shared_memory(dt, [2 if WITH_DQ else 1, BN if WITH_DQ else 8, BM], DS)
    dq_bufs = gl.allocate_shared_memory(gl.float32, [2 * DQ_STAGES if WITH_DQ else 1, 64 if WITH_DQ else 8, DQ_N], DQ_S)
    lse_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, BM], desc_lse.layout)
    delta_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, BM], desc_lse.layout)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    dq_full = gl.allocate_shared_memory(gl.int64, [2 * DQ_STAGES, 1], mbarrier.MBarrierLayout())
    dq_empty = gl.allocate_shared_memory(gl.int64, [2 * DQ_STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(do_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
        mbarrier.init(do_empty.index(i), count=2)
    for i in gl.static_range(2 * DQ_STAGES):
        mbarrier.init(dq_full.index(i), count=1)
        mbarrier.init(dq_empty.index(i), count=1)
    fence_async_shared()

    DK += batch.to(gl.int64) * stride_dkb + kv_head.to(gl.int64) * stride_dkh
    DQ += batch.to(gl.int64) * stride_dqb
    DV += batch.to(gl.int64) * stride_dvb + kv_head.to(gl.int64) * stride_dvh
    buffers = (
        q_bufs, do_bufs, k_buf, v_buf, ds_bufs, dq_bufs, lse_bufs, delta_bufs,
        kv_full, q_full, q_empty, do_full, do_empty, dq_full, dq_empty,
    )  # fmt: skip
    CONFIG: gl.constexpr = (D, D_PAD, BM, STAGES, DQ_STAGES, KIND, HAS_LO, HAS_HI, EVEN_N, FRESH, WITH_DQ, PREFETCH, SOFTCAP, DQM)
    place = (DQ, stride_dqs, DK, DV, LO, HI, stride_dks, stride_dvs, scale, qk_scale, batch, head, n0, start, m0, a, b, m1, total, sq, sk)
    load_args = (
        desc_q, desc_do, desc_k, desc_v, desc_lse, desc_delta,
        q_bufs, do_bufs, k_buf, v_buf, lse_bufs, delta_bufs, kv_full, q_full, q_empty, do_full, do_empty,
        batch, kv_head, head, num_heads, sq_pad, n0, start, m0, m1, total, BM, STAGES,
    )  # fmt: skip
    if WITH_DQ and DQM == "storer":
        gl.warp_specialize(
            [
                (_consume, (desc_dq, buffers, place, 0, CONFIG)),
                (_consume, (desc_dq, buffers, place, 1, CONFIG)),
                (_load, load_args),
                (_reduce_dq, (desc_dq, dq_bufs, dq_full, dq_empty, batch, head, start, m0, m1, total, BM, D_PAD, DQ_STAGES)),
            ],
            [4, 1, 1],
            [240, 24, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (desc_dq, buffers, place, 0, CONFIG)),
                (_consume, (desc_dq, buffers, place, 1, CONFIG)),
                (_load, load_args),
            ],
            [4, 1],
            [240, 24],
        )


def _operand(t: torch.Tensor, rows: int, cols: int):
    b, s, h, d = t.shape
    own, plain = t.stride(), (s * h * d, h * d, d, 1)
    sb, ss, sh, _ = (p if n == 1 else o for n, o, p in zip((b, s, h, d), own, plain, strict=True))
    return describe(t, [b, h, s, d], [sb, sh, ss, 1], [1, 1, rows, cols])


def launch_hopper_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    key_range: KeyRange,
    *,
    scale: float,
    softcap: float,
    dq_acc: torch.Tensor,
    dk_acc: torch.Tensor,
    dv_acc: torch.Tensor,
    fresh: bool,
    deterministic: bool = False,
    options: dict | None = None,
) -> None:
    b, sq, h, d = q.shape
    sk, hk = k.shape[1:3]
    d_pad = max(64, triton.next_power_of_2(d))
    o = {"BM": 64, "STAGES": 2, "DQ_STAGES": 1, "PREFETCH": 2, "DQM": "storer", "ROT": 0, **(options or {})}
    bm = o["BM"]
    lse2, delta2 = prepare_rows(lse, delta)
    dq_tile = (64, d_pad) if bm == 128 else (64, d_pad // 2)
    _backward_kernel[(triton.cdiv(sk, 128) * hk * b,)](
        _operand(q, bm, d_pad), _operand(dout, bm, d_pad), _operand(k, 128, d_pad), _operand(v, 128, d_pad),
        describe(lse2, [lse2.numel()], [1], [bm]), describe(delta2, [lse2.numel()], [1], [bm]),
        _operand(dq_acc, *dq_tile), dq_acc, dk_acc, dv_acc,
        scale=scale, qk_scale=scale * LOG2_E, sq=sq, sq_pad=lse2.shape[-1], sk=sk,
        num_heads=h, num_kv_heads=hk, group=h // hk,
        stride_dkb=dk_acc.stride(0), stride_dks=dk_acc.stride(1), stride_dkh=dk_acc.stride(2),
        stride_dvb=dv_acc.stride(0), stride_dvs=dv_acc.stride(1), stride_dvh=dv_acc.stride(2), stride_dqb=dq_acc.stride(0), stride_dqs=dq_acc.stride(1),
        D=d, D_PAD=d_pad, EVEN_N=sk % 128 == 0, FRESH=fresh, WITH_DQ=not deterministic, SOFTCAP=float(softcap),
        **key_interval_args(key_range, sq, sk, q.device), **o, num_warps=4,
    )  # fmt: skip
