"""Models of transformers with our attention equal themselves with their own: on one device, and cut over ranks."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.distributed as dist
from hf_cases import CONFIGS, IGNORE, SIZES, gradients, make_model, make_tokens, worst_gradient
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, LlamaConfig, ModernBertConfig, ModernBertModel
from transformers.masking_utils import create_causal_mask, create_chunked_causal_mask

from longctx import Causal, Documents, ParallelMesh, ParallelPlan, SequenceMeta
from longctx.errors import KernelError, PlanError, ShapeError
from longctx.huggingface import CausalLMLoss, parallelize, shard_batch
from longctx.testing import run_distributed

ALONE = ParallelPlan()


def alone() -> ParallelMesh:
    return ParallelMesh.create(ALONE, device="cpu")


def both(name: str):
    return make_model(name, "eager"), make_model(name, "longctx")


# ---- one device


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_those_of_eager_attention(name):
    tokens, labels = make_tokens(2, 29)
    theirs, ours = both(name)
    expected, found = (model(input_ids=tokens, labels=labels).loss for model in (theirs, ours))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    found.backward()
    assert worst_gradient(ours, gradients(theirs)) < 1e-4


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_seen_by_nobody(side):
    tokens, labels = make_tokens(3, 24)
    mask = torch.ones_like(tokens)
    for row, padding in enumerate((0, 5, 11)):
        where = slice(0, padding) if side == "left" else slice(24 - padding, 24)
        mask[row, where], labels[row, where], tokens[row, where] = 0, IGNORE, 0
    theirs, ours = both("mistral-window")
    expected, found = (m(input_ids=tokens, attention_mask=mask, labels=labels) for m in (theirs, ours))
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    torch.testing.assert_close(found.logits[mask.bool()], expected.logits[mask.bool()], rtol=1e-4, atol=1e-4)
    # It is looked at: without the mask the real tokens behind padding have other neighbours.
    unmasked = ours(input_ids=tokens, labels=labels).loss
    assert (unmasked.item() == pytest.approx(found.loss.item(), rel=1e-5)) == (side == "right")


@pytest.mark.parametrize("said_by", ["position_ids", "cu_seq_lens"])
def test_packed_documents_do_not_see_each_other(said_by):
    lengths = (5, 1, 13, 7)
    tokens, _ = make_tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    boundaries = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    ours = make_model("llama", "longctx")
    said = {} if said_by == "position_ids" else {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries}
    packed = ours(input_ids=tokens, position_ids=positions, use_cache=False, **said).logits
    one_by_one = torch.cat([ours(input_ids=part).logits for part in tokens.split(lengths, 1)], 1)
    torch.testing.assert_close(packed, one_by_one, rtol=1e-4, atol=1e-4)


def test_positions_that_are_filled_anew_are_looked_at_anew():
    ours = make_model("llama", "longctx")
    tokens, _ = make_tokens(1, 12)
    positions = torch.arange(12)[None]
    whole = ours(input_ids=tokens, position_ids=positions, use_cache=False).logits
    positions[:, 6:] -= 6
    halves = ours(input_ids=tokens, position_ids=positions, use_cache=False).logits
    assert torch.equal(whole[:, :6], halves[:, :6])
    assert not torch.allclose(whole[:, 6:], halves[:, 6:], atol=1e-3)


def test_a_model_that_looks_both_ways():
    sizes = {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "bos_token_id", "eos_token_id")}
    config = ModernBertConfig(**sizes, local_attention=8, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2)
    tokens, _ = make_tokens(2, 27)
    outs = []
    for implementation in ("eager", "longctx"):
        torch.manual_seed(0)
        model = ModernBertModel._from_config(config, attn_implementation=implementation).eval()
        outs.append(model(input_ids=tokens).last_hidden_state)
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2-softcap"])
def test_generation_with_a_cache(name):
    tokens, _ = make_tokens(2, 12)
    mask = torch.ones_like(tokens)
    tokens[1, :4], mask[1, :4] = 0, 0
    made = []
    for model in both(name):
        model.eval()
        made.append(model.generate(tokens, attention_mask=mask, max_new_tokens=9, do_sample=False))
    assert torch.equal(*made)
    assert made[0].shape == (2, 21)


def test_the_fused_loss_is_the_models_own():
    batch = shard_batch(alone(), *make_tokens(2, 33))
    model = parallelize(make_model("qwen3", "eager"), alone())
    expected = model(**batch).loss
    expected.backward()
    reference = gradients(model)
    model.zero_grad()
    found = CausalLMLoss(model)(**batch)
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert worst_gradient(model, reference) < 1e-5


# ---- refusals


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (dict(output_attentions=True), "never made"),
        (dict(attention_mask=torch.ones(1, 1, 8, 8, dtype=torch.bool)), "only masks of padding"),
    ],
)
def test_what_one_device_refuses(asked, says):
    tokens, _ = make_tokens(1, 8)
    with pytest.raises(KernelError, match=says):
        make_model("llama", "longctx")(input_ids=tokens, **asked)


def test_dropout_and_foreign_masks_are_refused():
    tokens, _ = make_tokens(1, 8)
    config = LlamaConfig(**SIZES, attention_dropout=0.1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="longctx").train()
    with pytest.raises(KernelError, match="attention_dropout = 0"):
        model(input_ids=tokens)
    model.eval()(input_ids=tokens)
    embeds = torch.zeros(1, 8, 32)
    given = dict(config=config, inputs_embeds=embeds, attention_mask=None, past_key_values=None)
    assert create_causal_mask(**given) is None
    with pytest.raises(KernelError, match="blockwise_overlay"):
        create_causal_mask(**given, block_sequence_ids=torch.zeros(1, 8, dtype=torch.int64))
    with pytest.raises(KernelError, match="or_masks"):
        create_causal_mask(**given, or_mask_function=lambda b, h, q, k: k < 2)
    config.attention_chunk_size = 4
    with pytest.raises(KernelError, match="chunked_overlay"):
        create_chunked_causal_mask(**given)


def test_a_call_without_its_other_half_is_refused():
    tokens, _ = make_tokens(1, 8)
    model = make_model("llama", "longctx")
    batch = shard_batch(alone(), tokens)
    with pytest.raises(ShapeError, match="parallelize"):
        model(**batch)
    parallelize(model, alone())
    with pytest.raises(ShapeError, match="shard_batch"):
        model(input_ids=tokens)
    with pytest.raises(ShapeError, match="Documents"):
        model(**batch, attention_mask=torch.tensor([[0] * 3 + [1] * 5]))
    assert model(**batch, attention_mask=torch.ones(1, 8)).logits.shape == (1, 8, 64)


def test_scaled_and_capped_logits_have_no_fused_loss():
    with pytest.raises(KernelError, match=r"model\(\*\*batch\)\.loss"):
        CausalLMLoss(make_model("gemma2-softcap", "eager"))


def test_all_that_keeps_a_model_from_being_cut_is_said_at_once():
    config = LlamaConfig(
        **SIZES, attention_dropout=0.1, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    )
    config.layer_types = ["linear_attention", "full_attention"]
    model = AutoModelForCausalLM.from_config(config)
    plan = ParallelPlan(ring=2, ulysses=3, tp=2)
    mesh = ParallelMesh(plan.resolve(12), 0, device=torch.device("cpu"), groups={}, link=None)
    with pytest.raises(PlanError) as caught:
        parallelize(model, mesh)
    for word in ("tp 2", "linear_attention", "dynamic", "attention_dropout 0.1", "num_heads 4"):
        assert word in str(caught.value)
    assert model.config._attn_implementation != "longctx"
    # Of one rank the greatest position is that of all.
    config.attention_dropout, config.layer_types = 0.0, None
    parallelize(AutoModelForCausalLM.from_config(config), alone())


def test_copies_share_the_mesh():
    model = parallelize(make_model("llama", "eager"), alone())
    batch = shard_batch(alone(), *make_tokens(1, 16))
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**batch).logits, model(**batch).logits)
    assert not any("span" in key for key in model.state_dict())


# ---- shards


@pytest.mark.parametrize("layout", ["zigzag", "contiguous", "auto"])
def test_shards_hold_targets_and_positions_of_their_tokens(layout):
    tokens, _ = make_tokens(1, 21)
    mask = Causal() & Documents((0, 4, 4, 15, 21))
    seen = {}
    for rank in range(2):
        mesh = ParallelMesh(ParallelPlan(ring=2).resolve(2), rank, device=torch.device("cpu"), groups={}, link=None)
        meta = SequenceMeta.of(21, mask=mask, layout=layout, ring_rank=rank, ring_world=2)
        batch = shard_batch(mesh, tokens, None, mask=mask, layout=layout, pad_token_id=63)
        assert "labels" not in batch
        for i, position in enumerate(meta.positions.tolist()):
            seen[position] = int(batch["input_ids"][0, i]), int(batch["position_ids"][0, i])
    starts = [0] * 4 + [4] * 11 + [15] * 6
    assert len(seen) >= 21
    for position, (token, place) in seen.items():
        if position < 21:
            assert (token, place) == (int(tokens[0, position]), position - starts[position])
        else:
            assert token == 63


def parallel_worker(rank: int, names: list[str]) -> dict[str, dict[str, float]]:
    return {name: cut_and_whole(*PARALLEL[name]) for name in names}


def cut_and_whole(degrees: dict[str, int], name: str, seq_len: int, settings: dict) -> dict[str, float]:
    """DDP or FSDP2 over all ranks around a model cut over them, against one process with eager attention and all batches."""
    mesh = ParallelMesh.create(ParallelPlan(**degrees), device="cpu")
    mask = settings.get("mask")
    tokens, labels = make_tokens(2 * mesh.dp.size, seq_len)
    theirs = make_model(name, "eager")
    positions = None
    if isinstance(mask, Documents):
        positions = torch.cat([torch.arange(b - a) for a, b in zip(mask.cu_seqlens, mask.cu_seqlens[1:], strict=False)])
        positions = positions[None].expand(len(tokens), -1)
        mask = Causal() & mask
    expected = theirs(input_ids=tokens, position_ids=positions, labels=labels, use_cache=False).loss
    expected.backward()

    model = parallelize(make_model(name, "eager"), mesh, strategy=settings.get("strategy"))
    if settings.get("checkpointing"):
        model.gradient_checkpointing_enable()
    wrapped = CausalLMLoss(model) if settings.get("fused") else model
    if settings.get("fsdp"):
        everyone = init_device_mesh("cpu", (mesh.world_size,))
        for layer in model.get_decoder().layers:
            fully_shard(layer, mesh=everyone)
        fully_shard(wrapped, mesh=everyone)
    else:
        wrapped = DistributedDataParallel(wrapped)
    mine = slice(2 * mesh.dp.rank, 2 * mesh.dp.rank + 2)
    batch = shard_batch(mesh, tokens[mine], labels[mine], mask=mask, layout=settings.get("layout"))
    out = wrapped(**batch)
    loss = out if settings.get("fused") else out.loss
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    mean /= mesh.world_size
    return {
        "loss": abs(mean.item() / expected.item() - 1),
        "gradient": worst_gradient(model, gradients(theirs)),
    }


DOCS = Documents((0, 6, 9, 27, 30, 37))
PARALLEL = {
    "llama-ring2": ({"ring": 2}, "llama", 32, {}),
    "llama-ring3-odd-length-documents": ({"ring": 3}, "llama", 37, {"mask": DOCS, "layout": "balanced"}),
    "mistral-window-ring2-direct-checkpointing": (
        {"ring": 2},
        "mistral-window",
        32,
        {"strategy": "direct", "checkpointing": True},
    ),
    "qwen2-window-ulysses2-fused": ({"ulysses": 2}, "qwen2-one-layer-windowed", 30, {"fused": True}),
    "llama-ring2-fsdp2": ({"ring": 2}, "llama", 32, {"fused": True, "fsdp": True}),
    "qwen3-ring2-dp2": ({"ring": 2, "dp": 2}, "qwen3", 31, {"fused": True}),
    "gemma2-ring2-ulysses2": ({"ring": 2, "ulysses": 2}, "gemma2-softcap", 33, {"layout": "striped"}),
    "gpt-oss-sinks-ring2": ({"ring": 2}, "gpt-oss-sinks", 28, {}),
}


@pytest.mark.parametrize("world", [2, 3, 4])
def test_a_model_cut_over_ranks_under_ddp_or_fsdp_is_that_of_one_process(world):
    names = [name for name, (degrees, *_) in PARALLEL.items() if math.prod(degrees.values()) == world]
    assert names
    for found in run_distributed(parallel_worker, names, world=world):
        for name in names:
            assert found[name]["loss"] < 1e-5, found
            assert found[name]["gradient"] < 2e-4, found
