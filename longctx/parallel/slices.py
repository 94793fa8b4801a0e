"""Which elements of which parameter a process holds, and how what one plan cut becomes what another plan needs.

    parameter (4 x 6)        its slice on tensor rank 1        a piece of that slice
    . . . | a b c            a b c                             . . c
    . . . | d e f            d e f    ZeRO cuts the            d e f     begin 2, count 6
    . . . | g h i            g h i    flattened slice          g h .
    . . . | j k l            j k l                             . . .

Tensor and pipeline parallelism cut a parameter along one dimension (a slice), ZeRO cuts the flattened slice anywhere (a piece).
Pieces of any two plans overlap in at most nine rectangles of the parameter, seen as a matrix. Pure: no process group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn


@dataclass(frozen=True)
class ParameterSlice:
    """Which part of a parameter of the whole model a parameter of this rank's module is.

    Args:
        name: of the parameter in the `Transformer` of one process, which is Hugging Face's.
        full_shape: of the whole parameter.
        dim: along which it is cut; None: this rank holds all of it.
        start, length: the part that this rank holds, along `dim`; with dim None 0 and 0.
    """

    name: str
    full_shape: tuple[int, ...]
    dim: int | None = None
    start: int = 0
    length: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the part."""
        if self.dim is None:
            return self.full_shape
        return (*self.full_shape[: self.dim], self.length, *self.full_shape[self.dim + 1 :])

    def take(self, whole: torch.Tensor) -> torch.Tensor:
        """The part of `whole`, of `full_shape`, as a view."""
        return whole if self.dim is None else whole.narrow(self.dim, self.start, self.length)

    def columns(self, dim: int | None) -> tuple[int, int]:
        """First column and number of columns of the part, in the parameter as a matrix whose rows are cut by `dim`.

        That matrix has a row for each index before `dim`, and in it a column for each index from `dim` on; with dim None it is
        one row.
        """
        if dim is None:
            return 0, math.prod(self.full_shape)
        inner = math.prod(self.full_shape[dim + 1 :])
        start, length = (0, self.full_shape[dim]) if self.dim is None else (self.start, self.length)
        return start * inner, length * inner


@dataclass(frozen=True)
class Piece:
    """Elements `begin` to `begin + count` of a slice's elements in row-major order."""

    slice: ParameterSlice
    begin: int
    count: int

    def __post_init__(self) -> None:
        end = self.begin + self.count
        assert 0 <= self.begin <= end <= math.prod(self.slice.shape), f"{self} is not within its slice"

    @staticmethod
    def whole(name: str, shape: tuple[int, ...]) -> Piece:
        """All of a parameter."""
        return Piece(ParameterSlice(name, shape), 0, math.prod(shape))


class _Rectangle(NamedTuple):
    """Rows [top, bottom) x columns [left, right) of a parameter's matrix; `offset`: of its first element in the piece.

    Consecutive rows stand `right - left` elements apart in the piece.
    """

    top: int
    bottom: int
    left: int
    right: int
    offset: int


def copy_overlap(source: Piece, read: Callable[[int, int], torch.Tensor], target: Piece, out: torch.Tensor) -> int:
    """Copy what two pieces of one parameter have in common.

    Args:
        read: `read(a, b)` gives elements a to b of `source`, [b - a]; asked for no more than rows that overlap.
        out: elements of `target`, [target.count]; those in common are set.

    Returns:
        How many these are.
    """
    ours, theirs = target.slice, source.slice
    assert theirs.full_shape == ours.full_shape, f"{source} and {target} are not of one parameter"
    dim = ours.dim if theirs.dim is None else theirs.dim
    assert ours.dim in (None, dim), f"{ours.name} is cut along dimension {theirs.dim} and along {ours.dim}"
    copied = 0
    for given in _rectangles(source, dim):
        for wanted in _rectangles(target, dim):
            top, bottom = max(given.top, wanted.top), min(given.bottom, wanted.bottom)
            left, right = max(given.left, wanted.left), min(given.right, wanted.right)
            if top >= bottom or left >= right:
                continue
            rows, columns = bottom - top, right - left
            _view(lambda a, b: out[a:b], wanted, top, left, rows, columns).copy_(
                _view(read, given, top, left, rows, columns)
            )
            copied += rows * columns
    return copied


def _rectangles(piece: Piece, dim: int | None) -> list[_Rectangle]:
    """A piece as at most three rectangles: the rest of its first row, whole rows, the beginning of its last."""
    left, width = piece.slice.columns(dim)
    if not piece.count or not width:
        return []
    end = piece.begin + piece.count
    first, last = piece.begin // width, (end - 1) // width
    found = []
    if first == last:
        spans = [(first, first + 1, piece.begin % width, (end - 1) % width + 1)]
    else:
        head = int(piece.begin % width > 0)
        tail = int(end % width > 0)
        spans = [(first, first + 1, piece.begin % width, width)] * head
        spans += [(first + head, last + 1 - tail, 0, width)] if first + head < last + 1 - tail else []
        spans += [(last, last + 1, 0, end % width)] * tail
    for top, bottom, begin, stop in spans:
        found.append(_Rectangle(top, bottom, left + begin, left + stop, top * width + begin - piece.begin))
    return found


def _view(
    read: Callable[[int, int], torch.Tensor], within: _Rectangle, top: int, left: int, rows: int, columns: int
) -> torch.Tensor:
    """[rows, columns] from (top, left) on."""
    width = within.right - within.left
    first = within.offset + (top - within.top) * width
    if rows == 1:
        first += left - within.left
        return read(first, first + columns).view(1, columns)
    return read(first, first + rows * width).view(rows, width).narrow(1, left - within.left, columns)


def slice_of(name: str, parameter: nn.Parameter) -> ParameterSlice:
    """The slice that a parameter was made as.

    Args:
        name: in the whole model.
    """
    # ZeRO-3 empties parameters and notes their shapes.
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    if not hasattr(parameter, "tp_cut"):
        return ParameterSlice(name, shape)
    dim, rank, size = parameter.tp_cut
    full = (*shape[:dim], shape[dim] * size, *shape[dim + 1 :])
    return ParameterSlice(name, full, dim, rank * shape[dim], shape[dim])


def parameter_slices(module: nn.Module) -> dict[str, ParameterSlice]:
    """For each parameter of this rank's module, by its name there, the part of the whole model that it is.

    A tied parameter appears once on each rank. A module of a pipeline stage, whose names are its own, says by `canonical_name(name)` what each is in the whole
    model.
    """
    rename = getattr(module, "canonical_name", str)
    return {name: slice_of(rename(name), parameter) for name, parameter in module.named_parameters()}
