"""What `longctx bench attention` says: the table, and the rows of the CSV file."""

from __future__ import annotations

from collections.abc import Sequence

from longctx.bench_timing import TIMED, CaseResult
from longctx.peers import Contender
from longctx.results import Measurement

# The matrix product's name among the measurements.
PRODUCT = "matmul"


def table(results: Sequence[CaseResult], entrants: Sequence[Contender], *, with_both: bool = False) -> str:
    """Forward / backward (/ both) TFLOP/s beside a matrix product's, ours over the best peer's, and the reasons where there is
    no number."""
    shown = [c for c in entrants if any(c.name in r.tflops for r in results)]
    header = ["batch x length, heads, mask", "matmul", *(c.title for c in shown), "ours / best peer"]
    body, notes = [], []
    for r in results:
        body.append(
            [
                r.case.label,
                "-" if r.bound is None else _number(r.bound),
                *(_speeds(r.tflops.get(c.name), with_both) for c in shown),
                _ratio(r, entrants),
            ]
        )
        notes += [f"{r.case.label}: {c.title}: {r.refused[c.name]}" for c in entrants if c.name in r.refused]
    widths = [max(len(line[i]) for line in (header, *body)) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in (header, *body)
    ]
    blocks = [
        f"{r.case.label}: {c.title}, kernel alone {_number(got['block forward'])} / {_number(got['block backward'])}"
        for r in results
        for c in entrants
        if "block forward" in (got := r.tflops.get(c.name, {}))
    ]
    return "\n".join([*lines, "", *blocks, *([""] if notes else []), *notes])


def _number(x: float) -> str:
    return f"{x:.0f}" if x >= 10 else f"{x:.2g}"


def _speeds(got: dict[str, float] | None, with_both: bool) -> str:
    return " / ".join(_number(got[metric]) for metric in TIMED[: 2 + with_both]) if got else "-"


def _ratio(result: CaseResult, entrants: Sequence[Contender]) -> str:
    cells = []
    for metric in ("forward", "backward"):
        ours, peers = (
            [result.tflops[c.name][metric] for c in entrants if c.name in result.tflops and c.is_ours == side]
            for side in (True, False)
        )
        cells.append(f"{max(ours) / max(peers):.2f}" if ours and peers else "-")
    return " / ".join(cells)


def rows_of(result: CaseResult, area: str = "attention", **where) -> list[Measurement]:
    """One case's results as measurements, the matrix product's among them.

    Args:
        area: "attention", or "sweep": the first part of their names.
        where: the columns of `results.environment`.
    """
    bound = {} if result.bound is None else {PRODUCT: {"forward": result.bound}}
    return [
        Measurement(
            name=f"{area}/{name}", config=result.case.label, metric=metric, value=value, unit="TFLOP/s", **where
        )
        for name, got in (bound | result.tflops).items()
        for metric, value in got.items()
    ]
