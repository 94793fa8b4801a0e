"""`longctx bench attention`: our kernels beside the hardware's bound and other people's kernels, in one run."""

from __future__ import annotations

import argparse
import importlib
import math
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from longctx.bench_errors import (
    ERROR_CASES,
    SMOKE_ERROR_CASES,
    CaseErrors,
    error_rows,
    error_table,
    measure_errors,
    verdicts,
)
from longctx.bench_forms import (
    FORM_CASES,
    SMOKE_FORM_CASES,
    CaseForms,
    form_rows,
    form_table,
    form_verdicts,
    measure_forms,
)
from longctx.bench_kept import kept
from longctx.bench_output import rows_of, table
from longctx.bench_timing import WRONG, Budget, CaseResult, measure
from longctx.errors import ConfigError, KernelError, LongCtxError, did_you_mean
from longctx.figures import attention_bars, draw, redraw, sweep_lines
from longctx.kernels import kernel_names
from longctx.peers import Case, Contender, contenders
from longctx.predecessors import sweep_contenders
from longctx.results import RESULTS, Measurement, append, environment
from longctx.settings import parse_size

# For one contender and case, unless --budget says another.
BUDGET_S = 20.0

__all__ = ["WRONG", "case_arguments", "cases_of", "main", "measure"]

# The shapes that attention papers and this project's anchors use, then packed documents and a window. About five minutes
# on an H100 with every peer.
DEFAULT_CASES = (
    Case(batch=4, seq_len=8192, heads=16, kv_heads=16, head_dim=64),
    Case(batch=4, seq_len=8192, heads=16, kv_heads=16, head_dim=128),
    Case(batch=4, seq_len=8192, heads=16, kv_heads=16, head_dim=128, mask="full"),
    Case(batch=1, seq_len=32768, heads=16, kv_heads=16, head_dim=128),
    Case(batch=1, seq_len=32768, heads=32, kv_heads=8, head_dim=128),
    Case(batch=1, seq_len=131072, heads=8, kv_heads=8, head_dim=128),
    Case(batch=1, seq_len=32768, heads=8, kv_heads=8, head_dim=256),
    Case(batch=1, seq_len=32768, heads=16, kv_heads=16, head_dim=64),
    Case(batch=1, seq_len=65536, heads=32, kv_heads=8, head_dim=128, mask="docs"),
    Case(batch=1, seq_len=131072, heads=32, kv_heads=8, head_dim=128, mask="window", window=4096),
)
SMOKE_CASES = (
    Case(batch=1, seq_len=64, heads=2, kv_heads=1, head_dim=16),
    Case(batch=2, seq_len=48, heads=2, kv_heads=2, head_dim=16, mask="window", window=8),
)

# The sweep: 16k tokens a batch up to that length, then one sequence. A width of 2048 as in the papers up to 64k tokens; beyond,
# as many fewer heads as a head has more work, down to one, so that a call of the longest takes seconds and not minutes. One
# head of 256k tokens is still 2048 blocks of rows, 15 for each SM.
SWEEP_TOKENS, SWEEP_WIDTH, SWEEP_FULL_WIDTH = 1 << 14, 2048, 1 << 16
SWEEP_SHORTEST = 512
SMOKE_LENGTHS = (32, 64)


def sweep_cases(longest: int) -> list[Case]:
    """Head dims 64 and 128, causal and full, lengths doubling up to the longest; the short ones first.

    Raises:
        ConfigError: `longest` is shorter than the shortest.
    """
    if longest < SWEEP_SHORTEST:
        raise ConfigError(f"--sweep {longest}: the shortest sequence is {SWEEP_SHORTEST}")
    lengths = [SWEEP_SHORTEST << n for n in range((longest // SWEEP_SHORTEST).bit_length())]
    return [
        Case(
            batch=max(1, SWEEP_TOKENS // length), seq_len=length, heads=heads, kv_heads=heads, head_dim=head_dim, mask=mask
        )
        for length in lengths
        for head_dim in (64, 128)
        for mask in ("causal", "full")
        for heads in [max(1, SWEEP_WIDTH // head_dim // max(1, length // SWEEP_FULL_WIDTH) ** 2)]
    ]  # fmt: skip


def smoke_sweep() -> list[Case]:
    """The sweep's masks, small enough for a CPU."""
    return [
        Case(batch=2, seq_len=length, heads=2, kv_heads=2, head_dim=16, mask=mask)
        for mask in ("causal", "full")
        for length in SMOKE_LENGTHS
    ]


def token_count(text: str) -> int:
    """8192 or 8k, for a command line."""
    size = parse_size(text)
    if size is None or size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 8192 or 8k")
    return size


def _shape(text: str) -> tuple[int, int]:
    batch, _, length = text.rpartition("x")
    return token_count(batch or "1"), token_count(length)


def case_arguments(p: argparse.ArgumentParser) -> None:
    """The arguments that say what to measure and where to put it; `cases_of` reads them."""
    p.add_argument("--shapes", nargs="+", type=_shape, metavar="BxS", help="batch x length, such as 4x8k 1x32k")
    p.add_argument("--dim", nargs="+", type=int, metavar="D", help="head dims (128)")
    p.add_argument("--heads", type=int, help="query heads (16)")
    p.add_argument("--kv-heads", type=int, help="key heads (as many as query heads)")
    mask = p.add_mutually_exclusive_group()
    mask.add_argument("--mask", choices=["causal", "full", "docs", "window"], help="who sees whom (causal)")
    mask.add_argument("--causal", action="store_const", const="causal", dest="mask", help="the same as --mask causal")
    p.add_argument("--window", type=token_count, default=4096, help="keys that --mask window shows (4k)")
    p.add_argument("--only", nargs="+", metavar="NAME", help="measure these only, such as triton fa2")
    p.add_argument("--csv", type=Path, help="append the measurements to this file")
    p.add_argument("--plot", type=Path, metavar="PNG", help="draw them")
    p.add_argument("--commit", help="of this code, where it has no git history")
    p.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU: shows that it runs, times mean nothing")


def _kind_arguments(p: argparse.ArgumentParser) -> None:
    """What else than a few shapes' times may be asked for."""
    kind = p.add_mutually_exclusive_group()
    kind.add_argument(
        "--sweep", nargs="?", type=token_count, const=1 << 20, metavar="LENGTH",
        help="512 tokens to LENGTH (1M), from attention's formula to today's kernels",
    )  # fmt: skip
    kind.add_argument("--errors", action="store_true", help="errors against float64 instead of times")
    kind.add_argument(
        "--forms", action="store_true",
        help="our kernels alone: what it costs them to carry a ring's state, or to be told the mask row by row",
    )  # fmt: skip
    p.add_argument(
        "--budget", type=float, metavar="SECONDS", help=f"skip a contender where a case would take it longer ({BUDGET_S:g})",
    )  # fmt: skip
    p.add_argument(
        "--time", type=float, metavar="SECONDS", default=math.inf, help="of the whole call: leave out the rest"
    )
    p.add_argument(
        "--resume", action="store_true",
        help="keep what --csv holds of this commit, GPU and versions, and measure only what is missing",
    )  # fmt: skip
    p.add_argument(
        "--rows", nargs="+", metavar="TEXT",
        help="of the table, the sweep, the errors or the forms: rows with one of these in their name, such as docs window '4 x 8k'",
    )  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command line of `longctx bench`, but for `ring` and `scaling`, which have their own."""
    top = argparse.ArgumentParser(prog="longctx bench", description=__doc__.splitlines()[0])
    commands = top.add_subparsers(dest="what", required=True)
    p = commands.add_parser("attention", help="forward and backward TFLOP/s")
    case_arguments(p)
    _kind_arguments(p)
    commands.add_parser("ring", help="attention over several GPUs (longctx bench ring --help)")
    commands.add_parser("scaling", help="a training on 1, 2, 4, ... GPUs (longctx bench scaling --help)")
    p = commands.add_parser("redraw", help="draw every figure of measurements anew from the files of results")
    p.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="of CSV files, and of the figures")
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


def _cases(args: argparse.Namespace) -> Sequence[Case]:
    if args.sweep is not None:
        defaults: Sequence[Case] = smoke_sweep() if args.smoke else sweep_cases(args.sweep)
    elif args.errors:
        defaults = SMOKE_ERROR_CASES if args.smoke else ERROR_CASES
    elif args.forms:
        defaults = SMOKE_FORM_CASES if args.smoke else FORM_CASES
    else:
        defaults = SMOKE_CASES if args.smoke else DEFAULT_CASES
    cases = cases_of(args, defaults)
    if args.sweep is not None and cases is not defaults:
        raise ConfigError("--sweep has shapes of its own: leave --shapes, --dim, --heads, --kv-heads and --mask out")
    return rows_with(args.rows, cases)


def rows_with(texts: Sequence[str] | None, cases: Sequence[Case]) -> Sequence[Case]:
    """The cases that have one of `texts` in their label; None: all.

    Raises:
        ConfigError: one of them is in no label.
    """
    if texts is None:
        return cases
    for text in texts:
        if not any(text in case.label for case in cases):
            raise ConfigError(f"--rows {text!r} is in none of:\n  " + "\n  ".join(case.label for case in cases))
    return [case for case in cases if any(text in case.label for text in texts)]


def _entrants(args: argparse.Namespace) -> list[Contender]:
    ours = kernel_names() if args.smoke else tuple(n for n in kernel_names() if n != "reference")
    found = contenders(ours) if args.sweep is None else sweep_contenders(ours)
    # Of a name that is in both lists, either is the same.
    known = {c.name: c for c in (*sweep_contenders(ours), *contenders(ours))}
    for name in args.only or ():
        if name not in known:
            raise ConfigError(f"--only {name}: {did_you_mean(name, known)}")
    return [c for c in known.values() if c.name in args.only] if args.only else found


@dataclass(frozen=True)
class _Asked:
    """What one call of the command measures, and where.

    Args:
        where: the columns of `results.environment`.
    """

    args: argparse.Namespace
    cases: Sequence[Case]
    entrants: Sequence[Contender]
    device: torch.device
    dtype: torch.dtype
    where: dict

    def title(self, what: str) -> str:
        where = self.where
        versions = f"torch {where['torch']}, triton {where['triton']}, commit {where['commit']}"
        return f"{where['gpu']}, {versions}; {what.format(dtype=str(self.dtype).removeprefix('torch.'))}\n"

    def refuse(self, kind: str) -> None:
        """
        Raises:
            ConfigError: an option was given that this kind of measurement does not have.
        """
        args = self.args
        timing = {"--budget": args.budget is not None, "--time": args.time != math.inf}
        for option, given in ({"--plot": args.plot, "--resume": args.resume} | timing).items():
            if given:
                raise ConfigError(f"{kind} knows no {option}: leave it out")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; 1 if a result of ours was wrong."""
    if not args.smoke and not torch.cuda.is_available():
        raise KernelError(
            "there is no CUDA device to measure on; `longctx bench attention --smoke` runs tiny sizes on the CPU"
        )
    device, dtype = (torch.device("cpu"), torch.float32) if args.smoke else (torch.device("cuda"), torch.bfloat16)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"
    where = environment(gpu, commit=args.commit)
    asked = _Asked(args, _cases(args), () if args.forms else _entrants(args), device, dtype, where)
    return (_run_errors if args.errors else _run_forms if args.forms else _run_times)(asked)


def _run_times(asked: _Asked) -> int:
    args, device, dtype, where = asked.args, asked.device, asked.dtype, asked.where
    if args.resume and args.csv is None:
        raise ConfigError("--resume needs --csv: the file that earlier calls wrote")
    print(asked.title("TFLOP/s forward / backward, {dtype}, median times"), flush=True)
    area, size = "attention" if args.sweep is None else "sweep", 256 if args.smoke else 8192
    earlier = kept(args.csv if args.resume else None, area, where)
    budget = Budget(BUDGET_S if args.budget is None else args.budget, args.time)
    rows: list[Measurement] = []
    results: list[CaseResult] = []
    for case in asked.cases:
        began = time.perf_counter()
        known = earlier.tflops.get(case.label, {})
        result = measure(
            case, asked.entrants, device, dtype,
            budget=budget, with_parts=args.sweep is None, kept=known, product_size=size,
        )  # fmt: skip
        new = replace(result, tflops={name: got for name, got in result.tflops.items() if name not in known})
        if result.bound is None:
            result.bound = earlier.bounds.get(case.label)
        results.append(result)
        rows += rows_of(result, area, **where)
        took = time.perf_counter() - began
        print(f"measured {case.label} in {took:.0f} s ({len(known)} known)", file=sys.stderr, flush=True)
        if args.csv:
            # Case by case: what was measured is not lost when the rest is interrupted.
            append(args.csv, rows_of(new, area, **where))
    print(table(results, asked.entrants, with_both=args.sweep is not None))
    if args.plot:
        titles = {entrant.name: entrant.title for entrant in asked.entrants}
        draw(sweep_lines(rows, titles) if args.sweep is not None else attention_bars(rows, titles), args.plot)
    return int(any(entrant.is_ours and entrant.name in r.wrong for r in results for entrant in asked.entrants))


def _run_errors(asked: _Asked) -> int:
    asked.refuse("--errors")
    args, entrants = asked.args, asked.entrants
    print(asked.title("errors against float64, {dtype}, of each tensor's size; x: of the best of cuDNN and FA4"))
    found: list[CaseErrors] = []
    for case in asked.cases:
        began = time.perf_counter()
        found.append(measure_errors(case, entrants, asked.device, asked.dtype))
        print(f"measured {case.label} in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        if args.csv:
            append(args.csv, error_rows(found[-1], **asked.where))
    print(error_table(found, entrants))
    print("\n".join(["", *verdicts(found, entrants)]))
    return 0


def _run_forms(asked: _Asked) -> int:
    asked.refuse("--forms")
    args = asked.args
    kernels = tuple(args.only or (["reference"] if args.smoke else ["hopper", "triton"]))
    for name in kernels:
        if name not in kernel_names():
            raise ConfigError(f"--forms --only {name}: {did_you_mean(name, kernel_names())}")
    print(asked.title("TFLOP/s, {dtype}, median times of calls by turns"), flush=True)
    found: list[CaseForms] = []
    for case in asked.cases:
        found.append(measure_forms(case, kernels, asked.device, asked.dtype))
        print(f"measured {case.label}", file=sys.stderr, flush=True)
        if args.csv:
            append(args.csv, form_rows(found[-1], **asked.where))
    print(form_table(found))
    print("\n".join(["", *form_verdicts(found)]))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """`longctx bench`; returns the exit code: 0, 1 for a wrong result of ours, 2 for a command that cannot be done."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in (["ring"], ["scaling"]):
        return importlib.import_module(f"longctx.bench_{words[0]}").main(words[1:])
    args = parser().parse_args(words)
    try:
        if args.what == "redraw":
            for path in redraw(args.results):
                print(f"drawn: {path}")
            return 0
        return run(args)
    except LongCtxError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
