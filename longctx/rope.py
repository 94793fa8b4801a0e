"""Rotary position embedding from explicit positions, and the ways to stretch it to longer contexts."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

import torch

from longctx.errors import Problem, ShapeError, did_you_mean
from longctx.kernels.fused import Fused, rotate
from longctx.shapes import check_shapes

KINDS = ("linear", "ntk", "yarn", "llama3")
# Which of the optional settings each kind reads; a setting of another kind is refused, not ignored.
_USED = {
    "linear": (),
    "ntk": (),
    "yarn": ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"),
    "llama3": ("low_freq_factor", "high_freq_factor"),
}


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the frequencies of RoPE are changed so that a model sees further than it was trained to.

    * `linear`: every frequency divided by `factor` (position interpolation).
    * `ntk`: the base raised to `theta * factor^(d / (d - 2))`: the lowest frequency is divided by `factor`, the highest stays.
    * `yarn`: frequencies that turn more than `beta_fast` times within the original length stay, those that turn less than
      `beta_slow` times are divided by `factor`, a linear ramp between; cos and sin are multiplied by the attention factor.
    * `llama3`: wavelengths below `original_max_position / high_freq_factor` stay, those above
      `original_max_position / low_freq_factor` are stretched by `factor`, a smooth change between.

    Args:
        factor: how many times longer, >= 1.
        original_max_position: length in tokens that the model was trained on. `linear` and `ntk` do not depend on it.
        attention_factor: yarn's factor on cos and sin; None: `0.1 * ln(factor) + 1`, or from the two mscales.
        mscale, mscale_all_dim: yarn: the attention factor is (0.1 * mscale * ln(factor) + 1) over the same of
            mscale_all_dim (DeepSeek's form). Both or neither.
        truncate: yarn: the ends of the ramp are rounded outwards to whole dimensions.

    Source: Chen et al. 2023 (arXiv 2306.15595) linear; Peng et al. 2023 (arXiv 2309.00071) ntk (section 3.1) and yarn;
        Llama 3 (arXiv 2407.21783). Equal to the functions of the same names in transformers.
    """

    kind: Literal["linear", "ntk", "yarn", "llama3"]
    factor: float
    original_max_position: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def problems(self) -> list[Problem]:
        """What is wrong with these settings; empty if nothing."""
        if self.kind not in KINDS:
            return [Problem(f"rope_scaling.kind = {self.kind!r} is not known", did_you_mean(str(self.kind), KINDS))]
        found = []
        if not self.factor >= 1 or math.isinf(self.factor):
            found.append(
                Problem(f"rope_scaling.factor = {self.factor} must be a finite number >= 1", "1 changes nothing")
            )
        if self.original_max_position < 1:
            found.append(
                Problem(
                    f"rope_scaling.original_max_position = {self.original_max_position} must be >= 1",
                    "it is the length in tokens that the model was trained on, e.g. 8192",
                )
            )
        for field in fields(self):
            optional = field.name not in ("kind", "factor", "original_max_position")
            if optional and field.name not in _USED[self.kind] and getattr(self, field.name) != field.default:
                users = [kind for kind in KINDS if field.name in _USED[kind]]
                found.append(
                    Problem(
                        f"rope_scaling.{field.name} = {getattr(self, field.name)} has no effect with kind {self.kind!r}",
                        f"remove it, or take kind {' or '.join(map(repr, users))}",
                    )
                )
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            found.append(
                Problem(
                    f"rope_scaling: low_freq_factor {self.low_freq_factor} and high_freq_factor {self.high_freq_factor} "
                    "must be 0 < low < high",
                    "Llama 3 uses 1 and 4",
                )
            )
        if not 0 < self.beta_slow < self.beta_fast:
            found.append(
                Problem(
                    f"rope_scaling: beta_slow {self.beta_slow} and beta_fast {self.beta_fast} must be 0 < slow < fast",
                    "YaRN uses 1 and 32",
                )
            )
        if (self.mscale is None) != (self.mscale_all_dim is None):
            found.append(Problem("rope_scaling: mscale and mscale_all_dim are given together or not at all"))
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                found.append(Problem(f"rope_scaling.{name} = {value} must be > 0"))
        return found


def rope_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None, *, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, float]:
    """Angle per position of each pair of a head, and the factor on cos and sin.

    Returns:
        inv_freq: float64 [head_dim / 2], radians per position, on `device`.
        attention_factor: 1.0 but for yarn.

    Raises:
        ShapeError: an odd `head_dim` has no pairs.
    """
    if head_dim < 2 or head_dim % 2:
        raise ShapeError(f"head_dim = {head_dim}: RoPE turns pairs, it must be even and at least 2")
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    if scaling is not None and scaling.kind == "ntk" and head_dim > 2:
        theta = theta * scaling.factor ** (head_dim / (head_dim - 2))
    inv_freq = theta**-exponent
    if scaling is None or scaling.kind == "ntk":
        return inv_freq, 1.0
    if scaling.kind == "linear":
        return inv_freq / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(inv_freq, scaling), 1.0
    assert scaling.kind == "yarn", f"unchecked kind {scaling.kind!r}"
    kept = 1 - _yarn_ramp(head_dim, theta, scaling, device)
    return inv_freq / scaling.factor * (1 - kept) + inv_freq * kept, _yarn_attention_factor(scaling)


def rope_cos_sin(
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    *,
    attention_factor: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every position, once per forward for all layers.

    The angles are taken in float64: float32 angles are wrong by up to 0.06 rad at position 10^6.

    Args:
        positions: int [s], global positions of the local tokens, in any order.
        inv_freq: float64 [d/2], of `rope_frequencies`, on the device of `positions`.

    Returns:
        cos, sin: "s d/2" in `dtype`, on the device of `positions`. Empty for no positions.
    """
    check_shapes(positions=(positions, "s"), inv_freq=(inv_freq, "half"))
    # Written into results of the final dtype in pieces: the float64 angles of 10^6 positions would be 0.5 GB a copy.
    shape = (positions.shape[0], inv_freq.shape[0])
    cos, sin = (torch.empty(shape, dtype=dtype, device=positions.device) for _ in range(2))
    for start in range(0, shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        angles = positions[rows, None].double() * inv_freq
        cos[rows] = angles.cos() * attention_factor
        sin[rows] = angles.sin() * attention_factor
    return cos, sin


def apply_rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, fused: Fused = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn the queries and keys to their positions.

    The pairs are (i, i + d/2), Hugging Face's convention. Computed in the dtype of cos and sin, returned in the inputs'. On
    CUDA with liger-kernel, contiguous q and k are overwritten.

    Args:
        q: "b s h d". k: "b s hk d".
        cos, sin: "s d/2", of `rope_cos_sin`.
        fused: "auto", "on" or "off": see `longctx.kernels.fused`.

    Raises:
        ShapeError: the shapes disagree.
    """
    axes = check_shapes(q=(q, "b s h d"), k=(k, "b s hk d"), cos=(cos, "s half"), sin=(sin, "s half"))
    if 2 * axes["half"] != axes["d"]:
        raise ShapeError(f"cos has {axes['half']} columns, but heads of {axes['d']} have {axes['d'] / 2:g} pairs")
    return rotate(q, k, cos, sin, fused=fused)


_ROWS = 1 << 16


def _llama3(inv_freq: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    turns = scaling.original_max_position * inv_freq / (2 * math.pi)
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * inv_freq / scaling.factor + smooth * inv_freq


def _yarn_ramp(head_dim: int, theta: float, scaling: RopeScaling, device: torch.device | str) -> torch.Tensor:
    """0 for the pairs that keep their frequency, 1 for those that are interpolated: float64 [head_dim / 2]."""

    def pair_with(turns: float) -> float:
        return head_dim * math.log(scaling.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_with(scaling.beta_fast), pair_with(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    # A ramp of no width would divide by zero; a thousandth of a pair is a step.
    width = max(high - low, 0.001)
    return ((torch.arange(head_dim // 2, dtype=torch.float64, device=device) - low) / width).clamp(0, 1)


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale is not None and scaling.mscale_all_dim is not None:
        return mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)
    return mscale(1.0)
