"""Models of transformers with our attention equal themselves with their own: on one device, and cut over ranks."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.distributed as dist
from hf_cases import CONFIGS, SIZES, gradients, make_batch, make_model, worst_gradient
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, LlamaConfig, ModernBertConfig, ModernBertModel, Qwen3Config
from transformers.masking_utils import create_causal_mask, create_chunked_causal_mask

from longctx import Causal, Documents, Full, ParallelMesh, ParallelPlan
from longctx.errors import KernelError, PlanError, ShapeError
from longctx.hf_masks import VisibleKeys
from longctx.huggingface import CausalLMLoss, gradient_checkpointing_kwargs, parallelize, shard_batch
from longctx.testing import run_distributed

ALONE = ParallelPlan()


def alone() -> ParallelMesh:
    return ParallelMesh.create(ALONE, device="cpu")


def both(name: str):
    return make_model(name, "eager"), make_model(name, "longctx")


# ---- one device


@pytest.mark.parametrize("kind", ["plain", "packed", "left", "right"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_are_those_of_eager_attention(name, kind):
    if (name, kind) == ("gpt-oss-sinks", "packed"):
        pytest.skip("eager attention of this model does not look at position_ids")
    batch = make_batch(kind, 2, 29)
    is_token = batch.get("attention_mask", torch.ones(2, 29)).bool()
    theirs, ours = both(name)
    logits = [model(**batch, use_cache=False).logits[is_token] for model in (theirs, ours)]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-6, atol=1e-6)
    weight = torch.randn(logits[0].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for found in logits:
        (found * weight).sum().backward()
    assert worst_gradient(ours, gradients(theirs)) < 1e-5


def test_boundaries_of_flash_attention():
    """What DataCollatorWithFlattening(return_flash_attn_kwargs=True) makes."""
    for name in ("llama", "gpt-oss-sinks"):
        model, batch = make_model(name, "longctx"), make_batch("packed", 1, 26)
        starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
        boundaries = torch.tensor([*starts, 26], dtype=torch.int32)
        said = {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, "max_length_q": 26, "max_length_k": 26}
        expected = model(**batch, use_cache=False).logits
        torch.testing.assert_close(model(**batch, **said, use_cache=False).logits, expected, rtol=1e-9, atol=1e-9)
        del batch["position_ids"]
        found = model(**batch, **said, use_cache=False).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # RoPE at other places, made in fp32
        cut = parallelize(model, alone())(**shard_batch(batch | said, alone())).logits
        torch.testing.assert_close(cut, found, rtol=1e-9, atol=1e-9)


def test_positions_that_are_filled_anew_are_looked_at_anew():
    ours = make_model("llama", "longctx")
    tokens = make_batch("plain", 1, 12)["input_ids"]
    positions = torch.arange(12)[None]
    whole = ours(input_ids=tokens, position_ids=positions, use_cache=False).logits
    positions[:, 6:] -= 6
    halves = ours(input_ids=tokens, position_ids=positions, use_cache=False).logits
    assert torch.equal(whole[:, :6], halves[:, :6])
    assert not torch.allclose(whole[:, 6:], halves[:, 6:], atol=1e-3)


def test_a_model_that_looks_both_ways():
    sizes = {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "bos_token_id", "eos_token_id")}
    config = ModernBertConfig(**sizes, local_attention=8, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2)
    tokens = make_batch("plain", 2, 27)["input_ids"]
    outs = []
    for implementation in ("eager", "longctx"):
        torch.manual_seed(0)
        model = ModernBertModel._from_config(config, attn_implementation=implementation).eval()
        outs.append(model(input_ids=tokens).last_hidden_state)
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2-softcap", "gpt-oss-sinks"])
def test_generation_with_a_cache(name):
    """Two prompts, one padded on the left; greedy words are those of eager attention."""
    tokens = make_batch("plain", 2, 12)["input_ids"]
    mask = torch.ones_like(tokens)
    tokens[1, :4], mask[1, :4] = 0, 0
    made = []
    for model in both(name):
        model.eval()
        made.append(model.generate(tokens, attention_mask=mask, max_new_tokens=9, do_sample=False))
    assert torch.equal(*made)
    assert made[0].shape == (2, 21)
    with pytest.raises(KernelError, match="the default cache grows"):
        model.generate(tokens, attention_mask=mask, max_new_tokens=2, cache_implementation="static")


def test_the_fused_loss_is_the_models_own():
    batch = shard_batch(make_batch("plain", 2, 33), alone())
    model = parallelize(make_model("qwen3", "eager"), alone())
    expected = model(**batch).loss
    expected.backward()
    reference = gradients(model)
    model.zero_grad()
    found = CausalLMLoss(model)(**batch)
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert worst_gradient(model, reference) < 1e-5  # theirs rounds logits to fp32


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["packed", "left"])
def test_in_half_precision_it_is_as_near_to_fp32_as_torchs_attention(kind):
    """Qwen3's heads of 128, in bf16, at a length of many tiles."""
    batch = {key: x.cuda() for key, x in make_batch(kind, 2, 1500).items() if key != "labels"}
    is_token = batch.get("attention_mask", torch.ones(2, 1500, device="cuda")).bool()
    config = Qwen3Config(**SIZES | dict(hidden_size=256, max_position_embeddings=2048), head_dim=128)
    logits = {}
    for implementation, dtype in (("sdpa", torch.float32), ("sdpa", torch.bfloat16), ("longctx", torch.bfloat16)):
        torch.manual_seed(2)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).to("cuda", dtype).eval()
        with torch.no_grad():
            logits[implementation, dtype] = model(**batch, use_cache=False).logits[is_token].float()
    exact, theirs, ours = logits.values()
    assert (ours - exact).norm() < 1.1 * (theirs - exact).norm()


# ---- refusals


def test_what_cannot_be_done_is_refused():
    model, tokens = make_model("llama", "longctx"), make_batch("plain", 1, 8)["input_ids"]

    def refused(match: str, error: type = KernelError, **words) -> None:
        with pytest.raises(error, match=match):
            model(input_ids=tokens, **words)

    refused("attention_mask is a tensor", attention_mask=torch.ones(1, 1, 8, 8, dtype=torch.bool))
    refused("probabilities are never made", output_attentions=True)
    boundaries, gaps = torch.tensor([0, 3, 8], dtype=torch.int32), torch.tensor([[0] * 2 + [1] * 6])
    refused("leave out one of them", ShapeError, attention_mask=gaps, cu_seq_lens_q=boundaries)
    refused("zeros between ones", ShapeError, attention_mask=torch.tensor([[1, 1, 0, 0, 1, 1, 1, 1]]))
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    refused(r"attention_dropout = 0\.0")
    model.eval()(input_ids=tokens)


def test_masks_that_transformers_makes_are_read_as_they_are():
    config = LlamaConfig(**SIZES, attn_implementation="longctx")
    config.attention_chunk_size = 4
    given = dict(config=config, inputs_embeds=torch.zeros(1, 8, 32), attention_mask=None, past_key_values=None)
    chunks = create_chunked_causal_mask(**given).hops(8, 8)
    expected = VisibleKeys(1, 8, 8, 0, 0, lambda b, h, q, k: (k <= q) & (k // 4 == q // 4), None, "cpu").hops(8, 8)
    assert all(torch.equal(a, b) for a, b in zip(chunks, expected, strict=True))
    with pytest.raises(KernelError, match="no one interval"):
        create_causal_mask(**given, or_mask_function=lambda b, h, q, k: (k < 2) & (q > 4) | (k == 7)).hops(8, 8)


def test_a_call_without_its_other_half_is_refused():
    model, batch = make_model("llama", "longctx"), make_batch("plain", 1, 8)
    tokens, cut = batch["input_ids"], shard_batch(batch, alone())
    with pytest.raises(ShapeError, match="parallelize"):
        model(**cut)
    parallelize(model, alone())
    with pytest.raises(ShapeError, match="shard_batch"):
        model(input_ids=tokens)
    with pytest.raises(ShapeError, match="give it to shard_batch"):
        model(**cut, attention_mask=torch.tensor([[0] * 3 + [1] * 5]))
    with pytest.raises(ShapeError, match="cu_seq_lens_q came beside a sequence_meta"):
        model(**cut, cu_seq_lens_q=torch.tensor([0, 3, 8], dtype=torch.int32))
    with pytest.raises(ShapeError, match="a cache cannot span ranks"):
        model(**cut | {"use_cache": True, "past_key_values": model(**cut | {"use_cache": True}).past_key_values})
    assert model(**cut, attention_mask=torch.ones(1, 8)).logits.shape == (1, 8, 64)


def test_a_model_that_looks_both_ways_is_not_cut_by_a_causal_mask():
    config = LlamaConfig(**SIZES)
    config.is_causal = False
    model = parallelize(AutoModelForCausalLM.from_config(config), alone())
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    batch = make_batch("plain", 1, 8)
    with pytest.raises(ShapeError, match=r"mask=Full\(\)"):
        model(**shard_batch(batch, alone()))
    model(**shard_batch(batch, alone(), mask=Full()))


def test_batches_that_cannot_be_cut_are_refused():
    batch = make_batch("plain", 2, 8)
    with pytest.raises(ShapeError, match="input_ids is list"):
        shard_batch({"input_ids": [[1, 2]]}, alone())
    with pytest.raises(ShapeError, match="pixel_values"):
        shard_batch({**batch, "pixel_values": torch.zeros(1)}, alone())
    with pytest.raises(ShapeError, match=r"labels is \[2, 7\]"):
        shard_batch({**batch, "labels": batch["labels"][:, 1:]}, alone())


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
    batch = shard_batch(make_batch("plain", 1, 16), alone())
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**batch).logits, model(**batch).logits)
    assert not any("span" in key for key in model.state_dict())


# ---- shards


@pytest.mark.parametrize("layout", ["zigzag", "contiguous", "auto"])
def test_shards_hold_targets_and_positions_of_their_tokens(layout):
    tokens = make_batch("plain", 1, 21)["input_ids"]
    mask = Causal() & Documents((0, 4, 4, 15, 21))
    seen = {}
    for rank in range(2):
        mesh = ParallelMesh(ParallelPlan(ring=2).resolve(2), rank, device=torch.device("cpu"), groups={}, link=None)
        batch = shard_batch({"input_ids": tokens}, mesh, mask=mask, layout=layout)
        assert "labels" not in batch
        for i, position in enumerate(batch["sequence_meta"].positions.tolist()):
            seen[position] = int(batch["input_ids"][0, i]), int(batch["position_ids"][0, i])
    starts = [0] * 4 + [4] * 11 + [15] * 6
    assert len(seen) >= 21
    for position, (token, place) in seen.items():
        if position < 21:
            assert (token, place) == (int(tokens[0, position]), position - starts[position])
        else:
            assert token == 0


def parallel_worker(rank: int, names: list[str]) -> dict[str, dict[str, float]]:
    return {name: cut_and_whole(*PARALLEL[name]) for name in names}


def cut_and_whole(degrees: dict[str, int], name: str, seq_len: int, settings: dict) -> dict[str, float]:
    """DDP or FSDP2 over all ranks around a model cut over them, against one process with eager attention and all batches."""
    mesh = ParallelMesh.create(ParallelPlan(**degrees), device="cpu")
    whole = make_batch(settings.get("kind", "plain"), 2 * mesh.dp.size, seq_len)
    theirs = make_model(name, "eager")
    expected = theirs(**whole, use_cache=False).loss
    expected.backward()

    model = parallelize(make_model(name, "eager"), mesh, strategy=settings.get("strategy"))
    if settings.get("checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=gradient_checkpointing_kwargs())
    wrapped = CausalLMLoss(model) if settings.get("fused") else model
    if settings.get("fsdp"):
        everyone = init_device_mesh("cpu", (mesh.world_size,))
        for layer in model.get_decoder().layers:
            fully_shard(layer, mesh=everyone)
        fully_shard(wrapped, mesh=everyone)
    else:
        wrapped = DistributedDataParallel(wrapped)
    mine = slice(2 * mesh.dp.rank, 2 * mesh.dp.rank + 2)
    batch = shard_batch({key: x[mine] for key, x in whole.items()}, mesh, layout=settings.get("layout"))
    out = wrapped(**batch)
    loss = out if settings.get("fused") else out.loss
    sent = mesh.exchange.bytes_sent
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    mean /= mesh.world_size
    return {
        "loss": abs(mean.item() / expected.item() - 1),
        "gradient": worst_gradient(model, gradients(theirs)),
        "backward_over_forward": (mesh.exchange.bytes_sent - sent) / max(sent, 1),
    }


PARALLEL = {
    "llama-ring2": ({"ring": 2}, "llama", 32, {"kind": "right"}),
    "llama-ring2-checkpointing": ({"ring": 2}, "llama", 32, {"kind": "right", "checkpointing": True}),
    "mistral-window-ring2-direct-packed": ({"ring": 2}, "mistral-window", 31, {"strategy": "direct", "kind": "packed"}),
    "qwen2-window-ulysses2-fused": ({"ulysses": 2}, "qwen2-one-layer-windowed", 30, {"fused": True, "kind": "right"}),
    "gpt-oss-sinks-ring2": ({"ring": 2}, "gpt-oss-sinks", 28, {}),
    "llama-ring2-fsdp2": ({"ring": 2}, "llama", 32, {"fused": True, "fsdp": True}),
    "llama-ring3-odd-length-packed": ({"ring": 3}, "llama", 37, {"kind": "packed", "layout": "balanced"}),
    "qwen3-ring2-dp2": ({"ring": 2, "dp": 2}, "qwen3", 31, {"fused": True}),
    "gemma2-ring2-ulysses2": ({"ring": 2, "ulysses": 2}, "gemma2-softcap", 33, {"layout": "striped"}),
}


@pytest.mark.parametrize("world", [2, 3, 4])
def test_a_model_cut_over_ranks_under_ddp_or_fsdp_is_that_of_one_process(world):
    names = [name for name, (degrees, *_) in PARALLEL.items() if math.prod(degrees.values()) == world]
    assert names
    for found in run_distributed(parallel_worker, names, world=world):
        for name in names:
            assert found[name]["loss"] < 1e-5, found
            assert found[name]["gradient"] < 1e-5, found
        # Layers are computed again, messages are not sent again.
        if world == 2:
            once, again = (
                found[name]["backward_over_forward"] for name in ("llama-ring2", "llama-ring2-checkpointing")
            )
            assert once == again > 0
