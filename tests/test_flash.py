"""flash-attention's interface against dense float64 attention, aligned to the bottom right; and what it refuses."""

from __future__ import annotations

import inspect
import itertools
import math

import pytest
import torch

from longctx import functional
from longctx.errors import KernelError, ShapeError
from longctx.flash import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
)

BOUND = 1e-12
LENGTHS = [(7, 7), (7, 12), (12, 7), (1, 9), (9, 1), (300, 290)]
WINDOWS = [(-1, -1), (3, 2), (0, 0), (2, -1), (-1, 1), (1000, 1000)]


def draw(*shape: int, seed: int = 0, dtype=torch.float64, device="cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()


def visible(sq: int, sk: int, causal: bool, window: tuple[int, int]) -> torch.Tensor:
    """By flash-attention's rule, pair by pair."""
    left, right = window[0], 0 if causal else window[1]
    place = torch.arange(sq)[:, None] + sk - sq
    key = torch.arange(sk)[None]
    seen = torch.ones(sq, sk, dtype=torch.bool)
    if left >= 0:
        seen &= key >= place - left
    if right >= 0:
        seen &= key <= place + right
    return seen


def dense(q, k, v, seen, scale=None, softcap=0.0):
    """out "b sq h d" and lse "b h sq" by definition."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    s = torch.einsum("bihd,bjhd->bhij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    s = softcap * torch.tanh(s / softcap) if softcap else s
    seen = seen.to(q.device)
    some = seen.any(-1)
    p = torch.where(seen, s, torch.where(some[:, None], -math.inf, 0.0)).softmax(-1) * seen
    lse = torch.where(seen, s, -math.inf).masked_fill(~some[:, None], 0.0).logsumexp(-1).masked_fill(~some, -math.inf)
    return torch.einsum("bhij,bjhd->bihd", p.to(v.dtype), v), lse


def agree(got, want, tensors, bound=BOUND):
    """out, lse and the gradients through both agree."""
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert torch.equal(a == -math.inf, b == -math.inf)
        assert (a - b).masked_fill(b == -math.inf, 0.0).abs().max() <= bound
    weights = [torch.cos(torch.arange(t.numel(), dtype=t.dtype)).view_as(t) for t in want]

    def total(results):
        return sum(
            (torch.where(b == -math.inf, 0.0, a) * w).sum() for a, b, w in zip(results, want, weights, strict=True)
        )

    for a, b in zip(torch.autograd.grad(total(got), tensors), torch.autograd.grad(total(want), tensors), strict=True):
        assert (a - b).abs().max() <= bound


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["plain", "causal"])
@pytest.mark.parametrize(("sq", "sk"), LENGTHS)
def test_flash_attn_func(sq, sk, causal, window):
    q, k, v = draw(2, sq, 4, 8), draw(2, sk, 2, 8, seed=1), draw(2, sk, 2, 8, seed=2)
    out, lse, unused = flash_attn_func(q, k, v, 0.0, None, causal, window, return_attn_probs=True)
    assert unused.numel() == 0
    agree((out, lse), dense(q, k, v, visible(sq, sk, causal, window)), (q, k, v))
    assert torch.equal(flash_attn_func(q, k, v, causal=causal, window_size=window), out)


def test_scale_and_softcap():
    q, k, v = draw(1, 9, 4, 8), draw(1, 14, 2, 8, seed=1), draw(1, 14, 2, 8, seed=2)
    got = flash_attn_func(q, k, v, softmax_scale=0.9, causal=True, softcap=1.5, return_attn_probs=True)[:2]
    agree(got, dense(q, k, v, visible(9, 14, True, (-1, -1)), 0.9, 1.5), (q, k, v))


def test_packed_functions_are_the_same():
    qkv, options = draw(2, 9, 3, 4, 8), {"causal": True, "window_size": (4, 0), "softcap": 2.0}
    expected = flash_attn_func(*qkv.unbind(2), **options)
    assert torch.equal(flash_attn_qkvpacked_func(qkv, **options), expected)
    q, kv = draw(2, 5, 4, 8), draw(2, 9, 2, 2, 8)
    got = flash_attn_kvpacked_func(q, kv, return_attn_probs=True, **options)
    expected = flash_attn_func(q, *kv.unbind(2), return_attn_probs=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert torch.autograd.grad(got[0].sum(), kv)[0].abs().sum() > 0


def test_no_keys_and_gaps_along_the_head_dim():
    q, empty = draw(2, 3, 4, 8), draw(2, 0, 2, 8)
    out, lse, _ = flash_attn_func(q, empty, empty, causal=True, return_attn_probs=True)
    assert not out.any()
    assert bool((lse == -math.inf).all())
    k = draw(2, 3, 4, 8)
    gaps = k.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(flash_attn_func(q, gaps, gaps), flash_attn_func(q, k, k))


# Lengths in q and in k: both, either or neither empty; longer in q; longer in k.
DOCUMENTS = [
    [(5, 5), (1, 1), (9, 9)],
    [(5, 9), (0, 3), (7, 4), (3, 0), (0, 0), (1, 6)],
    [(0, 0), (4, 4)],
    [(6, 11)],
    [(2, 0), (3, 0)],
]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["plain", "causal"])
@pytest.mark.parametrize("documents", DOCUMENTS, ids=str)
def test_flash_attn_varlen_func(documents, causal, window):
    cu_q, cu_k = ([0, *itertools.accumulate(n)] for n in zip(*documents, strict=True))
    q, k, v = draw(cu_q[-1], 4, 8), draw(cu_k[-1], 2, 8, seed=1), draw(cu_k[-1], 2, 8, seed=2)
    seen = torch.zeros(cu_q[-1], cu_k[-1], dtype=torch.bool)
    for (lq, lk), i, j in zip(documents, cu_q, cu_k, strict=False):
        seen[i : i + lq, j : j + lk] = visible(lq, lk, causal, window)
    if not cu_k[-1]:
        want = torch.zeros_like(q), torch.full((4, cu_q[-1]), -math.inf, dtype=q.dtype)
    else:
        out, lse = dense(q[None], k[None], v[None], seen, softcap=3.0)
        want = out[0], lse[0]
    boundaries = (torch.tensor(cu, dtype=torch.int32) for cu in (cu_q, cu_k))
    longest = (max(n) for n in zip(*documents, strict=True))
    out, lse, unused = flash_attn_varlen_func(
        q, k, v, *boundaries, *longest, causal=causal, window_size=window, softcap=3.0, return_attn_probs=True
    )
    assert unused.numel() == 0
    assert lse.shape == (4, cu_q[-1])
    if cu_k[-1]:
        agree((out, lse), want, (q, k, v))
    else:
        assert torch.equal(out, want[0])
        assert torch.equal(lse, want[1])


def test_boundaries_are_read_at_every_call():
    """A buffer that is filled anew is the same tensor: results must follow its content."""
    q = draw(8, 2, 8)
    cu = torch.tensor([0, 3, 8], dtype=torch.int32)
    first = flash_attn_varlen_func(q, q, q, cu, cu, 8, 8)
    cu[1] = 6
    second = flash_attn_varlen_func(q, q, q, cu, cu, 8, 8)
    fresh = cu.clone()
    assert not torch.equal(first, second)
    assert torch.equal(second, flash_attn_varlen_func(q, q, q, fresh, fresh, 8, 8))


def test_what_is_not_supported_is_refused():
    q = draw(2, 4, 2, 8)
    for options, match in (
        ({"dropout_p": 0.1}, "no dropout"),
        ({"alibi_slopes": torch.ones(2)}, "ALiBi"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"softcap": math.nan}, "softcap is nan"),
        ({"kernel": "cudnn", "softcap": 2.0}, "cudnn"),
        ({"kernel": "cudnn", "deterministic": True}, "backward of 'cudnn' is not"),
        ({"kernel": "flash4", "deterministic": True}, "backward of 'flash4' is not"),
    ):
        with pytest.raises(KernelError, match=match):
            flash_attn_func(q, q, q, **options)
    with pytest.raises(ShapeError, match="nothing to attend to"):
        flash_attn_func(q[:0], q[:0], q[:0])
    assert torch.equal(flash_attn_func(q, q, q, deterministic=True), flash_attn_func(q, q, q))


def varlen(cu_q, cu_k, *longest, dtype=torch.int32, **options):
    q = draw(8, 2, 8)
    boundaries = (torch.tensor(cu, dtype=dtype) for cu in (cu_q, cu_k))
    return flash_attn_varlen_func(q, q, q, *boundaries, *(longest or (8, 8)), **options)


def test_wrong_boundaries_are_refused():
    good = [0, 3, 8]
    for cu_q, cu_k, match in (
        ([0, 3, 7], good, "cu_seqlens_q .* end at 8, the rows of q"),
        (good, [1, 3, 8], "cu_seqlens_k .* must start at 0"),
        (good, [0, 9, 8], "never decrease"),
        (good, [0, 8], "both must be of the same documents"),
        ([0], [0], r"must be int32 \[documents \+ 1\]"),
    ):
        with pytest.raises(ShapeError, match=match):
            varlen(cu_q, cu_k)
    with pytest.raises(ShapeError, match=r"torch\.int64"):
        varlen(good, good, dtype=torch.int64)
    with pytest.raises(ShapeError, match="max_seqlen_k is 4, but a document of k has 5 rows"):
        varlen(good, good, 5, 4)
    with pytest.raises(KernelError, match="block_table"):
        varlen(good, good, block_table=torch.zeros(1))


# The parameters of flash-attention 2.8, in order.
_OPTIONS = "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs"
SIGNATURES = {
    "flash_attn_func": f"q k v {_OPTIONS}",
    "flash_attn_qkvpacked_func": f"qkv {_OPTIONS}",
    "flash_attn_kvpacked_func": f"q kv {_OPTIONS}",
    "flash_attn_varlen_func": f"q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k {_OPTIONS} block_table",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    parameters = inspect.signature(getattr(functional, name)).parameters.values()
    assert [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY] == SIGNATURES[name].split()
    assert [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] == ["kernel"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_varlen_on_a_gpu(dtype):
    """Against float64, beside the dense computation in the same dtype."""
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([0, 300, 300, 515], [0, 200, 270, 600]))
    tensors = [draw(n, h, 128, seed=h, dtype=dtype, device="cuda") for n, h in ((515, 4), (600, 2), (600, 2))]
    seen = torch.zeros(515, 600, dtype=torch.bool)
    seen[:300, :200] = visible(300, 200, True, (90, 0))
    seen[300:, 270:] = visible(215, 330, True, (90, 0))
    exact = [t.detach().double().requires_grad_() for t in tensors]
    want, plain = (dense(*(t[None] for t in x), seen)[0][0] for x in (exact, tensors))
    got = flash_attn_varlen_func(*tensors, cu_q, cu_k, 300, 330, causal=True, window_size=(90, 0), softcap=0.0)
    results = [(got, plain, want)]
    dout = torch.randn_like(got)
    grads = (torch.autograd.grad(o, x, dout.to(o.dtype)) for o, x in ((got, tensors), (plain, tensors), (want, exact)))
    results += zip(*grads, strict=True)
    for ours, torchs, true in results:
        floor = 4 * torch.finfo(dtype).eps * true.abs().max()
        assert (ours - true).abs().max() <= 2 * (torchs - true).abs().max() + floor
