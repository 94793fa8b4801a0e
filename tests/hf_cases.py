"""Small random models of Hugging Face's, batches as their collators make them, and what the processes of a test do."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from longctx.hf import gradient_checkpointing_kwargs, shard_batch, sharded_trainer
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.plan import ParallelPlan

VOCAB, LENGTH = 61, 26
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=56,
    head_dim=8,
    max_position_embeddings=128,
    pad_token_id=0,
    eos_token_id=None,
    bos_token_id=None,
)
WINDOWS = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}

# name -> (model class, configuration, what transformers has to compare with)
MODELS: dict[str, tuple[type[PreTrainedModel], Any, str]] = {
    "llama": (LlamaForCausalLM, lambda: LlamaConfig(**SIZES), "sdpa"),
    "mistral": (MistralForCausalLM, lambda: MistralConfig(**SIZES, sliding_window=5), "sdpa"),
    "qwen3": (
        Qwen3ForCausalLM,
        lambda: Qwen3Config(**SIZES, use_sliding_window=True, max_window_layers=1, sliding_window=5),
        "sdpa",
    ),
    "gemma3": (Gemma3ForCausalLM, lambda: Gemma3TextConfig(**SIZES, **WINDOWS), "sdpa"),
    "gpt-oss": (GptOssForCausalLM, lambda: GptOssConfig(**SIZES, **WINDOWS, **ROPE, num_local_experts=4), "eager"),
}


def make_model(name: str, attention: str) -> PreTrainedModel:
    """Equal weights for every kind of attention; large enough that each of them matters."""
    cls, config, _ = MODELS[name]
    model = cls._from_config(config(), attn_implementation=attention, experts_implementation="eager").double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1))
    return model


def make_batch(kind: str = "plain") -> dict[str, torch.Tensor]:
    """Two whole sequences: "plain", "packed" documents, or padded "left" or "right"."""
    tokens = torch.randint(1, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "labels": tokens.clone()}
    batch["labels"][:, 3:7] = -100
    if kind == "packed":
        rows = [torch.cat([torch.arange(n) for n in lengths]) for lengths in ((7, 1, 18), (13, 13))]
        batch["position_ids"] = torch.stack(rows)
        batch["labels"][batch["position_ids"] == 0] = -100
    elif kind in ("left", "right"):
        batch["attention_mask"] = torch.ones_like(tokens)
        batch["attention_mask"][0, slice(0, 6) if kind == "left" else slice(17, None)] = 0
        batch["labels"][batch["attention_mask"] == 0] = -100
    return batch


def gradients(model: PreTrainedModel, batch: dict[str, Any], num_targets: int) -> dict[str, torch.Tensor]:
    """Loss and gradients. Of the loss in float64; transformers' own, which rounds logits to fp32, is "their_loss"."""
    model.zero_grad()
    made = model(**batch, num_items_in_batch=torch.tensor(num_targets), use_cache=False)
    labels = batch.get("shift_labels")
    if labels is None:
        labels = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    loss = F.cross_entropy(made.logits.flatten(0, 1), labels.flatten(), reduction="sum") / num_targets
    loss.backward()
    found = {"loss": loss.detach(), "their_loss": made.loss.detach().double()}
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def their_gradients(name: str, kind: str) -> dict[str, torch.Tensor]:
    """By transformers' own attention, on one process."""
    batch = make_batch(kind)
    targets = num_targets(batch)
    if name == "gpt-oss" and kind == "packed":
        # It tells its masks nothing of position_ids, so they are given whole.
        document = (batch["position_ids"].diff(prepend=torch.full((2, 1), -1)) != 1).cumsum(1)
        row = torch.arange(LENGTH)
        causal = (document[:, :, None] == document[:, None]) & (row <= row[:, None])
        seen = {"full_attention": causal, "sliding_attention": causal & (row > row[:, None] - 5)}
        batch["attention_mask"] = {layers: (~mask[:, None]).double() * -1e30 for layers, mask in seen.items()}
    return gradients(make_model(name, MODELS[name][2]), batch, targets)


def num_targets(batch: dict[str, torch.Tensor]) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


def shard_worker(rank: int, plans: list[ParallelPlan], cases: list[tuple[str, str, bool]]) -> list[dict]:
    """Gradients summed over the ranks, of each plan and (model, batch, whether layers are computed again)."""
    results = []
    for plan in plans:
        mesh = ParallelMesh.create(plan, device="cpu")
        for name, kind, recompute in cases:
            model = make_model(name, "longctx")
            if recompute:
                model.train()
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=gradient_checkpointing_kwargs())
            batch = make_batch(kind)
            before = mesh.exchange.bytes_sent
            found = gradients(model, shard_batch(batch, mesh), num_targets(batch))
            sent = mesh.exchange.bytes_sent - before
            for value in found.values():
                dist.all_reduce(value)
            results.append({**found, "sent": sent})
    return results if rank == 0 else []


def trainer_worker(rank: int, plan: ParallelPlan, folder: str) -> dict[str, Any]:
    """Two steps of transformers' Trainer, each of two micro-batches of two samples, and an evaluation."""
    from transformers import Trainer, TrainingArguments, default_data_collator

    arguments = TrainingArguments(
        folder,
        use_cpu=True,
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        optim="sgd",
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs=gradient_checkpointing_kwargs(),
    )
    mesh = ParallelMesh.create(plan, device="cpu")
    rows = [{"input_ids": tokens, "labels": tokens.clone()} for tokens in make_batch()["input_ids"].repeat(5, 1)]
    for i, row in enumerate(rows):
        row["input_ids"] = row["input_ids"].roll(i)
        row["labels"][: 2 * i] = -100
    trainer = sharded_trainer(Trainer, mesh)(
        make_model("llama", "longctx"), arguments, train_dataset=rows, data_collator=default_data_collator
    )
    trainer.train()
    log = [entry[name] for entry in trainer.state.log_history for name in ("loss", "grad_norm") if name in entry]
    return {
        "log": [float(value) for value in log],
        "eval": trainer.evaluate(rows[:3])["eval_loss"],
        "weights": {name: p.detach() for name, p in trainer.model.named_parameters()},
    }
