"""The messages of a ring: each rank hands a tensor to the rank `shift` further and gets one from the rank `shift` behind.

A message is posted before the compute that hides it and waited for after. All ranks post the same messages in the same
order; the schedule, which is equal on every rank, fixes both. `head_exchange` and `tensor_exchange` hold the messages of the
other axes; all of them are found by the handles that are given out here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist

from longctx.errors import DistributedError
from longctx.parallel.journal import Journal

# The only registry of live objects in this package. A custom op takes tensors, numbers and strings, so it names its
# exchange by a handle. Entries go with their meshes.
_EXCHANGES: WeakValueDictionary[str, Any] = WeakValueDictionary()
_handles = itertools.count()
# Between the name of an exchange and the layer that uses it.
_AT = "@"
_Exchange = TypeVar("_Exchange")


class Link(Protocol):
    """What carries the messages of a ring. `peers` are the global ranks, in ring order."""

    rank: int
    peers: tuple[int, ...]

    def swap(
        self, send: Sequence[torch.Tensor], receive: Sequence[torch.Tensor], *, to: int, source: int, room: int
    ) -> Callable[[], None]:
        """Start sending the tensors `send` to ring rank `to` and filling `receive` from ring rank `source`.

        Args:
            send, receive: contiguous, in the same order on both sides; none to send or receive nothing.
            room: bytes, at least what any rank of the ring sends or receives this time; equal on all of them.

        Returns:
            A call that blocks until both are done, or on a GPU makes the current stream wait for them. `send` and
            `receive` must not be touched before.
        """


class GroupLink:
    """Messages through a torch.distributed process group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.peers = tuple(dist.get_process_group_ranks(group))

    def swap(
        self, send: Sequence[torch.Tensor], receive: Sequence[torch.Tensor], *, to: int, source: int, room: int
    ) -> Callable[[], None]:
        # The tag keeps several tensors between one pair of ranks apart on gloo; NCCL goes by their order.
        posts = [dist.P2POp(dist.isend, x, group=self._group, group_peer=to, tag=i) for i, x in enumerate(send)]
        posts += [dist.P2POp(dist.irecv, x, group=self._group, group_peer=source, tag=i) for i, x in enumerate(receive)]
        # One batch: on NCCL both directions run as one grouped kernel on the group's own communicator.
        works = dist.batch_isend_irecv(posts) if posts else []

        def wait() -> None:
            for work in works:
                work.wait()

        return wait


@dataclass
class Rotation:
    """A message on its way. `wait` once, before reading the result or writing to what was sent."""

    _tensor: torch.Tensor
    # Keeps the memory of what is being sent until it is gone.
    _sent: torch.Tensor
    _wait: Callable[[], None]
    _failed: Callable[[Exception], DistributedError]

    def wait(self) -> torch.Tensor:
        """What arrived, shaped like what was sent.

        Raises:
            DistributedError: the peer died, or did not answer in time.
        """
        try:
            self._wait()
        except RuntimeError as error:
            raise self._failed(error) from error
        return self._tensor


@dataclass
class Trade:
    """Tensors on their way, both ways. `wait` once, before reading what was received or writing to what was sent."""

    _kept: Sequence[torch.Tensor]
    _wait: Callable[[], None]
    _failed: Callable[[Exception], DistributedError]

    def wait(self) -> None:
        """
        Raises:
            DistributedError: a peer died, or did not answer in time.
        """
        try:
            self._wait()
        except RuntimeError as error:
            raise self._failed(error) from error


class RingExchange:
    """The messages of one ring, with its two receive buffers for each purpose, reused by every layer.

    Args:
        link: what carries the messages; None for a ring of one.
        prefix: how this rank's messages to the user begin.
        grad_dtype: dtype of key and value gradients on the wire. None: as they are accumulated, fp32.
        journal: where its messages are noted; None: one of its own.

    Attributes:
        handle: names this exchange in a custom op's arguments; empty for a ring of one that has no journal given.
        bytes_sent: payload of all messages so far.
    """

    def __init__(
        self,
        link: Link | None,
        *,
        prefix: str = "",
        grad_dtype: torch.dtype | None = None,
        journal: Journal | None = None,
    ) -> None:
        self._link = link
        self.journal = Journal() if journal is None else journal
        self._prefix = prefix
        self._buffers: dict[tuple[str, int], torch.Tensor] = {}
        self._turns: dict[str, int] = {}
        self.grad_dtype = grad_dtype
        self.rank = link.rank if link is not None else 0
        self.world = len(link.peers) if link is not None else 1
        self.bytes_sent = 0
        self.handle = ""
        if link is not None or journal is not None:
            self.handle = register(self, "ring")

    def rotate(
        self, tensor: torch.Tensor, shift: int, *, purpose: str, what: str, into: torch.Tensor | None = None
    ) -> Rotation:
        """Start handing `tensor` to the rank `shift` further round the ring (backwards if negative).

        Every rank of the ring calls this with the same shift and with tensors of one shape.

        Args:
            tensor: contiguous; not to be written to until the rotation was waited for.
            purpose: messages of one purpose share two buffers: what arrives is valid until the second next `rotate` of
                that purpose.
            what: names the message in errors.
            into: contiguous; receives instead of a shared buffer, for what must be kept.

        Raises:
            DistributedError: the message could not be posted.
        """
        assert tensor.is_contiguous(), "messages are contiguous"
        received = self._spare(purpose, tensor) if into is None else into
        wait, failed = self._post([tensor], [received], shift, tensor.numel() * tensor.element_size(), what)
        return Rotation(received, tensor, wait, failed)

    def trade(
        self, send: Sequence[torch.Tensor], receive: Sequence[torch.Tensor], shift: int, *, room: int, what: str
    ) -> Trade:
        """Start sending `send` to the rank `shift` further round the ring and filling `receive` from the one `shift` behind.

        Every rank of the ring calls this with the same shift and room, also one that has nothing to send or receive: what
        one sends must be what the other expects.

        Args:
            send: not to be written to until the trade was waited for; empty tensors are left out, as the other side does.
            receive: contiguous.
            room: bytes, at least what any rank sends or receives in this trade; equal on all of them.
            what: names the message in errors.

        Raises:
            DistributedError: the message could not be posted.
        """
        send = [x.contiguous() for x in send if x.numel()]
        receive = [x for x in receive if x.numel()]
        assert all(x.is_contiguous() for x in receive), "messages are contiguous"
        wait, failed = self._post(send, receive, shift, room, what)
        return Trade([*send, *receive], wait, failed)

    def _post(
        self, send: Sequence[torch.Tensor], receive: Sequence[torch.Tensor], shift: int, room: int, what: str
    ) -> tuple[Callable[[], None], Callable[[Exception], DistributedError]]:
        """Start a message; returns what waits for it, and what makes an error of its failure."""
        assert self._link is not None, "a ring of one has nobody to send to"
        assert shift % self.world, "a message to oneself"
        to, source = (self.rank + shift) % self.world, (self.rank - shift) % self.world
        peers = self._link.peers

        def failed(error: Exception) -> DistributedError:
            layer = "" if message.layer is None else f"layer {message.layer}, "
            return DistributedError(
                f"{self._prefix} {layer}{what}: sending to ring rank {to} (rank {peers[to]}) and receiving from ring rank "
                f"{source} (rank {peers[source]}) failed: {error}\n"
                "       one of them died, hangs, or is at another place of the program: look for the first error among "
                "all ranks"
            )

        num_bytes = sum(x.numel() * x.element_size() for x in send)
        # Noted also where there is nothing to send or receive: all ranks count the same messages.
        message = self.journal.post(what, to=(peers[to],), source=(peers[source],), num_bytes=num_bytes)
        try:
            arrive = self._link.swap(send, receive, to=to, source=source, room=room)
        except RuntimeError as error:
            raise failed(error) from error
        self.bytes_sent += num_bytes
        return lambda: self.journal.wait(message, arrive), failed

    def buffer(self, purpose: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """One of the two buffers of `purpose`, in turn: valid until the second next call. Contents are left over."""
        self._turns[purpose] = 1 - self._turns.get(purpose, 0)
        return self._reserved((purpose, self._turns[purpose]), shape, dtype, device)

    def warm_up(self, device: torch.device) -> None:
        """Send one number each way round, so that connections are made now, in the same order on all ranks.

        NCCL makes them at the first message otherwise, which can deadlock with other traffic of the same processes.
        """
        if self._link is None:
            return
        for shift in (1, -1):
            token = torch.full((1,), float(self.rank), device=device)
            got = self.rotate(token, shift, purpose="warm-up", what="first contact").wait()
            if int(got) != (self.rank - shift) % self.world:
                raise DistributedError(f"{self._prefix} first contact: heard ring rank {int(got)} out of turn")
        self.bytes_sent = 0

    def _spare(self, purpose: str, like: torch.Tensor) -> torch.Tensor:
        """The receive buffer of `purpose` that `like` does not lie in, shaped like `like`."""
        for index in (0, 1):
            buffer = self._reserved((purpose, index), like.shape, like.dtype, like.device)
            if buffer.data_ptr() != like.data_ptr():
                return buffer
        raise AssertionError("two buffers share one address")

    def _reserved(
        self, key: tuple[str, int], shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """The start of that buffer, which is made or replaced where it is too small."""
        size = math.prod(shape) * dtype.itemsize
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size or buffer.device != device:
            buffer = torch.empty(size, dtype=torch.uint8, device=device)
            self._buffers[key] = buffer
        return buffer[:size].view(dtype).view(tuple(shape))


def get_exchange(handle: str) -> RingExchange:
    """The exchange of that handle, for one operation, which its journal notes; an empty handle is a ring of one.

    Args:
        handle: `RingExchange.handle`, also as `at_layer` makes it.

    Raises:
        DistributedError: its mesh is gone.
    """
    if not handle:
        return RingExchange(None)
    exchange, layer = find(handle, RingExchange)
    exchange.journal.enter(layer)
    return exchange


def register(exchange: object, kind: str) -> str:
    """A new handle for `exchange`, by which `find` knows it as long as it lives."""
    handle = f"{kind}{next(_handles)}"
    _EXCHANGES[handle] = exchange
    return handle


def find(handle: str, cls: type[_Exchange]) -> tuple[_Exchange, int | None]:
    """The exchange of that handle, which is a `cls`, and the layer that `at_layer` put into it.

    Raises:
        DistributedError: its mesh is gone.
    """
    name, _, layer = handle.partition(_AT)
    exchange = _EXCHANGES.get(name)
    if exchange is None:
        raise DistributedError(
            f"the mesh of {cls.__name__} {name!r} is gone: keep the ParallelMesh alive until the backward pass is done"
        )
    assert isinstance(exchange, cls), f"{name} is no {cls.__name__}"
    return exchange, int(layer) if layer else None


def at_layer(handle: str, layer: int | None) -> str:
    """A handle that says which layer of a model uses it: reports name it, in forward and in backward."""
    return handle if layer is None or not handle else f"{handle}{_AT}{layer}"
