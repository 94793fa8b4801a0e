"""Hugging Face's models on this attention: equal to their own, on one process and with sequences cut over two."""

from __future__ import annotations

import pytest
import torch
from hf_cases import (
    LENGTH,
    MODELS,
    gradients,
    make_batch,
    make_model,
    num_targets,
    shard_worker,
    their_gradients,
    trainer_worker,
)
from transformers import BertConfig, BertModel

from longctx.errors import KernelError, ShapeError
from longctx.hf import SharedSequence, shard_batch
from longctx.hf_masks import VisibleKeys, document_mask
from longctx.layout import SequenceMeta
from longctx.masks import Causal, Documents, Full, SlidingWindow
from longctx.parallel.plan import ParallelPlan
from longctx.testing import run_distributed

BATCHES = ("plain", "packed", "left", "right")


def worst(found: dict, expected: dict) -> float:
    """The largest error of any tensor, relative to its own norm."""
    assert set(expected) <= set(found)
    assert abs(found["their_loss"] - expected["their_loss"]) < 1e-5
    return max(
        float((found[name] - value).norm() / max(float(value.norm()), 1e-3))
        for name, value in expected.items()
        if name != "their_loss"
    )


@pytest.fixture(scope="module")
def of_one_process():
    """What transformers' own attention gives; made once for each model and batch."""
    made = {}

    def get(name: str, kind: str) -> dict:
        if (name, kind) not in made:
            made[name, kind] = their_gradients(name, kind)
        return made[name, kind]

    return get


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("name", MODELS)
def test_on_one_process_it_is_their_own_attention(name, kind, of_one_process):
    batch = make_batch(kind)
    assert worst(gradients(make_model(name, "longctx"), batch, num_targets(batch)), of_one_process(name, kind)) < 1e-9


# Every kind of batch and of model, and recomputation, without all their combinations.
SHARDED = [
    ("llama", "plain", False),
    ("llama", "packed", False),
    ("llama", "packed", True),
    ("llama", "left", False),
    ("mistral", "right", True),
    ("qwen3", "packed", False),
    ("gpt-oss", "packed", False),
]


def test_over_two_processes_it_is_one(of_one_process):
    plans = [ParallelPlan(ring=2), ParallelPlan(ulysses=2)]
    results, *_ = run_distributed(shard_worker, plans, SHARDED, world=2)
    for i, found in enumerate(results):
        name, kind, _ = SHARDED[i % len(SHARDED)]
        assert worst(found, of_one_process(name, kind)) < 1e-9, (plans[i // len(SHARDED)], name, kind)
    # Recomputation sends nothing twice.
    assert results[1]["sent"] == results[2]["sent"] > 0


def test_their_trainer_over_two_processes_is_one(tmp_path):
    pytest.importorskip("accelerate")
    (one,) = run_distributed(trainer_worker, ParallelPlan(), str(tmp_path), world=1)
    two, _ = run_distributed(trainer_worker, ParallelPlan(ring=2), str(tmp_path), world=2)
    assert two["log"] == pytest.approx(one["log"], rel=1e-5)
    assert two["eval"] == pytest.approx(one["eval"], rel=1e-5)
    for name, weight in one["weights"].items():
        assert (two["weights"][name] - weight).norm() < 1e-6 * weight.norm(), name


def test_generation_with_a_cache():
    """Two prompts, one padded to the left; greedy words are those of their own attention."""
    tokens = make_batch()["input_ids"][:, :9]
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    options = dict(attention_mask=mask, max_new_tokens=6, do_sample=False)
    theirs, ours = (make_model("mistral", kind).eval() for kind in ("sdpa", "longctx"))
    assert torch.equal(ours.generate(tokens, **options), theirs.generate(tokens, **options))
    with pytest.raises(KernelError, match="the default cache grows"):
        ours.generate(tokens, **options, cache_implementation="static")


def test_attention_in_both_directions():
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=56)
    config = BertConfig(vocab_size=61, **sizes, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)
    batch = make_batch("right")
    outs = []
    for kind in ("sdpa", "longctx"):
        torch.manual_seed(0)
        model = BertModel._from_config(config, attn_implementation=kind).double()
        outs.append(model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state)
    is_token = batch["attention_mask"].bool()
    assert (outs[0] - outs[1])[is_token].abs().max() < 1e-12


def test_boundaries_of_flash_attention():
    """What DataCollatorWithFlattening(return_flash_attn_kwargs=True) makes: equal to position_ids that start anew."""
    model, batch = make_model("mistral", "longctx"), make_batch("packed")
    one = {name: x[:1] for name, x in batch.items()}
    boundaries = torch.tensor([0, 7, 8, LENGTH], dtype=torch.int32)
    by_boundaries = {
        "cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, "max_length_q": 18, "max_length_k": 18
    }  # fmt: skip
    expected = model(**one, use_cache=False).logits
    assert (model(**one, **by_boundaries, use_cache=False).logits - expected).abs().max() < 1e-12
    cut = shard_batch({**one, **by_boundaries}, None)
    assert cut["shared_sequence"].meta.mask == Causal() & Documents((0, 7, 8, LENGTH))
    assert (model(**cut, use_cache=False).logits - expected).abs().max() < 1e-12


def visible(rule, length=12, **options) -> torch.Tensor:
    """The mask that the intervals of a rule make, [length, length]."""
    lo, hi = VisibleKeys(1, length, length, 0, 0, rule, options.get("attention_mask"), "cpu")._intervals()
    keys = torch.arange(length)
    return (keys >= lo[0, :, None]) & (keys < hi[0, :, None])


RULES = {
    "causal": lambda b, h, q, k: k <= q,
    "full": lambda b, h, q, k: q >= 0,
    "window": lambda b, h, q, k: (k <= q) & (k > q - 3),
    "chunks": lambda b, h, q, k: (k <= q) & (k // 5 == q // 5),
    "image": lambda b, h, q, k: (k <= q) | ((k >= 4) & (k < 8) & (q >= 4) & (q < 8)),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_intervals_are_those_of_the_rule(rule):
    row = torch.arange(12)
    assert torch.equal(visible(rule), rule(0, 0, row[:, None], row).expand(12, 12))


@pytest.mark.parametrize(
    "rule",
    [
        lambda b, h, q, k: (k <= q) & (k != 1),
        lambda b, h, q, k: (k < q) | (q == 0),
        lambda b, h, q, k: (k <= q) & ((q - k < 3) | (k == 0)),
    ],
    ids=["gap", "not_itself", "window_and_first"],
)
def test_a_rule_that_is_no_interval_is_refused(rule):
    with pytest.raises(KernelError, match="no one interval"):
        visible(rule)


def test_documents_of_a_batch():
    shape = torch.Size((2, 6))
    starts = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
    assert document_mask(shape) == Full()
    assert document_mask(shape, position_ids=starts) == Documents(((0, 3, 6), (0, 6)))
    assert document_mask(shape, position_ids=starts[:1]) == Documents((0, 3, 6))
    padding = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    assert document_mask(shape, attention_mask=padding) == Documents(((0, 2, 6), (0, 5, 6)))
    with pytest.raises(ShapeError, match="zeros between ones"):
        document_mask(shape, attention_mask=torch.tensor([[1, 1, 0, 0, 1, 1]] * 2))
    with pytest.raises(ShapeError, match="start anew among tokens"):
        document_mask(shape, position_ids=starts, attention_mask=torch.ones(2, 6))
    with pytest.raises(ShapeError, match="must rise from 0 to 6"):
        document_mask(shape, cu_seqlens=torch.tensor([0, 6]))


def test_what_cannot_be_done_is_refused():
    model, batch = make_model("llama", "longctx"), make_batch("right")

    def refused(match: str, error: type = KernelError, **words) -> None:
        with pytest.raises(error, match=match):
            model(**({"input_ids": batch["input_ids"]} | words))

    refused("attention_mask is a tensor", attention_mask=torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool))
    refused("probabilities are never made", output_attentions=True)
    gaps = torch.ones(2, LENGTH)
    gaps[0, 5] = 0
    refused("zeros between ones", ShapeError, attention_mask=gaps)
    whole = SharedSequence(SequenceMeta.of(LENGTH))
    refused("give it to shard_batch", ShapeError, shared_sequence=whole, attention_mask=batch["attention_mask"])
    refused("meta describes 30", ShapeError, shared_sequence=SharedSequence(SequenceMeta.of(30)))
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    model.train()
    refused(r"set config.attention_dropout = 0\.0")


def test_layers_that_look_beyond_a_shard_are_refused():
    shard = SharedSequence(SequenceMeta.of(LENGTH, ring_world=2))
    model = make_model("llama", "longctx")
    for setting in ({"layer_types": ["linear_attention", "full_attention"]}, {"mamba_d_state": 16}):
        model.config.__dict__ |= setting
        with pytest.raises(KernelError, match=r"linear_attention|mamba_d_state"):
            model(make_batch()["input_ids"][:, : LENGTH // 2], shared_sequence=shard, use_cache=False)
        for name in setting:
            del model.config.__dict__[name]


def test_batches_that_cannot_be_cut_are_refused():
    batch = make_batch()
    with pytest.raises(ShapeError, match=r"input_ids is list"):
        shard_batch({"input_ids": [[1, 2]]}, None)
    with pytest.raises(ShapeError, match="pixel_values"):
        shard_batch({**batch, "pixel_values": torch.zeros(1)}, None)
    with pytest.raises(ShapeError, match=r"labels is \[2, 25\]"):
        shard_batch({**batch, "labels": batch["labels"][:, 1:]}, None)


def test_a_mask_of_ones_own():
    cut = shard_batch(make_batch("packed"), None, mask=Causal() & SlidingWindow(4))
    assert cut["shared_sequence"].meta.mask == Causal() & SlidingWindow(4) & Documents(
        ((0, 7, 8, LENGTH), (0, 13, LENGTH))
    )
    assert "labels" not in shard_batch({"input_ids": make_batch()["input_ids"]}, None)
