"""Attention sinks: one learned logit for each head that joins every row's softmax and has no value.

A sink takes a share of a row's weight and gives nothing for it. It is folded in once, when a row has seen all its blocks;
kernels know nothing of it, since a backward that is told the row's whole lse leaves out the sink's share by itself.

Source: OpenAI 2025, the model card of gpt-oss, section 2.2; Xiao et al. 2023 (arXiv 2309.17453), section 3.2.
"""

from __future__ import annotations

import torch

from longctx.errors import ShapeError
from longctx.kernels import SoftmaxState


def check_sinks(sinks: torch.Tensor, q: torch.Tensor) -> None:
    """Raises ShapeError unless `sinks` holds one floating number for each head of q ("b s h d"), on the same device."""
    if sinks.shape != q.shape[2:3] or not sinks.dtype.is_floating_point or sinks.device != q.device:
        raise ShapeError(
            f"sinks is {sinks.dtype} {list(sinks.shape)} on {sinks.device}: it must hold one floating number for each of the "
            f"{q.shape[2]} heads of q, on {q.device}"
        )


def add_sinks(state: SoftmaxState, sinks: torch.Tensor) -> None:
    """Let the sinks join rows that have seen everything else, in place; sinks: [h]. A row without keys keeps out 0."""
    old = state.lse.clone()
    torch.logaddexp(old, sinks.to(old.dtype)[:, None], out=state.lse)
    # A sink of -inf beside no key: -inf - -inf would be nan.
    base = state.lse.masked_fill(state.lse == float("-inf"), 0.0)
    state.out.mul_(torch.exp(old - base).transpose(1, 2)[..., None])


def sink_gradient(sinks: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Gradient of the sinks, [h]: of each row its probability times what the softmax takes from every score, -delta.

    Args:
        lse, delta: "b h s", of the whole row, the sink in it.
    """
    lse = lse.masked_fill(lse == float("-inf"), float("inf"))
    p = torch.exp(sinks.to(lse.dtype)[:, None] - lse)
    return -(p * delta).sum((0, 2)).to(sinks.dtype)
