"""Times of several calls on one device, taken in turns.

A GPU under load runs as fast as its power and heat allow, which changes within a second by several percent: what is timed first, or
after a pause, looks faster. So a round times every call for a moment, and a call's time is the median over the rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)

ROUNDS = 5
# A moment: so long, or so many calls.
MOMENT_S = 0.03
MOST_CALLS = 50
# What takes longer is timed in fewer rounds: its own length steadies it, and has warmed it up.
LONG_S, LONG_ROUNDS = 0.2, 3
VERY_LONG_S = 1.0


def rounds_of(seconds: float) -> int:
    """In how many rounds a call of that length is timed."""
    return 1 if seconds > VERY_LONG_S else LONG_ROUNDS if seconds > LONG_S else ROUNDS


@dataclass(frozen=True)
class Call:
    """Something to time.

    Args:
        run: the call.
        seconds: that it takes at most, from a run before.
    """

    run: Callable[[], object]
    seconds: float

    @property
    def rounds(self) -> int:
        return rounds_of(self.seconds)

    @property
    def expected(self) -> float:
        """Seconds that timing it takes at most."""
        return self.rounds * (self.seconds if self.rounds < ROUNDS else self.seconds + max(self.seconds, MOMENT_S))


def medians_ms(calls: Mapping[Key, Call], device: torch.device) -> tuple[dict[Key, float], dict[Key, Exception]]:
    """Milliseconds of each call, and the error of each that failed: it is not called again."""
    times: dict[Key, list[float]] = {key: [] for key in calls}
    failed: dict[Key, Exception] = {}
    for turn in range(ROUNDS):
        for key, call in calls.items():
            if key in failed or turn >= call.rounds:
                continue
            try:
                times[key] += _moment(call, device)
            except Exception as error:  # whatever a peer raises is its reason to have no number
                # Its traceback would keep what it had allocated.
                failed[key] = error.with_traceback(None)
                if isinstance(error, torch.OutOfMemoryError):
                    torch.cuda.empty_cache()
    return {key: statistics.median(found) for key, found in times.items() if key not in failed}, failed


def median_ms(run: Callable[[], object], device: torch.device) -> float:
    """Of one call alone."""
    medians, failed = medians_ms({0: warmed_up(run, device)}, device)
    for error in failed.values():
        raise error
    return medians[0]


def warmed_up(run: Callable[[], object], device: torch.device) -> Call:
    """What is run for the first time here: once to compile it, once to see how long it takes."""
    run()
    _synchronize(device)
    began = time.perf_counter()
    run()
    _synchronize(device)
    return Call(run, time.perf_counter() - began)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _moment(call: Call, device: torch.device) -> list[float]:
    """Milliseconds of each of some calls one after the other."""
    if device.type != "cuda":
        began = time.perf_counter()
        call.run()
        return [1e3 * (time.perf_counter() - began)]
    from triton.runtime import driver

    # Larger than the L2 cache: what the call before left there is not the call's own.
    cache = driver.active.get_empty_cache_for_benchmark()
    count = min(MOST_CALLS, max(1, int(MOMENT_S / max(call.seconds, 1e-6))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    if call.rounds == ROUNDS:
        call.run()
    for begin, end in events:
        driver.active.clear_cache(cache)
        begin.record()
        call.run()
        end.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) for begin, end in events]
