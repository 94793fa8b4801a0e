"""What is settled before a run touches a GPU: its plan, its device, its data, how all that reads, and who watches over it.

Everything here follows from the configuration, the files it names and the number of processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from longctx.data import ShardedBatch, ShardedLoader, check_vocab, open_dataset
from longctx.errors import ConfigError, DataError, Problem, format_problems
from longctx.kernels import get_kernel
from longctx.launch import Launch, Place, StartError, choose_device
from longctx.memory import rank_memory
from longctx.parallel.plan import ParallelPlan
from longctx.progress import in_bytes
from longctx.results import environment, version
from longctx.watchdog import Watchdog
from longctx.weights import WeightsFolder

if TYPE_CHECKING:
    from longctx.checkpoint import TrainState
    from longctx.config import Config
    from longctx.tokens import TokenDataset

# Tokenising a large text takes hours once; the watchdog meanwhile sees whether everyone is alive.
DATA_TIMEOUT_S = 24 * 3600.0

# The process group's own timeout comes after the watchdog's, which knows more and says so.
GROUP_TIMEOUT_MARGIN_S = 60.0

# A step that takes a CPU of 100 GFLOP/s, which is a good one, a quarter of an hour.
CPU_STEP_FLOPS = 1e14


def dry_run(config: Config, launch: Launch, *, world_size: int | None = None) -> str:
    """What a run would be, as text: the configuration, the plan, the first batch's shapes, memory. Trains nothing.

    Args:
        world_size: pretend to be rank 0 of so many processes.

    Raises:
        StartError: the input cannot be used.
    """
    place = launch.place if world_size is None else Place(rank=0, world_size=world_size)
    with launch.together("the configuration"):
        plan, device = settle(config, place, is_dry=True)
    with launch.together("the weights to start from"):
        weights = weights_to_start_from(config)
    with launch.together("the data", timeout_s=DATA_TIMEOUT_S):
        dataset, loader = open_data(config, plan, place.rank, torch.device("cpu"))
    shape = config.model.shape
    dtype = config.engine.resolved_dtype(device.type)
    stages = config.model.stages(plan.num_stages, config.data.seq_len)
    lines = [
        config.dump().rstrip(),
        "",
        f"plan      {plan.describe(config.data.seq_len, stages)}",
        *_degrees_lines(config, place),
        f"data      {dataset.describe()}",
        f"step      {_step_line(config, plan, loader)}",
        *(f"batch {i}   {_batch_line(batch)}" for i, batch in enumerate(loader.step(0))),
        f"model     {shape.num_params:_} parameters, {dtype}",
        *_weights_lines(config, weights),
        f"memory    {_memory_line(config, plan, device, place)}",
    ]
    return "\n".join(lines)


def choices(
    config: Config,
    place: Place,
    plan: ParallelPlan,
    device: torch.device,
    *,
    data: tuple[TokenDataset, ShardedLoader],
    resume_from: Path | None,
    init_from: WeightsFolder | None,
    has_peak: bool,
    threads: str,
) -> Iterator[str]:
    """What was settled without the user having said it, and why; a line each."""
    dataset, loader = data
    facts = about(config, plan, device)
    yield (
        f"longctx   {facts['longctx']}, commit {facts['commit']}; torch {facts['torch']}, "
        f"deepspeed {facts['deepspeed']}; started by {place.launcher}"
    )
    filled = " (dp: what the other degrees leave)" if config.parallel.dp is None and plan.world_size > 1 else ""
    ring = f", layout {plan.layout}, strategy {plan.strategy}" if plan.ring > 1 else ""
    ring += f", dk and dv sent in {plan.grad_dtype}" if plan.wire_dtype is not None else ""
    local = place.local_world_size or plan.world_size
    nodes = f", {local} on each machine" if local < plan.world_size else ""
    yield f"plan      {plan} on {plan.world_size} process{'es' * (plan.world_size > 1)}{nodes}{ring}{filled}"
    yield from _degrees_lines(config, place)
    if plan.pp > 1:
        counts = [len(layers) for layers in config.model.stages(plan.num_stages, config.data.seq_len)]
        micro_batches = config.engine.accumulation_steps
        idle = (plan.pp - 1) / (micro_batches + plan.pp - 1)
        waiting = f", idle {idle:.0%} of the time" if plan.schedule == "1f1b" else ""
        yield (
            f"stages    of {', '.join(map(str, counts))} layers; {plan.schedule} with {micro_batches} micro-batches "
            f"(engine.accumulation_steps){waiting}"
        )
    yield f"device    {choose_device(place, config.train.device)[1]}; {threads}"
    dtype = config.engine.resolved_dtype(device.type)
    because = f" (engine.dtype = auto on {device.type})" if config.engine.dtype == "auto" else ""
    known = "" if has_peak else "; utilisation is shown as TFLOP/s: no peak is known for this device and dtype"
    yield f"dtype     {dtype}{because}{known}"
    yield f"data      {dataset.describe()}"
    yield f"model     {config.model.shape.num_params:_} parameters"
    yield from _weights_lines(config, init_from)
    yield f"step      {_step_line(config, plan, loader)}"
    if config.train.resume == "never":
        yield "resume    from the start (train.resume = never)"
    elif resume_from is None:
        yield f"resume    from the start: no checkpoint in {config.train.checkpoints}"
    else:
        yield f"resume    from {resume_from} (train.resume = {config.train.resume})"


def resumed(before: TrainState, now: TrainState, there: str, here: str) -> Iterator[str]:
    """Where a run goes on, and what is other than it was; a line each.

    Args:
        before: what the checkpoint says; now: what the run begins with.
        there, here: the `arrangement` of the checkpoint and of this run.
    """
    other = f", from a checkpoint of {there} at {here}" if there != here else ""
    yield f"resumed   at step {now.step}, sample {now.cursor:_}{other}"
    if before.data != now.data:
        yield (
            f"note      the checkpoint's data were other ({before.data or 'not recorded'}; now {now.data}): samples are read "
            "from the first on"
        )
    if before.batch not in (0, now.batch):
        yield (
            f"note      a step is {now.batch} samples now, before it was {before.batch}: the loss goes on as before where "
            "dp x engine.micro_batch_size x engine.accumulation_steps is the same"
        )


def settle(config: Config, place: Place, *, is_dry: bool = False) -> tuple[ParallelPlan, torch.device]:
    """The plan for this world and this process's device.

    Args:
        is_dry: nothing is going to be computed, so what this device can do does not matter.

    Raises:
        ConfigError: with every problem of the configuration.
    """
    problems = config.check(place.world_size, place.local_world_size)
    if problems:
        raise ConfigError(config.refusal("this configuration", problems, place.world_size, place.local_world_size))
    device, _ = choose_device(place, config.train.device)
    plan = config.choose_plan(place.local_world_size)[0].resolve(place.world_size)
    problems = config.engine.problems(device.type)
    if not is_dry and device.type == "cpu":
        problems += _cpu_problems(config, plan)
    if problems:
        raise ConfigError(format_problems(f"this configuration on {device.type}", problems))
    return plan, device


def _cpu_problems(config: Config, plan: ParallelPlan) -> list[Problem]:
    """What keeps a run from being of use without a GPU."""
    found = []
    engine, length = config.engine, config.data.seq_len
    if engine.kernel != "auto":
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[engine.resolved_dtype("cpu")]
        why = get_kernel(engine.kernel).supports(
            device=torch.device("cpu"),
            dtype=dtype,
            head_dim=config.model.head_size,
            kind="rows",
            softcap=config.model.softcap,
        )
        if why is not None:
            found.append(
                Problem(f"engine.kernel = {engine.kernel!r}: {why}", "engine.kernel = auto takes one that can")
            )
    assert plan.dp is not None, "the plan is resolved"
    samples = plan.dp * engine.micro_batch_size * engine.accumulation_steps
    flops = config.model.shape.train_flops(samples * length, samples * length * length // 2) / plan.world_size
    if config.train.device == "auto" and flops > CPU_STEP_FLOPS:
        found.append(
            Problem(
                f"torch sees no GPU here, and a step of this run is {flops:.1e} FLOPs on each process: hours on a CPU",
                "start it where there is one (`longctx info` says what torch sees), look at it with --dry-run, or insist "
                "with --train.device=cpu",
            )
        )
    return found


def open_data(
    config: Config, plan: ParallelPlan, rank: int, device: torch.device
) -> tuple[TokenDataset, ShardedLoader]:
    """The text that is trained on, and this rank's batches of it."""
    dataset = open_dataset(config.data)
    problems = check_vocab(dataset, config.model.vocab_size)
    if problems:
        raise ConfigError(format_problems("this configuration", problems))
    coords = plan.coords(rank)
    assert plan.dp is not None, "the plan is resolved"
    loader = ShardedLoader(
        dataset,
        seq_len=config.data.seq_len,
        micro_batch_size=config.engine.micro_batch_size,
        accumulation_steps=config.engine.accumulation_steps,
        dp_rank=coords.dp,
        dp_world=plan.dp,
        layout=plan.sequence_layout,
        ring_rank=coords.ring,
        ring_world=plan.ring,
        ulysses_rank=coords.ulysses,
        ulysses_world=plan.ulysses,
        local_multiple=plan.local_multiple,
        sliding_window=config.model.sliding_window,
        seed=config.data.seed,
        shuffle=config.data.shuffle,
        mask_documents=config.data.mask_documents,
        device=device,
    )
    return dataset, loader


def open_eval_data(config: Config, plan: ParallelPlan, rank: int, device: torch.device) -> ShardedLoader | None:
    """This rank's batches of the text that is evaluated on, in its own order; None: there is none.

    Raises:
        DataError: it has fewer sequences than one step takes.
    """
    if config.data.eval_path is None:
        return None
    data = replace(config.data, path=config.data.eval_path, shuffle=False)
    _, loader = open_data(replace(config, data=data), plan, rank, device)
    if loader.num_samples < loader.samples_per_step:
        raise DataError(
            f"data.eval_path = {data.path!r} has {loader.num_samples} sequences of {loader.seq_len:_} tokens, but the ranks read "
            f"{loader.samples_per_step} at a time (dp x engine.micro_batch_size x engine.accumulation_steps)\n"
            "       give more text, or a smaller step"
        )
    return loader


def weights_to_start_from(config: Config) -> WeightsFolder | None:
    """The folder of `train.init_from`; only headers are read.

    Raises:
        CheckpointError: it cannot be used, or is of another model.
    """
    if config.train.init_from is None:
        return None
    folder = WeightsFolder(config.train.init_from)
    folder.fits(config.model)
    return folder


def about(config: Config, plan: ParallelPlan, device: torch.device) -> dict[str, Any]:
    """What a result depends on: for the first record of metrics.jsonl, and for wandb."""
    is_gpu = device.type == "cuda"
    return {
        "config": config.as_dict(),
        "plan": asdict(plan),
        "world_size": plan.world_size,
        **environment(torch.cuda.get_device_name(device) if is_gpu else "cpu", plan.world_size if is_gpu else 0),
        "deepspeed": version("deepspeed"),
        "longctx": version("longctx"),
    }


def _degrees_lines(config: Config, place: Place) -> Iterator[str]:
    _, why = config.choose_plan(place.local_world_size)
    if why:
        yield f"degrees   {why}"


def _weights_lines(config: Config, init_from: WeightsFolder | None) -> Iterator[str]:
    if init_from is not None:
        yield f"weights   from {init_from.path} (train.init_from)"
        for difference in init_from.fits(config.model):
            yield f"note      {difference}"


def _step_line(config: Config, plan: ParallelPlan, loader: ShardedLoader) -> str:
    engine = config.engine
    return (
        f"{loader.tokens_per_step:_} tokens = dp {plan.dp} x micro-batch {engine.micro_batch_size} x accumulation "
        f"{engine.accumulation_steps} x seq_len {config.data.seq_len:_}; {config.train.steps:_} steps are "
        f"{config.train.steps * loader.samples_per_step / loader.num_samples:.3g} epochs"
    )


def _batch_line(batch: ShardedBatch) -> str:
    mask = str(batch.meta.mask)
    shown = mask if len(mask) <= 100 else f"{mask[:97]}..."
    return (
        f"tokens {list(batch.tokens.shape)} {str(batch.tokens.dtype).removeprefix('torch.')}, labels "
        f"{list(batch.labels.shape)}, {int((batch.labels != -100).sum()):_} targets here of {batch.num_target_tokens:_} in "
        f"the step, mask {shown}"
    )


def _memory_line(config: Config, plan: ParallelPlan, device: torch.device, place: Place) -> str:
    memory = rank_memory(
        config.model,
        config.engine,
        plan,
        config.data.seq_len,
        device_type=device.type,
        node_size=place.local_world_size,
    )
    parts = [f"{name} {in_bytes(size)}" for name, size in vars(memory).items() if name != "host" and size]
    host = f"; {in_bytes(memory.host)} in the host's memory" if memory.host else ""
    return f"about {in_bytes(memory.total)} on the rank that holds most: {', '.join(parts)}{host}"


@contextlib.contextmanager
def watched(
    place: Place,
    plan: ParallelPlan,
    *,
    timeout_s: float,
    stacks_dir: Path | None = None,
    before_exit: Callable[[str], None] = lambda reason: None,
) -> Iterator[Watchdog]:
    """A watchdog over the body; a rank that fails in it tells the others why. Arguments as `Watchdog`."""
    watchdog = Watchdog(
        place,
        name_of=lambda rank: str(plan.coords(rank)),
        timeout_s=timeout_s,
        stacks_dir=stacks_dir,
        before_exit=before_exit,
        in_stages=plan.pp > 1,
    )
    watchdog.start()
    try:
        yield watchdog
    except BaseException as error:
        # What all processes agreed on, all of them know.
        if not isinstance(error, StartError):
            watchdog.failed(error)
        raise
    finally:
        watchdog.stop()
