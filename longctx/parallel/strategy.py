"""How the ranks of a ring get to see each other's keys: one class for each scheme, and the choice among them.

Every scheme computes the same attention and differs in what is sent when. Ulysses is not one of these: it goes around them,
over its own axis of the mesh, so any of them serves as the inner scheme of the hybrid.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from longctx.errors import KernelError, PlanError, did_you_mean
from longctx.kernels import Direction, select_kernel
from longctx.parallel.cost import GROUPS, Estimate, Rates, Shape, Variant, estimates, hop_shares, ranked
from longctx.parallel.direct import DIRECT_ATTENTION
from longctx.parallel.gather import GATHER_ATTENTION
from longctx.parallel.moves import direct_comm_bytes, direct_plan, gather_comm_bytes, gather_plan
from longctx.parallel.operator import SCHEMES, RingPlan
from longctx.parallel.ring import RING_ATTENTION_OP, cached_hops
from longctx.parallel.schedule import CommBytes, RingSchedule, comm_bytes
from longctx.parallel.ulysses import ULYSSES_ATTENTION_OP

log = logging.getLogger(__name__)

# What a scheme has no use for.
_NONE = torch.empty(0, dtype=torch.int64)

# What activation checkpointing must keep, so that attention is never computed and no message sent a second time.
KEPT_OPERATORS = (RING_ATTENTION_OP, DIRECT_ATTENTION.forward, GATHER_ATTENTION.forward, ULYSSES_ATTENTION_OP)


class ContextStrategy(ABC):
    """One scheme of communication over a ring. `name` is what settings call it, and what its operators are registered as."""

    name: str

    def __str__(self) -> str:
        return self.name

    @abstractmethod
    def plan(self, schedule: RingSchedule, num_kv_heads: int) -> RingPlan:
        """What the operators of the scheme are told of `schedule`.

        Raises:
            PlanError: the scheme cannot be had with so many key heads.
        """

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        schedule: RingSchedule,
        exchange: str,
        kernel: str,
        scale: float,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of the local queries to all keys of the ring. Differentiable, collective.

        Args:
            q: "b s h d"; k, v: "b s hk d".
            schedule: of this rank.
            exchange: handle of the ring's `RingExchange`; empty for a ring of one.
            kernel, scale, softcap, sinks: as `longctx.functional.attention`.

        Returns:
            out "b s h d" in q's dtype; lse "b h s" fp32.
        """
        plan = self.plan(schedule, k.shape[2])
        out, lse, _ = SCHEMES[self.name].forward(q, k, v, *plan, kernel, scale, exchange, softcap, sinks)
        return out, lse

    @abstractmethod
    def comm_bytes(
        self,
        schedule: RingSchedule,
        *,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        itemsize: int,
        grad_itemsize: int = 4,
    ) -> CommBytes:
        """What this rank sends, forward and backward; arguments as `longctx.parallel.schedule.comm_bytes`."""


class RelayStrategy(ContextStrategy):
    """All keys go round the ring from neighbour to neighbour, and their gradients ride back with them.

    Uses the links between neighbours only, so it suits networks in which these are the fast ones.

    Source: Liu et al. 2023 (arXiv 2310.01889).
    """

    name = "relay"

    def plan(self, schedule, num_kv_heads):
        hops, rows = schedule.packed
        return RingPlan(hops, rows, _NONE, _NONE, _NONE, 0)

    def comm_bytes(self, schedule, **shape):
        return comm_bytes(schedule, **shape)


@dataclass(frozen=True)
class DirectStrategy(ContextStrategy):
    """At each hop the keys that a rank needs come straight from their owner, and their gradients go straight home.

    Never sends more forward than the relay, and less wherever a rank does not see all keys of another.

    Args:
        holds: whether the keys that come last, up to as many as a rank has, stay in every layer for the backward pass, which
            begins with them. Else they come again: one message a layer that nothing hides.
        groups: of heads, which go through the ring one after the other: the more, the fewer keys and gradients are in memory
            at a time, and the more messages and calls of kernels there are. Of fewer key heads, as many as divide both.
    """

    holds: bool = True
    groups: int = 1
    name = "direct"

    def __str__(self) -> str:
        in_groups = f" in {self.groups} groups" * (self.groups > 1)
        return self.name + in_groups + ", holding no keys" * (not self.holds)

    def plan(self, schedule, num_kv_heads):
        hops, rows, moves, held_len = direct_plan(schedule, self.holds)
        groups = math.gcd(self.groups, num_kv_heads) if schedule.world > 1 else 1
        return RingPlan(hops, rows, moves, _NONE, _NONE, held_len, groups)

    def comm_bytes(self, schedule, **shape):
        return direct_comm_bytes(schedule, holds=self.holds, **shape)


@dataclass(frozen=True)
class GatherStrategy(ContextStrategy):
    """A rank gathers all keys that it needs, a group of heads at a time, and attends to them in one go.

    Args:
        groups: of heads. None: the most up to `longctx.parallel.cost.GROUPS` that divide the key heads. The first group's
            message is not hidden behind anything, and two groups of gathered keys bound the memory.
    """

    groups: int | None = None
    name = "gather"

    def __str__(self) -> str:
        return self.name if self.groups is None else f"{self.name} in {self.groups} group{'s' * (self.groups > 1)}"

    def plan(self, schedule, num_kv_heads):
        return RingPlan(*gather_plan(schedule), self.groups_of(num_kv_heads, schedule.world))

    def comm_bytes(self, schedule, **shape):
        return gather_comm_bytes(schedule, **shape)

    def groups_of(self, num_kv_heads: int, world: int) -> int:
        """Groups that so many key heads are cut into; one where nothing is gathered.

        Raises:
            PlanError: `groups` does not divide the heads.
        """
        if self.groups is None:
            return max(n for n in range(1, GROUPS + 1) if num_kv_heads % n == 0) if world > 1 else 1
        if self.groups < 1 or num_kv_heads % self.groups:
            divisors = [n for n in range(1, num_kv_heads + 1) if num_kv_heads % n == 0]
            raise PlanError(
                f"gather in {self.groups} groups of heads: {num_kv_heads} key heads can be cut into "
                f"{', '.join(map(str, divisors))}"
            )
        return self.groups


_DIRECTIONS: tuple[Direction, Direction] = ("forward", "backward")

_STRATEGIES: dict[str, ContextStrategy] = {s.name: s for s in (RelayStrategy(), DirectStrategy(), GatherStrategy())}


def strategy_names() -> tuple[str, ...]:
    """Names that `get_strategy` knows."""
    return tuple(_STRATEGIES)


def get_strategy(name: str) -> ContextStrategy:
    """The strategy of that name.

    Raises:
        PlanError: unknown name; names the nearest.
    """
    if name not in _STRATEGIES:
        raise PlanError(f"unknown strategy {name!r}: {did_you_mean(name, ['auto', *_STRATEGIES])}")
    return _STRATEGIES[name]


def _of_variant(variant: Variant) -> ContextStrategy:
    if variant.name == "gather":
        return GatherStrategy(variant.groups)
    if variant.name == "direct":
        return DirectStrategy(variant.holds, variant.groups)
    return _STRATEGIES[variant.name]


@lru_cache(maxsize=64)
def choose_strategy(
    schedule: RingSchedule,
    shape: Shape,
    *,
    names: tuple[str, ...] = tuple(_STRATEGIES),
    device: torch.device,
    dtype: torch.dtype,
    kernel: str = "auto",
    softcap: float = 0.0,
    in_one_node: bool,
) -> tuple[ContextStrategy, str]:
    """The scheme that `estimates` finds best for such a call, and why, as a line for a log; remembered.

    That is the fastest, or one that holds less for the backward pass and is hardly slower (`longctx.parallel.cost.WORTH`). The
    same on every rank of the ring: it looks at all ranks' rows, and for the kernels at those of the first rank.

    Args:
        names: of the schemes to choose from.
        device, dtype: of q, k and v.
        kernel, softcap: as `longctx.functional.attention`.

    Raises:
        KernelError: no kernel can do the blocks of any scheme.
    """
    q = stand_in(shape, device, dtype)
    hops = hop_shares(schedule.mask, schedule.layout, schedule.world, schedule.seq_len)
    first = RingSchedule.build(schedule.mask, schedule.layout, 0, schedule.world, schedule.seq_len)
    rates: dict[str, Rates] = {}
    refused: list[KernelError] = []
    for alike, plan_of in ((("direct", "relay"), direct_plan), (("gather",), gather_plan)):
        asked = [name for name in alike if name in names]
        if not asked:
            continue
        plan = plan_of(first)
        try:
            rates |= dict.fromkeys(asked, kernel_rates(first, plan.hops, plan.rows, q, kernel, softcap))
        except KernelError as error:
            refused.append(error)
    if not rates:
        raise refused[0]
    found: dict[ContextStrategy, Estimate] = {
        _of_variant(variant): estimate
        for variant, estimate in estimates(shape, hops, rates, in_one_node=in_one_node).items()
    }
    order = ranked(found)
    told = "; ".join(f"{s}: {1e3 * found[s].total:.2f} ms ({1e3 * found[s].exposed:.2f} of it waiting)" for s in order)
    where = "one node" if in_one_node else "several nodes"
    spared = max(estimate.held for estimate in found.values()) - found[order[0]].held
    saves = spared * shape.local_len * shape.key_elements * shape.itemsize / 1e6
    return order[0], (
        f"{order[0]} for {shape.local_len:_} tokens a rank, {shape.num_heads}/{shape.num_kv_heads} heads of "
        f"{shape.head_dim}, {len(hops)} of {schedule.world} hops, {where}"
        + f", {saves:.0f} MB a layer less than with the last keys held" * (saves >= 1)
        + f"; estimated: {told}"
    )


def stand_in(shape: Shape, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A tensor without memory of its own, for which the same kernels are chosen as for queries of that shape."""
    # Kernels are chosen by the rows of a block too.
    return torch.empty(1, 1, 1, shape.head_dim, device=device, dtype=dtype).expand(-1, shape.local_len, -1, -1)


def kernel_rates(first: RingSchedule, table: Tensor, rows: Tensor, q: Tensor, kernel: str, softcap: float) -> Rates:
    """Of the kernels that would be chosen for these blocks of the first rank.

    Args:
        table, rows: of blocks, one for each hop of `first` (or one of all), as `pack_hops` makes them.
        q: the queries, or a `stand_in` for them.

    Raises:
        KernelError: no kernel can do one of them.
    """
    blocks = []
    for hop, (_, key_range) in zip(first.hops, cached_hops(table, rows), strict=False):
        if key_range.kind != "empty":
            there, back = (select_kernel(kernel, q, key_range, softcap, d).name for d in _DIRECTIONS)
            blocks.append((there, back, hop.area))
    return Rates.of(blocks)


def resolve_strategy(
    strategy: str | ContextStrategy,
    schedule: RingSchedule,
    shape: Shape,
    q: Tensor,
    *,
    kernel: str = "auto",
    softcap: float = 0.0,
    in_one_node: bool,
) -> ContextStrategy:
    """The strategy itself, or the one of that name; with "auto" and "direct", which leave a choice, the one of `choose_strategy`,
    logged once for every kind of call.

    Raises:
        PlanError: unknown name.
        KernelError: as `choose_strategy`.
    """
    if schedule.world == 1:
        # Nothing is sent, so there is nothing to choose.
        return _STRATEGIES["relay"]
    if isinstance(strategy, ContextStrategy):
        return strategy
    if strategy not in ("auto", "direct"):
        return get_strategy(strategy)
    chosen, why = choose_strategy(
        schedule,
        shape,
        names=tuple(_STRATEGIES) if strategy == "auto" else (strategy,),
        device=q.device,
        dtype=q.dtype,
        kernel=kernel,
        softcap=softcap,
        in_one_node=in_one_node,
    )
    log_choice("strategy", chosen, schedule, shape, why)
    return chosen


# Which calls were spoken of; beyond so many kinds the oldest may be spoken of again.
@lru_cache(maxsize=64)
def _spoken(*kind: object) -> list[bool]:
    return []


def log_choice(what: str, chosen: object, schedule: RingSchedule, shape: Shape, why: str) -> None:
    """Log why `chosen` was taken, the first time for such a shape; other masks may have other reasons for the same."""
    said = _spoken(what, str(chosen), schedule.layout.name, schedule.world, shape)
    if not said:
        said.append(True)
        log.info("%s %s", what, why)
