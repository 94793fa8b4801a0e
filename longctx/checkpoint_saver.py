"""Saving checkpoints, at once or beside the training.

A save has two parts: what is to be written (views of the engine's state, or copies of it in the host's memory), and the
writing, which needs nothing of the engine and so may go on in a thread while the next steps change it. The folder is made,
completed and pruned in the same way in both cases: processes agree on it over a group of their own.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

import longctx
from longctx.checkpoint import TrainState, arrangement, on_all
from longctx.checkpoint_files import Files, WrittenFile, rng_state
from longctx.checkpoint_folder import complete, final_name, prepare, prune
from longctx.checkpoint_shards import shard_contents, shard_name, write_shard
from longctx.checkpoint_state import EngineState
from longctx.errors import CheckpointError

if TYPE_CHECKING:
    from longctx.engine import TrainEngine
    from longctx.parallel.mesh import ParallelMesh

# Processes wait this long for the slowest disk. One that died is noticed by the watchdog.
_WRITE_TIMEOUT = timedelta(days=1)


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
    content = _content(engine, state, fingerprint, Path(root) / final_name(state.step))
    return _write(engine.mesh, content, keep=keep)


class Saver:
    """Saves the checkpoints of a run, beside the training if asked to.

    In the background, `save` copies this process's part of the state to the host's memory (over all processes
    12 bytes for each parameter, kept for the next time) and returns; a thread writes it. There is never more than one save at a time: the
    next one waits. A process that ends meanwhile leaves the earlier checkpoints as they were.

    Args:
        root, fingerprint, keep: as for `save_checkpoint`.
        in_background: write in a thread. All processes alike; making the saver is collective then.

    Attributes:
        newest: the checkpoint that was completed last by this saver; None: none yet.
    """

    def __init__(
        self,
        root: Path | str,
        engine: TrainEngine,
        *,
        fingerprint: dict[str, Any],
        keep: int,
        in_background: bool = False,
    ) -> None:
        self.newest: Path | None = None
        self._root, self._engine, self._fingerprint, self._keep = Path(root), engine, fingerprint, keep
        self._in_background = in_background
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None
        self._host: dict[str, torch.Tensor] = {}
        self._group: dist.ProcessGroup | None = None
        if in_background and engine.mesh.world_size > 1:
            # On the CPU whatever the device: the training's group must not wait for a disk, nor be used by two threads.
            self._group = dist.new_group(backend="gloo", timeout=_WRITE_TIMEOUT)

    def save(self, state: TrainState) -> None:
        """Save the engine's state, or begin to. Every process calls it, after `finish`.

        Raises:
            CheckpointError: as `save_checkpoint`; in the background `poll` and `finish` raise what concerns the writing.
        """
        assert self._thread is None, "finish comes before the next save"
        content = _content(self._engine, state, self._fingerprint, self._root / final_name(state.step))
        if not self._in_background:
            self.newest = _write(self._engine.mesh, content, keep=self._keep)
            return
        content.tensors = self._copied(content.tensors)
        self._thread = threading.Thread(target=self._work, args=(content,), name="longctx-save", daemon=True)
        self._thread.start()

    def poll(self) -> None:
        """Raise what went wrong with a save in the background, once, as soon as it is known; never waits.

        Raises:
            CheckpointError: as `save_checkpoint`.
        """
        if self._thread is not None and not self._thread.is_alive():
            self.finish()

    def finish(self) -> None:
        """Wait for the save in the background, if there is one.

        Raises:
            CheckpointError: as `save_checkpoint`; once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _copied(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies in the host's memory, which is the same at every save."""
        for name, tensor in tensors.items():
            if name not in self._host:
                self._host[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
            self._host[name].copy_(tensor)
        return self._host

    def _work(self, content: _Content) -> None:
        try:
            self.newest = _write(self._engine.mesh, content, keep=self._keep, group=self._group)
        except CheckpointError as error:
            self._error = error
        except Exception as error:
            # Of the group, when another process has ended: there is nobody here to hear of it but the next step.
            self._error = CheckpointError(f"checkpoint {content.final} was not completed: {error}")


@dataclass
class _Content:
    """What a process is to write of a checkpoint."""

    final: Path
    tensors: Mapping[str, torch.Tensor]
    metadata: dict[str, str]
    rng: dict[str, Any]
    manifest: dict[str, Any]


def _content(engine: TrainEngine, state: TrainState, fingerprint: dict[str, Any], final: Path) -> _Content:
    """The state as it is now: tensors are views of the engine's."""
    mesh, of_engine = engine.mesh, EngineState(engine)
    on_all(mesh, "made", final, of_engine.check)
    tensors, metadata = shard_contents(of_engine.written())
    manifest = {
        "state": asdict(state),
        "optimizer_steps": of_engine.steps,
        "model": fingerprint,
        "plan": asdict(mesh.plan),
        "engine": {"zero_stage": engine.config.zero_stage, "dtype": engine.dtype},
        "arrangement": arrangement(engine.config, mesh.plan, mesh.device.type),
        "versions": _versions(),
    }
    return _Content(final, tensors, metadata, rng_state(mesh.device), manifest)


def _write(mesh: ParallelMesh, content: _Content, *, keep: int, group: dist.ProcessGroup | None = None) -> Path:
    assert keep >= 1, f"keep = {keep}: the checkpoint just written is always kept"
    final, is_first = content.final, mesh.rank == 0
    temporary = final.parent / f"tmp-{final.name}"

    def write() -> list[WrittenFile]:
        files = Files()
        write_shard(files, content.tensors, content.metadata, temporary / shard_name(mesh.rank))
        files.save_json(content.rng, temporary / f"rng-rank{mesh.rank:05d}.json")
        return files.written

    on_all(mesh, "prepared", final, lambda: prepare(final.parent, temporary) if is_first else None, group=group)
    try:
        written = [file for of_one in on_all(mesh, "written", final, write, group=group) for file in of_one]
        on_all(
            mesh,
            "completed",
            final,
            lambda: complete(content.manifest, written, temporary, final) if is_first else None,
            group=group,
        )
    except CheckpointError:
        # Nobody waits for it: a process that ends because of the error would take the others' last messages with it.
        if is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if is_first:
        prune(final.parent, keep)
    return final


def _versions() -> dict[str, str]:
    import deepspeed

    return {"longctx": longctx.__version__, "torch": torch.__version__, "deepspeed": deepspeed.__version__}
