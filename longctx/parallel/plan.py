"""Parallel plans: how many processes share which axis, as plain numbers. No GPU, no process group.

A rank's place follows one rule, with tensor parallelism innermost and pipeline stages outermost:

    rank = ((pp_rank * dp + dp_rank) * sp + sp_rank) * tp + tp_rank
    sp_rank = ring_rank * ulysses + ulysses_rank
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from longctx.errors import LongCtxError, PlanError, Problem, did_you_mean, format_problems
from longctx.layout import SequenceLayout, get_layout, layout_names
from longctx.masks import AttentionMask, Causal
from longctx.parallel.degrees import Work, choose_degrees, chunk_problems, tensor_problems, ulysses_problems
from longctx.parallel.placement import describe
from longctx.sequence import shard_multiple

SCHEDULES = ("1f1b", "dualpipev")

# Values of `strategy` and `transport`, explained at `ParallelPlan`.
STRATEGIES = ("auto", "relay", "direct", "gather")
TRANSPORTS = ("auto", "nccl", "copy_engine")


@dataclass(frozen=True)
class Coords:
    """The place of one rank on every axis of a plan."""

    dp: int
    pp: int
    ring: int
    ulysses: int
    tp: int

    def __str__(self) -> str:
        return f"dp{self.dp} pp{self.pp} ring{self.ring} uly{self.ulysses} tp{self.tp}"


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """How many processes share which axis of the work.

    Args:
        dp: replicas that read different samples. None: whatever the world leaves, filled in by `resolve`.
        pp: pipeline stages, each a run of the model's layers; micro-batches are what keeps all of them busy.
        context: processes that share one sequence, which `choose_degrees` splits into ring x ulysses; it stands for both, and a
            plan is used once they are chosen. None: as `ring` and `ulysses` say.
        ring: processes that share one sequence and pass keys and values round a ring.
        ulysses: processes that share one sequence by exchanging it for heads, around the ring's attention: each ring rank
            is that many processes. Must divide the query heads; key heads are divided, or repeated where they are fewer.
        ulysses_chunks: in how many parts a rank's heads are exchanged: attention with one part hides the messages of its
            neighbours, and each part is one more call of the kernel. None: what is estimated to be fastest, logged with the
            reason.
        tp: processes that share each weight matrix; they hold the same tokens. Must divide the query heads, the key heads, the
            features of the SwiGLU and the vocabulary; Ulysses then divides the heads that are left.
        layout: which positions of a sequence each ring rank holds, by name; "auto": for each batch's mask the layout that is
            fastest for it.
        strategy: how the ranks of a ring get to see each other's keys: "relay", "direct", "gather", or "auto": what is
            estimated to be fastest, or hardly slower for less memory, logged with the reason.
        transport: what carries the messages of a ring: "nccl" (gloo on CPUs), "copy_engine" (GPUs of one node, through each
            other's memory), or "auto": NCCL, which was measured as fast.
        grad_dtype: of key and value gradients on the ring's wire: as they are summed, or in half the bytes, rounded at each
            hop.
        schedule: of the pipeline's micro-batches. "1f1b": one forward, one backward in turn. "dualpipev": each process holds two
            stages, one from the front and one from the back, and is idle for less of a step; it keeps the activations of more
            micro-batches, and needs at least 2 pp of them.
        shard_norms: with tp, each of its ranks computes norms and residuals for a part of their tokens only. Activations kept
            for backward and sent between stages are divided by tp; with activation checkpointing, two messages more a layer.
        allow_across_nodes: let the processes of one tp or ulysses group be on several machines, whose network is many times
            slower than what connects the GPUs of one. Refused otherwise.

    The default is one process; a degree of 1 leaves its axis out.
    """

    dp: int | None = None
    pp: int = 1
    context: int | None = None
    ring: int = 1
    ulysses: int = 1
    ulysses_chunks: int | None = None
    tp: int = 1
    layout: str = "zigzag"
    strategy: str = "auto"
    transport: str = "auto"
    schedule: Literal["1f1b", "dualpipev"] = "1f1b"
    shard_norms: bool = False
    allow_across_nodes: bool = False
    grad_dtype: Literal["fp32", "bf16"] = "fp32"

    @property
    def sp(self) -> int:
        """Processes that share one sequence."""
        return self.ring * self.ulysses

    @property
    def grad_world(self) -> int:
        """Processes whose gradients are averaged: dp * sp."""
        return self._resolved_dp * self.sp

    @property
    def world_size(self) -> int:
        """All processes of the plan."""
        return self.pp * self.grad_world * self.tp

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline: one, or two, on each process of the pp axis."""
        return self.pp * (2 if self.schedule == "dualpipev" else 1)

    def stages_of(self, pp_rank: int) -> tuple[int, ...]:
        """The stages that a process of the pp axis holds."""
        return (pp_rank,) if self.schedule == "1f1b" else (pp_rank, self.num_stages - 1 - pp_rank)

    @property
    def sequence_layout(self) -> SequenceLayout:
        """The layout that `layout` names."""
        return get_layout(self.layout)

    @property
    def local_multiple(self) -> int:
        """What the tokens of each rank must be a multiple of, beyond what the layout needs."""
        return self.tp if self.shard_norms else 1

    @property
    def seq_multiple(self) -> int:
        """What a sequence is padded to a multiple of."""
        return shard_multiple(self.sequence_layout, self.ring, self.ulysses, self.local_multiple)

    @property
    def wire_dtype(self) -> torch.dtype | None:
        """`grad_dtype` as `ParallelMesh.create` takes it: None leaves gradients in the dtype of their sums."""
        return torch.bfloat16 if self.grad_dtype == "bf16" else None

    @property
    def _resolved_dp(self) -> int:
        if self.dp is None:
            raise PlanError("dp is not known yet: call plan.resolve(world_size) first, or give dp")
        return self.dp

    def __str__(self) -> str:
        dp = "rest" if self.dp is None else self.dp
        norms = ", norms sharded" * self.shard_norms
        shared = f"ring {self.ring}, ulysses {self.ulysses}" if self.context is None else f"context {self.context}"
        return f"dp {dp}, pp {self.pp}, {shared}, tp {self.tp}{norms}"

    def problems(self) -> list[Problem]:
        """What is wrong with the plan whatever the model, the sequence and the world: impossible or unavailable degrees."""
        found = []
        for name in ("dp", "pp", "context", "ring", "ulysses", "tp"):
            degree = getattr(self, name)
            if degree is not None and degree < 1:
                hint = "leave dp out to use every process that the other degrees leave" if name == "dp" else ""
                found.append(Problem(f"{name} = {degree}: a degree is at least 1", hint or f"{name} 1 leaves it out"))
        if found:
            return found
        if self.context is not None and self.ring * self.ulysses > 1:
            found.append(
                Problem(
                    f"context = {self.context} beside ring {self.ring} and ulysses {self.ulysses}: context chooses both",
                    "leave context out, or ring and ulysses",
                )
            )
        if self.schedule not in SCHEDULES:
            found.append(Problem(f"unknown schedule {self.schedule!r}: {did_you_mean(self.schedule, SCHEDULES)}"))
        elif self.schedule != "1f1b" and self.pp == 1:
            found.append(Problem(f"schedule = {self.schedule}, but there is no pipeline", "schedule 1f1b, or pp 2"))
        if self.shard_norms and self.tp == 1:
            found.append(Problem("shard_norms = true, but there is no tp to share norms", "shard_norms false, or tp 2"))
        if self.layout not in layout_names():
            try:
                get_layout(self.layout)
            except LongCtxError as error:
                found.append(Problem(str(error)))
        for name, known in (("strategy", STRATEGIES), ("transport", TRANSPORTS)):
            if (value := getattr(self, name)) not in known:
                found.append(Problem(f"unknown {name} {value!r}: {did_you_mean(value, known)}"))
        if self.grad_dtype not in ("fp32", "bf16"):
            found.append(Problem(f"grad_dtype = {self.grad_dtype!r} is not known", "one of fp32, bf16"))
        elif self.grad_dtype != "fp32" and self.ring == 1 and self.context is None:
            found.append(
                Problem(
                    f"grad_dtype = {self.grad_dtype} with ring 1: only a ring sends gradients of keys and values",
                    "leave grad_dtype out, or use a ring of 2 or more",
                )
            )
        return found

    def check(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        seq_len: int,
        num_layers: int | None = None,
        mlp_size: int | None = None,
        vocab_size: int | None = None,
    ) -> list[Problem]:
        """Everything that keeps this plan from training such a model on such sequences; empty if nothing does.

        Args:
            num_heads, num_kv_heads, num_layers, mlp_size, vocab_size: of the whole model; None: not asked about.
            seq_len: global length S.
        """
        found = self.problems()
        if num_layers is not None and 1 <= num_layers < self.num_stages:
            each = self.num_stages // self.pp
            fewer = max(n for n in range(1, max(1, num_layers // each) + 1) if self.pp * self.ring % n == 0)
            twice = f" with schedule {self.schedule}" * (each > 1)
            found.append(
                Problem(
                    f"pp {self.pp}{twice} has more stages than the model has layers, {num_layers}",
                    f"nearest for the same processes: pp {fewer} with ring {self.ring * self.pp // fewer}",
                )
            )
        found += tensor_problems(
            self.tp,
            self.ring,
            {
                "num_heads": num_heads,
                "num_kv_heads": num_kv_heads,
                "intermediate_size": mlp_size,
                "vocab_size": vocab_size,
            },
        )
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            divisors = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
            found.append(
                Problem(
                    f"num_heads {num_heads} is not a multiple of num_kv_heads {num_kv_heads}",
                    f"num_kv_heads may be {', '.join(map(str, divisors))}",
                )
            )
        elif min(self.ring, self.ulysses, self.tp) >= 1 and num_heads % self.tp == num_kv_heads % self.tp == 0:
            # Ulysses divides the heads that a tp rank has.
            found += ulysses_problems(
                num_heads // self.tp, num_kv_heads // self.tp, ulysses=self.ulysses, ring=self.ring, tp=self.tp
            )
            found += chunk_problems(
                self.ulysses_chunks,
                num_heads // self.tp,
                num_kv_heads // self.tp,
                ulysses=self.ulysses,
                ring=self.ring,
            )
        if self.sp >= 1 and seq_len < self.sp:
            found.append(
                Problem(
                    f"seq_len = {seq_len:_} is less than a token for each of the {self.sp} ranks that share a sequence",
                    f"use {self.sp:_} or more, or a smaller ring",
                )
            )
        return found

    def choose_degrees(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        seq_len: int,
        mask: AttentionMask | None = None,
        batch: int = 1,
        itemsize: int = 2,
        node_size: int | None = None,
    ) -> tuple[ParallelPlan, str]:
        """The plan with ring and ulysses in the place of `context`, and why these; itself and "" where there is none.

        Args:
            num_heads, num_kv_heads, head_dim: of the whole model.
            seq_len: global length.
            mask: who sees whom; None: causal.
            batch: sequences at a time; itemsize: bytes of one element of activations.
            node_size: processes on each machine; None: all are on one.

        Raises:
            PlanError: no split serves such a model on such machines, or the plan is impossible in itself.

        The order of estimated times decides; explicit degrees are taken as they are.
        """
        if self.context is None:
            return self, ""
        if problems := self.problems():
            raise PlanError(format_problems(f"this plan ({self})", problems))
        work = Work(
            num_heads=num_heads // self.tp,
            num_kv_heads=num_kv_heads // self.tp,
            head_dim=head_dim,
            seq_len=seq_len,
            mask=Causal() if mask is None else mask,
            batch=batch,
            itemsize=itemsize,
            grad_itemsize=2 if self.grad_dtype == "bf16" else max(4, itemsize),
        )
        ring, ulysses, why = choose_degrees(
            self.context,
            work,
            layout=self.sequence_layout,
            strategies=STRATEGIES[1:] if self.strategy == "auto" else (self.strategy,),
            tp=self.tp,
            node_size=node_size,
            may_cross_nodes=self.allow_across_nodes,
            chunks=self.ulysses_chunks,
        )
        # Only a ring sends gradients of keys.
        grad_dtype = self.grad_dtype if ring > 1 else "fp32"
        return replace(self, context=None, ring=ring, ulysses=ulysses, grad_dtype=grad_dtype), why

    def resolve(self, world_size: int) -> ParallelPlan:
        """The same plan with dp filled in for `world_size` processes.

        Raises:
            PlanError: the degrees are impossible, not chosen yet, or do not multiply up to `world_size`; lists every problem.
        """
        found = self.problems()
        if self.context is not None and not found:
            found = [
                Problem(
                    f"context {self.context} is not split into ring and ulysses yet",
                    "call plan.choose_degrees(...), which looks at the model and the length; or give ring and ulysses",
                )
            ]
            raise PlanError(format_problems(f"this plan ({self}, world {world_size})", found))
        if world_size < 1:
            found.append(Problem(f"world size {world_size}: at least 1 process is needed"))
        elif all(degree >= 1 for degree in (self.pp, self.ring, self.ulysses, self.tp)):
            found += self._world_problems(world_size)
        if found:
            raise PlanError(format_problems(f"this plan ({self}, world {world_size})", found))
        return replace(self, dp=world_size // (self.pp * self.sp * self.tp)) if self.dp is None else self

    def _world_problems(self, world_size: int) -> list[Problem]:
        share = self.pp * self.sp * self.tp
        rings = [n for n in range(1, world_size + 1) if world_size % n == 0]
        if world_size % share:
            below = world_size // share * share
            counts = f"{below} or {below + share}" if below else f"{share}"
            return [
                Problem(
                    f"world size {world_size} is not a multiple of pp * ring * ulysses * tp = {share}",
                    f"start {counts} processes, or use ring {', '.join(map(str, rings))} alone",
                )
            ]
        if self.dp is not None and self.dp >= 1 and self.dp * share != world_size:
            return [
                Problem(
                    f"dp * pp * ring * ulysses * tp = {self.dp * share}, but the world has {world_size} processes",
                    f"dp {world_size // share} fits, as does leaving dp out; or start {self.dp * share} processes",
                )
            ]
        return []

    def coords(self, rank: int) -> Coords:
        """The place of `rank` on every axis.

        Raises:
            PlanError: no such rank, or dp is not known yet.
        """
        if not 0 <= rank < self.world_size:
            raise PlanError(f"rank {rank} is not one of the {self.world_size} of this plan ({self})")
        rest, tp = divmod(rank, self.tp)
        rest, sp = divmod(rest, self.sp)
        pp, dp = divmod(rest, self._resolved_dp)
        ring, ulysses = divmod(sp, self.ulysses)
        return Coords(dp, pp, ring, ulysses, tp)

    def rank_of(self, coords: Coords) -> int:
        """The rank at `coords`: the inverse of `coords`."""
        sp = coords.ring * self.ulysses + coords.ulysses
        return ((coords.pp * self._resolved_dp + coords.dp) * self.sp + sp) * self.tp + coords.tp

    def describe(self, seq_len: int | None = None, layers: Sequence[range] | None = None) -> str:
        """Who is where, one line a rank, and with whom.

        Args:
            seq_len: with it, also the token positions that each rank holds under a causal mask.
            layers: of each stage; with it, also the layers that each rank holds.

        Raises:
            PlanError: dp is not known yet, or there is no `seq_len` to cut.
        """
        return describe(self, seq_len, layers)
