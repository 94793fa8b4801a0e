"""Masks as transformers describes them, as intervals of keys: of a rule that is asked pair by pair, and of a batch's tensors.

Causal and bidirectional attention, sliding windows, chunks, packed documents, blocks seen in both directions, padding and
caches all leave each row one interval of keys, around the row's own place. Its ends are found by bisection, so no
[S, S] tensor is ever made; a rule that leaves gaps is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.errors import KernelError, ShapeError
from longctx.masks import AttentionMask, Documents, Full, KeyRange
from longctx.parallel.schedule import pack_hops

# (sequence, head, query, key), tensors of places in the whole sequence -> whether the query sees the key
MaskRule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# How many keys inside a row's interval, and as many outside, are looked at for gaps.
_SAMPLES = 16


class VisibleKeys:
    """Which keys each row sees, by a rule of transformers. Intervals are made when a layer first asks, and kept.

    Args:
        batch_size, q_length, kv_length: of the attention calls that it is for.
        q_offset, kv_offset: the place of the first row, and of the first key, in the whole sequence.
        rule: who sees whom; heads are not told apart.
        attention_mask: [b, ...] with 0 where a token is padding, from the sequence's first token on; None: no padding.
        device: where the rule's own tensors are.
    """

    def __init__(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int,
        kv_offset: int,
        rule: MaskRule,
        attention_mask: Tensor | None,
        device: torch.device | str,
    ) -> None:
        self.batch_size, self.q_length, self.kv_length = batch_size, q_length, kv_length
        self.q_offset, self.kv_offset = q_offset, kv_offset
        self.attention_mask = attention_mask
        self._rule = rule
        self._device = device
        self._hops: tuple[Tensor, Tensor] | None = None

    @classmethod
    def simple(cls, q: Tensor, k: Tensor, *, is_causal: bool, sliding_window: int | None) -> VisibleKeys:
        """Without padding or packing, the last row beside the last key: for models that make no mask of their own.

        Args:
            q: "b sq h d"; k: "b sk hk d".
            sliding_window: keys that a row sees, its own included, to either side.
        """

        def rule(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            near = torch.full((), 1 << 62) if sliding_window is None else torch.tensor(sliding_window)
            seen = (query - key).abs() < near.to(key.device)
            return seen & (key <= query) if is_causal else seen

        return cls(1, q.shape[1], k.shape[1], k.shape[1] - q.shape[1], 0, rule, None, "cpu")

    def contiguous(self) -> VisibleKeys:
        """What transformers asks of the mask that it hands over, as a tensor, to be compiled with a static cache."""
        raise KernelError(
            "generation with a static cache wants its mask as a tensor, but here it is intervals of keys\n"
            '       leave out cache_implementation="static": the default cache grows'
        )

    @cached_property
    def is_padded(self) -> bool:
        """Whether any token is padding."""
        return self.attention_mask is not None and not bool(self.attention_mask.all())

    def hops(self, sq: int, sk: int, position_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `interval_attention` takes them.

        Args:
            position_ids: [b or 1, s] of the call. Where there is neither an attention mask nor a cache, documents begin where
                they are not one more than before: many models tell their mask nothing of it.

        Raises:
            ShapeError: made for other lengths; padding in the middle of a sequence.
            KernelError: a row sees keys with a gap between them.
        """
        if (sq, sk) != (self.q_length, self.kv_length):
            raise ShapeError(
                f"the mask is of {self.q_length} rows and {self.kv_length} keys, but q has {sq} and k {sk}"
            )
        if self._hops is None:
            if position_ids is not None and position_ids.ndim == 2 and self.attention_mask is None and sq == sk:
                self._rule = _within_documents(self._rule, position_ids)
            lo, hi = self._intervals()
            self._hops = pack_hops([(0, KeyRange.of(lo.cpu(), hi.cpu(), sk))], sq)
        return self._hops

    def _intervals(self) -> tuple[Tensor, Tensor]:
        """lo, hi: int64 [b, sq], in keys of this call."""
        rows = torch.arange(self.q_offset, self.q_offset + self.q_length, device=self._device)
        rows = rows.expand(self.batch_size, -1)
        first, end = self.kv_offset, self.kv_offset + self.kv_length
        if self.is_padded:
            assert self.attention_mask is not None, "padded"
            one_run_of_tokens(self.attention_mask)
        # A row of padding sees nothing.
        is_row = self._sees(rows, rows.clamp(first, end - 1))
        lo = _bisect(lambda keys: ~self._sees(rows, keys), torch.full_like(rows, first), rows)
        hi = _bisect(lambda keys: self._sees(rows, keys), rows, torch.full_like(rows, end))
        self._check_gaps(rows, lo, hi, is_row)
        # Neither end may decrease, and rows that see nothing stand at a sequence's edges: beside what others see.
        hi = torch.where(is_row, hi, first).cummax(-1).values
        lo = torch.where(is_row, lo, hi)
        return lo - first, hi - first

    def _sees(self, rows: Tensor, keys: Tensor) -> Tensor:
        """bool [b, s] for places [b, s] and as many keys, or keys [b, s, n]."""
        b = torch.arange(self.batch_size, device=rows.device).view(-1, *(1 for _ in range(keys.ndim - 1)))
        rows = rows.view(*rows.shape, *(1 for _ in range(keys.ndim - rows.ndim))).expand(keys.shape)
        seen = self._rule(b.expand(keys.shape), torch.zeros_like(keys), rows, keys).expand(keys.shape)
        if not self.is_padded:
            return seen
        mask = self.attention_mask
        assert mask is not None, "padded"
        mask = mask.to(rows.device, torch.bool)
        # A cache has room behind the last token that the mask knows of.
        there = torch.cat([mask, mask.new_zeros(mask.shape[0], 1)], 1)
        rows, keys = (x.clamp(max=mask.shape[1]) for x in (rows, keys))
        return seen & there[b, keys] & there[b, rows]

    def _check_gaps(self, rows: Tensor, lo: Tensor, hi: Tensor, is_row: Tensor) -> None:
        first, end = self.kv_offset, self.kv_offset + self.kv_length
        # Spread over the row, and the next keys to either end.
        share = torch.linspace(0, 1, _SAMPLES, device=rows.device, dtype=torch.float64)
        inside = (lo[..., None] + share * (hi - 1 - lo)[..., None]).long().clamp(first, end - 1)
        before = (first + share * (lo - 1 - first)[..., None]).long().clamp(first, end - 1)
        behind = (hi[..., None] + share * (end - 1 - hi)[..., None]).long().clamp(first, end - 1)
        wrong = ~self._sees(rows, inside)
        wrong |= self._sees(rows, before) & (before < lo[..., None])
        wrong |= self._sees(rows, behind) & (behind >= hi[..., None])
        wrong = wrong.any(-1) & is_row
        if not self.is_padded:
            # Padding sees nothing; any other row is in its own interval.
            wrong |= ~is_row
        if bool(wrong.any()):
            b, row = wrong.nonzero()[0].tolist()
            raise KernelError(
                f"the mask of sequence {b} shows row {row} keys that are no one interval around its own place\n"
                '       this attention cannot do that mask: use attn_implementation="sdpa" or "flex_attention"'
            )


def _within_documents(rule: MaskRule, position_ids: Tensor) -> MaskRule:
    document = F.pad(position_ids.diff() != 1, (1, 0)).cumsum(1)

    def within(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        of = document.expand(int(b.max()) + 1, -1) if len(document) == 1 else document
        of = of.to(query.device)
        return rule(b, h, query, key) & (of[b, query] == of[b, key])

    return within


def _bisect(is_after: Callable[[Tensor], Tensor], lo: Tensor, hi: Tensor) -> Tensor:
    """For each row the first key in [lo, hi] that `is_after` denies, where it holds for a head of the keys [lo, hi)."""
    lo, hi = lo.clone(), hi.clone()
    while bool((lo < hi).any()):
        middle = (lo + hi) // 2
        holds = is_after(torch.minimum(middle, (hi - 1).clamp(min=0))) & (lo < hi)
        lo = torch.where(holds, middle + 1, lo)
        hi = torch.where(holds | (lo >= hi), hi, middle)
    return lo


def one_run_of_tokens(attention_mask: Tensor) -> None:
    """ShapeError where padding stands between a sequence's tokens. attention_mask: [b, s], 0 at padding."""
    is_token = attention_mask.bool()
    begins = is_token & ~F.pad(is_token[:, :-1], (1, 0))
    if bool((bad := begins.sum(1) > 1).any()):
        raise ShapeError(
            f"attention_mask of sequence {int(bad.nonzero()[0])} has zeros between ones, so a row would see its keys with "
            "a gap\n"
            "       padding may stand before or behind the tokens; for packed documents give position_ids that start anew"
        )


def document_mask(
    shape: torch.Size,
    *,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> AttentionMask:
    """The documents of a batch, padding being one of its own, as a mask; `Full` where each sequence is one document.

    Args:
        shape: (b, S).
        position_ids: [b or 1, S]; a document begins where it is not one more than before.
        attention_mask: [b, S], 0 at padding.
        cu_seqlens: [documents + 1] of the one sequence of a batch.

    Raises:
        ShapeError: boundaries that are not of this batch; padding between tokens; documents inside a padded batch.
    """
    b, length = shape
    begins = torch.zeros(b, length, dtype=torch.bool)
    if position_ids is not None:
        position_ids = position_ids.cpu()
        begins[:, 1:] |= position_ids.diff() != 1
    if attention_mask is not None:
        one_run_of_tokens(attention_mask)
        is_token = attention_mask.bool().cpu()
        changes = is_token[:, 1:] != is_token[:, :-1]
        if bool((begins[:, 1:] & is_token[:, 1:] & is_token[:, :-1]).any()):
            raise ShapeError(
                "position_ids start anew among tokens, but there is an attention_mask: transformers takes such a batch for "
                "one document a row\n"
                "       leave out attention_mask for packed documents, or position_ids for padded ones"
            )
        begins[:, 1:] = changes
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        if b != 1 or ends[0] != 0 or ends[-1] != length or sorted(ends) != ends:
            raise ShapeError(
                f"cu_seq_lens_q {ends[:8]} must rise from 0 to {length}, the tokens of a batch of one; the batch is {b}"
            )
        begins[0, [end for end in ends if 0 < end < length]] = True
    if not bool(begins[:, 1:].any()):
        return Full()
    rows = [(0, *row.nonzero().flatten().tolist(), length) for row in begins]
    return Documents(rows[0] if all(row == rows[0] for row in rows) else tuple(rows))
