"""The training engine: one optimizer step over all processes through DeepSpeed, and the one gradient rule.

`scaled_loss` is the only place that knows how a micro-batch's loss enters the mean over the step. It fits what
`deepspeed_setup` tells DeepSpeed: that its data-parallel world is dp x sp.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from longctx.deepspeed_setup import FoldedWorld, check_one_world, deepspeed_config, import_deepspeed, partition
from longctx.engine_config import EngineConfig
from longctx.errors import ConfigError, DataError, DistributedError, NonFiniteError, format_problems
from longctx.optim import OptimConfig, lr_at, parameter_groups
from longctx.parallel.slices import parameter_slices
from longctx.parallel.tensor import gather_slices, split_by_cut
from longctx.telemetry import StepTelemetry, tells

if TYPE_CHECKING:
    from longctx.data import ShardedBatch
    from longctx.model import ModelConfig
    from longctx.parallel.mesh import ParallelMesh

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step was.

    Args:
        loss: mean nats per target token over the whole step, all processes and micro-batches.
        grad_norm: of the whole gradient, before clipping.
        lr: the learning rate that was used.
        telemetry: of its attention; None unless the mesh's journal is measuring. Over all stages of a pipeline, so that its
            imbalance is also that of the stages; of tp ranks, which share heads evenly, over those with this one's place.
    """

    loss: float
    grad_norm: float
    lr: float
    telemetry: StepTelemetry | None = None


def scaled_loss(
    local_sum: torch.Tensor, *, num_target_tokens: int, grad_world: int, accumulation_steps: int
) -> torch.Tensor:
    """The gradient rule: what a process backpropagates for one micro-batch.

    DeepSpeed divides by the accumulation steps and averages over the dp x sp processes; undoing both leaves the gradient of
    `sum of all token losses / num_target_tokens`, however unevenly the targets fall on processes and micro-batches.

    Args:
        local_sum: sum of this shard's token losses; 0, with a graph, where it holds no target.
        num_target_tokens: of the whole step: all processes and micro-batches.
        grad_world: dp * sp.
    """
    return local_sum * (grad_world * accumulation_steps / num_target_tokens)


class TrainEngine:
    """A model under DeepSpeed, trained step by step.

    Every process makes it with the same weights (process 0's are broadcast) and calls each method together with all
    others. With ZeRO-3 the parameters are partitioned here, unless they came so: `build_engine` partitions each layer as soon as
    it is made.

    Args:
        model: `model(batch)` gives the sum of the shard's token losses, an fp32 scalar.
        mesh: of this process; `torch.distributed` must be initialised, also for one process.
        engine_config, optim_config: the settings.
        total_steps: where the learning rate's cosine ends.
        world: what DeepSpeed has been told of the processes, where a part of the model was given to it before.

    Raises:
        ConfigError: the settings have problems.
        DistributedError: no process group, or one of other processes than an earlier engine in this process had.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: ParallelMesh,
        engine_config: EngineConfig,
        optim_config: OptimConfig,
        *,
        total_steps: int,
        world: FoldedWorld | None = None,
    ) -> None:
        if not dist.is_initialized():
            raise DistributedError(
                "TrainEngine needs torch.distributed, also for one process\n"
                "       call torch.distributed.init_process_group first, or start through longctx.trainer"
            )
        self.mesh, self.config, self.optim, self.total_steps = mesh, engine_config, optim_config, total_steps
        self.dtype = engine_config.resolved_dtype(mesh.device.type)
        self.grad_world = len(mesh.grad.ranks)
        problems = [*engine_config.problems(mesh.device.type), *engine_config.plan_problems(mesh.plan)]
        problems += optim_config.problems()
        if problems:
            raise ConfigError(format_problems("the engine's settings", problems))
        deepspeed = import_deepspeed(mesh.device)
        check_one_world(deepspeed, mesh)
        self.slices = parameter_slices(model)
        groups = parameter_groups(model, optim_config.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=optim_config.lr, **self._adamw_settings())
        # Its bf16 optimizer prints memory figures whatever the log level.
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            self.ds, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=deepspeed_config(engine_config, optim_config, dtype=self.dtype, grad_world=self.grad_world),
                mpu=self._groups(world),
                dist_init_required=False,
            )
        log.debug("deepspeed.initialize: %s", printed.getvalue())
        if self.ds.device.type != mesh.device.type or (self.ds.device.index or 0) != (mesh.device.index or 0):
            raise DistributedError(
                f"{mesh.prefix} DeepSpeed works on {self.ds.device}, the mesh on {mesh.device}\n"
                "       the device of a process must be the one numbered by the environment variable LOCAL_RANK"
            )

    def train_step(self, step: int, micro_batches: Sequence[ShardedBatch]) -> StepResult:
        """One optimizer step over `accumulation_steps` micro-batches.

        Costs two small collectives beside DeepSpeed's own, the loss and the norm; a third with telemetry.

        Args:
            step: from 0; it sets the learning rate.
            micro_batches: this process's shards, `accumulation_steps` of them.

        Raises:
            NonFiniteError: on all processes alike; parameters and optimizer are as before the step, but gradients are not
                cleared, so the engine is of no further use.
            DataError: the step has no target token.
            DistributedError: the processes do not agree about the step.
        """
        loss = self.accumulate(step, micro_batches)
        accounts, journal = None, self.mesh.journal
        if journal.is_measuring:
            # The loss has come to the host, so all attention of the step is over: no measurement is waited for.
            accounts = self._gather(torch.tensor(tells(journal.take()), dtype=torch.float64, device=self.mesh.device))
        result = self.update(step, loss, cursor=micro_batches[0].cursor)
        # The norm has come to the host since, so these have too.
        return result if accounts is None else replace(result, telemetry=StepTelemetry.of(accounts.tolist()))

    def accumulate(self, step: int, micro_batches: Sequence[ShardedBatch]) -> float:
        """The first half of `train_step`: forward and backward. Returns the mean loss; `gradients` can be read after it."""
        expected = self.config.accumulation_steps
        assert len(micro_batches) == expected, f"{len(micro_batches)} micro-batches for {expected} accumulation steps"
        self.ds.train()
        self.mesh.journal.discard()
        first = micro_batches[0]
        if not first.num_target_tokens:
            raise DataError(
                f"{self.mesh.prefix} step {step}: no token of the samples from cursor {first.cursor} on has a target\n"
                "       documents of one token have none; check the data, or set data.mask_documents = false"
            )
        return self._mean_loss(step, self._forward_backward(micro_batches), first)

    def _groups(self, world: FoldedWorld | None) -> Any:
        """What DeepSpeed asks for its process groups."""
        return world or FoldedWorld(self.mesh)

    def _forward_backward(self, micro_batches: Sequence[ShardedBatch]) -> torch.Tensor:
        """All micro-batches; [sum of the losses, targets] of this process in float64."""
        # float64: the sums of a whole step, exact enough that every process count gives the same mean.
        total = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        for i, batch in enumerate(micro_batches):
            local_sum = self.ds(batch)
            self.ds.backward(self._scaled(local_sum, batch))
            if i + 1 < len(micro_batches):
                # Between micro-batches this only counts them.
                self.ds.step()
            total += torch.stack([local_sum.detach().double(), (batch.labels != -100).sum().double()])
        return total

    def _scaled(self, local_sum: torch.Tensor, batch: ShardedBatch) -> torch.Tensor:
        return scaled_loss(
            local_sum,
            num_target_tokens=batch.num_target_tokens,
            grad_world=self.grad_world,
            accumulation_steps=self.config.accumulation_steps,
        )

    def update(self, step: int, loss: float, *, cursor: int) -> StepResult:
        """The second half of `train_step`: clip and update."""
        lr = lr_at(step, self.optim, self.total_steps)
        for group in self.ds.optimizer.param_groups:
            group["lr"] = lr
        norm: Any = None
        if self.config.zero_stage == 0:
            norm = self._total_norm()
            self._check_norm(step, float(norm), cursor)
            if self.optim.gradient_clipping > 0:
                nn.utils.clip_grads_with_norm_(self.ds.module.parameters(), self.optim.gradient_clipping, norm)
        self._apply_step()
        if norm is None:
            norm = self.ds.get_global_grad_norm()
            self._check_norm(step, float(norm), cursor)
        return StepResult(loss, float(norm), lr)

    def _apply_step(self) -> None:
        """Update the parameters and clear the gradients."""
        self.ds.step()

    def _total_norm(self) -> torch.Tensor:
        """The norm of the whole gradient without ZeRO, where every process has its parameters' averaged gradients."""
        # The last stage's copy of a tied embedding has the gradient that the first one's has.
        mine = (p for p in self.ds.module.parameters() if not getattr(p, "ds_pipe_replicated", False))
        cut, whole = split_by_cut(mine)
        square = self._square_norm(cut)
        self.mesh.tensor_exchange.all_reduce(square, what="tp sum of the gradient norm")
        square += self._square_norm(whole)
        if self.mesh.pp.group is not None:
            dist.all_reduce(square, group=self.mesh.pp.group)
        return square.sqrt()

    def _square_norm(self, parameters: Sequence[nn.Parameter]) -> torch.Tensor:
        """The square of the norm of these parameters' gradients together; 0 for none."""
        norms = [p.grad for p in parameters if p.grad is not None]
        return nn.utils.get_total_norm(norms).square() if norms else torch.zeros((), device=self.mesh.device)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[ShardedBatch]) -> float:
        """Mean nats per target token over `batches`; every process must bring as many. nan where there is no target."""
        was_training = self.ds.module.training
        self.ds.eval()
        total = self._forward_only(batches)
        self.ds.train(was_training)
        loss, targets = self._gather(total).sum(0).tolist()
        return loss / targets if targets else math.nan

    def _forward_only(self, batches: Iterable[ShardedBatch]) -> torch.Tensor:
        """As `_forward_backward`, without gradients."""
        total = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        for batch in batches:
            total += torch.stack([self.ds(batch).double(), (batch.labels != -100).sum().double()])
        return total

    def gradients(self) -> dict[str, torch.Tensor]:
        """The whole gradient of each of the model's parameters in fp32, on every process, between `accumulate` and `update`.

        For inspection and tests: every process holds all of it. Collective.
        """
        from deepspeed.utils import safe_get_full_grad

        found = {}
        for name, parameter in self.ds.module.named_parameters():
            # With stages 1 and 2, parameter.grad is this process's own part; the partitions hold the average.
            partitioned = self.config.zero_stage in (1, 2)
            grad = parameter.get_full_hp_grad() if partitioned else safe_get_full_grad(parameter)
            assert grad is not None, f"{name} has no gradient"
            part = self.slices[name]
            found[part.name] = gather_slices(grad.detach().float().clone(), part, self.mesh.tensor_exchange)
        return found

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """Every parameter, whole, in the training dtype and on the CPU, on process 0; nothing on the others.

        Every process must call it. With ZeRO-3 one parameter at a time is gathered. A tied parameter appears once.
        """
        import deepspeed

        state = {}
        for name, parameter in self.ds.module.named_parameters():
            part = self.slices[name]
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.config.zero_stage == 3):
                whole = gather_slices(parameter.detach(), part, self.mesh.tensor_exchange)
                if self.mesh.grad.rank == self.mesh.tp.rank == 0:
                    state[part.name] = whole.cpu().clone()
        return state

    def _adamw_settings(self) -> dict[str, Any]:
        # torch has a fused AdamW for CPUs too: for an optimizer on the host, the one that is not slow.
        fused = self.mesh.device.type == "cuda" or self.config.offload != "none"
        return {"betas": tuple(self.optim.betas), "eps": self.optim.eps, "fused": fused}

    @property
    def _told(self) -> tuple[int, ...]:
        """The ranks that `_gather` hears: one of each set of processes that compute the same."""
        return self.mesh.grad.ranks

    def _gather(self, local: torch.Tensor) -> torch.Tensor:
        """`local` [n] of every process of `_told`: [processes, n], the same everywhere."""
        axis = self.mesh.grad
        if axis.size == 1:
            return local[None]
        # A sum of rows of which one is not zero: the name of the gather into one tensor depends on torch's version.
        everyone = local.new_zeros(axis.size, local.numel())
        everyone[axis.rank] = local
        dist.all_reduce(everyone, group=axis.group)
        return everyone

    def _mean_loss(self, step: int, total: torch.Tensor, first: ShardedBatch) -> float:
        """The step's mean loss from every process's (sum of losses, targets); checks that they fit together."""
        own = torch.tensor([step, first.cursor, first.num_target_tokens], dtype=torch.float64, device=total.device)
        rows, ranks = self._gather(torch.cat([total, own])).cpu(), self._told
        if bool((rows[:, 2:] != rows[0, 2:]).any()):
            told = "; ".join(
                f"rank {rank}: step {int(s)}, cursor {int(c)}, {int(n)} targets"
                for rank, (s, c, n) in zip(ranks, rows[:, 2:].tolist(), strict=True)
            )
            raise DistributedError(f"{self.mesh.prefix} the processes are not at the same step: {told}")
        held = int(rows[:, 1].sum())
        if held != first.num_target_tokens:
            raise DistributedError(
                f"{self.mesh.prefix} step {step}: the processes hold {held:_} target tokens, but the batch says "
                f"{first.num_target_tokens:_}, which scales the gradient"
            )
        broken = [rank for rank, loss in zip(ranks, rows[:, 0].tolist(), strict=True) if not math.isfinite(loss)]
        if broken:
            where = ", ".join(f"rank {rank} ({self.mesh.plan.coords(rank)})" for rank in broken)
            value = float(rows[list(ranks).index(broken[0]), 0])
            raise NonFiniteError(self._non_finite(step, f"the loss is {value} on {where}", first.cursor))
        return float(rows[:, 0].sum()) / first.num_target_tokens

    def _check_norm(self, step: int, norm: float, cursor: int) -> None:
        # DeepSpeed reports inf, or -1 from some of its helpers, for a step that it left out.
        if not math.isfinite(norm) or norm < 0:
            what = f"the gradient norm is {norm}, with a finite loss on every rank"
            raise NonFiniteError(self._non_finite(step, what, cursor))

    def _non_finite(self, step: int, what: str, cursor: int) -> str:
        return (
            f"{self.mesh.prefix} step {step}: {what}; batch cursor {cursor}\n"
            "       the parameters were not updated, and the last checkpoint is intact\n"
            "       try a lower optim.lr, a longer optim.warmup_steps or a smaller optim.gradient_clipping, "
            "or look at the samples from that cursor on"
        )


def build_engine(
    model_config: ModelConfig,
    engine_config: EngineConfig,
    optim_config: OptimConfig,
    mesh: ParallelMesh,
    *,
    total_steps: int,
    seed: int = 0,
    seq_len: int = 0,
    load: Callable[[nn.Module, str], None] | None = None,
) -> TrainEngine:
    """A new `Transformer`, or its stage of a pipeline, in a `TrainEngine`; its weights those of `seed`, or what `load` makes
    of them.

    Args:
        seq_len: tokens of a sequence: a pipeline's stages are cut by what they compute, attention included. 0: leave it out.
        load: `load(part, prefix)` sets the parameters of a part of the model, which is on the CPU then; the same on every
            process. `prefix` is what their names begin with in the whole model: empty for all of it, which it is given but
            with ZeRO-3. bf16 training rounds fp32 weights and works on from the rounded ones.
    """
    from longctx.model import Transformer

    made: dict[str, Any] = {"kernel": engine_config.kernel, "fused": engine_config.fused, "seed": seed}
    made["activation_checkpointing"] = engine_config.activation_checkpointing
    made["activation_offload"] = engine_config.activation_offload
    made["mlp_chunk_tokens"] = engine_config.mlp_chunk_tokens
    if mesh.pp.size > 1:
        # DeepSpeed must know its device before anything of it is imported.
        check_one_world(import_deepspeed(mesh.device), mesh)
        from longctx.pipeline import DualPipeTransformer, PipelineTrainEngine, PipelineTransformer

        stage_class = DualPipeTransformer if mesh.plan.schedule == "dualpipev" else PipelineTransformer
        stage = stage_class(model_config, mesh, model_config.stages(mesh.plan.num_stages, seq_len), **made)
        if load is not None:
            load(stage, "")
        return PipelineTrainEngine(stage, mesh, engine_config, optim_config, total_steps=total_steps)
    if engine_config.zero_stage < 3:
        model = Transformer(model_config, mesh=mesh, **made)
        if load is not None:
            load(model, "")
        return TrainEngine(model, mesh, engine_config, optim_config, total_steps=total_steps)
    deepspeed = import_deepspeed(mesh.device)
    check_one_world(deepspeed, mesh)
    world = FoldedWorld(mesh)
    dtype = engine_config.resolved_dtype(mesh.device.type)
    settings = deepspeed_config(engine_config, optim_config, dtype=dtype, grad_world=len(mesh.grad.ranks))

    def settle(name: str, part: nn.Module) -> None:
        if load is not None:
            load(part, f"{name}.")
        partition(deepspeed, part, settings, world)

    model = Transformer(model_config, mesh=mesh, settle=settle, **made)
    return TrainEngine(model, mesh, engine_config, optim_config, total_steps=total_steps, world=world)
