"""No Hopper kernel has a race that Triton's concurrency sanitizer knows; and it finds barriers that are left out."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import pytest
import race_cases
import triton
from race_cases import MISTAKES, shipped

WITHOUT = "this Triton has no instrumentation modes"
needs_sanitizer = pytest.mark.skipif(not hasattr(triton.knobs.compilation, "instrumentation_mode"), reason=WITHOUT)
# One of each kernel.
LOWERED = ("forward-d64-rows-final", "backward-d64-full", "backward-d128-full", "backward-d256-full")


@pytest.fixture(scope="module")
def said(request):
    """What the sanitizer says of (name, mistake): a minute of compiling each, side by side unless pytest is so already."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        yield race_cases.run
        return
    here = [item for item in request.session.items if item.path == request.path and "said" in item.fixturenames]
    keys = [_key(**item.callspec.params) for item in here]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = {key: pool.submit(race_cases.run, *key) for key in keys}
        yield lambda *key: found[key].result()


def _key(name: str = "", mistake: str | None = None) -> tuple[str, str | None]:
    return (MISTAKES[mistake][0] if mistake else name), mistake


@needs_sanitizer
@pytest.mark.gpu
@pytest.mark.parametrize("name", shipped())
def test_no_race_on_a_gpu(name, said):
    assert said(*_key(name)) == ""


@needs_sanitizer
@pytest.mark.gpu
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_barrier_left_out_is_reported_on_a_gpu(mistake, said):
    found = said(*_key(mistake=mistake))
    assert "outstanding" in found or "pending access" in found, found


@pytest.mark.parametrize("mistake", [None, *MISTAKES])
def test_the_kernels_have_what_is_replaced(mistake):
    texts = race_cases.sources(mistake)
    assert not any(re.search(r"named_barrier_sync\(\d", text) for text in texts.values())
    met = "".join(texts.values()).count("await_signal(ds_ready, 1 - CID, t, TO_OTHER)")
    assert met == 1 - (mistake is not None and "named_barrier" in MISTAKES[mistake][1].old)
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
    assert "bar.arrive" not in module
    assert "async_tma_reduce" not in module
    registers = re.search(r"requestedRegisters = array<i32: ([^>]*)>", module)
    assert registers is not None
    assert set(registers[1].split(", ")) == {"128" if "forward-d64" in name else "168"}
    assert module.count("ttng.warp_group_dot ") >= 2
    assert "ttng.async_tma_copy_global_to_local" in module
    if name.startswith("backward"):
        assert "ttng.async_tma_copy_local_to_global" in module
