"""The README's figures of measurements, drawn from the same rows as its tables.

What is drawn is data first (`Picture`); the PNG carries a digest of it, so that a figure older than its CSV file is found.
`longctx bench redraw` draws all of them anew.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longctx.bench_timing import TIMED
from longctx.errors import ConfigError
from longctx.kernel_rules import AttentionCase
from longctx.kernels import kernel_names
from longctx.peers import contenders, short
from longctx.predecessors import sweep_contenders
from longctx.results import Measurement, read
from longctx.table_parts import WHOLE_RUN, latest, of_last_gpu, provenance

_DIGEST_KEY = "longctx data"
_RING_ALONE, _RING_PEERS = "one GPU", ("torch-cp", "ulysses-torch")


@dataclass(frozen=True)
class Line:
    """One contender's values in a panel: (number of the group, or length; TFLOP/s)."""

    label: str
    is_ours: bool
    points: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    ylabel: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Picture:
    """All that a figure shows.

    Args:
        kind: "bars", a group of them for each tick; "lines" over the length; "scaling", lines over the number of GPUs, from 0.
        panels: rows of columns.
        ticks: (x, label).
        bound: TFLOP/s of the matrix product, a line through every panel; None: no line.
        marks: for each row of panels, (tick, value) of the short lines that bars are held against.
    """

    kind: str
    title: str
    panels: tuple[tuple[Panel, ...], ...]
    ticks: tuple[tuple[int, str], ...]
    bound: float | None = None
    marks: tuple[tuple[tuple[int, float], ...], ...] = ()

    @property
    def digest(self) -> str:
        """The same for the same data, whatever drew it."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


def attention_bars(rows: Sequence[Measurement], titles: Mapping[str, str] | None = None) -> Picture:
    """Forward and backward of every shape of `attention/...` on the GPU of the newest row.

    Args:
        titles: contender -> name; others are left out. None: all that the benchmark knows.

    Raises:
        ConfigError: there is nothing of it in `rows`.
    """
    titles = titles or {c.name: c.title for c in contenders(kernel_names())}
    rows = _of("attention/", rows)
    values = {(row.name.split("/", 1)[1], row.metric, row.config): row.value for row in rows}
    groups = list(dict.fromkeys(row.config for row in rows if row.name != "attention/matmul"))
    panels = tuple(
        (Panel("", f"{metric}, TFLOP/s", tuple(_bars(values, metric, groups, titles, set(kernel_names())))),)
        for metric in TIMED[:2]
    )
    return Picture("bars", provenance(rows), panels, _wrapped(groups), _bound(rows))


def ring_bars(rows: Sequence[Measurement]) -> Picture:
    """Forward, and with backward, of attention over several GPUs; held against the best kernel on one with its share.

    Raises:
        ConfigError: there is nothing of it in `rows`.
    """
    rows = _of("ring/", rows)
    values = {(row.name.split("/", 1)[1], row.metric, row.config): row.value for row in rows}
    groups = list(dict.fromkeys(row.config for row in rows))
    names = list(dict.fromkeys(name for name, _, _ in values))
    titles = {name: name for name in names if not name.startswith(_RING_ALONE)}
    ours = {name for name in titles if not name.startswith(_RING_PEERS)}
    panels, marks = [], []
    for metric in (TIMED[0], TIMED[2]):
        lines = tuple(_bars(values, metric, groups, titles, ours))
        panels.append((Panel("", f"{metric}, TFLOP/s per GPU", lines),))
        alone = [
            [got for name in names if name not in titles and (got := values.get((name, metric, group)))]
            for group in groups
        ]
        marks.append(tuple((i, max(found)) for i, found in enumerate(alone) if found))
    return Picture("bars", provenance(rows), tuple(panels), _wrapped(groups), marks=tuple(marks))


def sweep_lines(rows: Sequence[Measurement], titles: Mapping[str, str] | None = None) -> Picture:
    """Lines over the length: a column for each head dim and mask, a row for forward, backward and both.

    Args:
        rows: of a sweep, `sweep/...`; of several dates the newest of each.
        titles: contender -> its name in the legend; others are left out. None: all that the sweep knows.

    Raises:
        ConfigError: there is no sweep in `rows`.
    """
    titles = titles or {c.name: c.title for c in sweep_contenders(kernel_names())}
    rows = _of("sweep/", rows)
    # (head dim, mask) -> (metric, contender) -> length -> TFLOP/s.
    found: dict[tuple[int, str], dict[tuple[str, str], dict[int, float]]] = {}
    for row in rows:
        if (case := AttentionCase.of(row)) is not None:
            lines = found.setdefault((case.head_dim, case.mask), {})
            lines.setdefault((row.metric, row.name.split("/", 1)[1]), {})[case.length] = row.value
    columns = sorted(found)
    shown = [name for name in titles if any(name == other for lines in found.values() for _, other in lines)]
    panels = tuple(
        tuple(
            Panel(
                f"head dim {head_dim}, {mask}" if metric == TIMED[0] else "",
                f"{metric}, TFLOP/s",
                tuple(
                    Line(
                        titles[name],
                        name in kernel_names(),
                        tuple(sorted(found[head_dim, mask].get((metric, name), {}).items())),
                    )
                    for name in shown
                ),
            )
            for head_dim, mask in columns
        )
        for metric in TIMED
    )
    lengths = sorted({x for row in panels for panel in row for line in panel.lines for x, _ in line.points})
    return Picture("lines", provenance(rows), panels, tuple((n, short(n)) for n in lengths), _bound(rows))


def scaling_lines(rows: Sequence[Measurement]) -> Picture:
    """TFLOP/s of each GPU over their number: a column for one sequence on all of them, one for as much of it on each.

    Raises:
        ConfigError: there is nothing of it in `rows`.
    """
    rows = [row for row in _of("scaling/", rows) if row.metric == "tflops"]
    panels = []
    for kind in dict.fromkeys(row.name for row in rows):
        lines = []
        for config in dict.fromkeys(row.config for row in rows if row.name == kind):
            points = tuple(sorted((row.gpus, row.value) for row in rows if (row.name, row.config) == (kind, config)))
            lines.append(Line(config, True, points))
            if len(points) > 1:
                level = tuple((gpus, points[0][1]) for gpus, _ in points)
                lines.append(Line("what the fewest reach", False, level))
        panels.append(Panel(kind.split("/", 1)[1], "TFLOP/s of each GPU", tuple(lines)))
    numbers = sorted({row.gpus for row in rows})
    return Picture("scaling", provenance(rows), (tuple(panels),), tuple((n, str(n)) for n in numbers))


def _of(prefix: str, rows: Sequence[Measurement]) -> list[Measurement]:
    """The newest of each of our own rows of that name, on the GPU that was measured last."""
    own = latest([row for row in rows if row.name.startswith(prefix) and not row.source])
    if not any(row.name != f"{prefix}matmul" for row in own):
        raise ConfigError(f"there is nothing of {prefix.rstrip('/')!r} to draw: measure it with --csv FILE")
    return of_last_gpu(own)


def _bars(
    values: Mapping[tuple[str, str, str], float],
    metric: str,
    groups: Sequence[str],
    titles: Mapping[str, str],
    ours: set[str],
) -> Iterator[Line]:
    # Whoever is in one panel has a place, and a colour, in all.
    shown = {name for name, _, _ in values}
    for name, title in titles.items():
        if name in shown:
            points = [(i, values[name, metric, g]) for i, g in enumerate(groups) if (name, metric, g) in values]
            yield Line(title, name in ours, tuple(points))


def _wrapped(groups: Iterable[str]) -> tuple[tuple[int, str], ...]:
    return tuple((i, group.replace(", ", "\n")) for i, group in enumerate(groups))


def _bound(rows: Sequence[Measurement]) -> float | None:
    """The median over the cases; of early runs the one figure of the whole run."""
    found = [row for row in rows if row.name.endswith("/matmul")]
    of_cases = [row for row in found if row.config != WHOLE_RUN] or found
    return statistics.median(row.value for row in of_cases) if of_cases else None


def draw(picture: Picture, path: Path) -> None:
    """Write a picture as PNG.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("figures need matplotlib: pip install 'longctx[plot]'") from error
    rows, columns = len(picture.panels), len(picture.panels[0])
    bars = picture.kind == "bars"
    size = (max(6.0, 1.7 * len(picture.ticks)), 4.0 * rows) if bars else (4.2 * columns, 3.0 * rows)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex="col", sharey=not bars)
    handles: dict[str, Any] = {}
    for r, row in enumerate(picture.panels):
        for c, panel in enumerate(row):
            axes = grid[r, c]
            (_draw_bars if bars else _draw_lines)(axes, panel)
            if picture.bound is not None:
                axes.axhline(picture.bound, color="black", linestyle=":", label="matmul")
            for x, y in picture.marks[r] if picture.marks else ():
                axes.hlines(y, x - 0.45, x + 0.45, color="black", linestyle=":", label="best kernel on one GPU")
            axes.set(title=panel.title, ylabel=panel.ylabel if c == 0 else "")
            if picture.kind == "scaling":
                axes.set_ylim(bottom=0)
            handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    for axes in grid[-1]:
        at, labels = zip(*picture.ticks, strict=True)
        axes.set_xticks(at, labels, fontsize=8, rotation=60 if picture.kind == "lines" else 0)
        axes.set_xlabel({"lines": "length", "scaling": "GPUs"}.get(picture.kind, ""))
    figure.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=4, title=picture.title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={_DIGEST_KEY: picture.digest})


def _draw_bars(axes, panel: Panel) -> None:
    width = 0.8 / max(1, len(panel.lines))
    for i, line in enumerate(panel.lines):
        at = [x + (i - (len(panel.lines) - 1) / 2) * width for x, _ in line.points]
        heights = [y for _, y in line.points]
        axes.bar(at, heights, width, label=line.label, color=f"C{i}", hatch="//" if line.is_ours else None)


def _draw_lines(axes, panel: Panel) -> None:
    for i, line in enumerate(panel.lines):
        style = "-" if line.is_ours else "--"
        xs, ys = [x for x, _ in line.points], [y for _, y in line.points]
        axes.plot(xs, ys, style, marker=".", color=f"C{i}", label=line.label)
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)


# name -> what is drawn of the rows in NAME.csv, as NAME.png.
FIGURES: dict[str, Callable[[Sequence[Measurement]], Picture]] = {
    "attention": attention_bars,
    "sweep": sweep_lines,
    "ring": ring_bars,
    "scaling": scaling_lines,
}


def _pictures(folder: Path) -> Iterator[tuple[Path, Picture]]:
    for name, of in FIGURES.items():
        if (path := folder / f"{name}.csv").exists():
            yield path.with_suffix(".png"), of(read(path))


def redraw(folder: Path) -> list[Path]:
    """Draw every figure whose CSV file is in `folder`, beside it; their paths.

    Raises:
        ConfigError: there is none, or one of them holds nothing to draw.
    """
    drawn = []
    for path, picture in _pictures(folder):
        draw(picture, path)
        drawn.append(path)
    if not drawn:
        raise ConfigError(f"{folder} holds none of {', '.join(f'{name}.csv' for name in FIGURES)}")
    return drawn


def outdated(folder: Path) -> list[Path]:
    """The figures in `folder` that do not show what their CSV files say, or are not there."""
    return [path for path, picture in _pictures(folder) if digest_in(path) != picture.digest]


def digest_in(path: Path) -> str | None:
    """`Picture.digest` of what a PNG shows; None: no such file, or drawn by something else."""
    if not path.exists():
        return None
    data, at = path.read_bytes(), 8
    # Chunks: length, type, content, checksum.
    while at + 8 <= len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        key, _, text = data[at + 8 : at + 8 + size].partition(b"\0")
        if kind == b"tEXt" and key.decode("latin-1") == _DIGEST_KEY:
            return text.decode("latin-1")
        at += 12 + size
    return None
