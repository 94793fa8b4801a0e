"""`longctx eval`: the loss of a run's checkpoint, by context, on one process and on several."""

from __future__ import annotations

import os
import re

import pytest
import torch
from run_cases import clean_env, train, write_config

from longctx.__main__ import main
from longctx.checkpoint_folder import latest_checkpoint
from longctx.checkpoint_weights import CheckpointWeights
from longctx.config import load_config
from longctx.evaluation import LossOfContext, measure, table
from longctx.launch import Place
from longctx.model import Transformer
from longctx.parallel.mesh import ParallelMesh
from longctx.preparation import open_data, settle
from longctx.shapes import NO_TARGET
from longctx.testing import run_distributed


@pytest.fixture(autouse=True)
def own_environment(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "environ", clean_env(HOME=str(tmp_path)))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Of a run that has ended; evaluated in batches that its sequences do not fill."""
    path = write_config(tmp_path_factory.mktemp("run"))
    run = train("python", 1, "--config", path, "--train.steps=2", timeout_s=300)
    assert run.returncode == 0, run.stdout
    return path


def evaluated(capsys, *words) -> tuple[int, str, str]:
    code = main(["eval", *map(str, words)])
    seen = capsys.readouterr()
    return code, seen.out, seen.err


def test_it_is_the_loss_of_every_token(config, capsys, tmp_path):
    code, out, err = evaluated(capsys, "--config", config, "--engine.micro_batch_size=4")
    assert code == 0, err
    settings = load_config(config, ["--data.shuffle=false"])
    plan, device = settle(settings, Place())
    _, loader = open_data(settings, plan, 0, device)
    assert loader.num_samples % 4, "the last batch is not full"
    weights = CheckpointWeights(latest_checkpoint(settings.train.checkpoints))
    model = Transformer(settings.model).double()
    model.load_state_dict({name: weights.tensor(name, "fp32") for name in weights.shapes})
    loss, targets = 0.0, 0
    for cursor in range(loader.num_samples):
        (batch,) = loader.step(cursor)
        loss += model(batch).item()
        targets += int((batch.labels != NO_TARGET).sum())
    tokens, nats = re.search(r"all +([\d_]+) +([\d.]+)", out).groups()
    assert int(tokens) == targets
    assert float(nats) == pytest.approx(loss / targets, abs=1e-4)
    # The same weights in Hugging Face's layout.
    assert main(["export", str(weights.path), str(tmp_path / "out"), "--dtype", "fp32"]) == 0
    capsys.readouterr()
    code, again, err = evaluated(capsys, "--config", config, "--weights", tmp_path / "out")
    assert code == 0, err
    assert re.search(r"all .*", again)[0] == re.search(r"all .*", out)[0]
    # Other text, where it is named: that of the run, and nothing to train on.
    words = [f"--data.eval_path={settings.data.path}", "--data.path=none"]
    code, other, err = evaluated(capsys, "--config", config, *words)
    assert code == 0, err
    assert re.search(r"all .*", other)[0] == re.search(r"all .*", out)[0]
    code, some, _ = evaluated(capsys, "--config", config, "--samples", 1, "--data.mask_documents=false")
    assert re.search(r"65 to 128 +64 ", some), some
    assert re.search(r"all +128 ", some), some


def eval_worker(rank: int, path: str, plans: list[list[str]], world: int) -> list[list[LossOfContext]]:
    results = []
    for words in plans:
        settings = load_config(path, ["--data.shuffle=false", "--engine.micro_batch_size=4", *words])
        plan, device = settle(settings, Place(rank=rank, world_size=world))
        _, loader = open_data(settings, plan, rank, device)
        mesh = ParallelMesh.create(plan, device=device)
        model = Transformer(settings.model, mesh=mesh, seed=3).double()
        results.append(measure(model, loader, loader.num_samples, mesh))
    return results


def test_over_processes_it_is_one(config):
    ((one,),) = run_distributed(eval_worker, str(config), [[]], 1, world=1)
    assert sum(row.tokens > 0 for row in one) > 3
    plans = [["--parallel.ring=2"], ["--parallel.dp=2"], ["--parallel.tp=2"]]
    for of_rank in run_distributed(eval_worker, str(config), plans, 2, world=2):
        for words, found in zip(plans, of_rank, strict=True):
            assert [row.tokens for row in found] == [row.tokens for row in one], words
            for a, b in zip(found, one, strict=True):
                assert a.loss == pytest.approx(b.loss, rel=1e-9, nan_ok=True), words


def test_what_cannot_be_evaluated_is_refused(config, capsys, tmp_path):
    for words, says in (
        (["--parallel.pp=2"], "an evaluation has no stages"),
        (["--samples=0"], "at least 1 sequence"),
        (["--smaples=3"], "did you mean"),
        (["--weights", tmp_path / "none"], "there is no such folder"),
        (["--model.hidden_size=64"], "hidden_size"),
        ([f"--train.run_dir={tmp_path}"], "there is no checkpoint in"),
    ):
        code, out, err = evaluated(capsys, "--config", config, *words)
        assert (code, out) == (2, "")
        assert says in err, err
    assert "--weights" in evaluated(capsys, "--help")[1]


def test_a_table_of_nothing_is_no_error():
    assert "nan" in table([LossOfContext(1, 8, 0, float("nan"))])
    assert torch.isinf(torch.tensor(float(table([LossOfContext(1, 8, 2, 800.0)]).split()[-1])))
