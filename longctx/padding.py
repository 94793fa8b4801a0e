"""Sequences of any length: positions behind the end, which fill up the last shards and take part in nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longctx.errors import ShapeError
from longctx.masks import AttentionMask


@dataclass(frozen=True)
class Padded(AttentionMask):
    """`mask` on the first `seq_len` positions; those behind them see nothing, and nobody sees them.

        # . . .      Causal() padded from 3 positions to 4
        # # . .
        # # # .
        . . . .

    Args:
        mask: of the sequence itself.
        seq_len: positions of the sequence itself.
    """

    mask: AttentionMask
    seq_len: int

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise ShapeError(f"Padded(seq_len={self.seq_len}): a sequence has at least 1 position")

    @property
    def batch(self) -> int | None:
        return self.mask.batch

    def key_range(self, q_pos: torch.Tensor, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        if seq_len < self.seq_len:
            raise ShapeError(f"a sequence of {self.seq_len:_} positions cannot be padded to {seq_len:_}")
        # Ascending positions: those of the sequence come first.
        real = int((q_pos < self.seq_len).sum())
        lo, hi = self.mask.key_range(q_pos[:real], self.seq_len)
        # An empty interval at the end, where no earlier row's may be further on.
        behind = lo.new_full((*lo.shape[:-1], len(q_pos) - real), self.seq_len)
        return torch.cat([lo, behind], -1), torch.cat([hi, behind], -1)


def padded(mask: AttentionMask, seq_len: int, length: int) -> AttentionMask:
    """`mask`, of `seq_len` positions, on `length` of them."""
    return mask if length == seq_len else Padded(mask, seq_len)


def padded_length(seq_len: int, multiple: int) -> int:
    """The least multiple of `multiple` that holds `seq_len` positions."""
    return -(-seq_len // multiple) * multiple
