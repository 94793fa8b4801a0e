"""The training state inside an engine: each parameter's fp32 weights and moments, wherever a ZeRO stage keeps them.

    stage   this process holds                                   as
    0       every element of its parameters                      the parameters, and AdamW's state of each
    1, 2    a contiguous part of all parameters in a row         one flat vector per optimizer group
    3       a part of every parameter                            flat vectors of several parameters each

`EngineState` shows all of them alike: views of pieces of parameters, to be read when a checkpoint is written and filled when one
is loaded. It knows DeepSpeed's inner names, and checks that what it found is what the model computes with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from longctx.errors import CheckpointError
from longctx.parallel.slices import ParameterSlice, Piece

if TYPE_CHECKING:
    from longctx.engine import TrainEngine

# What AdamW keeps of each element beside its weight, by torch's names.
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("fp32", *MOMENTS)


@dataclass(frozen=True)
class OwnPiece:
    """What this process holds of one parameter, as views: [piece.count] each.

    Args:
        piece: of which parameter, and which elements.
        fp32: the optimizer's weights.
        moments: by the names of `MOMENTS`.
        computing: the same elements of what the model computes with, in the training's dtype.
        is_written: whether this process writes them; other processes hold the same where not.
    """

    piece: Piece
    fp32: torch.Tensor
    moments: dict[str, torch.Tensor]
    computing: torch.Tensor
    is_written: bool

    def tensors(self) -> dict[str, torch.Tensor]:
        """By the names of `KINDS`."""
        return {"fp32": self.fp32} | self.moments


class EngineState:
    """The state of an engine, as pieces of parameters.

    Attributes:
        pieces: of this process.

    Raises:
        CheckpointError: the model has what no checkpoint holds: parameters that are not trained, or buffers of its state.
    """

    def __init__(self, engine: TrainEngine) -> None:
        self._ds, self._stage, self._grad = engine.ds, engine.config.zero_stage, engine.mesh.grad
        self._inner: torch.optim.Optimizer = self._ds.optimizer.optimizer if self._stage else self._ds.optimizer
        module = self._ds.module
        named = dict(module.named_parameters())
        self._check_model(module, named)
        slices, is_first = engine.slices, engine.mesh.coords.tp == 0
        assert slices.keys() == named.keys(), f"slices of other parameters: {sorted(slices.keys() ^ named.keys())}"
        # Of what several ranks of the tensor axis hold whole the first one's is written, and of a tied table the first stage's.
        owned = {
            name: (is_first or slices[name].dim is not None) and not getattr(parameter, "ds_pipe_replicated", False)
            for name, parameter in named.items()
        }
        self._flats = self._flat_vectors()
        for flat in self._flats:
            self._begin(flat)
        found = [
            self._piece(index, parameter, slices[name], is_owner=owned[name])
            for index, (name, parameter) in enumerate(named.items())
        ]
        self.pieces = [own for own in found if own is not None]

    @property
    def steps(self) -> int:
        """Steps that the optimizer has taken, by its own count, which corrects the bias of its moments."""
        counts = {int(self._inner.state[flat]["step"]) for flat in self._flats}
        assert len(counts) == 1, f"parameters were updated {sorted(counts)} times"
        return counts.pop()

    @steps.setter
    def steps(self, count: int) -> None:
        for flat in self._flats:
            state = self._inner.state[flat]
            if torch.is_tensor(state["step"]):
                state["step"].fill_(count)
            else:
                state["step"] = count

    def publish(self) -> None:
        """Give the model the optimizer's weights, in the training's dtype. Every process calls it."""
        optimizer = self._ds.optimizer
        if self._stage in (1, 2):
            optimizer.update_lp_params()
        elif self._stage == 3:
            # Parameters that stay whole are put away first: DeepSpeed gathers only what is away.
            optimizer.checkpoint_event_prologue()
            for group in range(len(self._flats)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            optimizer.checkpoint_event_epilogue()

    def check(self) -> None:
        """Hold the optimizer's weights against those that the model computes with.

        Raises:
            CheckpointError: they differ, so these are not the weights that they seem.
        """
        for own in self.pieces:
            if not torch.equal(own.fp32.to(own.computing.device, own.computing.dtype), own.computing):
                import deepspeed

                raise CheckpointError(
                    f"{own.piece.slice.name} of the optimizer is not that of the model\n"
                    f"       DeepSpeed {deepspeed.__version__} keeps its state in another way than 0.19.8 does"
                )

    @staticmethod
    def _check_model(module: torch.nn.Module, named: dict[str, torch.nn.Parameter]) -> None:
        idle = [name for name, parameter in named.items() if not parameter.requires_grad]
        if idle:
            raise CheckpointError(
                f"parameters that are not trained are in no checkpoint: {', '.join(idle)}\n"
                "       keep them outside of the model, or train them with a learning rate"
            )
        buffers = {name for name, _ in module.named_buffers()} & module.state_dict().keys()
        if buffers:
            raise CheckpointError(
                f"buffers of the model's state are in no checkpoint: {', '.join(sorted(buffers))}\n"
                "       register them with persistent=False if they follow from the settings"
            )

    def _flat_vectors(self) -> list[torch.Tensor]:
        """What the optimizer takes for its parameters."""
        optimizer = self._ds.optimizer
        if self._stage == 0:
            return [parameter for group in optimizer.param_groups for parameter in group["params"]]
        # The names of ZeRO 3, of 1 and 2, and of DeepSpeed's optimizer for bf16 with stage 1.
        for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
            if hasattr(optimizer, name):
                return list(getattr(optimizer, name))
        raise AssertionError(f"{type(optimizer).__name__} keeps its weights elsewhere")

    def _begin(self, flat: torch.Tensor) -> None:
        """Moments of a vector that has not been updated yet, as AdamW would make them."""
        state = self._inner.state[flat]
        if "step" not in state:
            is_fused = bool(self._inner.defaults.get("fused"))
            state["step"] = torch.zeros((), device=flat.device if is_fused else "cpu")
            for name in MOMENTS:
                state[name] = torch.zeros_like(flat.detach(), memory_format=torch.preserve_format)

    def _piece(self, index: int, parameter: Any, held: ParameterSlice, *, is_owner: bool) -> OwnPiece | None:
        if self._stage == 0:
            flat, first, begin, count = parameter, 0, 0, parameter.numel()
            computing = parameter.detach().view(-1)
        elif self._stage < 3:
            mapping = parameter._hp_mapping
            if mapping is None:
                return None
            flat = self._flats[mapping.param_group_index]
            first, count = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
            begin = mapping.lp_fragment_address.start
            computing = parameter.detach().view(-1)[begin : begin + count]
        else:
            group, first, each = self._ds.optimizer.grad_position[self._ds.optimizer.get_param_id(parameter)]
            flat, begin = self._flats[group], self._grad.rank * each
            # The last parts are padded to the length of the others.
            count = max(0, min(each, math.prod(held.shape) - begin))
            computing = parameter.ds_tensor.detach().view(-1)[:count]
        if not count:
            return None

        def part(vector: torch.Tensor) -> torch.Tensor:
            return vector.detach().view(-1)[first : first + count]

        return OwnPiece(
            Piece(held, begin, count),
            part(flat),
            {name: part(self._inner.state[flat][name]) for name in MOMENTS},
            computing,
            # Without ZeRO all processes hold the same: each writes some parameters.
            is_owner and (self._stage > 0 or index % self._grad.size == self._grad.rank),
        )

    def written(self) -> Iterator[OwnPiece]:
        """The pieces that this process writes."""
        return (own for own in self.pieces if own.is_written)
