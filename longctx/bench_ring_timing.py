"""Times of several ways to attend over the same ranks, taken in turns: see `bench_rounds` for why.

Here a turn is a moment and not a single call: to open one way and close another takes longer than its calls.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from longctx.bench_ring_output import METRICS
from longctx.parallel.journal import Journal
from longctx.peers_ring import Attend, Ranks

ROUNDS = 5
# What takes longer is timed in fewer rounds: its own length steadies it, and has warmed it up.
LONG_S, LONG_ROUNDS = 0.2, 3
VERY_LONG_S = 1.0
# In a round each call is repeated for about so long, but at most so often; one that takes longer is not warmed up anew.
MOMENT_S = 0.1
MOST_CALLS = 4
# Calls over which waiting is averaged.
WAITED = 3


def rounds_of(seconds: float) -> int:
    """In how many rounds a call of that length is timed."""
    return 1 if seconds > VERY_LONG_S else LONG_ROUNDS if seconds > LONG_S else ROUNDS


@dataclass
class Side:
    """One way to attend, which takes its turn.

    Args:
        name: in the results.
        local: makes this rank's q, k, v and dout, "b s h d".
        opened: a context in which attention of them works, and beside it the same without messages where that can be had.
            Collective.
        rounds: in how many it takes part, which its first turn decides.
    """

    name: str
    local: Callable[[], Sequence[torch.Tensor]]
    opened: Callable[[], contextlib.AbstractContextManager[Sequence[Attend]]]
    rounds: int = ROUNDS
    _ms: dict[tuple[int, str], list[float]] = field(default_factory=dict)

    def take_turn(self, ranks: Ranks) -> None:
        """Time every call for a moment. Collective."""
        local = self.local()
        with self.opened() as attends:
            variants = [calls_of(attend, local) for attend in attends]
            for metric in METRICS:
                count = self._count(metric, ranks)
                if count > 1:
                    for calls in variants:
                        calls[metric]()
                for _ in range(count):
                    for which, calls in enumerate(variants):
                        self._ms.setdefault((which, metric), []).append(timed(calls[metric], ranks))
        self.rounds = rounds_of(largest(self._ms[0, METRICS[-1]][0], ranks) / 1e3)

    def _count(self, metric: str, ranks: Ranks) -> int:
        if (0, metric) not in self._ms:
            return 1
        return min(MOST_CALLS, max(1, round(1e3 * MOMENT_S / largest(self._ms[0, metric][-1], ranks))))

    def medians_ms(self, ranks: Ranks) -> list[dict[str, float]]:
        """Of the slowest rank, by metric: as it is, and without messages. Collective."""
        found: list[dict[str, float]] = []
        for (which, metric), times in self._ms.items():
            if which == len(found):
                found.append({})
            found[which][metric] = largest(statistics.median(times), ranks)
        return found


def calls_of(attend: Attend, local: Sequence[torch.Tensor]) -> dict[str, Callable[[], object]]:
    """What is timed, by metric."""
    leaves = [x.requires_grad_() for x in local[:3]]
    calls: tuple[Callable[[], object], ...] = (
        lambda: attend(*leaves),
        lambda: torch.autograd.grad(attend(*leaves), leaves, local[3]),
    )
    return dict(zip(METRICS, calls, strict=True))


def waiting_ms(attend: Attend, local: Sequence[torch.Tensor], ranks: Ranks, journal: Journal) -> dict[str, float]:
    """Milliseconds of a call in which compute stood still for messages, by metric, of the rank that waited longest.

    What messages add beyond it is what they take of the GPU from attention beside them, or chance.
    """
    found = {}
    for metric, call in calls_of(attend, local).items():
        journal.discard()
        journal.is_measuring = True
        for _ in range(WAITED):
            timed(call, ranks)
        journal.is_measuring = False
        found[metric] = largest(1e3 * journal.take().exposed_s / WAITED, ranks)
    return found


def timed(call: Callable[[], object], ranks: Ranks) -> float:
    """Milliseconds of a call that all ranks begin together. Collective."""
    dist.barrier()
    if ranks.device.type != "cuda":
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # The GPUs wait about 2 ms, so that what is measured is never the launching.
    torch.cuda._sleep(4_000_000)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def largest(value: float, ranks: Ranks) -> float:
    """Of all ranks; infinite if any has NaN. Collective."""
    found = torch.tensor([value if value == value else float("inf")], device=ranks.device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)
