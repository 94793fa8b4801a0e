"""The whole weights of a training checkpoint, parameter by parameter, without an engine and on any machine.

Whatever plan, ZeRO stage and number of processes saved it: files are mapped, not read, so a parameter costs its own bytes, and
the optimizer's moments are never touched.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from longctx.checkpoint_folder import find_damage, find_problem, read_manifest
from longctx.checkpoint_shards import StateShards
from longctx.errors import CheckpointError
from longctx.model import ModelConfig, Transformer
from longctx.rope import RopeScaling

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class CheckpointWeights:
    """The weights in a checkpoint's folder.

    Args:
        path: of the checkpoint, `.../checkpoints/step-...`.

    Attributes:
        config: of the model.
        dtype: "fp32" or "bf16", of its training.
        shapes: name -> shape, in the model's order; a tied parameter once.

    Raises:
        CheckpointError: it is missing, truncated or damaged, or does not hold the parameters of its model.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = path = Path(path)
        problem = find_problem(path)
        if problem is None:
            self._manifest = read_manifest(path)
            problem = find_damage(path, self._manifest["files"])
        if problem is not None:
            raise CheckpointError(f"checkpoint {path}: {problem}")
        self.config = _config(self._manifest["model"])
        self.dtype: str = self._manifest["engine"]["dtype"]
        self.shapes = parameter_shapes(self.config)
        self._shards = StateShards(path, [file["name"] for file in self._manifest["files"]])
        wrong = [name for name, shape in self.shapes.items() if self._shards.shapes.get(name) != shape]
        if wrong:
            raise CheckpointError(
                f"checkpoint {path} lacks parameters of its model, or has them in other shapes: {', '.join(wrong)}"
            )

    def tensor(self, name: str, dtype: str) -> torch.Tensor:
        """A parameter, whole, contiguous and on the CPU: in the training's dtype bit by bit what the engine holds.

        With bf16 training, "fp32" gives the optimizer's own weights, of which those of the engine are roundings.

        Raises:
            CheckpointError: the files do not hold all of it.
        """
        return self._shards.whole(name).to(_DTYPES[dtype])

    @property
    def state(self) -> dict[str, Any]:
        """How far the training had come: the fields of `TrainState`."""
        return self._manifest["state"]


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter, in the model's order; a tied one once."""
    with torch.device("meta"):
        model = Transformer(config, kernel="reference", fused="off")
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _config(values: dict[str, Any]) -> ModelConfig:
    scaling = values.get("rope_scaling")
    return ModelConfig(**values | {"rope_scaling": RopeScaling(**scaling) if scaling else None})
