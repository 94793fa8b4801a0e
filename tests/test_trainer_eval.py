"""The loss on text that is not trained on, during a run and after a resume."""

from __future__ import annotations

import math
import re

import pytest
from run_cases import train, write_config, write_text

from longctx.config import load_config
from longctx.metrics import read_metrics


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A run of six steps on two ranks, evaluated every four and at the end: (folder, words, output)."""
    folder = tmp_path_factory.mktemp("evaluated")
    config = write_config(folder)
    other = write_text(folder / "other", documents=8)
    words = ("--config", config, f"--data.eval_path={other}", "--train.eval_every=4", "--train.eval_sequences=3")
    done = train("forked", 2, *words, "--parallel.ring=2", "--train.steps=6", "--train.save_every=5")
    assert done.returncode == 0, done.stdout
    return folder, words, done.stdout


def evals(folder) -> list[dict]:
    return read_metrics(folder / "run" / "metrics.jsonl", "eval")


def test_a_run_says_and_keeps_its_evaluations(evaluated):
    folder, _, output = evaluated
    records = evals(folder)
    assert [record["step"] for record in records] == [3, 5]
    assert all(record["eval_sequences"] == 3 and record["eval_seconds"] > 0 for record in records)
    assert records[1]["eval_loss"] < records[0]["eval_loss"] < math.log(264)
    found = re.findall(r"^eval +loss ([\d.]+) \(perplexity [\d.]+\) after step (\d), on 3 sequences in ", output, re.M)
    assert [(float(loss), int(step)) for loss, step in found] == [
        (pytest.approx(record["eval_loss"], abs=1e-4), record["step"]) for record in records
    ]


def test_evaluation_does_not_touch_training(evaluated, tmp_path):
    folder, words, _ = evaluated
    plain = train("forked", 2, *words[:2], "--parallel.ring=2", "--train.steps=6", f"--train.run_dir={tmp_path}")
    assert plain.returncode == 0, plain.stdout
    losses, expected = (
        [step["loss"] for step in read_metrics(path / "metrics.jsonl")] for path in (tmp_path, folder / "run")
    )
    assert losses == expected
    assert not read_metrics(tmp_path / "metrics.jsonl", "eval")


def test_a_resumed_run_measures_again_what_came_after_its_checkpoint(evaluated):
    folder, words, _ = evaluated
    before = evals(folder)
    older = folder / "run" / "checkpoints" / "step-00000005"
    done = train("forked", 2, *words, "--parallel.ring=2", "--train.steps=6", f"--train.resume={older}")
    assert done.returncode == 0, done.stdout
    after = evals(folder)
    assert [record["step"] for record in after] == [3, 5]
    assert after[0] == before[0]
    assert after[1]["eval_loss"] == before[1]["eval_loss"]


def test_what_cannot_be_evaluated_is_said(evaluated, tmp_path):
    words = evaluated[1]
    config = words[1]
    for said, *more in (
        ("set data.eval_path", "--train.eval_every=2"),
        ("data.eval_path = '/nowhere/at/all' does not exist", "--data.eval_path=/nowhere/at/all"),
    ):
        done = train("forked", 1, "--config", config, *more)
        assert done.returncode == 2, done.stdout
        assert said in done.stdout
    short = write_text(tmp_path / "short", documents=1)
    done = train("forked", 1, "--config", config, f"--data.eval_path={short}", "--engine.accumulation_steps=40")
    assert done.returncode == 2
    assert "give more text, or a smaller step" in done.stdout
    assert load_config(config, ["--train.eval_sequences=0"]).train.problems()
