"""The Hopper forward's kernel in Gluon: the online softmax of one tile runs under the matrix products of another.

A persistent program for each SM takes row blocks off a common counter. Its producer warp (`hopper_forward_loader`) loads tiles
with the TMA engine; each of its consumer warpgroups owns 64 query rows, which it holds against the key tiles from the last
that any row sees to the first. Every kind of key range is the same code: masked tiles at either end, unmasked ones between.

`V` is a `hopper_forward.Variant`: all that is known when the kernel is compiled.

Source: Dao 2023 (arXiv 2307.08691), algorithm 1; Shah et al. 2024 (arXiv 2407.08608), section 3 (warp specialisation, and
the products of two tiles in flight).
"""

# mypy: ignore-errors

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from longctx.kernels.gluon_api import barrier_ring, tma_store, tma_store_wait
from longctx.kernels.hopper_forward_loader import is_right, key_tiles, piece_of_work, produce, row_block, visible
from longctx.kernels.hopper_softmax import (
    as_operand,
    in_range,
    lane_sums,
    pack_pairs,
    raised_maximum,
    rounded_off,
    seen_scores,
    settled,
)


@gluon.jit
def _pass_over(num_tiles, count, barriers, V: gl.constexpr):
    """Release key tiles of which this group's rows see nothing; the tile count after them."""
    STAGES: gl.constexpr = V.schedule.stages
    _, _, k_full, k_empty, v_full, v_empty = barriers
    for _ in range(0, num_tiles):
        stage = count % STAGES
        phase = (count // STAGES) & 1
        mbarrier.wait(k_full.index(stage), phase)
        mbarrier.arrive(k_empty.index(stage), count=1)
        mbarrier.wait(v_full.index(stage), phase)
        mbarrier.arrive(v_empty.index(stage), count=1)
        count += 1
    return count


@gluon.jit
def _step(
    n, count, p, alpha, acc, m, sums, q, tiles, barriers, rows, units, MASKED: gl.constexpr, FIXED: gl.constexpr, V: gl.constexpr
):  # fmt: skip
    """Scores and softmax of key tile n, and acc += p @ v of the tile before it; alpha is what acc is still to be scaled by.

    With FIXED the maximum stays as it is: nothing is to be compared, and nothing to be rescaled (alpha is 1). `sums` are l and, once
    a maximum has been fixed, what l lacks beside the largest probabilities as they were rounded: see `rounded_off`.

    The order is what the compiler must not change: rescaling and rounding between issuing the two products, all exponentials
    before waiting for the second. Values named among a wait's dependencies hold LLVM to it. ptxas sees no such names, but
    moves little across the branch of a barrier's wait: the second wait for the same v tile stands there for that alone.
    """
    D: gl.constexpr = V.padded
    BLOCK_N: gl.constexpr = V.schedule.block_n
    STAGES: gl.constexpr = V.schedule.stages
    SCORES: gl.constexpr = V.scores
    ROW_OUT: gl.constexpr = gl.SliceLayout(1, V.output)
    _, _, k_tiles, v_tiles = tiles
    _, _, k_full, k_empty, v_full, v_empty = barriers
    here = count % STAGES
    phase = (count // STAGES) & 1
    before = (count - 1) % STAGES
    dtype: gl.constexpr = k_tiles.dtype
    k = k_tiles.index(here).reshape([BLOCK_N, D]).permute((1, 0))
    v = v_tiles.index(before).reshape([BLOCK_N, D])
    zeros = gl.zeros([64, BLOCK_N], gl.float32, layout=SCORES)

    mbarrier.wait(k_full.index(here), phase)
    s = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), ((count - 1) // STAGES) & 1)
    acc, p, alpha = warpgroup_mma_wait(1, deps=(acc, p, alpha))
    if not FIXED:
        acc = acc * gl.convert_layout(alpha, ROW_OUT)[:, None]
    operand = as_operand(p, dtype, V)
    acc = warpgroup_mma(operand, v, acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(k_empty.index(here), count=1)
    s = seen_scores(s, rows, n * BLOCK_N, units[1], MASKED, V)
    if FIXED:
        p = gl.exp2(s * units[0] - m[:, None])
        sums = (sums[0] + lane_sums(p, V), sums[1] + rounded_off(p, dtype, V))
    else:
        before_m = m
        m, base = raised_maximum(s, m, units[0], MASKED, V)
        alpha = gl.exp2(before_m - base)
        p = gl.exp2(s * units[0] - base[:, None])
        part = lane_sums(p, V)
        factor = gl.convert_layout(alpha[:, None], part.type.layout)
        if len(sums) == 1:
            sums = (sums[0] * factor + part,)
        else:
            sums = (sums[0] * factor + part, sums[1] * factor)
    mbarrier.wait(v_full.index(here), phase)
    acc, _ = warpgroup_mma_wait(0, deps=(acc, operand))
    mbarrier.arrive(v_empty.index(before), count=1)
    if V.schedule.packed:
        p = pack_pairs(p, dtype)
    return p, alpha, acc, m, sums


@gluon.jit
def _start(m0, batch, head, pointers, strides, sq, V: gl.constexpr):
    """Accumulators (out, running maximum, sum) of rows that have seen nothing, or what earlier blocks left."""
    SCORES: gl.constexpr = V.scores
    OUTPUT: gl.constexpr = V.output
    D: gl.constexpr = V.padded
    row = m0 + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    if V.carry:
        _, old_ptr, lse_ptr = pointers
        old_b, old_s, old_h, _, _, _, lse_b, lse_h = strides
        lse_ptr += batch.to(gl.int64) * lse_b + head.to(gl.int64) * lse_h
        m = gl.load(lse_ptr + row, mask=row < sq, other=float("-inf")) * 1.4426950408889634
        # The state is normalised: its sum is 1 beside a maximum of lse.
        l = gl.where(m == float("-inf"), 0.0, 1.0)
        row_out = m0 + gl.arange(0, 64, layout=gl.SliceLayout(1, OUTPUT))
        col = gl.arange(0, D, layout=gl.SliceLayout(0, OUTPUT))
        ok = (row_out < sq)[:, None] & (col < V.head_dim)[None, :]
        old_ptr += batch.to(gl.int64) * old_b + head.to(gl.int64) * old_h
        acc = gl.load(old_ptr + (row_out.to(gl.int64) * old_s)[:, None] + col[None, :], mask=ok, other=0.0)
    else:
        m = gl.full([64], float("-inf"), gl.float32, layout=gl.SliceLayout(1, SCORES))
        l = gl.full([64], 0.0, gl.float32, layout=gl.SliceLayout(1, SCORES))
        acc = gl.zeros([64, D], gl.float32, layout=OUTPUT)
    return acc, m, l


@gluon.jit
def _attend(
    m0, batch, head, count, turn, GROUP: gl.constexpr, tiles, barriers, mask, pointers, strides, sizes, units,
    V: gl.constexpr,
):  # fmt: skip
    """Walk over a row block's key tiles; the unnormalised output, its running maximum and sum, and the tile count."""
    D: gl.constexpr = V.padded
    BLOCK_N: gl.constexpr = V.schedule.block_n
    STAGES: gl.constexpr = V.schedule.stages
    ROWS: gl.constexpr = V.schedule.groups * 64
    SCORES: gl.constexpr = V.scores
    ROW: gl.constexpr = gl.SliceLayout(1, V.scores)
    MASKED: gl.constexpr = V.masked
    q_tiles, _, k_tiles, _ = tiles
    q_full, q_empty, k_full, k_empty, _, _ = barriers
    dtype: gl.constexpr = k_tiles.dtype
    sq, sk = sizes
    first, end, _, _ = visible(mask, batch, m0, sq, sk, ROWS, V)
    start, stop = key_tiles(first, end, BLOCK_N)
    # All groups walk over the same tiles, but which of them need a mask is this group's own affair.
    m0 += GROUP * 64
    first, end, full_lo, full_hi = visible(mask, batch, m0, sq, sk, 64, V)
    own_start, own_stop = key_tiles(first, end, BLOCK_N)
    own_stop = gl.minimum(own_stop, stop)
    own_start = gl.minimum(own_start, own_stop - 1)
    count = _pass_over(stop - own_stop, count, barriers, V)
    rest = own_start - start
    start = own_start
    stop = own_stop
    b = gl.minimum(gl.maximum(full_hi // BLOCK_N, start), stop - 1)
    a = gl.minimum(gl.maximum(gl.cdiv(full_lo, BLOCK_N), start), b)
    if V.fixed_max and V.kind != "full":
        # Every row has seen a key before its maximum is fixed, if only the first of tile b.
        b = gl.where(full_hi > b * BLOCK_N, b, gl.maximum(b - 1, a))
    row = m0 + gl.arange(0, 64, layout=ROW)
    lo, hi, stride = mask
    if V.kind == "full":
        row_lo = row * 0
        row_hi = row * 0 + sk
    elif V.kind == "band":
        row_lo = row + lo
        row_hi = gl.minimum(row + hi, sk)
    else:
        row_lo = gl.load(lo + batch.to(gl.int64) * stride + row, mask=row < sq, other=0)
        row_hi = gl.load(hi + batch.to(gl.int64) * stride + row, mask=row < sq, other=0)
    rows = (row_lo, row_hi)

    q = q_tiles.index(GROUP).reshape([64, D])
    stage = count % STAGES
    zeros = gl.zeros([64, BLOCK_N], gl.float32, layout=SCORES)
    acc, m, l = _start(m0, batch, head, pointers, strides, sq, V)
    mbarrier.wait(q_full.index(GROUP), turn & 1)
    mbarrier.wait(k_full.index(stage), (count // STAGES) & 1)
    k = k_tiles.index(stage).reshape([BLOCK_N, D]).permute((1, 0))
    s = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(k_empty.index(stage), count=1)
    s = seen_scores(s, rows, (stop - 1) * BLOCK_N, units[1], MASKED, V)
    top, base = raised_maximum(s, m, units[0], MASKED, V)
    alpha = gl.exp2(m - base)
    p = gl.exp2(s * units[0] - base[:, None])
    part = lane_sums(p, V)
    # What is carried counts in one of a row's lanes.
    lane = gl.arange(0, 4, layout=gl.SliceLayout(0, part.type.layout))
    l = gl.where(lane[None, :] == 0, gl.convert_layout((l * alpha)[:, None], part.type.layout), 0.0) + part
    sums = (l,)
    m = top
    if V.schedule.packed:
        p = pack_pairs(p, dtype)
    count += 1
    if V.kind != "full":
        for i in range(b, stop - 1):
            n = stop - 2 - (i - b)
            p, alpha, acc, m, sums = _step(
                n, count, p, alpha, acc, m, sums, q, tiles, barriers, rows, units, True, False, V
            )
            count += 1
    FIXED: gl.constexpr = V.fixed_max
    if FIXED:
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, V.output))[:, None]
        alpha = gl.full([64], 1.0, gl.float32, layout=ROW)
        m, l = settled(m, sums[0], row < sq, a < b)
        sums = (l, l * 0.0)
    for i in range(a, b):
        n = b - 1 - (i - a)
        p, alpha, acc, m, sums = _step(
            n, count, p, alpha, acc, m, sums, q, tiles, barriers, rows, units, False, FIXED, V
        )
        count += 1
    if FIXED:
        sums = (in_range(sums[0]), sums[1])
    if V.has_lo:
        for i in range(start, a):
            n = a - 1 - (i - start)
            p, alpha, acc, m, sums = _step(
                n, count, p, alpha, acc, m, sums, q, tiles, barriers, rows, units, True, False, V
            )
            count += 1
    if V.schedule.own_out:
        mbarrier.arrive(q_empty.index(GROUP), count=1)
    return p, alpha, acc, m, sums, count, rest


@gluon.jit
def _finish(
    m0, batch, head, piece, count, p, alpha, acc, m, sums, desc_out, pointers, strides, work, GROUP: gl.constexpr, tiles, barriers,
    sizes, V: gl.constexpr,
):  # fmt: skip
    """The last product; normalise, merge with the state of earlier blocks, and store out and lse."""
    D: gl.constexpr = V.padded
    BLOCK_N: gl.constexpr = V.schedule.block_n
    STAGES: gl.constexpr = V.schedule.stages
    ROW: gl.constexpr = gl.SliceLayout(1, V.scores)
    ROW_OUT: gl.constexpr = gl.SliceLayout(1, V.output)
    _, out_tiles, k_tiles, v_tiles = tiles
    _, q_empty, _, _, v_full, v_empty = barriers
    out_ptr, _, lse_ptr = pointers
    _, _, _, out_b, out_s, out_h, lse_b, lse_h = strides
    dtype: gl.constexpr = k_tiles.dtype
    sq, _ = sizes
    before = (count - 1) % STAGES
    mbarrier.wait(v_full.index(before), ((count - 1) // STAGES) & 1)
    acc = acc * gl.convert_layout(alpha, ROW_OUT)[:, None]
    operand = as_operand(p, dtype, V)
    acc = warpgroup_mma(operand, v_tiles.index(before).reshape([BLOCK_N, D]), acc, is_async=True)

    l = gl.convert_layout(gl.sum(sums[0], 1), ROW)
    # Compared with 0, not with > 0: a nan must come out as one.
    unseen = l == 0.0
    l = gl.where(unseen, 1.0, l)
    lse2 = gl.where(unseen, float("-inf"), m + gl.log2(l))
    divisor = l
    if V.fixed_max:
        divisor += gl.convert_layout(gl.sum(sums[1], 1), ROW)
    weight = 1.0 / divisor
    row = m0 + gl.arange(0, 64, layout=ROW)
    lse_ptr += batch.to(gl.int64) * lse_b + head.to(gl.int64) * lse_h

    acc, _ = warpgroup_mma_wait(0, deps=(acc, operand))
    mbarrier.arrive(v_empty.index(before), count=1)
    # Rows from `end` on are not stored: past the last one, or not right.
    end = sq
    if V.fixed_max or V.again:
        end = gl.where(is_right(l, piece, work, GROUP, V), sq, 0)
    gl.store(lse_ptr + row, lse2 * 0.6931471805599453, mask=row < end)
    out = acc * gl.convert_layout(weight, ROW_OUT)[:, None]
    row_out = m0 + gl.arange(0, 64, layout=ROW_OUT)
    col = gl.arange(0, V.padded, layout=gl.SliceLayout(0, V.output))
    if V.final:
        if V.schedule.own_out:
            # Of the row block before: long done.
            tma_store_wait(0)
        out_tiles.index(GROUP).reshape([64, D]).store(out.to(dtype))
        fence_async_shared()
        if m0 < end:
            tma_store(desc_out, [batch, head, m0, 0], out_tiles.index(GROUP))
        if not V.schedule.own_out:
            tma_store_wait(0)
    else:
        ok = (row_out < end)[:, None] & (col < V.head_dim)[None, :]
        out_ptr += batch.to(gl.int64) * out_b + head.to(gl.int64) * out_h
        gl.store(out_ptr + (row_out.to(gl.int64) * out_s)[:, None] + col[None, :], out, mask=ok)
    if not V.schedule.own_out:
        mbarrier.arrive(q_empty.index(GROUP), count=1)


@gluon.jit
def _consume(args, GROUP: gl.constexpr, V: gl.constexpr):
    """A consumer warpgroup: rows [64 * GROUP, 64 * GROUP + 64) of each row block that this program takes."""
    desc_out, pointers, strides, tiles, barriers, next_work, mask, work, sizes, units = args
    ROWS: gl.constexpr = V.schedule.groups * 64
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    _, slot, slot_full, slot_empty = next_work
    index = gl.program_id(0)
    count = 0
    turn = 0
    while index < work[5]:
        piece = piece_of_work(index, work, V)
        m, batch, head = row_block(piece, work)
        p, alpha, acc, top, sums, count, rest = _attend(
            m * ROWS, batch, head, count, turn, GROUP, tiles, barriers, mask, pointers, strides, sizes, units, V
        )
        _finish(
            m * ROWS + GROUP * 64, batch, head, piece, count, p, alpha, acc, top, sums, desc_out, pointers, strides, work,
            GROUP, tiles, barriers, sizes, V,
        )  # fmt: skip
        count = _pass_over(rest, count, barriers, V)
        mbarrier.wait(slot_full, turn & 1)
        index = gl.max(slot.load(ONE), 0)
        mbarrier.arrive(slot_empty, count=1)
        turn += 1
    tma_store_wait(0)


@gluon.jit(
    do_not_specialize=["LO", "HI", "stride_lo", "sq", "sk", "num_heads", "group", "num_m", "section", "num_work"]
)
def forward_kernel(
    desc_q, desc_k, desc_v, desc_out, OUT, OLD, LSE, LO, HI, stride_lo, COUNTER, AGAIN,
    stride_xb, stride_xs, stride_xh, stride_ob, stride_os, stride_oh, stride_lb, stride_lh,
    sq, sk, num_heads, group, num_m, section, num_work, unit, inner, V: gl.constexpr,
):  # fmt: skip
    D: gl.constexpr = V.padded
    BLOCK_N: gl.constexpr = V.schedule.block_n
    GROUPS: gl.constexpr = V.schedule.groups
    STAGES: gl.constexpr = V.schedule.stages
    dtype: gl.constexpr = desc_q.dtype
    q_tiles = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, 64, D], desc_q.layout)
    if V.final and V.schedule.own_out:
        out_tiles = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, 64, D], desc_q.layout)
    else:
        out_tiles = q_tiles
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], desc_k.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], desc_v.layout)
    q_full, q_empty = barrier_ring(GROUPS, 1), barrier_ring(GROUPS, 1)
    k_full, k_empty = barrier_ring(STAGES, 1), barrier_ring(STAGES, GROUPS)
    v_full, v_empty = barrier_ring(STAGES, 1), barrier_ring(STAGES, GROUPS)
    slot_full, slot_empty = barrier_ring(1, 1), barrier_ring(1, GROUPS)
    slot = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    fence_async_shared()

    tiles = (q_tiles, out_tiles, k_tiles, v_tiles)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    next_work = (COUNTER, slot, slot_full.index(0), slot_empty.index(0))
    mask = (LO, HI, stride_lo)
    todo = num_work
    if V.again:
        todo = gl.load(AGAIN)
    work = (num_m, section, num_heads, group, num_work, todo, AGAIN)
    sizes = (sq, sk)
    strides = (stride_xb, stride_xs, stride_xh, stride_ob, stride_os, stride_oh, stride_lb, stride_lh)
    consumed = (desc_out, (OUT, OLD, LSE), strides, tiles, barriers, next_work, mask, work, sizes, (unit, inner))
    carried = (OLD, stride_xb, stride_xs, stride_xh)
    produced = ((desc_q, desc_k, desc_v), tiles, barriers, next_work, mask, work, sizes, carried)
    CONSUMER: gl.constexpr = V.schedule.registers[0]
    PRODUCER: gl.constexpr = V.schedule.registers[1]
    # One more list per number of groups: what is specialised is spelled out, not looped over.
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (consumed, gl.constexpr(0), gl.constexpr(V))),
                (_consume, (consumed, gl.constexpr(1), gl.constexpr(V))),
                (produce, (produced, gl.constexpr(V))),
            ],
            [4, 1],
            [CONSUMER, PRODUCER],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (consumed, gl.constexpr(0), gl.constexpr(V))),
                (_consume, (consumed, gl.constexpr(1), gl.constexpr(V))),
                (_consume, (consumed, gl.constexpr(2), gl.constexpr(V))),
                (produce, (produced, gl.constexpr(V))),
            ],
            [4, 4, 1],
            [CONSUMER, CONSUMER, PRODUCER],
        )
