"""The messages of Ulysses, in which every rank hands each of the others a piece."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist

from longctx.errors import DistributedError
from longctx.parallel.exchange import Rotation, find, register
from longctx.parallel.journal import Journal


class HeadLink(Protocol):
    """What carries the messages of Ulysses. `peers` are the global ranks, in Ulysses order."""

    rank: int
    peers: tuple[int, ...]

    def all_to_all(self, send: torch.Tensor, receive: torch.Tensor) -> Callable[[], None]:
        """Start handing `send[j]` to rank j and filling `receive[i]` from rank i, for all of them.

        Args:
            send, receive: uint8 [world, bytes].

        Returns:
            A call that blocks until both are done, or on a GPU makes the current stream wait for them. `send` and
            `receive` must not be touched before.
        """


class GroupHeadLink:
    """Messages through a torch.distributed process group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.peers = tuple(dist.get_process_group_ranks(group))

    def all_to_all(self, send: torch.Tensor, receive: torch.Tensor) -> Callable[[], None]:
        work = dist.all_to_all_single(receive, send, group=self._group, async_op=True)
        assert work is not None, "it was asked for"

        def wait() -> None:
            work.wait()

        return wait


class HeadExchange:
    """The all-to-all of the ranks that exchange their parts of a sequence for parts of the heads.

    Args:
        link: what carries the messages; None for one rank alone.
        prefix: how this rank's messages to the user begin.
        journal: where its messages are noted; None: one of its own.

    Attributes:
        handle: names this exchange in a custom op's arguments; empty for one rank.
        bytes_sent: payload of all messages to others so far.
    """

    def __init__(self, link: HeadLink | None, *, prefix: str = "", journal: Journal | None = None) -> None:
        self._link = link
        self.journal = Journal() if journal is None else journal
        self._prefix = prefix
        self.rank = link.rank if link is not None else 0
        self.world = len(link.peers) if link is not None else 1
        self.bytes_sent = 0
        self.handle = "" if link is None else register(self, "ulysses")

    def all_to_all(self, message: torch.Tensor, *, what: str) -> Rotation:
        """Start handing `message[j]` to rank j, for all j.

        Args:
            message: [world, ...], contiguous, of one shape and dtype on all ranks; not to be written to until the exchange
                was waited for.
            what: names the message in errors and reports.

        Returns:
            Whose `wait` gives a new tensor of that shape: `[i]` came from rank i.

        Raises:
            DistributedError: the message could not be posted.
        """
        assert self._link is not None, "one rank alone has nobody to send to"
        assert message.shape[0] == self.world, f"{message.shape[0]} pieces for {self.world} ranks"
        assert message.is_contiguous(), "messages are contiguous"
        link, peers = self._link, self._link.peers
        received = torch.empty_like(message)
        num_bytes = message.numel() * message.element_size() // self.world * (self.world - 1)
        note = self.journal.post(what, to=peers, source=peers, num_bytes=num_bytes)

        def failed(error: Exception) -> DistributedError:
            layer = "" if note.layer is None else f"layer {note.layer}, "
            return DistributedError(
                f"{self._prefix} {layer}{what}: all-to-all among the ranks {list(peers)} failed: {error}\n"
                "       one of them died, hangs, or is at another place of the program: look for the first error among "
                "all ranks"
            )

        try:
            # As bytes: gloo does not know every dtype.
            arrive = link.all_to_all(*(x.view(self.world, -1).view(torch.uint8) for x in (message, received)))
        except RuntimeError as error:
            raise failed(error) from error
        self.bytes_sent += num_bytes
        return Rotation(received, message, lambda: self.journal.wait(note, arrive), failed)

    def warm_up(self, device: torch.device) -> None:
        """Exchange one number with everyone, so that connections are made now, in the same order on all ranks."""
        if self._link is None:
            return
        heard = self.all_to_all(
            torch.full((self.world, 1), float(self.rank), device=device), what="first contact"
        ).wait()
        if heard.flatten().tolist() != list(range(self.world)):
            raise DistributedError(f"{self._prefix} first contact: heard the Ulysses ranks {heard.flatten().tolist()}")
        self.bytes_sent = 0


def enter_heads(handle: str) -> HeadExchange:
    """The exchange of that handle, for the messages that follow, which its journal notes as of one operation.

    Args:
        handle: `HeadExchange.handle`, also as `at_layer` makes it.

    Raises:
        DistributedError: its mesh is gone.
    """
    exchange, layer = find(handle, HeadExchange)
    exchange.journal.enter(layer)
    return exchange
