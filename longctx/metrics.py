"""Numbers of a run: speed and utilisation, and `metrics.jsonl`, where they are kept.

FLOPs are counted for the part of the attention matrix that the mask shows ("MFU"), and for half of the whole matrix as
most publications do ("dense"): with packed documents or windows the two differ widely, and only the first is work done.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from longctx.errors import ConfigError, Problem
from longctx.telemetry import StepTelemetry, mean_telemetry

if TYPE_CHECKING:
    from longctx.data import ShardedLoader
    from longctx.shapes import ModelShape

# Dense bf16 peak of one GPU in FLOP/s, from the makers' data sheets (sparsity figures halved). First match counts.
_PEAK_BF16 = (
    (r"B300|GB300", 2.5e15),
    (r"B200|GB200", 2.25e15),
    (r"H100 PCIe", 756e12),
    (r"H100 NVL", 835e12),
    (r"H100|H200|H800|GH200", 989.5e12),
    (r"A100|A800", 312e12),
    (r"L40S", 362e12),
    (r"L4\b", 121e12),
    (r"A40\b|A6000", 149.7e12),
    (r"RTX 4090", 165.2e12),
    (r"MI300X", 1307.4e12),
    (r"MI250X", 383e12),
)

# Steps that the averages leave out: kernels compile and memory is first allocated in them.
WARMUP_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is shown and kept of a run.

    Args:
        every: steps between two records.
        telemetry: measure, in each step, what attention and its communication take; a few CUDA events for each message
            and one small collective a step.
        progress: a live bar, plain lines, or nothing; "auto": a bar on a terminal, lines elsewhere.
        wandb: "offline" writes a folder for `wandb sync` and needs no network; "online" needs `wandb login`.
        project, name: of the wandb run; without a name, that of the run's folder.
    """

    every: int = 1
    telemetry: bool = True
    progress: Literal["auto", "bar", "plain", "off"] = "auto"
    wandb: Literal["off", "offline", "online"] = "off"
    project: str = "longctx"
    name: str | None = None

    def problems(self) -> list[Problem]:
        """What is wrong with these settings."""
        found = []
        if self.every < 1:
            found.append(Problem(f"log.every = {self.every}: it must be 1 or more", "1 records every step"))
        for name, allowed in (("progress", ("auto", "bar", "plain", "off")), ("wandb", ("off", "offline", "online"))):
            if getattr(self, name) not in allowed:
                found.append(
                    Problem(f"log.{name} = {getattr(self, name)!r} is not known", f"one of {', '.join(allowed)}")
                )
        if not self.project:
            found.append(Problem("log.project is empty", "name the wandb project, such as longctx"))
        return found


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """FLOP/s that the device could do at best in bf16; None where no figure is known, or in another dtype."""
    if device.type != "cuda" or dtype != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for pattern, peak in _PEAK_BF16 if re.search(pattern, name)), None)


@dataclass(frozen=True)
class StepWork:
    """What one optimizer step computes on all ranks together.

    Args:
        tokens: in the step.
        area: (query, key) pairs that the mask shows, over all sequences.
        dense_area: S * S / 2 for each sequence.
    """

    tokens: int
    area: int
    dense_area: int


def causal_area(lengths: Iterable[int], window: int | None = None) -> int:
    """Pairs that causal attention shows within documents of these lengths, each query seeing at most `window` keys.

    `causal_area([n])` is n * (n + 1) / 2.
    """
    total = 0
    for n in lengths:
        w = n if window is None else min(n, window)
        total += w * (w + 1) // 2 + (n - w) * w
    return total


def step_work(loader: ShardedLoader, cursor: int, *, window: int | None = None) -> StepWork:
    """The work of the step at `cursor` on all ranks, from the documents' boundaries: no collective and no text is read.

    Args:
        window: the model's sliding window.
    """
    seq_len, samples = loader.seq_len, loader.samples_per_step
    area = 0
    for n in range(cursor, cursor + samples):
        lengths = [seq_len]
        if loader.mask_documents:
            start = loader.sample_index(n) * seq_len
            edges = sorted({start, *loader.dataset.document_ends(start, start + seq_len).tolist(), start + seq_len})
            lengths = [b - a for a, b in itertools.pairwise(edges)]
        area += causal_area(lengths, window)
    return StepWork(samples * seq_len, area, samples * seq_len * seq_len // 2)


@dataclass(frozen=True)
class Rates:
    """Speed over some steps.

    Args:
        seconds: of one step, the wait for data included.
        data_seconds: of them, waiting for data.
        tokens_per_second: all ranks together.
        tflops: TFLOP/s of one rank, counting what the mask shows; `tflops_dense` counting half the matrix.
        mfu, mfu_dense: the same as a part of the device's peak; None where that is not known.
        telemetry: of attention and its communication; None where it was not measured.
    """

    seconds: float
    data_seconds: float
    tokens_per_second: float
    tokens_per_second_per_gpu: float
    tflops: float
    tflops_dense: float
    mfu: float | None
    mfu_dense: float | None
    telemetry: StepTelemetry | None = None

    @property
    def exposed_comm_share(self) -> float | None:
        """The part of a step in which compute stood still for messages of attention; None where it was not measured."""
        return None if self.telemetry is None else self.telemetry.exposed_comm_ms / 1e3 / max(self.seconds, 1e-9)

    def record(self) -> dict[str, Any]:
        """All of it in one flat dict, as it is kept."""
        flat = asdict(self)
        told = flat.pop("telemetry")
        return flat if told is None else flat | told | {"exposed_comm_share": self.exposed_comm_share}


@dataclass
class _Sum:
    steps: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0
    tokens: int = 0
    flops: int = 0
    flops_dense: int = 0
    telemetry: list[StepTelemetry] = field(default_factory=list)


class Meter:
    """Adds up the steps of a run.

    Args:
        shape: of the model.
        world_size: ranks that share the work.
        peak: FLOP/s of one rank's device in this dtype; None: not known.
        warmup: first steps that `average` leaves out.
    """

    def __init__(
        self, shape: ModelShape, *, world_size: int, peak: float | None = None, warmup: int = WARMUP_STEPS
    ) -> None:
        self.shape, self.world_size, self.peak, self.warmup = shape, world_size, peak, warmup
        self._seen = 0
        self._window = _Sum()
        self._all = _Sum()

    def add(
        self, work: StepWork, *, seconds: float, data_seconds: float, telemetry: StepTelemetry | None = None
    ) -> None:
        """One more step: `seconds` in all, of which `data_seconds` were spent waiting for data."""
        self._seen += 1
        for total in (self._window, self._all) if self._seen > self.warmup else (self._window,):
            total.steps += 1
            total.seconds += seconds
            total.data_seconds += data_seconds
            total.tokens += work.tokens
            total.flops += self.shape.train_flops(work.tokens, work.area)
            total.flops_dense += self.shape.train_flops(work.tokens, work.dense_area)
            if telemetry is not None:
                total.telemetry.append(telemetry)

    def window(self) -> Rates:
        """The steps since the last call; there must be one."""
        rates, self._window = self._rates(self._window), _Sum()
        return rates

    def average(self) -> Rates | None:
        """All steps but the first `warmup`; None while there is none."""
        return self._rates(self._all) if self._all.steps else None

    def _rates(self, total: _Sum) -> Rates:
        assert total.steps, "no step was added"
        seconds = max(total.seconds, 1e-9)
        per_rank = seconds * self.world_size
        flops, dense = total.flops / per_rank, total.flops_dense / per_rank
        return Rates(
            seconds=seconds / total.steps,
            data_seconds=total.data_seconds / total.steps,
            tokens_per_second=total.tokens / seconds,
            tokens_per_second_per_gpu=total.tokens / per_rank,
            tflops=flops / 1e12,
            tflops_dense=dense / 1e12,
            mfu=flops / self.peak if self.peak else None,
            mfu_dense=dense / self.peak if self.peak else None,
            telemetry=mean_telemetry(total.telemetry) if total.telemetry else None,
        )


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory that this process has held: allocated by torch on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    # kilobytes, except on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line. `kind` is "run" (once per start: configuration, plan, versions), "step", or
    "end" (why the run ended, averages). Every line is flushed when written.

    Args:
        path: the file; made if need be. After a kill it is cut back to what `first_step` follows on, so no step is in it
            twice, and a last line that was torn is dropped.
        first_step: the step this run goes on with.
    """

    def __init__(self, path: Path, *, first_step: int) -> None:
        self.path = path
        of_steps = ("step", "eval")
        kept = [x for x in _complete_lines(path) if x.get("kind") not in of_steps or x["step"] < first_step]
        path.parent.mkdir(parents=True, exist_ok=True)
        # Renamed when complete: a kill in this moment must not cost the history.
        partial = path.with_suffix(".jsonl.partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(partial, path)
        self._file = path.open("a")

    def write(self, kind: str, record: dict[str, Any]) -> None:
        """Append one record."""
        if not self._file.closed:
            self._file.write(json.dumps({"kind": kind, "time": round(time.time(), 3), **record}) + "\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: str | Path, kind: str = "step") -> list[dict[str, Any]]:
    """The records of one kind in a `metrics.jsonl`, in order.

    Raises:
        ConfigError: there is no such file.
    """
    if not Path(path).is_file():
        raise ConfigError(f"there is no {path}\n       a run keeps its metrics in <train.run_dir>/metrics.jsonl")
    return [line for line in _complete_lines(Path(path)) if line.get("kind") == kind]


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # torn by a kill while it was written
        if isinstance(line, dict):
            lines.append(line)
    return lines
