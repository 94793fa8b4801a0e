"""`longctx bench attention`: our kernels beside the hardware's bound and other people's kernels, in one run."""

from __future__ import annotations

import argparse
import gc
import importlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from longctx.errors import ConfigError, KernelError, LongCtxError, did_you_mean
from longctx.kernels import kernel_names
from longctx.peers import Case, Contender, Gradients, Unavailable, contenders, reasons
from longctx.results import Measurement, append, environment
from longctx.settings import parse_size

# The shapes that attention papers and this project's anchors use. About three minutes on an H100 with every peer.
DEFAULT_CASES = (
    Case(batch=4, seq_len=8192, heads=16, kv_heads=16, head_dim=64),
    Case(batch=4, seq_len=8192, heads=16, kv_heads=16, head_dim=128),
    Case(batch=4, seq_len=8192, heads=16, kv_heads=16, head_dim=128, mask="full"),
    Case(batch=1, seq_len=32768, heads=16, kv_heads=16, head_dim=128),
    Case(batch=1, seq_len=32768, heads=32, kv_heads=8, head_dim=128),
    Case(batch=1, seq_len=131072, heads=8, kv_heads=8, head_dim=128),
    Case(batch=1, seq_len=32768, heads=8, kv_heads=8, head_dim=256),
    Case(batch=1, seq_len=32768, heads=16, kv_heads=16, head_dim=64),
)
SMOKE_CASES = (
    Case(batch=1, seq_len=64, heads=2, kv_heads=1, head_dim=16),
    Case(batch=2, seq_len=48, heads=2, kv_heads=2, head_dim=16, mask="window", window=8),
)

# A relative RMS error of bf16 attention is about 3e-3; a wrong mask, scale or head is beyond 1e-1.
WRONG = 2e-2
SAMPLED_ROWS = 16


@dataclass
class CaseResult:
    """TFLOP/s by contender and metric; where there is no number, the reason."""

    case: Case
    tflops: dict[str, dict[str, float]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def measure(case: Case, entrants: Sequence[Contender], device: torch.device, dtype: torch.dtype) -> CaseResult:
    """Every contender on one case: checked first, then timed. One that fails leaves its reason."""
    result = CaseResult(case)
    tensors = case.inputs(device, dtype)
    oracle = SampledRows(case, **tensors)
    for entrant in entrants:
        said: list[str] = []
        try:
            with reasons() as said:
                result.tflops[entrant.name] = _checked_and_timed(case, entrant, tensors, oracle, device)
        except WrongResult as error:
            result.refused[entrant.name] = f"WRONG RESULT: {error}"
            result.wrong.append(entrant.name)
        except Exception as error:  # whatever a peer raises is its reason to have no number
            result.refused[entrant.name] = _one_line(error, said)
        _free(device)
    return result


def _checked_and_timed(
    case: Case, entrant: Contender, tensors: dict[str, torch.Tensor], oracle: SampledRows, device: torch.device
) -> dict[str, float]:
    prepared = entrant.prepare(case, **tensors)
    oracle.check(prepared.forward(), prepared.backward())
    work = {"forward": case.forward_flops, "backward": 2.5 * case.forward_flops}
    calls: dict[str, Callable[[], object]] = {
        "forward": prepared.forward,
        "backward": prepared.backward,
        **prepared.parts,
    }
    ms = {metric: median_ms(call, device) for metric, call in calls.items()}
    tflops = {metric: work[metric.removeprefix("block ")] / took / 1e9 for metric, took in ms.items()}
    # One after the other on one stream: the time of both is the sum.
    tflops["forward+backward"] = sum(work.values()) / (ms["forward"] + ms["backward"]) / 1e9
    return tflops


def median_ms(call: Callable[[], object], device: torch.device) -> float:
    """Median time of a call in ms: CUDA events after a warm-up, the L2 cache cleared before each; at least five of them."""
    if device.type == "cuda":
        from triton.testing import do_bench

        call()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        # do_bench runs `rep` ms; a call of 200 ms would run once.
        return float(do_bench(call, warmup=20, rep=max(100.0, 5.5 * start.elapsed_time(end)), return_mode="median"))
    times = []
    for _ in range(4):
        began = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[1:])


def matmul_tflops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """What the machine's own matrix product of `size` cubed reaches: the bound beside which attention stands."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / median_ms(lambda: a @ b, device) / 1e9


class WrongResult(Exception):
    """A contender's numbers are not attention's."""


class SampledRows:
    """Exact attention of a few rows in float32, which costs rows x length: out and dq of every contender are held against it.

    dk and dv need all rows; they are compared among the contenders, with the first that passed.
    """

    def __init__(self, case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor) -> None:
        self.rows = torch.linspace(0, case.seq_len - 1, SAMPLED_ROWS, dtype=torch.float64).long().unique().to(q.device)
        lo, hi = case.rule.key_range(self.rows.cpu(), case.seq_len)
        keys = torch.arange(case.seq_len)
        visible = ((keys >= lo[:, None]) & (keys < hi[:, None])).to(q.device)
        self.out, self.dq = _exact_rows(case, q[:, self.rows], k, v, dout[:, self.rows], visible)
        self.dkdv: tuple[torch.Tensor, torch.Tensor] | None = None

    def check(self, out: torch.Tensor, gradients: Gradients) -> None:
        """
        Raises:
            WrongResult: an error larger than rounding explains.
        """
        dq, dk, dv = gradients
        pairs = {"out": (out[:, self.rows], self.out), "dq": (dq[:, self.rows], self.dq)}
        if self.dkdv is not None:
            pairs |= {"dk": (dk, self.dkdv[0]), "dv": (dv, self.dkdv[1])}
        for name, (got, want) in pairs.items():
            error = float((got.float() - want.float()).norm() / want.float().norm())
            if not error <= WRONG:
                raise WrongResult(f"relative error of {name} {error:.2g}, more than {WRONG}")
        if self.dkdv is None:
            self.dkdv = (dk.clone(), dv.clone())


def _exact_rows(case: Case, q, k, v, dout, visible: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """out and dq of the rows q, dout "b n h d" in float32; visible: bool [n, S]."""
    out, dq = torch.empty_like(q, dtype=torch.float32), torch.empty_like(q, dtype=torch.float32)
    # One key head at a time: all of them at once would hold heads x rows x S scores several times.
    for head in range(case.kv_heads):
        group = slice(head * case.heads // case.kv_heads, (head + 1) * case.heads // case.kv_heads)
        kf, vf = k[:, :, head].float(), v[:, :, head].float()
        s = torch.einsum("bngd,bsd->bngs", q[:, :, group].float(), kf) * case.scale
        p = s.masked_fill(~visible[None, :, None], float("-inf")).softmax(-1)
        out[:, :, group] = torch.einsum("bngs,bsd->bngd", p, vf)
        do = dout[:, :, group].float()
        dp = torch.einsum("bngd,bsd->bngs", do, vf)
        ds = p * (dp - (do * out[:, :, group]).sum(-1, keepdim=True)) * case.scale
        dq[:, :, group] = torch.einsum("bngs,bsd->bngd", ds, kf)
    return out, dq


def _one_line(error: Exception, said: Sequence[str] = ()) -> str:
    """Why there is no number, at most 160 characters: torch's warnings where it gave some, else the error."""
    text = str(error).strip().splitlines() or [""]
    name = "" if isinstance(error, Unavailable) else f"{type(error).__name__}: "
    because = next((s for s in said if "because" in s or "requires" in s or "not" in s), "")
    line = f"{name}{text[0]}" + (f" ({because})" if because else "")
    return line if len(line) <= 160 else line[:157] + "..."


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def table(results: Sequence[CaseResult], entrants: Sequence[Contender], bound: float) -> str:
    """Forward / backward TFLOP/s, the best peer's share of ours, and the reasons where there is no number."""
    shown = [c for c in entrants if any(c.name in r.tflops for r in results)]
    header = ["batch x length, heads, mask", "matmul", *(c.title for c in shown), "ours / best peer"]
    body, notes = [], []
    for r in results:
        body.append([r.case.label, _number(bound), *(_pair(r.tflops.get(c.name)) for c in shown), _ratio(r, entrants)])
        notes += [f"{r.case.label}: {c.title}: {r.refused[c.name]}" for c in entrants if c.name in r.refused]
    widths = [max(len(line[i]) for line in (header, *body)) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in (header, *body)
    ]
    blocks = [
        f"{r.case.label}: {c.title}, kernel alone {_number(got['block forward'])} / {_number(got['block backward'])}"
        for r in results
        for c in entrants
        if "block forward" in (got := r.tflops.get(c.name, {}))
    ]
    return "\n".join([*lines, "", *blocks, *([""] if notes else []), *notes])


def _number(x: float) -> str:
    return f"{x:.0f}" if x >= 10 else f"{x:.2g}"


def _pair(got: dict[str, float] | None) -> str:
    return f"{_number(got['forward'])} / {_number(got['backward'])}" if got else "-"


def _ratio(result: CaseResult, entrants: Sequence[Contender]) -> str:
    cells = []
    for metric in ("forward", "backward"):
        ours, peers = (
            [result.tflops[c.name][metric] for c in entrants if c.name in result.tflops and c.is_ours == side]
            for side in (True, False)
        )
        cells.append(f"{max(ours) / max(peers):.2f}" if ours and peers else "-")
    return " / ".join(cells)


def bound_row(bound: float, size: int, **where) -> Measurement:
    """The hardware's bound as a measurement; `where`: the columns of `results.environment`."""
    return Measurement(
        name="attention/matmul", config=f"{size} cubed", metric="forward", value=bound, unit="TFLOP/s", **where
    )


def rows_of(result: CaseResult, **where) -> list[Measurement]:
    """One case's results as measurements; `where`: the columns of `results.environment`."""
    return [
        Measurement(
            name=f"attention/{name}", config=result.case.label, metric=metric, value=value, unit="TFLOP/s", **where
        )
        for name, got in result.tflops.items()
        for metric, value in got.items()
    ]


def plot(results: Sequence[CaseResult], entrants: Sequence[Contender], bound: float, path: Path, title: str) -> None:
    """Bars of forward and backward TFLOP/s, a group for each case.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'longctx[plot]'") from error
    shown = [c for c in entrants if any(c.name in r.tflops for r in results)]
    figure = Figure(figsize=(max(6.0, 1.6 * len(results)), 7), layout="constrained")
    for axes, metric in zip(figure.subplots(2, 1, sharex=True), ("forward", "backward"), strict=True):
        width = 0.8 / max(1, len(shown))
        for i, entrant in enumerate(shown):
            at = [n + (i - (len(shown) - 1) / 2) * width for n in range(len(results))]
            heights = [r.tflops.get(entrant.name, {}).get(metric, 0.0) for r in results]
            axes.bar(at, heights, width, label=entrant.title, color=f"C{i}", hatch="//" if entrant.is_ours else None)
        axes.axhline(bound, color="black", linestyle=":", label="matmul")
        axes.set_ylabel(f"{metric}, TFLOP/s")
    axes.set_xticks(range(len(results)), [r.case.label.replace(", ", "\n") for r in results], fontsize=8)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4, title=title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _size(text: str) -> int:
    size = parse_size(text)
    if size is None or size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 8192 or 8k")
    return size


def _shape(text: str) -> tuple[int, int]:
    batch, _, length = text.rpartition("x")
    return _size(batch or "1"), _size(length)


def case_arguments(p: argparse.ArgumentParser) -> None:
    """The arguments that say what to measure and where to put it; `cases_of` reads them."""
    p.add_argument("--shapes", nargs="+", type=_shape, metavar="BxS", help="batch x length, such as 4x8k 1x32k")
    p.add_argument("--dim", nargs="+", type=int, metavar="D", help="head dims (128)")
    p.add_argument("--heads", type=int, help="query heads (16)")
    p.add_argument("--kv-heads", type=int, help="key heads (as many as query heads)")
    mask = p.add_mutually_exclusive_group()
    mask.add_argument("--mask", choices=["causal", "full", "docs", "window"], help="who sees whom (causal)")
    mask.add_argument("--causal", action="store_const", const="causal", dest="mask", help="the same as --mask causal")
    p.add_argument("--window", type=_size, default=4096, help="keys that --mask window shows (4k)")
    p.add_argument("--only", nargs="+", metavar="NAME", help="measure these only, such as triton fa2")
    p.add_argument("--csv", type=Path, help="append the measurements to this file")
    p.add_argument("--plot", type=Path, metavar="PNG", help="draw them")
    p.add_argument("--commit", help="of this code, where it has no git history")
    p.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU: shows that it runs, times mean nothing")


def parser() -> argparse.ArgumentParser:
    """The command line of `longctx bench`, but for `ring`, which has its own."""
    top = argparse.ArgumentParser(prog="longctx bench", description=__doc__.splitlines()[0])
    commands = top.add_subparsers(dest="what", required=True)
    case_arguments(commands.add_parser("attention", help="forward and backward TFLOP/s"))
    commands.add_parser("ring", help="attention over several GPUs (longctx bench ring --help)")
    return top


def cases_of(args: argparse.Namespace, defaults: Sequence[Case]) -> Sequence[Case]:
    """The cases that `case_arguments` ask for; `defaults` where they ask for none.

    Raises:
        ConfigError: the heads do not divide.
    """
    given = (args.shapes, args.dim, args.heads, args.kv_heads, args.mask)
    if all(x is None for x in given):
        return defaults
    heads = args.heads or 16
    kv_heads = args.kv_heads or heads
    if heads % kv_heads:
        raise ConfigError(f"--heads {heads} is not a multiple of --kv-heads {kv_heads}")
    return [
        Case(
            batch=batch, seq_len=seq_len, heads=heads, kv_heads=kv_heads, head_dim=dim,
            mask=args.mask or "causal", window=args.window,
        )
        for batch, seq_len in args.shapes or [(1, 32768)]
        for dim in args.dim or [128]
    ]  # fmt: skip


def _entrants(args: argparse.Namespace) -> list[Contender]:
    ours = kernel_names() if args.smoke else tuple(n for n in kernel_names() if n != "reference")
    found = contenders(ours)
    names = [c.name for c in found]
    for name in args.only or ():
        if name not in names:
            raise ConfigError(f"--only {name}: {did_you_mean(name, names)}")
    return [c for c in found if not args.only or c.name in args.only]


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; 1 if a result of ours was wrong."""
    if not args.smoke and not torch.cuda.is_available():
        raise KernelError(
            "there is no CUDA device to measure on; `longctx bench attention --smoke` runs tiny sizes on the CPU"
        )
    device, dtype = (torch.device("cpu"), torch.float32) if args.smoke else (torch.device("cuda"), torch.bfloat16)
    cases, entrants, size = (
        cases_of(args, SMOKE_CASES if args.smoke else DEFAULT_CASES),
        _entrants(args),
        256 if args.smoke else 8192,
    )
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"
    where = environment(gpu, commit=args.commit)
    title = f"{gpu}, torch {where['torch']}, triton {where['triton']}, commit {where['commit']}"
    print(f"{title}; TFLOP/s forward / backward, {str(dtype).removeprefix('torch.')}, median times\n", flush=True)
    bound = matmul_tflops(device, dtype, size)
    results: list[CaseResult] = []
    if args.csv:
        append(args.csv, [bound_row(bound, size, **where)])
    for case in cases:
        began = time.perf_counter()
        results.append(measure(case, entrants, device, dtype))
        print(f"measured {case.label} in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        if args.csv:
            # Case by case: what was measured is not lost when the rest is interrupted.
            append(args.csv, rows_of(results[-1], **where))
    print(table(results, entrants, bound))
    if args.plot:
        plot(results, entrants, bound, args.plot, title)
    return int(any(entrant.is_ours and entrant.name in r.wrong for r in results for entrant in entrants))


def main(argv: Sequence[str] | None = None) -> int:
    """`longctx bench`; returns the exit code: 0, 1 for a wrong result of ours, 2 for a command that cannot be done."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["ring"]:
        return importlib.import_module("longctx.bench_ring").main(words[1:])
    args = parser().parse_args(words)
    try:
        return run(args)
    except LongCtxError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
