"""No Hopper kernel has a race that Triton's concurrency sanitizer knows; and it finds barriers that are left out."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import race_cases
import triton
from race_cases import MISTAKES, shipped

WITHOUT = "this Triton has no instrumentation modes"
needs_sanitizer = pytest.mark.skipif(not hasattr(triton.knobs.compilation, "instrumentation_mode"), reason=WITHOUT)
# One of each kernel.
LOWERED = ("forward-d64-rows-final", "backward-d64-full", "backward-d256-full")


@needs_sanitizer
@pytest.mark.gpu
@pytest.mark.parametrize("name", shipped())
def test_no_race_on_a_gpu(name):
    assert race_cases.run(name) == ""


@needs_sanitizer
@pytest.mark.gpu
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_barrier_left_out_is_reported_on_a_gpu(mistake):
    said = race_cases.run(MISTAKES[mistake][0], mistake)
    assert "outstanding" in said or "pending access" in said, said


@pytest.mark.parametrize("mistake", [None, *MISTAKES])
def test_the_kernels_have_what_is_replaced(mistake):
    texts = race_cases.sources(mistake)
    assert not any(re.search(r"named_barrier_sync\(\d", text) for text in texts.values())
    met = len(re.findall(r"mbarrier\.wait\(dq_full\.index\([23]\), t & 1\)", "".join(texts.values())))
    assert met == 3 - (mistake is not None and "named_barrier" in MISTAKES[mistake][1].old)
    for text in texts.values():
        compile(text, "kernel", "exec")


def test_a_kernel_that_changed_is_noticed(monkeypatch):
    change = race_cases.Change(race_cases.FORWARD, "no such line", "")
    monkeypatch.setitem(MISTAKES, "gone", ("forward-d128-full-carry", change))
    with pytest.raises(AssertionError, match="has this 0 times, not once"):
        race_cases.sources("gone")


@pytest.fixture(scope="module")
def lowered() -> dict[str, list[str]]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {**race_cases.ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = {}
    for name in LOWERED:
        one = asdict(replace(shipped()[name], waits=frozenset()))
        case = json.dumps({"shipped": one, "mistake": None, "lower": True}, default=list)
        done = subprocess.run(
            [sys.executable, race_cases.__file__, case], capture_output=True, text=True, env=env, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found[name] = json.loads(done.stdout)
    return found


@needs_sanitizer
@pytest.mark.parametrize("name", LOWERED)
def test_the_sanitizer_is_given_what_it_knows(name, lowered):
    """Only mbarriers, loads and stores; as many registers for each warp."""
    (module,) = lowered[name]
    assert "bar.sync" not in module
    assert "async_tma_reduce" not in module
    registers = re.search(r"requestedRegisters = array<i32: ([^>]*)>", module)
    assert registers is not None
    assert set(registers[1].split(", ")) == {"128" if "forward-d64" in name else "168"}
    assert module.count("ttng.warp_group_dot ") >= 2
    assert "ttng.async_tma_copy_global_to_local" in module
    if name.startswith("backward"):
        assert "ttng.async_tma_copy_local_to_global" in module
