"""Where the keys of other ranks go among the keys that a rank gathers, and where their gradients come from."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field

from torch import Tensor

from longctx.parallel.moves import Move, Span, unpack_moves, unpack_pieces
from longctx.parallel.schedule import CACHED_SCHEDULES


@dataclass(frozen=True, eq=False)
class Route:
    """One move of a `GatherPlan`.

    Args:
        received: (local keys of the source, where they start among the gathered), for each run; the own ones for the first
            route. A start of -1: see `order`.
        sent: (own local keys, where they start among the gathered), likewise.
        order: int64 [keys received], the place of each among the gathered.
    """

    move: Move
    received: tuple[tuple[Span, int], ...]
    sent: tuple[tuple[Span, int], ...]
    order: Tensor
    _per_device: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def is_loose(self) -> bool:
        """The keys do not stand in a few runs, so they are put in their places one by one."""
        return any(start < 0 for _, start in self.received)

    def parts(self, gathered: Tensor) -> list[Tensor]:
        """The runs of K and V, or of their gradients, in "2 b g n d": for each sequence a contiguous tensor."""
        return [x[n, at : at + keys.size] for x in gathered for n in range(len(x)) for keys, at in self.received]

    def place(self, gathered: Tensor, keys: Tensor) -> None:
        """Put "b s n d" of the source's keys that move into "b g n d"."""
        if self.is_loose:
            gathered.index_copy_(1, self._places(keys), keys)
            return
        for span, at in self.received:
            first = span.first - self.move.receive.first
            gathered[:, at : at + span.size] = keys[:, first : first + span.size]

    def take(self, gathered: Tensor) -> Tensor:
        """The inverse of `place` for loose keys, contiguous."""
        return gathered.index_select(1, self._places(gathered))

    def collect(self, gathered: Tensor, into: Tensor) -> None:
        """Copy the keys of this route from "b g n d" to "b s n d"."""
        if self.is_loose:
            into.copy_(self.take(gathered))
            return
        for span, at in self.received:
            into[:, slice(*span)] = gathered[:, at : at + span.size]

    def add_sent(self, own: Route, gathered: Tensor, arrived: Tensor) -> None:
        """Add to the gradients of own keys in "b g n d" those that came back from where the keys were sent."""
        first = self.move.send.first
        for keys, at in self.sent:
            part = arrived[:, keys.first - first : keys.last - first]
            if own.is_loose:
                places = own._places(gathered)[slice(*keys)]
                gathered.index_add_(1, places, part.to(gathered.dtype))
            else:
                gathered[:, at : at + keys.size] += part

    def _places(self, like: Tensor) -> Tensor:
        key = str(like.device)
        if key not in self._per_device:
            self._per_device[key] = self.order.to(like.device)
        return self._per_device[key]


# The tensors of a plan -> its routes, which remember their order on each device. As with the hops of a ring, the tensors
# are kept with the entry, so no other tensor can come to lie at the same address.
_unpacked: OrderedDict[tuple[int, int], tuple[Tensor, Tensor, Tensor, list[Route]]] = OrderedDict()
_unpacked_lock = threading.Lock()


def unpack_routes(moves: Tensor, pieces: Tensor, order: Tensor) -> list[Route]:
    """The routes of a `GatherPlan`, remembered; the own keys' first."""
    key = (moves.data_ptr(), pieces.data_ptr())
    with _unpacked_lock:
        if key not in _unpacked:
            _unpacked[key] = (moves, pieces, order, _unpack(moves, pieces, order))
            if len(_unpacked) > CACHED_SCHEDULES:
                _unpacked.popitem(last=False)
        _unpacked.move_to_end(key)
        return _unpacked[key][3]


def _unpack(moves: Tensor, pieces: Tensor, order: Tensor) -> list[Route]:
    found = unpack_pieces(pieces)
    routes, first = [], 0
    for i, move in enumerate(unpack_moves(moves)):
        received, sent = (
            tuple((p.keys, p.start) for p in found if p.move == i and p.is_sent == is_sent) for is_sent in (False, True)
        )
        routes.append(Route(move, received, sent, order[first : first + move.receive.size]))
        first += move.receive.size
    return routes
