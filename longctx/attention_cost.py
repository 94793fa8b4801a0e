"""What attention of one layer costs a rank of a plan: seconds, and keys that it keeps or has under way."""

from __future__ import annotations

from functools import lru_cache

from longctx.engine_config import EngineConfig
from longctx.layout import SequenceLayout
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
    return _attention(
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
        node_size % (plan.sp * plan.tp) == 0,
        node_size % (plan.ulysses * plan.tp) == 0,
    )


@lru_cache(maxsize=256)
def _attention(
    ring: int,
    ulysses: int,
    work: Work,
    layout: SequenceLayout,
    strategies: tuple[str, ...],
    chunks: int | None,
    ring_in_one_node: bool,
    ulysses_in_one_node: bool,
) -> Estimate:
    """`attention_estimate`, which does not depend on what else a plan says, remembered."""
    return attention_estimate(
        ring,
        ulysses,
        work,
        layout,
        strategies,
        chunks,
        ring_in_one_node=ring_in_one_node,
        ulysses_in_one_node=ulysses_in_one_node,
    )
