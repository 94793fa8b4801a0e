"""The Hopper backward: every shipped variant compiles as it must, and on a GPU it is held against float64."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import block_cases
import pytest
import sm90
import torch
from block_cases import VISIBLE, Case, make_inputs

from longctx.errors import KernelError
from longctx.kernels import row_delta
from longctx.kernels.hopper_backward import (
    SCHEDULES,
    launch_hopper_backward,
    launch_with_rows,
    padded_head_dim,
    scales_p,
    shipped_configurations,
)
from longctx.kernels.hopper_backward_parts import EXCHANGED_PIECE
from longctx.kernels.triton_attention import TritonAttention
from longctx.masks import KeyRange

SHARED = 232_448
# Pending products at each wait, in the order of the source. Up to 128: dP under the exponentials; dP; dv under dq; dq under dk; dk.
# At 64 dv and dq, of the step before, are waited for at once, and the last dq after the loop. At 256 the first warpgroup waits for S
# before the loop, the second for dP under dv; both for dv under dq, for dq under dk, and for dk, the first with the next S.
WAITS = {
    64: 2 * [1, 0, 1, 0, 0],
    128: 2 * [1, 0, 1, 1, 0],
    256: [0, 1, 1, 0, 1, 1, 1, 0],
}


def jobs() -> dict[str, dict]:
    """The loops of whole tiles, with dq and without; test_compiled compiles all that is shipped."""
    found = {}
    for shipped in shipped_configurations():
        if shipped.kind == "full" and not shipped.fresh and shipped.seq_len == 8192:
            found[shipped.id] = {**asdict(shipped), "waits": sorted(shipped.waits), "with_dq": True}
    for dim in (64, 128, 256):
        full = found[f"backward-d{dim}-full"]
        found[f"backward-d{dim}-full-deterministic"] = {**full, "waits": [0], "with_dq": False}
    return found


JOBS = jobs()


def compile_one(job: dict) -> dict:
    """Compile one variant on tensors without storage; what ptxas says of it."""
    s, h, hk, d = (job[x] for x in ("seq_len", "heads", "kv_heads", "head_dim"))
    q = torch.empty(1, s, h, d, dtype=getattr(torch, job["dtype"]), device="meta")
    k = torch.empty(1, s, hk, d, dtype=q.dtype, device="meta")
    rows = torch.empty(1, h, math.ceil(s / 128) * 128, device="meta")
    dk = torch.empty(k.shape, dtype=q.dtype if job["fresh"] else torch.float32, device="meta")
    with sm90.compile_only() as compiled:
        launch_with_rows(
            q, q, k, k, rows, rows, sm90.key_range(job["kind"], s), scale=0.1, softcap=job["softcap"],
            dq_acc=torch.empty(q.shape, device="meta"), dk_acc=dk, dv_acc=dk, fresh=job["fresh"],
            with_dq=job["with_dq"],
        )  # fmt: skip
    ((name, kernel, log),) = compiled
    ptx = kernel.asm["ptx"]
    waits = [int(line.split()[-1].rstrip(";")) for line in ptx.splitlines() if "wgmma.wait_group" in line]
    reduces = sum("cp.reduce.async.bulk.tensor" in line for line in ptx.splitlines())
    return {**sm90._report(name, kernel, log), "waits": waits, "reduces": reduces}


@pytest.fixture(scope="session")
def compiled() -> dict[str, dict]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__))],
        input=json.dumps(list(JOBS.values())),
        capture_output=True,
        text=True,
        env={**env, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(JOBS, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("name", JOBS)
def test_shipped_variants_compile(name, compiled):
    job, report = JOBS[name], compiled[name]
    assert report["shared"] <= SHARED
    assert report["warnings"] == [], "ptxas serialises matrix instructions"
    assert {24, 240} <= set(report["max_registers"]), "registers do not move to the warpgroups that compute"
    assert (report["reduces"] > 0) == job["with_dq"]
    # One loop for each of the two warpgroups: a mask is a branch in it, not a second loop.
    assert len(report["loops"]) == 2
    assert set(job["waits"]) <= set(report["waits"]), "products are serialised"
    if job["known_spills"] is not None:
        assert max(loop["num_spills"] for loop in report["loops"]) <= job["known_spills"], report["loops"]


@pytest.mark.parametrize("dim", WAITS)
def test_products_overlap(dim, compiled):
    """The waits of a loop leave products in flight where the schedule says so, in both warpgroups."""
    assert sorted(compiled[f"backward-d{dim}-full"]["waits"]) == sorted(WAITS[dim])


@pytest.mark.parametrize("name", [n for n in JOBS if "d256" not in n])
def test_the_softmax_runs_under_a_product(name, compiled):
    """ptxas leaves the exponentials of a block before the wait for dP, in both warpgroups."""
    want = SCHEDULES[padded_head_dim(JOBS[name]["head_dim"])].rows // 2
    covered = [loop["num_covered_exp2"] for loop in compiled[name]["loops"]]
    assert min(covered) >= want - 4, covered


def dq_offsets() -> dict[tuple[int, int], int]:
    """(row, exchanged column) of a piece of dq -> element of shared memory, as EXCHANGED_PIECE says."""
    found = {}
    for offset in range(64 * 64):
        row = column = 0
        for bit, (rows, columns) in enumerate(EXCHANGED_PIECE.value.offset_bases):
            if offset >> bit & 1:
                row, column = row ^ rows, column ^ columns
        found[row, column] = offset
    return found


class TestTheWayOfDq:
    """A piece of dq is a tile as TMA reads it, and no two threads that store at once meet in one bank."""

    def test_it_is_the_tile_that_tma_reads(self):
        """Boxes of 32 columns; of a row's 16-byte chunks the k-th lies at k ^ (row % 8)."""
        assert len(dq_offsets()) == 64 * 64
        for (row, exchanged), offset in dq_offsets().items():
            column = exchanged ^ (16 * (row & 1))
            chunk = column % 32 // 4 ^ row % 8
            assert offset == column // 32 * 2048 + row * 32 + chunk * 4 + column % 4

    def test_half_a_warp_stores_into_all_banks(self):
        """8 bytes a thread: lane 4 g + c holds columns 8 j + 2 c and the next of row g of a warp's 16."""
        offsets = dq_offsets()
        for row, j in itertools.product(range(0, 64, 4), range(8)):
            stored = [offsets[row + g, 8 * j + 2 * c + i] % 32 for g in range(4) for c in range(4) for i in range(2)]
            assert len(set(stored)) == 32


@pytest.mark.parametrize(
    ("dtype", "scale", "folded"),
    [
        (torch.bfloat16, 64**-0.5, True),
        (torch.bfloat16, 96**-0.5, True),
        (torch.bfloat16, 128**-0.5, True),
        (torch.bfloat16, 192**-0.5, False),
        (torch.bfloat16, 256**-0.5, True),
        (torch.bfloat16, 0.0, False),
        (torch.bfloat16, -0.125, False),
        (torch.float16, 0.125, False),
    ],
)
def test_p_carries_the_scale_where_that_costs_no_digits(dtype, scale, folded):
    assert scales_p(dtype, scale) is folded
    # On probabilities near 1, which decide where one key takes nearly all of a row: the error of scale * p beside that of p.
    if dtype == torch.bfloat16 and scale > 0:
        p = torch.linspace(0.9, 1.0, 10_001, dtype=torch.float64)

        def error(x):
            return float(((x.to(dtype).double() - x) / x).square().mean().sqrt())

        assert (error(p * scale) < 1.5 * error(p)) is folded


class TestRefusals:
    def call(self, dtype=torch.bfloat16, head_dim=64, visible=None, acc=torch.float32, fresh=False, offset=0):
        q = torch.zeros(1, 8, 2, head_dim + offset, dtype=dtype)[..., offset:]
        rows = torch.zeros(1, 2, 8)
        dk, dv = torch.zeros(q.shape, dtype=acc), torch.zeros(q.shape)
        launch_hopper_backward(
            q, q, q, q, rows, rows, visible or KeyRange.full(), scale=1.0, dq_acc=torch.zeros(q.shape),
            dk_acc=dk, dv_acc=dv, fresh=fresh,
        )  # fmt: skip

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"dtype": torch.float32}, "not torch.float32"),
            ({"head_dim": 100}, "multiples of 8 up to 256, not 100"),
            ({"head_dim": 264}, "not 264"),
            ({"visible": KeyRange.empty()}, "empty block"),
            ({"acc": torch.bfloat16}, "dk_acc is torch.bfloat16"),
            ({"offset": 4}, "whole 16 bytes"),
        ],
        ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
    )
    def test_what_it_cannot_do(self, changes, message):
        with pytest.raises(KernelError, match=message):
            self.call(**changes)


@dataclass(frozen=True)
class HopperBackward(TritonAttention):
    """The portable forward with the Hopper backward behind it."""

    deterministic: bool = False

    def supports(self, **asked):
        return None

    def backward(self, dout, q, k, v, lse, delta, key_range, *, out, **options):
        if key_range.kind != "empty":
            options["deterministic"] = self.deterministic
            launch_hopper_backward(dout, q, k, v, lse, delta, key_range, **options)


def gpu_cases() -> list[Case]:
    cases = []
    for dim in (64, 128, 256):
        for visible in VISIBLE:
            batch = 2 if visible == "rows_per_sequence" else 1
            cases.append(Case("hopper", "bfloat16", visible, 333, 333, 4, 1, dim, batch=batch))
        d = Case("hopper", "bfloat16", "causal", 256, 256, 2, 2, dim, batch=2)
        cases += [replace(d, dtype="float16"), replace(d, dtype="float16", visible="full")]
        cases += [replace(d, heads=8, kv_heads=1), replace(d, heads=8, kv_heads=2)]
        cases += [replace(d, visible="full"), replace(d, sq=200, sk=77, visible="full"), replace(d, sq=1, sk=300)]
        cases += [replace(d, blocks=3, sq=300, sk=300), replace(d, blocks=3, visible="rows_per_sequence")]
        cases += [replace(d, softcap=2.0), replace(d, amplitude=50.0, visible="full"), replace(d, strided=True)]
        cases += [
            replace(d, amplitude=200.0, softcap=50.0),
            replace(d, dtype="float16", visible="rows", sq=300, sk=300),
        ]
    # Head dims that ride in larger tiles, and more rows than one program can have in flight.
    cases += [Case("hopper", "bfloat16", "causal", 200, 200, 4, 2, dim) for dim in (8, 96, 112, 160, 192)]
    cases += [Case("hopper", "bfloat16", "window", 2048, 2048, 4, 2, dim, batch=1) for dim in (64, 128, 256)]
    return cases


@pytest.mark.gpu
@pytest.mark.parametrize("case", gpu_cases(), ids=[case.id for case in gpu_cases()])
def test_on_a_gpu(case):
    block_cases.check(case, device="cuda", kernel=HopperBackward())


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_deterministic_on_a_gpu(dim):
    case = Case("hopper", "bfloat16", "causal", 500, 500, 4, 2, dim)
    block_cases.check(case, device="cuda", kernel=HopperBackward(deterministic=True))


def _gradients(inputs, key_range, rows, fresh=None, **options) -> list[torch.Tensor]:
    """dq, dk, dv; with `fresh`, dk and dv in that dtype, in memory that held nan."""
    q, k, v, dout = inputs.q, inputs.k, inputs.v, inputs.dout
    dq = torch.zeros(q.shape, device=q.device)
    start = {"fill_value": math.nan, "dtype": fresh} if fresh else {"fill_value": 0.0, "dtype": torch.float32}
    dk, dv = (torch.full(k.shape, device=q.device, **start) for _ in range(2))
    launch_hopper_backward(
        dout, q, k, v, *rows, key_range, scale=q.shape[-1] ** -0.5, dq_acc=dq, dk_acc=dk, dv_acc=dv,
        fresh=fresh is not None, **options,
    )  # fmt: skip
    return [dq, dk, dv]


def _prepared(case: Case):
    inputs = make_inputs(case, "cuda")
    key_range = VISIBLE[case.visible](case.batch, case.sq, case.sk)
    state = TritonAttention().forward(inputs.q, inputs.k, inputs.v, key_range, scale=case.head_dim**-0.5)
    return inputs, key_range, (state.lse, row_delta(state.out.to(inputs.q.dtype), inputs.dout))


@pytest.mark.gpu
@pytest.mark.parametrize("visible", ["full", "late", "rows"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_fresh_writes_every_element_on_a_gpu(dim, visible):
    prepared = _prepared(Case("hopper", "bfloat16", visible, 300, 300, 4, 2, dim))
    added = _gradients(*prepared)
    for dtype in (torch.float32, torch.bfloat16):
        written = _gradients(*prepared, fresh=dtype)
        for into, from_zero in zip(written[1:], added[1:], strict=True):
            assert torch.equal(into, from_zero.to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_200_repeats_on_a_gpu(dim):
    """dk and dv are the same bits; dq differs by its order of summation only, and not at all when deterministic."""
    prepared = _prepared(Case("hopper", "bfloat16", "causal", 1500, 1500, 4, 2, dim))
    dq, dk, dv = _gradients(*prepared)
    exact = _gradients(*prepared, deterministic=True)
    # A sum of 1500 / 64 terms in any order: each of its additions rounds by at most half an ulp of what is in it.
    bound = 24 * torch.finfo(torch.float32).eps * float(dq.abs().max()) * 4
    for _ in range(200):
        again = _gradients(*prepared)
        assert torch.equal(dk, again[1])
        assert torch.equal(dv, again[2])
        assert float((dq - again[0]).abs().max()) <= bound
        assert all(map(torch.equal, exact, _gradients(*prepared, deterministic=True)))


if __name__ == "__main__":
    json.dump([compile_one(job) for job in json.load(sys.stdin)], sys.stdout)
