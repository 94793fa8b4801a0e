"""By which measured speeds `kernel = "auto"` chooses: the table of `longctx.kernels.choice`, made from measurements."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from longctx.errors import ConfigError
from longctx.kernels import kernel_names
from longctx.kernels.choice import Table
from longctx.results import Measurement
from longctx.settings import parse_size
from longctx.table_parts import latest, provenance

# GPUs whose measurements decide `kernel = "auto"` -> their compute capability.
_DECIDING_GPUS = {"NVIDIA H100 80GB HBM3": (9, 0)}
# A benchmark's mask -> the kind of block that it makes.
_BLOCK_KINDS = {"causal": "causal", "full": "full", "window": "band", "docs": "rows"}
_ATTENTION_CASE = re.compile(r"\d+ x (?P<length>\w+), \d+/\d+ heads of (?P<head_dim>\d+), (?P<mask>[a-z]+)")


class AttentionCase(NamedTuple):
    """What the `config` of an attention measurement says: `1 x 32k, 32/8 heads of 128, causal`."""

    head_dim: int
    mask: str
    length: int

    @staticmethod
    def of(row: Measurement) -> AttentionCase | None:
        """None if the row is of something else."""
        found = _ATTENTION_CASE.match(row.config)
        length = parse_size(found["length"]) if found else None
        return AttentionCase(int(found["head_dim"]), found["mask"], length) if found and length else None


def kernel_rules(rows: Sequence[Measurement]) -> dict[tuple[int, int], Table]:
    """What `longctx.kernels.choice.MEASURED` should say by these measurements.

    A shape that was measured with several batch sizes or numbers of heads has the mean of their speeds, over the cases that
    every kernel of the shape has. Where our call around cuDNN was not measured, its forward has the speed of torch's: the last
    block's is the same call. Its backward adds sums and casts of ours, so nothing is said of that one.
    """
    speeds: dict[tuple, dict[str, dict[str, float]]] = {}
    for row in latest(rows):
        kernel = row.name.split("/", 1)[1] if row.name.startswith(("attention/", "sweep/")) else ""
        case = AttentionCase.of(row)
        is_stand_in = (kernel, row.metric) == ("cudnn-torch", "forward")
        if row.gpu not in _DECIDING_GPUS or case is None or not (is_stand_in or kernel in kernel_names()):
            continue
        if row.metric not in ("forward", "backward"):
            continue
        shape = case.head_dim, _BLOCK_KINDS[case.mask], case.length
        by_kernel = speeds.setdefault((_DECIDING_GPUS[row.gpu], shape, row.metric), {})
        if is_stand_in:
            by_kernel.setdefault("cudnn", {}).setdefault(row.config, row.value)
        else:
            by_kernel.setdefault(kernel, {})[row.config] = row.value
    found: dict[tuple[int, int], Table] = {}
    for (capability, shape, metric), by_kernel in sorted(speeds.items()):
        common = set.intersection(*(set(cases) for cases in by_kernel.values()))
        means = {
            kernel: round(statistics.mean(cases[c] for c in (common or cases))) for kernel, cases in by_kernel.items()
        }
        pair = found.setdefault(capability, {}).setdefault(shape, ({}, {}))
        pair[metric == "backward"].update(sorted(means.items(), key=lambda item: -item[1]))
    return found


def rules_text(rows: Sequence[Measurement]) -> str:
    """`kernel_rules` as the lines that `longctx/kernels/choice.py` holds, with where they come from."""
    lines = [f"# {provenance([row for row in rows if row.gpu in _DECIDING_GPUS])}"]
    for capability, table in kernel_rules(rows).items():
        lines += [f"    {capability}: {{"]
        lines += [f"        {shape}: {pair},".replace("'", '"') for shape, pair in table.items()]
        lines += ["    },"]
    return "\n".join(lines)


_RULES = re.compile(
    r"(?P<before>\n)# From (?P<from>[^\n]*)\n(?P<open># fmt: off\nMEASURED[^\n]*\{\n).*?(?P<close>^\}\n# fmt: on\n)",
    re.DOTALL | re.MULTILINE,
)


def with_rules(text: str, rows: Sequence[Measurement]) -> str:
    """`text`, the source of `longctx/kernels/choice.py`, with the table that the measurements make.

    Raises:
        ConfigError: it holds no such table, or there is nothing to choose by.
    """
    where, *lines = rules_text(rows).splitlines()
    if not lines:
        raise ConfigError("no measurements to choose a kernel by: run longctx bench attention --csv on a GPU first")
    found = _RULES.search(text)
    if found is None:
        raise ConfigError("there is no table MEASURED between `# fmt: off` and `# fmt: on`, after a line `# From ...`")
    table = (
        f"\n# From {where.removeprefix('# ')}, the newest of them.\n{found['open']}"
        + "\n".join(lines)
        + f"\n{found['close']}"
    )
    return text[: found.start()] + table + text[found.end() :]
