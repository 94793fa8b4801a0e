"""A transformer in the stages of a pipeline, and the engine that runs it: DeepSpeed's PipelineModule and PipelineEngine.

    stage 0             stage 1             ...     the last stage
    embedding, layers   layers                      layers, norm, output projection and loss
           ──── activations "b s e", one micro-batch after the other ────▶
           ◀─── their gradients ───

Activations alone travel. Where the tokens stand and who sees whom differs between micro-batches; every stage has read them
itself, for its processes hold the same part of the same sequences as their peers in the other stages. Micro-batches run one
forward, one backward in turn (1F1B), in the order in which they were given, so a stage knows which one has come.

With DualPipeV a process holds two stages, and micro-batches go out through the first ones and come back through the second:
every process is idle for less of a step, at the price of as many activations again.

Import it after `deepspeed_setup.import_deepspeed`, which decides what DeepSpeed runs on.

Source: Narayanan et al. 2021 (arXiv 2104.04473) for 1F1B; DeepSeek-AI 2024 (arXiv 2412.19437) for DualPipe, whose V shape is
of Qi et al. 2023 (arXiv 2401.10241).
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.dualpipev import DualPipeVModule
from deepspeed.runtime.pipe.schedule import (
    CommitP2P,
    OptimizerStep,
    PipeSchedule,
    RecvActivation,
    RecvGrad,
    SendActivation,
    SendGrad,
)
from deepspeed.runtime.pipe.topology import ProcessTopology

from longctx.engine import TrainEngine
from longctx.errors import ConfigError, format_problems
from longctx.initial import init_parameter
from longctx.model import DecoderLayer, ModelConfig, RMSNorm, make_offload, run_layers
from longctx.parallel.journal import Journal
from longctx.parallel.loss import LMHead, linear_cross_entropy
from longctx.parallel.tensor import TensorParallel, VocabularyEmbedding

if TYPE_CHECKING:
    from longctx.data import ShardedBatch
    from longctx.parallel.mesh import ParallelMesh

log = logging.getLogger(__name__)

EMBEDDING = "model.embed_tokens"
_TIED = "embedding"


class _Stages(PipelineModule):
    """The stages of a `Transformer` that one process holds: the same layers, with the same initial weights under DeepSpeed's
    names.

    Args:
        stages: the decoder layers of each stage.
        activation_checkpointing, activation_offload, mlp_chunk_tokens, kernel, fused, seed: as in `Transformer`.

    Raises:
        ConfigError: all problems of `config` in one message.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: ParallelMesh,
        stages: Sequence[range],
        *,
        kernel: str,
        activation_checkpointing: bool,
        activation_offload: bool,
        mlp_chunk_tokens: int | None,
        fused: str,
        seed: int,
    ) -> None:
        if problems := config.problems():
            raise ConfigError(format_problems("the model", problems))
        plan = mesh.plan
        # Before any attribute may be set on a module: what _partition_layers, called in the middle of it, needs.
        object.__setattr__(self, "_stages", tuple(stages))
        topology = ProcessTopology(axes=["pipe", "data", "model"], dims=[plan.pp, plan.grad_world, plan.tp])
        specs = _specs(config, mesh, kernel, fused, mlp_chunk_tokens)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False, verbose=False)
            super().__init__(layers=specs, topology=topology, activation_checkpoint_interval=0)
        log.debug("deepspeed.PipelineModule: %s", printed.getvalue())
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.offload = make_offload(activation_checkpointing, activation_offload)
        # Of a process that holds two stages, for each of them.
        self._coming: tuple[list[ShardedBatch], list[ShardedBatch]] = ([], [])
        self.local_sums: list[torch.Tensor] = []
        for name, parameter in self.named_parameters():
            init_parameter(self.canonical_name(name), parameter, config, seed)

    def canonical_name(self, name: str) -> str:
        """What a parameter of this stage is called in the `Transformer` of one process."""
        head, _, rest = name.partition(".")
        if head == "tied_modules":
            return f"{EMBEDDING}.weight"
        layer = int(head) - 1
        if layer < 0:
            return f"{EMBEDDING}.{rest}"
        if layer < self.config.num_layers:
            return f"model.layers.{layer}.{rest}"
        return f"model.norm.{rest}" if layer == self.config.num_layers else f"lm_head.{rest}"

    def feed(self, batches: Sequence[ShardedBatch]) -> None:
        """The micro-batches that the next calls are for, in order; sums of losses are collected anew."""
        self._coming = (list(batches), list(batches))
        self.local_sums = []

    def forward(self, received: torch.Tensor) -> torch.Tensor:
        """One micro-batch through a stage.

        Args:
            received: what the stage before sent, "b s e"; on the first stage the tokens, "b s".

        Returns:
            "b s e" for the next stage; on the last one the sum of the shard's token losses.
        """
        batch = self._coming[self.active_phase].pop(0)
        layers = list(self.forward_funcs)
        x = layers.pop(0)(received) if self._local_start == 0 else received
        is_last = self._local_stop == self._num_layers
        norm, head = (layers.pop(-2), layers.pop(-1)) if is_last else (None, None)
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        x = run_layers(layers, x, batch.meta, self.config, recompute=recompute, offload=self.offload)
        if norm is None or head is None:
            return x
        local_sum = head(norm(x), batch.labels)
        self.local_sums.append(local_sum.detach())
        return local_sum

    # Which of its stages a process is at; DeepSpeed's DualPipeV sets it.
    active_phase = 0

    def _partition_layers(self, method: str = "") -> None:
        """The bounds of every stage among the specs: layer i of the model is the spec i + 1."""
        stages: tuple[range, ...] = self._stages
        inner = [layers.start + 1 for layers in stages[1:]]
        self.parts = [0, *inner, self._num_layers]
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    def _synchronize_tied_weights(self) -> None:
        # Without gradients: else autograd would take the broadcast for a part of the model.
        with torch.no_grad():
            super()._synchronize_tied_weights()


class PipelineTransformer(_Stages):
    """One stage of a `Transformer`, for 1F1B.

    A tied embedding is held by the first stage and the last one; DeepSpeed adds up the two gradients.
    """


class DualPipeTransformer(_Stages, DualPipeVModule):
    """Two stages of a `Transformer`, for DualPipeV: on rank r the r-th from the front and the r-th from the back."""

    def _partition_layers(self, method: str = "") -> None:
        self.num_stages *= 2
        super()._partition_layers(method)
        mirror = self.num_stages - 1 - self.stage_id
        self.phase_bounds = [(self._local_start, self._local_stop), (self.parts[mirror], self.parts[mirror + 1])]


def _specs(
    config: ModelConfig, mesh: ParallelMesh, kernel: str, fused: str, mlp_chunk_tokens: int | None
) -> list[LayerSpec]:
    """The whole model as DeepSpeed's recipes; only this stage's are made."""
    tensor = TensorParallel.of(mesh)
    e, vocab, eps = config.hidden_size, config.vocab_size, config.norm_eps
    layers = [
        LayerSpec(DecoderLayer, config, mesh.for_layer(i), kernel, fused, mlp_chunk_tokens)
        for i in range(config.num_layers)
    ]
    norm = LayerSpec(RMSNorm, e, eps, fused=fused, tensor=tensor.of_norms)
    if not config.tie_embeddings:
        embedding = LayerSpec(VocabularyEmbedding, vocab, e, tensor)
        return [embedding, *layers, norm, LayerSpec(LMHead, e, vocab, fused=fused, tensor=tensor)]

    def tied(forward_fn: Callable[..., torch.Tensor] | None = None) -> TiedLayerSpec:
        return TiedLayerSpec(
            _TIED, VocabularyEmbedding, vocab, e, tensor, forward_fn=forward_fn, tied_weight_attr="weight"
        )

    impl = {"auto": "auto", "on": "liger", "off": "torch"}[fused]
    return [tied(), *layers, norm, tied(partial(_tied_head, impl))]


def _tied_head(impl: Any, table: VocabularyEmbedding, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return linear_cross_entropy(hidden, table.weight, labels, impl=impl, tensor=table.tensor)


class _WithoutStep:
    """A schedule up to the averaged gradients; the optimizer's step is a call of its own, after the loss was looked at."""

    def __init__(self, schedule: PipeSchedule) -> None:
        self._schedule = schedule
        self.num_pipe_buffers = schedule.num_pipe_buffers

    def __iter__(self) -> Iterator[list[Any]]:
        for commands in self._schedule:
            yield [command for command in commands if not isinstance(command, OptimizerStep)]


def _noted(acts: dict[type, Callable[..., None]], journal: Journal) -> dict[type, Callable[..., None]]:
    """What DeepSpeed's engine does at each instruction of a schedule, messages between stages noted in the journal."""

    def noting(instruction: type, what: str, peers: Callable[[Any], Iterable[int]]) -> Callable[..., None]:
        def act(ds: Any, **settings: Any) -> None:
            ranks = tuple(sorted(set(peers(ds))))
            if ranks:
                journal.exchange(f"pipeline, {what}", None, ranks, lambda: acts[instruction](ds, **settings))

        return act

    def before(ds: Any) -> list[int]:
        return [ds.grid.stage_to_global(ds.prev_stage)]

    def behind(ds: Any) -> list[int]:
        return [ds.grid.stage_to_global(ds.next_stage)]

    if CommitP2P in acts:
        # DualPipeV: the others only queue what this one exchanges.
        queued = noting(CommitP2P, "activations and gradients", lambda ds: [op.peer for op in ds._p2p_ops])
        return acts | {CommitP2P: queued}
    return acts | {
        SendActivation: noting(SendActivation, "activations to the next stage", behind),
        RecvActivation: noting(RecvActivation, "activations of the stage before", before),
        SendGrad: noting(SendGrad, "gradients to the stage before", before),
        RecvGrad: noting(RecvGrad, "gradients of the next stage", behind),
    }


class PipelineTrainEngine(TrainEngine):
    """A `TrainEngine` whose model is a stage of a pipeline. Micro-batches are the accumulation steps."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.ds._INSTRUCTION_MAP = _noted(self.ds._INSTRUCTION_MAP, self.mesh.journal)

    def _groups(self, world: Any) -> None:
        # DeepSpeed takes the grid of the PipelineModule.
        return None

    def _forward_backward(self, micro_batches: Sequence[ShardedBatch]) -> torch.Tensor:
        ds, first = self.ds, micro_batches[0]
        ds.module.loss_fn = lambda local_sum, labels: self._scaled(local_sum, first)
        ds.total_loss, ds._compute_loss = None, True
        return self._run(micro_batches, _WithoutStep(ds._train_schedule()))

    def _forward_only(self, batches: Iterable[ShardedBatch]) -> torch.Tensor:
        # Without a loss function the output, the sum of the losses, is taken as the loss.
        self.ds.total_loss, self.ds._compute_loss = None, False
        todo, total = list(batches), torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        at_once = len(todo)
        if isinstance(self.ds.module, DualPipeTransformer):
            # Its engine finds the second stage's buffers by the number of micro-batches in a training step.
            at_once = self.config.accumulation_steps
            if len(todo) % at_once:
                raise ConfigError(
                    f"evaluate was given {len(todo)} micro-batches; with parallel.schedule dualpipev they must be a multiple "
                    f"of engine.accumulation_steps, {at_once}"
                )
        for start in range(0, len(todo), at_once or 1):
            total += self._run(todo[start : start + at_once], self.ds._inference_schedule(at_once))
        return total

    def _run(self, batches: Sequence[ShardedBatch], schedule: Any) -> torch.Tensor:
        """Micro-batches in the order of a schedule; [sum of the losses, targets] of this process, 0 where there is no loss."""
        ds = self.ds
        ds.module.feed(batches)
        ds.set_dataiterator(iter([(batch.tokens, batch.labels) for batch in batches]))
        ds._exec_schedule(schedule)
        total = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        for batch, local_sum in zip(batches, ds.module.local_sums, strict=False):
            total += torch.stack([local_sum.double(), (batch.labels != -100).sum().double()])
        return total

    def _apply_step(self) -> None:
        self.ds._exec_optimizer_step()

    @property
    def _told(self) -> tuple[int, ...]:
        # The ranks of one tp axis have the same losses.
        mesh = self.mesh
        return tuple(rank for rank in range(mesh.world_size) if mesh.plan.coords(rank).tp == mesh.coords.tp)

    def _gather(self, local: torch.Tensor) -> torch.Tensor:
        everyone = local.new_zeros(self.mesh.world_size, local.numel())
        everyone[self.mesh.rank] = local
        dist.all_reduce(everyone)
        return everyone[list(self._told)]

    def gradients(self) -> dict[str, torch.Tensor]:
        of_stages: list[Any] = [None] * self.mesh.pp.size
        dist.all_gather_object(of_stages, super().gradients(), group=self.mesh.pp.group)
        return {name: grad.to(self.mesh.device) for of_stage in of_stages for name, grad in of_stage.items()}

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        state, axis = super().full_state_dict(), self.mesh.pp
        if self.mesh.grad.rank or self.mesh.tp.rank:
            return {}
        of_stages: list[Any] | None = [None] * axis.size if axis.rank == 0 else None
        dist.gather_object(state, of_stages, dst=axis.ranks[0], group=axis.group)
        return {name: whole for of_stage in of_stages or () for name, whole in of_stage.items()}
