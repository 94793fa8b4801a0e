"""Schedules: exact intervals, the same hops on every rank, nothing lost and nothing that has no work."""

from __future__ import annotations

import pytest
import torch
from dense_masks import dense, from_intervals, mask_strategy
from hypothesis import given, settings
from hypothesis import strategies as st
from ring_cases import LAYOUTS

from longctx.errors import PlanError, ShapeError
from longctx.layout import Contiguous, Striped, ZigZag
from longctx.masks import Causal, Documents, Full, SlidingWindow
from longctx.parallel.schedule import CommBytes, RingSchedule, comm_bytes, sampled_rows, unpack_hops

WORLDS = st.integers(1, 6)


def draw_ring(data, layout: str, world: int, batch: int | None = None):
    """A mask and its length, and the schedules of all ranks of one ring."""
    seq_len = LAYOUTS[layout].multiple(world) * data.draw(st.integers(1, 4))
    mask = data.draw(mask_strategy(seq_len, batch))
    return mask, seq_len, [RingSchedule.build(mask, LAYOUTS[layout], r, world, seq_len) for r in range(world)]


@pytest.mark.parametrize("batch", [None, 2], ids=["one_rule", "own_rules"])
@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=40)
@given(data=st.data(), world=WORLDS)
def test_hops_show_exactly_what_the_mask_shows(layout, batch, data, world):
    mask, seq_len, schedules = draw_ring(data, layout, world, batch)
    share = seq_len // world
    visible = dense(mask, seq_len) if mask.batch else dense(mask, seq_len)[None]
    positions = [LAYOUTS[layout].positions(r, world, seq_len) for r in range(world)]
    shown = torch.zeros_like(visible)
    for schedule in schedules:
        for hop in schedule.hops:
            assert hop.source == (schedule.rank - hop.distance) % world
            block = from_intervals(*hop.key_range.bounds(share, share), share)
            assert hop.area == int(block.sum()) * (visible.shape[0] // block.shape[0])
            shown[:, positions[schedule.rank][:, None], positions[hop.source][None]] = block
    assert torch.equal(shown, visible)
    assert sum(s.area for s in schedules) == mask.area(seq_len)


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=40)
@given(data=st.data(), world=WORLDS)
def test_all_ranks_make_the_same_hops_and_none_for_nothing(layout, data, world):
    mask, seq_len, schedules = draw_ring(data, layout, world)
    distances = schedules[0].distances
    assert distances[0] == 0
    assert list(distances) == sorted(set(distances))
    assert {s.distances for s in schedules} == {distances}
    assert len({s.digest for s in schedules}) == 1
    work = LAYOUTS[layout].balance(mask, world, seq_len)
    live = {0} | set(work.sum(0).nonzero().flatten().tolist())
    assert set(distances) == live
    assert [[hop.area for hop in s.hops] for s in schedules] == work[:, list(distances)].tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=40)
@given(data=st.data(), world=WORLDS)
def test_packed_hops_say_the_same(layout, data, world):
    _, seq_len, schedules = draw_ring(data, layout, world, data.draw(st.sampled_from([None, 3])))
    share = seq_len // world
    for schedule in schedules:
        table, rows = schedule.packed
        unpacked = unpack_hops(table, rows)
        assert [distance for distance, _ in unpacked] == list(schedule.distances)
        for (_, key_range), hop in zip(unpacked, schedule.hops, strict=True):
            assert key_range.kind == hop.key_range.kind
            for got, expected in zip(key_range.bounds(share, share), hop.key_range.bounds(share, share), strict=True):
                assert torch.equal(got, expected.expand_as(got))
                assert got.is_contiguous()


def test_sampled_rows_are_not_the_last_word():
    """Work in one row of one rank, which is not among those that are looked at first."""
    world, seq_len, row = 4, 8192, 10
    assert row not in sampled_rows(seq_len // world)
    # Documents of one token each, but for one pair of neighbours, which lie on ranks 0 and 1.
    second = row * world + 1
    mask = Documents(tuple(x for x in range(seq_len + 1) if x != second)) & Causal()
    schedules = [RingSchedule.build(mask, Striped(), r, world, seq_len) for r in range(world)]
    assert schedules[0].distances == (0, 1)
    assert [s.hops[1].area for s in schedules] == [0, 1, 0, 0]


def test_zigzag_balances_causal_work():
    world, seq_len = 4, 1024
    areas = [[h.area for h in RingSchedule.build(Causal(), ZigZag(), r, world, seq_len).hops] for r in range(world)]
    away = {area for hops in areas for area in hops[1:]}
    assert away == {(seq_len // world) ** 2 // 2}
    assert len({sum(hops) for hops in areas}) == 1


def test_a_window_makes_two_hops_whatever_the_length():
    for world, seq_len in ((8, 1 << 12), (64, 1 << 16)):
        schedule = RingSchedule.build(SlidingWindow(33) & Causal(), Contiguous(), world - 1, world, seq_len)
        assert schedule.distances == (0, 1)
        assert [h.key_range.kind for h in schedule.hops] == ["band", "band"]


def test_a_ring_of_one_makes_one_hop():
    schedule = RingSchedule.build(Causal(), ZigZag(), 0, 1, 7)
    assert [(h.distance, h.source, h.area) for h in schedule.hops] == [(0, 0, 28)]
    assert RingSchedule.build(Full(), ZigZag(), 0, 1, 1).area == 1


def test_schedules_are_remembered():
    def build():
        return RingSchedule.build(Documents((0, 5, 48)), ZigZag(), 1, 3, 48)

    assert build() is build()
    assert build().packed[0] is build().packed[0]


def test_digest_tells_what_differs_between_ranks():
    base = RingSchedule.build(Documents((0, 5, 48)), ZigZag(), 1, 3, 48)
    others = [
        RingSchedule.build(Documents((0, 6, 48)), ZigZag(), 1, 3, 48),
        RingSchedule.build(Documents((0, 5, 48)), Contiguous(), 1, 3, 48),
        RingSchedule.build(Documents((0, 5, 48)), ZigZag(), 1, 4, 48),
        RingSchedule.build(Documents((0, 5, 96)), ZigZag(), 1, 3, 96),
    ]
    assert base.digest not in {o.digest for o in others}
    # Said in another way, but the same mask.
    assert RingSchedule.build(Documents((0, 5, 5, 48)), ZigZag(), 2, 3, 48).digest == base.digest


def test_comm_bytes():
    schedule = RingSchedule.build(Causal(), ZigZag(), 0, 4, 64)
    message = 2 * 3 * 16 * 2 * 8
    assert comm_bytes(schedule, batch=3, num_kv_heads=2, head_dim=8, itemsize=2) == CommBytes(
        3 * message * 2, 2 * message * 2 + 3 * message * 4
    )
    alone = RingSchedule.build(Causal(), ZigZag(), 0, 1, 64)
    assert comm_bytes(alone, batch=3, num_kv_heads=2, head_dim=8, itemsize=2) == CommBytes(0, 0)


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(PlanError, match="nearest: 48 or 54"):
        RingSchedule.build(Causal(), ZigZag(), 0, 3, 50)
    with pytest.raises(PlanError, match="rank 3 is not one of the 3"):
        RingSchedule.build(Causal(), ZigZag(), 3, 3, 48)
    with pytest.raises(ShapeError, match="end at 40, but the sequence has 48"):
        RingSchedule.build(Documents((0, 40)), ZigZag(), 0, 3, 48)
