"""What attention and its communication took of a step, over all ranks: exposed communication, imbalance, kernel speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longctx.parallel.journal import Account

# The numbers that a rank tells the others, in this order.
_TOLD = ("exposed_s", "attention_s", "flops", "bytes_sent")


@dataclass(frozen=True)
class StepTelemetry:
    """Attention and its communication in one step, or on average over several.

    Args:
        exposed_comm_ms: time that compute stood still for messages of attention, mean over the ranks; `_max` of the
            slowest. Waiting for a rank that computes for longer is part of it.
        exposed_comm_ms_max: likewise, of the rank that waited longest.
        comm_bytes: payload that a rank sent for attention, mean over the ranks.
        attention_ms: time in attention without that, mean over the ranks.
        attention_imbalance: `attention_ms` of the slowest rank over the mean; 1.0 is even, also where there was none.
        attention_tflops: TFLOP/s of a rank while it is in attention, counting what the mask shows.
    """

    exposed_comm_ms: float
    exposed_comm_ms_max: float
    comm_bytes: float
    attention_ms: float
    attention_imbalance: float
    attention_tflops: float

    @staticmethod
    def of(rows: Sequence[Sequence[float]]) -> StepTelemetry:
        """From what each rank `tells`; there is at least one."""
        exposed, attention, flops, sent = (list(column) for column in zip(*rows, strict=True))
        mean_attention = sum(attention) / len(attention)
        return StepTelemetry(
            exposed_comm_ms=1e3 * sum(exposed) / len(exposed),
            exposed_comm_ms_max=1e3 * max(exposed),
            comm_bytes=sum(sent) / len(sent),
            attention_ms=1e3 * mean_attention,
            attention_imbalance=max(attention) / mean_attention if mean_attention else 1.0,
            attention_tflops=sum(flops) / sum(attention) / 1e12 if sum(attention) else 0.0,
        )


def tells(account: Account) -> list[float]:
    """The numbers of a rank that `StepTelemetry.of` takes, in a row."""
    return [float(getattr(account, name)) for name in _TOLD]


def mean_telemetry(steps: Sequence[StepTelemetry]) -> StepTelemetry:
    """The mean of each number over `steps`, of which there is at least one; speed and imbalance weigh by time."""
    n = len(steps)
    attention = sum(s.attention_ms for s in steps)

    def by_time(name: str) -> float:
        if not attention:
            return sum(getattr(s, name) for s in steps) / n
        return sum(getattr(s, name) * s.attention_ms for s in steps) / attention

    return StepTelemetry(
        exposed_comm_ms=sum(s.exposed_comm_ms for s in steps) / n,
        exposed_comm_ms_max=max(s.exposed_comm_ms_max for s in steps),
        comm_bytes=sum(s.comm_bytes for s in steps) / n,
        attention_ms=attention / n,
        attention_imbalance=by_time("attention_imbalance"),
        attention_tflops=by_time("attention_tflops"),
    )
