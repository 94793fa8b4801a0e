"""flash-attention's functions, on the kernels of this library: the same names, order and meaning of arguments.

Code written for flash-attention 2 runs by importing from here. Differences: every floating dtype, CPUs, gradients through
softmax_lse; rows that see nothing have softmax_lse -inf, not +inf; dropout, ALiBi and paged keys are refused.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from longctx.errors import KernelError, ShapeError
from longctx.kernels import check_block, check_softcap, get_kernel
from longctx.kernels.sinks import check_sinks
from longctx.masks import UNBOUNDED, KeyRange
from longctx.parallel.ring import RING_ATTENTION_OP
from longctx.parallel.schedule import CACHED_SCHEDULES, pack_hops
from longctx.shapes import check_shapes

Result = Tensor | tuple[Tensor, Tensor, Tensor]

# Kernels whose backward sums dq in the order in which programs finish.
_NOT_DETERMINISTIC = ("cudnn", "flash4", "hopper")


@_disable_dynamo
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    kernel: str = "auto",
) -> Result:
    """Attention of whole sequences on one device. Differentiable in q, k, v, through out and softmax_lse.

    Where q and k have different lengths, the last query stands beside the last key (the bottom right of the matrix), for
    `causal` and for `window_size` alike: query i stands at key i + sk - sq.

    Args:
        q: "b sq h d".
        k, v: "b sk hk d" with hk dividing h. sk may be 0: then out is 0.
        dropout_p: must be 0.
        softmax_scale: multiplies q @ k^T. None: 1 / sqrt(d).
        causal: a query sees no key after its own place.
        window_size: how many keys a query sees to the left and to the right of its place; a negative one is no limit.
        softcap: bends the scores s to softcap * tanh(s / softcap); 0 leaves them.
        alibi_slopes: must be None.
        deterministic: leave out kernels whose backward sums in no fixed order.
        return_attn_probs: return softmax_lse too.
        kernel: not flash-attention's: "auto", or a name from `longctx.kernels.kernel_names`.

    Returns:
        out: "b sq h d" in q's dtype; 0 in rows that see nothing. With `return_attn_probs` (out, softmax_lse, S_dmask):
        softmax_lse is "b h sq" fp32, natural log, -inf in rows that see nothing; S_dmask is empty, as without dropout in
        flash-attention.

    Raises:
        ShapeError: shapes, dtypes or devices do not agree.
        KernelError: an argument that is not supported, or that the kernel cannot do.

    Source: Dao 2023 (arXiv 2307.08691); the interface is that of flash-attention 2.8.
    """
    _refuse(dropout_p, alibi_slopes)
    q, k, v = _unit_strides(q, k, v)
    axes = check_block(q, k, v)
    left, right = _window(window_size, causal)
    hops = _band_hops(axes["sq"], axes["sk"], left, right)
    out, lse = _attend(q, k, v, hops, softmax_scale, softcap, kernel, deterministic)
    return (out, lse, q.new_empty(0)) if return_attn_probs else out


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    kernel: str = "auto",
) -> Result:
    """`flash_attn_func` of q, k and v in one tensor, which is not copied.

    Args:
        qkv: "b s 3 h d".
    """
    check_shapes(qkv=(qkv, "b s 3 h d"))
    q, k, v = qkv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs, kernel=kernel,
    )  # fmt: skip


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    kernel: str = "auto",
) -> Result:
    """`flash_attn_func` of k and v in one tensor, which is not copied.

    Args:
        q: "b sq h d".
        kv: "b sk 2 hk d".
    """
    check_shapes(kv=(kv, "b sk 2 hk d"))
    k, v = kv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs, kernel=kernel,
    )  # fmt: skip


@_disable_dynamo
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    kernel: str = "auto",
) -> Result:
    """`flash_attn_func` of documents packed one behind the other; each attends to its own keys only.

    Waits for the device once a call where the boundaries lie on one, since intervals are made on the host; boundaries on the
    CPU cost no wait. Layers that are called with equal boundaries share the intervals. Tiles outside them are not computed.

    Args:
        q: "total_q h d".
        k, v: "total_k hk d".
        cu_seqlens_q, cu_seqlens_k: int32 [documents + 1], from 0 to total_q and total_k, never decreasing. A document's
            lengths in q and k may differ, and either may be 0.
        max_seqlen_q, max_seqlen_k: no shorter than the longest document; nothing else depends on them here.
        block_table: must be None.
        others: as `flash_attn_func`, within each document.

    Returns:
        As `flash_attn_func`: out "total_q h d", softmax_lse "h total_q".

    Raises:
        ShapeError, KernelError: as `flash_attn_func`; or the boundaries are not those of q and k.
    """
    _refuse(dropout_p, alibi_slopes, block_table)
    check_shapes(q=(q, "total_q h d"), k=(k, "total_k hk d"), v=(v, "total_k hk d"))
    q, k, v = (t.unsqueeze(0) for t in _unit_strides(q, k, v))
    axes = check_block(q, k, v)
    cu_q, cu_k = _boundaries(cu_seqlens_q, cu_seqlens_k)
    _check_boundaries("q", cu_q, axes["sq"], int(max_seqlen_q))
    _check_boundaries("k", cu_k, axes["sk"], int(max_seqlen_k))
    left, right = _window(window_size, causal)
    out, lse = _attend(q, k, v, _document_hops(cu_q, cu_k, left, right), softmax_scale, softcap, kernel, deterministic)
    return (out[0], lse[0], q.new_empty(0)) if return_attn_probs else out[0]


@_disable_dynamo
def interval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hops: tuple[Tensor, Tensor],
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    kernel: str = "auto",
) -> Tensor:
    """Attention of whole sequences on one device in which each row sees one interval of keys.

    Args:
        q: "b sq h d".
        k, v: "b sk hk d" with hk dividing h.
        hops: the intervals, one hop of `longctx.parallel.schedule.pack_hops`.
        scale, softcap, sinks, kernel: as in `longctx.functional.attention`.

    Returns:
        "b sq h d" in q's dtype; 0 in rows that see nothing.

    Raises:
        ShapeError, KernelError: as `longctx.functional.attention`.
    """
    q, k, v = _unit_strides(q, k, v)
    check_block(q, k, v)
    if sinks is not None:
        check_sinks(sinks, q)
    return _attend(q, k, v, hops, scale, softcap, kernel, deterministic=False, sinks=sinks)[0]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hops: tuple[Tensor, Tensor],
    softmax_scale: float | None,
    softcap: float,
    kernel: str,
    deterministic: bool,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    b, _, h, d = q.shape
    if not b * h * d:
        raise ShapeError(f"nothing to attend to: q has shape {list(q.shape)}")
    scale = 1 / math.sqrt(d) if softmax_scale is None else float(softmax_scale)
    if deterministic and kernel in _NOT_DETERMINISTIC:
        raise KernelError(f"deterministic=True, but the backward of {kernel!r} is not; use kernel 'auto' or 'triton'")
    if deterministic and kernel == "auto":
        able = get_kernel("triton").supports(device=q.device, dtype=q.dtype, head_dim=d, kind="full", softcap=softcap)
        kernel = "triton" if able is None else "reference"
    out, lse, _ = RING_ATTENTION_OP(q, k, v, *hops, kernel, scale, "", check_softcap(softcap), sinks)
    return out, lse


def _refuse(dropout_p: float, alibi_slopes: Tensor | None, block_table: Tensor | None = None) -> None:
    """KernelError for the options of flash-attention that there are no kernels for."""
    if dropout_p:
        raise KernelError(f"dropout_p is {dropout_p}, but there is no dropout of attention here: pass 0.0")
    if alibi_slopes is not None:
        raise KernelError("alibi_slopes is given, but ALiBi is not supported: pass None")
    if block_table is not None:
        raise KernelError("block_table is given, but paged keys and values are not supported: pass None")


def _unit_strides(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Like flash-attention, copies what has gaps along the head dim."""
    return tuple(t if not t.ndim or t.stride(-1) == 1 else t.contiguous() for t in tensors)


def _window(window_size: tuple[int, int], causal: bool) -> tuple[int, int]:
    """(left, right) with `UNBOUNDED` for no limit. A causal window ends at the query itself."""
    left, right = (UNBOUNDED if n < 0 else min(int(n), UNBOUNDED) for n in window_size)
    return left, 0 if causal else right


@lru_cache(maxsize=CACHED_SCHEDULES)
def _band_hops(sq: int, sk: int, left: int, right: int) -> tuple[Tensor, Tensor]:
    """One hop in which row i sees the keys [i + sk - sq - left, i + sk - sq + right]."""
    # A side that cuts off nothing is none: the last row looks back farthest, the first row ahead.
    lo = -UNBOUNDED if left >= sk - 1 else sk - sq - left
    hi = UNBOUNDED if right >= sq - 1 else sk - sq + right + 1
    if sq == 0 or sk == 0:
        key_range = KeyRange.empty()
    elif lo == -UNBOUNDED and hi == UNBOUNDED:
        key_range = KeyRange.full()
    else:
        key_range = KeyRange("band", lo, hi)
    return pack_hops([(0, key_range)], sq)


@lru_cache(maxsize=CACHED_SCHEDULES)
def _document_hops(cu_q: tuple[int, ...], cu_k: tuple[int, ...], left: int, right: int) -> tuple[Tensor, Tensor]:
    """One hop in which each row sees the keys of its document that the window shows."""
    total_q, total_k = cu_q[-1], cu_k[-1]
    starts_q, starts_k = torch.tensor(cu_q), torch.tensor(cu_k)
    document = torch.repeat_interleave(starts_q.diff())
    first, end = starts_k[document], starts_k[document + 1]
    # Where the row stands among the keys: the last row of a document beside its last key.
    place = torch.arange(total_q) - starts_q[document + 1] + end
    lo = torch.minimum(torch.maximum(place - left, first), end)
    hi = torch.maximum(torch.minimum(place + right + 1, end), lo)
    key_range = KeyRange.of(lo, hi, total_k) if total_q and total_k else KeyRange.empty()
    return pack_hops([(0, key_range)], total_q)


def _boundaries(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Both as ints, in one copy from the device. Never remembered by tensor: a buffer may be filled anew."""
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if cu.ndim != 1 or len(cu) < 2 or cu.dtype != torch.int32:
            raise ShapeError(f"{name} is {cu.dtype} {list(cu.shape)}: it must be int32 [documents + 1]")
    if len(cu_seqlens_q) != len(cu_seqlens_k) or cu_seqlens_q.device != cu_seqlens_k.device:
        raise ShapeError(
            f"cu_seqlens_q has {len(cu_seqlens_q)} boundaries on {cu_seqlens_q.device}, but cu_seqlens_k has "
            f"{len(cu_seqlens_k)} on {cu_seqlens_k.device}: both must be of the same documents"
        )
    both = torch.stack([cu_seqlens_q, cu_seqlens_k]).tolist()
    return tuple(both[0]), tuple(both[1])


def _check_boundaries(name: str, cu: tuple[int, ...], total: int, max_seqlen: int) -> None:
    lengths = [b - a for a, b in itertools.pairwise(cu)]
    if cu[0] != 0 or min(lengths) < 0 or cu[-1] != total:
        raise ShapeError(
            f"cu_seqlens_{name} {list(cu[:8])}... must start at 0, never decrease and end at {total}, the rows of {name}"
        )
    if max(lengths) > max_seqlen:
        raise ShapeError(f"max_seqlen_{name} is {max_seqlen}, but a document of {name} has {max(lengths)} rows")
