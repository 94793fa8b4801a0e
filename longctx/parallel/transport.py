"""What carries the messages of a ring between GPUs: NCCL, or inside one node the copy engines.

NCCL moves data with kernels, which need SMs that attention has filled; the copy engines need none. With them a message is
copied into memory that all GPUs of the ring can read, announced by a signal, and fetched by the GPU that needs it, all on a
stream of its own.
"""

from __future__ import annotations

import logging
import math
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longctx.errors import DistributedError, PlanError
from longctx.parallel.exchange import GroupLink, Link

log = logging.getLogger(__name__)

# Messages that may be on their way at once: one is fetched while the next is made ready.
_SLOTS = 2
# Signals of slot i: i says that it is filled, _SLOTS + i that it was read.
_FILLED, _READ = 0, _SLOTS
# Room of a slot is a multiple of this.
_ROOM_STEP = 1 << 20


@dataclass(frozen=True)
class NcclSettings:
    """How NCCL's kernels that carry messages of layers share a GPU with attention.

    Args:
        max_sms: the most SMs that messages of one group take while they are on their way, waiting for the peer included;
            fewer leave more to attention, and move less in a second. None: what NCCL chooses.
        has_priority: its stream gets SMs before attention's next blocks do, instead of in turn.
    """

    max_sms: int | None = None
    has_priority: bool = True

    def __post_init__(self) -> None:
        if self.max_sms is not None and self.max_sms < 1:
            raise PlanError(f"max_sms = {self.max_sms}: a message needs at least 1 SM; None lets NCCL choose")

    def options(self, timeout: timedelta) -> Any:
        """What torch's new_group takes."""
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=self.has_priority)
        options._timeout = timeout
        if self.max_sms is not None:
            options.config.max_ctas = self.max_sms
        return options


class CopyEngineLink:
    """Messages through memory that the GPUs of one node share (symmetric memory): a `Link` without kernels for the data.

    Each rank has two slots of memory, grown to the largest message. The sender copies into a slot and signals; the receiver
    fetches from there over NVLink or PCIe and signals back. Signals are kernels of one warp, so a stream waits for them and
    the host never does, but for growing the slots: then all ranks wait for each other, once for each larger message.

    Raises:
        RuntimeError: the GPUs cannot reach each other's memory.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, timeout: timedelta) -> None:
        self._group = group
        self._device = device
        self._timeout_ms = int(1000 * timeout.total_seconds())
        self.rank = dist.get_rank(group)
        self.peers = tuple(dist.get_process_group_ranks(group))
        # Signals and copies start while attention fills the GPU.
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._room = 0
        self._reserve(_ROOM_STEP)

    def swap(
        self, send: Sequence[torch.Tensor], receive: Sequence[torch.Tensor], *, to: int, source: int, room: int
    ) -> Callable[[], None]:
        # All ranks count alike, so a sender and its receiver speak of the same slot.
        self._reserve(room)
        slot = self._messages % _SLOTS
        self._messages += 1
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            if send:
                self._fill(slot, send, to)
            if receive:
                self._fetch(slot, receive, source)
            done = torch.cuda.Event()
            done.record(self._stream)
        return lambda: torch.cuda.current_stream(self._device).wait_event(done)

    def _fill(self, slot: int, tensors: Sequence[torch.Tensor], to: int) -> None:
        reader = self._readers[slot]
        if reader is not None:
            self._memory.wait_signal(reader, _READ + slot, self._timeout_ms)
        for part, x in zip(self._parts(self.rank, slot, tensors), tensors, strict=True):
            part.copy_(x, non_blocking=True)
        self._memory.put_signal(to, _FILLED + slot, self._timeout_ms)
        self._readers[slot] = to

    def _fetch(self, slot: int, tensors: Sequence[torch.Tensor], source: int) -> None:
        self._memory.wait_signal(source, _FILLED + slot, self._timeout_ms)
        for part, x in zip(self._parts(source, slot, tensors), tensors, strict=True):
            x.copy_(part, non_blocking=True)
        self._memory.put_signal(source, _READ + slot, self._timeout_ms)

    def _parts(self, rank: int, slot: int, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Where tensors of these shapes, all of one dtype, lie in that slot of that rank: one behind the other."""
        parts, at = [], slot * self._room
        for x in like:
            parts.append(self._memory.get_buffer(rank, tuple(x.shape), x.dtype, at // x.element_size()))
            at += x.numel() * x.element_size()
        assert at <= (slot + 1) * self._room, "a message larger than the room that all ranks agreed on"
        return parts

    def _reserve(self, room: int) -> None:
        if room <= self._room:
            return
        import torch.distributed._symmetric_memory as symmetric

        torch.cuda.synchronize(self._device)
        self._room = math.ceil(room / _ROOM_STEP) * _ROOM_STEP
        slots = symmetric.empty(_SLOTS * self._room, dtype=torch.uint8, device=self._device)
        memory = symmetric.rendezvous(slots, self._group)
        # All have come here, so nobody reads the old slots any more.
        self._slots, self._memory = slots, memory
        self._readers: list[int | None] = [None] * _SLOTS
        self._messages = 0


def node_name() -> str:
    """The same for all processes of one machine, and another on every other."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"


def are_in_one_node(group: dist.ProcessGroup) -> bool:
    """Whether all ranks of the group are processes of one machine. Collective."""
    names: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(names, node_name(), group=group)
    return len(set(names)) == 1


def ring_link(
    group: dist.ProcessGroup,
    device: torch.device,
    *,
    transport: str,
    in_one_node: bool,
    timeout: timedelta,
    prefix: str,
) -> Link:
    """What carries the messages of the ring `group`, and a line in the log that says why. Collective.

    Args:
        transport: "auto", "nccl" or "copy_engine", the same on every rank.
        prefix: how this rank's messages to the user begin.

    Raises:
        DistributedError: "copy_engine" was asked for and cannot be had.
    """
    link: Link | None = None
    if transport == "nccl":
        reason = "as asked for"
    elif device.type != "cuda" or torch.version.hip is not None:
        reason = f"{device.type} has no copy engines that longctx knows"
    elif not in_one_node:
        reason = "the ring spans several machines, whose GPUs do not see each other's memory"
    elif transport == "auto":
        # Two H200, 16k to 128k tokens: within the noise of each other, and copy engines take two slots of the largest message.
        reason = "measured as fast as copy engines, without their buffers"
    else:
        link, reason = _try_copy_engine(group, device, timeout)
    if link is None and transport == "copy_engine":
        raise DistributedError(
            f"{prefix} transport 'copy_engine' cannot be had: {reason}\n"
            "       leave transport 'auto', or keep the ring inside one node (ulysses across nodes, or a smaller ring)"
        )
    name = "copy_engine" if link is not None else dist.get_backend(group)
    log.info("%s messages of the ring: %s (%s)", prefix, name, reason)
    return GroupLink(group) if link is None else link


def _try_copy_engine(
    group: dist.ProcessGroup, device: torch.device, timeout: timedelta
) -> tuple[CopyEngineLink | None, str]:
    """The link if every rank of the group got one, and why or why not."""
    link, reason = None, "all GPUs of the ring are in one node"
    try:
        link = CopyEngineLink(group, device, timeout)
    except (RuntimeError, ImportError) as error:
        reason = f"no shared memory among the GPUs: {str(error).splitlines()[0]}"
    got = torch.tensor([int(link is not None)], device=device)
    dist.all_reduce(got, dist.ReduceOp.MIN, group=group)
    if link is not None and not int(got):
        return None, "another rank of the ring got no shared memory"
    return link, reason
