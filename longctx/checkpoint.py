"""Checkpoints: complete or not there, checked before they are loaded, and loaded by any plan.

    checkpoints/step-00000100/            complete: it has this name only once everything in it is on the disk
        manifest.json                     what it is of, the training state, and each file's size and checksum
        state-rank00000.safetensors       a process's part of the weights and of the optimizer's moments, in fp32
        rng-rank00000.json                each process's random generators
    checkpoints/tmp-step-00000200/        being written, or left by a run that was killed; the next save removes it

All files are safetensors and JSON, so none of them can run code. They say of each number which parameter it is of and where in
it, and nothing of ZeRO: every stage, number of processes, arrangement of them and dtype reads what any other has written.
DeepSpeed's own files hold what its optimizers happen to hold, in an order that depends on the stage and on the number of
processes, and moving them to another plan takes a conversion of the whole checkpoint on one machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from longctx.checkpoint_files import set_rng_state
from longctx.checkpoint_folder import find_damage, find_problem, latest_checkpoint, read_manifest, refuse
from longctx.checkpoint_shards import StateShards
from longctx.checkpoint_state import EngineState
from longctx.errors import CheckpointError

if TYPE_CHECKING:
    from longctx.engine import EngineConfig, TrainEngine
    from longctx.parallel.mesh import ParallelMesh
    from longctx.parallel.plan import ParallelPlan

__all__ = [
    "TrainState",
    "arrangement",
    "check_checkpoint",
    "latest_checkpoint",
    "load_checkpoint",
    "saved_as",
]


@dataclass(kw_only=True)
class TrainState:
    """How far a run has come.

    Args:
        step: optimizer steps done.
        cursor: samples consumed, over all processes: where the data go on, whatever the number of processes.
        tokens: tokens consumed, over all processes.
        data: what `cursor` counts: `ShardedLoader.order` of the run.
        batch: samples of the last step, over all processes; 0: not known.
    """

    step: int = 0
    cursor: int = 0
    tokens: int = 0
    data: str = ""
    batch: int = 0


def check_checkpoint(path: Path | str, fingerprint: dict[str, Any]) -> None:
    """Check what can be said of a checkpoint without an engine: that it is complete, and of this model.

    Raises:
        CheckpointError: it is missing or truncated (the newest complete one beside it is named), or of another model (with
            the fields that differ).
    """
    path = Path(path)
    problem = find_problem(path)
    if problem is not None:
        raise refuse(path, problem)
    _check_model(path, read_manifest(path), fingerprint)


def load_checkpoint(path: Path | str, engine: TrainEngine, fingerprint: dict[str, Any]) -> TrainState:
    """Bring `engine` and this process's random generators to where they were. Every process calls it.

    The checkpoint may be of any plan, ZeRO stage and dtype. Under the plan that saved it, training goes on bit for bit; under
    another one up to the rounding of sums in another order. A process that had no counterpart gets random generators of its
    own, which follow from the checkpoint. The optimizer's settings are the engine's. A process reads what it holds, one
    parameter at a time.

    Args:
        engine: a new one: DeepSpeed cannot change ZeRO-3 parameters that have been trained.

    Raises:
        CheckpointError: it is missing, truncated or damaged (the newest complete one beside it is named), or of another model
            (with the fields that differ). On all processes alike, with the engine as it was. Or it does not hold what its
            manifest promises; the engine is of no further use then.
    """
    path, mesh = Path(path), engine.mesh

    def check() -> None:
        check_checkpoint(path, fingerprint)
        # Each process reads its share of the files; together they read all.
        damage = find_damage(path, read_manifest(path)["files"][mesh.rank :: mesh.world_size])
        if damage is not None:
            raise refuse(path, damage)

    on_all(mesh, "read", path, check)
    manifest = read_manifest(path)
    names = [file["name"] for file in manifest["files"]]

    def load() -> None:
        shards = StateShards(path, names)
        for own in state.pieces:
            for kind, held in own.tensors().items():
                values = torch.empty(own.piece.count)
                shards.fill(values, own.piece, kind)
                held.copy_(values)
        state.steps = manifest["optimizer_steps"]

    state = EngineState(engine)
    on_all(mesh, "loaded", path, load)
    state.publish()
    on_all(mesh, "loaded", path, state.check)
    of_rank = sorted(name for name in names if name.startswith("rng-"))
    branch, source = divmod(mesh.rank, len(of_rank))
    set_rng_state(json.loads((path / of_rank[source]).read_text()), mesh.device, branch=branch)
    return TrainState(**manifest["state"])


def arrangement(engine: EngineConfig, plan: ParallelPlan, device_type: str) -> str:
    """In words, how a resolved plan and these settings share a model out."""
    return f"{plan}, zero {engine.zero_stage}, {engine.resolved_dtype(device_type)}"


def saved_as(path: Path | str) -> str:
    """The `arrangement` under which a complete checkpoint was saved."""
    return read_manifest(Path(path))["arrangement"]


def on_all(
    mesh: ParallelMesh, what: str, path: Path, action: Callable[[], Any], *, group: dist.ProcessGroup | None = None
) -> list[Any]:
    """Run `action` on every process; return what it returned on each, in rank order.

    Args:
        what: past participle of what is done to the checkpoint `path`, for the message.
        group: of all processes; None: the default group.

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
            f"{mesh.prefix} checkpoint {path} could not be {what}: {caught}\n"
            "       earlier checkpoints are as they were; see to the file system"
        )
    reports: list[tuple[Any, str | None]] = [(result, error)]
    if mesh.world_size > 1:
        reports = [(None, None)] * mesh.world_size
        dist.all_gather_object(reports, (result, error), group=group)
    for _, message in reports:
        if message is not None:
            raise CheckpointError(message)
    return [result for result, _ in reports]


def _check_model(path: Path, manifest: dict[str, Any], fingerprint: dict[str, Any]) -> None:
    # Through JSON, where a tuple is a list.
    different = _differences(_flat(manifest["model"]), _flat(json.loads(json.dumps(fingerprint))))
    if different:
        raise CheckpointError(
            f"checkpoint {path} is of another model\n{different}\n"
            "       give the model these settings, or start anew with --train.resume=never in another train.run_dir"
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
