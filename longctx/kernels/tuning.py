"""Tile sizes of the Triton kernels, per head dim, dtype and GPU; each entry says how it was found."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Tile:
    """How one kernel cuts and pipelines its work.

    Args:
        block_m: query rows per tile, a power of two, at least 16.
        block_n: keys per tile, likewise.
        num_warps: 4 or 8.
        num_stages: tiles in flight; shared memory grows with it.
        use_descriptor: load tiles with the TMA engine where the tensors allow it (Hopper and later).
        max_registers: a cap per thread, to fit more programs on one SM; None leaves it to the compiler.
    """

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2
    use_descriptor: bool = False
    max_registers: int | None = None

    def options(self) -> dict[str, int]:
        """The launch options of Triton."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.max_registers is None else {**options, "maxnreg": self.max_registers}


@dataclass(frozen=True)
class Tiles:
    """Tiles of the three kernels."""

    forward: Tile
    dq: Tile
    dkdv: Tile


# Small enough that tests of a few dozen rows cross several tiles, in every loop.
INTERPRETER = Tiles(Tile(32, 16), Tile(32, 16), Tile(16, 32))

# GPUs with the TMA engine, wgmma and 227 KB of shared memory per program (compute capability 9.0 and 10.0), 16-bit
# inputs, by padded head dim. 64, 128 and 256: the fastest of 6 to 14 variants each on one H100 (triton 3.6.0, bf16, 2026-11-22;
# batch 4 x 8k x 16 heads and 1 x 32k x 16 heads, causal and full). Small tiles with 4 warps win because two or three
# programs share an SM, and one's softmax runs under another's products. 16 and 32 take the tiles of 64, not measured.
_HOPPER_64 = Tiles(Tile(64, 128, 4, 3, True), Tile(128, 64, 8, 3, True), Tile(64, 64, 4, 3, True))
_HOPPER = {
    16: _HOPPER_64,
    32: _HOPPER_64,
    64: _HOPPER_64,
    128: Tiles(Tile(128, 64, 4, 2, True), Tile(64, 64, 4, 2, True), Tile(64, 64, 4, 2, True)),
    256: Tiles(Tile(128, 64, 8, 2, True), Tile(64, 64, 4, 2, True), Tile(64, 64, 8, 2, True)),
}

# Every other GPU, 16-bit inputs: sized for the 99 KB of shared memory of consumer GPUs. Not measured.
_PORTABLE = {
    16: Tiles(Tile(128, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    32: Tiles(Tile(128, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    64: Tiles(Tile(128, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    128: Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 4, 1), Tile(32, 64, 4, 1)),
    256: Tiles(Tile(64, 32, 4, 1), Tile(32, 32, 4, 1), Tile(16, 32, 4, 1)),
}

# fp32 inputs: products are exact fp32 on the plain cores, bound by arithmetic and registers, not by loads. The largest tiles
# of those compiled for sm_90 that spill nothing, or the least (dq at 128 and 256: 600 bytes); speed not measured.
_FP32_64 = Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1))
_FP32 = {
    16: _FP32_64,
    32: _FP32_64,
    64: _FP32_64,
    128: Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    256: Tiles(Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 4, 1)),
}


@cache
def tiles_for(head_dim: int, dtype: torch.dtype, device: torch.device) -> Tiles:
    """The tuned tiles for a padded head dim (a power of two from 16 to 256)."""
    if device.type == "cpu":
        return INTERPRETER
    if dtype == torch.float32:
        return _FP32[head_dim]
    capability = torch.cuda.get_device_capability(device)
    return (_HOPPER if capability in ((9, 0), (10, 0), (10, 3)) else _PORTABLE)[head_dim]
