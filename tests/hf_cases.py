"""Tiny models of transformers with random weights, and what one process makes of a batch with their own attention."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch.distributed.tensor import DTensor
from transformers import (
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

IGNORE = -100
SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
)
WINDOWED = dict(use_sliding_window=True, sliding_window=7, max_window_layers=1)
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "mistral-window": MistralConfig(**SIZES, sliding_window=9),
    "qwen2-one-layer-windowed": Qwen2Config(**SIZES, **WINDOWED),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "gemma2-softcap": Gemma2Config(**SIZES, head_dim=8, sliding_window=6, attn_logit_softcapping=5.0),
    "gemma3": Gemma3TextConfig(
        **SIZES, head_dim=8, sliding_window=5, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt-oss-sinks": GptOssConfig(**SIZES, head_dim=8, sliding_window=8, num_local_experts=4, num_experts_per_tok=2),
    # Multi-head latent attention: heads of values are narrower than those of queries.
    "deepseek-latent": DeepseekV3Config(
        **SIZES | dict(num_key_value_heads=4),
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=12,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=12,
    ),
}


def make_model(name: str, implementation: str) -> PreTrainedModel:
    """The same weights for any implementation of attention."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(
        CONFIGS[name], attn_implementation=implementation, experts_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            # Wide enough that attention matters.
            parameter.mul_(4.0) if parameter.ndim == 2 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double().train()


def make_batch(kind: str, batch: int, seq_len: int) -> dict[str, torch.Tensor]:
    """Whole sequences as collators make them: "plain", "packed" documents, or padded on the "left" or "right". The first targets
    are left out, more of them in each sequence.
    """
    generator = torch.Generator().manual_seed(batch * 1000 + seq_len)
    tokens = torch.randint(1, 64, (batch, seq_len), generator=generator)
    labels = tokens.clone()
    made = {"input_ids": tokens, "labels": labels}
    for row in range(batch):
        labels[row, : 3 + 4 * row] = IGNORE
    if kind == "packed":
        cuts = [torch.randperm(seq_len - 1, generator=generator)[:3].sort().values + 1 for _ in range(batch)]
        cuts[0][0] = 1  # a document of one token
        rows = [[0, *cut.tolist(), seq_len] for cut in cuts]
        positions = [torch.cat([torch.arange(b - a) for a, b in pairwise(sorted(set(row)))]) for row in rows]
        made["position_ids"] = torch.stack(positions)
        labels[made["position_ids"] == 0] = IGNORE
    elif kind != "plain":
        made["attention_mask"] = torch.ones_like(tokens)
        for row in range(1, batch):
            padding = 3 + 2 * row
            where = slice(0, padding) if kind == "left" else slice(seq_len - padding, seq_len)
            made["attention_mask"][row, where], labels[row, where] = 0, IGNORE
    return made


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The gradient of each parameter, whole also where FSDP2 cut it."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: (g.full_tensor() if isinstance(g, DTensor) else g).clone() for name, g in found.items()}


def worst_gradient(model: PreTrainedModel, expected: dict[str, torch.Tensor]) -> float:
    """Greatest relative error of a parameter's gradient."""
    found = gradients(model)
    assert found.keys() == expected.keys()
    return max(float((found[n] - g).norm() / g.norm().clamp(min=1e-12)) for n, g in expected.items())
