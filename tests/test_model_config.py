"""What a transformer is told that it cannot be, or cannot read."""

import pytest
from model_cases import SIZES, VOCAB, Batch, make_batch

from longctx.errors import ConfigError, DataError, ShapeError
from longctx.masks import Causal
from longctx.model import ModelConfig, Transformer
from longctx.rope import RopeScaling


class TestBadInput:
    def test_all_problems_of_a_config_are_in_one_message(self):
        config = ModelConfig(
            hidden_size=100,
            num_heads=6,
            num_kv_heads=4,
            rope_scaling=RopeScaling(kind="yarn", factor=0.5, original_max_position=4096),
        )
        with pytest.raises(ConfigError) as caught:
            Transformer(config)
        message = str(caught.value)
        assert message.startswith("3 problems with the model")
        for expected in ("100 / num_heads 6 = 16.67", "num_kv_heads that work: 1, 2, 3, 6", "factor = 0.5"):
            assert expected in message

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            (dict(num_layers=0), "num_layers = 0"),
            (dict(sliding_window=0), "sliding_window = 0"),
            (dict(rope_theta=0.5), "rope_theta = 0.5"),
            (dict(norm_eps=0.0), "norm_eps = 0.0"),
            (dict(head_dim=33), "head_dim = 33 is odd"),
            (dict(hidden_size=60, num_heads=4), "head_dim = 15 is odd"),
        ],
        ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
    )
    def test_each_problem_is_named(self, change, expected):
        problems = ModelConfig(**change).problems()
        assert len(problems) == 1
        assert expected in problems[0].what

    def test_tokens_outside_the_vocabulary(self):
        model = Transformer(ModelConfig(**SIZES))
        batch = make_batch(Causal())
        batch.tokens[1, 5] = VOCAB
        with pytest.raises(DataError, match=rf"token {VOCAB} at \[1, 5\] is outside the vocabulary of {VOCAB}"):
            model(batch)

    def test_a_shard_of_another_length(self):
        model = Transformer(ModelConfig(**SIZES))
        batch = make_batch(Causal())
        with pytest.raises(ShapeError, match="'s'"):
            model(Batch(batch.tokens[:, 1:], batch.labels[:, 1:], batch.meta))
        with pytest.raises(ShapeError, match="'s'"):
            model(Batch(batch.tokens, batch.labels[:, 1:], batch.meta))

    def test_fused_on_without_liger(self, monkeypatch):
        from longctx.kernels import fused

        monkeypatch.setattr(fused, "liger_missing", lambda: "liger-kernel is not installed")
        with pytest.raises(ConfigError, match=r"longctx\[gpu\]"):
            Transformer(ModelConfig(**SIZES), fused="on")
