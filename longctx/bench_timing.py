"""One case, every contender: held against exact attention of sampled rows, then timed by turns, unless that would take too long."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from longctx.bench_rounds import Call, medians_ms, timed_once, warmed_up
from longctx.peers import Case, Contender, Gradients, Prepared, Unavailable, reasons

# What is measured of every contender.
TIMED = ("forward", "backward", "forward+backward")
# Before a metric: of the kernel alone.
ALONE = "block "
# A relative RMS error of bf16 attention is about 3e-3; a wrong mask, scale or head is beyond 1e-1.
WRONG = 2e-2
SAMPLED_ROWS = 16
# Of a GPU's memory: who holds more between its forward and its backward is timed alone.
HELD_SHARE = 1 / 16


@dataclass
class CaseResult:
    """TFLOP/s by contender and metric; where there is no number, the reason.

    Args:
        bound: what a matrix product reached in the same turns; None where it took none.
    """

    case: Case
    tflops: dict[str, dict[str, float]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    bound: float | None = None


def timing_seconds(forward: float, backward: float) -> float:
    """That timing a forward and a backward takes, which take so many seconds."""
    return sum(Call(lambda: None, seconds).expected for seconds in (forward, backward))


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
        self._reserved = 0.0
        self._flops_per_second: dict[tuple, float] = {}

    @property
    def left(self) -> float:
        """Seconds of the total that remain, beside what is reserved."""
        return self._end - time.perf_counter() - self._reserved

    def reserve(self, seconds: float) -> None:
        """For what is admitted and not timed yet."""
        self._reserved += seconds

    def release(self) -> None:
        """It is timed now."""
        self._reserved = 0.0

    def refuse_predicted(self, entrant: Contender, case: Case) -> None:
        """
        Raises:
            Unavailable: saying what is expected, and of which speed.
        """
        if self.left <= 0:
            raise Unavailable(f"left for another call: the {self.total:g} s of --time are over")
        speed = self._flops_per_second.get(self._key(entrant, case))
        if speed is not None:
            seconds = 3.5 * case.forward_flops / speed
            # To compile, to check, and to time.
            timing = timing_seconds(seconds / 3.5, seconds * 2.5 / 3.5)
            self._refuse(2 * seconds + timing, f"at its last {speed / 1e12:.3g} TFLOP/s")

    def record(self, entrant: Contender, case: Case, seconds: float) -> None:
        """Remember how long a forward and a backward took together."""
        self._flops_per_second[self._key(entrant, case)] = 3.5 * case.forward_flops / seconds

    def refuse_measured(self, forward: float, backward: float, pairs: float = 1.0) -> None:
        """
        Args:
            forward, backward: the seconds of each.
            pairs: of them that are timed.

        Raises:
            Unavailable: a forward and a backward took too long to be repeated.
        """
        self._refuse(pairs * timing_seconds(forward, backward), "by its first forward and backward")

    def _refuse(self, expected: float, why: str) -> None:
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
    product_size: int | None = None,
) -> CaseResult:
    """Every contender on one case: each checked first, then all timed by turns. One that fails leaves its reason.

    Args:
        budget: of a run over several cases; None: no limit.
        with_parts: also time what `Prepared.parts` names.
        kept: what contenders reached in an earlier run, by metric: these are not run again.
        product_size: of the matrix product, cubed, that takes turns with them, if any of them does; None: no product.
    """
    result = CaseResult(case)
    budget = Budget(float("inf")) if budget is None else budget
    inputs = _Inputs(case, device, dtype)
    entered: dict[str, dict[str, Call]] = {}
    for entrant in entrants:
        if kept and entrant.name in kept:
            result.tflops[entrant.name] = dict(kept[entrant.name])
            budget.record(entrant, case, 3.5 * case.forward_flops / kept[entrant.name]["forward+backward"] / 1e12)
            continue
        calls, share = _admitted(result, entrant, inputs, budget, with_parts)
        if share > HELD_SHARE:
            # Others would not fit beside it.
            _time(result, {entrant.name: calls}, device)
        elif calls:
            entered[entrant.name] = calls
            budget.reserve(sum(call.expected for call in calls.values()))
        del calls
        _free(device)
    budget.release()
    _time(result, entered, device, _Product.make(device, dtype, product_size) if product_size and entered else None)
    entered.clear()
    _free(device)
    result.tflops = {entrant.name: result.tflops[entrant.name] for entrant in entrants if entrant.name in result.tflops}
    return result


def _admitted(
    result: CaseResult, entrant: Contender, inputs: _Inputs, budget: Budget, with_parts: bool
) -> tuple[dict[str, Call], float]:
    """The calls to time, of a contender whose results are right and that is quick enough, and what share of the GPU's memory it
    holds for them; else none, and the reason noted."""
    said: list[str] = []
    try:
        with reasons() as said:
            budget.refuse_predicted(entrant, inputs.case)
            oracle, before = inputs.oracle, _held(inputs.device)
            prepared = entrant.prepare(inputs.case, **inputs.tensors)
            seconds = _check_in_time(inputs.case, entrant, prepared, oracle, budget, with_parts)
            return _calls(prepared, seconds, with_parts), _held(inputs.device) - before
    except WrongResult as error:
        result.refused[entrant.name] = f"WRONG RESULT: {error}"
        result.wrong.append(entrant.name)
    except Exception as error:  # whatever a peer raises is its reason to have no number
        result.refused[entrant.name] = _one_line(error, said)
    return {}, 0.0


def _check_in_time(
    case: Case, entrant: Contender, prepared: Prepared, oracle: SampledRows, budget: Budget, with_parts: bool
) -> dict[str, float]:
    """Seconds of the forward and of the backward, whose results are right."""
    device = oracle.out.device
    # What there was to compile was compiled when it was prepared.
    out, forward = timed_once(prepared.forward, device)
    gradients, backward = timed_once(prepared.backward, device)
    budget.record(entrant, case, forward + backward)
    oracle.check(out, gradients)
    budget.refuse_measured(forward, backward, 1 + len(prepared.parts) / 2 if with_parts else 1)
    return {"forward": forward, "backward": backward}


def _calls(prepared: Prepared, seconds: Mapping[str, float], with_parts: bool) -> dict[str, Call]:
    runs: dict[str, Callable[[], object]] = {"forward": prepared.forward, "backward": prepared.backward}
    if with_parts:
        runs |= prepared.parts
    return {metric: Call(run, seconds[metric.removeprefix(ALONE)]) for metric, run in runs.items()}


@dataclass(frozen=True)
class _Product:
    """The machine's own matrix product: the bound beside which attention stands."""

    call: Call
    flops: float

    @classmethod
    def make(cls, device: torch.device, dtype: torch.dtype, size: int) -> _Product:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        return cls(warmed_up(lambda: a @ b, device), 2.0 * size**3)


def _time(
    result: CaseResult, entered: Mapping[str, dict[str, Call]], device: torch.device, product: _Product | None = None
) -> None:
    """Time contenders by turns: every call of each, and the product."""
    turns = {(name, metric): call for name, calls in entered.items() for metric, call in calls.items()}
    bounding = ("", "product")
    ms, failed = medians_ms(turns if product is None else {bounding: product.call, **turns}, device)
    if product is not None and bounding in ms:
        result.bound = product.flops / ms[bounding] / 1e9
    work = {"forward": result.case.forward_flops, "backward": 2.5 * result.case.forward_flops}
    for name, calls in entered.items():
        errors = [failed[name, m] for m in calls if (name, m) in failed]
        if errors:
            result.refused[name] = _one_line(errors[0])
            continue
        tflops = {m: work[m.removeprefix(ALONE)] / ms[name, m] / 1e9 for m in calls}
        # One after the other on one stream: the time of both is the sum.
        tflops["forward+backward"] = sum(work.values()) / (ms[name, "forward"] + ms[name, "backward"]) / 1e9
        result.tflops[name] = tflops


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


def _held(device: torch.device) -> float:
    """The share of a GPU's memory that is allocated."""
    if device.type != "cuda":
        return 0.0
    return torch.cuda.memory_allocated(device) / torch.cuda.get_device_properties(device).total_memory


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
