"""One case, every contender: held against exact attention of sampled rows, then timed, unless that would take too long."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from longctx.peers import Case, Contender, Gradients, Prepared, Unavailable, reasons

# What is measured of every contender.
TIMED = ("forward", "backward", "forward+backward")
# A relative RMS error of bf16 attention is about 3e-3; a wrong mask, scale or head is beyond 1e-1.
WRONG = 2e-2
SAMPLED_ROWS = 16
# A call longer than this is timed three times instead of for 100 ms: its own length steadies it.
LONG_MS = 200.0
# A forward and a backward that take longer than this together are timed once: the runs before have warmed up.
VERY_LONG_S = 1.0


@dataclass
class CaseResult:
    """TFLOP/s by contender and metric; where there is no number, the reason."""

    case: Case
    tflops: dict[str, dict[str, float]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def _runs(seconds: float) -> int:
    """How often a long forward and backward are run: to compile, to check, and to warm up and time."""
    return 3 if seconds > VERY_LONG_S else 6


class Budget:
    """The time that one contender may take for one case, and all of them together; what is known of each one's speed.

    A contender is not started where its last speed under the same mask and head dim lets expect more than that, nor timed
    where its first forward and backward have shown it.

    Args:
        seconds: for all runs of a contender in a case.
        total: for all that is measured from now on. What does not fit is left out, with that reason.
    """

    def __init__(self, seconds: float, total: float = math.inf) -> None:
        self.seconds, self.total = seconds, total
        self._end = time.perf_counter() + total
        self._flops_per_second: dict[tuple, float] = {}

    @property
    def left(self) -> float:
        """Seconds of the total that remain."""
        return self._end - time.perf_counter()

    def refuse_predicted(self, entrant: Contender, case: Case) -> None:
        """
        Raises:
            Unavailable: saying what is expected, and of which speed.
        """
        if self.left <= 0:
            raise Unavailable(f"left for another call: the {self.total:g} s of --time are over")
        speed = self._flops_per_second.get(self._key(entrant, case))
        if speed is not None:
            self._refuse(3.5 * case.forward_flops / speed, f"at its last {speed / 1e12:.3g} TFLOP/s")

    def record(self, entrant: Contender, case: Case, seconds: float) -> None:
        """Remember how long a forward and a backward took together."""
        self._flops_per_second[self._key(entrant, case)] = 3.5 * case.forward_flops / seconds

    def refuse_measured(self, seconds: float) -> None:
        """
        Raises:
            Unavailable: a forward and a backward took too long to be repeated.
        """
        self._refuse(seconds, "by its first forward and backward")

    def _refuse(self, seconds: float, why: str) -> None:
        expected = _runs(seconds) * seconds
        if expected > self.seconds:
            raise Unavailable(f"skipped: {expected:.0f} s expected {why}, more than the {self.seconds:g} s of --budget")
        if expected > self.left:
            raise Unavailable(
                f"left for another call: {expected:.0f} s expected {why}, and {max(0.0, self.left):.0f} s remain of --time"
            )

    @staticmethod
    def _key(entrant: Contender, case: Case) -> tuple:
        return entrant.name, case.mask, case.head_dim


class _Inputs:
    """A case's tensors and what results are held against, made when the first contender needs them."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        self.case, self.device, self.dtype = case, device, dtype

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        return self.case.inputs(self.device, self.dtype)

    @cached_property
    def oracle(self) -> SampledRows:
        return SampledRows(self.case, **self.tensors)


def measure(
    case: Case,
    entrants: Sequence[Contender],
    device: torch.device,
    dtype: torch.dtype,
    *,
    budget: Budget | None = None,
    with_parts: bool = True,
    kept: Mapping[str, dict[str, float]] | None = None,
) -> CaseResult:
    """Every contender on one case: checked first, then timed. One that fails leaves its reason.

    Args:
        budget: of a run over several cases; None: no limit.
        with_parts: also time what `Prepared.parts` names.
        kept: what contenders reached in an earlier run, by metric: these are not run again.
    """
    result = CaseResult(case)
    budget = Budget(float("inf")) if budget is None else budget
    inputs = _Inputs(case, device, dtype)
    for entrant in entrants:
        if kept and entrant.name in kept:
            result.tflops[entrant.name] = dict(kept[entrant.name])
            budget.record(entrant, case, 3.5 * case.forward_flops / kept[entrant.name]["forward+backward"] / 1e12)
            continue
        said: list[str] = []
        prepared: Prepared | None = None
        try:
            with reasons() as said:
                budget.refuse_predicted(entrant, case)
                prepared = entrant.prepare(case, **inputs.tensors)
                seconds = _check_in_time(case, entrant, prepared, inputs, budget)
                result.tflops[entrant.name] = _timed(case, prepared, device, with_parts, seconds)
        except WrongResult as error:
            result.refused[entrant.name] = f"WRONG RESULT: {error}"
            result.wrong.append(entrant.name)
        except Exception as error:  # whatever a peer raises is its reason to have no number
            result.refused[entrant.name] = _one_line(error, said)
        prepared = None
        _free(device)
    return result


def _check_in_time(case: Case, entrant: Contender, prepared: Prepared, inputs: _Inputs, budget: Budget) -> float:
    """Seconds of a forward and a backward, whose results are right."""
    oracle = inputs.oracle
    if inputs.device.type == "cuda":
        torch.cuda.synchronize(inputs.device)
    # What there was to compile was compiled when it was prepared.
    began = time.perf_counter()
    out, gradients = prepared.forward(), prepared.backward()
    if inputs.device.type == "cuda":
        torch.cuda.synchronize(inputs.device)
    seconds = time.perf_counter() - began
    budget.record(entrant, case, seconds)
    oracle.check(out, gradients)
    budget.refuse_measured(seconds)
    return seconds


def _timed(case: Case, prepared: Prepared, device: torch.device, with_parts: bool, seconds: float) -> dict[str, float]:
    work = {"forward": case.forward_flops, "backward": 2.5 * case.forward_flops}
    calls: dict[str, Callable[[], object]] = {"forward": prepared.forward, "backward": prepared.backward}
    if with_parts:
        calls |= prepared.parts
    time_of = _once_ms if seconds > VERY_LONG_S else median_ms
    ms = {metric: time_of(call, device) for metric, call in calls.items()}
    tflops = {metric: work[metric.removeprefix("block ")] / took / 1e9 for metric, took in ms.items()}
    # One after the other on one stream: the time of both is the sum.
    tflops["forward+backward"] = sum(work.values()) / (ms["forward"] + ms["backward"]) / 1e9
    return tflops


def median_ms(call: Callable[[], object], device: torch.device) -> float:
    """Median time of a call in ms: CUDA events after a warm-up, the L2 cache cleared before each of at least five calls; of
    three calls where one takes longer than `LONG_MS`."""
    if device.type == "cuda":
        from triton.testing import do_bench

        call()
        if (once := _event_ms(call)) > LONG_MS:
            return statistics.median([once, _event_ms(call), _event_ms(call)])
        # do_bench runs `rep` ms; a call of 100 ms would run once.
        return float(do_bench(call, warmup=20, rep=max(100.0, 5.5 * once), return_mode="median"))
    times = [_once_ms(call, device) for _ in range(4)]
    return statistics.median(times[1:])


def _once_ms(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        return _event_ms(call)
    began = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - began)


def _event_ms(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def matmul_tflops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """What the machine's own matrix product of `size` cubed reaches: the bound beside which attention stands."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / median_ms(lambda: a @ b, device) / 1e9


class WrongResult(Exception):
    """A contender's numbers are not attention's."""


class SampledRows:
    """Exact attention of a few rows in float32, which costs rows x length: out and dq of every contender are held against it.

    dk and dv need all rows; they are compared among the contenders, with the first that passed.
    """

    def __init__(self, case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor) -> None:
        self.rows = torch.linspace(0, case.seq_len - 1, SAMPLED_ROWS, dtype=torch.float64).long().unique().to(q.device)
        lo, hi = case.rule.key_range(self.rows.cpu(), case.seq_len)
        keys = torch.arange(case.seq_len)
        visible = ((keys >= lo[:, None]) & (keys < hi[:, None])).to(q.device)
        self.out, self.dq = _exact_rows(case, q[:, self.rows], k, v, dout[:, self.rows], visible)
        self.dkdv: tuple[torch.Tensor, torch.Tensor] | None = None

    def check(self, out: torch.Tensor, gradients: Gradients) -> None:
        """
        Raises:
            WrongResult: an error larger than rounding explains.
        """
        dq, dk, dv = gradients
        pairs = {"out": (out[:, self.rows], self.out), "dq": (dq[:, self.rows], self.dq)}
        if self.dkdv is not None:
            pairs |= {"dk": (dk, self.dkdv[0]), "dv": (dv, self.dkdv[1])}
        for name, (got, want) in pairs.items():
            error = float((got.float() - want.float()).norm() / want.float().norm())
            if not error <= WRONG:
                raise WrongResult(f"relative error of {name} {error:.2g}, more than {WRONG}")
        if self.dkdv is None:
            self.dkdv = (dk.clone(), dv.clone())


def _exact_rows(case: Case, q, k, v, dout, visible: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """out and dq of the rows q, dout "b n h d" in float32; visible: bool [n, S]."""
    out, dq = torch.empty_like(q, dtype=torch.float32), torch.empty_like(q, dtype=torch.float32)
    # One key head at a time: all of them at once would hold heads x rows x S scores several times.
    for head in range(case.kv_heads):
        group = slice(head * case.heads // case.kv_heads, (head + 1) * case.heads // case.kv_heads)
        kf, vf = k[:, :, head].float(), v[:, :, head].float()
        s = torch.einsum("bngd,bsd->bngs", q[:, :, group].float(), kf) * case.scale
        p = s.masked_fill(~visible[None, :, None], float("-inf")).softmax(-1)
        out[:, :, group] = torch.einsum("bngs,bsd->bngd", p, vf)
        do = dout[:, :, group].float()
        dp = torch.einsum("bngd,bsd->bngs", do, vf)
        ds = p * (dp - (do * out[:, :, group]).sum(-1, keepdim=True)) * case.scale
        dq[:, :, group] = torch.einsum("bngs,bsd->bngd", ds, kf)
    return out, dq


def _one_line(error: Exception, said: Sequence[str] = ()) -> str:
    """Why there is no number, at most 160 characters: torch's warnings where it gave some, else the error."""
    text = str(error).strip().splitlines() or [""]
    name = "" if isinstance(error, Unavailable) else f"{type(error).__name__}: "
    because = next((s for s in said if "because" in s or "requires" in s or "not" in s), "")
    line = f"{name}{text[0]}" + (f" ({because})" if because else "")
    return line if len(line) <= 160 else line[:157] + "..."


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
