"""Ranks that are killed and disks that are full, by way of the table of what a run survives: a few here, the table itself if slow."""

from __future__ import annotations

import random

import pytest
from fault_table import WHILE_SAVING, WHILE_TRAINING, can_mount, full_disk, kills, records, steps_differ, undisturbed

needs_mount = pytest.mark.skipif(not can_mount(), reason="this user cannot have a mount namespace for a small tmpfs")


def survive(folder, count: int, launcher: str) -> None:
    told = []
    for kill in kills(folder / "killed", count, seed=count, launcher=launcher):
        told.append(kill)
        assert kill.lost == 0, kill
        assert kill.went_on == kill.after >= kill.before > 0, kill
    assert {kill.kind for kill in told} == {WHILE_TRAINING, WHILE_SAVING}
    steps = len(records(folder / "killed"))
    assert steps > count
    undisturbed(folder / "whole", steps, launcher)
    assert steps_differ(folder / "killed", folder / "whole", steps) == []


def test_a_rank_killed_at_any_moment_costs_no_checkpoint_and_no_step(tmp_path):
    survive(tmp_path, 3, "forked")


@pytest.mark.slow
def test_fifty_kills(tmp_path):
    survive(tmp_path, 50, "torchrun")


def fill(folder, room: float) -> None:
    told = full_disk(folder, room)
    assert told.said, told
    assert told.lost == 0
    assert told.went_on, told


@needs_mount
def test_a_disk_that_fills_up_leaves_the_checkpoint_before(tmp_path):
    fill(tmp_path / "disk", 0.4)


@needs_mount
@pytest.mark.slow
@pytest.mark.parametrize("number", range(10))
def test_a_disk_that_fills_up_anywhere(tmp_path, number):
    fill(tmp_path / "disk", random.Random(number).uniform(0.02, 0.97))


def test_steps_that_are_missing_or_other_would_be_seen(tmp_path):
    for name, losses in (("a", (1, 2, 3)), ("other", (1, 2.5, 3)), ("missing", (1, 3))):
        (tmp_path / name / "run").mkdir(parents=True)
        lines = [
            f'{{"kind": "step", "step": {int(loss) - 1}, "cursor": 0, "tokens": 0, "loss": {loss}, "grad_norm": 1, "lr": 1}}'
            for loss in losses
        ]
        (tmp_path / name / "run" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert steps_differ(tmp_path / "a", tmp_path / "a", 3) == []
    assert steps_differ(tmp_path / "other", tmp_path / "a", 3) == [1]
    assert steps_differ(tmp_path / "missing", tmp_path / "a", 3) == [0, 1, 2]
