"""A small model and batch, and what the processes of the model's tests do. Without transformers: they start faster."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longctx.layout import get_layout
from longctx.masks import AttentionMask, Causal, Documents
from longctx.model import ModelConfig, Transformer
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.plan import ParallelPlan
from longctx.parallel.strategy import KEPT_OPERATORS, ContextStrategy
from longctx.sequence import SequenceMeta

VOCAB, LENGTH = 61, 24
SIZES = dict(vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=56)
# Each sequence its own documents: one of a single token, one of none.
DOCUMENTS = Documents(((0, 7, 8, LENGTH), (0, 0, 13, LENGTH)))


@dataclass(frozen=True)
class Batch:
    tokens: torch.Tensor
    labels: torch.Tensor
    meta: SequenceMeta


def make_batch(
    mask: AttentionMask,
    *,
    length: int = LENGTH,
    vocab: int = VOCAB,
    rank: int = 0,
    world: int = 1,
    layout: str = "zigzag",
) -> Batch:
    """Two sequences with ragged labels; of a ring, this rank's shard of them."""
    g = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, vocab, (2, length), generator=g)
    labels = torch.where(
        torch.rand(2, length, generator=g) < 0.2, -100, torch.randint(0, vocab, (2, length), generator=g)
    )
    meta = SequenceMeta.of(length, mask=mask, layout=get_layout(layout), ring_rank=rank, ring_world=world)
    return Batch(tokens[:, meta.positions], labels[:, meta.positions], meta)


def error(x: torch.Tensor, exact: torch.Tensor) -> float:
    return ((x.double() - exact.double()).norm() / exact.double().norm()).item()


class CountOps(TorchDispatchMode):
    """How often any of some operators really runs. What activation checkpointing has kept does not come here again."""

    def __init__(self, *ops):
        super().__init__()
        self.ops = ops
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func in self.ops
        return func(*args, **(kwargs or {}))


def gradients(model: Transformer, batch: Batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(batch)
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters()}}


def ring_worker(
    rank: int, config: ModelConfig, layouts: list[str], strategies: list[str | ContextStrategy], world: int
) -> list[dict]:
    results = []
    for layout, strategy in itertools.product(layouts, strategies):
        plan = ParallelPlan(ring=world, layout=layout, strategy=getattr(strategy, "name", strategy))
        mesh = ParallelMesh.create(plan, device="cpu")
        batch = make_batch(DOCUMENTS & Causal(), rank=rank, world=world, layout=layout)
        traffic, own = [], {}
        for recompute, offload in ((False, False), (True, False), (True, True)):
            settings = {"activation_checkpointing": recompute, "activation_offload": offload}
            model = Transformer(config, mesh=mesh, **settings).double()
            for layer in model.model.layers:
                layer.self_attn.attention.strategy = strategy
            before = mesh.exchange.bytes_sent
            with CountOps(*KEPT_OPERATORS) as attention:
                grads = gradients(model, batch)
            traffic.append((mesh.exchange.bytes_sent - before, attention.calls))
            if offload:
                assert all(torch.equal(grads[name], value) for name, value in own.items())
                assert model.offload.pages.made >= 3 * config.num_layers
                assert model.offload.host_bytes == 0
            own = {name: value.clone() for name, value in grads.items()}
            for value in grads.values():
                torch.distributed.all_reduce(value)
            results.append(grads)
        assert traffic == traffic[:1] * 3, f"recomputation or offload changed (bytes, calls): {traffic}"
        assert traffic[0][0] > 0
        assert traffic[0][1] == config.num_layers
    return results if rank == 0 else []


def zero3_worker(rank: int, configs: list[ModelConfig]) -> list[dict]:
    warnings.simplefilter("ignore")
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    results = []
    for config in configs:
        model = Transformer(config, activation_checkpointing=True, activation_offload=config.tie_embeddings)
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 2,
            # 0: not even a norm's weight stays on every rank.
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
        }
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        whole = make_batch(Causal())
        mine = Batch(whole.tokens[rank : rank + 1], whole.labels[rank : rank + 1], whole.meta)
        for last in (False, True):
            # DeepSpeed divides by 2 accumulation steps and averages over 2 ranks.
            loss = engine(mine) * (2 * (0.75 if last else 0.25) * 2)
            engine.backward(loss)
            if not last:
                engine.step()
        results.append({name: safe_get_full_grad(p) for name, p in engine.module.named_parameters()})
    return results if rank == 0 else []
