"""Gradients through DeepSpeed on real processes are those of plain autograd on one process."""

from __future__ import annotations

from dataclasses import replace

import pytest
from engine_cases import STAGES, TOLERANCE, gradient_errors, make_mesh
from train_cases import MODEL, full_step

from longctx import engine as engine_module
from longctx.deepspeed_setup import FoldedWorld
from longctx.parity import shard_step
from longctx.testing import run_distributed

# (ring, dp) of each world. Factorings of one world share their processes: to DeepSpeed they are the same world.
WORLDS = {1: [(1, 1)], 2: [(2, 1), (1, 2)], 3: [(3, 1)], 4: [(4, 1), (2, 2)], 6: [(3, 2)], 8: [(4, 2)]}


# ---- the main proof


def gradient_matrix(rank: int, pairs: list[tuple[int, int]]) -> dict[str, dict[str, float]]:
    found = {}
    for ring, dp in pairs:
        mesh = make_mesh(ring, dp)
        for stage in STAGES:
            for accumulation in (1, 2):
                case = f"zero{stage}-ring{ring}-dp{dp}-accumulate{accumulation}"
                found[case] = gradient_errors(mesh, zero_stage=stage, accumulation_steps=accumulation)
    return found


@pytest.mark.parametrize(
    "world",
    [pytest.param(world, marks=[pytest.mark.slow] if world > 4 else []) for world in WORLDS],
    ids=lambda w: f"world{w}",
)
def test_gradients_equal_one_process(world):
    """ZeRO 0-3 x ring 1-4 x dp 1-2 x accumulation 1-2, one rank without a target: 64 cases over the worlds."""
    found = run_distributed(gradient_matrix, WORLDS[world], world=world, timeout_s=300)[0]
    assert len(found) == len(WORLDS[world]) * len(STAGES) * 2
    worst = {case: max(errors.items(), key=lambda item: item[1]) for case, errors in found.items()}
    wrong = {case: pair for case, pair in worst.items() if not pair[1] < TOLERANCE}
    assert not wrong, f"{len(wrong)} of {len(found)} cases are wrong; the worst parameter of each: {wrong}"


def ulysses_gradients(rank: int, degrees: list[tuple[int, int]]) -> dict[str, dict[str, float]]:
    found = {}
    for ring, ulysses in degrees:
        mesh = make_mesh(ring, ulysses=ulysses)
        for stage, recompute in ((1, False), (3, True)):
            settings = {"zero_stage": stage, "activation_checkpointing": recompute, "accumulation_steps": 2}
            found[f"zero{stage}-ring{ring}-ulysses{ulysses}"] = gradient_errors(mesh, **settings)
    return found


@pytest.mark.parametrize(("world", "degrees"), [(2, [(1, 2)]), (4, [(2, 2), (1, 4)])], ids=["world2", "world4"])
def test_gradients_with_ulysses_equal_one_process(world, degrees):
    """Ulysses alone, around a ring, and with more ranks than key heads."""
    found = run_distributed(ulysses_gradients, degrees, world=world, timeout_s=300)[0]
    worst = {case: max(errors.items(), key=lambda item: item[1]) for case, errors in found.items()}
    assert len(worst) == 2 * len(degrees)
    assert {case: pair for case, pair in worst.items() if not pair[1] < TOLERANCE} == {}


def test_the_matrix_is_complete():
    assert {pair for pairs in WORLDS.values() for pair in pairs} == {(r, d) for r in (1, 2, 3, 4) for d in (1, 2)}
    assert all(ring * dp == world for world, pairs in WORLDS.items() for ring, dp in pairs)


# ---- broken twins: mistakes that the comparison must see


def broken_gradients(rank: int) -> dict[str, float]:
    """The worst error of any parameter, for each mistake."""
    mesh = make_mesh(ring=2)
    found = {}
    right = engine_module.scaled_loss

    def worst(**settings) -> float:
        return max(error for name, error in gradient_errors(mesh, **settings).items() if name != "loss")

    # The usual mistake: every rank and micro-batch brings the mean over its own targets.
    mine = [b.labels for b in shard_step(full_step(0, dp=1, accumulation=2, starved=(0, 1, 2)), mesh)]
    counts = iter([max(1, int((labels != -100).sum())) for labels in mine])
    engine_module.scaled_loss = lambda local_sum, **rest: local_sum / next(counts)
    found["mean_of_means"] = worst(accumulation_steps=2)

    def as_if_summed(local_sum, *, num_target_tokens, grad_world, accumulation_steps):
        return local_sum * (accumulation_steps / num_target_tokens)

    engine_module.scaled_loss = as_if_summed
    for stage in STAGES:
        found[f"as_if_summed_over_the_ring-zero{stage}"] = worst(zero_stage=stage)
    engine_module.scaled_loss = right
    # Last, for it changes a class: DeepSpeed is told of dp alone, so nothing is reduced over the ring.
    FoldedWorld.get_data_parallel_group = lambda self: self._alone
    for stage in (0, 1):
        found[f"told_of_dp_alone-zero{stage}"] = worst(zero_stage=stage)
    return found


def test_broken_twins_are_caught():
    found = run_distributed(broken_gradients, world=2, timeout_s=240)[0]
    assert len(found) == 7
    missed = {twin: error for twin, error in found.items() if not error > 1000 * TOLERANCE}
    assert not missed


# ---- variants of the model


def variant_gradients(rank: int) -> dict[str, dict[str, float]]:
    mesh = make_mesh(ring=2)
    tied = replace(MODEL, tie_embeddings=True)
    rich = replace(MODEL, qkv_bias=True, qk_norm=True, sliding_window=20, tie_embeddings=True)
    return {
        "tied-zero1": gradient_errors(mesh, model=tied, zero_stage=1),
        "tied-zero3": gradient_errors(mesh, model=tied, zero_stage=3, accumulation_steps=2),
        "recompute-zero1": gradient_errors(mesh, zero_stage=1, activation_checkpointing=True),
        "recompute-zero3": gradient_errors(mesh, zero_stage=3, activation_checkpointing=True, accumulation_steps=2),
        "tied-recompute-zero3": gradient_errors(mesh, model=tied, zero_stage=3, activation_checkpointing=True),
        "rich-recompute-zero3": gradient_errors(mesh, model=rich, zero_stage=3, activation_checkpointing=True),
        # Matrices of 1 024 elements and more partitioned, the others whole.
        "some_kept-zero3": gradient_errors(mesh, zero_stage=3, zero3_keep_elements=1024),
    }


@pytest.fixture(scope="module")
def variants():
    return run_distributed(variant_gradients, world=2, timeout_s=240)[0]


@pytest.mark.parametrize(
    "variant",
    [
        "tied-zero1",
        "tied-zero3",
        "recompute-zero1",
        "recompute-zero3",
        "tied-recompute-zero3",
        "rich-recompute-zero3",
        "some_kept-zero3",
    ],
)
def test_gradients_of_variants_equal_one_process(variants, variant):
    assert {name: error for name, error in variants[variant].items() if not error < TOLERANCE} == {}
