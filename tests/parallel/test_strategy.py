"""The strategies of a ring against the dense result, their traffic against their formulas, and how one is chosen."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from dense_masks import mask_strategy
from hypothesis import given, settings
from hypothesis import strategies as st
from ring_cases import BATCH, LAYOUTS, MASKS, SEQ_LEN, Case, Report, run_case

from longctx import functional
from longctx.errors import DistributedError, KernelError
from longctx.layout import ZigZag
from longctx.masks import Causal, SlidingWindow
from longctx.parallel import direct, gather, moves
from longctx.parallel.exchange import RingExchange, Trade
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.moves import Span, build_moves
from longctx.parallel.plan import ParallelPlan
from longctx.parallel.schedule import RingSchedule
from longctx.parallel.strategy import DirectStrategy, get_strategy, strategy_names
from longctx.sequence import SequenceMeta
from longctx.testing import run_distributed, run_virtual_ring

NEW = ("direct", DirectStrategy(holds=False), DirectStrategy(holds=True, groups=2), "gather")


def each(function):
    return pytest.mark.parametrize("name", NEW, ids=str)(function)


def cases_of(name: str | DirectStrategy) -> dict[str, Case]:
    """Every mask with every layout exactly; single precision and bf16; the groupings of heads."""
    cases = [Case(mask, layout) for mask, layout in itertools.product(MASKS, LAYOUTS)]
    cases += [Case(mask, "zigzag", torch.float32, lse_gradient=False) for mask in ("causal", "docs", "window_causal")]
    cases += [Case("docs_causal", "zigzag", heads=heads) for heads in ("mqa", "mha", "gqa6")]
    cases += [Case("own_docs_causal", layout, torch.bfloat16) for layout in LAYOUTS]
    return {str(case): replace(case, strategy=name) for case in cases}


# ---- on real processes


def worker(rank: int, plan: ParallelPlan, cases: dict[str, Case]) -> dict[str, Report]:
    # Fills torch.empty with NaN.
    torch.use_deterministic_algorithms(True)
    mesh = ParallelMesh.create(plan, device="cpu")
    return {name: run_case(mesh, case) for name, case in cases.items()}


def problems(found: list[dict[str, Report]]) -> dict:
    """What is wrong, or was not sent as predicted, by rank and case."""
    return {
        (rank, name): (r.wrong, r.sent, r.predicted)
        for rank, reports in enumerate(found)
        for name, r in reports.items()
        if r.wrong or r.sent != r.predicted
    }


@each
def test_three_processes(name):
    cases = cases_of(name)
    found = run_distributed(worker, ParallelPlan(ring=3), cases, world=3)
    assert problems(found) == {}
    assert len(found[0]) == len(cases) > len(MASKS) * len(LAYOUTS)


@each
def test_inside_exchanged_heads(name):
    """The hybrid is composition: Ulysses around any strategy."""
    cases = {
        f"{mask}-{layout}": Case(mask, layout, strategy=name)
        for mask, layout in itertools.product(("causal", "own_docs_causal", "window"), ("zigzag", "striped4"))
    }
    assert problems(run_distributed(worker, ParallelPlan(ring=2, ulysses=2), cases, world=4)) == {}


# ---- on virtual rings


@pytest.mark.parametrize("world", [1, 2, 4, 6])
@each
def test_virtual_rings(name, world):
    for mask, layout in itertools.product(("causal", "full", "own_docs", "docs_causal_window"), ("zigzag", "striped1")):
        assert (
            problems([{"": r} for r in run_virtual_ring(run_case, Case(mask, layout, strategy=name), world=world)])
            == {}
        )


@settings(max_examples=30)
@given(data=st.data(), world=st.integers(2, 5), layout=st.sampled_from(sorted(LAYOUTS)), name=st.sampled_from(NEW))
def test_any_mask_on_any_ring(data, world, layout, name):
    seq_len = LAYOUTS[layout].multiple(world) * data.draw(st.integers(1, 3))
    mask = data.draw(mask_strategy(seq_len, data.draw(st.sampled_from([None, BATCH]))))
    case = Case("any", layout, head_dim=2, seq_len=seq_len, strategy=name)
    assert problems([{"": r} for r in run_virtual_ring(run_case, case, mask, world=world)]) == {}


@each
def test_gradients_may_travel_in_half_precision(name):
    case = Case("causal", "zigzag", torch.float32, strategy=name)
    full = run_virtual_ring(run_case, case, world=3)
    half = run_virtual_ring(run_case, case, world=3, grad_dtype=torch.bfloat16)
    for a, b in zip(half, full, strict=True):
        assert all(a.errors[x] == b.errors[x] for x in ("out", "lse", "dq"))
        assert all(1e-4 < a.errors[x][0] < 5e-2 for x in ("dk", "dv"))
        assert a.sent == a.predicted
        assert a.sent.backward < b.sent.backward


def test_a_kernel_that_cannot_do_it_fails_before_any_message():
    def attend(mesh, name):
        meta = SequenceMeta.of(SEQ_LEN, ring_rank=mesh.ring.rank, ring_world=mesh.ring.size)
        q = torch.randn(1, meta.local_len, 2, 4, dtype=torch.float64)
        with pytest.raises(KernelError, match="triton"):
            functional.ring_attention(q, q, q, meta=meta, mesh=mesh, kernel="triton", strategy=name)
        return mesh.exchange.bytes_sent

    for name in NEW:
        assert run_virtual_ring(attend, name, world=2) == [0, 0]


def test_receive_buffers_are_made_once():
    """A second step, and other layers, take the buffers of the first."""

    def steps(mesh, name):
        case, seen = Case("causal", "zigzag", strategy=name), []
        for _ in range(3):
            run_case(mesh, case)
            seen.append({key: x.data_ptr() for key, x in mesh.exchange._buffers.items()})
        return seen

    for name in NEW:
        for first, second, third in run_virtual_ring(steps, name, world=3):
            assert first
            assert first == second == third


# ---- broken twins: mistakes that the checks above must see


def _is_caught(name: str | DirectStrategy, layout: str = "zigzag", world: int = 3) -> bool:
    case = Case("causal", layout, seq_len=SEQ_LEN // 3 * world, strategy=name)
    return any(r.wrong for r in run_virtual_ring(run_case, case, world=world))


def _tampered(monkeypatch, change):
    trade = RingExchange.trade
    monkeypatch.setattr(RingExchange, "trade", lambda self, *args, **kwargs: change(trade, self, *args, **kwargs))


def _gradients_stay_away(trade, self, send, receive, shift, **rest):
    result = trade(self, send, receive, shift, **rest)
    if "dK/dV" not in rest["what"]:
        return result
    result.wait()
    for x in receive:
        x.zero_()
    return Trade((), lambda: None, lambda error: AssertionError())


def _last_received_twice(trade, self, send, receive, shift, **rest):
    return trade(self, send[::-1], receive, shift, **rest)


def _read_before_arrival(trade, self, send, receive, shift, **rest):
    result = trade(self, send, receive, shift, **rest)
    early = [x.clone() for x in receive]
    result.wait()
    for x, then in zip(receive, early, strict=True):
        x.copy_(then)
    return Trade((), lambda: None, lambda error: AssertionError())


@each
@pytest.mark.parametrize("twin", [_gradients_stay_away, _last_received_twice, _read_before_arrival])
def test_broken_messages_are_caught(monkeypatch, twin, name):
    assert not _is_caught(name)
    _tampered(monkeypatch, twin)
    assert _is_caught(name)


@pytest.mark.parametrize("layout", ["zigzag", "striped1"])
@each
def test_one_buffer_instead_of_two_is_caught(monkeypatch, name, layout):
    def only_one(self, purpose, shape, dtype, device):
        return self._reserved((purpose, 0), shape, dtype, device)

    # The direct exchange needs the second from the fourth hop on where the last one's block lies elsewhere.
    world = 3 if name == "gather" else 5
    assert not _is_caught(name, layout, world)
    monkeypatch.setattr(RingExchange, "buffer", only_one)
    assert _is_caught(name, layout, world)


@each
def test_a_key_too_few_is_caught(monkeypatch, name):
    right = moves.needed

    def one_less(lo, hi):
        first, last = right(lo, hi)
        return Span(min(first + 1, last), last)

    monkeypatch.setattr(moves, "needed", one_less)
    for cached in (moves._build_moves, moves._direct_plan, moves._gather_plan):
        cached.cache_clear()
    try:
        caught = _is_caught(name)
    except Exception:  # intervals beyond the keys that are there are refused
        caught = True
    finally:
        for cached in (moves._build_moves, moves._direct_plan, moves._gather_plan):
            cached.cache_clear()
    assert caught


# ---- what travels


def schedules(mask, layout, world, seq_len=SEQ_LEN) -> list[RingSchedule]:
    return [RingSchedule.build(mask, layout, r, world, seq_len) for r in range(world)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", MASKS)
def test_what_one_sends_is_what_the_other_expects(mask, layout):
    found = [build_moves(s) for s in schedules(MASKS[mask], LAYOUTS[layout], 4)]
    for rank, of_rank in enumerate(found):
        for i, move in enumerate(of_rank):
            if move.distance:
                assert move.receive == found[(rank - move.distance) % 4][i].send


def test_two_ranks_of_zigzag():
    """Rank 1 sees the first chunk of rank 0; of rank 0, the last chunk sees all that rank 1 has."""
    first, second = (build_moves(s)[1] for s in schedules(Causal(), ZigZag(), 2))
    assert (first.send, first.receive) == (Span(0, 24), Span(0, 48))
    assert (second.send, second.receive) == (Span(0, 48), Span(0, 24))


@pytest.mark.parametrize("world", [2, 4, 8])
def test_zigzag_sends_half_on_half_of_the_hops(world):
    shape = {"batch": 1, "num_kv_heads": 2, "head_dim": 8, "itemsize": 2}
    ranks = schedules(Causal(), ZigZag(), world)
    sent = {name: sum(get_strategy(name).comm_bytes(s, **shape).forward for s in ranks) for name in strategy_names()}
    assert sent["direct"] == sent["gather"] == sent["relay"] * 3 // 4


def test_what_is_not_held_comes_again():
    """Rank 1 needs half of rank 0's keys, rank 0 all of rank 1's; what they need they send home in fp32."""
    shape = {"batch": 1, "num_kv_heads": 1, "head_dim": 1, "itemsize": 2}
    ranks = schedules(Causal(), ZigZag(), 2)
    held, again = (
        [DirectStrategy(holds).comm_bytes(s, **shape).backward for s in ranks] for holds in (True, False)
    )  # fmt: skip
    assert held == [2 * 48 * 4, 2 * 24 * 4]
    assert again == [held[0] + 2 * 24 * 2, held[1] + 2 * 48 * 2]


def test_a_window_sends_a_halo():
    mask, shape = SlidingWindow(9) & Causal(), {"batch": 1, "num_kv_heads": 1, "head_dim": 1, "itemsize": 1}
    ranks = schedules(mask, LAYOUTS["contiguous"], 4)
    # Eight keys of the neighbour, K and V; the last rank's keys serve nobody else.
    assert [get_strategy("direct").comm_bytes(s, **shape).forward for s in ranks] == [16, 16, 16, 0]


# ---- as operators


@pytest.mark.parametrize("name", [DirectStrategy(), DirectStrategy(holds=False, groups=2), "gather"], ids=str)
def test_operators_are_well_registered(name):
    operators = direct.DIRECT_ATTENTION if isinstance(name, DirectStrategy) else gather.GATHER_ATTENTION
    q, k, v = (torch.randn(2, SEQ_LEN, h, 4) for h in (4, 2, 2))
    schedule = RingSchedule.build(MASKS["own_docs"], LAYOUTS["contiguous"], 0, 1, SEQ_LEN)
    plan = (get_strategy(name) if isinstance(name, str) else name).plan(schedule, 2)
    if isinstance(name, DirectStrategy):
        # Nothing travels in a ring of one, in which operators can be called from here.
        plan = plan._replace(groups=name.groups)
    for sinks in (None, torch.zeros(4)):
        rest = (*plan, "reference", 0.3, "", 0.0, sinks)
        wanted = [x.clone().requires_grad_() for x in (q, k, v)]
        torch.library.opcheck(operators.forward, (*wanted, *rest))
        out, lse, held = operators.forward(q, k, v, *rest)
        args = (torch.ones_like(out), torch.ones_like(lse), out, lse, held, q, k, v, *rest)
        torch.library.opcheck(operators.backward, args)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("holds", [True, False])
def test_what_the_fakes_say_of_a_ring_is_true(holds, groups):
    def attend(mesh):
        s = SEQ_LEN // mesh.ring.size
        real = [torch.randn(2, s, h, 4, dtype=torch.bfloat16) for h in (4, 2, 2)]
        schedule = RingSchedule.build(Causal(), ZigZag(), mesh.ring.rank, mesh.ring.size, SEQ_LEN)
        *plan, size, groups_of = DirectStrategy(holds, groups).plan(schedule, 2)
        assert groups_of == groups
        rest = (size, groups, "reference", 0.3, mesh.exchange.handle)
        results = direct.DIRECT_ATTENTION.forward(*real, *plan, *rest)
        grads = direct.DIRECT_ATTENTION.backward(torch.ones_like(real[0]), None, *results, *real, *plan, *rest)
        return real, plan, size, results, grads

    from torch._subclasses.fake_tensor import FakeTensorMode

    for real, plan, size, results, grads in run_virtual_ring(attend, world=3):
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            q, k, v, *plan = (mode.from_tensor(x) for x in (*real, *plan))
            rest = (size, groups, "reference", 0.3, "nowhere")
            fakes = direct.DIRECT_ATTENTION.forward(q, k, v, *plan, *rest)
            fake_grads = direct.DIRECT_ATTENTION.backward(torch.ones_like(q), None, *fakes, q, k, v, *plan, *rest)
        for fake, true in zip((*fakes, *fake_grads), (*results, *grads), strict=True):
            assert (fake.shape, fake.dtype, fake.stride()) == (true.shape, true.dtype, true.stride())


# ---- transports


def refused_on_cpus(rank: int) -> str:
    with pytest.raises(DistributedError) as error:
        ParallelMesh.create(ParallelPlan(ring=2, transport="copy_engine"), device="cpu")
    mesh = ParallelMesh.create(ParallelPlan(ring=2, transport="auto"), device="cpu")
    assert mesh.ring_in_one_node
    return str(error.value)


def test_copy_engines_are_refused_where_there_are_none():
    for rank, said in enumerate(run_distributed(refused_on_cpus, world=2)):
        assert said.startswith(
            f"[rank {rank} | dp0 pp0 ring{rank} uly0 tp0] transport 'copy_engine' cannot be had: cpu"
        )
        assert "leave transport 'auto'" in said


def gpu_worker(rank: int, transport: str, cases: dict[str, Case]) -> dict[str, Report]:
    mesh = ParallelMesh.create(ParallelPlan(ring=2, transport=transport), device=torch.device("cuda", rank))
    # Several rounds: slots and signals are used again.
    return {f"{name}-{i}": run_case(mesh, case) for i in range(3) for name, case in cases.items()}


@pytest.mark.gpu2
@pytest.mark.parametrize("transport", ["nccl", "copy_engine"])
def test_strategies_of_gpus(transport):
    cases = {
        f"{mask}-{layout}-{name}": Case(
            mask,
            layout,
            torch.bfloat16,
            head_dim=128,
            seq_len=seq_len,
            kernel="auto",
            lse_gradient=False,
            strategy=name,
        )
        for mask, layout, name, seq_len in itertools.product(
            ("causal", "window_causal", "prefix"),
            ("zigzag", "striped4"),
            (*strategy_names(), DirectStrategy(holds=False, groups=2)),
            (512, 2048),
        )
    }
    found = run_distributed(gpu_worker, transport, cases, world=2, backend="nccl", timeout_s=300)
    assert problems(found) == {}
