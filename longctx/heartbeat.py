"""What the ranks of a run tell each other beside the process group: signs of life, and why the run ends."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Mapping
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
        step, phase: where its main thread is; `age` seconds since either changed or a message was the last to arrive.
        marks: how often they changed. Ranks run the same program: the one with the fewest is the one others wait for.
        where: innermost line of this package that its main thread is in.
        call, message, is_waiting, messages: where it is in its communication: `longctx.parallel.journal.Standing`.
        host, pid, born: its process, so that a rank of the same machine sees its death at once.
        is_done: it has finished; its silence from now on is no sign of death.
    """

    count: int = 0
    step: int = 0
    phase: str = "start"
    marks: int = 0
    age: float = 0.0
    where: str = ""
    call: int = 0
    message: int = 0
    is_waiting: bool = False
    messages: str = ""
    host: str = ""
    pid: int = 0
    born: str = ""
    is_done: bool = False

    @property
    def order(self) -> tuple[int, int, int, bool]:
        """How far it has come; the least of all ranks is the one that the others wait for."""
        return (self.marks, self.call, self.message, self.is_waiting)


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


def tell_standings(
    beats: Mapping[int, Heartbeat], *, name_of: Callable[[int], str], silent_s: Mapping[int, float], patience_s: float
) -> list[str]:
    """A line about where each rank stands, and one about its messages where it has sent any.

    Args:
        silent_s: for how long nothing was heard of a rank; told where it is more than `patience_s`.
    """
    lines = []
    for r, b in sorted(beats.items()):
        silence = silent_s.get(r, 0.0)
        heard = f", last heard {silence:.0f} s ago" if silence > patience_s else ""
        lines.append(f"  rank {r} ({name_of(r)}): step {b.step}, {b.phase} for {b.age:.0f} s, in {b.where}{heard}")
        if b.messages:
            lines.append(f"    {b.messages}")
    return lines


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
