"""Which keys travel straight from the rank that holds them to a rank whose queries see them, by arithmetic alone.

A relay hands every key to everybody. Sent straight, a rank gets of each other rank one interval of keys: from the first
that any of its queries sees to the last. With zigzag and a causal mask that is half of the keys for half of the ranks;
with windows and packed documents, little or nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from longctx.masks import KeyRange
from longctx.parallel.schedule import CACHED_SCHEDULES, CommBytes, Hop, RingSchedule, pack_hops

# Runs of consecutive positions that one message may be made of. Keys in more pieces (of a striped layout) travel in one and
# are put in their places at the end.
MAX_RUNS = 16


class Span(NamedTuple):
    """Local keys [first, last) of a rank; first == last for none."""

    first: int
    last: int

    @property
    def size(self) -> int:
        return self.last - self.first


@dataclass(frozen=True)
class Move:
    """What one rank sends and receives for the hop of one distance.

    Args:
        distance: how far behind on the ring the keys come from, and how far ahead the own ones go.
        send: of the own keys, what the rank `distance` ahead needs; for distance 0, nothing.
        receive: of the keys of the rank `distance` behind, what this rank needs; for distance 0, all, which are there.
    """

    distance: int
    send: Span
    receive: Span


def build_moves(schedule: RingSchedule) -> tuple[Move, ...]:
    """The moves of a rank, one for each hop of its schedule; remembered. O(seq_len) work on the CPU."""
    return _build_moves(schedule, schedule.hops)


# Schedules are equal if they were built for the same case; the hops tell one from another that was changed since.
@lru_cache(maxsize=CACHED_SCHEDULES)
def _build_moves(schedule: RingSchedule, hops: tuple[Hop, ...]) -> tuple[Move, ...]:
    s, world, rank = schedule.seq_len // schedule.world, schedule.world, schedule.rank
    moves = []
    for hop in hops:
        if hop.distance == 0:
            moves.append(Move(0, Span(0, 0), Span(0, s)))
            continue
        ahead = (rank + hop.distance) % world
        theirs = schedule.layout.local_bounds(schedule.mask, ahead, rank, world, schedule.seq_len)
        moves.append(Move(hop.distance, needed(*theirs), needed(*hop.key_range.bounds(s, s))))
    return tuple(moves)


def needed(lo: torch.Tensor, hi: torch.Tensor) -> Span:
    """The smallest span with all keys that rows with the intervals [lo, hi) see; int [s] or [b, s]."""
    sees = hi > lo
    if not bool(sees.any()):
        return Span(0, 0)
    return Span(int(lo[sees].min()), int(hi[sees].max()))


# In place of a number of keys: none are kept.
NOT_HELD = -1


class DirectPlan(NamedTuple):
    """What the operator of the direct exchange is told, as CPU tensors and numbers.

    Args:
        hops, rows: `pack_hops`, key ranges counted from the first key received.
        moves: int64 [hops, 5]: distance, send, receive.
        held_len: keys received last, which are kept for the backward pass; `NOT_HELD`: they come again.
    """

    hops: torch.Tensor
    rows: torch.Tensor
    moves: torch.Tensor
    held_len: int


def direct_plan(schedule: RingSchedule, holds: bool = True) -> DirectPlan:
    """The direct exchange of a rank; remembered.

    Args:
        holds: whether the keys received last are kept for the backward pass. The same on all ranks.
    """
    plan = _direct_plan(schedule, schedule.hops)
    return plan if holds else plan._replace(held_len=NOT_HELD)


@lru_cache(maxsize=CACHED_SCHEDULES)
def _direct_plan(schedule: RingSchedule, hops: tuple[Hop, ...]) -> DirectPlan:
    s, moves = schedule.seq_len // schedule.world, build_moves(schedule)
    trimmed = []
    for hop, move in zip(hops, moves, strict=True):
        key_range = hop.key_range
        if hop.distance:
            lo, hi = (x.clamp(*move.receive) - move.receive.first for x in key_range.bounds(s, s))
            key_range = KeyRange.of(lo, hi, move.receive.size)
        trimmed.append((hop.distance, key_range))
    held_len = moves[-1].receive.size if len(moves) > 1 else 0
    return DirectPlan(*pack_hops(trimmed, s), pack_moves(moves), held_len)


def pack_moves(moves: Sequence[Move]) -> torch.Tensor:
    """Moves as a tensor that an operator can take: int64 [hops, 5]; `unpack_moves` is the inverse."""
    return torch.tensor([(m.distance, *m.send, *m.receive) for m in moves], dtype=torch.int64)


def unpack_moves(table: torch.Tensor) -> list[Move]:
    """The moves of `pack_moves`."""
    return [Move(distance, Span(a, b), Span(c, d)) for distance, a, b, c, d in table.tolist()]


def direct_comm_bytes(
    schedule: RingSchedule,
    *,
    batch: int,
    num_kv_heads: int,
    head_dim: int,
    itemsize: int,
    grad_itemsize: int = 4,
    holds: bool = True,
) -> CommBytes:
    """What this rank sends when keys go straight to whom they serve; ranks may differ.

    Forward: of the own K and V, what each other rank needs. Backward: the same, but where `holds` for the last hop, whose block
    its receiver kept; and the gradients of every block that was received, straight home.
    """
    key = 2 * batch * num_kv_heads * head_dim
    moves = build_moves(schedule)[1:]
    sent, received = [m.send.size for m in moves], [m.receive.size for m in moves]
    again = sent[:-1] if holds else sent
    return CommBytes(sum(sent) * key * itemsize, sum(again) * key * itemsize + sum(received) * key * grad_itemsize)


def gather_comm_bytes(
    schedule: RingSchedule, *, batch: int, num_kv_heads: int, head_dim: int, itemsize: int, grad_itemsize: int = 4
) -> CommBytes:
    """What this rank sends when every rank gathers what it needs; nothing is kept, so backward gathers again."""
    key = 2 * batch * num_kv_heads * head_dim
    moves = build_moves(schedule)[1:]
    sent, received = sum(m.send.size for m in moves), sum(m.receive.size for m in moves)
    return CommBytes(sent * key * itemsize, sent * key * itemsize + received * key * grad_itemsize)


class Piece(NamedTuple):
    """Consecutive keys of one message.

    Args:
        move: index of the move.
        is_sent: from here; else to here.
        keys: local keys, of this rank if sent or own, else of the source.
        start: where they stand, or if sent stood, among the keys that this rank gathers; -1: each at its own place, as
            `GatherPlan.order` says.
    """

    move: int
    is_sent: bool
    keys: Span
    start: int


class GatherPlan(NamedTuple):
    """What the operator that gathers keys is told, as CPU tensors.

    Args:
        hops, rows: `pack_hops` of one block, with key indices counted in the gathered keys, positions ascending.
        moves: `pack_moves`.
        pieces: int64 [pieces, 5]: the fields of `Piece`. The own keys are the pieces of the first move.
        order: int64 [gathered keys]: where the own keys and those received stand, one move after the other.
    """

    hops: torch.Tensor
    rows: torch.Tensor
    moves: torch.Tensor
    pieces: torch.Tensor
    order: torch.Tensor


def gather_plan(schedule: RingSchedule) -> GatherPlan:
    """How a rank gathers the keys that it needs; remembered."""
    return _gather_plan(schedule, schedule.hops)


@lru_cache(maxsize=CACHED_SCHEDULES)
def _gather_plan(schedule: RingSchedule, hops: tuple[Hop, ...]) -> GatherPlan:
    s, world, seq_len = schedule.seq_len // schedule.world, schedule.world, schedule.seq_len
    moves = build_moves(schedule)
    held = [schedule.layout.positions(hop.source, world, seq_len) for hop in hops]
    received = [positions[slice(*move.receive)] for positions, move in zip(held, moves, strict=True)]
    gathered = torch.cat(received).sort().values
    order = [torch.searchsorted(gathered, positions) for positions in received]
    pieces = []
    for i, move in enumerate(moves):
        pieces += _pieces(i, False, move.receive, received[i], order[i])
        pieces += _pieces(i, True, move.send, held[0][slice(*move.send)], order[0][slice(*move.send)])
    # Counted in the gathered keys: every visible key is among them.
    lo, hi = (torch.searchsorted(gathered, x.contiguous()) for x in schedule.mask.key_range(held[0], seq_len))
    block = KeyRange.of(lo, hi, len(gathered))
    table = torch.tensor([(p.move, p.is_sent, *p.keys, p.start) for p in pieces], dtype=torch.int64).view(-1, 5)
    return GatherPlan(*pack_hops([(0, block)], s), pack_moves(moves), table, torch.cat(order))


def unpack_pieces(table: torch.Tensor) -> list[Piece]:
    """The pieces of a `GatherPlan`."""
    return [Piece(move, bool(is_sent), Span(a, b), start) for move, is_sent, a, b, start in table.tolist()]


def _pieces(move: int, is_sent: bool, keys: Span, positions: torch.Tensor, places: torch.Tensor) -> list[Piece]:
    """One for each run of consecutive positions; the sender and the receiver of keys find the same."""
    runs = _runs(positions)
    if len(runs) > MAX_RUNS:
        return [Piece(move, is_sent, keys, -1)]
    return [Piece(move, is_sent, Span(keys.first + a, keys.first + b), int(places[a])) for a, b in runs]


def _runs(positions: torch.Tensor) -> list[Span]:
    """Index spans of consecutive positions; more than `MAX_RUNS` are not told apart any further."""
    if not len(positions):
        return []
    ends = (positions.diff() != 1).nonzero().flatten()[: MAX_RUNS + 1] + 1
    bounds = [0, *ends.tolist(), len(positions)]
    return [Span(a, b) for a, b in itertools.pairwise(bounds)]
