"""A model learns to recall what only another rank's shard says; with attention cut at the shard's edge it cannot.

Every sequence is a table of pairs, all on rank 0, then questions, all on rank 1. A pair (key, value) is one token, a
question names a key, its answer is the value that the pair of this sequence gave it. Values are drawn anew for each
sequence, so nothing but attention from rank 1 to the keys and values of rank 0 can tell the answer.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from model_cases import Batch

from longctx.layout import get_layout
from longctx.masks import AttentionMask, Causal, Documents
from longctx.model import ModelConfig, Transformer
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.plan import ParallelPlan
from longctx.sequence import SequenceMeta
from longctx.testing import run_distributed

KEYS, VALUES = 16, 8
SHARD = KEYS
LENGTH = 2 * SHARD
CHANCE = 1 / VALUES
# Tokens: the pairs, then the questions. The answers are the first VALUES ids.
# The wide start makes attention differ between keys at once: it learns in 100 steps what takes 300 from the usual 0.02.
MODEL = ModelConfig(
    vocab_size=KEYS * VALUES + KEYS, hidden_size=64, num_layers=2, num_heads=2, intermediate_size=128, init_std=0.1
)
MASKS = {"ring": Causal(), "cut": Causal() & Documents((0, SHARD, LENGTH))}
SEQUENCES, STEPS, LR = 64, 120, 5e-3


def sample(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels of whole sequences, [SEQUENCES, LENGTH]."""
    g = torch.Generator().manual_seed(seed)
    values = torch.randint(0, VALUES, (SEQUENCES, KEYS), generator=g)
    order = torch.rand(SEQUENCES, KEYS, generator=g).argsort(1)
    questions = torch.randint(0, KEYS, (SEQUENCES, SHARD), generator=g)
    pairs = order * VALUES + values.gather(1, order)
    tokens = torch.cat([pairs, KEYS * VALUES + questions], 1)
    labels = torch.cat([torch.full_like(pairs, -100), values.gather(1, questions)], 1)
    return tokens, labels


def shard(seed: int, meta: SequenceMeta) -> Batch:
    tokens, labels = sample(seed)
    return Batch(tokens[:, meta.positions], labels[:, meta.positions], meta)


def train_and_test(mesh: ParallelMesh, mask: AttentionMask) -> float:
    """Accuracy on new sequences after a short training; the same number on each rank."""
    rank = mesh.ring.rank
    meta = SequenceMeta.of(LENGTH, mask=mask, layout=get_layout("contiguous"), ring_rank=rank, ring_world=2)
    model = Transformer(MODEL, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=STEPS, pct_start=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        (model(shard(step, meta)) / (SEQUENCES * SHARD)).backward()
        # Rank 0 has no target at all: its gradients come only from the keys and values that rank 1 looked at.
        flat = torch.nn.utils.parameters_to_vector(p.grad for p in model.parameters())
        dist.all_reduce(flat, group=mesh.ring.group)
        torch.nn.utils.vector_to_parameters(flat, [p.grad for p in model.parameters()])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    right = torch.zeros(2)
    for seed in range(10**6, 10**6 + 4):
        batch = shard(seed, meta)
        with torch.no_grad():
            logits = model.hidden(batch.tokens, meta) @ model.lm_head.weight.t()
        asked = batch.labels != -100
        right += torch.tensor([(logits.argmax(-1) == batch.labels)[asked].sum(), asked.sum()])
    dist.all_reduce(right, group=mesh.ring.group)
    return (right[0] / right[1]).item()


def _worker(rank: int) -> dict[str, float]:
    mesh = ParallelMesh.create(ParallelPlan(ring=2, layout="contiguous"), device="cpu")
    return {name: train_and_test(mesh, mask) for name, mask in MASKS.items()}


def test_a_ring_recalls_what_another_rank_holds():
    accuracy, other = run_distributed(_worker, world=2, timeout_s=300)
    print(
        f"recall: with the ring {accuracy['ring']:.1%}, cut at the shard's edge {accuracy['cut']:.1%}, chance {CHANCE:.1%}"
    )
    assert accuracy == other
    assert accuracy["ring"] > 0.95
    assert accuracy["cut"] < CHANCE + 0.05
