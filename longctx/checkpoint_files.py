"""The files of a checkpoint: written with checksums and errors kept, read without running what is in them."""

from __future__ import annotations

import base64
import json
import os
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class WrittenFile:
    """One file of a checkpoint, as its manifest lists it."""

    name: str
    bytes: int
    crc32: int


class Files:
    """What DeepSpeed writes and reads through, in place of its own checkpoint engine.

    Writing never raises: DeepSpeed would leave the other processes waiting at its barrier. The first error is kept, nothing
    more is written, and `finish` raises it when all processes are past DeepSpeed. Each file is on the disk when its call
    returns.
    """

    def __init__(self) -> None:
        self._written: list[WrittenFile] = []
        self._error: OSError | None = None

    def save(self, state_dict: Any, path: str | Path) -> None:
        self._write(Path(path), lambda stream: torch.save(state_dict, stream))

    def save_json(self, value: Any, path: Path) -> None:
        text = json.dumps(value, indent=1, allow_nan=False)
        self._write(path, lambda stream: stream.write(text.encode()))

    def load(self, path: str | Path, map_location: Any = None, *, mmap: bool = False) -> Any:
        """What `save` wrote: tensors, plain containers and the classes of `_deepspeed_classes`.

        Args:
            mmap: tensors stay in the file until they are read; `map_location` must be the CPU.

        Raises:
            pickle.UnpicklingError: there is something else in it.
        """
        with torch.serialization.safe_globals(_deepspeed_classes()):
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)

    def finish(self) -> list[WrittenFile]:
        """What was written.

        Raises:
            OSError: the first error.
        """
        if self._error is not None:
            raise self._error
        return self._written

    def _write(self, path: Path, fill: Callable[[Any], Any]) -> None:
        if self._error is not None:
            return
        try:
            with open(path, "wb") as raw:
                stream = _Checksummed(raw)
                fill(stream)
                if stream.error is not None:
                    raise stream.error
                raw.flush()
                os.fsync(raw.fileno())
        except OSError as error:
            self._error = error
        else:
            self._written.append(WrittenFile(path.name, stream.bytes, stream.crc32))

    # The rest of what DeepSpeed asks of a checkpoint engine.
    def create(self, info: Any) -> None:
        """Nothing is to be opened."""

    def commit(self, info: Any) -> bool:
        return True

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """The folders are there already."""

    def is_decoupled(self) -> bool:
        return False

    def preserves_storage_sharing(self) -> bool:
        """Views are written with all of what they are views of, so DeepSpeed copies them before."""
        return True


class _Checksummed:
    """A binary stream that counts and sums up what passes.

    It keeps an error and swallows the data that follow: torch's writer calls it from C++ and cannot end in order after an
    exception.
    """

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self.bytes = self.crc32 = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if self.error is None:
            try:
                self._raw.write(view)
            except OSError as error:
                self.error = error
        self.bytes += len(view)
        self.crc32 = zlib.crc32(view, self.crc32)
        return len(view)

    def flush(self) -> None:
        """The file is flushed once, at its end."""


def _deepspeed_classes() -> list[Any]:
    """The classes, beside torch's, of the objects in DeepSpeed's files: plain records all of them."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, ZeroStageEnum, fragment_address]


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


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Set the generators to what `rng_state` returned. A GPU's is left alone where the state is of a CPU run."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, place, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), place, has_gauss, cached))
    torch.set_rng_state(_decoded(state["torch"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(_decoded(state["cuda"]), device)


def _encoded(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decoded(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
