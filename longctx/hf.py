"""Hugging Face's models on this attention, on one device or with every sequence cut over the ranks of a mesh.

Importing this module makes `attn_implementation="longctx"` known to transformers. On one device that is all: causal and
bidirectional attention, sliding windows, chunks, packed documents, padding on either side and caches come from the mask
that transformers describes, as the interval of keys that each row sees (`longctx.hf_masks`).

Over several ranks each of them calls the model with its shard, which `shard_batch` cuts out of a batch as transformers'
collators make it. Where the shard stands goes along as the keyword `shared_sequence`, which models hand down to attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.utils.data import DataLoader, DistributedSampler

from longctx.attention import ParallelAttention
from longctx.errors import ConfigError, KernelError, Problem, ShapeError, format_problems
from longctx.flash import flash_attn_varlen_func, interval_attention
from longctx.hf_masks import VisibleKeys, document_mask
from longctx.layout import SequenceLayout, SequenceMeta
from longctx.masks import AttentionMask, Causal, Full, Intersection, SlidingWindow
from longctx.model import keep_attention
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.strategy import ContextStrategy

IMPLEMENTATION = "longctx"

# What a collator may put into a batch beside what is cut here; it says which documents are packed.
_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
_KNOWN = ("input_ids", "labels", "position_ids", "attention_mask", *_BOUNDARIES)

# Kinds of layers, in `config.layer_types`, that look beyond a shard by attention alone, and as their arguments say.
_LAYERS = ("full_attention", "sliding_attention")
# How the settings begin of layers that carry a state along the sequence.
_STATEFUL = ("mamba_", "ssm_", "linear_", "conv_", "rwkv", "lru_")


@dataclass(frozen=True, eq=False)
class SharedSequence:
    """What attention must know of a shard: the keyword `shared_sequence` of a model's call.

    Args:
        meta: where the shard stands in the sequence, and who sees whom.
        mesh: whose processes share the sequence; None: this one holds it whole.
        kernel, strategy: as in `ParallelAttention`.
    """

    meta: SequenceMeta
    mesh: ParallelMesh | None = None
    kernel: str = "auto"
    strategy: str | ContextStrategy | None = None

    def to(self, device: torch.device | str) -> SharedSequence:
        """The same on `device`."""
        return replace(self, meta=self.meta.to(device))


def shard_batch(
    batch: Mapping[str, Any],
    mesh: ParallelMesh | None,
    *,
    mask: AttentionMask | None = None,
    layout: SequenceLayout | str | None = None,
    kernel: str = "auto",
    strategy: str | ContextStrategy | None = None,
) -> dict[str, Any]:
    """This rank's part of a batch, to be called with: `model(**shard_batch(batch, mesh))`.

    Every rank of `mesh.sp` gives the same batch. Labels are shifted before they are cut, so the token behind a shard's edge
    is predicted too. Packed documents are those of `position_ids` that start anew, or of `cu_seq_lens_q`; padding,
    where `attention_mask` is 0, is a document of its own. A length that cannot be cut evenly is padded inside.
    Reads the documents on the host: on the CPU, where collators work, that costs no waiting.

    The loss that the model returns is of the shard. Give it `num_items_in_batch`, the targets (`shift_labels` that are not
    -100) of all ranks and micro-batches of a step, and the ranks' losses and gradients add up to those of one process;
    transformers' Trainer does so by itself.

    Args:
        batch: `input_ids` int64 [b, S]; and if there are any `labels` [b, S], not shifted, `position_ids` [b or 1, S],
            `attention_mask` [b, S] of 0 and 1, `cu_seq_lens_q` int32 [documents + 1] for b = 1.
        mesh: None: one process that holds the sequences whole.
        mask: who sees whom beside that; None: causal.
        layout: of the ring; None: what the plan of `mesh` says.
        kernel, strategy: as in `ParallelAttention`.

    Returns:
        `input_ids`, `position_ids` [b, s], `shared_sequence`; and with labels `shift_labels` and `labels`, both shifted.

    Raises:
        ShapeError: a key that is not known here, shapes that disagree, or padding in the middle of a row.
    """
    tokens = batch.get("input_ids")
    if not isinstance(tokens, Tensor) or tokens.ndim != 2:
        got = list(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ShapeError(f"input_ids is {got}: a batch has input_ids [b, S], the whole sequence on every rank of it")
    if unknown := [name for name in batch if name not in _KNOWN]:
        raise ShapeError(
            f"this batch has {', '.join(unknown)}, and what a shard's part of that is, is not known here\n"
            f"       leave it out, or cut it by batch['shared_sequence'].meta.shard; known: {', '.join(_KNOWN)}"
        )
    length = tokens.shape[1]
    for name in ("labels", "position_ids", "attention_mask"):
        if batch.get(name) is not None and batch[name].shape[-2:] not in (tokens.shape, (1, length)):
            raise ShapeError(f"{name} is {list(batch[name].shape)}, but input_ids is {list(tokens.shape)}")
    documents = document_mask(
        tokens.shape,
        position_ids=batch.get("position_ids"),
        attention_mask=batch.get("attention_mask"),
        cu_seqlens=batch.get("cu_seq_lens_q"),
    )
    seen = (Causal() if mask is None else mask) & documents
    where: dict[str, Any] = {"layout": layout}
    if mesh is not None:
        where = dict(
            layout=mesh.plan.sequence_layout if layout is None else layout,
            ring_rank=mesh.ring.rank,
            ring_world=mesh.ring.size,
            ulysses_rank=mesh.ulysses.rank,
            ulysses_world=mesh.ulysses.size,
        )
    meta = SequenceMeta.of(length, mask=seen, **where).to(tokens.device)
    positions = batch.get("position_ids")
    if positions is None:
        positions = torch.arange(length, device=tokens.device)[None]
    found: dict[str, Any] = {
        "input_ids": meta.shard(tokens, fill=0),
        "position_ids": meta.shard(positions, fill=0),
        "shared_sequence": SharedSequence(meta, mesh, kernel, strategy),
    }
    if (labels := batch.get("labels")) is not None:
        shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        # Models make a loss where there are labels, and take it of these where they are given shifted.
        found["labels"] = found["shift_labels"] = meta.shard(shifted, fill=-100)
    return found


def sharded_trainer(trainer: type, mesh: ParallelMesh, **options: Any) -> type:
    """A subclass of transformers' Trainer, or of one built on it, whose every batch is cut over `mesh`.

    The ranks of `mesh.sp` read the same samples, those of `mesh.dp` different ones, so `per_device_train_batch_size` counts
    whole sequences of a data-parallel rank. The Trainer's own arithmetic, which divides by the targets of all ranks, then
    gives the loss and gradients of one process, under DDP and FSDP alike. Evaluation gives the loss; logits are of shards.

    Args:
        trainer: the class.
        mesh: made after `TrainingArguments`, which start the process group.
        options: `mask`, `layout`, `kernel` and `strategy` of `shard_batch`.

    Raises:
        ConfigError: when it is made, if its arguments or model would scale the loss otherwise.
    """

    class ShardedTrainer(trainer):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            problems = []
            if not self.args.average_tokens_across_devices:
                problems.append(
                    Problem(
                        "average_tokens_across_devices = False: a shard's loss would be divided by its own targets",
                        "leave it True, its default",
                    )
                )
            if not self.model_accepts_loss_kwargs:
                problems.append(
                    Problem(
                        f"{type(self.model).__name__} takes no num_items_in_batch, so its loss is the mean of a shard",
                        "use a causal language model of transformers, or give it **kwargs that reach its loss",
                    )
                )
            if self.compute_metrics is not None:
                problems.append(
                    Problem(
                        "compute_metrics is given, but logits are of shards", "leave it out; evaluation gives the loss"
                    )
                )
            if problems:
                raise ConfigError(format_problems("this sharded Trainer", problems))
            self.args.prediction_loss_only = True

        def get_train_dataloader(self) -> DataLoader:
            return self._sharded_loader(self.train_dataset, self.args.train_batch_size, is_training=True)

        def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
            if isinstance(eval_dataset, str):
                eval_dataset = self.eval_dataset[eval_dataset]
            chosen = self.eval_dataset if eval_dataset is None else eval_dataset
            return self._sharded_loader(chosen, self.args.eval_batch_size, is_training=False)

        def _sharded_loader(self, dataset: Any, batch_size: int, *, is_training: bool) -> DataLoader:
            if not hasattr(dataset, "__len__"):
                raise ConfigError(
                    f"the dataset is a {type(dataset).__name__} without a length, so ranks cannot agree who reads what\n"
                    "       give a dataset with __len__ and __getitem__"
                )
            # The Trainer tells this sampler the epoch.
            sampler: DistributedSampler[Any] = DistributedSampler(
                dataset,
                num_replicas=mesh.dp.size,
                rank=mesh.dp.rank,
                shuffle=is_training,
                seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
                drop_last=is_training,
            )
            return DataLoader(
                dataset,
                batch_size,
                sampler=sampler,
                drop_last=is_training,
                # Sharded here and not in a worker: a batch carries the mesh, which stays in its process.
                collate_fn=lambda rows: shard_batch(self.data_collator(rows), mesh, **options),
            )

    ShardedTrainer.__name__ = f"Sharded{trainer.__name__}"
    return ShardedTrainer


def gradient_checkpointing_kwargs() -> dict[str, Any]:
    """For `model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=...)`: layers are computed again in backward,
    attention and its messages are not. Costs s * h * (2 * d + 4) bytes a layer and sequence in bf16.
    """
    return {"use_reentrant": False, "context_fn": keep_attention}


@_disable_dynamo
def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: VisibleKeys | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    shared_sequence: SharedSequence | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer.

    Args:
        query: "b h s d"; key, value: "b hk sk d", with RoPE applied.
        attention_mask: from `visible_keys`; None where the model asked for no mask.
        sliding_window, softcap, s_aux: as models give them; s_aux are sinks, [h].
        kwargs: everything else that the model was called with.

    Returns:
        "b s h d", and no weights.

    Raises:
        KernelError: something is asked that attention here does not do.
        ShapeError: the shapes, or shard and mask, do not agree.
    """
    _refuse(dropout, attention_mask, kwargs)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    softcap = softcap or 0.0
    if shared_sequence is not None:
        mesh, meta = shared_sequence.mesh, shared_sequence.meta
        _check_shared(module, q, k, attention_mask, meta, is_causal)
        if sliding_window is not None:
            meta = replace(meta, mask=meta.mask & SlidingWindow(sliding_window))
        attend = ParallelAttention(
            mesh,
            kernel=shared_sequence.kernel,
            scale=scaling,
            softcap=softcap,
            strategy=shared_sequence.strategy,
            layer=getattr(module, "layer_idx", None),
        )
        return attend(q, k, v, meta, sinks=s_aux), None
    if (cu_seqlens := kwargs.get("cu_seq_lens_q")) is not None:
        if s_aux is not None:
            raise KernelError(
                "cu_seq_lens_q beside sinks: give position_ids that start anew with each document instead"
            )
        window = (-1, -1) if sliding_window is None else (sliding_window - 1, sliding_window - 1)
        out = flash_attn_varlen_func(
            q.flatten(0, 1),
            k.flatten(0, 1),
            v.flatten(0, 1),
            cu_seqlens,
            kwargs.get("cu_seq_lens_k", cu_seqlens),
            int(kwargs.get("max_length_q") or q.shape[0] * q.shape[1]),
            int(kwargs.get("max_length_k") or k.shape[0] * k.shape[1]),
            softmax_scale=scaling,
            causal=is_causal,
            window_size=window,
            softcap=softcap,
        )
        assert isinstance(out, Tensor), "without return_attn_probs"
        return out.unflatten(0, q.shape[:2]), None
    if attention_mask is None:
        attention_mask = VisibleKeys.simple(q, k, is_causal=is_causal, sliding_window=sliding_window)
    assert isinstance(attention_mask, VisibleKeys), "other masks are refused"
    hops = attention_mask.hops(q.shape[1], k.shape[1], kwargs.get("position_ids"))
    return interval_attention(q, k, v, hops, scale=scaling, softcap=softcap, sinks=s_aux), None


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
    """What transformers makes masks by: remembers the rule, of which a layer that needs it makes intervals once."""
    return VisibleKeys(
        batch_size, q_length, kv_length, int(q_offset), int(kv_offset), mask_function, attention_mask, device
    )


def _refuse(dropout: float, attention_mask: object, kwargs: Mapping[str, Any]) -> None:
    if dropout:
        raise KernelError(
            f"dropout of attention is {dropout}, but there is none here: set config.attention_dropout = 0.0"
        )
    if kwargs.get("output_attentions"):
        raise KernelError(
            'output_attentions=True, but probabilities are never made here: use attn_implementation="eager" for them'
        )
    if isinstance(attention_mask, Tensor):
        raise KernelError(
            f"attention_mask is a tensor {list(attention_mask.shape)}, but a mask here is one interval of keys for each row\n"
            "       give [b, S] of 0 and 1 for padding, or position_ids that start anew for packed documents"
        )


def _check_shared(
    module: torch.nn.Module,
    q: Tensor,
    k: Tensor,
    attention_mask: VisibleKeys | Tensor | None,
    meta: SequenceMeta,
    is_causal: bool,
) -> None:
    if q.shape[1] != k.shape[1]:
        raise ShapeError(
            f"q has {q.shape[1]} positions but k has {k.shape[1]}: a cache cannot be used with shared_sequence\n"
            "       generate on one process, without shared_sequence"
        )
    if isinstance(attention_mask, VisibleKeys) and attention_mask.is_padded:
        raise ShapeError(
            "attention_mask has zeros beside shared_sequence, whose mask alone counts\n"
            "       give it to shard_batch, which makes it a part of that mask, and not to the model"
        )
    parts = meta.mask.parts if isinstance(meta.mask, Intersection) else (meta.mask,)
    if not is_causal and any(isinstance(part, Causal) for part in parts):
        raise ShapeError(
            f"{type(module).__name__} attends in both directions, but the mask of shared_sequence is {meta.mask}\n"
            f"       use shard_batch(..., mask={Full()})"
        )
    if meta.ring_world * meta.ulysses_world == 1:
        return
    settings = vars(getattr(module, "config", object())) if hasattr(module, "config") else {}
    others = sorted({kind for kind in settings.get("layer_types") or () if kind not in _LAYERS})
    others += [name for name, value in settings.items() if name.startswith(_STATEFUL) and value]
    if settings.get("attention_chunk_size"):
        others.append("attention_chunk_size")
    if others:
        raise KernelError(
            f"this model has layers that look beyond a shard other than by attention over its mask: {', '.join(others)}\n"
            "       they would see one shard only; train it on whole sequences, with ring 1 and ulysses 1"
        )


def _register() -> None:
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError("longctx.hf needs transformers 5: pip install 'longctx[hf]'") from error

    AttentionInterface.register(IMPLEMENTATION, attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, visible_keys)


_register()
