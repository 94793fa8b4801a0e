"""Attention over several GPUs as a benchmark sees it: our strategies and other people's, behind one pair of calls."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from longctx.errors import DistributedError, PlanError
from longctx.functional import attention, context_parallel_attention
from longctx.layout import get_layout
from longctx.parallel.journal import Journal
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.plan import ParallelPlan
from longctx.parallel.strategy import ContextStrategy, DirectStrategy
from longctx.parallel.transport import NcclSettings
from longctx.peers import Case, Unavailable
from longctx.sequence import SequenceMeta

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class SilentLink:
    """A link over which nothing is sent: what remains of the time is computation, and a copy of what would have arrived.

    That is random numbers where a ring's keys would be, and the own ones where exchanged heads would: a GPU computes faster on
    zeros, by more than what is to be measured. Results are wrong.
    """

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.peers = rank, tuple(range(world))
        self._arrives: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}

    def swap(
        self, send: Sequence[torch.Tensor], receive: Sequence[torch.Tensor], *, to: int, source: int, room: int
    ) -> Callable[[], None]:
        for x in receive:
            key = x.dtype, x.device
            if key not in self._arrives or self._arrives[key].numel() < x.numel():
                self._arrives[key] = torch.randn(x.numel(), dtype=x.dtype, device=x.device)
            x.view(-1).copy_(self._arrives[key][: x.numel()])
        return lambda: None

    def all_to_all(self, send: torch.Tensor, receive: torch.Tensor) -> Callable[[], None]:
        receive.copy_(send)
        return lambda: None


@dataclass(frozen=True)
class Ranks:
    """Who measures: this process's place, its device, and the meshes that contenders share."""

    rank: int
    world: int
    device: torch.device
    meshes: dict[tuple[ParallelPlan, NcclSettings | None], ParallelMesh] = field(default_factory=dict)
    _silent: dict[ParallelPlan, ParallelMesh] = field(default_factory=dict)

    def mesh(self, plan: ParallelPlan, nccl: NcclSettings | None = None) -> ParallelMesh:
        """The mesh of that plan, made once. Collective."""
        if (plan, nccl) not in self.meshes:
            self.meshes[plan, nccl] = ParallelMesh.create(plan, device=self.device, nccl=nccl)
        return self.meshes[plan, nccl]

    def silent(self, plan: ParallelPlan) -> ParallelMesh:
        """The mesh of that plan with nobody to talk to, made once."""
        if plan not in self._silent:
            self._silent[plan] = self._make_silent(plan)
        return self._silent[plan]

    def _make_silent(self, plan: ParallelPlan) -> ParallelMesh:
        real = self.mesh(plan)
        link, head_link = (
            SilentLink(axis.rank, axis.size) if axis.size > 1 else None for axis in (real.ring, real.ulysses)
        )
        return ParallelMesh(
            plan.resolve(self.world),
            self.rank,
            device=self.device,
            groups={},
            link=link,
            head_link=head_link,
            ring_in_one_node=real.ring_in_one_node,
            ulysses_in_one_node=real.ulysses_in_one_node,
        )


class RingContender(ABC):
    """One way to attend over several ranks: `name` in the results, `title` in tables."""

    name: str
    title: str
    is_ours = False

    def meta(self, case: Case, ranks: Ranks) -> SequenceMeta:
        """Which positions this rank holds; zigzag over all ranks unless overridden."""
        return SequenceMeta.of(case.seq_len, mask=case.rule, ring_rank=ranks.rank, ring_world=ranks.world)

    @abstractmethod
    def prepare(self, case: Case, ranks: Ranks) -> contextlib.AbstractContextManager[Attend]:
        """A context in which the call works: local q, k, v "b s h d" -> out, differentiable. Collective.

        Raises:
            Unavailable: with the reason; on all ranks.
        """

    def without_messages(self, case: Case, ranks: Ranks) -> Attend | None:
        """The same computation with no message sent, where that can be had."""
        return None

    def journal(self, ranks: Ranks) -> Journal | None:
        """Where its messages are noted, and how long they were waited for, if anywhere."""
        return None


class _Ours(RingContender):
    """What the library does over a mesh of its own."""

    is_ours = True
    strategy: str | ContextStrategy | None = None

    @abstractmethod
    def plan(self, ranks: Ranks) -> ParallelPlan:
        """Degrees and settings."""

    def mesh(self, ranks: Ranks) -> ParallelMesh:
        """Collective when called first."""
        return ranks.mesh(self.plan(ranks))

    def prepare(self, case: Case, ranks: Ranks) -> contextlib.AbstractContextManager[Attend]:
        problems = self.plan(ranks).check(num_heads=case.heads, num_kv_heads=case.kv_heads, seq_len=case.seq_len)
        if problems:
            raise Unavailable(f"{problems[0].what}; {problems[0].hint}")
        try:
            mesh = self.mesh(ranks)
        except (DistributedError, PlanError) as error:
            raise Unavailable(str(error).splitlines()[0]) from error
        return contextlib.nullcontext(self._attend(case, ranks, mesh))

    def without_messages(self, case: Case, ranks: Ranks) -> Attend:
        return self._attend(case, ranks, ranks.silent(self.plan(ranks)))

    def journal(self, ranks: Ranks) -> Journal:
        return self.mesh(ranks).journal

    def _attend(self, case: Case, ranks: Ranks, mesh: ParallelMesh) -> Attend:
        meta = self.meta(case, ranks)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return context_parallel_attention(q, k, v, meta=meta, mesh=mesh, strategy=self.strategy, scale=case.scale)

        return attend


class OurStrategy(_Ours):
    """A strategy of the library over a transport.

    Args:
        nccl: how NCCL shares the GPU; None: as it is set.
        note: what is special about it, as part of the contender's name.
    """

    def __init__(
        self, strategy: str | ContextStrategy, transport: str, nccl: NcclSettings | None = None, note: str = ""
    ) -> None:
        name = strategy if isinstance(strategy, str) else strategy.name
        self.name = f"{name}-{transport}" + f"-{note}" * bool(note)
        self.title = f"ours: {name}, {transport}" + f" ({note})" * bool(note)
        self.strategy = strategy
        self._transport, self._nccl = transport, nccl

    def plan(self, ranks: Ranks) -> ParallelPlan:
        return ParallelPlan(ring=ranks.world, transport=self._transport)

    def mesh(self, ranks: Ranks) -> ParallelMesh:
        return ranks.mesh(self.plan(ranks), self._nccl)

    def meta(self, case: Case, ranks: Ranks) -> SequenceMeta:
        """In the layout that the library takes for this mask."""
        layout = get_layout("auto")
        return SequenceMeta.of(
            case.seq_len, mask=case.rule, layout=layout, ring_rank=ranks.rank, ring_world=ranks.world
        )


class OurUlysses(_Ours):
    """The library's all-to-all around its kernels.

    Args:
        chunks: of a rank's heads, as in `ParallelPlan.ulysses_chunks`.
    """

    def __init__(self, chunks: int | None = None) -> None:
        self._chunks = chunks
        self.name = "ulysses" if chunks is None else f"ulysses-{chunks}"
        self.title = "ours: ulysses" if chunks is None else f"ours: ulysses, heads in {chunks}"

    def plan(self, ranks: Ranks) -> ParallelPlan:
        return ParallelPlan(ulysses=ranks.world, ulysses_chunks=self._chunks)

    def meta(self, case: Case, ranks: Ranks) -> SequenceMeta:
        return SequenceMeta.of(case.seq_len, mask=case.rule, ulysses_rank=ranks.rank, ulysses_world=ranks.world)


class OurHybrid(_Ours):
    """Heads exchanged among neighbours, and keys passed round among those who then hold the same heads."""

    def __init__(self, ring: int, ulysses: int) -> None:
        self._ring, self._ulysses = ring, ulysses
        self.name = f"hybrid-{ring}x{ulysses}"
        self.title = f"ours: ring {ring} x ulysses {ulysses}"

    def plan(self, ranks: Ranks) -> ParallelPlan:
        return ParallelPlan(ring=self._ring, ulysses=self._ulysses)

    def meta(self, case: Case, ranks: Ranks) -> SequenceMeta:
        coords = self.plan(ranks).resolve(ranks.world).coords(ranks.rank)
        return SequenceMeta.of(
            case.seq_len, mask=case.rule, layout=get_layout("auto"),
            ring_rank=coords.ring, ring_world=self._ring, ulysses_rank=coords.ulysses, ulysses_world=self._ulysses,
        )  # fmt: skip


class PlainUlysses(RingContender):
    """torch's all-to-all around its cuDNN attention (on a CPU its own), as one writes it down."""

    name, title = "ulysses-torch", "Ulysses, cuDNN (torch)"

    def meta(self, case: Case, ranks: Ranks) -> SequenceMeta:
        return SequenceMeta.of(case.seq_len, mask=case.rule, ulysses_rank=ranks.rank, ulysses_world=ranks.world)

    def prepare(self, case: Case, ranks: Ranks) -> contextlib.AbstractContextManager[Attend]:
        if case.mask not in ("causal", "full"):
            raise Unavailable(f"no {case.mask} mask but as a dense [S, S] bias")
        if case.heads % ranks.world or case.kv_heads % ranks.world:
            raise Unavailable(f"{case.heads}/{case.kv_heads} heads over {ranks.world} ranks")
        from torch.distributed._functional_collectives import all_to_all_single_autograd

        group = ranks.mesh(ParallelPlan(ulysses=ranks.world)).ulysses.group
        assert group is not None, "there are at least two ranks"

        def exchange(x: torch.Tensor) -> torch.Tensor:
            return all_to_all_single_autograd(x.contiguous(), None, None, group)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            # b s h d -> u b s h/u d -> b (u s) h/u d
            parts = [x.unflatten(2, (ranks.world, -1)).movedim(2, 0) for x in (q, k, v)]
            q, k, v = (exchange(x).movedim(0, 1).flatten(1, 2).transpose(1, 2) for x in parts)
            with sdpa_kernel(_backend(ranks.device)):
                out = F.scaled_dot_product_attention(
                    q, k, v, is_causal=case.mask == "causal", scale=case.scale, enable_gqa=case.kv_heads != case.heads
                )
            out = out.transpose(1, 2).unflatten(1, (ranks.world, -1)).movedim(1, 0)
            return exchange(out).movedim(0, 2).flatten(2, 3)

        return contextlib.nullcontext(attend)


class TorchContextParallel(RingContender):
    """torch.distributed.tensor.experimental.context_parallel around cuDNN, with one of its two ways to move keys."""

    def __init__(self, method: str) -> None:
        self.name = f"torch-cp-{method}"
        self.title = f"torch CP {method}, cuDNN"
        self._method = method

    def prepare(self, case: Case, ranks: Ranks) -> contextlib.AbstractContextManager[Attend]:
        if ranks.device.type != "cuda":
            raise Unavailable("its ring knows CUDA's attention kernels only")
        if case.mask != "causal":
            raise Unavailable("it knows causal masks only")
        return self._context(case, ranks)

    @contextlib.contextmanager
    def _context(self, case: Case, ranks: Ranks) -> Iterator[Attend]:
        from torch.distributed.tensor.experimental import context_parallel
        from torch.distributed.tensor.experimental._attention import set_rotate_method

        set_rotate_method(self._method)
        mesh = _device_mesh(ranks.world)
        # It asks for buffers of the whole sequence, to cut them as it is used to: head and tail, which is zigzag.
        whole = torch.zeros(case.seq_len, device=ranks.device)
        repeats = case.heads // case.kv_heads

        def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            is_gqa = k.shape[1] != q.shape[1]
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=case.scale, enable_gqa=is_gqa)
            return out.transpose(1, 2)

        def expanded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return grouped(q, *(x.repeat_interleave(repeats, 2) for x in (k, v)))

        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), context_parallel(mesh, buffers=[whole], buffer_seq_dims=[0]):
            yield grouped if _can_differentiate(grouped, case, ranks) else expanded


@cache
def _device_mesh(world: int):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cuda", (world,))


def _can_differentiate(attend: Attend, case: Case, ranks: Ranks) -> bool:
    """Whether the call works forward and backward on a short shard with the heads of the case."""
    shape = (1, 256, case.kv_heads, case.head_dim)
    k = torch.zeros(shape, device=ranks.device, dtype=torch.bfloat16, requires_grad=True)
    q = torch.zeros(1, 256, case.heads, case.head_dim, device=ranks.device, dtype=torch.bfloat16, requires_grad=True)
    try:
        attend(q, k, k).sum().backward()
    except RuntimeError:
        return False
    return k.grad is not None and k.grad.shape == shape


@dataclass(frozen=True)
class OneGpu:
    """One device with its share of the heads and the whole sequence: what a GPU reaches if nothing is sent."""

    kernel: str

    @property
    def title(self) -> str:
        return f"one GPU: {self.kernel}"

    def attend(self, case: Case, ranks: Ranks) -> tuple[Case, Attend]:
        """The share of the case, and the call.

        Raises:
            Unavailable: the heads cannot be shared, or the kernel cannot do it.
        """
        if case.kv_heads % ranks.world:
            raise Unavailable(f"{case.kv_heads} key heads cannot be shared over {ranks.world}")
        share = replace(case, heads=case.heads // ranks.world, kv_heads=case.kv_heads // ranks.world)
        if self.kernel == "ours":
            return share, lambda q, k, v: attention(q, k, v, mask=case.rule, scale=case.scale)
        if case.mask not in ("causal", "full"):
            raise Unavailable(f"no {case.mask} mask but as a dense [S, S] bias")

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            with sdpa_kernel(_backend(ranks.device)):
                return F.scaled_dot_product_attention(
                    q, k, v, is_causal=case.mask == "causal", scale=case.scale, enable_gqa=case.kv_heads != case.heads
                ).transpose(1, 2)

        return share, attend


@dataclass(frozen=True)
class OneGpuHalo:
    """One device with its share of the tokens, all heads, and before these as many tokens as the first of them see.

    What a GPU reaches of a window that is sent no more than it needs. The rate counts the halo's own queries too.
    """

    title: str = "one GPU: ours, share and halo"

    def attend(self, case: Case, ranks: Ranks) -> tuple[Case, Attend]:
        """As `OneGpu.attend`."""
        if case.mask != "window":
            raise Unavailable("only a window has a halo")
        share = replace(case, seq_len=-(-case.seq_len // ranks.world) + case.window)
        return share, lambda q, k, v: attention(q, k, v, mask=share.rule, scale=case.scale)


def _backend(device: torch.device) -> SDPBackend:
    return SDPBackend.CUDNN_ATTENTION if device.type == "cuda" else SDPBackend.MATH


# Whether the direct exchange holds the last keys for the backward pass, which by its name alone it decides itself.
DIRECT_VARIANTS = ((True, "held"), (False, "again"))


def ring_contenders(transports: Sequence[str], sms: Sequence[int] = (), *, world: int = 2) -> list[RingContender]:
    """Peers first, then ours: every strategy and variant over every transport, what "auto" takes, Ulysses, and rings of it.

    Args:
        sms: also the direct exchange over NCCL that takes at most so many SMs, each, and one without priority.
    """
    held = [OurStrategy("direct", "nccl", NcclSettings(max_sms=n), f"{n}sms") for n in sms]
    if sms:
        held.append(OurStrategy("direct", "nccl", NcclSettings(has_priority=False), "no-priority"))
    return [
        TorchContextParallel("alltoall"),
        TorchContextParallel("allgather"),
        PlainUlysses(),
        *(OurUlysses(chunks) for chunks in (None, 1, 2, 4)),
        *(OurStrategy(s, t) for t in transports for s in ("relay", "direct", "gather")),
        *(OurStrategy(DirectStrategy(holds), t, note=n) for t in transports for holds, n in DIRECT_VARIANTS),
        *held,
        *(OurHybrid(ring, world // ring) for ring in range(2, world // 2 + 1) if world % ring == 0),
        OurStrategy("auto", "auto"),
    ]
