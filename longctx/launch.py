"""Process start-up: which process this is, errors that all processes agree on, the process group, the seeds.

Started by `torchrun`, by the `deepspeed` launcher or as bare `python train.py`, a run passes through the same three
steps: `Place.from_env` says which of how many processes this is; `Launch.together` runs what can go wrong because of
the user's input and makes every process leave together, with one message, if it did on any; `start_process_group` is
the first thing that touches a GPU.
"""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from longctx.errors import ConfigError, DistributedError, LongCtxError
from longctx.process import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER_ERROR, exit_on_sigterm, leave_now, tell

# How long processes wait for each other at start-up: importing everything from a cold network disk takes a while.
MEET_TIMEOUT_S = 300.0


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which process this is.

    Args:
        rank, world_size: among all processes of the run.
        local_rank: among those of this machine, which is also its GPU.
        local_world_size: how many these are; None: the launcher did not say.
        launcher: who started it.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int | None = None
    launcher: Literal["python", "torchrun", "deepspeed", "other"] = "python"

    @staticmethod
    def from_env(env: MutableMapping[str, str] | None = None) -> Place:
        """Read what the launcher set. Without a launcher: one process, and the variables DeepSpeed reads are set.

        Raises:
            ConfigError: the variables are incomplete or do not fit together.
        """
        env = os.environ if env is None else env
        if "RANK" not in env and "WORLD_SIZE" not in env:
            tasks = int(env.get("SLURM_NTASKS", env.get("OMPI_COMM_WORLD_SIZE", "1")))
            if tasks > 1 and ("SLURM_PROCID" in env or "OMPI_COMM_WORLD_RANK" in env):
                raise ConfigError(
                    f"{tasks} tasks were started, but each would train alone: RANK and WORLD_SIZE are not set\n"
                    "       start one task per node, and in it torchrun --nnodes ... --nproc-per-node ..."
                )
            env.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"})
            env.setdefault("MASTER_ADDR", "127.0.0.1")
            env.setdefault("MASTER_PORT", "29500")
        needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in needed if name not in env]
        if missing:
            raise ConfigError(
                f"the launcher set only some of {', '.join(needed)}; missing: {', '.join(missing)}\n"
                "       start with torchrun or deepspeed, or unset RANK and WORLD_SIZE to run one process"
            )
        try:
            rank, world_size, local_rank = int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"])
            # torchrun's name of it, and the deepspeed launcher's.
            local = env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE")
            local_world_size = int(local) if local else None
        except ValueError as error:
            raise ConfigError(
                f"RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE must be whole numbers: {error}"
            ) from None
        if not (0 <= rank < world_size and 0 <= local_rank <= rank):
            raise ConfigError(f"RANK={rank}, LOCAL_RANK={local_rank} and WORLD_SIZE={world_size} do not fit together")
        launcher: Literal["python", "torchrun", "deepspeed", "other"]
        if "TORCHELASTIC_RUN_ID" in env:
            launcher = "torchrun"
        elif "CROSS_RANK" in env:
            launcher = "deepspeed"
        else:
            launcher = "python" if world_size == 1 else "other"
        return Place(
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            local_world_size=local_world_size,
            launcher=launcher,
        )

    @property
    def store_is_with_launcher(self) -> bool:
        """Whether the meeting point outlives rank 0 (torchrun's agent holds it)."""
        return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


class StartError(LongCtxError):
    """What all processes agreed went wrong; `str()` is empty on processes that leave the telling to another."""


class Launch:
    """The meeting of a run's processes, before and beside the process group.

    Args:
        place: which process this is.
        timeout_s: how long to wait for the others at each meeting.

    Attributes:
        is_working: set once training has begun; an error is the run's from then on, and no longer the input's.
    """

    def __init__(self, place: Place, *, timeout_s: float = MEET_TIMEOUT_S) -> None:
        self.place = place
        self.timeout_s = timeout_s
        self.is_working = False
        self._store: dist.Store | None = None
        self._meetings = 0

    @property
    def store(self) -> dist.Store | None:
        """The key-value store of this run; None with one process. The first use waits until all processes are there.

        Raises:
            DistributedError: not all of them came, or the port is taken.
        """
        if self._store is None and self.place.world_size > 1:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            try:
                store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=self.timeout_s)))
            except (dist.DistError, RuntimeError, ValueError) as error:
                raise DistributedError(
                    f"{_rank_name(self.place.rank)} could not meet the other {self.place.world_size - 1} processes "
                    f"at {where}: {str(error).splitlines()[0]}\n"
                    "       if the port is taken, choose another: torchrun --standalone does so by itself, "
                    "deepspeed takes --master_port"
                ) from None
            self._store = dist.PrefixStore("longctx", store)
        return self._store

    def agree(self, stage: str, error: BaseException | None, *, timeout_s: float | None = None) -> None:
        """Tell the others whether `stage` went well here; all leave together if it failed anywhere.

        Every process must call this in the same order. The same message from every rank is told once, by rank 0;
        messages that differ are told by the ranks that have them.

        Args:
            timeout_s: how long to wait for the others; None: the launch's.

        Raises:
            StartError: some rank has an error.
            DistributedError: a process did not come.
        """
        mine = "" if error is None else _message(error)
        if self.place.world_size == 1:
            if mine:
                raise StartError(mine) from error
            return
        rank, world = self.place.rank, self.place.world_size
        store = self.store
        assert store is not None, "more than one process has a store"
        prefix = f"agree/{self._meetings}"
        self._meetings += 1
        store.set(f"{prefix}/{rank}", mine)
        texts = [
            self._await(store, f"{prefix}/{r}", f"rank {r} did not reach {stage}", timeout_s) for r in range(world)
        ]
        failed = [r for r, text in enumerate(texts) if text]
        if not failed:
            return
        same_everywhere = len(failed) == world and len(set(texts)) == 1
        first = failed[0]
        # A launcher ends the other ranks as soon as one leaves: leave once the teller has told.
        exit_on_sigterm(EXIT_USER_ERROR)
        told = f"{prefix}/told"
        if same_everywhere:
            text = mine if rank == 0 else ""
            tellers = 1
        else:
            text = f"{_rank_name(rank)}, {stage}: {mine}" if mine and mine not in texts[:rank] else ""
            tellers = len({t for t in texts if t})
        if text:
            tell(text)
            store.add(told, 1)
        deadline = time.monotonic() + self.timeout_s
        while store.add(told, 0) < tellers and time.monotonic() < deadline:
            time.sleep(0.02)
        self._leave_store_together(store, f"{prefix}/left")
        raise StartError("") from (error if rank == first else None)

    @contextlib.contextmanager
    def together(self, stage: str, *, timeout_s: float | None = None) -> Iterator[None]:
        """Run the body on every process and `agree` on how it went.

        Raises:
            StartError: the body raised a LongCtxError, or anything at all on another rank.
        """
        error: BaseException | None = None
        try:
            yield
        except LongCtxError as caught:
            if isinstance(caught, StartError):
                raise
            error = caught
        except Exception as caught:
            # A mistake of ours, not of the user: the others must not wait for us, and we keep our traceback.
            with contextlib.suppress(StartError):
                self.agree(stage, caught, timeout_s=timeout_s)
            raise
        self.agree(stage, error, timeout_s=timeout_s)

    def from_first(self, what: str, make: Callable[[], str]) -> str:
        """The same text on every process: what `make` gives on rank 0. Every process must call this in the same order.

        Raises:
            StartError: `make` failed.
        """
        text, error = "", None
        if self.place.rank == 0:
            try:
                text = make()
            except LongCtxError as caught:
                error = caught
        self.agree(what, error)
        if self.place.world_size == 1:
            return text
        store = self.store
        assert store is not None, "more than one process has a store"
        key = f"from_first/{self._meetings}"
        if self.place.rank == 0:
            store.set(key, text)
        return self._await(store, key, f"rank 0 did not reach {what}", None)

    def start_process_group(self, device: torch.device, timeout_s: float) -> None:
        """Start torch.distributed: NCCL for CUDA devices, gloo for the CPU. One process uses a store of its own.

        Args:
            timeout_s: after which a collective that a peer does not join is an error.
        """
        timeout = timedelta(seconds=timeout_s)
        place = self.place
        if device.type == "cuda":
            torch.cuda.set_device(device)
        store = dist.HashStore() if self.store is None else dist.PrefixStore("process_group", self.store)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=place.rank,
            world_size=place.world_size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )

    def finish(self) -> None:
        """Leave in good order: the process group goes, and the process that holds the store leaves last."""
        if dist.is_initialized():
            dist.destroy_process_group()
        if self._store is not None:
            self._leave_store_together(self._store, "finish")

    def _leave_store_together(self, store: dist.Store, key: str) -> None:
        """Rank 0 may hold the store: it waits until all others need it no more. The wait is bounded."""
        with contextlib.suppress(dist.DistError, RuntimeError):
            store.add(key, 1)
            deadline = time.monotonic() + 10.0
            while self.place.rank == 0 and store.add(key, 0) < self.place.world_size and time.monotonic() < deadline:
                time.sleep(0.01)

    def _await(self, store: dist.Store, key: str, otherwise: str, timeout_s: float | None) -> str:
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        try:
            store.wait([key], timedelta(seconds=timeout_s))
            return store.get(key).decode()
        except (dist.DistError, RuntimeError) as error:
            raise DistributedError(f"{otherwise} within {timeout_s:.0f} s: {str(error).splitlines()[0]}") from None


# What a GPU's memory is spent on in a long run: activations first, then the optimizer's state.
OUT_OF_MEMORY = (
    "the GPU's memory does not suffice; what helps, the cheapest first:\n"
    "       --engine.activation_checkpointing=true    recompute activations; attention and its messages are kept\n"
    "       --parallel.ring=N on more GPUs            each then holds a smaller part of every sequence\n"
    "       --engine.activation_offload=true          with recomputation: what is kept, in the host's memory\n"
    "       --engine.mlp_chunk_tokens=16k             the SwiGLU of so many tokens at a time\n"
    "       --engine.zero_stage=2, or 3               gradients, then parameters too, are spread over the processes\n"
    "       --engine.offload=optimizer                its state in the host's memory\n"
    "       --data.seq_len, --engine.micro_batch_size less of either; --dry-run says what state needs before activations"
)


def run(body: Callable[[Launch], None], place: Place | None = None) -> int:
    """Run `body` as the whole of this process and return its exit code.

    0: done. 2: the user's input cannot be used; one message, no traceback, on every process, before any GPU work.
    1: the run failed; a message where the reason is known, a traceback where it is a mistake of ours. 130: Ctrl-C.
    """
    try:
        launch = Launch(place or Place.from_env())
    except LongCtxError as error:
        tell(_message(error))
        return EXIT_USER_ERROR
    name = _rank_name(launch.place.rank) if launch.place.world_size > 1 else ""
    try:
        body(launch)
        return 0
    except StartError as error:
        if str(error):
            tell(str(error))
        code = EXIT_USER_ERROR
    except LongCtxError as error:
        if not getattr(error, "was_told", False):
            tell(f"{name} {_message(error)}".strip())
        code = EXIT_FAILED if launch.is_working else EXIT_USER_ERROR
    except KeyboardInterrupt as error:
        if not getattr(error, "was_told", False):
            tell(f"{name} interrupted".strip())
        code = EXIT_INTERRUPTED
    except Exception as error:
        if not getattr(error, "was_told", False):
            before = f"{name} " if name else ""
            tell("\n".join(before + line for line in traceback.format_exc().splitlines()))
            if isinstance(error, torch.OutOfMemoryError):
                tell(before + OUT_OF_MEMORY)
        code = EXIT_FAILED
    if launch.place.world_size > 1:
        # Peers may be gone, and the destructors of the process group would wait for them; or the launcher's SIGTERM comes
        # in Python's last moments, which no longer know the handler that keeps the exit code.
        leave_now(code)
    return code


def _message(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _rank_name(rank: int) -> str:
    return f"[rank {rank}]"


def choose_device(place: Place, device: str) -> tuple[torch.device, str]:
    """The device of this process, and why.

    Args:
        device: "auto" (CUDA where there is a GPU, else the CPU), "cuda" or "cpu".

    Raises:
        ConfigError: "cuda" without a GPU, or more processes on this machine than GPUs.
    """
    if device == "cpu":
        return torch.device("cpu"), "train.device = cpu"
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not gpus:
        if device == "cuda":
            raise ConfigError("train.device = cuda, but torch sees no CUDA device\n       use train.device=cpu or auto")
        return torch.device("cpu"), "no CUDA device"
    if place.local_rank >= gpus:
        raise ConfigError(
            f"process {place.local_rank} of this machine has no GPU: {gpus} visible, at least {place.local_rank + 1} "
            f"processes started\n       start at most {gpus} per machine, or use --train.device=cpu"
        )
    name = torch.cuda.get_device_name(place.local_rank)
    return torch.device("cuda", place.local_rank), f"{name}, GPU {place.local_rank} of {gpus}"
