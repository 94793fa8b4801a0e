"""Errors against an exact result, and whether they are such as plain torch makes in the same dtype."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

# An error may be so many times plain torch's, plus a floor.
FACTOR = 2.0
# Relative, by dtype: 8 and 2 units in the last place. A loss is one number, whose error in plain torch may be 0 by luck.
FLOORS = {"fp32": 2**-20, "bf16": 2**-6}


class Error(NamedTuple):
    """How far from exact: as root mean square and at the worst element, both relative to the exact tensor's."""

    rms: float
    peak: float


@dataclass(frozen=True)
class Tally:
    """What an `Error` is made from; the tallies of a tensor's shards add up."""

    error_squares: float
    exact_squares: float
    error_max: float
    exact_max: float

    @staticmethod
    def of(got: torch.Tensor, exact: torch.Tensor) -> Tally:
        """The tally of `got`, which should be `exact`; any shape, the same for both."""
        assert got.shape == exact.shape, f"{list(got.shape)} compared with {list(exact.shape)}"
        exact = exact.detach().double()
        error = got.detach().to(exact) - exact
        if not error.numel():
            return Tally(0.0, 0.0, 0.0, 0.0)
        # A nan must not look like a small error.
        error = error.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
        return Tally(
            float(error.square().sum()),
            float(exact.square().sum()),
            float(error.abs().max()),
            float(exact.abs().max()),
        )

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.error_squares + other.error_squares,
            self.exact_squares + other.exact_squares,
            max(self.error_max, other.error_max),
            max(self.exact_max, other.exact_max),
        )

    @property
    def error(self) -> Error:
        tiny = torch.finfo(torch.float64).tiny
        return Error(
            math.sqrt(self.error_squares / max(self.exact_squares, tiny)), self.error_max / max(self.exact_max, tiny)
        )


@dataclass(frozen=True)
class Comparison:
    """One tensor, or one number, of the plan beside one process.

    Args:
        what: the quantity: attention, gradients, gradient norm, gradient scale, loss.
        name: which tensor of it.
        ours, plain: the plan's and plain torch's, both from float64.
        floor: added to what is allowed.
        note: the numbers themselves, where they are few.
    """

    what: str
    name: str
    ours: Tally
    plain: Tally
    floor: float
    note: str = ""

    @property
    def measured(self) -> tuple[float, float, float]:
        """(our error, plain torch's, what is allowed), of rms and peak whichever is nearer to its limit, or beyond it."""
        pairs = zip(self.ours.error, self.plain.error, strict=True)
        return max(
            ((mine, theirs, FACTOR * theirs + self.floor) for mine, theirs in pairs),
            key=lambda triple: triple[0] / triple[2],
        )

    @property
    def excess(self) -> float:
        """Error over what is allowed; above 1 is wrong."""
        mine, _, allowed = self.measured
        return mine / allowed

    @property
    def is_ok(self) -> bool:
        return self.excess <= 1.0


def merge_ranks(of_ranks: Sequence[list[Comparison]]) -> list[Comparison]:
    """One list from every rank's: shards of attention are added up, of what all ranks hold whole the worst is taken."""
    merged = []
    for same in zip(*of_ranks, strict=True):
        if same[0].what == "attention":
            ours, plain = same[0].ours, same[0].plain
            for other in same[1:]:
                ours, plain = ours + other.ours, plain + other.plain
            merged.append(replace(same[0], ours=ours, plain=plain))
        else:
            merged.append(max(same, key=lambda c: c.excess))
    return merged
