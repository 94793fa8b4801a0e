"""The files of a checkpoint: safetensors and JSON, written with checksums. Nothing in them can run code."""

from __future__ import annotations

import base64
import itertools
import json
import os
import random
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Elements that are copied from a device, summed up and written at a time: 64 MiB.
_BLOCK = 1 << 24


@dataclass(frozen=True)
class WrittenFile:
    """One file of a checkpoint, as its manifest lists it."""

    name: str
    bytes: int
    crc32: int


class Files:
    """What one process writes of a checkpoint, with checksums. Each file is on the disk when its call returns.

    Attributes:
        written: the files so far.
    """

    def __init__(self) -> None:
        self.written: list[WrittenFile] = []

    def save_json(self, value: Any, path: Path) -> None:
        """A JSON file.

        Raises:
            OSError: it could not be written.
        """
        self._write(path, [json.dumps(value, indent=1, allow_nan=False).encode()])

    def save_tensors(self, tensors: Mapping[str, torch.Tensor], path: Path, *, metadata: Mapping[str, str]) -> None:
        """A safetensors file, tensor by tensor: a device's memory is copied in blocks, never as a whole.

        Args:
            tensors: contiguous, of any device, in fp32.
            metadata: goes into the file's header.

        Raises:
            OSError: it could not be written.
        """
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        end = 0
        for name, tensor in tensors.items():
            assert tensor.dtype == torch.float32, f"{name} is {tensor.dtype}"
            assert tensor.is_contiguous(), f"{name} has strides {tensor.stride()}"
            begin, end = end, end + 4 * tensor.numel()
            header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._write(path, itertools.chain([struct.pack("<Q", len(text)), text], _blocks(tensors.values())))

    def _write(self, path: Path, blocks: Iterable[bytes | memoryview]) -> None:
        size = crc32 = 0
        with open(path, "wb") as stream:
            for block in blocks:
                stream.write(block)
                size += len(block)
                crc32 = zlib.crc32(block, crc32)
            stream.flush()
            os.fsync(stream.fileno())
        self.written.append(WrittenFile(path.name, size, crc32))


def _blocks(tensors: Iterable[torch.Tensor]) -> Iterator[memoryview]:
    for tensor in tensors:
        for block in tensor.detach().flatten().split(_BLOCK):
            yield memoryview(block.cpu().numpy()).cast("B")


def rng_state(device: torch.device) -> dict[str, Any]:
    """The state of Python's, numpy's and torch's generators of this process, as plain values."""
    version, internal, gauss = random.getstate()
    name, keys, place, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "python": [version, list(internal), gauss],
        "numpy": [name, np.asarray(keys).tolist(), place, has_gauss, cached],
        "torch": _encoded(torch.get_rng_state()),
    }
    if device.type == "cuda":
        state["cuda"] = _encoded(torch.cuda.get_rng_state(device))
    return state


def set_rng_state(state: dict[str, Any], device: torch.device, *, branch: int = 0) -> None:
    """Set the generators to what `rng_state` returned. A GPU's is left alone where the state is of a CPU run.

    Args:
        branch: 0: go on as there. Another number: generators of their own, which follow from the state and the number.
    """
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, place, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), place, has_gauss, cached))
    torch.set_rng_state(_decoded(state["torch"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(_decoded(state["cuda"]), device)
    if branch:
        random.seed(f"{random.getrandbits(64)} {branch}")
        np.random.seed(random.getrandbits(32))
        torch.manual_seed(random.getrandbits(63))


def _encoded(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decoded(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
