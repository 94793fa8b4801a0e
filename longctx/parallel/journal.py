"""Where a process is in its communication, and what that costs: each message when it is posted and when it is waited for.

Kept without any synchronisation with a GPU. There the host is far ahead of the device, so what was posted says little; a
CUDA event on either side of each wait says what arrived. A thread of the watchdog asks these events when it wants to
know, and their distance is the time that the compute stream stood still: exposed communication.

    compute stream   ... attention of hop 1 |reached ......... arrived| attention of hop 2 ...
    message 2             posted -------------------- on its way ----|

One journal for each mesh, shared by all that carries its messages. Two calls do everything for a carrier: `post` where a
message starts, `wait` where it is waited for.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

_T = TypeVar("_T")

# So many messages a GPU may be behind before each new one asks whether the oldest has arrived.
REMEMBERED = 256
# More messages than an operation has.
_ALL = 1 << 30


@dataclass(slots=True, eq=False)
class Message:
    """One message of a process, from `Journal.post` on.

    Args:
        number: counts the messages of the journal.
        call: which attention operation of the process it belongs to, counted from 1; `index` which of its messages.
        layer: of the model; None where nobody named it.
        what: direction, kind and hop, such as "forward, K/V for hop 1".
        to, source: the global ranks at its two ends; the same ones where all exchange with all.
        is_counted: whether it is part of an `Account`.
    """

    number: int
    call: int
    index: int
    layer: int | None
    what: str
    to: tuple[int, ...]
    source: tuple[int, ...]
    is_counted: bool = True
    waiting_since: float | None = None
    has_arrived: bool = False
    # On a GPU: the compute stream came to the wait, and went on from it.
    _reached: torch.cuda.Event | None = None
    _arrived: torch.cuda.Event | None = None

    def __str__(self) -> str:
        layer = "" if self.layer is None else f"layer {self.layer}, "
        return f"{layer}{self.what} ({self.route})"

    @property
    def route(self) -> str:
        """Who takes part in it."""
        if self.to == self.source:
            return f"with {_ranks(self.to)}"
        return f"to {_ranks(self.to)}, from {_ranks(self.source)}"

    def is_over(self) -> bool:
        """Whether it arrived and, on a GPU, whether the compute stream went on."""
        if not self.has_arrived and self._arrived is not None:
            self.has_arrived = _is_done(self._arrived)
        return self.has_arrived

    def is_waited_for(self) -> bool:
        """Whether the process, or on a GPU its compute stream, stands still for it."""
        if self.waiting_since is None or self.is_over():
            return False
        return self._reached is None or _is_done(self._reached)


@dataclass(frozen=True)
class Standing:
    """How far a process has come; ordered, the least is the one that others wait for.

    Args:
        call, message: the attention operation it is in and the message of it that is next to arrive, both counted up.
        is_waiting: whether it stands still for that message; a process that does is ahead of one that works.
        text: the same for people; empty before the first message.
        age: seconds for which it has not changed, as far as anybody asked.
    """

    call: int = 0
    message: int = 0
    is_waiting: bool = False
    text: str = ""
    age: float = math.inf

    @property
    def order(self) -> tuple[int, int, bool]:
        return (self.call, self.message, self.is_waiting)


@dataclass(frozen=True)
class Account:
    """What attention and its communication took of one process since the last account.

    Args:
        exposed_s: seconds that its compute stood still for messages: on a GPU the stream's, on a CPU the process's.
        attention_s: seconds inside attention operations without what is exposed: kernels, and copies beside them.
        flops: floating-point operations of attention, for the pairs that the mask shows.
        bytes_sent: payload of all messages.
        messages: how many.
    """

    exposed_s: float = 0.0
    attention_s: float = 0.0
    flops: float = 0.0
    bytes_sent: float = 0.0
    messages: float = 0.0


class Journal:
    """The messages of one process over one mesh.

    Args:
        device: where its tensors live.

    Attributes:
        is_measuring: whether times are kept for `take`. Without it a GPU still records two events a message, without
            times, so that a hang can be explained.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        device = torch.device(device)
        self._is_cuda = device.type == "cuda"
        if self._is_cuda and device.index is None and torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device())
        self._device = device
        self.is_measuring = False
        self._layer: int | None = None
        self._call = 0
        self._index = 0
        self._is_over = False
        self._last: Message | None = None
        # Posted and not known to have arrived, in the order of posting.
        self._open: dict[int, Message] = {}
        self._posted = 0
        self._stood: tuple[tuple[int, int, bool] | None, float] = (None, 0.0)
        self._span: _Span | None = None
        self._waits: list[tuple[_Moment, _Moment, bool]] = []
        self._spans: list[_Span] = []
        self._bytes = 0
        self._messages = 0

    def enter(self, layer: int | None) -> None:
        """An attention operation of that layer begins: what follows is its messages."""
        self._layer = layer
        self._call += 1
        self._index = 0
        self._is_over = False

    def post(
        self, what: str, *, to: tuple[int, ...], source: tuple[int, ...], num_bytes: int, is_counted: bool = True
    ) -> Message:
        """A message starts.

        Args:
            what: direction, kind and hop, for people.
            to, source: global ranks.
            num_bytes: payload that this process sends.
            is_counted: as in `Message`.
        """
        if len(self._open) >= REMEMBERED:
            self._forget()
        self._posted += 1
        message = Message(self._posted, self._call, self._index, self._layer, what, to, source, is_counted)
        self._index += 1
        if is_counted:
            self._messages += 1
            self._bytes += num_bytes
        self._open[message.number] = message
        self._last = message
        return message

    def wait(self, message: Message, arrive: Callable[[], _T]) -> _T:
        """Wait for `message` by calling `arrive`, which blocks, or on a GPU makes the current stream wait."""
        is_timed = self.is_measuring and message.is_counted
        begin = _Moment.now(self._is_cuda, is_timed=is_timed)
        message._reached = begin.event
        message.waiting_since = time.monotonic()
        result = arrive()
        end = _Moment.now(self._is_cuda, is_timed=is_timed)
        message._arrived = end.event
        if not self._is_cuda:
            message.has_arrived = True
            self._open.pop(message.number, None)
        if is_timed:
            self._waits.append((begin, end, self._span is not None))
        return result

    def exchange(self, what: str, layer: int | None, ranks: tuple[int, ...], collective: Callable[[], _T]) -> _T:
        """A message that is an operation of its own, posted and waited for by `collective`; it is part of no account.

        Args:
            what: for people, as in `post`.
            layer: of the model; None where nobody named it.
            ranks: global ranks that take part.
        """
        self.enter(layer)
        message = self.post(what, to=ranks, source=ranks, num_bytes=0, is_counted=False)
        result = self.wait(message, collective)
        self._is_over = True
        return result

    def begin_attention(self, count_flops: Callable[[], float]) -> None:
        """An attention operation starts to compute: `count_flops` gives its floating-point operations in this process."""
        if self.is_measuring:
            self._span = _Span(count_flops(), _Moment.now(self._is_cuda, is_timed=True))

    def end_attention(self) -> None:
        """It has posted and computed all it has to. An operation that failed never comes here, and is not counted."""
        self._is_over = True
        span, self._span = self._span, None
        if span is not None:
            span.end = _Moment.now(self._is_cuda, is_timed=True)
            self._spans.append(span)

    def discard(self) -> None:
        """Forget what was measured since the last call of `take`, without waiting for any of it."""
        self._waits, self._spans = [], []
        self._bytes = self._messages = 0

    def take(self) -> Account:
        """What was measured since the last call. On a GPU it waits for all of it, so call it once the device is done."""
        waits, spans, sent, messages = self._waits, self._spans, self._bytes, self._messages
        self.discard()
        stood = [(begin.until(end), is_inside) for begin, end, is_inside in waits]
        inside = sum(seconds for seconds, is_inside in stood if is_inside)
        spent = sum(span.begin.until(span.end) for span in spans if span.end is not None)
        return Account(
            exposed_s=sum(seconds for seconds, _ in stood),
            attention_s=max(0.0, spent - inside),
            flops=sum(span.flops for span in spans),
            bytes_sent=sent,
            messages=messages,
        )

    def standing(self) -> Standing:
        """Where this process is now. For another thread; never waits."""
        if self._device.index is not None and self._is_cuda:
            # A thread that has not chosen its device would open a context on the first one, memory and all.
            with contextlib.suppress(RuntimeError):
                torch.cuda.set_device(self._device)
        standing, now = self._standing(), time.monotonic()
        if self._stood[0] != standing.order:
            self._stood = (standing.order, now)
        return replace(standing, age=now - self._stood[1])

    def _standing(self) -> Standing:
        self._forget(is_thorough=True)
        waiting = list(self._open.values())
        here = next((m for m in waiting if m.is_waited_for()), waiting[0] if waiting else None)
        last = self._last
        if here is None:
            text = "" if last is None else f"last message, arrived: {last}"
            # Rings of other sequences may have made fewer hops: done is done.
            return Standing(self._call, _ALL if self._is_over else self._index, False, text)
        if not here.is_waited_for():
            text = f"computing, with a message on its way: {here}"
        else:
            assert here.waiting_since is not None, "it is waited for"
            # On a GPU the host called wait long before the device came to it.
            since = "" if self._is_cuda else f" for {time.monotonic() - here.waiting_since:.0f} s"
            text = f"waiting{since}: {here}"
        if last is not None and last is not here:
            text += f"; posted up to: {last}"
        return Standing(here.call, here.index, here.is_waited_for(), text)

    def _forget(self, *, is_thorough: bool = False) -> None:
        """Drop what has arrived: from the first on, or all."""
        for message in list(self._open.values()):
            if message.is_over():
                self._open.pop(message.number, None)
            elif not is_thorough:
                break


@dataclass(slots=True)
class _Moment:
    """A time on the host, or on a GPU's current stream."""

    seconds: float = 0.0
    event: torch.cuda.Event | None = None

    @staticmethod
    def now(is_cuda: bool, *, is_timed: bool) -> _Moment:
        if not is_cuda:
            return _Moment(time.perf_counter())
        event = torch.cuda.Event(enable_timing=is_timed)
        event.record()
        return _Moment(event=event)

    def until(self, later: _Moment) -> float:
        if self.event is None or later.event is None:
            return later.seconds - self.seconds
        later.event.synchronize()
        return self.event.elapsed_time(later.event) / 1e3


@dataclass(slots=True)
class _Span:
    flops: float
    begin: _Moment
    end: _Moment | None = None


def _is_done(event: torch.cuda.Event) -> bool:
    try:
        return event.query()
    except RuntimeError:
        return False  # the device has failed; whoever uses it will say so


def _ranks(ranks: tuple[int, ...]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
