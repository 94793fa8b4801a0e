"""What DeepSpeed is told, and what must be arranged before it is used.

DeepSpeed's data-parallel world is every process that holds a piece of the step's tokens, dp x sp of them, and it hears
nothing of the sequence axis; its model-parallel world is tp, and the stages of a pipeline where there is one. Gradient averaging, ZeRO partitions, the gradient norm and overflow checks are then right in
every ZeRO stage; every other way of telling it about sequences is wrong in some stage. It keeps that world in a module
global, so a process can hold engines over one set of processes only.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from longctx.errors import DistributedError

if TYPE_CHECKING:
    from longctx.engine import EngineConfig
    from longctx.optim import OptimConfig
    from longctx.parallel.mesh import ParallelMesh

log = logging.getLogger(__name__)

# Elements per communication bucket of ZeRO: 200 MB in fp32. DeepSpeed's default, 5e8, holds 2 GB beside the model.
BUCKET_ELEMENTS = 50_000_000


def deepspeed_config(engine: EngineConfig, optim: OptimConfig, *, dtype: str, grad_world: int) -> dict[str, Any]:
    """DeepSpeed's settings. What it would choose silently is always written out."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": engine.micro_batch_size,
        "gradient_accumulation_steps": engine.accumulation_steps,
        "train_batch_size": engine.micro_batch_size * engine.accumulation_steps * grad_world,
        # Stage 0 in fp32 is clipped by TrainEngine, which needs the norm that DeepSpeed keeps to itself there.
        "gradient_clipping": optim.gradient_clipping if engine.zero_stage else 0.0,
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": engine.zero_stage,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
            "stage3_param_persistence_threshold": engine.zero3_keep_elements,
            # The parameters of the modules ahead are gathered while this one computes, as many elements at a time as a bucket.
            "overlap_comm": engine.zero_stage == 3,
            "stage3_prefetch_bucket_size": BUCKET_ELEMENTS,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 60,
        "wall_clock_breakdown": False,
        # It waits for the device before and after every micro-batch.
        "timers": {"throughput": {"enabled": False}},
        # Activation checkpointing is the model's own, which keeps attention. Activations go whole from stage to stage.
        "pipeline": {
            "use_reentrant": False,
            "activation_checkpoint_interval": 0,
            "pipe_partitioned": False,
            "grad_partitioned": False,
        },
    }
    if engine.offload != "none":
        zero = config["zero_optimization"]
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        # Our AdamW, and not DeepSpeed's, which a C++ compiler would make at the start.
        config["zero_force_ds_cpu_optimizer"] = False
        if engine.offload == "all":
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    if dtype == "bf16":
        # A step whose gradient is not finite is left out instead of applied, as the fp32 optimizers do anyway.
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


class FoldedWorld:
    """The `mpu` that DeepSpeed asks for its groups: data parallel over dp x sp, model parallel over tp.

    It must have no method about sequences: with one, ZeRO-3 partitions over dp only and leaves sp unreduced.
    """

    def __init__(self, mesh: ParallelMesh) -> None:
        self.rank, self.ranks = mesh.grad.rank, tuple(mesh.grad.ranks)
        self.tp_rank, self.tp_ranks = mesh.tp.rank, tuple(mesh.tp.ranks)
        if mesh.world_size == 1:
            self._group = self._tp_group = self._alone = dist.group.WORLD
            return
        # To DeepSpeed None would mean the whole world.
        # Every rank makes all groups, in one order: NCCL may split them off the world's communicator, which is collective.
        alone = [dist.new_group([rank]) for rank in range(mesh.world_size)]
        self._alone = alone[mesh.rank]
        self._group = mesh.grad.group or self._alone
        # DeepSpeed sums norms over it.
        self._tp_group = mesh.tp.group or self._alone

    def get_data_parallel_rank(self) -> int:
        return self.rank

    def get_data_parallel_world_size(self) -> int:
        return len(self.ranks)

    def get_data_parallel_group(self) -> Any:
        return self._group

    def get_data_parallel_group_ranks(self) -> tuple[int, ...]:
        return self.ranks

    def get_model_parallel_rank(self) -> int:
        return self.tp_rank

    def get_model_parallel_world_size(self) -> int:
        return len(self.tp_ranks)

    def get_model_parallel_group(self) -> Any:
        return self._tp_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_pipeline_model_parallel_world_size(self) -> int:
        return 1


def import_deepspeed(device: torch.device) -> Any:
    """deepspeed, set to the type of device in use, its own log quietened to warnings. Importing it takes seconds."""
    # Read once, at its first import; without it DeepSpeed takes a GPU that it sees, also for a run on the CPU.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # DeepSpeed asks for the launcher's variable also where there was no launcher.
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # On a CPU DeepSpeed would compile a shared-memory all-reduce, which only its inference uses: half a minute, a C++
    # compiler, and segments in /dev/shm whose fixed names two runs of one user would share.
    # The attribute is not read first: that would try compilers on all other operators.
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    # torch 2.13 renamed collectives that DeepSpeed 0.19 calls many times a step.
    warnings.filterwarnings(
        "ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning, r"torch\.distributed"
    )
    chosen = deepspeed.get_accelerator().device_name()
    if chosen != device.type:
        raise DistributedError(
            f"DeepSpeed was set to {chosen!r}, but this run is on {device.type!r}\n"
            f"       set the environment variable DS_ACCELERATOR={device.type}, or unset it, before deepspeed is imported"
        )
    return deepspeed


def partition(deepspeed: Any, part: nn.Module, settings: dict[str, Any], world: FoldedWorld) -> None:
    """Give each process its share of the parameters of a part of the model, as ZeRO-3 does when an engine is made.

    Args:
        part: on the CPU, the same on every process of `world`.
        settings: `deepspeed_config`.
    """
    # DeepSpeed casts a model in its engine, but not one that is partitioned already.
    part.to(torch.bfloat16 if "bf16" in settings else torch.float32)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False, verbose=False)
        deepspeed.zero.Init(
            module=part,
            data_parallel_group=world.get_data_parallel_group(),
            config_dict_or_path=settings,
            mpu=world,
        )
    log.debug("deepspeed.zero.Init: %s", printed.getvalue())


def check_one_world(deepspeed: Any, mesh: ParallelMesh) -> None:
    """Refuse a second set of processes in this process: engines over the first would silently reduce over the second.

    Raises:
        DistributedError: an earlier engine spans other ranks.
    """
    earlier = deepspeed.utils.groups.mpu
    if earlier is None:
        return
    # The grid of a pipeline answers the same questions as a FoldedWorld.
    before = (earlier.get_pipeline_model_parallel_world_size(), earlier.get_tensor_model_parallel_world_size())
    ranks, now = list(mesh.grad.ranks), (mesh.pp.size, mesh.tp.size)
    earlier_ranks = list(earlier.get_data_parallel_group_ranks())
    if (earlier_ranks, before) != (ranks, now):
        raise DistributedError(
            f"{mesh.prefix} an earlier engine of this process spans the ranks {earlier_ranks} with pp {before[0]} and tp "
            f"{before[1]}, this one {ranks} with pp {now[0]} and tp {now[1]}\n"
            "       DeepSpeed keeps one set per process: start a new process for another plan"
        )
