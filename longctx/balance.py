"""The arithmetic of balance: which rank gets which blocks of a sequence, and how long a ring takes over a layout.

Integers and exact sums only, so that every process comes to the same answer without asking another. O(sequence) on the
CPU: no pair of positions is ever looked at.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from longctx.masks import AttentionMask
from longctx.padding import Padded

log = logging.getLogger(__name__)

# Rows and keys that a kernel works on at once. Blocks of that many tokens leave its tiles whole.
TILE = 128

# Blocks of `Balanced`: a rank has at least so many of them before they become as long as a tile, ...
LEAST_ROUNDS = 8
# ... and they are halved down to this where the work cannot be made even with longer ones.
SHORTEST_BLOCK = 8

# Blocks are exchanged while a rank has more than this above its even share of the work; more would cost hops' balance.
GOAL = 0.01
# What `Balanced` promises: no rank has more than this above its even share, wherever blocks of SHORTEST_BLOCK allow it.
PROMISE = 0.02

# To pass a shard on takes as long as to see this many keys with each of its tokens: flops / bandwidth * key heads / query
# heads for K and V in 16 bits, with 400 TFLOP/s, 360 GB/s and 4 query heads to a key head. Backward has about the same
# ratio: 2.5 times the arithmetic, three times the bytes.
KEYS_OF_A_MESSAGE = 278

# Of candidates whose times are this close to the least, the one of the fewest pieces is taken.
AUTO_TOLERANCE = 0.02

# What was said of `fastest_shards`: choices are logged once, not for every batch of documents.
_said: set[tuple[str, str, int]] = set()


@lru_cache(maxsize=16)
def balanced_blocks(mask: AttentionMask, world: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Rounds of `world` blocks, of which every rank holds one in each round, so that the ranks' areas of the mask agree.

    Dealing blocks out in the same order in every round spreads each document over the ranks and over the ring's hops. Then
    the rank with the most work swaps its block of one round with another rank's, always the swap that leaves the larger of
    the two with least, until no rank has more than `GOAL` above the mean: the fewer swaps, the closer every hop stays to the
    even work of the order dealt. So the ranks' totals come first, and hops follow.

    Args:
        world: ranks, at least 1.
        seq_len: a multiple of `world`.

    Returns:
        starts: int64 [rounds, world], the first position of each rank's block in each round.
        lengths: int64 [rounds], of the blocks; `TILE` but for short shards, and the last round takes what is left.
    """
    share = seq_len // world
    # rows[i]: pairs seen by the positions before i.
    rows = np.zeros(seq_len + 1, np.int64)
    lo, hi = mask.key_range(torch.arange(seq_len), seq_len)
    np.cumsum((hi - lo).reshape(-1, seq_len).sum(0).numpy(), out=rows[1:])
    limit = (1 + PROMISE) * int(rows[-1]) / world
    block = TILE
    while block > 1 and share < LEAST_ROUNDS * block:
        block //= 2
    while True:
        rounds = -(-share // block)
        lengths = np.full(rounds, block, np.int64)
        lengths[-1] = share - (rounds - 1) * block
        first = np.arange(rounds)[:, None] * block * world
        edges = first + np.arange(world + 1) * lengths[:, None]
        work = rows[edges[:, 1:]] - rows[edges[:, :-1]]
        held, load = _even_out(work, np.tile(np.arange(world), (rounds, 1)))
        if int(load.max()) > limit:
            held, load = _even_out(work, _largest_first(work))
        if block <= SHORTEST_BLOCK or int(load.max()) <= limit:
            return first + held * lengths[:, None], lengths
        block //= 2


def _largest_first(work: np.ndarray) -> np.ndarray:
    """Blocks dealt out with no regard for hops: of each round the largest to the rank with the least work so far, the rounds
    with the largest differences first. For work so uneven that swaps alone do not end well.

    Source: Graham 1969, "Bounds on multiprocessing timing anomalies", for one round of many.
    """
    held, load = np.empty_like(work), np.zeros(work.shape[1], np.int64)
    for at in np.argsort(work.min(1) - work.max(1), kind="stable"):
        ranks, blocks = np.argsort(load, kind="stable"), np.argsort(-work[at], kind="stable")
        held[at, ranks] = blocks
        load[ranks] += work[at, blocks]
    return held


def _even_out(work: np.ndarray, dealt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Who holds what, by swaps within a round.

    Args:
        work: int64 [rounds, world], of each block.
        dealt: int64 [rounds, world], the block that each rank holds in each round at first.

    Returns:
        held: the same afterwards. load: int64 [world], the ranks' work.
    """
    rounds, world = work.shape
    held, mine = dealt.copy(), np.take_along_axis(work, dealt, 1)
    load = mine.sum(0)
    goal = int(load.sum()) * (1 + GOAL) / world
    # Few swaps are needed; never more than this.
    for _ in range(4 * rounds * world):
        most = int(load.argmax())
        if load[most] <= goal:
            break
        given = mine[:, most, None] - mine
        left = np.maximum(load[most] - given, load + given)
        left[:, most] = np.iinfo(np.int64).max
        at, other = divmod(int(left.argmin()), world)
        if left[at, other] >= load[most]:
            break
        load[[most, other]] += np.array([-1, 1]) * given[at, other]
        for table in (held, mine):
            table[at, [most, other]] = table[at, [other, most]]
    return held, load


def tile_work(mask: AttentionMask, shards: Sequence[torch.Tensor], seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """What kernels work on at each hop, and what they need for it.

    Args:
        shards: the ascending positions of each rank, all of one length.

    Returns:
        work: int64 [world, world], of rank r at distance i: pairs in all tiles that hold a visible one, so that cut-up shards
            cost what they cost; summed over the sequences that the mask tells apart.
        keys: int64 [world, world]: length of the span of keys that any row sees there.
    """
    world, share = len(shards), len(shards[0])
    first = torch.arange(0, share, TILE)
    last = (first + TILE - 1).clamp(max=share - 1)
    work, needed = np.zeros((world, world), np.int64), np.zeros((world, world), np.int64)
    for rank, positions in enumerate(shards):
        # Both ends ascend, so the first row's and the last row's are those of the whole row of tiles.
        lo, hi = mask.key_range(positions[first], seq_len)[0], mask.key_range(positions[last], seq_len)[1]
        for source, keys in enumerate(shards):
            a, b = torch.searchsorted(keys, lo.contiguous()), torch.searchsorted(keys, hi.contiguous())
            sees = b > a
            if bool(sees.any()):
                distance = (rank - source) % world
                tiles = torch.where(sees, (b + TILE - 1) // TILE - a // TILE, 0)
                work[rank, distance] = int((tiles * TILE * (last - first + 1)).sum())
                needed[rank, distance] = int(b[sees].max() - a[sees].min())
    return work, needed


def ring_time(work: np.ndarray, keys: np.ndarray, batch: int = 1) -> int:
    """How long a ring takes, in visible pairs: ranks wait for each other at every hop, and for the message that it needs.

    The sum over hops of the slowest rank's work, where a hop other than the first takes at least as long as the message
    with the keys that it needs. Distances at which no rank has work are not made.

    Args:
        work, keys: [world, world], as `tile_work` gives them.
        batch: sequences that `work` sums over.
    """
    messages = (KEYS_OF_A_MESSAGE * batch * keys.max(0)).tolist()
    slowest = work.max(0).tolist()
    return slowest[0] + sum(max(hop, message) for hop, message in zip(slowest[1:], messages[1:], strict=True))


def fastest_shards(mask: AttentionMask, candidates: dict[str, list[torch.Tensor]], seq_len: int) -> str:
    """The name of the candidate with the least `ring_time`; of those within `AUTO_TOLERANCE` of it, the first.

    Args:
        candidates: name -> the positions of each rank; those of fewer pieces first.
    """
    times = {name: ring_time(*tile_work(mask, shards, seq_len), mask.batch or 1) for name, shards in candidates.items()}
    least = min(times.values())
    best = next(name for name, time in times.items() if time <= (1 + AUTO_TOLERANCE) * least)
    world = len(candidates[best])
    said = (best, kind_of(mask), world)
    if said not in _said:
        _said.add(said)
        others = ", ".join(f"{name} {time / times[best]:.2f}" for name, time in times.items() if name != best)
        log.info(
            "layout auto: %s for a mask of %s on %s positions over ring %d; times of the others beside it: %s",
            best, kind_of(mask), f"{seq_len:_}", world, others,
        )  # fmt: skip
    return best


def kind_of(mask: AttentionMask) -> str:
    """A mask's rules in words, without their numbers."""
    if isinstance(mask, Padded):
        return kind_of(mask.mask)
    parts = getattr(mask, "parts", None)
    return " and ".join(map(kind_of, parts)) if parts else type(mask).__name__
