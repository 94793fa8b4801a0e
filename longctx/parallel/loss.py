"""The output projection and the cross-entropy in one: no tensor of all logits ever exists."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn

from longctx.errors import ConfigError, DataError, LongCtxError, ShapeError, did_you_mean
from longctx.kernels import state_dtype
from longctx.kernels.fused import check_fused, use_liger
from longctx.parallel.tensor import ALONE, TensorParallel
from longctx.parallel.tensor_exchange import get_tensor_exchange
from longctx.shapes import NO_TARGET, check_shapes

LossImpl = Literal["auto", "torch", "liger"]
_IMPLS = {"auto": "auto", "liger": "on", "torch": "off"}

# What the logits of one chunk and the temporaries of their softmax may take. On a GPU the products need about a thousand
# rows to be fast; on a CPU a chunk that stays near the caches is.
CHUNK_BYTES = {"cuda": 512 << 20}
CHUNK_BYTES_ELSEWHERE = 32 << 20


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    chunk_tokens: int | None = None,
    impl: LossImpl = "auto",
    tensor: TensorParallel = ALONE,
) -> torch.Tensor:
    """Sum over the tokens of `-log softmax(hidden @ weight^T)[label]`.

    Works through the tokens in chunks; the gradients are computed along with the loss, so that logits are made once and
    kept never, and are scaled by the upstream gradient in backward, which can run once. Products in the dtype of the
    inputs, the softmax and the sums over tokens (the loss, the gradient of `weight`) in fp32, or fp64 for fp64 inputs.
    Memory beyond the inputs: one chunk of logits, the gradient of `hidden`, and `weight`'s in fp32.

    Args:
        hidden: "... e".
        weight: "v e", same dtype as hidden.
        labels: int64 "...", in [0, v), or -100 for a token without a target.
        chunk_tokens: tokens whose logits exist at once; None: from a memory budget.
        impl: "torch", "liger" (CUDA, liger-kernel installed), or "auto": liger where it can be had, logged once.
        tensor: the ranks that share the vocabulary: `weight` then is this rank's part of it, `hidden` and `labels` (ids of the
            whole vocabulary) are the same on all of them; if they share tokens too, `hidden` is "b s/t e". Collective, with two small messages a chunk, and one of `hidden`'s
            size in backward.

    Returns:
        A scalar, the same on all ranks of `tensor`; 0 (still differentiable) for no tokens, or none with a target.

    Raises:
        ShapeError: shapes, dtypes or devices disagree.
        DataError: a label outside the vocabulary, on the CPU. On CUDA an assertion of the device, without waiting for it.
        ConfigError: unknown impl, or "liger" where it cannot run or the vocabulary is shared.
    """
    if impl not in _IMPLS:
        raise ConfigError(f"impl = {impl!r} is not a loss implementation: {did_you_mean(impl, _IMPLS)}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ConfigError(f"chunk_tokens = {chunk_tokens} must be at least 1")
    if tensor.size > 1:
        if impl == "liger":
            raise ConfigError(
                "liger's loss needs the logits of the whole vocabulary; with tp use impl 'auto' or 'torch'"
            )
        hidden = tensor.enter(hidden)
    _check(hidden, weight, labels)
    check_token_ids(labels, weight.shape[0] * tensor.size, what="label", ignore=NO_TARGET)
    softmax: _Softmax = _torch_softmax
    if tensor.size > 1:
        softmax = partial(_shared_softmax, tensor)
    elif use_liger(_IMPLS[impl], hidden):
        softmax = _liger_softmax
    if chunk_tokens is None:
        chunk_tokens = _default_chunk(hidden, weight.shape[0], copies=softmax is not _liger_softmax)
    flat = hidden.reshape(-1, hidden.shape[-1])
    # An autograd Function cannot see whether gradients are wanted: in it they are always off.
    with_grad = torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(flat, weight, labels.reshape(-1), chunk_tokens, softmax, with_grad)


class LMHead(nn.Module):
    """The output projection as a module that returns the loss, so that hooks on modules (ZeRO-3's) gather `weight`.

    Args:
        hidden_size, vocab_size: shape of `weight`, "v e", without a bias. Uninitialised.
        fused: "auto", "on" or "off".
        tensor: the ranks that share the vocabulary.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        fused: str = "auto",
        tensor: TensorParallel = ALONE,
    ) -> None:
        super().__init__()
        check_fused(fused)
        self.tensor = tensor
        self.weight = tensor.cut(nn.Parameter(torch.empty(tensor.part(vocab_size), hidden_size)), 0)
        self.impl = next(impl for impl, setting in _IMPLS.items() if setting == fused)

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """hidden: "b s e", labels: "b s" -> the sum of token losses, a scalar."""
        return linear_cross_entropy(
            hidden,
            self.weight,
            labels,
            impl=self.impl,  # type: ignore[arg-type]
            tensor=self.tensor,
        )


def check_token_ids(ids: torch.Tensor, vocab_size: int, *, what: str, ignore: int | None = None) -> None:
    """Refuse ids outside [0, vocab_size), other than `ignore`.

    Raises:
        DataError: on the CPU; names the id and where it is. On CUDA the device asserts, and the host does not wait.
    """
    if ids.numel() == 0 or ids.is_meta:
        return
    wrong = (ids < 0) | (ids >= vocab_size)
    if ignore is not None:
        wrong &= ids != ignore
    if ids.device.type != "cpu":
        torch._assert_async(~wrong.any(), f"a {what} is outside the vocabulary of {vocab_size}")
        return
    if bool(wrong.any()):
        where = wrong.nonzero()[0].tolist()
        raise DataError(
            f"{what} {int(ids[tuple(where)])} at {where} is outside the vocabulary of {vocab_size}\n"
            "       the data were made with another tokenizer: set model.vocab_size to that of the tokenizer"
        )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, chunk_tokens, softmax, with_grad):
        need_hidden, need_weight = (with_grad and need for need in ctx.needs_input_grad[:2])
        dtype = state_dtype(hidden.dtype)
        loss = torch.zeros((), dtype=dtype, device=hidden.device)
        grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if need_weight else None
        # One buffer for all chunks: the allocator would otherwise hold two.
        buffer = hidden.new_empty(min(chunk_tokens, max(len(labels), 1)), weight.shape[0])
        for start in range(0, len(labels), chunk_tokens):
            rows = slice(start, min(start + chunk_tokens, len(labels)))
            logits = torch.mm(hidden[rows], weight.t(), out=buffer[: rows.stop - rows.start])
            loss += softmax(logits, labels[rows], need_hidden or need_weight)
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                add_product(grad_weight, logits, hidden[rows])
        ctx.grads = grad_hidden, grad_weight
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        if ctx.grads is None:
            raise LongCtxError(
                "linear_cross_entropy: backward ran twice, but its gradients are scaled in place the first time\n"
                "       compute the loss again for a second backward"
            )
        (grad_hidden, grad_weight), ctx.grads = ctx.grads, None
        if grad_hidden is not None:
            grad_hidden.mul_(upstream)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(upstream).to(ctx.dtype)
        return grad_hidden, grad_weight, None, None, None, None


# (logits [n, v], labels [n], with_grad) -> sum of the losses; with_grad: logits are replaced by their gradient.
_Softmax = Callable[[torch.Tensor, torch.Tensor, bool], torch.Tensor]


def _torch_softmax(logits: torch.Tensor, labels: torch.Tensor, with_grad: bool) -> torch.Tensor:
    x = logits.to(state_dtype(logits.dtype))  # the logits themselves where they are fp32
    valid = (labels != NO_TARGET)[:, None]
    index = labels[:, None].masked_fill(~valid, 0)
    # In place, and relative to the maximum until the end: against the logsumexp itself, logits of 1000 would cost 5 digits.
    x.sub_(x.amax(-1, keepdim=True))
    target = x.gather(1, index)
    total = x.exp_().sum(-1, keepdim=True)
    loss = (total.log() - target).masked_fill_(~valid, 0.0).sum()
    if with_grad:
        x.div_(total).scatter_add_(1, index, x.new_full(index.shape, -1.0))
        # Not a product with 0: a token without a target gives no gradient even where its logits are not finite.
        x.masked_fill_(~valid, 0.0)
        if x is not logits:
            logits.copy_(x)
    return loss


def _shared_softmax(
    tensor: TensorParallel, logits: torch.Tensor, labels: torch.Tensor, with_grad: bool
) -> torch.Tensor:
    """`_torch_softmax` where the logits are this rank's part of the vocabulary: the maxima, and then the sums of the
    exponentials with the targets' logits, go over the ranks.
    """
    exchange, _ = get_tensor_exchange(tensor.exchange)
    x = logits.to(state_dtype(logits.dtype))
    valid = (labels != NO_TARGET)[:, None]
    index = labels[:, None] - tensor.rank * logits.shape[1]
    is_mine = valid & (index >= 0) & (index < logits.shape[1])
    index = index.masked_fill(~is_mine, 0)
    largest = exchange.all_reduce(x.amax(-1, keepdim=True), op=dist.ReduceOp.MAX, what="loss, tp maxima of logits")
    x.sub_(largest)
    target = x.gather(1, index).masked_fill_(~is_mine, 0.0)
    sums = torch.stack([x.exp_().sum(-1, keepdim=True), target])
    total, target = exchange.all_reduce(sums, what="loss, tp sums of exponentials")
    loss = (total.log() - target).masked_fill_(~valid, 0.0).sum()
    if with_grad:
        x.div_(total).scatter_add_(1, index, is_mine.to(x.dtype).neg())
        x.masked_fill_(~valid, 0.0)
        if x is not logits:
            logits.copy_(x)
    return loss


def _liger_softmax(logits: torch.Tensor, labels: torch.Tensor, with_grad: bool) -> torch.Tensor:
    """liger's kernel without liger's wrapper, which waits for the device and keeps one gradient of the weight per call."""
    import triton
    from liger_kernel.ops.cross_entropy import MAX_FUSED_SIZE, liger_cross_entropy_kernel
    from liger_kernel.ops.utils import is_hip

    rows, vocab = logits.shape
    losses = torch.zeros(rows, dtype=torch.float32, device=logits.device)
    labels = labels.contiguous()
    liger_cross_entropy_kernel[(rows,)](
        X_ptr=logits,
        X_stride=logits.stride(0),
        Y_ptr=labels,
        Y_stride=labels.stride(0),
        weight_ptr=None,
        loss_ptr=losses,
        z_loss_ptr=None,
        loss_stride=losses.stride(0),
        token_accuracy_ptr=None,
        token_accuracy_stride=0,
        predicted_tokens_ptr=None,
        predicted_tokens_stride=0,
        n_cols=vocab,
        # Read for reduction "mean" only: the wrapper's count is what makes it wait.
        n_non_ignore=1,
        sum_non_ignore_weight=1,
        weight_sum=0.0,
        ignore_index=NO_TARGET,
        lse_square_scale=0.0,
        label_smoothing=0.0,
        reduction="sum",
        softcap=None,
        RETURN_Z_LOSS=False,
        RETURN_TOKEN_ACCURACY=False,
        RETURN_PREDICTED_TOKENS=False,
        BLOCK_SIZE=min(MAX_FUSED_SIZE, triton.next_power_of_2(vocab)),
        HAS_WEIGHT=False,
        HAS_SOFTCAPPING=False,
        HAS_GRADIENTS=with_grad,
        num_warps=16 if is_hip() else 32,
    )
    return losses.sum()


def add_product(total: torch.Tensor, dlogits: torch.Tensor, hidden: torch.Tensor) -> None:
    """total += dlogits^T @ hidden; `total` is fp32 (fp64), its products are never rounded to a half type."""
    if dlogits.dtype == total.dtype:
        total.addmm_(dlogits.t(), hidden)
    elif dlogits.is_cuda and torch.cuda.get_device_capability(dlogits.device) >= (8, 0):
        torch.addmm(total, dlogits.t(), hidden, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(dlogits.t().to(total.dtype), hidden.to(total.dtype))


def _default_chunk(hidden: torch.Tensor, vocab_size: int, copies: bool) -> int:
    budget = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES_ELSEWHERE)
    # The logits become their gradient where they lie; plain torch does that on a copy in fp32 unless they are fp32.
    state = state_dtype(hidden.dtype).itemsize
    per_logit = hidden.dtype.itemsize + (state if copies and hidden.dtype.itemsize < state else 0)
    tokens = max(1, budget // (vocab_size * per_logit))
    return tokens // 128 * 128 or tokens


def _check(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> None:
    check_shapes(weight=(weight, "v e"))
    if hidden.shape != (*labels.shape, weight.shape[1]):
        raise ShapeError(
            f"hidden {list(hidden.shape)}, weight {list(weight.shape)} and labels {list(labels.shape)} disagree: "
            "expected '... e', 'v e' and '...'"
        )
    if hidden.dtype != weight.dtype or labels.dtype != torch.int64:
        raise ShapeError(
            f"hidden is {hidden.dtype}, weight {weight.dtype}, labels {labels.dtype}: the first two must be equal, the "
            "last int64; convert them first"
        )
    if len({hidden.device, weight.device, labels.device}) > 1:
        raise ShapeError(f"hidden is on {hidden.device}, weight on {weight.device}, labels on {labels.device}")
