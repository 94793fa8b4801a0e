"""Plans of every axis, each trained some steps and held against one process. Run by the processes of a plan."""

from __future__ import annotations

import gc
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from train_cases import MODEL, SEQ_LEN, ReferenceTrainer, full_step, relative_error

from longctx.checkpoint import TrainState, latest_checkpoint, load_checkpoint, save_checkpoint
from longctx.engine import EngineConfig, TrainEngine, build_engine
from longctx.model import ModelConfig
from longctx.optim import OptimConfig
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.plan import ParallelPlan
from longctx.parity import reference_backward, shard_step

STEPS = 5
TOLERANCE = 1e-5
# Four query and four key heads, so that tp 2 and ulysses 2 both divide them; three layers, so that stages are uneven.
WIDE = replace(MODEL, num_kv_heads=4, num_layers=3)
# A large eps: Adam would otherwise turn a gradient near 0 and its rounding into steps of one size.
OPTIM = OptimConfig(lr=1e-2, warmup_steps=1, eps=1e-4, gradient_clipping=0.5)


@dataclass(frozen=True, kw_only=True)
class PlanCase:
    """One plan and how it is trained."""

    dp: int = 1
    pp: int = 1
    ring: int = 1
    ulysses: int = 1
    tp: int = 1
    zero: int = 1
    accumulation: int = 1
    tied: bool = False
    recompute: bool = False
    rich: bool = False
    layers: int = 3
    steps: int = STEPS

    @property
    def plan(self) -> ParallelPlan:
        return ParallelPlan(dp=self.dp, pp=self.pp, ring=self.ring, ulysses=self.ulysses, tp=self.tp)

    @property
    def model(self) -> ModelConfig:
        made = replace(WIDE, tie_embeddings=self.tied, num_layers=self.layers)
        return replace(made, qkv_bias=True, qk_norm=True, sliding_window=20) if self.rich else made

    @property
    def world(self) -> tuple[int, int, int]:
        """What DeepSpeed knows of a plan: cases that agree in it can share their processes."""
        return (self.pp, self.dp * self.ring * self.ulysses, self.tp)

    def __str__(self) -> str:
        degrees = [f"{axis}{n}" for axis in ("dp", "pp", "ring", "ulysses", "tp") if (n := getattr(self, axis)) > 1]
        words = [f"zero{self.zero}", f"accumulate{self.accumulation}"]
        words += [name for name in ("tied", "recompute", "rich") if getattr(self, name)]
        return "-".join((degrees or ["one"]) + words)


def train_plans(rank: int, cases: list[PlanCase]) -> dict[str, dict[str, float]]:
    """For each case, relative errors of the losses, norms and parameters after all steps, worst first; on every rank."""
    return {str(case): errors(case) for case in cases}


def errors(case: PlanCase) -> dict[str, float]:
    engine = make_engine(case)
    mesh = engine.mesh
    # The last rank of the last replica has no target.
    last = (mesh.ring.size - 1, mesh.ring.size, mesh.ulysses.size - 1, mesh.ulysses.size)
    starved = (mesh.dp.size - 1, *last) if mesh.grad.size > 1 else None
    steps = [full_step(n, dp=case.dp, accumulation=case.accumulation, starved=starved) for n in range(case.steps)]
    reference = ReferenceTrainer(OPTIM, total_steps=case.steps, config=case.model)
    found: dict[str, float] = {}

    def note(name: str, got: float, expected: float) -> None:
        found[name] = max(found.get(name, 0.0), abs(got - expected) / abs(expected))

    for n, full in enumerate(steps):
        result = engine.train_step(n, shard_step(full, mesh))
        loss, norm = reference.step(n, full)
        note("loss", result.loss, loss)
        note("grad_norm", result.grad_norm, norm)
    with torch.no_grad():
        evaluated = engine.evaluate(shard_step(steps[0], mesh))
    note("evaluated", evaluated, reference_backward(reference.model, steps[0]))
    state = engine.full_state_dict()
    if mesh.rank == 0:
        for name, parameter in reference.model.named_parameters():
            found[name] = relative_error(state.pop(name), parameter.detach())
        assert not state, f"the engine has more parameters: {list(state)}"
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def resume_plans(rank: int, root: str, cases: list[PlanCase], dtype: str) -> dict[str, dict[str, float]]:
    """For each case, steps that go on from a checkpoint beside the same steps without one: relative differences."""
    found = {}
    for case in cases:
        path = Path(root) / f"{case}-{dtype}"
        straight = make_engine(case, dtype)
        losses = take_steps(straight, case, 0, 2)
        save_checkpoint(path, straight, TrainState(step=2), fingerprint=asdict(case.model), keep=1)
        losses += take_steps(straight, case, 2, 4)
        resumed = make_engine(case, dtype)
        state = load_checkpoint(latest_checkpoint(path), resumed, asdict(case.model))
        again = take_steps(resumed, case, state.step, 4)
        found[str(case)] = {
            f"step {n}": abs(a - b) / b for n, (a, b) in enumerate(zip(again, losses[2:], strict=True), 2)
        }
        want, got = straight.full_state_dict(), resumed.full_state_dict()
        found[str(case)] |= {name: relative_error(got[name], want[name]) for name in want}
    return found


def take_steps(engine: TrainEngine, case: PlanCase, first: int, last: int) -> list[float]:
    steps = (full_step(n, dp=case.dp, accumulation=case.accumulation) for n in range(first, last))
    return [engine.train_step(n, shard_step(full, engine.mesh)).loss for n, full in enumerate(steps, first)]


def make_engine(case: PlanCase, dtype: str = "fp32") -> TrainEngine:
    gc.freeze()
    mesh = ParallelMesh.create(case.plan, device="cpu")
    settings = EngineConfig(
        zero_stage=case.zero,
        dtype=dtype,
        micro_batch_size=2,
        accumulation_steps=case.accumulation,
        activation_checkpointing=case.recompute,
        zero3_keep_elements=0,
        kernel="reference",
    )
    return build_engine(case.model, settings, OPTIM, mesh, total_steps=case.steps, seq_len=SEQ_LEN, seed=0)
