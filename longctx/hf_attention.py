"""`attn_implementation="longctx"`: what transformers calls where a model makes its masks and attends, on one device and over ranks.

Importing this module registers the name. A model attends over ranks once `longctx.huggingface.parallelize` left a `Span` at each of
its attentions; who sees whom then comes with each call, as `sequence_meta`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from longctx.errors import KernelError, ShapeError
from longctx.flash import interval_attention
from longctx.functional import attention, context_parallel_attention
from longctx.hf_masks import VisibleKeys, document_mask
from longctx.masks import AttentionMask, Causal, Full, Intersection, SlidingWindow
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.strategy import ContextStrategy
from longctx.sequence import SequenceMeta

NAME = "longctx"


@dataclass(frozen=True)
class Span:
    """What `parallelize` leaves at each attention: over whom it goes, and how. Shared by copies of the model."""

    mesh: ParallelMesh
    kernel: str
    strategy: str | ContextStrategy | None

    def __deepcopy__(self, memo: dict) -> Span:
        return self

    def attend(self, q: Tensor, k: Tensor, v: Tensor, meta: SequenceMeta, **scores: Any) -> Tensor:
        """Attention of a shard: as `longctx.functional.context_parallel_attention`."""
        if q.shape[1] != k.shape[1]:
            raise ShapeError(
                f"q has {q.shape[1]} positions but k has {k.shape[1]}: a cache cannot span ranks\n"
                "       generate on one process, with a model that was not parallelized"
            )
        return context_parallel_attention(
            q, k, v, meta=meta, mesh=self.mesh, kernel=self.kernel, strategy=self.strategy, **scores
        )


@_disable_dynamo
def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: VisibleKeys | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    sequence_meta: SequenceMeta | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' attention interface wants it.

    Args:
        query: "b h sq d", with RoPE applied; key: "b hk sk d"; value: "b hk sk dv", dv <= d.
        attention_mask: from `visible_keys`; None where the model made no mask.
        sliding_window: how many keys, its own included, a query sees on a side.
        s_aux: [h], attention sinks.
        sequence_meta: of `longctx.huggingface.shard_batch`; the one authority over who sees whom where the model spans ranks.
        position_ids: int64 [b or 1, s]; on one device and without padding or a cache, documents begin where they start anew.
        cu_seq_lens_q: on one device, the boundaries of the packed documents of a batch of one.
        others: everything else that the model was called with.

    Returns:
        "b sq h dv" and None: weights are never made.

    Raises:
        KernelError: something asked for is not supported.
        ShapeError: the model spans ranks and no `sequence_meta` came, or the reverse; shapes disagree.
    """
    _refuse(dropout, attention_mask, others)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    value_dim = v.shape[-1]
    if value_dim < q.shape[-1]:
        v = nn.functional.pad(v, (0, q.shape[-1] - value_dim))
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scores: dict[str, Any] = {"scale": scaling, "softcap": softcap or 0.0, "sinks": s_aux}
    span: Span | None = getattr(module, "span", None)
    if span is not None or sequence_meta is not None:
        meta = _checked_meta(module, span, sequence_meta, attention_mask, causal)
        if cu_seq_lens_q is not None:
            raise ShapeError(
                "cu_seq_lens_q came beside a sequence_meta, whose mask alone counts: give it to shard_batch, not to the model"
            )
        if sliding_window is not None:
            meta = replace(meta, mask=meta.mask & SlidingWindow(sliding_window))
        out = span.attend(q, k, v, meta, **scores)  # type: ignore[union-attr]
    elif cu_seq_lens_q is not None:
        if isinstance(attention_mask, VisibleKeys) and attention_mask.is_padded:
            raise ShapeError("cu_seq_lens_q came beside an attention_mask with zeros: leave out one of them")
        mask: AttentionMask = Causal() if causal else Full()
        mask &= SlidingWindow(sliding_window) if sliding_window is not None else Full()
        out = attention(q, k, v, mask=mask & document_mask(q.shape[:2], cu_seqlens=cu_seq_lens_q), **scores)
    else:
        visible = attention_mask or VisibleKeys.simple(q, k, is_causal=causal, sliding_window=sliding_window)
        assert isinstance(visible, VisibleKeys), "tensors are refused"
        out = interval_attention(q, k, v, visible.hops(q.shape[1], k.shape[1], position_ids), **scores)
    return out[..., :value_dim], None


def visible_keys(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> VisibleKeys:
    """What transformers makes masks by: the rule, of which a layer that needs it makes intervals once."""
    return VisibleKeys(
        batch_size, q_length, kv_length, int(q_offset), int(kv_offset), mask_function, attention_mask, device
    )


def _refuse(dropout: float, attention_mask: object, others: Mapping[str, Any]) -> None:
    """KernelError for what is asked that attention here does not do."""
    if dropout:
        raise KernelError(
            f"attention dropout is {dropout}, but there is none here: set the configuration's attention_dropout = 0.0"
        )
    if others.get("output_attentions"):
        raise KernelError(
            'output_attentions=True, but probabilities are never made here: use attn_implementation="eager" for them'
        )
    if isinstance(attention_mask, Tensor):
        raise KernelError(
            f"attention_mask is a tensor {list(attention_mask.shape)}, but a mask here is one interval of keys for each row\n"
            "       give [b, S] of 0 and 1 for padding, or position_ids that start anew for packed documents"
        )


def _checked_meta(
    module: nn.Module, span: Span | None, meta: SequenceMeta | None, attention_mask: object, causal: bool
) -> SequenceMeta:
    """The meta that came with the call, if the module can work by it."""
    name = type(module).__name__
    if span is None:
        raise ShapeError(f"{name} got a sequence_meta, but spans no ranks: call parallelize(model, mesh) first")
    if meta is None:
        raise ShapeError(
            f"{name} spans ranks, but got no sequence_meta, without which it would attend to its shard alone\n"
            "       call the model with **shard_batch(...); one that keeps such keywords from its layers cannot be used"
        )
    if isinstance(attention_mask, VisibleKeys) and attention_mask.is_padded:
        raise ShapeError(
            "attention_mask has zeros beside a sequence_meta, whose mask alone counts\n"
            "       give it to shard_batch, which makes it a part of that mask, and not to the model"
        )
    parts = meta.mask.parts if isinstance(meta.mask, Intersection) else (meta.mask,)
    if not causal and any(isinstance(part, Causal) for part in parts):
        raise ShapeError(
            f"{name} attends in both directions, but the mask that it is given is {meta.mask}\n"
            "       use shard_batch(..., mask=Full())"
        )
    return meta


ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, visible_keys)
