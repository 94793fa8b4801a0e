"""Forward block attention for Hopper: how the kernel is cut and pipelined for a head dim, and its launch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from triton.experimental.gluon import language as gl

from longctx.errors import KernelError
from longctx.kernels import SoftmaxState
from longctx.kernels.gluon_api import describe_heads
from longctx.kernels.hopper_forward_kernel import forward_kernel
from longctx.kernels.shipped import Shipped
from longctx.kernels.tiles import LOG2_E, heads_abreast, num_sms, num_tiles, row_interval_args, stride_args
from longctx.masks import KeyRange

# Rows of one consumer warpgroup: what one matrix instruction takes.
GROUP_ROWS = 64
# Of a block without a mask, from which on a second launch costs less than fixed maxima save: some 150 us on an H100.
MIN_FLOPS_FIXED = 1e11


@dataclass(frozen=True)
class Schedule:
    """How the kernel for one padded head dim is cut and pipelined.

    Args:
        groups: consumer warpgroups, 2 to 4, of 64 query rows each.
        block_n: keys per tile, a power of two.
        stages: tiles of keys and of values in flight.
        packed: round probabilities to 16 bits at the end of a step instead of under the next tile's product: half the
            registers across steps.
        own_out: shared memory of its own for the output, so that it is stored while the next queries arrive.
        registers: per consumer thread and per producer thread; the SM has 65536.
    """

    groups: int
    block_n: int
    stages: int
    packed: bool
    own_out: bool
    registers: tuple[int, int]


@dataclass(frozen=True)
class Variant:
    """What is known when the kernel is compiled. `padded` is the head dim of the tiles, with zeros from `head_dim` on.

    With `fixed_max` a row's maximum stays what it is after the tiles with a mask, at least one: see `launch_hopper_forward`.
    With `again` the pieces of work are those that were found wrong by that.
    """

    schedule: Schedule
    padded: int
    head_dim: int
    kind: str
    has_lo: bool
    even_n: bool
    carry: bool
    final: bool
    capped: bool
    fixed_max: bool = False
    again: bool = False

    @property
    def masked(self) -> bool:
        """Whether the first tile (the last keys) may hold keys that a row must not see."""
        return self.kind != "full" or not self.even_n

    @property
    def scores(self) -> gl.NVMMADistributedLayout:
        return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, self.schedule.block_n, 16])

    @property
    def output(self) -> gl.NVMMADistributedLayout:
        return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, self.padded, 16])


# By padded head dim: the fastest of 4 to 9 variants each, interleaved on one H100 (triton 3.6.0, bf16, 2026-11-23; causal and
# full, 32k and 4 x 8k). Not packed at 128 since rounding then hides under a product: full 696 against 665 TFLOP/s, causal the
# same; packed at 256 it is 772 against 726. Three groups at 64: 580 against 450 with two.
# Fixed maxima, by turns with those (2026-11-24, medians, full / causal): 736 / 767 for 643 / 645 at 128, 592 / 581 for 536 /
# 501 at 64 (4 x 8k x 16 heads), 757 / 739 for 695 / 697 at 256; and with what rounding adds in the divisor (another run, upper
# quartiles) 783 / 765 for 804 / 778, 581 / 559 for 597 / 585 and 797 / 773 for 786 / 783. Named barriers for the releases of
# tiles beside that: the same. Groups that issue their products in turn, as FlashAttention-3 does, and three stages at 64: no
# gain.
SCHEDULES = {
    64: Schedule(3, 128, 2, True, True, (160, 24)),
    128: Schedule(2, 128, 2, False, True, (240, 24)),
    256: Schedule(2, 64, 2, True, False, (240, 24)),
}


def shipped_configurations() -> list[Shipped]:
    """What is compiled in real runs, one of each form."""
    # One product stays in flight while the other is waited for.
    of = partial(Shipped, direction="forward", waits=frozenset({0, 1}))
    # But for the last two, each in two launches: with fixed maxima, and without what these were too small for.
    # By rows at 128 two sums beside bounds at both ends are too much: 4 spills in the loop without a mask, 12 with one.
    found = []
    for dim in SCHEDULES:
        found += [
            of(head_dim=dim, kind="full", carry=True),
            of(head_dim=dim, kind="rows", final=True, known_spills=12 if dim == 128 else 0),
        ]
    return [
        *found,
        of(head_dim=128, kind="causal", final=True),
        # Its tanh needs registers.
        of(head_dim=128, kind="causal", final=True, softcap=50.0, known_spills=None),
        of(head_dim=96, kind="full", seq_len=8000, dtype="float16", carry=True),
        of(head_dim=128, kind="causal", seq_len=512, final=True),
    ]


def padded_head_dim(head_dim: int) -> int:
    """The head dim of the tiles: the next of `SCHEDULES`."""
    return next(d for d in SCHEDULES if d >= head_dim)


def launch_hopper_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_range: KeyRange,
    *,
    scale: float,
    softcap: float,
    state: SoftmaxState | None,
    final: bool,
    schedule: Schedule | None = None,
    fixed_max: bool | None = None,
) -> SoftmaxState:
    """Launch the forward on a block that is not empty; see `BlockAttention.forward`. q, k, v: what `can_describe` allows.

    A softmax is the same whatever is subtracted from a row's scores before exp2, as long as nothing overflows and the largest
    does not vanish. So that tiles without a mask need no maximum of their own and rescale nothing, a row may keep the one that
    it has when it gets to them (`fixed_max`): it is the score of a key that the row sees, or the lse that it brings. Where
    later scores are so much larger that the row's sum passes 2**64 (44 above it, in units of the natural logarithm), or where
    it is nan, the 64 rows are not stored but listed, and a second launch does the listed row blocks again, with the maximum
    of every tile: there for nothing, it costs some microseconds. In float16 exponentials could grow no further than 2**16, so
    there, as in small blocks, every tile's maximum is taken.

    Args:
        schedule: another than that of the head dim.
        fixed_max: whether maxima are fixed; by default in bfloat16, where the block is large enough to pay for two launches.

    Raises:
        KernelError: `fixed_max` for another dtype than bfloat16.
    """
    b, sq, h, d = q.shape
    sk, hk = k.shape[1:3]
    padded = padded_head_dim(d)
    schedule = schedule or SCHEDULES[padded]
    if fixed_max is None:
        fixed_max = q.dtype == torch.bfloat16 and 4 * b * h * sq * sk * padded >= MIN_FLOPS_FIXED
    elif fixed_max and q.dtype != torch.bfloat16:
        raise KernelError(f"maxima are fixed in bfloat16 only, not {q.dtype}: its exponentials would overflow")
    if state is None or final:
        out = torch.empty(b, sq, h, d, dtype=q.dtype if final else torch.float32, device=q.device)
    else:
        out = state.out
    lse = state.lse if state is not None else torch.empty(b, h, sq, dtype=torch.float32, device=q.device)
    old = state.out if state is not None else out
    mask = row_interval_args(key_range, sq, sk, q.device)
    variant = Variant(
        schedule=schedule,
        padded=padded,
        head_dim=d,
        kind=mask["KIND"],
        has_lo=mask["HAS_LO"] and key_range.kind != "full",
        even_n=sk % schedule.block_n == 0,
        carry=state is not None,
        final=final,
        capped=softcap > 0,
        fixed_max=fixed_max,
    )
    num_m = num_tiles(sq, schedule.groups * GROUP_ROWS)
    num_work = num_m * h * b
    q_desc = describe_heads(q, GROUP_ROWS, padded)
    tensors = (
        q_desc,
        describe_heads(k, schedule.block_n, padded),
        describe_heads(v, schedule.block_n, padded),
        describe_heads(out, GROUP_ROWS, padded) if final else q_desc,
        out,
        old,
        lse,
        mask["LO"],
        mask["HI"],
        mask["stride_lo"],
    )
    sizes = {
        **stride_args(x=old, o=out),
        "stride_lb": lse.stride(0),
        "stride_lh": lse.stride(1),
        "sq": sq,
        "sk": sk,
        "num_heads": h,
        "group": h // hk,
        "num_m": num_m,
        "section": heads_abreast(num_m, h * b, q.device),
        "num_work": num_work,
        # Above 0, so that -inf stays -inf.
        "unit": softcap * LOG2_E if softcap else max(scale * LOG2_E, 1e-30),
        "inner": 2 * LOG2_E * scale / softcap if softcap else 0.0,
    }
    grid = (min(num_work, num_sms(q.device)),)
    given_out, again = _counters(num_work if fixed_max else 0, q.device)
    forward_kernel[grid](*tensors, given_out, again, **sizes, V=variant, num_warps=4)
    if fixed_max:
        # Before it has begun, nobody on the host can know whether there is anything to do.
        second = replace(variant, fixed_max=False, again=True)
        forward_kernel[grid](*tensors, given_out[1:], again, **sizes, V=second, num_warps=4)
    return SoftmaxState(out, lse)


def _counters(num_work: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """How many pieces of work each of two launches has given out; what of `num_work` is to be done again: see `is_right`."""
    given_out, again = torch.zeros(3 + 2 * num_work, dtype=torch.int32, device=device).split_with_sizes(
        [2, 1 + 2 * num_work]
    )
    return given_out, again
