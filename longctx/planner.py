"""`longctx plan`: which plans of so many GPUs fit a model and a length, how fast each would be, and which to take, before anything runs.

Every split of the processes into dp, pp, ring, ulysses and tp is asked whether it is possible, what it takes of each GPU
(`longctx.memory`) and how long a step would be (`longctx.step_time`). Good enough to leave few plans to measure, no substitute
for measuring them.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from longctx.config import Config, load_config
from longctx.engine_config import EngineConfig
from longctx.errors import ConfigError, LongCtxError, did_you_mean
from longctx.masks import AttentionMask
from longctx.memory import RankMemory, rank_memory
from longctx.parallel.nearest import changes, splits
from longctx.parallel.plan import ParallelPlan
from longctx.settings import parse_size
from longctx.step_time import StepTime, step_time

GIB = 1 << 30
# name -> (memory that torch can have of it, bf16 peak in FLOP/s by the maker's data sheet).
GPUS = {
    "h100": (79.1 * GIB, 989.5e12),
    "h200": (139.8 * GIB, 989.5e12),
    "a100": (79.1 * GIB, 312e12),
    "a100-40": (39.4 * GIB, 312e12),
    "b200": (178.0 * GIB, 2250e12),
    "l40s": (44.3 * GIB, 362e12),
}
# What fragmentation and other libraries leave.
USABLE = 0.95
# Estimates that differ by less say nothing.
ALIKE = 0.99


@dataclass(frozen=True)
class Candidate:
    """One way to train the model on these GPUs.

    Args:
        config: with this plan, ZeRO stage, recomputation and accumulation.
        flags: what makes `train.py` run it, beside the configuration that was asked about.
    """

    config: Config
    flags: str
    plan: ParallelPlan
    memory: RankMemory
    time: StepTime

    @property
    def tokens_per_step(self) -> int:
        engine = self.config.engine
        return self.config.data.seq_len * self.plan.dp * engine.micro_batch_size * engine.accumulation_steps  # type: ignore[operator]

    @property
    def speed(self) -> float:
        """Tokens a second of all GPUs."""
        return self.tokens_per_step / self.time.total

    def mfu(self, peak: float) -> float:
        """FLOPs of the model, without recomputation, over what the GPUs could do."""
        data, shape = self.config.data, self.config.model.shape
        sequences = self.tokens_per_step // data.seq_len
        flops = shape.train_flops(self.tokens_per_step, sequences * _area(self.config.model.causal_mask, data.seq_len))
        return flops / self.time.total / self.plan.world_size / peak


@lru_cache(maxsize=8)
def _area(mask: AttentionMask, seq_len: int) -> int:
    """`mask.area(seq_len)`, remembered."""
    return mask.area(seq_len)


def candidates(config: Config, world_size: int, *, peak: float, node_size: int, tokens: int) -> list[Candidate]:
    """Every plan with every ZeRO stage, with and without activation checkpointing, the fastest first.

    Args:
        tokens: of one step; micro-batches are accumulated to come as near as whole ones do, at least one.
    """
    found = []
    for split in splits(config.parallel, world_size):
        for asked in dict.fromkeys((split, replace(split, shard_norms=split.tp > 1))):
            plan = asked if asked.problems() else asked.resolve(world_size)
            for engine in _engines(config, plan, tokens):
                mine = replace(config, engine=engine, parallel=plan)
                if engine.problems("cuda") or mine.plan_problems(plan, world_size, node_size):
                    continue
                memory = rank_memory(config.model, engine, plan, config.data.seq_len, node_size=node_size)
                time = step_time(mine, plan, peak=peak, node_size=node_size)
                found.append(Candidate(mine, _flags(config, asked, engine), plan, memory, time))
    return sorted(found, key=lambda c: c.time.total / c.tokens_per_step)


def _engines(config: Config, plan: ParallelPlan, tokens: int) -> Iterator[EngineConfig]:
    """Every ZeRO stage that makes a difference, with and without activation checkpointing, for a step of about `tokens`."""
    engine = config.engine
    each = config.data.seq_len * (plan.dp or 1) * engine.micro_batch_size
    steps = max(plan.num_stages if plan.schedule == "dualpipev" else 1, round(tokens / each))
    for zero_stage, checkpointing in itertools.product((1, 2, 3), (False, True)):
        # Over one process there is nothing to spread; but what is offloaded must be partitioned.
        if zero_stage == 1 or (plan.dp or 1) * plan.sp > 1 or engine.offload == "all":
            yield replace(
                engine, zero_stage=zero_stage, activation_checkpointing=checkpointing, accumulation_steps=steps
            )


def _flags(config: Config, plan: ParallelPlan, engine: EngineConfig) -> str:
    """What `plan` and `engine` say otherwise than `config`, as on a command line."""
    names = ("zero_stage", "activation_checkpointing", "accumulation_steps")
    changed = {name: getattr(engine, name) for name in names if getattr(engine, name) != getattr(config.engine, name)}
    words = [changes(config.parallel, plan), *(f"--engine.{name}={str(x).lower()}" for name, x in changed.items())]
    return " ".join(filter(None, words))


def longest(candidate: Candidate, limit: float, node_size: int) -> int:
    """The most tokens of a sequence, in thousands of 1024, with which a candidate still fits; 0 if none does."""
    config, plan = candidate.config, candidate.plan

    def fits(blocks: int) -> bool:
        memory = rank_memory(config.model, config.engine, plan, blocks * 1024, node_size=node_size)
        return memory.total <= limit

    # A longer sequence may need less than a shorter one: its ring keeps no keys.
    low = max((1 << n for n in range(17) if fits(1 << n)), default=0)
    high = max(1, 2 * low)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * 1024


def parser() -> argparse.ArgumentParser:
    """The command line of `longctx plan`."""
    made = argparse.ArgumentParser(
        prog="longctx plan",
        usage="longctx plan [--config FILE] --world-size N [--section.key=value ...] [--gpu NAME] [--longest]",
        description="Which plans of N GPUs fit, how fast each is estimated to be, and which to take. Starts nothing.",
        epilog="Degrees, ZeRO stage, activation checkpointing and accumulation are tried; all else is as configured.",
        allow_abbrev=False,
    )
    made.add_argument("--config", metavar="FILE", help="a TOML file, such as one in configs/")
    made.add_argument("--world-size", type=int, required=True, metavar="N", help="GPUs in all")
    made.add_argument("--node-size", type=int, metavar="N", help="GPUs of one machine; by default 8, or all if fewer")
    made.add_argument("--gpu", default="h100", help=f"one of {', '.join(GPUS)}; h100 by default")
    made.add_argument("--tokens", type=parse_size, metavar="N", help="tokens of a step; by default as configured")
    made.add_argument("--top", type=int, default=10, metavar="N", help="plans to show; 10 by default")
    made.add_argument("--longest", action="store_true", help="also the longest sequence with which each plan fits")
    return made


def run(args: argparse.Namespace, overrides: Sequence[str]) -> str:
    """The whole answer, as text.

    Raises:
        ConfigError: the configuration, or an argument, cannot be used.
    """
    config = load_config(args.config, overrides)
    if args.gpu not in GPUS:
        raise ConfigError(f"--gpu {args.gpu} is not known: {did_you_mean(args.gpu, GPUS)}")
    if args.world_size < 1 or args.top < 1 or (args.node_size is not None and args.node_size < 1):
        raise ConfigError("--world-size, --node-size and --top are at least 1")
    memory, peak = GPUS[args.gpu]
    limit = USABLE * memory
    node_size = args.node_size or min(8, args.world_size)
    if problems := config.model.problems():
        raise ConfigError("\n".join(problem.what for problem in problems))
    engine, dp = config.engine, config.parallel.dp or 1
    tokens = args.tokens or config.data.seq_len * engine.micro_batch_size * engine.accumulation_steps * dp
    found = candidates(config, args.world_size, peak=peak, node_size=node_size, tokens=tokens)
    fitting = [c for c in found if c.memory.total <= limit]
    head = (
        f"{config.model.shape.num_params / 1e9:.2f}B parameters, sequences of {config.data.seq_len:_} tokens, {args.world_size} x {args.gpu} "
        f"({limit / GIB:.0f} GiB usable), {node_size} a machine, about {tokens:_} tokens a step\n"
        f"{len(found)} plans are possible, {len(fitting)} fit; one causal document a sequence is assumed, speed is estimated"
    )
    if not found:
        raise ConfigError(
            f"{head}\n       no split of {args.world_size} processes serves these heads, layers and this length"
        )
    if not fitting:
        least = min(found, key=lambda c: c.memory.total)
        offload = (
            ""
            if config.engine.activation_offload
            else "--engine.activation_offload=true (with activation_checkpointing), "
        )
        return "\n".join(
            [
                head,
                _table([least], peak, [longest(least, limit, node_size)] if args.longest else None),
                f"nothing fits: even the plan above needs {least.memory.total / GIB:.1f} GiB, most of it {_largest(least.memory)}",
                f"more GPUs, shorter sequences, {offload}or --engine.offload=optimizer",
            ]
        )
    shown = _best_of_each(fitting)[: args.top]
    best = shown[0]
    return "\n".join(
        [
            head,
            _table(shown, peak, [longest(c, limit, node_size) for c in shown] if args.longest else None),
            f"take the first: {_why(best, shown)}",
            f"  {best.flags or 'as it is configured'}",
        ]
    )


def _best_of_each(fitting: Sequence[Candidate]) -> list[Candidate]:
    """Of the candidates with one split of the processes the fastest; of those as fast the one with the least of ZeRO."""
    of_split: dict[tuple[int, ...], list[Candidate]] = {}
    for c in fitting:
        of_split.setdefault((c.plan.pp, c.plan.ring, c.plan.ulysses, c.plan.tp), []).append(c)
    chosen = [
        min(
            (c for c in group if c.speed > ALIKE * group[0].speed),
            key=lambda c: (c.config.engine.zero_stage, c.time.total),
        )
        for group in of_split.values()
    ]
    return sorted(chosen, key=lambda c: -c.speed)


def _table(shown: Sequence[Candidate], peak: float, lengths: Sequence[int] | None) -> str:
    header = [
        "dp",
        "pp",
        "ring",
        "uly",
        "tp",
        "zero",
        "recompute",
        "micro",
        "GiB",
        "step s",
        "tok/s/GPU",
        "MFU",
        "waiting",
    ]
    header += ["longest"] * (lengths is not None)
    rows = [header]
    for i, c in enumerate(shown):
        p, e = c.plan, c.config.engine
        waiting = (c.time.messages + c.time.bubble) / c.time.total
        rows.append(
            [
                *(str(x) for x in (p.dp, p.pp, p.ring, p.ulysses, f"{p.tp}{'n' * p.shard_norms}", e.zero_stage)),
                "yes" if e.activation_checkpointing else "no",
                str(e.accumulation_steps),
                f"{c.memory.total / GIB:.1f}",
                f"{c.time.total:.2f}",
                f"{c.speed / p.world_size:,.0f}",
                f"{100 * c.mfu(peak):.1f}%",
                f"{100 * waiting:.1f}%",
                *([f"{lengths[i] // 1024:_}k"] if lengths is not None else []),
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _why(best: Candidate, shown: Sequence[Candidate]) -> str:
    """What the choice gains over the next, and where its time and memory go."""
    time, memory = best.time, best.memory
    parts = {
        "products": time.linear,
        "attention": time.attention,
        "messages": time.messages,
        "idle stages": time.bubble,
    }
    spent = ", ".join(f"{name} {100 * t / time.total:.0f}%" for name, t in parts.items() if t > 0.005 * time.total)
    ahead = ""
    if len(shown) > 1:
        gain = best.speed / shown[1].speed - 1
        ahead = f"{100 * gain:.1f}% faster than the next; " if gain >= 0.001 else "as fast as the next; "
    return f"{ahead}time: {spent}; memory: mostly {_largest(memory)}"


def _largest(memory: RankMemory) -> str:
    """The two that take most, as text."""
    parts = {name: size for name, size in vars(memory).items() if name != "host"}
    first = sorted(parts, key=lambda name: -parts[name])[:2]
    return " and ".join(f"{name} ({parts[name] / GIB:.1f} GiB)" for name in first)


def main(argv: Sequence[str] | None = None) -> int:
    """`longctx plan`; returns the exit code."""
    args, overrides = parser().parse_known_args(argv)
    try:
        print(run(args, overrides))
    except LongCtxError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
