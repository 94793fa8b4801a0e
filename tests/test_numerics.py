"""The error of attention over a ring does not grow with the ring: virtual rings of up to 64 ranks beside one rank."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from longctx import numerics
from longctx.kernels.reference import ReferenceAttention
from longctx.numerics import TENSORS, RingNumerics, main
from longctx.results import read

# What a ring may add to the error of one rank.
ALLOWED = 1.1


@cache
def errors(world: int, dtype: str, wire: str = "fp32") -> dict[str, float]:
    return RingNumerics(world=world, dtype=dtype, wire=wire, seq_len=512, head_dim=16).errors()


def grown(found: dict[str, float], dtype: str) -> list[str]:
    alone = errors(1, dtype)
    assert tuple(alone) == TENSORS
    return [name for name in TENSORS if not found[name] <= ALLOWED * alone[name]]


@pytest.mark.parametrize("world", [2, 4, 8, 16, pytest.param(64, marks=pytest.mark.slow)])
def test_the_error_does_not_grow_with_the_ring(world):
    assert grown(errors(world, "bf16"), "bf16") == []


@pytest.mark.parametrize("world", [2, 16])
def test_nor_in_fp16(world):
    assert grown(errors(world, "fp16"), "fp16") == []


def test_errors_are_those_of_16_bit_results():
    """Neither nothing nor everything: about the rounding of the results, half a unit in the last place."""
    for dtype, eps in (("bf16", 2**-8), ("fp16", 2**-11)):
        assert all(0.1 * eps < error < eps for error in errors(1, dtype).values())


def test_gradients_sent_in_bf16_cost_what_is_stated():
    """A stated loss: of dk and dv only, which grows with the hops; the README has the table."""
    half = errors(16, "bf16", "bf16")
    assert grown(half, "bf16") == ["dk", "dv"]
    assert all(half[name] < 3 * errors(1, "bf16")[name] for name in ("dk", "dv"))


def test_a_state_rounded_at_every_hop_is_seen(monkeypatch):
    """What rings without a carried state do: the result of every block in 16 bits."""
    forward = ReferenceAttention.forward

    def rounded(self, q, *args, **kwargs):
        state = forward(self, q, *args, **kwargs)
        state.out.copy_(state.out.to(q.dtype))
        return state

    alone = errors(1, "bf16")
    monkeypatch.setattr(ReferenceAttention, "forward", rounded)
    twin = RingNumerics(world=16, seq_len=512, head_dim=16).errors()
    assert twin["out"] > ALLOWED * alone["out"]


def test_the_command_prints_and_keeps_every_error(tmp_path, capsys, monkeypatch):
    small = RingNumerics
    monkeypatch.setattr(numerics, "RingNumerics", lambda **case: small(**case, seq_len=64, head_dim=8))
    path = tmp_path / "numerics.csv"
    assert main(["--rings", "1,3", "--csv", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("| ring 1 | ring 3 |")
    assert lines[2].startswith("| fp16 inputs, dk and dv sent in fp32: out | ")
    rows = read(path)
    assert len(rows) == 2 * len(lines[2:]) == 2 * 2 * 2 * len(TENSORS)
    assert {row.config.split(",")[0] for row in rows} == {"ring 1", "ring 3"}
    assert torch.tensor([row.value for row in rows]).isfinite().all()
    assert main(["--rings", "1,x"]) == 2
    assert "such as 1,2,4" in capsys.readouterr().err
