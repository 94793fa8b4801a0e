"""Whole runs: every launcher, kill and resume bit for bit, a loss that is not finite, a rank that dies, wandb."""

from __future__ import annotations

import json
import math
import re
import shutil
import time

import pytest
from run_cases import Background, train, train_command, write_config

from longctx.checkpoint import latest_checkpoint
from longctx.config import load_config
from longctx.launch import Launch, Place
from longctx.metrics import read_metrics
from longctx.trainer import Trainer


def steps_of(folder):
    return read_metrics(folder / "run" / "metrics.jsonl")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of one process without a launcher, logged to wandb offline: (folder, config, output, seconds to exit)."""
    folder = tmp_path_factory.mktemp("alone")
    config = write_config(folder)
    # An address that never answers: whatever still wants the network would wait for it.
    done = train("python", 1, "--config", config, "--log.wandb=offline", WANDB_BASE_URL="http://10.255.255.1:9")
    left = time.time()
    assert done.returncode == 0, done.stdout
    (end,) = read_metrics(folder / "run" / "metrics.jsonl", "end")
    return folder, config, done.stdout, left - end["time"]


def test_bare_python_trains_and_says_what_it_chose(alone):
    folder, _, output, _ = alone
    losses = [record["loss"] for record in steps_of(folder)]
    assert len(losses) == 3
    assert losses[0] == pytest.approx(math.log(264), abs=0.15), "random weights know nothing yet"
    assert losses[2] < losses[0]
    for name in ("plan", "device", "dtype", "data", "model", "step", "resume", "records"):
        assert len(re.findall(rf"^{name} ", output, re.M)) >= 1, f"no line about {name}:\n{output}"
    assert "128 tokens = dp 1 x micro-batch 1 x accumulation 1 x seq_len 128" in output
    assert re.search(r"attention kernel for \w+ on cpu", output)
    assert re.search(r"^done .*loss \d", output, re.M)
    assert latest_checkpoint(folder / "run" / "checkpoints").name == "step-00000003"


def test_the_first_record_says_what_the_run_depends_on(alone):
    folder, _, _, _ = alone
    (run,) = read_metrics(folder / "run" / "metrics.jsonl", "run")
    assert run["config"]["model"]["hidden_size"] == 32
    assert run["plan"]["ring"] == 1
    assert {"commit", "torch", "triton", "deepspeed", "longctx", "date"} <= run.keys()


def test_wandb_offline_leaves_a_run_and_does_not_delay_the_exit(alone):
    folder, _, output, seconds = alone
    (left,) = (folder / "run" / "wandb").glob("offline-run-*")
    assert list(left.glob("*.wandb"))
    assert (folder / "run" / "wandb-id").read_text() in left.name
    assert f"wandb offline: {left}" in output
    assert seconds < 5, "leaving took too long"


def test_a_finished_run_has_nothing_left_to_do(alone):
    folder, config, _, _ = alone
    before = steps_of(folder)
    again = train("forked", 1, "--config", config)
    assert again.returncode == 0, again.stdout
    assert "nothing to do" in again.stdout
    assert steps_of(folder) == before


def test_going_on_with_other_data_begins_them_at_their_start(alone, tmp_path):
    folder, config, _, _ = alone
    (saved,) = (folder / "run" / "checkpoints").glob("step-*")
    words = ("--config", config, "--resume", saved, f"--train.run_dir={tmp_path}", "--train.steps=4")
    further = train("forked", 1, *words, "--data.seq_len=64", "--log.telemetry=false")
    assert further.returncode == 0, further.stdout
    assert "the checkpoint's data were other" in further.stdout
    (step,) = read_metrics(tmp_path / "metrics.jsonl")
    last = steps_of(folder)[-1]
    assert (step["step"], step["cursor"], step["tokens"]) == (3, 1, last["tokens"] + 64)
    assert "attention_ms" in last
    assert not {"attention_ms", "comm_bytes", "exposed_comm_share"} & step.keys(), "nothing was measured"


def test_a_new_run_in_an_old_folder_keeps_the_old_records(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    for loss in (1.0, 2.0, 3.0):
        trainer = Trainer(load_config(write_config(tmp_path), ["--train.resume=never"]), Launch(Place()))
        file = trainer._metrics_file()
        file.write("step", {"step": 0, "loss": loss})
        file.close()
    kept = {p.name: read_metrics(p)[0]["loss"] for p in path.parent.glob("*.jsonl")}
    assert kept == {"metrics-1.jsonl": 1.0, "metrics-2.jsonl": 2.0, "metrics.jsonl": 3.0}


def test_a_measurement_saves_nothing(tmp_path):
    done = train("forked", 1, "--config", write_config(tmp_path), "--train.save_every=none")
    assert done.returncode == 0, done.stdout
    assert len(steps_of(tmp_path)) == 3
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert re.search(r"checkpoint none, records in", done.stdout), done.stdout


def test_a_checkpoint_that_cannot_be_written_is_a_warning_until_the_last(tmp_path):
    config = write_config(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").touch()  # a file where the folder should be
    done = train("forked", 1, "--config", config, "--train.save_every=2")
    assert done.returncode == 1
    assert re.search(r"no checkpoint: .*step-00000002", done.stdout), done.stdout
    assert "could not be prepared" in done.stdout
    assert len(steps_of(tmp_path)) == 3, "training went on"
    assert re.search(r"^CheckpointError: ", done.stdout, re.M), done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.parametrize(("launcher", "axis"), [("torchrun", "ring"), ("deepspeed", "ring"), ("forked", "ulysses")])
def test_a_launcher_with_two_processes_trains_as_one_process_does(launcher, axis, alone, tmp_path):
    config = write_config(tmp_path)
    done = train(launcher, 2, "--config", config, f"--parallel.{axis}=2", "--parallel.strategy=relay")
    assert done.returncode == 0, done.stdout
    assert f"started by {launcher.replace('forked', 'other')}" in done.stdout
    assert len(re.findall(r"^done ", done.stdout, re.M)) == 1, "only one process speaks"
    for ours, theirs in zip(steps_of(tmp_path), steps_of(alone[0]), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        # 2 layers of 2 heads of 16: K and V of 64 tokens in fp32, twice forward; with dK and dV, back once.
        ring_bytes = 2 * 2 * (2 * 64 * 32 * 4)
        # Of queries, keys, values and outputs half goes to the other rank, forward and backward.
        ulysses_bytes = 2 * 2 * (4 * 64 * 32 * 4) // 2
        assert ours["comm_bytes"] == (ring_bytes if axis == "ring" else ulysses_bytes)
        assert 0 < ours["exposed_comm_share"] < 1
        assert ours["exposed_comm_ms"] <= ours["exposed_comm_ms_max"] <= 1e3 * ours["seconds"]
        assert 0 < ours["attention_ms"] < 1e3 * ours["seconds"]
        assert 1 <= ours["attention_imbalance"] <= 2
        assert (theirs["comm_bytes"], theirs["exposed_comm_ms"], theirs["attention_imbalance"]) == (0, 0, 1)
        # Both counted what the mask shows.
        flops = [r["attention_tflops"] * r["attention_ms"] * n for r, n in ((ours, 2), (theirs, 1))]
        assert flops[0] == pytest.approx(flops[1])
    assert "exposed comm" in done.stdout


def test_the_same_command_goes_on_at_another_plan(alone, tmp_path):
    """One process with ZeRO-1 -> two data-parallel ones with ZeRO-3, which write beside the training."""
    folder, config, _, _ = alone
    shutil.copytree(folder / "run" / "checkpoints", tmp_path / "checkpoints")
    words = ("--config", config, f"--train.run_dir={tmp_path}", "--train.steps=5", "--train.save_every=1")
    moved = train("forked", 2, *words, "--engine.zero_stage=3", "--train.async_save=true")
    assert moved.returncode == 0, moved.stdout
    before, after = (f"dp {dp}, pp 1, ring 1, ulysses 1, tp 1, zero {zero}, fp32" for dp, zero in ((1, 1), (2, 3)))
    assert f"resumed   at step 3, sample 3, from a checkpoint of {before} at {after}" in moved.stdout
    assert "a step is 2 samples now, before it was 1" in moved.stdout
    steps = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["cursor"]) for r in steps] == [(3, 5), (4, 7)]
    assert steps[0]["loss"] < steps_of(folder)[0]["loss"]
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000004", "step-00000005"]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    # The first update makes every weight about 1e30: the next step overflows.
    words = ("--parallel.ring=2", "--optim.lr=1e30", "--optim.warmup_steps=0", "--train.save_every=1")
    done = train("forked", 2, "--config", write_config(tmp_path), *words)
    assert done.returncode != 0
    message = [line for line in done.stdout.splitlines() if "batch cursor" in line]
    assert len(message) == 1, done.stdout
    where = r"\[rank \d \| dp0 pp0 ring\d uly0 tp0\] .*step 1: the (loss|gradient norm) is (nan|-?inf)"
    assert re.match(where, message[0])
    assert "batch cursor 1" in message[0]
    assert f"last checkpoint: {tmp_path / 'run' / 'checkpoints' / 'step-00000001'}" in done.stdout
    assert latest_checkpoint(tmp_path / "run" / "checkpoints").name == "step-00000001"
    assert "longctx/engine.py" not in done.stdout, "no traceback of ours"
    (end,) = read_metrics(tmp_path / "run" / "metrics.jsonl", "end")
    assert "batch cursor 1" in end["reason"]


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_run_and_is_named(victim, tmp_path):
    command = train_command(
        "torchrun", 2, "--config", write_config(tmp_path), "--parallel.ring=2", "--train.steps=100000"
    )
    with Background(command, tmp_path / "log") as run:
        metrics = tmp_path / "run" / "metrics.jsonl"
        run.wait_for(lambda: metrics.exists() and '"step": 3' in metrics.read_text(), "step 3")
        start = time.monotonic()
        run.rank(victim).kill()
        assert run.wait(20) != 0
        took = time.monotonic() - start
        output = run.output
    assert took < 20, "train.timeout_s"
    named = (
        rf"\[rank {1 - victim} \| dp0 pp0 ring{1 - victim} uly0 tp0\] rank {victim} \(dp0 pp0 ring{victim} uly0 tp0\) "
    )
    assert re.search(named + r"stopped answering at step \d+", output), output
    assert json.loads(metrics.read_text().splitlines()[0])["kind"] == "run"
