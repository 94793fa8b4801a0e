"""What a shard knows of its place in the sequence: positions over ring and Ulysses, padding of any length, and back again."""

from __future__ import annotations

import itertools

import pytest
import torch
from dense_masks import mask_strategy
from hypothesis import given
from hypothesis import strategies as st
from layout_cases import CASES, LAYOUT_CASES

from longctx.errors import PlanError, ShapeError
from longctx.layout import (
    Contiguous,
    ZigZag,
    get_layout,
    layout_names,
)
from longctx.masks import Causal, Documents, Full, SlidingWindow
from longctx.sequence import SequenceMeta, shard_multiple


class TestSequenceMeta:
    def test_defaults_are_causal_on_one_rank(self):
        meta = SequenceMeta.of(8)
        assert (meta.mask, meta.layout, meta.ring_rank, meta.ring_world) == (Causal(), ZigZag(), 0, 1)
        assert torch.equal(meta.positions, torch.arange(8))
        assert meta.local_len == 8

    @LAYOUT_CASES
    def test_positions_are_the_layouts(self, layout):
        mask = Documents((0, 5, 36))
        for rank in range(3):
            meta = SequenceMeta.of(36, mask=mask, layout=layout, ring_rank=rank, ring_world=3)
            assert meta.mask is mask
            assert meta.layout == layout.for_mask(mask, 3, 36)
            assert torch.equal(meta.positions, meta.layout.positions(rank, 3, 36))
            assert meta.local_len == 12

    @LAYOUT_CASES
    @pytest.mark.parametrize(("ring", "ulysses"), [(1, 3), (3, 2), (2, 3)])
    def test_ulysses_ranks_hold_contiguous_pieces_of_the_ring_shard(self, layout, ring, ulysses):
        seq_len = 2 * shard_multiple(layout, ring, ulysses)
        whole = torch.arange(seq_len)[None] + 100
        for r in range(ring):
            metas = [
                SequenceMeta.of(
                    seq_len, layout=layout, ring_rank=r, ring_world=ring, ulysses_rank=u, ulysses_world=ulysses
                )
                for u in range(ulysses)
            ]
            assert torch.equal(torch.cat([m.positions for m in metas]), layout.positions(r, ring, seq_len))
            assert {m.local_len for m in metas} == {seq_len // (ring * ulysses)}
            assert torch.equal(torch.cat([m.shard(whole) for m in metas], 1), layout.shard(whole, r, ring))

    def test_the_picture_in_the_docstring(self):
        owner = torch.empty(16, dtype=torch.int64)
        for r, u in itertools.product(range(4), range(2)):
            meta = SequenceMeta.of(16, ring_rank=r, ring_world=4, ulysses_rank=u, ulysses_world=2)
            owner[meta.positions] = 2 * r + u
        assert " ".join(map(str, owner.tolist())) in SequenceMeta.__doc__

    def test_what_does_not_fit_is_refused(self):
        with pytest.raises(PlanError, match="zigzag over 0 ranks"):
            SequenceMeta.of(16, ring_world=0)
        with pytest.raises(PlanError, match="seq_len = 0: a sequence has at least 1 position"):
            SequenceMeta.of(0)
        with pytest.raises(PlanError, match="unknown layout 'zigzga'"):
            SequenceMeta.of(16, layout="zigzga")
        with pytest.raises(PlanError, match="ulysses rank 2 is not one of 2"):
            SequenceMeta.of(16, ulysses_rank=2, ulysses_world=2)
        with pytest.raises(ShapeError, match="8 positions is not the whole sequence of 16"):
            SequenceMeta.of(16).shard(torch.zeros(1, 8))

    def test_to_moves_only_the_positions(self):
        meta = SequenceMeta.of(8, layout=Contiguous(), ring_rank=1, ring_world=2)
        moved = meta.to("meta")
        assert moved.positions.device.type == "meta"
        assert meta.positions.device.type == "cpu"
        assert (moved.seq_len, moved.mask, moved.layout, moved.ring_rank) == (8, meta.mask, meta.layout, 1)


ANY_LAYOUT = st.sampled_from([*layout_names(), *CASES.values()])


class TestAnyLength:
    """What ranks cannot share evenly is padded, and padding takes part in nothing."""

    @given(
        data=st.data(), seq_len=st.integers(1, 50), ring=st.integers(1, 4), ulysses=st.integers(1, 3), layout=ANY_LAYOUT
    )
    def test_shards_hold_every_position_once(self, data, seq_len, ring, ulysses, layout):
        mask = data.draw(mask_strategy(seq_len, data.draw(st.sampled_from([None, 2]))))
        metas = [
            SequenceMeta.of(
                seq_len,
                **{"mask": mask, "layout": layout, "ring_rank": r, "ring_world": ring},
                **{"ulysses_rank": u, "ulysses_world": ulysses},
            )
            for r, u in itertools.product(range(ring), range(ulysses))
        ]
        length = metas[0].padded_len
        assert {(m.local_len, m.padded_len) for m in metas} == {(length // (ring * ulysses), length)}
        assert len({m.layout for m in metas}) == 1
        assert all(bool((m.positions.diff() > 0).all()) for m in metas)
        assert torch.equal(torch.cat([m.positions for m in metas]).sort().values, torch.arange(length))
        given_layout = get_layout(layout) if isinstance(layout, str) else layout
        assert 0 <= length - seq_len < shard_multiple(given_layout, ring, ulysses)
        dim = data.draw(st.sampled_from([0, 1, 2, -1, -3]))
        x = torch.arange(6 * seq_len).view(2, seq_len, 3).movedim(1, dim)
        shards = [m.shard(x, dim, fill=-100) for m in metas]
        assert torch.equal(metas[-1].unshard(shards, dim), x)
        for meta, shard in zip(metas, shards, strict=True):
            is_padding = meta.positions >= seq_len
            assert bool((shard.movedim(dim, 0)[is_padding] == -100).all())
            assert torch.equal(shard.movedim(dim, 0)[~is_padding], x.movedim(dim, 0)[meta.positions[~is_padding]])
        work = metas[0].layout.balance(metas[0].padded_mask, ring, length)
        assert int(work.sum()) == mask.area(seq_len), "padding is no work"

    @pytest.mark.parametrize("mask", [Causal(), Full(), SlidingWindow(3), Documents((0, 2, 7))], ids=str)
    def test_padding_sees_nothing_and_nobody_sees_it(self, mask):
        meta = SequenceMeta.of(7, mask=mask, ring_world=2)
        assert meta.padded_len == 8
        assert meta.mask is mask
        visible = meta.padded_mask.materialize(8)
        assert torch.equal(visible[:7, :7], mask.materialize(7))
        assert not visible[7].any()
        assert not visible[:, 7].any()
        # Without padding there is nothing around the mask.
        assert SequenceMeta.of(7, mask=mask).padded_mask is mask

    def test_what_stands_at_padding_must_be_said_on_every_rank(self):
        for rank in range(2):
            meta = SequenceMeta.of(7, ring_rank=rank, ring_world=2)
            with pytest.raises(ShapeError, match=r"7 positions are padded to 8.*\n.*fill=-100\) for labels"):
                meta.shard(torch.zeros(1, 7))
        assert SequenceMeta.of(8, ring_world=2).shard(torch.arange(8)[None]).tolist() == [[0, 1, 6, 7]]
        assert SequenceMeta.of(7, ring_world=2).shard(torch.arange(7)[None], fill=-100).tolist() == [[0, 1, 6, -100]]

    def test_shards_that_do_not_belong_together_are_refused(self):
        meta = SequenceMeta.of(7, ring_world=2)
        for shards in ([torch.zeros(1, 4)], [torch.zeros(1, 4), torch.zeros(1, 3)]):
            with pytest.raises(ShapeError, match="expected 2 of 4 positions"):
                meta.unshard(shards)
