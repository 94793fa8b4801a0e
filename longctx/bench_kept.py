"""What earlier calls of `longctx bench attention` wrote into the same file, so that several short calls fill one table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from longctx.bench_output import PRODUCT
from longctx.bench_timing import TIMED
from longctx.results import read
from longctx.tables import latest

# What must be equal for a measurement to be as good as a new one.
_SAME = ("commit", "gpu", "gpus", "torch", "triton")


@dataclass(frozen=True)
class Kept:
    """Measurements of this code, GPU and versions.

    Args:
        tflops: configuration -> contender -> metric -> TFLOP/s; contenders of which every metric of `TIMED` is there.
        bounds: configuration -> the matrix product's TFLOP/s beside it.
    """

    tflops: Mapping[str, Mapping[str, dict[str, float]]]
    bounds: Mapping[str, float]


def kept(path: Path | None, area: str, where: Mapping[str, str | int]) -> Kept:
    """What `path` holds that need not be measured again; nothing where there is no such file yet.

    Args:
        area: the first part of the rows' names, "attention" or "sweep".
        where: the columns of `results.environment`, of the call that asks.

    Raises:
        ConfigError: the file is not one of measurements.
    """
    if path is None or not path.exists():
        return Kept({}, {})
    rows = [
        row
        for row in latest(read(path))
        if row.name.startswith(f"{area}/") and all(getattr(row, column) == where[column] for column in _SAME)
    ]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        found.setdefault(row.config, {}).setdefault(row.name.split("/", 1)[1], {})[row.metric] = row.value
    whole = {
        config: {name: got for name, got in of_case.items() if set(TIMED) <= set(got)}
        for config, of_case in found.items()
    }
    return Kept(whole, {row.config: row.value for row in rows if row.name == f"{area}/{PRODUCT}"})
