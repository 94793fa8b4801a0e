"""Messages of a ring: what arrives, which buffers it lies in, and what happens when a peer is gone."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta

import pytest
import torch

from longctx.errors import DistributedError
from longctx.functional import ring_attention
from longctx.layout import ZigZag
from longctx.parallel.exchange import RingExchange, get_exchange
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.plan import ParallelPlan
from longctx.sequence import SequenceMeta
from longctx.testing import run_distributed, run_virtual_ring

# Longer than any message takes on a busy machine, short enough to wait for.
PEER_TIMEOUT_S = 8


def rotations(mesh: ParallelMesh) -> dict[int, int]:
    own = torch.tensor([mesh.ring.rank])
    return {
        shift: int(mesh.exchange.rotate(own, shift, purpose="p", what="test").wait()) for shift in (1, 2, -1, -3, 6)
    }


def test_a_shift_of_i_brings_what_is_i_behind():
    world = 5
    for rank, found in enumerate(run_virtual_ring(rotations, world=world)):
        assert found == {shift: (rank - shift) % world for shift in found}


def relays(mesh: ParallelMesh) -> tuple[set[int], list[float], float, int]:
    """Pass a block on three times, and another purpose's in between."""
    exchange = mesh.exchange
    block = torch.full((4,), float(mesh.ring.rank))
    mine = block.clone()
    kept = torch.empty(4)
    addresses, values = set(), []
    for i in range(6):
        other = exchange.rotate(torch.full((2,), 100.0 + mesh.ring.rank), 1, purpose="other", what="test")
        block = exchange.rotate(block, 1, purpose="block", what="test", into=kept if i == 5 else None).wait()
        addresses.add(block.data_ptr())
        values.append(block[0].item())
        assert other.wait()[0].item() == 100.0 + (mesh.ring.rank - 1) % mesh.ring.size
    assert block.data_ptr() == kept.data_ptr()
    assert torch.equal(mine, torch.full((4,), float(mesh.ring.rank)))
    addresses.discard(kept.data_ptr())
    return addresses, values, kept[0].item(), exchange.bytes_sent


def test_two_buffers_serve_any_number_of_messages():
    for rank, (addresses, values, kept, sent) in enumerate(run_virtual_ring(relays, world=4)):
        assert len(addresses) == 2
        assert values == [(rank - i) % 4 for i in range(1, 7)]
        assert kept == values[-1]
        assert sent == 6 * (4 + 2) * 4


def grow(mesh: ParallelMesh) -> list[float]:
    found = []
    for shape, dtype in (
        ((3,), torch.float32),
        ((2, 5), torch.float64),
        ((3,), torch.bfloat16),
        ((4, 4), torch.float32),
    ):
        x = torch.full(shape, float(mesh.ring.rank), dtype=dtype)
        got = mesh.exchange.rotate(x, 1, purpose="p", what="test").wait()
        assert got.shape == x.shape
        assert got.dtype == dtype
        found.append(got.flatten()[-1].item())
    return found


def test_buffers_fit_any_shape_and_dtype():
    for rank, found in enumerate(run_virtual_ring(grow, world=2)):
        assert found == [1 - rank] * 4


def test_only_contiguous_tensors_are_sent():
    def worker(mesh):
        mesh.exchange.rotate(torch.zeros(2, 3).t(), 1, purpose="p", what="test")

    with pytest.raises(AssertionError, match="contiguous"):
        run_virtual_ring(worker, world=2)


def test_a_handle_lives_as_long_as_its_mesh():
    def worker(mesh):
        assert get_exchange(mesh.exchange.handle) is mesh.exchange
        return mesh.exchange.handle

    handles = run_virtual_ring(worker, world=2)
    assert len(set(handles)) == 2
    with pytest.raises(DistributedError, match="keep the ParallelMesh alive"):
        get_exchange(handles[0])
    assert get_exchange("").world == 1


def test_the_error_names_message_and_peers():
    said = []

    def worker(mesh):
        if mesh.ring.rank == 1:
            raise ZeroDivisionError
        if mesh.ring.rank == 2:
            with pytest.raises(DistributedError) as error:
                mesh.exchange.rotate(torch.zeros(1), 1, purpose="p", what="forward, K/V for hop 1").wait()
            said.append(str(error.value))

    with pytest.raises(ZeroDivisionError):
        run_virtual_ring(worker, world=3)
    assert said[0].startswith(
        "[rank 2 | dp0 pp0 ring2 uly0 tp0] forward, K/V for hop 1: sending to ring rank 0 (rank 0) and receiving from "
        "ring rank 1 (rank 1) failed: ring rank 1 failed\n"
    )


def attend(mesh: ParallelMesh) -> None:
    meta = SequenceMeta.of(24, layout=ZigZag(), ring_rank=mesh.ring.rank, ring_world=mesh.ring.size)
    q = torch.randn(1, 24 // mesh.ring.size, 2, 8, requires_grad=True)
    ring_attention(q, q, q, meta=meta, mesh=mesh, kernel="reference").sum().backward()


def bereaved_worker(rank: int, how: str) -> tuple[str, float]:
    """All attend once; then rank 1 dies or freezes, and the others attend again."""
    mesh = ParallelMesh.create(ParallelPlan(ring=3), device="cpu", timeout=timedelta(seconds=PEER_TIMEOUT_S))
    attend(mesh)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    start = time.monotonic()
    try:
        for _ in range(3):
            attend(mesh)
    except DistributedError as error:
        return str(error), time.monotonic() - start
    return "nothing happened", 0.0


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_a_rank_that_is_gone_is_an_error_and_not_a_hang(how):
    found = run_distributed(bereaved_worker, how, world=3, abandon={1}, timeout_s=60)
    assert found[1] is None
    for rank in (0, 2):
        message, seconds = found[rank]
        assert message.startswith(f"[rank {rank} | dp0 pp0 ring{rank} uly0 tp0] ")
        assert "hop" in message
        assert "(rank 1)" in message
        assert seconds < 4 * PEER_TIMEOUT_S


def test_a_ring_of_one_sends_nothing():
    exchange = RingExchange(None)
    exchange.warm_up(torch.device("cpu"))
    assert (exchange.world, exchange.rank, exchange.bytes_sent, exchange.handle) == (1, 0, 0, "")
