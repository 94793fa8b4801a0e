"""What the Triton kernels share: loading one tile of a head, and cutting an interval into masked and unmasked tiles.

A tile is loaded either through pointers (any strides) or through a tensor descriptor (the TMA engine of Hopper and later:
one instruction per tile, no registers for addresses, zeros outside the tensor). The host decides which, per launch.
"""

# mypy: ignore-errors

from __future__ import annotations

import math
from functools import cache

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from longctx.masks import UNBOUNDED, KeyRange

LOG2_E = 1.4426950408889634

# Whether @triton.jit functions made in this process run in the interpreter, on CPU tensors. Fixed at import, as is theirs.
INTERPRETING: bool = triton.knobs.runtime.interpret


@triton.jit
def load_tile(
    src, batch, head, start, end, stride_b, stride_s, stride_h,
    ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    USE_DESCRIPTOR: tl.constexpr, CHECK_ROWS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Rows [start, start + ROWS) of one head of a "b s h d" tensor, [ROWS, D_PAD]; zeros from row `end` and column D on.

    CHECK_ROWS=False promises that no row reaches `end`.
    """
    if USE_DESCRIPTOR:
        tile = src.load([batch, head, start, 0]).reshape([ROWS, D_PAD])
    else:
        # 64-bit before any product: one row of a million may lie more than 2**31 elements from the base.
        base = src + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + tl.cast(start, tl.int64) * stride_s
        row = tl.arange(0, ROWS)
        col = tl.arange(0, D_PAD)
        ptrs = base + row.to(tl.int64)[:, None] * stride_s + col[None, :]
        if CHECK_ROWS and D < D_PAD:
            tile = tl.load(ptrs, mask=(start + row < end)[:, None] & (col < D)[None, :], other=0.0)
        elif CHECK_ROWS:
            tile = tl.load(ptrs, mask=(start + row < end)[:, None], other=0.0)
        elif D < D_PAD:
            tile = tl.load(ptrs, mask=(col < D)[None, :], other=0.0)
        else:
            tile = tl.load(ptrs)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def place_of(index, total, num_tiles, section):
    """(tile, head) of piece `index` of `total` pieces of work, which are `num_tiles` of each head; see `heads_abreast`.

    Sections of `section` heads one after the other, the last with what remains; in a section the first tiles of all its heads,
    then their second, to their last.
    """
    heads = total // num_tiles
    last = heads // section - 1
    which = tl.minimum(index // (num_tiles * section), last)
    first = which * section
    size = tl.where(which == last, heads - first, section)
    within = index - first * num_tiles
    return within // size, first + within % size


@triton.jit
def tanh_of_scores(s, qk_scale, SOFTCAP: tl.constexpr, PRECISE: tl.constexpr):
    """tanh(scale * s / SOFTCAP), with qk_scale = scale * log2(e); SOFTCAP * log2(e) times it is the capped score in base 2.

    From exp2, since the interpreter has no tanh. For small arguments that is exact to an ulp of 1, not of the result: far
    below the rounding of 16-bit inputs, but not of fp32. PRECISE takes a polynomial there.

    Source: Moshier, Cephes, tanhf.c (the polynomial and where it ends).
    """
    x = s * (qk_scale * (0.6931471805599453 / SOFTCAP))
    e = tl.math.exp2(tl.abs(x) * -2.8853900817779268)
    t = (1.0 - e) / (1.0 + e)
    t = tl.where(x < 0.0, -t, t)
    if PRECISE:
        z = x * x
        y = ((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1
        t = tl.where(tl.abs(x) < 0.625, ((y * z - 3.33332819422e-1) * z) * x + x, t)
    return t


@triton.jit
def row_intervals(LO, HI, stride_lo, batch, m0, sq, sk, KIND: tl.constexpr, BLOCK_M: tl.constexpr):
    """Visible keys of the rows [m0, m0 + BLOCK_M): per row `row_lo`, `row_hi`; of the block, `first`, `end` (any row sees
    them) and `full_lo`, `full_hi` (all rows do). Both ends never decrease, so the first and the last row bound the block.

    KIND "full": all keys. "band": row i sees [i + LO, i + HI). "rows": LO and HI point to the ends, int32 [1 or b, sq]. With
    queries and keys exchanged it says which rows see each key.
    """
    row = m0 + tl.arange(0, BLOCK_M)
    last = tl.minimum(m0 + BLOCK_M, sq) - 1
    if KIND == "full":
        row_lo = row * 0
        row_hi = row_lo + sk
        first, end, full_lo, full_hi = m0 * 0, m0 * 0 + sk, m0 * 0, m0 * 0 + sk
    elif KIND == "band":
        row_lo = row + LO
        row_hi = tl.minimum(row + HI, sk)
        first = tl.maximum(m0 + LO, 0)
        end = tl.minimum(tl.maximum(last + HI, 0), sk)
        full_lo = tl.maximum(last + LO, 0)
        full_hi = tl.minimum(tl.maximum(m0 + HI, 0), sk)
    else:
        lo_ptr = LO + batch.to(tl.int64) * stride_lo
        hi_ptr = HI + batch.to(tl.int64) * stride_lo
        row_lo = tl.load(lo_ptr + row, mask=row < sq, other=0)
        row_hi = tl.load(hi_ptr + row, mask=row < sq, other=0)
        first, end = tl.load(lo_ptr + m0), tl.load(hi_ptr + last)
        full_lo, full_hi = tl.load(lo_ptr + last), tl.load(hi_ptr + m0)
    return row_lo, row_hi, first, end, full_lo, full_hi


@triton.jit
def cut_tiles(first, end, full_lo, full_hi, BLOCK: tl.constexpr, MASK_HEAD: tl.constexpr):
    """Cut the tiles over [first, end) into masked [start, a), unmasked [a, b) and masked [b, end).

    [full_lo, full_hi) inside [first, end) is where nothing needs a mask. Where no tile lies in it, all are masked and go
    into the first part (MASK_HEAD) or into the last. start, a and b are multiples of BLOCK. All inputs are >= 0.
    """
    start = first // BLOCK * BLOCK
    a = (full_lo + BLOCK - 1) // BLOCK * BLOCK
    b = full_hi // BLOCK * BLOCK
    has_unmasked = b > a
    if MASK_HEAD:
        none = tl.maximum(start, (end + BLOCK - 1) // BLOCK * BLOCK)
    else:
        none = start
    return start, tl.where(has_unmasked, a, none), tl.where(has_unmasked, b, none)


def as_operand(t: torch.Tensor, rows: int, d_pad: int, use_descriptor: bool):
    """`t` "b s h d" as a kernel argument: itself, or a descriptor that loads [rows, d_pad] tiles of one head.

    The descriptor's axes are (b, h, s, d), whatever the strides: unit leading axes fold away in the compiler.
    """
    if not use_descriptor:
        return t
    b, s, h, d = t.shape
    sb, ss, sh, sd = strides_of(t)
    return TensorDescriptor(t, [b, h, s, d], [sb, sh, ss, sd], [1, 1, rows, d_pad])


def as_flat_operand(t: torch.Tensor, rows: int, use_descriptor: bool):
    """A contiguous `t` as one flat array, or a descriptor that loads `rows` of its elements."""
    return TensorDescriptor(t, [t.numel()], [1], [rows]) if use_descriptor else t


def can_describe(*tensors: torch.Tensor) -> bool:
    """Whether the TMA engine can read all of these: base and strides of 16 bytes, nothing empty or expanded."""
    return all(
        t.numel() > 0
        and t.data_ptr() % 16 == 0
        and all(0 < s * t.element_size() < 1 << 40 and s * t.element_size() % 16 == 0 for s in strides_of(t)[:3])
        for t in tensors
    )


def strides_of(t: torch.Tensor) -> tuple[int, int, int, int]:
    """Strides of "b s h d"; an axis of size 1 is given the one it would have in a contiguous tensor: torch leaves it free."""
    b, s, h, d = t.shape
    own = t.stride()
    if min(b, s, h, d) > 1:
        return own
    plain = (s * h * d, h * d, d, 1)
    return tuple(p if n == 1 else o for n, o, p in zip((b, s, h, d), own, plain, strict=True))


def stride_args(**tensors: torch.Tensor) -> dict[str, int]:
    """stride_{name}b, stride_{name}s, stride_{name}h of tensors "b s h d"."""
    return {f"stride_{name}{axis}": t.stride(i) for name, t in tensors.items() for i, axis in enumerate("bsh")}


def row_interval_args(key_range: KeyRange, sq: int, sk: int, device: torch.device) -> dict:
    """Kernel arguments that say which keys a query row sees; see `row_intervals`."""
    if key_range.kind == "rows":
        return _tensor_args(*key_range.bounds(sq, sk, device))
    return _band_args(key_range.kind, key_range.lo, key_range.hi)


def key_interval_args(key_range: KeyRange, sq: int, sk: int, device: torch.device) -> dict:
    """The same seen from the keys: which query rows see a key."""
    if key_range.kind == "rows":
        return _tensor_args(*key_range.transposed(sq, sk, device))
    # Row i sees key n when i + lo <= n < i + hi, so n + 1 - hi <= i < n + 1 - lo.
    return _band_args(key_range.kind, 1 - key_range.hi, 1 - key_range.lo)


def _tensor_args(lo: torch.Tensor, hi: torch.Tensor) -> dict:
    stride = lo.shape[1] if lo.shape[0] > 1 else 0
    return {"LO": lo, "HI": hi, "stride_lo": stride, "KIND": "rows", "HAS_LO": True, "HAS_HI": True}


def _band_args(kind: str, lo: int, hi: int) -> dict:
    # One less than the limit: seen from the keys, an end that no row reaches is off by one.
    has_lo, has_hi = lo > 1 - UNBOUNDED, hi < UNBOUNDED - 1
    return {"LO": lo, "HI": hi, "stride_lo": 0, "KIND": kind, "HAS_LO": has_lo, "HAS_HI": has_hi}


# Pieces of work in a section, per SM.
_SECTION = 1.5


def heads_abreast(tiles: int, heads: int, device: torch.device) -> int:
    """How many heads' tiles are begun side by side, so that the GPU is busy to the end and yet reads few heads at a time.

    Tiles of a causal block differ in length, and the longest of a head begin first. Were a head begun when the one before it has
    all its tiles begun, the last one's longest tiles would run on while other SMs have nothing left: at 8k tokens and 8 key heads
    that is a fifth of a backward's time. So the last heads to begin, together, are more tiles than there are SMs.
    """
    return max(1, min(heads, math.ceil(_SECTION * num_sms(device) / tiles)))


@cache
def num_sms(device: torch.device) -> int:
    """Of a GPU; under the interpreter few, so that small blocks have sections too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def num_tiles(length: int, tile: int) -> int:
    """Tiles that cover `length`. triton.cdiv says the same after 10 us of unwrapping, in a launch of 200."""
    return -(-length // tile)


def padded(head_dim: int) -> int:
    """The power of two that a head dim is padded to inside the kernels; matrix units need at least 16."""
    return max(16, triton.next_power_of_2(head_dim))
