"""`longctx bench attention --forms`: what it costs a kernel to carry a ring's state, or to be told its mask row by row.

One kernel serves every mask and every hop of a ring. Each of its forms is timed beside the plain call: one causal block, or one that
sees everything, with nothing before and nothing after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import get_args

import torch

from longctx.bench_rounds import Call, medians_ms, warmed_up
from longctx.errors import KernelError
from longctx.kernels import BlockAttention, Direction, SoftmaxState, block_kind, get_kernel, row_delta, state_dtype
from longctx.masks import KeyRange
from longctx.peers import Case
from longctx.results import Measurement

PLAIN = "plain"
ROWS, CARRIED, LAST, ADDED = "mask by rows", "state carried on", "last of several", "gradients added to"
DIRECTIONS = get_args(Direction)
# What a form may take of the plain call's time; gradients that are added to are read as well, and have no limit.
LIMIT = 1.03
LIMITED = (ROWS, CARRIED, LAST)

FORM_CASES = tuple(
    Case(batch=1, seq_len=16384, heads=heads, kv_heads=kv_heads, head_dim=dim, mask=mask)
    for heads, kv_heads, dim in ((32, 8, 128), (16, 16, 64), (8, 8, 256))
    for mask in ("causal", "full")
)
SMOKE_FORM_CASES = (
    Case(batch=2, seq_len=48, heads=4, kv_heads=2, head_dim=16),
    Case(batch=2, seq_len=48, heads=4, kv_heads=2, head_dim=16, mask="full"),
)


@dataclass
class CaseForms:
    """Milliseconds by (kernel, form, direction); of a kernel that has none, the reason."""

    case: Case
    ms: dict[tuple[str, str, str], float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def slower(self, kernel: str, form: str, direction: str) -> float:
        """The form's time over the plain call's."""
        return self.ms[kernel, form, direction] / self.ms[kernel, PLAIN, direction]

    def tflops(self, kernel: str, form: str, direction: str) -> float:
        products = {"forward": 1.0, "backward": 2.5}[direction]
        return products * self.case.forward_flops / self.ms[kernel, form, direction] / 1e9


def measure_forms(case: Case, kernels: Sequence[str], device: torch.device, dtype: torch.dtype) -> CaseForms:
    """Every form of every kernel on one case, all by turns."""
    found = CaseForms(case)
    tensors = case.inputs(device, dtype)
    calls: dict[tuple[str, str, str], Call] = {}
    for name in kernels:
        kernel = get_kernel(name)
        reason = _unsupported(kernel, case, device, dtype)
        if reason is not None:
            found.refused[name] = reason
            continue
        for (form, direction), run in _forms(kernel, case, **tensors).items():
            calls[name, form, direction] = warmed_up(run, device)
    found.ms, failed = medians_ms(calls, device)
    for error in failed.values():
        raise error
    return found


def _unsupported(kernel: BlockAttention, case: Case, device: torch.device, dtype: torch.dtype) -> str | None:
    for key_range in (case.key_range, _by_rows(case)):
        for direction in DIRECTIONS:
            reason = kernel.supports(
                device=device, dtype=dtype, head_dim=case.head_dim, kind=block_kind(key_range), direction=direction
            )
            if reason is not None:
                return f"{direction}: {reason}"
    return None


def _by_rows(case: Case) -> KeyRange:
    """The mask of the case as an interval for each row, which `KeyRange.of` would say more cheaply."""
    rows = torch.arange(case.seq_len)
    lo, hi = case.rule.key_range(rows, case.seq_len)
    return KeyRange("rows", lo[None].int().contiguous(), hi[None].int().contiguous())


def _forms(
    kernel: BlockAttention, case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor
) -> dict[tuple[str, str], Callable[[], object]]:
    """The calls, by form and direction.

    Raises:
        KernelError: a form gives another result than the plain call.
    """
    plain, rows = case.key_range, _by_rows(case)
    attend = partial(kernel.forward, q, k, v, scale=case.scale)
    # What a ring has after some hops. The calls go on from it, each time.
    carried = attend(plain)
    before = attend(plain, final=True)
    out, lse = before.out.to(q.dtype), before.lse
    delta = row_delta(out, dout)
    wide = state_dtype(q.dtype)
    dq = torch.zeros(q.shape, dtype=wide, device=q.device)
    sums = [torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v)]
    writes = [torch.empty_like(x) for x in (k, v)]

    def last() -> SoftmaxState:
        return attend(plain, state=carried, final=True)

    def backward(key_range: KeyRange, into: list[torch.Tensor], fresh: bool) -> None:
        kernel.backward(
            dout, q, k, v, lse, delta, key_range,
            scale=case.scale, out=out, dq_acc=dq, dk_acc=into[0], dv_acc=into[1], fresh=fresh,
        )  # fmt: skip

    _check_equal(attend(rows, final=True).out, out, ROWS)
    # The block twice: the same weights, each half.
    _check_equal(last().out, out, LAST)
    return {
        (PLAIN, "forward"): lambda: attend(plain, final=True),
        (ROWS, "forward"): lambda: attend(rows, final=True),
        (CARRIED, "forward"): lambda: attend(plain, state=carried),
        (LAST, "forward"): last,
        (PLAIN, "backward"): lambda: backward(plain, writes, True),
        (ROWS, "backward"): lambda: backward(rows, writes, True),
        (ADDED, "backward"): lambda: backward(plain, sums, False),
    }


def _check_equal(got: torch.Tensor, want: torch.Tensor, form: str) -> None:
    error = float((got.float() - want.float()).norm() / want.float().norm())
    if not error < 1e-2:
        raise KernelError(f"{form}: the output differs by {error:.2g} from the plain call's")


def form_table(found: Sequence[CaseForms]) -> str:
    """A line a case, kernel and form: TFLOP/s and the time as a multiple of the plain call's."""
    lines = [["case", "kernel", "form", *DIRECTIONS]]
    notes = []
    for result in found:
        label = result.case.label
        for name, form in dict.fromkeys(key[:2] for key in result.ms):
            lines.append([label, name, form, *(_form_cell(result, name, form, d) for d in DIRECTIONS)])
        notes += [f"{label}: {name}: {why}" for name, why in result.refused.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*text, *([""] if notes else []), *notes])


def _form_cell(result: CaseForms, name: str, form: str, direction: str) -> str:
    if (name, form, direction) not in result.ms:
        return "-"
    times = "" if form == PLAIN else f" ({result.slower(name, form, direction):.3f} x the time)"
    return f"{result.tflops(name, form, direction):.3g}{times}"


def form_verdicts(found: Sequence[CaseForms]) -> list[str]:
    """A line for each kernel and limited form: the most that it takes, and whether that is within `LIMIT`."""
    worst: dict[tuple[str, str], tuple[float, str]] = {}
    for result in found:
        for name, form, direction in result.ms:
            if form in LIMITED:
                seen = (result.slower(name, form, direction), f"{direction} of {result.case.label}")
                worst[name, form] = max(seen, worst.get((name, form), seen))
    return [
        f"{name}, {form}: at most {x:.3f} x ({where}), {'within' if x <= LIMIT else 'BEYOND'} {LIMIT:g}"
        for (name, form), (x, where) in worst.items()
    ]


def form_rows(found: CaseForms, **where) -> list[Measurement]:
    """One case's forms as measurements; `where`: the columns of `results.environment`."""
    return [
        Measurement(
            name=f"forms/{name}", config=found.case.label, metric=f"{form}, {direction}",
            value=found.tflops(name, form, direction), unit="TFLOP/s", **where,
        )
        for name, form, direction in found.ms
    ]  # fmt: skip
