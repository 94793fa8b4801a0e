"""What a person gets for input that cannot be used: one clear message, exit code 2, no traceback, before any work."""

from __future__ import annotations

import gzip
import json
import os
import re

import pytest
import torch
import torch.distributed as dist
from run_cases import clean_env, train, write_config

from longctx.__main__ import main


@pytest.fixture(autouse=True)
def own_environment(monkeypatch, tmp_path):
    """As from a shell, with a home of its own: nobody is logged in to wandb there."""
    monkeypatch.setattr(os, "environ", clean_env(HOME=str(tmp_path), WANDB_CONFIG_DIR=str(tmp_path)))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("bad"))


def refused(capsys, *words):
    """The message for a training run with these words; checks the rest of the promise."""
    code = main(["train", *map(str, words)])
    seen = capsys.readouterr()
    assert code == 2, seen
    assert "Traceback" not in seen.err
    assert not dist.is_initialized(), "nothing was started"
    assert re.match(r"\w+Error: ", seen.err), seen.err
    return seen.err


# Words after --config, and what the message must say: what, got, and what to do.
SETTINGS = {
    "misspelt-key": (["--model.num_head=2"], ["model.num_head", "did you mean 'model.num_heads'"]),
    "unknown-section": (["--modle.num_heads=2"], ["modle.num_heads", "model.num_heads"]),
    "wrong-type": (["--data.seq_len=long"], ["--data.seq_len=long is text", "expected a whole number"]),
    "wrong-choice": (["--engine.zero_stage=4"], ["engine.zero_stage = 4", "one of 0, 1, 2, 3"]),
    "world-size": (["--parallel.ring=2"], ["world size 1 is not a multiple of", "start 2 processes"]),
    "tensor-parallel": (
        ["--parallel.tp=3"],
        [
            "num_heads 2, num_kv_heads 2 and intermediate_size 128 are no multiples of tp 3",
            "tp 1 with ring 3; these heads and projections allow tp 1, 2",
        ],
    ),
    "stages": (
        ["--parallel.pp=5", "--engine.zero_stage=3"],
        ["pp 5 has more stages than", "engine.zero_stage 3 with pp 5"],
    ),
    "seq-len": (
        ["--parallel.ring=8", "--data.seq_len=7"],
        ["seq_len = 7 is less than a token for each of the 8 ranks", "use 8 or more"],
    ),
    "layout": (["--parallel.layout=zigzak"], ["zigzak", "did you mean 'zigzag'"]),
    "heads": (["--model.num_heads=6", "--model.num_kv_heads=4"], ["6", "4", "num_kv_heads"]),
    "vocabulary": (["--model.vocab_size=100"], ["model.vocab_size = 100", "id 256", "257 or more"]),
    "kernel": (["--engine.kernel=tritn"], ["engine.kernel = 'tritn'", "did you mean 'triton'"]),
    "phantom-step": (["--engine.zero_stage=0", "--engine.dtype=bf16"], ["zero_stage 0", "zero_stage 1"]),
    "steps": (["--train.steps=0"], ["train.steps = 0", "1 or more"]),
    "timeout": (["--train.timeout_s=1"], ["train.timeout_s = 1", "between 5"]),
    "every": (["--log.every=0"], ["log.every = 0", "1 or more"]),
    "device": (["--train.device=tpu"], ["train.device", "auto"]),
    "file-without-config": (["configs/debug_cpu.toml"], ["is not an override", "--config configs/debug_cpu.toml"]),
    "no-dashes": (["data.seq_len=64"], ["'data.seq_len=64' is not an override", "write --data.seq_len=64"]),
    "tokenizer": (["--data.tokenizer=meta-llama/Llama-3"], ["does not exist", "hf download NAME tokenizer.json"]),
    "weights": (["--train.init_from=meta-llama/Llama-3"], ["is not a folder", "hf download NAME --local-dir"]),
    "kernel-of-gpus": (
        ["--engine.kernel=hopper"],
        ["engine.kernel = 'hopper': needs an NVIDIA GPU", "engine.kernel = auto"],
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings(case, config, capsys):
    words, says = SETTINGS[case]
    message = refused(capsys, "--config", config, *words)
    for part in says:
        assert part in message, message


def test_a_run_for_gpus_is_not_started_without_one(capsys, config, monkeypatch):
    """It would take hours a step. Who insists gets it: then what is wrong is something else."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    large = ["--model.hidden_size=2048", "--model.num_layers=16", "--data.seq_len=64k"]
    message = refused(capsys, "--config", config, *large)
    assert "torch sees no GPU here, and a step of this run is" in message
    assert "insist with --train.device=cpu" in message
    assert "less than one sequence" in refused(capsys, "--config", config, *large, "--train.device=cpu")


def test_a_folder_without_a_tokenizer(capsys, config, tmp_path):
    message = refused(capsys, "--config", config, f"--data.tokenizer={tmp_path}")
    assert "is a folder without a tokenizer.json" in message


def test_all_problems_come_in_one_message(config, capsys):
    message = refused(capsys, "--config", config, "--data.seq_len=2", "--parallel.ring=4", "--optim.lr=-1")
    assert message.startswith("ConfigError: 3 problems with this configuration\n")
    assert [line[:5] for line in message.splitlines() if re.match(r"  \d\. ", line)] == ["  1. ", "  2. ", "  3. "]


def test_configuration_file(config, capsys):
    near = config.with_name("tyni.toml")
    assert "did you mean 'tiny.toml'" in refused(capsys, "--config", near)
    broken = config.with_name("broken.toml")
    broken.write_text("[data]\nseq_len = 128k\n")
    assert "is not TOML" in refused(capsys, "--config", broken)
    broken.write_text("[data]\nseqlen = 128\n")
    assert "data.seqlen" in refused(capsys, "--config", broken)


def test_missing_empty_and_unreadable_text(config, capsys, tmp_path):
    def with_text(path):
        return refused(capsys, "--config", config, f"--data.path={path}")

    assert "does not exist" in with_text(tmp_path / "nothing.txt")
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert "is empty" in with_text(empty)
    numbers = tmp_path / "tokens.bin"
    numbers.write_bytes(bytes(range(64, 0, -1)) * 40 + bytes(2))
    assert f"{numbers} is no text: byte 2_560 is NUL" in with_text(numbers)
    (tmp_path / "folder").mkdir()
    assert str(tmp_path / "folder") in with_text(tmp_path / "folder")
    broken = tmp_path / "broken.txt.gz"
    with gzip.open(broken, "wb") as file:
        file.write(os.urandom(5000))
    broken.write_bytes(broken.read_bytes()[:2000])
    assert "cannot read" in with_text(broken)
    parquet = tmp_path / "broken.parquet"
    parquet.write_bytes(b"not parquet at all")
    assert "parquet" in with_text(parquet)
    lines = tmp_path / "lines.jsonl"
    lines.write_text(json.dumps({"txt": "x" * 500}) + "\n")
    message = with_text(lines)
    assert "has no 'text': did you mean 'txt'" in message


def test_a_corpus_shorter_than_one_sequence(config, capsys, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("too short")
    message = refused(capsys, "--config", config, f"--data.path={short}")
    assert "has 10 tokens, less than one sequence of data.seq_len = 128" in message
    assert "at most 10" in message


def test_text_that_is_not_utf8_is_used_as_bytes_with_a_note(config, capsys, tmp_path):
    odd = tmp_path / "latin1.txt"
    odd.write_bytes("é".encode("latin-1") * 300)
    assert main(["train", "--config", str(config), f"--data.path={odd}", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"note: .*not .*UTF-8", shown, re.I), shown


def test_a_token_id_outside_the_vocabulary_of_a_tokenizer(config, capsys, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    # The end of a document is within the model's vocabulary, and so are most words; one word of the text is not.
    words = {"</s>": 0, "[UNK]": 1} | {f"w{i}": i for i in range(2, 50)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([tokenizers.AddedToken("</s>", special=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("w7 w49 " * 200)
    message = refused(
        capsys,
        "--config",
        config,
        f"--data.path={tmp_path / 'text.txt'}",
        f"--data.tokenizer={tmp_path / 'tokenizer.json'}",
        "--model.vocab_size=40",
    )
    assert "has ids up to 49, but model.vocab_size = 40 ends at 39" in message
    assert "set model.vocab_size to 50 or more" in message


def test_run_dir_that_cannot_be_used(config, capsys, tmp_path):
    from filelock import FileLock

    (tmp_path / "file").touch()
    assert "cannot be written" in refused(capsys, "--config", config, f"--train.run_dir={tmp_path / 'file' / 'run'}")
    (tmp_path / "busy").mkdir()
    with FileLock(tmp_path / "busy" / ".lock"):
        message = refused(capsys, "--config", config, f"--train.run_dir={tmp_path / 'busy'}")
    assert "another run is writing to" in message


def test_wandb_online_without_a_login(config, capsys, tmp_path):
    message = refused(capsys, "--config", config, "--log.wandb=online", f"--train.run_dir={tmp_path / 'run'}")
    assert "wandb could not start online" in message
    assert "--log.wandb=offline" in message


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The configuration of a run that has left two checkpoints."""
    config = write_config(tmp_path_factory.mktemp("trained"))
    done = train("forked", 1, "--config", config, "--train.save_every=1", "--train.steps=2")
    assert done.returncode == 0, done.stdout
    return config


def test_a_checkpoint_of_another_model(trained, capsys):
    message = refused(capsys, "--config", trained, "--model.hidden_size=64")
    assert "step-00000002 is of another model" in message
    assert "hidden_size: 32 in the checkpoint, 64 here" in message


def test_a_checkpoint_that_is_not_there(trained, capsys, tmp_path):
    assert "there is no such folder" in refused(capsys, "--config", trained, "--resume", tmp_path / "step-00000009")


def test_a_truncated_checkpoint_offers_the_previous_one(trained, capsys):
    folder = trained.parent / "run" / "checkpoints"
    largest = max((folder / "step-00000002").glob("*.safetensors"), key=lambda file: file.stat().st_size)
    whole = largest.read_bytes()
    largest.write_bytes(whole[: len(whole) // 2])
    try:
        message = refused(capsys, "--config", trained, "--resume", folder / "step-00000002")
        assert "is truncated" in message
        assert f"--train.resume={folder / 'step-00000001'}" in message
        # With "auto" the previous one is taken, and it is said so.
        assert main(["train", "--config", str(trained), "--model.hidden_size=64"]) == 2
        seen = capsys.readouterr()
        assert re.search(r"warning +passing over checkpoint .*step-00000002: .* is truncated", seen.out)
        assert "step-00000001 is of another model" in seen.err
    finally:
        largest.write_bytes(whole)


def test_only_damaged_checkpoints_do_not_mean_a_new_start(trained, capsys, tmp_path):
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints" / "step-00000005").mkdir(parents=True)
    message = refused(capsys, "--config", trained, f"--train.run_dir={run_dir}")
    assert "none of the checkpoints" in message
    assert "--train.resume=never" in message


def test_every_rank_ends_with_code_2_and_one_of_them_speaks(config):
    done = train("torchrun", 2, "--config", config, "--parallel.ring=2", "--parallel.layout=zigzak")
    assert done.returncode == 1, "torchrun's own code for a failed rank"
    assert done.stdout.count("ConfigError: ") == 1
    assert "did you mean 'zigzag'" in done.stdout
    assert re.findall(r"exitcode +: (-?\d+)", done.stdout) == ["2", "2"], done.stdout
    assert "longctx/" not in done.stdout, "no traceback of ours"


def test_bare_python_ends_with_code_2(config):
    done = train("python", 1, "--config", config, "--data.path=/nowhere")
    assert done.returncode == 2
    assert done.stdout.startswith("ConfigError: 1 problem with this configuration\n")
    assert "Traceback" not in done.stdout
