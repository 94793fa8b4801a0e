"""Checkpoint folders on the disk: which are complete, what is wrong with the others, and how one becomes complete.

A folder is complete once it has its final name, a manifest, and every file that the manifest lists in full length. Names
that begin with `tmp-` are never complete: being written, left by a run that was killed, or being removed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from longctx.checkpoint_files import Files, WrittenFile
from longctx.errors import CheckpointError

log = logging.getLogger(__name__)

FORMAT = 2
MANIFEST = "manifest.json"
_KEYS = ("format", "serial", "state", "optimizer_steps", "model", "plan", "engine", "arrangement", "versions", "files")
_BLOCK = 1 << 24


def final_name(step: int) -> str:
    """The folder's name when it is complete."""
    return f"step-{step:08d}"


def read_manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / MANIFEST).read_text())


def latest_checkpoint(root: Path | str) -> Path | None:
    """The complete checkpoint in `root` that was saved last; None if there is none. Incomplete ones are logged and passed over.

    Looks at names and sizes, not at contents: `load_checkpoint` does.
    """
    complete = []
    for path in _folders(Path(root)):
        problem = find_problem(path)
        if problem is None:
            complete.append((read_manifest(path)["serial"], path))
        else:
            log.warning("passing over checkpoint %s: %s", path, problem)
    return max(complete)[1] if complete else None


def find_problem(path: Path) -> str | None:
    """What is wrong with the folder `path` as a checkpoint, from names and sizes; None if nothing."""
    if not path.is_dir():
        return "there is no such folder"
    try:
        manifest = read_manifest(path)
        version = manifest["format"]
        if version != FORMAT:
            return f"it has format {version}; this version of longctx reads format {FORMAT}"
        files = [(file["name"], file["bytes"]) for file in manifest["files"]]
        if missing := [key for key in _KEYS if key not in manifest]:
            return f"its {MANIFEST} lacks {', '.join(missing)}"
    except FileNotFoundError:
        if (newest := latest_checkpoint(path)) is not None:
            return f"it holds checkpoints, and is not one itself; the newest is {newest}"
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__}: {error})"
    for name, size in files:
        if not (path / name).is_file():
            return f"{name} is missing"
        if (found := (path / name).stat().st_size) != size:
            return f"{name} is truncated: {found:_} of {size:_} bytes"
    return None


def find_damage(path: Path, files: list[dict[str, Any]]) -> str | None:
    """The first of these files whose content is not what was written; None if there is none. Reads them all."""
    for file in files:
        crc = 0
        with open(path / file["name"], "rb") as stream:
            while block := stream.read(_BLOCK):
                crc = zlib.crc32(block, crc)
        if crc != file["crc32"]:
            return f"{file['name']} is damaged: its checksum is {crc:08x}, it was written with {file['crc32']:08x}"
    return None


def refuse(path: Path, problem: str) -> CheckpointError:
    """The error for an unusable checkpoint; offers the newest complete one beside it."""
    others = [p for p in _folders(path.parent) if p != path and find_problem(p) is None]
    if others:
        newest = max(others, key=lambda p: read_manifest(p)["serial"])
        offer = f"the newest complete one beside it: --train.resume={newest}"
    else:
        offer = "there is no complete one beside it; --train.resume=never starts anew"
    return CheckpointError(f"checkpoint {path}: {problem}\n       {offer}")


def prepare(root: Path, temporary: Path) -> None:
    """An empty folder to write in; what killed runs left is removed."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob("tmp-step-*"):
        shutil.rmtree(leftover)
    temporary.mkdir()


def complete(manifest: dict[str, Any], written: list[WrittenFile], temporary: Path, final: Path) -> None:
    """The manifest, then the final name: from here on it counts.

    Raises:
        CheckpointError: files of other processes are not there.
        OSError: it could not be written; `final`, if there was one, is as before.
    """
    missing = [file.name for file in written if not (temporary / file.name).is_file()]
    if missing:
        raise CheckpointError(
            f"{', '.join(missing)} of other processes cannot be seen in {temporary}\n"
            "       train.run_dir must be on a file system that all machines share"
        )
    root = final.parent
    # A count, not the step: a run that goes on from an older checkpoint writes smaller steps later.
    serials = [read_manifest(path)["serial"] for path in _folders(root) if find_problem(path) is None]
    manifest = manifest | {
        "format": FORMAT,
        "serial": 1 + max(serials, default=0),
        "files": [asdict(file) for file in written],
    }
    Files().save_json(manifest, temporary / MANIFEST)
    _sync(temporary)
    if not final.exists():
        temporary.rename(final)
    else:
        replaced = root / f"tmp-{final.name}-replaced"
        final.rename(replaced)
        try:
            temporary.rename(final)
        except OSError:
            replaced.rename(final)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    _sync(root)


def prune(root: Path, keep: int) -> None:
    """Remove all complete checkpoints but the `keep` saved last. What cannot be removed is logged."""
    found = [path for path in _folders(root) if find_problem(path) is None]
    found.sort(key=lambda path: read_manifest(path)["serial"])
    for path in found[:-keep]:
        try:
            # Not a checkpoint any more before its files go.
            shutil.rmtree(path.rename(root / f"tmp-{path.name}-pruned"))
        except OSError as error:
            log.warning("old checkpoint %s could not be removed: %s", path, error)


def _folders(root: Path) -> list[Path]:
    return sorted(p for p in root.glob("step-*") if p.is_dir())


def _sync(folder: Path) -> None:
    """The names in a folder, to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
