"""Settings of the engine and the optimizer: what DeepSpeed is told of them, and what cannot work."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from engine_cases import OPTIM, STAGES, make_engine, make_mesh
from torch import nn
from train_cases import MODEL

from longctx.deepspeed_setup import deepspeed_config
from longctx.engine import EngineConfig, scaled_loss
from longctx.errors import ConfigError
from longctx.model import Transformer
from longctx.optim import OptimConfig, lr_at, parameter_groups
from longctx.parallel.plan import ParallelPlan
from longctx.testing import run_distributed


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
        ({"activation_offload": True}, "cpu", "engine.activation_checkpointing true"),
        ({"mlp_chunk_tokens": 0}, "cpu", "engine.mlp_chunk_tokens none"),
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
