"""`kernel="auto"`: of the kernels that can do a block, the one that was measured fastest on such a block.

Forward and backward are chosen apart. What was measured stands in `MEASURED`; a block is compared with the nearest shape
there. A kernel that was not measured comes after those that were, in the registry's order. To refill the table after new
measurements: `python -m longctx.results --rules`, whose output a test compares with this file.
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

# Compute capability -> table. Means over the cases of benchmarks/results/attention.csv with that head dim, mask and length,
# whatever their batch and heads; bf16, which stands for fp16 too. NVIDIA H100 80GB HBM3, triton 3.6.0, commit 9f48123,
# 2026-11-22, `longctx bench attention`.
# fmt: off
MEASURED: dict[tuple[int, int], Table] = {
    (9, 0): {
        (64, "causal", 8192): ({"triton": 406, "cudnn": 402}, {"cudnn": 336, "triton": 325}),
        (64, "causal", 32768): ({"cudnn": 454, "triton": 430}, {"cudnn": 409, "triton": 382}),
        (128, "causal", 8192): ({"cudnn": 500, "triton": 479}, {"cudnn": 400, "triton": 368}),
        (128, "causal", 32768): ({"cudnn": 588, "triton": 541}, {"cudnn": 515, "triton": 406}),
        (128, "causal", 131072): ({"triton": 521, "cudnn": 509}, {"cudnn": 518, "triton": 434}),
        (128, "full", 8192): ({"cudnn": 559, "triton": 516}, {"cudnn": 488, "triton": 401}),
        (256, "causal", 32768): ({"cudnn": 607, "triton": 548}, {"cudnn": 376, "triton": 290}),
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
            why = "; ".join(filter(None, [_measured(candidate, tried), *refused]))
            block = f"{device.type} {dtype} head dim {head_dim}, {kind}{capped}"
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
