"""Block attention in plain torch: the oracle in float64, and the CPU's path in float32."""

from __future__ import annotations

import torch

from longctx.kernels import Direction, SoftmaxState, check_block, state_dtype
from longctx.masks import KeyRange

# Rows of q per step: bounds the scores held at once to b * h * ROWS * sk, and lets intervals be skipped.
ROWS = 256


class ReferenceAttention:
    """Any device, any floating dtype; computes in float32, or float64 for float64 inputs. Memory linear in the length."""

    name = "reference"

    def supports(
        self,
        *,
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int,
        kind: str,
        softcap: float = 0.0,
        direction: Direction = "forward",
    ) -> str | None:
        return None if dtype.is_floating_point else f"{dtype} is not a floating type"

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        key_range: KeyRange,
        *,
        scale: float,
        softcap: float = 0.0,
        state: SoftmaxState | None = None,
        final: bool = False,
    ) -> SoftmaxState:
        check_block(q, k, v)
        state = SoftmaxState.empty_like(q) if state is None else state
        for rows, keys, visible in _steps(q, k, key_range):
            s, _ = _scores(q[:, rows], k[:, keys], scale, softcap)
            s = s.masked_fill(~visible, float("-inf"))
            old = state.lse[:, :, rows]
            new = torch.logaddexp(old, s.logsumexp(-1))
            # exp(-inf - -inf) is nan; a row that has seen nothing has weights 0.
            base = new.masked_fill(new == float("-inf"), 0.0)
            p = _ungroup(torch.exp(s - base[..., None]), k.shape[2])
            seen = torch.einsum("bkgij,bjkd->bikgd", p, v[:, keys].to(p.dtype)).flatten(2, 3)
            kept = torch.exp(old - base).transpose(1, 2)[..., None]
            state.out[:, rows] = state.out[:, rows] * kept + seen
            state.lse[:, :, rows] = new
        return state

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lse: torch.Tensor,
        delta: torch.Tensor,
        key_range: KeyRange,
        *,
        scale: float,
        softcap: float = 0.0,
        out: torch.Tensor,
        dq_acc: torch.Tensor,
        dk_acc: torch.Tensor,
        dv_acc: torch.Tensor,
        fresh: bool = False,
    ) -> None:
        check_block(q, k, v, dout=dout)
        if fresh:
            into = [torch.zeros(x.shape, dtype=state_dtype(k.dtype), device=k.device) for x in (dk_acc, dv_acc)]
            self.backward(
                dout, q, k, v, lse, delta, key_range,
                scale=scale, softcap=softcap, out=out, dq_acc=dq_acc, dk_acc=into[0], dv_acc=into[1],
            )  # fmt: skip
            dk_acc.copy_(into[0])
            dv_acc.copy_(into[1])
            return
        hk = k.shape[2]
        # exp(s - inf) = 0: a row that saw nothing contributes nothing.
        lse = lse.masked_fill(lse == float("-inf"), float("inf"))
        for rows, keys, visible in _steps(q, k, key_range):
            s, slope = _scores(q[:, rows], k[:, keys], scale, softcap)
            s = s.masked_fill(~visible, float("-inf"))
            p = torch.exp(s - lse[:, :, rows, None])
            do = dout[:, rows].to(p.dtype).unflatten(2, (hk, -1))
            dp = torch.einsum("bikgd,bjkd->bkgij", do, v[:, keys].to(p.dtype))
            p = _ungroup(p, hk)
            ds = p * (dp - _ungroup(delta[:, :, rows, None], hk)) * scale
            if slope is not None:
                ds *= _ungroup(slope, hk)
            dv_acc[:, keys] += torch.einsum("bkgij,bikgd->bjkd", p, do)
            dq_acc[:, rows] += torch.einsum("bkgij,bjkd->bikgd", ds, k[:, keys].to(ds.dtype)).flatten(2, 3)
            dk_acc[:, keys] += torch.einsum("bkgij,bikgd->bjkd", ds, q[:, rows].to(ds.dtype).unflatten(2, (hk, -1)))


def _steps(q: torch.Tensor, k: torch.Tensor, key_range: KeyRange):
    """Blocks of rows with the slice of keys that any of them sees, and the mask on it, [b or 1, 1, rows, keys]."""
    if key_range.kind == "empty":
        return
    lo, hi = key_range.bounds(q.shape[1], k.shape[1], "cpu")
    for start in range(0, q.shape[1], ROWS):
        rows = slice(start, min(start + ROWS, q.shape[1]))
        row_lo, row_hi = lo[:, rows], hi[:, rows]
        seen = row_hi > row_lo
        if not bool(seen.any()):
            continue
        keys = slice(int(row_lo[seen].min()), int(row_hi[seen].max()))
        index = torch.arange(keys.start, keys.stop)
        visible = (index >= row_lo[..., None]) & (index < row_hi[..., None])
        yield rows, keys, visible[:, None].to(q.device)


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float, softcap: float) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The scores in the state's dtype, "b h i j", and their derivative by scale * q @ k^T; None where that is 1."""
    dtype = state_dtype(q.dtype)
    grouped = q.to(dtype).unflatten(2, (k.shape[2], -1))
    s = torch.einsum("bikgd,bjkd->bkgij", grouped * scale, k.to(dtype)).flatten(1, 2)
    if not softcap:
        return s, None
    t = torch.tanh(s / softcap)
    return softcap * t, 1 - t * t


def _ungroup(x: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """b (k g) ... -> b k g ..."""
    return x.unflatten(1, (num_kv_heads, -1))
