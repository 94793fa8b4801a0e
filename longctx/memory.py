"""What training takes of one GPU's memory, estimated from the shape of the model and the plan: nothing is allocated.

Counted at the moment of a step when most is held, the backward pass of a layer or of the loss, from what this library keeps and what
DeepSpeed 0.19 holds beside it. Held against runs on H100 and H200 (`benchmarks/results/training.csv`) to 3 %, and what a token takes
against the account of torch's allocator to 6 %; fragmentation, which that adds, is left out.

Source: Rajbhandari et al. 2020 (arXiv 1910.02054) for what ZeRO divides; Korthikanti et al. 2022 (arXiv 2205.05198) for activations.
"""

from __future__ import annotations

from dataclasses import dataclass

from longctx.attention_cost import attention_of
from longctx.deepspeed_setup import BUCKET_ELEMENTS
from longctx.engine_config import EngineConfig
from longctx.model_config import ModelConfig
from longctx.offload import LAYERS_HELD
from longctx.padding import padded_length
from longctx.parallel.cost import Estimate
from longctx.parallel.loss import CHUNK_BYTES, CHUNK_BYTES_ELSEWHERE
from longctx.parallel.plan import ParallelPlan

# Held on a GPU whatever the plan: tables of RoPE, workspaces of the matrix library, small tensors.
_ALWAYS = {"cuda": 128 << 20}


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the GPU that holds most, and what holds them.

    Args:
        weights: in the dtype of training; with ZeRO-3 the parts, and the layers that are gathered at a time.
        gradients: their sums in fp32.
        optimizer: fp32 weights and Adam's two moments.
        activations: kept for backward, of all layers and of all micro-batches in flight; with `engine.activation_offload`
            of two layers, and what goes into a pipeline's stage and comes out of it.
        working: temporaries of the layer, or of the loss, whose backward pass needs most.
        buffers: of messages.
        host: beside all these, in the host's memory.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    working: int
    buffers: int
    host: int = 0

    @property
    def total(self) -> int:
        """On the GPU."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.working + self.buffers


@dataclass(frozen=True)
class _Rank:
    """What the estimates below share: sizes of one rank, in elements.

    Args:
        tokens: of a micro-batch.
        q, kv, features: of one token: all query heads, the key heads of K alone, and the SwiGLU, of this rank.
        attention: what a layer's attention keeps and has under way, in shares of the rank's keys.
        itemsize: bytes of an activation.
    """

    model: ModelConfig
    engine: EngineConfig
    plan: ParallelPlan
    tokens: int
    itemsize: int
    device_type: str
    attention: Estimate

    @property
    def q(self) -> int:
        return self.model.num_heads * self.model.head_size // self.plan.tp

    @property
    def kv(self) -> int:
        return self.model.kv_heads * self.model.head_size // self.plan.tp

    @property
    def ring_keys(self) -> int:
        """Bytes of K and V of one token as the ring has them. Of the keys that few key heads have, Ulysses ranks hold copies."""
        return self.itemsize * 2 * self.kv * self._copies

    @property
    def _copies(self) -> int:
        return max(1, self.plan.ulysses * self.plan.tp // self.model.kv_heads)

    @property
    def features(self) -> int:
        return self.model.mlp_size // self.plan.tp

    @property
    def residual(self) -> int:
        return self.model.hidden_size // (self.plan.tp if self.plan.shard_norms else 1)

    def kept_by_layer(self) -> int:
        """Bytes that one layer keeps of one token for its backward pass."""
        size, q, kv = self.itemsize, self.q, self.kv
        lse = 4 * self.model.num_heads // self.plan.tp
        attention = size * q + lse + round(self.attention.held * self.ring_keys)
        # q, k, v and out once more, of the heads of a Ulysses rank.
        exchanged = round(self.attention.exchanged * (size * 2 * q + self.ring_keys))
        if self.engine.activation_checkpointing:
            summed = self.model.hidden_size if self.plan.tp > 1 and not self.plan.shard_norms else 0
            return size * (self.residual + summed) + attention + exchanged
        # Both residuals and both norms, what enters attention, and the SwiGLU's gate, input and product; in pieces it keeps
        # its input alone, which the norms are.
        swiglu = 3 * self.features if self.engine.mlp_chunk_tokens is None else 0
        return size * (2 * self.residual + 2 * self.model.hidden_size + q + 2 * kv + swiglu) + attention + exchanged

    def working(self, with_loss: bool) -> int:
        """Bytes of the temporaries at the peak: of the SwiGLU's, of attention's or of the loss's backward pass."""
        size, e, q, kv = self.itemsize, self.model.hidden_size, self.q, self.kv
        chunk, groups = self.engine.mlp_chunk_tokens, self.attention.groups
        # The residual's gradient and, where a layer is computed again, what its projections and norms were given, with q, k and v.
        again = (2 * e + q + 2 * kv + (q + kv) * self.model.qk_norm) if self.engine.activation_checkpointing else e
        # Two norms' inputs or gradients; gate, up, their product and its gradient, of which the first three may be kept already.
        wide = 4 * self.features if self.engine.activation_checkpointing else 2 * self.features
        swiglu = self.tokens * size * (again + 2 * e)
        if chunk is None:
            swiglu += self.tokens * size * wide
        else:
            # The gradient of its input, whole, and the sums of the weights' gradients.
            swiglu += self.tokens * size * e
            swiglu += min(self.tokens, chunk) * size * 5 * self.features + 4 * 3 * e * self.features
        # The gradients of out, q, k and v; Ulysses packs what it sends, and has what it did not keep once more.
        packed = (q + kv + (1 - self.attention.exchanged) * (2 * q + 2 * kv)) if self.plan.ulysses > 1 else 0
        attention = round(size * (again + 2 * q + 2 * kv + packed / groups))
        # In fp32 for a group of heads at a time; without a ring the kernel rounds those of k and v itself.
        attention += 4 * (q + 2 * kv * (self.plan.ring > 1)) // groups
        found = max(swiglu, self.tokens * attention)
        if with_loss:
            # One chunk of logits, the gradient of the hidden state, and that of the projection in fp32.
            table = 4 * self.model.vocab_size * self.model.hidden_size // self.plan.tp
            logits = CHUNK_BYTES.get(self.device_type, CHUNK_BYTES_ELSEWHERE)
            found = max(found, logits + self.tokens * size * self.model.hidden_size + table)
        return found

    def message_buffers(self) -> int:
        """Bytes of the ring's buffers, two of each kind: keys and values that come, their gradients in fp32, and gradients that
        come home.
        """
        if self.plan.ring == 1:
            return 0
        grad = 2 if self.plan.grad_dtype == "bf16" else 4
        # A rank of a ring x Ulysses holds all tokens of its ring rank and a share of the heads.
        # The only keys that come to a ring of two are those that are held.
        coming = 0 if self.plan.ring == 2 and self.attention.held else self.itemsize
        of_key = self.ring_keys // self.itemsize * (coming + 4 + grad)
        return round(2 * self.tokens * self.attention.moving * of_key)


def rank_memory(
    model: ModelConfig,
    engine: EngineConfig,
    plan: ParallelPlan,
    seq_len: int,
    *,
    device_type: str = "cuda",
    node_size: int | None = None,
) -> RankMemory:
    """The estimate for the rank that needs most.

    Args:
        plan: resolved, and without problems for this model and length.
        seq_len: global length of a sequence.
        device_type: decides what the dtype "auto" is.
        node_size: GPUs of one machine, which decides what a ring keeps; None: all are in one.
    """
    rank = _rank(model, engine, plan, seq_len, device_type, node_size)
    itemsize = rank.itemsize
    stages = model.stages(plan.num_stages, seq_len)
    parameters = model.stage_params(stages)
    found = []
    for pp_rank in range(plan.pp):
        held = plan.stages_of(pp_rank)
        kept = of_stages = 0
        for stage in held:
            in_flight = min(engine.accumulation_steps, plan.num_stages - stage)
            kept += in_flight * len(stages[stage]) * rank.kept_by_layer() * rank.tokens
            # What DeepSpeed's pipeline holds itself.
            of_stages += in_flight * 2 * itemsize * rank.residual * rank.tokens * (plan.pp > 1)
        params = sum(parameters[stage] for stage in held) // plan.tp
        largest = max(parameters[stage] // max(1, len(stages[stage])) for stage in held) // plan.tp
        state = _model_state(engine, plan, params, largest, itemsize, model)
        if engine.activation_offload:
            state["host"] += kept
            kept = min(kept, LAYERS_HELD * rank.kept_by_layer() * rank.tokens + of_stages)
        with_loss = plan.num_stages - 1 in held
        found.append(
            RankMemory(
                **state,
                activations=kept,
                working=rank.working(with_loss) + _ALWAYS.get(device_type, 0),
                buffers=rank.message_buffers() + _zero_buckets(engine, plan, params),
            )
        )
    return max(found, key=lambda memory: memory.total)


def layer_activations(
    model: ModelConfig, engine: EngineConfig, plan: ParallelPlan, seq_len: int, *, node_size: int | None = None
) -> int:
    """Bytes that one layer keeps of one micro-batch for its backward pass, on a GPU. Arguments as `rank_memory`."""
    rank = _rank(model, engine, plan, seq_len, "cuda", node_size)
    return rank.kept_by_layer() * rank.tokens


def _rank(
    model: ModelConfig, engine: EngineConfig, plan: ParallelPlan, seq_len: int, device_type: str, node_size: int | None
) -> _Rank:
    local_len = padded_length(seq_len, plan.seq_multiple) // plan.sp
    itemsize = 4 if engine.resolved_dtype(device_type) == "fp32" else 2
    attention = attention_of(model, engine, plan, seq_len, node_size=node_size)
    return _Rank(model, engine, plan, engine.micro_batch_size * local_len, itemsize, device_type, attention)


def _model_state(
    engine: EngineConfig, plan: ParallelPlan, params: int, layer: int, itemsize: int, model: ModelConfig
) -> dict[str, int]:
    """Bytes of weights, gradients, optimizer and host of one rank that holds `params` parameters."""
    share, stage = plan.grad_world, engine.zero_stage
    weights, gradients, optimizer = itemsize * params, 4 * params, 12 * params
    if stage == 0:
        optimizer = 8 * params  # the weights are fp32 themselves
    else:
        optimizer //= share
    if stage >= 2:
        gradients //= share
    if stage == 3:
        # The layer at work and the next, or the largest table.
        table = model.vocab_size * model.hidden_size // plan.tp
        weights = weights // share + itemsize * max(2 * layer, table) * (share > 1)
    # Of a micro-batch after the first, beside the sums in fp32 of those before.
    of_one = itemsize * params if engine.accumulation_steps > 1 and itemsize == 2 else 0
    host = 0
    if engine.offload != "none":
        # DeepSpeed keeps the gradients' sums where the optimizer is.
        host, optimizer = optimizer + gradients // (1 if stage >= 2 else share), 0
        gradients = gradients if stage < 2 else 0
    if engine.offload == "all":
        host += itemsize * params // share
        weights -= itemsize * params // share
    return {"weights": weights, "gradients": gradients + of_one, "optimizer": optimizer, "host": host}


def _zero_buckets(engine: EngineConfig, plan: ParallelPlan, params: int) -> int:
    """Bytes of the buckets in which gradients are averaged and weights come back: two in flight, and one filling."""
    return 3 * 4 * min(BUCKET_ELEMENTS, params) if engine.zero_stage and plan.grad_world > 1 else 0
