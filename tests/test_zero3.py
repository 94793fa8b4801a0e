"""ZeRO-3: no process ever holds the whole model, gathers run ahead of the work, and all processes send alike."""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
from engine_cases import OPTIM, make_mesh
from plan_cases import WIDE
from torch import nn
from train_cases import full_step

from longctx import engine as engine_module
from longctx.engine import EngineConfig, TrainEngine, build_engine
from longctx.model import DecoderLayer, Transformer
from longctx.parallel.mesh import ParallelMesh
from longctx.parity import shard_step
from longctx.testing import run_distributed

LAYERS = 5
MODEL = replace(WIDE, num_layers=LAYERS)


def make_engine(mesh: ParallelMesh, **settings: Any) -> TrainEngine:
    config = EngineConfig(zero_stage=3, micro_batch_size=2, kernel="reference", zero3_keep_elements=0, **settings)
    return build_engine(MODEL, config, OPTIM, mesh, total_steps=9)


def elements() -> int:
    """Of all parameters that this process holds whole at the moment."""
    return sum(p.numel() for p in gc.get_objects() if isinstance(p, nn.Parameter))


# ---- the start


def start(rank: int) -> dict[str, int]:
    """The most elements of parameters that this process held while an engine was made, and those of the whole model."""
    mesh = make_mesh(dp=2)
    most, partition = 0, engine_module.partition

    def watched(*args: Any) -> None:
        nonlocal most
        most = max(most, elements())
        partition(*args)

    with mock.patch.object(engine_module, "partition", watched):
        engine = make_engine(mesh)
    found = {"most": most, "after": elements()}
    del engine
    whole: Any = Transformer(MODEL, kernel="reference")
    sizes = {"whole": elements(), "layer": sum(p.numel() for p in whole.model.layers[0].parameters())}
    return found | sizes | {"largest": max(p.numel() for p in whole.parameters())}


def test_no_process_holds_the_whole_model_at_the_start():
    for found in run_distributed(start, world=2):
        # A layer, or an embedding, and what of a part is made before it is given away.
        assert found["most"] <= found["layer"] + found["largest"]
        assert found["most"] < 0.5 * found["whole"]
        assert found["after"] == 0


# ---- gathers


def timeline(rank: int, recompute: bool) -> list[list[tuple[str, int]]]:
    """For each of some steps, forward: when the gather of a layer's first matrix was begun, and when a layer computed."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    mesh = make_mesh(dp=2)
    engine = make_engine(mesh, activation_checkpointing=recompute)
    layers: Any = engine.ds.module.model.layers
    of_layer = {id(layer.self_attn.q_proj.weight): i for i, layer in enumerate(layers)}
    number = {id(layer): i for i, layer in enumerate(layers)}
    events: list[tuple[str, int]] = []
    name = "_PartitionedParameterCoordinator__all_gather_params"
    gather, forward = getattr(PartitionedParameterCoordinator, name), DecoderLayer.forward

    def gathering(self: Any, params: Any, forward: bool) -> Any:
        events.extend(("gather", of_layer[id(p)]) for p in params if id(p) in of_layer)
        return gather(self, params, forward)

    def computing(self: Any, *args: Any, **settings: Any) -> Any:
        result = forward(self, *args, **settings)
        events.append(("computed", number[id(self)]))
        return result

    told = []
    with (
        mock.patch.object(PartitionedParameterCoordinator, name, gathering),
        mock.patch.object(DecoderLayer, "forward", computing),
    ):
        for step in range(4):
            engine.train_step(step, shard_step(full_step(step, dp=2, accumulation=1), mesh))
            told.append(list(events))
            events.clear()
    return told


def runs_ahead(events: list[tuple[str, int]]) -> list[bool]:
    """For each layer but the first: whether its gather had begun before the layer below it was done."""
    first = {event: i for i, event in reversed(list(enumerate(events)))}
    return [first["gather", i] < first["computed", i - 1] for i in range(1, LAYERS)]


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
def test_gathers_run_ahead_of_the_layers(recompute):
    for of_rank in run_distributed(timeline, recompute, world=2):
        # In the first step nothing is known of the order of the modules, and each waits for its own.
        assert runs_ahead(of_rank[0]) == [False] * (LAYERS - 1)
        assert runs_ahead(of_rank[-1]) == [True] * (LAYERS - 1)


# ---- messages


def messages(rank: int) -> Counter[str]:
    """How often this process called each collective in a step in which it has other documents, and maybe no target."""
    from deepspeed.comm.torch import TorchBackend

    mesh = make_mesh(ring=3)
    engine = make_engine(mesh, accumulation_steps=2)
    counts: Counter[str] = Counter()

    def counted(name: str) -> Any:
        right = getattr(TorchBackend, name)

        def call(*args: Any, **settings: Any) -> Any:
            counts[name] += 1
            return right(*args, **settings)

        return call

    names = [n for n in vars(TorchBackend) if n.startswith(("all_", "reduce", "broadcast"))]
    patched = {name: counted(name) for name in names if callable(getattr(TorchBackend, name))}
    with mock.patch.multiple(TorchBackend, **patched):
        for step in range(3):
            full = full_step(step, dp=1, accumulation=2, starved=(0, 1, 3))
            engine.train_step(step, shard_step(full, mesh))
    return counts


def test_every_process_sends_as_often_as_the_others():
    first, *others = run_distributed(messages, world=3)
    assert sum(first.values()) > 3 * 2 * LAYERS, first
    assert others == [first, first]
