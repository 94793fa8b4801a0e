"""What `longctx bench ring` found: rates, shares and exposed messages, as a table and as measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from longctx.peers import Case
from longctx.peers_ring import RingContender
from longctx.results import Measurement

METRICS = ("forward", "forward+backward")
# Of forward's products: backward has five for its two.
_WORK = {"forward": 1.0, "forward+backward": 3.5}


@dataclass
class RingResult:
    """Milliseconds of the slowest rank by contender and metric; where there is no time, the reason.

    Args:
        silent_ms: the same without messages.
        waited_ms: in which compute stood still for messages, of the rank that waited longest.
        flops: of forward on one GPU, where they are other than its share of the case.
    """

    case: Case
    ms: dict[str, dict[str, float]] = field(default_factory=dict)
    silent_ms: dict[str, dict[str, float]] = field(default_factory=dict)
    waited_ms: dict[str, dict[str, float]] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def tflops(self, name: str, metric: str, world: int) -> float:
        """Per GPU, on the pairs that the mask shows."""
        flops = self.flops.get(name, self.case.forward_flops / world)
        return _WORK[metric] * flops / self.ms[name][metric] / 1e9

    def best_alone(self, metric: str, world: int) -> float | None:
        """TFLOP/s of the fastest kernel on one GPU with its share of the work."""
        rates = [self.tflops(name, metric, world) for name in self.ms if name.startswith("one GPU")]
        return max(rates, default=None)

    def exposed(self, name: str, metric: str) -> float | None:
        """Milliseconds that messages add."""
        silent = self.silent_ms.get(name)
        return self.ms[name][metric] - silent[metric] if silent else None


def table(results: Sequence[RingResult], entrants: Sequence[RingContender], world: int) -> str:
    """Of every case a block: TFLOP/s per GPU, the share of the best kernel on one GPU, and what messages add to the time."""
    titles = {entrant.name: entrant.title for entrant in entrants}
    lines, notes = [], []
    for result in results:
        head = [*(f"{m} TFLOP/s" for m in METRICS), *(f"{m} share" for m in METRICS), "exposed messages", "waiting"]
        body = [["", *head]]
        for name in result.ms:
            rates = [result.tflops(name, m, world) for m in METRICS]
            alone = [result.best_alone(m, world) for m in METRICS]
            shares = [f"{rate / a:.3f}" if a else "-" for rate, a in zip(rates, alone, strict=True)]
            late = [result.exposed(name, m) for m in METRICS]
            shown = [
                f"{x:+.2f} ms ({x / result.ms[name][m]:+.1%})"
                for x, m in zip(late, METRICS, strict=True)
                if x is not None
            ]
            waited = " / ".join(f"{ms:.2f} ms" for ms in result.waited_ms.get(name, {}).values())
            told = [f"{rate:.3g}" for rate in rates]
            body.append([titles.get(name, name), *told, *shares, " / ".join(shown) or "-", waited or "-"])
        widths = [max(len(row[i]) for row in body) for i in range(len(body[0]))]
        lines.append(result.case.label)
        lines += ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in body]
        lines.append("")
        notes += [f"{result.case.label}: {titles.get(name, name)}: {why}" for name, why in result.refused.items()]
    return "\n".join([*lines, *notes])


def rows_of(result: RingResult, world: int, **where) -> list[Measurement]:
    """One case's results as measurements; `where`: the columns of `results.environment`."""
    config = f"{result.case.label}, {world} ranks"
    rows = []
    for name in result.ms:
        for metric in METRICS:
            rows.append((name, metric, result.tflops(name, metric, world), "TFLOP/s"))
            late = result.exposed(name, metric)
            if late is not None:
                rows.append((name, f"{metric} exposed", late, "ms"))
            if name in result.waited_ms:
                rows.append((name, f"{metric} waiting", result.waited_ms[name][metric], "ms"))
    return [
        Measurement(name=f"ring/{name}", config=config, metric=metric, value=value, unit=unit, **where)
        for name, metric, value, unit in rows
    ]
