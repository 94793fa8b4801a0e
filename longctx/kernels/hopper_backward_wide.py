"""The Hopper backward for head dims above 128, in Gluon: one program owns 64 keys of one key head and walks the rows.

Here dk and dv of 64 keys fill the registers of both warpgroups, so each holds half of their columns. The first warpgroup makes the
probabilities P of a block of rows, the second dS from them; both meet in shared memory, and every other product takes its left
side from there. The parties are those of `hopper_backward_parts`.

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

from longctx.kernels.gluon_api import barrier_ring, gl, gluon
from longctx.kernels.hopper_backward_parts import (
    DQ_PIECE,
    PLAIN_ARGS,
    add_dq,
    load_tiles,
    make_barriers,
    masked,
    probabilities,
    program_place,
    put_dq,
    seen_by,
    store_columns,
)


@gluon.jit
def _as_fragments(x):
    """x [64, 64] of a product as [16, 256]: the four values that a thread holds of two rows and two columns lie side by side."""
    return x.reshape([4, 2, 8, 8, 4, 2]).permute((3, 0, 2, 4, 1, 5)).reshape([16, 256])


@gluon.jit
def _of_fragments(flat, LAYOUT: gl.constexpr):
    """The inverse of `_as_fragments`: each thread has what it would have had of the product."""
    x = flat.reshape([8, 4, 8, 4, 2, 2]).permute((1, 4, 2, 0, 3, 5)).reshape([64, 64])
    return gl.convert_layout(x, LAYOUT)


@gluon.jit
def _make_p(t, m, dv, bounds, qk_scale, buffers, barriers, V: gl.constexpr):
    """The first warpgroup: P of this block to where both find it. Its half of dv stays in flight."""
    q_bufs, do_bufs, k_buf, _, lse_bufs, _, p_buf, p_exact, _, _ = buffers
    _, q_full, _, do_full, _, _, _, p_ready, p_read, ds_ready = barriers
    SCORES: gl.constexpr = V.scores
    SOFTCAP: gl.constexpr = V.softcap
    row_lo, row_hi, a, b = bounds
    i = t % V.stages
    j = t % V.do_stages
    zeros = gl.zeros([64, 64], gl.float32, layout=SCORES)
    mbarrier.wait(q_full.index(i), (t // V.stages) & 1)
    s = warpgroup_mma(k_buf, q_bufs.index(i).permute((1, 0)), zeros, use_acc=False, is_async=True)
    lse = lse_bufs.index(i).load(gl.SliceLayout(0, SCORES))
    s = warpgroup_mma_wait(0, deps=(s,))
    p, slope = probabilities(s, lse, qk_scale, SOFTCAP)
    if V.masked:  # noqa: SIM102 - the first test is made by the compiler, the second by the GPU
        if (m < a) | (m >= b):
            p = masked(p, m * 64, row_lo, row_hi, V)
    # The other has ended its step before.
    mbarrier.wait(p_read, (t & 1) ^ 1)
    p_t = p_buf.permute((1, 0))
    p_t.store(p.to(q_bufs.dtype))
    if SOFTCAP > 0.0:
        p *= slope
    p_exact.store(_as_fragments(p))
    fence_async_shared()
    mbarrier.arrive(p_ready, count=1)
    mbarrier.wait(do_full.index(j), (t // V.do_stages) & 1)
    dv = warpgroup_mma(p_t, do_bufs.index(j).slice(0, 128, dim=1), dv, is_async=True)
    mbarrier.wait(ds_ready, t & 1)
    return dv


@gluon.jit
def _make_ds(t, dv, buffers, barriers, V: gl.constexpr):
    """The second warpgroup: dS of this block from P. Its half of dv stays in flight."""
    _, do_bufs, _, v_buf, _, delta_bufs, p_buf, p_exact, ds_buf, _ = buffers
    _, q_full, _, do_full, _, _, _, p_ready, _, ds_ready = barriers
    SCORES: gl.constexpr = V.scores
    i = t % V.stages
    j = t % V.do_stages
    do = do_bufs.index(j)
    zeros = gl.zeros([64, 64], gl.float32, layout=SCORES)
    mbarrier.wait(do_full.index(j), (t // V.do_stages) & 1)
    dp = warpgroup_mma(v_buf, do.permute((1, 0)), zeros, use_acc=False, is_async=True)
    delta = delta_bufs.index(j).load(gl.SliceLayout(0, SCORES))
    # Q is not read here; what dk reads must have come.
    mbarrier.wait(q_full.index(i), (t // V.stages) & 1)
    mbarrier.wait(p_ready, t & 1)
    dv = warpgroup_mma(p_buf.permute((1, 0)), do.slice(128, 128, dim=1), dv, is_async=True)
    flat: gl.constexpr = _as_fragments(zeros).type.layout
    p = _of_fragments(p_exact.load(flat), SCORES)
    dp = warpgroup_mma_wait(1, deps=(dp,))
    ds_buf.permute((1, 0)).store((p * (dp - delta[None, :])).to(p_buf.dtype))
    fence_async_shared()
    mbarrier.arrive(ds_ready, count=1)
    return dv


@gluon.jit
def _gradients(t, dk, dv, scale, buffers, barriers, CID: gl.constexpr, V: gl.constexpr):
    """Columns [CID * 128, CID * 128 + 128) of dk and dq from dS, and of dv, which is in flight."""
    q_bufs, _, k_buf, _, _, _, _, _, ds, dq_bufs = buffers
    _, _, q_empty, _, do_empty, dq_full, dq_empty, _, _, _ = barriers
    i = t % V.stages
    q = q_bufs.index(i).slice(CID * 128, 128, dim=1)
    if V.with_dq:
        SHARE: gl.constexpr = V.dq_share
        zeros = gl.zeros([64, 64], gl.float32, layout=SHARE)
        left = k_buf.slice(CID * 128, 64, dim=1)
        right = k_buf.slice(CID * 128 + 64, 64, dim=1)
        dq_left = warpgroup_mma(ds, left, zeros, use_acc=False, is_async=True)
        dq_right = warpgroup_mma(ds, right, zeros, use_acc=False, is_async=True)
        dv = warpgroup_mma_wait(2, deps=(dv,))
    else:
        dv = warpgroup_mma_wait(0, deps=(dv,))
    mbarrier.arrive(do_empty.index(t % V.do_stages), count=1)
    dk = warpgroup_mma(ds.permute((1, 0)), q, dk, is_async=True)
    if V.with_dq:
        full, empty, dq_buf = dq_full.index(CID), dq_empty.index(CID), dq_bufs.index(CID)
        dq_left = warpgroup_mma_wait(2, deps=(dq_left,))
        put_dq(dq_left * scale, 0, dq_buf, full, empty)
        dq_right = warpgroup_mma_wait(1, deps=(dq_right,))
        put_dq(dq_right * scale, 1, dq_buf, full, empty)
    dk = warpgroup_mma_wait(0, deps=(dk,))
    mbarrier.arrive(q_empty.index(i), count=1)
    return dk, dv


@gluon.jit
def _consume(buffers, barriers, gradients, place, CID: gl.constexpr, V: gl.constexpr):
    """A computing warpgroup: its role in P and dS, and columns [128 * CID, 128 * CID + 128) of the gradients."""
    COLUMNS: gl.constexpr = V.columns
    DK, DV, stride_dks, stride_dvs = gradients
    LO, HI, scale, qk_scale, n0, m0, m1, a, b, total, sq, sk = place
    p_read = barriers[8]
    key = n0 + gl.arange(0, 64, layout=gl.SliceLayout(1, V.scores))
    row_lo, row_hi = seen_by(key, LO, HI, sq, sk, V)
    dk = gl.zeros([64, 128], gl.float32, layout=COLUMNS)
    dv = gl.zeros([64, 128], gl.float32, layout=COLUMNS)
    mbarrier.wait(barriers[0], 0)
    m = m0
    for t in range(total):
        if CID == 0:
            dv = _make_p(t, m, dv, (row_lo, row_hi, a, b), qk_scale, buffers, barriers, V)
        else:
            dv = _make_ds(t, dv, buffers, barriers, V)
        dk, dv = _gradients(t, dk, dv, scale, buffers, barriers, CID, V)
        if CID == 1:
            mbarrier.arrive(p_read, count=1)
        m = gl.where(m + 1 == m1, m0, m + 1)
    store_columns(DV, dv, n0, CID * 128, stride_dvs, sk, 64, 128, V)
    store_columns(DK, dk * scale, n0, CID * 128, stride_dks, sk, 64, 128, V)


@gluon.jit(do_not_specialize=PLAIN_ARGS)
def backward_wide_kernel(
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
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 256], dtype)
    P_L: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], dtype)
    q_bufs = gl.allocate_shared_memory(dtype, [V.stages, 64, 256], TILE)
    do_bufs = gl.allocate_shared_memory(dtype, [V.do_stages, 64, 256], TILE)
    k_buf = gl.allocate_shared_memory(dtype, [64, 256], TILE)
    v_buf = gl.allocate_shared_memory(dtype, [64, 256], TILE)
    lse_bufs = gl.allocate_shared_memory(gl.float32, [V.stages, 64], desc_lse.layout)
    delta_bufs = gl.allocate_shared_memory(gl.float32, [V.do_stages, 64], desc_delta.layout)
    p_buf = gl.allocate_shared_memory(dtype, [64, 64], P_L)
    p_exact = gl.allocate_shared_memory(gl.float32, [16, 256], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    ds_buf = gl.allocate_shared_memory(dtype, [64, 64], P_L)
    dq_bufs = gl.allocate_shared_memory(gl.float32, [2, 64, 64], DQ_PIECE)
    kv_full, q_full, q_empty, do_full, do_empty, dq_full, dq_empty = make_barriers(V)
    p_ready, p_read, ds_ready = barrier_ring(1, 1).index(0), barrier_ring(1, 1).index(0), barrier_ring(1, 1).index(0)
    barriers = (kv_full, q_full, q_empty, do_full, do_empty, dq_full, dq_empty, p_ready, p_read, ds_ready)
    fence_async_shared()

    buffers = (q_bufs, do_bufs, k_buf, v_buf, lse_bufs, delta_bufs, p_buf, p_exact, ds_buf, dq_bufs)
    gradients = (DK, DV, stride_dks, stride_dvs)
    place = (LO, HI, scale, qk_scale, n0, m0, m1, a, b, total, sq, sk)
    sources = (desc_q, desc_do, desc_k, desc_v, desc_lse, desc_delta)
    loaded = (q_bufs, do_bufs, k_buf, v_buf, lse_bufs, delta_bufs)
    signals = (kv_full, q_full, q_empty, do_full, do_empty)
    walk = (batch, kv_head, head, num_heads, sq_pad, n0, m0, m1, total)
    first: gl.constexpr = gl.constexpr(0)
    second: gl.constexpr = gl.constexpr(1)
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
