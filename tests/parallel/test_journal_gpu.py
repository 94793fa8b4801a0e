"""The journal on a GPU, where the host is ahead of the device: on a clock that the test sets, and on a real one."""

from __future__ import annotations

import time

import pytest
import torch

from longctx.parallel.journal import Account, Journal
from longctx.parallel.ring import RING_ATTENTION_BACKWARD_OP, RING_ATTENTION_OP
from longctx.sequence import SequenceMeta
from longctx.testing import run_virtual_ring

BATCH, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 8


class FakeEvent:
    """A CUDA event on a clock that the test sets: recorded work is done once the clock has come to it."""

    now = 0.0
    recorded: list[FakeEvent]

    def __init__(self, enable_timing=False):
        self.is_timed, self.at = enable_timing, None

    def record(self):
        self.at = float(len(FakeEvent.recorded))
        FakeEvent.recorded.append(self)

    def query(self):
        return self.at is not None and self.at <= FakeEvent.now

    def synchronize(self):
        assert self.query(), "the host would wait for the device"

    def elapsed_time(self, end):
        assert self.is_timed
        assert end.is_timed
        return 1000.0 * (end.at - self.at)


def test_on_a_gpu_the_host_is_ahead_and_the_device_decides(monkeypatch):
    FakeEvent.now, FakeEvent.recorded = -1.0, []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    journal = Journal("cuda")
    journal.is_measuring = True
    # The host runs through two layers of two messages at once. Events: begin, (reached, arrived) x 2, end; six a layer.
    for layer in (0, 1):
        journal.enter(layer)
        journal.begin_attention(lambda: 10.0)
        for hop in (1, 2):
            message = journal.post(f"forward, K/V for hop {hop}", to=(1,), source=(2,), num_bytes=100)
            journal.wait(message, lambda: None)
        journal.end_attention()
    posted = "posted up to: layer 1, forward, K/V for hop 2 (to rank 1, from rank 2)"
    stands = []
    for now, said in (
        (-1, "computing, with a message on its way: layer 0, forward, K/V for hop 1"),
        (1, "waiting: layer 0, forward, K/V for hop 1"),
        (2, "computing, with a message on its way: layer 0, forward, K/V for hop 2"),
        (3, "waiting: layer 0, forward, K/V for hop 2"),
        (5, "computing, with a message on its way: layer 1, forward, K/V for hop 1"),
    ):
        FakeEvent.now = now
        standing = journal.standing()
        assert standing.text == f"{said} (to rank 1, from rank 2); {posted}"
        assert standing.is_waiting == said.startswith("waiting")
        stands.append(standing.order)
    assert stands == sorted(stands)
    with pytest.raises(AssertionError, match="the host would wait"):
        journal.take()
    FakeEvent.now = 99
    assert journal.standing().text == "last message, arrived: layer 1, forward, K/V for hop 2 (to rank 1, from rank 2)"


def test_on_a_gpu_times_come_from_events(monkeypatch):
    FakeEvent.now, FakeEvent.recorded = 99.0, []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    journal = Journal("cuda")
    for is_measuring, expected in (
        (False, Account(bytes_sent=100, messages=1)),
        # One second from each event to the next: 3 of the operation, of which 1 was spent waiting.
        (True, Account(exposed_s=1.0, attention_s=2.0, flops=10.0, bytes_sent=100, messages=1)),
    ):
        journal.is_measuring = is_measuring
        journal.enter(None)
        journal.begin_attention(lambda: 10.0)
        journal.wait(journal.post("forward", to=(1,), source=(1,), num_bytes=100), lambda: None)
        journal.end_attention()
        assert journal.take() == expected
        assert journal.take() == Account()


def test_messages_that_nobody_asks_about_are_forgotten(monkeypatch):
    FakeEvent.now, FakeEvent.recorded = -1.0, []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    journal = Journal("cuda")
    for i in range(1000):
        FakeEvent.now = 2.0 * i - 100
        journal.wait(journal.post("forward", to=(1,), source=(1,), num_bytes=1), lambda: None)
    assert len(journal._open) <= 257


def test_a_device_that_failed_is_no_error_here(monkeypatch):
    class Broken(FakeEvent):
        def query(self):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    FakeEvent.recorded = []
    monkeypatch.setattr(torch.cuda, "Event", Broken)
    journal = Journal("cuda")
    journal.wait(journal.post("forward", to=(1,), source=(1,), num_bytes=1), lambda: None)
    assert "forward" in journal.standing().text


def test_the_age_of_a_standing_is_that_of_its_last_change(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    journal = Journal()
    assert journal.standing().age == 0
    now[0] += 5
    assert journal.standing().age == 5
    journal.enter(0)
    message = journal.post("forward", to=(1,), source=(1,), num_bytes=1)
    assert journal.standing().age == 0
    now[0] += 7
    assert journal.standing().age == 7
    journal.wait(message, lambda: None)
    assert journal.standing().age == 0


@pytest.mark.gpu
def test_events_of_a_real_gpu_measure_the_kernels():
    def worker(mesh):
        mesh.journal.is_measuring = True
        meta = SequenceMeta.of(8192, ring_rank=mesh.ring.rank, ring_world=mesh.ring.size)
        q = torch.randn(1, meta.local_len, 8, 128, device="cuda", dtype=torch.bfloat16)
        from longctx.parallel.schedule import RingSchedule

        packed = RingSchedule.build(meta.mask, meta.layout, meta.ring_rank, meta.ring_world, meta.seq_len).packed
        rest = (*packed, "auto", 0.1, mesh.exchange.handle)
        out, lse, held = RING_ATTENTION_OP(q, q, q, *rest)
        RING_ATTENTION_BACKWARD_OP(q, None, q, q, q, out, lse, held, *rest)
        torch.cuda.synchronize()
        standing = mesh.journal.standing()
        return mesh.journal.take(), standing

    for account, standing in run_virtual_ring(worker, world=2, device="cuda"):
        assert account.attention_s > 0
        assert account.exposed_s >= 0
        assert account.flops == 14 * 8192 * 8193 / 2 / 2 * 8 * 128
        assert standing.text.startswith("last message, arrived")
