"""The optimizer's settings, its learning rate, and which parameters decay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from longctx.errors import Problem


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with a linear warm-up and a cosine decay.

    Args:
        lr: the highest learning rate.
        min_lr_ratio: the last learning rate, as a part of `lr`.
        warmup_steps: steps over which the rate rises linearly to `lr`.
        betas, eps: of AdamW.
        weight_decay: decoupled, of matrices only; norms, biases and embedding tables have none.
        gradient_clipping: largest norm of the whole gradient; 0 switches it off.
    """

    lr: float = 3e-4
    min_lr_ratio: float = 0.1
    warmup_steps: int = 100
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    gradient_clipping: float = 1.0

    def problems(self) -> list[Problem]:
        """What is wrong with these settings."""
        found = []
        for name in ("lr", "min_lr_ratio", "eps", "weight_decay", "gradient_clipping"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                found.append(Problem(f"optim.{name} = {value}: it must be a finite number, 0 or more"))
        if self.min_lr_ratio > 1:
            found.append(
                Problem(f"optim.min_lr_ratio = {self.min_lr_ratio} is above 1", "it is a part of lr, such as 0.1")
            )
        if self.warmup_steps < 0:
            found.append(Problem(f"optim.warmup_steps = {self.warmup_steps}: it must be 0 or more"))
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            found.append(
                Problem(f"optim.betas = {list(self.betas)}: two numbers in [0, 1) are needed", "try [0.9, 0.95]")
            )
        return found


def lr_at(step: int, optim: OptimConfig, total_steps: int) -> float:
    """The learning rate of `step` (from 0): linear warm-up to `lr`, then a cosine that ends at `lr * min_lr_ratio`.

    The last step, `total_steps - 1`, and any after it have the lowest rate. Step 0 of a warm-up has `lr / warmup_steps`.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    decay_steps = max(1, total_steps - 1 - optim.warmup_steps)
    progress = min(1.0, (step - optim.warmup_steps) / decay_steps)
    low = optim.lr * optim.min_lr_ratio
    return low + (optim.lr - low) * (1 + math.cos(math.pi * progress)) / 2


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters in optimizer groups: matrices with weight decay; norms, biases, sinks and embedding tables without.

    A tied embedding counts as an embedding. Each parameter is in one group; empty groups are left out.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            # ZeRO-3 empties parameters and notes their shapes.
            is_vector = len(getattr(parameter, "ds_shape", parameter.shape)) < 2
            (rest if is_vector or id(parameter) in tables else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
