"""How long a training step takes, estimated from the shape of the model and the plan: nothing runs.

Times are those of Hopper GPUs, scaled by the peak of others; what a plan loses to messages follows from the estimates that
`strategy="auto"` uses (`longctx.parallel.cost`). Held against the runs in `benchmarks/results/training.csv`.

Source: Narayanan et al. 2021 (arXiv 2104.04473) for pipelines and tensor parallelism; Rajbhandari et al. 2020 (arXiv 1910.02054)
for the messages of ZeRO.
"""

from __future__ import annotations

from dataclasses import dataclass

from longctx.attention_cost import attention_of
from longctx.config import Config
from longctx.memory import layer_activations
from longctx.parallel.cost import MEMORY_BYTES, NETWORK_BYTES, NODE_BYTES
from longctx.parallel.plan import ParallelPlan

# Of the products with weights and what goes with them (norms, SwiGLU, loss): FLOP/s on a Hopper GPU, from the steps of
# benchmarks/results/training.csv less attention's time.
LINEAR_FLOPS = 520e12
HOPPER_PEAK = 989.5e12
# Time of attention by head dim, that of 128 being 1 (benchmarks/results/attention.csv).
HEAD_DIM_TIME = {64: 1.1, 128: 1.0, 256: 1.2}
# Bytes a second between a GPU and pinned memory of the host, each way: of PCIe 5.0 with 16 lanes, 63e9 by the standard, what
# large copies reach.
HOST_BYTES = 50e9
# Of attention's time on the pass forward: 2 products of 7.
FORWARD_SHARE = 2 / 7
# Bytes that the optimizer reads and writes for each parameter that it steps.
OPTIMIZER_BYTES = 40


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step of the slowest rank, and where they go; messages are what is waited for, from other ranks
    or from the host's memory."""

    linear: float
    attention: float
    messages: float
    bubble: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.linear + self.attention + self.messages + self.bubble + self.optimizer


def step_time(config: Config, plan: ParallelPlan, *, peak: float, node_size: int) -> StepTime:
    """The estimate for a resolved plan; of sequences that are one document each, which packed ones do not exceed.

    Args:
        peak: bf16 FLOP/s of one GPU by its data sheet.
        node_size: GPUs of one machine.
    """
    model, engine, seq_len = config.model, config.engine, config.data.seq_len
    scale = HOPPER_PEAK / peak
    tokens = engine.micro_batch_size * -(-seq_len // plan.sp)
    stages = model.stages(plan.num_stages, seq_len)
    parameters = model.stage_params(stages)
    table = model.vocab_size * model.hidden_size
    of_machine = node_size % (plan.ulysses * plan.tp) == 0
    attention = attention_of(model, engine, plan, seq_len, node_size=node_size)
    nearest = min(HEAD_DIM_TIME, key=lambda d: abs(d - model.head_size))
    attended = (attention.total - attention.exposed) * HEAD_DIM_TIME[nearest] * scale
    # Products forward and twice backward; layers once more where they are recomputed.
    passes = 8 if engine.activation_checkpointing else 6
    slowest = StepTime(0, 0, 0, 0, 0)
    for held in (plan.stages_of(pp_rank) for pp_rank in range(plan.pp)):
        layers = sum(len(stages[stage]) for stage in held)
        of_tables = (0 in held) + (plan.num_stages - 1 in held)
        if model.tie_embeddings and plan.num_stages == 1:
            of_tables = 1
        weights = (sum(parameters[stage] for stage in held) - of_tables * table) // plan.tp
        flops = passes * weights * tokens + 6 * table * tokens * (plan.num_stages - 1 in held) / plan.tp
        linear = flops / LINEAR_FLOPS * scale
        messages = layers * attention.exposed + _tensor_messages(config, plan, tokens, layers, of_machine)
        messages += _gathers(config, plan, sum(parameters[stage] for stage in held) // plan.tp, linear, node_size)
        if engine.mlp_chunk_tokens is not None and not engine.activation_checkpointing:
            # Gate and up of each piece once more.
            linear += 4 * layers * model.hidden_size * model.mlp_size // plan.tp * tokens / LINEAR_FLOPS * scale
        of_layers = passes * weights * tokens / LINEAR_FLOPS * scale
        messages += _fetches(config, plan, layers, passes, of_layers / max(1, layers), attended, node_size)
        one = StepTime(linear, layers * attended, messages, 0, 0)
        slowest = max(slowest, one, key=lambda t: t.total)
    m = engine.accumulation_steps
    # 1F1B: every stage waits for the first to reach it and for the last to come back. With two stages each, half as long.
    idle = (plan.pp - 1) * (0.5 if plan.schedule == "dualpipev" else 1.0)
    share = max(parameters) // plan.tp // (plan.grad_world if engine.zero_stage else 1)
    step = OPTIMIZER_BYTES * share / MEMORY_BYTES + _averaging(config, plan, max(parameters) // plan.tp, node_size)
    return StepTime(m * slowest.linear, m * slowest.attention, m * slowest.messages, idle * slowest.total, step)


def _tensor_messages(config: Config, plan: ParallelPlan, tokens: int, layers: int, of_machine: bool) -> float:
    """Seconds of one micro-batch in which tp ranks sum activations: twice a layer, forward and backward."""
    if plan.tp == 1:
        return 0.0
    speed = NODE_BYTES if of_machine else NETWORK_BYTES
    each = 2 * 2 * tokens * config.model.hidden_size * (plan.tp - 1) / plan.tp / speed
    return layers * each * (6 if plan.shard_norms else 4)


def _fetches(
    config: Config, plan: ParallelPlan, layers: int, passes: int, linear: float, attention: float, node_size: int
) -> float:
    """Seconds of one micro-batch in which compute waits for copies to the host and back, where activations are offloaded.

    Args:
        linear, attention: seconds of one layer; passes: into which those of products are counted, two of them forward.
    """
    if not config.engine.activation_offload:
        return 0.0
    kept = layer_activations(config.model, config.engine, plan, config.data.seq_len, node_size=node_size)
    moved = kept / HOST_BYTES
    forward = linear * 2 / passes + attention * FORWARD_SHARE
    waits = layers * (max(0.0, moved - forward) + max(0.0, moved - (linear + attention - forward)))
    # A pipeline goes back through a micro-batch whose last layers have left.
    return waits + moved * (plan.pp > 1)


def _gathers(config: Config, plan: ParallelPlan, params: int, linear: float, node_size: int) -> float:
    """Seconds of one micro-batch in which ZeRO-3's layers wait for their weights: what does not hide behind products."""
    if config.engine.zero_stage < 3 or plan.grad_world == 1:
        return 0.0
    speed = NODE_BYTES if node_size >= plan.world_size else NETWORK_BYTES
    # Weights forward and backward, and gradients in fp32.
    moved = (2 * 2 + 4) * params * (plan.grad_world - 1) / plan.grad_world / speed
    return max(0.0, moved - linear) + 0.1 * moved


def _averaging(config: Config, plan: ParallelPlan, params: int, node_size: int) -> float:
    """Seconds of a step in which gradients are averaged in fp32 and the stepped weights come back; ZeRO-3 has both in its layers."""
    if plan.grad_world == 1 or config.engine.zero_stage == 3:
        return 0.0
    speed = NODE_BYTES if node_size >= plan.world_size else NETWORK_BYTES
    return (2 * 4 + 2) * params * (plan.grad_world - 1) / plan.grad_world / speed
