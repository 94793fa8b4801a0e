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

from longctx.kernels.gluon_api import await_signal, gl, gluon, signal_ring, tell
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
    store_columns,
    unscaled,
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
def _scores(t, buffers, barriers, V: gl.constexpr):
    """Issue S of step t."""
    q_bufs, k_buf, q_full = buffers[0], buffers[2], barriers[1]
    i = t % V.stages
    SCORES: gl.constexpr = V.scores
    zeros = gl.zeros([64, 64], gl.float32, layout=SCORES)
    mbarrier.wait(q_full.index(i), (t // V.stages) & 1)
    return warpgroup_mma(k_buf, q_bufs.index(i).permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _make_p(t, m, s, dv, bounds, qk_scale, buffers, barriers, V: gl.constexpr):
    """The first warpgroup: P of this block, from S, to where both find it. Its half of dv stays in flight."""
    q_bufs, do_bufs, _, _, lse_bufs, _, p_buf, p_exact, _, _ = buffers
    _, _, _, do_full, _, _, _, p_ready, p_read, ds_ready = barriers
    SCORES: gl.constexpr = V.scores
    SOFTCAP: gl.constexpr = V.softcap
    row_lo, row_hi, a, b = bounds
    i = t % V.stages
    j = t % V.do_stages
    lse = lse_bufs.index(i).load(gl.SliceLayout(0, SCORES))
    p, slope = probabilities(s, lse, qk_scale, SOFTCAP)
    if V.masked:  # noqa: SIM102 - the first test is made by the compiler, the second by the GPU
        if (m < a) | (m >= b):
            p = masked(p, m * 64, row_lo, row_hi, V)
    # The other has ended its step before.
    await_signal(p_read, 0, t, TO_OTHER)
    p_t = p_buf.permute((1, 0))
    p_t.store(p.to(q_bufs.dtype))
    if SOFTCAP > 0.0:
        p *= slope
    p_exact.store(_as_fragments(p))
    fence_async_shared()
    tell(p_ready, 0, TO_OTHER)
    mbarrier.wait(do_full.index(j), (t // V.do_stages) & 1)
    dv = warpgroup_mma(p_t, do_bufs.index(j).slice(0, 128, dim=1), dv, is_async=True)
    await_signal(ds_ready, 0, t, TO_OTHER)
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
    await_signal(p_ready, 0, t, TO_OTHER)
    dv = warpgroup_mma(p_buf.permute((1, 0)), do.slice(128, 128, dim=1), dv, is_async=True)
    flat: gl.constexpr = _as_fragments(zeros).type.layout
    p = _of_fragments(p_exact.load(flat), SCORES)
    dp = warpgroup_mma_wait(1, deps=(dp,))
    ds_buf.permute((1, 0)).store((p * (dp - delta[None, :])).to(p_buf.dtype))
    fence_async_shared()
    tell(ds_ready, 0, TO_OTHER)
    return dv


@gluon.jit
def _gradients(t, total, s, dk, dv, scale, buffers, barriers, CID: gl.constexpr, V: gl.constexpr):
    """Columns [CID * 128, CID * 128 + 128) of dk and dq from dS, and of dv, which is in flight.

    The first warpgroup has S of the next step computed under dq's way out; after the last step that of the last once more.
    """
    q_bufs, _, k_buf, _, _, _, _, _, ds, dq_bufs = buffers
    _, _, q_empty, _, do_empty, dq_full, dq_empty, _, _, _ = barriers
    i = t % V.stages
    q = q_bufs.index(i).slice(CID * 128, 128, dim=1)
    if V.with_dq:
        SHARE: gl.constexpr = V.dq_share
        COLUMNS: gl.constexpr = V.columns
        zeros = gl.zeros([64, 128], gl.float32, layout=COLUMNS)
        dq = warpgroup_mma(ds, k_buf.slice(CID * 128, 128, dim=1), zeros, use_acc=False, is_async=True)
        dv = warpgroup_mma_wait(1, deps=(dv,))
    else:
        dv = warpgroup_mma_wait(0, deps=(dv,))
    tell(do_empty, t % V.do_stages, TO_LOADER)
    dk = warpgroup_mma(ds.permute((1, 0)), q, dk, is_async=True)
    following = gl.minimum(t + 1, total - 1)
    if V.with_dq:
        dq = warpgroup_mma_wait(1, deps=(dq,))
        left, right = gl.split(scaled(dq, scale, V).reshape([64, 2, 64]).permute((0, 2, 1)))
        put_dq(gl.convert_layout(left, SHARE), 0, dq_bufs, dq_full, dq_empty, CID)
        if CID == 0:
            s = _scores(following, buffers, barriers, V)
        put_dq(gl.convert_layout(right, SHARE), 1, dq_bufs, dq_full, dq_empty, CID)
    elif CID == 0:
        s = _scores(following, buffers, barriers, V)
    if CID == 0:
        dk, s = warpgroup_mma_wait(0, deps=(dk, s))
    else:
        dk = warpgroup_mma_wait(0, deps=(dk,))
    tell(q_empty, i, TO_LOADER)
    return dk, dv, s


@gluon.jit
def _consume(buffers, barriers, gradients, place, CID: gl.constexpr, V: gl.constexpr):
    """A computing warpgroup: its role in P and dS, and columns [128 * CID, 128 * CID + 128) of the gradients."""
    COLUMNS: gl.constexpr = V.columns
    DK, DV, stride_dks, stride_dvs = gradients
    LO, HI, scale, qk_scale, n0, m0, m1, a, b, total, sq, sk = place
    SCORES: gl.constexpr = V.scores
    p_read = barriers[8]
    key = n0 + gl.arange(0, 64, layout=gl.SliceLayout(1, V.scores))
    row_lo, row_hi = seen_by(key, LO, HI, sq, sk, V)
    dk = gl.zeros([64, 128], gl.float32, layout=COLUMNS)
    dv = gl.zeros([64, 128], gl.float32, layout=COLUMNS)
    mbarrier.wait(barriers[0], 0)
    m = m0
    if CID == 0:
        s = _scores(0, buffers, barriers, V)
        s = warpgroup_mma_wait(0, deps=(s,))
    else:
        s = gl.zeros([64, 64], gl.float32, layout=SCORES)
        # There is no P yet that it would still have to read.
        tell(p_read, 0, TO_OTHER)
    for t in range(total):
        if CID == 0:
            dv = _make_p(t, m, s, dv, (row_lo, row_hi, a, b), qk_scale, buffers, barriers, V)
        else:
            dv = _make_ds(t, dv, buffers, barriers, V)
        dk, dv, s = _gradients(t, total, s, dk, dv, scale, buffers, barriers, CID, V)
        if CID == 1:
            tell(p_read, 0, TO_OTHER)
        m = gl.where(m + 1 == m1, m0, m + 1)
    if CID == 0:
        await_signal(p_read, 0, total, TO_OTHER)
    store_columns(DV, unscaled(dv, scale, V), n0, CID * 128, stride_dvs, sk, 64, 128, V)
    store_columns(DK, scaled(dk, scale, V), n0, CID * 128, stride_dks, sk, 64, 128, V)


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
    p_ready, p_read, ds_ready = signal_ring(10, 1, 1), signal_ring(11, 1, 1), signal_ring(12, 1, 1)
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
