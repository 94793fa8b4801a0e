"""Attention of one device as a benchmark sees it: our kernels and other people's, behind one pair of calls."""

from __future__ import annotations

import contextlib
import math
import random
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import get_args

import torch
import torch.nn.functional as F
from torch._functorch import config as functorch_config
from torch.nn.attention import SDPBackend, sdpa_kernel

from longctx.kernels import Direction, SoftmaxState, block_kind, get_kernel, row_delta, state_dtype
from longctx.layout import Contiguous
from longctx.masks import AttentionMask, Causal, Documents, Full, KeyRange, SlidingWindow

# Rows and columns of a tile in Flex's block mask: its own default, and what its kernels are tuned for.
FLEX_BLOCK = 128


class Unavailable(Exception):
    """This implementation cannot do the case here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape and mask to measure.

    Args:
        mask: "causal", "full", "window" (causal, `window` keys) or "docs" (causal, packed documents of lognormal length,
            median 4k, sigma 1, the same ones in every run).
        logits: q is drawn larger, so that the greatest of a row's scores is about this; None: scores of about 1.
    """

    batch: int
    seq_len: int
    heads: int
    kv_heads: int
    head_dim: int
    mask: str = "causal"
    window: int = 4096
    logits: float | None = None

    @property
    def label(self) -> str:
        """The case in words: `4 x 8k, 16/16 heads of 64, causal`."""
        mask = f"window {short(self.window)}" if self.mask == "window" else self.mask
        heads = f"{self.heads}/{self.kv_heads} heads of {self.head_dim}"
        logits = f", logits of {self.logits:g}" if self.logits else ""
        return f"{self.batch} x {short(self.seq_len)}, {heads}, {mask}{logits}"

    @property
    def rule(self) -> AttentionMask:
        """The mask as the library says it."""
        if self.mask == "docs":
            return Causal() & Documents(_documents(self.seq_len))
        return {"causal": Causal(), "full": Full(), "window": Causal() & SlidingWindow(self.window)}[self.mask]

    @property
    def key_range(self) -> KeyRange:
        return Contiguous().local_range(self.rule, 0, 0, 1, self.seq_len)

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.head_dim)

    @property
    def forward_flops(self) -> int:
        """Two products over the pairs that the mask shows. The backward pass has five: 2.5 times as many."""
        return 4 * self.batch * self.heads * self.head_dim * self.rule.area(self.seq_len)

    def inputs(self, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Random q, k, v, dout; the same ones for every implementation."""
        make = torch.Generator(device).manual_seed(0)
        heads = {"q": self.heads, "k": self.kv_heads, "v": self.kv_heads, "dout": self.heads}
        drawn = {
            name: torch.randn(self.batch, self.seq_len, h, self.head_dim, generator=make, device=device, dtype=dtype)
            for name, h in heads.items()
        }
        if self.logits:
            # Scores of unit normals are normal too, and the greatest of n such is about sqrt(2 ln n).
            drawn["q"] *= self.logits / math.sqrt(2 * math.log(max(2, self.seq_len)))
        return drawn


def short(size: int) -> str:
    """8192 as 8k."""
    return f"{size >> 10}k" if size % 1024 == 0 else str(size)


def _documents(seq_len: int) -> tuple[int, ...]:
    # A generator of its own: the boundaries are part of the case, not of the random state of the run.
    lengths, ends = random.Random(0), [0]
    while ends[-1] < seq_len:
        ends.append(min(seq_len, ends[-1] + max(1, round(lengths.lognormvariate(math.log(4096), 1.0)))))
    return tuple(ends)


Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass
class Prepared:
    """What to time. `forward` returns out "b s h d", `backward` dq, dk, dv in the dtype of the inputs.

    Args:
        parts: further calls worth a row of their own, by metric: "block forward" and "block backward" are a kernel alone,
            without the casts and sums around it.
        lse: what it returns of the row sums, "b h s" natural log; None: it gives none.
    """

    forward: Callable[[], torch.Tensor]
    backward: Callable[[], Gradients]
    parts: dict[str, Callable[[], object]] = field(default_factory=dict)
    lse: Callable[[], torch.Tensor] | None = None


class Contender(ABC):
    """One implementation: `name` in the results, `title` in tables."""

    name: str
    title: str
    is_ours = False

    @abstractmethod
    def prepare(self, case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor) -> Prepared:
        """Compile and run once.

        Raises:
            Unavailable: with the reason. Any other error counts as one too.
        """


class Ours(Contender):
    """A registered kernel, called as the library's attention calls it for one whole block."""

    is_ours = True

    def __init__(self, kernel: str) -> None:
        self.name = kernel
        self.title = f"ours: {kernel}"

    def prepare(self, case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor) -> Prepared:
        kernel, key_range = get_kernel(self.name), case.key_range
        kind = block_kind(key_range)
        for direction in get_args(Direction):
            reason = kernel.supports(
                device=q.device, dtype=q.dtype, head_dim=case.head_dim, kind=kind, direction=direction
            )
            if reason:
                raise Unavailable(f"{direction}: {reason}")

        def forward() -> SoftmaxState:
            return kernel.forward(q, k, v, key_range, scale=case.scale, final=True)

        state = forward()
        out = state.out.to(q.dtype)
        delta = row_delta(out, dout)

        def block_backward(delta: torch.Tensor, dq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            dk, dv = torch.empty_like(k), torch.empty_like(v)
            kernel.backward(
                dout, q, k, v, state.lse, delta, key_range,
                scale=case.scale, out=out, dq_acc=dq, dk_acc=dk, dv_acc=dv, fresh=True,
            )  # fmt: skip
            return dk, dv

        def zeros() -> torch.Tensor:
            return torch.zeros(q.shape, dtype=state_dtype(q.dtype), device=q.device)

        def backward() -> Gradients:
            dq = zeros()
            dk, dv = block_backward(row_delta(out, dout), dq)
            return dq.to(q.dtype), dk, dv

        dq = zeros()
        backward()
        return Prepared(
            forward=lambda: forward().out.to(q.dtype),
            backward=backward,
            lse=lambda: forward().lse,
            parts={"block forward": forward, "block backward": lambda: block_backward(delta, dq)},
        )


class Differentiated(Contender):
    """An implementation that torch differentiates: the backward pass runs on one graph, kept."""

    def prepare(self, case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor) -> Prepared:
        attend = self.attend(case)
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        # A compiled graph may otherwise write into what it saved, and could be run backward only once.
        with functorch_config.patch(donated_buffer=False):
            out = attend(*leaves)
            torch.autograd.grad(out, leaves, dout, retain_graph=True)

        def backward() -> Gradients:
            dq, dk, dv = torch.autograd.grad(out, leaves, dout, retain_graph=True)
            return dq, dk, dv

        lse = self.lse(case)
        return Prepared(
            forward=lambda: attend(*leaves),
            backward=backward,
            lse=None if lse is None else lambda: lse(*(x.detach() for x in leaves)),
        )

    @abstractmethod
    def attend(self, case: Case) -> Callable[..., torch.Tensor]:
        """The differentiable call on "b s h d"."""

    def lse(self, case: Case) -> Callable[..., torch.Tensor] | None:
        """The call that gives the row sums, "b h s"; None: there is none."""
        return None


class Sdpa(Differentiated):
    """One backend of torch's scaled_dot_product_attention, and no other in its place."""

    def __init__(self, name: str, title: str, backend: SDPBackend) -> None:
        self.name, self.title, self.backend = name, title, backend

    def attend(self, case: Case) -> Callable[..., torch.Tensor]:
        if case.mask not in ("causal", "full"):
            raise Unavailable(f"no {case.mask} mask but as a dense [S, S] bias")

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            with sdpa_kernel(self.backend):
                out = F.scaled_dot_product_attention(
                    q,
                    k,
                    v,
                    is_causal=case.mask == "causal",
                    scale=case.scale,
                    enable_gqa=case.kv_heads != case.heads,
                )
            return out.transpose(1, 2)

        return attend

    def lse(self, case: Case) -> Callable[..., torch.Tensor] | None:
        """From the operators below scaled_dot_product_attention, which drops it."""
        is_causal = case.mask == "causal"

        def lse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            if self.backend == SDPBackend.CUDNN_ATTENTION:
                got = torch.ops.aten._scaled_dot_product_cudnn_attention(
                    q, k, v, None, True, 0.0, is_causal, False, scale=case.scale
                )[1]
            else:
                # This one knows no grouped heads by itself.
                k, v = (x.repeat_interleave(case.heads // case.kv_heads, 1) for x in (k, v))
                on_gpu = torch.ops.aten._scaled_dot_product_flash_attention
                on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
                got = (on_gpu if q.is_cuda else on_cpu)(q, k, v, 0.0, is_causal, scale=case.scale)[1]
            return got.reshape(case.batch, case.heads, case.seq_len)

        return lse


class Flex(Differentiated):
    """torch's compiled flex_attention, with the block mask made from the same intervals."""

    name, title = "flex", "Flex"

    def attend(self, case: Case) -> Callable[..., torch.Tensor]:
        from torch.nn.attention.flex_attention import flex_attention

        if not torch.cuda.is_available():
            raise Unavailable("compiled for CUDA devices only")
        # Every shape is compiled by itself; past a few, dynamo would fall back to the eager form, which is dense.
        torch._dynamo.reset()
        compiled = torch.compile(flex_attention, dynamic=False)
        block_mask = None if case.mask == "full" else flex_block_mask(case, torch.device("cuda"))

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            grouped = case.kv_heads != case.heads
            return compiled(q, k, v, block_mask=block_mask, scale=case.scale, enable_gqa=grouped).transpose(1, 2)

        return attend


def flex_block_mask(case: Case, device: torch.device):
    """The BlockMask of a case, from its intervals: `create_block_mask` would first make the dense [S, S] mask."""
    from torch.nn.attention.flex_attention import BlockMask

    lo, hi = (x[0] for x in case.key_range.bounds(case.seq_len, case.seq_len))
    blocks = -(-case.seq_len // FLEX_BLOCK)
    pad = blocks * FLEX_BLOCK - case.seq_len
    # Rows beyond the sequence repeat the last one, so that they change no minimum or maximum.
    first, last = (torch.cat([x, x[-1:].expand(pad)]).view(blocks, FLEX_BLOCK) for x in (lo, hi))
    start = torch.arange(blocks) * FLEX_BLOCK
    touched = (first.amin(1)[:, None] < start + FLEX_BLOCK) & (last.amax(1)[:, None] > start)
    full = (first.amax(1)[:, None] <= start) & (last.amin(1)[:, None] >= start + FLEX_BLOCK)

    def listed(dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        counts, order = dense.sum(1), dense.int().argsort(dim=1, descending=True, stable=True)
        return counts.int()[None, None].to(device), order.int()[None, None].contiguous().to(device)

    lo, hi = lo.to(device), hi.to(device)

    def in_interval(b, h, q, k):
        return (k >= lo[q]) & (k < hi[q])

    def causal(b, h, q, k):
        return k <= q

    return BlockMask.from_kv_blocks(
        *listed(touched & ~full),
        *listed(full),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=causal if case.mask == "causal" else in_interval,
        seq_lengths=(case.seq_len, case.seq_len),
    )


class FlashAttention4(Differentiated):
    """flash-attn-4 (CuTe), where it is installed."""

    name, title = "fa4", "FA4"

    def attend(self, case: Case) -> Callable[..., torch.Tensor]:
        call = self._call(case)
        return lambda q, k, v: call(q, k, v)[0]

    def lse(self, case: Case) -> Callable[..., torch.Tensor] | None:
        call = self._call(case)
        return lambda q, k, v: call(q, k, v, return_lse=True)[1].reshape(case.batch, case.heads, case.seq_len)

    def _call(self, case: Case) -> Callable[..., tuple[torch.Tensor, ...]]:
        """out "b s h d" and whatever else it returns."""
        try:
            from flash_attn.cute import flash_attn_func, flash_attn_varlen_func
        except ImportError as error:
            raise Unavailable(f"flash-attn-4 is not installed ({error})") from error
        options: dict = {"softmax_scale": case.scale, "causal": case.mask != "full"}
        if case.mask == "window":
            options["window_size"] = (case.window - 1, 0)
        if case.mask != "docs":
            return lambda q, k, v, **more: _as_tuple(flash_attn_func(q, k, v, **options, **more))
        ends = torch.tensor(_documents(case.seq_len), dtype=torch.int32, device="cuda")
        longest = int(ends.diff().max())
        options |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": longest, "max_seqlen_k": longest}

        def packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **more: object) -> tuple[torch.Tensor, ...]:
            if case.batch != 1:
                raise Unavailable("packed documents are measured with one sequence")
            out, *rest = _as_tuple(flash_attn_varlen_func(q[0], k[0], v[0], **options, **more))
            return out[None], *rest

        return packed


def _as_tuple(got: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    # Releases differ in whether out comes alone.
    return got if isinstance(got, tuple) else (got,)


def contenders(ours: tuple[str, ...]) -> list[Contender]:
    """Peers first, then our kernels of those names."""
    return [
        Sdpa("fa2", "FA2 (torch)", SDPBackend.FLASH_ATTENTION),
        Flex(),
        Sdpa("cudnn-torch", "cuDNN (torch)", SDPBackend.CUDNN_ATTENTION),
        FlashAttention4(),
        *(Ours(name) for name in ours),
    ]


@contextlib.contextmanager
def reasons() -> Iterator[list[str]]:
    """Collect the warnings by which torch says why a backend was refused, instead of printing them."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield said
        finally:
            said += [str(w.message).split(" (Triggered")[0] for w in caught]
