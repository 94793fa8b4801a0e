"""RoPE: frequencies against transformers, rotation against complex numbers, exactness at a million positions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from longctx.errors import ShapeError
from longctx.rope import KINDS, RopeScaling, apply_rope, rope_cos_sin, rope_frequencies

THETA = 5e5

# name -> (ours, transformers' rope_parameters)
SCALINGS = {
    "linear": (
        RopeScaling(kind="linear", factor=4.0, original_max_position=4096),
        {"rope_type": "linear", "factor": 4.0},
    ),
    "llama3": (
        RopeScaling(kind="llama3", factor=8.0, original_max_position=8192),
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "llama3-factors": (
        RopeScaling(kind="llama3", factor=32.0, original_max_position=2048, low_freq_factor=2.0, high_freq_factor=16.0),
        {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 2.0,
            "high_freq_factor": 16.0,
            "original_max_position_embeddings": 2048,
        },
    ),
    "yarn": (
        RopeScaling(kind="yarn", factor=16.0, original_max_position=4096),
        {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096},
    ),
    "yarn-betas": (
        RopeScaling(
            kind="yarn", factor=40.0, original_max_position=4096, beta_fast=64.0, beta_slow=2.0, truncate=False
        ),
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "beta_fast": 64.0,
            "beta_slow": 2.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    ),
    "yarn-mscale": (
        RopeScaling(kind="yarn", factor=40.0, original_max_position=4096, mscale=1.0, mscale_all_dim=0.707),
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
        },
    ),
    "yarn-attention_factor": (
        RopeScaling(kind="yarn", factor=4.0, original_max_position=32768, attention_factor=1.5),
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5, "original_max_position_embeddings": 32768},
    ),
}


def transformers_frequencies(parameters: dict, head_dim: int, **kwargs) -> tuple[torch.Tensor, float]:
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": THETA, **parameters},
    )
    return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"), **kwargs)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("name", SCALINGS)
def test_scaling_equals_transformers(name, head_dim):
    ours, parameters = SCALINGS[name]
    assert ours.problems() == []
    inv_freq, factor = rope_frequencies(head_dim, THETA, ours)
    expected, expected_factor = transformers_frequencies(parameters, head_dim)
    assert inv_freq.dtype == torch.float64
    # transformers computes in fp32: some roundings of 6e-8 in powers and quotients, and one of 1 - ramp that counts `factor`
    # times where almost nothing is kept.
    torch.testing.assert_close(inv_freq, expected.double(), rtol=1e-6 + 1.2e-7 * ours.factor, atol=0)
    assert factor == pytest.approx(expected_factor, rel=1e-12)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_ntk_equals_transformers_dynamic_at_that_length(head_dim):
    """transformers has the NTK base as a function of the current length: with its factor 1, of length / trained length."""
    inv_freq, factor = rope_frequencies(
        head_dim, THETA, RopeScaling(kind="ntk", factor=8.0, original_max_position=131072)
    )
    expected, _ = transformers_frequencies({"rope_type": "dynamic", "factor": 1.0}, head_dim, seq_len=8 * 131072)
    torch.testing.assert_close(inv_freq, expected.double(), rtol=2e-6, atol=0)
    assert factor == 1.0


def test_ntk_stretches_the_slowest_pair_by_factor_and_leaves_the_fastest():
    plain, _ = rope_frequencies(128, 1e4)
    ntk, _ = rope_frequencies(128, 1e4, RopeScaling(kind="ntk", factor=8.0, original_max_position=4096))
    assert ntk[0] == plain[0] == 1.0
    assert (plain[-1] / ntk[-1]).item() == pytest.approx(8.0, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_factor_one_changes_nothing(kind):
    scaled, attention = rope_frequencies(64, 1e4, RopeScaling(kind=kind, factor=1.0, original_max_position=4096))
    torch.testing.assert_close(scaled, rope_frequencies(64, 1e4)[0], rtol=1e-14, atol=0)
    assert attention == 1.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [2, 4, 256])
@pytest.mark.parametrize("length", [1, 5, 1 << 20])
def test_frequencies_are_finite_and_between_plain_and_stretched(kind, head_dim, length):
    plain, _ = rope_frequencies(head_dim, 1e4)
    scaled, _ = rope_frequencies(head_dim, 1e4, RopeScaling(kind=kind, factor=8.0, original_max_position=length))
    assert bool((scaled <= plain * (1 + 1e-12)).all())
    assert bool((scaled >= plain / 8 * (1 - 1e-12)).all())


def test_angles_are_exact_at_a_million_positions():
    inv_freq, _ = rope_frequencies(128, 1e4)
    positions = torch.tensor([0, 1, 999_983, (1 << 20) - 1, 10_000_019])
    cos, sin = rope_cos_sin(positions, inv_freq)
    for i, position in enumerate(positions.tolist()):
        for j in (0, 1, 7, 63):
            angle = position * 1e4 ** (-2 * j / 128)
            # The float64 angle itself is good to 1e-9 at 10^7; what remains is the rounding of the result to fp32.
            assert cos[i, j].item() == pytest.approx(math.cos(angle), abs=6e-8)
            assert sin[i, j].item() == pytest.approx(math.sin(angle), abs=6e-8)
    # The broken twin: angles in fp32, as most code has them.
    wrong = (positions[:, None].float() * inv_freq.float()).cos()
    assert (wrong - cos).abs().max() > 0.01


def test_each_row_depends_on_its_own_position_only():
    """A shard's cos and sin are rows of the whole sequence's, in every order and across the internal pieces."""
    inv_freq, _ = rope_frequencies(8, 1e4)
    whole, _ = rope_cos_sin(torch.arange(140_000), inv_freq)
    shard = torch.cat([torch.arange(5, 70_000), torch.arange(139_000, 140_000)])
    cos, _ = rope_cos_sin(shard, inv_freq)
    assert torch.equal(cos, whole[shard])


@given(
    head_dim=st.sampled_from([2, 6, 32]),
    length=st.integers(0, 9),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    seed=st.integers(0, 1000),
)
def test_rotation_equals_complex_multiplication(head_dim, length, heads, seed):
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, length, h, head_dim, generator=g, dtype=torch.float64) for h in heads)
    positions = torch.randint(0, 10**6, (length,), generator=g)
    inv_freq, _ = rope_frequencies(head_dim, 1e4)
    cos, sin = rope_cos_sin(positions, inv_freq, dtype=torch.float64)
    turned = apply_rope(q, k, cos, sin)
    turn = torch.polar(torch.ones_like(cos), positions[:, None].double() * inv_freq)[:, None]
    for x, y in zip((q, k), turned, strict=True):
        z = torch.complex(*x.chunk(2, dim=-1)) * turn
        torch.testing.assert_close(y, torch.cat([z.real, z.imag], -1), rtol=1e-12, atol=1e-12)
        assert y.dtype == x.dtype


def test_scores_depend_on_distance_only():
    """What makes global positions in packed documents as good as positions that restart."""
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 64, generator=g, dtype=torch.float64) for _ in range(2))
    inv_freq, _ = rope_frequencies(64, 1e4)

    def score(q_pos, k_pos):
        turned = [
            apply_rope(x, x, *rope_cos_sin(torch.tensor([p]), inv_freq, dtype=torch.float64))[0]
            for x, p in ((q, q_pos), (k, k_pos))
        ]
        return (turned[0] * turned[1]).sum().item()

    assert score(1_000_007, 1_000_000) == pytest.approx(score(7, 0), abs=1e-8)
    assert abs(score(8, 0) - score(7, 0)) > 1e-3


def test_half_inputs_keep_their_dtype_and_are_rotated_in_fp32():
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, 64, 2, 64, generator=g).bfloat16()
    cos, sin = rope_cos_sin(torch.arange(64) + 100_000, rope_frequencies(64, 1e4)[0])
    turned, _ = apply_rope(q, q, cos, sin)
    exact, _ = apply_rope(q.double(), q.double(), cos.double(), sin.double())
    assert turned.dtype == torch.bfloat16
    # One rounding to bf16 and nothing else.
    assert torch.equal(turned, exact.float().bfloat16()) or (turned - exact).abs().max() <= exact.abs().max() * 2**-8


PROBLEMS = {
    "kind": (dict(kind="yran"), "did you mean 'yarn'"),
    "factor-below-1": (dict(factor=0.5), "factor = 0.5"),
    "factor-nan": (dict(factor=float("nan")), "factor = nan"),
    "length-0": (dict(original_max_position=0), "original_max_position = 0"),
    "of-another-kind": (dict(kind="linear", beta_fast=16.0), "no effect with kind 'linear'"),
    "low-above-high": (dict(kind="llama3", low_freq_factor=4.0, high_freq_factor=1.0), "0 < low < high"),
    "slow-above-fast": (dict(beta_slow=64.0), "0 < slow < fast"),
    "one-mscale": (dict(mscale=1.0), "together or not at all"),
    "negative-attention": (dict(attention_factor=-1.0), "attention_factor = -1.0"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_bad_settings_are_named(name):
    change, expected = PROBLEMS[name]
    problems = RopeScaling(**{"kind": "yarn", "factor": 4.0, "original_max_position": 4096, **change}).problems()
    assert len(problems) == 1
    assert expected in f"{problems[0].what} {problems[0].hint}"


def test_odd_head_dims_and_wrong_shapes_are_refused():
    with pytest.raises(ShapeError, match="head_dim = 7"):
        rope_frequencies(7, 1e4)
    cos, sin = rope_cos_sin(torch.arange(4), rope_frequencies(8, 1e4)[0])
    with pytest.raises(ShapeError, match="4 columns"):
        apply_rope(torch.zeros(1, 4, 2, 16), torch.zeros(1, 4, 1, 16), cos, sin)
    with pytest.raises(ShapeError, match="axis 's'"):
        apply_rope(torch.zeros(1, 3, 2, 8), torch.zeros(1, 3, 1, 8), cos, sin)
