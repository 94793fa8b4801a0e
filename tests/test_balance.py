"""Balance: what `Balanced` promises on packed documents, what `Auto` takes and why, and the arithmetic under both."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from dense_masks import mask_strategy
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx import balance
from longctx.balance import KEYS_OF_A_MESSAGE, balanced_blocks, ring_time, tile_work
from longctx.layout import LAYOUTS, Auto, Balanced, Contiguous, SequenceLayout, Striped, ZigZag
from longctx.masks import AttentionMask, Causal, Documents, Full, PrefixLM, SlidingWindow
from longctx.padding import padded
from longctx.sequence import SequenceMeta


def lognormal(seq_len: int, seed: int, median: int = 4096) -> tuple[int, ...]:
    """Ends of documents of lognormal lengths, sigma 1, which fill the sequence."""
    random, ends = np.random.RandomState(seed), [0]
    while ends[-1] < seq_len:
        ends.append(ends[-1] + max(1, int(median * math.exp(random.randn()))))
    return (*ends[:-1], seq_len)


def packed(seq_len: int, seed: int) -> AttentionMask:
    return Documents(lognormal(seq_len, seed)) & Causal()


def imbalances(layout: SequenceLayout, mask: AttentionMask, world: int, seq_len: int) -> tuple[float, float]:
    """Slowest rank over the mean, of whole rings and with a wait at every hop."""
    work = layout.for_mask(mask, world, seq_len).balance(mask, world, seq_len)
    mean = int(work.sum()) / world
    return int(work.sum(1).max()) / mean, int(work.max(0).values.sum()) / mean


PACKED = {
    "64k": (1 << 16, packed(1 << 16, 0)),
    "128k": (1 << 17, packed(1 << 17, 1)),
    # Any length: padded to a multiple of 16.
    "odd": (100_016, padded(packed(100_001, 2), 100_001, 100_016)),
    "batch": (1 << 16, Documents((lognormal(1 << 16, 3), lognormal(1 << 16, 4))) & Causal()),
    "both_ways": (1 << 16, Documents(lognormal(1 << 16, 5))),
    # All the work in an eighth of the sequence.
    "one_in_eight": (1 << 16, Documents((*range(0, 30_001, 8), *range(38_192, (1 << 16) + 1, 8))) & Causal()),
}


@pytest.mark.parametrize("world", [2, 3, 8, 16])
@pytest.mark.parametrize("name", PACKED)
def test_areas_of_packed_documents_differ_by_less_than_two_percent(name, world):
    seq_len, mask = PACKED[name]
    if seq_len % world:
        mask = padded(mask, seq_len, seq_len + world - seq_len % world)
        seq_len += world - seq_len % world
    whole, every_hop = imbalances(Balanced(), mask, world, seq_len)
    assert whole <= 1.02
    # Hops follow, less strictly; those of zigzag are far from it wherever documents are packed.
    assert every_hop <= (1.08 if name != "one_in_eight" else 1.3)


def test_layouts_that_know_nothing_of_documents_are_worse():
    seq_len, mask = PACKED["128k"]
    assert imbalances(ZigZag(), mask, 8, seq_len)[1] > 1.5
    assert imbalances(Contiguous(), mask, 8, seq_len)[0] > 1.3


def test_without_swaps_the_promise_would_not_hold(monkeypatch):
    monkeypatch.setattr(balance, "_even_out", lambda work, dealt: (dealt, np.zeros(1)))
    balanced_blocks.cache_clear()
    assert max(imbalances(Balanced(), packed(1 << 16, seed), 16, 1 << 16)[0] for seed in range(4)) > 1.04
    balanced_blocks.cache_clear()


@given(data=st.data(), world=st.integers(1, 6), share=st.integers(1, 40), batch=st.sampled_from([None, 2]))
def test_every_rank_holds_a_block_of_each_round(data, world, share, batch):
    seq_len = world * share
    mask = data.draw(mask_strategy(seq_len, batch))
    starts, lengths = balanced_blocks(mask, world, seq_len)
    assert starts.shape == (len(lengths), world)
    assert lengths.sum() == share
    for round_starts, length, first in zip(starts, lengths, world * (np.cumsum(lengths) - lengths), strict=True):
        assert sorted(round_starts.tolist()) == list(range(first, first + world * length, length))


def test_long_shards_leave_tiles_whole():
    starts, lengths = balanced_blocks(packed(1 << 17, 1), 8, 1 << 17)
    assert set(lengths.tolist()) == {128}
    assert not (starts % 128).any()


def test_a_fitted_layout_is_a_value():
    seq_len, mask = PACKED["64k"]
    fitted = Balanced().for_mask(mask, 4, seq_len)
    assert fitted == Balanced(mask)
    assert hash(fitted) == hash(Balanced(mask))
    assert fitted != Balanced(Causal())
    # A mask that is made narrower later, as a model's window does, moves no token.
    assert fitted.for_mask(mask & SlidingWindow(8), 4, seq_len) is fitted
    first = fitted.positions(1, 4, seq_len)
    balanced_blocks.cache_clear()
    assert torch.equal(Balanced(mask).positions(1, 4, seq_len), first)
    # Where nobody says what is attended with, it is made for causal attention.
    assert torch.equal(Balanced().positions(1, 4, 64), Balanced(Causal()).positions(1, 4, 64))


def test_swaps_end_at_even_work():
    held, load = balance._even_out(np.array([[5, 3], [5, 3], [1, 1], [4, 4]]), np.tile([0, 1], (4, 1)))
    assert load.tolist() == [13, 13]
    assert sorted(held[0].tolist()) == [0, 1]
    assert (held[:2, 0] != held[0, 0]).any(), "one of two rounds was swapped"
    # Nothing to gain by a swap: left as it was.
    held, load = balance._even_out(np.array([[9, 1]]), np.array([[0, 1]]))
    assert held.tolist() == [[0, 1]]


@settings(max_examples=50)
@given(data=st.data(), world=st.integers(1, 4), name=st.sampled_from(sorted(LAYOUTS)), share=st.integers(1, 10))
def test_work_in_tiles_of_one_is_the_area(data, world, name, share):
    seq_len = 2 * world * share
    mask = data.draw(mask_strategy(seq_len, data.draw(st.sampled_from([None, 2]))))
    layout = LAYOUTS[name].for_mask(mask, world, seq_len)
    shards = [layout.positions(rank, world, seq_len) for rank in range(world)]
    exact = layout.balance(mask, world, seq_len).numpy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(balance, "TILE", 1)
        work, keys = tile_work(mask, shards, seq_len)
    assert (work == exact).all()
    assert ((keys > 0) == (exact > 0)).all()
    visible = mask.materialize(seq_len)
    visible = visible.any(0) if visible.ndim == 3 else visible
    for rank in range(world):
        for distance in range(world):
            seen = visible[shards[rank]][:, shards[(rank - distance) % world]].any(0).nonzero().flatten()
            assert keys[rank, distance] == (int(seen[-1] - seen[0]) + 1 if len(seen) else 0)
    # Whole tiles hold at least what is visible in them.
    assert (tile_work(mask, shards, seq_len)[0] >= exact).all()


def test_time_waits_for_the_slowest_of_every_hop_and_for_messages():
    work = np.array([[10, 1000, 0], [30, 10, 0], [20, 20, 0]])
    keys = np.array([[5, 2, 0], [5, 3, 0], [5, 1, 0]])
    assert ring_time(work, keys) == 30 + 1000
    assert ring_time(work // 100, keys) == 3 * KEYS_OF_A_MESSAGE
    assert ring_time(work // 100, keys, batch=2) == 6 * KEYS_OF_A_MESSAGE
    assert ring_time(np.array([[7]]), np.array([[9]])) == 7


CHOICES = {
    "full": (Full(), 8, 1 << 16, "contiguous"),
    "causal": (Causal(), 8, 1 << 16, "zigzag"),
    "window": (SlidingWindow(1024) & Causal(), 8, 1 << 16, "contiguous"),
    "packed": (PACKED["128k"][1], 8, 1 << 17, "balanced"),
    "packed_batch": (PACKED["batch"][1], 4, 1 << 16, "balanced"),
    "prefix": (PrefixLM(1 << 15), 8, 1 << 16, "balanced"),
    "short_documents": (Documents(tuple(range(0, (1 << 16) + 1, 64))) & Causal(), 8, 1 << 16, "contiguous"),
    "alone": (PACKED["64k"][1], 1, 1 << 16, "contiguous"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_auto_takes_the_fastest(name):
    mask, world, seq_len, want = CHOICES[name]
    taken = Auto().for_mask(mask, world, seq_len)
    assert taken.name == want
    assert SequenceMeta.of(seq_len, mask=mask, layout="auto", ring_rank=world - 1, ring_world=world).layout == taken

    def time(layout: SequenceLayout) -> int:
        shards = [layout.positions(rank, world, seq_len) for rank in range(world)]
        return ring_time(*tile_work(mask, shards, seq_len), mask.batch or 1)

    least = min(time(layout.for_mask(mask, world, seq_len)) for layout in (*LAYOUTS.values(), Striped(block=128)))
    assert time(taken) <= 1.03 * least


def test_a_choice_is_said_once_with_its_reason(caplog):
    balance._said.clear()
    with caplog.at_level(logging.INFO, "longctx"):
        for seed in range(3):
            Auto().for_mask(packed(1 << 15, seed), 4, 1 << 15)
        Auto().for_mask(padded(Causal(), 4090, 4096), 2, 4096)
    first, *rest = (record.getMessage() for record in caplog.records)
    assert first.startswith("layout auto: balanced for a mask of Documents and Causal on 32_768 positions over ring 4;")
    assert "zigzag 1." in first
    assert len(rest) == len(balance._said) - 1
    assert rest[-1].startswith("layout auto: zigzag for a mask of Causal on 4_096 positions over ring 2;")
