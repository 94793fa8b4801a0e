"""Where the tokens of a shard stand in the whole sequence, which is padded until it can be cut evenly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from longctx.errors import PlanError, ShapeError
from longctx.layout import SequenceLayout, ZigZag, get_layout
from longctx.masks import AttentionMask, Causal
from longctx.padding import padded, padded_length


def shard_multiple(layout: SequenceLayout, ring: int, ulysses: int, local_multiple: int = 1) -> int:
    """What a length must be a multiple of for `layout` over a ring, each ring shard cut evenly over Ulysses ranks.

    Args:
        local_multiple: what the tokens of each rank must be a multiple of.
    """
    return math.lcm(layout.multiple(ring), ring * ulysses * local_multiple)


def padded_sequence(
    seq_len: int, mask: AttentionMask, layout: SequenceLayout, ring: int, ulysses: int, local_multiple: int = 1
) -> tuple[int, AttentionMask, SequenceLayout]:
    """The length to which a sequence is padded so that it can be cut evenly, and the mask and the layout on that length.

    Args:
        layout: one that fits masks is fitted to this one.
        ring, ulysses, local_multiple: as in `shard_multiple`.

    Raises:
        PlanError: there is nothing to cut, or nobody to cut it for.
    """
    if ring < 1:
        layout.check(ring, seq_len)
    if seq_len < 1:
        raise PlanError(f"seq_len = {seq_len:_}: a sequence has at least 1 position")
    length = padded_length(seq_len, shard_multiple(layout, ring, ulysses, local_multiple))
    mask = padded(mask, seq_len, length)
    return length, mask, layout.for_mask(mask, ring, length)


@dataclass(frozen=True, eq=False)
class SequenceMeta:
    """Where the tokens of a shard stand in the whole sequence, and who sees whom. Passed down through the model.

    The one place that says which positions a process holds: the layout's over the ring, and of those, in order, a
    contiguous piece for each Ulysses rank. So the pieces of a ring shard, put one behind the other, ascend again:

    0 0 1 1 2 2 3 3 3 3 2 2 1 1 0 0      zigzag over ring 4
    0 0 2 2 4 4 6 6 7 7 5 5 3 3 1 1      over ring 4 x ulysses 2: ring rank r is ranks 2r and 2r + 1

    A sequence of any length is padded to the next that can be cut evenly: `positions` from `seq_len` on are padding, which
    sees nothing and is seen by nobody. `shard` fills it in and `unshard` drops it.

    Args:
        seq_len: global length S, without padding.
        mask: on global positions.
        layout: how the padded sequence is cut over the ring; one that fits masks is fitted to `mask`.
        ring_rank, ring_world: this shard's place on the ring.
        positions: int64 [s], the global positions of the local tokens, ascending.
        ulysses_rank, ulysses_world: which piece of the ring rank's shard this is.

    Make one with `SequenceMeta.of`.
    """

    seq_len: int
    mask: AttentionMask
    layout: SequenceLayout
    ring_rank: int
    ring_world: int
    positions: torch.Tensor
    ulysses_rank: int = 0
    ulysses_world: int = 1

    @staticmethod
    def of(
        seq_len: int,
        *,
        mask: AttentionMask | None = None,
        layout: SequenceLayout | str | None = None,
        ring_rank: int = 0,
        ring_world: int = 1,
        ulysses_rank: int = 0,
        ulysses_world: int = 1,
        local_multiple: int = 1,
        device: torch.device | str = "cpu",
    ) -> SequenceMeta:
        """The meta of one shard; causal and zigzag unless said otherwise.

        Args:
            layout: one, or the name of one, such as "auto".
            local_multiple: pad until the local tokens are a multiple of this: `ParallelPlan.local_multiple`.

        Raises:
            PlanError: there is no such rank or layout, or nothing to cut.
        """
        mask = mask or Causal()
        layout = get_layout(layout) if isinstance(layout, str) else layout or ZigZag()
        if not 0 <= ulysses_rank < ulysses_world:
            raise PlanError(f"ulysses rank {ulysses_rank} is not one of {ulysses_world}")
        length, _, layout = padded_sequence(seq_len, mask, layout, ring_world, ulysses_world, local_multiple)
        positions = layout.positions(ring_rank, ring_world, length)
        mine = positions.view(ulysses_world, -1)[ulysses_rank].to(device)
        return SequenceMeta(seq_len, mask, layout, ring_rank, ring_world, mine, ulysses_rank, ulysses_world)

    @property
    def local_len(self) -> int:
        return self.positions.shape[0]

    @property
    def padded_len(self) -> int:
        """Positions of all shards together: `seq_len` and the padding."""
        return self.local_len * self.ring_world * self.ulysses_world

    @property
    def padded_mask(self) -> AttentionMask:
        """`mask` on `padded_len` positions: what attention over the shards is computed with."""
        return padded(self.mask, self.seq_len, self.padded_len)

    def shard(self, x: torch.Tensor, dim: int = 1, *, fill: float | None = None) -> torch.Tensor:
        """The part of the whole-sequence tensor `x` that stands at `positions`; `dim` is the sequence dim.

        Args:
            fill: what stands at padding. Needed where there is any, on every rank alike: -100 for labels, so that padding is
                no target, and anything that can be computed with for the rest.

        Raises:
            ShapeError: `x` is not of `seq_len` positions; there is padding, but no `fill`.
        """
        if x.shape[dim] != self.seq_len:
            raise ShapeError(f"a tensor of {x.shape[dim]:_} positions is not the whole sequence of {self.seq_len:_}")
        positions = self.positions.to(x.device)
        if self.padded_len == self.seq_len:
            return x.index_select(dim, positions)
        if fill is None:
            raise ShapeError(
                f"{self.seq_len:_} positions are padded to {self.padded_len:_}, but nothing says what stands there\n"
                "       give shard(x, fill=-100) for labels, shard(x, fill=0) for tokens and the like"
            )
        part = x.index_select(dim, positions.clamp(max=self.seq_len - 1))
        # From the front: dims after the sequence's are in the mask by broadcasting.
        is_padding = (positions >= self.seq_len).view(-1, *(1 for _ in range(x.ndim - 1 - dim % x.ndim)))
        return part.masked_fill(is_padding, fill)

    def unshard(self, shards: Sequence[torch.Tensor], dim: int = 1) -> torch.Tensor:
        """The whole-sequence tensor from the shards of all ranks, in the order ring_rank * ulysses_world + ulysses_rank, without
        padding: the inverse of `shard`.

        Raises:
            ShapeError: not one shard of `local_len` positions for each rank.
        """
        if [x.shape[dim] for x in shards] != [self.local_len] * (self.ring_world * self.ulysses_world):
            raise ShapeError(
                f"shards of lengths {[x.shape[dim] for x in shards]}: expected {self.ring_world * self.ulysses_world} of "
                f"{self.local_len:_} positions"
            )
        u = self.ulysses_world
        of_ring = [torch.cat(list(shards[i : i + u]), dim) for i in range(0, len(shards), u)]
        return self.layout.unshard(of_ring, dim).narrow(dim, 0, self.seq_len)

    def to(self, device: torch.device | str) -> SequenceMeta:
        """The same on `device`."""
        return replace(self, positions=self.positions.to(device, non_blocking=True))
