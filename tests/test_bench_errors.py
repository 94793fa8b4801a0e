"""`longctx bench attention --errors`: errors are measured as large as they are, and judged by the best yardstick."""

from __future__ import annotations

import math

import pytest
import torch
from bench_contenders import CPU, Broken

from longctx import bench, bench_errors, peers, results, tables
from longctx.peers import Case, Ours
from longctx.results import read


class TestErrors:
    CASE = Case(batch=2, seq_len=50, heads=4, kv_heads=2, head_dim=16, mask="window", window=9)

    def test_the_truth_is_that_of_autograd(self, monkeypatch):
        """In pieces of a few rows, under a mask that hides keys on both sides."""
        monkeypatch.setattr(bench_errors, "_SCORES", 7 * 50)
        tensors = {name: t.double() for name, t in self.CASE.inputs(CPU, torch.float32).items()}
        got = bench_errors.truth(self.CASE, **tensors)
        q, k, v = (tensors[n].requires_grad_() for n in "qkv")
        s = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) * self.CASE.scale
        s = s.masked_fill(~self.CASE.rule.materialize(50), -math.inf)
        out = torch.einsum("bhij,bjhd->bihd", s.softmax(-1), v.repeat_interleave(2, 2))
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), tensors["dout"])
        want = {
            "out": out[0, :, :2], "lse": s.logsumexp(-1)[0, :2], "dq": dq[0, :, :2], "dk": dk[0, :, 0], "dv": dv[0, :, 0],
        }  # fmt: skip
        for name, x in want.items():
            assert (got[name] - x).abs().max() <= 1e-12, name

    def test_an_error_is_measured_as_large_as_it_is(self):
        def spoil(out, dq, dk, dv):
            return out * 1.01, dq * 0.98, dk * 1.03, dv * 0.5

        found = bench_errors.measure_errors(self.CASE, [Ours("reference"), Broken(spoil)], CPU, torch.float32)
        assert set(found.errors["reference"]) == set(bench_errors.TENSORS)
        assert max(found.errors["reference"].values()) < 1e-6
        spoiled = found.errors["broken"]
        # The stand-in gives no lse.
        assert spoiled == pytest.approx({"out": 0.01, "dq": 0.02, "dk": 0.03, "dv": 0.5}, rel=1e-4)

    def test_ratios_are_of_the_least_yardstick(self):
        found = bench_errors.CaseErrors(
            self.CASE,
            {
                "cudnn-torch": {"out": 2e-3, "lse": 1e-6},
                "fa4": {"out": 4e-3},
                "x": {"out": 3e-3, "lse": 2e-6, "dq": 1.0},
            },
        )
        assert bench_errors.ratios(found, "x") == pytest.approx({"out": 1.5, "lse": 2.0})

    def test_peers_give_their_lse(self):
        fa2 = next(c for c in peers.contenders(()) if c.name == "fa2")
        case = Case(batch=2, seq_len=48, heads=4, kv_heads=2, head_dim=16)
        found = bench_errors.measure_errors(case, [fa2], CPU, torch.float32)
        assert found.errors["fa2"]["lse"] < 1e-6, found.refused

    def test_errors_are_printed_and_written(self, tmp_path, capsys):
        csv = tmp_path / "x.csv"
        words = ["attention", "--smoke", "--errors", "--only", "fa2", "reference", "--csv", str(csv)]
        assert bench.main(words) == 0
        out = capsys.readouterr().out
        assert "logits of 50" in out
        rows = read(csv)
        assert {r.name for r in rows} == {"errors/fa2", "errors/reference"}
        assert {r.metric for r in rows} == set(bench_errors.TENSORS)
        assert all(0 < r.value < 1e-4 for r in rows)
        assert "Not measured" not in tables.errors_table(rows)

    def test_errors_are_judged_by_the_best_yardstick(self):
        class Mine(Broken):
            is_ours, name, title = True, "triton", "ours: triton"

        cases = [Case(batch=1, seq_len=8, heads=1, kv_heads=1, head_dim=8, logits=x) for x in (None, 50.0)]
        found = [
            bench_errors.CaseErrors(
                cases[0], {"fa4": {"out": 2e-3, "dq": 2e-3}, "triton": {"out": 2e-3, "dq": 2.1e-3}}
            ),
            bench_errors.CaseErrors(cases[1], {"cudnn-torch": {"out": 1e-3}, "triton": {"out": 1.2e-3}}),
        ]
        mine = Mine(None)
        assert bench_errors.verdicts(found[:1], [mine]) == [
            "ours: triton: at most 1.050 x (dq of 1 x 8, 1/1 heads of 8, causal), within 1.1"
        ]
        assert bench_errors.verdicts(found, [mine])[0].endswith("logits of 50), BEYOND 1.1")
        where = results.environment("GPU X", commit="c")
        rows = [row for case in found for row in bench_errors.error_rows(case, **where)]
        assert {(r.metric, r.unit) for r in rows if r.name == "errors/triton"} == {
            ("out", "relative"), ("dq", "relative"), ("out ratio", "x"), ("dq ratio", "x"),
        }  # fmt: skip
        text = tables.errors_table(rows)
        assert "At most: ours: triton 1.20 x" in text
        assert (
            "| 1 x 8, 1/1 heads of 8, causal | **ours: triton** | 2.0e-03 (1.00 x) | - | 2.1e-03 (1.05 x) | - | - |"
            in text
        )


@pytest.mark.gpu
def test_on_a_gpu_errors_are_those_of_rounding():
    case = Case(batch=1, seq_len=1000, heads=4, kv_heads=2, head_dim=64, logits=50.0)
    entrants = [c for c in peers.contenders(("triton", "cudnn")) if c.name != "flex"]
    found = bench_errors.measure_errors(case, entrants, torch.device("cuda"), torch.bfloat16)
    assert {"fa2", "cudnn-torch", "triton", "cudnn"} <= set(found.errors), found.refused
    for errors in found.errors.values():
        assert set(errors) == set(bench_errors.TENSORS)
        assert errors["lse"] < 1e-4
        assert max(errors.values()) < 2e-2
    assert set(bench_errors.ratios(found, "triton")) == set(bench_errors.TENSORS)
