"""What goes wrong in stages and shared matrices when one piece of their wiring is missing, and that it is seen."""

from __future__ import annotations

from dataclasses import asdict, replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from plan_cases import OPTIM, TOLERANCE, WIDE, PlanCase, errors, make_mesh
from train_cases import SEQ_LEN, full_step

from longctx.engine import EngineConfig, TrainEngine, build_engine
from longctx.model import Transformer
from longctx.parallel.journal import Journal
from longctx.parallel.slices import parameter_slices
from longctx.parallel.tensor import TensorParallel
from longctx.parallel.tensor_exchange import TensorExchange
from longctx.parity import shard_step
from longctx.testing import run_distributed


def worst(case: PlanCase) -> tuple[str, float]:
    return next(iter(errors(case).items()), ("", 0.0))


# ---- stages


def broken_stages(rank: int) -> dict[str, tuple[str, float]]:
    from deepspeed.runtime.pipe.engine import schedule

    from longctx import pipeline

    case = PlanCase(pp=2, zero=0, accumulation=2, tied=True, steps=2)
    found = {"right": worst(case)}
    feed, commands_of = pipeline.PipelineTransformer.feed, pipeline._WithoutStep.__iter__

    def other_micro_batch(self, batches):
        # Its documents differ, its tokens do not matter there.
        feed(self, batches if self.stage_id == 0 else [*batches[1:], batches[0]])

    def without_tied_sums(self):
        for commands in commands_of(self):
            yield [command for command in commands if not isinstance(command, schedule.ReduceTiedGrads)]

    with mock.patch.object(pipeline.PipelineTransformer, "feed", other_micro_batch):
        found["metadata of another micro-batch"] = worst(case)
    with mock.patch.object(pipeline._WithoutStep, "__iter__", without_tied_sums):
        found["tied gradients are not added"] = worst(case)
    with mock.patch.object(
        TrainEngine, "_total_norm", lambda self: self._square_norm([*self.ds.module.parameters()]).sqrt()
    ):
        found["norm of one stage alone"] = worst(case)
    return found


def test_broken_stages_are_caught():
    found = run_distributed(broken_stages, world=2, timeout_s=240)[0]
    assert found.pop("right")[1] < TOLERANCE
    assert len(found) == 3
    assert {twin: pair for twin, pair in found.items() if not pair[1] > 1000 * TOLERANCE} == {}


def measured(rank: int) -> dict[str, float]:
    """What a step over two stages of two ring ranks each reports of its attention, and this rank's own layers."""
    case = PlanCase(pp=2, ring=2)
    # What a relay sends depends on no mask.
    mesh = make_mesh(replace(case.plan, strategy="relay"))
    settings = EngineConfig(micro_batch_size=2, accumulation_steps=2, zero_stage=0, kernel="reference")
    engine = build_engine(case.model, settings, OPTIM, mesh, total_steps=2, seq_len=SEQ_LEN)
    full = full_step(0, dp=1, accumulation=2)
    assert engine.train_step(0, shard_step(full, mesh)).telemetry is None
    mesh.journal.is_measuring = True
    layers: set[int] = set()
    between: list[str] = []
    post = mesh.journal.post

    def remembering(*args, **settings):
        message = post(*args, **settings)
        if message.what.startswith("pipeline, "):
            between.append(str(message).removeprefix("pipeline, "))
        else:
            layers.add(message.layer)
        return message

    with mock.patch.object(mesh.journal, "post", remembering):
        told = engine.train_step(1, shard_step(full_step(1, dp=1, accumulation=2), mesh)).telemetry
    assert told is not None
    return asdict(told) | {
        "layers": sorted(layers),
        "between": between,
        "area": sum(batch[0].meta.mask.area(SEQ_LEN) for batch in full),
    }


def test_a_pipeline_reports_the_attention_of_all_stages():
    found = run_distributed(measured, world=4, timeout_s=120)
    layers, between = ([of_rank.pop(what) for of_rank in found] for what in ("layers", "between"))
    assert layers == [[0, 1], [0, 1], [2], [2]], "each stage names its own layers"
    sent, back = "activations to the next stage (with rank 2)", "gradients of the next stage (with rank 2)"
    assert sorted(between[0]) == sorted([sent, back] * 2)
    came, gone = "activations of the stage before (with rank 0)", "gradients to the stage before (with rank 0)"
    assert sorted(between[2]) == sorted([came, gone] * 2)
    assert all(of_rank == found[0] for of_rank in found), "every rank reports the same"
    got = found[0]
    # Of each layer and micro-batch: K and V of two rows of 24 tokens in fp32 forward, and again backward; dK and dV once.
    keys_and_values = 2 * (2 * 24 * WIDE.num_kv_heads * WIDE.head_size * 4)
    assert got["comm_bytes"] == 3 * 2 * 2 * keys_and_values / 2
    assert 0 < got["exposed_comm_ms"] <= got["exposed_comm_ms_max"]
    assert 1 <= got["attention_imbalance"] <= 4
    # Forward four, backward ten operations for each pair, head and feature, of 3 layers.
    flops = 14 * got["area"] * WIDE.num_heads * WIDE.head_size * 3
    assert got["attention_tflops"] * got["attention_ms"] * 4 * 1e9 == pytest.approx(flops)


def test_two_stages_of_a_process_exchange_at_once():
    """DualPipeV queues what goes and comes; one message is noted where it is exchanged, none where nothing is queued."""
    from deepspeed.runtime.pipe.schedule import CommitP2P, SendActivation

    from longctx.pipeline import _noted

    done = []
    acts = {CommitP2P: lambda ds: done.append(len(ds._p2p_ops)), SendActivation: lambda ds, **settings: None}
    journal = Journal()
    noted = _noted(acts, journal)
    assert noted[SendActivation] is acts[SendActivation], "it only queues"
    noted[CommitP2P](SimpleNamespace(_p2p_ops=[]))
    assert (done, journal.standing().text) == ([], "")
    noted[CommitP2P](SimpleNamespace(_p2p_ops=[SimpleNamespace(peer=rank) for rank in (3, 1, 3)]))
    assert done == [3]
    assert journal.standing().text.endswith("pipeline, activations and gradients (with ranks 1, 3)")


# ---- shared matrices


def broken_matrices(rank: int) -> dict[str, tuple[str, float]]:
    def right(zero: int) -> PlanCase:
        return PlanCase(tp=2, zero=zero, rich=True, steps=2)

    found = {"right": worst(right(1))}
    cut = TensorParallel.cut

    def without_word_to_deepspeed(self, parameter, dim):
        cut(self, parameter, dim)
        vars(parameter).pop("tensor_model_parallel", None)
        return parameter

    with mock.patch.object(TensorParallel, "cut", without_word_to_deepspeed):
        # Then the norm counts only the first rank's part.
        found["norm of the first part alone"] = worst(right(1))
    with mock.patch.object(TensorParallel, "enter", lambda self, x: x):
        found["gradients of shared inputs are not added"] = worst(right(0))
    with mock.patch.object(TensorParallel, "leave", lambda self, x, keep=False: x):
        found["parts of outputs are not added"] = worst(right(0))
    return found


def test_broken_matrices_are_caught():
    found = run_distributed(broken_matrices, world=2, timeout_s=240)[0]
    assert found.pop("right")[1] < TOLERANCE
    assert len(found) == 3
    assert {twin: pair for twin, pair in found.items() if not pair[1] > 1000 * TOLERANCE} == {}


# ---- what is held and what is sent


def held(rank: int) -> dict[str, object]:
    """What one rank of two holds, and how often it sends with and without recomputation."""
    case = PlanCase(tp=2)
    mesh = make_mesh(case.plan)
    model = Transformer(case.model, mesh=mesh, kernel="reference")
    whole = Transformer(case.model, kernel="reference")
    slices, full = parameter_slices(model), dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        part = slices[name]
        assert torch.equal(part.take(full[part.name]), parameter), name
        assert part.shape == tuple(parameter.shape)
    sums = {}
    for recompute in (False, True):
        settings = EngineConfig(
            micro_batch_size=2, zero_stage=0, kernel="reference", activation_checkpointing=recompute
        )
        engine = build_engine(case.model, settings, OPTIM, mesh, total_steps=1)
        with mock.patch.object(
            TensorExchange, "all_reduce", autospec=True, side_effect=TensorExchange.all_reduce
        ) as sent:
            engine.accumulate(0, shard_step(full_step(0, dp=1, accumulation=1), mesh))
        sums[recompute] = sent.call_count
    return {
        "cut": sorted(name.split(".")[-2] for name, part in slices.items() if part.dim is not None and ".0." in name),
        "elements": sum(p.numel() for p in model.parameters()),
        "of": sum(p.numel() for p in whole.parameters()),
        "sums": sums,
    }


@pytest.fixture(scope="module")
def holdings():
    return run_distributed(held, world=2)


def test_each_rank_starts_from_its_part_of_the_same_matrices(holdings):
    for of_rank in holdings:
        assert of_rank["cut"] == [
            *("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"),
        ]
        norms = of_rank["of"] - 2 * (of_rank["of"] - of_rank["elements"])
        assert norms == (2 * 3 + 1) * 32, "all but the norms is cut in two"


def test_recomputation_sends_nothing_again(holdings):
    # Forward: the embedding, two sums in each of three layers, two of the loss; backward: two in each layer, one of the loss.
    assert {str(of_rank["sums"]) for of_rank in holdings} == {str({False: 16, True: 16})}
