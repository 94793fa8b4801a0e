"""The training state in a checkpoint's files: pieces of parameters, read as any plan needs them.

    state-rank00000.safetensors     what a process wrote: for each piece of a parameter three vectors in fp32, called
                                    fp32/NAME, exp_avg/NAME and exp_avg_sq/NAME; which elements of which parameter they are
                                    stands in the header, under "pieces"

Files are mapped: what is read of a parameter is what is asked for.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from longctx.checkpoint_files import Files
from longctx.checkpoint_state import OwnPiece
from longctx.errors import CheckpointError
from longctx.parallel.slices import ParameterSlice, Piece, copy_overlap

_SUFFIX = ".safetensors"


def shard_name(rank: int) -> str:
    return f"state-rank{rank:05d}{_SUFFIX}"


def shard_contents(pieces: Iterable[OwnPiece]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A process's pieces as the tensors of its file, and the file's metadata."""
    tensors: dict[str, torch.Tensor] = {}
    addresses = {}
    for own in pieces:
        held = own.piece.slice
        for kind, tensor in own.tensors().items():
            tensors[f"{kind}/{held.name}"] = tensor
        addresses[held.name] = {
            "shape": list(held.full_shape),
            "slice": [held.dim, held.start, held.length],
            "range": [own.piece.begin, own.piece.count],
        }
    return tensors, {"pieces": json.dumps(addresses, separators=(",", ":"))}


def write_shard(files: Files, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], path: Path) -> None:
    """Write what `shard_contents` gave; a process that has nothing to write makes no file."""
    if tensors:
        files.save_tensors(tensors, path, metadata=metadata)


class StateShards:
    """The training state in a checkpoint's folder.

    Args:
        path: of the checkpoint.
        files: names of the files in it, as its manifest lists them.

    Attributes:
        shapes: name -> shape of every parameter in it.

    Raises:
        CheckpointError: files cannot be read, or are not what `write_shard` wrote.
    """

    def __init__(self, path: Path, files: Iterable[str]) -> None:
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, list[tuple[Piece, Any]]] = defaultdict(list)
        for file in files:
            if file.endswith(_SUFFIX):
                self._open(file)

    def fill(self, out: torch.Tensor, target: Piece, kind: str) -> None:
        """Set `out`, [target.count] on the CPU, to these elements of the parameter.

        Args:
            kind: one of `checkpoint_state.KINDS`.

        Raises:
            CheckpointError: the files do not hold all of them, or the parameter has another shape.
        """
        name = target.slice.name
        copied = 0
        if self.shapes.get(name) == target.slice.full_shape:
            for piece, file in self._pieces[name]:
                copied += copy_overlap(piece, _reading(file.get_slice(f"{kind}/{name}")), target, out)
        if copied != target.count:
            shape = self.shapes.get(name)
            told = (
                f"{copied} of {target.count} elements of {name}"
                if shape == target.slice.full_shape
                else (f"{name} of shape {list(shape)}, not {list(target.slice.full_shape)}" if shape else f"no {name}")
            )
            raise CheckpointError(f"checkpoint {self.path} holds {told}")

    def whole(self, name: str, kind: str = "fp32") -> torch.Tensor:
        """All of a parameter, or of one of its moments, in fp32."""
        shape = self.shapes[name]
        target = Piece.whole(name, shape)
        out = torch.empty(target.count)
        self.fill(out, target, kind)
        return out.view(shape)

    def _open(self, name: str) -> None:
        try:
            # Kept open: the operating system maps it, and reads what is touched.
            file = safe_open(self.path / name, framework="pt", device="cpu")
            addresses = json.loads(file.metadata()["pieces"])
            for parameter, address in addresses.items():
                held = ParameterSlice(parameter, tuple(address["shape"]), *address["slice"])
                if self.shapes.setdefault(parameter, held.full_shape) != held.full_shape:
                    raise ValueError(
                        f"{parameter} has shape {self.shapes[parameter]} in other files, {held.full_shape} here"
                    )
                self._pieces[parameter].append((Piece(held, *address["range"]), file))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.path / name} is as it was written, but is not understood: {type(error).__name__}: {error}"
            ) from error


def _reading(values: Any) -> Callable[[int, int], torch.Tensor]:
    return lambda a, b: values[a:b]
