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
    """What one process's module holds of a parameter: `full.narrow(dim, start, length)`, contiguous.

    Args:
        name: of the parameter in the model of one process; a tied parameter has one.
        shape: of the whole parameter.
        dim, start, length: the cut; all of it unless given.
        is_owner: whether this process stands for the slice among those that hold the same one at another place of the tensor
            or pipeline axis. Each element of a parameter has one owner there.
    """

    name: str
    shape: tuple[int, ...]
    dim: int = 0
    start: int = 0
    length: int | None = None
    is_owner: bool = True

    @property
    def is_whole(self) -> bool:
        return self.width == self._lengths[self.dim]

    @property
    def width(self) -> int:
        """Elements along `dim`."""
        return self._lengths[self.dim] if self.length is None else self.length

    @property
    def numel(self) -> int:
        return math.prod(self._lengths) // max(1, self._lengths[self.dim]) * self.width

    @property
    def _lengths(self) -> tuple[int, ...]:
        # A scalar is a vector of one.
        return self.shape or (1,)

    def band(self, dim: int) -> tuple[int, int, int]:
        """As columns of the parameter seen as a matrix that is cut along `dim`: (rows, first column, columns of the slice)."""
        lengths = self._lengths
        inner = math.prod(lengths[dim + 1 :])
        start, width = (0, lengths[dim]) if self.is_whole else (self.start, self.width)
        return math.prod(lengths[:dim]), start * inner, width * inner


@dataclass(frozen=True)
class Piece:
    """Elements `begin` to `begin + count` of a slice's elements in row-major order."""

    slice: ParameterSlice
    begin: int
    count: int

    def __post_init__(self) -> None:
        assert 0 <= self.begin <= self.begin + self.count <= self.slice.numel, f"{self} is not within its slice"

    @staticmethod
    def whole(name: str, shape: tuple[int, ...]) -> Piece:
        """All of a parameter."""
        everything = ParameterSlice(name, shape)
        return Piece(everything, 0, everything.numel)


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
    assert source.slice.shape == target.slice.shape, f"{source} and {target} are not of one parameter"
    dim = target.slice.dim if source.slice.is_whole else source.slice.dim
    if source.slice.is_whole and target.slice.is_whole:
        # One row: both are plain ranges of the parameter.
        dim = 0
    assert source.slice.is_whole or target.slice.is_whole or source.slice.dim == target.slice.dim, (
        f"{source.slice.name} is cut along dimension {source.slice.dim} and along {target.slice.dim}"
    )
    copied = 0
    for theirs in _rectangles(source, dim):
        for ours in _rectangles(target, dim):
            top, bottom = max(theirs.top, ours.top), min(theirs.bottom, ours.bottom)
            left, right = max(theirs.left, ours.left), min(theirs.right, ours.right)
            if top >= bottom or left >= right:
                continue
            rows, columns = bottom - top, right - left
            _view(lambda a, b: out[a:b], ours, top, left, rows, columns).copy_(
                _view(read, theirs, top, left, rows, columns)
            )
            copied += rows * columns
    return copied


def _rectangles(piece: Piece, dim: int) -> list[_Rectangle]:
    """A piece as at most three rectangles: the rest of its first row, whole rows, the beginning of its last."""
    _, left, width = piece.slice.band(dim)
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


def parameter_slices(module: nn.Module) -> dict[str, ParameterSlice]:
    """What this process's module holds, by the names of `module.named_parameters()`.

    A module that is cut over processes says so in a method `parameter_slices()` that returns such a dictionary; any other
    holds every parameter whole and under its own name.
    """
    own = getattr(module, "parameter_slices", None)
    if own is not None:
        return own()
    # With ZeRO-3, a parameter's own shape is that of what is left of it.
    return {
        name: ParameterSlice(name, tuple(getattr(parameter, "ds_shape", parameter.shape)))
        for name, parameter in module.named_parameters()
    }
