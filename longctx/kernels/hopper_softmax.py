"""The softmax of the Hopper forward on one tile of scores, in Gluon: pieces of `hopper_forward_kernel`.

A tile of scores lies in a warpgroup's registers as the matrix units leave it: a row of 64 belongs to four neighbouring
lanes, of which each holds two neighbouring columns of every eight.

`V` is a `hopper_forward.Variant`: all that is known when the kernel is compiled.
"""

# mypy: ignore-errors

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _capped(s, inner):
    """tanh of the scores over their cap, from inner = 2 * log2(e) * scale / cap: exact to an ulp of 1.

    The hardware's own tanh is off by 5e-4, which a cap of 50 would make an error of 2 % in a probability.
    """
    e = gl.exp2(s * inner)
    r = gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [e + 1.0], dtype=gl.float32, is_pure=True, pack=1
    )
    return 1.0 - 2.0 * r


@gluon.jit
def _row_max(s, V: gl.constexpr):
    """The largest of each row, by a tree: a chain through a thread's 64 values would wait for each of them in turn."""
    N: gl.constexpr = V.schedule.block_n
    # Columns as (group of 32, one of 4 eights, lane, neighbour): all but the lane lie within a thread.
    best = gl.max(gl.max(gl.max(s.reshape([64, N // 32, 4, 4, 2]), 4), 2), 1)
    return gl.convert_layout(gl.max(best, 1), gl.SliceLayout(1, V.scores))


@gluon.jit
def lane_sums(p, V: gl.constexpr):
    """What each of a row's four lanes holds of its sum, [64, 4]: they are added up once, at the end."""
    return gl.sum(gl.sum(p.reshape([64, V.schedule.block_n // 8, 4, 2]), 3), 1)


@gluon.jit
def rounded_off(p, dtype: gl.constexpr, V: gl.constexpr):
    """What rounding to 16 bits adds to the largest p that each of a row's four lanes holds, [64, 4].

    Under a running maximum the largest of a row is 1 and rounds to itself. Under another it does not, and where it takes nearly
    all of the row, out would be off by as much as it is: unless divided by the sum of what was multiplied.
    """
    # As integers, which order positive numbers alike, and of which the maximum of three is one instruction.
    bits = p.to(gl.int32, bitcast=True).reshape([64, V.schedule.block_n // 8, 4, 2])
    largest = gl.max(gl.max(bits, 3), 1).to(gl.float32, bitcast=True)
    return largest.to(dtype).to(gl.float32) - largest


@gluon.jit
def pack_pairs(p, dtype: gl.constexpr):
    """p in 16 bits, two neighbours in an int32: 16-bit values would each take a register across a step."""
    even, odd = gl.split(p.reshape([p.shape[0], p.shape[1] // 2, 2]))
    if dtype == gl.bfloat16:
        asm: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;"
    else:
        asm: gl.constexpr = "cvt.rn.f16x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(asm, "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def as_operand(p, dtype: gl.constexpr, V: gl.constexpr):
    """p as the first operand of p @ v, in registers."""
    OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=V.output, k_width=2)
    if V.schedule.packed:
        even = (p & 0xFFFF).to(gl.int16).to(dtype, bitcast=True)
        odd = (p >> 16).to(gl.int16).to(dtype, bitcast=True)
        p = gl.join(even, odd).reshape([p.shape[0], 2 * p.shape[1]])
    return gl.convert_layout(p.to(dtype), OPERAND)


@gluon.jit
def seen_scores(s, rows, n, inner, MASKED: gl.constexpr, V: gl.constexpr):
    """A tile of q @ k^T whose first key is the n-th: capped, and -inf where a row does not see the key."""
    row_lo, row_hi = rows
    if V.capped:
        s = _capped(s, inner)
    if MASKED:
        # A thread's columns are constants plus what its lane adds in bits 1 and 2. Moved to the other side of the
        # comparison, that leaves constants in the instructions instead of registers that hold columns.
        col = gl.arange(0, V.schedule.block_n, layout=gl.SliceLayout(0, V.scores))
        lane = (col & 6)[None, :]
        fixed = (col & (V.schedule.block_n - 7))[None, :]
        seen = fixed < (row_hi - n)[:, None] - lane
        if V.has_lo:
            seen = seen & (fixed >= (row_lo - n)[:, None] - lane)
        s = gl.where(seen, s, float("-inf"))
    return s


@gluon.jit
def raised_maximum(s, m, unit, MASKED: gl.constexpr, V: gl.constexpr):
    """The running maximum of log2(e) * score after this tile, and what to subtract before exp2."""
    m = gl.maximum(m, _row_max(s, V) * unit)
    base = m
    if MASKED:
        # A row that has seen nothing yet: -inf - -inf would be nan.
        base = gl.where(m == float("-inf"), 0.0, m)
    return m, base


@gluon.jit
def settled(m, l, real, more):
    """The maximum and the lanes' sums of rows of which, if there is `more`, further keys are seen under the maximum as it is.

    A `real` row without one has nothing to hold its exponentials against: its sum becomes nan. Rows past the end just go on.
    """
    unknown = (m == float("-inf")) & more
    lost = gl.where(unknown & real, float("nan"), 0.0)
    return gl.where(unknown, 0.0, m), l + gl.convert_layout(lost[:, None], l.type.layout)


@gluon.jit
def in_range(l):
    """The lanes' sums `l`, nan where one has grown so far that what was summed up with it may have overflowed."""
    return gl.where(l <= 18446744073709551616.0, l, float("nan"))
