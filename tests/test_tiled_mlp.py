"""The SwiGLU in pieces: what the whole gives, with temporaries of a piece, no product more than needed, and one gradient a weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from engine_cases import make_engine, make_mesh
from model_cases import DOCUMENTS, SIZES, CountOps, error, gradients, make_batch
from torch.utils._python_dispatch import TorchDispatchMode
from train_cases import full_step

from longctx.errors import ConfigError
from longctx.masks import Causal
from longctx.model import ModelConfig, Transformer
from longctx.parity import shard_step
from longctx.testing import run_distributed
from longctx.tiled_mlp import tiled_swiglu

CONFIG = ModelConfig(**SIZES, qk_norm=True)
BATCH = make_batch(DOCUMENTS & Causal())
TOKENS = BATCH.tokens.numel()
PRODUCTS = tuple(getattr(torch.ops.aten, name) for name in ("mm", "addmm", "addmm_"))
PRODUCTS = tuple(getattr(op, overload) for op in PRODUCTS for overload in op.overloads())


def draw(dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = ((2, 13, 16), (24, 16), (24, 16), (16, 24))
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(device, dtype).requires_grad_() for shape in shapes]


def whole(x, gate, up, down):
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def out_and_gradients(compute, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    out = compute(*inputs)
    # An expanded gradient, as of a mean.
    found = torch.autograd.grad(
        (out * torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype, device=out.device)).sum(), inputs
    )
    return [out.detach(), *found]


@pytest.mark.parametrize("chunk_tokens", [1, 5, 13, 26, 1000])
def test_is_the_whole(chunk_tokens):
    inputs = draw(torch.float64)
    got = out_and_gradients(lambda *tensors: tiled_swiglu(*tensors, chunk_tokens=chunk_tokens), inputs)
    for ours, theirs in zip(got, out_and_gradients(whole, inputs), strict=True):
        assert ours.shape == theirs.shape
        assert error(ours, theirs) < 1e-12


def test_bf16_is_no_worse_than_the_whole():
    """Weights' gradients are summed in fp32 over the pieces, and rounded once."""
    exact = out_and_gradients(whole, [x.detach().double().requires_grad_() for x in draw(torch.bfloat16)])
    theirs = out_and_gradients(whole, draw(torch.bfloat16))
    ours = out_and_gradients(lambda *tensors: tiled_swiglu(*tensors, chunk_tokens=1), draw(torch.bfloat16))
    for got, plain, value in zip(ours, theirs, exact, strict=True):
        assert got.dtype == torch.bfloat16
        assert error(got, value) <= 1.5 * error(plain, value) + 2**-9


def test_frozen_weights_no_gradients_and_no_tokens():
    x, gate, up, down = draw(torch.float64)
    gate.requires_grad_(False)
    tiled_swiglu(x, gate, up, down, chunk_tokens=3).sum().backward()
    assert gate.grad is None
    assert up.grad is not None
    with torch.no_grad():
        out = tiled_swiglu(x, gate, up, down, chunk_tokens=3)
    torch.testing.assert_close(out, whole(x, gate, up, down).detach())
    up.grad = None
    tiled_swiglu(x[:, :0], gate, up, down, chunk_tokens=3).sum().backward()
    assert up.grad.abs().sum() == 0
    with pytest.raises(ConfigError, match="chunk_tokens = 0 must be at least 1"):
        tiled_swiglu(x, gate, up, down, chunk_tokens=0)


# ---- in the model


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("offload", [False, True], ids=["device", "host"])
def test_the_model_is_the_same(recompute, offload):
    settings = {"activation_checkpointing": recompute, "activation_offload": recompute and offload}
    expected = gradients(Transformer(CONFIG).double(), BATCH)
    got = gradients(Transformer(CONFIG, mlp_chunk_tokens=7, **settings).double(), BATCH)
    assert list(got) == list(expected), "parameters have the names they had"
    for name, value in expected.items():
        assert error(got[name], value) < 1e-12, name


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
def test_no_product_is_made_twice_without_need(recompute):
    """Of the 7 projections of a layer gate and up are made again in backward, and with recomputation q, k, v and o, which is what
    it makes of the whole too: the layer's recomputation ends where the SwiGLU begins."""
    with CountOps(*PRODUCTS) as without:
        gradients(Transformer(CONFIG), BATCH)
    model = Transformer(CONFIG, mlp_chunk_tokens=TOKENS, activation_checkpointing=recompute)
    with CountOps(*PRODUCTS) as once:
        gradients(model, BATCH)
    again = 6 if recompute else 2
    assert once.calls - without.calls == again * CONFIG.num_layers
    pieces = 4
    model = Transformer(CONFIG, mlp_chunk_tokens=TOKENS // pieces, activation_checkpointing=recompute)
    with CountOps(*PRODUCTS) as tiled:
        gradients(model, BATCH)
    # Of a piece 3 forward, 2 again and 6 backward.
    assert tiled.calls - once.calls == (pieces - 1) * 11 * CONFIG.num_layers


class Widest(TorchDispatchMode):
    """The most tokens of a tensor as wide as the SwiGLU."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.shape[-1:] == (SIZES["intermediate_size"],):
            # A gradient of down_proj is of that width too.
            self.rows = max(self.rows, out.numel() // out.shape[-1] if out.shape[0] != SIZES["hidden_size"] else 0)
        return out


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
def test_what_is_wide_is_of_one_piece(recompute):
    found = []
    for chunk_tokens in (None, 7):
        with Widest() as widest:
            gradients(Transformer(CONFIG, mlp_chunk_tokens=chunk_tokens, activation_checkpointing=recompute), BATCH)
        found.append(widest.rows)
    assert found == [TOKENS, 7]


def gathers_and_hooks(rank: int) -> dict[str, object]:
    """Under ZeRO-3, in whole and in pieces: how often a layer's weights of the SwiGLU are gathered in a step, what is left of
    them after it, and the gradients."""
    from unittest import mock

    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    name = "_PartitionedParameterCoordinator__all_gather_params"
    gather = getattr(PartitionedParameterCoordinator, name)
    mesh = make_mesh(dp=2)
    found: dict[str, object] = {}
    for recompute in (False, True):
        for chunk_tokens in (None, 7):
            settings = {"zero_stage": 3, "activation_checkpointing": recompute, "activation_offload": recompute}
            engine = make_engine(mesh, mlp_chunk_tokens=chunk_tokens, **settings)
            weights = {id(p): n for n, p in engine.ds.module.named_parameters() if "mlp" in n}
            count: dict[str, int] = dict.fromkeys(weights.values(), 0)

            def gathering(self, params, forward, weights=weights, count=count):
                for p in params:
                    if id(p) in weights:
                        count[weights[id(p)]] += 1
                return gather(self, params, forward)

            step = shard_step(full_step(0, dp=2, accumulation=1), mesh)
            engine.accumulate(0, step)
            with mock.patch.object(PartitionedParameterCoordinator, name, gathering):
                engine.accumulate(0, step)
            left = [n for n, p in engine.ds.module.named_parameters() if "mlp" in n and p.numel()]
            found[f"{recompute}-{chunk_tokens}"] = (count, left, engine.gradients())
    return found


def test_zero3_gathers_weights_once_for_all_pieces():
    found = run_distributed(gathers_and_hooks, world=2, env={"DS_ACCELERATOR": "cpu"}, timeout_s=120)
    for of_rank in found:
        for recompute in (False, True):
            count, left, got = of_rank[f"{recompute}-7"]
            most, _, expected = of_rank[f"{recompute}-None"]
            assert count
            assert left == []
            assert all(0 < count[name] <= most[name] for name in count), (count, most)
            for name, value in expected.items():
                assert error(got[name], value) < 1e-5, name


@pytest.mark.gpu
@pytest.mark.parametrize("fused", ["off", "auto"])
def test_cuda_takes_less_and_is_as_good(fused):
    """In bf16 relative to float64, as the whole; the temporaries of a piece instead of all."""
    tokens, e, f = 16384, 1024, 4096
    g = torch.Generator("cuda").manual_seed(0)
    shapes = ((1, tokens, e), (f, e), (f, e), (e, f))
    exact = [torch.randn(shape, generator=g, device="cuda", dtype=torch.float64) / shape[-1] ** 0.5 for shape in shapes]
    wanted = out_and_gradients(whole, [x.bfloat16().double().requires_grad_() for x in exact])
    errors, peaks = [], []
    for chunk_tokens in (tokens, tokens // 8):
        inputs = [x.bfloat16().requires_grad_() for x in exact]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        got = out_and_gradients(lambda *x, n=chunk_tokens: tiled_swiglu(*x, chunk_tokens=n, fused=fused), inputs)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        errors.append([error(ours, value) for ours, value in zip(got, wanted, strict=True)])
    assert all(b <= 1.5 * a + 2**-9 for a, b in zip(*errors, strict=True))
    # At least gate, up, their product and its gradient of seven of the eight pieces.
    assert peaks[0] - peaks[1] > 0.9 * 4 * 2 * f * tokens * 7 / 8
