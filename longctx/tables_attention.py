"""The README's tables of attention: on one GPU, its errors and forms, over several GPUs."""

from __future__ import annotations

import re
from collections.abc import Sequence

from longctx.kernels import kernel_names
from longctx.results import Measurement
from longctx.table_parts import OLDER, WHOLE_RUN, latest, mark, markdown, newest_commit, of_last_gpu, provenance

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
                got = cells.get((config, system)) or (system == "matmul" and cells.get((WHOLE_RUN, system))) or {}
                line.append(" / ".join(got.get(m, "-") for m in ("forward", "backward")) if got else "-")
                if system == "matmul" and got:
                    line[-1] = got["forward"]
            body.append(line)
        note = provenance(here) or f"{gpu}; ours not measured yet"
        tables.append(
            f"{note}; TFLOP/s forward / backward, bf16\n\n{markdown(['batch x length, heads, mask', *(known[s] for s in systems)], body)}"
        )
    text = "".join(tables)
    notes = []
    if re.search(r"\d\*(?!\*)", text):
        notes.append("`*` measured earlier on such a GPU (`benchmarks/results/anchors.csv`).")
    notes.append(OLDER if "†" in text else "All other figures are of one commit." if notes else "All of one commit.")
    return "\n\n".join([*tables, " ".join(notes)])


_ERROR_TENSORS = ("out", "lse", "dq", "dk", "dv")
_RATIO = " ratio"
# Kernels of others behind our contract, whose errors are theirs.
_AROUND = ("cudnn", "flash4")


def errors_table(rows: Sequence[Measurement]) -> str:
    """Errors of our own kernels against float64, in brackets as multiples of the lesser of cuDNN's and FA4's; of every block
    kernel the greatest multiple."""
    rows = of_last_gpu(latest([row for row in rows if row.name.startswith("errors/")]))
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
    return f"{note}\n\n{table}" + (f"\n\n{OLDER}" if "†" in table else "")


def _error_cell(got: dict[str, Measurement], tensor: str, commit: str) -> str:
    if tensor not in got:
        return "-"
    ratio = got.get(f"{tensor}{_RATIO}")
    value = f"{got[tensor].value:.1e}{mark(got[tensor], commit)}"
    return value + (f" ({ratio.value:.2f} x)" if ratio is not None else "")


def forms_table(rows: Sequence[Measurement]) -> str:
    """What each form of our kernels reaches, and in brackets its time over the plain call's."""
    rows = of_last_gpu(latest([row for row in rows if row.name.startswith("forms/")]))
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
        plain = found.get((kernel, config, "plain", direction))
        times = "" if form == "plain" or plain is None else f" ({plain.value / row.value:.3f} x)"
        return f"{row.value:.0f}{mark(row, commit)}{times}"

    body = [
        [config, kernel, *(" / ".join(cell(kernel, config, form, d) for d in directions) for form in forms)]
        for kernel, config in dict.fromkeys(key[:2] for key in found)
    ]
    table = markdown(["batch x length, heads, mask", "kernel", *forms], body)
    note = f"{provenance(rows)}; TFLOP/s forward / backward, bf16, in brackets the time over the plain call's"
    return f"{note}\n\n{table}" + (f"\n\n{OLDER}" if "†" in table else "")


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
    rows = of_last_gpu(latest([row for row in rows if row.name.startswith("ring/")]))
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
    hybrids = {
        system: f"**ours: ring {ring} x ulysses {ulysses}**"
        for system in dict.fromkeys(system for _, system in cells)
        if system.startswith("hybrid-")
        for ring, ulysses in [system.removeprefix("hybrid-").split("x")]
    }
    tables = [table(_RING_COLUMNS | hybrids, configs)]
    held = [c for c in configs if any((c, system) in cells for system in _NCCL_COLUMNS if "sms" in system)]
    if held:
        tables.append("The direct exchange by what it leaves to attention:\n\n" + table(_NCCL_COLUMNS, held))
    if "†" in "".join(tables):
        tables.append(OLDER)
    return "\n\n".join([f"{provenance(rows)}; TFLOP/s per GPU forward / forward+backward, bf16", *tables])
