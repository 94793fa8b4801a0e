"""Weights in Hugging Face's layout: exact both ways, through engines of every ZeRO stage, and every refusal."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from train_cases import ROWS, SEQ_LEN, full_step
from transformers import AutoConfig, AutoModelForCausalLM
from weights_cases import CASES, filled, randomised

from longctx.checkpoint import TrainState, latest_checkpoint
from longctx.checkpoint_saver import save_checkpoint
from longctx.engine import EngineConfig, build_engine
from longctx.errors import CheckpointError, ConfigError
from longctx.masks import Causal
from longctx.model import Transformer
from longctx.optim import OptimConfig
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.plan import ParallelPlan
from longctx.parity import shard_step
from longctx.sequence import SequenceMeta
from longctx.testing import run_distributed
from longctx.weights import INDEX, SINGLE, WeightsFolder, export, parse_bytes, shards_of

# Parameters do not divide by three: the last partition is padded.
WORLD = 3


TOKENS = torch.randint(0, 64, (2, SEQ_LEN), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same_logits(ours: Transformer, hf: torch.nn.Module) -> None:
    """Relative to ours in float64: theirs is that to fp32 (so both compute the same), and ours no worse than theirs.

    transformers in float64 would be no reference: its RoPE works in fp32.
    """

    def logits() -> torch.Tensor:
        return F.linear(ours.hidden(TOKENS, SequenceMeta.of(SEQ_LEN, mask=Causal())), ours.lm_head.weight)

    ours.float()
    mine, theirs = logits(), hf.float()(input_ids=TOKENS, use_cache=False).logits
    ours.double()
    exact = logits()

    def errors(x: torch.Tensor) -> tuple[float, float]:
        difference = x.double() - exact
        return float(difference.abs().max() / exact.abs().max()), float(difference.norm() / exact.norm())

    for got, allowed in zip(errors(mine), errors(theirs), strict=True):
        assert allowed < 1e-5
        assert got <= 2 * allowed + 1e-7


def through_engines(rank: int, root: str) -> dict:
    """Start from each folder, take two steps, save; what the engine held at the start and at the end."""
    from deepspeed.utils import safe_get_full_fp32_param

    told = {}
    for name, case in CASES.items():
        mesh = ParallelMesh.create(ParallelPlan(ring=WORLD), device="cpu")
        settings = EngineConfig(
            zero_stage=case.zero_stage,
            dtype=case.dtype,
            micro_batch_size=ROWS,
            kernel="reference",
            zero3_keep_elements=case.keep_elements,
        )
        weights = WeightsFolder(Path(root) / name / "hf")
        engine = build_engine(
            weights.config, settings, OptimConfig(lr=1e-2, warmup_steps=0), mesh, total_steps=9, load=weights.load_into
        )
        start = engine.full_state_dict()
        for step in range(2):
            engine.train_step(step, shard_step(full_step(step, dp=1, accumulation=1), mesh))
        fingerprint = asdict(weights.config)
        save_checkpoint(Path(root) / name, engine, TrainState(step=2), fingerprint=fingerprint, keep=1)
        masters = {}
        if case.zero_stage:
            for key, p in engine.ds.module.named_parameters():
                whole = p.get_full_hp_param() if case.zero_stage < 3 else safe_get_full_fp32_param(p)
                masters[key] = whole.detach().float().clone().view(p.shape if case.zero_stage < 3 else p.ds_shape)
        told[name] = {"start": start, "end": engine.full_state_dict(), "masters": masters}
    return told


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """root/NAME/hf: what transformers saves of each case; the tied one, too, in several files."""
    root = tmp_path_factory.mktemp("weights")
    for name, case in CASES.items():
        size = "8KB" if name == "qwen2-tied" else "5GB"
        randomised(case.theirs).save_pretrained(root / name / "hf", max_shard_size=size)
    assert (root / "qwen2-tied" / "hf" / INDEX).is_file()
    return root


@pytest.fixture(scope="module")
def trained(root):
    return run_distributed(through_engines, str(root), world=WORLD, timeout_s=240)[0]


# ---- in


@pytest.mark.parametrize("name", CASES)
def test_transformers_models_come_in_with_the_same_logits(root, name):
    weights = WeightsFolder(root / name / "hf")
    assert weights.config == filled(CASES[name].ours)
    assert weights.fits(CASES[name].ours) == [], "defaults that are filled in are no difference"
    model = Transformer(weights.config, kernel="reference")
    weights.load_into(model)
    hf = AutoModelForCausalLM.from_pretrained(root / name / "hf")
    assert {key for key, p in model.state_dict().items() if not torch.equal(p, hf.state_dict()[key])} == set()
    assert_same_logits(model, hf)


@pytest.mark.parametrize("name", CASES)
def test_an_engine_of_any_stage_starts_from_them(root, trained, name):
    hf = AutoModelForCausalLM.from_pretrained(root / name / "hf").state_dict()
    dtype = torch.bfloat16 if CASES[name].dtype == "bf16" else torch.float32
    start = trained[name]["start"]
    assert {key for key, p in start.items() if not torch.equal(p, hf[key].to(dtype))} == set()
    assert {key for key, p in trained[name]["end"].items() if torch.equal(p, start[key])} == set(), "it has learnt"


IN_PARTS = ("llama-llama3", "qwen2-tied")


def in_parts(rank: int, root: str) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    """As `through_engines`, by an engine of two stages and two tp ranks; the stages' parameters put together again."""
    mesh = ParallelMesh.create(ParallelPlan(pp=2, tp=2), device="cpu")
    told = {}
    for name in IN_PARTS:
        weights = WeightsFolder(Path(root) / name / "hf")
        settings = EngineConfig(dtype="fp32", micro_batch_size=ROWS, kernel="reference")
        optim = OptimConfig(lr=1e-2, warmup_steps=0)
        engine = build_engine(weights.config, settings, optim, mesh, total_steps=9, load=weights.load_into)
        start = engine.full_state_dict()
        for step in range(2):
            engine.train_step(step, shard_step(full_step(step, dp=1, accumulation=1), mesh))
        path = Path(root) / f"{name}-parts"
        save_checkpoint(path, engine, TrainState(step=2), fingerprint=asdict(weights.config), keep=1)
        told[name] = {"start": start, "end": engine.full_state_dict()}
    return told


@pytest.fixture(scope="module")
def parts(root):
    return run_distributed(in_parts, str(root), world=4, timeout_s=240)


@pytest.mark.parametrize("name", IN_PARTS)
def test_stages_and_shared_matrices_start_from_them(root, parts, name):
    assert not any(of_rank[name]["start"] for of_rank in parts[1:])
    start = parts[0][name]["start"]
    held = dict(AutoModelForCausalLM.from_pretrained(root / name / "hf").named_parameters())
    assert start.keys() == held.keys()
    assert {key for key, p in start.items() if not torch.equal(p, held[key])} == set()


# ---- out


@pytest.mark.parametrize("name", CASES)
def test_checkpoints_go_out_bit_for_bit_and_transformers_computes_the_same(root, trained, tmp_path, name):
    end = trained[name]["end"]
    files = export(latest_checkpoint(root / name), tmp_path / "out", max_position=128, shard_bytes=9_000)
    assert sum(file.suffix == ".safetensors" for file in files) > 1
    assert all(re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", f.name) for f in files if f.suffix == ".safetensors")
    hf, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert hf.config.model_type == name.split("-")[0]
    held = dict(hf.named_parameters())
    assert held.keys() == end.keys()
    assert {key for key, p in held.items() if p.dtype != end[key].dtype or not torch.equal(p, end[key])} == set()
    # And in again.
    weights = WeightsFolder(tmp_path / "out")
    assert weights.config == filled(CASES[name].ours)
    model = Transformer(weights.config, kernel="reference")
    weights.load_into(model)
    assert_same_logits(model, hf)


@pytest.mark.parametrize("name", IN_PARTS)
def test_checkpoints_of_stages_and_shared_matrices_go_out_whole(root, parts, trained, tmp_path, name):
    files = export(latest_checkpoint(root / f"{name}-parts"), tmp_path / "out", max_position=128, shard_bytes=9_000)
    assert sum(file.suffix == ".safetensors" for file in files) > 1
    held = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    end, of_ring = parts[0][name]["end"], trained[name]["end"]
    assert held.keys() == end.keys() == of_ring.keys()
    assert {key for key, p in held.items() if not torch.equal(p, end[key])} == set()
    # What another plan has learnt from the same steps.
    for key, p in held.items():
        assert (p - of_ring[key]).norm() <= 1e-4 * of_ring[key].norm(), key


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.zero_stage])
def test_fp32_are_the_optimizers_own_weights(root, trained, tmp_path, name):
    export(latest_checkpoint(root / name), tmp_path / "out", dtype="fp32", max_position=128)
    got = load_file(tmp_path / "out" / SINGLE)
    masters = trained[name]["masters"]
    assert {key for key in masters if not torch.equal(got[key], masters[key])} == set()
    rounded = {key: p.to(trained[name]["end"][key].dtype) for key, p in got.items()}
    assert {key for key in masters if not torch.equal(rounded[key], trained[name]["end"][key])} == set()
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.float32


def test_tensors_are_cut_into_files_in_order():
    sizes = {"a": 4, "b": 4, "c": 1, "d": 20, "e": 3}
    assert shards_of(sizes, 8) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert shards_of(sizes, 100) == [list("abcde")]
    assert [parse_bytes(text) for text in ("5GB", "1.5 MB", "2GiB", "300")] == [5 * 10**9, 1_500_000, 2 << 30, 300]
    for text in ("5TB", "0", "GB", "-1GB"):
        with pytest.raises(ConfigError, match="is not a size of files"):
            parse_bytes(text)


# ---- files that are not what they should be


@pytest.fixture
def folder(root, tmp_path) -> Path:
    """A copy of a folder in several files, to be damaged."""
    return Path(shutil.copytree(root / "qwen2-tied" / "hf", tmp_path / "hf"))


def edited(path: Path, edit) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_every_tensor_that_does_not_fit_is_listed(root, tmp_path):
    folder = Path(shutil.copytree(root / "mistral" / "hf", tmp_path / "hf"))

    def edit(tensors):
        del tensors["model.norm.weight"]
        tensors["lm_head.weight"] = torch.zeros(63, 32)
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)

    edited(folder / SINGLE, edit)
    with pytest.raises(CheckpointError) as caught:
        WeightsFolder(folder)
    said = str(caught.value)
    assert said.startswith("3 problems with the weights in")
    assert "model.norm.weight is missing" in said
    assert "lm_head.weight has shape [63, 32]; config.json says [64, 32]" in said
    assert "q_proj.bias is not a parameter of the model" in said
    edited(folder / SINGLE, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(64, 32, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=r"lm_head.weight holds numbers of type I8\n.*BF16"):
        WeightsFolder(folder)


def test_a_tied_head_that_is_stored_must_be_the_embedding(folder):
    WeightsFolder(folder)
    index = json.loads((folder / INDEX).read_text())
    name = "model.embed_tokens.weight"
    file = index["weight_map"][name]
    edited(folder / file, lambda tensors: tensors.update({"lm_head.weight": tensors[name].clone()}))
    index["weight_map"]["lm_head.weight"] = file
    (folder / INDEX).write_text(json.dumps(index))
    assert WeightsFolder(folder).config.tie_embeddings
    edited(folder / file, lambda tensors: tensors["lm_head.weight"].add_(1e-3))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is not the embedding"):
        WeightsFolder(folder)


def test_files_that_are_missing_or_cut_off_are_named(folder, tmp_path):
    index = json.loads((folder / INDEX).read_text())
    file = folder / index["weight_map"]["model.norm.weight"]
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    with pytest.raises(CheckpointError, match=rf"{file.name} cannot be read"):
        WeightsFolder(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match=rf"lacks {file.name}"):
        WeightsFolder(folder)
    index["weight_map"]["model.norm.weight"] = f"../{file.name}"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="names files that are not in it"):
        WeightsFolder(folder)
    (folder / INDEX).write_text("[]")
    with pytest.raises(CheckpointError, match="cannot be read"):
        WeightsFolder(folder)
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match="pickles, which can run code"):
        WeightsFolder(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        WeightsFolder(folder)
    with pytest.raises(CheckpointError, match="is not a folder"):
        WeightsFolder(tmp_path / "nowhere")


def test_a_checkpoint_that_is_damaged_or_of_another_kind_is_refused(root, trained, tmp_path):
    path = Path(shutil.copytree(latest_checkpoint(root / "mistral"), tmp_path / "step-00000002"))
    with pytest.raises(CheckpointError, match="it holds checkpoints"):
        export(path.parent, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(CheckpointError, match="exists already"):
        export(path, tmp_path / "full")
    manifest = json.loads((path / "manifest.json").read_text())
    of_one = [file for file in manifest["files"] if file["name"] != "state-rank00001.safetensors"]
    (path / "manifest.json").write_text(json.dumps(manifest | {"files": of_one}))
    with pytest.raises(CheckpointError, match="lacks parameters of its model"):
        export(path, tmp_path / "out", max_position=128)
    (path / "manifest.json").write_text(json.dumps(manifest))
    file = max(path.glob("state-rank*"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match="is damaged"):
        export(path, tmp_path / "out")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is truncated"):
        export(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_left_of_an_export_that_fails(root, trained, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("longctx.weights.save_file", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        export(latest_checkpoint(root / "mistral"), tmp_path / "out", max_position=128)
    assert list(tmp_path.iterdir()) == []


def test_the_exported_length_is_that_of_the_training_where_nothing_stretches_it(root, trained, tmp_path):
    path = Path(shutil.copytree(latest_checkpoint(root / "mistral"), tmp_path / "step-00000002"))
    with pytest.raises(CheckpointError, match="--max-position"):
        export(path, tmp_path / "out")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["state"]["data"] = "text 0a, sequences of 96, in order"
    (path / "manifest.json").write_text(json.dumps(manifest))
    export(path, tmp_path / "out")
    assert AutoConfig.from_pretrained(tmp_path / "out").max_position_embeddings == 96
