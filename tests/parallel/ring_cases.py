"""Attention over a ring, Ulysses or both against plain float64 attention of the whole sequence: cases, and the check that ranks run on them.

Knows nothing of key intervals, schedules or messages: the other side is a dense mask and torch.softmax.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch

from longctx import functional
from longctx.kernels import state_dtype
from longctx.layout import Balanced, Contiguous, SequenceLayout, Striped, ZigZag
from longctx.masks import AttentionMask, Causal, Documents, Full, PrefixLM, SlidingWindow
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.ring import RING_ATTENTION_BACKWARD_OP, RING_ATTENTION_OP
from longctx.parallel.schedule import CommBytes, RingSchedule, ulysses_comm_bytes
from longctx.parallel.strategy import ContextStrategy, get_strategy
from longctx.sequence import SequenceMeta

# A multiple of what every layout asks for at 3 and at 4 ranks.
SEQ_LEN = 96
# A multiple of nothing: sequences of this length are padded on any ring.
ODD_LEN = 89
BATCH = 2
TENSORS = ("out", "lse", "dq", "dk", "dv")
FLOAT64_BOUND = 1e-12
# What stands in q, k, v and their gradients' inputs at padding.
PADDING = 3.0


@dataclass(frozen=True)
class Before(AttentionMask):
    """A query sees what came before it, not itself: the first sees nothing. A mask that the library does not know."""

    def key_range(self, q_pos: torch.Tensor, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros_like(q_pos), q_pos


LAYOUTS: dict[str, SequenceLayout] = {
    "contiguous": Contiguous(),
    "zigzag": ZigZag(),
    "striped1": Striped(),
    "striped4": Striped(block=4),
    "balanced": Balanced(),
}


def _masks(seq_len: int) -> dict[str, AttentionMask]:
    docs = Documents((0, 1, 9, 9, 40, 77, seq_len))
    own_docs = Documents(((0, 50, seq_len), (0, 3, 4, 60, seq_len)))
    return {
        "full": Full(),
        "causal": Causal(),
        "before": Before(),
        "window": SlidingWindow(11),
        "window_causal": SlidingWindow(7) & Causal(),
        "docs": docs,
        "docs_causal": docs & Causal(),
        "docs_causal_window": docs & Causal() & SlidingWindow(6),
        "own_docs": own_docs,
        "own_docs_causal": own_docs & Causal(),
        "prefix": PrefixLM(41),
    }


MASKS = _masks(SEQ_LEN)
ODD_MASKS = _masks(ODD_LEN)

# Query heads and key heads.
HEADS = {"gqa": (4, 2), "mqa": (3, 1), "mha": (2, 2), "mqa4": (4, 1), "gqa6": (6, 3), "mqa6": (6, 1), "gqa8": (8, 4)}


@dataclass(frozen=True)
class Case:
    mask: str
    layout: str
    dtype: torch.dtype = torch.float64
    heads: str = "gqa"
    head_dim: int = 8
    seq_len: int = SEQ_LEN
    kernel: str = "reference"
    # Whether the loss depends on lse too.
    lse_gradient: bool = True
    strategy: str | ContextStrategy | None = "relay"
    # Of Ulysses: whether what came for the forward pass is expected to stay.
    holds: bool = True

    def __str__(self) -> str:
        parts = [self.mask, self.layout, str(self.dtype).removeprefix("torch."), self.heads, self.kernel]
        parts += [str(self.strategy)] * (self.strategy != "relay") + ["lse"] * self.lse_gradient
        return "-".join(parts + [f"s{self.seq_len}"] * (self.seq_len != SEQ_LEN))


def all_cases() -> list[Case]:
    """Every mask with every layout exactly, every mask in single precision, at an odd length, every grouping of heads, bf16."""
    cases = [Case(mask, layout) for mask, layout in itertools.product(MASKS, LAYOUTS)]
    cases += odd_cases()
    cases += [Case(mask, "zigzag", torch.float32, lse_gradient=False) for mask in MASKS]
    cases += [Case("docs_causal", "zigzag", heads=heads) for heads in ("mqa", "mha")]
    cases += [Case("own_docs_causal", layout, torch.bfloat16) for layout in LAYOUTS]
    return cases


def odd_cases(heads: str = "gqa") -> list[Case]:
    """Every mask on a padded sequence, the layouts in turn."""
    return [
        Case(mask, layout, heads=heads, seq_len=ODD_LEN)
        for mask, layout in zip(MASKS, itertools.cycle(("zigzag", "balanced", "contiguous", "striped4")), strict=False)
    ]


@dataclass
class Report:
    """What one rank found: the worst error of each tensor with what is allowed, and what it sent."""

    errors: dict[str, tuple[float, float]]
    sent: CommBytes
    predicted: CommBytes
    digest: str
    distances: tuple[int, ...]

    @property
    def wrong(self) -> list[str]:
        return [
            f"{name}: error {error:.2e}, allowed {allowed:.2e}"
            for name, (error, allowed) in self.errors.items()
            if not error <= allowed
        ]


def dense_attention(q, k, v, visible: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """out "b s h d" and lse "b h s" by definition, in the dtype of q; `visible` is bool [S, S] or [b, S, S]."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    visible = visible[:, None] if visible.ndim == 3 else visible
    seen = visible.any(-1)
    scores = torch.einsum("bihd,bjhd->bhij", q * scale, k)
    # Rows that see nothing would be nan: they get even weights, which are then taken away.
    scores = scores.masked_fill(~visible & seen[..., None], float("-inf"))
    p = scores.softmax(-1) * visible
    lse = scores.logsumexp(-1).masked_fill(~seen, float("-inf"))
    return torch.einsum("bhij,bjhd->bihd", p, v), lse


def inputs(case: Case, device: torch.device) -> list[torch.Tensor]:
    """q, k, v, dout and dlse of the whole sequence, the same on every rank, in float64 but rounded to the case's dtype."""
    # Every strategy gets the same numbers.
    generator = torch.Generator().manual_seed(sum(map(ord, str(replace(case, strategy="relay")))))
    h, hk = HEADS[case.heads]

    def draw(*shape: int) -> torch.Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        return x.to(case.dtype).double().to(device)

    b, s, d = BATCH, case.seq_len, case.head_dim
    return [draw(b, s, h, d), draw(b, s, hk, d), draw(b, s, hk, d), draw(b, s, h, d), draw(b, h, s)]


def run_case(
    mesh: ParallelMesh, case: Case, mask: AttentionMask | None = None, *, through_autograd: bool = True
) -> Report:
    """Attention, forward and backward, on this rank's shards, compared with its part of the dense result.

    Args:
        mask: instead of the one that the case names.
        through_autograd: False calls the backward operator directly, as threads that share one GPU must.
    """
    layout = LAYOUTS[case.layout]
    mask = mask or (ODD_MASKS if case.seq_len == ODD_LEN else MASKS)[case.mask]
    rank, world = mesh.ring.rank, mesh.ring.size
    scale = case.head_dim**-0.5
    visible = mask.materialize(case.seq_len).to(mesh.device)

    def dense(q, k, v):
        return dense_attention(q, k, v, visible, scale)

    whole = inputs(case, mesh.device)
    given = slice(0, 5 if case.lse_gradient else 4)
    exact = _gradients(whole[given], dense)
    # lse and its gradient stay in the state's precision.
    rounded = [x.to(case.dtype) for x in whole[:4]] + [whole[4].to(torch.promote_types(case.dtype, torch.float32))]
    plain = None if case.dtype == torch.float64 else _gradients(rounded[given], dense)

    meta = SequenceMeta.of(
        case.seq_len,
        mask=mask,
        layout=layout,
        ring_rank=rank,
        ring_world=world,
        ulysses_rank=mesh.ulysses.rank,
        ulysses_world=mesh.ulysses.size,
    )
    shards = [meta.shard(x, dim=2 if x is rounded[4] else 1, fill=PADDING) for x in rounded]
    schedule = RingSchedule.build(meta.padded_mask, meta.layout, rank, world, meta.padded_len)
    sent = [_sent(mesh)]
    if through_autograd:

        def attend(q, k, v):
            result = functional.context_parallel_attention(
                q, k, v, meta=meta, mesh=mesh, scale=scale, kernel=case.kernel, strategy=case.strategy, return_lse=True
            )
            sent.append(_sent(mesh))
            return result

        ours = _gradients(shards[given], attend)
    else:
        q, k, v, dout, dlse = shards
        rest = (*schedule.packed, case.kernel, scale, mesh.exchange.handle)
        out, lse, held = RING_ATTENTION_OP(q, k, v, *rest)
        sent.append(_sent(mesh))
        dlse = dlse if case.lse_gradient else None
        ours = [out, lse, *RING_ATTENTION_BACKWARD_OP(dout, dlse, q, k, v, out, lse, held, *rest)]
    sent.append(_sent(mesh))

    errors = {}
    for i, name in enumerate(TENSORS):
        # Padding sees nothing and is seen by nobody, whatever stands there.
        part = meta.shard(exact[i], 2, fill=float("-inf")) if name == "lse" else meta.shard(exact[i], fill=0)
        allowed = FLOAT64_BOUND
        if plain is not None:
            floor = 4 * torch.finfo(ours[i].dtype).eps * _finite(part).abs().max().item()
            allowed = 2 * _distance(plain[i], exact[i]) + floor
        errors[name] = (_distance(ours[i], part), allowed)
    predicted = _predicted(mesh, case, schedule, meta.local_len)
    counted = CommBytes(sent[1] - sent[0], sent[2] - sent[1])
    return Report(errors, counted, predicted, schedule.digest, schedule.distances)


def _sent(mesh: ParallelMesh) -> int:
    return mesh.exchange.bytes_sent + mesh.head_exchange.bytes_sent


def _predicted(mesh: ParallelMesh, case: Case, schedule: RingSchedule, local_len: int) -> CommBytes:
    (h, hk), ulysses, lse = HEADS[case.heads], mesh.ulysses.size, state_dtype(case.dtype)
    chosen = case.strategy or "relay"
    ring = (get_strategy(chosen) if isinstance(chosen, str) else chosen).comm_bytes(
        schedule,
        batch=BATCH,
        num_kv_heads=max(hk, ulysses) // ulysses,
        head_dim=case.head_dim,
        itemsize=case.dtype.itemsize,
        grad_itemsize=(mesh.exchange.grad_dtype or lse).itemsize,
    )
    there, back = (
        ulysses_comm_bytes(
            ulysses=ulysses,
            batch=BATCH,
            local_len=local_len,
            num_heads=h,
            num_kv_heads=hk,
            head_dim=case.head_dim,
            itemsize=case.dtype.itemsize,
            lse_itemsize=lse.itemsize if with_lse else 0,
            holds=case.holds,
        )
        for with_lse in (True, case.lse_gradient)
    )
    return CommBytes(ring.forward + there.forward, ring.backward + back.backward)


def _gradients(tensors: list[torch.Tensor], attend) -> list[torch.Tensor]:
    """out, lse, dq, dk, dv, given q, k, v, dout and dlse; dlse may be missing."""
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    results = attend(q, k, v)
    ends = [(x, dx.to(x.dtype)) for x, dx in zip(results, tensors[3:], strict=False)]
    grads = torch.autograd.grad([x for x, _ in ends], (q, k, v), [dx for _, dx in ends])
    return [*(x.detach() for x in results), *grads]


def _finite(x: torch.Tensor) -> torch.Tensor:
    return x.double().masked_fill(x == float("-inf"), 0.0)


def _distance(x: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest difference; infinite unless both are -inf at the same places. NaN stays NaN."""
    if not torch.equal(x == float("-inf"), exact == float("-inf")):
        return float("inf")
    return (_finite(x) - _finite(exact)).abs().max().item()
