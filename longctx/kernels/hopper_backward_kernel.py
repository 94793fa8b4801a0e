"""The Hopper backward for head dims up to 128, in Gluon: one program owns 128 keys of one key head and walks the rows.

The parties are those of `hopper_backward_parts`. Each computing warpgroup owns 64 of the keys (K, V below) and does for one
block of rows:

    S^T = K Q^T - lse;  dP^T = V dO^T - delta;  P^T = exp2(S^T);  dS^T = P^T dP^T;  dV += P^T dO;  dK += dS^T Q

The products S^T and dP^T start from -lse and -delta instead of 0, so that neither is held in registers beside them, and nothing
is left to be done but the exponential; a capped score is not that sum, and has its lse taken off afterwards. With dS^T of both
warpgroups in shared memory, each computes its share of dQ = dS K. P^T and dS^T go from the registers in which they arise straight
into the products for dv and dk: the transposed form is what makes that possible. The product for dv is issued after dS is stored,
when the registers of dP are free.

Source: Dao 2023 (arXiv 2307.08691), algorithm 2.
"""

# mypy: ignore-errors

from __future__ import annotations

from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from longctx.kernels.gluon_api import await_signal, gl, gluon, named_barrier_sync, signal_ring, tell
from longctx.kernels.hopper_backward_parts import (
    DQ_PIECE,
    PLAIN_ARGS,
    TO_LOADER,
    TO_OTHER,
    add_dq,
    load_tiles,
    make_barriers,
    masked,
    probabilities,
    program_place,
    put_dq,
    scaled,
    seen_by,
    start_at,
    store_columns,
    unscaled,
)


@gluon.jit
def _dq_product(t, k_buf, ds_bufs, CID: gl.constexpr, V: gl.constexpr):
    """Issue this warpgroup's share of dQ of step t: 64 rows of 128, or half the columns of 64."""
    ds = ds_bufs.index(t & 1)
    if V.rows == 128:
        left = ds.slice(CID * 64, 64, dim=1).permute((1, 0))
        right = k_buf
    else:
        left = ds.permute((1, 0))
        right = k_buf.slice(CID * 64, 64, dim=1)
    SHARE: gl.constexpr = V.dq_share
    zeros = gl.zeros([64, 64], gl.float32, layout=SHARE)
    return warpgroup_mma(left, right, zeros, use_acc=False, is_async=True)


@gluon.jit
def _await_other(t, ds_ready, CID: gl.constexpr):
    """Until the other warpgroup has ended step t - 1. Two signals by turns: it may have ended step t as well."""
    await_signal(ds_ready, 2 * (1 - CID) + ((t + 1) & 1), t // 2, TO_OTHER)


@gluon.jit
def _gradients(t, i, j, left_p, left_ds, q, do, dk, dv, scale, buffers, barriers, CID: gl.constexpr, V: gl.constexpr):
    """From dS in shared memory on: dk, dv, and dq of this step; where V.late_dq of the step before.

    Late, the warpgroups need not meet: each finds the other's part of a dS that is a step old, and may be ahead by a step.
    """
    _, _, k_buf, _, _, _, ds_bufs, dq_bufs = buffers
    _, _, q_empty, _, do_empty, dq_full, dq_empty, ds_ready = barriers
    dv = warpgroup_mma(left_p, do, dv, is_async=True)
    fence_async_shared()
    if not V.with_dq:
        dk = warpgroup_mma(left_ds, q, dk, is_async=True)
        dv = warpgroup_mma_wait(1, deps=(dv,))
        tell(do_empty, j, TO_LOADER)
    elif V.late_dq:
        dq = _dq_product(t - 1, k_buf, ds_bufs, CID, V)
        dk = warpgroup_mma(left_ds, q, dk, is_async=True)
        dq, dv = warpgroup_mma_wait(1, deps=(dq, dv))
        if t > 0:
            put_dq(scaled(dq, scale, V), t - 1, dq_bufs, dq_full, dq_empty, CID)
        tell(ds_ready, 2 * CID + (t & 1), TO_OTHER)
        tell(do_empty, j, TO_LOADER)
    else:
        # Two buffers for dS, so that one meeting of the warpgroups per block suffices: nobody is two blocks ahead.
        named_barrier_sync(9, 256)
        dq = _dq_product(t, k_buf, ds_bufs, CID, V)
        dv = warpgroup_mma_wait(1, deps=(dv,))
        tell(do_empty, j, TO_LOADER)
        dk = warpgroup_mma(left_ds, q, dk, is_async=True)
        dq = warpgroup_mma_wait(1, deps=(dq,))
        put_dq(scaled(dq, scale, V), t, dq_bufs, dq_full, dq_empty, CID)
    dk = warpgroup_mma_wait(0, deps=(dk,))
    tell(q_empty, i, TO_LOADER)
    return dk, dv


@gluon.jit
def _step(t, m, dk, dv, kc, vc, bounds, units, buffers, barriers, CID: gl.constexpr, V: gl.constexpr):
    """One block of rows: the t-th of this program, the m-th of its query head."""
    q_bufs, do_bufs, _, _, lse_bufs, delta_bufs, ds_bufs, _ = buffers
    kv_full, q_full, _, do_full, _, _, _, ds_ready = barriers
    row_lo, row_hi, a, b = bounds
    qk_scale, scale = units
    ROWS: gl.constexpr = V.rows
    SCORES: gl.constexpr = V.scores
    SOFTCAP: gl.constexpr = V.softcap
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=V.columns, k_width=2)
    OF_ROWS: gl.constexpr = gl.SliceLayout(0, SCORES)
    dtype: gl.constexpr = q_bufs.dtype
    i = t % V.stages
    j = t % V.do_stages
    q = q_bufs.index(i)
    do = do_bufs.index(j)
    mbarrier.wait(q_full.index(i), (t // V.stages) & 1)
    mbarrier.wait(do_full.index(j), (t // V.do_stages) & 1)
    # Both before either product: ptxas lets nothing else be written while one is in flight.
    if SOFTCAP > 0.0:
        s = gl.zeros([64, ROWS], gl.float32, layout=SCORES)
    else:
        s = start_at(lse_bufs.index(i).load(OF_ROWS), V)
    dp = start_at(delta_bufs.index(j).load(OF_ROWS), V)
    s = warpgroup_mma(kc, q.permute((1, 0)), s, use_acc=SOFTCAP == 0.0, is_async=True)
    dp = warpgroup_mma(vc, do.permute((1, 0)), dp, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    if SOFTCAP > 0.0:
        p, slope = probabilities(s, lse_bufs.index(i).load(OF_ROWS), qk_scale, SOFTCAP)
    else:
        p = gl.exp2(s * qk_scale)
    if V.masked:  # noqa: SIM102 - the first test is made by the compiler, the second by the GPU
        if (m < a) | (m >= b):
            p = masked(p, m * V.rows, row_lo, row_hi, V)
    # Long there. What stands before a wait's branch ptxas leaves before it: all exponentials run under the product for dP.
    mbarrier.wait(kv_full, 0)
    dp, p = warpgroup_mma_wait(0, deps=(dp, p))
    left_p = gl.convert_layout(p.to(dtype), LEFT)
    if SOFTCAP > 0.0:
        p *= slope
    ds = (p * dp).to(dtype)
    left_ds = gl.convert_layout(ds, LEFT)
    if V.with_dq:
        if V.late_dq:
            # The other's part of the step before is there, and what is overwritten here it has used.
            _await_other(t, ds_ready, CID)
        ds_bufs.index(t & 1).slice(CID * 64, 64, dim=0).store(ds)
    return _gradients(t, i, j, left_p, left_ds, q, do, dk, dv, scale, buffers, barriers, CID, V)


@gluon.jit
def _consume(buffers, barriers, gradients, place, CID: gl.constexpr, V: gl.constexpr):
    """A computing warpgroup: dk and dv of keys [64 * CID, 64 * CID + 64) of the program's, and half of dq."""
    PADDED: gl.constexpr = V.padded
    COLUMNS: gl.constexpr = V.columns
    DK, DV, stride_dks, stride_dvs = gradients
    LO, HI, scale, qk_scale, n0, m0, m1, a, b, total, sq, sk = place
    n0 += CID * 64
    key = n0 + gl.arange(0, 64, layout=gl.SliceLayout(1, V.scores))
    row_lo, row_hi = seen_by(key, LO, HI, sq, sk, V)
    kc = buffers[2].slice(CID * 64, 64, dim=0)
    vc = buffers[3].slice(CID * 64, 64, dim=0)
    dk = gl.zeros([64, PADDED], gl.float32, layout=COLUMNS)
    dv = gl.zeros([64, PADDED], gl.float32, layout=COLUMNS)
    mbarrier.wait(barriers[0], 0)
    bounds = (row_lo, row_hi, a, b)
    m = m0
    if V.with_dq and V.late_dq:
        # The step before the first.
        tell(barriers[7], 2 * CID + 1, TO_OTHER)
    for t in range(total):
        dk, dv = _step(t, m, dk, dv, kc, vc, bounds, (qk_scale, scale), buffers, barriers, CID, V)
        m = gl.where(m + 1 == m1, m0, m + 1)
    if V.with_dq and V.late_dq:
        _await_other(total, barriers[7], CID)
        dq = _dq_product(total - 1, buffers[2], buffers[6], CID, V)
        dq = warpgroup_mma_wait(0, deps=(dq,))
        put_dq(scaled(dq, scale, V), total - 1, buffers[7], barriers[5], barriers[6], CID)
    store_columns(DV, unscaled(dv, scale, V), n0, 0, stride_dvs, sk, 64, PADDED, V)
    store_columns(DK, scaled(dk, scale, V), n0, 0, stride_dks, sk, 64, PADDED, V)


@gluon.jit(do_not_specialize=PLAIN_ARGS)
def backward_kernel(
    desc_q, desc_do, desc_k, desc_v, desc_lse, desc_delta, desc_dq, DK, DV, LO, HI, stride_lo,
    scale, qk_scale, sq, sq_pad, sk, num_heads, num_kv_heads, group, section,
    stride_dkb, stride_dks, stride_dkh, stride_dvb, stride_dvs, stride_dvh, V: gl.constexpr,
):  # fmt: skip
    seen = program_place(LO, HI, stride_lo, sq, sk, num_kv_heads, group, section, V)
    LO, HI, batch, kv_head, head, n0, m0, m1, a, b = seen
    total = (m1 - m0) * group
    DK += batch.to(gl.int64) * stride_dkb + kv_head.to(gl.int64) * stride_dkh
    DV += batch.to(gl.int64) * stride_dvb + kv_head.to(gl.int64) * stride_dvh

    dtype: gl.constexpr = desc_q.dtype
    ROWS_L: gl.constexpr = gl.NVMMASharedLayout.get_default_for([V.rows, V.padded], dtype)
    KEYS_L: gl.constexpr = gl.NVMMASharedLayout.get_default_for([V.keys, V.padded], dtype)
    DS_L: gl.constexpr = gl.NVMMASharedLayout.get_default_for([V.keys, V.rows], dtype)
    q_bufs = gl.allocate_shared_memory(dtype, [V.stages, V.rows, V.padded], ROWS_L)
    do_bufs = gl.allocate_shared_memory(dtype, [V.do_stages, V.rows, V.padded], ROWS_L)
    k_buf = gl.allocate_shared_memory(dtype, [V.keys, V.padded], KEYS_L)
    v_buf = gl.allocate_shared_memory(dtype, [V.keys, V.padded], KEYS_L)
    lse_bufs = gl.allocate_shared_memory(gl.float32, [V.stages, V.rows], desc_lse.layout)
    delta_bufs = gl.allocate_shared_memory(gl.float32, [V.do_stages, V.rows], desc_delta.layout)
    ds_bufs = gl.allocate_shared_memory(dtype, [2, V.keys, V.rows], DS_L)
    dq_bufs = gl.allocate_shared_memory(gl.float32, [2, 64, 64], DQ_PIECE)
    kv_full, q_full, q_empty, do_full, do_empty, dq_full, dq_empty = make_barriers(V)
    # Two of each warpgroup, by turns: it has ended a step. Only where dq is late.
    ds_ready = signal_ring(10, 4, 1)
    barriers = (kv_full, q_full, q_empty, do_full, do_empty, dq_full, dq_empty, ds_ready)
    fence_async_shared()

    buffers = (q_bufs, do_bufs, k_buf, v_buf, lse_bufs, delta_bufs, ds_bufs, dq_bufs)
    gradients = (DK, DV, stride_dks, stride_dvs)
    place = (LO, HI, scale, qk_scale, n0, m0, m1, a, b, total, sq, sk)
    sources = (desc_q, desc_do, desc_k, desc_v, desc_lse, desc_delta)
    loaded = (q_bufs, do_bufs, k_buf, v_buf, lse_bufs, delta_bufs)
    signals = (kv_full, q_full, q_empty, do_full, do_empty)
    walk = (batch, kv_head, head, num_heads, sq_pad, n0, m0, m1, total)
    first: gl.constexpr = gl.constexpr(0)
    second: gl.constexpr = gl.constexpr(1)
    # 240 registers for each thread that computes; the warps that move data need few.
    if V.with_dq:
        gl.warp_specialize(
            [
                (_consume, (buffers, barriers, gradients, place, first, gl.constexpr(V))),
                (_consume, (buffers, barriers, gradients, place, second, gl.constexpr(V))),
                (load_tiles, (sources, loaded, signals, walk, gl.constexpr(V))),
                (add_dq, (desc_dq, dq_bufs, dq_full, dq_empty, batch, head, m0, m1, total, gl.constexpr(V))),
            ],
            [4, 1, 1],
            [240, 24, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (buffers, barriers, gradients, place, first, gl.constexpr(V))),
                (_consume, (buffers, barriers, gradients, place, second, gl.constexpr(V))),
                (load_tiles, (sources, loaded, signals, walk, gl.constexpr(V))),
            ],
            [4, 1],
            [240, 24],
        )
