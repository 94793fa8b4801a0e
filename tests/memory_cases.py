"""What a training step allocates of each token, by the account of torch's CPU allocator, with what only a GPU has left out.

GPU kernels and liger's operations need no temporaries, and work in place where they can; those of a CPU do not. So attention
computes nothing here, and norms, RoPE and SwiGLU are stand-ins that keep and allocate what the real ones do on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from longctx import calls, model, offload, rope
from longctx.data import ShardedBatch
from longctx.kernels import SoftmaxState
from longctx.kernels.reference import ReferenceAttention
from longctx.model import Transformer
from longctx.model_config import ModelConfig
from longctx.parallel import ring
from longctx.parallel.cost import Split
from longctx.parallel.head_exchange import GroupHeadLink
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.plan import ParallelPlan
from longctx.parallel.strategy import ContextStrategy
from longctx.sequence import SequenceMeta

# The proportions of Qwen3's 8B.
CONFIG = ModelConfig(
    vocab_size=64, hidden_size=256, num_layers=4, num_heads=32, num_kv_heads=8, head_dim=8, intermediate_size=768, qk_norm=True
)  # fmt: skip
# Local tokens; what grows from one to the other is of tokens.
TOKENS = (768, 1536)


def _forward(self, q, k, v, key_range, *, scale, softcap=0.0, state=None, final=False) -> SoftmaxState:
    out = None if state is None or final else state.out
    if out is None:
        out = torch.zeros(q.shape, dtype=q.dtype if final else torch.float32)
    lse = torch.zeros(q.shape[0], q.shape[2], q.shape[1]) if state is None else state.lse
    return SoftmaxState(out, lse)


def _backward(self, *block, **options) -> None:
    """Not a mock, which would hold what it is called with."""


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, torch.empty(x.shape[:-1]))
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grad, torch.zeros_like(ctx.saved_tensors[1])


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return q.contiguous().view_as(q), k.contiguous().view_as(k)

    @staticmethod
    def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return dq.contiguous(), dk.contiguous()


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return torch.zeros_like(gate)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ctx.saved_tensors


def _row_delta(out: torch.Tensor, dout: torch.Tensor) -> torch.Tensor:
    return torch.zeros(out.shape[0], out.shape[2], out.shape[1])


def _all_to_all(self: GroupHeadLink, send: torch.Tensor, receive: torch.Tensor) -> Callable[[], None]:
    """By messages between pairs: a thread of gloo's carries a collective, and lets go of its tensors when it gets to it."""
    others = [i for i in range(len(self.peers)) if i != self.rank]
    posts = [dist.P2POp(dist.isend, send[i], group=self._group, group_peer=i) for i in others]
    posts += [dist.P2POp(dist.irecv, receive[i], group=self._group, group_peer=i) for i in others]
    works = dist.batch_isend_irecv(posts)
    receive[self.rank].copy_(send[self.rank])

    def wait() -> None:
        for work in works:
            work.wait()

    return wait


def bytes_of_tokens(
    rank: int, plan: ParallelPlan, way: ContextStrategy | Split | None, settings: dict[str, Any]
) -> tuple[float, float]:
    """Bytes of one more token at the peak of a step, and of these the buffers of messages.

    Args:
        way: how the ring's ranks see each other's keys, or how Ulysses exchanges heads; None: nothing is sent.
    """
    torch.set_num_threads(1)
    mesh = ParallelMesh.create(plan, device="cpu")
    patches = [
        mock.patch.object(ReferenceAttention, "forward", _forward),
        mock.patch.object(ReferenceAttention, "backward", _backward),
        mock.patch.object(ring, "row_delta", _row_delta),
        mock.patch.object(GroupHeadLink, "all_to_all", _all_to_all),
        mock.patch.object(model, "rms_norm", lambda x, weight, eps, **rest: _Norm.apply(x, weight)),
        mock.patch.object(model, "silu_mul", lambda gate, up, **rest: _Gate.apply(gate, up)),
        mock.patch.object(rope, "rotate", lambda q, k, cos, sin, **rest: _Rotation.apply(q, k)),
        # A page is not of the device.
        mock.patch.object(offload, "PAGE_BYTES_ELSEWHERE", 1 << 12),
    ]
    for patch in patches:
        patch.start()
    net = Transformer(CONFIG, mesh=mesh, kernel="reference", activation_checkpointing=True, **settings)
    net.to(torch.bfloat16)
    if isinstance(way, Split):

        def always(*args: Any, **rest: Any) -> Split:
            return way

        mock.patch.object(calls, "resolve_split", always).start()
    elif way is not None:
        for layer in net.model.layers:
            layer.self_attn.attention.strategy = way
    peaks = [_peak(net, mesh, tokens) for tokens in TOKENS]
    return tuple((b - a) / (TOKENS[1] - TOKENS[0]) for a, b in zip(*peaks, strict=True))  # type: ignore[return-value]


def _peak(net: Transformer, mesh: ParallelMesh, tokens: int) -> tuple[int, int]:
    """Bytes at the peak of a step on so many local tokens, with the buffers that are there already; and these."""
    places = {
        "ring_rank": mesh.ring.rank, "ring_world": mesh.ring.size,
        "ulysses_rank": mesh.ulysses.rank, "ulysses_world": mesh.ulysses.size,
    }  # fmt: skip
    length = tokens * mesh.ring.size * mesh.ulysses.size
    meta = SequenceMeta.of(length, **places)
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    batch = ShardedBatch(ids, ids, meta, length, 0)
    # The first step makes gradients, buffers and pages, and remembers schedules: what it leaves is not of tokens.
    net(batch).backward()
    peak = _peak_of_step(net, batch)
    buffers = sum(x.numel() for x in mesh.exchange._buffers.values())
    return peak + buffers, buffers


def _peak_of_step(net: Transformer, batch: ShardedBatch) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        net(batch).backward()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak
