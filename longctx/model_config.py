"""The shape of a transformer of the Llama family: its settings, what is wrong with them, and the numbers that follow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from longctx.errors import Problem
from longctx.masks import AttentionMask, Causal, SlidingWindow
from longctx.parallel.stages import cut_by_flops, params_of_stages
from longctx.rope import RopeScaling
from longctx.shapes import ModelShape


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a transformer. Llama, Mistral (`sliding_window`), Qwen2 (`qkv_bias`) and Qwen3 (`qk_norm`) are cases of it.

    Args:
        vocab_size: the default holds bytes and the end of a document, rounded up to a multiple of 8.
        num_kv_heads: None: `num_heads`.
        head_dim: even; None: `hidden_size / num_heads`.
        intermediate_size: of the SwiGLU; None: 8/3 of `hidden_size`, rounded up to a multiple of 64.
        rope_theta: the base of RoPE's frequencies.
        tie_embeddings: the output projection is the embedding's weight.
        qkv_bias: biases on the query, key and value projections.
        qk_norm: an RMSNorm over each head of q and k, before RoPE.
        sliding_window: keys that a query sees, its own included, of those that the batch's mask shows; None: all.
        softcap: bends attention's scores s to softcap * tanh(s / softcap), as in Gemma 2; 0 leaves them.
        sinks: in each layer a learned logit a head that joins every row's softmax and has no value, as in gpt-oss.
        init_std: of the normal distribution that weights start from; projections into the residual start from
            `init_std / sqrt(2 * num_layers)`.

    Source: Llama 3 (arXiv 2407.21783); GPT-2 for the start of the residual projections.
    """

    vocab_size: int = 264
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    rope_theta: float = 1e4
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    softcap: float = 0.0
    sinks: bool = False
    init_std: float = 0.02

    @property
    def kv_heads(self) -> int:
        """`num_kv_heads` with its default filled in."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        """`head_dim` with its default filled in."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def mlp_size(self) -> int:
        """`intermediate_size` with its default filled in."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        return math.ceil(self.hidden_size * 8 / 3 / 64) * 64

    @property
    def causal_mask(self) -> AttentionMask:
        """Who sees whom in a sequence that is one document."""
        return Causal() if self.sliding_window is None else Causal() & SlidingWindow(self.sliding_window)

    def problems(self) -> list[Problem]:
        """What is wrong with these numbers; empty if nothing."""
        found = []
        optional = ("num_kv_heads", "head_dim", "intermediate_size", "sliding_window")
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", *optional):
            value = getattr(self, name)
            if value is not None and value < 1:
                found.append(Problem(f"model.{name} = {value} must be at least 1"))
        for name, least in (("rope_theta", 1.0), ("norm_eps", 0.0), ("init_std", 0.0)):
            if not getattr(self, name) > least:
                found.append(Problem(f"model.{name} = {getattr(self, name)} must be greater than {least:g}"))
        if not (math.isfinite(self.softcap) and self.softcap >= 0):
            found.append(Problem(f"model.softcap = {self.softcap} must be above 0, or 0 for none"))
        if not found:
            found += self._head_problems()
        return found + (self.rope_scaling.problems() if self.rope_scaling is not None else [])

    def _head_problems(self) -> list[Problem]:
        found = []
        if self.head_dim is None and self.hidden_size % self.num_heads:
            per_head = self.hidden_size / self.num_heads
            found.append(
                Problem(
                    f"model.hidden_size {self.hidden_size} / num_heads {self.num_heads} = {per_head:.2f} is not whole",
                    f"set model.head_dim, or num_heads to a divisor of {self.hidden_size}",
                )
            )
        elif self.head_size % 2:
            found.append(
                Problem(
                    f"head_dim = {self.head_size} is odd; RoPE turns pairs", f"try model.head_dim {self.head_size + 1}"
                )
            )
        if self.num_heads % self.kv_heads:
            divisors = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            found.append(
                Problem(
                    f"model.num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}",
                    f"num_kv_heads that work: {', '.join(map(str, divisors))}",
                )
            )
        return found

    @property
    def shape(self) -> ModelShape:
        """The numbers that planning and FLOP counts need. A tied output projection is counted once."""
        e, d, h, hk, f = self.hidden_size, self.head_size, self.num_heads, self.kv_heads, self.mlp_size
        attention = 2 * e * h * d + 2 * e * hk * d
        attention += (h + 2 * hk) * d if self.qkv_bias else 0
        attention += 2 * d if self.qk_norm else 0
        attention += h if self.sinks else 0
        per_layer = attention + 3 * e * f + 2 * e
        embeddings = self.vocab_size * e * (1 if self.tie_embeddings else 2)
        return ModelShape(
            num_layers=self.num_layers,
            hidden_size=e,
            num_heads=h,
            num_kv_heads=hk,
            head_dim=d,
            vocab_size=self.vocab_size,
            num_params=self.num_layers * per_layer + embeddings + e,
        )

    def stages(self, num_stages: int, seq_len: int) -> tuple[range, ...]:
        """The decoder layers of each stage of a pipeline, their FLOPs of a step as even as can be.

        Args:
            seq_len: tokens of a sequence; attention is counted as of one causal document. 0: without attention.
        """
        return cut_by_flops(self.shape, num_stages, seq_len, tied=self.tie_embeddings, window=self.sliding_window)

    def stage_params(self, stages: Sequence[range]) -> list[int]:
        """Parameters of each stage; a tied embedding is held by the first and, if that is another, the last."""
        return params_of_stages(self.shape, stages, tied=self.tie_embeddings)
