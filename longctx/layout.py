"""Layouts: which global positions each rank of a ring holds. Positions of a rank are always ascending.

That one rule makes the visible keys of a row an interval of local indices on every shard pair (`local_range`), for
every mask and every layout; no code anywhere else knows about particular layouts.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from longctx.balance import balanced_blocks, fastest_shards
from longctx.errors import PlanError, ShapeError, did_you_mean
from longctx.masks import AttentionMask, Causal, KeyRange


class SequenceLayout(ABC):
    """An assignment of the positions 0..seq_len-1 to `world` ranks in equal shares, ascending on each rank."""

    name: str
    # Whether positions depend on the mask; then `for_mask` says how.
    fits_masks = False

    @abstractmethod
    def multiple(self, world: int) -> int:
        """`seq_len` must be a multiple of this. (`SequenceMeta` pads any length to one.)"""

    def for_mask(self, mask: AttentionMask, world: int, seq_len: int) -> SequenceLayout:
        """The layout that stands for this one where `mask` is attended with: itself, unless it is made to fit masks.

        By arithmetic alone, so that every rank comes to the same.
        """
        return self

    @abstractmethod
    def _positions(self, rank: int, world: int, seq_len: int) -> torch.Tensor: ...

    def positions(self, rank: int, world: int, seq_len: int) -> torch.Tensor:
        """Global positions that `rank` holds: int64 [seq_len / world], strictly ascending.

        Raises:
            PlanError: `seq_len` cannot be cut so; names the nearest lengths that can.
        """
        self.check(world, seq_len)
        if not 0 <= rank < world:
            raise PlanError(f"rank {rank} is not one of the {world} ranks of this layout")
        positions = self._positions(rank, world, seq_len).contiguous()
        assert bool((positions[1:] > positions[:-1]).all()), f"layout {self.name}: positions of a rank must ascend"
        return positions

    def check(self, world: int, seq_len: int) -> None:
        """Raise PlanError if `seq_len` cannot be cut for `world` ranks."""
        if world < 1:
            raise PlanError(f"{self.name} over {world} ranks: a sequence is cut over at least 1 rank")
        multiple = self.multiple(world)
        if seq_len < 1 or seq_len % multiple:
            raise PlanError(
                f"seq_len = {seq_len:_} is not a multiple of {multiple} ({self.name} over {world} ranks)\n"
                f"       nearest: {nearest_lengths(seq_len, multiple)}"
            )

    def shard(self, x: torch.Tensor, rank: int, world: int, dim: int = 1) -> torch.Tensor:
        """The part of the whole-sequence tensor `x` that `rank` holds; `dim` is the sequence dim."""
        return x.index_select(dim, self.positions(rank, world, x.shape[dim]).to(x.device))

    def unshard(self, shards: Sequence[torch.Tensor], dim: int = 1) -> torch.Tensor:
        """The whole-sequence tensor from every rank's shard, in rank order: the inverse of `shard`.

        Raises:
            ShapeError: the shards are not of one length.
        """
        if len({x.shape[dim] for x in shards}) != 1:
            raise ShapeError(f"shards of lengths {[x.shape[dim] for x in shards]}: each rank holds an equal share")
        joined = torch.cat(list(shards), dim)
        world, seq_len = len(shards), joined.shape[dim]
        order = torch.cat([self.positions(r, world, seq_len) for r in range(world)])
        return joined.index_select(dim, order.argsort().to(joined.device))

    def local_range(self, mask: AttentionMask, q_rank: int, k_rank: int, world: int, seq_len: int) -> KeyRange:
        """What the queries on `q_rank` see of the keys on `k_rank`, in local indices. Exact for every mask."""
        lo, hi = self.local_bounds(mask, q_rank, k_rank, world, seq_len)
        return KeyRange.of(lo, hi, seq_len // world)

    def local_bounds(
        self, mask: AttentionMask, q_rank: int, k_rank: int, world: int, seq_len: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`local_range` as tensors: int64 [s] or [b, s]. Empty rows have lo == hi."""
        lo, hi = mask.key_range(self.positions(q_rank, world, seq_len), seq_len)
        k_pos = self.positions(k_rank, world, seq_len)
        return torch.searchsorted(k_pos, lo.contiguous()), torch.searchsorted(k_pos, hi.contiguous())

    def balance(self, mask: AttentionMask, world: int, seq_len: int) -> torch.Tensor:
        """Work of each rank at each ring distance: int64 [world, world], visible pairs; `[r, i]` is rank r with the
        keys of rank (r - i) % world. Its sum is `mask.area(seq_len)`."""
        work = torch.zeros(world, world, dtype=torch.int64)
        for rank in range(world):
            for distance in range(world):
                lo, hi = self.local_bounds(mask, rank, (rank - distance) % world, world, seq_len)
                work[rank, distance] = (hi - lo).sum()
        return work


@dataclass(frozen=True)
class Contiguous(SequenceLayout):
    """Rank r holds the r-th piece. Simple, and unbalanced under a causal mask.

    0 0 0 0 1 1 1 1
    """

    name = "contiguous"

    def multiple(self, world: int) -> int:
        return world

    def _positions(self, rank: int, world: int, seq_len: int) -> torch.Tensor:
        share = seq_len // world
        return torch.arange(rank * share, (rank + 1) * share)


@dataclass(frozen=True)
class ZigZag(SequenceLayout):
    """2 * world chunks; rank r holds chunks r and 2 * world - 1 - r. Equal causal work on every rank and hop.

    0 0 1 1 1 1 0 0

    Source: the balanced layout of zigzag ring attention (ring-flash-attention; Llama 3, arXiv 2407.21783, section 3.3.2).
    """

    name = "zigzag"

    def multiple(self, world: int) -> int:
        return 2 * world if world > 1 else 1

    def _positions(self, rank: int, world: int, seq_len: int) -> torch.Tensor:
        if world == 1:
            return torch.arange(seq_len)
        chunk = seq_len // (2 * world)
        late = 2 * world - 1 - rank
        return torch.cat(
            [torch.arange(rank * chunk, (rank + 1) * chunk), torch.arange(late * chunk, (late + 1) * chunk)]
        )


@dataclass(frozen=True)
class Striped(SequenceLayout):
    """Blocks of `block` tokens dealt out in turn. Balanced for any mask that changes slowly along the sequence.

    0 1 0 1 0 1 0 1      block 1

    Source: Brandon et al. 2023 (arXiv 2311.09431).
    """

    block: int = 1
    name = "striped"

    def __post_init__(self) -> None:
        if self.block < 1:
            raise PlanError(f"Striped(block={self.block}): a block holds at least 1 token")

    def multiple(self, world: int) -> int:
        return world * self.block if world > 1 else 1

    def _positions(self, rank: int, world: int, seq_len: int) -> torch.Tensor:
        if world == 1:
            return torch.arange(seq_len)
        return torch.arange(seq_len).view(-1, world, self.block)[:, rank].reshape(-1)


@dataclass(frozen=True)
class Balanced(SequenceLayout):
    """Blocks of up to 128 tokens, one of each round for every rank, so that all ranks have equal areas of one mask.

    Made for packed documents, whose work is anywhere: see `balanced_blocks`. Areas differ by less than 2 % of the mean
    wherever blocks of 8 tokens can do that. O(seq_len) on the CPU for a new mask: 40 ms for a million tokens.

    0 1 2 3 0 1 3 2 0 1 2 3      two ranks swapped their blocks of the second round

    Args:
        fitted: the mask. None: the one that `for_mask` is given, and Causal() where nobody is asked.
    """

    fitted: AttentionMask | None = None
    name = "balanced"
    fits_masks = True

    def multiple(self, world: int) -> int:
        return world

    def for_mask(self, mask: AttentionMask, world: int, seq_len: int) -> SequenceLayout:
        return self if self.fitted is not None else Balanced(mask)

    def _positions(self, rank: int, world: int, seq_len: int) -> torch.Tensor:
        starts, lengths = balanced_blocks(self.fitted or Causal(), world, seq_len)
        # Each block's first position less the local index where it goes.
        shift = starts[:, rank] - np.concatenate([[0], lengths[:-1].cumsum()])
        return torch.from_numpy(np.arange(lengths.sum()) + np.repeat(shift, lengths))


# In the order of how few pieces a shard consists of, which decides between equally fast ones.
LAYOUTS: dict[str, SequenceLayout] = {x.name: x for x in (Contiguous(), ZigZag(), Balanced(), Striped())}


@dataclass(frozen=True)
class Auto(SequenceLayout):
    """For each mask the layout whose ring takes least time over it, and of several the one with the fewest pieces.

    By `longctx.balance.ring_time`: the slowest rank of every hop, in tiles that a kernel works on, or the hop's message. The
    first choice for each kind of mask is logged with its reason. O(ring * seq_len / 128) on the CPU beyond `Balanced`.
    """

    name = "auto"
    fits_masks = True

    def multiple(self, world: int) -> int:
        return math.lcm(*(layout.multiple(world) for layout in LAYOUTS.values()))

    def for_mask(self, mask: AttentionMask, world: int, seq_len: int) -> SequenceLayout:
        return _fastest(mask, world, seq_len)

    def _positions(self, rank: int, world: int, seq_len: int) -> torch.Tensor:
        return self.for_mask(Causal(), world, seq_len).positions(rank, world, seq_len)


@lru_cache(maxsize=16)
def _fastest(mask: AttentionMask, world: int, seq_len: int) -> SequenceLayout:
    if world == 1:
        return LAYOUTS["contiguous"]
    fitted = {name: layout.for_mask(mask, world, seq_len) for name, layout in LAYOUTS.items()}
    shards = {name: [x.positions(rank, world, seq_len) for rank in range(world)] for name, x in fitted.items()}
    return fitted[fastest_shards(mask, shards, seq_len)]


def layout_names() -> tuple[str, ...]:
    """Names that `get_layout` knows."""
    return (*LAYOUTS, Auto.name)


def get_layout(name: str) -> SequenceLayout:
    """The layout of that name.

    Raises:
        PlanError: unknown name; names the nearest.
    """
    if name == Auto.name:
        return Auto()
    if name not in LAYOUTS:
        raise PlanError(f"unknown layout {name!r}: {did_you_mean(name, layout_names())}")
    return LAYOUTS[name]


def nearest_lengths(seq_len: int, multiple: int) -> str:
    """The lengths next to `seq_len` that `multiple` divides, as text."""
    below = seq_len // multiple * multiple
    return f"{below:_} or {below + multiple:_}" if below > 0 else f"{multiple:_}"
