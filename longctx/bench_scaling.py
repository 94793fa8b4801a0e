"""`longctx bench scaling`: a training on 1, 2, 4, ... GPUs, of one sequence (strong) and of one that grows with them (weak).

Each run is `longctx train` under torchrun in a folder of its own, with wandb offline. A folder whose run is complete is read
instead of run again, so that a call goes on where the last one ended, and figures are made from folders alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from longctx.bench import token_count
from longctx.errors import ConfigError, LongCtxError
from longctx.figures import draw, scaling_lines
from longctx.metrics import WARMUP_STEPS, read_metrics
from longctx.peers import short
from longctx.results import Measurement, append, read, rows_of_run
from longctx.tables import scaling_table

OUTPUT, COMMAND, METRICS = "output.txt", "command.json", "metrics.jsonl"
# Of what a run measured.
SHOWN = ("tokens/s", "tflops", "mfu", "mfu dense", "memory", "waiting")
# Settings that make a run what it is called.
OWN = ("data.seq_len", "train.steps", "train.run_dir", "train.save_every", "train.resume")
# Of a run that failed: lines of what it said last.
TAIL = 12


@dataclass(frozen=True)
class Point:
    """One run.

    Args:
        kind: "strong", the same sequence for every number of GPUs, or "weak", the same part of one for each GPU.
        tokens: of the sequence, or of each GPU.
    """

    kind: str
    gpus: int
    tokens: int

    @property
    def seq_len(self) -> int:
        return self.tokens * (self.gpus if self.kind == "weak" else 1)

    @property
    def label(self) -> str:
        return f"{short(self.tokens)} tokens" + " a GPU" * (self.kind == "weak")

    def folder(self, runs: Path) -> Path:
        return runs / f"{self.kind}-{short(self.tokens)}-{self.gpus}gpus"


def plan_name(settings: Sequence[str]) -> str:
    """What the settings do with the GPUs: `ulysses` for --parallel.ulysses={gpus}, and a ring where they say nothing; then what
    they say of the engine."""
    plan, engine = (
        [word.removeprefix(part).removesuffix("={gpus}") for word in settings if word.startswith(part)]
        for part in ("--parallel.", "--engine.")
    )
    return ", ".join([*(plan or ["ring"]), *engine])


def points(gpus: Sequence[int], strong: Sequence[int], weak: Sequence[int]) -> list[Point]:
    """The runs, the shortest first: what does not work is found early."""
    found = [
        Point(kind, n, tokens)
        for kind, lengths in (("strong", strong), ("weak", weak))
        for tokens in lengths
        for n in gpus
    ]
    return sorted(found, key=lambda point: point.seq_len**2 / point.gpus)


def command(point: Point, config: str | None, runs: Path, steps: int, settings: Sequence[str]) -> list[str]:
    """What starts a run. In `settings`, `{gpus}` stands for their number; without any of `parallel`, they are one ring."""
    if not any(word.startswith("--parallel.") for word in settings):
        settings = (*settings, "--parallel.ring={gpus}")
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(point.gpus)),
        *("-m", "longctx", "train", *(("--config", config) if config else ())),
        *(f"--data.seq_len={point.seq_len}", f"--train.steps={steps}", f"--train.run_dir={point.folder(runs)}"),
        *("--train.save_every=none", "--train.resume=never", "--log.wandb=offline", "--log.every=1", "--log.progress=plain"),
        *(word.replace("{gpus}", str(point.gpus)) for word in settings),
    ]  # fmt: skip


def _told(words: Sequence[str]) -> list[str]:
    """A command without what may differ where its folder is read: which Python, and where the folder is."""
    return [word for word in words[1:] if not word.startswith("--train.run_dir=")]


def is_complete(folder: Path, words: Sequence[str]) -> bool:
    """Whether this command's run in `folder` went to its end.

    Raises:
        ConfigError: the folder holds the run of another command.
    """
    if not (folder / METRICS).exists():
        return False
    path = folder / COMMAND
    if not path.exists() or json.loads(path.read_text())["command"] != _told(words):
        raise ConfigError(f"{folder} holds a run of other settings: remove it, or name another folder with --runs")
    return bool(read_metrics(folder / METRICS, "summary"))


def start(words: Sequence[str], folder: Path, commit: str | None) -> None:
    """Run a command to its end; it and what it says stand in files in `folder`.

    Args:
        commit: of the code; None: what the run itself finds.

    Raises:
        ConfigError: it failed, with the end of what it said.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / COMMAND).write_text(json.dumps({"commit": commit, "command": _told(words)}, indent=1))
    path = folder / OUTPUT
    with path.open("w") as output:
        code = subprocess.run(words, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        said = "\n".join(path.read_text(errors="replace").splitlines()[-TAIL:])
        raise ConfigError(f"exit code {code}; all that it said is in {path}, and last:\n{said}")


def rows_of(point: Point, folder: Path, plan: str) -> list[Measurement]:
    """What a complete run measured, as `scaling/...`: tokens/s of all GPUs and of one, TFLOP/s of one, MFU, memory, waiting."""
    rows = rows_of_run(folder, "run")
    # Its length is that of this number of GPUs.
    model, _, *packed = rows[0].config.split(", ")
    name, config = f"scaling/{point.kind}", ", ".join([model, point.label, *packed, plan])
    rows = [replace(row, name=name, config=config, gpus=point.gpus) for row in rows if row.metric in SHOWN]
    total = next(row for row in rows if row.metric == "tokens/s")
    each = replace(total, metric="tokens/s a GPU", value=total.value / point.gpus)
    # That of the run, whatever is given to a call that only reads it.
    commit = json.loads((folder / COMMAND).read_text())["commit"]
    return [replace(row, commit=commit or row.commit) for row in (*rows, each)]


def measure(
    wanted: Sequence[Point], runs: Path, make: Callable[[Point], Sequence[str]], plan: str, commit: str | None
) -> tuple[list[Measurement], dict[Point, str]]:
    """Rows of all runs, started or found; of each that failed the reason."""
    rows: list[Measurement] = []
    failed: dict[Point, str] = {}
    for number, point in enumerate(wanted, 1):
        folder = point.folder(runs)
        what = f"[{number}/{len(wanted)}] {point.kind}, {point.label}, {point.gpus} GPU{'s' * (point.gpus > 1)}"
        try:
            words = make(point)
            if is_complete(folder, words):
                print(f"{what}: complete, read from {folder}", flush=True)
            else:
                print(f"{what}: runs; {folder / OUTPUT} says how far it is", flush=True)
                start(words, folder, commit)
            rows += rows_of(point, folder, plan)
        except LongCtxError as error:
            failed[point] = str(error)
            print(f"{what}: {error}", file=sys.stderr, flush=True)
    return rows, failed


def parser() -> argparse.ArgumentParser:
    """The command line of `longctx bench scaling`."""
    p = argparse.ArgumentParser(
        prog="longctx bench scaling",
        description=__doc__.splitlines()[0],
        epilog="Further --section.key=value go to every run; in them {gpus} is their number.",
        allow_abbrev=False,
    )
    p.add_argument("--config", help="the model, as for longctx train")
    p.add_argument("--gpus", nargs="+", type=int, default=[1, 2, 4, 8], metavar="N", help="(1 2 4 8)")
    p.add_argument(
        "--strong", nargs="+", type=token_count, default=(), metavar="N", help="tokens of a sequence, such as 128k"
    )
    p.add_argument(
        "--weak", nargs="+", type=token_count, default=(), metavar="N", help="tokens of a sequence on each GPU"
    )
    p.add_argument(
        "--steps", type=int, default=6, help=f"of each run, of which the first {WARMUP_STEPS} do not count (6)"
    )
    p.add_argument(
        "--runs", type=Path, default=Path("runs/scaling"), metavar="FOLDER", help="of the runs' folders (runs/scaling)"
    )
    p.add_argument("--csv", type=Path, help="append the measurements to this file")
    p.add_argument("--plot", type=Path, metavar="PNG", help="draw them")
    p.add_argument("--commit", help="of this code, where it has no git history")
    return p


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and the settings for every run.

    Raises:
        ConfigError: something else was given, or nothing to measure.
    """
    args, settings = parser().parse_known_args(argv)
    for word in settings:
        if not word.startswith("--") or "." not in word or "=" not in word:
            raise ConfigError(f"{word!r} is neither an option nor a setting such as --engine.zero_stage=3")
        if (key := word[2:].partition("=")[0]) in OWN:
            raise ConfigError(f"--{key} is what this command sets itself: use --strong, --weak, --steps or --runs")
    if not args.strong and not args.weak:
        raise ConfigError("nothing to measure: name lengths with --strong 128k, --weak 32k or both")
    if args.steps <= WARMUP_STEPS:
        raise ConfigError(
            f"--steps {args.steps}: the first {WARMUP_STEPS} warm up, so {WARMUP_STEPS + 1} are the least"
        )
    if min(args.gpus) < 1:
        raise ConfigError(f"--gpus {min(args.gpus)}: a run has at least one")
    return args, settings


def main(argv: Sequence[str]) -> int:
    """`longctx bench scaling`; returns the exit code: 0, 1 if a run failed, 2 for a command that cannot be done."""
    try:
        args, settings = parse(argv)
        wanted = points(args.gpus, args.strong, args.weak)
        rows, failed = measure(
            wanted,
            args.runs,
            lambda point: command(point, args.config, args.runs, args.steps, settings),
            plan_name(settings),
            args.commit,
        )
        if args.csv and rows:
            # Of a run that was there before, too. Values are rounded in the file.
            known = {replace(row, value=0.0) for row in read(args.csv)} if args.csv.exists() else set()
            append(args.csv, [row for row in rows if replace(row, value=0.0) not in known])
        print(f"\n{scaling_table(rows)}")
        if args.plot and rows:
            draw(scaling_lines(rows), args.plot)
        return int(bool(failed))
    except LongCtxError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
