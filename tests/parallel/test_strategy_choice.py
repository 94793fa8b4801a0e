"""Which strategy a call takes, and why: by time, and by what stays for the backward pass."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace

import pytest
import torch
from ring_cases import Case, run_case

from longctx.attention import ParallelAttention
from longctx.errors import KernelError, PlanError
from longctx.kernels import block_kind
from longctx.layout import ZigZag
from longctx.masks import Causal, Documents, Full, SlidingWindow
from longctx.parallel import strategy
from longctx.parallel.cost import WORTH, Estimate, Rates, Shape, Variant, estimates, hop_shares, ranked
from longctx.parallel.operator import SCHEMES
from longctx.parallel.plan import STRATEGIES, TRANSPORTS, ParallelPlan
from longctx.parallel.schedule import RingSchedule
from longctx.parallel.strategy import (
    DirectStrategy,
    GatherStrategy,
    choose_strategy,
    get_strategy,
    strategy_names,
)
from longctx.testing import run_virtual_ring

SEQ_LEN = 96


def schedules(mask, layout, world, seq_len=SEQ_LEN) -> list[RingSchedule]:
    return [RingSchedule.build(mask, layout, r, world, seq_len) for r in range(world)]


SHAPE = Shape(batch=1, local_len=32768, num_heads=32, num_kv_heads=8, head_dim=128, itemsize=2)
HELD, AGAIN = Variant("direct", holds=True), Variant("direct", holds=False)
ON_CPU = {"device": torch.device("cpu"), "dtype": torch.float32, "kernel": "reference"}


@pytest.mark.parametrize("mask", [Causal(), Full(), Documents((0, 100, 4096, 32768)), SlidingWindow(64) & Causal()])
@pytest.mark.parametrize("in_one_node", [True, False])
def test_every_rank_chooses_alike_and_says_why(mask, in_one_node):
    found = {choose_strategy(s, SHAPE, **ON_CPU, in_one_node=in_one_node) for s in schedules(mask, ZigZag(), 4, 32768)}
    ((chosen, why),) = found
    assert why.startswith(f"{chosen} for 32_768 tokens a rank, 32/8 heads of 128")
    assert all(name in why for name in strategy_names())
    assert ("one node" in why) == in_one_node


def test_the_relay_is_never_better_where_it_sends_more():
    s = schedules(Causal(), ZigZag(), 4, 32768)[0]
    for length, in_one_node in itertools.product((256, 4096, 65536), (True, False)):
        chosen, _ = choose_strategy(s, replace(SHAPE, local_len=length), **ON_CPU, in_one_node=in_one_node)
        assert chosen.name != "relay"


def test_a_scheme_whose_blocks_no_kernel_can_do_is_not_chosen(monkeypatch):
    """cuDNN knows causal blocks and rectangles, which the hops of zigzag are, but not the intervals of gathered keys."""

    class Blocks:
        name = "cudnn"

    def select(name, q, key_range, softcap, direction):
        if block_kind(key_range) not in ("full", "causal", "rectangle"):
            raise KernelError("no")
        return Blocks()

    s = schedules(Causal(), ZigZag(), 2, 32768)[1]
    choose_strategy.cache_clear()
    monkeypatch.setattr(strategy, "select_kernel", select)
    try:
        chosen, why = choose_strategy(s, SHAPE, **ON_CPU, in_one_node=True)
        assert chosen.name == "direct"
        assert "gather" not in why
        monkeypatch.setattr(strategy, "select_kernel", lambda *_: (_ for _ in ()).throw(KernelError("none")))
        choose_strategy.cache_clear()
        with pytest.raises(KernelError, match="none"):
            choose_strategy(s, SHAPE, **ON_CPU, in_one_node=True)
    finally:
        choose_strategy.cache_clear()


def test_slow_links_favour_what_hides_messages_and_small_work_what_has_few_kernels():
    rates = dict.fromkeys(strategy_names(), Rates(600e12, 500e12))
    hops = hop_shares(Causal(), ZigZag(), 8, 1 << 16)
    fast, slow = (estimates(SHAPE, hops, rates, in_one_node=x) for x in (True, False))
    assert fast[Variant("gather", 2)].exposed > fast[HELD].exposed
    assert all(slow[variant].exposed >= fast[variant].exposed for variant in fast)
    tiny = estimates(replace(SHAPE, local_len=64), hops, rates, in_one_node=True)
    assert tiny[Variant("gather", 1)].total < tiny[HELD].total <= tiny[Variant("relay", holds=True)].total


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("mask", [Causal(), Full(), SlidingWindow(9) & Causal()])
def test_what_stays_for_the_backward_pass_is_what_is_estimated(mask, world):
    shape = Shape(batch=1, local_len=96 // world, num_heads=4, num_kv_heads=2, head_dim=4, itemsize=8)

    def held(mesh, chosen):
        schedule = RingSchedule.build(mask, ZigZag(), mesh.ring.rank, world, 96)
        q, k, v = (torch.randn(1, shape.local_len, h, 4, dtype=torch.float64) for h in (4, 2, 2))
        plan = chosen.plan(schedule, 2)
        *_, kept = SCHEMES[chosen.name].forward(q, k, v, *plan, "reference", 0.5, mesh.exchange.handle)
        return kept.numel()

    rates = dict.fromkeys(strategy_names(), Rates(600e12, 500e12))
    found = estimates(shape, hop_shares(mask, ZigZag(), world, 96), rates, in_one_node=True)
    assert {variant.name for variant in found} == set(strategy_names())
    for variant, estimate in found.items():
        chosen = strategy._of_variant(variant)
        most = max(run_virtual_ring(held, chosen, world=world))
        assert most == round(estimate.held * shape.local_len * shape.key_elements)
    if world > 1:
        assert found[AGAIN].held == 0 < found[HELD].held
        assert found[AGAIN].total > found[HELD].total


def test_keys_are_held_only_where_it_is_worth_it():
    """The last message behind nothing is a percent of a short shard's attention and nothing of a long one's."""
    for local_len, holds in ((8192, True), (65536, False)):
        (first, _) = schedules(Causal(), ZigZag(), 2, 2 * local_len)
        shape = replace(SHAPE, local_len=local_len)
        for names in (strategy_names(), ("direct",)):
            chosen, why = choose_strategy(first, shape, names=names, **ON_CPU, in_one_node=True)
            assert chosen == DirectStrategy(holds)
            assert ("a layer less than with the last keys held" in why) == (not holds)
        # In its own name too, and without one by what the plan says.
        found = strategy.resolve_strategy("direct", first, shape, torch.zeros(1), kernel="reference", in_one_node=True)
        assert found == DirectStrategy(holds)


def test_less_is_held_only_at_a_price_that_is_named():
    def order(*estimates: Estimate) -> list[int]:
        return ranked(dict(enumerate(estimates)))

    assert order(Estimate(1.0, 0.0, held=1.0), Estimate(WORTH, 0.0)) == [1, 0]
    assert order(Estimate(1.0, 0.0, held=1.0), Estimate(1.001 * WORTH, 0.0)) == [0, 1]
    assert order(Estimate(1.0, 0.0), Estimate(0.9, 0.0, held=1.0), Estimate(2.0, 0.0)) == [1, 0, 2]
    assert order(Estimate(1.0, 0.0), Estimate(1.0, 0.0)) == [0, 1]


def test_the_choice_is_logged_once(caplog):
    strategy._spoken.cache_clear()
    s = schedules(Causal(), ZigZag(), 4)[0]
    with caplog.at_level(logging.INFO, logger=strategy.__name__):
        for _ in range(3):
            strategy.resolve_strategy("auto", s, SHAPE, torch.zeros(1), in_one_node=True)
        strategy.resolve_strategy("relay", s, SHAPE, torch.zeros(1), in_one_node=True)
    assert len([r for r in caplog.records if r.getMessage().startswith("strategy ")]) == 1


def test_auto_is_what_a_plan_says_by_default_and_agrees_with_the_dense_result():
    def attend(mesh):
        assert mesh.plan.strategy == "auto"
        report = run_case(mesh, replace(Case("docs_causal", "zigzag"), strategy=None))
        return report.wrong, report.sent.forward > 0

    assert run_virtual_ring(attend, world=3) == [([], True)] * 3


def test_unknown_names_are_refused():
    assert ("auto", *strategy_names()) == STRATEGIES
    with pytest.raises(PlanError, match="did you mean 'relay'"):
        get_strategy("rely")
    with pytest.raises(PlanError, match="did you mean 'gather'"):
        ParallelAttention(strategy="gathr")
    said = str(ParallelPlan(strategy="dirct", transport="copyengine").problems())
    assert "did you mean 'direct'" in said
    assert "did you mean 'copy_engine'" in said
    assert set(TRANSPORTS) == {"auto", "nccl", "copy_engine"}


def test_groups_of_heads():
    assert [GatherStrategy().groups_of(n, 2) for n in (1, 2, 3, 6, 8)] == [1, 2, 3, 3, 4]
    assert GatherStrategy().groups_of(8, 1) == 1
    assert GatherStrategy(groups=8).groups_of(8, 2) == 8
    with pytest.raises(PlanError, match="1, 2, 4, 8"):
        GatherStrategy(groups=3).groups_of(8, 2)
