"""`longctx check`: it passes where the plan is right, and sees every mistake that it knows."""

from __future__ import annotations

import math
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longctx import check
from longctx.__main__ import main
from longctx.broken import TWINS, twins_of
from longctx.comparison import Comparison, Tally, merge_ranks
from longctx.config import load_config
from longctx.engine import EngineConfig
from longctx.errors import ConfigError
from longctx.optim import OptimConfig
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.plan import ParallelPlan
from longctx.parity import ParityCase, make_step, shard_step
from longctx.shapes import NO_TARGET

ROOT = Path(check.__file__).parent.parent
# Wide enough that something is cut, on CPUs wherever the tests run.
WORDS = ["--train.device=cpu", "--data.seq_len=2k", "--model.num_kv_heads=2"]
RICH = [
    *("--model.tie_embeddings", "--model.qkv_bias", "--model.qk_norm", "--model.sliding_window=512"),
    *("--model.softcap=20", "--model.sinks"),
    *("--parallel.layout=striped", "--engine.activation_checkpointing"),
]
BF16 = ["--engine.dtype=bf16"]
# name -> (processes, settings, mistakes). Every mistake must be seen even through bf16's rounding.
PLANS = {
    "ring2-zero1-bf16": (2, ["--parallel.ring=2", "--engine.dtype=bf16"], "all"),
    "ring3-zero3-rich": (3, ["--parallel.ring=3", "--engine.zero_stage=3", "--data.seq_len=3k", *RICH], "hop"),
    "tp2-ring2-zero3-bf16": (4, ["--parallel.tp=2", "--parallel.ring=2", "--engine.zero_stage=3", *BF16], "all"),
    # An odd length is padded so that the norms' tokens can be shared.
    "tp2-shard_norms-pp2": (
        4,
        ["--parallel.tp=2", "--parallel.pp=2", "--parallel.shard_norms", "--data.seq_len=2047", *BF16],
        "tensor",
    ),
    "pp2-ulysses2-rich": (
        4,
        ["--parallel.pp=2", "--parallel.ulysses=2", "--engine.accumulation_steps=3", *RICH],
        "labels",
    ),
    # An odd length is padded, and each micro-batch has a layout of its own.
    "dp2-ring2-zero1-accumulate2": (
        4,
        ["--parallel.ring=2", "--engine.accumulation_steps=2", "--parallel.layout=balanced", "--data.seq_len=2047"],
        "scale",
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_right_plans_pass_and_mistakes_are_caught(name, capfd):
    """One launch a plan: the right code, then broken twins on the same processes."""
    nproc, settings, mistakes = PLANS[name]
    plan = load_config(None, [*WORDS, *settings]).parallel.resolve(nproc)
    twins = twins_of(mistakes, plan)
    others = multiprocessing.active_children()
    code = main(["check", "--nproc", str(nproc), *WORDS, *settings, "--broken", mistakes])
    out, err = capfd.readouterr()
    assert code == 0, out
    verdict = out.strip().splitlines()[-1]
    assert verdict.startswith("PASS: dp ")
    assert f"caught: {', '.join(twins)}" in verdict
    right, *broken = out.split("broken: ")
    assert "NO:" not in right
    assert len(broken) == len(twins)
    for block in broken:
        # Positions and labels are no matter of attention alone; a skipped hop is.
        attention = next(line for line in block.splitlines() if line.startswith("attention "))
        assert ("NO:" in attention) == block.startswith("hop:")
        assert any("NO:" in line for line in block.splitlines() if line.startswith("gradients "))
    assert "train.device = cpu" in out
    assert f"starting {nproc} processes" in err
    assert set(multiprocessing.active_children()) <= set(others)


def test_without_a_ring_and_without_twins(capfd):
    code = main(["check", "--nproc", "1", *WORDS, "--engine.dtype=fp32", "--data.mask_documents=false"])
    out = capfd.readouterr().out
    assert code == 0, out
    assert "one causal stream" in out
    assert "PASS: dp 1, pp 1, ring 1, ulysses 1, tp 1 on 1 process equals one process in all" in out


# ---- the verdict


def comparison(what: str, error: float, name: str = "x") -> Comparison:
    tally = Tally(error**2, 1.0, error, 1.0)
    return Comparison(what, name, tally, Tally(1e-12, 1.0, 1e-6, 1.0), 1e-6)


def case(**settings) -> ParityCase:
    config = load_config(None, ["--model.num_kv_heads=2"])
    base = ParityCase(
        model=config.model,
        engine=EngineConfig(micro_batch_size=2),
        optim=OptimConfig(),
        plan=ParallelPlan(ring=2, dp=2),
        seq_len=96,
        mask_documents=True,
    )
    return replace(base, **settings)


def test_a_difference_fails_and_is_named():
    found = {"": [comparison("gradients", 2.9e-6), comparison("gradients", 3.1e-6, "wrong"), comparison("loss", 0.0)]}
    text, is_ok = check.report(found, case())
    assert not is_ok
    assert "FAIL: dp 2, pp 1, ring 2, ulysses 1, tp 1 on 4 processes differs from one process in 1 of 3" in text
    assert "wrong of 2" in text
    assert "NO: 1 of 2" in text


def test_a_mistake_that_is_not_caught_fails():
    found = {"": [comparison("loss", 1e-6)], "scale": [comparison("loss", 1e-6)], "hop": [comparison("loss", 0.1)]}
    text, is_ok = check.report(found, case(twins=("scale", "hop")))
    assert not is_ok
    assert "NOT CAUGHT" in text
    assert text.endswith("equals one process, but the check did not see: scale")


def test_a_wrong_plan_does_not_pass_because_a_mistake_was_caught():
    found = {"": [comparison("loss", 0.1)], "scale": [comparison("loss", 0.1)]}
    assert not check.report(found, case(twins=("scale",)))[1]


def test_the_exit_code_is_1_where_processes_fail_or_differ(monkeypatch, capsys):
    words = ["check", "--nproc", "2", *WORDS, "--timeout", "30"]
    monkeypatch.setattr(check, "run_distributed", lambda *_, **__: [{"": [comparison("loss", 0.1)]}] * 2)
    assert main(words) == 1
    assert "FAIL: dp 2" in capsys.readouterr().out
    monkeypatch.undo()
    # Too little time to start in: the processes are ended, and the stacks of all shown.
    assert main([*words[:-1], "0.05"]) == 1
    assert "did not end within 0.05 s" in capsys.readouterr().out


def test_errors_are_measured_as_mean_and_at_the_worst_element():
    exact = torch.ones(100)
    got = exact.clone()
    got[3] = 1.5
    error = Tally.of(got, exact).error
    assert error.rms == pytest.approx(0.05)
    assert error.peak == pytest.approx(0.5)
    halves = Tally.of(got[:50], exact[:50]) + Tally.of(got[50:], exact[50:])
    assert halves.error == pytest.approx(error)
    got[3] = math.nan
    assert Tally.of(got, exact).error.rms == math.inf
    broken = Comparison("loss", "", Tally.of(got, exact), Tally.of(exact, exact), 1e-6)
    assert not broken.is_ok
    assert Tally.of(torch.zeros(3), torch.zeros(3)).error == (0.0, 0.0)


def test_shards_are_added_and_of_whole_tensors_the_worst_rank_counts():
    ranks = [[comparison("attention", e), comparison("loss", e)] for e in (1e-7, 1e-3)]
    attention, loss = merge_ranks(ranks)
    assert attention.ours.exact_squares == 2.0
    assert loss == ranks[1][1]


# ---- the step


@pytest.mark.parametrize("layout", ["zigzag", "striped", "contiguous"])
def test_the_made_up_step_is_uneven_and_consistent(layout):
    plan = ParallelPlan(ring=2, dp=2, layout=layout)
    made = case(plan=plan, engine=EngineConfig(micro_batch_size=2, accumulation_steps=2))
    full = make_step(made, torch.device("cpu"))
    assert [len(of_dp) for of_dp in full] == [2, 2]
    held = []
    for rank in range(4):
        mesh = ParallelMesh(plan, rank, device=torch.device("cpu"), groups={}, link=None)
        mine = shard_step(full, mesh)
        assert all(batch.tokens.shape == (2, 48) for batch in mine)
        held.append(sum(int((batch.labels != NO_TARGET).sum()) for batch in mine))
    assert sum(held) == full[0][0].num_target_tokens
    assert held[3] == 0
    assert len(set(held)) == 4
    batch = full[0][0]
    has_target = batch.labels[:, :-1] != NO_TARGET
    assert torch.equal(batch.labels[:, :-1][has_target], batch.tokens[:, 1:][has_target])


# ---- what is cut, and what is refused


def test_what_decides_the_sharing_is_kept():
    words = [
        "--config",
        str(ROOT / "configs/llama3_8b_128k_ring8.toml"),
        "--model.sliding_window=4k",
        "--train.device=cpu",
    ]
    prepared = check.prepare(["--nproc", "8", *words])
    made, lines = prepared.case, "\n".join(prepared.lines)
    assert (made.model.num_heads, made.model.kv_heads, made.model.head_size) == (8, 2, 128)
    assert (made.plan.ring, made.plan.layout, made.plan.dp) == (8, "zigzag", 1)
    assert (made.engine.zero_stage, made.engine.accumulation_steps, made.engine.dtype) == (3, 4, "bf16")
    assert made.model.rope_scaling is not None
    assert made.model.num_layers == 2
    assert made.seq_len == 8 * 48
    # 4k of 128k is a thirty-second.
    assert made.model.sliding_window == 12
    assert "layers 32 -> 2" in lines
    assert "sequence 131_072 -> 384, sliding window 4_096 -> 12" in lines
    assert "zero3_keep_elements 100_000 -> 0" in lines
    assert made.model.problems() == []


def test_a_small_model_is_left_alone():
    words = [
        *("--model.hidden_size=64", "--model.num_layers=1", "--model.num_heads=2", "--model.vocab_size=64"),
        *("--model.intermediate_size=48", "--model.init_std=0.2", "--data.seq_len=32", "--train.device=cpu"),
    ]
    prepared = check.prepare(["--nproc", "2", *words])
    model = load_config(None, words).model
    assert prepared.case.seq_len == 32
    assert prepared.case.model == replace(model, num_kv_heads=2, head_dim=32)
    assert not [line for line in prepared.lines if line.startswith("cut ")]


@pytest.mark.parametrize(
    ("gpus", "device", "nproc", "backend", "why"),
    [
        (0, "auto", 2, "gloo", "torch sees no GPU"),
        (2, "auto", 2, "nccl", "2 GPUs, one for each of 2 processes"),
        (1, "auto", 2, "gloo", "NCCL needs a GPU for each of 2 processes, there are 1"),
        (8, "cpu", 2, "gloo", "train.device = cpu"),
    ],
)
def test_the_backend_and_why(monkeypatch, gpus, device, nproc, backend, why):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    chosen, reason = check.choose_backend(device, nproc)
    assert chosen == backend
    assert why in reason


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nproc", "0"], "--nproc 0: at least 1 process"),
        (["--nproc", "2", "--timeout", "0"], "--timeout 0"),
        (["--nproc", "2", "--brokn=scale"], "did you mean '--broken'?"),
        (["--nproc", "2", "--model.num_heds=4"], "did you mean 'model.num_heads'"),
        (["--nproc", "3", "--parallel.ring=2"], "world size 3 is not a multiple"),
        (["--nproc", "2", "--parallel.ring=2", "--broken", "hopp"], "did you mean 'hop'?"),
        (["--nproc", "2", "--broken", "labels"], "--broken labels changes nothing in this plan"),
        (["--nproc", "1", "--broken", "scale"], "--broken scale changes nothing in this plan"),
        (["--nproc", "1", "--broken", "all"], "none of the mistakes"),
        (["--nproc", "2", "--model.num_heads=3", "--optim.lr=-1"], "2 problems with this configuration"),
        (["--nproc", "2", "--engine.zero_stage=0", "--engine.dtype=bf16"], "phantom optimizer step"),
    ],
    ids=lambda x: "_".join(w.strip("-") for w in x[2:] or x) if isinstance(x, list) else "",
)
def test_bad_arguments_exit_2(words, message, capsys):
    assert main(["check", *words, "--train.device=cpu"]) == 2
    assert message in capsys.readouterr().err


def test_the_number_of_processes_is_asked_for():
    with pytest.raises(SystemExit) as left:
        main(["check"])
    assert left.value.code == 2


def test_cuda_without_enough_gpus_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="2 processes on 0 GPUs: NCCL needs one for each"):
        check.choose_backend("cuda", 2)


def test_all_means_every_mistake_that_fits():
    assert twins_of("all", ParallelPlan(dp=2)) == ("scale",)
    assert twins_of("all", ParallelPlan(ring=2, tp=2, dp=1)) == tuple(TWINS)
    with pytest.raises(ConfigError, match="none of the mistakes"):
        twins_of("all", ParallelPlan(pp=2, dp=1))


@pytest.mark.gpu2
@pytest.mark.parametrize(
    ("settings", "mistakes"),
    [
        (["--parallel.ring=2", "--engine.zero_stage=3"], "all"),
        (["--parallel.tp=2", "--engine.zero_stage=3", "--engine.activation_checkpointing"], "all"),
        (["--parallel.tp=2", "--parallel.shard_norms", "--engine.activation_checkpointing"], "tensor"),
        (["--parallel.pp=2", "--engine.accumulation_steps=3", "--model.tie_embeddings"], ""),
        (["--engine.zero_stage=3", "--engine.offload=all"], "scale"),
    ],
    ids=["ring2", "tp2", "tp2-shard_norms", "pp2", "dp2-offload"],
)
def test_two_gpus(capfd, settings, mistakes):
    words = ["check", "--nproc", "2", *settings, "--data.seq_len=2k", "--model.num_kv_heads=2"]
    code = main([*words, "--model.hidden_size=512", *(["--broken", mistakes] if mistakes else [])])
    out = capfd.readouterr().out
    assert code == 0, out
    assert "backend   nccl" in out
    assert "bf16" in out
