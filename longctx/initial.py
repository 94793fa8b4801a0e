"""What each parameter starts from: decided by its name and the seed, so the same at every plan."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from longctx.parallel.slices import slice_of

if TYPE_CHECKING:
    from longctx.model import ModelConfig


@torch.no_grad()
def init_parameter(name: str, parameter: nn.Parameter, config: ModelConfig, seed: int) -> None:
    """The initial value of a parameter: norms 1, biases 0, the rest normal.

    One that is cut over the tp ranks becomes its part of what one process starts with; memory holds the whole of it meanwhile.

    Args:
        name: in the `Transformer` of one process.
    """
    if parameter.is_meta:
        return
    if name.endswith("norm.weight"):
        parameter.fill_(1.0)
    elif name.endswith(".bias"):
        parameter.zero_()
    else:
        residual_std = config.init_std / math.sqrt(2 * config.num_layers)
        digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
        # On the CPU wherever the parameter is: other devices draw other numbers from the same seed.
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        part = slice_of(name, parameter)
        whole = torch.empty(part.full_shape, dtype=parameter.dtype)
        whole.normal_(0.0, residual_std if is_residual else config.init_std, generator=generator)
        parameter.copy_(whole if part.dim is None else part.take(whole))
