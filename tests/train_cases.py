"""A tiny model, uneven packed batches for any mesh, and the same steps taken by plain torch on one process."""

from __future__ import annotations

import torch

from longctx.data import ShardedBatch
from longctx.masks import Causal, Documents
from longctx.model import ModelConfig, Transformer
from longctx.optim import OptimConfig, lr_at
from longctx.parity import reference_backward
from longctx.sequence import SequenceMeta

# 48 divides for zigzag over 1, 2, 3 and 4 ranks; 3 layers of GQA would tell no more than 2.
SEQ_LEN = 48
ROWS = 2  # sequences of a micro-batch
# The large start makes every parameter's gradient one that rounding does not hide.
MODEL = ModelConfig(
    vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48, init_std=0.2
)
# Documents that end inside every rank's shard, on its edges, and after one token; each row of a micro-batch its own.
BOUNDARIES = (((0, 6, 7, 29, 48), (0, 12, 24, 48)), ((0, 48), (0, 1, 17, 40, 48)))


def full_step(
    step: int, *, dp: int, accumulation: int, starved: tuple[int, ...] | None = None, seq_len: int = SEQ_LEN
) -> list[list[ShardedBatch]]:
    """The micro-batches of an optimizer step on whole sequences: [accumulation][dp].

    Targets are uneven everywhere: about 30 % are left out at random, the last micro-batch keeps only a few.

    Args:
        starved: (dp rank, ring rank, ring world) that holds no target at all; with Ulysses, its rank and world too.
        seq_len: between 41 and 48.
    """
    generator = torch.Generator().manual_seed(1000 + step)
    shape = (accumulation, dp, ROWS, seq_len)
    tokens = torch.randint(0, MODEL.vocab_size, shape, generator=generator)
    labels = torch.randint(0, MODEL.vocab_size, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.3] = -100
    if accumulation > 1:
        labels[-1, :, :, 7:] = -100
    if starved is not None:
        places = ("ring_rank", "ring_world", "ulysses_rank", "ulysses_world")
        meta = SequenceMeta.of(seq_len, **dict(zip(places, starved[1:], strict=False)))
        labels[:, starved[0], :, meta.positions[meta.positions < seq_len]] = -100
    targets = int((labels != -100).sum())
    boundaries = [tuple((*of_row[:-1], seq_len) for of_row in rows) for rows in BOUNDARIES]
    return [
        [
            ShardedBatch(
                tokens[m, d],
                labels[m, d],
                SequenceMeta.of(seq_len, mask=Documents(boundaries[(m + d) % 2]) & Causal()),
                targets,
                cursor=step * accumulation * dp * ROWS,
            )
            for d in range(dp)
        ]
        for m in range(accumulation)
    ]


def reference_model(config: ModelConfig = MODEL, dtype: torch.dtype = torch.float64) -> Transformer:
    """The same weights as every engine's model in these tests starts from, without any mesh."""
    return Transformer(config, kernel="reference", seed=0).to(dtype)


class ReferenceTrainer:
    """AdamW, clipping and the learning rate by plain torch, in float64."""

    def __init__(self, optim: OptimConfig, total_steps: int, config: ModelConfig = MODEL) -> None:
        self.model = reference_model(config)
        self.optim, self.total_steps = optim, total_steps
        names = dict(self.model.named_parameters())
        plain = [p for n, p in names.items() if "norm" in n or "embed" in n or n.endswith(("bias", "sinks"))]
        decayed = [p for p in names.values() if not any(p is q for q in plain)]
        self.adamw = torch.optim.AdamW(
            [{"params": decayed}, {"params": plain, "weight_decay": 0.0}],
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
        )

    def step(self, step: int, full: list[list[ShardedBatch]]) -> tuple[float, float]:
        """(mean loss, gradient norm before clipping)."""
        loss = reference_backward(self.model, full)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.optim.gradient_clipping)
        for group in self.adamw.param_groups:
            group["lr"] = lr_at(step, self.optim, self.total_steps)
        self.adamw.step()
        self.adamw.zero_grad()
        return loss, float(norm)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """|got - expected| / |expected|, in float64."""
    expected = expected.double()
    return float((got.double() - expected).norm() / expected.norm())
