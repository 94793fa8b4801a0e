"""Block attention in Triton: every GPU that Triton knows, and the interpreter on CPUs."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

from longctx.errors import KernelError
from longctx.kernels import Direction, SoftmaxState, begin_fresh, check_block, check_softcap
from longctx.kernels.tiles import INTERPRETING, can_describe, padded
from longctx.kernels.triton_backward import launch_dkdv, launch_dq, prepare_rows
from longctx.kernels.triton_forward import launch_forward
from longctx.kernels.tuning import Tiles, tiles_for
from longctx.masks import KeyRange

MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class TritonAttention:
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
        tiles = self._tiles(q)
        with _on(q):
            return launch_forward(
                q, k, v, key_range, scale=scale, softcap=softcap, state=state, final=final,
                tile=tiles.forward, use_descriptor=tiles.forward.use_descriptor and can_describe(q, k, v),
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
        if piece := key_range.rectangle:
            key_range.bounds(q.shape[1], k.shape[1])  # refuses intervals of other lengths
            rows, keys = slice(*piece[:2]), slice(*piece[2:])
            dk_part, dv_part = (begin_fresh(acc, keys) if fresh else acc[:, keys] for acc in (dk_acc, dv_acc))
            self.backward(
                dout[:, rows], q[:, rows], k[:, keys], v[:, keys], lse[:, :, rows], delta[:, :, rows], KeyRange.full(),
                scale=scale, softcap=softcap, out=out[:, rows],
                dq_acc=dq_acc[:, rows], dk_acc=dk_part, dv_acc=dv_part, fresh=fresh,
            )  # fmt: skip
            return
        with _on(q):
            lse2, delta2 = prepare_rows(lse, delta)
        block = (dout, q, k, v, lse2, delta2, key_range)
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


def nothing_to_do(q: torch.Tensor, k: torch.Tensor, key_range: KeyRange) -> bool:
    return key_range.kind == "empty" or q.numel() == 0 or k.numel() == 0


def check_scale(scale: float) -> None:
    # The running maximum is taken before the scores are scaled, which is right only for a scale that keeps their order.
    if not scale >= 0:
        raise KernelError(f"scale is {scale}, but the Triton kernels need scale >= 0: negate q instead")


def _on(q: torch.Tensor):
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext()
