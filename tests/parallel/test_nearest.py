"""What is offered for a plan that does not work: plans on the same processes that do, nearest first."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.config import load_config
from longctx.errors import ConfigError
from longctx.launch import Place
from longctx.parallel.nearest import changes, nearest_plans
from longctx.parallel.plan import ParallelPlan
from longctx.preparation import settle


def test_the_least_of_a_change_comes_first():
    asked = ParallelPlan(ring=2, tp=3)
    found = nearest_plans(asked, 6, lambda plan: plan.tp in (1, 2), count=3)
    assert [changes(asked, plan) for plan in found] == [
        "--parallel.ring=3 --parallel.tp=2",
        "--parallel.tp=1",
        "--parallel.ring=1 --parallel.tp=2",
    ]
    # dp follows unless it was given.
    assert all(plan.dp is None for plan in found)
    asked = ParallelPlan(dp=2, ring=4)
    assert [changes(asked, plan) for plan in nearest_plans(asked, 4, lambda plan: True, count=2)] == [
        "--parallel.dp=1",
        "--parallel.ring=2",
    ]
    assert nearest_plans(asked, 4, lambda plan: False) == []


def test_what_needs_an_axis_goes_with_it():
    asked = ParallelPlan(pp=2, ring=3, tp=2, schedule="dualpipev", shard_norms=True, grad_dtype="bf16")
    (found,) = nearest_plans(asked, 7, lambda plan: plan.ring == 1, count=1)
    assert (found.pp, found.ring, found.tp, found.problems()) == (1, 1, 1, [])
    assert "--parallel.schedule=1f1b" in changes(asked, found)
    assert "--parallel.shard_norms=false" in changes(asked, found)


MODEL = [
    "--model.hidden_size=48",
    "--model.num_heads=6",
    "--model.num_kv_heads=3",
    "--model.num_layers=3",
    "--model.vocab_size=264",
    "--model.intermediate_size=96",
]
DEGREE = st.integers(1, 6)


@settings(max_examples=30)
@given(
    pp=DEGREE,
    ring=DEGREE,
    ulysses=DEGREE,
    tp=DEGREE,
    world=st.integers(1, 16),
    node=st.sampled_from([None, 2, 4]),
    zero=st.integers(0, 3),
)
def test_every_plan_that_is_offered_works(pp, ring, ulysses, tp, world, node, zero):
    words = [f"--parallel.{name}={n}" for name, n in (("pp", pp), ("ring", ring), ("ulysses", ulysses), ("tp", tp))]
    words += [*MODEL, f"--engine.zero_stage={zero}", "--train.device=cpu"]
    config = load_config(None, words)
    problems = config.check(world, node)
    if not problems:
        return
    message = config.refusal("this configuration", problems, world, node)
    # Data parallelism alone always works, so there is something to offer.
    offered = message.split("that work, nearest first:\n")[1].splitlines()
    assert 1 <= len(offered) <= 3
    for line in offered:
        assert load_config(None, [*words, *line.split()]).check(world, node) == [], line


def test_a_run_is_refused_with_them():
    config = load_config(None, [*MODEL, "--parallel.tp=4", "--parallel.ring=2", "--engine.zero_stage=9"])
    with pytest.raises(ConfigError) as caught:
        settle(config, Place(rank=0, world_size=8))
    message = str(caught.value)
    assert message.startswith("2 problems with this configuration")
    assert message.splitlines()[-4:] == [
        "  plans for 8 processes that work, nearest first:",
        "       --parallel.tp=1",
        "       --parallel.ring=4 --parallel.tp=1",
        "       --parallel.ring=1 --parallel.tp=1",
    ]


def test_nothing_is_offered_where_the_plan_is_not_what_is_wrong():
    config = load_config(None, [*MODEL, "--optim.lr=-1", "--parallel.ring=2"])
    problems = config.check(2)
    assert len(problems) == 1
    assert "nearest" not in config.refusal("this configuration", problems, 2)
