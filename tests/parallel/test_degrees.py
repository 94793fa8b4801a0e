"""How a number of processes is split into ring x ulysses, and what such a plan says before and after."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.check import prepare
from longctx.config import load_config
from longctx.errors import ConfigError, PlanError
from longctx.layout import get_layout
from longctx.masks import Causal, SlidingWindow
from longctx.parallel import degrees
from longctx.parallel.degrees import Work, chunk_problems, heads_divide, possible_chunks
from longctx.parallel.plan import STRATEGIES, ParallelPlan
from longctx.parallel.ulysses import head_chunks

LLAMA = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128}


def split(
    context: int, seq_len: int, *, node_size: int | None = None, plan: dict | None = None, **model
) -> ParallelPlan:
    chosen, why = ParallelPlan(context=context, **(plan or {})).choose_degrees(
        **(LLAMA | model), seq_len=seq_len, node_size=node_size
    )
    assert why.startswith(f"ring {chosen.ring} x ulysses {chosen.ulysses} of context {context}: ")
    assert chosen.context is None
    assert chosen.sp == context
    return chosen


def test_few_ranks_with_few_key_heads_make_a_ring():
    """All of its messages are behind attention, and it is one hop."""
    assert split(2, 64 << 10).ring == 2


def test_many_ranks_in_one_machine_exchange_heads():
    """Each hop of a long ring is a call of the kernel and a pass over the state."""
    assert split(8, 128 << 10, node_size=8).ulysses == 8


def test_the_ring_crosses_machines_and_ulysses_does_not():
    for context, node_size in ((16, 8), (64, 8), (16, 4)):
        chosen = split(context, 1 << 20, node_size=node_size)
        assert node_size % chosen.ulysses == 0
        assert chosen.ring > 1
    assert split(16, 1 << 20, node_size=8, plan={"tp": 4}).ulysses <= 2


def test_heads_that_do_not_divide_leave_more_to_the_ring():
    assert split(8, 32 << 10, num_heads=28, num_kv_heads=4).ulysses == 4
    assert split(4, 32 << 10, num_heads=9, num_kv_heads=9).ring == 4


def test_strategy_window_and_parts_are_taken_into_account():
    work = Work(**LLAMA, seq_len=1 << 18, mask=Causal() & SlidingWindow(4096))
    window = degrees.choose_degrees(8, work, layout=get_layout("auto"), strategies=STRATEGIES[1:])
    assert window[:2] == (8, 1), "a halo is next to nothing beside exchanged heads"
    # With zigzag the relay sends all keys where a window needs few.
    relayed = degrees.choose_degrees(8, work, layout=get_layout("zigzag"), strategies=("relay",))
    assert relayed[1] > 1
    assert split(8, 128 << 10, plan={"ulysses_chunks": 4}).sp == 8


@settings(max_examples=40)
@given(
    context=st.sampled_from([1, 2, 3, 4, 6, 8, 12]),
    heads=st.sampled_from([(8, 2), (32, 8), (12, 12), (6, 1), (7, 7)]),
    seq_len=st.integers(100, 100_000),
    node_size=st.sampled_from([None, 2, 4, 8]),
    strategy=st.sampled_from(STRATEGIES),
)
def test_what_is_chosen_serves_the_model(context, heads, seq_len, node_size, strategy):
    h, hk = heads
    chosen = split(context, seq_len, node_size=node_size, plan={"strategy": strategy}, num_heads=h, num_kv_heads=hk)
    assert heads_divide(h, hk, chosen.ulysses)
    assert chosen.check(num_heads=h, num_kv_heads=hk, seq_len=seq_len) == []
    assert chosen.resolve(chosen.sp).world_size == context


def test_the_reason_names_what_was_not_taken():
    _, why = ParallelPlan(context=8).choose_degrees(
        **LLAMA | {"num_heads": 28, "num_kv_heads": 4}, seq_len=4096, node_size=4
    )
    assert "4_096 tokens, 28/4 heads of 128, machines of 4; estimated" in why
    assert "ring 1 x ulysses 8 would not fit the heads or a machine" in why


def _forget():
    degrees.choose_degrees.cache_clear()
    degrees.attention_estimate.cache_clear()


def test_the_estimates_decide(monkeypatch):
    """Were calls of a kernel and its passes over the state free, nothing would be won by exchanging heads."""
    assert split(8, 128 << 10, num_kv_heads=32).ulysses == 8
    _forget()
    monkeypatch.setattr("longctx.parallel.cost.LAUNCH_S", 0.0)
    monkeypatch.setattr("longctx.parallel.cost.MEMORY_BYTES", float("inf"))
    try:
        assert split(8, 128 << 10, num_kv_heads=32).ring == 8
    finally:
        _forget()


def test_explicit_degrees_are_taken_as_they_are():
    plan = ParallelPlan(ring=4, ulysses=2)
    assert plan.choose_degrees(**LLAMA, seq_len=1 << 17) == (plan, "")


def test_a_plan_is_not_used_before_its_degrees_are_chosen():
    plan = ParallelPlan(context=4)
    assert "context 4" in str(plan)
    with pytest.raises(PlanError, match="context 4 is not split into ring and ulysses yet"):
        plan.resolve(4)
    for beside in ({"ring": 4}, {"ulysses": 2}):
        with pytest.raises(PlanError, match="context chooses both"):
            ParallelPlan(context=4, **beside).choose_degrees(**LLAMA, seq_len=4096)
    with pytest.raises(PlanError, match="cannot be split"):
        plan.choose_degrees(**LLAMA, seq_len=3)


# ---- in a configuration

GOOD = ["--data.path=none", "--train.device=cpu"]


def test_a_configuration_says_how_many_share_a_sequence(capsys):
    words = ["--parallel.context=4", "--model.num_heads=8", "--model.num_kv_heads=2"]
    config = load_config(None, words)
    chosen, why = config.choose_plan()
    assert chosen.sp == 4
    assert why
    assert [p for p in config.check(8) if "context" in p.what or "ring" in p.what] == []
    wrong = load_config(None, [*words, "--parallel.ring=2"]).check(8)
    assert any("context = 4 beside ring 2" in p.what for p in wrong)
    (problem,) = [p for p in config.check(6) if "multiple" in p.what]
    assert "pp * ring * ulysses * tp = 4" in problem.what


def test_check_names_the_choice():
    prepared = prepare(
        ["--nproc=4", "--parallel.context=4", "--model.num_heads=8", "--model.num_kv_heads=2", "--train.device=cpu"]
    )
    assert prepared.case.plan.sp == 4
    assert prepared.case.plan.context is None
    assert any(line.startswith("degrees   ring ") for line in prepared.lines)
    with pytest.raises((ConfigError, PlanError), match="not a multiple"):
        prepare(["--nproc=3", "--parallel.context=2", "--train.device=cpu"])


# ---- heads in chunks


@pytest.mark.parametrize(("heads", "ring"), list(itertools.product([(4, 4), (8, 2), (6, 1), (1, 1)], [1, 2])), ids=str)
def test_chunks_hold_every_head_once(heads, ring):
    h, hk = heads
    for chunks in possible_chunks(h, hk, ring=ring):
        parts = head_chunks(h, hk, chunks)
        queries = [i for part in parts for i in range(part.queries.start, part.queries.stop)]
        assert queries == list(range(h))
        for part in parts:
            serving = {i // (h // hk) for i in range(part.queries.start, part.queries.stop)}
            assert serving == set(range(part.keys.start, part.keys.stop))
        for end in ("is_first", "is_last"):
            keys = [i for part in parts if getattr(part, end) for i in range(part.keys.start, part.keys.stop)]
            assert keys == list(range(hk)), "keys come once, and their gradients go once"
        assert ring == 1 or chunks <= hk


def test_chunks_that_cannot_be_are_refused_with_those_that_can():
    assert chunk_problems(None, 8, 2, ulysses=2, ring=1) == []
    assert chunk_problems(4, 8, 2, ulysses=2, ring=1) == []
    (beside_a_ring,) = chunk_problems(4, 8, 2, ulysses=2, ring=2)
    assert "beside a ring" in beside_a_ring.what
    assert beside_a_ring.hint.startswith("one of 1, ")
    (alone,) = chunk_problems(2, 8, 2, ulysses=1, ring=2)
    assert "no heads are exchanged" in alone.what
    plan = ParallelPlan(ulysses=2, ulysses_chunks=3)
    assert any("ulysses_chunks = 3" in p.what for p in plan.check(num_heads=8, num_kv_heads=2, seq_len=64))
