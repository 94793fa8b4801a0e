"""Models of Hugging Face's transformers over the ranks of a mesh: their attention spans them, the rest works on its shard.

On one device `attn_implementation="longctx"`, which importing this module registers, is all. Over ranks, `parallelize` tells the model
which mesh its attention spans, and `shard_batch` cuts whole sequences into the keyword arguments of a call. Who sees whom
travels with the batch, as the keyword `sequence_meta` that models hand on to their attention: no state is kept anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from longctx.errors import KernelError, PlanError, Problem, format_problems
from longctx.functional import linear_cross_entropy
from longctx.hf_attention import NAME, Span
from longctx.layout import SequenceLayout, SequenceMeta
from longctx.masks import AttentionMask, Documents
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.plan import ulysses_problems
from longctx.parallel.strategy import ContextStrategy, get_strategy
from longctx.shapes import check_shapes

IGNORE = -100

# The kinds of layers, in the configurations' `layer_types`, whose tokens see each other through attention only, by intervals.
_LAYER_TYPES = ("full_attention", "sliding_attention")
# Kinds of RoPE whose frequencies follow from the greatest position, of which each rank knows its own.
_ROPES_OF_LENGTH = ("dynamic", "longrope")


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
    mesh: ParallelMesh,
    input_ids: Tensor,
    labels: Tensor | None = None,
    *,
    mask: AttentionMask | None = None,
    layout: SequenceLayout | str | None = None,
    pad_token_id: int = 0,
) -> dict[str, Any]:
    """This rank's part of whole sequences, as the keyword arguments of a model: `model(**shard_batch(...))`.

    The loss of such a call, averaged over all ranks, is the mean over all targets of all ranks, and so is its gradient under
    whatever averages gradients over the ranks, as DDP, FSDP2 and DeepSpeed do.

    Args:
        mesh: the one that the model was parallelized with. Ranks of one dp coordinate give the same sequences. Collective.
        input_ids: int64 "b s", whole sequences, of any length.
        labels: int64 "b s", not shifted, -100 where there is no target. None: no loss.
        mask: who sees whom, such as `Causal() & Documents(cu_seqlens)`. None: causal. Windows come from the model's layers.
            Positions start anew in each document.
        layout: how a sequence is cut, as in `SequenceMeta.of`. None: zigzag.
        pad_token_id: stands where a sequence was padded to be cut evenly; seen by nobody.

    Returns:
        `input_ids`, `position_ids`: int64 "b s/n", on the mesh's device; `sequence_meta`; `use_cache` False; and with labels `labels` and
        `shift_labels`, the targets of the local tokens, and `num_items_in_batch`.

    Raises:
        ShapeError: shapes disagree.
        DistributedError: the ranks have no target at all.
    """
    check_shapes(input_ids=(input_ids, "b s"), **({} if labels is None else {"labels": (labels, "b s")}))
    seq_len = input_ids.shape[1]
    meta = SequenceMeta.of(
        seq_len,
        mask=mask,
        layout=layout,
        ring_rank=mesh.ring.rank,
        ring_world=mesh.ring.size,
        ulysses_rank=mesh.ulysses.rank,
        ulysses_world=mesh.ulysses.size,
        device=mesh.device,
    )
    positions = _positions_in_documents(meta.mask, seq_len).expand(input_ids.shape[0], -1)
    batch: dict[str, Any] = {
        "input_ids": meta.shard(input_ids.to(mesh.device), fill=pad_token_id),
        "position_ids": meta.shard(positions.to(mesh.device), fill=0),
        "sequence_meta": meta,
        "use_cache": False,
    }
    if labels is not None:
        # Shifted before the cut: the target of a shard's last token is another rank's.
        shifted = torch.cat([labels[:, 1:], labels.new_full((labels.shape[0], 1), IGNORE)], 1).to(mesh.device)
        targets = meta.shard(shifted, fill=IGNORE)
        batch |= {"labels": targets, "shift_labels": targets, "num_items_in_batch": _targets_per_rank(mesh, targets)}
    return batch


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
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - set(_LAYER_TYPES))
    if kinds:
        problems.append(
            Problem(
                f"layers of the kinds {', '.join(kinds)} carry something else than keys and values along the sequence",
                f"kinds that can be cut: {', '.join(_LAYER_TYPES)}",
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


def _targets_per_rank(mesh: ParallelMesh, targets: Tensor) -> Tensor:
    """The targets of all ranks that gradients are averaged over, divided by their number."""
    count = (targets != IGNORE).sum()
    if mesh.grad.size > 1:
        dist.all_reduce(count, group=mesh.grad.group)
    return count / mesh.grad.size


def _check_logits(model: PreTrainedModel) -> None:
    """KernelError unless the model's logits are hidden states times the output projection, which is tried on two of them."""
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if weight is None or weight.ndim != 2:
        raise KernelError(f"{type(model).__name__} has no output projection whose weight is one matrix at this point")
    hidden = torch.randn(1, 2, weight.shape[1], dtype=weight.dtype, device=weight.device)
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
