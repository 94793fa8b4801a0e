"""The training engine: whole steps beside plain torch on one process, and what stops a run."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from engine_cases import OPTIM, STAGES, make_engine, make_mesh
from torch import nn
from train_cases import (
    MODEL,
    ReferenceTrainer,
    full_step,
    reference_model,
    relative_error,
)

from longctx.deepspeed_setup import FoldedWorld, check_one_world
from longctx.engine import EngineConfig, TrainEngine
from longctx.errors import DataError, DistributedError, NonFiniteError
from longctx.model import Transformer
from longctx.optim import lr_at
from longctx.parity import reference_backward, shard_step
from longctx.testing import run_distributed

# ---- whole steps


def train_and_compare(rank: int) -> tuple[dict, dict]:
    return train(rank), bf16_gradients(rank)


def train(rank: int) -> dict[str, dict]:
    """Three steps with clipping in every stage, and what one process makes of them."""
    mesh = make_mesh(ring=3)
    steps = [full_step(n, dp=1, accumulation=2, starved=(0, 1, 3)) for n in range(3)]
    reference = ReferenceTrainer(OPTIM, total_steps=3)
    before = {name: p.detach().clone() for name, p in reference.model.named_parameters()}
    told = [reference.step(n, full) for n, full in enumerate(steps)]
    expected = {
        "losses": [loss for loss, _ in told],
        "norms": [norm for _, norm in told],
        "rates": [lr_at(n, OPTIM, 3) for n in range(3)],
        "evaluated": reference_backward(reference.model, steps[0]),
        "moved": 0.0,
        "seen": {},
    }
    after = {name: p.detach() for name, p in reference.model.named_parameters()}
    found = {"one_process": expected}
    for dtype, stages in (("fp32", STAGES), ("bf16", (1, 2, 3))):
        for stage in stages:
            engine = make_engine(mesh, zero_stage=stage, dtype=dtype, accumulation_steps=2)
            start = engine.full_state_dict()
            results = []
            for n, full in enumerate(steps):
                results.append(engine.train_step(n, shard_step(full, mesh)))
                # Between steps, to see that it changes nothing.
                engine.evaluate(shard_step(full, mesh)[:1])
            evaluated = engine.evaluate(shard_step(steps[0], mesh))
            state = engine.full_state_dict()
            moved = [
                relative_error(state[name].double() - start[name].double(), after[name] - before[name])
                for name in state
            ]
            found[f"{dtype}-zero{stage}"] = {
                "losses": [r.loss for r in results],
                "norms": [r.grad_norm for r in results],
                "rates": [r.lr for r in results],
                "evaluated": evaluated,
                "moved": max(moved, default=0.0),
                "seen": {"names": sorted(state), "dtypes": {str(v.dtype) for v in state.values()}},
            }
    return found


def bf16_gradients(rank: int) -> dict[str, dict[str, tuple[float, float]]]:
    """Of each stage and parameter: the error of the engine's gradient, and that of plain torch in bf16 on one process."""
    mesh = make_mesh(ring=3)
    full = full_step(0, dp=1, accumulation=1, starved=(0, 1, 3))
    exact, plain = reference_model(), reference_model(dtype=torch.bfloat16)
    for model in (exact, plain):
        reference_backward(model, full)
    theirs = {
        name: relative_error(p.grad, q.grad)
        for (name, p), q in zip(plain.named_parameters(), exact.parameters(), strict=True)
    }
    found = {}
    for stage in (1, 2, 3):
        engine = make_engine(mesh, zero_stage=stage, dtype="bf16")
        engine.accumulate(0, shard_step(full, mesh))
        ours = engine.gradients()
        found[f"zero{stage}"] = {
            name: (relative_error(ours[name], p.grad), theirs[name]) for name, p in exact.named_parameters()
        }
    return found


@pytest.fixture(scope="module")
def trained(both):
    return [of_rank[0] for of_rank in both]


@pytest.fixture(scope="module")
def both():
    return run_distributed(train_and_compare, world=3, timeout_s=240)


@pytest.mark.parametrize("stage", STAGES, ids=lambda s: f"zero{s}")
def test_three_steps_equal_one_process(trained, stage):
    got, expected = trained[0][f"fp32-zero{stage}"], trained[0]["one_process"]
    assert got["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert got["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    assert got["evaluated"] == pytest.approx(expected["evaluated"], rel=1e-5)
    assert got["rates"] == expected["rates"]
    assert all(norm > 2 * OPTIM.gradient_clipping for norm in got["norms"]), "clipping had nothing to do"
    # Of the distance that the parameters went. Adam turns a gradient near 0 and its rounding into steps of one size.
    assert got["moved"] < 1e-3
    assert got["seen"] == {
        "names": sorted(n for n, _ in reference_model().named_parameters()),
        "dtypes": {"torch.float32"},
    }


@pytest.mark.parametrize("stage", [1, 2, 3], ids=lambda s: f"zero{s}")
def test_bf16_is_close(trained, stage):
    got, expected = trained[0][f"bf16-zero{stage}"], trained[0]["one_process"]
    # bf16 keeps 8 bits. Losses average many numbers; from the second step on the parameters differ too.
    assert got["losses"] == pytest.approx(expected["losses"], rel=2**-8)
    assert got["norms"][0] == pytest.approx(expected["norms"][0], rel=2**-7)
    assert got["norms"] == pytest.approx(expected["norms"], rel=2**-4)
    assert got["evaluated"] == pytest.approx(expected["evaluated"], rel=2**-7)
    assert got["evaluated"] < 0.7 * got["losses"][0], "the first step's batch was not learned"
    assert got["seen"]["dtypes"] == {"torch.bfloat16"}


@pytest.mark.parametrize("stage", [1, 2, 3], ids=lambda s: f"zero{s}")
def test_bf16_gradients_are_as_good_as_plain_torch(both, stage):
    errors = both[0][1][f"zero{stage}"]
    assert len(errors) == len(list(reference_model().parameters()))
    wrong = {name: pair for name, pair in errors.items() if not pair[0] <= 2 * pair[1] + 2**-8}
    assert not wrong, f"(ours, plain torch in bf16): {wrong}"


def test_every_process_gets_the_same_result(trained):
    for case in trained[0]:
        for key in ("losses", "norms", "evaluated"):
            assert len({str(of_rank[case][key]) for of_rank in trained}) == 1


def test_the_whole_state_is_on_the_first_process_only(trained):
    assert [bool(of_rank["fp32-zero3"]["seen"]["names"]) for of_rank in trained] == [True, False, False]


# ---- what stops a run


class Poisoned(Transformer):
    """Gives a wrong loss, or a right loss with a wrong gradient, on one rank."""

    poison = ""

    def forward(self, batch):
        loss = super().forward(batch)
        if self.poison == "loss":
            return loss * math.nan
        if self.poison == "gradient" and loss.requires_grad:
            loss.register_hook(lambda grad: grad * math.inf)
        return loss


def stop(rank: int) -> dict[str, str]:
    """Each stage's message for each reason, and whether the parameters stayed as they were."""
    mesh = make_mesh(ring=2)
    good = shard_step(full_step(0, dp=1, accumulation=1), mesh)
    bad = shard_step(full_step(1, dp=1, accumulation=1), mesh)
    told = {}
    cases = [(poison, "fp32", stage) for stage in STAGES for poison in ("loss", "gradient")]
    for poison, dtype, stage in [*cases, *(("gradient", "bf16", stage) for stage in (1, 2, 3))]:
        model = Poisoned(MODEL, mesh=mesh, kernel="reference")
        settings = EngineConfig(zero_stage=stage, dtype=dtype, micro_batch_size=2, zero3_keep_elements=0)
        engine = TrainEngine(model, mesh, settings, OPTIM, total_steps=3)
        engine.train_step(0, good)
        before = engine.full_state_dict()
        model.poison = poison if rank == 1 else ""
        with pytest.raises(NonFiniteError) as caught:
            engine.train_step(1, bad)
        told[f"{poison}-{dtype}-zero{stage}"] = str(caught.value)
        after = engine.full_state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before), "the parameters were updated"
    engine = make_engine(mesh)
    for case, error, batch in (
        ("no_targets", DataError, replace(good[0], num_target_tokens=0)),
        ("wrong_targets", DistributedError, replace(good[0], num_target_tokens=7)),
        ("other_cursor", DistributedError, replace(good[0], cursor=rank)),
    ):
        with pytest.raises(error) as caught:
            engine.train_step(0, [batch])
        told[case] = str(caught.value)
    return told


@pytest.fixture(scope="module")
def stopped():
    return run_distributed(stop, world=2, timeout_s=240)


@pytest.mark.parametrize("stage", STAGES, ids=lambda s: f"zero{s}")
def test_a_non_finite_loss_names_step_rank_and_cursor_on_every_rank(stopped, stage):
    for rank, of_rank in enumerate(stopped):
        message = of_rank[f"loss-fp32-zero{stage}"]
        assert message.startswith(
            f"[rank {rank} | dp0 pp0 ring{rank} uly0 tp0] step 1: the loss is nan on rank 1 (dp0 pp0"
        )
        assert "batch cursor 2" in message
        assert "parameters were not updated" in message


@pytest.mark.parametrize("case", [*(f"fp32-zero{s}" for s in STAGES), *(f"bf16-zero{s}" for s in (1, 2, 3))])
def test_a_non_finite_norm_stops_before_the_update(stopped, case):
    for of_rank in stopped:
        message = of_rank[f"gradient-{case}"]
        assert "step 1: the gradient norm is" in message
        assert "batch cursor 2" in message


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("no_targets", "step 0: no token of the samples from cursor 0 on has a target"),
        ("wrong_targets", "but the batch says 7"),
        ("other_cursor", "rank 1: step 0, cursor 1"),
    ],
)
def test_steps_that_do_not_fit_together_are_refused(stopped, case, words):
    for of_rank in stopped:
        assert words in of_rank[case]


def test_an_engine_needs_a_process_group():
    model = nn.Linear(2, 2)
    with pytest.raises(DistributedError, match="also for one process"):
        TrainEngine(model, make_mesh(), EngineConfig(), OPTIM, total_steps=1)


def test_a_second_set_of_processes_is_refused():
    def mesh(*ranks, tp=(0,)):
        axes = {name: SimpleNamespace(rank=0, ranks=of, size=len(of)) for name, of in (("grad", ranks), ("tp", tp))}
        return SimpleNamespace(**axes, pp=SimpleNamespace(size=1), world_size=1, prefix="[rank 0]")

    groups = SimpleNamespace(mpu=None)
    deepspeed = SimpleNamespace(utils=SimpleNamespace(groups=groups))
    check_one_world(deepspeed, mesh(0))
    groups.mpu = FoldedWorld(mesh(0))
    check_one_world(deepspeed, mesh(0))
    with pytest.raises(DistributedError, match=r"spans the ranks \[0\] with pp 1 and tp 1, this one \[0, 1\]"):
        check_one_world(deepspeed, mesh(0, 1))
    with pytest.raises(DistributedError, match=r"this one \[0\] with pp 1 and tp 2"):
        check_one_world(deepspeed, mesh(0, tp=(0, 1)))
