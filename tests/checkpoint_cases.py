"""Runs of every ZeRO stage that are saved on the way, each process with random generators of its own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from train_cases import MODEL, full_step

from longctx.checkpoint import TrainState
from longctx.checkpoint_saver import save_checkpoint
from longctx.engine import EngineConfig, TrainEngine, build_engine
from longctx.optim import OptimConfig
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.plan import ParallelPlan
from longctx.parity import shard_step

FINGERPRINT = asdict(MODEL)
OPTIM = OptimConfig(lr=1e-2, warmup_steps=2, gradient_clipping=0.5)
RUNS = {f"fp32-zero{stage}": ("fp32", stage) for stage in (0, 1, 2, 3)} | {
    f"bf16-zero{stage}": ("bf16", stage) for stage in (1, 2, 3)
}
STEPS, SAVED_AT = 6, 3


def make_engine(run: str, *, ring: int = 2, dp: int = 1, optim: OptimConfig = OPTIM) -> TrainEngine:
    dtype, stage = RUNS[run]
    mesh = ParallelMesh.create(ParallelPlan(ring=ring, dp=dp), device="cpu")
    settings = EngineConfig(
        zero_stage=stage,
        dtype=dtype,
        micro_batch_size=2,
        accumulation_steps=2,
        kernel="reference",
        zero3_keep_elements=0,
    )
    return build_engine(MODEL, settings, optim, mesh, total_steps=STEPS)


def take_steps(engine: TrainEngine, first: int, last: int) -> list[tuple[float, float]]:
    taken = []
    for step in range(first, last):
        result = engine.train_step(
            step, shard_step(full_step(step, dp=engine.mesh.dp.size, accumulation=2), engine.mesh)
        )
        taken.append((result.loss, result.grad_norm))
    return taken


def draw() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def at(step: int) -> TrainState:
    return TrainState(step=step, cursor=4 * step, tokens=192 * step)


def uninterrupted(rank: int, root: str, runs: Sequence[str] = tuple(RUNS)) -> dict:
    """Six steps, saved after three; each process has random generators of its own."""
    told = {}
    for run in runs:
        engine = make_engine(run)
        before = take_steps(engine, 0, SAVED_AT)
        random.seed(rank)
        np.random.seed(rank)
        torch.manual_seed(rank)
        random.gauss(0, 1)  # leaves a second value behind, which is part of the state
        save_checkpoint(Path(root) / run, engine, at(SAVED_AT), fingerprint=FINGERPRINT, keep=1)
        drawn = draw()
        saved = engine.full_state_dict()
        told[run] = {"before": before, "after": take_steps(engine, SAVED_AT, STEPS), "drawn": drawn, "saved": saved}
    return told
