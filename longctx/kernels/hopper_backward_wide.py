"""The Hopper backward for head dims above 128, in Gluon: one program owns 64 keys of one key head and walks the rows.

Here dk and dv of 64 keys fill the registers of both warpgroups, so each holds half of their columns. The scores of a block
of rows are halved by rows instead; P and dS meet in shared memory, and every other product takes its left side from there.
The parties are those of `hopper_backward_kernel`.

Source: Dao 2023 (arXiv 2307.08691), algorithm 2.
"""

# mypy: ignore-errors
# Every party unpacks all buffers and barriers by name, whichever it uses.
# ruff: noqa: RUF059

from __future__ import annotations

from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from longctx.kernels.gluon_api import gl, gluon, named_barrier_sync
from longctx.kernels.hopper_backward_kernel import (
    PLAIN_ARGS,
    add_dq,
    load_tiles,
    make_barriers,
    masked,
    probabilities,
    put_dq,
    row_blocks,
    seen_by,
    store_columns,
)


@gluon.jit
def _scores(t, m, row_lo, row_hi, a, b, qk_scale, buffers, barriers, CID: gl.constexpr, CONFIG: gl.constexpr):
    """Rows [CID * BM / 2, (CID + 1) * BM / 2) of the block: P and dS, [BM, 64] together, into shared memory."""
    q_bufs, do_bufs, k_buf, v_buf, lse_bufs, delta_bufs, p_bufs, ds_bufs, dq_bufs = buffers
    kv_full, q_full, q_empty, do_full, do_empty, dq_full, dq_empty = barriers
    BM: gl.constexpr = CONFIG[1]
    STAGES: gl.constexpr = CONFIG[2]
    MASKED: gl.constexpr = CONFIG[3]
    HAS_HI: gl.constexpr = CONFIG[4]
    SOFTCAP: gl.constexpr = CONFIG[6]
    DO_STAGES: gl.constexpr = CONFIG[11]
    P_STAGES: gl.constexpr = CONFIG[12]
    HALF: gl.constexpr = BM // 2
    S_L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HALF, 16])
    OF_ROWS: gl.constexpr = gl.SliceLayout(0, S_L)
    dtype: gl.constexpr = q_bufs.dtype
    i = t % STAGES
    j = t % DO_STAGES
    zeros = gl.zeros([64, HALF], gl.float32, layout=S_L)
    mbarrier.wait(q_full.index(i), (t // STAGES) & 1)
    q = q_bufs.index(i).slice(CID * HALF, HALF, dim=0).permute((1, 0))
    s = warpgroup_mma(k_buf, q, zeros, use_acc=False, is_async=True)
    mbarrier.wait(do_full.index(j), (t // DO_STAGES) & 1)
    do = do_bufs.index(j).slice(CID * HALF, HALF, dim=0).permute((1, 0))
    dp = warpgroup_mma(v_buf, do, zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    lse = lse_bufs.index(i).slice(CID * HALF, HALF, dim=0).load(OF_ROWS)
    p, slope = probabilities(s, lse, qk_scale, SOFTCAP)
    if MASKED:  # noqa: SIM102 - the first test is made by the compiler, the second by the GPU
        if (m < a) | (m >= b):
            p = masked(p, m * BM + CID * HALF, row_lo, row_hi, HALF, S_L, HAS_HI)
    if P_STAGES == 1:
        # The other warpgroup has read what this one is about to overwrite.
        named_barrier_sync(9, 256)
    p_bufs.index(t % P_STAGES).slice(CID * HALF, HALF, dim=0).permute((1, 0)).store(p.to(dtype))
    if SOFTCAP > 0.0:
        p *= slope
    delta = delta_bufs.index(j).slice(CID * HALF, HALF, dim=0).load(OF_ROWS)
    dp = warpgroup_mma_wait(0, deps=(dp,))
    ds = (p * (dp - delta[None, :])).to(dtype)
    ds_bufs.index(t % P_STAGES).slice(CID * HALF, HALF, dim=0).permute((1, 0)).store(ds)
    fence_async_shared()
    named_barrier_sync(9, 256)


@gluon.jit
def _gradients(t, dk, dv, scale, buffers, barriers, CID: gl.constexpr, CONFIG: gl.constexpr):
    """Columns [CID * D_PAD / 2, (CID + 1) * D_PAD / 2) of dk, dv and dq from P and dS."""
    q_bufs, do_bufs, k_buf, v_buf, lse_bufs, delta_bufs, p_bufs, ds_bufs, dq_bufs = buffers
    kv_full, q_full, q_empty, do_full, do_empty, dq_full, dq_empty = barriers
    BM: gl.constexpr = CONFIG[1]
    STAGES: gl.constexpr = CONFIG[2]
    WITH_DQ: gl.constexpr = CONFIG[5]
    DO_STAGES: gl.constexpr = CONFIG[11]
    P_STAGES: gl.constexpr = CONFIG[12]
    HALF: gl.constexpr = CONFIG[0] // 2
    PIECE: gl.constexpr = HALF // 2
    DQ_L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, PIECE, 16])
    i = t % STAGES
    j = t % DO_STAGES
    p = p_bufs.index(t % P_STAGES)
    ds = ds_bufs.index(t % P_STAGES)
    do = do_bufs.index(j).slice(CID * HALF, HALF, dim=1)
    q = q_bufs.index(i).slice(CID * HALF, HALF, dim=1)
    dv = warpgroup_mma(p.permute((1, 0)), do, dv, is_async=True)
    if WITH_DQ:
        zeros = gl.zeros([BM, PIECE], gl.float32, layout=DQ_L)
        left = k_buf.slice(CID * HALF, PIECE, dim=1)
        right = k_buf.slice(CID * HALF + PIECE, PIECE, dim=1)
        dq_left = warpgroup_mma(ds, left, zeros, use_acc=False, is_async=True)
        dq_right = warpgroup_mma(ds, right, zeros, use_acc=False, is_async=True)
        dv = warpgroup_mma_wait(2, deps=(dv,))
    else:
        dv = warpgroup_mma_wait(0, deps=(dv,))
    mbarrier.arrive(do_empty.index(j), count=1)
    dk = warpgroup_mma(ds.permute((1, 0)), q, dk, is_async=True)
    if WITH_DQ:
        full, empty, dq_buf = dq_full.index(CID), dq_empty.index(CID), dq_bufs.index(CID)
        dq_left = warpgroup_mma_wait(2, deps=(dq_left,))
        put_dq(dq_left * scale, 0, dq_buf, full, empty)
        dq_right = warpgroup_mma_wait(1, deps=(dq_right,))
        put_dq(dq_right * scale, 1, dq_buf, full, empty)
    dk = warpgroup_mma_wait(0, deps=(dk,))
    mbarrier.arrive(q_empty.index(i), count=1)
    return dk, dv


@gluon.jit
def _consume(buffers, barriers, gradients, place, CID: gl.constexpr, CONFIG: gl.constexpr):
    DK, DV, stride_dks, stride_dvs = gradients
    LO, HI, scale, qk_scale, n0, m0, m1, a, b, total, sq, sk = place
    HALF: gl.constexpr = CONFIG[0] // 2
    BM: gl.constexpr = CONFIG[1]
    D: gl.constexpr = CONFIG[7]
    KIND: gl.constexpr = CONFIG[8]
    EVEN_N: gl.constexpr = CONFIG[9]
    FRESH: gl.constexpr = CONFIG[10]
    S_L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM // 2, 16])
    KV_L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HALF, 16])
    key = n0 + gl.arange(0, 64, layout=gl.SliceLayout(1, S_L))
    row_lo, row_hi = seen_by(key, LO, HI, sq, sk, KIND, EVEN_N)
    dk = gl.zeros([64, HALF], gl.float32, layout=KV_L)
    dv = gl.zeros([64, HALF], gl.float32, layout=KV_L)
    mbarrier.wait(barriers[0], 0)
    m = m0
    for t in range(total):
        _scores(t, m, row_lo, row_hi, a, b, qk_scale, buffers, barriers, CID, CONFIG)
        dk, dv = _gradients(t, dk, dv, scale, buffers, barriers, CID, CONFIG)
        m = gl.where(m + 1 == m1, m0, m + 1)
    store_columns(DV, dv, n0, CID * HALF, stride_dvs, sk, D, 64, HALF, KV_L, FRESH)
    store_columns(DK, dk * scale, n0, CID * HALF, stride_dks, sk, D, 64, HALF, KV_L, FRESH)


@gluon.jit(do_not_specialize=PLAIN_ARGS)
def backward_wide_kernel(
    desc_q, desc_do, desc_k, desc_v, desc_lse, desc_delta, desc_dq, DK, DV, LO, HI, stride_lo,
    scale, qk_scale, sq, sq_pad, sk, num_heads, num_kv_heads, group,
    stride_dkb, stride_dks, stride_dkh, stride_dvb, stride_dvs, stride_dvh,
    D: gl.constexpr, D_PAD: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, DO_STAGES: gl.constexpr, P_STAGES: gl.constexpr,
    KIND: gl.constexpr, HAS_HI: gl.constexpr, EVEN_N: gl.constexpr, FRESH: gl.constexpr,
    WITH_DQ: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    pid = gl.program_id(0)
    num_n = gl.cdiv(sk, BN)
    n0 = pid % num_n * BN
    kv_head = pid // num_n % num_kv_heads
    batch = pid // num_n // num_kv_heads
    head = kv_head * group
    if KIND == "rows":
        LO += batch.to(gl.int64) * stride_lo
        HI += batch.to(gl.int64) * stride_lo
    m0, m1, a, b = row_blocks(LO, HI, n0, sq, sk, BM, BN, KIND, EVEN_N)
    total = (m1 - m0) * group
    DK += batch.to(gl.int64) * stride_dkb + kv_head.to(gl.int64) * stride_dkh
    DV += batch.to(gl.int64) * stride_dvb + kv_head.to(gl.int64) * stride_dvh

    dtype: gl.constexpr = desc_q.dtype
    ROWS_L: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, D_PAD], dtype)
    KEYS_L: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, D_PAD], dtype)
    P_L: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BN], dtype)
    DQ_L: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, D_PAD // 4], gl.float32)
    q_bufs = gl.allocate_shared_memory(dtype, [STAGES, BM, D_PAD], ROWS_L)
    do_bufs = gl.allocate_shared_memory(dtype, [DO_STAGES, BM, D_PAD], ROWS_L)
    k_buf = gl.allocate_shared_memory(dtype, [BN, D_PAD], KEYS_L)
    v_buf = gl.allocate_shared_memory(dtype, [BN, D_PAD], KEYS_L)
    lse_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, BM], desc_lse.layout)
    delta_bufs = gl.allocate_shared_memory(gl.float32, [DO_STAGES, BM], desc_delta.layout)
    p_bufs = gl.allocate_shared_memory(dtype, [P_STAGES, BM, BN], P_L)
    ds_bufs = gl.allocate_shared_memory(dtype, [P_STAGES, BM, BN], P_L)
    dq_bufs = gl.allocate_shared_memory(gl.float32, [2, BM, D_PAD // 4], DQ_L)
    barriers = make_barriers(STAGES, DO_STAGES)

    MASKED: gl.constexpr = KIND != "full" or not EVEN_N
    CONFIG: gl.constexpr = (
        D_PAD, BM, STAGES, MASKED, HAS_HI, WITH_DQ, SOFTCAP, D, KIND, EVEN_N, FRESH, DO_STAGES, P_STAGES,
    )  # fmt: skip
    buffers = (q_bufs, do_bufs, k_buf, v_buf, lse_bufs, delta_bufs, p_bufs, ds_bufs, dq_bufs)
    gradients = (DK, DV, stride_dks, stride_dvs)
    place = (LO, HI, scale, qk_scale, n0, m0, m1, a, b, total, sq, sk)
    sources = (desc_q, desc_do, desc_k, desc_v, desc_lse, desc_delta)
    loaded = (q_bufs, do_bufs, k_buf, v_buf, lse_bufs, delta_bufs)
    signals = (barriers[0], barriers[1], barriers[2], barriers[3], barriers[4])
    walk = (batch, kv_head, head, num_heads, sq_pad, n0, m0, m1, total)
    if WITH_DQ:
        gl.warp_specialize(
            [
                (_consume, (buffers, barriers, gradients, place, 0, CONFIG)),
                (_consume, (buffers, barriers, gradients, place, 1, CONFIG)),
                (load_tiles, (sources, loaded, signals, walk, BM, STAGES, DO_STAGES)),
                (add_dq, (desc_dq, dq_bufs, barriers[5], barriers[6], batch, head, m0, m1, total, BM, D_PAD // 4, 2)),
            ],
            [4, 1, 1],
            [240, 24, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (buffers, barriers, gradients, place, 0, CONFIG)),
                (_consume, (buffers, barriers, gradients, place, 1, CONFIG)),
                (load_tiles, (sources, loaded, signals, walk, BM, STAGES, DO_STAGES)),
            ],
            [4, 1],
            [240, 24],
        )
