"""Cases of block attention, the dense oracle that they are held against, and the check.

A check runs wherever its kernel does: in the interpreter, on a GPU, or in plain torch. It imports no test framework, so
that a process of its own can run it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from longctx.errors import KernelError
from longctx.kernels import BlockAttention, SoftmaxState, block_kind, get_kernel, row_delta, state_dtype
from longctx.masks import UNBOUNDED, KeyRange


@dataclass(frozen=True)
class Case:
    """One block, or `blocks` blocks of keys one after the other.

    Args:
        visible: a name in `VISIBLE`.
        amplitude: q is multiplied by it: 1 gives ordinary scores, 200 scores of some hundred, so that a few keys take all.
        strided: q, k, v and dout are slices of larger tensors that hold nan elsewhere.
        descriptor: let a Triton kernel use tensor descriptors.
        softcap: of the scores; 0 for none.
    """

    kernel: str
    dtype: str
    visible: str
    sq: int
    sk: int
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 32
    batch: int = 2
    blocks: int = 1
    amplitude: float = 1.0
    strided: bool = False
    descriptor: bool = False
    softcap: float = 0.0

    @property
    def id(self) -> str:
        extra = [f"{self.blocks}blocks"] * (self.blocks > 1) + [f"x{self.amplitude:g}"] * (self.amplitude != 1)
        extra += ["strided"] * self.strided + ["descriptor"] * self.descriptor
        extra += [f"cap{self.softcap:g}"] * (self.softcap != 0)
        shape = f"{self.sq}x{self.sk}-h{self.heads}_{self.kv_heads}-d{self.head_dim}"
        return "-".join([self.kernel, self.dtype, self.visible, shape, *extra])


def _rows(batch: int, sq: int, sk: int, per_sequence: bool) -> KeyRange:
    """Causal inside documents of uneven length, with rows that see nothing: what a hop of a packed batch looks like."""
    ends = []
    for n in range(batch if per_sequence else 1):
        row = torch.arange(sq)
        at = row * sk // sq
        length = 7 + 12 * n
        lo = at // length * length
        hi = torch.minimum(at + 1, torch.tensor(sk))
        # Every third document is empty: its rows see nothing.
        hi = torch.where(at // length % 3 == 2, lo, hi)
        ends.append((lo, torch.maximum(lo, hi).cummax(0).values))
    lo, hi = (torch.stack(x).to(torch.int32) for x in zip(*ends, strict=True))
    return KeyRange("rows", lo, torch.maximum(hi, lo))


def _rectangle(sq: int, sk: int) -> KeyRange:
    """The second half of the rows sees a middle interval of the keys."""
    seen = torch.arange(sq) >= sq // 2
    lo = torch.full((1, sq), sk // 4, dtype=torch.int32)
    hi = torch.where(seen, 3 * sk // 4 + 1, sk // 4).clamp(max=sk).to(torch.int32)[None]
    return KeyRange("rows", lo, hi)


VISIBLE = {
    "empty": lambda b, sq, sk: KeyRange.empty(),
    "full": lambda b, sq, sk: KeyRange.full(),
    "causal": lambda b, sq, sk: KeyRange.causal(),
    "window": lambda b, sq, sk: KeyRange("band", -max(1, sk // 3), 1),
    "both_sides": lambda b, sq, sk: KeyRange("band", -max(1, sk // 4), max(2, sk // 5)),
    # Hops away from the diagonal: the first rows see nothing, or the last ones do.
    "late": lambda b, sq, sk: KeyRange("band", -UNBOUNDED, -max(1, sq // 3)),
    "leaving": lambda b, sq, sk: KeyRange("band", max(1, sk // 3), UNBOUNDED),
    "rows": lambda b, sq, sk: _rows(b, sq, sk, per_sequence=False),
    "rows_per_sequence": lambda b, sq, sk: _rows(b, sq, sk, per_sequence=True),
    "rectangle": lambda b, sq, sk: _rectangle(sq, sk),
}


@dataclass
class Inputs:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        return Inputs(*(t.to(dtype) for t in vars(self).values()))


def make_inputs(case: Case, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(hash_of(case))
    q_shape = (case.batch, case.sq, case.heads, case.head_dim)
    k_shape = (case.batch, case.sk, case.kv_heads, case.head_dim)

    def make(shape: tuple[int, ...], amplitude: float = 1.0) -> torch.Tensor:
        values = (torch.randn(shape, generator=generator, dtype=torch.float64) * amplitude).to(
            getattr(torch, case.dtype)
        )
        if not case.strided:
            return values.to(device)
        b, s, h, d = shape
        # Between heads, between rows and before the start there is something else, as in a packed qkv projection.
        frame = torch.full((b, s + 3, h + 1, d + 8), math.nan, dtype=values.dtype, device=device)
        view = frame[:, 2 : 2 + s, 1:, 8:]
        view.copy_(values)
        return view

    return Inputs(make(q_shape, case.amplitude), make(k_shape), make(k_shape), make(q_shape))


def hash_of(case: Case) -> int:
    """A seed that does not depend on the kernel: all kernels see the same numbers."""
    return sum(ord(c) * (i + 1) for i, c in enumerate(replace(case, kernel="", descriptor=False).id))


def dense(inputs: Inputs, visible: torch.Tensor, scale: float, softcap: float = 0.0) -> dict[str, torch.Tensor]:
    """Attention by the book in the dtype of the inputs, with autograd: out, lse, dq, dk, dv. Grouped heads are expanded."""
    q, k, v = (t.detach().clone().requires_grad_() for t in (inputs.q, inputs.k, inputs.v))
    group = q.shape[2] // k.shape[2]
    q_, k_, v_ = (t.transpose(1, 2) for t in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    mask = visible[:, None].to(q.device)
    seen = mask.any(-1, keepdim=True)
    # A row without keys would be nan: let it see all and drop what comes out.
    s = (q_ @ k_.transpose(-1, -2)) * scale
    s = (softcap * torch.tanh(s / softcap) if softcap else s).masked_fill(~(mask | ~seen), -math.inf)
    out = torch.where(seen, s.softmax(-1) @ v_, 0.0).transpose(1, 2)
    lse = torch.where(seen[..., 0], s.logsumexp(-1), -math.inf)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), inputs.dout)
    return {"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}


def key_blocks(case: Case, key_range: KeyRange) -> Iterator[tuple[slice, KeyRange]]:
    """The keys in `blocks` uneven pieces, and which of them each row sees; in an order that is not ascending."""
    if case.blocks == 1:
        yield slice(0, case.sk), key_range
        return
    lo, hi = key_range.bounds(case.sq, case.sk)
    cuts = [0, *(round(case.sk * (i + 0.3) / case.blocks) for i in range(1, case.blocks)), case.sk]
    pieces = [slice(a, b) for a, b in itertools.pairwise(cuts)]
    for piece in pieces[1:] + pieces[:1]:
        width = piece.stop - piece.start
        yield piece, KeyRange.of((lo - piece.start).clamp(0, width), (hi - piece.start).clamp(0, width), width)


@contextmanager
def poisoned():
    """Inside, memory that torch leaves unset holds nan: what a kernel forgets to write shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def fill(t: torch.Tensor) -> torch.Tensor:
        return t.fill_(math.nan) if t.is_floating_point() else t

    torch.empty = lambda *args, **kwargs: fill(empty(*args, **kwargs))
    torch.empty_like = lambda *args, **kwargs: fill(empty_like(*args, **kwargs))
    try:
        yield
    finally:
        torch.empty, torch.empty_like = empty, empty_like


def run(
    case: Case, kernel: BlockAttention, inputs: Inputs, key_range: KeyRange, scale: float, forward_only: bool = False
) -> dict[str, torch.Tensor]:
    """out, lse, dq, dk, dv of a kernel; the gradients are added to accumulators that already hold something."""
    q, k, v, dout = inputs.q, inputs.k, inputs.v, inputs.dout
    blocks = list(key_blocks(case, key_range))
    options = {"softcap": case.softcap} if case.softcap else {}
    with poisoned():
        state = None
        for keys, part in blocks:
            state = kernel.forward(q, k[:, keys], v[:, keys], part, scale=scale, state=state, **options)
        assert state is not None
        assert state.out.dtype == state.lse.dtype == state_dtype(q.dtype)
        if forward_only:
            return {"out": state.out, "lse": state.lse}
        out = state.out.to(q.dtype)
        delta = row_delta(out, dout)
        into = {
            name: torch.full(t.shape, 0.5, dtype=state_dtype(q.dtype), device=q.device)
            for name, t in (("dq", q), ("dk", k), ("dv", v))
        }
        for keys, part in blocks:
            dk, dv = (
                torch.full_like(into[n][:, keys], 0.5, memory_format=torch.contiguous_format) for n in ("dk", "dv")
            )
            kernel.backward(
                dout, q, k[:, keys], v[:, keys], state.lse, delta, part,
                scale=scale, out=out, dq_acc=into["dq"], dk_acc=dk, dv_acc=dv, **options,
            )  # fmt: skip
            into["dk"][:, keys], into["dv"][:, keys] = dk, dv
    return {"out": state.out, "lse": state.lse, **{n: t - 0.5 for n, t in into.items()}}


def check_last_and_only(case: Case, device: str = "cpu") -> None:
    """`final` and `fresh` give what the general path gives, rounded once, in memory that held something else.

    Raises:
        AssertionError: they differ by more than an ulp of the inputs' dtype.
    """
    kernel, inputs, scale = kernel_of(case), make_inputs(case, device), case.head_dim**-0.5
    key_range = VISIBLE[case.visible](case.batch, case.sq, case.sk)
    block = inputs.q, inputs.k, inputs.v
    close = {"rtol": 2 * torch.finfo(inputs.q.dtype).eps, "atol": 1e-6}
    before = kernel.forward(*block, KeyRange.causal(), scale=scale)
    with poisoned():
        for seen in (None, before):
            carried = [None if seen is None else SoftmaxState(seen.out.clone(), seen.lse.clone()) for _ in range(2)]
            usual = kernel.forward(*block, key_range, scale=scale, state=carried[0])
            last = kernel.forward(*block, key_range, scale=scale, state=carried[1], final=True)
            assert last.out.dtype in (inputs.q.dtype, usual.out.dtype)
            torch.testing.assert_close(last.out.to(inputs.q.dtype), usual.out.to(inputs.q.dtype), **close)
            torch.testing.assert_close(last.lse, usual.lse, rtol=1e-6, atol=1e-6)
        out = usual.out.to(inputs.q.dtype)
        rest = (inputs.dout, *block, usual.lse, row_delta(out, inputs.dout), key_range)
        zeros = [torch.zeros(x.shape, dtype=state_dtype(x.dtype), device=device) for x in block]
        names = ("dq_acc", "dk_acc", "dv_acc")
        kernel.backward(*rest, scale=scale, out=out, **dict(zip(names, zeros, strict=True)))
        for dtype in (state_dtype(inputs.q.dtype), inputs.q.dtype):
            into = [torch.zeros_like(zeros[0]), *(torch.empty(x.shape, dtype=dtype, device=device) for x in block[1:])]
            kernel.backward(*rest, scale=scale, out=out, **dict(zip(names, into, strict=True)), fresh=True)
            for name, found, expected in zip(names, into, zeros, strict=True):
                torch.testing.assert_close(found, expected.to(found.dtype), **close, msg=lambda m, n=name: f"{n}: {m}")


# What any order of the same operations may be off, in units of eps times the largest true value.
FLOOR_ULPS = 2.0


def check(
    case: Case, device: str = "cpu", kernel: BlockAttention | None = None, forward_only: bool = False
) -> dict[str, float]:
    """Hold a kernel against float64: no more than twice the error of plain torch in the same dtype plus a few ulps, as
    maximum and as RMS. Returns, per output, the largest error as a part of what is allowed.

    Raises:
        AssertionError: naming output, measure, error and bound.
    """
    if kernel is None:
        kernel = kernel_of(case)
    inputs = make_inputs(case, device)
    scale = case.head_dim**-0.5
    key_range = VISIBLE[case.visible](case.batch, case.sq, case.sk)
    if case.blocks == 1:
        reason = kernel.supports(
            device=inputs.q.device,
            dtype=inputs.q.dtype,
            head_dim=case.head_dim,
            kind=block_kind(key_range),
            softcap=case.softcap,
        )
        assert reason is None, reason
    lo, hi = key_range.bounds(case.sq, case.sk)
    index = torch.arange(case.sk)
    visible = (index >= lo[..., None]) & (index < hi[..., None])
    true = dense(inputs.to(torch.float64), visible, scale, case.softcap)
    plain = dense(inputs, visible, scale, case.softcap)
    # The state is fp32 whatever the inputs, so its lse is held against torch in fp32.
    plain["lse"] = dense(inputs.to(state_dtype(inputs.q.dtype)), visible, scale, case.softcap)["lse"]
    got = run(case, kernel, inputs, key_range, scale, forward_only)
    # Probabilities are recomputed from an lse that is rounded to the state's dtype: their relative error is eps * |lse|.
    state_eps = torch.finfo(state_dtype(inputs.q.dtype)).eps
    rounded = state_eps * float(true["lse"].masked_fill(true["lse"] == -math.inf, 0.0).abs().max())
    # dq and dk are differences of terms as large as dv, which may cancel: with one key they are 0.
    gradients = torch.cat([true[name].flatten() for name in ("dq", "dk", "dv")])
    used = {}
    for name, values in got.items():
        want = true[name]
        sized = gradients if name in ("dq", "dk", "dv") else want
        eps = rounded + (state_eps if name == "lse" else torch.finfo(inputs.q.dtype).eps)
        used[name] = _compare(f"{case.id} {name}", values, want, plain[name], sized, eps, state_eps)
    return used


def _compare(
    what: str,
    got: torch.Tensor,
    want: torch.Tensor,
    plain: torch.Tensor,
    sized: torch.Tensor,
    eps: float,
    state_eps: float,
) -> float:
    assert got.shape == want.shape, f"{what}: shape {list(got.shape)}, not {list(want.shape)}"
    unseen = want == -math.inf
    assert torch.equal(got == -math.inf, unseen), f"{what}: -inf in the wrong rows"
    got, want, plain = (t.double().masked_fill(unseen, 0.0) for t in (got, want, plain))
    sized = sized.masked_fill(sized == -math.inf, 0.0)
    assert bool(got.isfinite().all()), f"{what}: {int((~got.isfinite()).sum())} of {got.numel()} are not finite"
    worst = 0.0
    for measure, of in (("max", lambda t: t.abs().max().item()), ("rms", lambda t: t.square().mean().sqrt().item())):
        error, theirs, size = of(got - want), of(plain - want), of(sized)
        # The accumulators start at 0.5, so they end with its rounding.
        bound = 2 * theirs + FLOOR_ULPS * (eps * size + state_eps)
        assert error <= bound, (
            f"{what}: {measure} error {error:.3g} > {bound:.3g} (torch {theirs:.3g}, size {size:.3g})"
        )
        worst = max(worst, error / bound)
    return worst


def kernel_of(case: Case) -> BlockAttention:
    kernel = get_kernel(case.kernel)
    if case.kernel != "triton":
        return kernel
    from longctx.kernels.tiles import padded
    from longctx.kernels.triton_attention import TritonAttention
    from longctx.kernels.tuning import Tiles, tiles_for

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tuned = tiles_for(padded(case.head_dim), getattr(torch, case.dtype), device)
    return TritonAttention(
        Tiles(*(replace(tile, use_descriptor=case.descriptor) for tile in (tuned.forward, tuned.dq, tuned.dkdv)))
    )


def check_row_kernels(dtype: str, device: str = "cpu") -> None:
    """The fused row kernels against float64: delta, and a block merged into a state with rows that neither has seen."""
    from longctx.kernels.merge import fused_row_delta, merge_block
    from longctx.kernels.tiles import INTERPRETING

    delta_of = fused_row_delta if INTERPRETING or device == "cuda" else row_delta
    generator = torch.Generator().manual_seed(7)
    b, s, h, d = 2, 45, 3, 20

    def make(*shape: int, kind: str = "float32") -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(getattr(torch, kind)).to(device)

    # Slices of something wider: heads 1 to 3, strides that are not packed.
    out, dout = make(b, s, h + 1, d, kind=dtype)[:, :, 1:], make(b, s, h, d, kind=dtype)
    with poisoned():
        delta = delta_of(out, dout)
    want = (out.double() * dout.double()).sum(-1).transpose(1, 2)
    assert delta.is_contiguous()
    assert (delta - want).abs().max() <= 1e-6 * want.abs().max() * d

    # A view of the rows 3 on of a larger state, as for a block that only the later rows see.
    whole = SoftmaxState(make(b, s + 3, h, d), make(b, h, s + 3))
    before = SoftmaxState(whole.out.clone(), whole.lse.clone())
    state = SoftmaxState(whole.out[:, 3:], whole.lse[:, :, 3:])
    lse = make(b, h, s)
    state.lse[0, 1, :9] = -math.inf
    state.out[0, :9, 1] = 0.0
    lse[0, 1, 4:12] = -math.inf
    new = torch.logaddexp(state.lse.double(), lse.double())
    base = new.masked_fill(new == -math.inf, 0.0)
    old_weight, new_weight = (torch.exp(x - base).transpose(1, 2)[..., None] for x in (state.lse, lse))
    want = state.out * old_weight + out * new_weight
    merge_block(state, out, lse)
    assert bool((state.lse[0, 1, 4:9] == -math.inf).all())
    assert bool((state.out[0, 4:9, 1] == 0.0).all())
    assert (state.out - want).abs().max() <= 4e-7 * (1 + want.abs().max())
    assert (state.lse - new).masked_fill(new == -math.inf, 0.0).abs().max() <= 1e-6
    assert torch.equal(whole.out[:, :3], before.out[:, :3]), "rows outside the view were written"
    assert torch.equal(whole.lse[:, :, :3], before.lse[:, :, :3]), "rows outside the view were written"


def check_same_bits(case: Case, device: str = "cpu") -> None:
    """The same block three times gives the same bits."""
    inputs, visible = make_inputs(case, device), VISIBLE[case.visible](case.batch, case.sq, case.sk)
    first, *others = (run(case, kernel_of(case), inputs, visible, case.head_dim**-0.5) for _ in range(3))
    for other in others:
        for name in first:
            assert torch.equal(first[name], other[name]), f"{name} differs between runs"


def check_refusals(device: str = "cpu") -> str:
    """A negative scale is refused; returns the message."""
    case = Case("triton", "float32", "full", 4, 4)
    inputs = make_inputs(case, device)
    try:
        kernel_of(case).forward(inputs.q, inputs.k, inputs.v, KeyRange.full(), scale=-1.0)
    except KernelError as error:
        return str(error)
    raise AssertionError("scale -1 was accepted")
