"""The registry of attention kernels: names, the contract, the choice and its reasons, the checks of a block."""

from __future__ import annotations

import inspect
import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longctx import kernels
from longctx.errors import KernelError, ShapeError
from longctx.kernels import (
    BlockAttention,
    SoftmaxState,
    check_block,
    choice,
    get_kernel,
    kernel_names,
    row_delta,
    select_kernel,
    state_dtype,
)
from longctx.masks import KeyRange

CPU = torch.device("cpu")
# What `block_kind` can say.
KINDS = ("empty", "full", "causal", "band", "rectangle", "rows")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("name", kernel_names())
class TestContract:
    def test_the_kernel_knows_its_name(self, name):
        kernel = get_kernel(name)
        assert kernel.name == name
        assert get_kernel(name) is kernel

    @pytest.mark.parametrize("method", ["supports", "forward", "backward"])
    def test_the_signatures_are_the_protocols(self, name, method):
        def parameters(function):
            return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

        want = parameters(getattr(BlockAttention, method))[1:]
        assert parameters(getattr(get_kernel(name), method)) == want

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("kind", KINDS)
    def test_supports_answers_none_or_a_reason(self, name, dtype, kind):
        answer = get_kernel(name).supports(device=CPU, dtype=dtype, head_dim=64, kind=kind)
        assert answer is None or (isinstance(answer, str) and answer)

    def test_integers_are_refused(self, name):
        assert get_kernel(name).supports(device=CPU, dtype=torch.int64, head_dim=64, kind="full")


def test_block_kinds():
    lo, hi = torch.tensor([0, 0, 2, 2]), torch.tensor([0, 0, 5, 5])
    ranges = {
        "empty": KeyRange.empty(),
        "full": KeyRange.full(),
        "causal": KeyRange.causal(),
        "band": KeyRange("band", -2, 1),
        "rectangle": KeyRange.of(lo, hi, 6),
        "rows": KeyRange.of(lo, hi + torch.arange(4) // 3, 6),
    }
    assert {name: kernels.block_kind(key_range) for name, key_range in ranges.items()} == {k: k for k in KINDS}


def test_the_reference_is_last_and_takes_everything():
    assert kernel_names()[-1] == "reference"
    for dtype in DTYPES:
        for kind in KINDS:
            assert get_kernel("reference").supports(device=CPU, dtype=dtype, head_dim=77, kind=kind) is None


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(KernelError, match=r"unknown attention kernel 'tritn': did you mean 'triton'\?"):
        get_kernel("tritn")


class TestSelection:
    Q = torch.zeros(1, 4, 1, 16)

    @pytest.fixture(autouse=True)
    def _fresh(self):
        choice._choose.cache_clear()
        choice._log_once.cache_clear()
        yield
        choice._choose.cache_clear()
        choice._log_once.cache_clear()

    def test_a_named_kernel_is_taken(self):
        assert select_kernel("reference", self.Q, KeyRange.full()).name == "reference"

    def test_a_named_kernel_that_cannot_is_refused_with_its_reason(self):
        reason = get_kernel("cudnn").supports(device=CPU, dtype=torch.float32, head_dim=16, kind="full")
        assert reason
        with pytest.raises(KernelError) as error:
            select_kernel("cudnn", self.Q, KeyRange.full())
        assert "torch.float32 with head dim 16 on cpu" in str(error.value)
        assert f"cudnn: {reason}" in str(error.value)

    def test_a_softcap_is_part_of_the_choice(self, monkeypatch, caplog):
        caplog.set_level(logging.INFO, logger="longctx.kernels")
        # A GPU's cuDNN, as far as the choice can see.
        monkeypatch.setattr(
            type(get_kernel("cudnn")), "supports", lambda self, *, softcap=0.0, **_: "no softcap" if softcap else None
        )
        assert select_kernel("auto", self.Q, KeyRange.full()).name == "cudnn"
        assert select_kernel("auto", self.Q, KeyRange.full(), 30.0).name != "cudnn"
        left_out, chosen = (record.getMessage() for record in caplog.records[-2:])
        assert "full, softcap 30: " in chosen
        assert "cudnn: no softcap" in left_out
        with pytest.raises(KernelError, match="softcap 30\n  cudnn: no softcap"):
            select_kernel("cudnn", self.Q, KeyRange.full(), 30.0)

    def test_cudnn_called_with_a_softcap_refuses(self):
        with pytest.raises(KernelError, match="kernel 'cudnn' has none"):
            get_kernel("cudnn").forward(self.Q, self.Q, self.Q, KeyRange.full(), scale=1.0, softcap=30.0)

    def test_auto_takes_the_first_that_supports_the_block(self):
        for key_range in (KeyRange.full(), KeyRange.causal()):
            kind = kernels.block_kind(key_range)
            able = [
                name
                for name in kernel_names()
                if get_kernel(name).supports(device=CPU, dtype=torch.float32, head_dim=16, kind=kind) is None
            ]
            assert select_kernel("auto", self.Q, key_range).name == able[0]

    def test_choices_and_their_reasons_are_logged_once(self, caplog):
        caplog.set_level(logging.INFO, logger="longctx.kernels")
        for _ in range(3):
            chosen = select_kernel("auto", self.Q.double(), KeyRange.full())
        left_out, message = (record.getMessage() for record in caplog.records)
        assert message.endswith(f": {chosen.name}")
        for name in kernel_names()[: kernel_names().index(chosen.name)]:
            assert f"{name}: " in left_out
        # Another kind of block, for the same reasons.
        select_kernel("auto", self.Q.double(), KeyRange.causal())
        assert "causal" in caplog.records[-1].getMessage()
        assert len(caplog.records) == 3

    def test_when_none_can_every_reason_is_given(self):
        with pytest.raises(KernelError) as error:
            select_kernel("auto", self.Q.long(), KeyRange.full())
        for name in kernel_names():
            assert f"\n  {name}: " in str(error.value)


class TestCheckBlock:
    def block(self, **changes):
        tensors = {
            "q": torch.zeros(2, 5, 4, 8),
            "k": torch.zeros(2, 7, 2, 8),
            "v": torch.zeros(2, 7, 2, 8),
        }
        return check_block(**(tensors | changes))

    def test_the_axes_of_a_good_block(self):
        assert self.block() == {"b": 2, "sq": 5, "h": 4, "d": 8, "sk": 7, "hk": 2}
        assert self.block(dout=torch.zeros(2, 5, 4, 8))["sq"] == 5

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"v": torch.zeros(2, 6, 2, 8)}, "axis 'sk' is 7 in k but 6 in v"),
            ({"q": torch.zeros(2, 5, 4)}, "q has shape"),
            ({"dout": torch.zeros(2, 5, 4, 9)}, "axis 'd' is 8 in q but 9 in dout"),
            ({"q": torch.zeros(2, 5, 3, 8)}, "q has 3 heads, not a multiple of the 2 of k and v"),
            ({"k": torch.zeros(2, 7, 2, 8).half()}, "dtypes differ: q torch.float32, k torch.float16"),
            ({"v": torch.zeros(2, 7, 2, 8, device="meta")}, "devices differ: q cpu, k cpu, v meta"),
            ({"k": torch.zeros(2, 7, 8, 2).transpose(2, 3)}, "k has stride 2 along the head dim"),
        ],
        ids=["length", "axes", "dout", "heads", "dtype", "device", "stride"],
    )
    def test_bad_blocks_are_refused(self, changes, message):
        with pytest.raises(ShapeError) as error:
            self.block(**changes)
        assert message in str(error.value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_empty_state_has_seen_nothing(dtype):
    state = SoftmaxState.empty_like(torch.ones(2, 5, 3, 4, dtype=dtype))
    assert state.out.shape == (2, 5, 3, 4)
    assert state.lse.shape == (2, 3, 5)
    assert state.out.dtype == state.lse.dtype == state_dtype(dtype)
    assert state.out.is_contiguous()
    assert state.lse.is_contiguous()
    assert not state.out.any()
    assert bool((state.lse == float("-inf")).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(seed=st.integers(0, 2**32 - 1), length=st.integers(1, 9))
def test_row_delta_sums_in_the_states_precision(dtype, seed, length):
    make = torch.Generator().manual_seed(seed)
    out, dout = (torch.randn(2, length, 3, 64, generator=make, dtype=torch.float64).to(dtype) for _ in range(2))
    delta = row_delta(out, dout)
    assert delta.dtype == state_dtype(dtype)
    assert delta.shape == (2, 3, length)
    assert delta.is_contiguous()
    products = out.double() * dout.double()
    want = products.sum(-1).transpose(1, 2)
    # A sum of n terms in floating point is off by at most n eps times the sum of magnitudes.
    bound = 64 * torch.finfo(delta.dtype).eps * products.abs().sum(-1).transpose(1, 2)
    assert bool(((delta.double() - want).abs() <= bound).all())
