"""One training run from configuration to last checkpoint: what `train.py` and `longctx train` do.

What can go wrong because of the user's input happens first, on every process together and before anything touches a GPU.
Then the engine is built, a checkpoint is loaded if there is one, and the steps follow.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from longctx.checkpoint import TrainState, arrangement, check_checkpoint, latest_checkpoint, load_checkpoint, saved_as
from longctx.checkpoint_saver import Saver
from longctx.errors import CheckpointError, ConfigError, NonFiniteError
from longctx.launch import Launch, Place
from longctx.metrics import Meter, MetricsFile, peak_flops, peak_memory_bytes, step_work
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.plan import ParallelPlan
from longctx.preparation import (
    DATA_TIMEOUT_S,
    GROUP_TIMEOUT_MARGIN_S,
    about,
    choices,
    open_data,
    open_eval_data,
    resumed,
    settle,
    watched,
    weights_to_start_from,
)
from longctx.process import seed_everything, set_cpu_threads, tell
from longctx.progress import Progress, log_to
from longctx.recorder import Recorder, WandbRun
from longctx.watchdog import Watchdog
from longctx.weights import WeightsFolder

if TYPE_CHECKING:
    from longctx.config import Config
    from longctx.engine import TrainEngine

log = logging.getLogger(__name__)


class Trainer:
    """A training run.

    Args:
        config: everything about it.
        launch: the meeting of its processes; made from the launcher's environment variables if not given.

    Attributes:
        state: how far the run has come.

    Example:
        >>> Trainer(load_config("configs/debug_cpu.toml", ["--train.steps=50"])).fit()
    """

    def __init__(self, config: Config, launch: Launch | None = None) -> None:
        self.config = config
        self.launch = launch or Launch(Place.from_env())
        self.rank = self.launch.place.rank
        self.run_dir = Path(config.train.run_dir).expanduser()
        self.state = TrainState()
        self._progress: Progress | None = None
        self._recorder: Recorder | None = None
        self._wandb: WandbRun | None = None
        self._lock: Any = None

    def fit(self) -> TrainState:
        """Train to `train.steps`; returns where the run stands. Every process of the run calls it.

        Raises:
            StartError: the input cannot be used; with several processes it has been told already.
            NonFiniteError: the loss or the gradient norm stopped being finite; the last checkpoint is intact.
            DistributedError: the processes do not agree, or did not come.
        """
        with self.launch.together("the configuration"):
            plan, device = settle(self.config, self.launch.place)
        reason = "failed"
        try:
            with watched(
                self.launch.place,
                plan,
                timeout_s=self.config.train.timeout_s,
                stacks_dir=self.run_dir / "stacks",
                before_exit=lambda reason: self._close(reason, wandb_s=3.0),
            ) as watchdog:
                self._prepare(plan, device, watchdog)
                self._start_engine(plan, device, watchdog)
                self._train(plan, device, watchdog)
            reason = "done"
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._close(reason)
        self.launch.finish()
        return self.state

    def _prepare(self, plan: ParallelPlan, device: torch.device, watchdog: Watchdog) -> None:
        """What the user's input decides, on every process together; touches no GPU."""
        config, launch = self.config, self.launch
        watchdog.mark(0, "preparing", may_hang=False)
        unit = "GPU" if device.type == "cuda" else "rank"
        if self.rank == 0:
            self._progress = Progress(config.train.steps, style=config.log.progress, unit=unit)
            log_to(self._progress.say)
        else:
            # Choices are the same everywhere and told by rank 0; warnings may be of this rank alone.
            log_to(lambda text: tell(f"{watchdog.prefix} {text}"), level=logging.WARNING)
        with launch.together("the run's folder"):
            self._lock_run_dir()
        found = launch.from_first("the checkpoint to resume from", lambda: str(self._find_checkpoint() or ""))
        self.resume_from = Path(found) if found else None
        self.init_from: WeightsFolder | None = None
        with launch.together("the weights to start from"):
            if self.resume_from is None:
                self.init_from = weights_to_start_from(config)
        with launch.together("the data", timeout_s=DATA_TIMEOUT_S):
            self.dataset, self.loader = open_data(config, plan, self.rank, device)
            self.eval_loader = open_eval_data(config, plan, self.rank, device)
        threads = set_cpu_threads(launch.place.world_size)
        with launch.together("wandb"):
            if self.rank == 0:
                self._wandb = WandbRun(config.log, self.run_dir, about(config, plan, device))
        if self._progress is not None and self._wandb is not None:
            peak = peak_flops(device, config.engine.resolved_dtype(device.type))
            meter = Meter(config.model.shape, world_size=plan.world_size, peak=peak)
            self._recorder = Recorder(self._progress, meter, self._wandb, every=config.log.every)
            lines = choices(
                config,
                launch.place,
                plan,
                device,
                data=(self.dataset, self.loader),
                resume_from=self.resume_from,
                init_from=self.init_from,
                has_peak=peak is not None,
                threads=threads,
            )
            wandb = f"; wandb {config.log.wandb}: {self._wandb.where}" if self._wandb.where else "; wandb off"
            for line in (*lines, f"records   {self.run_dir / 'metrics.jsonl'}{wandb}"):
                self._progress.say(line)

    def _start_engine(self, plan: ParallelPlan, device: torch.device, watchdog: Watchdog) -> None:
        from longctx.engine import build_engine

        config = self.config
        watchdog.mark(0, "setting up", may_hang=False)
        seed_everything(config.train.seed)
        timeout_s = config.train.timeout_s + GROUP_TIMEOUT_MARGIN_S
        self.launch.start_process_group(device, timeout_s)
        mesh = ParallelMesh.create(plan, device=device, timeout=timedelta(seconds=timeout_s))
        mesh.journal.is_measuring = config.log.telemetry
        watchdog.watch(mesh.journal)
        self.engine: TrainEngine = build_engine(
            config.model,
            config.engine,
            config.optim,
            mesh,
            total_steps=config.train.steps,
            seq_len=config.data.seq_len,
            seed=config.train.seed,
            load=self.init_from.load_into if self.init_from is not None else None,
        )
        with self.launch.together("the checkpoint"):
            if self.resume_from is not None:
                self.state = load_checkpoint(self.resume_from, self.engine, asdict(config.model))
        batch = self.loader.samples_per_step
        self.state, before = replace(self.state, data=self.loader.order, batch=batch), self.state
        if self.resume_from is not None and before.data != self.state.data:
            # A cursor means nothing in other data: a further stage of training begins with their first sample.
            self.state = replace(self.state, cursor=0)
        if self._progress is not None and self.resume_from is not None:
            there, here = saved_as(self.resume_from), arrangement(config.engine, plan, device.type)
            for line in resumed(before, self.state, there, here):
                self._progress.say(line)
            self._progress.begin_at(self.state.step)
        self.launch.is_working = True

    def _train(self, plan: ParallelPlan, device: torch.device, watchdog: Watchdog) -> None:
        train, loader, recorder = self.config.train, self.loader, self._recorder
        if self.state.step >= train.steps:
            if self._progress is not None:
                self._progress.say(
                    f"nothing to do: {self.resume_from} is at step {self.state.step} of train.steps = {train.steps}; "
                    "raise train.steps to go on"
                )
            return
        if recorder is not None:
            file = self._metrics_file()
            file.write("run", {"first_step": self.state.step, **about(self.config, plan, device)})
            recorder.open(file)
        root, model = train.checkpoints, asdict(self.config.model)
        saver = Saver(root, self.engine, fingerprint=model, keep=train.keep, in_background=train.async_save)
        while self.state.step < train.steps:
            step, cursor = self.state.step, self.state.cursor
            self._heed(saver.poll)
            watchdog.mark(step, "waiting for data")
            start = time.perf_counter()
            batches = loader.step(cursor)
            ready = time.perf_counter()
            watchdog.mark(step, "computing")
            try:
                result = self.engine.train_step(step, batches)
            except NonFiniteError as error:
                self._heed(saver.finish)
                saved = saver.newest or self.resume_from or "none yet"
                raise NonFiniteError(f"{error}\n       last checkpoint: {saved}") from None
            # train_step ends with numbers on the host, so the device has finished too.
            end = time.perf_counter()
            self.state = replace(
                self.state,
                step=step + 1,
                cursor=cursor + loader.samples_per_step,
                tokens=self.state.tokens + loader.tokens_per_step,
            )
            watchdog.mark(step, "recording")
            if recorder is not None:
                recorder.step(
                    {"loss": result.loss, "grad_norm": result.grad_norm, "lr": result.lr}
                    | asdict(self.state)
                    | {"step": step},
                    step_work(loader, cursor, window=self.config.model.sliding_window),
                    seconds=end - start,
                    data_seconds=ready - start,
                    memory=peak_memory_bytes(device),
                    telemetry=result.telemetry,
                )
            if self.eval_loader is not None and train.evaluates_after(self.state.step):
                watchdog.mark(step, "evaluating")
                evaluation = self._evaluation()
                if recorder is not None:
                    recorder.evaluated(step, *evaluation)
            if train.saves_after(self.state.step):
                watchdog.mark(step, "saving a checkpoint")
                self._save(saver, is_last=self.state.step == train.steps)
        watchdog.mark(train.steps, "finishing")
        memory = _largest(peak_memory_bytes(device), device)
        if recorder is not None:
            recorder.summary(memory=memory, saved=str(saver.newest or "none"), folder=str(self.run_dir))

    def _evaluation(self) -> tuple[float, int, float]:
        """The loss on the first sequences of the text that is not trained on, how many these are, and the seconds it took."""
        loader, wanted = self.eval_loader, self.config.train.eval_sequences
        assert loader is not None, "asked for where there is such text"
        start, each = time.perf_counter(), loader.samples_per_step
        steps = min(math.ceil(wanted / each), loader.num_samples // each)
        loss = self.engine.evaluate(batch for n in range(steps) for batch in loader.step(n * each))
        return loss, steps * each, time.perf_counter() - start

    def _save(self, saver: Saver, *, is_last: bool) -> None:
        """A disk that is full now may have room at the next checkpoint; after the last one there is none."""
        self._heed(saver.finish)
        if is_last:
            saver.save(self.state)
            saver.finish()
        else:
            self._heed(lambda: saver.save(self.state))

    def _heed(self, action: Callable[[], None]) -> None:
        """A checkpoint that could not be saved is a warning, and training goes on."""
        try:
            action()
        except CheckpointError as error:
            if self.rank == 0:
                log.warning("no checkpoint: %s", error)

    def _lock_run_dir(self) -> None:
        """Two runs in one folder would overwrite each other's checkpoints."""
        if self.rank != 0:
            return
        from filelock import FileLock, Timeout

        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            lock = FileLock(str(self.run_dir / ".lock"))
            # A run that was just killed may take a moment to be gone.
            lock.acquire(timeout=5, poll_interval=0.2)
        except Timeout:
            raise ConfigError(
                f"another run is writing to train.run_dir = {str(self.run_dir)!r}\n"
                "       wait for it, end it, or choose another train.run_dir"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"train.run_dir = {str(self.run_dir)!r} cannot be written: {error.strerror or error}\n"
                "       choose a folder that can"
            ) from error
        self._lock = lock

    def _find_checkpoint(self) -> Path | None:
        """Where to go on from: complete and of this model; None: from the start."""
        train = self.config.train
        if train.resume == "never":
            return None
        path = Path(train.resume).expanduser()
        if train.resume == "auto":
            newest = latest_checkpoint(train.checkpoints)
            if newest is None:
                if any(train.checkpoints.glob("step-*")):
                    raise CheckpointError(
                        f"none of the checkpoints in {train.checkpoints} is complete\n"
                        "       give the path of another one with train.resume, or start anew with --train.resume=never"
                    )
                return None
            path = newest
        check_checkpoint(path, asdict(self.config.model))
        return path

    def _metrics_file(self) -> MetricsFile:
        path = self.run_dir / "metrics.jsonl"
        if self.config.train.resume == "never" and path.exists():
            # A new run in the folder of an old one: what was measured is kept.
            n = 1
            while (old := path.with_name(f"metrics-{n}.jsonl")).exists():
                n += 1
            path.rename(old)
        return MetricsFile(path, first_step=self.state.step)

    def _close(self, reason: str, wandb_s: float | None = None) -> None:
        """Leave files and terminal in order; also called from the watchdog's thread, just before the process ends."""
        if self._progress is not None:
            self._progress.close()
        if self._recorder is not None:
            self._recorder.close(reason)
        if self._wandb is not None:
            if wandb_s is None:
                self._wandb.finish(int(reason != "done"))
            else:
                self._wandb.finish(1, timeout_s=wandb_s)
        log_to(None)
        if self._lock is not None:
            self._lock.release()


def _largest(value: int, device: torch.device) -> int:
    """The largest of all ranks' values; collective."""
    if dist.get_world_size() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)
