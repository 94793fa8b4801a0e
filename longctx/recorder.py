"""What rank 0 keeps of a run while it shows it: `metrics.jsonl` and wandb."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

from longctx.errors import ConfigError
from longctx.metrics import LogConfig, Meter, MetricsFile, StepWork
from longctx.progress import Progress, describe_rates, duration, in_bytes
from longctx.telemetry import StepTelemetry

# Leaving must not wait for a network: what is not uploaded by then stays on disk, for `wandb sync`.
WANDB_FINISH_S = 20.0
WANDB_INIT_S = 30.0
# One step's loss depends on its text; the summary gives the mean of the last ones.
SUMMARY_STEPS = 20


class Recorder:
    """All that rank 0 shows and keeps of the steps: progress, `metrics.jsonl`, wandb.

    Args:
        every: steps between two records; the last step always has one.
    """

    def __init__(self, progress: Progress, meter: Meter, wandb: WandbRun, *, every: int) -> None:
        self.progress, self.meter, self.wandb, self.every = progress, meter, wandb, every
        self._file: MetricsFile | None = None
        self._first: dict[str, Any] | None = None
        self._last: dict[str, Any] = {}
        self._losses: deque[float] = deque(maxlen=SUMMARY_STEPS)
        self._began = time.monotonic()

    def open(self, file: MetricsFile) -> None:
        """Steps follow; their records go to `file`."""
        self._file = file
        self._began = time.monotonic()

    def step(
        self,
        record: dict[str, Any],
        work: StepWork,
        *,
        seconds: float,
        data_seconds: float,
        memory: int,
        telemetry: StepTelemetry | None = None,
    ) -> None:
        """One step is done.

        Args:
            record: step (from 0), loss and what else to keep.
            seconds: of the step, `data_seconds` of them waiting for data.
            memory: peak so far, in bytes.
            telemetry: of attention and its communication; None: not measured.
        """
        assert self._file is not None, "open comes first"
        self.meter.add(work, seconds=seconds, data_seconds=data_seconds, telemetry=telemetry)
        self._first = self._first or record
        self._last = record
        self._losses.append(record["loss"])
        self.progress.advance()
        done = record["step"] + 1
        if done % self.every and done != self.progress.total:
            return
        rates = self.meter.window()
        average = self.meter.average()
        kept = record | rates.record() | {"peak_memory_bytes": memory}
        self._file.write("step", kept)
        self.wandb.log(kept)
        left = (self.progress.total - done) * average.seconds if average is not None else None
        self.progress.show(record["step"], record["loss"], rates, memory=memory, eta_seconds=left)

    def evaluated(self, step: int, loss: float, sequences: int, seconds: float) -> None:
        """The loss on text that is not trained on, after `step` (from 0)."""
        record = {"step": step, "eval_loss": loss, "eval_sequences": sequences, "eval_seconds": seconds}
        if self._file is not None:
            self._file.write("eval", record)
        self.wandb.log(record)
        perplexity = math.exp(min(loss, 700.0))
        self.progress.say(
            f"eval      loss {loss:.4f} (perplexity {perplexity:.4g}) after step {step}, on {sequences} sequences in "
            f"{duration(seconds)}"
        )

    def summary(self, *, memory: int, saved: str, folder: str) -> None:
        """The line at the end, and the same in the file.

        Args:
            memory: the largest peak of any rank.
            saved: the last checkpoint.
        """
        assert self._first is not None, "there was a step"
        average = self.meter.average()
        took = time.monotonic() - self._began
        steps = self._last["step"] - self._first["step"] + 1
        speed = (
            ", ".join(describe_rates(average, unit=self.progress.unit)) if average is not None else "too short to time"
        )
        loss = sum(self._losses) / len(self._losses)
        over = f" (mean of the last {len(self._losses)} steps)" if len(self._losses) > 1 else ""
        self.progress.say(
            f"done      {steps} steps in {duration(took)}, loss {self._first['loss']:.4f} -> {loss:.4f}{over}; "
            f"{speed} (without the first {self.meter.warmup} steps); peak memory {in_bytes(memory)} (largest of all ranks)"
        )
        self.progress.say(f"          checkpoint {saved}, records in {folder}")
        if self._file is not None:
            rates = average.record() if average is not None else {}
            facts = {"steps": steps, "run_seconds": took, "loss": loss, "peak_memory_bytes": memory}
            self._file.write("summary", facts | rates)

    def close(self, reason: str) -> None:
        """Nothing more comes, because of `reason`."""
        if self._file is not None:
            self._file.write("end", {"reason": reason})
            self._file.close()


class WandbRun:
    """A wandb run on rank 0; with wandb = "off" every method does nothing.

    A run that is resumed in the same folder keeps its wandb id, so that its curve goes on.

    Args:
        log: settings.
        run_dir: wandb writes to `run_dir / "wandb"`.
        config: attached to the run: configuration, plan, commit, versions.

    Raises:
        ConfigError: online was asked for and there is no login or no network.
    """

    def __init__(self, log: LogConfig, run_dir: Path, config: dict[str, Any]) -> None:
        self._run: Any = None
        self._is_online = log.wandb == "online"
        if log.wandb == "off":
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        import wandb

        id_file = run_dir / "wandb-id"
        known = id_file.read_text().strip() if id_file.exists() else None
        # Without this wandb asks for a login on the terminal and waits.
        settings = wandb.Settings(silent=True, console="off", init_timeout=WANDB_INIT_S, disable_git=True)
        try:
            self._run = wandb.init(
                project=log.project,
                name=log.name or run_dir.name,
                id=known,
                # Offline runs are joined by `wandb sync`; only a server can resume one.
                resume="allow" if known and self._is_online else None,
                mode=log.wandb,
                dir=str(run_dir),
                config=config,
                settings=settings,
            )
        except wandb.Error as error:
            raise ConfigError(
                f"wandb could not start {log.wandb}: {str(error).strip().splitlines()[0]}\n"
                "       run `wandb login`, or keep the run on disk with --log.wandb=offline (`wandb sync` uploads it later)"
            ) from error
        id_file.write_text(self._run.id)
        # The step is a value of its own: a resumed run may repeat steps after its last checkpoint, and wandb's own counter
        # refuses to go back.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    @property
    def where(self) -> str | None:
        """The run's address, or its folder when offline."""
        if self._run is None:
            return None
        return str(self._run.url) if self._is_online else str(Path(self._run.dir).parent)

    def log(self, record: dict[str, Any]) -> None:
        """One record of a step."""
        if self._run is not None:
            self._run.log({k: v for k, v in record.items() if v is not None})

    def finish(self, exit_code: int, *, timeout_s: float = WANDB_FINISH_S) -> None:
        """Close the run; gives up after `timeout_s` when the network does not answer."""
        run, self._run = self._run, None
        if run is None:
            return
        closing = threading.Thread(target=self._finish, args=(run, exit_code), name="longctx-wandb", daemon=True)
        closing.start()
        closing.join(timeout_s)

    @staticmethod
    def _finish(run: Any, exit_code: int) -> None:
        with contextlib.suppress(Exception):  # a run that is trained is not lost because its upload failed
            run.finish(exit_code=exit_code)
