"""What `longctx bench attention` says: the table, the rows of the CSV file, and the figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from longctx.bench_timing import CaseResult
from longctx.errors import ConfigError
from longctx.peers import Contender, short
from longctx.results import Measurement
from longctx.tables import AttentionCase, latest

SWEEP_METRICS = ("forward", "backward", "forward+backward")


def table(
    results: Sequence[CaseResult], entrants: Sequence[Contender], bound: float, *, with_both: bool = False
) -> str:
    """Forward / backward (/ both) TFLOP/s, the best peer's share of ours, and the reasons where there is no number."""
    shown = [c for c in entrants if any(c.name in r.tflops for r in results)]
    header = ["batch x length, heads, mask", "matmul", *(c.title for c in shown), "ours / best peer"]
    body, notes = [], []
    for r in results:
        body.append(
            [
                r.case.label,
                _number(bound),
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
    return " / ".join(_number(got[metric]) for metric in SWEEP_METRICS[: 2 + with_both]) if got else "-"


def _ratio(result: CaseResult, entrants: Sequence[Contender]) -> str:
    cells = []
    for metric in ("forward", "backward"):
        ours, peers = (
            [result.tflops[c.name][metric] for c in entrants if c.name in result.tflops and c.is_ours == side]
            for side in (True, False)
        )
        cells.append(f"{max(ours) / max(peers):.2f}" if ours and peers else "-")
    return " / ".join(cells)


def bound_row(bound: float, size: int, area: str = "attention", **where) -> Measurement:
    """The hardware's bound as a measurement; `where`: the columns of `results.environment`."""
    return Measurement(
        name=f"{area}/matmul", config=f"{size} cubed", metric="forward", value=bound, unit="TFLOP/s", **where
    )


def rows_of(result: CaseResult, area: str = "attention", **where) -> list[Measurement]:
    """One case's results as measurements.

    Args:
        area: "attention", or "sweep": the first part of their names.
        where: the columns of `results.environment`.
    """
    return [
        Measurement(
            name=f"{area}/{name}", config=result.case.label, metric=metric, value=value, unit="TFLOP/s", **where
        )
        for name, got in result.tflops.items()
        for metric, value in got.items()
    ]


def plot(results: Sequence[CaseResult], entrants: Sequence[Contender], bound: float, path: Path, title: str) -> None:
    """Bars of forward and backward TFLOP/s, a group for each case.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    figure_of = _matplotlib_figure()
    shown = [c for c in entrants if any(c.name in r.tflops for r in results)]
    figure = figure_of(figsize=(max(6.0, 1.6 * len(results)), 7), layout="constrained")
    for axes, metric in zip(figure.subplots(2, 1, sharex=True), ("forward", "backward"), strict=True):
        width = 0.8 / max(1, len(shown))
        for i, entrant in enumerate(shown):
            at = [n + (i - (len(shown) - 1) / 2) * width for n in range(len(results))]
            heights = [r.tflops.get(entrant.name, {}).get(metric, 0.0) for r in results]
            axes.bar(at, heights, width, label=entrant.title, color=f"C{i}", hatch="//" if entrant.is_ours else None)
        axes.axhline(bound, color="black", linestyle=":", label="matmul")
        axes.set_ylabel(f"{metric}, TFLOP/s")
    axes.set_xticks(range(len(results)), [r.case.label.replace(", ", "\n") for r in results], fontsize=8)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4, title=title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def plot_sweep(rows: Sequence[Measurement], titles: dict[str, str], path: Path) -> None:
    """Lines over the length: a column for each head dim and mask, a row for forward, backward and both.

    Args:
        rows: of a sweep, `sweep/...`; of several dates the newest of each.
        titles: contender -> its name in the legend; others are left out.

    Raises:
        ConfigError: matplotlib is not installed, or there is no sweep in `rows`.
    """
    figure_of = _matplotlib_figure()
    rows = [row for row in latest(rows) if row.name.startswith("sweep/")]
    # (head dim, mask) -> metric -> contender -> length -> TFLOP/s.
    found: dict[tuple[int, str], dict[str, dict[str, dict[int, float]]]] = {}
    for row in rows:
        if (case := AttentionCase.of(row)) is not None:
            lines = found.setdefault((case.head_dim, case.mask), {}).setdefault(row.metric, {})
            lines.setdefault(row.name.split("/", 1)[1], {})[case.length] = row.value
    if not found:
        raise ConfigError("there is no sweep to draw: measure one with --sweep --csv FILE")
    bound = next((row.value for row in rows if row.name == "sweep/matmul"), None)
    columns = sorted(found)
    figure = figure_of(figsize=(4.2 * len(columns), 9), layout="constrained")
    all_axes = figure.subplots(len(SWEEP_METRICS), len(columns), squeeze=False, sharex="col", sharey=True)
    shown = [name for name in titles if any(name in lines for by in found.values() for lines in by.values())]
    for column, panel in enumerate(columns):
        for axes, metric in zip(all_axes[:, column], SWEEP_METRICS, strict=True):
            for i, name in enumerate(shown):
                line = sorted(found[panel].get(metric, {}).get(name, {}).items())
                axes.plot([x for x, _ in line], [y for _, y in line], marker=".", color=f"C{i}", label=titles[name])
            if bound is not None:
                axes.axhline(bound, color="black", linestyle=":", label="matmul")
            axes.set_xscale("log", base=2)
            axes.grid(alpha=0.3)
            if column == 0:
                axes.set_ylabel(f"{metric}, TFLOP/s")
        all_axes[0, column].set_title(f"head dim {panel[0]}, {panel[1]}")
        lengths = sorted({n for lines in found[panel].values() for line in lines.values() for n in line})
        all_axes[-1, column].set_xticks(lengths, [short(n) for n in lengths], rotation=60, fontsize=8)
        all_axes[-1, column].set_xlabel("length")
    newest = max(rows, key=lambda row: row.date)
    title = f"{newest.gpu}, torch {newest.torch}, triton {newest.triton}, commit {newest.commit}, {newest.date[:10]}"
    handles, labels = all_axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, title=title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _matplotlib_figure():
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'longctx[plot]'") from error
    return Figure
