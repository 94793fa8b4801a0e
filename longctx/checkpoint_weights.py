"""The whole weights of a training checkpoint, parameter by parameter, without an engine and on any machine.

What DeepSpeed's files hold of a parameter depends on the ZeRO stage (r is a process):

    0     mp_rank_00_model_states.pt: the parameter
    1, 2  the same, and in r's *_optim_states.pt the r-th part of one vector in fp32 per optimizer group, in which all its
          parameters stand one after the other
    3     in r's *_optim_states.pt the r-th part of each parameter in fp32, one after the other

Files are mapped, not read: a parameter costs its own bytes, and the optimizer's moments are never touched.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from longctx.checkpoint_files import Files
from longctx.checkpoint_folder import find_damage, find_problem, read_manifest
from longctx.errors import CheckpointError
from longctx.model import ModelConfig, Transformer
from longctx.rope import RopeScaling

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class CheckpointWeights:
    """The weights in a checkpoint's folder, saved under any ZeRO stage by any number of processes.

    Args:
        path: of the checkpoint, `.../checkpoints/step-...`.

    Attributes:
        config: of the model.
        dtype: "fp32" or "bf16", of its training.
        shapes: name -> shape, in the model's order; a tied parameter once.

    Raises:
        CheckpointError: it is missing, truncated or damaged, or was saved with pipeline or tensor parallelism.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = path = Path(path)
        problem = find_problem(path)
        if problem is None:
            self._manifest = read_manifest(path)
            files = [file for file in self._manifest["files"] if file["name"].endswith(".pt")]
            problem = find_damage(path, files)
        if problem is not None:
            raise CheckpointError(f"checkpoint {path}: {problem}")
        sharing = self._manifest["sharing"]
        degrees = {name: sharing.get(f"parallel.{name}", 1) for name in ("pp", "tp")}
        if degrees != {"pp": 1, "tp": 1}:
            told = ", ".join(f"{name} {degree}" for name, degree in degrees.items())
            raise CheckpointError(f"checkpoint {path} was saved with {told}; pp 1 and tp 1 can be exported")
        self.config = _config(self._manifest["model"])
        self.dtype: str = sharing["engine.dtype"]
        self._stage: int = sharing["engine.zero_stage"]
        self.shapes = parameter_shapes(self.config)
        try:
            self._open(sorted((file["name"] for file in files), key=_rank))
        except (RuntimeError, KeyError, ValueError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"checkpoint {path} is as it was written, but its files are not understood: {error}\n"
                f"       it was saved with {', '.join(f'{k} {v}' for k, v in self._manifest['versions'].items())}"
            ) from error

    def tensor(self, name: str, dtype: str) -> torch.Tensor:
        """A parameter, whole, contiguous and on the CPU: in the training's dtype bit by bit what the engine holds.

        With bf16 training, "fp32" gives the optimizer's own weights, of which those of the engine are roundings; without
        ZeRO there are none beside the engine's.

        Raises:
            CheckpointError: the optimizer's weights and the engine's do not agree, so the files are not what they seem.
        """
        shape = self.shapes[name]
        if self._stage == 0:
            return self._module[name].to(_DTYPES[dtype]).contiguous()
        whole = torch.cat(self._pieces(name)).view(shape)
        if self._stage < 3 and not torch.equal(whole.to(_DTYPES[self.dtype]), self._module[name]):
            raise CheckpointError(
                f"checkpoint {self.path}: {name} of the optimizer is not that of the model\n"
                f"       it was saved with DeepSpeed {self._manifest['versions'].get('deepspeed')}, whose files differ"
            )
        return whole.to(_DTYPES[dtype])

    @property
    def state(self) -> dict[str, Any]:
        """How far the training had come: the fields of `TrainState`."""
        return self._manifest["state"]

    def _open(self, names: Sequence[str]) -> None:
        models = [self._load(name) for name in names if name.endswith("_model_states.pt")]
        self._module: dict[str, torch.Tensor] = models[0]["module"]
        self._parts: list[list[torch.Tensor]] = []
        found = self._module.keys()
        if self._stage > 0:
            optimizers = [self._load(name)["optimizer_state_dict"] for name in names if "_optim_states" in name]
            expected = self._manifest["sharing"]["processes that share gradients (dp x ring x ulysses)"]
            if len(optimizers) != expected:
                raise ValueError(f"{len(optimizers)} files of the optimizer for {expected} processes")
            key = "fp32_flat_groups" if self._stage == 3 else "single_partition_of_fp32_groups"
            self._parts = [list(optimizer[key]) for optimizer in optimizers]
            shapes = models[0]["param_shapes"]
            found = {name for group in shapes for name in group}
            self._places = self._where(shapes, optimizers[0].get("param_alignment_paddings"))
        missing = [name for name in self.shapes if name not in found]
        if missing:
            raise ValueError(f"there is no {', '.join(missing)}")

    def _load(self, name: str) -> Any:
        return Files().load(self.path / name, "cpu", mmap=True)

    def _where(self, groups: list[dict[str, Any]], paddings: list[list[int]] | None) -> dict[str, tuple[int, int]]:
        """name -> (group, first element) of its place in a group's vector; with ZeRO-3, in one process's part of it."""
        world = len(self._parts)
        places: dict[str, tuple[int, int]] = {}
        offset = 0
        for index, group in enumerate(groups):
            # DeepSpeed may cut ZeRO-3's groups smaller than the parameter groups: they count as one row of elements.
            offset = offset if self._stage == 3 else 0
            for i, (name, shape) in enumerate(group.items()):
                if tuple(shape) != self.shapes.get(name):
                    raise ValueError(f"{name} has shape {list(shape)}, the model's is {self.shapes.get(name)}")
                places[name] = (index, offset)
                size = shape.numel()
                offset += -(-size // world) if self._stage == 3 else size + (paddings[index][i] if paddings else 0)
            # What follows is padding.
            if self._stage < 3 and sum(part[index].numel() for part in self._parts) < offset:
                raise ValueError(f"group {index} of the optimizer does not hold {offset} elements")
        if self._stage == 3 and (held := sum(flat.numel() for flat in self._parts[0])) != offset:
            raise ValueError(f"a process holds {held} elements, not {offset}")
        return places

    def _pieces(self, name: str) -> list[torch.Tensor]:
        """What each process holds of a parameter, in order; together exactly the parameter."""
        group, offset = self._places[name]
        size = 1
        for length in self.shapes[name]:
            size *= length
        if self._stage < 3:
            return _slice([part[group] for part in self._parts], offset, size)
        each = -(-size // len(self._parts))
        found = []
        for rank, flats in enumerate(self._parts):
            # The last parts are padded to the length of the others.
            found += _slice(flats, offset, max(0, min(each, size - rank * each)))
        return found


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter, in the model's order; a tied one once."""
    with torch.device("meta"):
        model = Transformer(config, kernel="reference", fused="off")
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _slice(vectors: Sequence[torch.Tensor], offset: int, size: int) -> list[torch.Tensor]:
    """Elements `offset` to `offset + size` of the concatenation of `vectors`, as views."""
    found = []
    for vector in vectors:
        begin, end = max(0, offset), min(vector.numel(), offset + size)
        if begin < end:
            found.append(vector[begin:end])
        offset -= vector.numel()
    return found


def _config(values: dict[str, Any]) -> ModelConfig:
    scaling = values.get("rope_scaling")
    return ModelConfig(**values | {"rope_scaling": RopeScaling(**scaling) if scaling else None})


def _rank(name: str) -> int:
    """Of the process that wrote a file; DeepSpeed's numbers have no leading zeros."""
    match = re.search(r"zero_pp_rank_(\d+)_", name)
    return int(match[1]) if match else 0
