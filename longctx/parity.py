"""One process against a plan: attention, every parameter's gradient, its norm and scale, and the loss.

Each quantity is computed three times on the same made-up step: by the plan on its processes, through the engine that trains;
by plain torch on one process in the same dtype; and by plain torch on one process in float64. The error of the first,
measured from the last, may be twice that of the second, and a floor for what rounding leaves to luck (see `comparison`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

import torch

from longctx.broken import broken
from longctx.comparison import FLOORS, Comparison, Tally
from longctx.data import PADDING_TOKEN, ShardedBatch
from longctx.engine import EngineConfig, TrainEngine, build_engine
from longctx.functional import context_parallel_attention
from longctx.masks import AttentionMask, Causal, Documents, SlidingWindow
from longctx.model import ModelConfig, Transformer
from longctx.optim import OptimConfig
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.plan import ParallelPlan
from longctx.process import tell
from longctx.sequence import SequenceMeta
from longctx.shapes import NO_TARGET

# A step of the made-up text: [accumulation][dp].
FullStep = list[list[ShardedBatch]]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Where documents end, as fractions of the sequence; each sequence takes the next row. The first is the plainest that
# crosses shards; then ends on the shards' edges, one document, and a document of one token.
_ENDS = ((0.13, 0.61), (0.5, 0.75), (), (0.001, 0.35, 0.83))
# Of the tokens, this share is no target, as prompts are in fine-tuning: processes hold different numbers of targets.
_LEFT_OUT = 0.3


@dataclass(frozen=True, kw_only=True)
class ParityCase:
    """What is compared: a plan, and a model and a step small enough for float64 on one process.

    Args:
        plan: resolved.
        seq_len: whole length, any.
        mask_documents: the sequences are packed documents.
        device_type: cpu or cuda.
        twins: names of mistakes, each compared after the right code; see `longctx.broken`.
        timeout_s: for each message between processes.
        is_verbose: rank 0 tells on stderr what it is at.
    """

    model: ModelConfig
    engine: EngineConfig
    optim: OptimConfig
    plan: ParallelPlan
    seq_len: int
    mask_documents: bool
    device_type: str = "cpu"
    twins: tuple[str, ...] = ()
    seed: int = 0
    timeout_s: float = 600.0
    is_verbose: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.engine.resolved_dtype(self.device_type)]

    @property
    def floor(self) -> float:
        return FLOORS[self.engine.resolved_dtype(self.device_type)]


def compare_on_rank(rank: int, case: ParityCase) -> dict[str, list[Comparison]]:
    """Everything that is compared, on one of the plan's processes: the right code under "", then each twin.

    Collective over all processes of the plan, which have a process group; attention's tallies are of this rank's shard.
    """
    device = torch.device("cuda", rank) if case.device_type == "cuda" else torch.device("cpu")
    mesh = ParallelMesh.create(case.plan, device=device, timeout=timedelta(seconds=case.timeout_s))
    full = make_step(case, device)

    def say(text: str) -> None:
        if case.is_verbose and rank == 0:
            tell(f"... {text}")

    say(f"one process: plain torch in float64 and in {str(case.dtype).removeprefix('torch.')}")
    exact, plain = _Reference(case, full, torch.float64), _Reference(case, full, case.dtype)
    blocks = _AttentionInputs(case, full, mesh)
    found = {}
    for twin in ("", *case.twins):
        name = f"twin {twin}: " if twin else ""
        with broken(twin, mesh, shard_step(full, mesh)) as batches:
            say(f"{name}attention over ring {case.plan.ring} x ulysses {case.plan.ulysses}")
            comparisons = blocks.compare(mesh, case.engine.kernel, case.floor)
            say(f"{name}a training step on {case.plan.world_size} processes")
            comparisons += _compare_step(case, mesh, batches, exact, plain)
        found[twin] = comparisons
    return found


# ---- the step, whole and cut


def make_step(case: ParityCase, device: torch.device) -> FullStep:
    """The micro-batches of an optimizer step on whole sequences, the same on every process.

    Random tokens, each the label of the one before it. Documents end within shards and on their edges; targets are uneven
    everywhere, and of several processes with other tokens the last one holds none at all.
    """
    plan, rows, accumulation = case.plan, case.engine.micro_batch_size, case.engine.accumulation_steps
    assert plan.dp is not None, "the plan is resolved"
    generator = torch.Generator().manual_seed(case.seed)
    shape = (accumulation, plan.dp, rows, case.seq_len)
    tokens = torch.randint(0, case.model.vocab_size, shape, generator=generator)
    labels = tokens.roll(-1, -1)
    left_out = torch.rand(shape, generator=generator) < _LEFT_OUT
    layout = plan.sequence_layout
    # Kept on the last position of each run that a process holds: where a label comes from another shard. Of striped
    # layouts that is every position.
    shards = [
        SequenceMeta.of(
            case.seq_len,
            layout=layout,
            ring_rank=ring_rank,
            ring_world=plan.ring,
            ulysses_rank=ulysses_rank,
            ulysses_world=plan.ulysses,
            local_multiple=plan.local_multiple,
        ).positions
        for ring_rank in range(plan.ring)
        for ulysses_rank in range(plan.ulysses)
    ]
    shards = [positions[positions < case.seq_len] for positions in shards]
    for positions in shards:
        last = torch.cat([positions[:-1][positions.diff() > 1], positions[-1:]])
        if 4 * len(last) <= len(positions):
            left_out[..., last] = False
    left_out[..., -1] = True
    if plan.grad_world > 1:
        left_out[:, -1, :, shards[-1]] = True
    masks: list[list[AttentionMask]] = []
    for m in range(accumulation):
        masks.append([])
        for d in range(plan.dp):
            first = (m * plan.dp + d) * rows
            ends = [_document_ends(first + row, case.seq_len) for row in range(rows)]
            if case.mask_documents:
                for row, of_row in enumerate(ends):
                    left_out[m, d, row, torch.tensor(of_row[1:]) - 1] = True
            masks[-1].append(Documents(tuple(ends)) & Causal() if case.mask_documents else Causal())
    labels[left_out] = NO_TARGET
    targets = int((labels != NO_TARGET).sum())
    return [
        [
            ShardedBatch(
                tokens[m, d].to(device),
                labels[m, d].to(device),
                SequenceMeta.of(case.seq_len, mask=masks[m][d], layout=layout, device=device),
                targets,
                cursor=0,
            )
            for d in range(plan.dp)
        ]
        for m in range(accumulation)
    ]


def _document_ends(row: int, seq_len: int) -> tuple[int, ...]:
    inner = {max(1, round(part * seq_len)) for part in _ENDS[row % len(_ENDS)]}
    return tuple(sorted({0, seq_len, *(end for end in inner if end < seq_len)}))


def shard_step(full: FullStep, mesh: ParallelMesh) -> list[ShardedBatch]:
    """What the process of `mesh` holds of a step on whole sequences: its micro-batches."""
    mine = []
    for of_dp in full:
        batch = of_dp[mesh.dp.rank]
        meta = _meta_on(mesh, batch.meta.seq_len, batch.meta.mask)
        tokens, labels = meta.shard(batch.tokens, fill=PADDING_TOKEN), meta.shard(batch.labels, fill=NO_TARGET)
        mine.append(replace(batch, tokens=tokens, labels=labels, meta=meta))
    return mine


def _meta_on(mesh: ParallelMesh, seq_len: int, mask: AttentionMask) -> SequenceMeta:
    return SequenceMeta.of(
        seq_len,
        mask=mask,
        layout=mesh.plan.sequence_layout,
        ring_rank=mesh.ring.rank,
        ring_world=mesh.ring.size,
        ulysses_rank=mesh.ulysses.rank,
        ulysses_world=mesh.ulysses.size,
        local_multiple=mesh.plan.local_multiple,
        device=mesh.device,
    )


# ---- training


def reference_backward(model: Transformer, full: FullStep) -> float:
    """Gradients of the mean loss over the step's targets by plain autograd; returns that mean."""
    total = 0.0
    for of_dp in full:
        for batch in of_dp:
            loss = model(batch) / batch.num_target_tokens
            loss.backward()
            total += loss.item()
    return total


class _Reference:
    """One process in plain torch: the loss, each parameter's gradient, their norm. Weights are those of the dtype trained."""

    def __init__(self, case: ParityCase, full: FullStep, dtype: torch.dtype) -> None:
        model = Transformer(case.model, kernel="reference", fused="off", seed=case.seed)
        model = model.to(case.dtype).to(full[0][0].tokens.device, dtype)
        self.loss = reference_backward(model, full)
        self.gradients: dict[str, torch.Tensor] = {}
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, f"{name} has no gradient"
            self.gradients[name] = parameter.grad.double()
        self.norm = gradient_norm(self.gradients)


def gradient_norm(gradients: dict[str, torch.Tensor]) -> float:
    """Of all tensors together, in float64."""
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))


def gradient_scale(gradients: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """By what factor of `exact` the gradient moves the weights: 1 where the loss is scaled rightly."""
    along = sum(float((gradients[name].double() * exact[name].double()).sum()) for name in exact)
    return along / gradient_norm(exact) ** 2


def _number(x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


def _compare_step(
    case: ParityCase, mesh: ParallelMesh, batches: list[ShardedBatch], exact: _Reference, plain: _Reference
) -> list[Comparison]:
    engine: TrainEngine = build_engine(
        case.model, case.engine, case.optim, mesh, total_steps=1, seq_len=case.seq_len, seed=case.seed
    )
    loss = engine.accumulate(0, batches)
    ours = engine.gradients()
    norm = engine.update(0, loss, cursor=0).grad_norm
    assert ours.keys() == exact.gradients.keys(), "the engine has other parameters than one process"
    found = [
        Comparison("gradients", name, Tally.of(ours[name], g), Tally.of(plain.gradients[name], g), case.floor)
        for name, g in exact.gradients.items()
    ]
    our_scale, plain_scale = (gradient_scale(g, exact.gradients) for g in (ours, plain.gradients))
    numbers = (
        ("gradient norm", norm, plain.norm, exact.norm),
        ("gradient scale", our_scale, plain_scale, 1.0),
        ("loss", loss, plain.loss, exact.loss),
    )
    for what, mine, theirs, right in numbers:
        ours_tally, plain_tally = (Tally.of(_number(x), _number(right)) for x in (mine, theirs))
        note = f"{mine:.6g}, one process {right:.6g}"
        found.append(Comparison(what, "", ours_tally, plain_tally, case.floor, note))
    return found


# ---- attention alone


class _AttentionInputs:
    """Random q, k, v and dout of whole sequences, what exact and plain attention make of them, and this rank's shards."""

    NAMES = ("out", "lse", "dq", "dk", "dv")

    def __init__(self, case: ParityCase, full: FullStep, mesh: ParallelMesh) -> None:
        model, b, s, d = case.model, case.engine.micro_batch_size, case.seq_len, case.model.head_size
        mask = full[0][mesh.dp.rank].meta.mask
        self.mask = mask if model.sliding_window is None else mask & SlidingWindow(model.sliding_window)
        # Every ring has its own numbers; the ranks of one ring the same.
        generator = torch.Generator().manual_seed(case.seed + 1 + mesh.dp.rank)
        shapes = [(b, s, heads, d) for heads in (model.num_heads, model.kv_heads, model.kv_heads, model.num_heads)]
        self.whole = [torch.randn(shape, generator=generator).to(mesh.device, case.dtype) for shape in shapes]
        visible = self.mask.materialize(s).to(mesh.device)
        self.exact = _dense([x.double() for x in self.whole], visible)
        self.plain = _dense(self.whole, visible)

    def compare(self, mesh: ParallelMesh, kernel: str, floor: float) -> list[Comparison]:
        """The plan's attention beside one process's; collective."""
        meta = _meta_on(mesh, self.whole[0].shape[1], self.mask)

        def cut(x: torch.Tensor, dim: int = 1) -> torch.Tensor:
            return meta.shard(x, dim, fill=0.0).contiguous()

        q, k, v = (cut(x).requires_grad_() for x in self.whole[:3])
        out, lse = context_parallel_attention(q, k, v, meta=meta, mesh=mesh, kernel=kernel, return_lse=True)
        out.backward(cut(self.whole[3]))
        assert q.grad is not None and k.grad is not None and v.grad is not None  # noqa: PT018
        found = []
        results = zip(self.NAMES, (out, lse, q.grad, k.grad, v.grad), self.exact, self.plain, strict=True)
        for name, ours, exact, plain in results:
            # lse is "b h s", all others "b s h d". What attention makes of padding at the shard's end is nobody's.
            dim, real = 2 if name == "lse" else 1, int((meta.positions < meta.seq_len).sum())
            exact, plain = (cut(x, dim).narrow(dim, 0, real) for x in (exact, plain))
            ours = ours.narrow(dim, 0, real)
            found.append(Comparison("attention", name, Tally.of(ours, exact), Tally.of(plain, exact), floor))
        return found


def _dense(whole: Sequence[torch.Tensor], visible: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Attention with all scores in memory, in the dtype of its inputs: out, lse, dq, dk, dv.

    Args:
        whole: q "b s h d", k and v "b s hk d", dout "b s h d".
        visible: bool [s, s] or [b, s, s].
    """
    q, k, v = (x.detach().clone().requires_grad_() for x in whole[:3])
    groups = q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(groups, 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, keys) / math.sqrt(q.shape[-1])
    shown = visible[:, None] if visible.ndim == 3 else visible
    scores = scores.masked_fill(~shown, -math.inf)
    out = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), values)
    out.backward(whole[3])
    assert q.grad is not None and k.grad is not None and v.grad is not None  # noqa: PT018
    return out.detach(), scores.detach().logsumexp(-1), q.grad, k.grad, v.grad
