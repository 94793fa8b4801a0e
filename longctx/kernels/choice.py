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
# From NVIDIA H100 80GB HBM3, torch 2.11.0, triton 3.6.0, commit f86bf30, 2026-11-24, the newest of them.
# fmt: off
MEASURED: dict[tuple[int, int], Table] = {
    (9, 0): {
        (64, "causal", 512): ({"cudnn": 255, "triton": 173, "hopper": 119}, {"hopper": 129, "triton": 121, "cudnn": 88}),
        (64, "causal", 1024): ({"cudnn": 331, "triton": 257, "hopper": 232}, {"hopper": 224, "triton": 180, "cudnn": 150}),
        (64, "causal", 2048): ({"hopper": 389, "cudnn": 382, "triton": 335}, {"hopper": 321, "triton": 262}),
        (64, "causal", 4096): ({"hopper": 472, "cudnn": 411, "triton": 387}, {"hopper": 394, "triton": 310}),
        (64, "causal", 8192): ({"hopper": 503, "flash4": 490, "cudnn": 432, "triton": 425}, {"hopper": 492, "flash4": 433, "triton": 357, "cudnn": 355}),
        (64, "causal", 16384): ({"hopper": 506, "cudnn": 427, "triton": 413}, {"hopper": 492, "triton": 365}),
        (64, "causal", 32768): ({"hopper": 545, "flash4": 528, "triton": 455, "cudnn": 426}, {"hopper": 550, "flash4": 519, "cudnn": 389, "triton": 381}),
        (64, "causal", 65536): ({"hopper": 522, "cudnn": 449, "triton": 421}, {"hopper": 509, "cudnn": 411, "triton": 385}),
        (64, "causal", 131072): ({"flash4": 564, "hopper": 534, "cudnn": 465, "triton": 457}, {"flash4": 558, "hopper": 544, "cudnn": 413, "triton": 387}),
        (64, "causal", 262144): ({"hopper": 536, "triton": 438, "cudnn": 430}, {"hopper": 545, "cudnn": 416, "triton": 381}),
        (64, "causal", 524288): ({"hopper": 527, "cudnn": 406}, {"hopper": 529, "cudnn": 409}),
        (64, "causal", 1048576): ({"hopper": 501, "cudnn": 386}, {"hopper": 516, "cudnn": 405}),
        (64, "full", 512): ({"cudnn": 377, "triton": 289, "hopper": 212}, {"hopper": 244, "triton": 210, "cudnn": 156}),
        (64, "full", 1024): ({"cudnn": 421, "hopper": 406, "triton": 368}, {"hopper": 366, "triton": 279, "cudnn": 248}),
        (64, "full", 2048): ({"hopper": 470, "cudnn": 435, "triton": 420}, {"hopper": 442, "triton": 327}),
        (64, "full", 4096): ({"hopper": 497, "cudnn": 441, "triton": 408}, {"hopper": 490, "triton": 351}),
        (64, "full", 8192): ({"hopper": 508, "cudnn": 445, "triton": 426}, {"hopper": 526, "triton": 375}),
        (64, "full", 16384): ({"hopper": 516, "cudnn": 449, "triton": 420}, {"hopper": 545, "triton": 380}),
        (64, "full", 32768): ({"hopper": 538, "cudnn": 473, "triton": 444}, {"hopper": 501, "cudnn": 400, "triton": 378}),
        (64, "full", 65536): ({"hopper": 535, "cudnn": 444, "triton": 438}, {"hopper": 539, "cudnn": 442, "triton": 383}),
        (64, "full", 131072): ({"flash4": 554, "hopper": 542, "cudnn": 465, "triton": 448}, {"hopper": 552, "flash4": 547, "cudnn": 427, "triton": 379}),
        (64, "full", 262144): ({"hopper": 532, "cudnn": 462}, {"hopper": 544, "cudnn": 428}),
        (64, "full", 524288): ({"hopper": 532, "cudnn": 428}, {"hopper": 519, "cudnn": 429}),
        (64, "full", 1048576): ({"hopper": 538, "cudnn": 408}, {"hopper": 501, "cudnn": 443}),
        (128, "band", 131072): ({"hopper": 657, "flash4": 606, "triton": 388}, {"hopper": 544, "flash4": 443, "triton": 400}),
        (128, "causal", 512): ({"cudnn": 319, "hopper": 288, "triton": 224}, {"hopper": 172, "triton": 142, "cudnn": 95}),
        (128, "causal", 1024): ({"cudnn": 437, "triton": 322, "hopper": 230}, {"hopper": 250, "triton": 204, "cudnn": 171}),
        (128, "causal", 2048): ({"cudnn": 506, "hopper": 453, "triton": 397}, {"hopper": 386, "triton": 293}),
        (128, "causal", 4096): ({"hopper": 603, "cudnn": 536, "triton": 439}, {"hopper": 470, "triton": 344}),
        (128, "causal", 8192): ({"hopper": 725, "flash4": 625, "cudnn": 585, "triton": 481}, {"hopper": 550, "flash4": 485, "cudnn": 430, "triton": 395}),
        (128, "causal", 16384): ({"hopper": 607, "cudnn": 569, "triton": 494}, {"hopper": 583, "triton": 413}),
        (128, "causal", 32768): ({"hopper": 691, "flash4": 667, "cudnn": 582, "triton": 559}, {"hopper": 602, "flash4": 574, "cudnn": 533, "triton": 421}),
        (128, "causal", 65536): ({"hopper": 651, "cudnn": 618, "triton": 538}, {"hopper": 614, "cudnn": 543, "triton": 419}),
        (128, "causal", 131072): ({"hopper": 716, "flash4": 669, "cudnn": 576, "triton": 533}, {"flash4": 632, "hopper": 626, "cudnn": 528, "triton": 433}),
        (128, "causal", 262144): ({"hopper": 671, "cudnn": 544}, {"hopper": 634, "cudnn": 543}),
        (128, "causal", 524288): ({"hopper": 605, "cudnn": 523}, {"hopper": 612, "cudnn": 529}),
        (128, "causal", 1048576): ({"hopper": 556, "cudnn": 495}, {"hopper": 601, "cudnn": 538}),
        (128, "full", 512): ({"cudnn": 508, "triton": 313, "hopper": 216}, {"hopper": 226, "triton": 215, "cudnn": 175}),
        (128, "full", 1024): ({"cudnn": 568, "triton": 456, "hopper": 452}, {"hopper": 402, "triton": 296}),
        (128, "full", 2048): ({"hopper": 623, "cudnn": 597, "triton": 495}, {"hopper": 489, "triton": 354}),
        (128, "full", 4096): ({"hopper": 661, "cudnn": 606, "triton": 518}, {"hopper": 530, "triton": 387}),
        (128, "full", 8192): ({"hopper": 725, "flash4": 658, "cudnn": 626, "triton": 493}, {"hopper": 577, "flash4": 551, "cudnn": 484, "triton": 395}),
        (128, "full", 16384): ({"hopper": 637, "cudnn": 600, "triton": 532}, {"hopper": 592, "triton": 427}),
        (128, "full", 32768): ({"hopper": 646, "cudnn": 635, "triton": 537}, {"hopper": 596, "cudnn": 551, "triton": 373}),
        (128, "full", 65536): ({"hopper": 600, "cudnn": 592, "triton": 534}, {"hopper": 570, "triton": 411}),
        (128, "full", 131072): ({"hopper": 617, "cudnn": 588, "triton": 531}, {"hopper": 568, "triton": 413}),
        (128, "full", 262144): ({"hopper": 574, "cudnn": 573}, {"hopper": 582, "cudnn": 533}),
        (128, "full", 524288): ({"hopper": 644, "cudnn": 601}, {"hopper": 573, "cudnn": 530}),
        (128, "full", 1048576): ({"hopper": 594, "cudnn": 584}, {"hopper": 550, "cudnn": 541}),
        (128, "rows", 65536): ({"hopper": 635, "triton": 370}, {"hopper": 533, "triton": 395}),
        (256, "causal", 32768): ({"flash4": 780, "hopper": 756, "cudnn": 705, "triton": 514}, {"hopper": 398, "cudnn": 390, "flash4": 318, "triton": 285}),
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
