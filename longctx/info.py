"""`longctx info`: versions, devices, process backends, which kernels can do what here and why not, and cache folders."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

import torch
import torch.distributed as dist

from longctx import __version__
from longctx.kernels import Direction, get_kernel, kernel_names
from longctx.kernels.fused import liger_missing
from longctx.results import git_commit, version

PACKAGES = (
    "torch", "triton", "deepspeed", "liger-kernel", "flash-attn-4", "numpy", "einops", "pydantic", "safetensors",
    "tokenizers", "transformers", "wandb", "pyarrow", "matplotlib",
)  # fmt: skip
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (64, 80, 128, 256)
# What a hop can ask of a kernel; "empty" is never launched.
KINDS = ("full", "causal", "rectangle", "band", "rows")


def sections() -> Iterator[tuple[str, list[str]]]:
    """Titles and lines, in the order in which they are printed."""
    yield (
        "versions",
        [
            _line("longctx", f"{__version__}, commit {git_commit()}"),
            _line("python", f"{platform.python_version()} on {platform.platform()}"),
            *(_line(package, version(package)) for package in PACKAGES),
        ],
    )
    yield "devices", _devices()
    yield "process backends", [_line(name, "yes" if there else "no") for name, there in _backends().items()]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield (
        f"attention kernels on {device.type}, in the order of kernel = auto where nothing was measured",
        _kernels(device),
    )
    yield "fused operations", [_line("liger-kernel", _fused(device))]
    yield "caches", _caches()


def _line(name: str, value: str) -> str:
    return f"{name:<14} {value}"


def _devices() -> list[str]:
    lines = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        lines.append(
            _line(
                f"cuda:{index}",
                f"{p.name}, {p.total_memory / 2**30:.0f} GiB, capability {p.major}.{p.minor}, "
                f"{p.multi_processor_count} multiprocessors",
            )
        )
    if not lines:
        built = f"built for CUDA {torch.version.cuda}, none seen" if torch.version.cuda else "torch is built without it"
        lines.append(_line("cuda", f"none: {built}"))
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [*lines, _line("cpu", f"{allowed} cores to use, {torch.get_num_threads()} threads in torch")]


def _backends() -> dict[str, bool]:
    if not dist.is_available():
        return {"gloo": False, "nccl": False}
    return {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}


def _kernels(device: torch.device) -> list[str]:
    """For every kernel and dtype, what it takes; what it does not, with its own reason."""
    lines = []
    for name in kernel_names():
        try:
            kernel = get_kernel(name)
        except ImportError as error:
            lines.append(_line(name, f"no: {error}"))
            continue
        for dtype in DTYPES:
            refused: dict[str, list[str]] = {}
            cases = [(dim, kind) for dim in HEAD_DIMS for kind in KINDS]
            for dim, kind in cases:
                forward, backward = (
                    kernel.supports(device=device, dtype=dtype, head_dim=dim, kind=kind, direction=direction)
                    for direction in get_args(Direction)
                )
                reason = (
                    forward
                    if forward == backward
                    else f"no forward: {forward}"
                    if forward
                    else f"no backward: {backward}"
                )
                if reason:
                    refused.setdefault(reason, []).append(f"{dim} {kind}")
            label = f"{name} {str(dtype).removeprefix('torch.')}"
            count = len(cases) - sum(map(len, refused.values()))
            if count == len(cases):
                lines.append(f"{label:<20} yes: head dims {', '.join(map(str, HEAD_DIMS))}, every mask")
            elif count == 0 and len(refused) == 1:
                lines.append(f"{label:<20} no: {next(iter(refused))}")
            else:
                lines.append(f"{label:<20} {count} of {len(cases)} head dims x key ranges, but")
                lines += [f"{'':<20}   {_shortened(where)}: {reason}" for reason, where in refused.items()]
    return lines


def _shortened(where: Sequence[str]) -> str:
    return ", ".join(where) if len(where) <= 6 else f"{', '.join(where[:6])} and {len(where) - 6} more"


def _fused(device: torch.device) -> str:
    missing = liger_missing()
    if missing:
        return f"no: {missing}; plain torch is used"
    return "yes" if device.type == "cuda" else "installed, but it runs on cuda; plain torch is used"


def _caches() -> list[str]:
    from longctx.data import DataConfig

    places = {
        "tokens": Path(DataConfig().cache_dir),
        "triton": Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache")),
    }
    return [_line(name, _place(path)) for name, path in places.items()]


def _place(path: Path) -> str:
    there = path.absolute()
    existing = next(p for p in (there, *there.parents) if p.exists())
    free = shutil.disk_usage(existing).free / 2**30
    return f"{path} ({'there' if there.exists() else 'not made yet'}, {free:.0f} GiB free)"


def main(argv: Sequence[str] | None = None) -> int:
    """`longctx info`; returns the exit code."""
    argparse.ArgumentParser(prog="longctx info", description=__doc__.splitlines()[0]).parse_args(argv)
    for title, lines in sections():
        print(title)
        print("\n".join(f"  {line}" for line in lines), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
