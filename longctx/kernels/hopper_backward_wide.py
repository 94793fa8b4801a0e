"""Wide."""

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

from longctx.kernels.gluon_api import describe, gl, gluon, named_barrier_sync, tma_load, tma_reduce_add, tma_store_wait
from longctx.kernels.hopper_backward import _PLAIN_ARGS, _next_block, _opaque, _operand
from longctx.kernels.tiles import LOG2_E, key_interval_args
from longctx.kernels.triton_backward import prepare_rows
from longctx.masks import KeyRange


@gluon.jit
def _load(
    desc_q, desc_do, desc_k, desc_v, desc_lse, desc_delta,
    q_bufs, do_bufs, k_buf, v_buf, lse_bufs, delta_bufs, kv_full, q_full, q_empty, do_full, do_empty,
    batch, kv_head, head, num_heads, sq_pad, n0, start, m0, m1, total, BM: gl.constexpr, STAGES: gl.constexpr, DO_STAGES: gl.constexpr
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
        i = t % DO_STAGES
        ph = (t // DO_STAGES) & 1
        mbarrier.wait(do_empty.index(i), ph ^ 1)
        mbarrier.expect(do_full.index(i), desc_do.block_type.nbytes + desc_delta.block_type.nbytes)
        tma_load(desc_do, [batch, head, m * BM, 0], do_full.index(i), do_bufs.index(i))
        tma_load(desc_delta, [of_rows], do_full.index(i), delta_bufs.index(i))
        m, head = _next_block(m, head, start, m0, m1)


@gluon.jit
def _reduce_dq(desc_dq, dq_bufs, dq_full, dq_empty, batch, head, start, m0, m1, total, BM: gl.constexpr, D_PAD: gl.constexpr):
    m = start
    for t in range(total):
        for piece in gl.static_range(2):
            for c in gl.static_range(2):
                mbarrier.wait(dq_full.index(c), piece)
                tma_reduce_add(desc_dq, [batch, head, m * BM, c * (D_PAD // 2) + piece * (D_PAD // 4)], dq_bufs.index(c))
            tma_store_wait(1)
            mbarrier.arrive(dq_empty.index(0), count=1)
            tma_store_wait(0)
            mbarrier.arrive(dq_empty.index(1), count=1)
        m, head = _next_block(m, head, start, m0, m1)


@gluon.jit
def _put_dq(dq, t, piece, buffers, CID: gl.constexpr):
    dq_bufs, dq_full, dq_empty = buffers[5], buffers[12], buffers[13]
    mbarrier.wait(dq_empty.index(CID), piece ^ 1)
    dq_bufs.index(CID).store(dq)
    fence_async_shared()
    mbarrier.arrive(dq_full.index(CID), count=1)


@gluon.jit
def _consume(buffers, place, CID: gl.constexpr, CONFIG: gl.constexpr):
    (
        q_bufs, do_bufs, k_buf, v_buf, pds_bufs, dq_bufs, lse_bufs, delta_bufs,
        kv_full, q_full, q_empty, do_full, do_empty_, dq_full, dq_empty,
    ) = buffers  # fmt: skip
    do_empty = do_empty_
    DQ, stride_dqs, DK, DV, LO, HI, stride_dks, stride_dvs, scale, qk_scale, batch, head, n0, start, m0, a, b, m1, total, sq, sk = place
    D: gl.constexpr = CONFIG[0]
    D_PAD: gl.constexpr = CONFIG[1]
    BM: gl.constexpr = CONFIG[2]
    STAGES: gl.constexpr = CONFIG[3]
    DO_STAGES: gl.constexpr = CONFIG[4]
    KIND: gl.constexpr = CONFIG[5]
    HAS_HI: gl.constexpr = CONFIG[7]
    EVEN_N: gl.constexpr = CONFIG[8]
    FRESH: gl.constexpr = CONFIG[9]
    WITH_DQ: gl.constexpr = CONFIG[10]
    P_STAGES: gl.constexpr = CONFIG[11]
    SOFTCAP: gl.constexpr = CONFIG[12]
    DQM: gl.constexpr = CONFIG[13]
    MASKED: gl.constexpr = KIND != "full" or not EVEN_N
    H: gl.constexpr = BM // 2
    DH: gl.constexpr = D_PAD // 2
    S_L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, H, 16])
    KV_L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DH, 16])
    DQ_N: gl.constexpr = DH // 2 if DQM == "storer" else DH
    DQ_L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DQ_N, 16])
    CS: gl.constexpr = gl.SliceLayout(0, S_L)
    dt: gl.constexpr = q_bufs.dtype
    z = gl.zeros([64, H], gl.float32, layout=S_L)
    dqz = gl.zeros([BM, DQ_N], gl.float32, layout=DQ_L)
    dk = gl.zeros([64, DH], gl.float32, layout=KV_L)
    dv = gl.zeros([64, DH], gl.float32, layout=KV_L)
    key = n0 + gl.arange(0, 64, layout=gl.SliceLayout(1, S_L))
    row_lo = key * 0
    row_hi = row_lo + sq
    if KIND == "band":
        row_lo = key + LO
        row_hi = key + HI
    elif KIND == "rows":
        row_lo = gl.load(LO + key, mask=key < sk, other=0)
        row_hi = gl.load(HI + key, mask=key < sk, other=0)
    if not EVEN_N:
        row_lo = gl.where(key < sk, row_lo, 1 << 30)
    mbarrier.wait(kv_full, 0)
    m = start
    for t in range(total):
        i = t % STAGES
        j = t % DO_STAGES
        q = q_bufs.index(i)
        do = do_bufs.index(j)
        mbarrier.wait(q_full.index(i), (t // STAGES) & 1)
        s = warpgroup_mma(k_buf, q.slice(CID * H, H, dim=0).permute((1, 0)), z, use_acc=False, is_async=True)
        mbarrier.wait(do_full.index(j), (t // DO_STAGES) & 1)
        dp = warpgroup_mma(v_buf, do.slice(CID * H, H, dim=0).permute((1, 0)), z, use_acc=False, is_async=True)
        lse = lse_bufs.index(i).slice(CID * H, H, dim=0).load(CS)
        s = warpgroup_mma_wait(1, deps=(s, ))
        if SOFTCAP > 0.0:
            e = gl.exp2(gl.abs(s * (qk_scale * (0.6931471805599453 / SOFTCAP))) * -2.8853900817779268)
            th = (1.0 - e) / (1.0 + e)
            th = gl.where(s < 0.0, -th, th)
            p = gl.exp2(th * (SOFTCAP * 1.4426950408889634) - lse[None, :])
        else:
            p = gl.exp2(s * qk_scale - lse[None, :])
        if MASKED:
            if (m < a) | (m >= b):
                row = m * BM + CID * H + _opaque(gl.arange(0, H, layout=CS))
                visible = row[None, :] >= row_lo[:, None]
                if HAS_HI:
                    visible = visible & (row[None, :] < row_hi[:, None])
                p = gl.where(visible, p, 0.0)
        delta = delta_bufs.index(j).slice(CID * H, H, dim=0).load(CS)
        p_buf = pds_bufs.index(2 * (t % P_STAGES))
        ds_buf = pds_bufs.index(2 * (t % P_STAGES) + 1)
        if P_STAGES == 1:
            # The other half's readers of the previous block are done.
            named_barrier_sync(9, 256)
        p_buf.slice(CID * H, H, dim=0).permute((1, 0)).store(p.to(dt))
        if SOFTCAP > 0.0:
            p = p * (1.0 - th * th)
        dp = warpgroup_mma_wait(0, deps=(dp, ))
        ds = p * (dp - delta[None, :])
        ds_buf.slice(CID * H, H, dim=0).permute((1, 0)).store(ds.to(dt))
        fence_async_shared()
        named_barrier_sync(9, 256)
        dv = warpgroup_mma(p_buf.permute((1, 0)), do.slice(CID * DH, DH, dim=1), dv, is_async=True)
        if WITH_DQ:
            dq = warpgroup_mma(ds_buf, k_buf.slice(CID * DH, DQ_N, dim=1), dqz, use_acc=False, is_async=True)
            if DQM == "storer":
                dq1 = warpgroup_mma(ds_buf, k_buf.slice(CID * DH + DQ_N, DQ_N, dim=1), dqz, use_acc=False, is_async=True)
                dv = warpgroup_mma_wait(2, deps=(dv, ))
            else:
                dv = warpgroup_mma_wait(1, deps=(dv, ))
        else:
            dv = warpgroup_mma_wait(0, deps=(dv, ))
        mbarrier.arrive(do_empty.index(j), count=1)
        dk = warpgroup_mma(ds_buf.permute((1, 0)), q.slice(CID * DH, DH, dim=1), dk, is_async=True)
        if WITH_DQ:
            if DQM == "storer":
                dq = warpgroup_mma_wait(2, deps=(dq, ))
                mbarrier.wait(dq_empty.index(CID), 1)
                dq_bufs.index(CID).store(dq * scale)
                fence_async_shared()
                mbarrier.arrive(dq_full.index(CID), count=1)
                dq1 = warpgroup_mma_wait(1, deps=(dq1, ))
                mbarrier.wait(dq_empty.index(CID), 0)
                dq_bufs.index(CID).store(dq1 * scale)
                fence_async_shared()
                mbarrier.arrive(dq_full.index(CID), count=1)
            else:
                dq = warpgroup_mma_wait(1, deps=(dq, ))
                rm = m * BM + gl.arange(0, BM, layout=gl.SliceLayout(1, DQ_L))
                cd = CID * DH + gl.arange(0, DQ_N, layout=gl.SliceLayout(0, DQ_L))
                ok = (rm < sq)[:, None] & (cd < D)[None, :]
                gl.atomic_add(DQ + head.to(gl.int64) * D + (rm.to(gl.int64)[:, None] * stride_dqs + cd[None, :]), dq * scale, mask=ok, sem="relaxed")
        dk = warpgroup_mma_wait(0, deps=(dk, ))
        mbarrier.arrive(q_empty.index(i), count=1)
        m, head = _next_block(m, head, start, m0, m1)
    row = n0 + gl.arange(0, 64, layout=gl.SliceLayout(1, KV_L))
    col = CID * DH + gl.arange(0, DH, layout=gl.SliceLayout(0, KV_L))
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


@gluon.jit(do_not_specialize=_PLAIN_ARGS)
def _backward_wide_kernel(
    desc_q, desc_do, desc_k, desc_v, desc_lse, desc_delta, desc_dq, DQ, DK, DV, LO, HI, stride_lo,
    scale, qk_scale, sq, sq_pad, sk, num_heads, num_kv_heads, group,
    stride_dkb, stride_dks, stride_dkh, stride_dvb, stride_dvs, stride_dvh, stride_dqb, stride_dqs,
    D: gl.constexpr, D_PAD: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, DO_STAGES: gl.constexpr,
    KIND: gl.constexpr, HAS_LO: gl.constexpr, HAS_HI: gl.constexpr, EVEN_N: gl.constexpr, FRESH: gl.constexpr,
    WITH_DQ: gl.constexpr, P_STAGES: gl.constexpr, SOFTCAP: gl.constexpr, DQM: gl.constexpr,
):  # fmt: skip
    BN: gl.constexpr = 64
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
    m0 = gl.minimum(first, sq - 1) // BM
    m1 = gl.maximum(gl.cdiv(end, BM), m0 + 1)
    a = gl.cdiv(full_lo, BM)
    b = gl.where(full_hi == sq, m1, full_hi // BM)
    if not EVEN_N:
        b = gl.where(n0 + BN > sk, 0, b)
    total = (m1 - m0) * group
    start = m0

    KV: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, D_PAD], dt)
    QO: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, D_PAD], dt)
    DS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BN], dt)
    DQ_S: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, D_PAD // 4], gl.float32)
    q_bufs = gl.allocate_shared_memory(dt, [STAGES, BM, D_PAD], QO)
    do_bufs = gl.allocate_shared_memory(dt, [DO_STAGES, BM, D_PAD], QO)
    k_buf = gl.allocate_shared_memory(dt, [BN, D_PAD], KV)
    v_buf = gl.allocate_shared_memory(dt, [BN, D_PAD], KV)
    pds_bufs = gl.allocate_shared_memory(dt, [2 * P_STAGES, BM, BN], DS)
    STAGED: gl.constexpr = WITH_DQ and DQM == "storer"
    dq_bufs = gl.allocate_shared_memory(gl.float32, [2 if STAGED else 1, BM if STAGED else 8, D_PAD // 4], DQ_S)
    lse_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, BM], desc_lse.layout)
    delta_bufs = gl.allocate_shared_memory(gl.float32, [DO_STAGES, BM], desc_lse.layout)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [DO_STAGES, 1], mbarrier.MBarrierLayout())
    do_empty = gl.allocate_shared_memory(gl.int64, [DO_STAGES, 1], mbarrier.MBarrierLayout())
    dq_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    dq_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
    for i in gl.static_range(DO_STAGES):
        mbarrier.init(do_full.index(i), count=1)
        mbarrier.init(do_empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(dq_full.index(i), count=1)
        mbarrier.init(dq_empty.index(i), count=1)
    fence_async_shared()

    DK += batch.to(gl.int64) * stride_dkb + kv_head.to(gl.int64) * stride_dkh
    DQ += batch.to(gl.int64) * stride_dqb
    DV += batch.to(gl.int64) * stride_dvb + kv_head.to(gl.int64) * stride_dvh
    buffers = (
        q_bufs, do_bufs, k_buf, v_buf, pds_bufs, dq_bufs, lse_bufs, delta_bufs,
        kv_full, q_full, q_empty, do_full, do_empty, dq_full, dq_empty,
    )  # fmt: skip
    CONFIG: gl.constexpr = (D, D_PAD, BM, STAGES, DO_STAGES, KIND, HAS_LO, HAS_HI, EVEN_N, FRESH, WITH_DQ, P_STAGES, SOFTCAP, DQM)
    place = (DQ, stride_dqs, DK, DV, LO, HI, stride_dks, stride_dvs, scale, qk_scale, batch, head, n0, start, m0, a, b, m1, total, sq, sk)
    load_args = (
        desc_q, desc_do, desc_k, desc_v, desc_lse, desc_delta,
        q_bufs, do_bufs, k_buf, v_buf, lse_bufs, delta_bufs, kv_full, q_full, q_empty, do_full, do_empty,
        batch, kv_head, head, num_heads, sq_pad, n0, start, m0, m1, total, BM, STAGES, DO_STAGES,
    )  # fmt: skip
    if STAGED:
        gl.warp_specialize(
            [
                (_consume, (buffers, place, 0, CONFIG)),
                (_consume, (buffers, place, 1, CONFIG)),
                (_load, load_args),
                (_reduce_dq, (desc_dq, dq_bufs, dq_full, dq_empty, batch, head, start, m0, m1, total, BM, D_PAD)),
            ],
            [4, 1, 1],
            [240, 24, 24],
        )
    else:
        gl.warp_specialize(
            [(_consume, (buffers, place, 0, CONFIG)), (_consume, (buffers, place, 1, CONFIG)), (_load, load_args)],
            [4, 1],
            [240, 24],
        )


def launch_wide(dout, q, k, v, lse, delta, key_range: KeyRange, *, scale, softcap, dq_acc, dk_acc, dv_acc, fresh, deterministic=False, options=None):
    b, sq, h, d = q.shape
    sk, hk = k.shape[1:3]
    d_pad = 256
    o = {"BM": 64, "STAGES": 2, "DO_STAGES": 1, "P_STAGES": 1, "DQM": "storer", **(options or {})}
    bm = o["BM"]
    lse2, delta2 = prepare_rows(lse, delta)
    _backward_wide_kernel[(triton.cdiv(sk, 64) * hk * b,)](
        _operand(q, bm, d_pad), _operand(dout, bm, d_pad), _operand(k, 64, d_pad), _operand(v, 64, d_pad),
        describe(lse2, [lse2.numel()], [1], [bm]), describe(delta2, [lse2.numel()], [1], [bm]),
        _operand(dq_acc, bm, d_pad // 4), dq_acc, dk_acc, dv_acc,
        scale=scale, qk_scale=scale * LOG2_E, sq=sq, sq_pad=lse2.shape[-1], sk=sk,
        num_heads=h, num_kv_heads=hk, group=h // hk,
        stride_dkb=dk_acc.stride(0), stride_dks=dk_acc.stride(1), stride_dkh=dk_acc.stride(2),
        stride_dvb=dv_acc.stride(0), stride_dvs=dv_acc.stride(1), stride_dvh=dv_acc.stride(2), stride_dqb=dq_acc.stride(0), stride_dqs=dq_acc.stride(1),
        D=d, D_PAD=d_pad, EVEN_N=sk % 64 == 0, FRESH=fresh, WITH_DQ=not deterministic, SOFTCAP=float(softcap),
        **key_interval_args(key_range, sq, sk, q.device), **o, num_warps=4,
    )  # fmt: skip
