"""lse and delta in the form in which the kernels of a backward take them, portable ones and Hopper's alike."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from longctx.kernels.tiles import LOG2_E, num_tiles


@triton.jit
def _prepare_rows_kernel(
    LSE, DELTA, LSE2, DELTA2, s, s_pad, lse_factor, lse_shift, delta_factor, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    of_head = tl.program_id(1).to(tl.int64)
    lse = tl.load(LSE + of_head * s + row, mask=row < s, other=float("inf"))
    delta = tl.load(DELTA + of_head * s + row, mask=row < s, other=0.0)
    lse = tl.where(lse == float("-inf"), float("inf"), lse) * lse_factor + lse_shift
    tl.store(LSE2 + of_head * s_pad + row, lse, mask=row < s_pad)
    tl.store(DELTA2 + of_head * s_pad + row, delta * delta_factor, mask=row < s_pad)


# Rows are padded to this, a multiple of every BLOCK_M.
_ROW_PADDING = 128


def prepare_rows(
    lse: torch.Tensor,
    delta: torch.Tensor,
    *,
    lse_factor: float = LOG2_E,
    lse_shift: float = 0.0,
    delta_factor: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """lse in base 2 and delta, "b h s", padded to whole tiles, so that the kernels load them without a mask.

    lse is +inf, which makes every probability 0, for rows that saw nothing and for rows that do not exist; after that it is
    lse * lse_factor + lse_shift, and delta is multiplied as well, for kernels that take them in another form.
    """
    lse, delta = lse.contiguous(), delta.contiguous()
    b, h, s = lse.shape
    s_pad = num_tiles(s, _ROW_PADDING) * _ROW_PADDING
    lse2 = torch.empty(b, h, s_pad, dtype=torch.float32, device=lse.device)
    delta2 = torch.empty_like(lse2)
    _prepare_rows_kernel[(num_tiles(s_pad, 1024), b * h)](
        lse, delta, lse2, delta2, s, s_pad, lse_factor, lse_shift, delta_factor, BLOCK=1024
    )
    return lse2, delta2
