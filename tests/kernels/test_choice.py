"""`kernel="auto"` takes what was measured fastest: the table is that of the results, and the nearest shape decides."""

from __future__ import annotations

import ast
import logging
from dataclasses import replace

import pytest
import torch

from longctx import kernel_rules, kernels, results
from longctx.errors import KernelError
from longctx.kernels import choice, kernel_names, select_kernel
from longctx.masks import KeyRange

GPU = torch.device("cuda")
BF16 = torch.bfloat16
TABLE = {
    (9, 0): {
        (64, "causal", 8192): ({"triton": 406, "cudnn": 402}, {"cudnn": 336, "triton": 325}),
        (128, "causal", 8192): ({"cudnn": 500, "triton": 479}, {"triton": 410, "cudnn": 400}),
        (128, "causal", 131072): ({"triton": 521, "cudnn": 509}, {"cudnn": 518, "triton": 434}),
        (128, "full", 8192): ({"cudnn": 559, "triton": 516, "unheard_of": 999}, {"cudnn": 488, "triton": 401}),
    },
}


@pytest.fixture
def measured(monkeypatch):
    """An H100 whose kernels can do everything, and the table above."""
    monkeypatch.setattr(choice, "MEASURED", TABLE)
    monkeypatch.setattr(choice, "_capability", lambda device: (9, 0))
    for name in kernel_names():
        monkeypatch.setattr(type(kernels.get_kernel(name)), "supports", lambda self, **_: None)
    choice._choose.cache_clear()
    choice._log_once.cache_clear()
    yield
    choice._choose.cache_clear()
    choice._log_once.cache_clear()


def first(head_dim: int, kind: str, length: int, direction: str, dtype: torch.dtype = BF16) -> str:
    return choice.order(GPU, dtype, head_dim, kind, length, direction).names[0]


def test_the_table_is_that_of_the_results():
    rows = results.read(results.RESULTS)
    assert kernel_rules.kernel_rules(rows) == choice.MEASURED, "run python -m longctx.results --write-rules"


def test_the_printed_table_is_python_that_says_the_same():
    rows = results.read(results.RESULTS)
    comment, *lines = kernel_rules.rules_text(rows).splitlines()
    assert comment.startswith("# NVIDIA H100")
    assert ast.literal_eval("{" + "\n".join(lines) + "}") == kernel_rules.kernel_rules(rows)


def test_the_written_table_is_that_of_the_measurements(tmp_path, capsys):
    source = results.CHOICE.read_text()
    rows = results.read(results.RESULTS)
    assert kernel_rules.with_rules(source, rows) == source, "run python -m longctx.results --write-rules"
    copy = tmp_path / "choice.py"
    copy.write_text(source.replace('"hopper": 5', '"hopper": 9'))
    assert copy.read_text() != source
    assert results.main(["--write-rules", "--choice", str(copy)]) == 0
    assert copy.read_text() == source
    copy.write_text("MEASURED = {}\n")
    assert results.main(["--write-rules", "--choice", str(copy)]) == 2
    assert "there is no table MEASURED" in capsys.readouterr().err


def test_a_shape_of_several_cases_has_the_mean_of_those_that_all_kernels_have():
    row = replace(next(r for r in results.read(results.RESULTS / "attention.csv") if r.metric == "forward"), date="x")

    def speed(kernel, config, value, **changes):
        return replace(row, name=f"attention/{kernel}", config=config, value=value, **changes)

    plain, grouped = "1 x 32k, 16/16 heads of 128, window 4k", "1 x 32k, 32/8 heads of 128, window 4k"
    rows = [
        speed("triton", plain, 100.0),
        speed("triton", grouped, 300.0),
        speed("cudnn", plain, 120.0),
        speed("fa4", plain, 900.0),
        speed("triton", plain, 700.0, gpu="NVIDIA Z1"),
        speed("triton", plain, 80.0, metric="backward"),
        speed("triton", plain, 80.0, metric="block backward"),
    ]
    assert kernel_rules.kernel_rules(rows) == {
        (9, 0): {(128, "band", 32768): ({"cudnn": 120, "triton": 100}, {"triton": 80})}
    }


def test_the_nearest_shape_decides(measured):
    assert first(64, "causal", 8192, "forward") == "triton"
    assert first(64, "causal", 8192, "backward") == "cudnn"
    assert first(128, "causal", 8192, "forward") == "cudnn"
    # 16k is nearer to 8k than to 128k; 64k is not.
    assert first(128, "causal", 16384, "forward") == "cudnn"
    assert first(128, "causal", 65536, "forward") == "triton"
    # 96 and 80 are padded to 128, 40 to 64; 256 has 128 next to it.
    assert [first(d, "causal", 8192, "forward") for d in (96, 80, 40, 256, 1)] == [
        *["cudnn"] * 2,
        "triton",
        "cudnn",
        "triton",
    ]
    # A rectangle is a full block, a window and documents are like a causal one.
    assert choice.order(GPU, BF16, 128, "rectangle", 8192, "forward").shape == "head dim 128, full, 8192 rows"
    assert first(128, "band", 8192, "backward") == first(128, "rows", 8192, "backward") == "triton"
    assert choice.order(GPU, torch.float16, 64, "causal", 8192, "forward").speeds


def test_what_was_not_measured_comes_last_and_is_not_left_out(measured, monkeypatch):
    names = choice.order(GPU, BF16, 128, "full", 8192, "forward").names
    assert names[:2] == ("cudnn", "triton")
    assert sorted(names) == sorted(kernel_names())
    # Nothing was measured of fp32, nor of other GPUs.
    for tried in (
        choice.order(GPU, torch.float32, 128, "full", 8192, "forward"),
        choice.order(torch.device("cpu"), torch.float32, 128, "full", 8192, "forward"),
    ):
        assert tried.names == kernel_names()
        assert tried.speeds == {}
    monkeypatch.setattr(choice, "_capability", lambda device: (8, 9))
    assert choice.order(GPU, BF16, 128, "full", 8192, "forward").names == kernel_names()


def test_the_reason_is_logged_once(measured, caplog):
    caplog.set_level(logging.INFO, logger="longctx.kernels")
    for length in (8192, 8190, 7000, 5000):
        q = torch.zeros(1, 1, 1, 128, dtype=BF16).expand(1, length, 1, 128)
        assert select_kernel("auto", q, KeyRange.causal()).name == "cudnn"
        assert select_kernel("auto", q, KeyRange.causal(), direction="backward").name == "triton"
    forward, backward = (r.getMessage() for r in caplog.records)
    assert forward.endswith(
        "causal: cudnn (cudnn: 500 TFLOP/s measured against triton 479; head dim 128, causal, 8192 rows)"
    )
    assert "backward on cpu" in backward
    assert "triton: 410 TFLOP/s measured against cudnn 400" in backward


def test_the_fastest_that_can_is_taken(measured, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="longctx.kernels")
    monkeypatch.setattr(type(kernels.get_kernel("cudnn")), "supports", lambda self, **_: "not here")
    q = torch.zeros(1, 8192, 1, 128, dtype=BF16)
    assert select_kernel("auto", q, KeyRange.full()).name == "triton"
    assert "triton: 516 TFLOP/s measured against cudnn 559" in caplog.text
    assert "cudnn: not here" in caplog.text
    assert select_kernel("reference", q, KeyRange.full()).name == "reference"
    with pytest.raises(KernelError, match="cudnn: not here"):
        select_kernel("cudnn", q, KeyRange.full())
