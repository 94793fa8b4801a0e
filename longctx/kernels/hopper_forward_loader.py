"""The producer of the Hopper forward: what is to be done, which tiles a row block sees, and the warp that loads them.

`V` is a `hopper_forward.Variant`: all that is known when the kernel is compiled.
"""

# mypy: ignore-errors

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from longctx.kernels.gluon_api import place_of, tma_load


@gluon.jit
def visible(mask, batch, m0, sq, sk, ROWS: gl.constexpr, V: gl.constexpr):
    """Keys that any (`first`, `end`) and that all (`full_lo`, `full_hi`) of the rows [m0, m0 + ROWS) see.

    Both ends never decrease, so the first and the last row bound them all. Past the end the last row stands for all.
    """
    m0 = gl.minimum(m0, sq - 1)
    last = gl.minimum(m0 + ROWS, sq) - 1
    lo, hi, stride = mask
    if V.kind == "full":
        return m0 * 0, m0 * 0 + sk, m0 * 0, m0 * 0 + sk
    elif V.kind == "band":
        first = gl.maximum(m0 + lo, 0)
        end = gl.minimum(gl.maximum(last + hi, 0), sk)
        return first, end, gl.maximum(last + lo, 0), gl.minimum(gl.maximum(m0 + hi, 0), sk)
    else:
        lo += batch.to(gl.int64) * stride
        hi += batch.to(gl.int64) * stride
        return gl.load(lo + m0), gl.load(hi + last), gl.load(lo + last), gl.load(hi + m0)


@gluon.jit
def key_tiles(first, end, BLOCK_N: gl.constexpr):
    """Tiles [start, stop) that cover the keys [first, end): at least one, so that every row block has a first tile."""
    start = first // BLOCK_N
    return start, gl.maximum(gl.cdiv(end, BLOCK_N), start + 1)


@gluon.jit
def piece_of_work(index, work, V: gl.constexpr):
    """The number of the `index`-th piece of work: itself, or the one that stands there in the list of those to do again."""
    _, _, _, _, num_work, _, again = work
    if V.again:
        index = gl.load(again + 1 + num_work + index)
    return index


@gluon.jit
def is_right(l, piece, work, GROUP: gl.constexpr, V: gl.constexpr):
    """Whether this group stores what it has found for its rows of a piece of work.

    Not where a maximum that was fixed was too small by far: the piece goes on the list of those to do again, which the second
    launch does without fixing any. `again`: [number of pieces listed; for each piece of work a bit of each group; the list].
    """
    _, _, _, _, num_work, _, again = work
    if V.again:
        right = ((gl.load(again + 1 + piece) >> GROUP) & 1) == 1
    else:
        right = gl.max(gl.where(l == l, 0, 1), 0) == 0
        if right == 0:  # noqa: SIM102 - both are the GPU's, and the second is to be done only where the first holds
            if gl.atomic_or(again + 1 + piece, 1 << GROUP) == 0:
                gl.store(again + 1 + num_work + gl.atomic_add(again, 1), piece)
    return right


@gluon.jit
def row_block(piece, work):
    """(row block, batch, head) of a piece of work: from the last rows to the first, which see most keys and fewest."""
    num_m, section, num_heads, _, num_work, _, _ = work
    tile, flat = place_of(piece, num_work, num_m, section)
    return num_m - 1 - tile, flat // num_heads, flat % num_heads


@gluon.jit
def _prefetch_rows(carried, batch, head, m0, sq, ROWS: gl.constexpr, V: gl.constexpr):
    """Ask for the carried rows [m0, m0 + ROWS) to be in L2: the consumers read them while the block before is finished."""
    ptr, stride_b, stride_s, stride_h = carried
    ptr += batch.to(gl.int64) * stride_b + head.to(gl.int64) * stride_h
    # A line of 128 bytes holds 32 columns in fp32.
    LINES: gl.constexpr = V.padded // 32
    L: gl.constexpr = gl.BlockedLayout([1, 1], [32 // LINES, LINES], [1, 1], [1, 0])
    # Rows and columns past the end are others' memory or nobody's: the last one is asked for instead.
    col = gl.minimum(gl.arange(0, LINES, layout=gl.SliceLayout(0, L)) * 32, V.head_dim - 1)
    for r in gl.static_range(ROWS // 32):
        row = gl.minimum(m0 + r * 32 + gl.arange(0, 32, layout=gl.SliceLayout(1, L)), sq - 1)
        at = (ptr + (row.to(gl.int64) * stride_s)[:, None] + col[None, :]).to(gl.int64)
        gl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], dtype=gl.int32, is_pure=False, pack=1
        )


@gluon.jit
def produce(args, V: gl.constexpr):
    """The producer warp: for each row block its queries, then its key and value tiles, from the last to the first."""
    descs, tiles, barriers, next_work, mask, work, sizes, carried = args
    BLOCK_N: gl.constexpr = V.schedule.block_n
    STAGES: gl.constexpr = V.schedule.stages
    GROUPS: gl.constexpr = V.schedule.groups
    ROWS: gl.constexpr = V.schedule.groups * 64
    desc_q, desc_k, desc_v = descs
    q_tiles, k_tiles, v_tiles = tiles[0], tiles[2], tiles[3]
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    counter, slot, slot_full, slot_empty = next_work
    sq, sk = sizes
    group, todo = work[3], work[5]
    index = gl.program_id(0)
    count = 0
    turn = 0
    while index < todo:
        m, batch, head = row_block(piece_of_work(index, work, V), work)
        first, end, _, _ = visible(mask, batch, m * ROWS, sq, sk, ROWS, V)
        start, stop = key_tiles(first, end, BLOCK_N)
        if V.carry:
            _prefetch_rows(carried, batch, head, m * ROWS, sq, ROWS, V)
        for g in gl.static_range(GROUPS):
            mbarrier.wait(q_empty.index(g), (turn & 1) ^ 1)
            mbarrier.expect(q_full.index(g), desc_q.block_type.nbytes)
            tma_load(desc_q, [batch, head, m * ROWS + g * 64, 0], q_full.index(g), q_tiles.index(g))
        for i in range(0, stop - start):
            n = (stop - 1 - i) * BLOCK_N
            stage = count % STAGES
            phase = ((count // STAGES) & 1) ^ 1
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_full.index(stage), desc_k.block_type.nbytes)
            tma_load(desc_k, [batch, head // group, n, 0], k_full.index(stage), k_tiles.index(stage))
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_full.index(stage), desc_v.block_type.nbytes)
            tma_load(desc_v, [batch, head // group, n, 0], v_full.index(stage), v_tiles.index(stage))
            count += 1
        # The consumers still have the tiles in flight to do: the counter's answer arrives before they need it.
        index = gl.num_programs(0) + gl.atomic_add(counter, 1, sem="relaxed")
        mbarrier.wait(slot_empty, (turn & 1) ^ 1)
        one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
        slot.store(gl.full([1], 0, gl.int32, layout=one) + index)
        mbarrier.arrive(slot_full, count=1)
        turn += 1
