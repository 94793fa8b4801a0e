"""`attn_implementation="longctx"`: what transformers calls where a model attends, on one device and over ranks.

Importing this module registers the name. A model attends over ranks once `longctx.huggingface.parallelize` left a `Span` at each of
its attentions; who sees whom then comes with each call, as `sequence_meta`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from longctx.errors import KernelError, ShapeError
from longctx.functional import attention, context_parallel_attention, flash_attn_func, flash_attn_varlen_func
from longctx.layout import SequenceMeta
from longctx.masks import AttentionMask, Causal, Documents, Full, SlidingWindow
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.strategy import ContextStrategy

NAME = "longctx"

# What transformers composes masks of, as the names of its functions, that one interval of keys for each row can say.
_MASK_FUNCTIONS = (
    "causal_mask_function",
    "bidirectional_mask_function",
    "sliding_window_overlay",
    "sliding_window_bidirectional_overlay",
    "packed_sequence_mask_function",
    "padding_mask_function",
    "add_offsets_to_mask_function",
    "and_masks",
)


@dataclass(frozen=True)
class Span:
    """What `parallelize` leaves at each attention: over whom it goes, and how. Shared by copies of the model."""

    mesh: ParallelMesh
    kernel: str
    strategy: str | ContextStrategy | None

    def __deepcopy__(self, memo: dict) -> Span:
        return self


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
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
        query: "b h s d"; key: "b hk sk d"; value: "b hk sk dv", dv <= d.
        attention_mask: None, or bool "b sk" that is False at padding, as `padding_mask` gives it.
        sliding_window: how many keys, its own included, a query sees on a side.
        s_aux: [h], attention sinks.
        sequence_meta: of `shard_batch`; the one authority over who sees whom where the model was parallelized.
        position_ids, cu_seq_lens_q: on one device, where packed documents start: positions that start anew, or boundaries.

    Returns:
        "b s h dv" and None: weights are never made.

    Raises:
        KernelError: something asked for is not supported.
        ShapeError: the model spans ranks and no `sequence_meta` came, or the reverse; shapes disagree.
    """
    if dropout:
        raise KernelError(
            f"attention dropout of {dropout} is not supported: set the configuration's attention_dropout = 0"
        )
    if others.get("output_attentions"):
        raise KernelError(
            "attention weights are never made: leave out output_attentions, or use attn_implementation='eager'"
        )
    if attention_mask is not None and attention_mask.ndim != 2:
        raise KernelError(f"attention_mask {list(attention_mask.shape)}: only masks of padding, [b, s], are supported")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    value_dim = v.shape[-1]
    if value_dim < q.shape[-1]:
        v = nn.functional.pad(v, (0, q.shape[-1] - value_dim))
    scores: dict[str, Any] = {"scale": scaling, "softcap": softcap or 0.0, "sinks": s_aux}
    span: Span | None = getattr(module, "span", None)
    if span is not None or sequence_meta is not None:
        out = _over_ranks(module, span, sequence_meta, q, k, v, attention_mask, sliding_window, **scores)
        return out[..., :value_dim], None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if q.shape[1] != k.shape[1]:
        out = _beside_cache(q, k, v, attention_mask, causal, sliding_window, **scores)
    else:
        mask: AttentionMask = Causal() if causal else Full()
        mask &= SlidingWindow(sliding_window) if sliding_window is not None else Full()
        mask &= _documents(q.shape[1], attention_mask, position_ids, cu_seq_lens_q)
        out = attention(q, k, v, mask=mask, **scores)
    return out[..., :value_dim], None


def padding_mask(
    *,
    mask_function: Callable,
    attention_mask: Tensor | None = None,
    kv_length: int,
    use_vmap: bool = False,
    **others: Any,
) -> Tensor | None:
    """What transformers gives `attention_forward` as its mask: bool "b sk" if there is padding, else None.

    Raises:
        KernelError: the model's mask is more than causality, windows, documents and padding.
    """
    foreign = [name for name in _names_of(mask_function) if name not in _MASK_FUNCTIONS]
    if foreign or use_vmap:
        raise KernelError(
            f"this model's mask is made with {', '.join(foreign) or 'a function of its own'}, which keys in one interval cannot say\n"
            "       use attn_implementation='sdpa' or 'flex_attention' for it"
        )
    if attention_mask is None:
        return None
    attention_mask = attention_mask[:, -kv_length:]
    return None if attention_mask.shape[1] == kv_length and bool(attention_mask.all()) else attention_mask


def _over_ranks(
    module: nn.Module,
    span: Span | None,
    meta: SequenceMeta | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    padding: Tensor | None,
    window: int | None,
    **scores: Any,
) -> Tensor:
    """Attention of a shard, by what came with the call."""
    name = type(module).__name__
    if span is None:
        raise ShapeError(f"{name} got a sequence_meta, but spans no ranks: call parallelize(model, mesh) first")
    if meta is None:
        raise ShapeError(
            f"{name} spans ranks, but got no sequence_meta, without which it would attend to its shard alone\n"
            "       call the model with **shard_batch(mesh, ...); one that keeps such keywords from its layers cannot be used"
        )
    if padding is not None:
        raise ShapeError(
            "an attention_mask with padding came with a sequence_meta: leave it out, and say with shard_batch(mask=Documents(...)) "
            "which tokens belong together, with -100 as the labels of padding"
        )
    if window is not None:
        meta = replace(meta, mask=meta.mask & SlidingWindow(window))
    return context_parallel_attention(
        q, k, v, meta=meta, mesh=span.mesh, kernel=span.kernel, strategy=span.strategy, **scores
    )


def _beside_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    padding: Tensor | None,
    causal: bool,
    window: int | None,
    *,
    scale: float | None,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of the last tokens, or of another sequence's, to keys of another number: generation with a cache."""
    if sinks is not None:
        raise KernelError("attention sinks with a cache are not supported: generate with attn_implementation='eager'")
    limits = (-1, -1) if window is None else (window - 1, window - 1)
    settings: dict[str, Any] = {"softmax_scale": scale, "causal": causal, "window_size": limits, "softcap": softcap}
    if padding is None:
        return cast(Tensor, flash_attn_func(q, k, v, **settings))
    b, sq = q.shape[:2]
    if padding.shape[1] != k.shape[1]:
        raise KernelError(
            f"the mask of {padding.shape[1]} tokens does not cover the cache of {k.shape[1]}: a static cache is not supported"
        )
    lengths = padding.sum(1)
    cu_q = torch.arange(0, (b + 1) * sq, sq, dtype=torch.int32, device=q.device)
    cu_k = nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    packed = q.flatten(0, 1), k[padding], v[padding]
    out = flash_attn_varlen_func(*packed, cu_q, cu_k, sq, int(lengths.max()), **settings)
    return cast(Tensor, out).unflatten(0, (b, sq))


# position_ids or masks of the calls in progress -> (their version, the documents found in them): asked for by every layer.
_FOUND: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _documents(
    seq_len: int, padding: Tensor | None, position_ids: Tensor | None, cu_seqlens: Tensor | None
) -> AttentionMask:
    """Which tokens belong together: real ones apart from padding, or packed documents."""
    source = padding if padding is not None else cu_seqlens if cu_seqlens is not None else position_ids
    if source is None or (source is position_ids and source.ndim != 2):
        return Full()
    version = None if source.is_inference() else source._version
    if version is None or source not in _FOUND or _FOUND[source][0] != version:
        if source is cu_seqlens:
            rows = [cu_seqlens.tolist()]
        else:
            # A document starts where a row of the mask changes, or where positions do not go on.
            starts = source.int().diff(dim=-1) != (0 if source is padding else 1)
            rows = [[0, *(row.nonzero().flatten() + 1).tolist(), seq_len] for row in starts.cpu()]
        boundaries = tuple(tuple(row) for row in rows)
        whole = all(len(row) == 2 for row in rows)
        mask = Full() if whole else Documents(boundaries if len(rows) > 1 else boundaries[0])
        _FOUND[source] = (version, mask)
    return _FOUND[source][1]


def _names_of(function: Callable) -> Iterator[str]:
    """The names of transformers' functions that a mask function is composed of, such as `sliding_window_overlay`."""
    yield function.__qualname__.split(".")[0]
    for cell in function.__closure__ or ():
        held = cell.cell_contents
        for inner in held if isinstance(held, tuple) else (held,):
            if callable(inner) and hasattr(inner, "__qualname__"):
                yield from _names_of(inner)


ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, padding_mask)
