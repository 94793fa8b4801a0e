"""Attention masks as key intervals: for each query position, one half-open interval of visible key positions.

Full, causal, sliding-window, document, prefix and any intersection of these have that form, and both ends of the
interval never decrease from one query to the next. Layouts keep positions ascending, so on any shard the visible keys
of a row are again one interval, of local indices: `KeyRange`, which is all that a kernel ever sees.
"""

from __future__ import annotations

import itertools
import operator
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch

from longctx.errors import ShapeError

# A band end that no row reaches: |offset| beyond any local length, and far from the int32 limits.
UNBOUNDED = 1 << 29


class AttentionMask(ABC):
    """Who sees whom, as an immutable, hashable rule on global positions.

    A mask may differ between the sequences of a batch; then `batch` is their number and the intervals are [b, s].
    """

    @property
    def batch(self) -> int | None:
        """Number of sequences this mask distinguishes; None if one rule holds for all."""
        return None

    @abstractmethod
    def key_range(self, q_pos: torch.Tensor, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Visible keys `[lo, hi)` of each query.

        Args:
            q_pos: int64 [s], ascending global positions in [0, seq_len).
            seq_len: global length.

        Returns:
            lo, hi: int64 [s] or [b, s], with 0 <= lo <= hi <= seq_len, both never decreasing along s. lo == hi: sees nothing.
        """

    def __and__(self, other: AttentionMask) -> AttentionMask:
        """Both rules at once. `Full()` is neutral."""
        if not isinstance(other, AttentionMask):
            return NotImplemented
        parts = [p for m in (self, other) for p in (m.parts if isinstance(m, Intersection) else (m,))]
        kept = [p for i, p in enumerate(parts) if not isinstance(p, Full) and p not in parts[:i]]
        if not kept:
            return Full()
        return kept[0] if len(kept) == 1 else Intersection(tuple(kept))

    def materialize(self, seq_len: int) -> torch.Tensor:
        """The mask as bool [S, S] or [b, S, S], True where the query (row) sees the key. For tests and pictures."""
        lo, hi = self.key_range(torch.arange(seq_len), seq_len)
        keys = torch.arange(seq_len)
        return (keys >= lo[..., None]) & (keys < hi[..., None])

    def area(self, seq_len: int) -> int:
        """Exact number of visible (query, key) pairs, summed over `batch` where the sequences differ. O(S) work."""
        lo, hi = self.key_range(torch.arange(seq_len), seq_len)
        return int((hi - lo).sum())


@dataclass(frozen=True)
class Full(AttentionMask):
    """Every query sees every key.

    # # # #
    # # # #
    # # # #
    # # # #
    """

    def key_range(self, q_pos: torch.Tensor, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros_like(q_pos), torch.full_like(q_pos, seq_len)


@dataclass(frozen=True)
class Causal(AttentionMask):
    """A query sees itself and what came before.

    # . . .
    # # . .
    # # # .
    # # # #
    """

    def key_range(self, q_pos: torch.Tensor, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros_like(q_pos), q_pos + 1


@dataclass(frozen=True)
class SlidingWindow(AttentionMask):
    """A query sees the keys at distance less than `window`, on both sides; `& Causal()` leaves the left side.

    `SlidingWindow(w) & Causal()` shows `w` keys, the query's own included: the meaning of `sliding_window` in Mistral's
    and Qwen's configurations.

        # # . .      window 2
        # # # .
        . # # #
        . . # #

    Args:
        window: >= 1; 1 leaves the diagonal.

    Source: Beltagy et al. 2020 (arXiv 2004.05150), section 3.1.
    """

    window: int

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ShapeError(f"SlidingWindow(window={self.window}): a window is at least 1 (1 leaves the diagonal)")

    def key_range(self, q_pos: torch.Tensor, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        return (q_pos - self.window + 1).clamp(min=0), (q_pos + self.window).clamp(max=seq_len)


@dataclass(frozen=True)
class Documents(AttentionMask):
    """A query sees its own document only.

        # # . .      cu_seqlens (0, 2, 4)
        # # . .
        . . # #
        . . # #

    Args:
        cu_seqlens: document boundaries, starting at 0 and never decreasing; the last one is the sequence length. A tuple
            of such tuples gives each sequence of the batch its own boundaries. Lists are turned into tuples.
    """

    cu_seqlens: tuple[int, ...] | tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "cu_seqlens", _as_tuples(self.cu_seqlens))
        for row in self._rows:
            if len(row) < 2 or row[0] != 0 or any(b < a for a, b in itertools.pairwise(row)):
                raise ShapeError(
                    f"Documents: boundaries {list(row[:8])}... must start at 0, never decrease and end at the length"
                )
        if len({row[-1] for row in self._rows}) > 1:
            raise ShapeError(
                f"Documents: sequences of one batch end at {sorted({r[-1] for r in self._rows})}, not at one length"
            )

    @cached_property
    def _rows(self) -> tuple[tuple[int, ...], ...]:
        return self.cu_seqlens if self._is_batched else (self.cu_seqlens,)  # type: ignore[return-value]

    @property
    def _is_batched(self) -> bool:
        return bool(self.cu_seqlens) and isinstance(self.cu_seqlens[0], tuple)

    @property
    def batch(self) -> int | None:
        return len(self._rows) if self._is_batched else None

    def key_range(self, q_pos: torch.Tensor, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self._rows[0][-1] != seq_len:
            raise ShapeError(
                f"Documents: boundaries end at {self._rows[0][-1]}, but the sequence has {seq_len} positions"
            )
        ranges = []
        q_pos = q_pos.contiguous()  # searchsorted warns otherwise
        for row in self._rows:
            cu = torch.tensor(row, device=q_pos.device)
            doc = torch.searchsorted(cu, q_pos, right=True)
            ranges.append((cu[doc - 1], cu[doc]))
        if self.batch is None:
            return ranges[0]
        return torch.stack([lo for lo, _ in ranges]), torch.stack([hi for _, hi in ranges])


@dataclass(frozen=True)
class PrefixLM(AttentionMask):
    """The first `prefix` positions see each other; the rest is causal.

        # # . .      prefix 2
        # # . .
        # # # .
        # # # #

    Source: Raffel et al. 2020 (arXiv 1910.10683), section 3.2.1.
    """

    prefix: int

    def __post_init__(self) -> None:
        if self.prefix < 0:
            raise ShapeError(f"PrefixLM(prefix={self.prefix}): a prefix is at least 0 (0 is causal)")

    def key_range(self, q_pos: torch.Tensor, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros_like(q_pos), (q_pos + 1).clamp(min=min(self.prefix, seq_len))


@dataclass(frozen=True)
class Intersection(AttentionMask):
    """What all `parts` show; made by `&`."""

    parts: tuple[AttentionMask, ...]

    def __post_init__(self) -> None:
        if len({p.batch for p in self.parts if p.batch is not None}) > 1:
            raise ShapeError(
                f"masks for different numbers of sequences cannot be combined: {[p.batch for p in self.parts]}"
            )

    @property
    def batch(self) -> int | None:
        return next((p.batch for p in self.parts if p.batch is not None), None)

    def key_range(self, q_pos: torch.Tensor, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        lo, hi = self.parts[0].key_range(q_pos, seq_len)
        for part in self.parts[1:]:
            other_lo, other_hi = part.key_range(q_pos, seq_len)
            lo, hi = torch.maximum(lo, other_lo), torch.minimum(hi, other_hi)
        return lo, torch.maximum(lo, hi)


@dataclass(frozen=True, eq=False)
class KeyRange:
    """The visible keys of each query row of one shard pair, as local indices: what a kernel is told.

    * `empty`: no row sees anything.
    * `full`: every row sees all `sk` keys.
    * `band`: row i sees keys [i + lo, i + hi), cut to [0, sk); `lo`, `hi` are ints (`UNBOUNDED` = no end on that side).
    * `rows`: row i of sequence n sees keys [lo[n, i], hi[n, i]); `lo`, `hi` are int32 [1 or b, sq], contiguous, with
      0 <= lo <= hi <= sk and never decreasing along a row of the tensor.

    Make one with `KeyRange.of`, which finds the cheapest kind.
    """

    kind: Literal["empty", "full", "band", "rows"]
    lo: int | torch.Tensor = -UNBOUNDED
    hi: int | torch.Tensor = UNBOUNDED
    _per_device: dict = field(default_factory=dict, repr=False)

    @staticmethod
    def empty() -> KeyRange:
        return KeyRange("empty")

    @staticmethod
    def full() -> KeyRange:
        return KeyRange("full")

    @staticmethod
    def causal() -> KeyRange:
        """Row i sees keys [0, i]: the diagonal hop of a causal mask, in every layout."""
        return KeyRange("band", -UNBOUNDED, 1)

    @staticmethod
    def of(lo: torch.Tensor, hi: torch.Tensor, sk: int) -> KeyRange:
        """The cheapest kind that says the same as the intervals `lo`, `hi`: int [sq] or [b, sq], within [0, sk].

        Raises:
            ShapeError: the intervals break the rules that kernels rely on, named with the first row that does.
        """
        lo, hi = torch.atleast_2d(lo.cpu()), torch.atleast_2d(hi.cpu())
        _check_intervals(lo, hi, sk)
        if not bool((hi > lo).any()):
            return KeyRange.empty()
        if bool((lo <= 0).all()) and bool((hi >= sk).all()):
            return KeyRange.full()
        band_lo, band_hi = _offset(lo, sk, unseen=-UNBOUNDED), _offset(hi, sk, unseen=UNBOUNDED)
        if band_lo is not None and band_hi is not None:
            return KeyRange("band", band_lo, band_hi)
        return KeyRange("rows", lo.to(torch.int32).contiguous(), hi.to(torch.int32).contiguous())

    def bounds(self, sq: int, sk: int, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """The intervals as int32 tensors `lo`, `hi` [1 or b, sq] on `device`, whatever the kind. Cached per device."""
        key = (sq, sk, str(device))
        if key not in self._per_device:
            if self.kind == "rows":
                assert isinstance(self.lo, torch.Tensor)
                assert isinstance(self.hi, torch.Tensor)
                lo, hi = self.lo, self.hi
                if lo.shape[-1] != sq:
                    raise ShapeError(f"KeyRange has {lo.shape[-1]} rows, but q has {sq}")
                if sq and int(hi[:, -1].max()) > sk:
                    raise ShapeError(f"KeyRange shows keys up to {int(hi[:, -1].max())}, but k has {sk}")
            else:
                row = torch.arange(sq)[None]
                first, last = {"empty": (0 * row, 0 * row), "full": (0 * row, 0 * row + sk)}.get(
                    self.kind, (row + self.lo, row + self.hi)
                )
                lo = first.clamp(0, sk)
                hi = torch.maximum(lo, last.clamp(0, sk))
            self._per_device[key] = tuple(
                t.to(torch.int32).contiguous().to(device, non_blocking=True) for t in (lo, hi)
            )
        return self._per_device[key]

    def pairs(self, batch: int, sq: int, sk: int) -> int:
        """Visible (query, key) pairs of `batch` sequences together. Remembered."""
        key = ("pairs", sq, sk)
        if key not in self._per_device:
            lo, hi = self.bounds(sq, sk)
            self._per_device[key] = (int((hi - lo).sum(dtype=torch.int64)), lo.shape[0])
        total, told_apart = self._per_device[key]
        return total * batch // told_apart

    def transposed(self, sq: int, sk: int, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """For each key, the rows `[first, last)` that see it: int32 [1 or b, sk] each, never decreasing. Cached per device.

        Exact: the rows with `lo <= key` are a head and those with `hi > key` a tail of all rows, because both ends never
        decrease, and a row sees the key when it is in both. A tile of keys still holds rows that see only some of them.
        """
        key = ("transposed", sq, sk, str(device))
        if key not in self._per_device:
            lo, hi = self.bounds(sq, sk)
            keys = torch.arange(sk, dtype=torch.int32).expand(lo.shape[0], sk).contiguous()
            first = torch.searchsorted(hi, keys, right=True)
            last = torch.maximum(first, torch.searchsorted(lo, keys, right=True))
            self._per_device[key] = tuple(
                t.to(torch.int32).contiguous().to(device, non_blocking=True) for t in (first, last)
            )
        return self._per_device[key]

    @cached_property
    def rectangle(self) -> tuple[int, int, int, int] | None:
        """(first row, last row, first key, last key), half-open, if the kind is "rows" and the visible pairs are one
        rectangle: what zigzag's hops other than the diagonal are.

        None also for intervals that lie on a GPU: asking them would wait for it.
        """
        lo, hi = self.lo, self.hi
        if not isinstance(lo, torch.Tensor) or not isinstance(hi, torch.Tensor) or lo.device.type != "cpu":
            return None
        rows = (hi > lo).any(0).nonzero().flatten()
        if not len(rows):
            return None
        first, last = int(rows[0]), int(rows[-1]) + 1
        inside_lo, inside_hi = lo[:, first:last], hi[:, first:last]
        if not bool((inside_lo == inside_lo[0, 0]).all() and (inside_hi == inside_hi[0, 0]).all()):
            return None
        return first, last, int(inside_lo[0, 0]), int(inside_hi[0, 0])

    def area(self, sq: int, sk: int, batch: int = 1) -> int:
        """Visible pairs; intervals that hold for every sequence count `batch` times."""
        lo, hi = self.bounds(sq, sk)
        return int((hi.long() - lo).sum()) * (batch if lo.shape[0] == 1 else 1)


def _as_tuples(boundaries):
    """Nested lists or tuples of ints as tuples of plain ints, so that a mask can be hashed."""
    rows = tuple(boundaries)
    if any(isinstance(row, (tuple, list)) for row in rows):
        if not all(isinstance(row, (tuple, list)) for row in rows):
            raise ShapeError("Documents: boundaries are either one list of ints or one such list for each sequence")
        return tuple(_as_tuples(row) for row in rows)
    try:
        return tuple(operator.index(x) for x in rows)
    except TypeError as error:
        raise ShapeError(f"Documents: a boundary is not a whole number ({error})") from error


def _check_intervals(lo: torch.Tensor, hi: torch.Tensor, sk: int) -> None:
    """ShapeError unless 0 <= lo <= hi <= sk and neither end decreases along a row of the tensors."""
    if lo.shape != hi.shape or lo.ndim != 2:
        raise ShapeError(f"intervals lo {list(lo.shape)} and hi {list(hi.shape)} must both be [sq] or [b, sq]")
    bad = (lo < 0) | (hi < lo) | (hi > sk)
    bad[:, 1:] |= (lo[:, 1:] < lo[:, :-1]) | (hi[:, 1:] < hi[:, :-1])
    if bool(bad.any()):
        n, i = bad.nonzero()[0].tolist()
        before = f" after [{int(lo[n, i - 1])}, {int(hi[n, i - 1])})" if i else ""
        raise ShapeError(
            f"query row {i} of sequence {n} sees keys [{int(lo[n, i])}, {int(hi[n, i])}){before}: "
            f"intervals must lie in [0, {sk}) and neither end may decrease from one row to the next"
        )


def _offset(ends: torch.Tensor, sk: int, unseen: int) -> int | None:
    """The c with ends[:, i] == clamp(i + c, 0, sk) for every i, `unseen` where only the outer limit occurs, else None."""
    limit = 0 if unseen < 0 else sk
    if bool((ends == limit).all()):
        return unseen
    row = torch.arange(ends.shape[-1], dtype=ends.dtype)
    inside = ((ends > 0) & (ends < sk))[0].nonzero()
    if len(inside):
        i = int(inside[0])
        candidates = [int(ends[0, i]) - i]
    else:
        # All ends are 0 or sk: clamp(i + c) can only do that with a single step of height sk, at the first row with sk.
        first = int((ends[0] == sk).to(torch.int8).argmax())
        candidates = [sk - first]
    for c in candidates:
        if bool((ends == (row + c).clamp(0, sk)).all()):
            return c
    return None
