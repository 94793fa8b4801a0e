"""The process groups of a plan: the only place that makes or holds any."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from longctx.errors import DistributedError
from longctx.parallel.agreement import Agreement
from longctx.parallel.exchange import Link, RingExchange, at_layer
from longctx.parallel.head_exchange import GroupHeadLink, HeadExchange, HeadLink
from longctx.parallel.journal import Journal
from longctx.parallel.plan import Coords, ParallelPlan
from longctx.parallel.tensor_exchange import TensorExchange
from longctx.parallel.transport import are_in_one_node, ring_link

DEFAULT_TIMEOUT = timedelta(minutes=10)

_AXES = ("ring", "ulysses", "tp", "sp", "dp", "grad", "pp")
# Their groups are never shared: reductions of gradients run during the backward pass and would stand in the layers' way.
_OF_LAYERS = ("ring", "ulysses", "tp")


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh, as one rank sees it.

    Args:
        name: ring, ulysses, tp, sp, dp, grad or pp.
        rank: this process's place on the axis.
        ranks: the global ranks on it, in axis order.
        group: their process group; None for an axis of one.
    """

    name: str
    rank: int
    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None

    @property
    def size(self) -> int:
        return len(self.ranks)


class ParallelMesh:
    """A plan brought to life in this process: who it is, and its process groups by purpose.

    Axes:
        ring: the processes that pass keys and values of one sequence round. Its group carries nothing else.
        ulysses: the processes that exchange parts of a ring shard for parts of the heads. Its group too carries nothing
            else.
        sp: the processes that share one sequence: ring x ulysses, in the order ring_rank * ulysses + ulysses_rank.
        dp: those that hold the same part of different sequences.
        grad: dp x sp, over which gradients are averaged and losses summed.
        tp: those that share each matrix. Its group carries what layers send and nothing else.
        pp: those that hold the same tokens in the stages of a pipeline, from the first to the last.

    Several meshes may live in one process. Make one with `ParallelMesh.create`, at the same place of the program on every
    rank.

    Attributes:
        journal: the messages of this process over this mesh.
        agreement: compares what the ranks of `sp` are about to attend to.
    """

    def __init__(
        self,
        plan: ParallelPlan,
        rank: int,
        *,
        device: torch.device,
        groups: dict[str, dist.ProcessGroup | None],
        link: Link | None,
        head_link: HeadLink | None = None,
        grad_dtype: torch.dtype | None = None,
        ring_in_one_node: bool = True,
        ulysses_in_one_node: bool = True,
        store: dist.Store | None = None,
        timeout: timedelta = DEFAULT_TIMEOUT,
    ) -> None:
        self.plan = plan
        self.rank = rank
        self.world_size = plan.world_size
        self.coords = plan.coords(rank)
        self.device = device
        self.ring, self.ulysses, self.tp, self.sp, self.dp, self.grad, self.pp = (
            Axis(name, ranks.index(rank), ranks, groups.get(name))
            for name in _AXES
            for ranks in [_axis_ranks(plan, name, self.coords)]
        )
        # Whether all ranks of the axis are processes of one machine.
        self.ring_in_one_node = ring_in_one_node
        self.ulysses_in_one_node = ulysses_in_one_node
        self.journal = Journal(device)
        self.agreement = Agreement(
            store,
            rank,
            self.sp.ranks,
            name_of=lambda r: str(plan.coords(r)),
            prefix=self.prefix,
            timeout=timeout,
        )
        self._layer: int | None = None
        self._exchange = RingExchange(
            link, prefix=self.prefix, grad_dtype=grad_dtype or plan.wire_dtype, journal=self.journal
        )
        self._head_exchange = HeadExchange(head_link, prefix=self.prefix, journal=self.journal)
        self._tensor_exchange = TensorExchange(self.tp.group, prefix=self.prefix, journal=self.journal)

    @classmethod
    def create(
        cls,
        plan: ParallelPlan,
        *,
        device: torch.device | str,
        timeout: timedelta = DEFAULT_TIMEOUT,
        grad_dtype: torch.dtype | None = None,
    ) -> ParallelMesh:
        """Make the groups of `plan`. Collective: every rank of the world calls it.

        Args:
            plan: dp may be left open; the world fills it in.
            device: where this process's tensors live. On CUDA it must be the current device.
            timeout: how long a rank waits for another before it fails.
            grad_dtype: dtype of key and value gradients on the ring's wire. None: what `plan.grad_dtype` says.

        A plan for one process needs no `torch.distributed.init_process_group`.

        Raises:
            PlanError: the plan does not fit the world, or needs what is not available.
            DistributedError: the transport that the plan names cannot be had; several processes are needed but none, or a
                backend that cannot carry the device's tensors, was initialised; the device is not the current one; no
                contact.
        """
        device = torch.device(device)
        is_alone = not dist.is_initialized()
        plan = plan.resolve(1 if is_alone and _wants_one(plan) else _world_size(plan))
        rank = 0 if is_alone else dist.get_rank()
        groups: dict[str, dist.ProcessGroup | None] = {}
        if plan.world_size > 1:
            _check_backend(device)
            groups = _make_groups(plan, rank, device, timeout)
        ring, ulysses = groups.get("ring"), groups.get("ulysses")
        link, in_one_node = None, True
        if ring is not None:
            prefix = f"[rank {rank} | {plan.coords(rank)}]"
            in_one_node = are_in_one_node(ring)
            link = ring_link(
                ring, device, transport=plan.transport, in_one_node=in_one_node, timeout=timeout, prefix=prefix
            )
        sp = groups.get("sp")
        mesh = cls(
            plan,
            rank,
            device=device,
            groups=groups,
            link=link,
            head_link=None if ulysses is None else GroupHeadLink(ulysses),
            grad_dtype=grad_dtype,
            ring_in_one_node=in_one_node,
            ulysses_in_one_node=ulysses is None or are_in_one_node(ulysses),
            store=None if sp is None else _store_of(sp),
            timeout=timeout,
        )
        mesh.exchange.warm_up(device)
        mesh.head_exchange.warm_up(device)
        mesh.tensor_exchange.warm_up(device)
        mesh.journal.discard()
        return mesh

    @property
    def exchange(self) -> RingExchange:
        """The exchange of this process's ring, the same object every time."""
        return self._exchange

    @property
    def head_exchange(self) -> HeadExchange:
        """The exchange of this process's Ulysses ranks, the same object every time."""
        return self._head_exchange

    def for_layer(self, layer: int) -> ParallelMesh:
        """This mesh as that layer of a model uses it: the same in everything, but reports name the layer."""
        mesh = copy.copy(self)
        mesh._layer = layer
        return mesh

    @property
    def ring_handle(self) -> str:
        """What an operator gets to find `exchange`."""
        return at_layer(self._exchange.handle, self._layer)

    @property
    def head_handle(self) -> str:
        """What an operator gets to find `head_exchange`."""
        return at_layer(self._head_exchange.handle, self._layer)

    @property
    def tensor_handle(self) -> str:
        """What an operator gets to find `tensor_exchange`."""
        return at_layer(self._tensor_exchange.handle, self._layer)

    @property
    def tensor_exchange(self) -> TensorExchange:
        """The exchange of this process's tp ranks, the same object every time."""
        return self._tensor_exchange

    @property
    def prefix(self) -> str:
        """How this rank's messages begin."""
        return f"[rank {self.rank} | {self.coords}]"

    def __repr__(self) -> str:
        return f"ParallelMesh({self.prefix} of {self.plan})"


def _store_of(group: dist.ProcessGroup) -> dist.Store:
    """Where the ranks of `group`, and no others, can leave each other notes."""
    # A connection of its own: who waits on it stands in nobody's way.
    store: Any = dist.distributed_c10d._get_default_store()
    return dist.PrefixStore(f"longctx/{group.group_name}", store.clone())


def _wants_one(plan: ParallelPlan) -> bool:
    return plan.dp in (None, 1) and plan.pp * plan.sp * plan.tp == 1


def _world_size(plan: ParallelPlan) -> int:
    if not dist.is_initialized():
        raise DistributedError(
            f"this plan ({plan}) needs several processes, but torch.distributed is not initialised\n"
            "       start with torchrun --nproc-per-node N, and call torch.distributed.init_process_group first"
        )
    return dist.get_world_size()


def _check_backend(device: torch.device) -> None:
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        raise DistributedError(
            f"the mesh is to live on {device}, but the current device is cuda:{torch.cuda.current_device()}\n"
            f"       call torch.cuda.set_device({device.index}) before init_process_group"
        )
    try:
        dist.distributed_c10d._get_default_group()._get_backend(device)
    except RuntimeError as error:
        raise DistributedError(
            f"the process group's backend {dist.get_backend()!r} cannot carry {device.type} tensors\n"
            f"       use init_process_group({'nccl' if device.type == 'cuda' else 'gloo'!r})"
        ) from error


def _axis_ranks(plan: ParallelPlan, name: str, at: Coords) -> tuple[int, ...]:
    """The ranks of the axis through `at`, in axis order."""
    sp = [replace(at, ring=r, ulysses=u) for r in range(plan.ring) for u in range(plan.ulysses)]
    assert plan.dp is not None, "the mesh's plan is resolved"
    places = {
        "ring": [replace(at, ring=r) for r in range(plan.ring)],
        "ulysses": [replace(at, ulysses=u) for u in range(plan.ulysses)],
        "sp": sp,
        "dp": [replace(at, dp=d) for d in range(plan.dp)],
        "grad": [replace(c, dp=d) for d in range(plan.dp) for c in sp],
        "tp": [replace(at, tp=t) for t in range(plan.tp)],
        "pp": [replace(at, pp=p) for p in range(plan.pp)],
    }[name]
    return tuple(plan.rank_of(c) for c in places)


def _all_axes(plan: ParallelPlan, name: str) -> Iterator[tuple[int, ...]]:
    """Every set of ranks that forms an axis of that name, in an order that does not depend on who asks."""
    seen = set()
    for rank in range(plan.world_size):
        ranks = _axis_ranks(plan, name, plan.coords(rank))
        if ranks not in seen:
            seen.add(ranks)
            yield ranks


def _make_groups(
    plan: ParallelPlan, rank: int, device: torch.device, timeout: timedelta
) -> dict[str, dist.ProcessGroup | None]:
    """This rank's group on each axis. new_group is collective: every rank makes every group, in one order."""
    mine: dict[str, dist.ProcessGroup | None] = {}
    made: dict[tuple[int, ...], dist.ProcessGroup] = {}
    for name in _AXES:
        for ranks in _all_axes(plan, name):
            if len(ranks) == 1:
                group = None
            elif name in _OF_LAYERS:
                group = _new_group(ranks, device, timeout, is_urgent=True)
            else:
                if ranks not in made:
                    made[ranks] = _new_group(ranks, device, timeout)
                group = made[ranks]
            if rank in ranks:
                mine[name] = group
    return mine


def _new_group(
    ranks: tuple[int, ...], device: torch.device, timeout: timedelta, *, is_urgent: bool = False
) -> dist.ProcessGroup:
    options = None
    if is_urgent and device.type == "cuda":
        # Messages must start while attention fills the GPU; a high-priority stream gets the next free SMs.
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options._timeout = timeout
    try:
        return dist.new_group(list(ranks), timeout=timeout, pg_options=options)
    except RuntimeError as error:
        raise DistributedError(f"no contact among ranks {list(ranks)}: {error}") from error
