"""Pieces of parameters: whatever one plan cut, another one finds whole."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from longctx.parallel import slices
from longctx.parallel.slices import ParameterSlice, Piece, copy_overlap, parameter_slices


def cut(shape: tuple[int, ...], dim: int, tp: int, zero: int) -> list[Piece]:
    """A parameter over `tp` unequal slices along `dim`, each flattened over `zero` partitions of equal length."""
    found = []
    edges = [(shape or (1,))[dim] * t // tp for t in range(tp + 1)]
    for start, stop in itertools.pairwise(edges):
        of_rank = ParameterSlice("w", shape) if tp == 1 else ParameterSlice("w", shape, dim, start, stop - start)
        size = math.prod(of_rank.shape)
        each = -(-size // zero)
        for z in range(zero):
            begin = min(z * each, size)
            found.append(Piece(of_rank, begin, min(each, size - begin)))
    return found


def elements(full: torch.Tensor, piece: Piece) -> torch.Tensor:
    """By the definition."""
    of_rank = piece.slice
    rows = of_rank.take(full.view(of_rank.full_shape)).flatten()
    return rows[piece.begin : piece.begin + piece.count].clone()


@st.composite
def plans(draw):
    shape = tuple(draw(st.lists(st.integers(1, 7), max_size=3)))
    dim = draw(st.integers(0, max(0, len(shape) - 1)))
    # A scalar is not cut over tensor ranks.
    degrees = [draw(st.integers(1, 5)) if shape or i % 2 else 1 for i in range(4)]
    return shape, dim, degrees


@given(plans())
def test_every_piece_is_found_in_the_pieces_of_any_other_plan(case):
    shape, dim, (tp, zero, other_tp, other_zero) = case
    full = torch.arange(math.prod(shape), dtype=torch.float32)
    held = [(piece, elements(full, piece)) for piece in cut(shape, dim, tp, zero)]
    for target in cut(shape, dim, other_tp, other_zero):
        out = torch.full((target.count,), torch.nan)
        copied = 0
        asked = 0

        def read(a, b, values):
            nonlocal asked
            assert 0 <= a < b <= len(values)
            asked += b - a
            return values[a:b]

        for source, values in held:
            copied += copy_overlap(source, lambda a, b, values=values: read(a, b, values), target, out)
        assert copied == target.count
        assert torch.equal(out, elements(full, target))
        assert asked <= full.numel() + target.count


def test_only_what_overlaps_is_read():
    """An embedding of a million rows over 8 partitions: a process of 16 reads its own 16th part."""
    shape = (1_000_000, 8)
    read = []

    def reading(a, b):
        read.append(b - a)
        return torch.zeros(b - a)

    (target,) = cut(shape, 0, 1, 16)[5:6]
    out = torch.empty(target.count)
    assert sum(copy_overlap(source, reading, target, out) for source in cut(shape, 0, 1, 8)) == target.count
    assert sum(read) == target.count


def test_another_order_of_elements_would_be_seen(monkeypatch):
    """With rows that are mistaken for columns the property above fails."""
    right = ParameterSlice.columns
    monkeypatch.setattr(slices.ParameterSlice, "columns", lambda self, dim: right(self, 0))
    full = torch.arange(24.0)
    target = Piece.whole("w", (4, 6))
    out = torch.full((24,), torch.nan)
    for source in cut((4, 6), 1, 2, 1):
        values = elements(full, source)
        copy_overlap(source, lambda a, b, values=values: values[a:b], target, out)
    assert not torch.equal(out, full)


def test_pieces_of_other_parameters_and_other_cuts_are_refused():
    whole = Piece.whole("w", (4, 6))
    with pytest.raises(AssertionError, match="are not of one parameter"):
        copy_overlap(Piece.whole("w", (6, 4)), lambda a, b: torch.zeros(b - a), whole, torch.zeros(24))
    rows, columns = (
        Piece(ParameterSlice("w", (4, 6), 0, 0, 2), 0, 12),
        Piece(ParameterSlice("w", (4, 6), 1, 0, 2), 0, 8),
    )
    with pytest.raises(AssertionError, match="is cut along dimension 0 and along 1"):
        copy_overlap(rows, lambda a, b: torch.zeros(b - a), columns, torch.zeros(8))
    with pytest.raises(AssertionError):
        Piece(ParameterSlice("w", (4, 6)), 20, 5)


def test_a_module_of_one_process_holds_all_of_its_parameters():
    assert parameter_slices(nn.Linear(3, 2)) == {
        "weight": ParameterSlice("weight", (2, 3)),
        "bias": ParameterSlice("bias", (2,)),
    }
