"""Tensor parallelism: each rank of the axis holds a part of every matrix, and all of them hold the same activations.

A pair of matrices is cut so that only sums are exchanged. The first is cut by its outputs (q, k and v by heads, the gate and
up projections by their features), the second by its inputs (the output and down projections):

    x ──enter── columns ── heads or features of this rank ── rows ──leave── y       the same y on all ranks

    enter     nothing forward; the sum of the gradient over the ranks backward
    leave     the sum of the ranks' parts forward; nothing backward

Between the pairs, norms and residuals are either computed whole on every rank, or on the part of the rank's tokens that is its
own (`shards_tokens`): then what is kept of them is divided too, `enter` gathers the tokens and `leave` hands out the sums. As
many bytes go over the wire; but a recomputation gathers again, for to keep what was gathered would cost what was saved.

The embedding and the output projection are cut by the vocabulary. DeepSpeed has such layers too; these need nothing of it,
start from the very weights that one process starts from, and let activation checkpointing keep what was sent.

Source: Shoeybi et al. 2019 (arXiv 1909.08053); Korthikanti et al. 2022 (arXiv 2205.05198) for the sharded tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from longctx.errors import ShapeError
from longctx.parallel.slices import ParameterSlice
from longctx.parallel.tensor_exchange import TensorExchange, get_tensor_exchange

if TYPE_CHECKING:
    from longctx.parallel.mesh import ParallelMesh


@torch.library.custom_op(
    "longctx::sum_over_ranks", mutates_args=(), schema="(Tensor x, str exchange, str what, bool keep) -> Tensor"
)
def _sum_over_ranks(x: torch.Tensor, exchange: str, what: str, keep: bool) -> torch.Tensor:
    """The sum of every rank's x, a new tensor of x's dtype. Collective over the `TensorExchange` of that handle.

    Args:
        what: names the message in errors and reports.
        keep: activation checkpointing must keep the result, so that nothing is sent a second time.
    """
    ranks, layer = get_tensor_exchange(exchange)
    return ranks.all_reduce(x.contiguous().clone(), what=what, layer=layer)


@_sum_over_ranks.register_fake
def _(x, exchange, what, keep):
    return x.new_empty(x.shape)


SUM_OVER_RANKS_OP = torch.ops.longctx.sum_over_ranks.default


@torch.library.custom_op(
    "longctx::gather_tokens", mutates_args=(), schema="(Tensor x, str exchange, str what) -> Tensor"
)
def _gather_tokens(x: torch.Tensor, exchange: str, what: str) -> torch.Tensor:
    """Every rank's tokens, one rank's behind the other's: "b s/t e" -> "b s e". Collective."""
    ranks, layer = get_tensor_exchange(exchange)
    return torch.cat(ranks.all_gather(x, what=what, layer=layer), 1)


@_gather_tokens.register_fake
def _(x, exchange, what):
    b, s, e = x.shape
    return x.new_empty(b, s * get_tensor_exchange(exchange)[0].world, e)


@torch.library.custom_op(
    "longctx::scatter_sums", mutates_args=(), schema="(Tensor x, str exchange, str what, bool keep) -> Tensor"
)
def _scatter_sums(x: torch.Tensor, exchange: str, what: str, keep: bool) -> torch.Tensor:
    """The sum of every rank's x, of this rank's tokens: "b s e" -> "b s/t e". Collective. The rest as in `_sum_over_ranks`."""
    ranks, layer = get_tensor_exchange(exchange)
    return ranks.reduce_scatter([piece.contiguous() for piece in x.chunk(ranks.world, 1)], what=what, layer=layer)


@_scatter_sums.register_fake
def _(x, exchange, what, keep):
    b, s, e = x.shape
    return x.new_empty(b, s // get_tensor_exchange(exchange)[0].world, e)


GATHER_TOKENS_OP = torch.ops.longctx.gather_tokens.default
SCATTER_SUMS_OP = torch.ops.longctx.scatter_sums.default
# Their last argument says whether activation checkpointing is to keep the result.
MAY_KEEP_OPS = (SUM_OVER_RANKS_OP, SCATTER_SUMS_OP)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, exchange: str) -> torch.Tensor:
        ctx.exchange = exchange
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return SUM_OVER_RANKS_OP(grad, ctx.exchange, "backward, tp sum of a gradient", False), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, exchange: str, keep: bool) -> torch.Tensor:
        return SUM_OVER_RANKS_OP(x, exchange, "forward, tp sum", keep)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, exchange: str) -> torch.Tensor:
        ctx.exchange = exchange
        return GATHER_TOKENS_OP(x, exchange, "forward, tp tokens gathered")

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return SCATTER_SUMS_OP(grad, ctx.exchange, "backward, tp gradient scattered", False), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, exchange: str, keep: bool) -> torch.Tensor:
        ctx.exchange = exchange
        return SCATTER_SUMS_OP(x, exchange, "forward, tp sum scattered", keep)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return GATHER_TOKENS_OP(grad, ctx.exchange, "backward, tp gradient gathered"), None, None


@dataclass(frozen=True)
class TensorParallel:
    """This process's part in the sharing of matrices. With `size` 1 every method gives back what it got.

    Args:
        rank: on the tp axis.
        size: ranks of the axis.
        exchange: handle of their `TensorExchange`.
        shards_tokens: what is not shared is computed on a part of the tokens, on rank i the i-th.
    """

    rank: int = 0
    size: int = 1
    exchange: str = ""
    shards_tokens: bool = False

    @staticmethod
    def of(mesh: ParallelMesh | None) -> TensorParallel:
        """The part of the process of `mesh`; without one, everything."""
        if mesh is None or mesh.tp.size == 1:
            return TensorParallel()
        return TensorParallel(mesh.tp.rank, mesh.tp.size, mesh.tensor_handle, shards_tokens=mesh.plan.shard_norms)

    @property
    def of_norms(self) -> TensorParallel:
        """Who shares the tokens of a norm over the residual: these ranks if they share tokens, else nobody."""
        return self if self.shards_tokens else ALONE

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """x on its way into this rank's part: "b s e" of all tokens. Its gradient is the sum over the ranks.

        Args:
            x: "b s e", the same on all ranks; with `shards_tokens` "b s/t e", this rank's.
        """
        if self.size == 1:
            return x
        return _Gather.apply(x, self.exchange) if self.shards_tokens else _Enter.apply(x, self.exchange)

    def of_all(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight that all ranks hold whole and each applies to its own heads or tokens: its gradient is their sum."""
        return weight if self.size == 1 else _Enter.apply(weight, self.exchange)

    def leave(self, x: torch.Tensor, *, keep: bool = False) -> torch.Tensor:
        """The sum of every rank's x, "b s e", whose gradient is each rank's; with `shards_tokens` that of its tokens, "b s/t e".

        Args:
            keep: activation checkpointing is to keep it, because something later in the same layer needs it in backward.

        Raises:
            ShapeError: the ranks cannot share the tokens evenly.
        """
        if self.size == 1:
            return x
        if self.shards_tokens and x.shape[1] % self.size:
            raise ShapeError(
                f"{x.shape[1]:_} tokens cannot be shared by {self.size} tp ranks\n"
                "       make the meta with SequenceMeta.of(..., local_multiple=plan.local_multiple), which pads them"
            )
        return (_Scatter if self.shards_tokens else _Leave).apply(x, self.exchange, keep)

    def part(self, whole: int) -> int:
        """How many of `whole` outputs, inputs, heads or tokens of the vocabulary a rank has."""
        assert whole % self.size == 0, f"{whole} cannot be shared by {self.size} ranks"
        return whole // self.size

    def cut(self, parameter: nn.Parameter, dim: int) -> nn.Parameter:
        """Note on a parameter made in its local size that it is this rank's part of one that is cut along `dim`."""
        if self.size > 1:
            parameter.tp_cut = (dim, self.rank, self.size)  # type: ignore[attr-defined]
            # By this name DeepSpeed knows that the gradient norm must count the parameter on every rank of the axis.
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        return parameter


# One process that shares nothing.
ALONE = TensorParallel()


class VocabularyEmbedding(nn.Embedding):
    """An embedding of which each rank holds a part of the vocabulary. Uninitialised.

    Args:
        vocab_size, hidden_size: of the whole table.
        tensor: who shares it.
    """

    def __init__(self, vocab_size: int, hidden_size: int, tensor: TensorParallel) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = tensor.part(vocab_size), hidden_size
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
        self.tensor = tensor
        self.weight = tensor.cut(nn.Parameter(torch.empty(self.num_embeddings, hidden_size)), 0)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 "b s", ids of the whole vocabulary -> "b s e"; with `shards_tokens` "b s/t e"."""
        if self.tensor.size == 1:
            return F.embedding(tokens, self.weight)
        local = tokens - self.tensor.rank * self.num_embeddings
        is_elsewhere = (local < 0) | (local >= self.num_embeddings)
        x = F.embedding(local.masked_fill(is_elsewhere, 0), self.weight)
        # The table of exactly one rank has the token, so the sum rounds nothing.
        return self.tensor.leave(x.masked_fill(is_elsewhere[..., None], 0.0))


def gather_slices(local: torch.Tensor, cut: ParameterSlice, exchange: TensorExchange) -> torch.Tensor:
    """The whole of which every rank of the tp axis holds its slice; collective. A tensor that is not cut is given back."""
    return local if cut.dim is None else torch.cat(exchange.all_gather(local, what="tp slices gathered"), cut.dim)


def split_by_cut(parameters: Iterator[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters of which this rank holds a part, and those that every rank of the tp axis holds whole."""
    cut: list[nn.Parameter] = []
    whole: list[nn.Parameter] = []
    for parameter in parameters:
        (cut if hasattr(parameter, "tp_cut") else whole).append(parameter)
    return cut, whole
