"""Small models of each family that comes in and goes out: transformers' configuration, and ours."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from longctx.model import ModelConfig
from longctx.rope import RopeScaling

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


def filled(config: ModelConfig) -> ModelConfig:
    return replace(config, head_dim=config.head_size, num_kv_heads=config.kv_heads, intermediate_size=config.mlp_size)


@torch.no_grad()
def randomised(config: PreTrainedConfig) -> torch.nn.Module:
    """Weights as different from their initial values as training makes them: biases not 0, norms not 1."""
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + (1.0 if name.endswith("norm.weight") else 0.0))
    return model
