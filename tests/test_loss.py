"""Linear cross-entropy in chunks against torch's on all logits: value, gradients, memory, odd inputs."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from longctx.errors import ConfigError, DataError, LongCtxError, ShapeError
from longctx.kernels.fused import check_fused, use_liger
from longctx.parallel import loss as loss_module
from longctx.parallel.loss import LMHead, check_token_ids, linear_cross_entropy
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.plan import ParallelPlan
from longctx.parallel.tensor import TensorParallel
from longctx.testing import run_distributed

LABELS = {
    "all": lambda n, v, g: torch.randint(0, v, (n,), generator=g),
    "ragged": lambda n, v, g: torch.where(
        torch.rand(n, generator=g) < 0.4, -100, torch.randint(0, v, (n,), generator=g)
    ),
    "one": lambda n, v, g: torch.full((n,), -100).index_fill_(0, torch.tensor([n // 2]), v - 1),
    "none": lambda n, v, g: torch.full((n,), -100),
}


def inputs(n, e, v, labels, seed=0, std=1.0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, e, generator=g, dtype=torch.float64) * std
    weight = torch.randn(v, e, generator=g, dtype=torch.float64)
    return hidden, weight, LABELS[labels](n, v, g)


def dense(hidden, weight, labels, reduction="sum"):
    logits = F.linear(hidden, weight)
    logits = logits.float() if logits.dtype != torch.float64 else logits
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction=reduction)


def noise_of_sum(hidden, weight, labels, *, dtype, device):
    """The size of the error that the sum of plain torch's token losses has: one draw of it may be near 0 by luck."""
    h, w = (x.to(device, dtype) for x in (hidden, weight))
    tokens = dense(h, w, labels.to(device), reduction="none").cpu().double()
    return (tokens - dense(hidden, weight, labels, reduction="none")).norm()


def run(fn, hidden, weight, labels, *, dtype, device="cpu", upstream=0.37):
    """Loss and gradients, in float64 on the CPU."""
    h, w = (x.detach().to(device, dtype).requires_grad_() for x in (hidden, weight))
    value = fn(h, w, labels.to(device))
    (value * upstream).backward()
    return {"loss": value, "dhidden": h.grad, "dweight": w.grad}, value.dtype


def assert_as_good_as_torch(ours, torchs, exact, dtype, noise=0.0):
    """err <= 2 * err of plain torch in the same dtype + some units in the last place, as max and as RMS.

    The loss is one number, a sum of errors of either sign; it may be off by 3 times their size, `noise_of_sum`.
    """
    for name in exact:
        ulp = torch.finfo(torch.float32 if name == "loss" else dtype).eps * 4
        for norm in (lambda x: x.abs().max(), lambda x: x.square().mean().sqrt()):
            mine, theirs = (norm(x[name].detach().cpu().double() - exact[name].detach()) for x in (ours, torchs))
            luck = 3 * noise if name == "loss" else 0.0
            assert mine <= max(2 * theirs, luck) + ulp * norm(exact[name].detach()), (
                f"{name}: {mine:.3g} against {theirs:.3g}"
            )


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("chunk", [1, 7, 16, 33, 100], ids=lambda c: f"chunk{c}")
def test_exact_in_float64(chunk, labels):
    """With an upstream gradient that is not 1: a loss that forgets it passes every other test."""
    data = inputs(33, 12, 50, labels)
    expected, _ = run(dense, *data, dtype=torch.float64)
    got, dtype = run(lambda *x: linear_cross_entropy(*x, chunk_tokens=chunk), *data, dtype=torch.float64)
    assert dtype == torch.float64
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("std", [1.0, 30.0], ids=["usual", "huge-logits"])
@pytest.mark.parametrize("labels", ["all", "ragged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_as_good_as_torch_in_half_and_single(dtype, labels, std):
    data = inputs(200, 64, 333, labels, std=std)
    data = (data[0].to(dtype).double(), data[1].to(dtype).double(), data[2])
    exact, _ = run(dense, *data, dtype=torch.float64)
    plain, _ = run(dense, *data, dtype=dtype)
    ours, loss_dtype = run(lambda *x: linear_cross_entropy(*x, chunk_tokens=48), *data, dtype=dtype)
    assert loss_dtype == torch.float32
    assert_as_good_as_torch(ours, plain, exact, dtype)


def test_weight_gradient_is_summed_in_fp32():
    """4096 tokens push one way: summed in bf16, one by one, the gradient stops growing at 256 times the addend."""
    hidden, weight = torch.ones(4096, 1), torch.zeros(2, 1)
    labels = torch.zeros(4096, dtype=torch.int64)
    got, _ = run(lambda *x: linear_cross_entropy(*x, chunk_tokens=1), hidden, weight, labels, dtype=torch.bfloat16)
    # Each token gives (p - 1) * hidden = -0.5 to row 0. The upstream gradient is 0.37.
    assert got["dweight"][0].item() == pytest.approx(-2048 * 0.37, rel=2**-8)


def test_leading_axes_and_views_are_as_good_as_flat():
    hidden, weight, labels = inputs(24, 8, 20, "ragged")
    strided = torch.randn(2, 24, 8, dtype=torch.float64).transpose(0, 1)[:, 0].copy_(hidden)
    flat = linear_cross_entropy(hidden, weight, labels)
    assert torch.equal(linear_cross_entropy(hidden.view(2, 3, 4, 8), weight, labels.view(2, 3, 4)), flat)
    assert torch.equal(linear_cross_entropy(strided, weight.t().contiguous().t(), labels), flat)


@pytest.mark.parametrize("shape", [(0,), (2, 0)], ids=str)
def test_no_tokens(shape):
    hidden = torch.zeros(*shape, 8, requires_grad=True)
    weight = torch.ones(20, 8, requires_grad=True)
    value = linear_cross_entropy(hidden, weight, torch.zeros(shape, dtype=torch.int64))
    value.backward()
    assert value.item() == 0.0
    assert torch.equal(weight.grad, torch.zeros(20, 8))
    assert hidden.grad.shape == hidden.shape


def test_tokens_without_a_target_may_hold_anything():
    """A rank's padding must not put a NaN into the gradient that all ranks share."""
    hidden, weight, labels = inputs(6, 8, 20, "all")
    hidden[3] = float("inf")
    labels[3] = -100
    got, _ = run(linear_cross_entropy, hidden, weight, labels, dtype=torch.float32)
    kept = torch.arange(6) != 3
    expected, _ = run(linear_cross_entropy, hidden[kept], weight, labels[kept], dtype=torch.float32)
    torch.testing.assert_close(got["loss"], expected["loss"])
    assert torch.equal(got["dhidden"][3], torch.zeros(8))


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_only_the_gradients_that_are_wanted(frozen):
    hidden, weight, labels = inputs(10, 8, 20, "all")
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    value = linear_cross_entropy(hidden, weight, labels)
    if frozen == "both":
        assert not value.requires_grad
    else:
        value.backward()
        assert (hidden.grad is None) == (frozen == "hidden")
        assert (weight.grad is None) == (frozen == "weight")


def test_a_second_backward_is_refused():
    hidden, weight, labels = (x.requires_grad_(x.is_floating_point()) for x in inputs(5, 4, 10, "all"))
    value = linear_cross_entropy(hidden, weight, labels)
    value.backward(retain_graph=True)
    with pytest.raises(LongCtxError, match="backward ran twice"):
        value.backward()


class Largest(TorchDispatchMode):
    """The largest result of any operation that is not a view, in elements."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (() if func.is_view else (result,)):
            self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
        return result


@pytest.mark.parametrize("chunk", [16, 64], ids=lambda c: f"chunk{c}")
def test_no_more_than_one_chunk_of_logits_exists(chunk):
    tokens, width, vocab = 64, 4, 100
    hidden, weight, labels = (x.requires_grad_(x.is_floating_point()) for x in inputs(tokens, width, vocab, "ragged"))
    with Largest() as largest:
        linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk).backward()
    assert largest.numel == chunk * vocab


@pytest.mark.parametrize("width", [8, 4096])
@pytest.mark.parametrize("vocab", [256, 128_256])
def test_default_chunk_follows_the_budget_not_the_width(width, vocab):
    hidden = torch.empty(1, width, dtype=torch.bfloat16)
    tokens = loss_module._default_chunk(hidden, vocab, copies=True)
    # bf16 logits and their fp32 copy.
    assert tokens * vocab * 6 <= loss_module.CHUNK_BYTES_ELSEWHERE < (tokens + 128) * vocab * 6


def test_evaluation_computes_no_gradients():
    hidden, weight, labels = (x.requires_grad_(x.is_floating_point()) for x in inputs(64, 4, 100, "all"))
    with torch.no_grad(), Largest() as largest:
        value = linear_cross_entropy(hidden, weight, labels, chunk_tokens=2)
    assert not value.requires_grad
    assert largest.numel == 2 * 100  # and not the 400 of the weight's gradient
    torch.testing.assert_close(value, dense(hidden, weight, labels))


def test_a_label_outside_the_vocabulary_is_named():
    hidden, weight, labels = inputs(6, 4, 10, "all")
    for wrong in (10, -1, -101):
        labels[4] = wrong
        with pytest.raises(DataError, match=rf"label {wrong} at \[4\] is outside the vocabulary of 10"):
            linear_cross_entropy(hidden, weight, labels)
    check_token_ids(torch.tensor([[0, 9]]), 10, what="token")
    with pytest.raises(DataError, match="token -100"):
        check_token_ids(torch.tensor([[0, -100]]), 10, what="token")


BAD = {
    "dtypes": (dict(weight=torch.zeros(10, 4, dtype=torch.bfloat16)), ShapeError, "bfloat16"),
    "widths": (dict(weight=torch.zeros(10, 5)), ShapeError, "disagree"),
    "tokens": (dict(labels=torch.zeros(5, dtype=torch.int64)), ShapeError, "disagree"),
    "int32": (dict(labels=torch.zeros(6, dtype=torch.int32)), ShapeError, "int64"),
    "chunk": (dict(chunk_tokens=0), ConfigError, "chunk_tokens = 0"),
    "impl": (dict(impl="ligre"), ConfigError, "did you mean 'liger'"),
    "liger-on-cpu": (dict(impl="liger"), ConfigError, "liger-kernel"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    change, error, message = BAD[name]
    arguments = {
        "hidden": torch.zeros(6, 4),
        "weight": torch.zeros(10, 4),
        "labels": torch.zeros(6, dtype=torch.int64),
        **change,
    }
    with pytest.raises(error, match=message):
        linear_cross_entropy(**arguments)


def test_the_automatic_choice_is_logged_once(caplog):
    from longctx.kernels.fused import _use_liger

    _use_liger.cache_clear()
    with caplog.at_level(logging.INFO, logger="longctx.kernels.fused"):
        assert not use_liger("auto", torch.zeros(1))
        assert not use_liger("auto", torch.zeros(2))
    assert len(caplog.records) == 1
    assert "plain torch (liger-kernel runs on cuda, these tensors are on cpu)" in caplog.text
    with pytest.raises(ConfigError, match="did you mean 'auto'"):
        check_fused("atuo")


def test_head_is_the_loss_of_its_weight():
    hidden, weight, labels = inputs(12, 8, 20, "ragged")
    head = LMHead(8, 20).double()
    with torch.no_grad():
        head.weight.copy_(weight)
    assert torch.equal(head(hidden.view(2, 6, 8), labels.view(2, 6)), linear_cross_entropy(hidden, weight, labels))
    assert list(head.state_dict()) == ["weight"]


@pytest.mark.gpu
@pytest.mark.parametrize("labels", ["all", "ragged", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["torch", "liger"])
def test_cuda(impl, dtype, labels):
    if impl == "liger":
        pytest.importorskip("liger_kernel")
    data = inputs(3000, 256, 5003, labels, std=0.5)
    data = (data[0].to(dtype).double(), data[1].to(dtype).double(), data[2])
    exact, _ = run(dense, *data, dtype=torch.float64)
    plain, _ = run(dense, *data, dtype=dtype, device="cuda")
    ours, _ = run(lambda *x: linear_cross_entropy(*x, chunk_tokens=1024, impl=impl), *data, dtype=dtype, device="cuda")
    assert_as_good_as_torch(ours, plain, exact, dtype, noise_of_sum(*data, dtype=dtype, device="cuda"))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("impl", ["torch", "liger"])
def test_cuda_never_waits_for_the_device_and_stays_in_its_memory(impl):
    if impl == "liger":
        pytest.importorskip("liger_kernel")
    tokens, width, vocab = 16384, 512, 64_000
    hidden = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, vocab, (tokens,), device="cuda")
    linear_cross_entropy(hidden, weight, labels, impl=impl).backward()  # compiles
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(hidden, weight, labels, impl=impl).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    peak = torch.cuda.max_memory_allocated() - before
    # One chunk, the gradient of hidden, that of weight in fp32 and in bf16, and a megabyte of small things. All logits
    # would be 2.1 GB in bf16.
    assert peak <= loss_module.CHUNK_BYTES["cuda"] + tokens * width * 2 + vocab * width * 6 + (1 << 20)


# ---- a vocabulary shared by several ranks


def shared_vocabulary(rank: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    mesh = ParallelMesh.create(ParallelPlan(tp=2), device="cpu")
    hidden, weight, labels = shared_inputs(dtype)
    hidden, weight = hidden.requires_grad_(), weight.chunk(2)[rank].clone().requires_grad_()
    # Chunks of 3 of 14 tokens: the last is shorter.
    loss = linear_cross_entropy(hidden, weight, labels, chunk_tokens=3, tensor=TensorParallel.of(mesh))
    (2 * loss).backward()
    return {"loss": loss.detach(), "hidden": hidden.grad, "weight": weight.grad}


def shared_inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of several hundred, targets in both halves of the vocabulary and on their edges, some tokens without one."""
    generator = torch.Generator().manual_seed(5)
    hidden = 30 * torch.randn(2, 7, 16, generator=generator, dtype=torch.float64)
    weight = torch.randn(10, 16, generator=generator, dtype=torch.float64)
    labels = torch.tensor([[0, 4, 5, 9, -100, 3, 7], [-100, 5, 4, 9, 0, 1, 8]])
    return hidden.to(dtype), weight.to(dtype), labels


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
def test_a_shared_vocabulary_gives_the_loss_of_the_whole(dtype):
    parts = run_distributed(shared_vocabulary, dtype, world=2)
    hidden, weight, labels = (x.requires_grad_(x.is_floating_point()) for x in shared_inputs(dtype))
    loss = linear_cross_entropy(hidden, weight, labels)
    (2 * loss).backward()
    tolerance = {torch.float64: 1e-13, torch.bfloat16: 2**-7}[dtype]
    got = torch.cat([part["weight"] for part in parts])
    for name, ours, whole in (
        ("loss", parts[0]["loss"], loss.detach()),
        ("hidden", parts[0]["hidden"], hidden.grad),
        ("weight", got, weight.grad),
    ):
        error = (ours.double() - whole.double()).norm() / whole.double().norm()
        assert error < tolerance, f"{name}: {error:.1e}"
    assert torch.equal(parts[0]["loss"], parts[1]["loss"])
    assert torch.equal(parts[0]["hidden"], parts[1]["hidden"])


def test_liger_needs_the_whole_vocabulary():
    hidden, weight, labels = shared_inputs(torch.float32)
    with pytest.raises(ConfigError, match="liger's loss needs the logits of the whole vocabulary"):
        linear_cross_entropy(hidden, weight, labels, impl="liger", tensor=TensorParallel(rank=0, size=2))
