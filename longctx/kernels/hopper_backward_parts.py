"""What both Hopper backwards are made of: the warps that move data, the way of dq out of a program, masks, barriers.

A program is four parties: a warp that loads tiles with the TMA engine (`load_tiles`), two warpgroups that compute, and a warp
that adds dq into global memory with TMA reductions (`add_dq`). dk and dv stay in registers over all rows and over all query
heads of the group, so nothing is added atomically to them.

`V` is a `hopper_backward.Variant`: all that is known when a kernel is compiled.

Source: Dao 2023 (arXiv 2307.08691), algorithm 2; Shah et al. 2024 (arXiv 2407.08608), appendix B.1: the split into parties.
"""

# mypy: ignore-errors

from __future__ import annotations

from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from longctx.kernels.gluon_api import (
    await_signal,
    barrier_ring,
    gl,
    gluon,
    laid_out,
    place_of,
    signal_ring,
    tell,
    tma_load,
    tma_reduce_add,
    tma_store_wait,
)

PLAIN_ARGS = ["LO", "HI", "stride_lo", "sq", "sq_pad", "sk", "num_heads", "num_kv_heads", "group", "section"]

# Threads of a signal: of both warpgroups to the loading warp, of one to the other, of one to the adding warp.
TO_LOADER = gl.constexpr(288)
TO_OTHER = gl.constexpr(256)
TO_ADDER = gl.constexpr(160)

# A piece of dq is [64, 64], handed over in the layout that TMA reads: rows of 32 columns, their 16-byte chunks permuted by the
# row's number. The fragments of the matrix units would meet there two by two in the same banks. With columns c and c ^ 16 of
# odd rows exchanged in registers (`exchanged`) they do not; this is the same layout, named by the exchanged columns.
DQ_PIECE = gl.constexpr(gl.NVMMASharedLayout.get_default_for([64, 64], gl.float32))
EXCHANGED_PIECE = gl.constexpr(
    gl.SharedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16], [1, 4 ^ 16], [2, 8], [4, 16], [8, 0], [16, 0], [32, 0], [0, 32]],
        alignment=1024,
    )
)


@gluon.jit
def row_blocks(LO, HI, n0, sq, sk, V: gl.constexpr):
    """The blocks of rows [m0, m1) that see any of the keys [n0, n0 + V.keys), and [a, b) of them that see all.

    At least one block, if only to find all of it masked: the loops need something to walk over.
    """
    last = gl.minimum(n0 + V.keys, sk) - 1
    if V.kind == "full":
        first, end, full_lo, full_hi = n0 * 0, n0 * 0 + sq, n0 * 0, n0 * 0 + sq
    elif V.kind == "band":
        first = gl.maximum(n0 + LO, 0)
        end = gl.minimum(gl.maximum(last + HI, 0), sq)
        full_lo = gl.maximum(last + LO, 0)
        full_hi = gl.minimum(gl.maximum(n0 + HI, 0), sq)
    else:
        first, end = gl.load(LO + n0), gl.load(HI + last)
        full_lo, full_hi = gl.load(LO + last), gl.load(HI + n0)
    m0 = gl.minimum(first, sq - 1) // V.rows
    m1 = gl.maximum(gl.cdiv(end, V.rows), m0 + 1)
    a = gl.cdiv(full_lo, V.rows)
    # Rows from sq on need no mask: their lse is +inf.
    b = gl.where(full_hi == sq, m1, full_hi // V.rows)
    if not V.even_n:
        # Keys from sk on do: they are zeros in shared memory, which is a score like any other.
        b = gl.where(n0 + V.keys > sk, 0, b)
    return m0, m1, a, b


@gluon.jit
def seen_by(key, LO, HI, sq, sk, V: gl.constexpr):
    """The rows [row_lo, row_hi) that see each key."""
    if V.kind == "band":
        row_lo = key + LO
        row_hi = key + HI
    elif V.kind == "rows":
        row_lo = gl.load(LO + key, mask=key < sk, other=0)
        row_hi = gl.load(HI + key, mask=key < sk, other=0)
    else:
        row_lo = key * 0
        row_hi = row_lo + sq
    if not V.even_n:
        row_lo = gl.where(key < sk, row_lo, 1 << 30)
    return row_lo, row_hi


@gluon.jit
def next_block(m, head, m0, m1):
    """The block of rows after `m` in the walk over [m0, m1) of one query head after the other."""
    wrap = m + 1 == m1
    return gl.where(wrap, m0, m + 1), gl.where(wrap, head + 1, head)


@gluon.jit
def start_at(x, V: gl.constexpr):
    """x of every row, beside each key: what a product S^T or dP^T [64 keys, V.rows] starts from.

    Each element is written by an instruction of its own that stays before the product. Plain copies would be written when the
    product is already announced, and ptxas would wait there for the products in flight.
    """
    SCORES: gl.constexpr = V.scores
    beside = gl.full([64, V.rows], 0.0, gl.float32, layout=SCORES)
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=f,f,f", [x[None, :], beside], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def probabilities(s, lse, qk_scale, SOFTCAP: gl.constexpr):
    """P of the scores s, times what lse was prepared with (`V.scaled_p`), and what the cap's derivative leaves of it."""
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
def masked(p, row0, row_lo, row_hi, V: gl.constexpr):
    """P^T [keys, V.rows] of the rows from row0 on, 0 where a row does not see the key."""
    # A thread's rows are constants plus what its lane adds in bits 1 and 2. Moved to the other side of the comparison, that
    # leaves constants in the instructions instead of registers that hold rows.
    row = gl.arange(0, V.rows, layout=gl.SliceLayout(0, V.scores))
    lane = (row & 6)[None, :] + row0
    fixed = (row & (V.rows - 7))[None, :]
    visible = fixed >= row_lo[:, None] - lane
    if V.has_hi:
        visible = visible & (fixed < row_hi[:, None] - lane)
    return gl.where(visible, p, 0.0)


@gluon.jit
def load_tiles(descriptors, buffers, barriers, place, V: gl.constexpr):
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
        of_rows = (batch * num_heads + head) * sq_pad + m * V.rows
        i = t % V.stages
        if t >= V.stages:
            await_signal(q_empty, i, t // V.stages - 1, TO_LOADER, 1)
        mbarrier.expect(q_full.index(i), desc_q.block_type.nbytes + desc_lse.block_type.nbytes)
        tma_load(desc_q, [batch, head, m * V.rows, 0], q_full.index(i), q_bufs.index(i))
        tma_load(desc_lse, [of_rows], q_full.index(i), lse_bufs.index(i))
        j = t % V.do_stages
        if t >= V.do_stages:
            await_signal(do_empty, j, t // V.do_stages - 1, TO_LOADER, 1)
        mbarrier.expect(do_full.index(j), desc_do.block_type.nbytes + desc_delta.block_type.nbytes)
        tma_load(desc_do, [batch, head, m * V.rows, 0], do_full.index(j), do_bufs.index(j))
        tma_load(desc_delta, [of_rows], do_full.index(j), delta_bufs.index(j))
        m, head = next_block(m, head, m0, m1)
    for t in range(gl.maximum(total - V.stages, 0), total):
        await_signal(q_empty, t % V.stages, t // V.stages, TO_LOADER, 1)
    for t in range(gl.maximum(total - V.do_stages, 0), total):
        await_signal(do_empty, t % V.do_stages, t // V.do_stages, TO_LOADER, 1)


@gluon.jit
def add_dq(desc_dq, dq_bufs, dq_full, dq_empty, batch, head, m0, m1, total, V: gl.constexpr):
    """The adding warp: the pieces of each warpgroup's share of dq, from shared into global memory.

    A block of 128 rows is shared out by rows, one of 64 by columns.
    """
    PIECES: gl.constexpr = V.dq_pieces
    m = m0
    for t in range(total):
        for piece in gl.static_range(PIECES):
            for c in gl.static_range(2):
                await_signal(dq_full, c, t * PIECES + piece, TO_ADDER, 1)
                if V.rows == 128:
                    tma_reduce_add(desc_dq, [batch, head, m * 128 + c * 64, 0], dq_bufs.index(c))
                else:
                    tma_reduce_add(desc_dq, [batch, head, m * 64, (c * PIECES + piece) * 64], dq_bufs.index(c))
                if V.late_dq:
                    # The warpgroups are up to a step apart: neither waits for the other's piece.
                    tma_store_wait(0)
                    mbarrier.arrive(dq_empty.index(c), count=1)
            if not V.late_dq:
                tma_store_wait(1)
                mbarrier.arrive(dq_empty.index(0), count=1)
                tma_store_wait(0)
                mbarrier.arrive(dq_empty.index(1), count=1)
        m, head = next_block(m, head, m0, m1)


@gluon.jit
def exchanged(dq):
    """dq [64, 64] with columns c and c ^ 16 of odd rows exchanged, which each thread does among its own registers."""
    LAYOUT: gl.constexpr = dq.type.layout
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    odd = (row & 1)[:, None] + gl.zeros([64, 64], gl.int32, layout=LAYOUT)
    odd, _ = gl.split(odd.reshape([64, 2, 2, 16]).permute((0, 1, 3, 2)))
    left, right = gl.split(dq.reshape([64, 2, 2, 16]).permute((0, 1, 3, 2)))
    both = gl.join(gl.where(odd != 0, right, left), gl.where(odd != 0, left, right))
    return both.permute((0, 1, 3, 2)).reshape([64, 64])


@gluon.jit
def put_dq(dq, turn, dq_bufs, dq_full, dq_empty, CID: gl.constexpr):
    """Hand a piece of this warpgroup's dq [64, 64], the `turn`-th, to the adding warp."""
    mbarrier.wait(dq_empty.index(CID), (turn & 1) ^ 1)
    laid_out(dq_bufs.index(CID), EXCHANGED_PIECE).store(exchanged(dq))
    fence_async_shared()
    tell(dq_full, CID, TO_ADDER)


@gluon.jit
def scaled(gradient, scale, V: gl.constexpr):
    """A gradient of dS, of which it is a product: with the scale that dS has, or is still to be given."""
    if not V.scaled_p:
        gradient = gradient * scale
    return gradient


@gluon.jit
def unscaled(dv, scale, V: gl.constexpr):
    """dv, a product of P: without the scale that this may have."""
    if V.scaled_p:
        dv = dv * (1.0 / scale)
    return dv


@gluon.jit
def store_columns(PTR, value, row0, col0, stride_s, sk, ROWS: gl.constexpr, COLS: gl.constexpr, V: gl.constexpr):
    """PTR[row0 :, col0 :] += value [ROWS, COLS], or = value where V.fresh; within sk rows of V.head_dim columns."""
    row = row0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, V.columns))
    col = col0 + gl.arange(0, COLS, layout=gl.SliceLayout(0, V.columns))
    ok = (row < sk)[:, None] & (col < V.head_dim)[None, :]
    ptrs = PTR + (row.to(gl.int64)[:, None] * stride_s + col[None, :])
    if not V.fresh:
        value = value + gl.load(ptrs, mask=ok, other=0.0)
    gl.store(ptrs, value.to(PTR.dtype.element_ty), mask=ok)


@gluon.jit
def make_barriers(V: gl.constexpr):
    """(kv_full, q_full, q_empty, do_full, do_empty, dq_full, dq_empty).

    What the TMA engine says, and what is said to a warpgroup by a single warp, goes through mbarriers; what warpgroups say are
    signals, of which numbers 9 to 13 are left to the kernel.
    """
    STAGES: gl.constexpr = V.stages
    DO_STAGES: gl.constexpr = V.do_stages
    kv_full = barrier_ring(1, 1).index(0)
    q_full, q_empty = barrier_ring(STAGES, 1), signal_ring(5, STAGES, 2)
    do_full, do_empty = barrier_ring(DO_STAGES, 1), signal_ring(7, DO_STAGES, 2)
    return kv_full, q_full, q_empty, do_full, do_empty, signal_ring(14, 2, 1), barrier_ring(2, 1)


@gluon.jit
def program_place(LO, HI, stride_lo, sq, sk, num_kv_heads, group, section, V: gl.constexpr):
    """What this program works on: (LO, HI) of its sequence; (batch, key head, first query head, first key, row blocks)."""
    # Ascending: the first keys of a causal block are seen by the most rows.
    num_n = gl.cdiv(sk, V.keys)
    tile, flat = place_of(gl.program_id(0), gl.num_programs(0), num_n, section)
    n0 = tile * V.keys
    kv_head = flat % num_kv_heads
    batch = flat // num_kv_heads
    if V.kind == "rows":
        LO += batch.to(gl.int64) * stride_lo
        HI += batch.to(gl.int64) * stride_lo
    m0, m1, a, b = row_blocks(LO, HI, n0, sq, sk, V)
    return LO, HI, batch, kv_head, kv_head * group, n0, m0, m1, a, b
