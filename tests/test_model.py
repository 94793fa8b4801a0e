"""The transformer: equal to Hugging Face's models, to itself on a ring, under recomputation, and under ZeRO-3."""

import pytest
import torch
import torch.nn.functional as F
from model_cases import (
    DOCUMENTS,
    LENGTH,
    SIZES,
    VOCAB,
    Batch,
    CountOps,
    error,
    gradients,
    make_batch,
    ring_worker,
    zero3_worker,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from longctx import model as model_module
from longctx.errors import ConfigError
from longctx.masks import Causal, SlidingWindow
from longctx.model import ModelConfig, Transformer
from longctx.parallel import loss as loss_module
from longctx.parallel.ring import RING_ATTENTION_OP
from longctx.parallel.strategy import DirectStrategy
from longctx.rope import RopeScaling
from longctx.testing import run_distributed

HF_SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=56,
    rms_norm_eps=1e-5,
    max_position_embeddings=128,
    attn_implementation="eager",
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

# name -> (our config, their model class, their config)
FAMILIES = {
    "llama": (
        ModelConfig(
            **SIZES, rope_theta=5e5, rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_max_position=16)
        ),
        LlamaForCausalLM,
        lambda: LlamaConfig(**HF_SIZES, rope_parameters=LLAMA3, tie_word_embeddings=False),
    ),
    "llama-tied": (
        ModelConfig(**SIZES, tie_embeddings=True),
        LlamaForCausalLM,
        lambda: LlamaConfig(**HF_SIZES, tie_word_embeddings=True),
    ),
    "qwen2": (
        ModelConfig(**SIZES, qkv_bias=True),
        Qwen2ForCausalLM,
        lambda: Qwen2Config(**HF_SIZES, tie_word_embeddings=False),
    ),
    "qwen3": (
        ModelConfig(**SIZES, head_dim=12, qk_norm=True),
        Qwen3ForCausalLM,
        lambda: Qwen3Config(**HF_SIZES, head_dim=12, tie_word_embeddings=False),
    ),
    "mistral": (
        ModelConfig(**SIZES, sliding_window=5),
        MistralForCausalLM,
        lambda: MistralConfig(**HF_SIZES, sliding_window=5, tie_word_embeddings=False),
    ),
}


@torch.no_grad()
def randomise(module: torch.nn.Module) -> None:
    """Weights as different from their initial values as training makes them: norms that are not 1, biases that are not 0."""
    g = torch.Generator().manual_seed(11)
    for name, p in module.named_parameters():
        p.copy_(
            torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.3
            + (1.0 if name.endswith("norm.weight") else 0.0)
        )


def logits_of(model: Transformer, batch: Batch) -> torch.Tensor:
    return F.linear(model.hidden(batch.tokens, batch.meta), model.lm_head.weight)


def step(model: torch.nn.Module, loss: torch.Tensor, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {"loss": loss, "logits": logits, **grads}


def theirs(hf: torch.nn.Module, batch: Batch, window: int | None = None) -> dict[str, torch.Tensor]:
    """Loss and gradients of the Hugging Face model; documents as a mask and restarting positions.

    A model with a window applies it by itself only where no mask is given.
    """
    mask, extra = batch.meta.mask, {}
    if mask != Causal():
        starts, _ = mask.key_range(torch.arange(LENGTH), LENGTH)
        visible = (mask if window is None else mask & SlidingWindow(window)).materialize(LENGTH)
        dtype = next(hf.parameters()).dtype
        extra["attention_mask"] = torch.where(visible, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]
        extra["position_ids"] = torch.arange(LENGTH) - starts
    logits = hf(input_ids=batch.tokens, use_cache=False, **extra).logits
    loss = F.cross_entropy(logits.float().flatten(0, 1), batch.labels.flatten(), ignore_index=-100, reduction="sum")
    return step(hf, loss, logits)


def families_with(ours: ModelConfig, cls: type, config) -> tuple[Transformer, torch.nn.Module]:
    hf = cls(config())
    randomise(hf)
    model = Transformer(ours)
    model.load_state_dict(hf.state_dict(), strict=True)
    return model, hf


class TestAgainstHuggingFace:
    @pytest.mark.parametrize("mask", [Causal(), DOCUMENTS & Causal()], ids=["causal", "docs"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_logits_loss_and_gradients(self, family, mask):
        """Relative to ours in float64: theirs is that to fp32 (so both compute the same), and ours no worse than theirs."""
        config = FAMILIES[family][0]
        model, hf = families_with(*FAMILIES[family])
        batch = make_batch(mask)
        reference = theirs(hf, batch, config.sliding_window)
        ours = step(model, model(batch), logits_of(model, batch))
        exact_model = families_with(*FAMILIES[family])[0].double()
        exact = step(exact_model, exact_model(batch), logits_of(exact_model, batch))
        assert ours["loss"].dtype == torch.float32
        assert set(ours) == set(reference)
        for name, value in exact.items():
            # A key bias moves all scores of a row alike: its gradient is rounding noise around 0.
            if name.endswith("k_proj.bias") and value.norm() < 1e-9:
                assert ours[name].norm() < 1e-4
                continue
            assert error(reference[name], value) < 1e-5, name
            assert error(ours[name], value) <= 2 * error(reference[name], value) + 1e-6, name

    @pytest.mark.parametrize("family", ["llama", "qwen3"])
    def test_bf16_is_no_worse_than_theirs(self, family):
        model, hf = families_with(*FAMILIES[family])
        batch = make_batch(DOCUMENTS & Causal())
        model.bfloat16()
        exact_model = families_with(*FAMILIES[family])[0]
        exact_model.load_state_dict(model.state_dict())
        exact_model.double()
        exact = step(exact_model, exact_model(batch), logits_of(exact_model, batch))
        ours = step(model, model(batch), logits_of(model, batch))
        reference = theirs(hf.bfloat16(), batch)
        for name, value in exact.items():
            assert ours[name].dtype == (torch.float32 if name == "loss" else torch.bfloat16)
            assert error(ours[name], value) <= 2 * error(reference[name], value) + 2**-8, name

    @pytest.mark.parametrize("family", FAMILIES)
    def test_state_dicts_load_both_ways(self, family):
        ours, cls, config = FAMILIES[family]
        model, hf = Transformer(ours, seed=5), cls(config())
        hf.load_state_dict(model.state_dict(), strict=True)
        assert {n: p.shape for n, p in hf.state_dict().items()} == {n: p.shape for n, p in model.state_dict().items()}
        assert torch.equal(hf.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)
        assert ours.shape.num_params == sum(p.numel() for p in hf.parameters())


def test_good_configurations_have_no_problems():
    assert all(config.problems() == [] for config, _, _ in FAMILIES.values())


class DenseAttention(torch.nn.Module):
    """By the formula: scores capped, then a softmax that the sinks are part of and whose share of them is dropped."""

    def forward(self, q, k, v, meta, *, sinks):
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
        s = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
        s = 1.5 * torch.tanh(s / 1.5)
        # A mask for each sequence: the documents differ.
        s = s.masked_fill(~meta.mask.materialize(meta.seq_len)[:, None], float("-inf"))
        p = torch.cat([s, sinks[None, :, None, None].expand(*s.shape[:3], 1)], -1).softmax(-1)[..., :-1]
        return torch.einsum("bhij,bjhd->bihd", p, v)


def test_softcap_and_sinks_are_attentions():
    config = ModelConfig(**SIZES, softcap=1.5, sinks=True)
    model, dense = Transformer(config).double(), Transformer(config).double()
    for one in (model, dense):
        randomise(one)
    for layer in dense.model.layers:
        layer.self_attn.attention = DenseAttention()
    batch = make_batch(DOCUMENTS & Causal())
    got, want = gradients(model, batch), gradients(dense, batch)
    assert any(name.endswith("self_attn.sinks") for name in got)
    assert config.shape.num_params == sum(p.numel() for p in model.parameters())
    for name, value in want.items():
        assert value.abs().max() > 0, name
        assert (got[name] - value).abs().max() <= 1e-9 * value.abs().max(), name
    # Without either the loss is another.
    for other in (ModelConfig(**SIZES, sinks=True), ModelConfig(**SIZES, softcap=1.5)):
        plain = Transformer(other).double()
        plain.load_state_dict(model.state_dict(), strict=other.sinks)
        assert abs(float(plain(batch).detach() - model(batch).detach())) > 1e-3


@pytest.mark.parametrize("softcap", [-1.0, float("nan"), float("inf")])
def test_a_softcap_that_is_none_is_refused(softcap):
    with pytest.raises(ConfigError, match=r"model\.softcap = .* must be above 0, or 0 for none"):
        Transformer(ModelConfig(**SIZES, softcap=softcap))


class TestRecomputation:
    @pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
    def test_is_exact_and_runs_attention_once(self, tied):
        config = ModelConfig(**SIZES, qk_norm=True, qkv_bias=True, sliding_window=9, tie_embeddings=tied)
        batch = make_batch(DOCUMENTS & Causal())
        products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        with CountOps(*products) as without:
            plain = gradients(Transformer(config), batch)
        model = Transformer(config, activation_checkpointing=True)
        with CountOps(RING_ATTENTION_OP) as attention, CountOps(*products) as recomputing:
            again = gradients(model, batch)
        assert attention.calls == config.num_layers
        # All of a layer's 7 projections but the last: backward does not need its result.
        assert recomputing.calls - without.calls == 6 * config.num_layers
        for name, value in plain.items():
            assert torch.equal(again[name], value), name

    def test_the_count_would_show_a_second_attention(self, monkeypatch):
        """The broken twin: a policy that does not keep the operator's results."""
        monkeypatch.setattr(model_module, "_KEPT", ())
        config = ModelConfig(**SIZES)
        with CountOps(RING_ATTENTION_OP) as attention:
            gradients(Transformer(config, activation_checkpointing=True), make_batch(Causal()))
        assert attention.calls == 2 * config.num_layers

    @pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
    def test_what_is_kept_per_layer(self, recompute):
        """One layer more saves its input; without recomputation the MLP alone saves 4 tensors of its own width.

        What attention gave is kept besides, by the policy: that costs no more than the input does.
        """

        def kept(num_layers):
            model = Transformer(ModelConfig(**{**SIZES, "num_layers": num_layers}), activation_checkpointing=recompute)
            weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
            total = {}

            def pack(x):
                if x.untyped_storage().data_ptr() not in weights:
                    total[x.untyped_storage().data_ptr()] = (x, x.untyped_storage().nbytes())
                return x

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                loss = model(make_batch(Causal()))
            assert loss.requires_grad
            return sum(size for _, size in total.values())

        per_token = (kept(3) - kept(2)) / (2 * LENGTH * 4)
        e, f = SIZES["hidden_size"], SIZES["intermediate_size"]
        if recompute:
            assert per_token <= e
        else:
            assert per_token >= 4 * f

    def test_evaluation_keeps_nothing(self):
        model = Transformer(ModelConfig(**SIZES), activation_checkpointing=True)
        batch = make_batch(Causal())
        with torch.no_grad():
            loss = model(batch)
        assert not loss.requires_grad
        torch.testing.assert_close(loss, model(batch).detach())


def test_no_tensor_of_all_logits_exists(monkeypatch):
    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, tuple | list) else (() if func.is_view else (result,)):
                self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
            return result

    largest = Largest()
    largest.numel = 0
    monkeypatch.setattr(loss_module, "CHUNK_BYTES_ELSEWHERE", 16 * 1000 * 4)
    config = ModelConfig(vocab_size=1000, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=8)
    batch = make_batch(Causal(), length=256, vocab=1000)
    with largest:
        Transformer(config)(batch).backward()
    # Scores of the plain attention are 2 * 2 * 256 * 256; all logits would be 2 * 256 * 1000.
    assert largest.numel <= 2 * 2 * 256 * 256 < 2 * 256 * 1000


def test_a_ring_computes_what_one_process_computes():
    """3 ranks, so that the order of hops matters. Recomputed layers send no message a second time, wherever what they keep lies."""
    config = ModelConfig(**SIZES, qk_norm=True, sliding_window=11, tie_embeddings=True, softcap=2.0, sinks=True)
    layouts = ["contiguous", "zigzag", "striped"]
    strategies = ["relay", "direct", "gather", DirectStrategy(holds=False, groups=2)]
    whole = gradients(Transformer(config).double(), make_batch(DOCUMENTS & Causal()))
    results = run_distributed(ring_worker, config, layouts, strategies, 3, world=3)[0]
    assert len(results) == 3 * len(layouts) * len(strategies)
    for result in results:
        for name, value in whole.items():
            torch.testing.assert_close(result[name], value, rtol=1e-9, atol=1e-11)


def test_zero3_with_recomputation_and_tied_weights():
    """DeepSpeed's hooks gather every weight when it is used, also in the recomputation and where one serves two modules; of
    the second with activations in the host's memory."""
    configs = [ModelConfig(**SIZES, qk_norm=True, tie_embeddings=tied) for tied in (False, True)]
    env = {"DS_ACCELERATOR": "cpu"}
    results = run_distributed(zero3_worker, configs, world=2, env=env)[0]
    for config, result in zip(configs, results, strict=True):
        whole = gradients(Transformer(config), make_batch(Causal()))
        assert set(result) == set(whole) - {"loss"}
        for name, value in result.items():
            assert error(value, whole[name]) < 1e-5, name


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_fused_is_as_good_as_plain(family):
    """bf16 on a GPU, liger and plain torch, both relative to float64."""
    pytest.importorskip("liger_kernel")
    config = FAMILIES[family][0]
    cpu = make_batch(DOCUMENTS & Causal())
    batch = Batch(cpu.tokens.cuda(), cpu.labels.cuda(), cpu.meta.to("cuda"))
    reference = Transformer(config)
    randomise(reference)
    weights = {name: w.bfloat16() for name, w in reference.state_dict().items()}
    reference.load_state_dict(weights)
    exact = gradients(reference.double(), cpu)
    results = {}
    for fused in ("off", "on"):
        model = Transformer(config, fused=fused, activation_checkpointing=fused == "on").cuda().bfloat16()
        model.load_state_dict(weights)
        results[fused] = gradients(model, batch)
    for name, value in exact.items():
        if not (name.endswith("k_proj.bias") and value.norm() < 1e-9):
            on, off = (error(results[fused][name].cpu(), value) for fused in ("on", "off"))
            assert on <= 2 * off + 2**-8, name


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_cuda_step_never_waits_for_the_device():
    config = ModelConfig(vocab_size=1024, hidden_size=256, num_layers=2, num_heads=4, num_kv_heads=2)
    model = Transformer(config, activation_checkpointing=True).cuda().bfloat16()
    cpu = make_batch(Causal(), length=512, vocab=1024)
    batch = Batch(cpu.tokens.cuda(), cpu.labels.cuda(), cpu.meta.to("cuda"))
    model(batch).backward()  # compiles, and copies the schedule
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(batch).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
