"""A decoder-only transformer of the Llama family, on sequence shards. Parameter names are Hugging Face's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from longctx.attention import ParallelAttention
from longctx.errors import ConfigError, format_problems
from longctx.initial import init_parameter
from longctx.kernels.fused import Fused, check_fused, rms_norm, silu_mul
from longctx.masks import SlidingWindow
from longctx.model_config import ModelConfig
from longctx.offload import ActivationOffload, KeptLayer
from longctx.parallel.loss import LMHead, check_token_ids
from longctx.parallel.strategy import KEPT_OPERATORS
from longctx.parallel.tensor import ALONE, MAY_KEEP_OPS, TensorParallel, VocabularyEmbedding
from longctx.rope import apply_rope, rope_cos_sin, rope_frequencies
from longctx.sequence import SequenceMeta
from longctx.shapes import check_shapes
from longctx.tiled_mlp import tiled_swiglu

if TYPE_CHECKING:
    from longctx.parallel.mesh import ParallelMesh


_Module = TypeVar("_Module", bound=nn.Module)

# (name of a part of the model, the part)
Settle = Callable[[str, nn.Module], None]


class _Made(Protocol):
    def __call__(self, name: str, part: _Module) -> _Module: ...


# What activation checkpointing keeps: attention's result, and under Ulysses what came for attention and back from it.
_KEPT = KEPT_OPERATORS


class Batch(Protocol):
    """What the model reads of a batch: one rank's shard."""

    @property
    def tokens(self) -> torch.Tensor:
        """int64 [b, s]."""

    @property
    def labels(self) -> torch.Tensor:
        """int64 [b, s]: the token that follows, -100 where there is none to predict."""

    @property
    def meta(self) -> SequenceMeta:
        """Where the tokens stand in the whole sequence, and who sees whom."""


class Transformer(nn.Module):
    """Embedding, decoder layers and output projection over one rank's shard of the sequence.

    Attention alone looks beyond the shard, through `mesh`; every other layer works token by token. No logits tensor of the
    whole shard exists. The parameters depend on `config` and `seed` only, not on ranks or on the order of construction; with
    tensor parallelism each process holds its part of the very same matrices (`longctx.parallel.slices.parameter_slices`).

    Args:
        mesh: the processes that share a sequence, and matrices; None: this process holds all of both.
        kernel: name of the attention kernel, or "auto".
        activation_checkpointing: keep, of each layer, its input and what attention gave; recompute the rest in backward.
            Attention and its communication run once.
        activation_offload: with activation checkpointing, what layers keep is in the host's memory but for two of them
            (`longctx.offload`).
        mlp_chunk_tokens: most tokens whose SwiGLU is computed at once (`longctx.tiled_mlp`); None: all.
        fused: liger-kernel's operations: "auto" where they can be had, "on", "off".
        seed: of the initial weights.
        settle: called with the name and the module of each part (embedding, each layer, last norm, output projection) in this
            order, as soon as it has its initial weights and before the next one is made: so that the whole model need never
            be in one memory.

    Raises:
        ConfigError: all problems of `config` in one message; `fused="on"` without liger-kernel; `activation_offload`
            without `activation_checkpointing`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        mesh: ParallelMesh | None = None,
        kernel: str = "auto",
        activation_checkpointing: bool = False,
        activation_offload: bool = False,
        mlp_chunk_tokens: int | None = None,
        fused: Fused = "auto",
        seed: int = 0,
        settle: Settle | None = None,
    ) -> None:
        super().__init__()
        if problems := config.problems():
            raise ConfigError(format_problems("the model", problems))
        check_fused(fused)
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.offload = make_offload(activation_checkpointing, activation_offload)

        def made(name: str, part: _Module) -> _Module:
            for of_part, parameter in part.named_parameters():
                init_parameter(f"{name}.{of_part}", parameter, config, seed)
            if settle is not None:
                settle(name, part)
            return part

        self.model = _Decoder(config, mesh, kernel, fused, mlp_chunk_tokens, made)
        head = LMHead(config.hidden_size, config.vocab_size, fused=fused, tensor=TensorParallel.of(mesh))
        if config.tie_embeddings:
            # One Parameter in two modules: each module's hooks find it, and the optimizer sees it once.
            head.weight = cast(nn.Parameter, self.model.embed_tokens.weight)
        self.lm_head = head if config.tie_embeddings else made("lm_head", head)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Sum of the token losses of this shard: fp32 scalar (fp64 for an fp64 model).

        Raises:
            ShapeError: tokens, labels and the batch's positions disagree.
            DataError: a token or label outside the vocabulary, on the CPU; see `check_token_ids`.
        """
        check_shapes(tokens=(batch.tokens, "b s"), labels=(batch.labels, "b s"), positions=(batch.meta.positions, "s"))
        return self.lm_head(self.hidden(batch.tokens, batch.meta), batch.labels)

    def hidden(self, tokens: torch.Tensor, meta: SequenceMeta) -> torch.Tensor:
        """What the output projection is applied to.

        Args:
            tokens: int64 "b s", this rank's shard.

        Returns:
            "b s e", after the last norm.
        """
        check_shapes(tokens=(tokens, "b s"), positions=(meta.positions, "s"))
        check_token_ids(tokens, self.config.vocab_size, what="token")
        return self.model(tokens, meta, self.activation_checkpointing and torch.is_grad_enabled(), self.offload)


def make_offload(activation_checkpointing: bool, activation_offload: bool) -> ActivationOffload | None:
    """Where the layers of a model keep what they keep; None: on the device.

    Raises:
        ConfigError: offload without checkpointing.
    """
    if activation_offload and not activation_checkpointing:
        raise ConfigError(
            "activation_offload moves what activation checkpointing keeps, which is off\n"
            "       set activation_checkpointing=True too"
        )
    return ActivationOffload() if activation_offload else None


class _Decoder(nn.Module):
    def __init__(
        self,
        config: ModelConfig,
        mesh: ParallelMesh | None,
        kernel: str,
        fused: Fused,
        mlp_chunk_tokens: int | None,
        made: _Made,
    ) -> None:
        super().__init__()
        self.config = config
        table = VocabularyEmbedding(config.vocab_size, config.hidden_size, TensorParallel.of(mesh))
        self.embed_tokens = made("model.embed_tokens", table)
        self.layers = nn.ModuleList(
            made(
                f"model.layers.{i}",
                DecoderLayer(config, None if mesh is None else mesh.for_layer(i), kernel, fused, mlp_chunk_tokens),
            )
            for i in range(config.num_layers)
        )
        norm = RMSNorm(config.hidden_size, config.norm_eps, fused=fused, tensor=TensorParallel.of(mesh).of_norms)
        self.norm = made("model.norm", norm)

    def forward(
        self, tokens: torch.Tensor, meta: SequenceMeta, recompute: bool, offload: ActivationOffload | None
    ) -> torch.Tensor:
        x = self.embed_tokens(tokens)
        return self.norm(run_layers(self.layers, x, meta, self.config, recompute=recompute, offload=offload))


def run_layers(
    layers: Iterable[nn.Module],
    x: torch.Tensor,
    meta: SequenceMeta,
    config: ModelConfig,
    *,
    recompute: bool,
    offload: ActivationOffload | None,
) -> torch.Tensor:
    """Decoder layers, one after the other.

    Args:
        x: "b s e"; with `ParallelPlan.shard_norms` this rank's part of the tokens.
        recompute: keep of each layer its input and what attention gave.
        offload: with `recompute`, where that is kept; None: on the device.
    """
    # Made anew each time: a buffer would be cast to bf16 along with the weights, and 10^6 positions need float64.
    inv_freq, factor = rope_frequencies(config.head_size, config.rope_theta, config.rope_scaling, device=x.device)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = rope_cos_sin(meta.positions, inv_freq, attention_factor=factor, dtype=dtype)
    if config.sliding_window is not None:
        meta = replace(meta, mask=meta.mask & SlidingWindow(config.sliding_window))
    kept: KeptLayer | None = None
    for layer in layers:
        if recompute and offload is not None:
            kept = offload.layer(kept, x.device)
        x = _recomputed(kept, layer, x, cos, sin, meta) if recompute else layer(x, cos, sin, meta)
    return x


class DecoderLayer(nn.Module):
    """Attention and SwiGLU, each behind a norm and added to what came in."""

    def __init__(
        self,
        config: ModelConfig,
        mesh: ParallelMesh | None,
        kernel: str,
        fused: Fused,
        mlp_chunk_tokens: int | None = None,
    ) -> None:
        super().__init__()
        size, eps, tensor = config.hidden_size, config.norm_eps, TensorParallel.of(mesh).of_norms
        self.input_layernorm = RMSNorm(size, eps, fused=fused, tensor=tensor)
        self.self_attn = _Attention(config, mesh, kernel, fused)
        self.post_attention_layernorm = RMSNorm(size, eps, fused=fused, tensor=tensor)
        self.mlp = _MLP(config, mesh, fused, mlp_chunk_tokens)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, meta: SequenceMeta) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, meta)
        return x + self.mlp(self.post_attention_layernorm(x))


class _Attention(nn.Module):
    def __init__(self, config: ModelConfig, mesh: ParallelMesh | None, kernel: str, fused: Fused) -> None:
        super().__init__()
        self.tensor = tensor = TensorParallel.of(mesh)
        e, d, h, hk = config.hidden_size, config.head_size, tensor.part(config.num_heads), tensor.part(config.kv_heads)
        self.head_dim = d
        self.fused = fused
        self.q_proj = _linear(e, h * d, tensor, cut=0, bias=config.qkv_bias)
        self.k_proj = _linear(e, hk * d, tensor, cut=0, bias=config.qkv_bias)
        self.v_proj = _linear(e, hk * d, tensor, cut=0, bias=config.qkv_bias)
        self.o_proj = _linear(h * d, e, tensor, cut=1)
        # Of all heads alike, so every rank has them whole, and their gradient is the sum over the ranks' heads.
        self.q_norm = RMSNorm(d, config.norm_eps, fused=fused, tensor=tensor) if config.qk_norm else None
        self.k_norm = RMSNorm(d, config.norm_eps, fused=fused, tensor=tensor) if config.qk_norm else None
        self.sinks = tensor.cut(nn.Parameter(torch.empty(h)), 0) if config.sinks else None
        self.attention = ParallelAttention(mesh, kernel=kernel, softcap=config.softcap)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, meta: SequenceMeta) -> torch.Tensor:
        x = self.tensor.enter(x)
        # Views of the projections: heads are never moved before the sequence, so nothing is copied.
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, k, cos, sin, fused=self.fused)
        out = self.o_proj(self.attention(q, k, v, meta, sinks=self.sinks).flatten(2))
        return self.tensor.leave(out, keep=True)


class _MLP(nn.Module):
    def __init__(self, config: ModelConfig, mesh: ParallelMesh | None, fused: Fused, chunk_tokens: int | None) -> None:
        super().__init__()
        self.tensor = tensor = TensorParallel.of(mesh)
        e, f = config.hidden_size, tensor.part(config.mlp_size)
        self.fused, self.chunk_tokens = fused, chunk_tokens
        self.gate_proj = _linear(e, f, tensor, cut=0, cls=_Projection)
        self.up_proj = _linear(e, f, tensor, cut=0, cls=_Projection)
        self.down_proj = _linear(f, e, tensor, cut=1, cls=_Projection)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.tensor.enter(x)
        if self.chunk_tokens is None:
            out = self.down_proj(silu_mul(self.gate_proj(x), self.up_proj(x), fused=self.fused))
        else:
            compute = partial(tiled_swiglu, chunk_tokens=self.chunk_tokens, fused=self.fused)
            out = _inside((self.gate_proj, self.up_proj, self.down_proj), x, compute)
        return self.tensor.leave(out)


class _Projection(nn.Linear):
    """A projection without a bias, or with `inside`, `inside(x, weight)`."""

    def forward(
        self, x: torch.Tensor, *, inside: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    ) -> torch.Tensor:
        return super().forward(x) if inside is None else inside(x, self.weight)


def _inside(
    projections: Sequence[nn.Module], x: torch.Tensor, compute: Callable[..., torch.Tensor], *weights: torch.Tensor
) -> torch.Tensor:
    """`compute(x, *weights of all projections)`, called in the forward of the last, this one in that of the one before, and so
    on: so that hooks on modules (ZeRO-3's) hold all weights while it runs, and again in backward, each gathered once.
    """
    if not projections:
        return compute(x, *weights)
    return projections[0](x, inside=lambda x, weight: _inside(projections[1:], x, compute, *weights, weight))


class RMSNorm(nn.Module):
    """`weight * x / sqrt(mean(x^2) + eps)` over the last axis. See `longctx.kernels.fused.rms_norm`.

    Args:
        tensor: the ranks that each apply the weight to a part of what it is for; by default each to all.
    """

    def __init__(self, size: int, eps: float, *, fused: Fused = "auto", tensor: TensorParallel = ALONE) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.fused = fused
        self.tensor = tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.tensor.of_all(self.weight), self.eps, fused=self.fused)


def _linear(
    size_in: int,
    size_out: int,
    tensor: TensorParallel,
    *,
    cut: int,
    bias: bool = False,
    cls: type[nn.Linear] = nn.Linear,
) -> nn.Linear:
    """A projection in this rank's size: a part of its outputs (cut 0) or of its inputs (cut 1, without a bias)."""
    linear = _uninitialised(cls, size_in, size_out, bias=bias)
    for parameter in linear.parameters():
        tensor.cut(parameter, cut)
    return linear


def _uninitialised(cls: type[_Module], *args: object, **kwargs: object) -> _Module:
    # torch's own initial values would be overwritten by ours. Left to itself, skip_init allocates on the CPU.
    return cast(_Module, nn.utils.skip_init(cls, *args, device=torch.get_default_device(), **kwargs))


def _recomputed(kept: KeptLayer | None, layer: nn.Module, x: torch.Tensor, *args: object) -> torch.Tensor:
    """`layer(x, *args)`, keeping x and what attention gave, in `kept` if given; the rest is computed again in backward."""
    context_fn = keep_attention if kept is None else partial(kept.contexts, _is_kept)
    # torch's default of stopping the recomputation early is relied upon: it ends inside `down_proj`, at the last tensor that
    # backward needs. That saves the product (with `mlp_chunk_tokens` all three of the SwiGLU), and under ZeRO-3 it is what
    # keeps the hook after `down_proj` from giving back the weight that backward has just gathered.
    with nullcontext() if kept is None else kept.input(x):
        return checkpoint(
            layer,
            x,
            *args,
            use_reentrant=False,
            context_fn=context_fn,
            preserve_rng_state=False,  # a layer draws no random numbers
        )


def keep_attention() -> tuple[AbstractContextManager, AbstractContextManager]:
    """`context_fn` of torch's checkpoint: all is computed again but attention and its messages."""
    return create_selective_checkpoint_contexts(_policy)


def _policy(ctx: object, op: Callable, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _is_kept(op, args) else CheckpointPolicy.PREFER_RECOMPUTE


def _is_kept(op: Callable, args: Sequence[object]) -> bool:
    # Recomputing attention would repeat its communication, on every rank and in the same order, or hang.
    return op in _KEPT or (op in MAY_KEEP_OPS and bool(args[-1]))
