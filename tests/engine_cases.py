"""Engines over any mesh, and how far their gradients are from those of one process in float64."""

from __future__ import annotations

import gc

from train_cases import MODEL, full_step, reference_model, relative_error

from longctx.engine import EngineConfig, TrainEngine, build_engine
from longctx.model import ModelConfig
from longctx.optim import OptimConfig
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.plan import ParallelPlan
from longctx.parity import reference_backward, shard_step

STAGES = (0, 1, 2, 3)
TOLERANCE = 1e-5
OPTIM = OptimConfig(lr=1e-2, warmup_steps=1, eps=1e-6, gradient_clipping=0.5)


def make_mesh(ring: int = 1, dp: int = 1, ulysses: int = 1) -> ParallelMesh:
    # DeepSpeed collects garbage whenever it starts; what was imported is none, and looking through it takes 0.3 s.
    gc.freeze()
    return ParallelMesh.create(ParallelPlan(ring=ring, ulysses=ulysses, dp=dp), device="cpu")


def make_engine(
    mesh: ParallelMesh, *, model: ModelConfig = MODEL, optim: OptimConfig = OPTIM, total_steps: int = 3, **settings
) -> TrainEngine:
    # Every parameter is small here: without the 0, ZeRO-3 would keep all of them whole.
    settings = {"dtype": "fp32", "micro_batch_size": 2, "zero3_keep_elements": 0, "kernel": "reference"} | settings
    return build_engine(model, EngineConfig(**settings), optim, mesh, total_steps=total_steps, seed=0)


def gradient_errors(mesh: ParallelMesh, *, model: ModelConfig = MODEL, **settings) -> dict[str, float]:
    """Relative error of each parameter's gradient, and of the mean loss, against float64 on one process."""
    accumulation = settings.get("accumulation_steps", 1)
    # The last rank of the last replica has no target: a mean of means would weigh it like the others.
    last = [x for axis in (mesh.ring, mesh.ulysses) for x in (axis.size - 1, axis.size)]
    starved = (mesh.dp.size - 1, *last) if mesh.world_size > 1 else None
    full = full_step(0, dp=mesh.dp.size, accumulation=accumulation, starved=starved)
    engine = make_engine(mesh, model=model, **settings)
    loss = engine.accumulate(0, shard_step(full, mesh))
    got = engine.gradients()
    reference = reference_model(model)
    expected_loss = reference_backward(reference, full)
    errors = {name: relative_error(got.pop(name), p.grad) for name, p in reference.named_parameters()}
    assert not got, f"the engine has more parameters: {list(got)}"
    return errors | {"loss": abs(loss - expected_loss) / expected_loss}
