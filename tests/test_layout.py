"""Layouts: permutations with ascending positions, exact inverses, and local key ranges against the dense mask."""

from __future__ import annotations

import pytest
import torch
from dense_masks import dense, from_intervals, mask_strategy
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_cases import LAYOUT_CASES

from longctx.errors import PlanError, ShapeError
from longctx.layout import (
    LAYOUTS,
    Auto,
    Contiguous,
    SequenceLayout,
    Striped,
    ZigZag,
    get_layout,
    layout_names,
    nearest_lengths,
)
from longctx.masks import AttentionMask, Causal, KeyRange, SlidingWindow

WORLDS = st.integers(1, 6)


def lengths(layout: SequenceLayout, world: int, most: int = 48) -> st.SearchStrategy[int]:
    multiple = layout.multiple(world)
    return st.integers(1, max(1, most // multiple)).map(lambda n: n * multiple)


def all_positions(layout: SequenceLayout, world: int, seq_len: int) -> list[torch.Tensor]:
    return [layout.positions(rank, world, seq_len) for rank in range(world)]


def test_every_layout_is_registered_under_its_name():
    classes = {cls for cls in SequenceLayout.__subclasses__() if cls.__module__.startswith("longctx.")}
    assert {type(layout) for layout in LAYOUTS.values()} == classes - {Auto}
    assert layout_names() == (*LAYOUTS, "auto")
    assert get_layout("auto") == Auto()
    for name, layout in LAYOUTS.items():
        assert layout.name == name
        assert get_layout(name) is layout
        assert hash(layout) == hash(type(layout)())


@LAYOUT_CASES
@given(data=st.data(), world=WORLDS)
def test_positions_are_an_ascending_partition(layout, data, world):
    seq_len = data.draw(lengths(layout, world))
    shards = all_positions(layout, world, seq_len)
    for shard in shards:
        assert shard.dtype == torch.int64
        assert shard.shape == (seq_len // world,)
        assert bool((shard.diff() > 0).all()), "positions of a rank must ascend"
    assert torch.equal(torch.cat(shards).sort().values, torch.arange(seq_len))


@LAYOUT_CASES
@given(data=st.data(), world=WORLDS, dim=st.sampled_from([0, 1, 2, -1, -2]))
def test_unshard_is_the_inverse_of_shard(layout, data, world, dim):
    seq_len = data.draw(lengths(layout, world))
    x = torch.arange(seq_len * 6).view(2, seq_len, 3).movedim(1, dim)
    shards = [layout.shard(x, rank, world, dim) for rank in range(world)]
    assert torch.equal(layout.unshard(shards, dim), x)
    for rank, shard in enumerate(shards):
        assert torch.equal(shard, x.index_select(dim, layout.positions(rank, world, seq_len)))


@LAYOUT_CASES
@given(data=st.data(), world=WORLDS, batch=st.sampled_from([None, 2]))
@settings(max_examples=60)
def test_local_ranges_are_exact_on_every_rank_and_hop(layout, data, world, batch):
    seq_len = data.draw(lengths(layout, world, most=36))
    mask = data.draw(mask_strategy(seq_len, batch))
    shown = dense(mask, seq_len)
    shards, local = all_positions(layout, world, seq_len), seq_len // world
    work = torch.zeros(world, world, dtype=torch.int64)
    for q_rank in range(world):
        for distance in range(world):
            k_rank = (q_rank - distance) % world
            want = shown[..., shards[q_rank], :][..., shards[k_rank]]
            key_range = layout.local_range(mask, q_rank, k_rank, world, seq_len)
            got = from_intervals(*key_range.bounds(local, local), local)
            assert torch.equal(got.expand(mask.batch or 1, -1, -1), torch.atleast_3d(want).view(-1, local, local))
            work[q_rank, distance] = int(want.sum())
            assert key_range.area(local, local, batch=mask.batch or 1) == work[q_rank, distance]
    assert torch.equal(layout.balance(mask, world, seq_len), work)
    assert int(work.sum()) == mask.area(seq_len)


@pytest.mark.parametrize("layout", [Contiguous(), ZigZag(), Striped()], ids=lambda x: x.name)
def test_the_picture_in_the_docstring_is_the_layout(layout):
    line = next(line for line in type(layout).__doc__.splitlines() if line.split()[:1] == ["0"])
    drawn = torch.tensor([int(mark) for mark in line.split()[:8]])
    for rank in range(2):
        assert torch.equal(layout.positions(rank, 2, 8), (drawn == rank).nonzero().flatten())


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_zigzag_gives_every_rank_the_same_causal_work(world):
    seq_len = 16 * world
    work = ZigZag().balance(Causal(), world, seq_len)
    # At every distance but 0 a rank sees half of two chunks' pairs, so no hop waits for a slower rank.
    assert len(set(work.sum(1).tolist())) == 1
    for distance in range(world):
        assert len(set(work[:, distance].tolist())) == 1


def test_contiguous_leaves_causal_work_to_the_last_rank():
    work = Contiguous().balance(Causal(), 4, 64).sum(1)
    assert bool((work.diff() > 0).all())
    assert int(work[-1]) == 16 * 48 + 16 * 17 // 2


def test_striped_causal_work_differs_by_less_than_a_row_per_hop():
    work = Striped().balance(Causal(), 4, 64).sum(1)
    assert int(work.max() - work.min()) <= 64


def test_a_window_leaves_far_hops_empty():
    kinds = [Contiguous().local_range(SlidingWindow(4) & Causal(), 3, 3 - d, 4, 64).kind for d in range(4)]
    assert kinds == ["band", "band", "empty", "empty"]


def test_causal_hops_of_contiguous_are_the_cheap_kinds():
    kinds = [[Contiguous().local_range(Causal(), q, k, 3, 24).kind for k in range(3)] for q in range(3)]
    assert kinds == [["band", "empty", "empty"], ["full", "band", "empty"], ["full", "full", "band"]]


class TestRefusals:
    @LAYOUT_CASES
    @given(world=WORLDS, seq_len=st.integers(-3, 200))
    def test_lengths_that_cannot_be_cut(self, layout, world, seq_len):
        multiple = layout.multiple(world)
        if seq_len > 0 and seq_len % multiple == 0:
            layout.check(world, seq_len)
            return
        with pytest.raises(PlanError) as error:
            layout.positions(0, world, seq_len)
        message = str(error.value)
        assert f"seq_len = {seq_len:_} is not a multiple of {multiple} ({layout.name} over {world} ranks)" in message
        for offered in message.split("nearest: ")[1].split(" or "):
            layout.check(world, int(offered))

    @LAYOUT_CASES
    def test_worlds_and_ranks(self, layout):
        with pytest.raises(PlanError, match="at least 1 rank"):
            layout.check(0, 8)
        for rank in (-1, 2):
            with pytest.raises(PlanError, match=f"rank {rank} is not one of the 2 ranks"):
                layout.positions(rank, 2, 12)

    def test_block(self):
        with pytest.raises(PlanError, match=r"block=0.*at least 1 token"):
            Striped(block=0)

    def test_unknown_name(self):
        with pytest.raises(PlanError, match="unknown layout 'zigzga': did you mean 'zigzag'"):
            get_layout("zigzga")
        with pytest.raises(PlanError, match="known: auto, balanced, contiguous, striped, zigzag"):
            get_layout("?")

    def test_shards_of_unequal_length(self):
        with pytest.raises(ShapeError, match=r"shards of lengths \[3, 1\]"):
            Contiguous().unshard([torch.zeros(1, 3), torch.zeros(1, 1)])


@given(seq_len=st.integers(1, 10**7), multiple=st.integers(1, 10**4))
def test_nearest_lengths_enclose(seq_len, multiple):
    offered = [int(x) for x in nearest_lengths(seq_len, multiple).split(" or ")]
    assert all(x > 0 and x % multiple == 0 for x in offered)
    if len(offered) == 2:
        assert offered[0] <= seq_len < offered[1] == offered[0] + multiple
    else:
        assert seq_len < multiple == offered[0]


def test_a_layout_of_descending_positions_is_caught():
    class Descending(Contiguous):
        def _positions(self, rank, world, seq_len):
            return super()._positions(rank, world, seq_len).flip(0)

    with pytest.raises(AssertionError, match="contiguous: positions of a rank must ascend"):
        Descending().local_range(Causal(), 1, 0, 2, 8)


def test_a_mask_can_be_its_own_class():
    """DESIGN's promise: a mask is a subclass with `key_range`, and everything else happens by itself."""

    class Chunked(AttentionMask):
        def key_range(self, q_pos, seq_len):
            return q_pos // 4 * 4, (q_pos // 4 * 4 + 4).clamp(max=seq_len)

    mask = Chunked() & Causal()
    assert mask.area(8) == 20
    got = ZigZag().local_range(mask, 0, 0, 2, 8)
    assert isinstance(got, KeyRange)
    assert got.area(4, 4) == ZigZag().balance(mask, 2, 8)[0, 0] == 2 * 3
