"""Run a function on several ranks of this machine, as processes or as threads, and get back results or what failed."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longctx.errors import DistributedError
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.plan import ParallelPlan

# After the first failure the others get this long to end by themselves, so that their own errors are seen too.
GRACE_S = 5.0
# Writing the stacks of all threads takes a worker milliseconds; a machine with busy cores gets more.
STACKS_S = 2.0


def run_distributed(
    fn: Callable[..., Any],
    *args: Any,
    world: int = 4,
    backend: str = "gloo",
    plan: ParallelPlan | None = None,
    timeout_s: float = 120.0,
    env: dict[str, str] | None = None,
    abandon: Collection[int] = (),
) -> list[Any]:
    """Call `fn(rank, *args)` in `world` new processes that share a process group; return what each returned.

    Each process is initialised (rendezvous through a file, so no port is taken), has one CPU thread, and on nccl the
    CUDA device of its rank. All processes are gone when this returns.

    Args:
        fn: a function of a module (it is pickled by name), as are `args` and the results.
        world: processes.
        backend: gloo or nccl.
        plan: with it, failures name coordinates as well as ranks. Must fit `world`.
        timeout_s: for everything together, and for each message.
        env: environment variables that the processes get on top of this one's.
        abandon: ranks that are meant to die or hang: not waited for, their result is None.

    Returns:
        One result a rank, in rank order.

    Raises:
        DistributedError: a rank failed (with its traceback), ended without a word, or did not end in time (with the
            stack of every rank).
    """
    plan = plan.resolve(world) if plan is not None else None
    is_fresh = backend == "nccl" or bool(env)
    context = multiprocessing.get_context("spawn") if is_fresh else forked()
    with tempfile.TemporaryDirectory(prefix="longctx-") as folder:
        workers = []
        try:
            for rank in range(world):
                workers.append(_Worker(context, rank, world, plan, Path(folder)))
                workers[-1].start(pickle.dumps((fn, args)), backend, timeout_s, os.environ | (env or {}))
            return _collect(workers, timeout_s, set(abandon))
        finally:
            for worker in workers:
                worker.kill()


# More threads than cores make small CPU work slower, not faster. A process that is to fork must have only one.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
# Forked processes work on the CPU, also beside a GPU; DeepSpeed reads this once, when it is imported.
_ON_CPU = {"DS_ACCELERATOR": "cpu"}
# What a process that trains imports before its first step: 5 s of work, most of it torch's compiler for one of DeepSpeed's optimizers.
_PRELOADED = ("torch.distributed", "longctx.engine", "deepspeed.runtime.zero.muon.muon_optimizer")


def forked() -> Any:
    """A `multiprocessing` context whose processes are forked from a server that has imported what training needs.

    That saves each of them seconds. They cannot use CUDA, and what libraries read from the environment when they are
    imported, the server has read.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    with _environment(_ONE_THREAD | _ON_CPU):
        forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Environment variables for the processes that are started inside."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class _Worker:
    """One process, seen from the parent."""

    def __init__(self, context: Any, rank: int, world: int, plan: ParallelPlan | None, folder: Path) -> None:
        self.rank = rank
        self.name = f"[rank {rank} of {world}{f' | {plan.coords(rank)}' if plan else ''}]"
        self.result: Any = None
        self.error: str | None = None
        self._world = world
        self._folder = folder
        self._stacks = folder / f"stacks.{rank}"
        self._context = context
        self.pipe: Connection
        self._process: Any = None

    def start(self, work: bytes, backend: str, timeout_s: float, env: dict[str, str]) -> None:
        self.pipe, theirs = self._context.Pipe(duplex=False)
        self._process = self._context.Process(
            target=_worker_main,
            args=(theirs, work, self.rank, self._world, backend, timeout_s, str(self._folder), env),
            name=self.name,
            daemon=True,
        )
        # A new interpreter reads these before any of our code could set them.
        with _environment(env | _ONE_THREAD):
            self._process.start()
        theirs.close()

    def receive(self) -> None:
        """Take the one message that a process sends when it ends, or note that it ended without."""
        try:
            kind, value = self.pipe.recv()
        except EOFError:
            self._process.join(GRACE_S)
            code = self._process.exitcode
            how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
            kind, value = "error", f"ended without a result ({how})"
        if kind == "ok":
            self.result = pickle.loads(value)
        else:
            self.error = value

    def ask_for_stacks(self) -> None:
        if self._process.is_alive():
            os.kill(self._process.pid, signal.SIGUSR1)

    def stacks(self) -> str:
        text = self._stacks.read_text() if self._stacks.exists() else ""
        if text:
            return text
        return "no stack: the process " + ("has ended" if not self._process.is_alive() else "is stopped or starting")

    def kill(self) -> None:
        if self._process is not None and self._process.pid is not None:
            self._process.kill()
            self._process.join()
            self.pipe.close()


def _collect(workers: list[_Worker], timeout_s: float, abandon: set[int]) -> list[Any]:
    """Wait for all that are not abandoned; raise at the first failure, or when time is up."""
    waiting = {w.pipe: w for w in workers if w.rank not in abandon}
    failed: list[_Worker] = []
    deadline = time.monotonic() + timeout_s
    while waiting and (left := deadline - time.monotonic()) > 0:
        for pipe in wait(list(waiting), timeout=left):
            worker = waiting.pop(pipe)  # type: ignore[call-overload]
            worker.receive()
            if worker.error is not None:
                failed.append(worker)
                deadline = min(deadline, time.monotonic() + GRACE_S)
    if failed:
        raise DistributedError(_failure(failed, list(waiting.values())))
    if waiting:
        hanging = list(waiting.values())
        raise DistributedError(
            f"{_names(hanging)} did not end within {timeout_s:g} s\n" + _all_stacks(workers, hanging, abandon)
        )
    return [w.result for w in workers]


def _failure(failed: list[_Worker], others: list[_Worker]) -> str:
    lines = [f"{failed[0].name} failed", failed[0].error or ""]
    for worker in failed[1:]:
        last = (worker.error or "").strip().splitlines()[-1]
        lines.append(f"then {worker.name}: {last}")
    if others:
        lines.append(f"still running {GRACE_S:g} s later: {_names(others)}")
        lines.append(_all_stacks(others, others, set()))
    return "\n".join(lines)


def _all_stacks(workers: list[_Worker], hanging: list[_Worker], abandon: set[int]) -> str:
    for worker in hanging:
        worker.ask_for_stacks()
    time.sleep(STACKS_S)
    parts = []
    for worker in workers:
        if worker in hanging:
            parts.append(f"--- {worker.name}\n{worker.stacks()}")
        else:
            parts.append(f"--- {worker.name}: {'abandoned' if worker.rank in abandon else 'done'}")
    return "\n".join(parts)


def _names(workers: list[_Worker]) -> str:
    return ", ".join(w.name for w in workers)


def _worker_main(
    pipe: Connection,
    work: bytes,
    rank: int,
    world: int,
    backend: str,
    timeout_s: float,
    folder: str,
    env: dict[str, str],
) -> None:
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ.clear()
    os.environ.update(env | _ONE_THREAD | ranks)
    with open(Path(folder) / f"stacks.{rank}", "w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
        try:
            torch.set_num_threads(1)
            device = None
            if backend == "nccl":
                device = torch.device("cuda", rank)
                torch.cuda.set_device(device)
            dist.init_process_group(
                backend,
                init_method=f"file://{folder}/rendezvous",
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=timeout_s),
                device_id=device,
            )
            fn, args = pickle.loads(work)
            message: tuple[str, bytes | str] = ("ok", pickle.dumps(fn(rank, *args)))
        except BaseException:
            message = ("error", traceback.format_exc())
        sys.stdout.flush()
        pipe.send(message)
        # A process that is done waits until the parent, which ends it, has heard of all: closing its connections any
        # earlier would break messages that others still send, and hide which rank failed first.
        if message[0] == "ok":
            parent = multiprocessing.parent_process()
            assert parent is not None, "a worker is a child process"
            parent.join()


def run_virtual_ring(
    fn: Callable[..., Any],
    *args: Any,
    world: int = 4,
    layout: str = "zigzag",
    device: torch.device | str = "cpu",
    grad_dtype: torch.dtype | None = None,
    timeout_s: float = 60.0,
) -> list[Any]:
    """Call `fn(mesh, *args)` in `world` threads of this process, each a rank of one ring; return what each returned.

    Messages are handed over in memory: milliseconds instead of seconds to start, one debugger for all ranks, and any
    number of ranks on one GPU. Only the ring works; there are no process groups for anything else. On a GPU, a backward
    pass through autograd would block (all threads share one autograd thread there): call the backward operator itself.

    Args:
        grad_dtype: as in `ParallelMesh.create`.
        timeout_s: for each message.

    Raises:
        Whatever `fn` raised first, with the rank's coordinates as a note.
    """
    plan = ParallelPlan(ring=world, layout=layout).resolve(world)
    boxes: _Boxes = {(i, j): queue.SimpleQueue() for i in range(world) for j in range(world)}
    meshes = []
    for rank in range(world):
        link = _MemoryLink(rank, world, boxes, timeout_s) if world > 1 else None
        meshes.append(
            ParallelMesh(plan, rank, device=torch.device(device), groups={}, link=link, grad_dtype=grad_dtype)
        )
    results: list[Any] = [None] * world
    failures: list[tuple[int, BaseException]] = []

    def work(rank: int) -> None:
        try:
            results[rank] = fn(meshes[rank], *args)
        except BaseException as error:
            failures.append((rank, error))
            for other in range(world):
                boxes[rank, other].put(None)

    threads = [threading.Thread(target=work, args=(rank,), name=f"ring{rank}", daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        rank, error = failures[0]
        error.add_note(f"on {meshes[rank].prefix} of a virtual ring")
        raise error
    return results


# (from, to) -> what is on its way, in order; None: the sender failed.
_Boxes = dict[tuple[int, int], "queue.SimpleQueue[torch.Tensor | None]"]


class _MemoryLink:
    """Messages between threads: a `Link`."""

    def __init__(self, rank: int, world: int, boxes: _Boxes, timeout_s: float) -> None:
        self.rank = rank
        self.peers = tuple(range(world))
        self._boxes = boxes
        self._timeout_s = timeout_s
        # Receives that were posted and not yet filled, by source: messages fill them in this order, whoever waits first.
        self._posted: dict[int, list[torch.Tensor]] = {}

    def swap(
        self, send: Sequence[torch.Tensor], receive: Sequence[torch.Tensor], *, to: int, source: int, room: int
    ) -> Callable[[], None]:
        for what, tensors in (("sends", send), ("receives", receive)):
            size = sum(x.numel() * x.element_size() for x in tensors)
            if size > room:
                raise RuntimeError(f"ring rank {self.rank} {what} {size} bytes, more than the {room} it spoke of")
        posted = self._posted.setdefault(source, [])
        for x in send:
            # Copied now: the sender may reuse its buffer as soon as its own wait returns.
            self._boxes[self.rank, to].put(x.detach().clone())
        for x in receive:
            if x.is_floating_point():
                # Whoever reads before waiting gets NaN, not what happened to be there.
                x.fill_(float("nan"))
            posted.append(x)

        def wait() -> None:
            while any(buffer is x for buffer in posted for x in receive):
                self._fill(posted.pop(0), source)

        return wait

    def _fill(self, receive: torch.Tensor, source: int) -> None:
        try:
            sent = self._boxes[source, self.rank].get(timeout=self._timeout_s)
        except queue.Empty:
            raise RuntimeError(f"no message within {self._timeout_s:g} s") from None
        if sent is None:
            raise RuntimeError(f"ring rank {source} failed")
        if sent.shape != receive.shape or sent.dtype != receive.dtype:
            raise RuntimeError(f"got {list(sent.shape)} {sent.dtype}, expected {list(receive.shape)} {receive.dtype}")
        receive.copy_(sent)
