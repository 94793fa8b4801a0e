"""`longctx bench attention --errors`: what each contender's numbers are off, against float64."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from longctx.peers import Case, Contender, Unavailable, reasons
from longctx.results import Measurement

TENSORS = ("out", "lse", "dq", "dk", "dv")
# Those whose least error is the measure of the others.
YARDSTICKS = ("cudnn-torch", "fa4")

_PLAIN = (
    Case(batch=4, seq_len=8192, heads=16, kv_heads=16, head_dim=128),
    Case(batch=4, seq_len=8192, heads=16, kv_heads=16, head_dim=128, mask="full"),
    Case(batch=1, seq_len=32768, heads=32, kv_heads=8, head_dim=128),
    Case(batch=1, seq_len=32768, heads=16, kv_heads=16, head_dim=64),
    Case(batch=1, seq_len=32768, heads=8, kv_heads=8, head_dim=256),
    Case(batch=1, seq_len=131072, heads=8, kv_heads=8, head_dim=128),
)
ERROR_CASES = (*_PLAIN, *(replace(case, logits=50.0) for case in _PLAIN))
SMOKE_ERROR_CASES = (
    Case(batch=2, seq_len=48, heads=4, kv_heads=2, head_dim=16),
    Case(batch=2, seq_len=48, heads=4, kv_heads=2, head_dim=16, logits=50.0),
)

# What an error may be of the least yardstick's, for out, lse and every gradient.
LIMIT = 1.1

# Scores in float64 that are held at once, of one head.
_SCORES = 1 << 27


@dataclass
class CaseErrors:
    """RMS error over RMS size, by contender and tensor; where there is none, the reason."""

    case: Case
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def measure_errors(case: Case, entrants: Sequence[Contender], device: torch.device, dtype: torch.dtype) -> CaseErrors:
    """Every contender's error on one case, in the first sequence's first key head and the query heads that share it: all
    rows and keys of these are computed in float64."""
    found = CaseErrors(case)
    tensors = case.inputs(device, dtype)
    true = truth(case, **tensors)
    for entrant in entrants:
        try:
            with reasons():
                found.errors[entrant.name] = _errors(case, entrant, tensors, true)
        except Exception as error:  # whatever a peer raises is its reason to have no number
            name = "" if isinstance(error, Unavailable) else f"{type(error).__name__}: "
            found.refused[entrant.name] = f"{name}{(str(error).splitlines() or [''])[0]}"[:160]
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def _errors(
    case: Case, entrant: Contender, tensors: dict[str, torch.Tensor], true: dict[str, torch.Tensor]
) -> dict[str, float]:
    prepared = entrant.prepare(case, **tensors)
    group = case.heads // case.kv_heads
    got = {"out": prepared.forward()[0, :, :group]}
    if prepared.lse is not None:
        got["lse"] = prepared.lse()[0, :group]
    dq, dk, dv = prepared.backward()
    got |= {"dq": dq[0, :, :group], "dk": dk[0, :, 0], "dv": dv[0, :, 0]}
    return {name: relative(x, true[name]) for name, x in got.items()}


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """RMS of the difference over RMS of what it should be, in float64."""
    return float((got.double() - want).norm() / want.norm())


def truth(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor) -> dict[str, torch.Tensor]:
    """out, dq "s g d", lse "g s", dk, dv "s d" in float64: of the first sequence and key head, g query heads share it."""
    group = case.heads // case.kv_heads
    k1, v1 = k[0, :, 0].double(), v[0, :, 0].double()
    q1, dout1 = q[0, :, :group].double(), dout[0, :, :group].double()
    out, dq = torch.empty_like(q1), torch.empty_like(q1)
    lse = torch.empty(group, case.seq_len, dtype=torch.float64, device=q.device)
    dk, dv = torch.zeros_like(k1), torch.zeros_like(v1)
    for head in range(group):
        for rows, keys, seen in _row_blocks(case, q.device):
            qr, kr, vr, dor = q1[rows, head], k1[keys], v1[keys], dout1[rows, head]
            s = (qr @ kr.T * case.scale).masked_fill_(~seen, float("-inf"))
            lse[head, rows] = s.logsumexp(-1)
            p = s.sub_(lse[head, rows, None]).exp_()
            out[rows, head] = p @ vr
            dv[keys] += p.T @ dor
            delta = (out[rows, head] * dor).sum(-1)
            ds = p.mul_((dor @ vr.T).sub_(delta[:, None])).mul_(case.scale)
            dq[rows, head] = ds @ kr
            dk[keys] += ds.T @ qr
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def _row_blocks(case: Case, device: torch.device) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """(rows, keys, seen): rows in pieces, the keys that any of them sees, and which sees which."""
    step = max(1, _SCORES // case.seq_len)
    for start in range(0, case.seq_len, step):
        rows = torch.arange(start, min(start + step, case.seq_len))
        lo, hi = case.rule.key_range(rows, case.seq_len)
        keys = slice(int(lo.min()), int(hi.max()))
        key = torch.arange(keys.start, keys.stop, device=device)
        seen = (key >= lo.to(device)[:, None]) & (key < hi.to(device)[:, None])
        yield slice(start, start + len(rows)), keys, seen


def ratios(found: CaseErrors, name: str) -> dict[str, float]:
    """A contender's errors over the least of the yardsticks'; empty where there is none."""
    rivals = [found.errors[other] for other in YARDSTICKS if other in found.errors]
    return {
        tensor: error / min(r[tensor] for r in rivals if tensor in r)
        for tensor, error in found.errors[name].items()
        if any(tensor in r for r in rivals)
    }


def error_table(found: Sequence[CaseErrors], entrants: Sequence[Contender]) -> str:
    """A line a case and contender: each tensor's error, and what multiple of the yardstick's it is."""
    lines = [["case", "", *TENSORS]]
    notes = []
    for case in found:
        for entrant in entrants:
            if entrant.name in case.errors:
                errors, multiples = case.errors[entrant.name], ratios(case, entrant.name)
                cells = [
                    (f"{errors[t]:.2e}" + (f" ({multiples[t]:.2f} x)" if t in multiples else ""))
                    if t in errors
                    else "-"
                    for t in TENSORS
                ]
                lines.append([case.case.label, entrant.title, *cells])
            elif entrant.name in case.refused:
                notes.append(f"{case.case.label}: {entrant.title}: {case.refused[entrant.name]}")
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*text, *([""] if notes else []), *notes])


def verdicts(found: Sequence[CaseErrors], entrants: Sequence[Contender]) -> list[str]:
    """A line for each kernel of ours that has a yardstick beside it: its worst multiple, and whether that is within `LIMIT`."""
    lines = []
    for entrant in entrants:
        seen = [
            (multiple, f"{tensor} of {case.case.label}")
            for case in found
            if entrant.is_ours and entrant.name in case.errors
            for tensor, multiple in ratios(case, entrant.name).items()
        ]
        if seen:
            worst, where = max(seen)
            word = "within" if worst <= LIMIT else "BEYOND"
            lines.append(f"{entrant.title}: at most {worst:.3f} x ({where}), {word} {LIMIT:g}")
    return lines


def error_rows(found: CaseErrors, **where) -> list[Measurement]:
    """One case's errors, and their multiples of the yardstick's, as measurements; `where`: `results.environment`'s columns."""
    rows = []
    for name, errors in found.errors.items():
        of = partial(Measurement, name=f"errors/{name}", config=found.case.label, **where)
        rows += [of(metric=tensor, value=error, unit="relative") for tensor, error in errors.items()]
        rows += [of(metric=f"{tensor} ratio", value=x, unit="x") for tensor, x in ratios(found, name).items()]
    return rows
