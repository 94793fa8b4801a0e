"""The training engine. Its gradients, through DeepSpeed on real processes, are those of plain autograd on one process."""

from __future__ import annotations

import gc
import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from train_cases import (
    MODEL,
    ReferenceTrainer,
    full_step,
    reference_model,
    relative_error,
)

from longctx import engine as engine_module
from longctx.deepspeed_setup import FoldedWorld, check_one_world, deepspeed_config
from longctx.engine import EngineConfig, TrainEngine, build_engine, scaled_loss
from longctx.errors import ConfigError, DataError, DistributedError, NonFiniteError
from longctx.model import ModelConfig, Transformer
from longctx.optim import OptimConfig, lr_at, parameter_groups
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.plan import ParallelPlan
from longctx.parity import reference_backward, shard_step
from longctx.testing import run_distributed

STAGES = (0, 1, 2, 3)
# (ring, dp) of each world. Factorings of one world share their processes: to DeepSpeed they are the same world.
WORLDS = {1: [(1, 1)], 2: [(2, 1), (1, 2)], 3: [(3, 1)], 4: [(4, 1), (2, 2)], 6: [(3, 2)], 8: [(4, 2)]}
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


# ---- the main proof


def gradient_matrix(rank: int, pairs: list[tuple[int, int]]) -> dict[str, dict[str, float]]:
    found = {}
    for ring, dp in pairs:
        mesh = make_mesh(ring, dp)
        for stage in STAGES:
            for accumulation in (1, 2):
                case = f"zero{stage}-ring{ring}-dp{dp}-accumulate{accumulation}"
                found[case] = gradient_errors(mesh, zero_stage=stage, accumulation_steps=accumulation)
    return found


@pytest.mark.parametrize("world", WORLDS, ids=lambda w: f"world{w}")
def test_gradients_equal_one_process(world):
    """ZeRO 0-3 x ring 1-4 x dp 1-2 x accumulation 1-2, one rank without a target: 64 cases over the worlds."""
    found = run_distributed(gradient_matrix, WORLDS[world], world=world, timeout_s=300)[0]
    assert len(found) == len(WORLDS[world]) * len(STAGES) * 2
    worst = {case: max(errors.items(), key=lambda item: item[1]) for case, errors in found.items()}
    wrong = {case: pair for case, pair in worst.items() if not pair[1] < TOLERANCE}
    assert not wrong, f"{len(wrong)} of {len(found)} cases are wrong; the worst parameter of each: {wrong}"


def ulysses_gradients(rank: int, degrees: list[tuple[int, int]]) -> dict[str, dict[str, float]]:
    found = {}
    for ring, ulysses in degrees:
        mesh = make_mesh(ring, ulysses=ulysses)
        for stage, recompute in ((1, False), (3, True)):
            settings = {"zero_stage": stage, "activation_checkpointing": recompute, "accumulation_steps": 2}
            found[f"zero{stage}-ring{ring}-ulysses{ulysses}"] = gradient_errors(mesh, **settings)
    return found


@pytest.mark.parametrize(("world", "degrees"), [(2, [(1, 2)]), (4, [(2, 2), (1, 4)])], ids=["world2", "world4"])
def test_gradients_with_ulysses_equal_one_process(world, degrees):
    """Ulysses alone, around a ring, and with more ranks than key heads."""
    found = run_distributed(ulysses_gradients, degrees, world=world, timeout_s=300)[0]
    worst = {case: max(errors.items(), key=lambda item: item[1]) for case, errors in found.items()}
    assert len(worst) == 2 * len(degrees)
    assert {case: pair for case, pair in worst.items() if not pair[1] < TOLERANCE} == {}


def test_the_matrix_is_complete():
    assert {pair for pairs in WORLDS.values() for pair in pairs} == {(r, d) for r in (1, 2, 3, 4) for d in (1, 2)}
    assert all(ring * dp == world for world, pairs in WORLDS.items() for ring, dp in pairs)


# ---- broken twins: mistakes that the comparison must see


def broken_gradients(rank: int) -> dict[str, float]:
    """The worst error of any parameter, for each mistake."""
    mesh = make_mesh(ring=2)
    found = {}
    right = engine_module.scaled_loss

    def worst(**settings) -> float:
        return max(error for name, error in gradient_errors(mesh, **settings).items() if name != "loss")

    # The usual mistake: every rank and micro-batch brings the mean over its own targets.
    mine = [b.labels for b in shard_step(full_step(0, dp=1, accumulation=2, starved=(0, 1, 2)), mesh)]
    counts = iter([max(1, int((labels != -100).sum())) for labels in mine])
    engine_module.scaled_loss = lambda local_sum, **rest: local_sum / next(counts)
    found["mean_of_means"] = worst(accumulation_steps=2)

    def as_if_summed(local_sum, *, num_target_tokens, grad_world, accumulation_steps):
        return local_sum * (accumulation_steps / num_target_tokens)

    engine_module.scaled_loss = as_if_summed
    for stage in STAGES:
        found[f"as_if_summed_over_the_ring-zero{stage}"] = worst(zero_stage=stage)
    engine_module.scaled_loss = right
    # Last, for it changes a class: DeepSpeed is told of dp alone, so nothing is reduced over the ring.
    FoldedWorld.get_data_parallel_group = lambda self: self._alone
    for stage in (0, 1):
        found[f"told_of_dp_alone-zero{stage}"] = worst(zero_stage=stage)
    return found


def test_broken_twins_are_caught():
    found = run_distributed(broken_gradients, world=2, timeout_s=240)[0]
    assert len(found) == 7
    missed = {twin: error for twin, error in found.items() if not error > 1000 * TOLERANCE}
    assert not missed


# ---- variants of the model


def variant_gradients(rank: int) -> dict[str, dict[str, float]]:
    mesh = make_mesh(ring=2)
    tied = replace(MODEL, tie_embeddings=True)
    rich = replace(MODEL, qkv_bias=True, qk_norm=True, sliding_window=20, tie_embeddings=True)
    return {
        "tied-zero1": gradient_errors(mesh, model=tied, zero_stage=1),
        "tied-zero3": gradient_errors(mesh, model=tied, zero_stage=3, accumulation_steps=2),
        "recompute-zero1": gradient_errors(mesh, zero_stage=1, activation_checkpointing=True),
        "recompute-zero3": gradient_errors(mesh, zero_stage=3, activation_checkpointing=True, accumulation_steps=2),
        "tied-recompute-zero3": gradient_errors(mesh, model=tied, zero_stage=3, activation_checkpointing=True),
        "rich-recompute-zero3": gradient_errors(mesh, model=rich, zero_stage=3, activation_checkpointing=True),
        # Matrices of 1 024 elements and more partitioned, the others whole.
        "some_kept-zero3": gradient_errors(mesh, zero_stage=3, zero3_keep_elements=1024),
    }


@pytest.fixture(scope="module")
def variants():
    return run_distributed(variant_gradients, world=2, timeout_s=240)[0]


@pytest.mark.parametrize(
    "variant",
    [
        "tied-zero1",
        "tied-zero3",
        "recompute-zero1",
        "recompute-zero3",
        "tied-recompute-zero3",
        "rich-recompute-zero3",
        "some_kept-zero3",
    ],
)
def test_gradients_of_variants_equal_one_process(variants, variant):
    assert {name: error for name, error in variants[variant].items() if not error < TOLERANCE} == {}


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


# ---- settings


def test_the_learning_rate_rises_then_falls_to_its_lowest():
    optim = OptimConfig(lr=1.0, min_lr_ratio=0.1, warmup_steps=4)
    rates = [lr_at(step, optim, 12) for step in range(14)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert all(b < a for a, b in itertools.pairwise(rates[4:12]))
    assert rates[11:] == pytest.approx([0.1] * 3)
    # Half-way down the cosine is half-way between the two.
    assert lr_at(5, replace(optim, warmup_steps=0), 11) == pytest.approx(0.55)


@pytest.mark.parametrize(
    ("optim", "total_steps", "rates"),
    [
        (OptimConfig(lr=1.0, warmup_steps=0), 1, [1.0]),
        (OptimConfig(lr=1.0, warmup_steps=1), 1, [1.0]),
        (OptimConfig(lr=1.0, warmup_steps=10), 2, [0.1, 0.2]),
        (OptimConfig(lr=1.0, warmup_steps=0, min_lr_ratio=1.0), 3, [1.0, 1.0, 1.0]),
    ],
    ids=["one_step", "one_step_of_warmup", "all_warmup", "constant"],
)
def test_the_learning_rate_of_short_runs(optim, total_steps, rates):
    assert [lr_at(step, optim, total_steps) for step in range(total_steps)] == rates


def test_weight_decay_is_for_matrices_only():
    model = Transformer(replace(MODEL, qkv_bias=True, qk_norm=True))
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, plain = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert {names[id(p)].split(".")[-2] for p in decayed["params"]} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
    }
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    tied = parameter_groups(Transformer(replace(MODEL, tie_embeddings=True)), 0.1)
    assert (
        sum(p.numel() for group in tied for p in group["params"])
        == replace(MODEL, tie_embeddings=True).shape.num_params
    )
    assert [group["weight_decay"] for group in parameter_groups(nn.LayerNorm(4), 0.1)] == [0.0]


def test_the_gradient_rule():
    # 2 ranks x 2 micro-batches: DeepSpeed divides by 4 what the rule multiplies by 4.
    parts = [
        scaled_loss(torch.tensor(s), num_target_tokens=10, grad_world=2, accumulation_steps=2)
        for s in (6.0, 0.0, 3.0, 1.0)
    ]
    assert sum(parts) / 4 == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_is_told_what_it_would_choose_silently(stage, dtype):
    config = deepspeed_config(
        EngineConfig(zero_stage=stage, micro_batch_size=3, accumulation_steps=5), OPTIM, dtype=dtype, grad_world=7
    )
    assert config["train_batch_size"] == 3 * 5 * 7
    # Stage 0 is clipped by the engine.
    assert config["gradient_clipping"] == (0.5 if stage else 0.0)
    assert config["communication_data_type"] == "fp32"
    assert not config["timers"]["throughput"]["enabled"]
    assert ("bf16" in config) == (dtype == "bf16")
    assert not config["pipeline"]["use_reentrant"]
    assert config.get("data_types") == ({"grad_accum_dtype": "fp32"} if dtype == "bf16" else None)


@pytest.mark.parametrize(
    ("settings", "device", "words"),
    [
        ({"zero_stage": 4}, "cpu", "engine.zero_stage = 4"),
        ({"dtype": "fp16"}, "cpu", "engine.dtype = 'fp16'"),
        ({"fused": "yes"}, "cpu", "engine.fused = 'yes'"),
        ({"offload": "disk"}, "cpu", "engine.offload = 'disk'"),
        ({"offload": "optimizer", "zero_stage": 0}, "cpu", "engine.zero_stage 1"),
        ({"offload": "all", "zero_stage": 2}, "cpu", "engine.zero_stage 3, or engine.offload optimizer"),
        ({"kernel": "tritn"}, "cpu", "did you mean 'triton'?"),
        ({"micro_batch_size": 0}, "cpu", "engine.micro_batch_size = 0"),
        ({"accumulation_steps": 0}, "cpu", "engine.accumulation_steps = 0"),
        ({"zero_stage": 0, "dtype": "bf16"}, "cpu", "engine.dtype bf16 with engine.zero_stage 0"),
        ({"zero_stage": 0}, "cuda", "(what 'auto' means on cuda)"),
    ],
    ids=lambda x: "-".join(f"{k}_{v}" for k, v in x.items()) if isinstance(x, dict) else None,
)
def test_engine_settings_that_cannot_work(settings, device, words):
    problems = EngineConfig(**settings).problems(device)
    assert len(problems) == 1
    assert words in problems[0].what + problems[0].hint


@pytest.mark.parametrize(
    ("settings", "plan", "words"),
    [
        ({"zero_stage": 2}, {"pp": 2}, "engine.zero_stage 2 with pp 2"),
        ({"zero_stage": 3}, {"pp": 2, "ring": 2}, "or pp 1 with ring 4"),
        ({"offload": "optimizer"}, {"pp": 2}, "engine.offload optimizer with pp 2"),
        ({"fused": "on"}, {"tp": 2}, "engine.fused = on with tp 2"),
        (
            {"accumulation_steps": 3},
            {"pp": 2, "schedule": "dualpipev"},
            "engine.accumulation_steps 4, or schedule 1f1b",
        ),
    ],
    ids=["zero2-pp2", "zero3-pp2", "offload-pp2", "fused-tp2", "accumulate3-dualpipev"],
)
def test_settings_that_do_not_go_with_a_plan(settings, plan, words):
    (problem,) = EngineConfig(**settings).plan_problems(ParallelPlan(**plan))
    assert words in problem.what + problem.hint
    assert EngineConfig(**settings).plan_problems(ParallelPlan(ring=2)) == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_defaults_work_everywhere(device):
    assert EngineConfig().problems(device) == []
    assert EngineConfig(zero_stage=0, dtype="fp32").problems(device) == []
    assert OptimConfig().problems() == []


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": -1.0},
        {"lr": math.nan},
        {"eps": math.inf},
        {"weight_decay": -0.1},
        {"gradient_clipping": -1.0},
        {"min_lr_ratio": 1.5},
        {"warmup_steps": -1},
        {"betas": (0.9, 1.0)},
        {"betas": (0.9,)},
    ],
    ids=lambda x: "-".join(f"{k}_{v}" for k, v in x.items()),
)
def test_optimizer_settings_that_cannot_work(settings):
    problems = OptimConfig(**settings).problems()
    assert len(problems) == 1
    assert f"optim.{next(iter(settings))}" in problems[0].what


def refuse(rank: int) -> None:
    with pytest.raises(ConfigError, match="2 problems with the engine's settings"):
        make_engine(make_mesh(), dtype="bf16", zero_stage=0, optim=OptimConfig(lr=-1.0))


def test_an_engine_refuses_its_settings():
    run_distributed(refuse, world=1)
