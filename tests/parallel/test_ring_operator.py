"""The ring operator as torch sees it: registration, compilers, checkpointing, kernels, lifetimes."""

from __future__ import annotations

import functools
import gc

import pytest
import torch
from ring_cases import LAYOUTS, MASKS, SEQ_LEN, dense_attention
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from longctx import functional, kernels
from longctx.errors import DistributedError, KernelError
from longctx.kernels.reference import ReferenceAttention
from longctx.layout import ZigZag
from longctx.masks import Causal, Documents
from longctx.parallel import ring
from longctx.parallel.ring import RING_ATTENTION_BACKWARD_OP, RING_ATTENTION_OP
from longctx.parallel.schedule import RingSchedule
from longctx.parallel.strategy import KEPT_OPERATORS, DirectStrategy
from longctx.sequence import SequenceMeta
from longctx.testing import run_virtual_ring

SCALE = 0.3


def arguments(mask_name: str, seed: int = 0):
    """q, k, v, which want gradients, and the rest of the operator's arguments, for a ring of one."""
    generator = torch.Generator().manual_seed(seed)
    qkv = [torch.randn(2, SEQ_LEN, h, 4, generator=generator, requires_grad=True) for h in (4, 2, 2)]
    schedule = RingSchedule.build(MASKS[mask_name], LAYOUTS["contiguous"], 0, 1, SEQ_LEN)
    return qkv, [*schedule.packed, "reference", SCALE, ""]


def loss(q, k, v, *rest):
    out, lse, _ = RING_ATTENTION_OP(q * 2, k, v, *rest)
    return (out * out).sum() + lse.sum()


@pytest.mark.parametrize("mask", ["causal", "docs_causal", "own_docs"])
def test_operators_are_well_registered(mask):
    qkv, rest = arguments(mask)
    torch.library.opcheck(RING_ATTENTION_OP, (*qkv, *rest))
    q, k, v = (x.detach() for x in qkv)
    out, lse, held = RING_ATTENTION_OP(q, k, v, *rest)
    for dlse in (None, torch.ones_like(lse)):
        args = (torch.ones_like(out), dlse, q, k, v, out, lse, held, *rest)
        torch.library.opcheck(RING_ATTENTION_BACKWARD_OP, args)


def test_what_the_fakes_say_of_a_ring_is_true():
    """A ring of several holds a block back, which a ring of one does not: opcheck in one process cannot see that."""

    def worker(mesh):
        s = SEQ_LEN // mesh.ring.size
        real = [torch.randn(2, s, h, 4, dtype=torch.bfloat16) for h in (4, 2, 2)]
        packed = RingSchedule.build(Causal(), ZigZag(), mesh.ring.rank, mesh.ring.size, SEQ_LEN).packed
        results = RING_ATTENTION_OP(*real, *packed, "reference", SCALE, mesh.exchange.handle)
        dout = torch.ones_like(real[0])
        grads = RING_ATTENTION_BACKWARD_OP(
            dout, None, *real, *results, *packed, "reference", SCALE, mesh.exchange.handle
        )
        return real, packed, results, grads

    from torch._subclasses.fake_tensor import FakeTensorMode

    for real, packed, results, grads in run_virtual_ring(worker, world=3):
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            q, k, v, table, rows = (mode.from_tensor(x) for x in (*real, *packed))
            fakes = RING_ATTENTION_OP(q, k, v, table, rows, "reference", SCALE, "nowhere")
            dout = torch.ones_like(q)
            fake_grads = RING_ATTENTION_BACKWARD_OP(
                dout, None, q, k, v, *fakes, table, rows, "reference", SCALE, "nowhere"
            )
        for fake, true in zip((*fakes, *fake_grads), (*results, *grads), strict=True):
            assert (fake.shape, fake.dtype, fake.stride()) == (true.shape, true.dtype, true.stride())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_operator_agrees_and_serves_every_batch(backend):
    """Other documents are other numbers in a tensor, not another graph."""
    torch.compiler.reset()
    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    stats = torch._dynamo.utils.counters["stats"]
    stats.clear()
    for cut in (5, 17, 40):
        qkv, rest = arguments("causal", seed=cut)
        mask = Documents((0, cut, SEQ_LEN)) & Causal()
        rest[:2] = RingSchedule.build(mask, LAYOUTS["contiguous"], 0, 1, SEQ_LEN).packed
        expected = torch.autograd.grad(loss(*qkv, *rest), qkv)
        got = torch.autograd.grad(compiled(*qkv, *rest), qkv)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert stats["unique_graphs"] == 1


# torch's compiler looks at .grad of what a graph break hands over, and is warned by torch.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_model_code_around_attention_agrees(backend):
    def model(q, k, v, mask):
        out, lse = functional.attention(q * 2, k, v, mask=mask, kernel="reference", return_lse=True)
        return (out * out).sum() + lse.sum()

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend)
    qkv, _ = arguments("causal")
    for mask in (Causal(), Documents((0, 7, SEQ_LEN)), MASKS["own_docs_causal"]):
        expected = torch.autograd.grad(model(*qkv, mask), qkv)
        got = torch.autograd.grad(compiled(*qkv, mask), qkv)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# Calls of the kernel on one rank: a hop each, or a group of heads each.
@pytest.mark.parametrize(
    ("strategy", "blocks"), [("relay", 3), ("direct", 3), (DirectStrategy(holds=False), 3), ("gather", 2)], ids=str
)
def test_checkpointing_that_keeps_the_operator_never_computes_it_again(strategy, blocks, monkeypatch):
    calls = []
    forward = ReferenceAttention.forward

    def counted(self, *args, **kwargs):
        calls.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(ReferenceAttention, "forward", counted)

    def policy(ctx, op, *args, **kwargs):
        keep = op in KEPT_OPERATORS
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def worker(mesh):
        meta = SequenceMeta.of(SEQ_LEN, ring_rank=mesh.ring.rank, ring_world=mesh.ring.size)
        generator = torch.Generator().manual_seed(mesh.ring.rank)
        q = torch.randn(1, meta.local_len, 2, 4, generator=generator, requires_grad=True)

        def layer(q):
            y = functional.ring_attention(q.sin(), q, q, meta=meta, mesh=mesh, kernel="reference", strategy=strategy)
            return y.cos()

        (expected,) = torch.autograd.grad(layer(q).sum(), q)
        sent = mesh.exchange.bytes_sent
        context = functools.partial(create_selective_checkpoint_contexts, policy)
        kept = checkpoint(layer, q, use_reentrant=False, context_fn=context)
        (got,) = torch.autograd.grad(kept.sum(), q)
        assert torch.equal(got, expected)
        return mesh.exchange.bytes_sent == 2 * sent

    assert all(run_virtual_ring(worker, world=3))
    assert len(calls) == 2 * 3 * blocks


def test_gradient_of_lse_alone():
    qkv, rest = arguments("prefix")
    whole = [x.detach().double().requires_grad_() for x in qkv]
    visible = MASKS["prefix"].materialize(SEQ_LEN)
    expected = torch.autograd.grad(dense_attention(*whole, visible, SCALE)[1].sum(), whole, allow_unused=True)
    lse = RING_ATTENTION_OP(*whole, *rest)[1]
    got = torch.autograd.grad(lse.sum(), whole)
    assert expected[2] is None
    for a, b in zip(got, (expected[0], expected[1], torch.zeros_like(whole[2])), strict=True):
        assert (a - b).abs().max() < 1e-12


def test_the_held_block_has_no_gradient():
    qkv, rest = arguments("causal")
    assert not RING_ATTENTION_OP(*qkv, *rest)[2].requires_grad


def test_second_derivatives_are_refused():
    qkv, rest = arguments("causal")
    (dq,) = torch.autograd.grad(loss(*qkv, *rest), qkv[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dq.sum().backward()


def test_expanded_gradients():
    """`out.sum()` hands back a gradient whose strides are 0."""
    qkv, rest = arguments("causal")
    out = RING_ATTENTION_OP(*qkv, *rest)[0]
    expanded = torch.autograd.grad(out.sum(), qkv)
    out = RING_ATTENTION_OP(*qkv, *rest)[0]
    assert all(
        torch.equal(a, b) for a, b in zip(expanded, torch.autograd.grad(out, qkv, torch.ones_like(out)), strict=True)
    )


class OwnDelta(ReferenceAttention):
    """Stands for cuDNN, which makes delta of out and dout itself: a gradient of lse is lost in it."""

    name = "cudnn"

    def backward(self, *args, **kwargs):
        args = list(args)
        args[5] = kernels.row_delta(kwargs["out"], args[0])
        super().backward(*args, **kwargs)


def test_gradient_of_lse_does_not_go_to_kernels_that_would_lose_it(monkeypatch):
    own, plain = OwnDelta(), ReferenceAttention()
    monkeypatch.setattr(ring, "select_kernel", lambda name, *_: own if name in ("auto", "cudnn") else plain)
    qkv, rest = arguments("causal")
    expected = torch.autograd.grad(loss(*qkv, *rest), qkv)

    rest[2] = "cudnn"
    torch.autograd.grad(RING_ATTENTION_OP(*qkv, *rest)[0].sum(), qkv)
    with pytest.raises(KernelError, match="no gradient for lse"):
        torch.autograd.grad(loss(*qkv, *rest), qkv)
    rest[2] = "auto"
    got = torch.autograd.grad(loss(*qkv, *rest), qkv)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    # The twin: without that rule the gradient would be wrong.
    monkeypatch.setattr(ring, "_OWN_DELTA", ())
    lost = torch.autograd.grad(loss(*qkv, *rest), qkv)
    assert (lost[0] - expected[0]).abs().max() > 1e-3


def test_a_kernel_that_cannot_do_it_fails_before_any_message():
    """Otherwise other ranks would wait for the messages of one that has left."""

    def worker(mesh):
        meta = SequenceMeta.of(SEQ_LEN, ring_rank=mesh.ring.rank, ring_world=mesh.ring.size)
        q = torch.randn(1, meta.local_len, 2, 4, dtype=torch.float64)
        with pytest.raises(KernelError):
            functional.ring_attention(q, q, q, meta=meta, mesh=mesh, kernel="triton")
        return mesh.exchange.bytes_sent

    assert "triton" in kernels.kernel_names()
    assert run_virtual_ring(worker, world=2) == [0, 0]


def test_backward_after_the_mesh_is_gone_says_so():
    def worker(mesh):
        meta = SequenceMeta.of(SEQ_LEN, ring_rank=mesh.ring.rank, ring_world=mesh.ring.size)
        q = torch.randn(1, meta.local_len, 2, 4, requires_grad=True)
        return functional.ring_attention(q, q, q, meta=meta, mesh=mesh, kernel="reference")

    outs = run_virtual_ring(worker, world=2)
    gc.collect()
    with pytest.raises(DistributedError, match="keep the ParallelMesh alive"):
        outs[0].sum().backward()
