"""Element-wise operations of a transformer: liger-kernel's Triton versions on CUDA, plain torch elsewhere.

Not ours, and not worth being ours: they are bound by memory, and liger's are near that bound. This module decides which
are used, says why once, and keeps both behind one signature.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F

from longctx.errors import ConfigError, did_you_mean

log = logging.getLogger(__name__)

Fused = Literal["auto", "on", "off"]
FUSED = ("auto", "on", "off")

# The signatures used here (RoPE's rotary_dim, the cross-entropy kernel's arguments) are those of this series.
LIGER_SERIES = (0, 8)
LIGER_FIRST = (0, 8, 5)
INSTALL_LIGER = "pip install --no-deps 'liger-kernel>=0.8.5,<0.9'   (the extra longctx[gpu])"
_LIGER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_fused(fused: str) -> None:
    """Refuse an unknown setting, and `"on"` where liger-kernel cannot be imported.

    Raises:
        ConfigError: names the setting that is near, or the extra to install.
    """
    if fused not in FUSED:
        raise ConfigError(f"fused = {fused!r} is not a setting: {did_you_mean(fused, FUSED)}")
    if fused == "on" and (reason := liger_missing()) is not None:
        raise ConfigError(f"fused = 'on', but {reason}\n       install it: {INSTALL_LIGER}; or take fused = 'auto'")


@cache
def liger_missing() -> str | None:
    """None if a liger-kernel that this code knows is installed, else the reason."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    version = importlib.metadata.version("liger-kernel")
    digits = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    if digits[:2] != LIGER_SERIES or digits < LIGER_FIRST:
        return f"liger-kernel {version} is installed, and this code is written for 0.8.5 and later 0.8 versions"
    return None


def use_liger(fused: str, x: torch.Tensor) -> bool:
    """Whether the operation on `x` is liger's. The choice is logged once for each device type and dtype.

    Raises:
        ConfigError: `fused` is "on", and liger cannot do it.
    """
    return _use_liger(fused, x.device.type, x.dtype)


@cache
def _use_liger(fused: str, device_type: str, dtype: torch.dtype) -> bool:
    check_fused(fused)
    where = f"fused operations on {device_type} in {dtype}"
    if fused == "off":
        log.info("%s: plain torch (fused = 'off')", where)
        return False
    reason = liger_missing()
    if device_type != "cuda":
        reason = f"liger-kernel runs on cuda, these tensors are on {device_type}"
    elif dtype not in _LIGER_DTYPES:
        reason = f"liger-kernel has no {dtype}"
    if reason is None:
        log.info("%s: liger-kernel", where)
        return True
    if fused == "on":
        raise ConfigError(f"liger-kernel was asked for, but {reason}\n       take 'auto', or plain torch")
    log.info("%s: plain torch (%s)", where, reason)
    return False


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, fused: Fused = "auto") -> torch.Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` over the last axis; the mean and the root in fp32 (fp64 for fp64).

    Args:
        x: "... e".
        weight: "e".

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467).
    """
    if use_liger(fused, x):
        from liger_kernel.ops import LigerRMSNormFunction

        # In place on the incoming gradient, which nobody else holds: a norm feeds projections or RoPE, never the residual.
        return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", True, None)
    return F.rms_norm(x, weight.shape, weight, eps)


def silu_mul(gate: torch.Tensor, up: torch.Tensor, *, fused: Fused = "auto") -> torch.Tensor:
    """`silu(gate) * up`, the gate of SwiGLU; both "... f".

    Source: Shazeer 2020 (arXiv 2002.05202).
    """
    if use_liger(fused, gate):
        from liger_kernel.ops import LigerSiLUMulFunction

        return LigerSiLUMulFunction.apply(gate, up)
    return F.silu(gate) * up


def rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, fused: Fused = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the pairs (i, i + d/2) of each head, in the dtype of `cos`; results in the dtypes of q and k.

    With liger, contiguous q and k are rotated in place: pass what nobody else reads, such as a projection's output.

    Args:
        q: "b s h d". k: "b s hk d".
        cos, sin: "s d/2".

    Source: Su et al. 2021 (arXiv 2104.09864); the half-split pairing is that of Hugging Face's models.
    """
    if use_liger(fused, q):
        from liger_kernel.ops import LigerRopeFunction

        # liger wants the shape "b h s d", but the memory "b s h d": a transposed view is what it unpacks for nothing.
        q_out, k_out = LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin, None, 1, q.shape[-1])
        return q_out.transpose(1, 2), k_out.transpose(1, 2)
    return _rotate_plain(q, cos, sin), _rotate_plain(k, cos, sin)


def _rotate_plain(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]  # s d/2 -> s 1 d/2
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
