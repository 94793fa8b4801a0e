"""Every configuration of the kernels that is shipped, and what its compiled form must be like."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import sm90

from longctx import kernels
from longctx.kernels import tuning

HEAD_DIMS = (64, 128, 256)
# Shared memory of one program: Hopper; consumer GPUs.
HOPPER_SHARED, CONSUMER_SHARED = 232_448, 101_376

# Spilled loads and stores in one pass of a loop, of several hundred instructions, that are known: (kernel, head dim) -> (in
# blocks without a mask, in others). These tiles were measured faster than those that spill nothing, on triton 3.6.0. A kernel
# written for Hopper says its own, as `Shipped.known_spills`.
KNOWN_SPILLS = {("forward", 128): (0, 40), ("dq", 256): (0, 16), ("dkdv", 256): (0, 2)}
# The same tiles by the newest release, which gives its loops fewer registers; not measured. Here "hopper_forward" and
# "hopper_backward" may have an entry too, for what they spill beyond their own.
KNOWN_SPILLS_NEWEST = {
    ("forward", 128): (8, 24),
    ("dkdv", 128): (0, 32),
    ("dkdv", 256): (72, 104),
    ("hopper_forward", 64): (0, 24),
    ("hopper_forward", 128): (0, 4),
    ("hopper_backward", 128): (0, 3),
    ("hopper_backward", 256): (6, 12),
}


def job(kernel: str, head_dim: int, kind: str, table: dict, **changes) -> dict:
    tile = asdict(getattr(table[head_dim], kernel))
    # 4 query heads per key head, as in the models of today; a forward inside a ring carries its state.
    shape = {"b": 1, "s": 8192, "h": 32, "hk": 8, "carry": kernel == "forward", "dtype": "bfloat16"}
    return {"kernel": kernel, "head_dim": head_dim, "kind": kind, "tile": tile, **shape, **changes}


def portable_jobs() -> dict[str, dict]:
    found = {}
    for kernel in sm90.KERNELS:
        for dim in HEAD_DIMS:
            for kind in ("full", "causal", "rows"):
                found[f"sm90-{kernel}-d{dim}-{kind}"] = job(kernel, dim, kind, tuning._HOPPER)
        found[f"sm90-{kernel}-d128-window"] = job(kernel, 128, "window", tuning._HOPPER)
        # Gemma 2's. Its tanh needs registers: spills are not asserted, since tiles are tuned without it.
        found[f"sm90-{kernel}-d128-causal-softcap"] = job(kernel, 128, "causal", tuning._HOPPER, softcap=50.0)
        found[f"sm89-{kernel}-d128-causal"] = job(kernel, 128, "causal", tuning._PORTABLE, capability=89)
        found[f"fp32-{kernel}-d64-causal"] = job(kernel, 64, "causal", tuning._FP32, dtype="float32")
    return found


def shipped_jobs() -> dict[str, dict]:
    """What the modules of kernels written for Hopper say that they launch, by their `shipped_configurations`."""
    found = {}
    for module in pkgutil.iter_modules(kernels.__path__, "longctx.kernels."):
        listed = getattr(importlib.import_module(module.name), "shipped_configurations", tuple)()
        for shipped in listed:
            name = f"hopper-{shipped.id}"
            assert name not in found, f"{name} is shipped twice"
            fields = {
                **asdict(shipped),
                "kernel": f"hopper_{shipped.direction}",
                "expected_waits": sorted(shipped.waits),
            }
            del fields["waits"]
            sizes = {"b": 1, "s": shipped.seq_len, "h": shipped.heads, "hk": shipped.kv_heads}
            found[name] = {**fields, **sizes}
    return found


PORTABLE = portable_jobs()
JOBS = {**PORTABLE, **shipped_jobs()}


def compile_all(triton: Path | None = None) -> dict[str, dict]:
    """Every job's report, from processes of their own; `triton`: a folder that holds another release of it."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = [str(triton)] if triton else []
    path += [str(Path(kernels.__file__).parents[2]), *filter(None, [env.get("PYTHONPATH")])]
    # Releases from 3.9 on warn where this is not said; it is what every release so far does.
    env |= {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(
        [sys.executable, str(Path(sm90.__file__)), "2"],
        input=json.dumps(list(JOBS.values())),
        capture_output=True,
        text=True,
        env=env,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    reports = json.loads(done.stdout)
    if triton:
        assert {r["triton"] for r in reports} == {str(triton / "triton")}, "another Triton was compiled with"
    return dict(zip(JOBS, reports, strict=True))


def check(name: str, report: dict, known_spills: dict[tuple[str, int], tuple[int, int]]) -> None:
    """
    Raises:
        AssertionError: it did not compile, spills in a loop, serialises its matrix instructions, or does not fit.
    """
    assert "error" not in report, report["error"]
    full, masked = known_spills.get((report["kernel"], report["head_dim"]), (0, 0))
    known = full if report["kind"] == "full" else masked
    if report["kernel"].startswith("hopper"):
        _check_shipped(report, known)
        return
    (kernel,) = report["kernels"]
    if not name.startswith("sm90"):
        assert kernel["shared"] <= CONSUMER_SHARED, f"{kernel['shared']} bytes of shared memory"
        return
    _check_hopper(report["kernels"])
    if not name.endswith("softcap"):
        assert max(loop["num_spills"] for loop in kernel["loops"]) <= known, kernel["loops"]


def _check_shipped(report: dict, known: int) -> None:
    _check_hopper(report["kernels"])
    waits = {n for kernel in report["kernels"] for n in kernel["waits"]}
    missing = set(report["expected_waits"]) - waits
    assert not missing, f"no wait leaves {missing} products in flight, only {waits}: they are serialised"
    if report["known_spills"] is None:
        return
    for kernel in report["kernels"]:
        for loop in kernel["loops"]:
            assert loop["num_spills"] <= max(known, report["known_spills"]), (kernel["name"], loop)


def _check_hopper(launched: list[dict]) -> None:
    """What holds for every block on sm_90. Kernels that only prepare rows have no matrix instructions."""
    for kernel in launched:
        assert kernel["shared"] <= HOPPER_SHARED, f"{kernel['name']}: {kernel['shared']} bytes of shared memory"
        assert kernel["warnings"] == [], f"{kernel['name']}: ptxas serialises matrix instructions"
    products = [kernel for kernel in launched if kernel["num_wgmma"]]
    assert products, "no Hopper matrix instructions"
    for kernel in products:
        assert kernel["num_tma"] > 0, "tiles are not loaded by the TMA engine"
        assert sum(loop["num_matrix"] for loop in kernel["loops"]) > 0, "no loop with matrix instructions was found"
