"""`longctx info` says what is there, and of each kernel what it does here or why it does not."""

from __future__ import annotations

import pytest
import torch

from longctx import __version__, info
from longctx.kernels import get_kernel, kernel_names


def test_every_section_is_printed(capsys):
    assert info.main([]) == 0
    out = capsys.readouterr().out
    for title in ("versions", "devices", "process backends", "attention kernels on", "fused operations", "caches"):
        assert f"{title}" in out
    assert f"longctx        {__version__}, commit " in out
    assert f"torch          {torch.__version__}" in out
    assert "gloo           yes" in out


@pytest.mark.parametrize("name", kernel_names())
@pytest.mark.parametrize("dtype", info.DTYPES, ids=str)
def test_a_kernel_has_a_yes_or_its_own_reason(name, dtype):
    lines = info._kernels(torch.device("cpu"))
    label = f"{name} {str(dtype).removeprefix('torch.')}"
    text = "\n".join(lines)
    assert label in text
    kernel = get_kernel(name)
    for dim in info.HEAD_DIMS:
        for kind in info.KINDS:
            for direction in ("forward", "backward"):
                reason = kernel.supports(
                    device=torch.device("cpu"), dtype=dtype, head_dim=dim, kind=kind, direction=direction
                )
                assert reason is None or reason in text


def test_a_kernel_that_does_some_says_which_it_refuses(monkeypatch):
    class Partly:
        def supports(self, *, device, dtype, head_dim, kind, direction):
            if dtype == torch.float32:
                return "no float32"
            return "too wide" if head_dim == 256 else None

    monkeypatch.setattr(info, "kernel_names", lambda: ("partly",))
    monkeypatch.setattr(info, "get_kernel", lambda name: Partly())
    text = "\n".join(info._kernels(torch.device("cpu")))
    assert "partly bfloat16      15 of 20 head dims x key ranges, but" in text
    assert "256 full, 256 causal, 256 rectangle, 256 band, 256 rows: too wide" in text
    assert "partly float32       no: no float32" in text


def test_unknown_options_are_refused():
    with pytest.raises(SystemExit) as error:
        info.main(["--all"])
    assert error.value.code == 2


@pytest.mark.gpu
def test_gpus_are_listed(capsys):
    info.main([])
    assert f"cuda:0         {torch.cuda.get_device_name(0)}" in capsys.readouterr().out
