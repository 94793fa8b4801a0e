"""What attention of one layer costs a rank of a plan: seconds, and keys that it keeps or has under way."""

from __future__ import annotations

from longctx.engine_config import EngineConfig
from longctx.model_config import ModelConfig
from longctx.parallel.cost import Estimate
from longctx.parallel.degrees import Work, attention_estimate
from longctx.parallel.plan import STRATEGIES, ParallelPlan


def attention_of(
    model: ModelConfig, engine: EngineConfig, plan: ParallelPlan, seq_len: int, *, node_size: int | None = None
) -> Estimate:
    """Of one micro-batch of sequences that are one document each, on Hopper GPUs, in bf16.

    Args:
        plan: resolved.
        seq_len: global length.
        node_size: GPUs of one machine; None: all are in one.
    """
    node_size = plan.world_size if node_size is None else node_size
    return attention_estimate(
        plan.ring,
        plan.ulysses,
        Work(
            num_heads=model.num_heads // plan.tp,
            num_kv_heads=model.kv_heads // plan.tp,
            head_dim=model.head_size,
            seq_len=seq_len,
            mask=model.causal_mask,
            batch=engine.micro_batch_size,
            itemsize=2,
            grad_itemsize=2 if plan.grad_dtype == "bf16" else 4,
        ),
        plan.sequence_layout,
        STRATEGIES[1:] if plan.strategy == "auto" else (plan.strategy,),
        plan.ulysses_chunks,
        ring_in_one_node=node_size % (plan.sp * plan.tp) == 0,
        ulysses_in_one_node=node_size % (plan.ulysses * plan.tp) == 0,
    )
