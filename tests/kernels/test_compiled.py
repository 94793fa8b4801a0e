"""The shipped tiles, compiled for the GPUs that they are meant for: no spills in the loops, matrix instructions in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import sm90
import torch

from longctx.kernels import tuning

HEAD_DIMS = (64, 128, 256)
# Shared memory of one program: Hopper; consumer GPUs.
HOPPER_SHARED, CONSUMER_SHARED = 232_448, 101_376
# Spilled loads and stores in one pass of a loop, of several hundred instructions, that are known: these tiles were measured
# faster than those that spill nothing. Blocks without a mask spill nothing.
KNOWN_SPILLS = {("forward", 128): 40, ("dq", 256): 16, ("dkdv", 256): 2}


def job(kernel: str, head_dim: int, kind: str, table: dict, **changes) -> dict:
    tile = asdict(getattr(table[head_dim], kernel))
    # 4 query heads per key head, as in the models of today; a forward inside a ring carries its state.
    shape = {"b": 1, "s": 8192, "h": 32, "hk": 8, "carry": kernel == "forward", "dtype": "bfloat16"}
    return {"kernel": kernel, "head_dim": head_dim, "kind": kind, "tile": tile, **shape, **changes}


def jobs() -> dict[str, dict]:
    found = {}
    for kernel in sm90.KERNELS:
        for dim in HEAD_DIMS:
            for kind in ("full", "causal", "rows"):
                found[f"hopper-{kernel}-d{dim}-{kind}"] = job(kernel, dim, kind, tuning._HOPPER)
        found[f"hopper-{kernel}-d128-window"] = job(kernel, 128, "window", tuning._HOPPER)
        # Gemma 2's. Its tanh needs registers: spills are not asserted, since tiles are tuned without it.
        found[f"softcap-{kernel}-d128-causal"] = job(kernel, 128, "causal", tuning._HOPPER, softcap=50.0)
        found[f"portable-{kernel}-d128-causal"] = job(kernel, 128, "causal", tuning._PORTABLE, capability=89)
        found[f"fp32-{kernel}-d64-causal"] = job(kernel, 64, "causal", tuning._FP32, dtype="float32")
    return found


JOBS = jobs()


@pytest.fixture(scope="session")
def compiled() -> dict[str, dict]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(sm90.__file__)), "2"],
        input=json.dumps(list(JOBS.values())),
        capture_output=True,
        text=True,
        env={**env, "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(JOBS, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("name", JOBS)
def test_shipped_tiles_compile(name, compiled):
    report = compiled[name]
    assert "error" not in report, report["error"]
    if not name.startswith(("hopper", "softcap")):
        assert report["shared"] <= CONSUMER_SHARED
        return
    assert report["shared"] <= HOPPER_SHARED
    assert report["num_tma"] > 0, "tiles are not loaded by the TMA engine"
    assert report["num_wgmma"] > 0, "no Hopper matrix instructions"
    assert report["warnings"] == [], "ptxas serialises matrix instructions"
    assert report["loops"], "no loop with matrix instructions was found"
    assert sum(loop["num_matrix"] for loop in report["loops"]) > 0
    if name.startswith("softcap"):
        return
    known = 0 if report["kind"] == "full" else KNOWN_SPILLS.get((report["kernel"], report["head_dim"]), 0)
    assert max(loop["num_spills"] for loop in report["loops"]) <= known, report["loops"]


def test_an_unmasked_block_has_no_mask_code(compiled):
    """A full block whose lengths are whole tiles has one loop: nothing is compared with an interval."""
    for dim in HEAD_DIMS:
        for kernel in sm90.KERNELS:
            assert len(compiled[f"hopper-{kernel}-d{dim}-full"]["loops"]) == 1


def test_spills_in_a_loop_are_counted():
    """What the counts above rest on: a loop of this listing spills once, and its barrier's retry is no loop."""
    sass = """
    /*0000*/ MOV R1, c[0x0][0x28] ;
.L_x_0:
    /*0010*/ HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4] ;
    /*0020*/ STL [R1], R3 ;
    /*0030*/ @P0 BRA `(.L_x_0) ;
.L_x_1:
    /*0040*/ HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4] ;
    /*0050*/ EXIT ;
    /*0060*/ BRA `(.L_x_1) ;
"""
    assert sm90.matrix_loops(sass) == [{"instructions": 2, "num_matrix": 1, "num_spills": 1, "num_covered_exp2": 0}]


@pytest.mark.parametrize("table", [tuning._HOPPER, tuning._PORTABLE, tuning._FP32], ids=["hopper", "portable", "fp32"])
def test_every_padded_head_dim_has_tiles(table):
    assert set(table) == {16, 32, 64, 128, 256}
    for tiles in table.values():
        for tile in (tiles.forward, tiles.dq, tiles.dkdv):
            assert {tile.block_m, tile.block_n} <= {16, 32, 64, 128}
            assert tile.num_warps in (4, 8)


def test_the_interpreter_has_its_own_tiles():
    assert tuning.tiles_for(128, torch.bfloat16, torch.device("cpu")) is tuning.INTERPRETER
