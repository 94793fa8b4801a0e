"""The estimate of a step's memory against what an allocator hands out for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from memory_cases import CONFIG, TOKENS, bytes_of_tokens

from longctx.engine_config import EngineConfig
from longctx.memory import _rank
from longctx.offload import LAYERS_HELD
from longctx.parallel.cost import Estimate, Split
from longctx.parallel.plan import ParallelPlan
from longctx.parallel.strategy import DirectStrategy
from longctx.testing import run_distributed

FAR = {"activation_offload": True, "mlp_chunk_tokens": 64}
CASES = {
    "one": (ParallelPlan(), None, {}),
    "one-far": (ParallelPlan(), None, FAR),
    "ring-held": (ParallelPlan(ring=3), DirectStrategy(), {}),
    "ring-again": (ParallelPlan(ring=3), DirectStrategy(holds=False), {}),
    "ring-groups-far": (ParallelPlan(ring=3), DirectStrategy(holds=False, groups=4), FAR),
    "ulysses-held": (ParallelPlan(ulysses=2), Split(), {}),
    "ulysses-again": (ParallelPlan(ulysses=2), Split(chunks=2, holds=False), {}),
    "ulysses-again-far": (ParallelPlan(ulysses=2), Split(chunks=4, holds=False), FAR),
}


def estimated(plan: ParallelPlan, way: DirectStrategy | Split | None, settings: dict) -> tuple[float, float]:
    """Bytes of one more token, and of these the buffers."""
    engine = EngineConfig(activation_checkpointing=True, dtype="bf16", zero_stage=0, **settings)
    plan, found = plan.resolve(plan.sp), []
    for tokens in TOKENS:
        rank = _rank(CONFIG, engine, plan, tokens * plan.sp, "cpu", None)
        # Whatever is best for so few tokens.
        if isinstance(way, DirectStrategy):
            # With zigzag and a causal mask one rank sees all keys of another.
            attention = Estimate(1.0, 0.0, held=way.holds, moving=1 / way.groups, groups=way.groups)
            rank = replace(rank, attention=attention)
        elif isinstance(way, Split):
            rank = replace(rank, attention=Estimate(1.0, 0.0, exchanged=float(way.holds), groups=way.chunks))
        layers = LAYERS_HELD if engine.activation_offload else CONFIG.num_layers
        kept = layers * rank.kept_by_layer() * rank.tokens
        found.append((kept + rank.working(with_loss=False) + rank.message_buffers(), rank.message_buffers()))
    return tuple((b - a) / (TOKENS[1] - TOKENS[0]) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_what_a_token_takes_is_what_is_estimated(name):
    plan, way, settings = CASES[name]
    found = run_distributed(bytes_of_tokens, plan, way, settings, world=plan.sp)
    got, buffers = (max(of_rank) for of_rank in zip(*found, strict=True))
    all_of_it, of_buffers = estimated(plan, way, settings)
    assert all_of_it == pytest.approx(got, rel=0.06)
    # What comes home may be less than what is there room for.
    assert 0.75 * of_buffers <= buffers <= of_buffers


def test_longer_shards_need_what_they_hold_less():
    """Groups, and keys that come again: a quarter less of a token where activations are offloaded."""
    plan = ParallelPlan(ring=8)
    held, lean = (
        estimated(plan, strategy, FAR)[0] for strategy in (DirectStrategy(), DirectStrategy(holds=False, groups=4))
    )  # fmt: skip
    assert lean < 0.75 * held
