"""Shape checks name every tensor and axis that disagree; model FLOPs agree with the usual formulas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longctx.errors import ShapeError
from longctx.masks import Causal, Full
from longctx.shapes import ModelShape, check_shapes


@given(sizes=st.tuples(*[st.integers(0, 5)] * 4))
def test_sizes_are_returned_by_axis(sizes):
    b, s, h, d = sizes
    axes = check_shapes(q=(torch.empty(b, s, h, d), "b s h d"), lse=(torch.empty(b, h, s), "b h s"))
    assert axes == {"b": b, "s": s, "h": h, "d": d}


def test_a_number_is_a_size_and_no_axis():
    assert check_shapes(x=(torch.empty(2, 3), "2 s")) == {"s": 3}
    with pytest.raises(ShapeError, match=r"x has shape \[2, 3\], expected 4 where it has 2"):
        check_shapes(x=(torch.empty(2, 3), "4 s"))


def test_a_scalar_has_no_axes():
    assert check_shapes(loss=(torch.tensor(1.0), "")) == {}


def test_wrong_number_of_axes():
    with pytest.raises(ShapeError, match=r"q has shape \[2, 3\], expected 4 axes: 'b s h d'"):
        check_shapes(q=(torch.empty(2, 3), "b s h d"))


def test_an_axis_repeated_in_one_tensor_must_agree():
    with pytest.raises(ShapeError, match="axis 's' is 2 in x but 3 in x"):
        check_shapes(x=(torch.empty(2, 3), "s s"))


def test_every_disagreement_is_in_one_message():
    q, k, v = torch.empty(1, 8, 4, 16), torch.empty(2, 8, 2, 16), torch.empty(1, 9, 2, 16)
    with pytest.raises(ShapeError) as error:
        check_shapes(q=(q, "b sq h d"), k=(k, "b sk hk d"), v=(v, "b sk hk d"))
    message = str(error.value)
    assert "2 problems with the shapes of q [1, 8, 4, 16], k [2, 8, 2, 16], v [1, 9, 2, 16]" in message
    assert "axis 'b' is 1 in q but 2 in k" in message
    assert "axis 'sk' is 8 in k but 9 in v" in message


SHAPE = ModelShape(
    num_layers=3, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=100, num_params=12345
)


@pytest.mark.parametrize("seq_len", [1, 7, 1024])
def test_train_flops_of_full_attention(seq_len):
    # 2 products forward and 4 backward, 2 FLOPs per multiply-add.
    attention = 6 * 2 * SHAPE.num_layers * SHAPE.num_heads * SHAPE.head_dim * seq_len**2
    assert SHAPE.train_flops(seq_len, Full().area(seq_len)) == 6 * SHAPE.num_params * seq_len + attention


def test_train_flops_of_causal_attention_are_half_and_the_diagonal():
    seq_len = 1024
    parameters = 6 * SHAPE.num_params * seq_len
    full = SHAPE.train_flops(seq_len, Full().area(seq_len)) - parameters
    causal = SHAPE.train_flops(seq_len, Causal().area(seq_len)) - parameters
    assert 2 * causal * seq_len == full * (seq_len + 1)
