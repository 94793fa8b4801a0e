"""`longctx check`: whether a configuration's plan computes on this machine what one process computes.

The configuration's model is cut down until float64 on one process is quick; what decides how the work is shared is kept.
`--broken` makes a well-known mistake and shows that the check sees it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from longctx.broken import TWINS, twins_of
from longctx.comparison import FACTOR, Comparison, merge_ranks
from longctx.config import Config, load_config
from longctx.engine import EngineConfig
from longctx.errors import ConfigError, DistributedError, Problem, did_you_mean, format_problems
from longctx.kernels import get_kernel
from longctx.model import ModelConfig
from longctx.parallel.plan import ParallelPlan
from longctx.parity import DTYPES, ParityCase, compare_on_rank
from longctx.process import EXIT_FAILED, tell
from longctx.testing import run_distributed

# Two layers have everything that more have; two key heads everything that more have.
LAYERS, KV_HEADS = 2, 2
HIDDEN, INTERMEDIATE, VOCAB = 64, 96, 128
ROWS, ACCUMULATION = 2, 4
# Positions of each rank that shares a sequence: a GPU's kernels work on tiles of up to 128, and want more than one.
SHARD = {"cpu": 48, "cuda": 384}
# Keys that a cut window shows at least.
WINDOW = 8


@dataclass(frozen=True)
class Prepared:
    """What will be run, and why so.

    Args:
        lines: every choice that the user did not make, with its reason.
    """

    case: ParityCase
    backend: str
    lines: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """`longctx check`; returns the exit code: 0 right (or every mistake caught), 1 wrong.

    Raises:
        LongCtxError: the command line or the configuration cannot be used.
    """
    prepared = prepare(argv)
    case = prepared.case
    print("\n".join(prepared.lines), flush=True)
    start = time.perf_counter()
    tell(f"... starting {_count(case.plan.world_size, 'process')}")
    try:
        of_ranks = run_distributed(
            compare_on_rank,
            case,
            world=case.plan.world_size,
            backend=prepared.backend,
            plan=case.plan,
            timeout_s=case.timeout_s,
        )
    except DistributedError as error:
        print(f"FAIL: the processes did not come to an end\n{error}")
        return EXIT_FAILED
    found = {twin: merge_ranks([of_rank[twin] for of_rank in of_ranks]) for twin in of_ranks[0]}
    text, is_ok = report(found, case)
    print(f"\n{text} ({time.perf_counter() - start:.0f} s)")
    return 0 if is_ok else EXIT_FAILED


def prepare(argv: Sequence[str] | None = None) -> Prepared:
    """From the command line to what will be run; starts nothing.

    Raises:
        ConfigError: with every problem of the configuration; or an unknown mistake.
        PlanError: the plan does not fit the number of processes.
    """
    known, overrides = parser().parse_known_args(argv)
    if known.nproc < 1:
        raise ConfigError(f"--nproc {known.nproc}: at least 1 process is needed")
    if not known.timeout > 0:
        raise ConfigError(f"--timeout {known.timeout:g}: it must be greater than 0 seconds")
    for word in overrides:
        flag = word.partition("=")[0]
        hint = did_you_mean(flag, ("--nproc", "--config", "--broken", "--timeout"))
        if flag.startswith("--") and "." not in flag:
            raise ConfigError(f"there is no flag {flag}: {hint}")
    config = load_config(known.config, overrides)
    backend, why = choose_backend(config.train.device, known.nproc)
    device = "cuda" if backend == "nccl" else "cpu"
    problems = _problems(config, known.nproc, device)
    if problems:
        raise ConfigError(format_problems("this configuration", problems))
    chosen, why_degrees = config.choose_plan()
    plan = chosen.resolve(known.nproc)
    model, seq_len, cuts = cut_model(config, plan, device)
    engine, engine_cuts = cut_engine(config.engine, plan, device)
    filled = " (dp: what the other degrees leave)" if config.parallel.dp is None and known.nproc > 1 else ""
    case = ParityCase(
        model=model,
        engine=engine,
        optim=config.optim,
        plan=plan,
        seq_len=seq_len,
        mask_documents=config.data.mask_documents,
        device_type=device,
        twins=() if known.broken is None else twins_of(known.broken, plan),
        timeout_s=known.timeout,
        is_verbose=True,
    )
    window = "" if model.sliding_window is None else f", window {model.sliding_window}"
    names = ("tie_embeddings", "qkv_bias", "qk_norm", "sinks")
    traits = "".join(f", {name}" for name in names if getattr(model, name))
    traits += f", softcap {model.softcap:g}" if model.softcap else ""
    dtype = engine.resolved_dtype(device)
    because = f" (engine.dtype = auto on {device})" if engine.dtype == "auto" else ""
    reference = f"held against float64, and against the error of plain torch in {dtype}"
    lines = (
        f"plan      {plan}, layout {plan.layout}{filled}",
        *([f"degrees   {why_degrees}"] if why_degrees else []),
        f"backend   {backend}: {why}",
        f"dtype     {dtype}{because}; {reference}",
        f"kept      {model.num_heads // model.kv_heads} query heads to a key head of {model.head_size}"
        f"{window}{traits}, {'packed documents' if case.mask_documents else 'one causal stream'}, "
        f"ZeRO {engine.zero_stage}, kernel {engine.kernel}, fused {engine.fused}"
        f"{', activation checkpointing' * engine.activation_checkpointing}",
        *(f"cut       {line}" for line in (*cuts, *engine_cuts)),
        "data      random tokens, 30 % of them no target, none on the last process: the text and tokenizer are not read",
    )
    return Prepared(case, backend, lines)


def parser() -> argparse.ArgumentParser:
    """The flags; what is left over are overrides of the configuration."""
    made = argparse.ArgumentParser(
        prog="longctx check",
        usage="longctx check --nproc N [--config FILE] [--section.key=value ...] [--broken NAME]",
        description="Compare attention, gradients, their norm and scale, and the loss of a plan with those of one process.",
        epilog="Mistakes: " + "; ".join(f"{name}: {twin.what}" for name, twin in TWINS.items()),
        allow_abbrev=False,
    )
    made.add_argument("--nproc", type=int, required=True, metavar="N", help="processes to start on this machine")
    made.add_argument("--config", metavar="FILE", help="a TOML file, such as one in configs/")
    made.add_argument(
        "--broken", metavar="NAME", help="also make this mistake (or all): succeeds if the check catches it"
    )
    made.add_argument(
        "--timeout", type=float, default=600.0, metavar="SECONDS", help="for everything together (default 600)"
    )
    return made


def choose_backend(device: str, nproc: int) -> tuple[str, str]:
    """gloo or nccl, and why.

    Args:
        device: "auto", "cuda" or "cpu", as in `TrainConfig`.

    Raises:
        ConfigError: "cuda" with fewer GPUs than processes.
    """
    if device == "cpu":
        return "gloo", "train.device = cpu"
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus >= nproc:
        return "nccl", f"{_count(gpus, 'GPU')}, one for each of {_count(nproc, 'process')}"
    if device == "cuda":
        raise ConfigError(
            f"train.device = cuda, but {_count(nproc, 'process')} on {_count(gpus, 'GPU')}: NCCL needs one for each\n"
            f"       use --train.device=cpu, or --nproc of at most {max(1, gpus)}"
        )
    if not gpus:
        return "gloo", "on CPUs, torch sees no GPU"
    return "gloo", f"on CPUs: NCCL needs a GPU for each of {_count(nproc, 'process')}, there are {gpus}"


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 'es' if what.endswith('s') else 's'}"


def _problems(config: Config, nproc: int, device: str) -> list[Problem]:
    """What the check needs of a configuration: all but text, logging and length of the run."""
    found = [*config.model.problems(), *config.engine.problems(device), *config.optim.problems()]
    has_heads, plan = not config.model.problems(), config.parallel
    if plan.context is not None and not found and not plan.problems():
        plan, _ = config.choose_plan()
    found += plan.check(
        num_heads=config.model.num_heads if has_heads else 1,
        num_kv_heads=config.model.kv_heads if has_heads else 1,
        seq_len=config.data.seq_len,
        num_layers=config.model.num_layers if has_heads else None,
        mlp_size=config.model.mlp_size if has_heads else None,
        vocab_size=config.model.vocab_size if has_heads else None,
    )
    found += config.engine.plan_problems(plan)
    if not found:
        plan.resolve(nproc)
    return found


def cut_model(config: Config, plan: ParallelPlan, device: str) -> tuple[ModelConfig, int, list[str]]:
    """A model and a sequence small enough for float64; the model, the length, and what was cut to what with the reason."""
    model, seq_len = config.model, config.data.seq_len
    multiple = plan.seq_multiple
    shortest = -(-SHARD[device] * plan.sp // multiple) * multiple
    # As much padding as the whole sequence has.
    short = min(seq_len, shortest - -seq_len % multiple)
    # Ulysses and tp divide the heads that there are, tp the features and the vocabulary, pp the layers.
    kv_heads = min(model.kv_heads, KV_HEADS) if plan.ulysses == plan.tp == 1 else model.kv_heads
    intermediate, vocab = (-(-size // plan.tp) * plan.tp for size in (INTERMEDIATE, VOCAB))
    # One more than stages, so that these are uneven.
    layers = LAYERS if plan.pp == 1 else plan.num_stages + 1
    window = model.sliding_window
    if window is not None and short < seq_len:
        # As long beside the sequence as it was.
        window = max(min(window, WINDOW), round(window * short / seq_len))
    cut = replace(
        model,
        num_layers=min(model.num_layers, layers),
        hidden_size=min(model.hidden_size, HIDDEN),
        intermediate_size=min(model.mlp_size, intermediate),
        vocab_size=min(model.vocab_size, vocab),
        num_kv_heads=kv_heads,
        num_heads=model.num_heads // model.kv_heads * kv_heads,
        head_dim=model.head_size,
        sliding_window=window,
        # Keeps activations of about one size through narrow layers. The starts of wide models leave attention so even that
        # bf16 rounding would hide the gradients of q and k, and with them a mistake.
        init_std=max(model.init_std, min(model.hidden_size, HIDDEN) ** -0.5),
    )
    sizes = [
        f"{name} {before:_} -> {after:_}"
        for name, before, after in (
            ("layers", model.num_layers, cut.num_layers),
            ("hidden", model.hidden_size, cut.hidden_size),
            ("intermediate", model.mlp_size, cut.mlp_size),
            ("vocabulary", model.vocab_size, cut.vocab_size),
            ("heads", model.num_heads, cut.num_heads),
            ("kv heads", model.kv_heads, cut.kv_heads),
        )
        if before != after
    ]
    lines = [f"{', '.join(sizes)}: float64 on one process must be quick"] if sizes else []
    if short < seq_len:
        scaled = f", sliding window {model.sliding_window:_} -> {window:_}" if window is not None else ""
        lines.append(
            f"sequence {seq_len:_} -> {short:_}{scaled}: {short // plan.sp} positions on each rank of a sequence"
        )
    if cut.init_std != model.init_std:
        lines.append(f"init_std {model.init_std:g} -> {cut.init_std:g}: so that rounding hides no parameter's gradient")
    return cut, short, lines


def cut_engine(engine: EngineConfig, plan: ParallelPlan, device: str) -> tuple[EngineConfig, list[str]]:
    """The engine's settings for a small model on `device`, and what was changed to what with the reason."""
    cut, lines = engine, []
    if engine.micro_batch_size > ROWS:
        cut = replace(cut, micro_batch_size=ROWS)
        lines.append(f"micro-batch {engine.micro_batch_size} -> {ROWS}: more sequences show no more")
    enough = max(ACCUMULATION, plan.num_stages if plan.schedule == "dualpipev" else 0)
    if engine.accumulation_steps > enough:
        cut = replace(cut, accumulation_steps=enough)
        lines.append(f"accumulation {engine.accumulation_steps} -> {enough}: more micro-batches show no more")
    if engine.zero_stage == 3 and engine.zero3_keep_elements:
        cut = replace(cut, zero3_keep_elements=0)
        lines.append(
            f"engine.zero3_keep_elements {engine.zero3_keep_elements:_} -> 0: else ZeRO-3 would keep every parameter of "
            "the small model whole"
        )
    if device == "cpu" and engine.kernel != "auto":
        dtype = DTYPES[engine.resolved_dtype(device)]
        kernel = get_kernel(engine.kernel)
        why = kernel.supports(device=torch.device("cpu"), dtype=dtype, head_dim=64, kind="rows")
        if why is not None:
            cut = replace(cut, kernel="auto")
            lines.append(f"engine.kernel {engine.kernel} -> auto: {why}")
    if device == "cpu" and engine.fused == "on":
        cut = replace(cut, fused="auto")
        lines.append("engine.fused on -> auto: liger-kernel runs on cuda")
    return cut, lines


def report(found: dict[str, list[Comparison]], case: ParityCase) -> tuple[str, bool]:
    """The tables and the verdict, and whether it is a good one.

    Args:
        found: comparisons of the right code under "", and of each twin.
    """
    blocks = [table(found[""])]
    right = all(c.is_ok for c in found[""])
    caught = {}
    for twin in case.twins:
        wrong = [c for c in found[twin] if not c.is_ok]
        caught[twin] = bool(wrong)
        blocks.append(f"broken: {twin}: {TWINS[twin].what}\n{table(found[twin])}")
        names = ", ".join(dict.fromkeys(c.what for c in wrong))
        blocks.append(f"caught by {names}" if wrong else "NOT CAUGHT")
    count = len(found[""])
    what = f"{case.plan} on {_count(case.plan.world_size, 'process')}"
    if not right:
        wrong_count = sum(not c.is_ok for c in found[""])
        verdict = f"FAIL: {what} differs from one process in {wrong_count} of {count} comparisons"
    elif not all(caught.values()):
        missed = ", ".join(twin for twin, is_caught in caught.items() if not is_caught)
        verdict = f"FAIL: {what} equals one process, but the check did not see: {missed}"
    else:
        verdict = f"PASS: {what} equals one process in all {count} comparisons"
        if caught:
            verdict += f"; caught: {', '.join(caught)}"
    return "\n\n".join([*blocks, verdict]), right and all(caught.values())


def table(comparisons: Sequence[Comparison]) -> str:
    """One line a quantity: its worst tensor, that one's error, plain torch's, their ratio, and what is allowed."""
    header = ("what", "worst tensor", "error", "plain torch", "ratio", f"allowed ({FACTOR:g} x + floor)", "ok")
    lines = [header]
    for what in dict.fromkeys(c.what for c in comparisons):
        group = [c for c in comparisons if c.what == what]
        worst = max(group, key=lambda c: c.excess)
        mine, theirs, allowed = worst.measured
        wrong = sum(not c.is_ok for c in group)
        ratio = f"{mine / theirs:.2g}" if theirs else "-"
        name = f"{worst.name} of {len(group)}" if worst.name else worst.note
        ok = "yes" if not wrong else f"NO: {wrong} of {len(group)}"
        lines.append((what, name, f"{mine:.1e}", f"{theirs:.1e}", ratio, f"{allowed:.1e}", ok))
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    left = (0, 1, len(header) - 1)
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


if __name__ == "__main__":
    sys.exit(main())
