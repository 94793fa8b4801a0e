"""What a run survives: ranks killed with -9 at random moments, and a disk that is full while a checkpoint is written.

    python tests/fault_table.py --kills 50 --full-disks 10 --csv benchmarks/results/faults.csv

One run of two processes is killed and started again, over and over, with checkpoints written at once and beside the training in
turn. After every kill each checkpoint that was there before is still there and undamaged, and the next start goes on from the
newest one; at the end all steps are, bit for bit, those of a run that nobody disturbed. A full disk is a real one: a small tmpfs
in a mount namespace of its own, where the system allows that.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from run_cases import Background, Forked, Run, clean_env, train, train_command, write_config

from longctx.checkpoint_folder import find_damage, find_problem, read_manifest
from longctx.metrics import read_metrics
from longctx.results import Measurement, append, environment

# What must be the same, bit for bit.
EXACT = ("step", "cursor", "tokens", "loss", "grad_norm", "lr")
# 6 MB of state: a save takes long enough to be hit. The last step is never reached.
WORDS = (
    "--model.hidden_size=128",
    "--parallel.ring=2",
    "--train.save_every=2",
    "--train.steps=100000",
    "--log.every=1",
)
START = '"kind": "run"'
WHILE_TRAINING, WHILE_SAVING = "kill -9 while training", "kill -9 while saving"


@dataclass(frozen=True)
class Kill:
    """One kill, and what came of it.

    Args:
        kind: `WHILE_TRAINING` or `WHILE_SAVING`.
        rank: the victim.
        reached: the last step, from 0, when it was killed.
        before: the newest complete checkpoint just before; after: and when all processes were gone; -1: none.
        went_on: where the next start went on.
        lost: checkpoints of before that were gone or damaged.
    """

    kind: str
    rank: int
    reached: int
    before: int
    after: int
    went_on: int
    lost: int


def complete_steps(root: Path) -> list[int]:
    """The steps of the complete checkpoints in a folder."""
    return sorted(int(p.name.split("-")[1]) for p in root.glob("step-*") if find_problem(p) is None)


def damaged(root: Path, steps: Sequence[int]) -> int:
    """How many of these checkpoints cannot be read any more."""
    paths = [root / f"step-{step:08d}" for step in steps]
    return sum(find_problem(p) is not None or find_damage(p, read_manifest(p)["files"]) is not None for p in paths)


def start(launcher: str, log: Path, *words: str | Path) -> Run:
    """A run of two processes with `WORDS`, in the background.

    Args:
        launcher: as in `run_cases.train`.
    """
    if launcher == "forked":
        return Forked(2, log, *WORDS, *words)
    return Background(train_command(launcher, 2, *WORDS, *words), log)


def kills(folder: Path, count: int, seed: int, launcher: str = "torchrun") -> Iterator[Kill]:
    """Kill a run `count` times; each is given when the start after it has made a step."""
    chosen = random.Random(seed)
    config = write_config(folder)
    root, metrics = folder / "run" / "checkpoints", folder / "run" / "metrics.jsonl"
    pending: dict | None = None
    for number in range(count + 1):
        asynchronous = str(number % 2 == 0).lower()
        words = ("--config", config, f"--train.async_save={asynchronous}")
        starts = metrics.read_text().count(START) if metrics.exists() else 0
        with start(launcher, folder / f"log{number}", *words) as run:
            run.wait_for(lambda: has_begun(metrics, starts), "a step", 180)  # noqa: B023
            if pending is not None:
                told = re.search(r"^resumed +at step (\d+)", run.output, re.M)
                yield Kill(**pending, went_on=int(told[1]) if told else -1)
            if number == count:
                return
            kind = (WHILE_TRAINING, WHILE_SAVING)[number // 2 % 2]
            wait_for_moment(run, kind, root, chosen)
            before, rank = complete_steps(root), chosen.randrange(2)
            reached = last_step(metrics)
            run.rank(rank).kill()
            assert run.wait(60) != 0, run.output
        after = complete_steps(root)
        # What was pruned in the meantime was replaced by newer ones.
        kept = [step for step in before if not after or step >= after[0]]
        pending = {
            "kind": kind,
            "rank": rank,
            "reached": reached,
            "before": before[-1] if before else -1,
            "after": after[-1] if after else -1,
            "lost": damaged(root, sorted({*kept, *after})) + int(bool(before) and not after),
        }


def wait_for_moment(run: Run, kind: str, root: Path, chosen: random.Random) -> None:
    delay = chosen.uniform(0, 1.5)
    run.wait_for(lambda: bool(complete_steps(root)), "a first checkpoint", 180)
    time.sleep(delay)
    if kind == WHILE_SAVING:
        run.wait_for(lambda: any(root.glob("tmp-step-*/state-*")), "a save", 60)
        time.sleep(chosen.uniform(0, 0.03))


def has_begun(metrics: Path, starts: int) -> bool:
    """Whether a run that is not one of the first `starts` has made a step."""
    text = metrics.read_text() if metrics.exists() else ""
    return text.count(START) > starts and '"kind": "step"' in text[text.rindex(START) :]


def last_step(metrics: Path) -> int:
    """The newest step in a file that is being written; -1: none."""
    found = re.findall(r'"step": (\d+)', metrics.read_text()[-4000:])
    return int(found[-1]) if found else -1


def undisturbed(folder: Path, steps: int, launcher: str = "torchrun") -> None:
    """The same run, which reaches so many steps in one go."""
    folder.mkdir()
    words = ("--config", write_config(folder), "--train.save_every=none", "--train.async_save=false")
    metrics = folder / "run" / "metrics.jsonl"
    with start(launcher, folder / "log", *words) as run:
        run.wait_for(lambda: metrics.exists() and last_step(metrics) >= steps, f"step {steps}", 1800)


def records(folder: Path) -> list[dict]:
    found = read_metrics(folder / "run" / "metrics.jsonl")
    return [{key: record[key] for key in EXACT} for record in found]


def steps_differ(folder: Path, other: Path, steps: int) -> list[int]:
    """The steps below `steps` that two runs did not take alike, each once and in order."""
    ours, theirs = records(folder)[:steps], records(other)[:steps]
    assert [r["step"] for r in theirs] == list(range(steps))
    if [r["step"] for r in ours] != list(range(steps)):
        return list(range(steps))
    return [a["step"] for a, b in zip(ours, theirs, strict=True) if a != b]


# ---- a full disk


@dataclass(frozen=True)
class FullDisk:
    """One run on a disk that has room for one checkpoint and a part of the next.

    Args:
        room: of what a checkpoint takes.
        said: whether the run told of the full disk, and went on.
        lost: checkpoints of before that were gone or damaged afterwards.
        went_on: whether the run went on from the earlier checkpoint once there was room.
    """

    room: float
    said: bool
    lost: int
    went_on: bool


def can_mount() -> bool:
    """Whether this user may have a mount namespace."""
    try:
        tried = subprocess.run(
            ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=64k tmpfs /mnt"], capture_output=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return tried.returncode == 0


def full_disk(folder: Path, room: float) -> FullDisk:
    """Run `full_disk_inside` in a mount namespace."""
    folder.mkdir(parents=True)
    command = ["unshare", "-rm", sys.executable, __file__, "--inside", str(folder), "--room", str(room)]
    path = {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, env=clean_env(**path), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return FullDisk(**json.loads(done.stdout.splitlines()[-1]))


def full_disk_inside(folder: Path, room: float) -> FullDisk:
    root = folder / "run" / "checkpoints"
    words = ("--config", write_config(folder), *WORDS[:3], f"--train.async_save={str(room < 0.5).lower()}")
    first = train("forked", 2, *words, "--train.steps=2")
    assert first.returncode == 0, first.stdout
    (saved,) = root.iterdir()
    files = {file.name: file.read_bytes() for file in saved.iterdir()}
    size = sum(-(-len(content) // 4096) * 4096 for content in files.values())
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(size * (1 + room))}", "tmpfs", str(root)], check=True)
    saved.mkdir()
    for name, content in files.items():
        (saved / name).write_bytes(content)
    full = train("forked", 2, *words, "--train.steps=6", "--train.keep=1")
    # Warned of at step 4, and raised at the last one.
    warned = re.search(r"^warning +no checkpoint: .*No space left on device", full.stdout, re.M)
    raised = re.search(r"failed at step 5 .*checkpoint .*No space left on device", full.stdout)
    said = bool(warned and raised) and full.returncode == 1 and "longctx/checkpoint" not in full.stdout
    lost = damaged(root, [2]) + (complete_steps(root) != [2]) + any(root.glob("tmp-*"))
    subprocess.run(["mount", "-o", f"remount,size={3 * size}", str(root)], check=True)
    again = train("forked", 2, *words, "--train.steps=6", "--train.keep=1")
    went_on = again.returncode == 0 and "resumed   at step 2" in again.stdout and complete_steps(root) == [6]
    return FullDisk(room, said, int(lost), went_on)


# ---- the table


def measurements(told: Sequence[Kill], full: Sequence[FullDisk], same_steps: int) -> list[Measurement]:
    """The rows of the table."""
    config = "2 processes, a checkpoint every 2 steps"
    where = environment("cpu", 0)

    def rows(kind: str, trials: int, kept: int, went_on: int) -> list[Measurement]:
        figures = {"times": trials, "kept every checkpoint": kept, "went on": went_on}
        return [
            Measurement(name=f"faults/{kind}", config=config, metric=metric, value=value, unit="", **where)
            for metric, value in figures.items()
        ]

    found = []
    for kind in (WHILE_TRAINING, WHILE_SAVING):
        of_kind = [kill for kill in told if kill.kind == kind]
        if of_kind:
            went_on = sum(kill.went_on == kill.after >= kill.before for kill in of_kind)
            found += rows(kind, len(of_kind), sum(not kill.lost for kill in of_kind), went_on)
    if full:
        good = sum(trial.said and trial.went_on for trial in full)
        found += rows("disk full while saving", len(full), sum(not trial.lost for trial in full), good)
    if told:
        name = "faults/steps equal to an undisturbed run's"
        found.append(Measurement(name=name, config=config, metric="steps", value=same_steps, unit="", **where))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--full-disks", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, help="where to add the rows; without it they are printed only")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--room", type=float, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.inside is not None:
        print(json.dumps(asdict(full_disk_inside(words.inside, words.room))))
        return 0
    with tempfile.TemporaryDirectory(prefix="longctx-faults-") as place:
        told, full, steps, wrong = [], [], 0, []
        if words.kills:
            killed, whole = Path(place) / "killed", Path(place) / "whole"
            for kill in kills(killed, words.kills, words.seed):
                told.append(kill)
                print(f"{len(told):>3}  {kill}", flush=True)
            steps = len(records(killed))
            undisturbed(whole, steps)
            wrong = steps_differ(killed, whole, steps)
            print(f"{steps} steps, {len(wrong)} of them not those of an undisturbed run", flush=True)
        for number in range(words.full_disks):
            chosen = random.Random(f"{words.seed} {number}")
            full.append(full_disk(Path(place) / f"full{number}", chosen.uniform(0.02, 0.97)))
            print(full[-1], flush=True)
    rows = measurements(told, full, steps - len(wrong))
    for row in rows:
        print(f"{row.name:<50} {row.metric:<20} {row.value:g}")
    if words.csv is not None:
        append(words.csv, rows)
    bad = any(kill.lost or kill.went_on != kill.after or kill.after < kill.before for kill in told)
    return int(bad or bool(wrong) or any(trial.lost or not trial.said or not trial.went_on for trial in full))


if __name__ == "__main__":
    sys.exit(main())
