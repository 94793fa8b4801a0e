"""Block attention: the contract that every kernel keeps, and the registry that chooses among them.

A kernel works on one block of queries against one block of keys. What makes blocks composable is the softmax state it
carries: the forward continues from the `(out, lse)` of earlier blocks, the backward takes the final `lse` and `delta` of
the whole row and adds into fp32 gradients. No kernel knows of ranks, layouts or masks; it is told a `KeyRange`.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from functools import cache
from typing import Literal, Protocol

import torch

from longctx.errors import KernelError, ShapeError, did_you_mean
from longctx.masks import UNBOUNDED, KeyRange
from longctx.shapes import check_shapes

Direction = Literal["forward", "backward"]


@dataclass
class SoftmaxState:
    """Attention over the keys seen so far.

    Args:
        out: "b sq h d", normalised; fp32 (float64 for float64 inputs), contiguous. 0 in rows that saw nothing.
        lse: "b h sq", natural log of the sum of exponentials; same dtype, contiguous. -inf in rows that saw nothing.
    """

    out: torch.Tensor
    lse: torch.Tensor

    @staticmethod
    def empty_like(q: torch.Tensor) -> SoftmaxState:
        """The state of rows that have seen nothing; q: "b sq h d"."""
        b, sq, h, d = q.shape
        dtype = state_dtype(q.dtype)
        return SoftmaxState(
            torch.zeros(b, sq, h, d, dtype=dtype, device=q.device),
            torch.full((b, h, sq), float("-inf"), dtype=dtype, device=q.device),
        )


class BlockAttention(Protocol):
    """Attention of one block of queries to one block of keys, forward and backward.

    Shapes: q, dout "b sq h d"; k, v "b sk hk d" with hk dividing h (query head i uses key head i // (h / hk)); any strides
    with a unit last one. `scale` multiplies q @ k^T. K/V are never expanded. `softcap` > 0 bends the scores s = scale * q k^T
    to softcap * tanh(s / softcap), which keeps them below it; 0 leaves them.
    """

    name: str

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
        """None if this kernel can do such a block, else the reason why not, as a sentence for a log.

        `kind` is what `block_kind` says of the key range. A kernel may do one direction and not the other.
        """

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
        """Attend to one more block of keys.

        Args:
            state: what earlier blocks left; updated in place and returned. None: start.
            final: no block follows, so the `out` of what is returned may be in q's dtype, and that of `state` be left as it was:
                a write, a read and a cast less.

        Source: Dao 2023 (arXiv 2307.08691), algorithm 1; Milakov and Gimelshein 2018 (arXiv 1805.02867).
        """

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
        """Add this block's gradients to `dq_acc`, `dk_acc`, `dv_acc` (fp32, shaped like q, k, v; unit last strides).

        Args:
            lse: "b h sq", of the whole row over all blocks. Rows with -inf contribute nothing.
            delta: "b h sq", `row_delta(out, dout)` of the whole row.
            out: "b sq h d" in q's dtype, the final output of the whole row: what `delta` was made of. Backends that
                compute their own delta (cuDNN) need it; ours use `delta`.
            fresh: `dk_acc` and `dv_acc` hold nothing yet: every element is written, in their dtype (fp32 or k's), 0 for keys
                that no row sees. `dq_acc` is added to all the same.

        Source: Dao 2023 (arXiv 2307.08691), algorithm 2.
        """


# name -> (module, class). In the order in which "auto" prefers them where nothing was measured.
_KERNELS = {
    "cudnn": ("longctx.kernels.cudnn", "CudnnAttention"),
    "hopper": ("longctx.kernels.hopper_attention", "HopperAttention"),
    "triton": ("longctx.kernels.triton_attention", "TritonAttention"),
    "flash4": ("longctx.kernels.flash4", "FlashAttention4"),
    "reference": ("longctx.kernels.reference", "ReferenceAttention"),
}


def kernel_names() -> tuple[str, ...]:
    """Names that `get_kernel` knows, in the order in which "auto" tries them where nothing was measured."""
    return tuple(_KERNELS)


@cache
def get_kernel(name: str) -> BlockAttention:
    """The kernel of that name.

    Raises:
        KernelError: unknown name; names the nearest.
    """
    if name not in _KERNELS:
        raise KernelError(f"unknown attention kernel {name!r}: {did_you_mean(name, ['auto', *_KERNELS])}")
    module, cls = _KERNELS[name]
    return getattr(importlib.import_module(module), cls)()


def select_kernel(
    name: str, q: torch.Tensor, key_range: KeyRange, softcap: float = 0.0, direction: Direction = "forward"
) -> BlockAttention:
    """The kernel for one block: the one named, or with "auto" what `longctx.kernels.choice` finds fastest.

    Raises:
        KernelError: the named kernel does not support the block (with its reason), or none does.
    """
    # Here: the choice knows the kernels that are registered in this module.
    from longctx.kernels.choice import choose

    return choose(name, q, key_range, softcap, direction)


def block_kind(key_range: KeyRange) -> str:
    """The kind of a key range as kernels tell them apart: its `kind`, or one of two that some kernels know and others not.

    * `causal`: the band that is `KeyRange.causal()`.
    * `rectangle`: rows of which one interval sees one and the same interval of keys and the rest nothing: what zigzag's
      hops other than the diagonal are.
    """
    if key_range.kind == "band" and (key_range.lo, key_range.hi) == (-UNBOUNDED, 1):
        return "causal"
    return "rectangle" if key_range.rectangle else key_range.kind


def check_softcap(softcap: float) -> float:
    """`softcap` as a float.

    Raises:
        KernelError: it is not a number from 0 (no cap) up.
    """
    if not (math.isfinite(softcap) and softcap >= 0):
        raise KernelError(f"softcap is {softcap}, but it must be above 0, or 0 for none")
    return float(softcap)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of the softmax state and the gradient accumulators for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_delta(out: torch.Tensor, dout: torch.Tensor) -> torch.Tensor:
    """`sum_d(out * dout)` of each row: the softmax backward's correction, once per backward.

    Args:
        out, dout: "b s h d".

    Returns:
        "b h s" contiguous, in the dtype of the softmax state.
    """
    if dout.is_cuda and dout.dtype != torch.float64:
        from longctx.kernels.merge import fused_row_delta

        return fused_row_delta(out, dout)
    dtype = state_dtype(dout.dtype)
    # einsum would round the product's inputs to a common half type; the sum over d needs fp32.
    return (out.to(dtype) * dout.to(dtype)).sum(-1).transpose(1, 2).contiguous()


def check_block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **like_q: torch.Tensor) -> dict[str, int]:
    """Check the inputs of a block at a public boundary; further tensors shaped like q may be named.

    Raises:
        ShapeError: shapes, dtypes or devices disagree; heads do not divide; a last stride is not 1.
    """
    extra = {name: (t, "b sq h d") for name, t in like_q.items()}
    axes = check_shapes(q=(q, "b sq h d"), k=(k, "b sk hk d"), v=(v, "b sk hk d"), **extra)
    if axes["h"] % axes["hk"]:
        raise ShapeError(f"q has {axes['h']} heads, not a multiple of the {axes['hk']} of k and v")
    named = {"q": q, "k": k, "v": v, **like_q}
    for what in ("dtype", "device"):
        values = {n: getattr(t, what) for n, t in named.items()}
        if len(set(values.values())) > 1:
            raise ShapeError(f"{what}s differ: {', '.join(f'{n} {x}' for n, x in values.items())}; convert them first")
    for n, t in named.items():
        if t.shape[-1] > 1 and t.stride(-1) != 1:
            raise ShapeError(f"{n} has stride {t.stride(-1)} along the head dim; it must be 1: call .contiguous()")
    return axes
