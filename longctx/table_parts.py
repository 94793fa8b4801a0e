"""What every table of the README is made with: the newest figures, where they come from, Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from longctx.results import Measurement


def latest(rows: Iterable[Measurement]) -> list[Measurement]:
    """The newest row of each (name, gpu, gpus, config, metric), in the order in which these first appear."""
    newest: dict[tuple, Measurement] = {}
    for row in rows:
        key = (row.name, row.gpu, row.gpus, row.config, row.metric)
        # Of rows of one time, or of none, the later line holds.
        if key not in newest or row.date >= newest[key].date:
            newest[key] = row
    return list(newest.values())


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column left, the others right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def provenance(rows: Sequence[Measurement]) -> str:
    """Where and when the newest of our own rows was measured."""
    own = [row for row in rows if not row.source]
    if not own:
        return ""
    row = max(own, key=lambda r: r.date)
    return f"{row.gpu}, torch {row.torch}, triton {row.triton}, commit {row.commit}, {row.date[:10]}"


# What the matrix product's row says of its case in early runs, which had one bound for all rows.
WHOLE_RUN = "8192 cubed"
OLDER = "`†` measured with an earlier commit, in another run."


def of_last_gpu(rows: Sequence[Measurement]) -> list[Measurement]:
    """Our own rows on the GPU that was measured last."""
    own = [row for row in rows if not row.source]
    gpu = max(own, key=lambda row: row.date).gpu if own else ""
    return [row for row in own if row.gpu == gpu]


def newest_commit(rows: Iterable[Measurement]) -> str:
    """Of our own measurements."""
    return max(((row.date, row.commit) for row in rows if not row.source), default=("", ""))[1]


def mark(row: Measurement, commit: str) -> str:
    """`*` for a figure of anchors.csv, `†` for one of another commit than `commit`."""
    return "*" if row.source else "" if row.commit == commit else "†"


def with_unit(row: Measurement) -> str:
    """A value as a reader expects it: `35.0 %`, `17 000`, `16.9 GiB`."""
    if row.unit == "%":
        return f"{row.value:.1f} %"
    if row.unit == "tokens/s":
        return f"{row.value:_.0f}".replace("_", " ")
    return f"{row.value:.1f} {row.unit}"
