"""Weights to start from: the same on every device and however a model is made."""

import pytest
import torch
from model_cases import SIZES, VOCAB, make_batch

from longctx.masks import Causal
from longctx.model import ModelConfig, Transformer


class TestInitialWeights:
    CONFIG = ModelConfig(**SIZES, qkv_bias=True, qk_norm=True)

    def test_depend_on_the_seed_alone(self):
        first = Transformer(self.CONFIG, seed=1).state_dict()
        torch.randn(17)  # another state of the global generator
        torch.manual_seed(99)
        again = Transformer(self.CONFIG, seed=1, activation_checkpointing=True).state_dict()
        other = Transformer(self.CONFIG, seed=2).state_dict()
        for name, value in first.items():
            assert torch.equal(value, again[name])
            is_constant = name.endswith(("norm.weight", "bias"))
            assert torch.equal(value, other[name]) == is_constant, name

    def test_leave_the_global_generator_alone(self):
        torch.manual_seed(7)
        expected = torch.randn(3)
        torch.manual_seed(7)
        Transformer(self.CONFIG)
        assert torch.equal(torch.randn(3), expected)

    def test_have_the_spread_that_was_asked_for(self):
        config = ModelConfig(vocab_size=500, hidden_size=256, num_layers=8, init_std=0.03)
        weights = Transformer(config).state_dict()
        layer = "model.layers.3"
        for name, std in {
            "model.embed_tokens.weight": 0.03,
            "lm_head.weight": 0.03,
            f"{layer}.self_attn.q_proj.weight": 0.03,
            f"{layer}.mlp.down_proj.weight": 0.03 / 4,
            f"{layer}.self_attn.o_proj.weight": 0.03 / 4,
        }.items():
            assert weights[name].std().item() == pytest.approx(std, rel=0.02), name
            assert abs(weights[name].mean().item()) < std * 0.02
        # No two parameters get the same numbers.
        firsts = [round(w.flatten()[0].item(), 12) for n, w in weights.items() if not n.endswith("norm.weight")]
        assert len(set(firsts)) == len(firsts)

    def test_initial_loss_is_that_of_a_uniform_guess(self):
        batch = make_batch(Causal())
        targets = (batch.labels >= 0).sum().item()
        assert Transformer(self.CONFIG)(batch).item() / targets == pytest.approx(
            torch.tensor(VOCAB).log().item(), rel=0.02
        )

    def test_meta_device_costs_nothing(self):
        config = ModelConfig(vocab_size=128_256, hidden_size=2048, num_layers=16, num_heads=32, num_kv_heads=8)
        with torch.device("meta"):
            model = Transformer(config)
        assert sum(p.numel() for p in model.parameters()) == config.shape.num_params
