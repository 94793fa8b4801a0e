"""The settings of a training step, and what of them cannot work: on a device, or with a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from longctx.errors import Problem, did_you_mean
from longctx.kernels import kernel_names

if TYPE_CHECKING:
    from longctx.parallel.plan import ParallelPlan


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a step is computed.

    Args:
        zero_stage: what DeepSpeed spreads over the dp x sp processes: 0 nothing, 1 the optimizer's state, 2 and gradients,
            3 and parameters.
        dtype: of parameters and activations; the optimizer always works on fp32. "auto": bf16 on CUDA, fp32 elsewhere.
        micro_batch_size: sequences of one forward pass.
        accumulation_steps: forward and backward passes of one optimizer step.
        activation_checkpointing: recompute activations in backward; attention's result is kept.
        activation_offload: with activation_checkpointing, what layers keep for backward lies in the host's memory, but for
            two of them (`longctx.offload`).
        mlp_chunk_tokens: most tokens of a process whose SwiGLU is computed at once, forward and backward; none: all of a
            micro-batch. Without activation_checkpointing it recomputes two of the SwiGLU's three products.
        kernel: attention kernel; "auto" takes the fastest that can do the work.
        fused: fused norms, RoPE, SwiGLU and loss: "auto" where they are installed and there is a GPU, "on", "off".
        zero3_keep_elements: with ZeRO-3, parameters of fewer elements stay whole on every process.
        offload: what lies in the host's memory and is fetched when it is needed: "optimizer" its state, which the CPU then
            updates (ZeRO 1 to 3); "all" the partitioned parameters as well (ZeRO 3).
    """

    zero_stage: int = 1
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    micro_batch_size: int = 1
    accumulation_steps: int = 1
    activation_checkpointing: bool = False
    activation_offload: bool = False
    mlp_chunk_tokens: int | None = None
    kernel: str = "auto"
    fused: Literal["auto", "on", "off"] = "auto"
    zero3_keep_elements: int = 100_000
    offload: Literal["none", "optimizer", "all"] = "none"

    def resolved_dtype(self, device_type: str) -> str:
        """ "fp32" or "bf16"."""
        return ("bf16" if device_type == "cuda" else "fp32") if self.dtype == "auto" else self.dtype

    def problems(self, device_type: str | None = None) -> list[Problem]:
        """What is wrong with these settings on that type of device; None: CUDA where there is one, else the CPU."""
        found = []
        for name, allowed in (
            ("zero_stage", (0, 1, 2, 3)),
            ("dtype", ("auto", "fp32", "bf16")),
            ("fused", ("auto", "on", "off")),
            ("offload", ("none", "optimizer", "all")),
        ):
            value = getattr(self, name)
            if value not in allowed:
                found.append(
                    Problem(f"engine.{name} = {value!r} is not known", f"one of {', '.join(map(str, allowed))}")
                )
        for name, least in (("micro_batch_size", 1), ("accumulation_steps", 1), ("zero3_keep_elements", 0)):
            value = getattr(self, name)
            if value < least:
                found.append(Problem(f"engine.{name} = {value}: it must be {least} or more"))
        if self.mlp_chunk_tokens is not None and self.mlp_chunk_tokens < 1:
            found.append(
                Problem(
                    f"engine.mlp_chunk_tokens = {self.mlp_chunk_tokens}: it must be 1 or more",
                    "engine.mlp_chunk_tokens none for all tokens at once, or 16k",
                )
            )
        if self.kernel != "auto" and self.kernel not in kernel_names():
            found.append(
                Problem(
                    f"engine.kernel = {self.kernel!r} is unknown", did_you_mean(self.kernel, ["auto", *kernel_names()])
                )
            )
        if device_type is None:
            device_type = "cuda" if torch.cuda.is_available() else "cpu"
        if self.zero_stage == 0 and self.resolved_dtype(device_type) == "bf16":
            # DeepSpeed 0.19's bf16 optimizer for stage 0 takes a step on zero gradients when it is made.
            chosen = "" if self.dtype == "bf16" else f" (what {self.dtype!r} means on {device_type})"
            found.append(
                Problem(
                    f"engine.dtype bf16{chosen} with engine.zero_stage 0: DeepSpeed takes a phantom optimizer step there",
                    "engine.zero_stage 1 does the same arithmetic rightly, also on one process; or engine.dtype fp32",
                )
            )
        if self.activation_offload and not self.activation_checkpointing:
            found.append(
                Problem(
                    "engine.activation_offload without engine.activation_checkpointing: what is moved to the host is what "
                    "checkpointing keeps",
                    "engine.activation_checkpointing true, or engine.activation_offload false",
                )
            )
        least_stage = {"optimizer": 1, "all": 3}.get(self.offload, 0)
        if self.zero_stage < least_stage:
            found.append(
                Problem(
                    f"engine.offload {self.offload} with engine.zero_stage {self.zero_stage}: DeepSpeed moves to the host what "
                    "ZeRO has partitioned",
                    f"engine.zero_stage {least_stage}" + ", or engine.offload optimizer" * (0 < self.zero_stage < 3),
                )
            )
        return found

    def plan_problems(self, plan: ParallelPlan) -> list[Problem]:
        """What of these settings does not go together with a plan."""
        found = []
        if plan.pp > 1 and self.zero_stage > 1:
            found.append(
                Problem(
                    f"engine.zero_stage {self.zero_stage} with pp {plan.pp}: a stage's gradients are needed whole until its "
                    "last micro-batch, so DeepSpeed has no ZeRO 2 or 3 with a pipeline",
                    f"engine.zero_stage 1, or pp 1 with ring {plan.ring * plan.pp}",
                )
            )
        if plan.schedule == "dualpipev" and self.accumulation_steps < plan.num_stages:
            found.append(
                Problem(
                    f"engine.accumulation_steps {self.accumulation_steps} with schedule dualpipev and pp {plan.pp}: it needs "
                    f"{plan.num_stages} micro-batches or more",
                    f"engine.accumulation_steps {plan.num_stages}, or schedule 1f1b",
                )
            )
        if plan.pp > 1 and self.offload != "none":
            found.append(
                Problem(
                    f"engine.offload {self.offload} with pp {plan.pp}: DeepSpeed then accumulates bf16 gradients where its "
                    "pipeline does not look for those of a tied embedding, which come out wrong",
                    "engine.offload none, or pp 1",
                )
            )
        if plan.tp > 1 and self.fused == "on":
            found.append(
                Problem(
                    f"engine.fused = on with tp {plan.tp}: liger's loss needs the logits of the whole vocabulary",
                    "engine.fused = auto takes liger for all else",
                )
            )
        return found
