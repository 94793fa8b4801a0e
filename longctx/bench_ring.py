"""`longctx bench ring`: attention over several GPUs beside one GPU with its share of the work, and other people's ways."""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from longctx.bench import WRONG, case_arguments, cases_of
from longctx.errors import ConfigError, LongCtxError, did_you_mean
from longctx.functional import attention
from longctx.peers import Case, Unavailable
from longctx.peers_ring import Attend, OneGpu, Ranks, RingContender, ring_contenders
from longctx.results import Measurement, append, environment
from longctx.testing import run_distributed

METRICS = ("forward", "forward+backward")
# Of forward's products: backward has five for its two.
_WORK = {"forward": 1.0, "forward+backward": 3.5}

# The table that the project holds itself to on two GPUs.
DEFAULT_CASES = (
    *(Case(batch=1, seq_len=n << 10, heads=32, kv_heads=8, head_dim=128) for n in (16, 32, 64, 128)),
    Case(batch=1, seq_len=64 << 10, heads=32, kv_heads=32, head_dim=128),
    Case(batch=1, seq_len=128 << 10, heads=32, kv_heads=8, head_dim=128, mask="docs"),
    Case(batch=1, seq_len=256 << 10, heads=32, kv_heads=8, head_dim=128, mask="window"),
)
SMOKE_CASES = (
    Case(batch=1, seq_len=64, heads=4, kv_heads=2, head_dim=16),
    Case(batch=2, seq_len=48, heads=4, kv_heads=2, head_dim=16, mask="window", window=8),
)
SMOKE_WORLD = 2

# A timed call is repeated for about so long, but at least and at most so often.
TIMED_S = 0.25
REPEATS = (3, 20)


@dataclass
class RingResult:
    """Milliseconds of the slowest rank by contender and metric, also without messages; where there is no time, the reason."""

    case: Case
    ms: dict[str, dict[str, float]] = field(default_factory=dict)
    silent_ms: dict[str, dict[str, float]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def tflops(self, name: str, metric: str, world: int) -> float:
        """Per GPU, on the pairs that the mask shows."""
        return _WORK[metric] * self.case.forward_flops / world / self.ms[name][metric] / 1e9

    def best_alone(self, metric: str) -> float | None:
        """The time of the fastest kernel on one GPU with its share of the work."""
        times = [ms[metric] for name, ms in self.ms.items() if name.startswith("one GPU")]
        return min(times, default=None)

    def exposed(self, name: str, metric: str) -> float | None:
        """Milliseconds that messages add."""
        silent = self.silent_ms.get(name)
        return self.ms[name][metric] - silent[metric] if silent else None


def measure(case: Case, entrants: Sequence[RingContender], ranks: Ranks, dtype: torch.dtype) -> RingResult:
    """Every contender on one case: checked against one process first, then timed. Collective; the same on every rank."""
    result = RingResult(case)
    tensors = case.inputs(ranks.device, dtype)
    leaves = [tensors[name].requires_grad_() for name in ("q", "k", "v")]
    out = attention(*leaves, mask=case.rule, scale=case.scale)
    exact = [out.detach(), *torch.autograd.grad(out, leaves, tensors["dout"])]
    del out
    for kernel in ("ours", "cuDNN (torch)"):
        alone = OneGpu(kernel)
        with _reasons(result, alone.title, ranks):
            share, attend = alone.attend(case, ranks)
            heads = {"q": share.heads, "k": share.kv_heads, "v": share.kv_heads, "dout": share.heads}
            part = [tensors[name][:, :, :n].detach().contiguous() for name, n in heads.items()]
            _both(attend, part)
            result.ms[alone.title], _ = _times(attend, part, ranks)
    for entrant in entrants:
        with _reasons(result, entrant.name, ranks):
            meta = entrant.meta(case, ranks)
            local = [meta.shard(tensors[name]).detach().contiguous() for name in ("q", "k", "v", "dout")]
            with entrant.prepare(case, ranks) as attend:
                error = max(_error(a, meta.shard(b)) for a, b in zip(_both(attend, local), exact, strict=True))
                error = _largest(error, ranks)
                if not error <= WRONG:
                    result.wrong.append(entrant.name)
                    raise Unavailable(f"WRONG RESULT: relative error {error:.2g}, more than {WRONG}")
                silent = entrant.without_messages(case, ranks)
                result.ms[entrant.name], result.silent_ms[entrant.name] = _times(attend, local, ranks, silent)
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()
    return result


@contextlib.contextmanager
def _reasons(result: RingResult, name: str, ranks: Ranks):
    """What is raised is the reason why there is no time. It is raised on all ranks alike, or the next message fails."""
    try:
        yield
    except Unavailable as error:
        result.refused[name] = str(error)
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        if isinstance(error, torch.OutOfMemoryError) or name.startswith("torch-cp"):
            result.refused[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
        else:
            raise


def _both(attend: Attend, local: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """out, dq, dk, dv."""
    leaves = [x.requires_grad_() for x in local[:3]]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, local[3])]


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


def _largest(value: float, ranks: Ranks) -> float:
    """Of all ranks; NaN if any has one."""
    found = torch.tensor([value if value == value else float("inf")], device=ranks.device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def _times(
    attend: Attend, local: Sequence[torch.Tensor], ranks: Ranks, silent: Attend | None = None
) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds by metric, and the same of `silent`, where there is one."""
    leaves = [x.requires_grad_() for x in local[:3]]

    def forward(attend: Attend) -> Callable[[], object]:
        return lambda: attend(*leaves)

    def both(attend: Attend) -> Callable[[], object]:
        return lambda: torch.autograd.grad(attend(*leaves), leaves, local[3])

    times: tuple[dict[str, float], dict[str, float]] = ({}, {})
    variants = [attend] if silent is None else [attend, silent]
    for metric, make in zip(METRICS, (forward, both), strict=True):
        for found, ms in zip(times, medians_ms([make(x) for x in variants], ranks), strict=False):
            found[metric] = ms
    return times


def medians_ms(calls: Sequence[Callable[[], object]], ranks: Ranks) -> list[float]:
    """Median milliseconds of the slowest rank for each call, all ranks starting together. Collective.

    What they run was compiled before.
    The calls take turns: a GPU gets slower as it gets warmer, by more than what some of them differ by.
    """
    times = [[_timed(call, ranks) for call in calls]]
    repeats = min(REPEATS[1], max(REPEATS[0], round(1e3 * TIMED_S / _largest(times[0][0], ranks))))
    times += [[_timed(call, ranks) for call in calls] for _ in range(repeats - 1)]
    return [_largest(statistics.median(column), ranks) for column in zip(*times, strict=True)]


def _timed(call: Callable[[], object], ranks: Ranks) -> float:
    dist.barrier()
    if ranks.device.type != "cuda":
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # The GPUs wait about 2 ms, so that what is measured is never the launching.
    torch.cuda._sleep(4_000_000)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def table(results: Sequence[RingResult], entrants: Sequence[RingContender], world: int) -> str:
    """Of every case a block: TFLOP/s per GPU, the share of the best kernel on one GPU, and what messages add to the time."""
    titles = {entrant.name: entrant.title for entrant in entrants}
    lines, notes = [], []
    for result in results:
        body = [["", *(f"{m} TFLOP/s" for m in METRICS), *(f"{m} share" for m in METRICS), "exposed messages"]]
        for name in result.ms:
            rates = [f"{result.tflops(name, m, world):.3g}" for m in METRICS]
            alone = [result.best_alone(m) for m in METRICS]
            shares = [f"{a / result.ms[name][m]:.3f}" if a else "-" for a, m in zip(alone, METRICS, strict=True)]
            late = [result.exposed(name, m) for m in METRICS]
            shown = [
                f"{x:+.2f} ms ({x / result.ms[name][m]:+.1%})"
                for x, m in zip(late, METRICS, strict=True)
                if x is not None
            ]
            body.append([titles.get(name, name), *rates, *shares, " / ".join(shown) or "-"])
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
    return [
        Measurement(name=f"ring/{name}", config=config, metric=metric, value=value, unit=unit, **where)
        for name, metric, value, unit in rows
    ]


def plot(results: Sequence[RingResult], entrants: Sequence[RingContender], world: int, path: Path, title: str) -> None:
    """Bars of TFLOP/s per GPU, a group for each case, and the best kernel on one GPU as a line over each.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'longctx[plot]'") from error
    shown = [e for e in entrants if any(e.name in r.ms for r in results)]
    width = 0.8 / max(1, len(shown))
    figure = Figure(figsize=(max(7.0, 2.2 * len(results)), 8), layout="constrained")
    for axes, metric in zip(figure.subplots(2, 1, sharex=True), METRICS, strict=True):
        for i, entrant in enumerate(shown):
            at = [n + (i - (len(shown) - 1) / 2) * width for n in range(len(results))]
            heights = [r.tflops(entrant.name, metric, world) if entrant.name in r.ms else 0.0 for r in results]
            axes.bar(at, heights, width, label=entrant.title, color=f"C{i}", hatch="//" if entrant.is_ours else None)
        for n, result in enumerate(results):
            alone = result.best_alone(metric)
            if alone:
                rate = _WORK[metric] * result.case.forward_flops / world / alone / 1e9
                label = "best kernel on one GPU" if n == 0 else None
                axes.hlines(rate, n - 0.45, n + 0.45, color="black", linestyle=":", label=label)
        axes.set_ylabel(f"{metric}, TFLOP/s per GPU")
    axes.set_xticks(range(len(results)), [r.case.label.replace(", ", "\n") for r in results], fontsize=8)
    handles = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3, title=title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def parser() -> argparse.ArgumentParser:
    """The command line of `longctx bench ring`."""
    p = argparse.ArgumentParser(prog="longctx bench ring", description=__doc__.splitlines()[0])
    case_arguments(p)
    p.add_argument(
        "--nproc", type=int, help="processes, where torchrun does not start them (every GPU; 2 with --smoke)"
    )
    p.add_argument("--transport", nargs="+", choices=["auto", "nccl", "copy_engine"], help="(nccl copy_engine)")
    return p


def run(args: argparse.Namespace, rank: int) -> int:
    """What every rank does: measure; rank 0 prints and writes. 1 if a result of ours was wrong."""
    world = dist.get_world_size()
    device, dtype = torch.device("cpu"), torch.float32
    if not args.smoke:
        device, dtype = torch.device("cuda", torch.cuda.current_device()), torch.bfloat16
    ranks = Ranks(rank, world, device, {})
    entrants = _entrants(args)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"
    where = environment(gpu, gpus=world, commit=args.commit)
    title = f"{world} x {gpu}, torch {where['torch']}, triton {where['triton']}, commit {where['commit']}"
    if rank == 0:
        print(f"{title}; {str(dtype).removeprefix('torch.')}, median times of the slowest rank\n", flush=True)
    results = []
    for case in args.cases:
        result = measure(case, entrants, ranks, dtype)
        results.append(result)
        if rank == 0:
            print(table([result], entrants, world), flush=True)
            if args.csv:
                append(args.csv, rows_of(result, world, **where))
    if rank == 0 and args.plot:
        plot(results, entrants, world, args.plot, title)
    return int(any(entrant.is_ours and entrant.name in r.wrong for r in results for entrant in entrants))


def _entrants(args: argparse.Namespace) -> list[RingContender]:
    found = ring_contenders(args.transport or (["auto"] if args.smoke else ["nccl", "copy_engine"]))
    names = [entrant.name for entrant in found]
    for name in args.only or ():
        if name not in names:
            raise ConfigError(f"--only {name}: {did_you_mean(name, names)}")
    return [entrant for entrant in found if not args.only or entrant.name in args.only]


def _spawned(rank: int, args: argparse.Namespace) -> int:
    return run(args, rank)


def _under_torchrun(args: argparse.Namespace) -> int:
    rank, device = int(os.environ["RANK"]), None
    if not args.smoke:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if args.smoke else "nccl", device_id=device)
    try:
        return run(args, rank)
    finally:
        dist.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> int:
    """`longctx bench ring`; returns the exit code: 0, 1 for a wrong result of ours, 2 for a command that cannot be done."""
    args = parser().parse_args(argv)
    try:
        world = int(os.environ.get("WORLD_SIZE", 0)) or args.nproc
        if world is None:
            world = SMOKE_WORLD if args.smoke else torch.cuda.device_count()
        if world < 2 or (not args.smoke and torch.cuda.device_count() < 1):
            raise ConfigError(
                f"{world} ranks with {torch.cuda.device_count()} CUDA devices: a ring has at least two GPUs; "
                "`longctx bench ring --smoke` runs tiny sizes on the CPU"
            )
        _entrants(args)
        args.cases = cases_of(args, SMOKE_CASES if args.smoke else DEFAULT_CASES)
        if "RANK" in os.environ:
            return _under_torchrun(args)
        backend, timeout_s = ("gloo", 120.0) if args.smoke else ("nccl", 3600.0)
        return max(run_distributed(_spawned, args, world=world, backend=backend, timeout_s=timeout_s))
    except LongCtxError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
