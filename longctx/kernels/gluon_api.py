"""What the Hopper kernels need of Triton's Gluon, under one name in every release: 3.6 is the oldest, 3.9 the newest tried.

Gluon is experimental: names move between releases, and two things that Hopper has are missing in 3.6 (TMA reductions, named
barriers). Kernels import them from here and nothing else asks for a version.

Source: NVIDIA, PTX ISA 8.6, `cp.reduce.async.bulk.tensor` and `barrier{.cta}`.
"""

# mypy: ignore-errors

from __future__ import annotations

from functools import cache

import torch
import triton
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from longctx.kernels.tiles import place_of as _place_of
from longctx.kernels.tiles import strides_of

# Half-open. Compiled with 3.6.0 and 3.9.0; run on a GPU with 3.6.0.
KNOWN_VERSIONS = ((3, 6), (3, 10))


def missing_gluon(device: torch.device) -> str | None:
    """None if Gluon kernels for Hopper run on `device`, else the reason why not, as a sentence for a log."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "needs an NVIDIA GPU"
    if triton.knobs.runtime.interpret:
        return "Gluon kernels have no interpreter: unset TRITON_INTERPRET"
    version = tuple(int(x) for x in triton.__version__.split(".")[:2])
    if not KNOWN_VERSIONS[0] <= version < KNOWN_VERSIONS[1]:
        low, high = (".".join(map(str, v)) for v in KNOWN_VERSIONS)
        return (
            f"it is known to work with Triton from {low} up to but not including {high}, this is {triton.__version__}"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"needs compute capability 9.0 (Hopper), this GPU has {'.'.join(map(str, capability))}"
    return None


def describe(t: torch.Tensor, shape: list[int], strides: list[int], tile: list[int], layout=None) -> TensorDescriptor:
    """A TMA descriptor that moves `tile`s of `t`, seen with `shape` and `strides` (both in elements, last stride 1).

    Reads past `shape` give zeros, writes past it are dropped. Strides but the last, and the base, are whole 16 bytes.
    """
    if layout is None:
        layout = shared_layout(tile, t.dtype)
    return TensorDescriptor(t, shape, strides, tile, layout)


def describe_heads(t: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A descriptor of `t` "b s h d" that moves [rows, columns] of one head, addressed by (b, h, s, d).

    Columns past d are zeros when read and dropped when written, so that no copy pads a head dim.
    """
    b, s, h, d = t.shape
    sb, ss, sh, _ = strides_of(t)
    return describe(t, [b, h, s, d], [sb, sh, ss, 1], [1, 1, rows, columns])


def shared_layout(tile: list[int], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """The swizzled layout in shared memory that TMA writes and the matrix units read."""
    return _default_layout(tuple(tile), dtype)


# Gluon takes 20 us to say it, more than TMA to load a tile, and is asked for every descriptor of every launch.
@cache
def _default_layout(tile: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(tile), _DTYPES[dtype])


_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}

# (descriptor, coordinates, barrier, shared memory): load a tile; the barrier counts its bytes.
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
# (descriptor, coordinates, shared memory): store a tile.
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
# (n): wait until all but the last n stores and reductions of this thread have read their shared memory.
tma_store_wait = tma.store_wait

if hasattr(tma, "async_atomic_add"):
    tma_reduce_add = tma.async_atomic_add
else:

    @builtin
    def tma_reduce_add(tensor_desc, coord, src, _semantic=None):
        """Add a tile in shared memory to one in global memory."""
        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
        _semantic.builder.create_async_tma_reduce(kind, tensor_desc.handle, coord, src.handle)


# Arithmetic, which is the same in Gluon.
place_of = gluon.jit(_place_of.fn)


@builtin
def laid_out(buffer, layout, _semantic=None):
    """The same shared memory, taken to be of another layout."""
    return _semantic.memdesc_reinterpret(buffer, buffer.dtype, buffer.shape, getattr(layout, "value", layout))


@gluon.constexpr_function
def _barrier_asm(operation, threads):
    return f"bar.{operation} $1, {threads}; mov.b32 $0, $1;"


@gluon.jit
def _named_barrier(OPERATION: gl.constexpr, number, THREADS: gl.constexpr, NUM_WARPS: gl.constexpr):
    # One element for each thread, so that each thread executes the instruction once.
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [NUM_WARPS], [0])
    numbers = gl.arange(0, 32 * NUM_WARPS, layout=layout) * 0 + number
    asm: gl.constexpr = _barrier_asm(OPERATION, THREADS)
    gl.inline_asm_elementwise(asm, "=r,r", [numbers], dtype=gl.int32, is_pure=False, pack=1)


# Named barriers: numbers 5 to 15 are free, the compiler takes those below for the partitions of a warp-specialised kernel. An
# arrival at an mbarrier is compiled to a barrier of the whole warpgroup and an instruction of one thread, since all must have
# come; at a named barrier each warp says so for itself and goes on. Only who waits is held up.
@gluon.jit
def named_barrier_sync(number, THREADS: gl.constexpr, NUM_WARPS: gl.constexpr = 4):
    """Wait at barrier `number` until THREADS threads have come to it; called by NUM_WARPS whole warps."""
    _named_barrier("sync", number, THREADS, NUM_WARPS)


@gluon.jit
def signal_ring(FIRST: gl.constexpr, COUNT: gl.constexpr, TELLERS: gl.constexpr):
    """COUNT signals, each given by TELLERS warpgroups to one listener: the named barriers from number FIRST on.

    For each time that all tell, the listener awaits once, also after the last one: they take turns. A named barrier knows by
    THREADS who is to come, and counts the turns itself; COUNT, TELLERS and `turn` are what signals made of mbarriers need, as
    the sanitizer has to be given.
    """
    return FIRST


@gluon.jit
def tell(signals, i, THREADS: gl.constexpr):
    """Give the i-th signal, by a whole warpgroup, and go on. THREADS: of all who tell and the listener."""
    _named_barrier("arrive", signals + i, THREADS, 4)


@gluon.jit
def await_signal(signals, i, turn, THREADS: gl.constexpr, NUM_WARPS: gl.constexpr = 4):
    """Wait for the i-th signal to have been given as often as this was called before (`turn`) and once more."""
    _named_barrier("sync", signals + i, THREADS, NUM_WARPS)


@gluon.jit
def barrier_ring(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers that each complete a phase after ARRIVALS arrivals. To be followed by `fence_async_shared`."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers
