"""Times of several calls on one device, taken in turns.

A GPU under load runs as fast as its power and heat allow, which changes within tens of milliseconds by several percent: what is timed
first, or after something that draws less, looks faster. So each turn runs every call once, in an order of its own, and a call's time
is the median over the turns.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")

# A call is run so often that its runs take about so long together, within these bounds; what takes very long, once.
TOGETHER_S = 0.3
FEWEST, MOST = 3, 50
VERY_LONG_S = 1.0


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
    def times(self) -> int:
        """How often it is run."""
        if self.seconds > VERY_LONG_S:
            return 1
        return max(FEWEST, MOST if self.seconds * MOST < TOGETHER_S else int(TOGETHER_S / self.seconds))

    @property
    def expected(self) -> float:
        """Seconds that timing it takes at most."""
        return self.times * self.seconds


def medians_ms(calls: Mapping[Key, Call], device: torch.device) -> tuple[dict[Key, float], dict[Key, Exception]]:
    """Milliseconds of each call, and the error of each that failed: it is not called again."""
    times: dict[Key, list[float]] = {key: [] for key in calls}
    failed: dict[Key, Exception] = {}
    turns = max((call.times for call in calls.values()), default=0)
    # The same orders at every run.
    orders = random.Random(0)
    for turn in range(turns):
        # What is run less often is spread evenly over the turns.
        due = [key for key, call in calls.items() if (turn + 1) * call.times // turns > turn * call.times // turns]
        readings: dict[Key, Callable[[], float]] = {}
        for key in orders.sample(due, len(due)):
            if key in failed:
                continue
            try:
                readings[key] = _started(calls[key].run, device)
            except Exception as error:  # whatever a peer raises is its reason to have no number
                # Its traceback would keep what it had allocated.
                failed[key] = error.with_traceback(None)
                if isinstance(error, torch.OutOfMemoryError):
                    torch.cuda.empty_cache()
        _synchronize(device)
        for key, read in readings.items():
            times[key].append(read())
    return {key: statistics.median(found) for key, found in times.items() if key not in failed}, failed


def warmed_up(run: Callable[[], object], device: torch.device) -> Call:
    """What is run for the first time here: once to compile it, once to see how long it takes."""
    run()
    _, seconds = timed_once(run, device)
    return Call(run, seconds)


def timed_once(run: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """What `run` returns, and the seconds until the device has it."""
    _synchronize(device)
    began = time.perf_counter()
    result = run()
    _synchronize(device)
    return result, time.perf_counter() - began


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _started(run: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """Run it; what is returned says, once the device is done, how many milliseconds that took."""
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        ended = time.perf_counter()
        return lambda: 1e3 * (ended - began)
    from triton.runtime import driver

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Larger than the L2 cache: what the call before left there is not the call's own.
    driver.active.clear_cache(driver.active.get_empty_cache_for_benchmark())
    begin.record()
    run()
    end.record()
    return lambda: begin.elapsed_time(end)
