"""This process: its exit codes, its last words, its signals, its share of the cores, its seeds."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import random
import select
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def leave_now(code: int) -> NoReturn:
    """End this process at once, with nothing but the output flushed."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def tell(text: str) -> None:
    """Print to stderr in one piece, so that lines of several processes do not mix."""
    sys.stdout.flush()
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def dump_stacks(path: Path | None, title: str) -> None:
    """Write the stacks of all threads to `path`, under `title`; None: to stderr. A file that cannot be written is left out."""
    if path is None:
        faulthandler.dump_traceback(all_threads=True)
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w") as file:
            file.write(f"{title}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)


class SignalPipe:
    """SIGTERM and SIGINT as bytes in a pipe, readable by a thread while the main thread is stuck inside a collective.

    Opened outside the main thread, which alone may set handlers, it stays silent.
    """

    def __init__(self) -> None:
        self._read, self._write, self._old_fd = -1, -1, -1
        self._old_handler: Any = None

    def open(self) -> None:
        """Start to listen. SIGTERM no longer ends the process; SIGINT still raises KeyboardInterrupt."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._old_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        # Without a Python handler nothing would reach the pipe.
        self._old_handler = signal.signal(signal.SIGTERM, lambda *_: None)

    def wait(self, timeout_s: float) -> bytes:
        """Numbers of the signals that came; empty after `timeout_s` without one."""
        if self._read < 0:
            time.sleep(timeout_s)
            return b""
        ready, _, _ = select.select([self._read], [], [], timeout_s)
        return os.read(self._read, 64) if ready else b""

    def close(self) -> None:
        """Back to how it was. No thread may be waiting."""
        if self._read >= 0:
            signal.set_wakeup_fd(self._old_fd)
            signal.signal(signal.SIGTERM, self._old_handler)
            os.close(self._read)
            os.close(self._write)
            self._read = self._write = -1


def exit_on_sigterm(code: int) -> None:
    with contextlib.suppress(ValueError):  # not the main thread: the default stays
        signal.signal(signal.SIGTERM, lambda *_: leave_now(code))


def set_cpu_threads(world_size: int, env: Mapping[str, str] | None = None) -> str:
    """Share the cores of this machine among its processes, unless OMP_NUM_THREADS says otherwise; tells what was done.

    torchrun sets OMP_NUM_THREADS to 1, the deepspeed launcher sets nothing: every process would use every core.
    """
    env = os.environ if env is None else env
    if "OMP_NUM_THREADS" in env or world_size == 1:
        because = f"OMP_NUM_THREADS = {env['OMP_NUM_THREADS']}" if "OMP_NUM_THREADS" in env else "torch's choice"
        return f"{_threads(torch.get_num_threads())} ({because})"
    local = int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or world_size)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // local))
    return f"{_threads(torch.get_num_threads())} ({cores} cores for {local} processes)"


def _threads(n: int) -> str:
    return f"{n} CPU thread{'s' * (n != 1)} a process"


def seed_everything(seed: int) -> None:
    """Seed Python's and torch's generators, the same on every rank: ranks must build the same initial weights."""
    random.seed(seed)
    torch.manual_seed(seed)
