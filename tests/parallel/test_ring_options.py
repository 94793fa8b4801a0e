"""Softcap and sinks: over a ring of three processes, as operators, in the attention module; all against dense float64."""

from __future__ import annotations

import math

import pytest
import torch
from ring_cases import LAYOUTS, MASKS, ODD_LEN, ODD_MASKS, SEQ_LEN

from longctx import functional
from longctx.attention import ParallelAttention
from longctx.errors import KernelError, ShapeError
from longctx.kernels import SoftmaxState, sinks
from longctx.kernels.reference import ReferenceAttention
from longctx.masks import Causal
from longctx.parallel import ring
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.plan import ParallelPlan
from longctx.parallel.ring import RING_ATTENTION_BACKWARD_OP, RING_ATTENTION_OP
from longctx.parallel.schedule import RingSchedule
from longctx.sequence import SequenceMeta
from longctx.testing import run_distributed, run_virtual_ring

NAMES = ("out", "lse", "dq", "dk", "dv", "dsinks")
SCALE, BOUND = 0.4, 1e-12
# softcap, whether there are sinks.
OPTIONS = {"softcap": (1.5, False), "sinks": (0.0, True), "both": (1.5, True)}


def inputs(dtype=torch.float64, s=SEQ_LEN) -> list[torch.Tensor]:
    """q, k, v, sinks, dout, dlse of whole sequences, the same on every rank."""
    generator = torch.Generator().manual_seed(7)
    shapes = [(2, s, h, 16) for h in (4, 2, 2)] + [(4,), (2, s, 4, 16), (2, 4, s)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def dense(q, k, v, logits, visible, softcap):
    """By definition: the sink is one more column of scores, whose value is 0."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    s = torch.einsum("bihd,bjhd->bhij", q, k) * SCALE
    s = softcap * torch.tanh(s / softcap) if softcap else s
    s = s.masked_fill(~(visible if visible.ndim == 2 else visible[:, None]), -math.inf)
    s = torch.cat([s, logits[None, :, None, None].expand(*s.shape[:3], 1)], -1)
    return torch.einsum("bhij,bjhd->bihd", s.softmax(-1)[..., :-1], v), s.logsumexp(-1)


def results(attend, tensors, dout, dlse) -> list[torch.Tensor]:
    tensors = [t.detach().requires_grad_() for t in tensors]
    out, lse = attend(*tensors)
    grads = torch.autograd.grad((out, lse), tensors, (dout, dlse), allow_unused=True)
    return [
        out.detach(),
        lse.detach(),
        *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, tensors, strict=True)),
    ]


def worker(mesh, mask_name: str, layout_name: str, option: str, dtype=torch.float64, kernel="reference", s=SEQ_LEN):
    """This rank's results and the dense ones of its part of the sequence; dsinks summed over all ranks."""
    softcap, has_sinks = OPTIONS[option]
    layout, mask = LAYOUTS[layout_name], (ODD_MASKS if s == ODD_LEN else MASKS)[mask_name]
    whole = inputs(dtype, s)
    if not has_sinks:
        # exp(-1e30) = 0: the dense oracle's column without weight.
        whole[3] = torch.full_like(whole[3], -1e30)
    visible = mask.materialize(s)
    exact = [t.double() for t in whole]
    want = results(lambda *x: dense(*x, visible, softcap), exact[:4], *exact[4:])
    plain = results(lambda *x: dense(*x, visible, softcap), whole[:4], *whole[4:])
    meta = SequenceMeta.of(
        s, mask=mask, layout=layout, ring_rank=mesh.ring.rank, ring_world=mesh.ring.size,
        ulysses_rank=mesh.ulysses.rank, ulysses_world=mesh.ulysses.size,
    )  # fmt: skip

    def attend(q, k, v, logits):
        return functional.context_parallel_attention(
            q, k, v, meta=meta, mesh=mesh, scale=SCALE, softcap=softcap,
            sinks=logits if has_sinks else None, kernel=kernel, return_lse=True,
        )  # fmt: skip

    def shard(x, name):
        return x if name in ("sinks", "dsinks") else meta.shard(x, dim=2 if "lse" in name else 1, fill=0)

    def real(x, name):
        return x if name == "dsinks" else x.narrow(2 if name == "lse" else 1, 0, int((meta.positions < s).sum()))

    local = [shard(x, name) for x, name in zip(whole, ("q", "k", "v", "sinks", "dout", "dlse"), strict=True)]
    got = [real(x, name) for x, name in zip(results(attend, local[:4], *local[4:]), NAMES, strict=True)]
    want = [real(shard(x, name), name) for x, name in zip(want, NAMES, strict=True)]
    plain = [real(shard(x, name), name) for x, name in zip(plain, NAMES, strict=True)]
    return {
        name: (got[i], want[i], float((plain[i].double() - want[i]).abs().max()) if want[i].numel() else 0.0)
        for i, name in enumerate(NAMES)
    }


def wrong(found: list[dict]) -> list[str]:
    """What is not right on any rank."""
    said = []
    for name in NAMES:
        ranks = [r[name] for r in found]
        if name == "dsinks":
            ranks = [(sum(got for got, _, _ in ranks), ranks[0][1], ranks[0][2])]
        for i, (got, want, plain) in enumerate(ranks):
            if not got.numel():
                continue
            eps = torch.finfo(got.dtype).eps
            allowed = BOUND if got.dtype == torch.float64 else 2 * plain + 4 * eps * float(want.abs().max())
            error = float((got.double() - want).abs().max())
            if not error <= allowed:
                said.append(f"{name} on rank {i}: error {error:.2e}, allowed {allowed:.2e}")
    return said


def all_cases(rank: int, cases: list[tuple], plan: ParallelPlan = ParallelPlan(ring=3)) -> list[dict]:  # noqa: B008
    mesh = ParallelMesh.create(plan, device="cpu")
    return [worker(mesh, *case) for case in cases]


def odd_lengths() -> list[tuple]:
    """Padded sequences: the sinks of padding's rows must stay out of the sinks' gradient."""
    found = [("prefix", "balanced", "softcap"), ("own_docs_causal", "balanced", "both"), ("window", "zigzag", "sinks")]
    return [(*case, torch.float64, "reference", ODD_LEN) for case in found]


def test_three_processes():
    cases = [(mask, "zigzag", option) for mask in ("causal", "own_docs_causal") for option in OPTIONS]
    cases += [("window_causal", "contiguous", "both"), ("full", "striped4", "both"), ("before", "zigzag", "sinks")]
    cases += odd_lengths()
    found = run_distributed(all_cases, cases, world=3)
    assert {case: wrong([rank[i] for rank in found]) for i, case in enumerate(cases)} == {case: [] for case in cases}


def test_over_exchanged_heads_and_a_ring():
    """Each rank attends with its own heads' sinks; the parts of their gradient add up over both axes."""
    cases = [("causal", "zigzag", option) for option in OPTIONS] + [("own_docs_causal", "striped4", "both")]
    cases += odd_lengths()
    found = run_distributed(all_cases, cases, ParallelPlan(ring=2, ulysses=2), world=4)
    assert {case: wrong([rank[i] for rank in found]) for i, case in enumerate(cases)} == {case: [] for case in cases}


def test_three_processes_with_triton():
    cases = [("causal", "zigzag", "both", torch.float32, "triton")]
    found = run_distributed(all_cases, cases, world=3, env={"TRITON_INTERPRET": "1"})
    assert wrong([rank[0] for rank in found]) == []


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("world", [1, 2])
def test_virtual_ring(world, option):
    assert wrong(run_virtual_ring(worker, "causal", "zigzag", option, world=world)) == []


class CountsTheSinkAtEveryHop(ReferenceAttention):
    """A sink of 0 joins once for each block instead of once for each row."""

    def forward(self, q, *args, **kwargs):
        state = super().forward(q, *args, **kwargs)
        sinks.add_sinks(state, torch.zeros(q.shape[2]))
        return state


def test_a_sink_that_is_counted_at_every_hop_is_found(monkeypatch):
    zero = torch.zeros(4, dtype=torch.float64)

    def out(mesh, logits):
        rank, world, layout = mesh.ring.rank, mesh.ring.size, LAYOUTS["zigzag"]
        shards = (layout.shard(x, rank, world) for x in inputs()[:3])
        meta = SequenceMeta.of(SEQ_LEN, layout=layout, ring_rank=rank, ring_world=world)
        return functional.ring_attention(*shards, meta=meta, mesh=mesh, kernel="reference", sinks=logits)

    for world, is_found in ((1, False), (3, True)):
        right = run_virtual_ring(out, zero, world=world)
        with monkeypatch.context() as patch:
            patch.setattr(ring, "select_kernel", lambda *_: CountsTheSinkAtEveryHop())
            twin = run_virtual_ring(out, None, world=world)
        assert (max(float((a - b).abs().max()) for a, b in zip(right, twin, strict=True)) > 1e-3) == is_found


@pytest.mark.parametrize("option", OPTIONS)
def test_operators_are_well_registered(option):
    softcap, has_sinks = OPTIONS[option]
    q, k, v, logits = (t.float().requires_grad_() for t in inputs()[:4])
    packed = RingSchedule.build(MASKS["docs_causal"], LAYOUTS["contiguous"], 0, 1, SEQ_LEN).packed
    rest = (*packed, "reference", SCALE, "", softcap, logits if has_sinks else None)
    torch.library.opcheck(RING_ATTENTION_OP, (q, k, v, *rest))
    rest = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in rest)
    q, k, v = (t.detach() for t in (q, k, v))
    out, lse, held = RING_ATTENTION_OP(q, k, v, *rest)
    for dlse in (None, torch.ones_like(lse)):
        torch.library.opcheck(RING_ATTENTION_BACKWARD_OP, (torch.ones_like(out), dlse, q, k, v, out, lse, held, *rest))


def test_the_module_carries_both():
    q, k, v, logits = (t.requires_grad_() for t in inputs()[:4])
    module = ParallelAttention(scale=SCALE, softcap=1.5)
    assert "softcap=1.5" in repr(module)
    out = module(q, k, v, SequenceMeta.of(SEQ_LEN, mask=Causal()), sinks=logits)
    want, _ = dense(q, k, v, logits, Causal().materialize(SEQ_LEN), 1.5)
    assert (out - want).abs().max() < BOUND
    (a,), (b,) = (torch.autograd.grad(x.square().sum(), logits) for x in (out, want))
    assert (a - b).abs().max() < BOUND


def test_sinks_of_minus_infinity_are_none():
    q, k, v = inputs()[:3]
    none = torch.full((4,), -math.inf, dtype=q.dtype, requires_grad=True)
    for mask in ("causal", "before"):
        expected = functional.attention(q, k, v, mask=MASKS[mask], return_lse=True)
        got = functional.attention(q, k, v, mask=MASKS[mask], sinks=none, return_lse=True)
        assert torch.equal(got[1], expected[1])
        assert (got[0] - expected[0]).abs().max() < BOUND
        assert not torch.autograd.grad(got[0].sum(), none)[0].any()


def test_a_row_that_saw_nothing_has_the_sinks_lse():
    state = SoftmaxState.empty_like(torch.zeros(1, 3, 2, 4))
    sinks.add_sinks(state, torch.tensor([0.5, -2.0]))
    assert torch.equal(state.lse[0, :, 0], torch.tensor([0.5, -2.0]))
    assert not state.out.any()


def test_what_is_wrong_is_refused():
    q, k, v, logits = inputs()[:4]
    for bad in (logits[:3], logits.long(), logits[None]):
        with pytest.raises(ShapeError, match="one floating number for each of the 4 heads of q"):
            functional.attention(q, k, v, sinks=bad)
    for bad in (-1.0, math.inf, math.nan):
        with pytest.raises(KernelError, match="softcap is"):
            functional.attention(q, k, v, softcap=bad)
        with pytest.raises(KernelError, match="softcap is"):
            ParallelAttention(softcap=bad)
