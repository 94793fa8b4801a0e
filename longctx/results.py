"""Measured figures as CSV files, one row a measurement, and the README's tables made from them.

`benchmarks/results/*.csv` is the only place that numbers live in. `python -m longctx.results --write` puts them into the
README between `<!-- table: NAME -->` and `<!-- end -->`; `--check` fails where the README says something else.
`--from-run RUN_DIR --name NAME` adds what a training run measured to `training.csv`. `--rules` prints by which measured
speeds `kernel = "auto"` should choose, as the lines of `longctx/kernels/choice.py`; `--write-rules` writes them there.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from importlib import metadata
from pathlib import Path

from longctx.errors import ConfigError, LongCtxError
from longctx.metrics import WARMUP_STEPS, read_metrics

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
CHOICE = ROOT / "longctx" / "kernels" / "choice.py"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One number, with all that is needed to judge it.

    Args:
        name: what was measured, `area/system`, for example `attention/triton`.
        commit: of this repository; `+` at its end where the code had changes of its own. Empty for others' figures.
        date: UTC, ISO 8601; empty where a source gives none.
        gpu: the device's name; gpus: how many.
        torch, triton: versions.
        config: the shapes, as a reader would say them.
        metric, value, unit: `forward`, 402.5, `TFLOP/s`.
        source: where a figure of others comes from; empty for our own.
    """

    name: str
    commit: str
    date: str
    gpu: str
    gpus: int
    torch: str
    triton: str
    config: str
    metric: str
    value: float
    unit: str
    source: str = ""


COLUMNS = tuple(f.name for f in fields(Measurement))
# Files of our own measurements leave the last column out.
OWN_COLUMNS = COLUMNS[:-1]


def environment(gpu: str, gpus: int = 1, commit: str | None = None) -> dict[str, str | int]:
    """The columns that say where and when: commit, date, gpu, gpus, torch, triton.

    Args:
        commit: for a copy of the code that has no git history; None asks git.
    """
    now = datetime.datetime.now(datetime.UTC)
    return {
        "commit": git_commit() if commit is None else commit,
        "date": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "gpu": gpu,
        "gpus": gpus,
        "torch": version("torch"),
        "triton": version("triton"),
    }


def version(package: str) -> str:
    """The installed version of a package, without importing it; "none" if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def git_commit() -> str:
    """Short commit of this code, with `+` if tracked files under longctx/ differ from it; "unknown" outside of git."""

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=20)

    try:
        head = git("rev-parse", "--short=10", "HEAD")
        # An installed copy may lie inside somebody else's repository.
        if head.returncode or git("ls-files", "--error-unmatch", "longctx/__init__.py").returncode:
            return "unknown"
        changed = git("diff", "--quiet", "HEAD", "--", "longctx").returncode != 0
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return head.stdout.strip() + ("+" if changed else "")


def append(path: Path, rows: Iterable[Measurement]) -> None:
    """Add rows to a CSV file, with a header where the file is new.

    Raises:
        ConfigError: the file has other columns, or rows with a source are to go where there is no such column.
    """
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = COLUMNS if any(row.source for row in rows) else OWN_COLUMNS
    if path.exists() and path.stat().st_size:
        with path.open(newline="") as file:
            header = tuple(next(csv.reader(file), ()))
        if header not in (COLUMNS, OWN_COLUMNS) or not set(columns) <= set(header):
            raise ConfigError(f"{path}: its columns are {', '.join(header)}; these rows need {', '.join(columns)}")
        columns = header
        new = False
    else:
        new = True
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(columns)
        for row in rows:
            writer.writerow([f"{row.value:.6g}" if c == "value" else getattr(row, c) for c in columns])


def read(path: Path) -> list[Measurement]:
    """The rows of one file, or of every CSV file of a folder in the order of their names.

    Raises:
        ConfigError: no such file, other columns, or a value that is no number; names file, line and column.
    """
    if path.is_dir():
        return [row for file in sorted(path.glob("*.csv")) for row in read(file)]
    if not path.exists():
        raise ConfigError(f"no such results file: {path}")
    rows = []
    with path.open(newline="") as file:
        reader = csv.reader(file)
        header = tuple(next(reader, ()))
        if header not in (COLUMNS, OWN_COLUMNS):
            raise ConfigError(f"{path}: columns {', '.join(header) or 'missing'}; expected {', '.join(OWN_COLUMNS)}")
        for cells in reader:
            where = f"{path}, line {reader.line_num}"
            if len(cells) != len(header):
                raise ConfigError(f"{where}: {len(cells)} cells, expected {len(header)}")
            row: dict = dict(zip(header, cells, strict=True))
            for column, kind in (("gpus", int), ("value", float)):
                try:
                    row[column] = kind(row[column])
                except ValueError:
                    raise ConfigError(f"{where}: {column} = {row[column]!r} is not a number") from None
            rows.append(Measurement(**row))
    return rows


def rows_of_run(run_dir: Path, name: str) -> list[Measurement]:
    """What a training run measured: medians over its steps without the first `WARMUP_STEPS`, its peak memory and its last loss.

    Args:
        run_dir: holds `metrics.jsonl`; of a run that was resumed, the last start counts.
        name: of the system, beside its peers in the training table.

    Raises:
        ConfigError: no metrics there, or too few steps.
    """
    path = run_dir / "metrics.jsonl"
    starts, summaries = read_metrics(path, "run"), read_metrics(path, "summary")
    if not starts:
        raise ConfigError(f"{path} has no record of a start: it is not from this version of the trainer")
    run = starts[-1]
    steps = [s for s in read_metrics(path) if s["step"] >= run["first_step"] + WARMUP_STEPS]
    if not steps:
        raise ConfigError(f"{path}: no step after the first {WARMUP_STEPS}, which warm up; train longer")
    where = {c: run[c] for c in ("commit", "date", "gpu", "gpus", "torch", "triton")}
    memory = max(r["peak_memory_bytes"] for r in (*steps, *summaries[-1:]))
    found = [
        ("tokens/s", _median(steps, "tokens_per_second"), 1.0, "tokens/s"),
        ("mfu", _median(steps, "mfu"), 100.0, "%"),
        ("mfu dense", _median(steps, "mfu_dense"), 100.0, "%"),
        ("tflops", _median(steps, "tflops"), 1.0, "TFLOP/s"),
        # What of a step compute stood still for messages of attention.
        ("waiting", _median(steps, "exposed_comm_share"), 100.0, "%"),
        ("memory", memory, 1 / 2**30, "GiB"),
        # Beside that of another plan after as many steps: whether both train alike.
        (f"loss of step {steps[-1]['step']}", steps[-1]["loss"], 1.0, "nats/token"),
    ]
    return [
        Measurement(
            name=f"train/{name}", config=_run_label(run), metric=metric, value=value * factor, unit=unit, **where
        )
        for metric, value, factor, unit in found
        if value is not None
    ]


def losses_of_run(run_dir: Path, steps: int) -> list[Measurement]:
    """The losses of a run's first `steps` steps, to hold a ring's beside one GPU's.

    Raises:
        ConfigError: no metrics there, or they do not begin at the first step.
    """
    path = run_dir / "metrics.jsonl"
    starts = read_metrics(path, "run")
    found = [s for s in read_metrics(path) if s["step"] < steps]
    if not starts or [s["step"] for s in found] != list(range(steps)):
        raise ConfigError(f"{path} does not hold the first {steps} steps of a run: train that many from the start")
    run = starts[-1]
    where = {c: run[c] for c in ("commit", "date", "gpu", "gpus", "torch", "triton")}
    name, config = f"losses/ring {run['plan']['ring']}", _run_label(run)
    return [
        Measurement(
            name=name, config=config, metric=f"loss of step {s['step']}", value=s["loss"], unit="nats/token", **where
        )
        for s in found
    ]


def _median(steps: Sequence[dict], key: str) -> float | None:
    values = [step[key] for step in steps if step.get(key) is not None]
    return statistics.median(values) if values else None


def _run_label(run: dict) -> str:
    """The model and the sequence of a run: `1.24B parameters, 64k tokens, packed documents`."""
    # Here: only a run needs the model.
    from longctx.model import ModelConfig

    model, data = run["config"]["model"], run["config"]["data"]
    # The scaling of RoPE has no parameters.
    count = ModelConfig(**{**model, "rope_scaling": None}).shape.num_params
    number = f"{count / 1e9:.2f}B" if count >= 1e8 else f"{count / 1e6:.2f}M"
    packed = ", packed documents" if data["mask_documents"] else ""
    length = data["seq_len"]
    return f"{number} parameters, {f'{length >> 10}k' if length % 1024 == 0 else length} tokens{packed}"


def parser() -> argparse.ArgumentParser:
    """The command line of `python -m longctx.results`."""
    p = argparse.ArgumentParser(prog="python -m longctx.results", description=__doc__.splitlines()[0])
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true", help="make the README's tables from the CSV files")
    what.add_argument("--check", action="store_true", help="exit 1 if the README says something else than the files")
    what.add_argument("--rules", action="store_true", help="print the table of longctx/kernels/choice.py")
    what.add_argument("--write-rules", action="store_true", help="write it there")
    what.add_argument("--from-run", type=Path, metavar="RUN_DIR", help="add a training run's figures to training.csv")
    p.add_argument(
        "--losses", type=int, default=0, metavar="N", help="with --from-run: the first N losses to losses.csv"
    )
    p.add_argument("--commit", help="with --from-run: of the code, where it ran without its git history")
    p.add_argument("--name", help="what --from-run calls the system (longctx)", default="longctx")
    p.add_argument("--results", type=Path, default=RESULTS, help="folder of CSV files")
    p.add_argument("--readme", type=Path, default=README)
    p.add_argument("--choice", type=Path, default=CHOICE, help="the module that --write-rules changes")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m longctx.results`; returns the exit code."""
    # Here: the tables are made of what this module reads.
    from longctx.kernel_rules import rules_text, with_rules
    from longctx.table_parts import with_unit
    from longctx.tables import render

    args = parser().parse_args(argv)
    try:
        if args.from_run:
            rows = rows_of_run(args.from_run, args.name)
            losses = losses_of_run(args.from_run, args.losses) if args.losses else []
            if args.commit:
                rows, losses = ([replace(row, commit=args.commit) for row in some] for some in (rows, losses))
            append(args.results / "training.csv", rows)
            if losses:
                append(args.results / "losses.csv", losses)
            print("\n".join(f"{row.name}, {row.config}: {row.metric} {with_unit(row)}" for row in rows))
            return 0
        if args.rules:
            print(rules_text(read(args.results)))
            return 0
        if args.write_rules:
            args.choice.write_text(with_rules(args.choice.read_text(), read(args.results)))
            return 0
        if not args.readme.exists():
            raise ConfigError(f"no such file: {args.readme}; name one with --readme")
        old = args.readme.read_text()
        new = render(old, read(args.results))
    except LongCtxError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    if args.check:
        if new != old:
            print(f"{args.readme} and {args.results} disagree: run python -m longctx.results --write", file=sys.stderr)
        return int(new != old)
    args.readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
