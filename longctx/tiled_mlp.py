"""SwiGLU over pieces of the tokens: what is wide exists for one piece at a time, forward and backward.

    x ──gate, up──▶ "tokens f", twice ──silu(gate) * up──▶ "tokens f" ──down──▶ out

Of a token f numbers are several times what the rest of a layer holds, and at a million tokens on eight GPUs a layer's
products would take as much as all that its backward pass keeps. Each token is computed by itself, so pieces change nothing
but the order of the sums in the gradients of the weights.

It is one function to autograd: it keeps its inputs alone, computes gate and up of a piece again in backward, and gives each
weight one gradient, summed over the pieces in fp32, so that hooks on gradients run once (ZeRO's average them).

Source: Bekman et al. 2025 (arXiv 2506.13996), whose TiledMLP it is; SwiGLU: Shazeer 2020 (arXiv 2002.05202).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from longctx.errors import ConfigError
from longctx.kernels import state_dtype
from longctx.kernels.fused import Fused, silu_mul
from longctx.parallel.loss import add_product


def tiled_swiglu(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    *,
    chunk_tokens: int,
    fused: Fused = "auto",
) -> torch.Tensor:
    """`(silu(x @ gate^T) * (x @ up^T)) @ down^T`, of at most `chunk_tokens` tokens at a time. Once differentiable.

    Costs the products with `gate` and `up` a second time in backward, which activation checkpointing around it then spares:
    a layer's recomputation ends where this begins.

    Args:
        x: "... e".
        gate, up: "f e". down: "e f". All of x's dtype.
        chunk_tokens: the last piece may be smaller.
        fused: as `longctx.kernels.fused.silu_mul`.

    Returns:
        Like x; empty for no tokens.

    Raises:
        ConfigError: `chunk_tokens` is less than 1.
    """
    if chunk_tokens < 1:
        raise ConfigError(f"chunk_tokens = {chunk_tokens} must be at least 1")
    flat = x.reshape(-1, x.shape[-1])
    # The function only keeps its inputs and makes room; the room is filled afterwards. A recomputation, which ends as soon
    # as the last tensor is kept, so computes nothing of it.
    out = _TiledSwiglu.apply(flat, gate, up, down, chunk_tokens, fused)
    with torch.no_grad():
        room = out.detach()
        for rows in _pieces(len(flat), chunk_tokens):
            wide = silu_mul(torch.mm(flat[rows], gate.t()), torch.mm(flat[rows], up.t()), fused=fused)
            torch.mm(wide, down.t(), out=room[rows])
    return out.view(x.shape)


class _TiledSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        gate: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
        chunk_tokens: int,
        fused: Fused,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, gate, up, down)
        ctx.chunk_tokens, ctx.fused = chunk_tokens, fused
        return x.new_empty(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, gate, up, down = ctx.saved_tensors
        needs_x, *needs = ctx.needs_input_grad[:4]
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_x else None
        sums = [
            torch.zeros(weight.shape, dtype=state_dtype(weight.dtype), device=weight.device) if needed else None
            for weight, needed in zip((gate, up, down), needs, strict=True)
        ]
        for rows in _pieces(len(x), ctx.chunk_tokens):
            part, dout = x[rows], grad[rows]
            g, u = (torch.mm(part, weight.t()).requires_grad_() for weight in (gate, up))
            with torch.enable_grad():
                wide = silu_mul(g, u, fused=ctx.fused)
            # Before the gradients of g and u, which may be written over them.
            _add(sums[2], dout, wide.detach())
            dg, du = torch.autograd.grad(wide, (g, u), torch.mm(dout, down))
            _add(sums[0], dg, part)
            _add(sums[1], du, part)
            if dx is not None:
                torch.mm(dg, gate, out=dx[rows]).addmm_(du, up)
        grads = [None if total is None else total.to(gate.dtype) for total in sums]
        return dx, *grads, None, None


def _add(total: torch.Tensor | None, grad: torch.Tensor, x: torch.Tensor) -> None:
    if total is not None:
        add_product(total, grad, x)


def _pieces(num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    for start in range(0, num_tokens, chunk_tokens):
        yield slice(start, min(start + chunk_tokens, num_tokens))
