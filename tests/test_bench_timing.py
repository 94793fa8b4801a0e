"""What limits a measurement: the time of a contender, the time of a call, and what is known from before."""

from __future__ import annotations

from functools import partial
from unittest import mock

import pytest
import torch
from bench_contenders import CPU, Broken

from longctx import bench, bench_rounds, bench_timing
from longctx.peers import Case, Ours, Prepared


class TestBudget:
    """No contender takes more than its time, and the table says whom that stopped."""

    CASES = tuple(
        Case(batch=1, seq_len=n, heads=2, kv_heads=2, head_dim=16, mask="full") for n in (32, 64, 128)
    )  # fmt: skip

    @pytest.fixture
    def clock(self, monkeypatch):
        """Time that passes only where a contender says so."""
        now = [0.0]
        monkeypatch.setattr(bench_timing.time, "perf_counter", lambda: now[0])
        return now

    def slow(self, clock, flops_per_second, called="slow"):
        """The reference, at so many FLOP/s."""
        calls = []

        class Slow(Broken):
            name = called

            def prepare(self, case, **tensors):
                prepared = Ours("reference").prepare(case, **tensors)
                good = prepared.forward(), prepared.backward()

                def spend(share, result):
                    clock[0] += share * case.forward_flops / flops_per_second
                    calls.append(case.seq_len)
                    return result

                return Prepared(forward=lambda: spend(1, good[0]), backward=lambda: spend(2.5, good[1]))

        return Slow(None), calls

    def test_a_slow_contender_is_skipped_by_what_it_showed(self, clock):
        # A forward and a backward of the first case take a second, of the second four, of the third sixteen.
        speed = 3.5 * self.CASES[0].forward_flops
        slow, calls = self.slow(clock, speed)
        quick, _ = self.slow(clock, 100 * speed, called="quick")
        budget = bench_timing.Budget(10.0)
        found = [bench.measure(case, [slow, quick], CPU, torch.float32, budget=budget) for case in self.CASES]
        assert found[0].tflops["slow"]["forward"] == pytest.approx(speed / 1e12)
        assert "skipped: 12 s expected at its last" in found[1].refused["slow"]
        assert "more than the 10 s of --budget" in found[1].refused["slow"]
        assert "skipped: 48 s expected" in found[2].refused["slow"]
        assert set(calls) == {32}
        assert all("quick" in r.tflops for r in found)

    def test_a_first_case_that_takes_too_long_is_run_once(self, clock):
        slow, calls = self.slow(clock, self.CASES[0].forward_flops)
        result = bench.measure(self.CASES[0], [slow], CPU, torch.float32, budget=bench_timing.Budget(3.0))
        assert "skipped: 6 s expected by its first forward and backward" in result.refused["slow"]
        assert calls == [32, 32]

    def test_a_very_long_call_is_timed_once(self, clock):
        slow, calls = self.slow(clock, self.CASES[0].forward_flops / 2)
        result = bench.measure(self.CASES[0], [slow], CPU, torch.float32, with_parts=False)
        assert result.tflops["slow"]["forward"] == pytest.approx(self.CASES[0].forward_flops / 2e12)
        assert calls == [32] * 4, "a forward and a backward to check, and one of each to time"

    def test_when_the_time_is_over_the_rest_is_left_for_another_call(self, clock):
        speed = 3.5 * self.CASES[0].forward_flops
        slow, calls = self.slow(clock, speed)
        budget = bench_timing.Budget(100.0, 12.0)
        found = [bench.measure(case, [slow], CPU, torch.float32, budget=budget) for case in self.CASES]
        assert "slow" in found[0].tflops
        # 1 s to check; a forward and a backward of a second or less are timed three times each.
        assert clock[0] == pytest.approx(4.0)
        assert "left for another call: 12 s expected" in found[1].refused["slow"]
        assert "8 s remain of --time" in found[1].refused["slow"]
        clock[0] = 12.0
        late = bench.measure(self.CASES[0], [slow], CPU, torch.float32, budget=budget)
        assert late.refused["slow"] == "left for another call: the 12 s of --time are over"
        assert set(calls) == {32}

    def test_what_is_known_is_not_run_again_and_predicts(self, clock):
        speed = 3.5 * self.CASES[0].forward_flops
        slow, calls = self.slow(clock, speed)
        known = {"slow": {"forward": 1.0, "backward": 2.0, "forward+backward": speed / 1e12}}
        budget = bench_timing.Budget(10.0)
        result = bench.measure(self.CASES[0], [slow], CPU, torch.float32, budget=budget, kept=known)
        assert result.tflops == known
        after = bench.measure(self.CASES[1], [slow], CPU, torch.float32, budget=budget)
        assert "skipped: 12 s expected at its last" in after.refused["slow"]
        assert calls == []

    def test_without_a_budget_everything_is_measured(self, clock):
        slow, _ = self.slow(clock, 1.0)
        assert bench.measure(self.CASES[0], [slow], CPU, torch.float32).refused == {}

    def test_what_waits_for_its_turn_has_its_time_reserved(self, clock):
        speed = 3.5 * self.CASES[0].forward_flops
        first, calls = self.slow(clock, speed, called="first")
        second, late = self.slow(clock, speed, called="second")
        budget = bench_timing.Budget(100.0, 7.0)
        result = bench.measure(self.CASES[0], [first, second], CPU, torch.float32, budget=budget)
        assert list(result.tflops) == ["first"]
        # Of the 7 s each took one to be checked, and the first's three rounds are to come.
        assert "3 s expected by its first forward and backward, and 2 s remain" in result.refused["second"]
        assert (len(calls), len(late)) == (8, 2)


class TestTurns:
    CASE = Case(batch=1, seq_len=32, heads=2, kv_heads=2, head_dim=16, mask="full")

    def contender(self, called, log, fails_after=999):
        class Logged(Broken):
            name = called

            def prepare(self, case, **tensors):
                prepared = Ours("reference").prepare(case, **tensors)
                results = {"forward": prepared.forward(), "backward": prepared.backward()}

                def run(metric):
                    log.append((called, metric))
                    if len(log) > fails_after:
                        raise RuntimeError("worn out")
                    return results[metric]

                return Prepared(forward=lambda: run("forward"), backward=lambda: run("backward"))

        return Logged(None)

    def test_a_turn_runs_everybody_once(self, monkeypatch):
        # However long a call takes on a busy machine.
        monkeypatch.setattr(bench_rounds, "FEWEST", bench_rounds.MOST)
        log = []
        found = bench.measure(self.CASE, [self.contender(c, log) for c in "ab"], CPU, torch.float32)
        assert list(found.tflops) == ["a", "b"]
        checked = [("a", "forward"), ("a", "backward"), ("b", "forward"), ("b", "backward")]
        assert log[:4] == checked
        turns = [tuple(log[n : n + 4]) for n in range(4, len(log), 4)]
        assert all(sorted(turn) == sorted(checked) for turn in turns)
        assert len(turns) == bench_rounds.MOST
        # Nobody is always first.
        assert len(set(turns)) > 12

    def test_what_is_run_less_often_is_spread_over_the_turns(self):
        log = []
        calls = {n: bench_rounds.Call(partial(log.append, n), s) for n, s in (("often", 0.01), ("seldom", 0.1))}
        found, failed = bench_rounds.medians_ms(calls, CPU)
        assert (list(found), failed) == (["often", "seldom"], {})
        assert (log.count("often"), log.count("seldom")) == (30, 3)
        assert [log[n : n + 11].count("seldom") for n in (0, 11, 22)] == [1, 1, 1]

    def test_a_product_takes_turns_with_them(self):
        found = bench.measure(self.CASE, [self.contender("a", [])], CPU, torch.float32, product_size=64)
        assert 0 < found.bound < 1
        assert bench.measure(self.CASE, [self.contender("a", [])], CPU, torch.float32).bound is None
        # Nobody to take turns with.
        assert bench.measure(self.CASE, [], CPU, torch.float32, product_size=64).bound is None

    def test_who_fails_when_timed_leaves_the_reason_and_the_others_a_number(self):
        log = []
        entrants = [self.contender("a", []), self.contender("b", log, fails_after=3)]
        found = bench.measure(self.CASE, entrants, CPU, torch.float32)
        assert list(found.tflops) == ["a"]
        assert found.refused == {"b": "RuntimeError: worn out"}

    def test_who_holds_much_memory_is_timed_before_the_next_one_comes(self, monkeypatch):
        log = []
        held = iter([0.1, 0.1 + bench_timing.HELD_SHARE + 0.01, 0.1, 0.1])
        monkeypatch.setattr(bench_timing, "_held", lambda device: next(held))
        found = bench.measure(self.CASE, [self.contender(c, log) for c in "ab"], CPU, torch.float32)
        assert list(found.tflops) == ["a", "b"]
        half = len(log) // 2
        assert {name for name, _ in log[:half]} == {"a"}
        assert {name for name, _ in log[half:]} == {"b"}

    @pytest.mark.parametrize(("seconds", "times"), [(0.0, 50), (1e-4, 50), (0.01, 30), (0.1, 3), (1.0, 3), (1.1, 1)])
    def test_the_longer_a_call_the_fewer_times_it_is_run(self, seconds, times):
        assert bench_rounds.Call(print, seconds).times == times

    def test_one_call_alone(self):
        times = [0.0, 1.0, *[x for t in (0.1, 0.5, 0.3) for x in (0.0, t)]]
        with mock.patch.object(bench_rounds.time, "perf_counter", side_effect=times):
            call = bench_rounds.warmed_up(lambda: None, CPU)
            assert bench_rounds.medians_ms({0: call}, CPU) == ({0: pytest.approx(300)}, {})
        with pytest.raises(ZeroDivisionError):
            bench_rounds.warmed_up(lambda: 1 / 0, CPU)


@pytest.mark.gpu
def test_on_a_gpu_calls_are_timed_by_turns_and_alone_alike():
    device = torch.device("cuda")
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for n in (2048, 4096))
    products = [lambda: a @ a, lambda: b @ b]
    for product in products:
        product()
    calls = {n: bench_rounds.Call(product, 1e-3) for n, product in enumerate(products)}
    ms, failed = bench_rounds.medians_ms({**calls, 2: bench_rounds.Call(lambda: a @ b, 1e-3)}, device)
    assert list(failed) == [2]
    for n, product in enumerate(products):
        alone, _ = bench_rounds.medians_ms({n: bench_rounds.warmed_up(product, device)}, device)
        assert ms[n] == pytest.approx(alone[n], rel=0.3)
    assert 4 < ms[1] / ms[0] < 16
