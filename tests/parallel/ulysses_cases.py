"""What the ranks of Ulysses do, alone and around a ring: cases, broken twins of the code, and what each process finds."""

from __future__ import annotations

import contextlib
import functools
import itertools
from dataclasses import dataclass, replace
from types import SimpleNamespace
from unittest import mock

import torch
from ring_cases import BATCH, HEADS, LAYOUTS, MASKS, Case, Report, odd_cases, run_case

from longctx import calls, functional
from longctx import model as model_module
from longctx.attention import ParallelAttention
from longctx.errors import DistributedError, ShapeError
from longctx.masks import Causal, SlidingWindow
from longctx.model import ModelConfig, Transformer
from longctx.parallel import ulysses
from longctx.parallel.journal import Journal
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.plan import ParallelPlan
from longctx.parallel.ulysses import ULYSSES_ATTENTION_OP
from longctx.sequence import SequenceMeta

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
