"""Masks against their pair-by-pair meaning, and key ranges against brute force."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle

import pytest
import torch
from dense_masks import SEES, dense, from_intervals, mask_classes, mask_strategy
from hypothesis import given
from hypothesis import strategies as st

from longctx.errors import ShapeError
from longctx.masks import (
    UNBOUNDED,
    AttentionMask,
    Causal,
    Documents,
    Full,
    Intersection,
    KeyRange,
    PrefixLM,
    SlidingWindow,
)
from longctx.padding import Padded

LENGTHS = st.integers(1, 24)
BATCHES = st.sampled_from([None, 1, 3])
CLASSES = mask_classes()
NAMES = [cls.__name__ for cls in CLASSES]


def test_every_mask_has_an_independent_definition():
    assert set(CLASSES) == set(SEES), "add the new mask to tests/dense_masks.py"


@pytest.mark.parametrize("cls", CLASSES, ids=NAMES)
@given(data=st.data(), seq_len=LENGTHS, batch=BATCHES)
def test_materialize_is_the_pairwise_meaning(cls, data, seq_len, batch):
    mask = data.draw(mask_strategy(seq_len, batch, (cls,)))
    shown = mask.materialize(seq_len)
    want = dense(mask, seq_len)
    assert shown.dtype == torch.bool
    assert shown.shape == want.shape
    assert torch.equal(shown, want)


@pytest.mark.parametrize("cls", CLASSES, ids=NAMES)
@given(data=st.data(), seq_len=LENGTHS, batch=BATCHES)
def test_key_range_is_ordered_monotone_and_pointwise(cls, data, seq_len, batch):
    mask = data.draw(mask_strategy(seq_len, batch, (cls,)))
    position = torch.arange(seq_len)
    lo, hi = mask.key_range(position, seq_len)
    expected_shape = (seq_len,) if mask.batch is None else (mask.batch, seq_len)
    for end in (lo, hi):
        assert end.dtype == torch.int64
        assert end.shape == expected_shape
        assert bool((end.diff() >= 0).all()), "an end decreases"
    assert bool((lo >= 0).all())
    assert bool((lo <= hi).all())
    assert bool((hi <= seq_len).all())
    # The rows of a shard are those of the whole sequence: a mask looks at the position, not at its place in q_pos.
    some = torch.tensor(sorted(data.draw(st.sets(st.integers(0, seq_len - 1), min_size=1))))
    some_lo, some_hi = mask.key_range(some, seq_len)
    assert torch.equal(some_lo, lo[..., some])
    assert torch.equal(some_hi, hi[..., some])


@pytest.mark.parametrize("cls", CLASSES, ids=NAMES)
@given(data=st.data(), seq_len=LENGTHS, batch=BATCHES)
def test_area_counts_the_visible_pairs(cls, data, seq_len, batch):
    mask = data.draw(mask_strategy(seq_len, batch, (cls,)))
    assert mask.area(seq_len) == int(dense(mask, seq_len).sum())


@pytest.mark.parametrize("cls", CLASSES, ids=NAMES)
@given(data=st.data(), seq_len=LENGTHS, batch=BATCHES)
def test_masks_are_immutable_values(cls, data, seq_len, batch):
    mask = data.draw(mask_strategy(seq_len, batch, (cls,)))
    for twin in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert twin == mask
        assert hash(twin) == hash(mask)
    for field in dataclasses.fields(mask):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(mask, field.name, None)


@pytest.mark.parametrize("cls", [c for c in CLASSES if c is not Intersection], ids=lambda c: c.__name__)
def test_the_picture_in_the_docstring_is_the_mask(cls):
    example = {SlidingWindow: SlidingWindow(2), Documents: Documents((0, 2, 4)), PrefixLM: PrefixLM(2)}
    example[Padded] = Padded(Causal(), 3)
    mask = example.get(cls) or cls()
    picture = [line.split()[:4] for line in cls.__doc__.splitlines() if line.strip().startswith(("#", "."))]
    drawn = torch.tensor([[mark == "#" for mark in line] for line in picture])
    assert torch.equal(drawn, dense(mask, 4))


class TestIntersection:
    @given(data=st.data(), seq_len=LENGTHS, batch=BATCHES)
    def test_and_shows_what_both_show(self, data, seq_len, batch):
        one, two = (data.draw(mask_strategy(seq_len, batch)) for _ in range(2))
        both = one & two
        want = torch.logical_and(dense(one, seq_len), dense(two, seq_len))
        got = both.materialize(seq_len)
        assert torch.equal(*torch.broadcast_tensors(got, want))
        assert torch.equal((two & one).materialize(seq_len), got)
        assert both.batch == (one.batch if one.batch is not None else two.batch)

    @given(data=st.data(), seq_len=LENGTHS)
    def test_full_is_neutral(self, data, seq_len):
        mask = data.draw(mask_strategy(seq_len, None, tuple(c for c in CLASSES if c is not Intersection)))
        assert mask & Full() == mask
        assert Full() & mask == mask
        assert mask & mask == mask

    def test_parts_are_flat_and_said_once(self):
        window, docs = SlidingWindow(3), Documents((0, 4, 8))
        mask = (Causal() & window) & (docs & Causal() & Full())
        assert mask == Intersection((Causal(), window, docs))
        assert Full() & Full() == Full()

    def test_batches_of_different_sizes_are_refused(self):
        two, three = Documents(((0, 4),) * 2), Documents(((0, 4),) * 3)
        with pytest.raises(ShapeError, match=r"different numbers of sequences.*\[2, None, 3\]"):
            two & Causal() & three

    def test_only_masks_combine(self):
        with pytest.raises(TypeError):
            Causal() & 3


class TestRefusals:
    @pytest.mark.parametrize("window", [0, -1])
    def test_window(self, window):
        with pytest.raises(ShapeError, match=f"window={window}.*at least 1"):
            SlidingWindow(window)

    def test_prefix(self):
        with pytest.raises(ShapeError, match=r"prefix=-1.*at least 0"):
            PrefixLM(-1)

    @pytest.mark.parametrize(
        "boundaries",
        [(), (0,), (1, 4), (0, 3, 2), ((0, 4), (0, 5, 4)), ((0, 4), ())],
        ids=["none", "one", "start", "decreasing", "second_row", "empty_row"],
    )
    def test_boundaries(self, boundaries):
        with pytest.raises(ShapeError, match="must start at 0, never decrease and end at the length"):
            Documents(boundaries)

    def test_boundaries_of_unequal_length(self):
        with pytest.raises(ShapeError, match=r"end at \[4, 5\], not at one length"):
            Documents(((0, 4), (0, 5)))

    def test_boundaries_half_nested(self):
        with pytest.raises(ShapeError, match="either one list of ints or one such list for each sequence"):
            Documents((0, (0, 4)))

    def test_boundaries_that_are_not_whole(self):
        with pytest.raises(ShapeError, match="not a whole number"):
            Documents((0, 2.5, 4))

    def test_boundaries_of_another_sequence(self):
        with pytest.raises(ShapeError, match="end at 4, but the sequence has 8"):
            Documents((0, 4)).area(8)

    def test_lists_become_tuples(self):
        assert hash(Documents([0, 2, 4])) == hash(Documents((0, 2, 4)))
        assert Documents([[0, 4], [0, 1, 4]]) == Documents(((0, 4), (0, 1, 4)))
        assert Documents(torch.tensor([0, 2, 4])) == Documents((0, 2, 4))


# --- KeyRange


@st.composite
def intervals(draw):
    """Ends of any lawful shape: lo, hi [b, sq] in [0, sk], both never decreasing; empty rows anywhere."""
    sq, sk, batch = draw(st.integers(1, 12)), draw(st.integers(1, 12)), draw(st.sampled_from([1, 1, 2]))
    rows = []
    for _ in range(batch):
        lo = sorted(draw(st.lists(st.integers(0, sk), min_size=sq, max_size=sq)))
        hi = sorted(draw(st.lists(st.integers(0, sk), min_size=sq, max_size=sq)))
        rows.append((lo, [max(a, b) for a, b in zip(lo, hi, strict=True)]))
    return torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows]), sk


@st.composite
def band_intervals(draw):
    """Ends that move one key a row: `i + c` cut to [0, sk], or no end at all."""
    sq, sk = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    first = draw(st.one_of(st.just(-UNBOUNDED), st.integers(-sq - 2, sk + 2)))
    last = draw(st.one_of(st.just(UNBOUNDED), st.integers(-sq - 2, sk + 2)))
    row = torch.arange(sq)
    lo = (row + first).clamp(0, sk)
    return lo[None], torch.maximum(lo, (row + last).clamp(0, sk))[None], sk


ANY_INTERVALS = st.one_of(intervals(), band_intervals())


def is_one_band(lo: torch.Tensor, hi: torch.Tensor, sk: int) -> bool:
    """By trying every band there is."""
    sq = lo.shape[1]
    row = torch.arange(sq)

    def affine(ends: torch.Tensor) -> bool:
        return any(bool((ends == (row + c).clamp(0, sk)).all()) for c in range(-sq - 1, sk + 2))

    return affine(lo) and affine(hi)


@given(case=ANY_INTERVALS)
def test_key_range_says_the_same_as_its_intervals(case):
    lo, hi, sk = case
    sq = lo.shape[1]
    key_range = KeyRange.of(lo, hi, sk)
    got_lo, got_hi = key_range.bounds(sq, sk)
    for end in (got_lo, got_hi):
        assert end.dtype == torch.int32
        assert end.is_contiguous()
        assert end.shape in ((1, sq), lo.shape)
    want = from_intervals(lo, hi, sk)
    got = from_intervals(got_lo, got_hi, sk).expand_as(want)
    assert torch.equal(got, want)
    assert key_range.area(sq, sk, batch=lo.shape[0]) == int(want.sum())


@given(case=ANY_INTERVALS)
def test_key_range_is_the_cheapest_kind(case):
    lo, hi, sk = case
    shown = from_intervals(lo, hi, sk)
    if not shown.any():
        want = "empty"
    elif shown.all():
        want = "full"
    else:
        want = "band" if is_one_band(lo, hi, sk) else "rows"
    assert KeyRange.of(lo, hi, sk).kind == want


@given(case=ANY_INTERVALS)
def test_transposed_is_exact(case):
    lo, hi, sk = case
    sq = lo.shape[1]
    key_range = KeyRange.of(lo, hi, sk)
    first, last = key_range.transposed(sq, sk)
    assert bool((first <= last).all())
    for end in (first, last):
        assert end.dtype == torch.int32
        assert end.is_contiguous()
        assert bool((end.diff() >= 0).all())
        assert int(end.min()) >= 0
        assert int(end.max()) <= sq
    shown = from_intervals(lo, hi, sk)
    got = from_intervals(first, last, sq).transpose(1, 2)
    assert torch.equal(got.expand_as(shown), shown)


@given(case=ANY_INTERVALS)
def test_a_rectangle_is_found_exactly_where_there_is_one(case):
    lo, hi, sk = case
    key_range = KeyRange.of(lo, hi, sk)
    shown = from_intervals(lo, hi, sk)
    rows, keys = shown.any(0).any(1).nonzero().flatten(), shown.any(0).any(0).nonzero().flatten()
    found = None
    if key_range.kind == "rows":
        box = (int(rows[0]), int(rows[-1]) + 1, int(keys[0]), int(keys[-1]) + 1)
        if bool(shown[:, box[0] : box[1], box[2] : box[3]].all()):
            found = box
    assert key_range.rectangle == found


@pytest.mark.parametrize("batch", [1, 3])
def test_area_counts_shared_intervals_for_each_sequence(batch):
    assert KeyRange.causal().area(4, 4, batch=batch) == 10 * batch
    per_sequence = KeyRange.of(torch.zeros(2, 4, dtype=torch.int64), torch.tensor([[0, 1, 1, 3], [1, 1, 2, 4]]), 4)
    assert per_sequence.kind == "rows"
    assert per_sequence.area(4, 4, batch=2) == 5 + 8


@pytest.mark.parametrize(("sq", "sk"), [(1, 1), (1, 5), (5, 1), (3, 7), (7, 3)])
def test_named_key_ranges(sq, sk):
    pairs = torch.ones(sq, sk, dtype=torch.bool)
    for key_range, want in (
        (KeyRange.empty(), ~pairs),
        (KeyRange.full(), pairs),
        (KeyRange.causal(), pairs.tril()),
    ):
        lo, hi = key_range.bounds(sq, sk)
        assert torch.equal(from_intervals(lo, hi, sk)[0], want)
        assert key_range.area(sq, sk) == int(want.sum())


def test_bounds_are_made_once_per_shape_and_device():
    key_range = KeyRange.causal()
    assert key_range.bounds(4, 4)[0] is key_range.bounds(4, 4)[0]
    assert key_range.transposed(4, 4)[0] is key_range.transposed(4, 4)[0]
    assert key_range.bounds(4, 6)[0] is not key_range.bounds(4, 4)[0]
    assert key_range.bounds(2, 4, "meta")[0].device.type == "meta"


class TestKeyRangeRefusals:
    ROWS = KeyRange.of(torch.tensor([0, 0, 2]), torch.tensor([1, 1, 4]), 5)

    def test_another_number_of_rows(self):
        assert self.ROWS.kind == "rows"
        with pytest.raises(ShapeError, match="has 3 rows, but q has 4"):
            self.ROWS.bounds(4, 5)

    def test_fewer_keys_than_it_shows(self):
        with pytest.raises(ShapeError, match="shows keys up to 4, but k has 3"):
            self.ROWS.bounds(3, 3)

    @pytest.mark.parametrize(
        ("lo", "hi"),
        [([0, -1], [1, 1]), ([0, 0], [1, 4]), ([0, 2], [1, 1]), ([1, 0], [2, 2]), ([0, 0], [2, 1])],
        ids=["below_zero", "above_sk", "reversed", "lo_decreases", "hi_decreases"],
    )
    def test_intervals_that_break_the_rules(self, lo, hi):
        with pytest.raises(ShapeError, match="query row 1 of sequence 0 sees keys"):
            KeyRange.of(torch.tensor(lo), torch.tensor(hi), 3)

    def test_ends_of_two_shapes(self):
        with pytest.raises(ShapeError, match=r"lo \[1, 2\] and hi \[1, 3\]"):
            KeyRange.of(torch.zeros(2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), 3)


def test_a_mask_that_is_no_interval_rule_is_caught():
    class Backwards(AttentionMask):
        """Later queries see earlier keys: both ends decrease."""

        def key_range(self, q_pos, seq_len):
            return seq_len - 1 - q_pos, seq_len - q_pos

    lo, hi = Backwards().key_range(torch.arange(4), 4)
    with pytest.raises(ShapeError, match="neither end may decrease"):
        KeyRange.of(lo, hi, 4)


def test_lengths_one_to_three_exhaustively():
    """Every lawful pair of ends on small blocks, not a sample of them."""
    for sq, sk in itertools.product(range(1, 4), repeat=2):
        ends = list(itertools.combinations_with_replacement(range(sk + 1), sq))
        for lo, hi in itertools.product(ends, repeat=2):
            if any(a > b for a, b in zip(lo, hi, strict=True)):
                continue
            lo_t, hi_t = torch.tensor([lo]), torch.tensor([hi])
            key_range = KeyRange.of(lo_t, hi_t, sk)
            shown = from_intervals(*key_range.bounds(sq, sk), sk)
            assert torch.equal(shown, from_intervals(lo_t, hi_t, sk)), (sq, sk, lo, hi)
