"""`longctx import`, `longctx export` and `train.init_from`: from transformers' weights to a run, and back."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from run_cases import clean_env, train, write_text
from weights_cases import CASES, filled, randomised

from longctx.__main__ import main
from longctx.checkpoint import latest_checkpoint
from longctx.config import load_config
from longctx.errors import CheckpointError
from longctx.model import Transformer
from longctx.preparation import weights_to_start_from
from longctx.weights import SINGLE, WeightsFolder, import_config


@pytest.fixture
def own_environment(monkeypatch):
    monkeypatch.setattr(os, "environ", clean_env())


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [
        "<unk>",
        "</s>",
        "ring",
        "attention",
        "passes",
        "keys",
        "and",
        "values",
        "round",
        "while",
        "queries",
        "stay",
    ]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def test_a_run_starts_from_a_folder_and_gives_it_back(tmp_path, own_environment, capsys):
    """transformers -> longctx import -> train.py, with steps too small to change anything -> longctx export."""
    folder = tmp_path / "hf"
    randomised(CASES["qwen3-yarn"].theirs).save_pretrained(folder)
    write_tokenizer(folder)
    config = tmp_path / "run.toml"
    assert main(["import", str(folder), "--config", str(config)]) == 0
    assert main(["import", str(folder), "--config", str(config)]) == 2
    assert "could not be written: File exists" in capsys.readouterr().err
    loaded = load_config(config)
    assert loaded.model == filled(CASES["qwen3-yarn"].ours)
    assert loaded.data.tokenizer == str(folder / "tokenizer.json")
    assert loaded.train.init_from == str(folder)
    words = ["--config", config, f"--data.path={write_text(tmp_path)}", f"--data.cache_dir={tmp_path}/cache"]
    words += ["--data.seq_len=96", "--optim.lr=1e-30", f"--train.run_dir={tmp_path}/run", "--model.sliding_window=40"]
    done = train("forked", 2, *words, "--parallel.ring=2", "--engine.zero_stage=3", "--train.steps=1")
    assert done.returncode == 0, done.stdout
    assert re.search(rf"^weights +from {folder} ", done.stdout, re.M)
    assert re.search(r"^note +model.sliding_window is 40, in the weights' config.json None", done.stdout, re.M)
    out = tmp_path / "out"
    step = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert main(["export", str(step), str(out), "--tokenizer", str(folder), "--shard-size", "10KB"]) == 0
    shown = capsys.readouterr().out
    assert "model-00001-of-" in shown
    assert "tokenizer.json" in shown
    given, got = WeightsFolder(folder), WeightsFolder(out)
    models = [Transformer(CASES["qwen3-yarn"].ours) for _ in range(2)]
    given.load_into(models[0])
    got.load_into(models[1])
    expected = models[0].state_dict()
    assert {key for key, p in models[1].state_dict().items() if not torch.equal(p, expected[key])} == set()
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 1

    # A run that goes on has its weights from its checkpoint; the folder may be gone.
    (folder / SINGLE).unlink()
    more = train("forked", 2, *words, "--parallel.ring=2", "--engine.zero_stage=3", "--train.steps=2")
    assert more.returncode == 0, more.stdout
    assert "resumed   at step 1" in more.stdout
    assert "train.init_from" not in more.stdout


def test_settings_that_do_not_fit_the_weights_are_all_named(tmp_path):
    folder = tmp_path / "hf"
    randomised(CASES["qwen2-window"].theirs).save_pretrained(folder)
    config = tmp_path / "run.toml"
    config.write_text(import_config(folder))
    words = ["--model.hidden_size=64", "--model.qkv_bias=false", "--model.rope_theta=1e7"]
    with pytest.raises(CheckpointError) as caught:
        weights_to_start_from(load_config(config, words))
    said = str(caught.value)
    assert said.startswith(f"2 problems with train.init_from = '{folder}'")
    assert "model.hidden_size = 64, but these weights are of 32" in said
    assert "model.qkv_bias = False, but these weights are of True" in said
    stretched = load_config(config, ["--model.rope_theta=1e7"])
    assert weights_to_start_from(stretched).fits(stretched.model) == [
        "model.rope_theta is 10000000.0, in the weights' config.json 10000.0"
    ]


def test_words_that_make_no_sense_are_refused(capsys, own_environment):
    assert main(["export", "nowhere"]) == 2
    assert "the following arguments are required: OUT" in capsys.readouterr().err
    assert main(["export", "nowhere", "out", "--max-position", "long"]) == 2
    assert "--max-position long is not a number of tokens" in capsys.readouterr().err
    assert main(["export", "nowhere", "out"]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert main(["import", "nowhere"]) == 2
    assert "nowhere is not a folder" in capsys.readouterr().err
