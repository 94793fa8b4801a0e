"""Ring schedules: which hops a rank makes and what it may see at each, by arithmetic that every rank can do alone.

At the hop of distance i a rank works on the keys of the ring rank i behind it. A distance at which no rank of the ring
has any work is left out on all of them, so that every rank sends and receives the same messages.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch

from longctx.layout import SequenceLayout
from longctx.masks import AttentionMask, KeyRange

# Rows of each rank that are looked at first to see that a distance has work; most masks need no second look.
SAMPLED_ROWS = 64

# A schedule with interval tables holds about 16 bytes a key of the whole sequence. One is in use at a time, or one for
# each kind of mask in the model; the rest are waiting for their backward pass.
CACHED_SCHEDULES = 8

_KINDS = ("empty", "full", "band", "rows")


@dataclass(frozen=True, eq=False)
class Hop:
    """One block of work of one rank.

    Args:
        distance: how far behind on the ring the keys' rank is; 0 is the rank itself.
        source: the ring rank whose keys these are.
        key_range: what the local queries see of them.
        area: visible (query, key) pairs, summed over the sequences that the mask distinguishes.
    """

    distance: int
    source: int
    key_range: KeyRange
    area: int


@dataclass(frozen=True)
class RingSchedule:
    """The hops of one rank, distance 0 first and always there.

    Equal on every rank but for `rank` and what the hops see: `distances` and `digest` are the same. Make one with
    `RingSchedule.build`.
    """

    mask: AttentionMask
    layout: SequenceLayout
    rank: int
    world: int
    seq_len: int
    hops: tuple[Hop, ...] = field(compare=False, repr=False)

    @staticmethod
    def build(mask: AttentionMask, layout: SequenceLayout, rank: int, world: int, seq_len: int) -> RingSchedule:
        """The schedule of `rank` in a ring of `world`; the last few are remembered.

        O(seq_len) work on the CPU where sampled rows show that every distance has work, up to O(world * seq_len) where
        some seem to have none and that must be proven.

        Raises:
            PlanError: the layout cannot cut `seq_len`, or there is no such rank.
            ShapeError: the mask is for another length.
        """
        return _build(mask, layout, rank, world, seq_len)

    @property
    def distances(self) -> tuple[int, ...]:
        return tuple(hop.distance for hop in self.hops)

    @property
    def area(self) -> int:
        """Visible pairs of this rank: its share of `mask.area`."""
        return sum(hop.area for hop in self.hops)

    @cached_property
    def digest(self) -> str:
        """A hash of what all ranks must agree on, down to every interval of the mask; for comparing ranks. O(seq_len)."""
        lo, hi = self.mask.key_range(torch.arange(self.seq_len), self.seq_len)
        content = hashlib.blake2b(repr((self.layout, self.world, self.seq_len, self.distances)).encode(), digest_size=8)
        for ends in (lo, hi):
            content.update(ends.to(torch.int32).contiguous().numpy().tobytes())
        return content.hexdigest()

    @cached_property
    def packed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The hops as `pack_hops` makes them."""
        return pack_hops([(hop.distance, hop.key_range) for hop in self.hops], self.seq_len // self.world)


def pack_hops(hops: Sequence[tuple[int, KeyRange]], num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hops as CPU tensors, which a custom op can take: `unpack_hops` is the inverse.

    Args:
        hops: distance and key range of each.
        num_rows: local queries.

    Returns:
        table: int64 [hops, 4]: distance, kind, lo, hi.
        rows: int32 [hops of kind rows, 2, b or 1, num_rows].
    """
    table: list[tuple[int, int, int | torch.Tensor, int | torch.Tensor]] = []
    rows = []
    for distance, kr in hops:
        if isinstance(kr.lo, torch.Tensor) and isinstance(kr.hi, torch.Tensor):
            table.append((distance, _KINDS.index(kr.kind), 0, 0))
            rows.append(torch.stack([kr.lo, kr.hi]))
        else:
            table.append((distance, _KINDS.index(kr.kind), kr.lo, kr.hi))
    empty = torch.empty(0, 2, 1, num_rows, dtype=torch.int32)
    # One hop may tell the sequences of a batch apart where another does not.
    batch = max((r.shape[1] for r in rows), default=1)
    stacked = torch.stack([r.expand(2, batch, -1) for r in rows]) if rows else empty
    return torch.tensor(table, dtype=torch.int64), stacked


def unpack_hops(table: torch.Tensor, rows: torch.Tensor) -> list[tuple[int, KeyRange]]:
    """(distance, key range) of each hop, from `pack_hops`."""
    hops, intervals = [], iter(rows)
    for distance, kind, lo, hi in table.tolist():
        if _KINDS[kind] == "rows":
            row_lo, row_hi = next(intervals)
            hops.append((distance, KeyRange("rows", row_lo, row_hi)))
        else:
            hops.append((distance, KeyRange(_KINDS[kind], lo, hi)))  # type: ignore[arg-type]
    return hops


class CommBytes(NamedTuple):
    """Payload that one rank sends for one attention call."""

    forward: int
    backward: int


def comm_bytes(
    schedule: RingSchedule, *, batch: int, num_kv_heads: int, head_dim: int, itemsize: int, grad_itemsize: int = 4
) -> CommBytes:
    """What each rank sends; the same on all of them.

    Args:
        itemsize: bytes of one element of k and v.
        grad_itemsize: bytes of one element of their gradients on the wire.

    Forward: K and V once for every hop but the first. Backward: K and V once less, because the last block was kept and the
    own block is at home; their gradients once for every hop but the first.
    """
    elements = 2 * batch * (schedule.seq_len // schedule.world) * num_kv_heads * head_dim
    moves = len(schedule.hops) - 1
    return CommBytes(
        moves * elements * itemsize, max(0, moves - 1) * elements * itemsize + moves * elements * grad_itemsize
    )


def ulysses_comm_bytes(
    *,
    ulysses: int,
    batch: int,
    local_len: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    itemsize: int,
    lse_itemsize: int = 0,
    holds: bool = True,
) -> CommBytes:
    """What each rank sends to the other Ulysses ranks; a ring inside comes on top, with `1 / ulysses` of the key heads.

    Args:
        local_len: tokens of one rank.
        num_heads, num_kv_heads: before they are divided; key heads fewer than ranks are repeated on the wire.
        itemsize: bytes of one element of q, k, v, out and of their gradients.
        lse_itemsize: bytes of one element of lse, where it is asked for and has a gradient.
        holds: whether what came for the forward pass stays for the backward pass. Else all of it is sent again.

    Of the queries, keys, values and outputs of its tokens a rank keeps one share of the heads and sends the others.
    """
    heads = 2 * num_heads + 2 * max(num_kv_heads, ulysses)
    inputs = batch * local_len * heads * head_dim * itemsize
    payload = inputs + batch * local_len * num_heads * lse_itemsize
    forward, again = (x // ulysses * (ulysses - 1) for x in (payload, inputs))
    return CommBytes(forward, forward + (0 if holds else again))


@lru_cache(maxsize=CACHED_SCHEDULES)
def _build(mask: AttentionMask, layout: SequenceLayout, rank: int, world: int, seq_len: int) -> RingSchedule:
    live = _live_distances(mask, layout, world, seq_len)
    hops = []
    for distance in live:
        source = (rank - distance) % world
        lo, hi = layout.local_bounds(mask, rank, source, world, seq_len)
        key_range = KeyRange.of(lo, hi, seq_len // world)
        hops.append(Hop(distance, source, key_range, int((hi - lo).sum())))
    return RingSchedule(mask, layout, rank, world, seq_len, tuple(hops))


@lru_cache(maxsize=CACHED_SCHEDULES)
def _live_distances(mask: AttentionMask, layout: SequenceLayout, world: int, seq_len: int) -> tuple[int, ...]:
    """Distances at which any rank of the ring sees anything, ascending; 0 is always among them."""
    if world == 1:
        return (0,)
    live = {0}
    positions = [layout.positions(r, world, seq_len) for r in range(world)]
    sample = sampled_rows(seq_len // world)
    for q_rank, k_rank in itertools.product(range(world), repeat=2):
        distance = (q_rank - k_rank) % world
        if distance not in live:
            lo, hi = mask.key_range(positions[q_rank][sample], seq_len)
            first, last = (torch.searchsorted(positions[k_rank], x.contiguous()) for x in (lo, hi))
            if bool((last > first).any()):
                live.add(distance)
    if len(live) < world:
        live |= _proven_distances(mask, positions, world, seq_len)
    return tuple(sorted(live))


def sampled_rows(local_len: int) -> torch.Tensor:
    """Up to `SAMPLED_ROWS` local rows, spread evenly, the first and the last among them."""
    return torch.linspace(0, local_len - 1, min(SAMPLED_ROWS, local_len), dtype=torch.float64).long().unique()


def _proven_distances(mask: AttentionMask, positions: list[torch.Tensor], world: int, seq_len: int) -> set[int]:
    """The same, from every row."""
    live = set()
    lo, hi = mask.key_range(torch.arange(seq_len), seq_len)
    owner = torch.empty(seq_len, dtype=torch.int64)
    for rank in range(world):
        owner[positions[rank]] = rank
    for k_rank in range(world):
        # before[x]: how many keys of k_rank lie before position x.
        before = torch.zeros(seq_len + 1, dtype=torch.int32)
        before[positions[k_rank] + 1] = 1
        before = before.cumsum(0, dtype=torch.int32)
        sees = before[hi] > before[lo]
        rows = sees.any(0) if sees.ndim == 2 else sees
        live |= {(q_rank - k_rank) % world for q_rank in owner[rows].unique().tolist()}
    return live
