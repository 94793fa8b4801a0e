"""A rank that is killed, frozen or stuck in the middle of a hop of a real run: the last words say who, where and for whom."""

from __future__ import annotations

import re
import signal

import pytest
from hang_cases import BACKWARD, FORWARD, LAYER, STAGE, STEP, TIMEOUT_S, VICTIM, run_until_it_happens
from run_cases import train, write_config

from longctx.checkpoint_folder import latest_checkpoint
from longctx.config import load_config

NAME = rf"rank {VICTIM} \(dp0 pp0 ring{VICTIM} uly0 tp0\)"


def standing_of(rank, text):
    """The two lines of a report about that rank."""
    found = re.search(rf"^  rank {rank} \(dp0 pp0 ring{rank} uly0 tp0\): (.*)\n    (.*)$", text, re.M)
    assert found, f"nothing about the messages of rank {rank}:\n{text}"
    return found.groups()


def one_report(logs):
    """What the one rank that tells has told."""
    told = [log for log in logs if "ending this run" in log]
    assert len(told) == 1, "\n".join(logs)
    return told[0]


@pytest.mark.parametrize("what", [FORWARD, BACKWARD], ids=["forward", "backward"])
def test_a_rank_killed_in_a_hop(what, tmp_path):
    codes, logs = run_until_it_happens(tmp_path, "kill", what)
    assert codes[VICTIM] == -signal.SIGKILL, logs
    assert [code for r, code in enumerate(codes) if r != VICTIM] == [1, 1], logs
    report = one_report(logs)
    assert re.search(rf"{NAME} stopped answering at step {STEP} \(last heard at step {STEP}, computing\)", report)
    # Forward goes up the ring, backward down: the one that hears the victim waits for just this message.
    next_one, to = (2, 0) if what == FORWARD else (0, 2)
    _, messages = standing_of(next_one, report)
    expected = rf"waiting for \d+ s: layer {LAYER}, {re.escape(what)} \(to rank {to}, from rank {VICTIM}\)"
    assert re.match(expected, messages), report


def test_a_rank_killed_in_an_evaluation(tmp_path):
    trained = train("forked", 1, "--config", write_config(tmp_path), "--train.steps=1")
    assert trained.returncode == 0, trained.stdout
    weights = latest_checkpoint(load_config(tmp_path / "tiny.toml").train.checkpoints)
    codes, logs = run_until_it_happens(tmp_path, "kill", FORWARD, weights)
    assert codes[VICTIM] == -signal.SIGKILL, logs
    assert [code for r, code in enumerate(codes) if r != VICTIM] == [1, 1], logs
    report = one_report(logs)
    assert re.search(rf"{NAME} stopped answering at step {STEP} \(last heard at step {STEP}, evaluating\)", report)
    assert f"layer {LAYER}, {FORWARD} (to rank 0, from rank {VICTIM})" in standing_of(2, report)[1]


def test_a_rank_frozen_in_a_hop(tmp_path):
    codes, logs = run_until_it_happens(tmp_path, "freeze", FORWARD)
    assert codes == [1, -signal.SIGKILL, 1], f"the frozen rank is ended too:\n{logs}"
    report = one_report(logs)
    assert re.search(rf"{NAME} stopped answering at step {STEP}", report)
    step, messages = standing_of(VICTIM, report)
    assert re.match(rf"step {STEP}, computing .*last heard \d+ s ago", step)
    assert f"layer {LAYER}, {FORWARD} (to rank 2, from rank 0)" in messages, report
    for rank in (0, 2):
        assert re.match(rf"waiting for \d+ s: layer {LAYER}, backward, .*from rank", standing_of(rank, report)[1]), (
            report
        )


def test_a_rank_stuck_in_a_hop_is_the_one_that_is_behind(tmp_path):
    """All three are alive and in the same phase: only their messages tell them apart."""
    codes, logs = run_until_it_happens(tmp_path, "stick", FORWARD)
    assert codes == [1, 1, 1], logs
    report = one_report(logs)
    assert re.search(rf"{NAME} hangs at step {STEP}: no progress for .*train.timeout_s = {TIMEOUT_S:g}", report), report
    assert standing_of(VICTIM, report)[1].startswith(f"last message, arrived: layer {LAYER}, forward, K/V for hop 1")
    assert re.match(rf"waiting for \d+ s: layer {LAYER}, {FORWARD} .*from rank {VICTIM}\)", standing_of(2, report)[1])


def test_the_stage_that_is_stuck_is_the_one_that_others_wait_for(tmp_path):
    """Stages send different messages, so their numbers tell nothing: the first has sent most, the last least."""
    codes, logs = run_until_it_happens(tmp_path, "stick", STAGE)
    assert codes == [1, 1, 1], logs
    report = one_report(logs)
    name = rf"rank {VICTIM} \(dp0 pp{VICTIM} ring0 uly0 tp0\)"
    assert re.search(rf"{name} hangs at step {STEP}: no progress for .*train.timeout_s = {TIMEOUT_S:g}", report), report
    waits = r"^ +waiting for \d+ s: pipeline, {} \(with rank {}\)"
    # A message over gloo has left when it has arrived.
    assert re.search(waits.format("activations to the next stage", VICTIM), report, re.M), report
    assert re.search(waits.format("activations of the stage before", VICTIM), report, re.M), report
