"""What each scheme of communication would cost, estimated from a few rows of the mask; the same on every rank.

Times are those of the slowest rank at every hop. The rates are round figures of one kind of machine (Hopper, NVLink inside a
node, one 400 Gb/s network card a GPU between nodes), good enough to tell schemes apart: what decides is which messages hide
behind which products.

Source: volumes and overlap of ring, all-gather and Ulysses schemes as derived in Liu et al. 2023 (arXiv 2310.01889) and
Fang and Zhao 2024 (arXiv 2405.07719).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch

from longctx.layout import SequenceLayout
from longctx.masks import AttentionMask
from longctx.parallel.schedule import CACHED_SCHEDULES, sampled_rows

# Bytes/s of the links inside a node and between nodes, and of the GPU's memory; seconds that a message takes however small it
# is, and that one more kernel loses at its start and in its last wave. Links measured on two H200 with messages of 32 MiB and
# more (both transports, 245 to 350 GB/s); the rest fits the times of rings with and without messages there, 2026-11-23.
NODE_BYTES = 280e9
NETWORK_BYTES = 40e9
MEMORY_BYTES = 3e12
MESSAGE_S = 20e-6
LAUNCH_S = 150e-6

# FLOP/s of kernels forward and backward, by name; of any other, the last.
KERNEL_FLOPS = {"hopper": (650e12, 580e12), "cudnn": (600e12, 540e12), "triton": (500e12, 400e12)}

# Five products instead of two.
BACKWARD = 2.5

# Groups of heads in which keys are gathered, at most: more hide more of the messages, and leave less work to each call of a kernel.
GROUPS = 4
# Groups of heads of the direct exchange: more need less memory for messages and gradients, and more calls of kernels.
DIRECT_GROUPS = (1, 2, 4, 8)

# So many times slower may be what needs less memory. A ring's last keys are a fifth of what a layer of a model of today keeps for
# the backward pass (32/8 heads), half where there are as many key heads as query heads; what Ulysses brought is more than half.
# To have either come again costs a message that nothing hides, which from 64k tokens a rank on is less than this.
WORTH = 1.0025

_Key = TypeVar("_Key")


class Variant(NamedTuple):
    """A scheme, and how it is used.

    Args:
        groups: of heads, one after the other.
        holds: whether the keys that came last stay for the backward pass, which begins with them, or come again.
    """

    name: str
    groups: int = 1
    holds: bool = False


@dataclass(frozen=True)
class Shape:
    """One attention call of one rank.

    Args:
        local_len: tokens of the rank.
        itemsize, grad_itemsize: bytes of one element of K/V and of their gradients on the wire.
    """

    batch: int
    local_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    itemsize: int
    grad_itemsize: int = 4

    @property
    def key_elements(self) -> int:
        """Of K and V of one key position."""
        return 2 * self.batch * self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class HopShares:
    """Of one distance: the visible share of all pairs of two ranks, and the share of keys that is needed, each of the rank
    with the most."""

    area: float
    keys: float


@lru_cache(maxsize=CACHED_SCHEDULES)
def hop_shares(mask: AttentionMask, layout: SequenceLayout, world: int, seq_len: int) -> tuple[HopShares, ...]:
    """Of every distance that has work in the rows looked at; distance 0 first. O(world squared), not O(seq_len squared)."""
    s = seq_len // world
    rows = sampled_rows(s)
    positions = [layout.positions(r, world, seq_len) for r in range(world)]
    seen = [mask.key_range(p[rows], seq_len) for p in positions]
    found = []
    for distance in range(world):
        areas, keys = [0.0], [0.0]
        for rank in range(world):
            k_pos = positions[(rank - distance) % world]
            lo, hi = (torch.searchsorted(k_pos, x.contiguous()) for x in seen[rank])
            sees = hi > lo
            if bool(sees.any()):
                areas.append(float((hi - lo).double().mean()) / s)
                keys.append(float(hi[sees].max() - lo[sees].min()) / s)
        if distance == 0 or max(areas) > 0:
            found.append(HopShares(max(areas), max(keys)))
    return tuple(found)


@dataclass(frozen=True)
class Estimate:
    """Seconds of one call, forward and backward together, and memory.

    Args:
        exposed: of the seconds, those in which only messages move.
        held: what stays for the backward pass, as a share of a rank's keys and values.
        moving: the keys of one message, likewise.
        groups: of heads, one after the other.
        exchanged: what Ulysses brought to a rank's heads and stays for the backward pass: 1 for all, 0 for nothing.
    """

    total: float
    exposed: float
    held: float = 0.0
    moving: float = 0.0
    groups: int = 1
    exchanged: float = 0.0


@dataclass(frozen=True)
class Rates:
    """FLOP/s of the kernels that a scheme runs."""

    forward: float
    backward: float

    @staticmethod
    def of(kernels: Iterable[tuple[str, str, int]]) -> Rates:
        """Of blocks, each with its kernel forward and backward and its area: together as fast as so many products are."""
        blocks = list(kernels)
        area = sum(n for *_, n in blocks)
        known = list(KERNEL_FLOPS.values())[-1]
        seconds = [sum(n / KERNEL_FLOPS.get(names[i], known)[i] for *names, n in blocks) for i in (0, 1)]
        return Rates(*(area / s for s in seconds)) if area else Rates(*known)


def ranked(found: Mapping[_Key, Estimate]) -> list[_Key]:
    """Keys of `found`, the one to take first; among equals in their order.

    First come those that are at most `WORTH` times slower than the fastest, by what every layer holds, then by what is under way;
    then the others, by time.
    """
    limit = WORTH * min(estimate.total for estimate in found.values())

    def place(key: _Key) -> tuple[float, ...]:
        e = found[key]
        return (1.0, e.total) if e.total > limit else (0.0, e.held, e.moving, e.total)

    return sorted(found, key=place)


def estimates(
    shape: Shape, hops: tuple[HopShares, ...], rates: Mapping[str, Rates], *, in_one_node: bool
) -> dict[Variant, Estimate]:
    """Of every variant of the schemes that there are rates for; of equals, what sends less comes first.

    Args:
        hops: `hop_shares`.
        rates: of the kernels that a scheme needs: for the blocks of its hops, or for the one block of gathered keys.
        in_one_node: whether all ranks of the ring are.
    """
    speed = NODE_BYTES if in_one_node else NETWORK_BYTES
    s = shape.local_len

    def message(keys: float, itemsize: int) -> float:
        return MESSAGE_S + keys * s * shape.key_elements * itemsize / speed if keys else 0.0

    def by_hops(variant: Variant, keys: Sequence[float]) -> Estimate:
        there = [message(x / variant.groups, shape.itemsize) for x in keys]
        home = [message(x / variant.groups, shape.grad_itemsize) for x in keys]
        return _by_hops(shape, [hop.area for hop in hops], rates[variant.name], there, home, keys, variant)

    found = {}
    for groups in DIRECT_GROUPS if "direct" in rates else ():
        for holds in (True, False):
            # Of one hop nothing is sent.
            if shape.num_kv_heads % groups == 0 and (len(hops) > 1 or (groups == 1 and holds)):
                variant = Variant("direct", groups, holds)
                found[variant] = by_hops(variant, [hop.keys for hop in hops])
    for groups in range(GROUPS, 0, -1) if "gather" in rates else ():
        if shape.num_kv_heads % groups == 0:
            there, home = (
                sum(message(hop.keys / groups, size) for hop in hops[1:]) for size in (shape.itemsize, shape.grad_itemsize)
            )  # fmt: skip
            found[Variant("gather", groups)] = _at_once(shape, hops, rates["gather"], there, home, groups)
    if "relay" in rates:
        found[Variant("relay", holds=True)] = by_hops(Variant("relay", holds=True), [1.0] * len(hops))
    return found


class Split(NamedTuple):
    """How heads are exchanged.

    Args:
        chunks: of a rank's heads, one after the other.
        holds: whether what came for the forward pass stays for the backward pass, or comes again.
    """

    chunks: int = 1
    holds: bool = True

    def __str__(self) -> str:
        return f"{self.chunks} chunk{'s' * (self.chunks > 1)}" + ", holding nothing" * (not self.holds)


def exchange_estimates(
    shape: Shape,
    hops: tuple[HopShares, ...],
    rates: Rates,
    *,
    ulysses: int,
    chunks: Iterable[int],
    in_one_node: bool,
) -> dict[Split, Estimate]:
    """Of attention with exchanged heads, without what the ring inside waits for: products, messages that nothing hides, and the
    calls of kernels that chunks cost.

    Args:
        shape: of attention with the heads of one rank, all of its tokens.
        hops: `hop_shares` of the ring inside.
        rates: of the kernels that the ring inside runs.
        ulysses: ranks that exchange; chunks: numbers of them to consider.
    """
    return {
        Split(n, holds): _exchange(shape, hops, rates, ulysses, Split(n, holds), in_one_node)
        for n in chunks
        for holds in (True, False)
    }


def _exchange(
    shape: Shape, hops: tuple[HopShares, ...], rates: Rates, ulysses: int, split: Split, in_one_node: bool
) -> Estimate:
    chunks = split.chunks
    speed = NODE_BYTES if in_one_node else NETWORK_BYTES
    away = shape.batch * shape.local_len * shape.head_dim * shape.itemsize * (ulysses - 1) / ulysses / chunks
    outputs = MESSAGE_S + away * shape.num_heads / speed
    inputs = MESSAGE_S + away * (shape.num_heads + 2 * shape.num_kv_heads) / speed
    forward = _products(shape) * sum(hop.area for hop in hops) / rates.forward / chunks
    backward = BACKWARD * forward * rates.forward / rates.backward
    again = 0.0 if split.holds else inputs + outputs
    # The first message in and the last one out; of the others what takes longer than attention with one chunk.
    hidden = max(0.0, inputs + outputs - forward) + max(0.0, inputs + outputs + again - backward)
    exposed = 2 * (inputs + outputs) + again + (chunks - 1) * hidden
    total = chunks * (forward + backward) + exposed + 2 * (chunks - 1) * len(hops) * LAUNCH_S
    return Estimate(total, exposed, held=float(split.holds), exchanged=float(split.holds))


def attention_seconds(shape: Shape, hops: Sequence[HopShares], rates: Rates) -> float:
    """Of the products alone, forward and backward."""
    area = sum(hop.area for hop in hops)
    return _products(shape) * area * (1 / rates.forward + BACKWARD / rates.backward)


def _products(shape: Shape) -> int:
    """FLOPs of a forward pass in which every local query sees as many keys as the rank holds."""
    return 4 * shape.batch * shape.num_heads * shape.head_dim * shape.local_len**2


def _by_hops(
    shape: Shape,
    areas: Sequence[float],
    rates: Rates,
    there: Sequence[float],
    home: Sequence[float],
    keys: Sequence[float],
    variant: Variant,
) -> Estimate:
    """Of one kernel for each hop and group; `there`, `home`: seconds of each hop's keys of a group and of their gradients; `keys`:
    as shares of a rank's.
    """
    groups = variant.groups
    forward_work = [_products(shape) * area / rates.forward / groups for area in areas]
    backward_work = [BACKWARD * _products(shape) * area / rates.backward / groups for area in areas]
    last = len(areas) - 1
    forward = sum(max(0.0, there[i + 1] - forward_work[i]) for i in range(last))
    # While hop i is computed, the block of hop i - 1 comes and the gradients of hop i + 1 go.
    beside = [(there[i - 1] if i > 1 else 0.0) + (home[i + 1] if i < last else 0.0) for i in range(last + 1)]
    backward = sum(max(0.0, b - w) for b, w in zip(beside, backward_work, strict=True))
    if last and not variant.holds:
        backward += there[last]
    # The carried state is written and read in fp32 at every hop; so is dq.
    state = 8 * shape.batch * shape.local_len * shape.num_heads * shape.head_dim / MEMORY_BYTES
    passes = 2 * (groups * (last + 1) - 1) * LAUNCH_S + 2 * last * state
    exposed = groups * (forward + backward)
    return Estimate(
        groups * (sum(forward_work) + sum(backward_work)) + passes + exposed,
        exposed,
        held=keys[last] if last and variant.holds else 0.0,
        moving=max(keys[1:], default=0.0) / groups,
        groups=groups,
    )


def _at_once(shape: Shape, hops: Sequence[HopShares], rates: Rates, there: float, home: float, groups: int) -> Estimate:
    """Of one kernel for each group of heads; `there`, `home`: seconds of one group's keys and of their gradients."""
    products = _products(shape) * sum(hop.area for hop in hops) / groups
    forward_work, backward_work = products / rates.forward, BACKWARD * products / rates.backward
    exposed = 2 * there + home
    exposed += (groups - 1) * (max(0.0, there - forward_work) + max(0.0, there + home - backward_work))
    # Keys and their gradients are put in order and collected again.
    keys = sum(hop.keys for hop in hops) * shape.local_len
    copies = keys * shape.key_elements * (4 * shape.itemsize + 8) / MEMORY_BYTES
    passes = 2 * (groups - 1) * LAUNCH_S + copies
    moving = sum(hop.keys for hop in hops) / groups if len(hops) > 1 else 0.0
    return Estimate(groups * (forward_work + backward_work) + passes + exposed, exposed, moving=moving, groups=groups)
