"""bf16 training adds up the gradients of a step's micro-batches in fp32, wherever they are added."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from engine_cases import OPTIM, make_mesh
from plan_cases import WIDE
from train_cases import full_step, relative_error

from longctx import engine as engine_module
from longctx.data import ShardedBatch
from longctx.engine import EngineConfig, build_engine
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.plan import ParallelPlan
from longctx.parity import shard_step
from longctx.testing import run_distributed

# A power of two, so that dividing by it rounds nothing. After so many additions a bf16 sum has lost its last bits.
MICRO_BATCHES = 8
# name -> (degrees, ZeRO stages)
PLANS = {
    "dp2": ({"dp": 2}, (1, 2, 3)),
    "pp2": ({"pp": 2}, (1,)),
    "pp2-dualpipev": ({"pp": 2, "schedule": "dualpipev"}, (1,)),
    "tp2": ({"tp": 2}, (1, 3)),
}
# Names of worlds in which DeepSpeed is told the same of its processes.
WORLDS = (("dp2",), ("pp2", "pp2-dualpipev"), ("tp2",))


def gradients(mesh: ParallelMesh, stage: int, count: int) -> dict[str, torch.Tensor]:
    """The gradients of `count` micro-batches that are all the same one: those of one, whatever the count."""
    settings = EngineConfig(
        zero_stage=stage,
        dtype="bf16",
        micro_batch_size=2,
        accumulation_steps=count,
        kernel="reference",
        zero3_keep_elements=0,
    )
    model = replace(WIDE, num_layers=max(2, mesh.plan.num_stages), tie_embeddings=True)
    engine = build_engine(model, settings, OPTIM, mesh, total_steps=1)
    (one,) = shard_step(full_step(0, dp=mesh.dp.size, accumulation=1), mesh)
    batch: ShardedBatch = replace(one, num_target_tokens=one.num_target_tokens * count)
    engine.accumulate(0, [batch] * count)
    return engine.gradients()


def worst(mesh: ParallelMesh, stage: int) -> float:
    fewest = mesh.plan.num_stages
    few, many = (gradients(mesh, stage, count) for count in (fewest, MICRO_BATCHES))
    return max(relative_error(many[name], few[name]) for name in few)


def summed(rank: int, names: tuple[str, ...]) -> dict[str, float]:
    """The worst relative difference of a gradient; for the first plan also where DeepSpeed was not told of fp32."""
    found = {}
    for name in names:
        degrees, stages = PLANS[name]
        plan = ParallelPlan(**{"dp": 1} | degrees)
        mesh = ParallelMesh.create(plan, device="cpu")
        for stage in stages:
            found[f"{name}-zero{stage}"] = worst(mesh, stage)
    right = engine_module.deepspeed_config

    def in_bf16(*args, **settings):
        return right(*args, **settings) | {"data_types": {"grad_accum_dtype": "bf16"}}

    if names == WORLDS[0]:
        mesh = make_mesh(dp=2)
        with mock.patch.object(engine_module, "deepspeed_config", in_bf16):
            found["broken-zero2"] = worst(mesh, 2)
    return found


@pytest.mark.parametrize("names", WORLDS, ids="-".join)
def test_many_micro_batches_add_up_as_exactly_as_one(names):
    found = run_distributed(summed, names, world=2, timeout_s=240)[0]
    broken = {name: found.pop(name) for name in list(found) if name.startswith("broken")}
    assert len(found) == sum(len(PLANS[name][1]) for name in names)
    assert {name: error for name, error in found.items() if not error < 1e-5} == {}
    assert {name: error for name, error in broken.items() if not error > 1e-3} == {}
    assert bool(broken) == (names == WORLDS[0])
