"""Ulysses, alone and around a ring, on real processes against the dense result; and that the check can fail."""

from __future__ import annotations

import pytest
import torch
from ring_cases import BATCH, HEADS, LAYOUTS, MASKS, Report
from ulysses_cases import CHUNKED, PLANS, TWINS, cases_of, gpu_worker, worker

from longctx import functional
from longctx.layout import ZigZag
from longctx.masks import Causal
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.plan import ParallelPlan
from longctx.parallel.schedule import RingSchedule, ulysses_comm_bytes
from longctx.parallel.strategy import get_strategy
from longctx.parallel.ulysses import ULYSSES_ATTENTION_OP
from longctx.sequence import SequenceMeta
from longctx.testing import run_distributed


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
