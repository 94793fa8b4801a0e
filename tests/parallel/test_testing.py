"""Running on several processes: results come back, and so does what went wrong."""

from __future__ import annotations

import os
import sys
import time

import pytest
import torch
import torch.distributed as dist

from longctx.errors import DistributedError
from longctx.parallel.plan import ParallelPlan
from longctx.testing import _PRELOADED, run_distributed, run_virtual_ring


def good(rank: int, base: int) -> tuple:
    x = torch.tensor(rank)
    dist.all_reduce(x)
    return base + rank, int(x), torch.get_num_threads(), os.environ["LONGCTX_TEST"], torch.ones(2)


def test_results_come_back_in_rank_order():
    found = run_distributed(good, 10, world=3, env={"LONGCTX_TEST": "yes"})
    assert [f[:4] for f in found] == [(10 + rank, 3, 1, "yes") for rank in range(3)]
    assert all(torch.equal(f[4], torch.ones(2)) for f in found)
    assert "LONGCTX_TEST" not in os.environ


def one_fails(rank: int) -> None:
    if rank == 1:
        raise ZeroDivisionError("the reason")
    dist.barrier()


def test_a_failing_rank_is_named_with_its_traceback():
    with pytest.raises(DistributedError) as error:
        run_distributed(one_fails, world=3, plan=ParallelPlan(ring=3))
    lines = str(error.value).splitlines()
    assert lines[0] == "[rank 1 of 3 | dp0 pp0 ring1 uly0 tp0] failed"
    assert "in one_fails" in str(error.value)
    assert "ZeroDivisionError: the reason" in lines
    # What became of the others is there too, in a line each.
    assert any(line.startswith(("then [rank ", "still running")) for line in lines)


def one_hangs(rank: int) -> None:
    if rank == 1:
        forgotten()


def forgotten() -> None:
    time.sleep(600)


def test_a_hang_shows_where_every_rank_is():
    start = time.monotonic()
    with pytest.raises(DistributedError) as error:
        run_distributed(one_hangs, world=2, timeout_s=10)
    assert time.monotonic() - start < 30
    message = str(error.value)
    assert message.startswith("[rank 1 of 2] did not end within 10 s")
    assert "in forgotten" in message
    assert "[rank 0 of 2]: done" in message


def exits(rank: int) -> None:
    os._exit(3)


def test_a_rank_that_ends_without_a_word():
    with pytest.raises(DistributedError, match=r"ended without a result \(exit code 3\)"):
        run_distributed(exits, world=2)


def test_a_virtual_ring_gives_results_or_the_first_failure():
    assert run_virtual_ring(lambda mesh, x: mesh.ring.rank + x, 5, world=3) == [5, 6, 7]
    assert run_virtual_ring(lambda mesh: mesh.plan.layout, world=1, layout="striped") == ["striped"]

    def fails(mesh):
        if mesh.ring.rank == 2:
            raise ZeroDivisionError("the reason")
        mesh.exchange.rotate(torch.zeros(1), 1, purpose="p", what="test").wait()

    with pytest.raises(ZeroDivisionError, match="the reason") as error:
        run_virtual_ring(fails, world=3)
    assert error.value.__notes__ == ["on [rank 2 | dp0 pp0 ring2 uly0 tp0] of a virtual ring"]


def imported(rank: int) -> list[bool]:
    return [name in sys.modules for name in (*_PRELOADED, "torch._dynamo")]


def test_processes_are_forked_with_what_training_imports():
    assert run_distributed(imported, world=1) == [[True] * (len(_PRELOADED) + 1)]
