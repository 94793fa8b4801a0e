"""`longctx eval`: the loss of a checkpoint, or of Hugging Face's weights, by how much context a token has; on the text of
`data.eval_path`, or where there is none of `data.path`.

At any plan without stages, so a text is read at lengths that one GPU cannot hold. Started like a training run.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import nn

from longctx.checkpoint import check_checkpoint
from longctx.checkpoint_folder import latest_checkpoint
from longctx.checkpoint_weights import CheckpointWeights
from longctx.config import Config, load_config
from longctx.data import ShardedBatch, ShardedLoader
from longctx.errors import ConfigError, did_you_mean
from longctx.hf_config import CONFIG
from longctx.launch import Launch, run
from longctx.model import ModelConfig, Transformer
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.slices import parameter_slices
from longctx.preparation import DATA_TIMEOUT_S, GROUP_TIMEOUT_MARGIN_S, open_data, settle, watched
from longctx.process import set_cpu_threads, tell
from longctx.shapes import NO_TARGET
from longctx.weights import WeightsFolder

# Rows of the table: a token's context is more than half of the longest, more than a quarter, and so on.
BUCKETS = 8
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class LossOfContext:
    """The loss of the tokens that have so much context.

    Args:
        least, most: tokens that one sees, itself included; both belong to it.
        tokens: how many were predicted.
        loss: their mean loss, nats; NaN where there are none.
    """

    least: int
    most: int
    tokens: int
    loss: float


def main(argv: Sequence[str] | None = None) -> int:
    """`longctx eval`; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)

    def body(launch: Launch) -> None:
        with launch.together("the command line"):
            known, overrides = parse(words)
            config = None if known.help else load_config(known.config, overrides)
        if config is None:
            if launch.place.rank == 0:
                print(parser().format_help())
            return
        evaluate(config, launch, weights=known.weights, samples=known.samples)
        launch.finish()

    return run(body)


def evaluate(config: Config, launch: Launch, *, weights: str | None, samples: int | None) -> list[LossOfContext]:
    """Measure and, on rank 0, print; every process of the run calls it.

    Args:
        weights: a checkpoint, or a folder in Hugging Face's layout; None: the newest checkpoint of `config`'s run, else its
            `train.init_from`.
        samples: sequences to read, from the text's beginning on; None: all.

    Raises:
        StartError: the input cannot be used.
    """
    # Order and accumulation are of training; of norms that are shared only memory depends.
    config = replace(
        config,
        data=replace(config.data, path=config.data.eval_path or config.data.path, shuffle=False),
        engine=replace(config.engine, accumulation_steps=1),
        parallel=replace(config.parallel, shard_norms=False),
    )
    with launch.together("the configuration"):
        if config.parallel.pp > 1:
            raise ConfigError(
                f"parallel.pp = {config.parallel.pp}: an evaluation has no stages\n       use parallel.tp, ring or ulysses"
            )
        if samples is not None and samples < 1:
            raise ConfigError(f"--samples {samples}: at least 1 sequence, or leave it out for all")
        plan, device = settle(config, launch.place)
    with launch.together("the weights"):
        path = _find_weights(config, weights)
        folder = _folder(path, config.model)
    with launch.together("the data", timeout_s=DATA_TIMEOUT_S):
        dataset, loader = open_data(config, plan, launch.place.rank, device)
    set_cpu_threads(launch.place.world_size)
    count = loader.num_samples if samples is None else min(samples, loader.num_samples)
    with watched(launch.place, plan, timeout_s=config.train.timeout_s) as watchdog:
        watchdog.mark(0, "setting up", may_hang=False)
        timeout_s = config.train.timeout_s + GROUP_TIMEOUT_MARGIN_S
        launch.start_process_group(device, timeout_s)
        launch.is_working = True
        mesh = ParallelMesh.create(plan, device=device, timeout=timedelta(seconds=timeout_s))
        watchdog.watch(mesh.journal)
        dtype = _DTYPES[config.engine.resolved_dtype(device.type)]
        model = Transformer(config.model, mesh=mesh, kernel=config.engine.kernel, fused=config.engine.fused)
        _load(folder, model)
        model.to(device, dtype).eval()
        if launch.place.rank == 0:
            tell(
                f"weights   {path}\ndata      {dataset.describe()}\n"
                f"plan      {plan}; {count:_} sequences of {loader.seq_len:_}"
            )
        start = time.perf_counter()
        found = measure(model, loader, count, mesh, mark=watchdog.mark)
    if launch.place.rank == 0:
        print(f"{table(found)}\n{count * loader.seq_len:_} tokens in {time.perf_counter() - start:.1f} s")
    return found


def measure(
    model: Transformer,
    loader: ShardedLoader,
    num_samples: int,
    mesh: ParallelMesh,
    *,
    mark: Callable[[int, str], None] = lambda step, phase: None,
) -> list[LossOfContext]:
    """The loss of the first `num_samples` samples by context, the same on every rank; collective.

    Args:
        mark: told the number and the phase of every step, as `Watchdog.mark`.

    Tokens of a packed document see no further than its beginning: that is their context.
    """
    edges = sorted({-(-loader.seq_len // 2**i) for i in range(BUCKETS)})
    # float64: sums of millions of losses.
    sums = torch.zeros(len(edges), 2, dtype=torch.float64, device=mesh.device)
    for step, cursor in enumerate(range(0, num_samples, loader.samples_per_step)):
        mark(step, "evaluating")
        for batch in loader.step(cursor):
            first = cursor + loader.dp_rank * loader.micro_batch_size
            _add_batch(sums, model, batch, edges, samples=num_samples - first)
    if mesh.grad.size > 1:
        dist.all_reduce(sums, group=mesh.grad.group)
    return [
        LossOfContext(least + 1, most, int(tokens), loss / tokens if tokens else math.nan)
        for least, most, (loss, tokens) in zip([0, *edges], edges, sums.tolist(), strict=False)
    ]


@torch.no_grad()
def _add_batch(sums: torch.Tensor, model: Transformer, batch: ShardedBatch, edges: list[int], *, samples: int) -> None:
    """Add this shard's losses, and how many they are, to the rows of `sums`; of the first `samples` sequences only."""
    labels = batch.labels.clone()
    # The last step may reach beyond the last sequence, where the text begins anew.
    labels[max(samples, 0) :] = NO_TARGET
    meta = batch.meta
    positions = meta.positions.cpu()
    seen_from, _ = meta.padded_mask.key_range(positions, meta.padded_len)
    bucket = torch.bucketize(positions - seen_from + 1, torch.tensor(edges)).expand(labels.shape).to(labels.device)
    bucket = bucket.masked_fill(labels == NO_TARGET, -1)
    hidden = model.hidden(batch.tokens, meta)
    for i in range(len(edges)):
        chosen = bucket == i
        tokens = int(chosen.sum())
        if tokens:
            sums[i, 0] += model.lm_head(hidden[chosen][None], labels[chosen][None]).double()
            sums[i, 1] += tokens


def table(found: Sequence[LossOfContext]) -> str:
    """The rows that have tokens, and all together, as text."""
    lines = [f"{'context':>20}  {'tokens':>13}  {'nats a token':>12}  {'perplexity':>10}"]
    total = sum(row.tokens for row in found)
    mean = sum(row.loss * row.tokens for row in found if row.tokens) / total if total else math.nan
    rows = [(f"{row.least:_} to {row.most:_}", row.tokens, row.loss) for row in found if row.tokens]
    for name, tokens, loss in [*rows, ("all", total, mean)]:
        perplexity = f"{math.exp(loss):.4g}" if loss < 700 else "inf"
        lines.append(f"{name:>20}  {tokens:>13_}  {loss:>12.4f}  {perplexity:>10}")
    return "\n".join(lines)


def _find_weights(config: Config, given: str | None) -> Path:
    if given is not None:
        return Path(given).expanduser()
    newest = latest_checkpoint(config.train.checkpoints)
    if newest is None and config.train.init_from is None:
        raise ConfigError(
            f"there is no checkpoint in {config.train.checkpoints}, and train.init_from is none\n"
            "       give --weights, a checkpoint or a folder in Hugging Face's layout, or the --config of a run"
        )
    return newest if newest is not None else Path(str(config.train.init_from)).expanduser()


def _folder(path: Path, model: ModelConfig) -> WeightsFolder | CheckpointWeights:
    if (path / CONFIG).is_file():
        folder = WeightsFolder(path)
        folder.fits(model)
        return folder
    check_checkpoint(path, asdict(model))
    return CheckpointWeights(path)


def _load(folder: WeightsFolder | CheckpointWeights, model: nn.Module) -> None:
    """Of matrices that are cut over tp ranks this rank's part; training in bf16 left fp32 weights, which are taken."""
    if isinstance(folder, WeightsFolder):
        folder.load_into(model)
        return
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, part in parameter_slices(model).items():
            whole = folder.tensor(part.name, "fp32")
            parameters[name].copy_(whole if part.dim is None else whole.narrow(part.dim, part.start, part.length))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}\n       `longctx eval --help` lists the flags")


def parse(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command line's own flags, and its settings.

    Raises:
        ConfigError: a flag is unknown or lacks its value.
    """
    made = parser()
    known, rest = made.parse_known_args(list(words))
    for name in (word.partition("=")[0] for word in rest if word.startswith("--")):
        if "." not in name:
            flags = [flag for action in made._actions for flag in action.option_strings]
            raise ConfigError(f"there is no flag {name}: {did_you_mean(name, flags)}")
    return known, rest


def parser() -> argparse.ArgumentParser:
    """The command line but for settings, which `load_config` takes."""
    made = _Parser(
        prog="longctx eval",
        usage="longctx eval [--config FILE] [--section.key=value ...] [--weights PATH] [--samples N]",
        description="The loss of a checkpoint, or of Hugging Face's weights, on a text, by how much context a token has. "
        "Over several processes: torchrun --nproc-per-node N -m longctx eval ...",
        add_help=False,
        allow_abbrev=False,
    )
    made.add_argument("--config", metavar="FILE", help="of the run; its [model] must be that of the weights")
    made.add_argument(
        "--weights", metavar="PATH", help="a checkpoint, or a folder of weights; the newest checkpoint of train.run_dir"
    )
    made.add_argument("--samples", type=int, metavar="N", help="sequences to read, from the text's beginning; all")
    made.add_argument("-h", "--help", action="store_true", help="show this and stop")
    return made
