"""What the ranks of a run tell each other beside the process group: signs of life, and why the run ends."""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass

import torch.distributed as dist

_COMMUNICATION = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|socket|recvvalue|sendbytes", re.I
)


@dataclass(frozen=True)
class Heartbeat:
    """What a rank says of itself.

    Args:
        count: grows with each beat.
        step, phase: where its main thread is; `age` seconds since either changed.
        marks: how often they changed. Ranks run the same program: the one with the fewest is the one others wait for.
        where: innermost line of this package that its main thread is in.
        host, pid, born: its process, so that a rank of the same machine sees its death at once.
        is_done: it has finished; its silence from now on is no sign of death.
    """

    count: int = 0
    step: int = 0
    phase: str = "start"
    marks: int = 0
    age: float = 0.0
    where: str = ""
    host: str = ""
    pid: int = 0
    born: str = ""
    is_done: bool = False


@dataclass(frozen=True)
class Verdict:
    """Why this run ends.

    Args:
        by, host: the rank that found it, and its machine.
        wants_stacks: whether each rank should leave the stacks of its threads.
        culprit: a rank that does not answer.
    """

    text: str
    by: int
    host: str
    wants_stacks: bool = False
    culprit: int | None = None


def is_communication_error(error: BaseException) -> bool:
    """Whether `error`, or one that it came from, is what a rank sees when another goes away: the reason is elsewhere."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return any(
        isinstance(e, dist.DistError) or (isinstance(e, RuntimeError) and bool(_COMMUNICATION.search(str(e))))
        for e in chain
    )


def one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__


def machine_name() -> str:
    """Names the machine and the process namespace: equal where process ids can be compared."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return f"{socket.gethostname()}/{os.getpid()}"  # no such comparison on this system
    return f"{socket.gethostname()}/{namespace}"


def start_time(pid: int) -> str | None:
    """Start time of a living process, as the kernel counts it; None if it is dead or a zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
