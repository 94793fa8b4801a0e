"""The backward of block attention on Hopper: which kernel runs, its tensor descriptors, the deterministic form."""

# mypy: ignore-errors

from __future__ import annotations

from functools import partial

import torch
import triton

from longctx.errors import KernelError
from longctx.kernels.gluon_api import describe, describe_heads
from longctx.kernels.hopper_backward_kernel import backward_kernel
from longctx.kernels.hopper_backward_wide import backward_wide_kernel
from longctx.kernels.shipped import Shipped
from longctx.kernels.tiles import LOG2_E, can_describe, key_interval_args, padded, stride_args
from longctx.kernels.triton_backward import launch_dq, prepare_rows
from longctx.kernels.tuning import tiles_for
from longctx.masks import KeyRange

MAX_HEAD_DIM = 256

# Row block, key block, columns of a piece of dq, pipeline options; by padded head dim. 64 and 128: the best of 4 and 10
# variants measured on one H200 (triton 3.6.0, bf16, 2026-11-23, 4 x 8k x 16 heads of 128, full and causal: 555 and 520
# TFLOP/s): taking up the next block's scores early 521 and 477, reductions by the warpgroups themselves 539 and 511, atomics
# from registers 460, two buffers for dq 542 and 528. 256: what fits in shared memory; 276 TFLOP/s on an H100 at
# 1 x 32k x 8 heads, causal, where cuDNN has 404.
_SCHEDULES = {
    64: (64, 128, 32, {"STAGES": 2}),
    128: (64, 128, 64, {"STAGES": 2}),
    256: (64, 64, 64, {"STAGES": 2, "DO_STAGES": 1, "P_STAGES": 1}),
}


# Spilled loads and stores in one pass of a loop of 400 to 700 instructions, by padded head dim: without a mask, with one.
# Triton 3.6; up to 128 most lie on the mask's branch. At 256 one warpgroup keeps addresses on the stack, with 3.9 neither does.
KNOWN_SPILLS = {64: (0, 0), 128: (2, 16), 256: (64, 80)}


def shipped_configurations() -> tuple[Shipped, ...]:
    """What is compiled in real runs, one of each form."""
    found = []
    for dim, (plain, with_mask) in KNOWN_SPILLS.items():
        # Up to 128 dk runs under dq's way out, dv under dS; above, two products for dq run under dv's wait.
        waits = frozenset({0, 1, 2} if dim == 256 else {0, 1})
        of = partial(Shipped, direction="backward", head_dim=dim, waits=waits)
        found += [
            of(kind="full", known_spills=plain),
            of(kind="causal", fresh=True, known_spills=with_mask),
            of(kind="rows", known_spills=with_mask),
        ]
    plain, with_mask = KNOWN_SPILLS[128]
    of = partial(Shipped, direction="backward", waits=frozenset({0, 1}))
    return (
        *found,
        of(head_dim=128, kind="full", fresh=True, dtype="float16", known_spills=plain),
        of(head_dim=128, kind="window", fresh=True, known_spills=with_mask),
        # The last keys of a length that is not whole tiles need the mask.
        of(head_dim=96, kind="full", seq_len=8000, known_spills=with_mask),
        # Its tanh needs registers.
        of(head_dim=128, kind="causal", fresh=True, softcap=50.0, known_spills=None),
    )


def launch_hopper_backward(
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
    dq_acc: torch.Tensor,
    dk_acc: torch.Tensor,
    dv_acc: torch.Tensor,
    fresh: bool = False,
    deterministic: bool = False,
) -> None:
    """Add a block's dq, dk and dv; the block is not empty. On the current device, which must be the tensors'.

    dk and dv are the same bits at every run. dq is summed over the blocks of keys in the order in which programs finish:
    its last bits change from run to run, as any order of an fp32 sum does. `deterministic` computes dq with the portable
    kernel instead, which owns a block of rows and adds nothing atomically: the same bits at every run, for seven products
    in place of five.

    Args:
        dout, q: "b sq h d" in fp16 or bf16, d a multiple of 8 up to 256. Other head dims than 64, 128 and 256 cost as much
            as the next of these.
        k, v: "b sk hk d", likewise. All with a unit last stride, the others and the base whole 16 bytes.
        lse, delta: "b h sq", fp32, of the whole row. Rows with lse -inf contribute nothing.
        key_range: of any kind but "empty"; "rows" for each sequence or for all.
        dq_acc: "b sq h d", fp32, whole 16 bytes likewise; added to.
        dk_acc, dv_acc: "b sk hk d" with a unit last stride; fp32, added to; or, with `fresh`, of any dtype and written.

    Raises:
        KernelError: what these kernels cannot do, each with its reason.

    Source: Dao 2023 (arXiv 2307.08691), algorithm 2.
    """
    _refuse(dout, q, k, v, key_range, dq_acc, dk_acc, dv_acc, fresh)
    lse2, delta2 = prepare_rows(lse, delta)
    block = (dout, q, k, v, lse2, delta2, key_range)
    launch_with_rows(
        *block, scale=scale, softcap=softcap, dq_acc=dq_acc, dk_acc=dk_acc, dv_acc=dv_acc,
        fresh=fresh, with_dq=not deterministic,
    )  # fmt: skip
    if deterministic:
        tile = tiles_for(padded(q.shape[-1]), q.dtype, q.device).dq
        launch_dq(
            *block, scale=scale, softcap=softcap, dq_acc=dq_acc, tile=tile, use_descriptor=tile.use_descriptor
        )  # fmt: skip


def launch_with_rows(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse2: torch.Tensor,
    delta2: torch.Tensor,
    key_range: KeyRange,
    *,
    scale: float,
    softcap: float,
    dq_acc: torch.Tensor,
    dk_acc: torch.Tensor,
    dv_acc: torch.Tensor,
    fresh: bool,
    with_dq: bool,
) -> None:
    """The kernel itself: lse2 and delta2 come from `prepare_rows`; without `with_dq` it leaves dq_acc alone."""
    b, sq, h, d = q.shape
    sk, hk = k.shape[1:3]
    d_pad = padded_head_dim(d)
    block_m, block_n, dq_columns, options = _SCHEDULES[d_pad]
    intervals = key_interval_args(key_range, sq, sk, q.device)
    # The lower end is always compared: of a tile with a mask it is the cheaper part.
    del intervals["HAS_LO"]
    kernel = backward_wide_kernel if d_pad == 256 else backward_kernel
    kernel[(triton.cdiv(sk, block_n) * hk * b,)](
        describe_heads(q, block_m, d_pad),
        describe_heads(dout, block_m, d_pad),
        describe_heads(k, block_n, d_pad),
        describe_heads(v, block_n, d_pad),
        describe(lse2, [lse2.numel()], [1], [block_m]),
        describe(delta2, [delta2.numel()], [1], [block_m]),
        describe_heads(dq_acc, block_m, dq_columns),
        dk_acc,
        dv_acc,
        scale=scale,
        qk_scale=scale * LOG2_E,
        sq=sq,
        sq_pad=lse2.shape[-1],
        sk=sk,
        num_heads=h,
        num_kv_heads=hk,
        group=h // hk,
        **stride_args(dk=dk_acc, dv=dv_acc),
        D=d,
        D_PAD=d_pad,
        BM=block_m,
        BN=block_n,
        EVEN_N=sk % block_n == 0,
        FRESH=fresh,
        WITH_DQ=with_dq,
        SOFTCAP=float(softcap),
        **options,
        **intervals,
        num_warps=4,
    )


def padded_head_dim(head_dim: int) -> int:
    """The head dim of the tiles that a head dim rides in: the TMA engine fills the rest with zeros."""
    return next(d for d in _SCHEDULES if d >= head_dim)


def _refuse(dout, q, k, v, key_range, dq_acc, dk_acc, dv_acc, fresh) -> None:
    d = q.shape[-1]
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise KernelError(f"the Hopper backward takes float16 and bfloat16, not {q.dtype}: use the kernel 'triton'")
    if d % 8 or not 8 <= d <= MAX_HEAD_DIM:
        raise KernelError(
            f"the Hopper backward takes head dims that are multiples of 8 up to {MAX_HEAD_DIM}, not {d}: "
            "use the kernel 'triton'"
        )
    if key_range.kind == "empty" or q.numel() == 0 or k.numel() == 0:
        raise KernelError("the Hopper backward was given an empty block: there is nothing to launch")
    if not can_describe(dout, q, k, v, dq_acc):
        raise KernelError(
            "the TMA engine cannot read these tensors: dout, q, k, v and dq_acc need a base and strides of whole "
            "16 bytes: call .contiguous(), or use the kernel 'triton'"
        )
    if dq_acc.dtype != torch.float32:
        raise KernelError(f"dq_acc is {dq_acc.dtype}, but gradients are summed in float32")
    for name, t in (("dk_acc", dk_acc), ("dv_acc", dv_acc)):
        if not fresh and t.dtype != torch.float32:
            raise KernelError(f"{name} is {t.dtype}, but gradients are summed in float32: or pass fresh=True")
        if t.stride(-1) != 1:
            raise KernelError(f"{name} has stride {t.stride(-1)} along the head dim; it must be 1")
