"""Ranks that are about to attend differently say so, and who differs in what, before any message."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from longctx.errors import DistributedError
from longctx.functional import context_parallel_attention
from longctx.layout import Contiguous, Striped, ZigZag
from longctx.masks import Causal, Documents
from longctx.parallel.agreement import REMEMBERED, Agreement
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.plan import ParallelPlan
from longctx.parallel.schedule import RingSchedule
from longctx.sequence import SequenceMeta
from longctx.testing import run_distributed

SEQ_LEN = 48
PATIENCE_S = 5.0


def agreements(world: int, seconds: float = PATIENCE_S) -> list[Agreement]:
    store = dist.HashStore()
    return [
        Agreement(
            store,
            rank,
            tuple(range(world)),
            name_of=lambda r: f"ring{r}",
            prefix=f"[rank {rank}]",
            timeout=timedelta(seconds=seconds),
        )
        for rank in range(world)
    ]


def schedule(rank: int, mask=None, layout=None, seq_len: int = SEQ_LEN, world: int = 3) -> RingSchedule:
    return RingSchedule.build(mask or Causal(), layout or ZigZag(), rank, world, seq_len)


def compare(calls, *, known: list[Agreement] | None = None, seconds: float = PATIENCE_S):
    """What each rank raises when rank r checks `calls[r]`: schedule, q, k, extra. All at once."""
    everyone = known or agreements(len(calls), seconds)
    raised: list[BaseException | None] = [None] * len(calls)

    def work(rank):
        try:
            *call, extra = calls[rank]
            everyone[rank].check(*call, extra=extra)
        except BaseException as error:
            raised[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def call(rank, *, heads=4, kv_heads=2, batch=1, dtype=torch.float32, extra="", **settings):
    of = schedule(rank, **settings)
    local = of.seq_len // of.world
    q, k = (torch.empty(batch, local, h, 8, dtype=dtype) for h in (heads, kv_heads))
    return of, q, k, extra


@pytest.mark.parametrize(
    ("odd", "what", "shown"),
    [
        ({"mask": Documents((0, 20, SEQ_LEN)) & Causal()}, "mask (documents, window)", "mask (documents, window) "),
        ({"layout": Striped()}, "layout", "layout Striped(block=1) over a ring of 3"),
        ({"seq_len": 96}, "sequence, batch, mask (documents, window)", "sequence 96 positions"),
        ({"kv_heads": 4}, "heads", "heads 4 / 4 of 8 in torch.float32"),
        ({"dtype": torch.bfloat16}, "heads", "in torch.bfloat16"),
        ({"batch": 2}, "batch", "batch 2 x 16 local tokens"),
        ({"extra": "allgather"}, "strategy", "strategy allgather"),
    ],
    ids=["documents", "layout", "length", "heads", "dtype", "batch", "strategy"],
)
def test_a_difference_is_an_error_on_every_rank_that_names_who_and_what(odd, what, shown):
    raised = compare([call(0), call(1, **odd), call(2)])
    for rank, error in enumerate(raised):
        assert isinstance(error, DistributedError)
        first, *lines, last = str(error).splitlines()
        assert first.startswith(f"[rank {rank}] the ranks that share a sequence are about to attend differently, in ")
        assert set(what.split(", ")) <= set(first.split(", in ", 1)[1].split(", "))
        assert lines[0].startswith("       rank 0 (ring0), rank 2 (ring2): ")
        assert lines[1].startswith("       rank 1 (ring1): ")
        assert shown in lines[1]
        assert "the same documents" in last


def test_documents_that_end_elsewhere_but_make_the_same_messages_are_told_too():
    """Nothing would hang; the result would be wrong."""
    masks = [Documents((0, cut, SEQ_LEN)) & Causal() for cut in (20, 21, 20)]
    distances = {schedule(r, mask).distances for r, mask in enumerate(masks)}
    assert len(distances) == 1
    raised = compare([call(r, mask=mask) for r, mask in enumerate(masks)])
    assert all("mask (documents, window)" in str(error) for error in raised)


def test_what_was_compared_is_not_compared_again():
    everyone = agreements(3)
    for _ in range(3):
        for mask in (Causal(), Documents((0, 20, SEQ_LEN)) & Causal()):
            assert compare([call(r, mask=mask) for r in range(3)], known=everyone) == [None] * 3
    assert [a.comparisons for a in everyone] == [2, 2, 2]


def test_notes_do_not_pile_up_in_the_store():
    everyone = agreements(2)
    store = everyone[0]._store
    for cut in range(1, 11):
        mask = Documents((0, cut, SEQ_LEN)) & Causal()
        assert compare([call(r, mask=mask, world=2) for r in range(2)], known=everyone) == [None, None]
    assert store.num_keys() <= 4
    assert all(len(a._agreed) == 10 for a in everyone)
    assert REMEMBERED >= 10


def test_a_rank_that_does_not_come_is_named():
    start = time.monotonic()
    early, _, late = agreements(3, seconds=1.0)

    def comes_too():
        with pytest.raises(DistributedError):
            late.check(*call(2)[:3])

    thread = threading.Thread(target=comes_too)
    thread.start()
    with pytest.raises(DistributedError, match=r"rank 1 \(ring1\) did not come to that"):
        early.check(*call(0)[:3])
    thread.join()
    assert time.monotonic() - start < 10


def test_one_rank_alone_compares_nothing():
    (alone,) = agreements(1)
    alone.check(*call(0, world=1)[:3])
    assert alone.comparisons == 0


def worker(rank: int, plan: ParallelPlan, is_checked: bool) -> tuple[str | None, int]:
    mesh = ParallelMesh.create(plan, device="cpu", timeout=timedelta(seconds=20))
    if not is_checked:
        mesh.agreement._store = None
    # The last rank has other documents than the rest, which make the same messages.
    cut = 21 if rank == mesh.world_size - 1 else 20
    error = None
    try:
        for mask in (Causal(), Documents((0, cut, SEQ_LEN)) & Causal()):
            meta = SequenceMeta.of(
                SEQ_LEN,
                mask=mask,
                layout=Contiguous(),
                ring_rank=mesh.ring.rank,
                ring_world=mesh.ring.size,
                ulysses_rank=mesh.ulysses.rank,
                ulysses_world=mesh.ulysses.size,
            )
            q = torch.ones(1, meta.local_len, 4, 8, requires_grad=True)
            before = mesh.exchange.bytes_sent + mesh.head_exchange.bytes_sent
            context_parallel_attention(q, q, q, meta=meta, mesh=mesh, kernel="reference").sum().backward()
    except DistributedError as caught:
        error = str(caught)
    return error, mesh.exchange.bytes_sent + mesh.head_exchange.bytes_sent - before


@pytest.mark.parametrize("plan", [ParallelPlan(ring=3), ParallelPlan(ulysses=2)], ids=["ring", "ulysses"])
def test_processes_with_different_documents_are_told_before_any_message(plan):
    world = plan.sp
    for error, sent in run_distributed(worker, plan, True, world=world):
        odd = f"rank {world - 1} (dp0 pp0 ring{plan.ring - 1} uly{plan.ulysses - 1} tp0): mask (documents, window) "
        assert error is not None
        assert f"\n       {odd}" in error
        assert sent == 0


def test_without_the_comparison_they_would_train_on():
    """The broken twin: no error, and messages are exchanged. Other strategies than the relay would send other sizes."""
    for error, sent in run_distributed(worker, ParallelPlan(ring=3, strategy="relay"), False, world=3):
        assert error is None
        assert sent > 0
