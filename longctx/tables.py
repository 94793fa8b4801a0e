"""The README's tables, made from measurements: of runs here, of attention in `tables_attention`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from longctx.errors import ConfigError, did_you_mean
from longctx.results import Measurement
from longctx.table_parts import OLDER, latest, mark, markdown, newest_commit, provenance, with_unit
from longctx.tables_attention import attention_table, context_parallel_table, errors_table, forms_table

_TRAINING_METRICS = {"tokens/s": "tokens/s", "mfu": "MFU", "mfu dense": "MFU if dense", "memory": "peak memory"}


def training_table(rows: Sequence[Measurement]) -> str:
    """Training steps: a row a system and configuration, peers beside ours."""
    rows = latest([row for row in rows if row.name.startswith("train/")])
    if not rows:
        return "Not measured yet."
    commit = newest_commit(rows)
    body = []
    for config, gpus, gpu in dict.fromkeys((r.config, r.gpus, r.gpu) for r in rows):
        of_config = [r for r in rows if (r.config, r.gpus, r.gpu) == (config, gpus, gpu)]
        for name in dict.fromkeys(r.name for r in of_config):
            got = {r.metric: r for r in of_config if r.name == name}
            line = [
                config,
                f"{gpus} x {gpu}" if gpus else gpu,
                name.split("/", 1)[1] + mark(max(got.values(), key=lambda row: row.date), commit),
            ]
            body.append([*line, *(with_unit(got[m]) if m in got else "-" for m in _TRAINING_METRICS)])
    table = markdown(["model, sequence", "GPUs", "system", *_TRAINING_METRICS.values()], body)
    note = provenance(rows)
    said = "`*` from `benchmarks/results/anchors.csv`." + (f" Ours: {note}." if note else "")
    if "†" in table:
        said += f" {OLDER}"
    return f"{table}\n\n{said}"


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


_SCALING_METRICS = {
    "tokens/s a GPU": "tokens/s a GPU",
    "tflops": "TFLOP/s a GPU",
    "mfu": "MFU",
    "mfu dense": "MFU if dense",
    "memory": "peak memory",
    "waiting": "waiting for messages",
}


def scaling_table(rows: Sequence[Measurement]) -> str:
    """A run a row: what each of so many GPUs reaches, and how that compares with the fewest."""
    rows = latest([row for row in rows if row.name.startswith("scaling/")])
    if not rows:
        return "Not measured yet."
    commit = newest_commit(rows)
    found: dict[tuple[str, str], dict[int, dict[str, Measurement]]] = {}
    for row in rows:
        found.setdefault((row.config, row.gpu), {}).setdefault(row.gpus, {})[row.metric] = row
    body = []
    for (config, gpu), runs in found.items():
        least = runs[min(runs)]["tflops"].value
        for gpus, got in sorted(runs.items()):
            cells = [with_unit(got[m]) if m in got else "-" for m in _SCALING_METRICS]
            share = f"{got['tflops'].value / least:.1%}".replace("%", " %")
            body.append([config, f"{gpus} x {gpu}{mark(got['tflops'], commit)}", *cells, share])
    header = ["model, sequence", "GPUs", *_SCALING_METRICS.values(), "of the fewest GPUs' TFLOP/s"]
    table = markdown(header, body)
    return f"{provenance(rows)}\n\n{table}" + (f"\n\n{OLDER}" if "†" in table else "")


TABLES: dict[str, Callable[[Sequence[Measurement]], str]] = {
    "attention": attention_table,
    "errors": errors_table,
    "forms": forms_table,
    "training": training_table,
    "scaling": scaling_table,
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
