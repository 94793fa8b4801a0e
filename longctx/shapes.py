"""Shape checks in einops notation, the label that is no target, and the shape of a model as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longctx.errors import Problem, ShapeError, format_problems

# Labels with this value are no targets, as in torch's cross entropy and Hugging Face's models.
NO_TARGET = -100


def check_shapes(**specs: tuple[torch.Tensor, str]) -> dict[str, int]:
    """Check that tensors agree with their einops-like shapes and with each other.

    Args:
        specs: name = (tensor, "b sq h d"). An axis is a name, bound by the first tensor that
            uses it, or a number.

    Returns:
        The size of each named axis.

    Raises:
        ShapeError: naming every tensor and axis that disagree.

    Example:
        >>> axes = check_shapes(q=(q, "b sq h d"), k=(k, "b sk hk d"))
        >>> axes["h"]
    """
    sizes: dict[str, int] = {}
    first: dict[str, str] = {}
    problems = []
    for name, (tensor, spec) in specs.items():
        axes = spec.split()
        shape = tuple(tensor.shape)
        if len(axes) != len(shape):
            problems.append(Problem(f"{name} has shape {list(shape)}, expected {len(axes)} axes: {spec!r}"))
            continue
        for axis, size in zip(axes, shape, strict=True):
            if axis.isdigit():
                if int(axis) != size:
                    problems.append(Problem(f"{name} has shape {list(shape)}, expected {axis} where it has {size}"))
            elif sizes.setdefault(axis, size) != size:
                problems.append(Problem(f"axis {axis!r} is {sizes[axis]} in {first[axis]} but {size} in {name}"))
            first.setdefault(axis, name)
    if problems:
        got = ", ".join(f"{n} {list(t.shape)}" for n, (t, _) in specs.items())
        raise ShapeError(format_problems(f"the shapes of {got}", problems))
    return sizes


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The numbers of a decoder-only transformer that planning and FLOP counts need.

    `num_params` counts every parameter once (a tied head is not counted twice).
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    num_params: int

    def train_flops(self, tokens: int, mask_area: int) -> int:
        """FLOPs of one forward and backward pass, without recomputation.

        Args:
            tokens: tokens in the batch.
            mask_area: visible (query, key) pairs, summed over the sequences of the batch.

        6 per parameter and token, and 12 per pair, head and head dimension for each layer (forward 4, backward 8).
        With `mask_area = S * S / 2` this is the usual 6 * N * S + 6 * layers * heads * head_dim * S^2.

        Source: Kaplan et al. 2020 (arXiv 2001.08361), section 2.1; Dao 2023 (arXiv 2307.08691), section 4.1.
        """
        attention = 12 * self.num_layers * self.num_heads * self.head_dim * mask_area
        return 6 * self.num_params * tokens + attention
