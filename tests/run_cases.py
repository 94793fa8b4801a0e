"""Training runs through the real command line, small enough for a test."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import psutil

from longctx.__main__ import main
from longctx.testing import forked

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ROOT / "train.py"

# Two processes share each sequence; documents of the text end inside sequences.
TINY = """
[model]
vocab_size = 264
hidden_size = 32
num_layers = 2
num_heads = 2

[data]
path = "{text}"
cache_dir = "{folder}/cache"
seq_len = 128

[optim]
lr = 0.01
warmup_steps = 2

[train]
steps = 3
run_dir = "{folder}/run"
timeout_s = 20
"""


def write_text(folder: Path, documents: int = 12) -> Path:
    """A folder of text files, some shorter and some longer than a sequence."""
    random.seed(0)
    text = folder / "text"
    text.mkdir(parents=True, exist_ok=True)
    words = ["ring", "attention", "passes", "keys", "and", "values", "round", "while", "queries", "stay", "at", "home"]
    for i in range(documents):
        size = random.choice((5, 40, 300))
        (text / f"{i:02}.txt").write_text(" ".join(random.choice(words) for _ in range(size)))
    return text


def write_config(folder: Path) -> Path:
    """A configuration of a run in `folder`, and its text."""
    path = folder / "tiny.toml"
    path.write_text(TINY.format(text=write_text(folder), folder=folder))
    return path


def clean_env(**extra: str) -> dict[str, str]:
    """This environment without what a launcher or wandb left in it; one thread a process."""
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
    env = {k: v for k, v in os.environ.items() if k not in ours and not k.startswith(("WANDB_", "TORCHELASTIC_"))}
    return env | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | extra


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train_command(launcher: str, world: int, *words: str | Path) -> list[str]:
    """`train.py` with `words` under python, torchrun or deepspeed."""
    tail = [str(TRAIN), *map(str, words)]
    if launcher == "python":
        assert world == 1, "bare python starts one process"
        return [sys.executable, *tail]
    if launcher == "torchrun":
        head = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    else:
        head = ["-m", "deepspeed.launcher.runner", "--num_gpus", str(world), "--master_port", str(free_port())]
    return [sys.executable, *head, *tail]


def train(
    launcher: str, world: int, *words: str | Path, timeout_s: float = 120, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run to the end. stdout and stderr come together, as on a terminal.

    Args:
        launcher: "python", "torchrun" or "deepspeed"; or "forked", for a run that is not about its launcher.
    """
    if launcher == "forked":
        with tempfile.TemporaryDirectory(prefix="longctx-run-") as folder:
            with Forked(world, Path(folder) / "log", *words, **env) as run:
                code = run.wait(timeout_s)
            return subprocess.CompletedProcess(list(map(str, words)), code, run.output)
    return subprocess.run(
        train_command(launcher, world, *words),
        env=clean_env(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
    )


def train_here(words: list[str]) -> int:
    """`longctx train` as this process of its run."""
    return main(["train", *words])


class Run:
    """A run in the background: a context manager that leaves no process behind.

    Args:
        log: where its output goes.
    """

    def __init__(self, log: Path) -> None:
        self._log = log

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill_all()

    @property
    def output(self) -> str:
        return self._log.read_text()

    def wait_for(self, condition: Callable[[], bool], what: str, timeout_s: float = 90) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.code() is None, f"ended with {self.code()} before {what}:\n{self.output}"
            assert time.monotonic() < deadline, f"no {what} within {timeout_s} s:\n{self.output}"
            time.sleep(0.01)

    def code(self) -> int | None:
        """The exit code; None while it runs."""
        raise NotImplementedError

    def rank(self, rank: int) -> psutil.Process:
        """The process of a rank."""
        raise NotImplementedError

    def wait(self, timeout_s: float) -> int:
        """The exit code, when it has ended."""
        raise NotImplementedError

    def kill_all(self) -> None:
        """SIGKILL for every process of it."""
        raise NotImplementedError


class Background(Run):
    """A run under its launcher.

    Args:
        command: what to start.
    """

    def __init__(self, command: list[str], log: Path, **env: str) -> None:
        super().__init__(log)
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, env=clean_env(**env), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def code(self) -> int | None:
        return self.process.poll()

    def rank(self, rank: int) -> psutil.Process:
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                # The deepspeed launcher sets RANK for each of its children only.
                if child.environ().get("RANK") == str(rank) and "train.py" in " ".join(child.cmdline()):
                    return child
            except psutil.Error:
                continue
        raise AssertionError(f"there is no rank {rank}:\n{self.output}")

    def wait(self, timeout_s: float) -> int:
        return self.process.wait(timeout_s)

    def kill_all(self) -> None:
        # The launcher first, so that it has no last word.
        try:
            family = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            family = []
        self.process.kill()
        for child in family:
            try:
                child.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(family, timeout=10)
        self.process.wait()


class Forked(Run):
    """A run without a launcher, in processes forked from one that has imported everything, which saves most of the time that a
    small run takes.

    Args:
        world: processes.
        main, words: each calls `main(words)`, which gives its exit code.
        logs: where the output of each goes, instead of all to `log`.
    """

    def __init__(
        self,
        world: int,
        log: Path,
        *words: str | Path,
        main: Callable[[list[str]], int] = train_here,
        logs: Sequence[Path] = (),
        **env: str,
    ) -> None:
        super().__init__(log)
        ranks = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        ranks |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} | env
        context = forked()
        self._processes = []
        for rank in range(world):
            output = logs[rank] if logs else log
            output.touch()
            of_rank = clean_env() | ranks | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self._processes.append(
                context.Process(target=_forked_main, args=(output, main, list(map(str, words)), of_rank))
            )
        # The first one, at which they meet, comes last.
        for process in reversed(self._processes):
            process.start()

    @property
    def codes(self) -> list[int | None]:
        """The exit code of each rank."""
        return [process.exitcode for process in self._processes]

    def code(self) -> int | None:
        # As a launcher: done when all are, and wrong when one is.
        return None if None in self.codes else next((code for code in self.codes if code), 0)

    def rank(self, rank: int) -> psutil.Process:
        return psutil.Process(self._processes[rank].pid)

    def wait(self, timeout_s: float) -> int:
        deadline = time.monotonic() + timeout_s
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        if (code := self.code()) is None:
            raise subprocess.TimeoutExpired("longctx train", timeout_s, self.output)
        return code

    def kill_all(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


def _forked_main(log: Path, main: Callable[[list[str]], int], words: list[str], env: dict[str, str]) -> None:
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(env)
    code = main(words)
    sys.stdout.flush()
    sys.exit(code)
