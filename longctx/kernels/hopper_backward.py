"""The backward of block attention on Hopper: which kernel runs, its tensor descriptors, the deterministic form."""

# mypy: ignore-errors

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from triton.experimental.gluon import language as gl

from longctx.errors import KernelError
from longctx.kernels.gluon_api import describe, describe_heads
from longctx.kernels.hopper_backward_kernel import backward_kernel
from longctx.kernels.hopper_backward_wide import backward_wide_kernel
from longctx.kernels.row_statistics import prepare_rows
from longctx.kernels.shipped import Shipped
from longctx.kernels.tiles import LOG2_E, can_describe, heads_abreast, key_interval_args, num_tiles, padded, stride_args
from longctx.kernels.triton_backward import launch_dq
from longctx.kernels.tuning import tiles_for
from longctx.masks import KeyRange

MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Schedule:
    """How the kernel for one padded head dim is cut and pipelined.

    Args:
        rows: of a block, 64 or 128.
        keys: of a program.
        stages: blocks of Q in flight.
        do_stages: blocks of dO in flight.
        late_dq: dq of a block is computed in the step after it, so that the warpgroups need not meet.
    """

    rows: int
    keys: int
    stages: int
    do_stages: int
    late_dq: bool


@dataclass(frozen=True)
class Variant(Schedule):
    """What is known when the kernel is compiled. `padded` is the head dim of the tiles, with zeros from `head_dim` on.

    With `scaled_p` lse has been prepared so that exp2 gives the scale times P: dq and dk need it no longer, of dv it is taken
    off at the end. In fp16 small probabilities would lose digits by it, in bf16 they do not.
    """

    padded: int
    head_dim: int
    kind: str
    has_hi: bool
    even_n: bool
    fresh: bool
    with_dq: bool
    scaled_p: bool
    softcap: float

    @property
    def masked(self) -> bool:
        """Whether a block may hold keys that a row must not see."""
        return self.kind != "full" or not self.even_n

    @property
    def dq_pieces(self) -> int:
        """In which a warpgroup's share of dq leaves: of 64 columns each."""
        return 2 if self.padded == 256 else 1

    @property
    def scores(self) -> gl.NVMMADistributedLayout:
        """Of S^T and dP^T, 64 keys to a warpgroup."""
        return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, self.rows, 16])

    @property
    def columns(self) -> gl.NVMMADistributedLayout:
        """Of a warpgroup's dk and dv: all columns of 64 keys, at 256 half of them."""
        return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, min(self.padded, 128), 16])

    @property
    def dq_share(self) -> gl.NVMMADistributedLayout:
        """Of a piece of dq, [64, 64]."""
        return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])


# By padded head dim: the fastest of 12 to 30 variants each on one H100 (triton 3.6.0, bf16, 2026-11-23; TFLOP/s of the kernel).
# 128, 4 x 8k x 16 heads full / causal: 591 / 577, of which dq without bank conflicts brings 20 / 36, and dv after dS with lse loaded
# early some 20 / 20. The scale in lse instead of on dq: 589 / 582, but in fp16 it would cost digits. dq in the order of the
# fragments, which nobody else could add to: 604 / 612; with it dq late as at 64 595 / 573, dk in flight over a step's end 588 / 474.
# dq added from registers by vector reductions, without shared memory: 441 / 433 where 616 / 630 were these in the same run (at 64
# and 256 it is a third slower, too). Programs that begin at other rows than their neighbours: 589 / 559 in that run.
# 64, 1 x 32k x 16 heads: 563 / 533; not late 526 / 497; 64 rows and not late 436 / 444. 256, 1 x 32k x 8 heads, causal: 442; with P
# and dS halved by rows instead of made by a warpgroup each 277.
# By turns with those (2026-11-24, medians, full / causal): signals for arrivals at mbarriers, and products that start from -lse
# and -delta, 604 / 592 for 571 / 582 at 128, 557 / 513 for 535 / 489 at 64; at 256 signals, S ahead and dq as one product 424 /
# 437 for 404 / 411, but signals alone 434 / 421. Beside that, at 128: start values written a step ahead 591 / 592; half of V in
# registers 610 (full); dq from each half of dS as it comes 598 (full); dv before dS 585 / 587; lse and delta stored in pairs
# twice, so that 16 bytes a thread load into the accumulators without a copy, 549 / 545 for 615 / 565 (64: 507 for 568), though
# the loop has 31 instructions of 390 less: such loads take shared memory four times as long. Otherwise a step takes about the
# time of its products plus that of its instructions: what spares some of these, and no shared memory is read more often for it,
# is worth trying; what moves them is not.
SCHEDULES = {
    64: Schedule(rows=128, keys=128, stages=2, do_stages=2, late_dq=True),
    128: Schedule(rows=64, keys=128, stages=2, do_stages=2, late_dq=False),
    256: Schedule(rows=64, keys=64, stages=2, do_stages=1, late_dq=False),
}


# Spilled loads and stores in one pass of a loop of 400 to 900 instructions, by padded head dim: without a mask, with one.
# Triton 3.6. What spills nothing at 64, blocks of 64 rows, is slower (above). At 256 dq as two products, without S ahead, spills 3
# with a mask: as fast without one, 2 % slower with.
KNOWN_SPILLS = {64: (0, 10), 128: (0, 0), 256: (5, 24)}


def shipped_configurations() -> tuple[Shipped, ...]:
    """What is compiled in real runs, one of each form."""
    found = []
    for dim, (plain, with_mask) in KNOWN_SPILLS.items():
        # dk runs under dq's way out.
        of = partial(Shipped, direction="backward", head_dim=dim, waits=frozenset({0, 1}))
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
    rows = prepare_rows(lse, delta, **_form_of_rows(q, scale, softcap))
    launch_with_rows(
        dout, q, k, v, *rows, key_range, scale=scale, softcap=softcap, dq_acc=dq_acc, dk_acc=dk_acc, dv_acc=dv_acc,
        fresh=fresh, with_dq=not deterministic,
    )  # fmt: skip
    if deterministic:
        tile = tiles_for(padded(q.shape[-1]), q.dtype, q.device).dq
        launch_dq(
            dout, q, k, v, *prepare_rows(lse, delta), key_range, scale=scale, softcap=softcap, dq_acc=dq_acc,
            tile=tile, use_descriptor=tile.use_descriptor,
        )  # fmt: skip


def scales_p(dtype: torch.dtype, scale: float) -> bool:
    """Whether P carries the scale. A probability near 1 would lose up to half its precision to one a little above a power of 2."""
    mantissa, _ = math.frexp(scale)
    return dtype == torch.bfloat16 and (mantissa == 0.5 or mantissa >= 0.7)


def _qk_scale(scale: float) -> float:
    # Above 0: it is divided by.
    return max(scale * LOG2_E, 1e-30)


def _form_of_rows(q: torch.Tensor, scale: float, softcap: float) -> dict[str, float]:
    """How the kernels take lse and delta, for `prepare_rows`: up to head dim 128 as what the products start from."""
    shift = -math.log2(scale) if scales_p(q.dtype, scale) else 0.0
    if padded_head_dim(q.shape[-1]) == 256:
        return {"lse_shift": shift}
    if softcap > 0:
        return {"lse_shift": shift, "delta_factor": -1.0}
    unit = _qk_scale(scale)
    return {"lse_factor": -LOG2_E / unit, "lse_shift": -shift / unit, "delta_factor": -1.0}


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
    """The kernel itself: lse2 and delta2 come from `prepare_rows`, as `_form_of_rows`; without `with_dq` it leaves dq_acc alone."""
    b, sq, h, d = q.shape
    sk, hk = k.shape[1:3]
    d_pad = padded_head_dim(d)
    mask = key_interval_args(key_range, sq, sk, q.device)
    schedule = SCHEDULES[d_pad]
    variant = Variant(
        **vars(schedule),
        padded=d_pad,
        head_dim=d,
        kind=mask["KIND"],
        # The lower end is always compared: of a block with a mask it is the cheaper part.
        has_hi=mask["HAS_HI"],
        even_n=sk % schedule.keys == 0,
        fresh=fresh,
        with_dq=with_dq,
        scaled_p=scales_p(q.dtype, scale),
        softcap=float(softcap),
    )
    kernel = backward_wide_kernel if d_pad == 256 else backward_kernel
    num_n = num_tiles(sk, schedule.keys)
    kernel[(num_n * hk * b,)](
        describe_heads(q, schedule.rows, d_pad),
        describe_heads(dout, schedule.rows, d_pad),
        describe_heads(k, schedule.keys, d_pad),
        describe_heads(v, schedule.keys, d_pad),
        describe(lse2, [lse2.numel()], [1], [schedule.rows]),
        describe(delta2, [delta2.numel()], [1], [schedule.rows]),
        describe_heads(dq_acc, 64, 64),
        dk_acc,
        dv_acc,
        mask["LO"],
        mask["HI"],
        mask["stride_lo"],
        scale=scale,
        qk_scale=_qk_scale(scale),
        sq=sq,
        sq_pad=lse2.shape[-1],
        sk=sk,
        num_heads=h,
        num_kv_heads=hk,
        group=h // hk,
        section=heads_abreast(num_n, hk * b, q.device),
        **stride_args(dk=dk_acc, dv=dv_acc),
        V=variant,
        num_warps=4,
    )


def padded_head_dim(head_dim: int) -> int:
    """The head dim of the tiles that a head dim rides in: the TMA engine fills the rest with zeros."""
    return next(d for d in SCHEDULES if d >= head_dim)


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
