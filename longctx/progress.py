"""What a person sees of a run: a live bar or plain lines, and what the library logs. Only rank 0 shows anything."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any, TextIO

from longctx.metrics import Rates


class Progress:
    """A live bar on a terminal, one plain line per record elsewhere.

    Args:
        total: steps of the whole run.
        style: "bar", "plain", "off", or "auto": a bar where `stream` is a terminal.
        unit: what one rank is, "GPU" or "rank".
        stream: where to; stderr for the bar and stdout for lines unless said otherwise.
    """

    def __init__(self, total: int, *, style: str = "auto", unit: str = "GPU", stream: TextIO | None = None) -> None:
        self.total = total
        self.unit = unit
        self._stream = stream
        if style == "auto":
            style = "bar" if (stream or sys.stderr).isatty() else "plain"
        self.style = style
        self._bar: Any = None
        if style == "bar":
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="step", dynamic_ncols=True, file=stream, smoothing=0.1)

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self.style == "off":
            return
        if self._bar is not None:
            self._bar.write(text, file=self._stream or sys.stderr)
        else:
            print(text, file=self._stream, flush=True)

    def begin_at(self, step: int) -> None:
        """The run goes on with `step` instead of 0."""
        if self._bar is not None:
            self._bar.initial = step
            self._bar.n = step
            self._bar.refresh()

    def advance(self) -> None:
        """One more step is done."""
        if self._bar is not None:
            self._bar.update()

    def show(self, step: int, loss: float, rates: Rates, *, memory: int, eta_seconds: float | None) -> None:
        """The state after `step`, counted from 0."""
        parts = describe_rates(rates, unit=self.unit)
        parts.append(f"mem {in_bytes(memory)}")
        if self._bar is not None:
            self._bar.set_description_str(f"loss {loss:.4f}", refresh=False)
            self._bar.set_postfix_str(" ".join(parts))
        elif self.style == "plain":
            eta = f"ETA {duration(eta_seconds)}" if eta_seconds is not None else "ETA -"
            width = len(str(self.total))
            line = [f"step {step:>{width}}/{self.total}", f"loss {loss:.4f}", *parts, eta]
            print(" | ".join(line), file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the terminal in order."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
            self.style = "plain"


def describe_rates(rates: Rates, *, unit: str) -> list[str]:
    """Rates as short phrases: tokens, tokens per rank, utilisation (or TFLOP/s where no peak is known), data wait, and of
    several ranks exposed communication and the imbalance of attention."""
    parts = [
        f"{in_thousands(rates.tokens_per_second)} tok/s",
        f"{in_thousands(rates.tokens_per_second_per_gpu)} tok/s/{unit}",
    ]
    if rates.mfu is not None and rates.mfu_dense is not None:
        parts.append(f"MFU {rates.mfu:.1%} (dense {rates.mfu_dense:.1%})")
    else:
        parts.append(
            f"{in_thousands(rates.tflops * 1e12)}FLOP/s/{unit} (dense {in_thousands(rates.tflops_dense * 1e12)})"
        )
    # Below this the wait is the queue's own overhead.
    if rates.data_seconds > 0.01 * rates.seconds:
        parts.append(f"data wait {rates.data_seconds / rates.seconds:.0%}")
    if rates.telemetry is not None and rates.telemetry.comm_bytes:
        parts.append(f"exposed comm {rates.exposed_comm_share:.1%}")
        # Below this it is measurement noise.
        if rates.telemetry.attention_imbalance > 1.02:
            parts.append(f"imbalance {rates.telemetry.attention_imbalance:.2f}")
    return parts


def in_thousands(x: float) -> str:
    """1234 -> "1.23k"; three figures."""
    for factor, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= factor:
            value = x / factor
            return (
                f"{value:.2f}{suffix}"
                if value < 10
                else f"{value:.1f}{suffix}"
                if value < 100
                else f"{value:.0f}{suffix}"
            )
    return f"{x:.0f}"


def in_bytes(n: float) -> str:
    """Bytes in the unit that reads best: "3.2 GiB"."""
    for factor, suffix in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if n >= factor:
            return f"{n / factor:.1f} {suffix}"
    return f"{n:.0f} B"


def duration(seconds: float) -> str:
    """ "1:02:03", or "2:03" below an hour."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def log_to(say: Callable[[str], None] | None, *, level: int = logging.INFO) -> None:
    """Send what the library logs from `level` on to `say`. None: as Python does by itself, warnings to stderr."""
    logger = logging.getLogger("longctx")
    for handler in list(logger.handlers):
        if isinstance(handler, _SayHandler):
            logger.removeHandler(handler)
    logger.propagate = say is None
    if say is not None:
        logger.addHandler(_SayHandler(say))
    logger.setLevel(level if say is not None else logging.WARNING)


class _SayHandler(logging.Handler):
    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        kind = "warning" if record.levelno >= logging.WARNING else "note"
        self._say(f"{kind:<9} {record.getMessage()}")
