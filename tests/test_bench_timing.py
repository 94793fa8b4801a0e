"""What limits a measurement: the time of a contender, the time of a call, and what is known from before."""

from __future__ import annotations

import pytest
import torch
from bench_contenders import CPU, Broken

from longctx import bench, bench_timing
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
        result = bench.measure(self.CASES[0], [slow], CPU, torch.float32, budget=bench_timing.Budget(10.0))
        assert "skipped: 10 s expected by its first forward and backward" in result.refused["slow"]
        assert calls == [32, 32]

    def test_a_very_long_call_is_timed_once(self, clock):
        slow, calls = self.slow(clock, self.CASES[0].forward_flops)
        result = bench.measure(self.CASES[0], [slow], CPU, torch.float32, with_parts=False)
        assert result.tflops["slow"]["forward"] == pytest.approx(self.CASES[0].forward_flops / 1e12)
        assert calls == [32] * 4, "a forward and a backward to check, and one of each to time"

    def test_when_the_time_is_over_the_rest_is_left_for_another_call(self, clock):
        speed = 3.5 * self.CASES[0].forward_flops
        slow, calls = self.slow(clock, speed)
        budget = bench_timing.Budget(100.0, 12.0)
        found = [bench.measure(case, [slow], CPU, torch.float32, budget=budget) for case in self.CASES]
        assert "slow" in found[0].tflops
        # 1 s to check; a forward and a backward of a second or less are timed four times each.
        assert clock[0] == pytest.approx(5.0)
        assert "left for another call: 12 s expected" in found[1].refused["slow"]
        assert "7 s remain of --time" in found[1].refused["slow"]
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
