"""Block attention in Triton: every GPU that Triton knows, and the interpreter on CPUs."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

from longctx.kernels import Direction, SoftmaxState
from longctx.kernels.pieces import PiecewiseAttention, check_scale
from longctx.kernels.row_statistics import prepare_rows
from longctx.kernels.tiles import INTERPRETING, can_describe, padded
from longctx.kernels.triton_backward import launch_dkdv, launch_dq
from longctx.kernels.triton_forward import launch_forward
from longctx.kernels.tuning import Tiles, tiles_for
from longctx.masks import KeyRange

MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class TritonAttention(PiecewiseAttention):
    """FlashAttention-2-style kernels that carry the softmax state; see `BlockAttention`.

    fp16, bf16 and fp32 (products in full fp32, not TF32), head dims up to 256, any length, every kind of key range. The
    backward is deterministic. Nothing waits for the GPU. A rectangle of rows and keys runs as a full block on views.

    Args:
        tiles: tile sizes to use instead of the tuned ones.
    """

    tiles: Tiles | None = None
    name: str = "triton"

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
        if device.type == "cpu" and not INTERPRETING:
            return "on a CPU it runs only in Triton's interpreter: set TRITON_INTERPRET=1 before starting Python"
        if device.type not in ("cuda", "cpu"):
            return f"no Triton kernels for {device.type}"
        if dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"{dtype} is not one of float16, bfloat16, float32"
        if device.type == "cuda" and not INTERPRETING and torch.version.hip is None:
            capability = torch.cuda.get_device_capability(device)
            if capability < (8, 0):
                return f"needs compute capability 8.0 or later, this GPU has {'.'.join(map(str, capability))}"
        if not 1 <= head_dim <= MAX_HEAD_DIM:
            return f"head dim {head_dim} is not within 1 to {MAX_HEAD_DIM}"
        return None

    def check_options(self, scale: float, softcap: float) -> None:
        check_scale(scale)
        super().check_options(scale, softcap)

    def attend(self, q, k, v, visible: KeyRange, *, scale, softcap, state, final) -> SoftmaxState:
        tile = self._tiles(q).forward
        with _on(q):
            return launch_forward(
                q, k, v, visible, scale=scale, softcap=softcap, state=state, final=final,
                tile=tile, use_descriptor=tile.use_descriptor and can_describe(q, k, v),
            )  # fmt: skip

    def differentiate(
        self, dout, q, k, v, lse, delta, visible: KeyRange, *, scale, softcap, out, dq_acc, dk_acc, dv_acc, fresh
    ) -> None:
        with _on(q):
            lse2, delta2 = prepare_rows(lse, delta)
        block = (dout, q, k, v, lse2, delta2, visible)
        self.add_dkdv(*block, scale=scale, softcap=softcap, dk_acc=dk_acc, dv_acc=dv_acc, fresh=fresh)
        self.add_dq(*block, scale=scale, softcap=softcap, dq_acc=dq_acc)

    def add_dq(
        self, dout, q, k, v, lse2, delta2, key_range, *, scale: float, softcap: float = 0.0, dq_acc: torch.Tensor
    ) -> None:
        """The half of `backward` that adds dq, for a block that is not empty; lse2 and delta2 are `prepare_rows`'."""
        tile = self._tiles(q).dq
        describe = tile.use_descriptor and can_describe(q, k, v, dout)
        with _on(q):
            launch_dq(
                dout, q, k, v, lse2, delta2, key_range, scale=scale, softcap=softcap, dq_acc=dq_acc,
                tile=tile, use_descriptor=describe,
            )  # fmt: skip

    def add_dkdv(
        self,
        dout,
        q,
        k,
        v,
        lse2,
        delta2,
        key_range,
        *,
        scale: float,
        softcap: float = 0.0,
        dk_acc,
        dv_acc,
        fresh: bool = False,
    ) -> None:
        """The half of `backward` that adds dk and dv; likewise."""
        tile = self._tiles(q).dkdv
        describe = tile.use_descriptor and can_describe(q, k, v, dout)
        with _on(q):
            launch_dkdv(
                dout, q, k, v, lse2, delta2, key_range, scale=scale, softcap=softcap, dk_acc=dk_acc, dv_acc=dv_acc,
                fresh=fresh, tile=tile, use_descriptor=describe,
            )  # fmt: skip

    def _tiles(self, q: torch.Tensor) -> Tiles:
        return self.tiles or tiles_for(padded(q.shape[-1]), q.dtype, q.device)


def _on(q: torch.Tensor):
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext()
