"""Three ranks that pretend to train, one of which meets with something: what `test_watchdog` runs.

Steps wait for the slowest rank, as collectives do; that is what makes a dead rank stop the others.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from run_cases import free_port

from longctx.errors import NonFiniteError
from longctx.launch import Launch, run
from longctx.testing import forked
from longctx.watchdog import Watchdog

WORLD = 3
TIMEOUT_S = 6.0
# The step in which it happens, of STEPS.
HAPPENS_AT = 5
STEPS = 20


def _rank_main(rank: int, port: int, case: str, victim: int, is_guarded: bool, folder: Path) -> None:
    log = os.open(folder / f"log{rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})

    def body(launch: Launch) -> None:
        with launch.together("the start"):
            pass
        watchdog = Watchdog(
            launch.place,
            name_of=lambda r: f"dp0 ring{r}",
            timeout_s=TIMEOUT_S,
            stacks_dir=folder / "stacks",
            before_exit=lambda reason: (folder / f"reason{rank}").write_text(reason) and None,
            interval_s=0.3,
        )
        launch.is_working = True
        if is_guarded:
            watchdog.start()
        try:
            _train(launch, watchdog, folder, case if rank == victim else "none")
        except BaseException as error:
            watchdog.failed(error)
            raise
        if is_guarded:
            watchdog.stop()
        launch.finish()

    code = run(body)
    sys.stdout.flush()
    os._exit(code)


def _train(launch: Launch, watchdog: Watchdog, folder: Path, case: str) -> None:
    store = launch.store
    assert store is not None
    for step in range(STEPS):
        watchdog.mark(step, "waiting for data")
        if step == HAPPENS_AT:
            befall(case)
        watchdog.mark(step, "computing")
        store.add(f"step{step}", 1)
        while store.add(f"step{step}", 0) < WORLD:
            time.sleep(0.01)
        time.sleep(0.1)
        (folder / f"step{launch.place.rank}").write_text(str(step))


def befall(case: str) -> None:
    if case == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif case == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif case == "hang":
        time.sleep(3600)
    elif case == "raise":
        raise KeyError("lost key")
    elif case == "non-finite":
        raise NonFiniteError("the loss is nan")


class Ranks:
    """The ranks of one case, without a launcher: rank 0 holds the store. A context manager that leaves no process behind."""

    def __init__(self, folder: Path, case: str, victim: int = 1, *, is_guarded: bool = True) -> None:
        self.folder = folder
        context = forked()
        port = free_port()
        self.processes = [
            context.Process(target=_rank_main, args=(rank, port, case, victim, is_guarded, folder), daemon=True)
            for rank in range(WORLD)
        ]
        for process in self.processes:
            process.start()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def log(self, rank: int) -> str:
        path = self.folder / f"log{rank}"
        return path.read_text() if path.exists() else ""

    @property
    def logs(self) -> str:
        return "\n".join(self.log(r) for r in range(WORLD))

    def codes(self, timeout_s: float = 60) -> list[int | None]:
        """Exit codes, when all have ended; None for one that has not in time."""
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def wait_until_it_happens(self) -> None:
        deadline = time.monotonic() + 60
        path = self.folder / "step0"
        while not path.exists() or int(path.read_text() or 0) < HAPPENS_AT - 1:
            assert time.monotonic() < deadline, self.logs
            time.sleep(0.02)
