"""Block attention for Hopper in Gluon: what runs there, and what was seen running."""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from longctx.kernels import Direction, SoftmaxState, begin_fresh, check_block, check_softcap, get_kernel
from longctx.kernels.tiles import can_describe
from longctx.kernels.triton_attention import check_scale, nothing_to_do
from longctx.masks import KeyRange

log = logging.getLogger(__name__)

# Head dims of the tiles; others are padded up to the next in shared memory.
_PADDED = (64, 128, 256)
# What a kind of block runs as: bands differ in nothing but two numbers, a rectangle is a full block on views.
_RUNS_AS = {"full": "full", "rectangle": "full", "causal": "band", "band": "band", "rows": "rows"}
# (direction, dtype, padded head dim, what it runs as) of every kernel that was held against float64 on a GPU (an H100, Triton
# 3.6.0). A wrong barrier hangs instead of failing, so nothing else is launched for a user; the tests on GPUs launch the rest.
VALIDATED: frozenset[tuple[str, torch.dtype, int, str]] = frozenset(
    launched
    for launched in itertools.product(
        ("forward", "backward"), (torch.bfloat16, torch.float16), _PADDED, ("full", "band", "rows")
    )
    if (launched[:2], launched[3]) != (("backward", torch.float16), "full")
)


@dataclass(frozen=True)
class HopperAttention:
    """FlashAttention-3-style kernels for compute capability 9.0; see `BlockAttention`.

    fp16 and bf16, head dims that are multiples of 8 up to 256, any length, every kind of key range. The forward is
    deterministic. Nothing waits for the GPU. Tensors that the TMA engine cannot read (a base or stride that is not a
    multiple of 16 bytes, an expanded axis) go to the portable kernel.

    Args:
        deterministic: compute dq with the portable kernel, which adds in a fixed order: the same bits at every run, for
            seven products in place of five. Without it only the last bits of dq change from run to run.
    """

    deterministic: bool = False
    name: str = "hopper"

    def supports(
        self,
        *,
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int,
        kind: str,
        softcap: float = 0.0,
        direction: Direction = "forward",
    ) -> str | None:
        from longctx.kernels.gluon_api import missing_gluon

        if reason := missing_gluon(device):
            return reason
        if dtype not in (torch.float16, torch.bfloat16):
            return f"{dtype} is not one of float16, bfloat16"
        if head_dim % 8 or not 8 <= head_dim <= _PADDED[-1]:
            return f"head dim {head_dim} is not a multiple of 8 up to {_PADDED[-1]}"
        padded = next(d for d in _PADDED if d >= head_dim)
        if kind != "empty" and (direction, dtype, padded, _RUNS_AS[kind]) not in VALIDATED:
            return f"its {direction} was not validated for {dtype}, head dims up to {padded}, {kind} blocks"
        return None

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        key_range: KeyRange,
        *,
        scale: float,
        softcap: float = 0.0,
        state: SoftmaxState | None = None,
        final: bool = False,
    ) -> SoftmaxState:
        check_block(q, k, v)
        check_scale(scale)
        check_softcap(softcap)
        if nothing_to_do(q, k, key_range):
            return SoftmaxState.empty_like(q) if state is None else state
        if piece := key_range.rectangle:
            key_range.bounds(q.shape[1], k.shape[1])  # refuses intervals of other lengths
            rows, keys = slice(*piece[:2]), slice(*piece[2:])
            state = SoftmaxState.empty_like(q) if state is None else state
            part = SoftmaxState(state.out[:, rows], state.lse[:, :, rows])
            block = q[:, rows], k[:, keys], v[:, keys]
            self.forward(*block, KeyRange.full(), scale=scale, softcap=softcap, state=part)
            return state
        if not can_describe(q, k, v):
            _log_undescribed()
            return get_kernel("triton").forward(
                q, k, v, key_range, scale=scale, softcap=softcap, state=state, final=final
            )
        from longctx.kernels.hopper_forward import launch_hopper_forward

        with torch.cuda.device(q.device):
            return launch_hopper_forward(
                q, k, v, key_range, scale=scale, softcap=softcap, state=state, final=final
            )  # fmt: skip

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lse: torch.Tensor,
        delta: torch.Tensor,
        key_range: KeyRange,
        *,
        scale: float,
        softcap: float = 0.0,
        out: torch.Tensor,
        dq_acc: torch.Tensor,
        dk_acc: torch.Tensor,
        dv_acc: torch.Tensor,
        fresh: bool = False,
    ) -> None:
        check_block(q, k, v, dout=dout)
        check_scale(scale)
        check_softcap(softcap)
        if nothing_to_do(q, k, key_range):
            if fresh:
                dk_acc.zero_()
                dv_acc.zero_()
            return
        options: dict[str, Any] = {"scale": scale, "softcap": softcap, "fresh": fresh}
        if piece := key_range.rectangle:
            key_range.bounds(q.shape[1], k.shape[1])  # refuses intervals of other lengths
            rows, keys = slice(*piece[:2]), slice(*piece[2:])
            dk_part, dv_part = (begin_fresh(acc, keys) if fresh else acc[:, keys] for acc in (dk_acc, dv_acc))
            self.backward(
                dout[:, rows], q[:, rows], k[:, keys], v[:, keys], lse[:, :, rows], delta[:, :, rows], KeyRange.full(),
                out=out[:, rows], dq_acc=dq_acc[:, rows], dk_acc=dk_part, dv_acc=dv_part, **options,
            )  # fmt: skip
            return
        block = (dout, q, k, v, lse, delta, key_range)
        if not can_describe(dout, q, k, v):
            _log_undescribed()
            get_kernel("triton").backward(*block, out=out, dq_acc=dq_acc, dk_acc=dk_acc, dv_acc=dv_acc, **options)
            return
        from longctx.kernels.hopper_backward import launch_hopper_backward

        with torch.cuda.device(q.device):
            launch_hopper_backward(
                *block, dq_acc=dq_acc, dk_acc=dk_acc, dv_acc=dv_acc, deterministic=self.deterministic, **options
            )


@cache
def _log_undescribed() -> None:
    log.info(
        "tensors with a base or strides that are not multiples of 16 bytes: triton (the TMA engine cannot read them)"
    )
