"""The command line: `longctx`, `python -m longctx`, `train.py` and its flags."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from run_cases import ROOT, TRAIN, clean_env, train, write_config

from longctx.__main__ import COMMANDS, TrainArguments, main
from longctx.config import load_config
from longctx.errors import ConfigError


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """As from a shell: no launcher's variables before, and none left behind."""
    monkeypatch.setattr(os, "environ", clean_env())


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("cli"))


def test_help_lists_the_commands(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("train", "layout", "info", "bench"))
    assert main([]) == 2


def test_an_unknown_command_names_the_nearest(capsys):
    assert main(["layuot"]) == 2
    assert capsys.readouterr().err == "longctx has no command 'layuot': did you mean 'layout'?\n"


def test_commands_go_to_their_modules_with_their_words(monkeypatch, capsys):
    import longctx.draw

    seen = []

    def fake(argv):
        seen.append(argv)
        raise ConfigError("no such layout")

    monkeypatch.setattr(longctx.draw, "main", fake)
    assert main(["layout", "--ring", "4"]) == 2
    assert seen == [["--ring", "4"]]
    assert capsys.readouterr().err == "ConfigError: no such layout\n"


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help(command, capsys):
    try:
        code = main([command, "--help"])
    except SystemExit as done:
        code = done.code
    assert code in (0, None)
    assert "usage" in capsys.readouterr().out


def test_python_m_longctx_is_the_same():
    done = subprocess.run(
        [sys.executable, "-m", "longctx", "nothing"], cwd=ROOT, env=clean_env(), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("longctx has no command 'nothing'")


def test_arguments():
    parsed = TrainArguments.parse(
        [
            "--local_rank=1",
            "--config",
            "x.toml",
            "--data.seq_len",
            "128k",
            "--dry-run",
            "--resume",
            "never",
            "--parallel.ring=4",
        ]
    )
    assert parsed == TrainArguments(
        config="x.toml",
        overrides=("--data.seq_len", "128k", "--parallel.ring=4", "--train.resume=never"),
        dry_run=True,
        world_size=None,
        help=False,
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--dryrun"], "there is no flag --dryrun: did you mean '--dry-run'"),
        (["--confg=x"], "there is no flag --confg: did you mean '--config'"),
        (["--config"], "expected one argument"),
        (["--world-size=x", "--dry-run"], "invalid int value"),
        (["--world-size=2"], "goes with --dry-run only"),
    ],
    ids=["flag", "flag-value", "no-value", "not-a-number", "alone"],
)
def test_wrong_flags(words, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        TrainArguments.parse(words)


def test_dry_run_says_everything_and_trains_nothing(config, capsys):
    words = ["train", "--config", str(config), "--parallel.ring=2", "--engine.accumulation_steps=2"]
    assert main([*words, "--dry-run", "--world-size=4"]) == 0
    shown = capsys.readouterr().out
    resolved, _, rest = shown.partition("\nplan ")
    (config.parent / "dumped.toml").write_text(resolved)
    again = load_config(config.parent / "dumped.toml")
    assert again == load_config(config, words[3:]), "what is printed is a configuration that says the same"
    assert "dp 2, pp 1, ring 2, ulysses 1, tp 1: 4 ranks, layout zigzag" in rest
    assert "rank 3  dp1 pp0 ring1 uly0 tp0  tokens 32-95" in rest
    assert "512 tokens = dp 2 x micro-batch 1 x accumulation 2 x seq_len 128" in rest
    assert len(re.findall(r"batch \d +tokens \[1, 64\] int64, labels \[1, 64\]", rest)) == 2
    assert re.search(r"model +\d[\d_]+ parameters, fp32", rest)
    assert re.search(r"memory +about [\d.]+ MiB on the rank that holds most: weights [\d.]+ KiB, gradients", rest)
    assert not (config.parent / "run").exists()


def test_dry_run_shows_what_ulysses_ranks_hold(config, capsys):
    words = ["train", "--config", str(config), "--parallel.ring=2", "--parallel.ulysses=2"]
    assert main([*words, "--dry-run", "--world-size=4"]) == 0
    shown = capsys.readouterr().out
    held = dict(re.findall(r"rank (\d)  dp0 pp0 (?:ring\d uly\d) tp0  tokens ([\d, -]*\d)", shown))
    assert held == {"0": "0-31", "1": "96-127", "2": "32-63", "3": "64-95"}
    assert re.search(r"batch 0 +tokens \[1, 32\] int64, labels \[1, 32\]", shown)


def test_dry_run_checks_as_training_does(config, capsys):
    assert main(["train", "--config", str(config), "--dry-run", "--world-size=3", "--parallel.ring=2"]) == 2
    assert "world size 3 is not a multiple" in capsys.readouterr().err


def test_train_py_is_the_same_script(config):
    done = train("python", 1, "--config", config, "--dry-run")
    assert done.returncode == 0, done.stdout
    assert "128 tokens = dp 1" in done.stdout
    assert len(TRAIN.read_text().splitlines()) <= 45


def test_help_of_train_is_printed_once_under_a_launcher():
    done = train("torchrun", 2, "--help")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("usage: train.py") == 1
