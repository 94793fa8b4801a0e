"""The README's tables, made from measurements."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from longctx.errors import ConfigError, did_you_mean
from longctx.kernels import kernel_names
from longctx.kernels.choice import Table
from longctx.results import Measurement
from longctx.settings import parse_size


def latest(rows: Iterable[Measurement]) -> list[Measurement]:
    """The newest row of each (name, gpu, gpus, config, metric), in the order in which these first appear."""
    newest: dict[tuple, Measurement] = {}
    for row in rows:
        key = (row.name, row.gpu, row.gpus, row.config, row.metric)
        # Of rows of one time, or of none, the later line holds.
        if key not in newest or row.date >= newest[key].date:
            newest[key] = row
    return list(newest.values())


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column left, the others right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def provenance(rows: Sequence[Measurement]) -> str:
    """Where and when the newest of our own rows was measured."""
    own = [row for row in rows if not row.source]
    if not own:
        return ""
    row = max(own, key=lambda r: r.date)
    return f"{row.gpu}, torch {row.torch}, triton {row.triton}, commit {row.commit}, {row.date[:10]}"


# system -> column, in order; "*" marks the figures that stand in anchors.csv only.
_ATTENTION_COLUMNS = {
    "matmul": "matmul bound",
    "fa2": "FA2 (torch)",
    "flex": "Flex",
    "cudnn-torch": "cuDNN (torch)",
    "fa4": "FA4",
    "triton": "**ours: triton**",
    "cudnn": "**ours: around cuDNN**",
    "flash4": "**ours: around FA4**",
    "hopper": "**ours: Hopper**",
}


def attention_table(rows: Sequence[Measurement]) -> str:
    """Forward / backward TFLOP/s of one GPU: a row a shape, a column an implementation."""
    rows = [row for row in rows if row.name.startswith("attention/")]
    if not rows:
        return "Not measured yet."
    tables = []
    for gpu in dict.fromkeys(row.gpu for row in rows):
        here = latest([r for r in rows if r.gpu == gpu and not r.source])
        anchors = latest([r for r in rows if r.gpu == gpu and r.source])
        cells: dict[tuple[str, str], dict[str, str]] = {}
        commit = max(here, key=lambda row: row.date).commit if here else ""
        for row in (*anchors, *here):
            mark = "*" if row.source else "" if row.commit == commit else "†"
            cells.setdefault((row.config, row.name.split("/")[1]), {})[row.metric] = f"{row.value:.0f}{mark}"
        known = {**_ATTENTION_COLUMNS, **{s: s for _, s in cells if s not in _ATTENTION_COLUMNS}}
        systems = [s for s in known if any(system == s for _, system in cells) or s in ("triton", "cudnn")]
        body = []
        for config in dict.fromkeys(r.config for r in (*anchors, *here) if r.name != "attention/matmul"):
            line = [config]
            for system in systems:
                # The bound is one figure of the whole run, written in every row.
                got = cells.get((config, system)) or (system == "matmul" and _any_config(cells, system)) or {}
                line.append(" / ".join(got.get(m, "-") for m in ("forward", "backward")) if got else "-")
                if system == "matmul" and got:
                    line[-1] = got["forward"]
            body.append(line)
        note = provenance(here) or f"{gpu}; ours not measured yet"
        tables.append(
            f"{note}; TFLOP/s forward / backward, bf16\n\n{markdown(['batch x length, heads, mask', *(known[s] for s in systems)], body)}"
        )
    footnote = "`*` measured earlier on such a GPU (`benchmarks/results/anchors.csv`); all other figures of a row come from one run."
    if "†" in "".join(tables):
        footnote += " `†` measured with an earlier commit, in another run."
    return "\n\n".join([*tables, footnote])


def _any_config(cells: dict[tuple[str, str], dict[str, str]], system: str) -> dict[str, str] | None:
    return next((got for (_, s), got in cells.items() if s == system), None)


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
    table = f"\n# From {where.removeprefix('# ')}.\n{found['open']}" + "\n".join(lines) + f"\n{found['close']}"
    return text[: found.start()] + table + text[found.end() :]


_TRAINING_METRICS = {"tokens/s": "tokens/s", "mfu": "MFU", "mfu dense": "MFU if dense", "memory": "peak memory"}


def training_table(rows: Sequence[Measurement]) -> str:
    """Training steps: a row a system and configuration, peers beside ours."""
    rows = latest([row for row in rows if row.name.startswith("train/")])
    if not rows:
        return "Not measured yet."
    body = []
    for config, gpus, gpu in dict.fromkeys((r.config, r.gpus, r.gpu) for r in rows):
        of_config = [r for r in rows if (r.config, r.gpus, r.gpu) == (config, gpus, gpu)]
        for name in dict.fromkeys(r.name for r in of_config):
            got = {r.metric: r for r in of_config if r.name == name}
            line = [
                config,
                f"{gpus} x {gpu}" if gpus else gpu,
                name.split("/", 1)[1] + ("*" if all(r.source for r in got.values()) else ""),
            ]
            body.append([*line, *(with_unit(got[m]) if m in got else "-" for m in _TRAINING_METRICS)])
    table = markdown(["model, sequence", "GPUs", "system", *_TRAINING_METRICS.values()], body)
    note = provenance(rows)
    return "\n\n".join(
        filter(None, [table, "`*` from `benchmarks/results/anchors.csv`." + (f" Ours: {note}." if note else "")])
    )


def with_unit(row: Measurement) -> str:
    """A value as a reader expects it: `35.0 %`, `17 000`, `16.9 GiB`."""
    if row.unit == "%":
        return f"{row.value:.1f} %"
    if row.unit == "tokens/s":
        return f"{row.value:_.0f}".replace("_", " ")
    return f"{row.value:.1f} {row.unit}"


def context_parallel_table(rows: Sequence[Measurement]) -> str:
    """Forward / forward+backward TFLOP/s per GPU of attention over several GPUs: a row a shape, a column a way to do it."""
    rows = latest([row for row in rows if row.name.startswith("ring/")])
    if not rows:
        return "Not measured yet."
    cells: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        cells.setdefault((row.config, row.name.split("/")[1]), {})[row.metric] = row.value
    systems = list(dict.fromkeys(system for _, system in cells))
    body = []
    for config in dict.fromkeys(config for config, _ in cells):
        found = [cells.get((config, system), {}) for system in systems]
        rates = [[got[m] for m in ("forward", "forward+backward") if m in got] for got in found]
        body.append([config, *(" / ".join(f"{x:.0f}" for x in of_system) or "-" for of_system in rates)])
    table = markdown(["batch x length, heads, mask", *systems], body)
    return f"{provenance(rows)}; TFLOP/s per GPU forward / forward+backward, bf16\n\n{table}"


def ring_table(rows: Sequence[Measurement]) -> str:
    """What a ring costs: the same model and sequence on several GPUs beside one of them, in speed and in losses."""
    rows = latest(rows)
    body = []
    for row in rows:
        if row.name != "train/longctx" or row.metric != "tokens/s" or row.gpus < 2:
            continue
        alone = [
            r
            for r in rows
            if (r.name, r.config, r.gpu, r.metric, r.gpus) == (row.name, row.config, row.gpu, row.metric, 1)
        ]
        if alone:
            per_gpu = row.value / row.gpus
            body.append(
                [
                    row.config,
                    f"{row.gpus} x {row.gpu}",
                    with_unit(replace(row, value=per_gpu)),
                    f"{100 * per_gpu / alone[0].value:.1f} %",
                    _loss_difference(rows, row),
                ]
            )
    if not body:
        return "Not measured yet."
    header = ["model, sequence", "GPUs", "tokens/s a GPU", "of one GPU's speed", "losses differ by at most"]
    return markdown(header, body)


def _loss_difference(rows: Sequence[Measurement], row: Measurement) -> str:
    """The largest relative difference between the losses of the same steps on `row.gpus` GPUs and on one."""
    losses = [r for r in rows if r.name.startswith("losses/") and (r.config, r.gpu) == (row.config, row.gpu)]
    alone = {r.metric: r.value for r in losses if r.gpus == 1}
    pairs = [(r.value, alone[r.metric]) for r in losses if r.gpus == row.gpus and r.metric in alone]
    return f"{max(abs(a - b) / b for a, b in pairs):.0e} over {len(pairs)} steps" if pairs else "-"


def recall_table(rows: Sequence[Measurement]) -> str:
    """Answers found in another rank's shard."""
    rows = latest([row for row in rows if row.name.startswith("recall/")])
    if not rows:
        return "Not measured yet."
    body = [[row.config, row.name.split("/", 1)[1], f"{row.value:.1f} {row.unit}"] for row in rows]
    return markdown(["task", "attention", "answered"], body)


def faults_table(rows: Sequence[Measurement]) -> str:
    """What a run survived, and how often that was tried."""
    rows = latest([row for row in rows if row.name.startswith("faults/")])
    if not rows:
        return "Not measured yet."
    body = []
    for name in dict.fromkeys(row.name for row in rows):
        got = {row.metric: f"{row.value:.0f}" for row in rows if row.name == name}
        if "times" in got:
            body.append([name.split("/", 1)[1], got["times"], got["kept every checkpoint"], got["went on"]])
    steps = [f"{row.value:_.0f}".replace("_", " ") for row in rows if row.metric == "steps"]
    table = markdown(["2 processes, a checkpoint every 2 steps", "times", "kept every checkpoint", "went on"], body)
    return (
        f"{table}\n\nThe {steps[0]} steps between the kills are bit for bit those of an undisturbed run."
        if steps
        else table
    )


def numerics_table(rows: Sequence[Measurement]) -> str:
    """What rings of several sizes add to the error of one rank, the worst of out, dq, dk and dv."""
    # ring -> label -> tensor -> error; the configuration reads "ring 4, bf16 inputs, dk and dv sent in fp32, 1024 tokens".
    errors: dict[int, dict[str, dict[str, float]]] = {}
    for row in latest([row for row in rows if row.name.startswith("numerics/")]):
        ring, label = row.config.split(", ", 1)
        errors.setdefault(int(ring.removeprefix("ring ")), {}).setdefault(label, {})[row.metric] = row.value
    if 1 not in errors:
        return "Not measured yet."
    rings = sorted(errors)
    body = []
    for label, alone in errors[1].items():
        ratios = [max(errors[ring][label][tensor] / alone[tensor] for tensor in alone) for ring in rings[1:]]
        body.append([label, f"{min(alone.values()):.1e} to {max(alone.values()):.1e}", *(f"{r:.2f} x" for r in ratios)])
    header = ["causal attention on a CPU, error against float64", "one rank", *(f"ring {ring}" for ring in rings[1:])]
    return markdown(header, body)


_ERROR_TENSORS = ("out", "lse", "dq", "dk", "dv")


def errors_table(rows: Sequence[Measurement]) -> str:
    """Errors of one GPU's kernels against float64: ours, with the multiples of the least of cuDNN's and FA4's in brackets."""
    rows = latest([row for row in rows if row.name.startswith("errors/")])
    if not rows:
        return "Not measured yet."
    cells: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        cells.setdefault((row.config, row.name.split("/")[1]), {})[row.metric] = row.value
    known = {name: _ATTENTION_COLUMNS.get(name, name) for _, name in cells}
    body = [
        [config, known[name], *(_error_cell(got, tensor) for tensor in _ERROR_TENSORS)]
        for (config, name), got in cells.items()
    ]
    table = markdown(["batch x length, heads, mask", "kernel", *_ERROR_TENSORS], body)
    worst = {
        name: max(
            (x for (_, other), got in cells.items() if other == name for m, x in got.items() if m.endswith(" ratio")),
            default=None,
        )
        for name in kernel_names()
    }
    said = ", ".join(f"{known[name].strip('*')} {x:.2f} x" for name, x in worst.items() if x is not None)
    note = f"{provenance(rows)}; RMS error over RMS size, bf16" + (f". At most: {said}" if said else "")
    return f"{note}\n\n{table}"


def _error_cell(got: dict[str, float], tensor: str) -> str:
    if tensor not in got:
        return "-"
    ratio = got.get(f"{tensor} ratio")
    return f"{got[tensor]:.1e}" + (f" ({ratio:.2f} x)" if ratio is not None else "")


TABLES: dict[str, Callable[[Sequence[Measurement]], str]] = {
    "attention": attention_table,
    "errors": errors_table,
    "training": training_table,
    "ring": ring_table,
    "context-parallel": context_parallel_table,
    "recall": recall_table,
    "faults": faults_table,
    "numerics": numerics_table,
}

_REGION = re.compile(r"(?P<open><!-- table: (?P<name>[^\n>]*?) -->\n)(?P<text>.*?)(?P<close><!-- end -->)", re.DOTALL)


def render(text: str, rows: Sequence[Measurement]) -> str:
    """`text` with every marked table made anew.

    Raises:
        ConfigError: a marker names no table, or has no end.
    """

    def replaced(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ConfigError(f"<!-- table: {name} --> is not a table: {did_you_mean(name, TABLES)}")
        return f"{match['open']}\n{TABLES[name](rows)}\n\n{match['close']}"

    starts, regions = text.count("<!-- table: "), len(_REGION.findall(text))
    if starts != regions:
        raise ConfigError(f"{starts} table markers but {regions} tables: each needs its <!-- end -->")
    return _REGION.sub(replaced, text)
