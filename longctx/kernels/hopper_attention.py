"""Block attention for Hopper in Gluon: what runs there, and what was seen running."""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass
from functools import cache

import torch

from longctx.kernels import Direction, SoftmaxState, get_kernel
from longctx.kernels.pieces import PiecewiseAttention, check_scale
from longctx.kernels.tiles import can_describe
from longctx.masks import KeyRange

log = logging.getLogger(__name__)

# Head dims of the tiles; others are padded up to the next in shared memory.
_PADDED = (64, 128, 256)
# What a kind of block runs as: bands differ in nothing but two numbers, a rectangle is a full block on views.
_RUNS_AS = {"full": "full", "rectangle": "full", "causal": "band", "band": "band", "rows": "rows"}
# (direction, dtype, padded head dim, what it runs as) of every kernel that was held against exact attention on a GPU (H100 and
# H200, Triton 3.6.0). A wrong barrier hangs instead of failing, so nothing else is launched for a user: a kernel that is changed
# leaves this set until the tests on GPUs, which launch it all the same, have passed.
VALIDATED: frozenset[tuple[str, torch.dtype, int, str]] = frozenset(
    itertools.product(("forward", "backward"), (torch.bfloat16, torch.float16), _PADDED, ("full", "band", "rows"))
)


@dataclass(frozen=True)
class HopperAttention(PiecewiseAttention):
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

    def check_options(self, scale: float, softcap: float) -> None:
        check_scale(scale)
        super().check_options(scale, softcap)

    def attend(self, q, k, v, visible: KeyRange, **options) -> SoftmaxState:
        if not can_describe(q, k, v):
            _log_undescribed()
            return get_kernel("triton").forward(q, k, v, visible, **options)
        from longctx.kernels.hopper_forward import launch_hopper_forward

        with torch.cuda.device(q.device):
            return launch_hopper_forward(q, k, v, visible, **options)

    def differentiate(self, dout, q, k, v, lse, delta, visible: KeyRange, *, out, **options) -> None:
        block = (dout, q, k, v, lse, delta, visible)
        if not can_describe(dout, q, k, v):
            _log_undescribed()
            get_kernel("triton").backward(*block, out=out, **options)
            return
        from longctx.kernels.hopper_backward import launch_hopper_backward

        with torch.cuda.device(q.device):
            launch_hopper_backward(*block, deterministic=self.deterministic, **options)


@cache
def _log_undescribed() -> None:
    log.info(
        "tensors with a base or strides that are not multiples of 16 bytes: triton (the TMA engine cannot read them)"
    )
