"""The Hopper forward: every shipped variant compiles as it must, and on a GPU it is held against float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import block_cases
import pytest
import sm90
import torch
from block_cases import Case

from longctx.errors import KernelError
from longctx.kernels import SoftmaxState, get_kernel, hopper_attention, hopper_forward
from longctx.kernels.hopper_forward import SCHEDULES, shipped_configurations
from longctx.masks import KeyRange

SHARED = 232_448
# Exponentials of one tile in a pass of the loop: 64 rows x block_n keys over 128 threads, two for alpha.
EXP2 = {64: 66, 96: 66, 128: 66, 256: 34}


TESTED = {
    ("forward", dtype, padded, runs_as)
    for dtype in (torch.bfloat16, torch.float16)
    for padded in (64, 128, 256)
    for runs_as in ("full", "band", "rows")
}


def jobs() -> dict[str, dict]:
    found = {}
    for shipped in shipped_configurations():
        fields = {"kernel": "hopper_forward", "b": 1, "s": shipped.seq_len, "h": shipped.heads, "hk": shipped.kv_heads}
        found[shipped.id.removeprefix("forward-")] = {**asdict(shipped), **fields, "waits": sorted(shipped.waits)}
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
def test_shipped_variants_compile(name, compiled):
    report = compiled[name]
    assert "error" not in report, report["error"]
    for kernel in report["kernels"]:
        assert kernel["shared"] <= SHARED
        assert kernel["num_tma"] > 0
        assert kernel["warnings"] == [], "ptxas serialises matrix instructions"
        found = set(kernel["max_registers"])
        assert {24, max(found)} <= found, "registers do not move to the consumers"
        if (known := JOBS[name]["known_spills"]) is not None:
            assert max(loop["num_spills"] for loop in kernel["loops"]) <= known, kernel["loops"]


@pytest.mark.parametrize("name", [n for n in JOBS if "softcap" not in n])
def test_the_softmax_runs_under_the_products(name, compiled):
    """In every loop ptxas leaves the exponentials of one tile before the wait for the products of the other."""
    want = EXP2[JOBS[name]["head_dim"]]
    covered = [loop["num_covered_exp2"] for kernel in compiled[name]["kernels"] for loop in kernel["loops"]]
    assert covered
    assert min(covered) >= want - 4, covered


def test_an_unmasked_block_has_no_mask_code(compiled):
    for dim, schedule in SCHEDULES.items():
        for name, num_loops in (("full-carry", 1), ("rows-final", 3)):
            for kernel in compiled[f"d{dim}-{name}"]["kernels"]:
                assert len(kernel["loops"]) == num_loops * schedule.groups


def test_a_fixed_maximum_is_not_looked_for(compiled):
    """Large blocks in bfloat16 are launched twice; without a mask, the first time compares no scores and rescales nothing."""
    for dim, schedule in SCHEDULES.items():
        first, second = compiled[f"d{dim}-full-carry"]["kernels"]
        assert all(loop["num_max"] == 0 for loop in first["loops"])
        assert all(loop["num_max"] >= schedule.block_n // 2 for loop in second["loops"])
        spared = min(loop["instructions"] for loop in second["loops"]) - max(x["instructions"] for x in first["loops"])
        assert spared > schedule.block_n // 2, (first["loops"], second["loops"])
    for name in ("d96-full-carry-float16-len8000", "d128-causal-final-len512"):
        (only,) = compiled[name]["kernels"]
        assert all(loop["num_max"] >= 64 for loop in only["loops"])


class TestSupport:
    def reason(self, monkeypatch, **changes) -> str | None:
        from longctx.kernels import gluon_api

        monkeypatch.setattr(gluon_api, "missing_gluon", lambda device: None)
        asked = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "head_dim": 128, "kind": "causal"}
        return get_kernel("hopper").supports(**{**asked, **changes})

    def test_elsewhere_it_is_refused(self):
        asked = {"dtype": torch.float16, "head_dim": 64, "kind": "full"}
        assert get_kernel("hopper").supports(device=torch.device("cpu"), **asked) == "needs an NVIDIA GPU"

    def test_what_was_validated_is_taken(self, monkeypatch):
        for direction, dtype, padded, kind in hopper_attention.VALIDATED:
            for head_dim in {padded, padded - 24}:
                changes = {"dtype": dtype, "head_dim": head_dim, "kind": kind, "direction": direction}
                assert self.reason(monkeypatch, **changes) is None, changes

    def test_what_was_not_validated_is_refused(self, monkeypatch):
        monkeypatch.setattr(hopper_attention, "VALIDATED", TESTED - {("forward", torch.bfloat16, 128, "band")})
        for kind in ("causal", "band"):
            assert "not validated for torch.bfloat16" in self.reason(monkeypatch, kind=kind)
            assert "backward" in self.reason(monkeypatch, kind=kind, direction="backward")
        assert self.reason(monkeypatch, kind="rectangle") is None
        assert self.reason(monkeypatch, kind="empty") is None

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"dtype": torch.float32}, "torch.float32 is not one of"),
            ({"head_dim": 100}, "head dim 100 is not a multiple of 8"),
            ({"head_dim": 264}, "head dim 264 is not a multiple of 8 up to 256"),
        ],
        ids=["dtype", "odd", "wide"],
    )
    def test_what_it_cannot_do_is_refused(self, monkeypatch, changes, message):
        assert message in self.reason(monkeypatch, **changes)


def gpu_cases() -> list[Case]:
    base = Case("hopper", "bfloat16", "causal", 515, 515, heads=4, kv_heads=2, head_dim=128)
    cases = []
    for dtype in ("bfloat16", "float16"):
        for dim in (64, 128, 256):
            cases += [replace(base, dtype=dtype, head_dim=dim, visible=v) for v in block_cases.VISIBLE]
    cases += [replace(base, head_dim=d) for d in (8, 32, 80, 96, 120, 160, 192, 248)]
    for sq, sk in ((1, 1), (1, 300), (300, 1), (64, 64), (200, 390), (390, 200), (512, 512), (1, 2048)):
        cases += [replace(base, sq=sq, sk=sk, visible=v) for v in ("full", "causal")]
    for dim in (64, 128, 256):
        cases += [
            replace(base, sq=700, sk=700, head_dim=dim, visible=v, blocks=3)
            for v in ("causal", "rows_per_sequence", "both_sides", "full")
        ]
        cases += [
            replace(base, head_dim=dim, visible="full", amplitude=50.0),
            replace(base, head_dim=dim, softcap=2.0),
            replace(base, head_dim=dim, visible="rows", softcap=50.0, amplitude=200.0),
        ]
    cases += [replace(base, heads=8, kv_heads=1), replace(base, heads=3, kv_heads=3), replace(base, strided=True)]
    # More row blocks than an H100 has SMs: programs take a second and a third.
    cases += [replace(base, sq=1030, sk=1030, heads=48, kv_heads=12, visible=v) for v in ("causal", "rows", "window")]
    return list(dict.fromkeys(cases))


@pytest.fixture(autouse=True)
def _everything_is_launched(request, monkeypatch):
    """What is held against float64 here is what may be validated: nothing else says so first."""
    if request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(hopper_attention, "VALIDATED", hopper_attention.VALIDATED | TESTED)
        # Also in blocks that are too small for it to pay.
        monkeypatch.setattr(hopper_forward, "MIN_FLOPS_FIXED", 0)


@pytest.mark.gpu
@pytest.mark.parametrize("case", gpu_cases(), ids=lambda case: case.id)
def test_on_a_gpu(case):
    block_cases.check(case, "cuda", forward_only=True)


@pytest.mark.gpu
@pytest.mark.parametrize("visible", ["full", "causal", "rows", "both_sides"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_small_blocks_on_a_gpu(head_dim, visible, monkeypatch):
    monkeypatch.setattr(hopper_forward, "MIN_FLOPS_FIXED", float("inf"))
    case = Case("hopper", "bfloat16", visible, 515, 515, heads=4, kv_heads=2, head_dim=head_dim, blocks=2)
    block_cases.check(case, "cuda", forward_only=True)


@pytest.fixture
def done_again(monkeypatch) -> list[torch.Tensor]:
    """Filled by every launch with its list of what is to be done again, which starts with how much."""
    kept, counters = [], hopper_forward._counters

    def keep(*args):
        found = counters(*args)
        kept.append(found[1])
        return found

    monkeypatch.setattr(hopper_forward, "_counters", keep)
    return kept


def _documents(b: int, sq: int, sk: int) -> KeyRange:
    """Long enough for tiles that need no mask."""
    row = torch.arange(sq, dtype=torch.int32)[None]
    return KeyRange("rows", row // 450 * 450, row + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("amplitude", [1.0, 1000.0])
@pytest.mark.parametrize("visible", ["full", "causal", "documents", "rectangle", "both_sides"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_rows_that_outgrow_their_maximum_are_done_again(head_dim, visible, amplitude, blocks, done_again, monkeypatch):
    """Scores of some hundreds: in most rows a later key is so much larger than the first ones that exp2 of it is infinite."""
    monkeypatch.setitem(block_cases.VISIBLE, "documents", _documents)
    case = Case(
        "hopper", "bfloat16", visible, 1100, 1100, heads=4, kv_heads=2, head_dim=head_dim, amplitude=amplitude, blocks=blocks
    )  # fmt: skip
    block_cases.check(case, "cuda", forward_only=True)
    assert any(int(again[0]) > 0 for again in done_again) == (amplitude > 1)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1.0, 3.0, 12.0])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_fixed_maximum_costs_little_precision(head_dim, size):
    """Ordinary scores, and such that a few keys or a single one take nearly all: the error beside that of running maxima."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, 4096, 4, head_dim, device="cuda", generator=generator).bfloat16() for _ in range(3))
    options = {"scale": size * head_dim**-0.5, "softcap": 0.0, "state": None, "final": True}
    exact = torch.nn.functional.scaled_dot_product_attention(
        *(t.double().transpose(1, 2) for t in (q, k, v)), scale=options["scale"]
    ).transpose(1, 2)

    def error(fixed_max):
        state = hopper_forward.launch_hopper_forward(q, k, v, KeyRange.full(), **options, fixed_max=fixed_max)
        return float((state.out - exact).norm())

    assert error(True) < {1.0: 1.05, 3.0: 1.2, 12.0: 1.08}[size] * error(False)


@pytest.mark.gpu
def test_only_what_is_wrong_is_done_again(done_again):
    """A key that outdoes all others for the rows of one group only, and a row of nan."""
    case = Case("hopper", "bfloat16", "full", 1024, 1024, heads=2, kv_heads=2, batch=1, head_dim=128)
    inputs, key_range = _inputs(case)
    q, k, v = (t.clone() for t in (inputs.q, inputs.k, inputs.v))
    k[0, 3, 1] = k[0, 3, 1].sign()
    q[0, 192:256, 1] = k[0, 3, 1] * 400
    got = get_kernel("hopper").forward(q, k, v, key_range, scale=0.1, final=True)
    (again,) = done_again
    assert int(again[0]) == 1
    assert again[1:].sum() > 0
    assert (got.out[0, 192:256, 1].float() - v[0, 3, 1].float()).abs().max() == 0
    untouched = get_kernel("hopper").forward(inputs.q, inputs.k, inputs.v, key_range, scale=0.1, final=True)
    assert torch.equal(got.out[:, :, 0], untouched.out[:, :, 0])
    q[0, 700, 0, 5] = float("nan")
    got = get_kernel("hopper").forward(q, k, v, key_range, scale=0.1, final=True)
    assert got.out[0, 700, 0].isnan().all()
    assert int(got.out.isnan().any(-1).sum()) == 1
    assert int(done_again[-1][0]) == 2


def test_maxima_are_fixed_in_bfloat16_only():
    q = torch.empty(1, 64, 1, 64, dtype=torch.float16, device="meta")
    with pytest.raises(KernelError, match=r"in bfloat16 only, not torch\.float16"):
        hopper_forward.launch_hopper_forward(
            q, q, q, KeyRange.full(), scale=1.0, softcap=0.0, state=None, final=True, fixed_max=True
        )


def _inputs(case: Case):
    inputs = block_cases.make_inputs(case, "cuda")
    return inputs, block_cases.VISIBLE[case.visible](case.batch, case.sq, case.sk)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_last_block_is_rounded_once(head_dim):
    case = Case("hopper", "bfloat16", "rows", 515, 515, heads=4, kv_heads=2, head_dim=head_dim)
    inputs, visible = _inputs(case)
    kernel, block = get_kernel("hopper"), (inputs.q, inputs.k, inputs.v)
    for before in (None, kernel.forward(*block, KeyRange.causal(), scale=0.1)):
        states = [None if before is None else SoftmaxState(before.out.clone(), before.lse.clone()) for _ in range(2)]
        usual = kernel.forward(*block, visible, scale=0.1, state=states[0])
        last = kernel.forward(*block, visible, scale=0.1, state=states[1], final=True)
        assert last.out.dtype == torch.bfloat16
        assert torch.equal(last.out, usual.out.bfloat16())
        assert torch.equal(last.lse, usual.lse)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("visible", ["full", "causal", "rows"])
def test_it_is_deterministic(head_dim, visible):
    """200 times the same bits, with more row blocks than programs, which take them in an order that differs."""
    case = Case("hopper", "bfloat16", visible, 2048, 2048, heads=16, kv_heads=4, head_dim=head_dim)
    inputs, key_range = _inputs(case)
    first, differ = None, torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(200):
        state = get_kernel("hopper").forward(inputs.q, inputs.k, inputs.v, key_range, scale=0.1, final=True)
        first = first or state
        differ += (state.out != first.out).sum() + (state.lse != first.lse).sum()
    assert int(differ) == 0


@pytest.mark.gpu
def test_rows_beyond_2_to_the_31_elements():
    """A row stride of 2**23 puts row 300 of q past 2**31 elements."""
    case = Case("hopper", "bfloat16", "causal", 300, 300, heads=2, kv_heads=2, batch=1, head_dim=64)
    inputs, key_range = _inputs(case)
    wide = torch.zeros(300 << 23, dtype=torch.bfloat16, device="cuda").as_strided(inputs.q.shape, (0, 1 << 23, 64, 1))
    wide.copy_(inputs.q)
    near, far = (get_kernel("hopper").forward(q, inputs.k, inputs.v, key_range, scale=0.125) for q in (inputs.q, wide))
    assert torch.equal(near.out, far.out)
    assert torch.equal(near.lse, far.lse)


@pytest.mark.gpu
def test_tensors_that_tma_cannot_read_go_to_the_portable_kernel(caplog):
    case = Case("hopper", "bfloat16", "causal", 300, 300, heads=2, kv_heads=1, head_dim=64)
    inputs, key_range = _inputs(case)
    odd = torch.zeros(2, 300, 2, 65, dtype=torch.bfloat16, device="cuda")[..., 1:]
    odd.copy_(inputs.q)
    hopper_attention._log_undescribed.cache_clear()
    with caplog.at_level("INFO"):
        got = get_kernel("hopper").forward(odd, inputs.k, inputs.v, key_range, scale=0.125)
    assert "the TMA engine cannot read them" in caplog.text
    assert torch.equal(got.out, get_kernel("triton").forward(odd, inputs.k, inputs.v, key_range, scale=0.125).out)
