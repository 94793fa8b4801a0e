"""Checkpoints: complete or not there, and checked before they are loaded.

    checkpoints/step-00000100/                complete: it has this name only once everything in it is on the disk
        manifest.json                         what it is of, the training state, and each file's size and checksum
        *_model_states.pt, *_optim_states.pt  DeepSpeed's: parameters, and each process's part of the optimizer
        rng-rank00000.json                    each process's random generators
    checkpoints/tmp-step-00000200/            being written, or left by a run that was killed; the next save removes it

DeepSpeed's files are pickles. They are read by torch's `weights_only` unpickler, which makes tensors, plain containers and
three record classes of DeepSpeed and refuses everything else, so a file cannot run code. All the rest is JSON.

A checkpoint is of one model and of one way of sharing it out: the ZeRO stage, the dtype and the number of processes over
which gradients are averaged (dp x ring x ulysses). Everything else may change between save and resume, dp against ring
and the layout included.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

import longctx
from longctx.checkpoint_files import Files, rng_state, set_rng_state
from longctx.checkpoint_folder import (
    complete,
    final_name,
    find_damage,
    find_problem,
    latest_checkpoint,
    prepare,
    prune,
    read_manifest,
    refuse,
)
from longctx.errors import CheckpointError

if TYPE_CHECKING:
    from longctx.engine import EngineConfig, TrainEngine
    from longctx.parallel.plan import ParallelPlan

__all__ = [
    "TrainState",
    "check_checkpoint",
    "latest_checkpoint",
    "load_checkpoint",
    "save_checkpoint",
    "sharing",
]


@dataclass(kw_only=True)
class TrainState:
    """How far a run has come.

    Args:
        step: optimizer steps done.
        cursor: samples consumed, over all processes: where the data go on, whatever the number of processes.
        tokens: tokens consumed, over all processes.
        data: what `cursor` counts: `ShardedLoader.order` of the run.
    """

    step: int = 0
    cursor: int = 0
    tokens: int = 0
    data: str = ""


def save_checkpoint(
    root: Path | str, engine: TrainEngine, state: TrainState, *, fingerprint: dict[str, Any], keep: int
) -> Path:
    """Write the checkpoint `root/step-...` and remove all but the last `keep`. Every process calls it; `root` is shared.

    The earlier ones stay until this one is complete. One of the same step is replaced.

    Args:
        fingerprint: what the model is, as plain values (the fields of its `ModelConfig`); compared when it is loaded.

    Raises:
        CheckpointError: it could not be written (a full disk, say), on any process; raised on all of them. What was
            written is removed, earlier checkpoints and the engine are as before, and training can go on.
    """
    assert keep >= 1, f"keep = {keep}: the checkpoint just written is always kept"
    root = Path(root)
    final = root / final_name(state.step)
    temporary = root / f"tmp-{final.name}"
    is_first = engine.mesh.rank == 0
    _on_all(engine, "prepared", final, lambda: prepare(root, temporary) if is_first else None)
    files = Files()
    with _through(engine, files):
        engine.ds.save_checkpoint(str(root), tag=temporary.name, save_latest=False)
    files.save_json(rng_state(engine.mesh.device), temporary / _rng_name(engine.mesh.rank))
    manifest = {
        "state": asdict(state),
        "model": fingerprint,
        "sharing": sharing(engine.config, engine.mesh.plan, engine.mesh.device.type),
        "plan": asdict(engine.mesh.plan),
        "versions": _versions(),
    }
    try:
        written = [file for of_one in _on_all(engine, "written", final, files.finish) for file in of_one]
        _on_all(engine, "completed", final, lambda: complete(manifest, written, temporary, final) if is_first else None)
    except CheckpointError:
        _on_all(engine, "removed", final, lambda: shutil.rmtree(temporary, ignore_errors=True) if is_first else None)
        raise
    if is_first:
        prune(root, keep)
    return final


def check_checkpoint(
    path: Path | str, fingerprint: dict[str, Any], *, shared_out: dict[str, Any] | None = None
) -> None:
    """Check what can be said of a checkpoint without an engine: that it is complete, of this model, and shared out so.

    Args:
        shared_out: `sharing(...)` of the run that is to load it; None: not checked.

    Raises:
        CheckpointError: it is missing or truncated (the newest complete one beside it is named), of another model (with
            the fields that differ), or shared out differently.
    """
    path = Path(path)
    problem = find_problem(path)
    if problem is not None:
        raise refuse(path, problem)
    manifest = read_manifest(path)
    _check_model(path, manifest, fingerprint)
    if shared_out is not None:
        _check_sharing(path, manifest, shared_out)


def load_checkpoint(path: Path | str, engine: TrainEngine, fingerprint: dict[str, Any]) -> TrainState:
    """Bring `engine` and this process's random generators to where they were. Every process calls it.

    The engine must be new: DeepSpeed cannot load into ZeRO-3 parameters that have been trained. The optimizer's state is the
    checkpoint's, its settings are the engine's.

    Raises:
        CheckpointError: it is missing, truncated or damaged (the newest complete one beside it is named), of another model
            (with the fields that differ), or was saved with another ZeRO stage, dtype or number of processes. On all
            processes alike; nothing was loaded then.
    """
    path, mesh = Path(path), engine.mesh

    def check() -> None:
        check_checkpoint(path, fingerprint, shared_out=sharing(engine.config, mesh.plan, mesh.device.type))
        # Each process reads its share of the files; together they read all.
        damage = find_damage(path, read_manifest(path)["files"][mesh.rank :: mesh.world_size])
        if damage is not None:
            raise refuse(path, damage)

    _on_all(engine, "read", path, check)
    manifest = read_manifest(path)

    def load() -> None:
        try:
            with _through(engine, Files()):
                loaded, _ = engine.ds.load_checkpoint(str(path.parent), tag=path.name)
        except (RuntimeError, KeyError, ValueError, pickle.UnpicklingError) as error:
            versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
            raise CheckpointError(
                f"{mesh.prefix} checkpoint {path} is as it was written, but DeepSpeed cannot load it: {error}\n"
                f"       it was saved with {versions}; use these versions"
            ) from error
        if loaded is None:
            raise CheckpointError(f"DeepSpeed finds no files in {path}\n       use a path without any of * ? [ ]")

    _on_all(engine, "loaded", path, load)
    engine.apply_optim_config()
    set_rng_state(json.loads((path / _rng_name(mesh.rank)).read_text()), mesh.device)
    return TrainState(**manifest["state"])


def sharing(engine: EngineConfig, plan: ParallelPlan, device_type: str) -> dict[str, Any]:
    """How a resolved plan and these settings share a model out: what must be the same when a checkpoint is loaded."""
    return {
        "engine.zero_stage": engine.zero_stage,
        "engine.dtype": engine.resolved_dtype(device_type),
        "processes that share gradients (dp x ring x ulysses)": plan.grad_world,
        "parallel.pp": plan.pp,
        "parallel.tp": plan.tp,
    }


def _check_model(path: Path, manifest: dict[str, Any], fingerprint: dict[str, Any]) -> None:
    # Through JSON, where a tuple is a list.
    different = _differences(_flat(manifest["model"]), _flat(json.loads(json.dumps(fingerprint))))
    if different:
        raise CheckpointError(
            f"checkpoint {path} is of another model\n{different}\n"
            "       give the model these settings, or start anew with --train.resume=never in another train.run_dir"
        )


def _check_sharing(path: Path, manifest: dict[str, Any], shared_out: dict[str, Any]) -> None:
    different = _differences(manifest["sharing"], shared_out)
    if different:
        plan = ", ".join(f"{name} {value}" for name, value in manifest["plan"].items())
        raise CheckpointError(
            f"checkpoint {path} was shared out differently\n{different}\n"
            f"       it can be resumed as it was saved: {plan}, and the same engine.zero_stage and engine.dtype"
        )


def _differences(saved: dict[str, Any], ours: dict[str, Any]) -> str:
    missing = "(not set)"
    return "\n".join(
        f"       {key}: {saved.get(key, missing)} in the checkpoint, {ours.get(key, missing)} here"
        for key in sorted(saved | ours)
        if saved.get(key, missing) != ours.get(key, missing)
    )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, keys joined by dots."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _versions() -> dict[str, str]:
    import deepspeed

    return {"longctx": longctx.__version__, "torch": torch.__version__, "deepspeed": deepspeed.__version__}


def _rng_name(rank: int) -> str:
    return f"rng-rank{rank:05d}.json"


@contextmanager
def _through(engine: TrainEngine, files: Files) -> Iterator[None]:
    """Let DeepSpeed save and load through `files`, and write only what it cannot do without."""
    ds = engine.ds
    theirs = ds.checkpoint_engine
    ds.checkpoint_engine = files
    # Copies of its conversion scripts, on one process before a barrier: a full disk would make the others wait for ever.
    ds._copy_recovery_script = lambda path: None
    try:
        yield
    finally:
        ds.checkpoint_engine = theirs
        del ds._copy_recovery_script


def _on_all(engine: TrainEngine, what: str, path: Path, action: Callable[[], Any]) -> list[Any]:
    """Run `action` here; return its result on every process, in rank order.

    Raises:
        CheckpointError: it failed on some process; the first one's error, on all of them.
    """
    result, error = None, None
    try:
        result = action()
    except CheckpointError as caught:
        error = str(caught)
    except OSError as caught:
        error = (
            f"{engine.mesh.prefix} checkpoint {path} could not be {what}: {caught}\n"
            "       earlier checkpoints are as they were; see to the file system"
        )
    reports: list[tuple[Any, str | None]] = [(result, error)]
    if engine.mesh.world_size > 1:
        reports = [(None, None)] * engine.mesh.world_size
        dist.all_gather_object(reports, (result, error))
    for _, message in reports:
        if message is not None:
            raise CheckpointError(message)
    return [result for result, _ in reports]
