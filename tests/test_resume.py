"""Checkpoints move: whatever plan saved, any other goes on as if it had been the run's from the start."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from resume_cases import PLACES, by_processes, largest_difference, moved, straight

from longctx.checkpoint import latest_checkpoint
from longctx.checkpoint_folder import read_manifest
from longctx.checkpoint_shards import StateShards
from longctx.checkpoint_state import KINDS

# Of the losses, the norms and the parameters after the resume, where both plans train in fp32.
SAME = 1e-6
# A sample of every stage and axis; each is left once and come to once.
CYCLE = ("one-zero0", "ring2-zero1", "pp2tp2-zero1", "uly2-zero3", "bf16-ring2-zero1", "tp2-zero3", "dp2-zero2")
SAMPLE = list(itertools.pairwise((*CYCLE, CYCLE[0])))
# To whom what is lost must be seen.
BROKEN = [("dp2-zero2", "one-zero0", lost) for lost in ("exp_avg", "exp_avg_sq", "steps")]
BROKEN += [("one-zero0", "ring2-zero1", "a rank's weights")]
TIED = [name for name in PLACES if PLACES[name].is_tied]
OTHERS = [name for name in PLACES if not PLACES[name].is_tied]
# From each to six others that are far apart in the table, and from each with a tied embedding to each.
ALL = [(name, OTHERS[(i + n) % len(OTHERS)]) for i, name in enumerate(OTHERS) for n in (1, 3, 6, 10, 15, 21)]
ALL = [pair for pair in ALL if pair not in SAMPLE] + list(itertools.permutations(TIED, 2))


class Runs:
    """The runs of some pairs of plans.

    Args:
        root: where their checkpoints go.
        broken: moves on which something is lost.
    """

    def __init__(self, root: Path, pairs: list[tuple[str, str]], broken: list[tuple[str, str, str]]) -> None:
        self.root = root
        self.straight = by_processes(straight, root, dict.fromkeys(name for pair in pairs for name in pair), str)
        moves = [*((*pair, "") for pair in pairs), *broken]
        self.moved = by_processes(moved, root, moves, lambda move: move[1])

    def check(self, source: str, target: str) -> None:
        self.check_state(source, target)
        precise = all(PLACES[name].dtype == "fp32" for name in (source, target))
        # In bf16 the state is as exact, but what is computed from it is rounded in another way.
        limit = SAME if precise else 1e-2
        found = largest_difference(self.moved[source, target, ""], self.straight[source])
        # `pytest -s` shows it.
        print(f"\n{source} to {target}: {found:.1e}")
        assert found < limit

    def check_state(self, source: str, target: str) -> None:
        """Saved again right after the resume, every number is bit for bit what it was."""
        before, after = (latest_checkpoint(self.root / name) for name in (source, f"{source}-to-{target}"))
        manifests = read_manifest(before), read_manifest(after)
        assert manifests[0]["optimizer_steps"] == manifests[1]["optimizer_steps"] == 3
        plans = [(manifest["plan"], manifest["engine"]) for manifest in manifests]
        assert plans[0] != plans[1]
        ours, theirs = (
            StateShards(path, [file["name"] for file in manifest["files"]])
            for path, manifest in zip((after, before), reversed(manifests), strict=True)
        )
        assert ours.shapes == theirs.shapes
        for name, kind in itertools.product(ours.shapes, KINDS):
            values = ours.whole(name, kind)
            assert torch.equal(values, theirs.whole(name, kind)), f"{kind} of {name}"
            assert values.abs().max() > 0, f"{kind} of {name} says nothing"


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("sample"), SAMPLE, BROKEN)


@pytest.mark.parametrize(("source", "target"), SAMPLE)
def test_a_run_goes_on_at_another_plan_as_if_it_had_not_moved(sample, source, target):
    sample.check(source, target)


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("all"), ALL, [])


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), ALL)
def test_a_run_goes_on_at_any_other_plan(everything, source, target):
    everything.check(source, target)


@pytest.mark.parametrize(("source", "target", "lost"), BROKEN)
def test_what_is_lost_on_the_way_would_be_seen(sample, source, target, lost):
    assert largest_difference(sample.moved[source, target, lost], sample.straight[source]) > 10 * SAME
