"""`kernel="auto"`: of the kernels that can do a block, the one that was measured fastest on such a block.

Forward and backward are chosen apart. What was measured stands in `MEASURED`; a block is compared with the nearest shape
there. A kernel that was not measured comes after those that were, in the registry's order. To refill the table after new
measurements: `python -m longctx.results --write-rules`; a test compares it with the measurements.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import cache

import torch

from longctx.errors import KernelError
from longctx.kernels import BlockAttention, Direction, block_kind, get_kernel, kernel_names
from longctx.masks import KeyRange

log = logging.getLogger(__name__)

# TFLOP/s of whole calls by kernel, forward and backward.
Speeds = tuple[dict[str, int], dict[str, int]]
# (head dim, kind of block, rows) -> speeds.
Table = dict[tuple[int, str, int], Speeds]

# Compute capability -> table. Means over the cases of benchmarks/results/{attention,sweep}.csv with that head dim, mask and length,
# whatever their batch and heads; bf16, which stands for fp16 too; by `longctx bench attention` and `longctx bench attention --sweep`.
# From NVIDIA H100 80GB HBM3, torch 2.11.0, triton 3.6.0, commit 7c3ed89, 2026-11-23.
# fmt: off
MEASURED: dict[tuple[int, int], Table] = {
    (9, 0): {
        (64, "causal", 512): ({"cudnn": 255, "triton": 172, "hopper": 158}, {"hopper": 138, "triton": 121, "cudnn": 88}),
        (64, "causal", 1024): ({"cudnn": 331, "triton": 257, "hopper": 180}, {"triton": 194, "hopper": 186, "cudnn": 150}),
        (64, "causal", 2048): ({"hopper": 393, "cudnn": 389, "triton": 337}, {"hopper": 293, "triton": 263}),
        (64, "causal", 4096): ({"hopper": 447, "cudnn": 417, "triton": 384}, {"hopper": 351, "triton": 310}),
        (64, "causal", 8192): ({"flash4": 520, "hopper": 506, "cudnn": 439, "triton": 413}, {"hopper": 462, "flash4": 443, "cudnn": 366, "triton": 348}),
        (64, "causal", 16384): ({"hopper": 505, "cudnn": 439, "triton": 425}, {"hopper": 431, "triton": 374}),
        (64, "causal", 32768): ({"flash4": 529, "hopper": 520, "cudnn": 463, "triton": 440}, {"flash4": 524, "hopper": 518, "cudnn": 414, "triton": 333}),
        (64, "causal", 65536): ({"hopper": 525, "cudnn": 449, "triton": 441}, {"hopper": 512, "cudnn": 411, "triton": 380}),
        (64, "full", 512): ({"cudnn": 377, "triton": 308, "hopper": 264}, {"hopper": 263, "triton": 212, "cudnn": 156}),
        (64, "full", 1024): ({"cudnn": 421, "hopper": 407, "triton": 371}, {"hopper": 373, "triton": 285, "cudnn": 248}),
        (64, "full", 2048): ({"hopper": 475, "cudnn": 432, "triton": 400}, {"hopper": 356, "triton": 329}),
        (64, "full", 4096): ({"hopper": 508, "cudnn": 447, "triton": 419}, {"hopper": 391, "triton": 354}),
        (64, "full", 8192): ({"hopper": 533, "cudnn": 456, "triton": 431}, {"hopper": 419, "triton": 364}),
        (64, "full", 16384): ({"hopper": 520, "cudnn": 452, "triton": 435}, {"hopper": 430, "triton": 388}),
        (64, "full", 32768): ({"hopper": 558, "cudnn": 473, "triton": 455}, {"hopper": 522, "cudnn": 400, "triton": 374}),
        (64, "full", 65536): ({"hopper": 530, "cudnn": 444, "triton": 444}, {"hopper": 544, "cudnn": 442, "triton": 380}),
        (128, "causal", 512): ({"cudnn": 319, "triton": 152, "hopper": 121}, {"triton": 142, "hopper": 124, "cudnn": 95}),
        (128, "causal", 1024): ({"cudnn": 437, "triton": 298, "hopper": 210}, {"hopper": 264, "triton": 221, "cudnn": 171}),
        (128, "causal", 2048): ({"cudnn": 506, "hopper": 397, "triton": 394}, {"hopper": 359, "triton": 295}),
        (128, "causal", 4096): ({"hopper": 573, "cudnn": 572, "triton": 450}, {"hopper": 423, "triton": 349}),
        (128, "causal", 8192): ({"flash4": 611, "hopper": 604, "cudnn": 572, "triton": 496}, {"hopper": 556, "flash4": 514, "cudnn": 446, "triton": 405}),
        (128, "causal", 16384): ({"hopper": 652, "cudnn": 578, "triton": 492}, {"hopper": 528, "triton": 419}),
        (128, "causal", 32768): ({"flash4": 685, "hopper": 652, "cudnn": 609, "triton": 519}, {"hopper": 592, "flash4": 583, "cudnn": 512, "triton": 419}),
        (128, "causal", 65536): ({"hopper": 666, "cudnn": 618, "triton": 514}, {"hopper": 628, "cudnn": 543, "triton": 426}),
        (128, "causal", 131072): ({"flash4": 596, "hopper": 563, "cudnn": 561, "triton": 492}, {"flash4": 582, "hopper": 559, "cudnn": 500, "triton": 399}),
        (128, "full", 512): ({"cudnn": 508, "triton": 380, "hopper": 374}, {"hopper": 290, "triton": 215, "cudnn": 175}),
        (128, "full", 1024): ({"cudnn": 585, "hopper": 578, "triton": 456}, {"hopper": 382, "triton": 295}),
        (128, "full", 2048): ({"hopper": 630, "cudnn": 600, "triton": 499}, {"hopper": 461, "triton": 355}),
        (128, "full", 4096): ({"hopper": 641, "cudnn": 623, "triton": 515}, {"hopper": 501, "triton": 394}),
        (128, "full", 8192): ({"flash4": 667, "hopper": 658, "cudnn": 614, "triton": 530}, {"hopper": 579, "flash4": 575, "cudnn": 513, "triton": 427}),
        (128, "full", 16384): ({"hopper": 656, "cudnn": 617, "triton": 533}, {"hopper": 559, "triton": 431}),
        (128, "full", 32768): ({"hopper": 693, "cudnn": 635, "triton": 550}, {"hopper": 613, "cudnn": 551, "triton": 386}),
        (256, "causal", 32768): ({"flash4": 703, "hopper": 693, "cudnn": 650, "triton": 562}, {"hopper": 431, "cudnn": 344, "flash4": 333, "triton": 290}),
    },
}
# fmt: on

# A kind that was measured nowhere is compared with another, whose work is most like its own.
_LIKE = {"empty": "full", "rectangle": "full", "band": "causal", "rows": "causal"}
_SIXTEEN_BIT = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class _Order:
    """Names in the order in which they are tried, and what that rests on.

    Args:
        shape: the measured shape in words; empty where nothing was measured.
    """

    names: tuple[str, ...]
    speeds: dict[str, int]
    shape: str


def order(device: torch.device, dtype: torch.dtype, head_dim: int, kind: str, length: int, direction: str) -> _Order:
    """Which kernels "auto" tries for a block, fastest first.

    Args:
        kind: what `block_kind` says.
        length: rows of the block.
    """
    table = MEASURED.get(_capability(device), {}) if dtype in _SIXTEEN_BIT else {}
    if not table:
        return _Order(kernel_names(), {}, "")
    kinds = {measured for _, measured, _ in table}
    while kind not in kinds and kind in _LIKE:
        kind = _LIKE[kind]
    # Kernels pad head dims to powers of two.
    padded = 1 << max(0, head_dim - 1).bit_length()

    def distance(key: tuple[int, str, int]) -> tuple[bool, float, float]:
        return key[1] != kind, abs(math.log2(padded / key[0])), abs(math.log2(max(1, length) / key[2]))

    nearest = min(table, key=distance)
    speeds = table[nearest][direction == "backward"]
    ranked = sorted(speeds, key=lambda name: -speeds[name])
    # What was measured and is not registered here cannot be chosen.
    ranked = [name for name in ranked if name in kernel_names()]
    shape = f"head dim {nearest[0]}, {nearest[1]}, {nearest[2]} rows"
    return _Order((*ranked, *(name for name in kernel_names() if name not in ranked)), speeds, shape)


def _capability(device: torch.device) -> tuple[int, int]:
    if device.type != "cuda" or torch.version.hip is not None:
        return (0, 0)
    return torch.cuda.get_device_capability(device)


def choose(
    name: str,
    q: torch.Tensor,
    key_range: KeyRange,
    softcap: float = 0.0,
    direction: Direction = "forward",
) -> BlockAttention:
    """The kernel for one block: the one named, or with "auto" the fastest that supports it. A choice is logged once.

    Raises:
        KernelError: the named kernel does not support the block (with its reason), or none does.
    """
    # Lengths differ from batch to batch; to the choice they are powers of two.
    length = 1 << round(math.log2(max(1, q.shape[1])))
    return _choose(name, q.device, q.dtype, q.shape[-1], block_kind(key_range), length, softcap, direction)


@cache
def _choose(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    kind: str,
    length: int,
    softcap: float,
    direction: Direction,
) -> BlockAttention:
    capped = f", softcap {softcap:g}" if softcap else ""
    tried = order(device, dtype, head_dim, kind, length, direction) if name == "auto" else _Order((name,), {}, "")
    refused: list[str] = []
    for candidate in tried.names:
        kernel = get_kernel(candidate)
        reason = kernel.supports(
            device=device, dtype=dtype, head_dim=head_dim, kind=kind, softcap=softcap, direction=direction
        )
        if reason is None:
            why = _measured(candidate, tried)
            block = f"{device.type} {dtype} head dim {head_dim}, {kind}{capped}"
            if refused:
                # The same for most kinds of blocks.
                _log_once(f"attention kernels left out on {device.type}: {'; '.join(refused)}")
            _log_once(f"attention kernel for {direction} on {block}: {candidate}" + (f" ({why})" if why else ""))
            return kernel
        refused.append(f"{candidate}: {reason}")
    raise KernelError(
        f"no attention kernel {direction} for {dtype} with head dim {head_dim} on {device.type}, key range {kind!r}{capped}\n  "
        + "\n  ".join(refused)
    )


def _measured(chosen: str, tried: _Order) -> str:
    """`hopper: 670 TFLOP/s measured against cudnn 615, triton 530; head dim 128, causal, 32768 rows`; or nothing."""
    if chosen not in tried.speeds:
        return ""
    others = ", ".join(
        f"{name} {tried.speeds[name]}" for name in tried.names if name in tried.speeds and name != chosen
    )
    against = f" against {others}" if others else ""
    return f"{chosen}: {tried.speeds[chosen]} TFLOP/s measured{against}; {tried.shape}"


@cache
def _log_once(message: str) -> None:
    # Blocks of different lengths may come to the same choice for the same reason.
    log.info(message)
