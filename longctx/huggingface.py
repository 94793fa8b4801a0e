"""Models of Hugging Face's transformers over the ranks of a mesh: their attention spans them, the rest works on its shard.

On one device `attn_implementation="longctx"`, which importing this module registers, is all. Over ranks, `parallelize` tells the model
which mesh its attention spans, and `shard_batch` cuts whole sequences into the keyword arguments of a call. Who sees whom
travels with the batch, as the keyword `sequence_meta` that models hand on to their attention: no state is kept anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from longctx.errors import KernelError, PlanError, Problem, ShapeError, format_problems
from longctx.functional import linear_cross_entropy
from longctx.hf_attention import NAME, Span
from longctx.hf_masks import document_mask
from longctx.layout import SequenceLayout
from longctx.masks import AttentionMask, Causal, Documents
from longctx.model import keep_attention
from longctx.parallel.degrees import ulysses_problems
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.strategy import ContextStrategy, get_strategy
from longctx.sequence import SequenceMeta
from longctx.shapes import NO_TARGET

# The kinds of layers, in the configurations' `layer_types`, whose tokens see each other through attention only, by intervals.
_LAYER_TYPES = ("full_attention", "sliding_attention")
# Kinds of RoPE whose frequencies follow from the greatest position, of which each rank knows its own.
_ROPES_OF_LENGTH = ("dynamic", "longrope")
# How the settings begin of layers that carry a state along the sequence.
_STATEFUL = ("mamba_", "ssm_", "linear_", "conv_", "rwkv", "lru_")
# What a collator may put into a batch beside what is cut here; it says which documents are packed.
_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
_KNOWN = ("input_ids", "labels", "position_ids", "attention_mask", *_BOUNDARIES)


def parallelize(
    model: PreTrainedModel,
    mesh: ParallelMesh,
    *,
    kernel: str = "auto",
    strategy: str | ContextStrategy | None = None,
) -> PreTrainedModel:
    """Let every attention of `model` span the ranks of `mesh`: from now on it is called with batches of `shard_batch`.

    In place. The weights stay whole on every rank and may be shared by FSDP2 or ZeRO afterwards; no key of the state dict changes.

    Args:
        model: one whose attention goes through transformers' attention interface, and whose tokens see each other nowhere else.
        mesh: of ring, ulysses and dp; tp and pp are for this library's own model.
        kernel, strategy: as in `longctx.ParallelAttention`.

    Returns:
        `model`.

    Raises:
        PlanError: the model cannot be cut along the sequence so; all reasons at once.
    """
    problems = _problems(model, mesh)
    if problems:
        raise PlanError(format_problems(f"{type(model).__name__} over {mesh.plan}", problems))
    if isinstance(strategy, str) and strategy != "auto":
        get_strategy(strategy)
    model.set_attn_implementation(NAME)
    for module in model.modules():
        if hasattr(module, "is_causal"):
            layer = getattr(module, "layer_idx", None)
            module.span = Span(mesh if layer is None else mesh.for_layer(layer), kernel, strategy)  # type: ignore[assignment]
    return model


def shard_batch(
    batch: Mapping[str, Any],
    mesh: ParallelMesh,
    *,
    mask: AttentionMask | None = None,
    layout: SequenceLayout | str | None = None,
    num_items_in_batch: int | None = None,
) -> dict[str, Any]:
    """This rank's part of a batch as transformers' collators make it, to be called with: `model(**shard_batch(batch, mesh))`.

    Every rank of `mesh.sp` gives the same batch. Labels are shifted before they are cut, so the token behind a shard's edge is
    predicted too. Packed documents are those of `position_ids` that start anew, or of `cu_seq_lens_q`; padding, where
    `attention_mask` is 0, is a document of its own. A length that cannot be cut evenly is padded inside. Documents are read on
    the host: of a batch on the CPU, where collators work, without waiting for anything.

    The loss that the model then returns, averaged over all ranks, is the mean over the targets of all of them; and so are the
    gradients under whatever averages them over the ranks, as DDP, FSDP2 and DeepSpeed do.

    Args:
        batch: whole sequences: `input_ids` int64 [b, S]; and if there are any `labels` [b, S], not shifted, -100 where there is no
            target; `position_ids` [b or 1, S], `attention_mask` [b, S] of 0 and 1, `cu_seq_lens_q` int32 [documents + 1] for b = 1.
        mask: who sees whom beside that; None: causal. Windows come from the model's layers. Without `position_ids`, positions
            start anew in each document of this mask.
        layout: of the ring, as in `SequenceMeta.of`; None: what the plan of `mesh` says.
        num_items_in_batch: targets of all ranks and micro-batches of a step. None: there is one micro-batch, and the ranks of `mesh.dp`
            count theirs together (a message, if there are several).

    Returns:
        On the mesh's device: `input_ids`, `position_ids` [b, s]; `sequence_meta`; `use_cache` False; and with labels `labels` and `shift_labels`,
        the targets of these tokens, and `num_items_in_batch`, what the sum of their losses is divided by.

    Raises:
        ShapeError: a key that is not known here, shapes that disagree, or padding in the middle of a row.
    """
    _check_batch(batch)
    tokens, positions, labels = (batch.get(name) for name in ("input_ids", "position_ids", "labels"))
    assert tokens is not None, "checked"
    documents = document_mask(
        tokens.shape,
        position_ids=positions,
        attention_mask=batch.get("attention_mask"),
        cu_seqlens=batch.get("cu_seq_lens_q"),
    )
    mask = mask or Causal()
    meta = SequenceMeta.of(
        tokens.shape[1],
        mask=mask & documents,
        layout=layout or mesh.plan.sequence_layout,
        ring_rank=mesh.ring.rank,
        ring_world=mesh.ring.size,
        ulysses_rank=mesh.ulysses.rank,
        ulysses_world=mesh.ulysses.size,
        device=mesh.device,
    )
    if positions is None:
        positions = _positions_in_documents(mask, tokens.shape[1])
    found: dict[str, Any] = {
        "input_ids": meta.shard(tokens.to(mesh.device), fill=0),
        "position_ids": meta.shard(positions.expand(tokens.shape).to(mesh.device), fill=0),
        "sequence_meta": meta,
        "use_cache": False,
    }
    if labels is not None:
        shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=NO_TARGET)
        if num_items_in_batch is None:
            num_items_in_batch = _count_targets(shifted, mesh)
        # Models make a loss where there are labels, and take it of these where they are given shifted.
        found["labels"] = found["shift_labels"] = meta.shard(shifted.to(mesh.device), fill=NO_TARGET)
        found["num_items_in_batch"] = torch.tensor(num_items_in_batch / mesh.grad.size, device=mesh.device)
    return found


def gradient_checkpointing_kwargs() -> dict[str, Any]:
    """For `model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=...)`: layers are computed again in backward,
    attention and its messages are not. Costs s * h * (2 * d + 4) bytes a layer and sequence in bf16.
    """
    return {"use_reentrant": False, "context_fn": keep_attention}


class CausalLMLoss(nn.Module):
    """The loss of a causal language model without the logits of all its tokens, which at 128k tokens are gigabytes.

    A module, so that DDP and FSDP2 can be put around it. The same number as `model(**batch).loss`.

    Args:
        model: with an output projection without a bias, whose logits are used as they are.

    Raises:
        KernelError: the logits are more than a product with the output projection: scaled, capped, or with a bias.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        _check_logits(model)

    def forward(self, *, shift_labels: Tensor, num_items_in_batch: Tensor | int, **batch: Any) -> Tensor:
        """`CausalLMLoss(model)(**shard_batch(...))`: a scalar, fp32 (fp64 for a model in fp64)."""
        batch.pop("labels", None)
        hidden = self.model.get_decoder()(**batch).last_hidden_state
        weight = self.model.get_output_embeddings().weight
        return linear_cross_entropy(hidden, weight, shift_labels) / num_items_in_batch


def _problems(model: PreTrainedModel, mesh: ParallelMesh) -> list[Problem]:
    """Why `model` cannot be cut along the sequence."""
    config = model.config.get_text_config()
    plan = mesh.plan
    problems = []
    if plan.tp > 1 or plan.pp > 1:
        problems.append(
            Problem(
                f"tp {plan.tp} and pp {plan.pp}: models of transformers are not cut into tensors or stages here",
                "use ring and ulysses, with FSDP2 or ZeRO for the weights; or train.py for tp and pp",
            )
        )
    if not (getattr(model, "_supports_attention_backend", False) and getattr(model, "_supports_flash_attn", False)):
        problems.append(
            Problem(f"{type(model).__name__} does not attend as flash-attention does, through transformers' interface")
        )
    if getattr(config, "is_encoder_decoder", False):
        problems.append(
            Problem("an encoder and a decoder attend to sequences of two lengths, which one cut does not serve")
        )
    beyond = sorted(set(getattr(config, "layer_types", None) or ()) - set(_LAYER_TYPES))
    beyond += [name for name, value in vars(config).items() if name.startswith(_STATEFUL) and value]
    beyond += ["attention_chunk_size"] * bool(getattr(config, "attention_chunk_size", None))
    if beyond:
        problems.append(
            Problem(
                f"layers look beyond a shard otherwise than by attention over one mask: {', '.join(beyond)}",
                f"kinds of layers that can be cut: {', '.join(_LAYER_TYPES)}; train this one on whole sequences",
            )
        )
    ropes = sorted({kind for kind in _rope_types(config) if kind in _ROPES_OF_LENGTH})
    if ropes and mesh.sp.size > 1:
        problems.append(
            Problem(
                f"RoPE of the kind {', '.join(ropes)} follows from the greatest position, of which each rank knows its own",
                "set rope_parameters to a kind that is the same for all lengths, such as yarn, linear or llama3",
            )
        )
    if getattr(config, "attention_dropout", 0.0):
        problems.append(Problem(f"attention_dropout {config.attention_dropout}", "set it to 0"))
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return problems + ulysses_problems(heads, kv_heads, ulysses=plan.ulysses, ring=plan.ring)


def _rope_types(config: Any) -> Iterator[str]:
    """Every kind of RoPE in `rope_parameters`, which may be one for all layers or one for each kind of them."""
    said = getattr(config, "rope_parameters", None) or {}
    for parameters in (said, *said.values()):
        if isinstance(parameters, dict) and "rope_type" in parameters:
            yield parameters["rope_type"]


def _positions_in_documents(mask: AttentionMask, seq_len: int) -> Tensor:
    """Each token's place in its document, as transformers counts positions: int64 [1 or b, s]."""
    positions = torch.arange(seq_len)
    for part in getattr(mask, "parts", (mask,)):
        if isinstance(part, Documents):
            first, _ = part.key_range(positions, seq_len)
            return torch.atleast_2d(positions - first)
    return positions[None]


def _count_targets(shifted: Tensor, mesh: ParallelMesh) -> int:
    """Targets of all dp ranks' sequences."""
    count = (shifted != NO_TARGET).sum().to(mesh.device)
    if mesh.dp.size > 1:
        dist.all_reduce(count, group=mesh.dp.group)
    return int(count)


def _check_batch(batch: Mapping[str, Any]) -> None:
    """ShapeError for what cannot be cut."""
    tokens = batch.get("input_ids")
    if not isinstance(tokens, Tensor) or tokens.ndim != 2:
        got = list(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ShapeError(f"input_ids is {got}: a batch has input_ids [b, S], the whole sequence on every rank of it")
    if unknown := [name for name in batch if name not in _KNOWN]:
        raise ShapeError(
            f"this batch has {', '.join(unknown)}, and what a shard's part of that is, is not known here\n"
            f"       leave it out, or cut it by shard_batch(...)['sequence_meta'].shard; known: {', '.join(_KNOWN)}"
        )
    length = tokens.shape[1]
    for name in ("labels", "position_ids", "attention_mask"):
        allowed = (tuple(tokens.shape), (1, length)) if name == "position_ids" else (tuple(tokens.shape),)
        if batch.get(name) is not None and tuple(batch[name].shape) not in allowed:
            raise ShapeError(f"{name} is {list(batch[name].shape)}, but input_ids is {list(tokens.shape)}")


def _check_logits(model: PreTrainedModel) -> None:
    """KernelError unless the model's logits are hidden states times the output projection, which is tried on two of them."""
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if weight is None or weight.ndim != 2:
        raise KernelError(f"{type(model).__name__} has no output projection whose weight is one matrix at this point")
    # Nothing is drawn: a model that is made leaves the random numbers of a run as they were.
    hidden = torch.arange(2 * weight.shape[1], device=weight.device).cos().view(1, 2, -1).to(weight.dtype)
    with torch.no_grad(), _decoder_that_returns(model, hidden):
        # Logits of 100, so that a cap shows.
        hidden *= 100 / nn.functional.linear(hidden, weight).abs().max()
        logits = model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=weight.device), use_cache=False).logits
        expected = nn.functional.linear(hidden, weight)
    if not torch.allclose(logits.to(expected.dtype), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
        raise KernelError(
            f"the logits of {type(model).__name__} are not its hidden states times its output projection: they are scaled, capped "
            "or have a bias\n       use model(**batch).loss"
        )


@contextmanager
def _decoder_that_returns(model: PreTrainedModel, hidden: Tensor) -> Iterator[None]:
    """`model` without its layers: they are taken to have given `hidden`."""
    decoder = model.get_decoder()
    decoder.forward = lambda *_, **__: BaseModelOutputWithPast(last_hidden_state=hidden)  # type: ignore[method-assign, arg-type]
    try:
        yield
    finally:
        del decoder.forward
