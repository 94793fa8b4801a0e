"""The signals of `gluon_api` as mbarriers, which the concurrency sanitizer knows: what `race_cases` puts in their place."""

# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from longctx.kernels.gluon_api import barrier_ring


@gluon.jit
def signal_ring(FIRST: gl.constexpr, COUNT: gl.constexpr, TELLERS: gl.constexpr):
    return barrier_ring(COUNT, TELLERS)


@gluon.jit
def tell(signals, i, THREADS: gl.constexpr):
    mbarrier.arrive(signals.index(i), count=1)


@gluon.jit
def await_signal(signals, i, turn, THREADS: gl.constexpr, NUM_WARPS: gl.constexpr = 4):
    mbarrier.wait(signals.index(i), turn & 1)
