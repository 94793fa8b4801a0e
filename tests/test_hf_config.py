"""Hugging Face's config.json: equal models both ways, and every field that cannot be represented refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from weights_cases import CASES, SIZES, filled

from longctx.errors import CheckpointError
from longctx.hf_config import from_hf_config, to_hf_config
from longctx.model import ModelConfig
from longctx.rope import RopeScaling, rope_frequencies

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
        ({"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping = 50.0 is not known for a llama"),
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
    for option in ({"softcap": 50.0}, {"sinks": True}):
        with pytest.raises(CheckpointError, match=rf"model\.{next(iter(option))} = "):
            to_hf_config(ModelConfig(**option), dtype="fp32", max_position=1, end_of_document=None)
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
