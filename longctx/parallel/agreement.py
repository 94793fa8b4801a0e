"""Ranks that share a sequence compare what they are about to attend to, before the first message of it.

Ranks that hold other documents, lengths, layouts or heads would send each other messages of other sizes or in another
order: a hang, or worse, a result. Each rank writes what it is about to do to the store at which the processes met and
reads the others': no collective, no GPU. That costs a few round trips to the store for each new schedule, none for one
that was compared before.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from longctx.errors import DistributedError
from longctx.parallel.schedule import RingSchedule

# Schedules that count as compared; the same number on every rank, so that all of them forget the same ones.
REMEMBERED = 64


class Agreement:
    """Comparisons among the ranks of one mesh that share sequences.

    Args:
        store: where they meet; None: nothing is compared.
        rank: this process's global rank; `ranks`: of all that compare, this one included.
        name_of: the coordinates of a rank, for messages.
        prefix: how this rank's messages begin.
        timeout: how long to wait for the others.

    Attributes:
        comparisons: how many there were.
    """

    def __init__(
        self,
        store: dist.Store | None,
        rank: int,
        ranks: tuple[int, ...],
        *,
        name_of: Callable[[int], str],
        prefix: str,
        timeout: timedelta,
    ) -> None:
        self._store = store if len(ranks) > 1 else None
        self._rank, self._ranks = rank, ranks
        self._name_of, self._prefix, self._timeout = name_of, prefix, timeout
        self._agreed: OrderedDict[tuple, None] = OrderedDict()
        self.comparisons = 0

    def check(self, schedule: RingSchedule, q: Tensor, k: Tensor, *, extra: str = "") -> None:
        """Compare an attention call over `schedule`, unless one like it was compared before. Collective for a new one.

        Args:
            q, k: "b s h d" and "b s hk d", as they enter the exchange.
            extra: anything else that decides which messages are sent, such as the name of a strategy.

        Raises:
            DistributedError: the ranks are about to attend differently (names who differs in what), or one of them did
                not come to this call in time.
        """
        if self._store is None:
            return
        key = (schedule.digest, tuple(q.shape), tuple(k.shape), q.dtype, extra)
        if key in self._agreed:
            self._agreed.move_to_end(key)
            return
        self._compare(
            {
                "sequence": f"{schedule.seq_len:_} positions",
                "layout": f"{schedule.layout} over a ring of {schedule.world}",
                "hops": list(schedule.distances),
                "heads": f"{q.shape[2]} / {k.shape[2]} of {q.shape[3]} in {q.dtype}",
                "batch": f"{q.shape[0]} x {q.shape[1]:_} local tokens",
                "strategy": extra,
                # Last: what is above explains it where it differs too.
                "mask (documents, window)": schedule.digest,
            }
        )
        self._agreed[key] = None
        if len(self._agreed) > REMEMBERED:
            self._agreed.popitem(last=False)

    def _compare(self, mine: dict[str, Any]) -> None:
        store, n = self._store, self.comparisons
        assert store is not None, "one rank has nothing to compare"
        self.comparisons += 1
        told: dict[int, dict[str, Any]] = {}
        try:
            store.set(f"{n}/{self._rank}", json.dumps(mine))
            for rank in self._ranks:
                store.wait([f"{n}/{rank}"], self._timeout)
                told[rank] = json.loads(store.get(f"{n}/{rank}"))
            if n:
                # Whoever wrote the n-th has read all of the one before.
                store.delete_key(f"{n - 1}/{self._rank}")
        except (dist.DistError, RuntimeError) as error:
            late = next(r for r in self._ranks if r not in told)
            raise DistributedError(
                f"{self._prefix} compares a new schedule with the ranks that share its sequence, but "
                f"{self._names([late])} did not come to that: {str(error).splitlines()[0]}\n"
                "       it died, hangs, or is at another place of the program: all of them make the same attention calls"
            ) from error
        if any(theirs != told[self._rank] for theirs in told.values()):
            raise DistributedError(self._difference(told))

    def _difference(self, told: dict[int, dict[str, Any]]) -> str:
        first = next(iter(told.values()))
        differs = [name for name in first if len({str(theirs.get(name)) for theirs in told.values()}) > 1]
        kinds: dict[str, list[int]] = {}
        for rank, theirs in told.items():
            kinds.setdefault("; ".join(f"{name} {theirs.get(name)}" for name in differs), []).append(rank)
        lines = [f"       {self._names(ranks)}: {text}" for text, ranks in kinds.items()]
        return "\n".join(
            [
                f"{self._prefix} the ranks that share a sequence are about to attend differently, in {', '.join(differs)}",
                *lines,
                "       give all of them the same documents, mask, layout, length and heads",
            ]
        )

    def _names(self, ranks: list[int]) -> str:
        return ", ".join(f"rank {r} ({self._name_of(r)})" for r in ranks)
