"""Weights in Hugging Face's layout: exact both ways, through engines of every ZeRO stage, and every refusal."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from run_cases import clean_env, train, write_text
from safetensors.torch import load_file, save_file
from train_cases import ROWS, SEQ_LEN, full_step, shards
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from longctx import checkpoint_weights
from longctx.__main__ import main
from longctx.checkpoint import TrainState, latest_checkpoint, save_checkpoint
from longctx.checkpoint_weights import CheckpointWeights
from longctx.config import load_config
from longctx.engine import EngineConfig, build_engine
from longctx.errors import CheckpointError, ConfigError
from longctx.hf_config import from_hf_config, to_hf_config
from longctx.layout import SequenceMeta
from longctx.masks import Causal
from longctx.model import ModelConfig, Transformer
from longctx.optim import OptimConfig
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.plan import ParallelPlan
from longctx.preparation import weights_to_start_from
from longctx.rope import RopeScaling, rope_frequencies
from longctx.testing import run_distributed
from longctx.weights import INDEX, SINGLE, WeightsFolder, export, import_config, parse_bytes, shards_of

SIZES = dict(vocab_size=64, hidden_size=32, num_heads=4, num_kv_heads=2, intermediate_size=56, num_layers=2)
HF_SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=56,
    max_position_embeddings=128,
    initializer_range=0.02,
    bos_token_id=None,
    eos_token_id=None,
)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=5e5)
YARN = dict(rope_type="yarn", factor=4.0, beta_fast=24.0, original_max_position_embeddings=32, rope_theta=1e6)


@dataclass(frozen=True)
class Case:
    """A model of transformers, what it is here, and how it is trained in between."""

    theirs: PreTrainedConfig
    ours: ModelConfig
    dtype: str
    zero_stage: int
    keep_elements: int = 0


CASES = {
    "llama-llama3": Case(
        LlamaConfig(**HF_SIZES, rope_parameters=LLAMA3 | {"original_max_position_embeddings": 16}),
        ModelConfig(
            **SIZES,
            norm_eps=1e-6,
            rope_theta=5e5,
            rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_max_position=16),
        ),
        "fp32",
        0,
    ),
    "llama-tied-linear": Case(
        LlamaConfig(**HF_SIZES, rope_parameters={"rope_type": "linear", "factor": 4.0}, tie_word_embeddings=True),
        ModelConfig(
            **SIZES,
            norm_eps=1e-6,
            tie_embeddings=True,
            rope_scaling=RopeScaling(kind="linear", factor=4.0, original_max_position=32),
        ),
        "bf16",
        3,
    ),
    "qwen2-tied": Case(
        Qwen2Config(**HF_SIZES, tie_word_embeddings=True, rms_norm_eps=1e-5),
        ModelConfig(**SIZES, tie_embeddings=True, qkv_bias=True),
        "fp32",
        1,
    ),
    "qwen2-window": Case(
        Qwen2Config(**HF_SIZES, use_sliding_window=True, sliding_window=7, max_window_layers=0),
        ModelConfig(**SIZES, norm_eps=1e-6, qkv_bias=True, sliding_window=7),
        "bf16",
        1,
    ),
    "qwen3-yarn": Case(
        Qwen3Config(**HF_SIZES, head_dim=12, rope_parameters=YARN),
        ModelConfig(
            **SIZES,
            head_dim=12,
            norm_eps=1e-6,
            qk_norm=True,
            rope_theta=1e6,
            rope_scaling=RopeScaling(kind="yarn", factor=4.0, original_max_position=32, beta_fast=24.0),
        ),
        "fp32",
        3,
        # The norms stay whole on every process.
        keep_elements=100,
    ),
    "mistral": Case(
        MistralConfig(**HF_SIZES, sliding_window=5),
        ModelConfig(**SIZES, norm_eps=1e-6, sliding_window=5),
        "bf16",
        2,
    ),
}
# Parameters do not divide by three: the last partition is padded.
WORLD = 3


@torch.no_grad()
def randomised(config: PreTrainedConfig) -> torch.nn.Module:
    """Weights as different from their initial values as training makes them: biases not 0, norms not 1."""
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + (1.0 if name.endswith("norm.weight") else 0.0))
    return model


def filled(config: ModelConfig) -> ModelConfig:
    return replace(config, head_dim=config.head_size, num_kv_heads=config.kv_heads, intermediate_size=config.mlp_size)


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
            engine.train_step(step, shards(full_step(step, dp=1, accumulation=1), mesh))
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


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.zero_stage])
def test_fp32_are_the_optimizers_own_weights(root, trained, tmp_path, name):
    export(latest_checkpoint(root / name), tmp_path / "out", dtype="fp32", max_position=128)
    got = load_file(tmp_path / "out" / SINGLE)
    masters = trained[name]["masters"]
    assert {key for key in masters if not torch.equal(got[key], masters[key])} == set()
    rounded = {key: p.to(trained[name]["end"][key].dtype) for key, p in got.items()}
    assert {key for key in masters if not torch.equal(rounded[key], trained[name]["end"][key])} == set()
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.float32


def test_partitions_in_the_wrong_order_would_be_seen(root, trained, monkeypatch):
    right = checkpoint_weights._rank
    monkeypatch.setattr(checkpoint_weights, "_rank", lambda name: -right(name))
    weights = CheckpointWeights(latest_checkpoint(root / "qwen2-window"))
    with pytest.raises(CheckpointError, match="of the optimizer is not that of the model"):
        weights.tensor("lm_head.weight", "bf16")
    weights = CheckpointWeights(latest_checkpoint(root / "qwen3-yarn"))
    assert not torch.equal(weights.tensor("lm_head.weight", "fp32"), trained["qwen3-yarn"]["end"]["lm_head.weight"])


def test_tensors_are_cut_into_files_in_order():
    sizes = {"a": 4, "b": 4, "c": 1, "d": 20, "e": 3}
    assert shards_of(sizes, 8) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert shards_of(sizes, 100) == [list("abcde")]
    assert [parse_bytes(text) for text in ("5GB", "1.5 MB", "2GiB", "300")] == [5 * 10**9, 1_500_000, 2 << 30, 300]
    for text in ("5TB", "0", "GB", "-1GB"):
        with pytest.raises(ConfigError, match="is not a size of files"):
            parse_bytes(text)


# ---- the configuration

CONFIGS = {
    "llama": ModelConfig(),
    "llama3": CASES["llama-llama3"].ours,
    "linear": CASES["llama-tied-linear"].ours,
    "yarn": CASES["qwen3-yarn"].ours,
    "yarn-mscale": ModelConfig(
        rope_scaling=RopeScaling(
            kind="yarn", factor=8.0, original_max_position=64, mscale=1.0, mscale_all_dim=0.7, truncate=False
        )
    ),
    "yarn-attention": ModelConfig(
        rope_scaling=RopeScaling(
            kind="yarn", factor=8.0, original_max_position=64, attention_factor=1.25, beta_slow=2.0
        )
    ),
    "qwen2-window": CASES["qwen2-window"].ours,
    "mistral": CASES["mistral"].ours,
    "odd-width": ModelConfig(hidden_size=36, num_heads=8, head_dim=16),
}


def read_back(hf: dict, folder: Path) -> PreTrainedConfig:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf))
    return AutoConfig.from_pretrained(folder)


def frequencies(hf: PreTrainedConfig, head_dim: int) -> tuple[torch.Tensor, float]:
    kind = hf.rope_parameters["rope_type"]
    if kind == "default":
        return hf.rope_parameters["rope_theta"] ** -(torch.arange(0, head_dim, 2).double() / head_dim), 1.0
    return ROPE_INIT_FUNCTIONS[kind](hf, "cpu")


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_go_out_and_in(name, tmp_path):
    config = CONFIGS[name]
    hf = to_hf_config(config, dtype="bf16", max_position=None if config.rope_scaling else 4096, end_of_document=3)
    assert from_hf_config(hf, where="config.json") == filled(config)
    theirs = read_back(hf, tmp_path)
    inv_freq, factor = rope_frequencies(config.head_size, config.rope_theta, config.rope_scaling)
    expected, expected_factor = frequencies(theirs, config.head_size)
    torch.testing.assert_close(expected.double(), inv_freq, rtol=1e-5, atol=0)
    assert factor == pytest.approx(expected_factor)
    # As transformers 5 writes it again, with its other names.
    theirs.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "rope_parameters" in again
    assert from_hf_config(again, where="config.json") == filled(config)


def test_static_ntk_goes_out_as_its_base(tmp_path):
    config = ModelConfig(rope_scaling=RopeScaling(kind="ntk", factor=8.0, original_max_position=4096))
    hf = to_hf_config(config, dtype="fp32", max_position=None, end_of_document=None)
    assert hf["max_position_embeddings"] == 32768
    again = from_hf_config(hf, where="config.json")
    assert again.rope_scaling is None
    ours, _ = rope_frequencies(config.head_size, config.rope_theta, config.rope_scaling)
    assert torch.equal(rope_frequencies(again.head_size, again.rope_theta)[0], ours)
    torch.testing.assert_close(frequencies(read_back(hf, tmp_path), config.head_size)[0], ours, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "gemma2"}, r"model_type = 'gemma2' is not supported"),
        ({"hidden_act": "gelu"}, r"hidden_act = 'gelu' cannot be represented"),
        ({"attention_bias": True}, r"attention_bias = True cannot"),
        ({"mlp_bias": True}, r"mlp_bias = True cannot"),
        ({"attention_dropout": 0.1}, r"attention_dropout = 0.1 cannot"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor = 0.5 cannot"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config = \{'bits': 4\} is not known for a llama"),
        ({"sliding_window": 4096}, r"sliding_window = 4096 is not known for a llama"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, r"rope_scaling.rope_type = 'dynamic' cannot"),
        ({"rope_scaling": {"rope_type": "longrope"}}, r"rope_type = 'longrope' cannot"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, r"partial_rotary_factor = 0.5"),
        ({"rope_parameters": {"full_attention": {}, "sliding_attention": {}}}, r"rope_parameters differs between"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"rope_scaling.low_freq_factor is missing"),
        ({"rope_scaling": {"rope_type": "linear"}}, r"rope_scaling.factor = None is"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "extra": 1}}, r"rope_scaling.extra = 1 is not known"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, r"rope_scaling.factor = 0.5 must be"),
        ({"num_hidden_layers": None}, r"num_hidden_layers is missing"),
        ({"hidden_size": "32"}, r"hidden_size = '32' is text"),
        ({"num_attention_heads": 5, "head_dim": 8}, r"num_heads 5 is not a multiple"),
        ({"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]}, r"layer_types = "),
        ({"model_type": "mistral", "sliding_window": 8, "layer_types": ["full_attention"] * 2}, r"layer_types = "),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            r"max_window_layers = 1 of 2 layers",
        ),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_what_cannot_be_represented_is_refused_by_name(change, said):
    hf = to_hf_config(ModelConfig(**SIZES), dtype="fp32", max_position=128, end_of_document=None)
    assert from_hf_config(hf, where="config.json") == filled(ModelConfig(**SIZES))
    with pytest.raises(CheckpointError, match=said):
        from_hf_config(hf | change, where="config.json")


def test_what_has_no_family_is_refused():
    with pytest.raises(CheckpointError, match=r"qkv_bias and model\.qk_norm together"):
        to_hf_config(ModelConfig(qkv_bias=True, qk_norm=True), dtype="fp32", max_position=1, end_of_document=None)
    with pytest.raises(CheckpointError, match="--max-position"):
        to_hf_config(ModelConfig(), dtype="fp32", max_position=None, end_of_document=None)


def test_fields_that_are_left_out_mean_what_transformers_means():
    given = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 32}
    for family, cls in (
        ("llama", LlamaConfig),
        ("mistral", MistralConfig),
        ("qwen2", Qwen2Config),
        ("qwen3", Qwen3Config),
    ):
        ours = from_hf_config(given | {"intermediate_size": 96, "model_type": family}, where="config.json")
        theirs = cls(**given, intermediate_size=96)
        assert ours.kv_heads == theirs.num_key_value_heads
        assert ours.head_size == getattr(theirs, "head_dim", 2)
        assert (ours.sliding_window, ours.norm_eps) == (getattr(theirs, "sliding_window", None), theirs.rms_norm_eps)
        assert (ours.rope_theta, ours.tie_embeddings) == (
            theirs.rope_parameters["rope_theta"],
            theirs.tie_word_embeddings,
        )


PUBLISHED = {
    "Llama-3.1-8B": (
        dict(
            **dict(model_type="llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32),
            **dict(num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072),
            **dict(attention_bias=False, attention_dropout=0.0, bos_token_id=128000, hidden_act="silu"),
            **dict(eos_token_id=[128001, 128008, 128009], initializer_range=0.02, mlp_bias=False, pretraining_tp=1),
            rope_scaling={
                **dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_type="llama3"),
                "original_max_position_embeddings": 8192,
            },
            **dict(rms_norm_eps=1e-5, rope_theta=500000.0, tie_word_embeddings=False, torch_dtype="bfloat16"),
            **dict(transformers_version="4.42.3", use_cache=True, architectures=["LlamaForCausalLM"]),
        ),
        8_030_261_248,
    ),
    "Qwen2.5-0.5B, stretched": (
        dict(
            **dict(model_type="qwen2", hidden_size=896, intermediate_size=4864, num_hidden_layers=24),
            **dict(num_attention_heads=14, num_key_value_heads=2, vocab_size=151936, max_position_embeddings=32768),
            **dict(attention_dropout=0.0, bos_token_id=151643, eos_token_id=151643, hidden_act="silu"),
            **dict(max_window_layers=24, sliding_window=32768, use_mrope=False, use_sliding_window=False),
            rope_scaling={"factor": 4, "original_max_position_embeddings": 32768, "type": "yarn"},
            **dict(rms_norm_eps=1e-6, rope_theta=1000000, tie_word_embeddings=True, torch_dtype="bfloat16"),
        ),
        494_032_768,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_read(name):
    hf, num_params = PUBLISHED[name]
    config = from_hf_config(hf, where="config.json")
    assert config.shape.num_params == num_params
    assert config.rope_scaling.kind == ("llama3" if name.startswith("Llama") else "yarn")
    # Whole numbers where ours have a fraction, as in a TOML file.
    assert isinstance(config.rope_theta, float)
    assert isinstance(config.rope_scaling.factor, float)


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
    manifest["sharing"]["parallel.tp"] = 2
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="saved with pp 1, tp 2"):
        export(path, tmp_path / "out")
    file = max(path.glob("*_optim_states.pt"))
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


# ---- commands and runs


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


def test_a_run_starts_from_a_folder_and_gives_it_back(root, tmp_path, own_environment, capsys):
    """transformers -> longctx import -> train.py, with steps too small to change anything -> longctx export."""
    folder = Path(shutil.copytree(root / "qwen3-yarn" / "hf", tmp_path / "hf"))
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
    done = train("torchrun", 2, *words, "--parallel.ring=2", "--engine.zero_stage=3", "--train.steps=1")
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
    more = train("torchrun", 2, *words, "--parallel.ring=2", "--engine.zero_stage=3", "--train.steps=2")
    assert more.returncode == 0, more.stdout
    assert "resumed   at step 1" in more.stdout
    assert "train.init_from" not in more.stdout


def test_the_exported_length_is_that_of_the_training_where_nothing_stretches_it(root, trained, tmp_path):
    path = Path(shutil.copytree(latest_checkpoint(root / "mistral"), tmp_path / "step-00000002"))
    with pytest.raises(CheckpointError, match="--max-position"):
        export(path, tmp_path / "out")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["state"]["data"] = "text 0a, sequences of 96, in order"
    (path / "manifest.json").write_text(json.dumps(manifest))
    export(path, tmp_path / "out")
    assert AutoConfig.from_pretrained(tmp_path / "out").max_position_embeddings == 96


def test_settings_that_do_not_fit_the_weights_are_all_named(root, tmp_path):
    folder = root / "qwen2-window" / "hf"
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
