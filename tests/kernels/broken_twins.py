"""Kernels with one mistake each, which the check of `block_cases` must find."""

from __future__ import annotations

import torch

from longctx.kernels import SoftmaxState
from longctx.kernels.reference import ReferenceAttention
from longctx.masks import KeyRange


class ForgetsToRescale(ReferenceAttention):
    """Adds a block's output to the carried one without scaling either to the common sum."""

    def forward(self, q, k, v, key_range, *, scale, state=None, **_):
        block = super().forward(q, k, v, key_range, scale=scale)
        if state is None:
            return block
        state.out += block.out
        state.lse.copy_(torch.logaddexp(state.lse, block.lse))
        return state


class StartsAnew(ReferenceAttention):
    """Drops the state of the earlier blocks."""

    def forward(self, q, k, v, key_range, *, scale, state=None, **_):
        return super().forward(q, k, v, key_range, scale=scale)


class UsesTheBlocksLse(ReferenceAttention):
    """Its backward normalises by the block's own sum instead of the whole row's."""

    def backward(self, dout, q, k, v, lse, delta, key_range, *, scale, **rest):
        local = self.forward(q, k, v, key_range, scale=scale).lse
        super().backward(dout, q, k, v, local, delta, key_range, scale=scale, **rest)


class Overwrites(ReferenceAttention):
    """Its backward writes the gradients instead of adding them."""

    def backward(self, *args, dq_acc, dk_acc, dv_acc, **rest):
        for acc in (dq_acc, dk_acc, dv_acc):
            acc.zero_()
        super().backward(*args, dq_acc=dq_acc, dk_acc=dk_acc, dv_acc=dv_acc, **rest)


class LeavesUnseenRows(ReferenceAttention):
    """Leaves the output of rows that see nothing as the allocator gave it."""

    def forward(self, q, k, v, key_range, *, scale, state=None, **_):
        done = super().forward(q, k, v, key_range, scale=scale, state=state)
        out = torch.empty(done.out.shape, dtype=done.out.dtype)
        seen = (done.lse > -torch.inf).transpose(1, 2)[..., None]
        return SoftmaxState(torch.where(seen, done.out, out), done.lse)


class SeesOneKeyMore(ReferenceAttention):
    """Includes the end of the half-open interval."""

    def forward(self, q, k, v, key_range, *, scale, state=None, **_):
        if key_range.kind == "band":
            key_range = KeyRange("band", key_range.lo, key_range.hi + 1)
        return super().forward(q, k, v, key_range, scale=scale, state=state)


class ForgetsTheSlope(ReferenceAttention):
    """Its backward takes the capped scores for uncapped ones: the derivative of tanh is missing."""

    def backward(self, dout, q, k, v, lse, delta, key_range, *, scale, softcap=0.0, out, dq_acc, dk_acc, dv_acc, **_):
        super().backward(
            dout, q, k, v, lse, delta, key_range, scale=scale, out=out, dq_acc=dq_acc, dk_acc=dk_acc, dv_acc=dv_acc
        )


class ForgetsTheGroup(ReferenceAttention):
    """Gives dk of the first query head of a group only."""

    def backward(self, dout, q, k, v, lse, delta, key_range, *, scale, out, dq_acc, dk_acc, dv_acc, **_):
        group = q.shape[2] // k.shape[2]
        unused = torch.zeros_like(dk_acc)
        args = (key_range,)
        super().backward(
            dout, q, k, v, lse, delta, *args, scale=scale, out=out, dq_acc=dq_acc, dk_acc=unused, dv_acc=dv_acc
        )
        heads = slice(None, None, group)
        super().backward(
            dout[:, :, heads], q[:, :, heads], k, v, lse[:, heads], delta[:, heads], *args, scale=scale, out=out[:, :, heads],
            dq_acc=torch.zeros_like(dq_acc[:, :, heads]), dk_acc=dk_acc, dv_acc=torch.zeros_like(dv_acc),
        )  # fmt: skip
