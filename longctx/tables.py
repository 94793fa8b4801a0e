"""The README's tables, made from measurements."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from longctx.errors import ConfigError, did_you_mean
from longctx.kernels import kernel_names
from longctx.results import Measurement


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


_OLDER = "`†` measured with an earlier commit, in another run."


def newest_commit(rows: Iterable[Measurement]) -> str:
    """Of our own measurements."""
    return max(((row.date, row.commit) for row in rows if not row.source), default=("", ""))[1]


def mark(row: Measurement, commit: str) -> str:
    """`*` for a figure of anchors.csv, `†` for one of another commit than `commit`."""
    return "*" if row.source else "" if row.commit == commit else "†"


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
        commit = newest_commit(here)
        for row in (*anchors, *here):
            value = f"{row.value:.0f}{mark(row, commit)}"
            cells.setdefault((row.config, row.name.split("/")[1]), {})[row.metric] = value
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
    text = "".join(tables)
    notes = ["All figures of a row come from one run."]
    if re.search(r"\d\*(?!\*)", text):
        notes = [
            "`*` measured earlier on such a GPU (`benchmarks/results/anchors.csv`); all other figures of a row come from one run."
        ]
    if "†" in text:
        notes.append(_OLDER)
    return "\n\n".join([*tables, " ".join(notes)])


def _any_config(cells: dict[tuple[str, str], dict[str, str]], system: str) -> dict[str, str] | None:
    return next((got for (_, s), got in cells.items() if s == system), None)


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
        said += f" {_OLDER}"
    return f"{table}\n\n{said}"


def with_unit(row: Measurement) -> str:
    """A value as a reader expects it: `35.0 %`, `17 000`, `16.9 GiB`."""
    if row.unit == "%":
        return f"{row.value:.1f} %"
    if row.unit == "tokens/s":
        return f"{row.value:_.0f}".replace("_", " ")
    return f"{row.value:.1f} {row.unit}"


# system -> column, in order. The first table holds ways to attend over several GPUs, the second what one of them costs NCCL.
_RING_COLUMNS = {
    "one GPU: ours": "one GPU: ours",
    "one GPU: ours, share and halo": "one GPU: ours, share and halo",
    "one GPU: cuDNN (torch)": "one GPU: cuDNN",
    "torch-cp-alltoall": "torch CP, alltoall",
    "torch-cp-allgather": "torch CP, allgather",
    "ulysses-torch": "Ulysses, cuDNN",
    "auto-auto": "**ours: auto**",
    "direct-nccl": "**ours: direct**",
    "gather-nccl": "**ours: gather**",
    "ulysses": "**ours: Ulysses**",
}
_NCCL_COLUMNS = {
    "direct-nccl": "NCCL as it is",
    "direct-nccl-16sms": "at most 16 SMs",
    "direct-nccl-8sms": "at most 8 SMs",
    "direct-nccl-4sms": "at most 4 SMs",
    "direct-nccl-no-priority": "normal priority",
    "direct-copy_engine": "copy engine",
}


def context_parallel_table(rows: Sequence[Measurement]) -> str:
    """Forward / forward+backward TFLOP/s per GPU of attention over several GPUs: a row a shape, a column a way to do it."""
    rows = latest([row for row in rows if row.name.startswith("ring/")])
    if not rows:
        return "Not measured yet."
    commit = newest_commit(rows)
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        value = f"{row.value:.0f}{mark(row, commit)}"
        cells.setdefault((row.config, row.name.split("/")[1]), {})[row.metric] = value

    def table(columns: dict[str, str], configs: Sequence[str]) -> str:
        systems = [system for system in columns if any((config, system) in cells for config in configs)]
        body = []
        for config in configs:
            found = [cells.get((config, system), {}) for system in systems]
            rates = [[got[m] for m in ("forward", "forward+backward") if m in got] for got in found]
            body.append([config, *(" / ".join(of_system) or "-" for of_system in rates)])
        return markdown(["batch x length, heads, mask", *(columns[system] for system in systems)], body)

    configs = list(dict.fromkeys(config for config, _ in cells))
    tables = [table(_RING_COLUMNS, configs)]
    held = [c for c in configs if any((c, system) in cells for system in _NCCL_COLUMNS if "sms" in system)]
    if held:
        tables.append("The direct exchange by what it leaves to attention:\n\n" + table(_NCCL_COLUMNS, held))
    if "†" in "".join(tables):
        tables.append(_OLDER)
    return "\n\n".join([f"{provenance(rows)}; TFLOP/s per GPU forward / forward+backward, bf16", *tables])


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
_RATIO = " ratio"
# Kernels of others behind our contract, whose errors are theirs.
_AROUND = ("cudnn", "flash4")


def errors_table(rows: Sequence[Measurement]) -> str:
    """Errors of our own kernels against float64, in brackets as multiples of the lesser of cuDNN's and FA4's; of every block
    kernel the greatest multiple."""
    rows = latest([row for row in rows if row.name.startswith("errors/")])
    if not rows:
        return "Not measured yet."
    cells: dict[tuple[str, str], dict[str, Measurement]] = {}
    for row in rows:
        cells.setdefault((row.config, row.name.split("/")[1]), {})[row.metric] = row
    known = {name: _ATTENTION_COLUMNS.get(name, name) for _, name in cells}
    commit = newest_commit(rows)
    body = [
        [config, known[name], *(_error_cell(got, tensor, commit) for tensor in _ERROR_TENSORS)]
        for (config, name), got in cells.items()
        if name in kernel_names() and name not in _AROUND
    ]
    table = markdown(["batch x length, heads, mask", "kernel", *_ERROR_TENSORS], body)
    said = []
    for name in (name for name in kernel_names() if name in known):
        ratios = [row for (_, other), got in cells.items() if other == name for row in got.values()]
        ratios = [row for row in ratios if row.metric.endswith(_RATIO)]
        if ratios:
            most = max(ratios, key=lambda row: row.value)
            said.append(f"{known[name].strip('*')} {most.value:.2f} x ({most.metric.removesuffix(_RATIO)})")
    note = f"{provenance(rows)}; RMS error over RMS size, bf16" + (f". At most: {', '.join(said)}" if said else "")
    return f"{note}\n\n{table}" + (f"\n\n{_OLDER}" if "†" in table else "")


def _error_cell(got: dict[str, Measurement], tensor: str, commit: str) -> str:
    if tensor not in got:
        return "-"
    ratio = got.get(f"{tensor}{_RATIO}")
    value = f"{got[tensor].value:.1e}{mark(got[tensor], commit)}"
    return value + (f" ({ratio.value:.2f} x)" if ratio is not None else "")


def forms_table(rows: Sequence[Measurement]) -> str:
    """What each form of our kernels reaches, and in brackets its time over the plain call's."""
    rows = latest([row for row in rows if row.name.startswith("forms/")])
    if not rows:
        return "Not measured yet."
    found = {(row.name.split("/")[1], row.config, *row.metric.rsplit(", ", 1)): row for row in rows}
    commit = newest_commit(rows)
    directions = ("forward", "backward")
    forms = list(dict.fromkeys(form for _, _, form, _ in found))

    def cell(kernel: str, config: str, form: str, direction: str) -> str:
        row = found.get((kernel, config, form, direction))
        if row is None:
            return "-"
        plain = found[kernel, config, "plain", direction]
        times = "" if form == "plain" else f" ({plain.value / row.value:.2f} x)"
        return f"{row.value:.0f}{mark(row, commit)}{times}"

    body = [
        [config, kernel, *(" / ".join(cell(kernel, config, form, d) for d in directions) for form in forms)]
        for kernel, config in dict.fromkeys(key[:2] for key in found)
    ]
    table = markdown(["batch x length, heads, mask", "kernel", *forms], body)
    note = f"{provenance(rows)}; TFLOP/s forward / backward, bf16, in brackets the time over the plain call's"
    return f"{note}\n\n{table}" + (f"\n\n{_OLDER}" if "†" in table else "")


TABLES: dict[str, Callable[[Sequence[Measurement]], str]] = {
    "attention": attention_table,
    "errors": errors_table,
    "forms": forms_table,
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
