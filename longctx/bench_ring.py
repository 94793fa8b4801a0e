"""`longctx bench ring`: attention over several GPUs beside one GPU with its share of the work, and other people's ways."""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from longctx.bench import WRONG, case_arguments, cases_of, rows_with, token_count
from longctx.bench_ring_output import RingResult, rows_of, table
from longctx.bench_ring_timing import ROUNDS, Side, largest, waiting_ms
from longctx.errors import ConfigError, LongCtxError, did_you_mean
from longctx.figures import draw, ring_bars
from longctx.functional import attention
from longctx.peers import Case, Unavailable
from longctx.peers_ring import Attend, OneGpu, OneGpuHalo, Ranks, RingContender, ring_contenders
from longctx.results import append, environment
from longctx.sequence import SequenceMeta
from longctx.testing import run_distributed

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

# Tokens up to which every head is compared with one process's.
CHECKED_WHOLE = 256 << 10


def measure(case: Case, entrants: Sequence[RingContender], ranks: Ranks, dtype: torch.dtype) -> RingResult:
    """Every contender on one case: each checked against one process, then all timed by turns. Collective; the same on every
    rank."""
    result = RingResult(case)
    tensors = case.inputs(ranks.device, dtype)
    chosen = _checked_heads(case)
    exact = _alone(case, tensors, chosen)
    sides = []
    for alone in (OneGpu("ours"), OneGpu("cuDNN (torch)"), OneGpuHalo()):
        with _reasons(result, alone.title, ranks):
            share, attend = alone.attend(case, ranks)
            side = Side(alone.title, partial(_share, tensors, share), partial(_given, attend))
            _both(attend, side.local())
            result.flops[alone.title] = share.forward_flops
            sides.append(side)
    for entrant in entrants:
        with _reasons(result, entrant.name, ranks):
            meta = entrant.meta(case, ranks)
            side = Side(entrant.name, partial(_shard, tensors, meta), partial(_opened, entrant, case, ranks))
            with side.opened() as (attend, *without_messages):
                local = side.local()
                got = [x[:, :, heads] for x, heads in zip(_both(attend, local), chosen.of_results, strict=True)]
                # Also what it has to allocate, and to compile.
                for silent in without_messages:
                    _both(silent, local)
            errors = [_error(a, meta.shard(b)) for a, b in zip(got, exact, strict=True)]
            del got, local
            # Not max(), which passes over NaN.
            error = largest(float(torch.tensor(errors).max()), ranks)
            if not error <= WRONG:
                result.wrong.append(entrant.name)
                raise Unavailable(f"WRONG RESULT: relative error {error:.2g}, more than {WRONG}")
            sides.append(side)
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()
    del exact
    for turn in range(ROUNDS):
        # On every rank the same order, and in every round another: who comes after something that draws less power looks faster.
        for side in random.Random(turn).sample(sides, len(sides)):
            if side.name not in result.refused and turn < side.rounds:
                with _reasons(result, side.name, ranks):
                    side.take_turn(ranks)
    journals = {entrant.name: entrant.journal(ranks) for entrant in entrants if entrant.name not in result.refused}
    for side in sides:
        if side.name in result.refused:
            continue
        result.ms[side.name], *of_silent = side.medians_ms(ranks)
        if of_silent:
            result.silent_ms[side.name] = of_silent[0]
        journal = journals.get(side.name)
        if journal is not None:
            with side.opened() as (attend, *_):
                result.waited_ms[side.name] = waiting_ms(attend, side.local(), ranks, journal)
    return result


def _share(tensors: dict[str, torch.Tensor], share: Case) -> list[torch.Tensor]:
    """What one GPU has to attend to."""
    heads = {"q": share.heads, "k": share.kv_heads, "v": share.kv_heads, "dout": share.heads}
    return [tensors[name][:, : share.seq_len, :n].detach().contiguous() for name, n in heads.items()]


def _shard(tensors: dict[str, torch.Tensor], meta: SequenceMeta) -> list[torch.Tensor]:
    """What this rank holds."""
    return [meta.shard(tensors[name]).detach().contiguous() for name in ("q", "k", "v", "dout")]


@contextlib.contextmanager
def _given(attend: Attend) -> Iterator[list[Attend]]:
    yield [attend]


@contextlib.contextmanager
def _opened(entrant: RingContender, case: Case, ranks: Ranks) -> Iterator[list[Attend]]:
    with entrant.prepare(case, ranks) as attend:
        silent = entrant.without_messages(case, ranks)
        yield [attend] if silent is None else [attend, silent]


@dataclass(frozen=True)
class _Heads:
    """Those whose results are compared: indices of query and of key heads that belong together."""

    query: list[int]
    key: list[int]

    @property
    def of_results(self) -> tuple[list[int], ...]:
        """Of out, dq, dk and dv."""
        return self.query, self.query, self.key, self.key


def _checked_heads(case: Case) -> _Heads:
    """All; of a sequence that one process would take long for, the first and the last key head with their query heads."""
    group = case.heads // case.kv_heads
    keys = list(range(case.kv_heads)) if case.seq_len <= CHECKED_WHOLE else sorted({0, case.kv_heads - 1})
    return _Heads([n * group + i for n in keys for i in range(group)], keys)


def _alone(case: Case, tensors: dict[str, torch.Tensor], heads: _Heads) -> list[torch.Tensor]:
    """out, dq, dk, dv of these heads, by one process."""
    part = [tensors[n][:, :, i].detach() for n, i in (("q", heads.query), ("k", heads.key), ("v", heads.key))]
    leaves = [x.requires_grad_() for x in part]
    out = attention(*leaves, mask=case.rule, scale=case.scale)
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors["dout"][:, :, heads.query])]


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


def parser() -> argparse.ArgumentParser:
    """The command line of `longctx bench ring`."""
    p = argparse.ArgumentParser(prog="longctx bench ring", description=__doc__.splitlines()[0])
    case_arguments(p)
    p.add_argument(
        "--nproc", type=int, help="processes, where torchrun does not start them (every GPU; 2 with --smoke)"
    )
    p.add_argument(
        "--rows",
        nargs="+",
        metavar="TEXT",
        help="rows with one of these in their name, such as docs window '64k, 32/8'",
    )
    p.add_argument(
        "--sms", nargs="+", type=int, default=(), metavar="N",
        help="also the direct exchange while NCCL's kernels take at most so many SMs, and at normal priority",
    )  # fmt: skip
    p.add_argument(
        "--tokens-per-gpu", nargs="+", type=token_count, metavar="N",
        help="lengths, by what of the sequence each GPU has, such as 8k 32k",
    )  # fmt: skip
    p.add_argument("--transport", nargs="+", choices=["auto", "nccl", "copy_engine"], help="(nccl copy_engine)")
    return p


def run(args: argparse.Namespace, rank: int) -> int:
    """What every rank does: measure; rank 0 prints and writes. 1 if a result of ours was wrong."""
    world = dist.get_world_size()
    device, dtype = torch.device("cpu"), torch.float32
    if not args.smoke:
        device, dtype = torch.device("cuda", torch.cuda.current_device()), torch.bfloat16
    ranks = Ranks(rank, world, device)
    entrants = _entrants(args, world)
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
        draw(ring_bars([row for result in results for row in rows_of(result, world, **where)]), args.plot)
    return int(any(entrant.is_ours and entrant.name in r.wrong for r in results for entrant in entrants))


def _cases(args: argparse.Namespace, world: int) -> Sequence[Case]:
    if args.tokens_per_gpu is not None:
        if args.shapes is not None:
            raise ConfigError("--tokens-per-gpu and --shapes both say how long sequences are: leave one of them out")
        args.shapes = [(1, n * world) for n in args.tokens_per_gpu]
    return rows_with(args.rows, cases_of(args, SMOKE_CASES if args.smoke else DEFAULT_CASES))


def _entrants(args: argparse.Namespace, world: int) -> list[RingContender]:
    if args.smoke and args.sms:
        raise ConfigError("--sms is about NCCL's kernels, and --smoke runs on the CPU: leave one of them out")
    transports = args.transport or (["auto"] if args.smoke else ["nccl", "copy_engine"])
    found = ring_contenders(transports, args.sms, world=world)
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
        _entrants(args, world)
        args.cases = _cases(args, world)
        if "RANK" in os.environ:
            return _under_torchrun(args)
        backend, timeout_s = ("gloo", 120.0) if args.smoke else ("nccl", 3600.0)
        return max(run_distributed(_spawned, args, world=world, backend=backend, timeout_s=timeout_s))
    except LongCtxError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
