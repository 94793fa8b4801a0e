"""What each mask means, pair by pair: the side of the mask tests that knows nothing of key intervals.

A mask class without an entry in `SEES` and `STRATEGIES` fails `test_masks.py`.
"""

from __future__ import annotations

import functools

import torch
from hypothesis import strategies as st

from longctx.masks import AttentionMask, Causal, Documents, Full, Intersection, PrefixLM, SlidingWindow
from longctx.padding import Padded


def dense(mask: AttentionMask, seq_len: int) -> torch.Tensor:
    """bool [S, S], or [b, S, S] where the sequences of a batch differ: may the query (row) see the key (column)?"""
    position = torch.arange(seq_len)
    return SEES[type(mask)](mask, position[:, None], position[None, :])


def _document_of(boundaries: tuple[int, ...]) -> torch.Tensor:
    lengths = torch.tensor(boundaries).diff()
    return torch.arange(len(lengths)).repeat_interleave(lengths)


def _padded(mask: Padded, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    last = mask.seq_len - 1
    inner = SEES[type(mask.mask)](mask.mask, q.clamp(max=last), k.clamp(max=last))
    return inner & (q <= last) & (k <= last)


def _documents(mask: Documents, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    if isinstance(mask.cu_seqlens[0], tuple):
        return torch.stack([_documents(Documents(row), q, k) for row in mask.cu_seqlens])
    document = _document_of(mask.cu_seqlens)
    return document[q] == document[k]


SEES = {
    Full: lambda mask, q, k: (q >= 0) & (k >= 0),
    Causal: lambda mask, q, k: k <= q,
    SlidingWindow: lambda mask, q, k: (q - k).abs() < mask.window,
    Documents: _documents,
    Padded: _padded,
    PrefixLM: lambda mask, q, k: (k <= q) | ((q < mask.prefix) & (k < mask.prefix)),
    Intersection: lambda mask, q, k: functools.reduce(torch.logical_and, [SEES[type(p)](p, q, k) for p in mask.parts]),
}


def _boundaries(seq_len: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Documents of any length, empty ones included."""
    cuts = st.lists(st.integers(0, seq_len), max_size=8)
    return cuts.map(lambda inner: (0, *sorted(inner), seq_len))


def _batched_documents(seq_len: int, batch: int | None) -> st.SearchStrategy[Documents]:
    if batch is None:
        return st.builds(Documents, _boundaries(seq_len))
    rows = st.lists(_boundaries(seq_len), min_size=batch, max_size=batch)
    return rows.map(lambda r: Documents(tuple(r)))


def _padded_masks(seq_len: int, batch: int | None) -> st.SearchStrategy[Padded]:
    kinds = tuple(kind for kind in STRATEGIES if kind is not Padded)
    real = st.integers(1, seq_len)
    return real.flatmap(lambda n: mask_strategy(n, batch, kinds).map(lambda mask: Padded(mask, n)))


# class -> strategy of (seq_len, batch); batch is None or the number of sequences that may differ.
STRATEGIES = {
    Full: lambda s, b: st.just(Full()),
    Causal: lambda s, b: st.just(Causal()),
    SlidingWindow: lambda s, b: st.builds(SlidingWindow, st.integers(1, s + 2)),
    Documents: _batched_documents,
    PrefixLM: lambda s, b: st.builds(PrefixLM, st.integers(0, s + 2)),
    Padded: _padded_masks,
}


def mask_strategy(
    seq_len: int, batch: int | None = None, kinds: tuple[type, ...] | None = None
) -> st.SearchStrategy[AttentionMask]:
    """Masks of the named classes, or any mask: one rule, or up to three at once."""
    if kinds == (Intersection,):
        several = st.lists(mask_strategy(seq_len, batch, tuple(STRATEGIES)), min_size=2, max_size=3, unique=True)
        return several.map(lambda parts: Intersection(tuple(parts)))
    if kinds is None:
        return st.one_of(
            mask_strategy(seq_len, batch, tuple(STRATEGIES)), mask_strategy(seq_len, batch, (Intersection,))
        )
    return st.one_of([STRATEGIES[kind](seq_len, batch) for kind in kinds])


def mask_classes() -> list[type]:
    """Every concrete mask of the library, found by itself."""
    found, todo = [], list(AttentionMask.__subclasses__())
    while todo:
        cls = todo.pop(0)
        todo += cls.__subclasses__()
        if cls.__module__.startswith("longctx."):
            found.append(cls)
    return found


def from_intervals(lo: torch.Tensor, hi: torch.Tensor, sk: int) -> torch.Tensor:
    """bool [..., sq, sk] of intervals [..., sq]."""
    key = torch.arange(sk)
    return (key >= lo[..., None]) & (key < hi[..., None])
