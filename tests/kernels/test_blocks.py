"""Every kernel against dense float64 attention, over everything that a block may be; and that the check finds mistakes."""

from __future__ import annotations

import os
from dataclasses import replace

import block_cases
import broken_twins
import pytest
import test_hopper_forward
import torch
from block_cases import VISIBLE, Case

from longctx.errors import ShapeError
from longctx.kernels import block_kind, get_kernel, kernel_names
from longctx.masks import UNBOUNDED, KeyRange

HEAD_DIMS = (16, 64, 80, 96, 128, 160, 192, 256)


def by_id(cases: list[Case]):
    return pytest.mark.parametrize("case", cases, ids=[case.id for case in cases])


def interpreted_cases() -> list[Case]:
    cases = []
    # Tiles of 32 x 16 and 16 x 32: 45 rows and keys cross two and three, with a ragged end.
    for visible in VISIBLE:
        for dtype in ("float32", "float16"):
            batch = 2 if visible == "rows_per_sequence" else 1
            cases.append(
                Case("triton", dtype, visible, 45, 45, batch=batch, head_dim=16, descriptor=dtype == "float16")
            )
    cases += [Case("triton", "bfloat16", v, 45, 45, batch=1, head_dim=16) for v in ("causal", "rows")]
    cases += [Case("triton", "float16", "causal", 19, 19, batch=1, heads=1, head_dim=d) for d in HEAD_DIMS]
    cases += [
        Case("triton", "float32", "causal", 20, 20, batch=1, heads=h, kv_heads=hk) for h, hk in ((4, 2), (3, 1), (2, 2))
    ]
    lengths = ((1, 1), (1, 40), (40, 1), (17, 50), (50, 17), (32, 32), (64, 32))
    for visible in ("full", "causal"):
        cases += [Case("triton", "float32", visible, sq, sk, batch=1, head_dim=16) for sq, sk in lengths]
    cases += [
        Case("triton", dtype, visible, 45, 45, head_dim=16, batch=1 + (visible == "rows_per_sequence"), blocks=3)
        for visible in ("causal", "rows_per_sequence", "both_sides")
        for dtype in ("float32", "float16")
    ]
    for dtype in ("float32", "float16"):
        cases.append(Case("triton", dtype, "full", 40, 40, batch=1, head_dim=16, amplitude=200.0))
        cases.append(Case("triton", dtype, "causal", 40, 40, batch=2, head_dim=24, strided=True))
    # Aligned slices, which a descriptor can read; and a head dim that it cannot.
    cases.append(Case("triton", "float16", "window", 40, 40, head_dim=24, batch=2, strided=True, descriptor=True))
    cases.append(Case("triton", "float16", "window", 40, 40, head_dim=20, batch=1, descriptor=True))
    # A cap of 2 bends ordinary scores; one of 50 leaves them almost, but not scores of some hundred.
    cases += [
        Case("triton", dtype, v, 45, 45, batch=1 + (v == "rows_per_sequence"), head_dim=16, softcap=2.0)
        for v in VISIBLE
        for dtype in ("float32", "float16")
    ]
    cases += [Case("triton", "float32", "causal", 45, 45, head_dim=16, blocks=3, softcap=c) for c in (0.5, 2.0, 50.0)]
    for dtype in ("float32", "float16"):
        cases.append(Case("triton", dtype, "full", 40, 40, batch=1, head_dim=16, amplitude=200.0, softcap=50.0))
        cases.append(Case("triton", dtype, "causal", 20, 31, batch=1, heads=4, kv_heads=2, softcap=50.0))
    return cases


@by_id(interpreted_cases())
def test_triton_in_the_interpreter(case, interpreter):
    interpreter(block_cases.check, case)


@pytest.mark.parametrize("visible", VISIBLE)
@pytest.mark.parametrize("kernel", ["reference", "triton"])
def test_last_and_only_blocks(kernel, visible, interpreter):
    if kernel == "triton":
        interpreter(block_cases.check_last_and_only, Case(kernel, "float16", visible, 40, 52, head_dim=16), "cpu")
    else:
        block_cases.check_last_and_only(Case(kernel, "float16", visible, 40, 52, head_dim=16), "cpu")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_row_kernels_in_the_interpreter(dtype, interpreter):
    interpreter(block_cases.check_row_kernels, dtype)


def test_the_backward_is_deterministic(interpreter):
    interpreter(block_cases.check_same_bits, Case("triton", "float16", "rows", 40, 40, batch=1, head_dim=16))


def test_a_negative_scale_is_refused(interpreter):
    message = interpreter(block_cases.check_refusals)
    assert "scale is -1.0" in message
    assert "negate q" in message


def reference_cases() -> list[Case]:
    cases = [Case("reference", dtype, v, 45, 45) for v in VISIBLE for dtype in ("float32", "float64")]
    cases += [
        replace(case, blocks=3) for case in cases if case.visible in ("causal", "rows_per_sequence", "both_sides")
    ]
    # More rows than one step takes, with a ragged end.
    cases += [Case("reference", "float32", v, 600, 530, batch=1) for v in ("causal", "rows", "rectangle")]
    cases += [Case("reference", dtype, "causal", 45, 45) for dtype in ("float16", "bfloat16")]
    cases += [Case("reference", "float32", "full", sq, sk) for sq, sk in ((1, 1), (1, 30), (30, 1))]
    cases += [Case("reference", "float32", "causal", 40, 40, heads=h, kv_heads=hk) for h, hk in ((4, 2), (3, 3))]
    cases += [Case("reference", "float32", "full", 45, 45, amplitude=200.0)]
    cases += [Case("reference", "float32", "window", 45, 45, strided=True)]
    cases += [Case("reference", dtype, v, 45, 45, softcap=2.0) for v in VISIBLE for dtype in ("float32", "float64")]
    cases += [Case("reference", "float64", "causal", 45, 45, blocks=3, amplitude=200.0, softcap=50.0)]
    return cases


@by_id(reference_cases())
def test_reference(case):
    block_cases.check(case)


@by_id([Case("reference", dtype, "causal", 45, 45, softcap=2.0) for dtype in ("float32", "float16")])
def test_the_check_finds_a_missing_slope(case):
    with pytest.raises(AssertionError, match="dq: max error"):
        block_cases.check(case, kernel=broken_twins.ForgetsTheSlope())


TWINS = [
    (broken_twins.ForgetsToRescale, "causal", 3, "out: max error"),
    (broken_twins.StartsAnew, "causal", 3, "out: max error"),
    (broken_twins.UsesTheBlocksLse, "causal", 3, "dq: max error"),
    (broken_twins.Overwrites, "full", 1, "dq: max error"),
    (broken_twins.LeavesUnseenRows, "rows", 1, "out: .* are not finite"),
    (broken_twins.SeesOneKeyMore, "causal", 1, "out: max error"),
    (broken_twins.ForgetsTheGroup, "causal", 1, "dk: max error"),
]


@pytest.mark.parametrize(("twin", "visible", "blocks", "message"), TWINS, ids=[t[0].__name__ for t in TWINS])
def test_the_check_finds_a_broken_twin(twin, visible, blocks, message):
    for dtype in ("float32", "float16"):
        case = Case("reference", dtype, visible, 45, 45, blocks=blocks)
        block_cases.check(case)
        with pytest.raises(AssertionError, match=message):
            block_cases.check(case, kernel=twin())


def test_merging_on_a_cpu():
    block_cases.check_row_kernels("float32")


class TestKinds:
    def test_causal_is_told_apart_from_other_bands(self):
        assert block_kind(KeyRange.causal()) == "causal"
        for lo, hi in ((-UNBOUNDED, 2), (-3, 1), (-UNBOUNDED, UNBOUNDED)):
            assert block_kind(KeyRange("band", lo, hi)) == "band"

    @pytest.mark.parametrize("kind", ["empty", "full"])
    def test_plain_kinds_stay(self, kind):
        assert block_kind(KeyRange(kind)) == kind

    def intervals(self, *rows: tuple[int, int]) -> KeyRange:
        lo, hi = torch.tensor(rows, dtype=torch.int32).T
        return KeyRange("rows", lo[None].contiguous(), hi[None].contiguous())

    def test_a_rectangle_is_found(self):
        assert self.intervals((0, 0), (2, 5), (2, 5), (5, 5)).rectangle == (1, 3, 2, 5)
        assert block_kind(self.intervals((2, 5), (2, 5))) == "rectangle"

    def test_other_intervals_are_none(self):
        for rows in (((0, 1), (0, 2)), ((0, 2), (1, 2)), ((0, 2), (2, 2), (2, 4)), ((1, 1), (1, 1))):
            assert self.intervals(*rows).rectangle is None
            assert block_kind(self.intervals(*rows)) == "rows"

    def test_sequences_that_differ_are_none(self):
        lo, hi = torch.zeros(2, 3, dtype=torch.int32), torch.tensor([[0, 4, 4], [4, 4, 4]], dtype=torch.int32)
        assert KeyRange("rows", lo, hi).rectangle is None


class TestCudnnParts:
    """cuDNN's pieces of a block, which are plain arithmetic."""

    @pytest.mark.parametrize(("sq", "sk"), [(6, 6), (4, 7), (7, 4), (1, 5), (5, 1)])
    @pytest.mark.parametrize("visible", ["empty", "full", "causal", "rectangle"])
    def test_they_cover_what_is_visible_once(self, visible, sq, sk):
        key_range = VISIBLE[visible](1, sq, sk)
        lo, hi = key_range.bounds(sq, sk)
        want = (torch.arange(sk) >= lo[0, :, None]) & (torch.arange(sk) < hi[0, :, None])
        got = torch.zeros(sq, sk, dtype=torch.int64)
        for rows, keys, inside in get_kernel("cudnn").pieces(key_range, sq, sk):
            piece = got[rows, keys]
            is_causal = block_kind(inside) == "causal"
            assert is_causal or inside.kind == "full"
            assert not is_causal or piece.shape[0] == piece.shape[1]
            piece += torch.ones_like(piece).tril() if is_causal else 1
        assert torch.equal(got, want.long())

    def test_intervals_of_another_length_are_refused(self):
        with pytest.raises(ShapeError, match="KeyRange has 6 rows, but q has 4"):
            list(get_kernel("cudnn").pieces(VISIBLE["rectangle"](1, 6, 6), 4, 6))

    def test_elsewhere_it_is_refused(self):
        reason = get_kernel("cudnn").supports(device=torch.device("cpu"), dtype=torch.float16, head_dim=64, kind="full")
        assert reason == "needs an NVIDIA GPU"


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is on")
def test_triton_on_a_cpu_says_how_to_switch_the_interpreter_on():
    reason = get_kernel("triton").supports(device=torch.device("cpu"), dtype=torch.float32, head_dim=64, kind="full")
    assert "TRITON_INTERPRET=1" in reason


@pytest.mark.parametrize(("dtype", "head_dim", "want"), [("float64", 64, "float64"), ("float32", 257, "257")])
def test_triton_names_what_it_cannot_do(dtype, head_dim, want, interpreter):
    assert want in interpreter(_supports, torch.device("cpu"), dtype, head_dim)


def _supports(device: torch.device, dtype: str, head_dim: int) -> str | None:
    return get_kernel("triton").supports(device=device, dtype=getattr(torch, dtype), head_dim=head_dim, kind="full")


def gpu_cases() -> list[Case]:
    cases = []
    for dtype in ("bfloat16", "float16", "float32"):
        for visible in VISIBLE:
            cases.append(Case("triton", dtype, visible, 515, 515, heads=4, kv_heads=2, head_dim=128, descriptor=True))
    cases += [Case("triton", "bfloat16", v, 515, 515, heads=4, kv_heads=2, head_dim=128) for v in VISIBLE]
    for dim in (*HEAD_DIMS, 20):
        cases += [Case("triton", "bfloat16", "causal", 300, 300, head_dim=dim, descriptor=x) for x in (True, False)]
        cases.append(Case("triton", "float32", "causal", 150, 150, head_dim=dim))
    for visible in ("causal", "rows_per_sequence", "both_sides"):
        cases += [
            Case("triton", d, visible, 700, 700, head_dim=64, blocks=3, descriptor=True)
            for d in ("bfloat16", "float32")
        ]
    for sq, sk in ((1, 1), (1, 300), (300, 1), (200, 390), (390, 200), (512, 512)):
        for kernel in ("triton", "cudnn"):
            cases += [
                Case(kernel, "bfloat16", v, sq, sk, head_dim=128, descriptor=kernel == "triton")
                for v in ("full", "causal")
            ]
    for kernel in ("triton", "cudnn"):
        on = kernel == "triton"
        cases.append(Case(kernel, "bfloat16", "causal", 300, 300, head_dim=64, strided=True, descriptor=on))
        cases.append(Case(kernel, "bfloat16", "full", 300, 300, head_dim=64, amplitude=200.0, descriptor=on))
        cases.append(Case(kernel, "bfloat16", "causal", 300, 300, heads=8, kv_heads=1, head_dim=64, descriptor=on))
    for dtype in ("bfloat16", "float16"):
        for dim in (64, 80, 128, 256):
            cases += [Case("cudnn", dtype, v, 515, 515, head_dim=dim) for v in ("full", "causal", "rectangle")]
    cases.append(Case("cudnn", "bfloat16", "full", 515, 515, head_dim=128, blocks=3))
    for dtype, dim in (("bfloat16", 256), ("float16", 128), ("float32", 64)):
        capped = Case(
            "triton", dtype, "full", 515, 515, heads=4, kv_heads=2, head_dim=dim, descriptor=True, softcap=2.0
        )
        cases += [replace(capped, visible=visible) for visible in VISIBLE]
        cases += [replace(capped, visible="causal", amplitude=200.0, softcap=50.0), replace(capped, blocks=3)]
    cases.append(Case("cudnn", "bfloat16", "empty", 515, 515, head_dim=128))
    return list(dict.fromkeys(cases))


@pytest.mark.gpu
@by_id(gpu_cases())
def test_on_a_gpu(case):
    kernel = get_kernel(case.kernel)
    kind = block_kind(VISIBLE[case.visible](case.batch, case.sq, case.sk))
    dtype = getattr(torch, case.dtype)
    reason = kernel.supports(device=torch.device("cuda"), dtype=dtype, head_dim=case.head_dim, kind=kind)
    if reason is not None and case.kernel == "cudnn":
        pytest.skip(reason)
    block_cases.check(case, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("visible", block_cases.VISIBLE)
@pytest.mark.parametrize("kernel", ["cudnn", "triton"])
def test_last_and_only_blocks_on_a_gpu(kernel, visible):
    case = Case(kernel, "bfloat16", visible, 333, 515, head_dim=128)
    kind = block_kind(VISIBLE[visible](case.batch, case.sq, case.sk))
    reason = get_kernel(kernel).supports(
        device=torch.device("cuda"), dtype=torch.bfloat16, head_dim=128, kind=kind, direction="backward"
    )
    if reason is not None:
        pytest.skip(reason)
    block_cases.check_last_and_only(case, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_row_kernels_on_a_gpu(dtype):
    block_cases.check_row_kernels(dtype, "cuda")


@pytest.mark.gpu
def test_the_backward_is_deterministic_on_a_gpu():
    case = Case("triton", "bfloat16", "causal", 2048, 2048, heads=8, kv_heads=2, head_dim=128, descriptor=True)
    block_cases.check_same_bits(case, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("descriptor", [False, True], ids=["pointers", "descriptor"])
def test_rows_beyond_2_to_the_31_elements(descriptor):
    """A row stride of 2**23 puts row 300 of q past 2**31 elements."""
    case = Case(
        "triton", "bfloat16", "causal", 300, 300, heads=2, kv_heads=2, batch=1, head_dim=64, descriptor=descriptor
    )
    inputs = block_cases.make_inputs(case, "cuda")
    wide = torch.zeros(300 << 23, dtype=torch.bfloat16, device="cuda").as_strided(inputs.q.shape, (0, 1 << 23, 64, 1))
    wide.copy_(inputs.q)
    far = replace_q(inputs, wide)
    kernel, visible = block_cases.kernel_of(case), KeyRange.causal()
    near, got = (block_cases.run(case, kernel, x, visible, 0.125) for x in (inputs, far))
    for name in near:
        assert torch.equal(near[name], got[name]), name


def replace_q(inputs: block_cases.Inputs, q: torch.Tensor) -> block_cases.Inputs:
    return block_cases.Inputs(q, inputs.k, inputs.v, inputs.dout)


def test_every_registered_kernel_has_cases():
    cases = interpreted_cases() + reference_cases() + gpu_cases() + test_hopper_forward.gpu_cases()
    tested = {case.kernel for case in cases}
    # flash4 needs a package that is not among the tested ones: test_flash4 holds it to a stand-in.
    assert tested | {"flash4"} == set(kernel_names())
