"""The mesh on four processes: who is on which axis, and that every group really connects its ranks."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from longctx.errors import DistributedError, PlanError
from longctx.parallel.mesh import Axis, ParallelMesh
from longctx.parallel.plan import ParallelPlan
from longctx.parallel.transport import NcclSettings
from longctx.testing import run_distributed

AXES = ("ring", "ulysses", "tp", "sp", "dp", "grad", "pp")


def _axes(mesh: ParallelMesh) -> dict[str, Axis]:
    return {name: getattr(mesh, name) for name in AXES}


def _sums(mesh: ParallelMesh) -> dict[str, int]:
    """The sum of 10^rank over each axis: shows exactly who took part."""
    sums = {}
    for name, axis in _axes(mesh).items():
        x = torch.tensor(10**mesh.rank)
        if axis.group is not None:
            dist.all_reduce(x, group=axis.group)
        sums[name] = int(x)
    return sums


def _neighbours(mesh: ParallelMesh) -> list[int]:
    """Global ranks heard from one step behind and one step ahead on the ring."""
    token = torch.tensor([mesh.rank])
    return [int(mesh.exchange.rotate(token, shift, purpose="test", what="test").wait()) for shift in (1, -1)]


def mesh_worker(rank: int) -> dict:
    found = {}
    meshes = {}
    # Six meshes in one process, alive together.
    for name, plan in {
        "dp2_ring2": ParallelPlan(ring=2),
        "ring4": ParallelPlan(ring=4, layout="striped", grad_dtype="bf16"),
        "dp4": ParallelPlan(),
        "ring2_ulysses2": ParallelPlan(ring=2, ulysses=2),
        "ulysses4": ParallelPlan(ulysses=4),
        "pp2_tp2": ParallelPlan(pp=2, tp=2),
    }.items():
        meshes[name] = ParallelMesh.create(plan, device="cpu")
    for name, mesh in meshes.items():
        found[name] = {
            "prefix": mesh.prefix,
            "ranks": {n: a.ranks for n, a in _axes(mesh).items()},
            "places": {n: a.rank for n, a in _axes(mesh).items()},
            "without_group": [n for n, a in _axes(mesh).items() if a.group is None],
            "sums": _sums(mesh),
            "neighbours": _neighbours(mesh) if mesh.ring.size > 1 else None,
            "handle": mesh.exchange.handle,
            "grad_dtype": mesh.exchange.grad_dtype,
            "same_exchange": mesh.exchange is mesh.exchange,
            "dp": mesh.plan.dp,
            "shares_group": [
                (a.name, b.name)
                for a in (mesh.ring, mesh.ulysses, mesh.tp)
                for b in _axes(mesh).values()
                if a is not b and a.group is not None and a.group is b.group
            ],
        }
    try:
        ParallelMesh.create(ParallelPlan(ring=3), device="cpu")
    except PlanError as error:
        found["refused"] = str(error)
    try:
        ParallelMesh.create(ParallelPlan(ring=4), device="xpu")
    except DistributedError as error:
        found["wrong_backend"] = str(error)
    return found


@pytest.fixture(scope="module")
def found() -> list[dict]:
    return run_distributed(mesh_worker, world=4)


def test_axes(found):
    ranks = [f["dp2_ring2"]["ranks"] for f in found]
    assert [r["ring"] for r in ranks] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert [r["sp"] for r in ranks] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert [r["dp"] for r in ranks] == [(0, 2), (1, 3), (0, 2), (1, 3)]
    assert {r["grad"] for r in ranks} == {(0, 1, 2, 3)}
    assert [f["dp2_ring2"]["places"]["ring"] for f in found] == [0, 1, 0, 1]
    assert [f["dp2_ring2"]["places"]["dp"] for f in found] == [0, 0, 1, 1]
    assert found[3]["dp2_ring2"]["prefix"] == "[rank 3 | dp1 pp0 ring1 uly0 tp0]"


@pytest.mark.parametrize("name", ["dp2_ring2", "ring4", "dp4", "ring2_ulysses2", "ulysses4", "pp2_tp2"])
def test_groups_connect_the_ranks_of_their_axis(found, name):
    for f in found:
        assert f[name]["sums"] == {axis: sum(10**r for r in ranks) for axis, ranks in f[name]["ranks"].items()}
        assert f[name]["without_group"] == [axis for axis, ranks in f[name]["ranks"].items() if len(ranks) == 1]
        assert f[name]["same_exchange"]
        # Reductions never stand in attention's way.
        assert not f[name]["shares_group"]


def test_gradients_travel_as_the_plan_says(found):
    for f in found:
        assert f["ring4"]["grad_dtype"] == torch.bfloat16
        assert f["dp2_ring2"]["grad_dtype"] is None


def test_rings_are_closed(found):
    assert [f["ring4"]["neighbours"] for f in found] == [[3, 1], [0, 2], [1, 3], [2, 0]]
    assert [f["dp2_ring2"]["neighbours"] for f in found] == [[1, 1], [0, 0], [3, 3], [2, 2]]
    for f in found:
        assert f["dp4"]["handle"] not in ("", f["ring4"]["handle"])
        assert f["dp4"]["dp"] == 4
        assert f["ring4"]["handle"] != f["dp2_ring2"]["handle"] != ""


def test_ulysses_ranks_are_neighbours_and_each_is_on_a_ring_of_its_own(found):
    ranks = [f["ring2_ulysses2"]["ranks"] for f in found]
    assert [r["ulysses"] for r in ranks] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert [r["ring"] for r in ranks] == [(0, 2), (1, 3), (0, 2), (1, 3)]
    assert {r["sp"] for r in ranks} == {(0, 1, 2, 3)}
    assert [f["ring2_ulysses2"]["neighbours"] for f in found] == [[2, 2], [3, 3], [0, 0], [1, 1]]
    assert [f["ulysses4"]["places"]["ulysses"] for f in found] == [0, 1, 2, 3]


def test_tp_ranks_are_neighbours_and_stages_lie_far_apart(found):
    ranks = [f["pp2_tp2"]["ranks"] for f in found]
    assert [r["tp"] for r in ranks] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert [r["pp"] for r in ranks] == [(0, 2), (1, 3), (0, 2), (1, 3)]
    assert [r["grad"] for r in ranks] == [(0,), (1,), (2,), (3,)]


def test_every_rank_refuses_a_plan_that_does_not_fit(found):
    assert {f["refused"] for f in found} == {found[0]["refused"]}
    assert "world size 4 is not a multiple" in found[0]["refused"]


def test_a_backend_that_cannot_carry_the_device_is_refused(found):
    for f in found:
        assert "'gloo' cannot carry xpu tensors" in f["wrong_backend"]


def test_one_process_needs_no_process_group():
    assert not dist.is_initialized()
    mesh = ParallelMesh.create(ParallelPlan(), device="cpu")
    assert (mesh.rank, mesh.world_size, mesh.plan.dp) == (0, 1, 1)
    assert all(axis.group is None and axis.ranks == (0,) for axis in _axes(mesh).values())
    assert mesh.exchange.world == 1


def test_several_processes_need_one():
    with pytest.raises(DistributedError, match="torchrun"):
        ParallelMesh.create(ParallelPlan(ring=2), device="cpu")
    with pytest.raises(DistributedError, match="torchrun"):
        ParallelMesh.create(ParallelPlan(dp=2), device="cpu")


def test_nccl_settings_are_of_gpus():
    with pytest.raises(DistributedError, match="only GPUs use NCCL"):
        ParallelMesh.create(ParallelPlan(), device="cpu", nccl=NcclSettings(max_sms=4))
    with pytest.raises(PlanError, match="at least 1 SM"):
        NcclSettings(max_sms=0)


def test_nccl_settings_reach_the_group(monkeypatch):
    class Options:
        def __init__(self, is_high_priority_stream):
            self.is_high_priority_stream, self.config = is_high_priority_stream, SimpleNamespace(max_ctas=None)

    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(Options=Options), raising=False)
    timeout = timedelta(seconds=7)
    by_default, held = (s.options(timeout) for s in (NcclSettings(), NcclSettings(max_sms=8, has_priority=False)))
    assert (by_default.is_high_priority_stream, by_default.config.max_ctas, by_default._timeout) == (
        True,
        None,
        timeout,
    )
    assert (held.is_high_priority_stream, held.config.max_ctas) == (False, 8)


def gpu_worker(rank: int) -> list[float]:
    found = []
    for settings in (NcclSettings(max_sms=2), NcclSettings(has_priority=False)):
        mesh = ParallelMesh.create(ParallelPlan(ring=2), device=torch.device("cuda", rank), nccl=settings)
        token = torch.full((1 << 20,), float(rank), device="cuda")
        found.append(float(mesh.exchange.rotate(token, 1, purpose="test", what="test").wait().mean()))
    return found


@pytest.mark.gpu2
def test_messages_arrive_with_few_sms():
    assert run_distributed(gpu_worker, world=2, backend="nccl", timeout_s=120) == [[1.0, 1.0], [0.0, 0.0]]
