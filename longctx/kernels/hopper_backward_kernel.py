"""The Hopper backward for head dims up to 128, in Gluon: one program owns 128 keys of one key head and walks the rows.

A program is four parties: a warp that loads tiles with the TMA engine, two warpgroups of 64 keys each that compute, and a
warp that adds dq into global memory with TMA reductions. dk and dv stay in registers over all rows and over all query heads
of the group, so nothing is added atomically to them. For one block of rows, per warpgroup (K, V: its 64 keys):

    S^T = K Q^T; dP^T = V dO^T;  P^T = exp2(S^T - lse);  dV += P^T dO;  dS^T = P^T (dP^T - delta);  dK += dS^T Q

and with dS^T of both warpgroups in shared memory, each computes half the columns of dQ = dS K. P^T and dS^T go from the
registers in which they arise straight into the products for dv and dk: the transposed form is what makes that possible.

Source: Dao 2023 (arXiv 2307.08691), algorithm 2; Shah et al. 2024 (arXiv 2407.08608), appendix B.1: the split into parties.
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

from longctx.kernels.gluon_api import gl, gluon, named_barrier_sync, tma_load, tma_reduce_add, tma_store_wait

PLAIN_ARGS = ["LO", "HI", "stride_lo", "sq", "sq_pad", "sk", "num_heads", "num_kv_heads", "group"]


@gluon.jit
def opaque(x):
    """`x`, of which the compiler knows nothing: what is computed from it stays inside the loop that computes it."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def row_blocks(
    LO, HI, n0, sq, sk, BM: gl.constexpr, BN: gl.constexpr, KIND: gl.constexpr, EVEN_N: gl.constexpr
):  # fmt: skip
    """The blocks of rows [m0, m1) that see any of the keys [n0, n0 + BN), and [a, b) of them that see all.

    At least one block, if only to find all of it masked: the loops need something to walk over.
    """
    last = gl.minimum(n0 + BN, sk) - 1
    if KIND == "full":
        first, end, full_lo, full_hi = n0 * 0, n0 * 0 + sq, n0 * 0, n0 * 0 + sq
    elif KIND == "band":
        first = gl.maximum(n0 + LO, 0)
        end = gl.minimum(gl.maximum(last + HI, 0), sq)
        full_lo = gl.maximum(last + LO, 0)
        full_hi = gl.minimum(gl.maximum(n0 + HI, 0), sq)
    else:
        first, end = gl.load(LO + n0), gl.load(HI + last)
        full_lo, full_hi = gl.load(LO + last), gl.load(HI + n0)
    m0 = gl.minimum(first, sq - 1) // BM
    m1 = gl.maximum(gl.cdiv(end, BM), m0 + 1)
    a = gl.cdiv(full_lo, BM)
    # Rows from sq on need no mask: their lse is +inf.
    b = gl.where(full_hi == sq, m1, full_hi // BM)
    if not EVEN_N:
        # Keys from sk on do: they are zeros in shared memory, which is a score like any other.
        b = gl.where(n0 + BN > sk, 0, b)
    return m0, m1, a, b


@gluon.jit
def seen_by(key, LO, HI, sq, sk, KIND: gl.constexpr, EVEN_N: gl.constexpr):
    """The rows [row_lo, row_hi) that see each key."""
    if KIND == "band":
        row_lo = key + LO
        row_hi = key + HI
    elif KIND == "rows":
        row_lo = gl.load(LO + key, mask=key < sk, other=0)
        row_hi = gl.load(HI + key, mask=key < sk, other=0)
    else:
        row_lo = key * 0
        row_hi = row_lo + sq
    if not EVEN_N:
        row_lo = gl.where(key < sk, row_lo, 1 << 30)
    return row_lo, row_hi


@gluon.jit
def next_block(m, head, m0, m1):
    """The block of rows after `m` in the walk over [m0, m1) of one query head after the other."""
    wrap = m + 1 == m1
    return gl.where(wrap, m0, m + 1), gl.where(wrap, head + 1, head)


@gluon.jit
def probabilities(s, lse, qk_scale, SOFTCAP: gl.constexpr):
    """P of the scores s, and P times what the cap's derivative leaves of it."""
    if SOFTCAP > 0.0:
        e = gl.exp2(gl.abs(s * (qk_scale * (0.6931471805599453 / SOFTCAP))) * -2.8853900817779268)
        t = (1.0 - e) / (1.0 + e)
        t = gl.where(s < 0.0, -t, t)
        p = gl.exp2(t * (SOFTCAP * 1.4426950408889634) - lse[None, :])
        slope = 1.0 - t * t
    else:
        p = gl.exp2(s * qk_scale - lse[None, :])
        slope = 1.0
    return p, slope


@gluon.jit
def masked(p, row0, row_lo, row_hi, BM: gl.constexpr, LAYOUT: gl.constexpr, HAS_HI: gl.constexpr):
    """P^T [keys, BM] of the rows from row0 on, 0 where a row does not see the key."""
    row = row0 + opaque(gl.arange(0, BM, layout=gl.SliceLayout(0, LAYOUT)))
    visible = row[None, :] >= row_lo[:, None]
    if HAS_HI:
        visible = visible & (row[None, :] < row_hi[:, None])
    return gl.where(visible, p, 0.0)


@gluon.jit
def load_tiles(descriptors, buffers, barriers, place, BM: gl.constexpr, STAGES: gl.constexpr, DO_STAGES: gl.constexpr):
    """The loading warp: K and V once, then Q with its lse and dO with its delta, block after block of rows."""
    desc_q, desc_do, desc_k, desc_v, desc_lse, desc_delta = descriptors
    q_bufs, do_bufs, k_buf, v_buf, lse_bufs, delta_bufs = buffers
    kv_full, q_full, q_empty, do_full, do_empty = barriers
    batch, kv_head, head, num_heads, sq_pad, n0, m0, m1, total = place
    mbarrier.expect(kv_full, desc_k.block_type.nbytes + desc_v.block_type.nbytes)
    tma_load(desc_k, [batch, kv_head, n0, 0], kv_full, k_buf)
    tma_load(desc_v, [batch, kv_head, n0, 0], kv_full, v_buf)
    m = m0
    for t in range(total):
        # 32 bits suffice: there is one number per row and head.
        of_rows = (batch * num_heads + head) * sq_pad + m * BM
        i = t % STAGES
        mbarrier.wait(q_empty.index(i), ((t // STAGES) & 1) ^ 1)
        mbarrier.expect(q_full.index(i), desc_q.block_type.nbytes + desc_lse.block_type.nbytes)
        tma_load(desc_q, [batch, head, m * BM, 0], q_full.index(i), q_bufs.index(i))
        tma_load(desc_lse, [of_rows], q_full.index(i), lse_bufs.index(i))
        j = t % DO_STAGES
        mbarrier.wait(do_empty.index(j), ((t // DO_STAGES) & 1) ^ 1)
        mbarrier.expect(do_full.index(j), desc_do.block_type.nbytes + desc_delta.block_type.nbytes)
        tma_load(desc_do, [batch, head, m * BM, 0], do_full.index(j), do_bufs.index(j))
        tma_load(desc_delta, [of_rows], do_full.index(j), delta_bufs.index(j))
        m, head = next_block(m, head, m0, m1)


@gluon.jit
def add_dq(
    desc_dq, dq_bufs, dq_full, dq_empty, batch, head, m0, m1, total, BM: gl.constexpr, COLS: gl.constexpr,
    PIECES: gl.constexpr,
):  # fmt: skip
    """The adding warp: each warpgroup's columns of dq, in PIECES of COLS, from shared into global memory."""
    m = m0
    for t in range(total):
        for piece in gl.static_range(PIECES):
            for c in gl.static_range(2):
                mbarrier.wait(dq_full.index(c), (t * PIECES + piece) & 1)
                tma_reduce_add(desc_dq, [batch, head, m * BM, (c * PIECES + piece) * COLS], dq_bufs.index(c))
            tma_store_wait(1)
            mbarrier.arrive(dq_empty.index(0), count=1)
            tma_store_wait(0)
            mbarrier.arrive(dq_empty.index(1), count=1)
        m, head = next_block(m, head, m0, m1)


@gluon.jit
def put_dq(dq, turn, dq_buf, full, empty):
    """Hand a piece of dq, the `turn`-th, to the adding warp."""
    mbarrier.wait(empty, (turn & 1) ^ 1)
    dq_buf.store(dq)
    fence_async_shared()
    mbarrier.arrive(full, count=1)


@gluon.jit
def store_columns(
    PTR, value, row0, col0, stride_s, sk,
    D: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr, LAYOUT: gl.constexpr, FRESH: gl.constexpr,
):  # fmt: skip
    """PTR[row0 :, col0 :] += value [ROWS, COLS], or = value; within sk rows of D columns."""
    row = row0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    col = col0 + gl.arange(0, COLS, layout=gl.SliceLayout(0, LAYOUT))
    ok = (row < sk)[:, None] & (col < D)[None, :]
    ptrs = PTR + (row.to(gl.int64)[:, None] * stride_s + col[None, :])
    if not FRESH:
        value = value + gl.load(ptrs, mask=ok, other=0.0)
    gl.store(ptrs, value.to(PTR.dtype.element_ty), mask=ok)


@gluon.jit
def _step(t, m, dk, dv, kc, vc, row_lo, row_hi, a, b, qk_scale, scale, buffers, barriers, CID: gl.constexpr, CONFIG: gl.constexpr):  # fmt: skip
    """One block of rows: the t-th of this program, the m-th of its query head."""
    q_bufs, do_bufs, k_buf, v_buf, lse_bufs, delta_bufs, ds_bufs, dq_bufs = buffers
    kv_full, q_full, q_empty, do_full, do_empty, dq_full, dq_empty = barriers
    D_PAD: gl.constexpr = CONFIG[0]
    BM: gl.constexpr = CONFIG[1]
    STAGES: gl.constexpr = CONFIG[2]
    MASKED: gl.constexpr = CONFIG[3]
    HAS_HI: gl.constexpr = CONFIG[4]
    WITH_DQ: gl.constexpr = CONFIG[5]
    SOFTCAP: gl.constexpr = CONFIG[6]
    DQ_N: gl.constexpr = D_PAD // 2
    S_L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16])
    KV_L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D_PAD, 16])
    DQ_L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DQ_N, 16])
    A_L: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=KV_L, k_width=2)
    OF_ROWS: gl.constexpr = gl.SliceLayout(0, S_L)
    dtype: gl.constexpr = q_bufs.dtype
    i = t % STAGES
    phase = (t // STAGES) & 1
    q = q_bufs.index(i)
    do = do_bufs.index(i)
    zeros = gl.zeros([64, BM], gl.float32, layout=S_L)
    mbarrier.wait(q_full.index(i), phase)
    s = warpgroup_mma(kc, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(do_full.index(i), phase)
    dp = warpgroup_mma(vc, do.permute((1, 0)), zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    p, slope = probabilities(s, lse_bufs.index(i).load(OF_ROWS), qk_scale, SOFTCAP)
    if MASKED:  # noqa: SIM102 - the first test is made by the compiler, the second by the GPU
        if (m < a) | (m >= b):
            p = masked(p, m * BM, row_lo, row_hi, BM, S_L, HAS_HI)
    dv = warpgroup_mma(gl.convert_layout(p.to(dtype), A_L), do, dv, is_async=True)
    if SOFTCAP > 0.0:
        p *= slope
    delta = delta_bufs.index(i).load(OF_ROWS)
    dp = warpgroup_mma_wait(1, deps=(dp,))
    ds = (p * (dp - delta[None, :])).to(dtype)
    if WITH_DQ:
        # Two buffers, so that one meeting of the warpgroups per block suffices: nobody is two blocks ahead.
        ds_buf = ds_bufs.index(t % 2)
        ds_buf.slice(CID * 64, 64, dim=0).store(ds)
        fence_async_shared()
        named_barrier_sync(9, 256)
        dq = gl.zeros([BM, DQ_N], gl.float32, layout=DQ_L)
        columns = k_buf.slice(CID * DQ_N, DQ_N, dim=1)
        dq = warpgroup_mma(ds_buf.permute((1, 0)), columns, dq, use_acc=False, is_async=True)
        dv = warpgroup_mma_wait(1, deps=(dv,))
    else:
        dv = warpgroup_mma_wait(0, deps=(dv,))
    mbarrier.arrive(do_empty.index(i), count=1)
    dk = warpgroup_mma(gl.convert_layout(ds, A_L), q, dk, is_async=True)
    if WITH_DQ:
        dq = warpgroup_mma_wait(1, deps=(dq,))
        put_dq(dq * scale, t, dq_bufs.index(CID), dq_full.index(CID), dq_empty.index(CID))
    dk = warpgroup_mma_wait(0, deps=(dk,))
    mbarrier.arrive(q_empty.index(i), count=1)
    return dk, dv


@gluon.jit
def _consume(buffers, barriers, gradients, place, CID: gl.constexpr, CONFIG: gl.constexpr):
    """A computing warpgroup: dk and dv of keys [64 * CID, 64 * CID + 64) of the program's, and half of dq's columns."""
    DK, DV, stride_dks, stride_dvs = gradients
    LO, HI, scale, qk_scale, n0, m0, m1, a, b, total, sq, sk = place
    D_PAD: gl.constexpr = CONFIG[0]
    BM: gl.constexpr = CONFIG[1]
    D: gl.constexpr = CONFIG[7]
    KIND: gl.constexpr = CONFIG[8]
    EVEN_N: gl.constexpr = CONFIG[9]
    FRESH: gl.constexpr = CONFIG[10]
    S_L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16])
    KV_L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D_PAD, 16])
    n0 += CID * 64
    key = n0 + gl.arange(0, 64, layout=gl.SliceLayout(1, S_L))
    row_lo, row_hi = seen_by(key, LO, HI, sq, sk, KIND, EVEN_N)
    kc = buffers[2].slice(CID * 64, 64, dim=0)
    vc = buffers[3].slice(CID * 64, 64, dim=0)
    dk = gl.zeros([64, D_PAD], gl.float32, layout=KV_L)
    dv = gl.zeros([64, D_PAD], gl.float32, layout=KV_L)
    mbarrier.wait(barriers[0], 0)
    m = m0
    for t in range(total):
        dk, dv = _step(t, m, dk, dv, kc, vc, row_lo, row_hi, a, b, qk_scale, scale, buffers, barriers, CID, CONFIG)
        m = gl.where(m + 1 == m1, m0, m + 1)
    store_columns(DV, dv, n0, 0, stride_dvs, sk, D, 64, D_PAD, KV_L, FRESH)
    store_columns(DK, dk * scale, n0, 0, stride_dks, sk, D, 64, D_PAD, KV_L, FRESH)


@gluon.jit
def _count_barriers(barriers, STAGES: gl.constexpr, DO_STAGES: gl.constexpr):
    """Arrivals that each barrier waits for: of one warp, or of both warpgroups."""
    kv_full, q_full, q_empty, do_full, do_empty, dq_full, dq_empty = barriers
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


@gluon.jit
def make_barriers(STAGES: gl.constexpr, DO_STAGES: gl.constexpr):
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [DO_STAGES, 1], mbarrier.MBarrierLayout())
    do_empty = gl.allocate_shared_memory(gl.int64, [DO_STAGES, 1], mbarrier.MBarrierLayout())
    dq_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    dq_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    barriers = (kv_full, q_full, q_empty, do_full, do_empty, dq_full, dq_empty)
    _count_barriers(barriers, STAGES, DO_STAGES)
    return barriers


@gluon.jit(do_not_specialize=PLAIN_ARGS)
def backward_kernel(
    desc_q, desc_do, desc_k, desc_v, desc_lse, desc_delta, desc_dq, DK, DV, LO, HI, stride_lo,
    scale, qk_scale, sq, sq_pad, sk, num_heads, num_kv_heads, group,
    stride_dkb, stride_dks, stride_dkh, stride_dvb, stride_dvs, stride_dvh,
    D: gl.constexpr, D_PAD: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    KIND: gl.constexpr, HAS_HI: gl.constexpr, EVEN_N: gl.constexpr, FRESH: gl.constexpr,
    WITH_DQ: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    # Ascending: the first keys of a causal block are seen by the most rows, and long programs should start first.
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
    DS_L: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, BM], dtype)
    DQ_L: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, D_PAD // 2], gl.float32)
    q_bufs = gl.allocate_shared_memory(dtype, [STAGES, BM, D_PAD], ROWS_L)
    do_bufs = gl.allocate_shared_memory(dtype, [STAGES, BM, D_PAD], ROWS_L)
    k_buf = gl.allocate_shared_memory(dtype, [BN, D_PAD], KEYS_L)
    v_buf = gl.allocate_shared_memory(dtype, [BN, D_PAD], KEYS_L)
    lse_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, BM], desc_lse.layout)
    delta_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, BM], desc_delta.layout)
    ds_bufs = gl.allocate_shared_memory(dtype, [2, BN, BM], DS_L)
    dq_bufs = gl.allocate_shared_memory(gl.float32, [2, BM, D_PAD // 2], DQ_L)
    barriers = make_barriers(STAGES, STAGES)

    MASKED: gl.constexpr = KIND != "full" or not EVEN_N
    CONFIG: gl.constexpr = (D_PAD, BM, STAGES, MASKED, HAS_HI, WITH_DQ, SOFTCAP, D, KIND, EVEN_N, FRESH)
    buffers = (q_bufs, do_bufs, k_buf, v_buf, lse_bufs, delta_bufs, ds_bufs, dq_bufs)
    gradients = (DK, DV, stride_dks, stride_dvs)
    place = (LO, HI, scale, qk_scale, n0, m0, m1, a, b, total, sq, sk)
    sources = (desc_q, desc_do, desc_k, desc_v, desc_lse, desc_delta)
    loaded = (q_bufs, do_bufs, k_buf, v_buf, lse_bufs, delta_bufs)
    signals = (barriers[0], barriers[1], barriers[2], barriers[3], barriers[4])
    walk = (batch, kv_head, head, num_heads, sq_pad, n0, m0, m1, total)
    # 240 registers for each thread that computes; the warps that move data need few.
    if WITH_DQ:
        gl.warp_specialize(
            [
                (_consume, (buffers, barriers, gradients, place, 0, CONFIG)),
                (_consume, (buffers, barriers, gradients, place, 1, CONFIG)),
                (load_tiles, (sources, loaded, signals, walk, BM, STAGES, STAGES)),
                (add_dq, (desc_dq, dq_bufs, barriers[5], barriers[6], batch, head, m0, m1, total, BM, D_PAD // 2, 1)),
            ],
            [4, 1, 1],
            [240, 24, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (buffers, barriers, gradients, place, 0, CONFIG)),
                (_consume, (buffers, barriers, gradients, place, 1, CONFIG)),
                (load_tiles, (sources, loaded, signals, walk, BM, STAGES, STAGES)),
            ],
            [4, 1],
            [240, 24],
        )
