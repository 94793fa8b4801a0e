"""What a kernel's forms cost is measured on forms that compute the same, and judged against the plain call."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bench_contenders import CPU

from longctx import bench, bench_forms, results, tables
from longctx.bench_forms import ADDED, CARRIED, LAST, PLAIN, ROWS, CaseForms
from longctx.errors import KernelError
from longctx.kernels import get_kernel
from longctx.peers import Case
from longctx.results import read

CASE = bench_forms.SMOKE_FORM_CASES[0]
FORMS = {
    (PLAIN, "forward"), (ROWS, "forward"), (CARRIED, "forward"), (LAST, "forward"),
    (PLAIN, "backward"), (ROWS, "backward"), (ADDED, "backward"),
}  # fmt: skip


class Seen:
    """The reference, which notes what it is asked for, and may be made to err."""

    def __init__(self, spoil=lambda key_range, state: 1.0):
        self.kernel, self.calls, self.spoil = get_kernel("reference"), [], spoil

    def supports(self, **block):
        return None if block["kind"] != "band" else "no bands"

    def forward(self, q, k, v, key_range, *, state=None, final=False, **options):
        self.calls.append(("forward", key_range.kind, state is not None, final))
        found = self.kernel.forward(q, k, v, key_range, state=state, final=final, **options)
        found.out *= self.spoil(key_range, state)
        return found

    def backward(self, *block, dk_acc, fresh, **options):
        self.calls.append(("backward", block[6].kind, dk_acc.dtype, fresh))
        self.kernel.backward(*block, dk_acc=dk_acc, fresh=fresh, **options)


def seen(monkeypatch, **options):
    kernel = Seen(**options)
    monkeypatch.setattr(bench_forms, "get_kernel", lambda name: kernel)
    return kernel


@pytest.mark.parametrize("case", bench_forms.SMOKE_FORM_CASES, ids=lambda case: case.mask)
def test_each_form_is_called_as_it_says(case, monkeypatch):
    kernel = seen(monkeypatch)

    def in_order(calls, device):
        """One turn of all, in the order that they are given."""
        kernel.calls.clear()
        for call in calls.values():
            call.run()
        return dict.fromkeys(calls, 1.0), {}

    monkeypatch.setattr(bench_forms, "medians_ms", in_order)
    found = bench_forms.measure_forms(case, ["x"], CPU, torch.float32)
    assert {key[1:] for key in found.ms} == FORMS
    kind = {"causal": "band", "full": "full"}[case.mask]
    assert kernel.calls == [
        ("forward", kind, False, True),
        ("forward", "rows", False, True),
        ("forward", kind, True, False),
        ("forward", kind, True, True),
        ("backward", kind, torch.float32, True),
        ("backward", "rows", torch.float32, True),
        ("backward", kind, torch.float32, False),
    ]


@pytest.mark.parametrize(
    ("spoil", "form"),
    [
        (lambda key_range, state: 1.1 if key_range.kind == "rows" else 1.0, ROWS),
        (lambda key_range, state: 1.1 if state is not None else 1.0, LAST),
    ],
    ids=["rows", "last"],
)
def test_a_form_that_computes_something_else_is_an_error(spoil, form, monkeypatch):
    seen(monkeypatch, spoil=spoil)
    with pytest.raises(KernelError, match=f"{form}: the output differs by 0.1 from the plain call's"):
        bench_forms.measure_forms(CASE, ["x"], CPU, torch.float32)


def test_what_a_kernel_does_not_do_is_said():
    case = Case(batch=1, seq_len=32, heads=1, kv_heads=1, head_dim=16)
    found = bench_forms.measure_forms(case, ["cudnn", "reference"], CPU, torch.float32)
    assert set(found.refused) == {"cudnn"}
    assert found.refused["cudnn"].startswith("forward: ")
    assert f"{case.label}: cudnn: forward: " in bench_forms.form_table([found])
    assert {key[0] for key in found.ms} == {"reference"}


def test_forms_are_judged_by_the_plain_call():
    times = {PLAIN: (1.0, 2.0), ROWS: (1.02, 2.08), CARRIED: (1.03, None), ADDED: (None, 4.0)}
    ms = {
        ("hopper", form, direction): t
        for form, both in times.items()
        for direction, t in zip(("forward", "backward"), both, strict=True)
        if t is not None
    }
    found = CaseForms(CASE, ms)
    assert found.slower("hopper", ROWS, "backward") == pytest.approx(1.04)
    assert bench_forms.form_verdicts([found]) == [
        f"hopper, mask by rows: at most 1.040 x (backward of {CASE.label}), BEYOND 1.03",
        f"hopper, state carried on: at most 1.030 x (forward of {CASE.label}), within 1.03",
    ]
    rows = bench_forms.form_rows(found, **results.environment("GPU X", commit="c"))
    plain = {r.metric: r.value for r in rows}
    assert plain["plain, backward"] == pytest.approx(2.5 * CASE.forward_flops / 2.0 / 1e9)
    table = tables.forms_table(rows)
    assert (
        "| batch x length, heads, mask | kernel | plain | mask by rows | state carried on | gradients added to |"
        in table
    )
    assert "0 (1.020 x) / 0 (1.040 x) | 0 (1.030 x) / - | - / 0 (2.000 x) |" in table


def test_a_table_is_of_the_gpu_that_was_measured_last():
    def rows(gpu, date, ms):
        found = CaseForms(CASE, {("hopper", PLAIN, "forward"): ms, ("hopper", ROWS, "forward"): 2 * ms})
        return [replace(r, date=date) for r in bench_forms.form_rows(found, **results.environment(gpu, commit="c"))]

    old, other = rows("H200", "2026-01-01", 1e-6), rows("H100", "2026-01-02", 1e-7)
    table = tables.forms_table([*old, *other, *rows("H200", "2026-01-03", 4e-6)])
    assert "H200" in table
    assert f"{CASE.forward_flops / 4e-6 / 1e9:.0f} / -" in table
    assert f"{CASE.forward_flops / 1e-7 / 1e9:.0f}" not in table


def test_the_command(tmp_path, capsys):
    path = tmp_path / "forms.csv"
    assert bench.main(["attention", "--smoke", "--forms", "--csv", str(path)]) == 0
    out = capsys.readouterr().out
    assert "reference, mask by rows: at most " in out
    assert len(read(path)) == len(bench_forms.SMOKE_FORM_CASES) * len(FORMS)
    for words, message in (
        (["--only", "hoper"], "--forms --only hoper: did you mean 'hopper'"),
        (["--plot", "x.png"], "--forms knows no --plot"),
        (["--budget", "5"], "--forms knows no --budget"),
    ):
        assert bench.main(["attention", "--smoke", "--forms", *words]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu_every_form_is_measured():
    case = Case(batch=1, seq_len=4096, heads=8, kv_heads=2, head_dim=128)
    found = bench_forms.measure_forms(case, ["hopper", "triton"], torch.device("cuda"), torch.bfloat16)
    kernels = {"hopper", "triton"} - set(found.refused)
    assert "triton" in kernels
    assert {key[1:] for key in found.ms} == FORMS
    for name, form, direction in found.ms:
        assert found.slower(name, form, direction) < 2
