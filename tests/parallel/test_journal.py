"""What a journal says of a rank's messages: where it stands, who is behind, and what it took, on a CPU and on a GPU's clock."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
from ring_cases import SEQ_LEN

from longctx.attention import ParallelAttention
from longctx.functional import ring_attention
from longctx.masks import Causal, Documents, SlidingWindow
from longctx.parallel.exchange import RingExchange
from longctx.parallel.journal import Account, Standing
from longctx.parallel.loss import LMHead
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.plan import ParallelPlan
from longctx.parallel.strategy import DirectStrategy, GatherStrategy, strategy_names
from longctx.parallel.tensor import TensorParallel
from longctx.sequence import SequenceMeta
from longctx.testing import run_distributed, run_virtual_ring

BATCH, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 8


def inputs(meta: SequenceMeta, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(meta.ring_rank)
    return [
        torch.randn(BATCH, meta.local_len, h, HEAD_DIM, generator=generator).to(device, dtype).requires_grad_()
        for h in (HEADS, KV_HEADS, KV_HEADS)
    ]


def meta_of(mesh: ParallelMesh, mask=None) -> SequenceMeta:
    return SequenceMeta.of(
        SEQ_LEN,
        mask=mask,
        ring_rank=mesh.ring.rank,
        ring_world=mesh.ring.size,
        ulysses_rank=mesh.ulysses.rank,
        ulysses_world=mesh.ulysses.size,
    )


def noted(mesh: ParallelMesh) -> list[str]:
    """Every message of the mesh from now on."""
    said: list[str] = []
    post = mesh.journal.post

    def remembering(*args, **settings):
        message = post(*args, **settings)
        said.append(str(message))
        return message

    mesh.journal.post = remembering
    return said


# What rank 1 of 3 sends of one layer.
MESSAGES = {
    "relay": [
        "layer 7, forward, K/V for hop 1 (to rank 2, from rank 0)",
        "layer 7, forward, K/V for hop 2 (to rank 2, from rank 0)",
        "layer 7, backward, K/V for hop 1 (to rank 0, from rank 2)",
        "layer 7, backward, dK/dV after hop 2 (to rank 0, from rank 2)",
        "layer 7, backward, dK/dV after hop 1 (to rank 0, from rank 2)",
    ],
    "direct": [
        "layer 7, forward, K/V for hop 1 (to rank 2, from rank 0)",
        "layer 7, forward, K/V for hop 2 (to rank 0, from rank 2)",
        "layer 7, backward, K/V for hop 1 (to rank 2, from rank 0)",
        "layer 7, backward, dK/dV of hop 2 (to rank 2, from rank 0)",
        "layer 7, backward, dK/dV of hop 1 (to rank 0, from rank 2)",
    ],
    DirectStrategy(holds=False): [
        "layer 7, forward, K/V for hop 1 (to rank 2, from rank 0)",
        "layer 7, forward, K/V for hop 2 (to rank 0, from rank 2)",
        "layer 7, backward, K/V for hop 2 (to rank 0, from rank 2)",
        "layer 7, backward, K/V for hop 1 (to rank 2, from rank 0)",
        "layer 7, backward, dK/dV of hop 2 (to rank 2, from rank 0)",
        "layer 7, backward, dK/dV of hop 1 (to rank 0, from rank 2)",
    ],
    GatherStrategy(groups=1): [
        "layer 7, forward, K/V for hop 1, heads 0 to 1 (to rank 2, from rank 0)",
        "layer 7, forward, K/V for hop 2, heads 0 to 1 (to rank 0, from rank 2)",
        "layer 7, backward, K/V for hop 1, heads 0 to 1 (to rank 2, from rank 0)",
        "layer 7, backward, K/V for hop 2, heads 0 to 1 (to rank 0, from rank 2)",
        "layer 7, backward, dK/dV of hop 1, heads 0 to 1 (to rank 0, from rank 2)",
        "layer 7, backward, dK/dV of hop 2, heads 0 to 1 (to rank 2, from rank 0)",
    ],
}


@pytest.mark.parametrize("strategy", MESSAGES, ids=str)
def test_messages_name_layer_direction_hop_and_peers(strategy):
    def worker(mesh):
        said = noted(mesh)
        meta = meta_of(mesh)
        out = ParallelAttention(mesh, kernel="reference", layer=7, strategy=strategy)(*inputs(meta), meta)
        out.sum().backward()
        return said

    assert run_virtual_ring(worker, world=3)[1] == MESSAGES[strategy]


def ulysses_worker(rank: int) -> tuple[list[str], Account, int]:
    mesh = ParallelMesh.create(ParallelPlan(ulysses=2), device="cpu", timeout=timedelta(seconds=30))
    mesh.journal.is_measuring = True
    mesh.journal.discard()
    said = noted(mesh)
    meta = meta_of(mesh)
    out = ParallelAttention(mesh, kernel="reference", layer=3)(*inputs(meta), meta)
    out.sum().backward()
    return said, mesh.journal.take(), mesh.head_exchange.bytes_sent


def test_messages_of_ulysses_are_noted_too():
    for said, account, sent in run_distributed(ulysses_worker, world=2):
        assert said == [
            "layer 3, forward, Q/K/V to heads (with ranks 0, 1)",
            "layer 3, forward, output to tokens (with ranks 0, 1)",
            "layer 3, backward, gradient of output to tokens (with ranks 0, 1)",
            "layer 3, backward, gradient of Q/K/V to heads (with ranks 0, 1)",
        ]
        assert account.bytes_sent == sent > 0
        assert account.flops > 0, "a ring of one computes the attention"


def tensor_worker(rank: int) -> dict[str, object]:
    mesh = ParallelMesh.create(ParallelPlan(tp=2), device="cpu", timeout=timedelta(seconds=30))
    mesh.journal.is_measuring = True
    said = noted(mesh)
    x = torch.ones(1, 4, 2, requires_grad=True)
    for shards_tokens in (False, True):
        tensor = replace(TensorParallel.of(mesh.for_layer(5)), shards_tokens=shards_tokens)
        tensor.leave(tensor.enter(x) * 2).sum().backward()
    hidden = torch.ones(1, 4, 2, requires_grad=True)
    head = LMHead(2, 6, tensor=TensorParallel.of(mesh))
    torch.nn.init.ones_(head.weight)
    head(hidden, torch.zeros(1, 4, dtype=torch.int64)).backward()
    standing = mesh.journal.standing()
    if rank == 1:
        time.sleep(1.0)
    late = threading.Thread(
        target=lambda: mesh.tensor_exchange.all_reduce(torch.ones(1), what="forward, tp sum", layer=8)
    )
    late.start()
    time.sleep(0.3)
    waiting = mesh.journal.standing()
    late.join()
    return {
        "said": said,
        "account": mesh.journal.take(),
        "standing": standing.text,
        "waiting": (waiting.is_waiting, waiting.text),
    }


def test_messages_of_tensor_parallelism_are_noted_and_not_accounted_for():
    found = run_distributed(tensor_worker, world=2)
    for f in found:
        assert f["said"][:7] == [
            "layer 5, forward, tp sum (with ranks 0, 1)",
            "layer 5, backward, tp sum of a gradient (with ranks 0, 1)",
            "layer 5, forward, tp tokens gathered (with ranks 0, 1)",
            "layer 5, forward, tp sum scattered (with ranks 0, 1)",
            "layer 5, backward, tp gradient gathered (with ranks 0, 1)",
            "layer 5, backward, tp gradient scattered (with ranks 0, 1)",
            "loss, tp maxima of logits (with ranks 0, 1)",
        ]
        assert "loss, tp sums of exponentials (with ranks 0, 1)" in f["said"]
        assert f["account"] == Account()
        assert f["standing"].startswith("last message, arrived: ")
    is_waiting, text = found[0]["waiting"]
    assert is_waiting
    assert text == "waiting for 0 s: layer 8, forward, tp sum (with ranks 0, 1)"


@pytest.mark.parametrize("strategy", strategy_names())
@pytest.mark.parametrize(
    "mask",
    [Causal(), SlidingWindow(5) & Causal(), Documents(((0, 7, SEQ_LEN), (0, 30, SEQ_LEN))) & Causal()],
    ids=["causal", "window", "own_docs"],
)
def test_an_account_holds_the_bytes_and_the_flops_of_the_mask(mask, strategy):
    def worker(mesh):
        meta = meta_of(mesh, mask)
        mesh.journal.is_measuring = True
        out = ring_attention(*inputs(meta), meta=meta, mesh=mesh, kernel="reference", strategy=strategy)
        forward = mesh.journal.take()
        sent = mesh.exchange.bytes_sent
        out.sum().backward()
        return forward, sent, mesh.journal.take(), mesh.exchange.bytes_sent - sent

    found = run_virtual_ring(worker, world=4)
    area = mask.area(SEQ_LEN) * (1 if mask.batch else BATCH)
    assert sum(f.flops for f, *_ in found) == 4 * area * HEADS * HEAD_DIM
    assert sum(b.flops for _, _, b, _ in found) == 10 * area * HEADS * HEAD_DIM
    for forward, sent, backward, sent_back in found:
        assert (forward.bytes_sent, backward.bytes_sent) == (sent, sent_back)
        assert forward.attention_s > 0
        assert backward.attention_s > 0


def test_nothing_is_kept_where_nothing_is_measured():
    def worker(mesh):
        meta = meta_of(mesh)
        ring_attention(*inputs(meta), meta=meta, mesh=mesh, kernel="reference")
        account = mesh.journal.take()
        return account.exposed_s, account.attention_s, account.flops, account.messages

    assert run_virtual_ring(worker, world=2) == [(0.0, 0.0, 0.0, 1)] * 2


def test_waiting_for_a_late_rank_is_exposed_and_no_part_of_attention():
    is_waited_for = threading.Event()

    def worker(mesh):
        began, wait = time.perf_counter(), mesh.journal.wait

        def telling(message, arrive):
            return wait(message, lambda: (is_waited_for.set(), arrive())[1])

        meta = meta_of(mesh)
        mesh.journal.is_measuring = True
        if mesh.ring.rank == 1:
            # However long the other takes until then on a busy machine.
            assert is_waited_for.wait(20)
            time.sleep(0.3)
        else:
            mesh.journal.wait = telling
        ring_attention(*inputs(meta), meta=meta, mesh=mesh, kernel="reference")
        return mesh.journal.take(), time.perf_counter() - began

    (on_time, took), (late, _) = run_virtual_ring(worker, world=2)
    assert on_time.exposed_s >= 0.3
    assert on_time.attention_s + on_time.exposed_s <= took
    assert late.exposed_s < on_time.exposed_s


@pytest.mark.parametrize("strategy", ["relay", "direct"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_rank_that_is_behind_has_the_least_standing(when, strategy, monkeypatch):
    """Rank 1 stops before it posts the message for hop 2, or after: no other rank stands as far back."""
    stop, is_there = threading.Event(), threading.Event()
    post = RingExchange._post

    def halting(self, send, receive, shift, room, what):
        is_it = self.rank == 1 and what == "forward, K/V for hop 2"
        flying = post(self, send, receive, shift, room, what) if when == "after" or not is_it else None
        if is_it:
            is_there.set()
            stop.wait(20)
        return flying or post(self, send, receive, shift, room, what)

    monkeypatch.setattr(RingExchange, "_post", halting)
    meshes = {}

    def worker(mesh):
        meshes[mesh.rank] = mesh
        meta = meta_of(mesh)
        for _ in range(2):
            ring_attention(*inputs(meta), meta=meta, mesh=mesh, kernel="reference", strategy=strategy)

    ring = threading.Thread(target=run_virtual_ring, args=(worker,), kwargs={"world": 4})
    ring.start()
    try:
        assert is_there.wait(20)
        deadline = time.monotonic() + 20
        others = (0, 2, 3)
        # Until they rest: on a busy machine a rank that waits for hop 1 may have it a moment later.
        stands: dict[int, Standing] = {}
        while len(meshes) < 4 or not all(stands and stands[r].is_waiting and stands[r].age > 0.3 for r in others):
            assert time.monotonic() < deadline
            time.sleep(0.05)
            stands = {r: mesh.journal.standing() for r, mesh in sorted(meshes.items())} if len(meshes) == 4 else {}
    finally:
        stop.set()
        ring.join()
    assert all(stands[1].order < stands[r].order for r in others), stands
    assert re.match(r"waiting for \d+ s: forward, K/V for hop", stands[2].text) or when == "after"
