"""The shipped configurations, compiled for the GPUs that they are meant for: no spills in the loops, matrix instructions in
them. `test_compiled_newest` does the same with the newest Triton."""

from __future__ import annotations

import copy

import compile_cases
import pytest
import sm90
import torch
from compile_cases import HEAD_DIMS, JOBS, KNOWN_SPILLS, PORTABLE

from longctx.kernels import kernel_names, tuning
from longctx.kernels.shipped import Shipped


@pytest.fixture(scope="session")
def compiled() -> dict[str, dict]:
    return compile_cases.compile_all()


@pytest.mark.parametrize("name", JOBS)
def test_shipped_configurations_compile(name, compiled):
    compile_cases.check(name, compiled[name], KNOWN_SPILLS)


def test_an_unmasked_block_has_no_mask_code(compiled):
    """A full block whose lengths are whole tiles has one loop: nothing is compared with an interval."""
    for dim in HEAD_DIMS:
        for kernel in sm90.KERNELS:
            assert len(compiled[f"sm90-{kernel}-d{dim}-full"]["kernels"][0]["loops"]) == 1


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda kernel: kernel.update(warnings=["C7510: serialized"]), "serialises"),
        (lambda kernel: kernel["loops"][0].update(num_spills=41), "num_spills"),
        (lambda kernel: kernel.update(shared=300_000), "300000"),
        (lambda kernel: kernel.update(num_tma=0), "TMA"),
        (lambda kernel: kernel.update(num_wgmma=0), "no Hopper matrix"),
        (lambda kernel: kernel.update(loops=[]), "no loop"),
        (lambda kernel: kernel.update(waits=[0]), "serialised"),
    ],
    ids=["warning", "spill", "shared", "tma", "wgmma", "loop", "waits"],
)
def test_the_check_finds(compiled, spoil, said):
    """Each fault that it looks for, put into the report of a configuration that is without it."""
    good = copy.deepcopy(compiled["sm90-dq-d128-causal"])
    good["kernels"][0]["waits"] = [0, 1]
    shipped = {**good, "kernel": "hopper_backward", "expected_waits": [0, 1], "known_spills": 0}
    compile_cases.check("hopper-x", shipped, {})
    spoil(good["kernels"][0])
    with pytest.raises(AssertionError, match=said):
        compile_cases.check("hopper-x", shipped, {})
    if said != "serialised":
        with pytest.raises(AssertionError, match=said):
            compile_cases.check("sm90-dq-d128-causal", good, {})


def test_a_kernel_for_hopper_lists_its_configurations():
    assert ("hopper" in kernel_names()) == (len(JOBS) > len(PORTABLE))


def test_names_of_configurations_tell_them_apart():
    plain = Shipped(direction="forward", head_dim=128, kind="rows")
    assert plain.id == "forward-d128-rows"
    changed = Shipped(
        direction="backward", head_dim=64, kind="full", dtype="float16", kv_heads=32, seq_len=8000,
        fresh=True, deterministic=True, softcap=50.0,
    )  # fmt: skip
    assert changed.id == "backward-d64-full-fresh-deterministic-softcap50-float16-heads32over32-len8000"


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
    (loop,) = sm90.matrix_loops(sass)
    assert (loop["instructions"], loop["num_matrix"], loop["num_spills"]) == (2, 1, 1)


@pytest.mark.parametrize("table", [tuning._HOPPER, tuning._PORTABLE, tuning._FP32], ids=["hopper", "portable", "fp32"])
def test_every_padded_head_dim_has_tiles(table):
    assert set(table) == {16, 32, 64, 128, 256}
    for tiles in table.values():
        for tile in (tiles.forward, tiles.dq, tiles.dkdv):
            assert {tile.block_m, tile.block_n} <= {16, 32, 64, 128}
            assert tile.num_warps in (4, 8)


def test_the_interpreter_has_its_own_tiles():
    assert tuning.tiles_for(128, torch.bfloat16, torch.device("cpu")) is tuning.INTERPRETER
