"""Contenders with a mistake, for the tests of the benchmark."""

from __future__ import annotations

import torch

from longctx.peers import Case, Contender, Ours, Prepared

CPU = torch.device("cpu")
SMALL = Case(batch=2, seq_len=40, heads=4, kv_heads=2, head_dim=16)


class Broken(Contender):
    """The reference with one error put in."""

    name, title = "broken", "broken"

    def __init__(self, spoil):
        self.spoil = spoil

    def prepare(self, case, q, k, v, dout):
        good = Ours("reference").prepare(case, q, k, v, dout)
        results = self.spoil(good.forward(), *good.backward())
        return Prepared(forward=lambda: results[0], backward=lambda: results[1:])
