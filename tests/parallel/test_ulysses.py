"""Ulysses, alone and around a ring, on real processes against the dense result; and that the check can fail."""

from __future__ import annotations

import contextlib
import functools
import itertools
from dataclasses import dataclass, replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from ring_cases import BATCH, HEADS, LAYOUTS, MASKS, Case, Report, odd_cases, run_case

from longctx import calls, functional
from longctx import model as model_module
from longctx.attention import ParallelAttention
from longctx.errors import DistributedError, ShapeError
from longctx.layout import SequenceMeta, ZigZag
from longctx.masks import Causal, SlidingWindow
from longctx.model import ModelConfig, Transformer
from longctx.parallel import ulysses
from longctx.parallel.journal import Journal
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.plan import ParallelPlan
from longctx.parallel.schedule import RingSchedule, ulysses_comm_bytes
from longctx.parallel.strategy import get_strategy
from longctx.parallel.ulysses import ULYSSES_ATTENTION_OP
from longctx.testing import run_distributed

# Degrees -> heads that every mask and layout is tried with, and others.
PLANS = {
    "ulysses2": (ParallelPlan(ulysses=2), "gqa", ("mha", "mqa4")),
    "ulysses3": (ParallelPlan(ulysses=3), "gqa6", ("mqa6",)),
    "ring2x2": (ParallelPlan(ring=2, ulysses=2), "gqa", ("mha", "mqa4")),
    # Fewer key heads than ranks.
    "ulysses4": (ParallelPlan(ulysses=4), "gqa", ("mqa4",)),
}


def cases_of(name: str) -> dict[str, Case]:
    _, heads, others = PLANS[name]
    cases = [Case(mask, layout, heads=heads) for mask, layout in itertools.product(MASKS, LAYOUTS)]
    cases += odd_cases(heads)
    cases += [Case("own_docs_causal", "zigzag", heads=other) for other in others]
    cases += [Case(mask, "zigzag", torch.float32, heads=heads, lse_gradient=False) for mask in ("causal", "docs")]
    cases += [Case("own_docs_causal", layout, torch.bfloat16, heads=heads) for layout in ("zigzag", "striped4")]
    return {str(case): case for case in cases}


# ---- broken twins: mistakes that the check must see, or it proves nothing


_place, _unpack = ulysses._place, ulysses._unpack


def _heads_in_another_order(leaving, world):
    """As if the first rank's heads were the last one's."""
    _place([(SimpleNamespace(wait=lambda x=x: x.wait().flip(0)), to) for x, to in leaving], world)


def _every_chunk_sees_the_first_keys(whole, chunk, block):
    mine, block_of_chunk = _unpack(whole, chunk, block)
    return mine, block_of_chunk if block is None else block


def _only_the_first_copy_has_a_gradient(x, world):
    copies = max(1, world // x.shape[2])
    rest = x.detach().unsqueeze(3).expand(-1, -1, -1, copies - 1, -1)
    return torch.cat([x.unsqueeze(3), rest], 3).flatten(2, 3)


def _copies_in_turn(x, world):
    return x.repeat(1, 1, max(1, world // x.shape[2]), 1)


_meta_of = SequenceMeta.of


def _cut_before_the_layout(seq_len, **rest):
    piece = seq_len // rest["ulysses_world"]
    positions = rest["layout"].positions(rest["ring_rank"], rest["ring_world"], piece) + rest["ulysses_rank"] * piece
    return replace(_meta_of(seq_len, **rest), positions=positions)


# name -> (what is replaced, by what, the plans and heads with which it must be seen)
TWINS = {
    "heads_in_another_order": (
        ulysses,
        "_place",
        _heads_in_another_order,
        {"ulysses2": "gqa", "ring2x2": "gqa"},
    ),
    "missing_gradient_sum": (
        ulysses,
        "repeat_heads",
        _only_the_first_copy_has_a_gradient,
        {"ulysses2": "mqa4", "ulysses3": "mqa6", "ring2x2": "mqa4", "ulysses4": "gqa"},
    ),
    "copies_in_turn": (ulysses, "repeat_heads", _copies_in_turn, {"ulysses4": "gqa"}),
    "cut_before_the_layout": (SequenceMeta, "of", staticmethod(_cut_before_the_layout), {"ring2x2": "gqa"}),
}


def twins_caught(mesh: ParallelMesh, name: str) -> dict[str, list[str]]:
    """Of each twin that concerns the plan: the tensors that came out wrong."""
    found = {}
    for twin, (owner, attribute, broken, plans) in TWINS.items():
        if name in plans:
            right = owner.__dict__[attribute]
            setattr(owner, attribute, broken)
            try:
                found[twin] = run_case(mesh, Case("causal", "zigzag", heads=plans[name])).wrong
            finally:
                setattr(owner, attribute, right)
    return found


# ---- what the processes of a plan do

# Plan -> (name, chunks, query and key heads, strategy of the ring).
CHUNKED = {
    "ulysses2": (("groups", 2, (8, 8), "relay"), ("one_key_head", 3, (6, 2), "relay"), ("parts", 4, (8, 4), "relay")),
    # Two key heads, repeated for four ranks.
    "ulysses4": (("repeated_parts", 2, (8, 2), "relay"),),
    "ring2x2": tuple((f"groups_{s}", 2, (8, 4), s) for s in ("relay", "direct", "gather")),
}


def traffic_of_a_model(mesh: ParallelMesh) -> dict[str, object]:
    """Bytes sent and gradients of a training step, without and with activation checkpointing, with what that keeps in the
    host's memory, and with a broken twin of it that keeps attention's result alone."""
    meta = SequenceMeta.of(
        48,
        ring_rank=mesh.ring.rank,
        ring_world=mesh.ring.size,
        ulysses_rank=mesh.ulysses.rank,
        ulysses_world=mesh.ulysses.size,
    )
    batch = type("Batch", (), {"tokens": meta.shard(torch.arange(48)[None]), "meta": meta})()
    batch.labels = batch.tokens
    config = ModelConfig(vocab_size=48, hidden_size=24, num_layers=2, num_heads=12, num_kv_heads=1, head_dim=2)
    sent, gradients = [], []
    kept = model_module._KEPT
    for recompute, offload, keep in (
        (False, False, kept),
        (True, False, kept),
        (True, True, kept),
        (True, False, tuple(op for op in kept if op is not ULYSSES_ATTENTION_OP)),
    ):
        model_module._KEPT = keep
        settings = {"activation_checkpointing": recompute, "activation_offload": offload}
        model = Transformer(config, mesh=mesh, kernel="reference", **settings).double()
        before = mesh.exchange.bytes_sent, mesh.head_exchange.bytes_sent
        model(batch).backward()
        sent.append((mesh.exchange.bytes_sent - before[0], mesh.head_exchange.bytes_sent - before[1]))
        gradients.append([p.grad for p in model.parameters()])
    model_module._KEPT = kept
    return {
        "sent": sent,
        "equal": all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*gradients[:3], strict=True)),
    }


def meta_of(mesh: ParallelMesh, seq_len: int = 48) -> SequenceMeta:
    return SequenceMeta.of(
        seq_len,
        mask=Causal() & SlidingWindow(31),
        ring_rank=mesh.ring.rank,
        ring_world=mesh.ring.size,
        ulysses_rank=mesh.ulysses.rank,
        ulysses_world=mesh.ulysses.size,
    )


@dataclass
class InChunks:
    """What heads in chunks gave: the relative difference to heads at once by tensor; errors; messages; bytes beside those at once."""

    apart: dict[str, float]
    wrong: list[str]
    report: Report
    twin: list[str]
    said: list[str]
    sent: tuple[int, int]


def attended(
    mesh: ParallelMesh, strategy: str, num_heads: int, num_kv_heads: int
) -> tuple[list[torch.Tensor], list[str], int]:
    """out, lse, dq, dk, dv and dsinks in single precision; what was noted of messages, posted and waited for; bytes sent."""
    meta = meta_of(mesh)
    generator = torch.Generator().manual_seed(meta.ring_rank * 100 + meta.ulysses_rank)
    shape = (BATCH, meta.local_len, num_heads, 4)
    q, k, v = (
        torch.randn(*shape[:2], h, 4, generator=generator, requires_grad=True)
        for h in (num_heads, num_kv_heads, num_kv_heads)
    )
    sinks = torch.linspace(-1, 1, num_heads).requires_grad_()
    said: list[str] = []
    journal = mesh.journal
    with (
        mock.patch.object(journal, "post", side_effect=journal.post) as post,
        mock.patch.object(journal, "wait", side_effect=journal.wait) as wait,
        mock.patch.object(journal, "begin_attention", side_effect=journal.begin_attention) as begin,
    ):
        post.side_effect = lambda what, **rest: (said.append(f"post {what}"), Journal.post(journal, what, **rest))[1]
        wait.side_effect = lambda note, arrive: (said.append(f"wait {note.what}"), Journal.wait(journal, note, arrive))[
            1
        ]
        begin.side_effect = lambda count: said.append("attend")
        before = mesh.exchange.bytes_sent + mesh.head_exchange.bytes_sent
        out, lse = functional.ulysses_attention(
            q, k, v, meta=meta, mesh=mesh, sinks=sinks, strategy=strategy, return_lse=True
        )
        ((out * out).sum() + lse.sum()).backward()
        sent = mesh.exchange.bytes_sent + mesh.head_exchange.bytes_sent - before
    return [x.detach() for x in (out, lse, q.grad, k.grad, v.grad, sinks.grad)], said, sent


def in_chunks(name_of_plan: str) -> dict[str, InChunks]:
    """Heads in chunks beside heads at once, by what is in a chunk: whole groups of heads, or a part of one."""
    plan, found = PLANS[name_of_plan][0], {}
    meshes = functools.cache(lambda n: ParallelMesh.create(replace(plan, ulysses_chunks=n), device="cpu"))
    for name, chunks, (h, hk), strategy in CHUNKED.get(name_of_plan, ()):
        cut, at_once = meshes(chunks), meshes(1)
        whole, _, bytes_at_once = attended(at_once, strategy, h, hk)
        parts, said, sent = attended(cut, strategy, h, hk)
        names = ("out", "lse", "dq", "dk", "dv", "dsinks")
        apart = {n: float((a - b).abs().max() / a.abs().max()) for n, a, b in zip(names, whole, parts, strict=True)}
        HEADS["chunked"] = (h, hk)
        case = Case("own_docs_causal", "zigzag", heads="chunked", strategy=strategy)
        report = run_case(cut, case)
        in_bf16 = run_case(cut, Case("causal", "zigzag", torch.bfloat16, heads="chunked", strategy=strategy))
        ulysses._unpack = _every_chunk_sees_the_first_keys
        twin = run_case(cut, case).wrong
        ulysses._unpack = _unpack
        found[name] = InChunks(apart, [*report.wrong, *in_bf16.wrong], report, twin, said, (sent, bytes_at_once))
    return found


@contextlib.contextmanager
def nothing_held():
    """In calls within it, as in those of very long sequences, heads are sent again for the backward pass."""
    resolve = calls.resolve_split
    with mock.patch.object(calls, "resolve_split", lambda *args, **rest: resolve(*args, **rest)._replace(holds=False)):
        yield


def sent_again(mesh: ParallelMesh, name: str) -> dict[str, object]:
    """Attention with nothing held, heads at once and in chunks, and a model around it."""
    plan, heads, _ = PLANS[name]
    cases = [
        Case(mask, layout, dtype, heads=heads, lse_gradient=with_lse, holds=False)
        for mask, layout, dtype, with_lse in (
            ("causal", "zigzag", torch.float64, True),
            ("own_docs_causal", "striped4", torch.bfloat16, True),
            ("window", "balanced", torch.float32, False),
        )
    ]
    with nothing_held():
        found: dict[str, object] = {str(case): run_case(mesh, case) for case in cases}
        for what, chunks, grouping, strategy in CHUNKED.get(name, ()):
            HEADS["chunked"] = grouping
            cut = ParallelMesh.create(replace(plan, ulysses_chunks=chunks), device="cpu")
            found[what] = run_case(
                cut, Case("own_docs_causal", "zigzag", heads="chunked", strategy=strategy, holds=False)
            )
        return {"reports": found, "model": traffic_of_a_model(mesh)}


def refusals(mesh: ParallelMesh) -> dict[str, str]:
    """What is said, before anything is sent, to shards and metas that do not fit."""
    u, n = mesh.ulysses.rank, mesh.ulysses.size
    meta = SequenceMeta.of(96, ring_rank=mesh.ring.rank, ring_world=mesh.ring.size, ulysses_rank=u, ulysses_world=n)
    other = replace(meta, ulysses_rank=(u + 1) % n)
    x = torch.zeros(1, meta.local_len, n, 4)
    odd = torch.zeros(1, meta.local_len, n + 1, 4)
    wrong = {
        "heads": lambda: functional.ulysses_attention(odd, odd, odd, meta=meta, mesh=mesh),
        "rank": lambda: functional.ulysses_attention(x, x, x, meta=other, mesh=mesh),
        "length": lambda: functional.ulysses_attention(x[:, 1:], x[:, 1:], x[:, 1:], meta=meta, mesh=mesh),
        "ring": lambda: functional.ring_attention(x, x, x, meta=meta, mesh=mesh),
        "no_mesh": lambda: ParallelAttention()(x, x, x, meta),
    }
    said = {}
    before = mesh.head_exchange.bytes_sent
    for name, call in wrong.items():
        try:
            call()
        except ShapeError as error:
            said[name] = str(error)
    assert mesh.head_exchange.bytes_sent == before
    return said


def worker(rank: int, name: str) -> dict[str, object]:
    # Fills torch.empty with NaN.
    torch.use_deterministic_algorithms(True)
    mesh = ParallelMesh.create(PLANS[name][0], device="cpu")
    found: dict[str, object] = {"reports": {n: run_case(mesh, case) for n, case in cases_of(name).items()}}
    found["twins"] = twins_caught(mesh, name)
    found["model"] = traffic_of_a_model(mesh)
    found["refused"] = refusals(mesh)
    found["module"] = repr(ParallelAttention(mesh))
    found["chunks"] = in_chunks(name)
    found["again"] = sent_again(mesh, name)
    meta = meta_of(mesh)
    x = torch.ones(1, meta.local_len, 2 * mesh.ulysses.size, 4, requires_grad=True)
    sent = functional.ulysses_attention(x, x, x, meta=meta, mesh=mesh)
    del mesh
    try:
        sent.sum().backward()
    except DistributedError as error:
        found["mesh_is_gone"] = str(error)
    return found


@pytest.fixture(scope="module", params=PLANS)
def found(request) -> tuple[str, list[dict]]:
    """A plan, and what each of its ranks found."""
    plan = PLANS[request.param][0]
    return request.param, run_distributed(worker, request.param, world=plan.sp, plan=plan)


def test_what_is_sent_again_gives_the_same(found):
    name, ranks = found
    for of_rank in ranks:
        reports = of_rank["again"]["reports"]
        assert {n: (r.wrong, r.sent) for n, r in reports.items() if r.wrong or r.sent != r.predicted} == {}
        assert len(reports) == 3 + len(CHUNKED.get(name, ()))
        model, held = of_rank["again"]["model"], of_rank["model"]
        assert model["equal"], "recomputation or offload changed gradients"
        assert model["sent"][0] == model["sent"][1] == model["sent"][2]
        # q, k, v and out of both layers once more: as much as a forward pass sends, a third of all.
        (_, before), (_, now) = held["sent"][0], model["sent"][0]
        assert now == before * 3 // 2


def test_every_mask_and_layout_is_attention_over_the_whole_sequence(found):
    name, ranks = found
    wrong = {(rank, n): r.wrong for rank, f in enumerate(ranks) for n, r in f["reports"].items() if r.wrong}
    assert not wrong
    assert len(ranks[0]["reports"]) == len(cases_of(name)) > len(MASKS) * len(LAYOUTS)


def test_every_rank_sends_what_was_predicted(found):
    for f in found[1]:
        for name, report in f["reports"].items():
            assert isinstance(report, Report)
            assert report.sent == report.predicted, name
            assert report.sent.forward > 0


@pytest.mark.parametrize("heads", ["gqa", "mqa4"])
@pytest.mark.parametrize("degree", [2, 4])
def test_bytes_are_those_of_the_formula(degree, heads):
    """(U - 1) / U * s * D * (2 Hq + 2 H'k) * b, with H'k = max(Hk, U)."""
    (h, hk), s, d = HEADS[heads], 24, 8
    sent = ulysses_comm_bytes(
        ulysses=degree, batch=BATCH, local_len=s, num_heads=h, num_kv_heads=hk, head_dim=d, itemsize=2
    )
    assert sent.forward == sent.backward == BATCH * (degree - 1) / degree * s * d * (2 * h + 2 * max(hk, degree)) * 2


def test_broken_twins_are_caught(found):
    name, ranks = found
    for twin, (*_, plans) in TWINS.items():
        if name in plans:
            assert any(f["twins"][twin] for f in ranks), twin
    if "missing_gradient_sum" in ranks[0]["twins"]:
        # And in nothing but what it breaks.
        assert {t.split(":")[0] for f in ranks for t in f["twins"]["missing_gradient_sum"]} == {"dk", "dv"}


def test_activation_checkpointing_sends_nothing_twice(found):
    for f in found[1]:
        assert f["model"]["equal"]
        plain, recomputed, offloaded, twin = f["model"]["sent"]
        assert plain == recomputed == offloaded
        assert twin[1] > plain[1]
        assert plain[1] > 0


def test_what_does_not_fit_is_refused_before_any_message(found):
    name, ranks = found
    n = PLANS[name][0].ulysses
    for rank, f in enumerate(ranks):
        said = f["refused"]
        assert f"num_heads {n + 1} is not a multiple of ulysses {n}" in said["heads"]
        assert "ulysses 1 with ring" in said["heads"]
        assert f"but this process is ulysses rank {rank % n} of {n}" in said["rank"]
        assert "positions each, but a rank's share of 96" in said["length"]
        assert "use context_parallel_attention" in said["ring"]
        assert "has no mesh" in said["no_mesh"]
        assert f"ulysses={n}" in f["module"]
        assert "keep the ParallelMesh alive" in f["mesh_is_gone"]


def test_chunks_of_heads_change_no_bit_and_no_byte(found):
    for f in found[1]:
        for name, chunked in f["chunks"].items():
            # torch sums the rows of fewer heads in another order. Parts of a group of heads are other products in the reference
            # kernel, and their gradients of keys are summed outside it.
            is_exact = name.startswith("groups")
            for tensor, difference in chunked.apart.items():
                assert difference <= (0.0 if is_exact and tensor != "dsinks" else 1e-5), (name, tensor)
            assert chunked.wrong == [], name
            assert chunked.report.sent == chunked.report.predicted, name
            assert chunked.sent[0] == chunked.sent[1] > 0, name
        assert set(f["chunks"]) == {name for name, *_ in CHUNKED.get(found[0], ())}
    of_several_keys = [name for name in found[1][0]["chunks"] if name not in ("one_key_head", "repeated_parts")]
    assert all(any(f["chunks"][name].twin for f in found[1]) for name in of_several_keys)


def test_the_next_chunk_is_on_its_way_before_attention_with_the_present_one(found):
    name, ranks = found
    if name != "ulysses2":
        pytest.skip("the order is the same on any number of ranks")
    there, out, back, dout = (
        "forward, Q/K/V to heads",
        "forward, output to tokens",
        "backward, gradient of Q/K/V to heads",
        "backward, gradient of output to tokens",
    )
    for f in ranks:
        said = [x for x in f["chunks"]["groups"].said if "lse" not in x]
        assert said == [
            f"post {there}, chunk 1 of 2",
            f"post {there}, chunk 2 of 2",
            f"wait {there}, chunk 1 of 2",
            "attend",
            f"post {out}, chunk 1 of 2",
            f"wait {there}, chunk 2 of 2",
            "attend",
            f"post {out}, chunk 2 of 2",
            f"wait {out}, chunk 1 of 2",
            f"wait {out}, chunk 2 of 2",
            f"post {dout}, chunk 1 of 2",
            f"post {dout}, chunk 2 of 2",
            f"wait {dout}, chunk 1 of 2",
            "attend",
            f"post {back}, chunk 1 of 2",
            f"wait {dout}, chunk 2 of 2",
            "attend",
            f"post {back}, chunk 2 of 2",
            f"wait {back}, chunk 1 of 2",
            f"wait {back}, chunk 2 of 2",
        ]


# ---- the operator in one process


def registered(rank: int) -> None:
    """The operators of a rank, whose messages reach the other rank that does the same."""
    mesh = ParallelMesh.create(ParallelPlan(ulysses=2), device="cpu")
    q, k, v = (torch.randn(2, 6, h, 4, requires_grad=True) for h in (8, 4, 4))
    plan = get_strategy("relay").plan(RingSchedule.build(Causal(), ZigZag(), 0, 1, 12), 1)
    # A chunk has half of the query heads that a key head serves.
    # Compilers see it whole: `test_composition` compiles around it.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for holds in (True, False):
        rest = (*plan, "reference", 0.3, mesh.ring_handle, 0.0, torch.zeros(4), "relay", mesh.head_handle, 2, 4, holds)
        torch.library.opcheck(ULYSSES_ATTENTION_OP, (q, k, v, *rest, True), test_utils=tests)
        with torch.no_grad():
            out, lse, kept = ULYSSES_ATTENTION_OP(q, k, v, *rest, True)
            again = [] if holds else [q, k, v, out]
            backward = torch.ops.longctx.ulysses_attention_backward.default
            torch.library.opcheck(backward, (out, lse, kept, again, *rest, 4), test_utils=tests)


def test_the_operators_are_well_registered():
    run_distributed(registered, world=2)


def test_one_rank_alone_is_plain_attention():
    mesh = ParallelMesh.create(ParallelPlan(), device="cpu")
    q, k, v = (torch.randn(2, 12, h, 4, dtype=torch.float64) for h in (4, 2, 2))
    meta = SequenceMeta.of(12)
    expected = functional.attention(q, k, v, mask=Causal(), return_lse=True)
    for attend in (functional.ulysses_attention, functional.context_parallel_attention):
        got = attend(q, k, v, meta=meta, mesh=mesh, return_lse=True)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.gpu2
def test_ulysses_of_gpus():
    ranks = run_distributed(gpu_worker, world=2, backend="nccl", timeout_s=300)
    assert {(rank, n): r.wrong for rank, rs in enumerate(ranks) for n, r in rs.items() if r.wrong} == {}
    assert all(r.sent == r.predicted for rs in ranks for r in rs.values())


def gpu_worker(rank: int) -> dict[str, Report]:
    found = {}
    for chunks in (None, 1, 2, 4):
        mesh = ParallelMesh.create(ParallelPlan(ulysses=2, ulysses_chunks=chunks), device=torch.device("cuda", rank))
        for mask, heads in itertools.product(("causal", "window_causal", "prefix"), ("gqa8", "gqa", "mqa4")):
            if chunks is None or heads == "gqa8":
                case = Case(mask, "zigzag", torch.bfloat16, heads, 128, 512, kernel="auto", lse_gradient=False)
                found[f"{case}-{chunks}"] = run_case(mesh, case)
                with nothing_held():
                    found[f"{case}-{chunks}-again"] = run_case(mesh, replace(case, holds=False))
    return found
