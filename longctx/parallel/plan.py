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
from longctx.layout import SequenceLayout, SequenceMeta, get_layout, layout_names, shard_multiple
from longctx.parallel.degrees import chunk_problems, tensor_problems, ulysses_problems

SCHEDULES = ("1f1b", "dualpipev")

# The token spans of a rank that `describe` writes out before it only counts them.
SHOWN_SPANS = 4

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
            estimated to be fastest, logged with the reason.
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
        return f"dp {dp}, pp {self.pp}, ring {self.ring}, ulysses {self.ulysses}, tp {self.tp}{norms}"

    def problems(self) -> list[Problem]:
        """What is wrong with the plan whatever the model, the sequence and the world: impossible or unavailable degrees."""
        found = []
        for name in ("dp", "pp", "ring", "ulysses", "tp"):
            degree = getattr(self, name)
            if degree is not None and degree < 1:
                hint = "leave dp out to use every process that the other degrees leave" if name == "dp" else ""
                found.append(Problem(f"{name} = {degree}: a degree is at least 1", hint or f"{name} 1 leaves it out"))
        if found:
            return found
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
        elif self.grad_dtype != "fp32" and self.ring == 1:
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

    def resolve(self, world_size: int) -> ParallelPlan:
        """The same plan with dp filled in for `world_size` processes.

        Raises:
            PlanError: the degrees are impossible or do not multiply up to `world_size`; lists every problem.
        """
        found = self.problems()
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
        is_fitted = seq_len is not None and self.ring > 1 and self.sequence_layout.fits_masks
        fitted = "; positions for a causal mask, other masks may have others" if is_fitted else ""
        lines = [f"{self}: {self.world_size} ranks, layout {self.layout}{fitted}"]
        width = len(str(self.world_size - 1))
        for rank in range(self.world_size):
            coords = self.coords(rank)
            line = f"  rank {rank:>{width}}  {coords}"
            if seq_len is not None:
                meta = SequenceMeta.of(
                    seq_len,
                    layout=self.sequence_layout,
                    ring_rank=coords.ring,
                    ring_world=self.ring,
                    ulysses_rank=coords.ulysses,
                    ulysses_world=self.ulysses,
                    local_multiple=self.local_multiple,
                )
                real = meta.positions[meta.positions < seq_len]
                line += f"  tokens {_spans(real)}" if len(real) else "  tokens none"
                line += f", {meta.local_len - len(real)} of padding" * (len(real) < meta.local_len)
            if layers is not None:
                held = []
                for stage in self.stages_of(coords.pp):
                    of_stage = f"{layers[stage].start}-{layers[stage].stop - 1}"
                    of_stage += " and embedding" * (stage == 0) + " and head" * (stage == self.num_stages - 1)
                    held.append(of_stage)
                line += f"  layers {', '.join(held)}"
            lines.append(line + self._peers(coords))
        return "\n".join(lines)

    def _peers(self, at: Coords) -> str:
        """The ranks on each axis through `at` that has more than one, as text."""
        sizes = {"tp": self.tp, "ulysses": self.ulysses, "ring": self.ring, "dp": self._resolved_dp, "pp": self.pp}
        found = [
            f"{axis} {','.join(str(self.rank_of(replace(at, **{axis: i}))) for i in range(size))}"
            for axis, size in sizes.items()
            if size > 1
        ]
        return f"  with {'; '.join(found)}" if found else ""


def _spans(positions: torch.Tensor) -> str:
    """Ascending positions as runs, `0-7, 24-31`; the first few, and how many there are."""
    is_break = positions.diff() != 1
    ends = torch.cat([positions[:-1][is_break], positions[-1:]]).tolist()
    starts = torch.cat([positions[:1], positions[1:][is_break]]).tolist()
    shown = [f"{a:_}-{b:_}" if a != b else f"{a:_}" for a, b in zip(starts, ends, strict=True)][:SHOWN_SPANS]
    more = f", ... ({len(starts):_} spans)" if len(starts) > SHOWN_SPANS else ""
    return ", ".join(shown) + more
