"""Plans: ranks and coordinates are one to one, and everything that does not fit is said at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longctx.errors import PlanError
from longctx.layout import layout_names
from longctx.parallel.plan import Coords, ParallelPlan
from longctx.sequence import SequenceMeta

DEGREES = st.integers(1, 4)


@given(dp=DEGREES, pp=DEGREES, ring=DEGREES, ulysses=DEGREES, tp=DEGREES)
def test_every_rank_has_its_own_place(dp, pp, ring, ulysses, tp):
    plan = ParallelPlan(dp=dp, pp=pp, ring=ring, ulysses=ulysses, tp=tp)
    assert plan.world_size == dp * pp * ring * ulysses * tp
    assert plan.grad_world == dp * ring * ulysses
    places = [plan.coords(rank) for rank in range(plan.world_size)]
    assert len(set(places)) == plan.world_size
    assert [plan.rank_of(place) for place in places] == list(range(plan.world_size))


def test_order_of_the_axes():
    """Tensor parallel neighbours are next to each other, then Ulysses, ring, dp; pipeline stages are furthest apart."""
    plan = ParallelPlan(dp=2, pp=2, ring=2, ulysses=2, tp=2)
    assert plan.coords(0) == Coords(dp=0, pp=0, ring=0, ulysses=0, tp=0)
    assert plan.coords(1) == Coords(dp=0, pp=0, ring=0, ulysses=0, tp=1)
    assert plan.coords(2) == Coords(dp=0, pp=0, ring=0, ulysses=1, tp=0)
    assert plan.coords(4) == Coords(dp=0, pp=0, ring=1, ulysses=0, tp=0)
    assert plan.coords(8) == Coords(dp=1, pp=0, ring=0, ulysses=0, tp=0)
    assert plan.coords(16) == Coords(dp=0, pp=1, ring=0, ulysses=0, tp=0)
    assert str(plan.coords(30)) == "dp1 pp1 ring1 uly1 tp0"


@given(ring=DEGREES, dp=DEGREES)
def test_resolve_fills_in_dp(ring, dp):
    plan = ParallelPlan(ring=ring).resolve(ring * dp)
    assert plan.dp == dp
    assert plan == ParallelPlan(ring=ring, dp=dp).resolve(ring * dp)
    assert plan.resolve(ring * dp) is plan


def test_resolve_names_what_would_fit():
    with pytest.raises(PlanError) as error:
        ParallelPlan(ring=4).resolve(6)
    assert str(error.value) == (
        "1 problem with this plan (dp rest, pp 1, ring 4, ulysses 1, tp 1, world 6)\n"
        "  1. world size 6 is not a multiple of pp * ring * ulysses * tp = 4\n"
        "       start 4 or 8 processes, or use ring 1, 2, 3, 6 alone"
    )
    with pytest.raises(PlanError, match=r"start 4 processes, or use ring 1 alone"):
        ParallelPlan(ring=4).resolve(1)
    with pytest.raises(PlanError, match=r"= 8, but the world has 4 processes\n       dp 2 fits"):
        ParallelPlan(dp=4, ring=2).resolve(4)
    with pytest.raises(PlanError, match=r"world size 0: at least 1"):
        ParallelPlan().resolve(0)


def test_every_problem_is_listed():
    with pytest.raises(PlanError) as error:
        ParallelPlan(pp=2, ulysses=2, tp=2, ring=3, layout="zigzagg").resolve(7)
    message = str(error.value)
    assert message.startswith("2 problems with this plan")
    assert "did you mean 'zigzag'" in message
    assert "not a multiple of pp * ring * ulysses * tp = 24" in message


@pytest.mark.parametrize("name", ["dp", "pp", "ring", "ulysses", "tp"])
def test_a_degree_is_at_least_one(name):
    plan = ParallelPlan(**{name: 0})
    assert [p.what for p in plan.problems()] == [f"{name} = 0: a degree is at least 1"]
    assert any(p.what.startswith(f"{name} = 0") for p in plan.check(num_heads=4, num_kv_heads=2, seq_len=64))
    with pytest.raises(PlanError, match=f"{name} = 0"):
        plan.resolve(4)


def test_check_finds_nothing_where_nothing_is_wrong():
    assert ParallelPlan(ring=4).check(num_heads=4, num_kv_heads=1, seq_len=1024) == []
    # Heads are not divided by a ring.
    assert ParallelPlan(ring=8).check(num_heads=3, num_kv_heads=3, seq_len=16) == []


def test_any_length_with_a_token_for_each_rank():
    for layout in layout_names():
        plan = ParallelPlan(ring=4, ulysses=2, layout=layout)
        assert plan.check(num_heads=8, num_kv_heads=2, seq_len=131_083) == []
        assert plan.check(num_heads=8, num_kv_heads=2, seq_len=8) == []
        (problem,) = plan.check(num_heads=8, num_kv_heads=2, seq_len=7)
        assert problem.what == "seq_len = 7 is less than a token for each of the 8 ranks that share a sequence"
        assert problem.hint == "use 8 or more, or a smaller ring"


def test_gradients_on_the_wire():
    assert ParallelPlan(ring=2).wire_dtype is None
    plan = ParallelPlan(ring=2, grad_dtype="bf16")
    assert plan.wire_dtype == torch.bfloat16
    assert plan.problems() == []
    for alone in (ParallelPlan(grad_dtype="bf16"), ParallelPlan(ulysses=4, grad_dtype="bf16")):
        with pytest.raises(PlanError, match="grad_dtype = bf16 with ring 1: only a ring sends gradients"):
            alone.resolve(4)
    with pytest.raises(PlanError, match="grad_dtype = 'fp16' is not known"):
        ParallelPlan(ring=2, grad_dtype="fp16").resolve(2)


def test_ulysses_divides_heads_and_lengths():
    def check(ring, ulysses, heads, kv_heads, seq_len=1 << 12):
        plan = ParallelPlan(ring=ring, ulysses=ulysses)
        return [(p.what, p.hint) for p in plan.check(num_heads=heads, num_kv_heads=kv_heads, seq_len=seq_len)]

    assert check(1, 4, 8, 2) == check(2, 8, 8, 1) == check(4, 2, 8, 2) == []
    # A ring shard of 2 x 2 zigzag chunks needs no more than one chunk a rank.
    assert check(2, 2, 4, 2, seq_len=4) == []
    assert check(1, 3, 8, 2, seq_len=12) == [
        (
            "num_heads 8 is not a multiple of ulysses 3",
            "nearest for the same processes: ulysses 1 with ring 3; these heads allow ulysses 1, 2, 4, 8",
        )
    ]
    ((what, hint),) = check(1, 4, 12, 6)
    assert what.startswith("num_kv_heads 6 and ulysses 4: neither is a multiple of the other")
    assert hint.startswith("nearest for the same processes: ulysses 2 with ring 2 or ulysses 1 with ring 4;")
    assert check(2, 3, 6, 3, seq_len=17) == []
    assert len(check(1, 3, 8, 2, seq_len=2)) == 2


def test_check_finds_heads_that_do_not_group():
    (problem,) = ParallelPlan().check(num_heads=6, num_kv_heads=4, seq_len=64)
    assert problem.what == "num_heads 6 is not a multiple of num_kv_heads 4"
    assert problem.hint == "num_kv_heads may be 1, 2, 3, 6"


def test_an_open_plan_has_no_ranks_yet():
    for ask in (lambda p: p.world_size, lambda p: p.coords(0), lambda p: p.grad_world):
        with pytest.raises(PlanError, match="resolve"):
            ask(ParallelPlan(ring=2))
    with pytest.raises(PlanError, match="rank 4 is not one of the 4"):
        ParallelPlan(dp=2, ring=2).coords(4)


def test_describe_shows_who_holds_what():
    plan = ParallelPlan(dp=1, ring=2)
    assert plan.describe(16).splitlines() == [
        "dp 1, pp 1, ring 2, ulysses 1, tp 1: 2 ranks, layout zigzag",
        "  rank 0  dp0 pp0 ring0 uly0 tp0  tokens 0-3, 12-15  with ring 0,1",
        "  rank 1  dp0 pp0 ring1 uly0 tp0  tokens 4-11  with ring 0,1",
    ]
    assert "tokens" not in plan.describe()
    both = ParallelPlan(dp=1, ring=2, ulysses=2).describe(16).splitlines()[1:]
    assert [line.split("  ")[3].removeprefix("tokens ") for line in both] == ["0-3", "12-15", "4-7", "8-11"]
    padded = ParallelPlan(dp=1, ring=3).describe(8).splitlines()[1:]
    assert [line.split("  ")[3].removeprefix("tokens ") for line in padded] == [
        "0-1, 2 of padding",
        "2-3, 2 of padding",
        "4-7",
    ]
    auto = ParallelPlan(dp=1, ring=2, layout="auto").describe(1 << 12).splitlines()
    assert auto[0].endswith("layout auto; positions for a causal mask, other masks may have others")
    assert auto[1].endswith("tokens 0-1_023, 3_072-4_095  with ring 0,1")
    striped = ParallelPlan(dp=1, ring=2, layout="striped").describe(1 << 12)
    assert "tokens 1, 3, 5, 7, ... (2_048 spans)" in striped
    assert ParallelPlan(dp=1).describe(1 << 20).splitlines()[1].endswith("tokens 0-1_048_575")


def test_describe_shows_stages_and_peers():
    plan = ParallelPlan(dp=2, pp=2, ring=2, tp=2)
    lines = plan.describe(16, [range(3), range(3, 5)]).splitlines()[1:]
    assert lines[0] == (
        "  rank  0  dp0 pp0 ring0 uly0 tp0  tokens 0-3, 12-15  layers 0-2 and embedding"
        "  with tp 0,1; ring 0,2; dp 0,4; pp 0,8"
    )
    assert lines[15] == (
        "  rank 15  dp1 pp1 ring1 uly0 tp1  tokens 4-11  layers 3-4 and head  with tp 14,15; ring 13,15; dp 11,15; pp 7,15"
    )


def test_two_stages_a_process():
    plan = ParallelPlan(dp=1, pp=2, schedule="dualpipev")
    lines = plan.describe(layers=[range(2), range(2, 4), range(4, 6), range(6, 7)]).splitlines()[1:]
    assert [line.split("layers ")[1] for line in lines] == [
        "0-1 and embedding, 6-6 and head  with pp 0,1",
        "2-3, 4-5  with pp 0,1",
    ]
    (problem,) = plan.check(num_heads=1, num_kv_heads=1, seq_len=64, num_layers=3)
    assert problem.what == "pp 2 with schedule dualpipev has more stages than the model has layers, 3"
    assert problem.hint == "nearest for the same processes: pp 1 with ring 2"
    (problem,) = ParallelPlan(schedule="dualpipev").problems()
    assert problem.hint == "schedule 1f1b, or pp 2"
    (problem,) = ParallelPlan(pp=2, schedule="dualpipe").problems()
    assert "did you mean 'dualpipev'?" in problem.what


def test_check_finds_what_stages_and_matrices_cannot_share():
    def check(heads=8, kv_heads=4, **plan):
        sizes = {"num_layers": 3, "mlp_size": 96, "vocab_size": 130}
        found = ParallelPlan(**plan).check(num_heads=heads, num_kv_heads=kv_heads, seq_len=64, **sizes)
        return [(p.what, p.hint) for p in found]

    assert check(pp=3, tp=2) == check(tp=2, ulysses=4) == check(tp=1, pp=2) == []
    assert check(pp=4) == [
        ("pp 4 has more stages than the model has layers, 3", "nearest for the same processes: pp 2 with ring 2")
    ]
    assert check(tp=4) == [("vocab_size 130 is not a multiple of tp 4", "model.vocab_size 132 is a multiple of 4")]
    assert check(tp=8) == [
        (
            "num_kv_heads 4 and vocab_size 130 are no multiples of tp 8",
            "nearest for the same processes: tp 4 with ring 2; these heads and projections allow tp 1, 2, 4; "
            "model.vocab_size 136 is a multiple of 8",
        )
    ]
    # Ulysses has the heads of one tp rank.
    ((what, _),) = check(tp=2, ulysses=8)
    assert what == "num_heads 4 of each of 2 tp ranks is not a multiple of ulysses 8"
    assert len(check(tp=4, ulysses=8, pp=4)) == 3
    assert check(tp=2, ring=2, shard_norms=True) == []
    assert check(shard_norms=True) == [
        ("shard_norms = true, but there is no tp to share norms", "shard_norms false, or tp 2")
    ]


def test_sharded_norms_pad_to_tokens_that_their_ranks_can_share():
    plan = ParallelPlan(dp=1, ring=2, tp=3, shard_norms=True)
    assert (plan.local_multiple, plan.seq_multiple) == (3, 12)
    assert plan.check(num_heads=9, num_kv_heads=3, seq_len=64) == []
    lines = plan.describe(22).splitlines()[1:]
    assert lines[0].split("  ")[3] == "tokens 0-5, 18-21, 2 of padding"
    assert lines[3].split("  ")[3] == "tokens 6-17"
    assert replace(plan, shard_norms=False).seq_multiple == 4
    for layout in layout_names():
        for tp in (2, 3, 4):
            plan = ParallelPlan(ring=2, ulysses=3, tp=tp, layout=layout, shard_norms=True)
            meta = SequenceMeta.of(65, layout=layout, ring_world=2, ulysses_world=3, local_multiple=plan.local_multiple)
            assert meta.local_len % tp == 0
            assert meta.padded_len % plan.seq_multiple == 0
