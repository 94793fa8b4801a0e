"""Attention on one device, and the module that models call: results, gradients, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from longctx.attention import ParallelAttention
from longctx.errors import KernelError, ShapeError
from longctx.functional import attention, ring_attention
from longctx.masks import Causal, Documents, Full, SlidingWindow
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.plan import ParallelPlan
from longctx.sequence import SequenceMeta

ALONE = ParallelPlan()


def qkv(b=2, s=32, h=4, hk=2, d=8, dtype=torch.float64, device="cpu", **kwargs):
    generator = torch.Generator().manual_seed(s)
    return [
        torch.randn(b, s, n, d, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
        for n in (h, hk, hk)
    ]


def sdpa(q, k, v, mask=None, scale=None):
    """torch's own attention, on "b s h d"."""
    visible = None if mask is None else mask.materialize(q.shape[1]).to(q.device)
    if visible is not None and visible.ndim == 3:
        visible = visible[:, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)


MASKS = {
    "full": Full(),
    "causal": Causal(),
    "window": SlidingWindow(5) & Causal(),
    "docs": Documents((0, 3, 32)) & Causal(),
    "own_docs": Documents(((0, 3, 32), (0, 32))),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("scale", [None, 0.7])
def test_attention_is_torchs(mask, scale):
    tensors = qkv()
    ours, theirs = attention(*tensors, mask=mask, scale=scale), sdpa(*tensors, mask, scale)
    assert (ours - theirs).abs().max() < 1e-12
    dout = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for a, b in zip(torch.autograd.grad(ours, tensors, dout), torch.autograd.grad(theirs, tensors, dout), strict=True):
        assert (a - b).abs().max() < 1e-12


def test_causal_is_the_default():
    tensors = qkv()
    assert torch.equal(attention(*tensors), attention(*tensors, mask=Causal()))


def test_two_calls_over_different_keys_merge_by_lse():
    """A union of masks: a window and the first keys, each seen once. Gradients flow through both lse."""
    q, k, v = qkv(hk=4)
    window = SlidingWindow(6) & Causal()
    near = attention(q, k, v, mask=window, return_lse=True)
    far_visible = Causal().materialize(32) & ~window.materialize(32)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / 8**0.5
    far_scores = scores.masked_fill(~far_visible, -1e30)
    far = torch.einsum("bhij,bjhd->bihd", far_scores.softmax(-1), v), far_scores.logsumexp(-1)
    whole = torch.logaddexp(near[1], far[1])
    merged = sum(out * (lse - whole).exp().transpose(1, 2)[..., None] for out, lse in (near, far))
    expected = attention(q, k, v)
    assert (merged - expected).abs().max() < 1e-12
    dout = torch.linspace(-1, 1, merged.numel(), dtype=torch.float64).view_as(merged)
    for a, b in zip(
        torch.autograd.grad(merged, (q, k, v), dout), torch.autograd.grad(expected, (q, k, v), dout), strict=True
    ):
        assert (a - b).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_the_results(dtype):
    tensors = qkv(dtype=dtype)
    out, lse = attention(*tensors, kernel="reference", return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert {g.dtype for g in torch.autograd.grad(out.sum(), tensors)} == {dtype}


def test_one_token():
    q, k, v = qkv(s=1)
    out, lse = attention(q, k, v, return_lse=True)
    assert torch.equal(out, v.repeat_interleave(2, 2))
    assert lse.shape == (2, 4, 1)


def test_strided_inputs():
    """q, k and v as slices of one projection, and a transposed layout."""
    packed = torch.randn(2, 32, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q, k, v = packed.split([4, 2, 2], dim=2)
    expected = attention(q.contiguous(), k.contiguous(), v.contiguous())
    assert torch.equal(attention(q, k, v), expected)
    flipped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert (attention(*flipped) - expected).abs().max() < 1e-12


def refused(match: str, error: type = ShapeError, **changes):
    tensors = dict(zip("qkv", qkv(), strict=True))
    options = {name: changes.pop(name) for name in list(changes) if name not in "qkv"}
    tensors |= changes
    with pytest.raises(error, match=match):
        attention(tensors["q"], tensors["k"], tensors["v"], **options)


def test_what_is_no_mesh_and_no_meta_is_refused():
    with pytest.raises(ShapeError, match=r"mesh is a ParallelPlan: make one with ParallelMesh\.create"):
        ParallelAttention(ALONE)
    with pytest.raises(ShapeError, match=r"meta is a NoneType: make it with SequenceMeta\.of"):
        ParallelAttention()(*qkv(), None)


def test_what_does_not_fit_is_refused():
    q, k, v = qkv()
    refused("axis 'sk' is 32 in k but 31 in v", v=v[:, :-1])
    refused("both are shards of one sequence", k=k[:, :-1], v=v[:, :-1])
    refused("not a multiple of the 2 of k and v", q=q[:, :, :3])
    refused("dtypes differ", q=q.float())
    refused("expected 4 axes", q=q[0])
    refused("expected 4 axes", q=q[0, 0, 0])
    refused("call .contiguous", q=q.transpose(2, 3).contiguous().transpose(2, 3))
    refused("nothing to attend to: b = 2, sq = 0", q=q[:, :0], k=k[:, :0], v=v[:, :0])
    refused("nothing to attend to: b = 0", q=q[:0], k=k[:0], v=v[:0])
    refused("distinguishes 3 sequences, but the batch of q, k and v has 2", mask=Documents(((0, 32),) * 3))
    refused("end at 30, but the sequence has 32", mask=Documents((0, 30)))
    refused("mask is a str: it must come from longctx.masks", mask="causal")
    refused("did you mean 'reference'", KernelError, kernel="referense")


@pytest.fixture(scope="module")
def mesh() -> ParallelMesh:
    return ParallelMesh.create(ALONE, device="cpu")


def test_a_ring_of_one_is_attention(mesh):
    tensors = qkv()
    meta = SequenceMeta.of(32, mask=MASKS["own_docs"])
    out, lse = ring_attention(*tensors, meta=meta, mesh=mesh, return_lse=True)
    expected = attention(*tensors, mask=MASKS["own_docs"], return_lse=True)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    assert torch.equal(ring_attention(*tensors, meta=meta, mesh=mesh), out)


def test_a_meta_that_is_not_of_the_shard_is_refused(mesh):
    tensors = qkv()
    with pytest.raises(ShapeError, match=r"meta is of ring rank 1 of 2, but this process is ring rank 0 of 1"):
        ring_attention(*tensors, meta=SequenceMeta.of(64, ring_rank=1, ring_world=2), mesh=mesh)
    with pytest.raises(ShapeError, match="hold 32 positions each, but a rank's share of 64"):
        ring_attention(*tensors, meta=SequenceMeta.of(64), mesh=mesh)
    with pytest.raises(ShapeError, match="hold 32 positions each, but a rank's share of 36"):
        ring_attention(*tensors, meta=replace(SequenceMeta.of(34), positions=torch.arange(36)), mesh=mesh)


@pytest.mark.parametrize("with_mesh", [True, False], ids=["mesh", "no_mesh"])
def test_module(mesh, with_mesh):
    module = ParallelAttention(mesh if with_mesh else None, scale=0.5)
    assert list(module.parameters()) == []
    assert module.state_dict() == {}
    assert repr(module) == "ParallelAttention(ring=1, kernel='auto', scale=0.5)"
    tensors = qkv()
    meta = SequenceMeta.of(32, mask=MASKS["docs"])
    assert torch.equal(module(*tensors, meta), attention(*tensors, mask=MASKS["docs"], scale=0.5))
    with pytest.raises(ShapeError, match="64"):
        module(*tensors, SequenceMeta.of(64))


def test_a_shard_needs_a_mesh():
    with pytest.raises(ShapeError, match="this shard is one of 2, but ParallelAttention has no mesh"):
        ParallelAttention()(*qkv(), SequenceMeta.of(64, ring_world=2))


@pytest.mark.gpu
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("d", [64, 128])
def test_attention_on_a_gpu(mask, dtype, d):
    s = 1000
    masks = MASKS | {"docs": Documents((0, 3, 700, s)) & Causal(), "own_docs": Documents(((0, 3, s), (0, s)))}
    mask = masks[mask]
    tensors = qkv(s=s, h=8, hk=2, d=d, dtype=dtype, device="cuda")
    exact_in = [x.detach().double().requires_grad_() for x in tensors]
    dout = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    results = []
    for fn, inputs in ((attention, tensors), (sdpa, tensors), (sdpa, exact_in)):
        out = fn(*inputs, mask=mask)
        results.append([out, *torch.autograd.grad(out, inputs, dout.to(out.dtype))])
    for name, ours, plain, exact in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        floor = 2 * torch.finfo(dtype).eps * exact.abs().max().item()
        allowed = 2 * (plain - exact).abs().max().item() + floor
        assert (ours - exact).abs().max().item() <= allowed, name
