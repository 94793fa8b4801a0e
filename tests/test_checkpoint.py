"""Checkpoints: a resumed run goes on bit for bit, with the random numbers and under the settings that it should."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_cases import FINGERPRINT, RUNS, SAVED_AT, STEPS, at, draw, make_engine, take_steps, uninterrupted

from longctx.checkpoint import latest_checkpoint, load_checkpoint
from longctx.checkpoint_files import rng_state, set_rng_state
from longctx.optim import OptimConfig
from longctx.testing import run_distributed


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def straight(root):
    return run_distributed(uninterrupted, str(root), world=2, timeout_s=240)


def resumed(rank: int, root: str) -> dict:
    told = {}
    for run in RUNS:
        path = latest_checkpoint(Path(root) / run)
        engine = make_engine(run)
        fresh = engine.full_state_dict()
        state = load_checkpoint(path, engine, FINGERPRINT)
        drawn = draw()
        loaded = engine.full_state_dict()
        assert rank != 0 or not torch.equal(fresh["lm_head.weight"], loaded["lm_head.weight"])
        told[run] = {
            "state": state,
            "drawn": drawn,
            "saved": loaded,
            "after": take_steps(engine, state.step, STEPS),
        }
    # The same number of processes in another arrangement, and other settings of the optimizer.
    other = OptimConfig(lr=1.0, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.7, gradient_clipping=0.25)
    for run in ("fp32-zero0", "fp32-zero1", "bf16-zero1", "fp32-zero3"):
        engine = make_engine(run, ring=1, dp=2, optim=other)
        load_checkpoint(latest_checkpoint(Path(root) / run), engine, FINGERPRINT)
        groups = [(group["betas"], group["eps"], group["weight_decay"]) for group in engine.ds.optimizer.param_groups]
        clip = getattr(engine.ds.optimizer, "clip_grad", None)
        told[f"{run}-dp2"] = {"saved": engine.full_state_dict(), "groups": groups, "clip": clip}
    return told


@pytest.fixture(scope="module")
def again(straight, root):
    return run_distributed(resumed, str(root), world=2, timeout_s=240)


@pytest.mark.parametrize("run", RUNS)
def test_a_resumed_run_goes_on_bit_for_bit(straight, again, run):
    for before, after in zip(straight, again, strict=True):
        assert after[run]["state"] == at(SAVED_AT)
        assert after[run]["after"] == before[run]["after"]
        assert len(after[run]["after"]) == STEPS - SAVED_AT
    # The steps were not all alike, or equality would say little.
    losses = [loss for loss, _ in straight[0][run]["before"] + straight[0][run]["after"]]
    assert len(set(losses)) == STEPS


@pytest.mark.parametrize("run", RUNS)
def test_every_process_gets_its_own_random_numbers_back(straight, again, run):
    assert [of_rank[run]["drawn"] for of_rank in again] == [of_rank[run]["drawn"] for of_rank in straight]
    assert straight[0][run]["drawn"] != straight[1][run]["drawn"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("run", RUNS)
def test_parameters_come_back(straight, again, run):
    assert same(straight[0][run]["saved"], again[0][run]["saved"])


@pytest.mark.parametrize("run", ["fp32-zero0", "fp32-zero1", "bf16-zero1", "fp32-zero3"])
def test_ring_and_dp_may_be_exchanged_and_settings_changed(straight, again, run):
    told = again[0][f"{run}-dp2"]
    assert same(straight[0][run]["saved"], told["saved"])
    assert told["groups"] == [((0.5, 0.6), 1e-3, 0.7), ((0.5, 0.6), 1e-3, 0.0)]
    assert told["clip"] == (None if run.endswith("zero0") else 0.25)


def test_processes_without_a_counterpart_get_random_numbers_of_their_own():
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    state = rng_state(torch.device("cpu"))
    draws = []
    for branch in (0, 1, 2, 1):
        set_rng_state(json.loads(json.dumps(state)), torch.device("cpu"), branch=branch)
        draws.append(draw())
    assert draws[1] == draws[3]
    assert all(len({of_branch[i] for of_branch in draws}) == 3 for i in range(3))
    random.seed(1)
    assert draws[0][0] == random.random(), "the first goes on as if nothing had been"
