"""Masks as transformers describes them, as intervals: of rules, of a batch's tensors, and what is no interval."""

from __future__ import annotations

import pytest
import torch

from longctx.errors import KernelError, ShapeError
from longctx.hf_masks import VisibleKeys, document_mask
from longctx.masks import Documents, Full


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
