"""Plans over every axis at once train what one process trains: losses, gradient norms and parameters after whole steps.

`make test` runs a covering sample; `make test-all` every plan of degrees 1 and 2 up to eight processes, and 200 random ones.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
from plan_cases import TOLERANCE, PlanCase, draw_case, train_plans, train_random

from longctx.testing import run_distributed

BATCH = 6
AXES = ("dp", "pp", "ring", "ulysses", "tp")
# A world's cases share its processes, for DeepSpeed keeps one set of groups in a process.
SAMPLE = (
    PlanCase(ring=2, tp=2, zero=0, mlp_tokens=7),
    PlanCase(ulysses=2, tp=2, zero=2, recompute=True, host=True),
    PlanCase(
        dp=2,
        tp=2,
        zero=3,
        accumulation=4,
        tied=True,
        recompute=True,
        host=True,
        mlp_tokens=7,
        rich=True,
        shard_norms=True,
        seq_len=47,
    ),
    PlanCase(pp=2, ulysses=2, zero=1, accumulation=4, tied=True, recompute=True, host=True, rich=True),
    PlanCase(pp=2, dp=2, zero=0, tied=True, mlp_tokens=10),
    PlanCase(
        pp=2, ring=2, zero=1, accumulation=4, tied=True, recompute=True, host=True, dual=True, layers=5, layout="auto"
    ),
    # Padded for the norms' sake, and each micro-batch cut otherwise.
    PlanCase(pp=2, ring=2, tp=2, accumulation=4, recompute=True, shard_norms=True, layout="balanced", seq_len=45),
    PlanCase(dp=2, zero=2, offload="optimizer"),
    PlanCase(dp=2, zero=3, offload="all", accumulation=4, recompute=True),
)
# Seeds of random cases whose runnable ones are of two worlds.
SEEDS = (7, 11, 12, 24, 26, 45, 186, 209, 241, 276)


def whole_matrix() -> list[PlanCase]:
    """Every plan of degrees 1 and 2 on up to 8 processes, and rings of 3 and 4; every ZeRO stage that goes with it."""
    plans = [
        dict(zip(AXES, degrees, strict=True))
        for degrees in itertools.product((1, 2), repeat=len(AXES))
        if degrees.count(2) <= 3
    ]
    plans += [{"ring": ring, other: 2} for ring in (3, 4) for other in ("dp", "pp", "ulysses", "tp")]
    plans += [{"ring": 3}, {"ring": 4}, {"pp": 4}, {"tp": 4}, {"pp": 3, "tp": 2}]
    cases = []
    for degrees in plans:
        for zero in (0, 1) if degrees.get("pp", 1) > 1 else (0, 1, 2, 3):
            for tied, accumulation in itertools.product((False, True), (1, 4)):
                # What else there is goes with one half of them each.
                rest: dict = {"shard_norms": degrees.get("tp", 1) > 1 and tied}
                # Four micro-batches are enough for the four stages of two processes.
                rest |= {"dual": degrees.get("pp", 1) == 2 and accumulation == 4 and tied == (zero == 1)}
                rest |= {"recompute": tied == (accumulation == 1), "rich": not tied, "layers": 5}
                # Of what is recomputed, and of each ZeRO stage, one half.
                rest |= {"host": rest["recompute"] and tied == (zero % 2 == 0)}
                rest |= {"mlp_tokens": 7 if zero == 3 or tied else None}
                cases.append(PlanCase(**degrees, zero=zero, tied=tied, accumulation=accumulation, **rest))
    return cases


def worlds_of(cases: Sequence) -> dict[tuple[int, int, int], list]:
    worlds: dict[tuple[int, int, int], list] = {}
    for case in cases:
        worlds.setdefault(case.world, []).append(case)
    return worlds


def batched(cases: list) -> list[list]:
    """Cases that share their processes. The groups of each stay, with threads that look for messages a hundred times a second:
    with those of dozens of cases a machine has no time left for the next."""
    return [cases[i : i + BATCH] for i in range(0, len(cases), BATCH)]


def name_of(world: tuple[int, int, int]) -> str:
    return "pp{}-grad{}-tp{}".format(*world)


def check(cases: list[PlanCase]) -> None:
    pp, grad, tp = cases[0].world
    found: dict[str, dict[str, float]] = {}
    for some in batched(cases):
        found |= run_distributed(train_plans, some, world=pp * grad * tp, timeout_s=60 + 60 * len(some))[0]
    assert list(found) == [str(case) for case in cases]
    worst = {case: next(iter(errors.items())) for case, errors in found.items()}
    case, (what, error) = max(worst.items(), key=lambda item: item[1][1])
    # `pytest -s` shows it.
    print(f"\n{len(found)} plans of {name_of(cases[0].world)}: the worst is {error:.1e}, {what} of {case}")
    wrong = {case: pair for case, pair in worst.items() if not pair[1] < TOLERANCE}
    assert not wrong, f"{len(wrong)} of {len(found)} cases are wrong; the worst number of each: {wrong}"


@pytest.mark.parametrize("world", worlds_of(SAMPLE), ids=name_of)
def test_a_sample_of_plans_equals_one_process(world):
    check(worlds_of(SAMPLE)[world])


@pytest.mark.slow
@pytest.mark.parametrize("world", worlds_of(whole_matrix()), ids=name_of)
def test_every_plan_equals_one_process(world):
    check(worlds_of(whole_matrix())[world])


def test_the_whole_matrix_is_whole():
    plans = {str(replace(case.plan, shard_norms=False, schedule="1f1b")) for case in whole_matrix()}
    # 1 + 5 + 10 + 10 of degrees 1 and 2, and 13 more.
    assert len(plans) == 39
    assert len(whole_matrix()) == 4 * sum(2 if "pp 1" not in plan else 4 for plan in plans)


# ---- plans that nobody chose


def check_random(cases: list) -> None:
    """Each case is refused before it starts, with something to do about it, or trains what one process trains."""
    runnable: list = []
    worst = 0.0
    for case in cases:
        problems = case.problems()
        assert all(problem.what and problem.hint for problem in problems), f"{case}: no hint in {problems}"
        if not problems:
            runnable.append(case)
    for (pp, grad, tp), of_world in worlds_of(runnable).items():
        found: list[dict] = [{} for _ in range(pp * grad * tp)]
        for some in batched(of_world):
            told = run_distributed(train_random, some, world=pp * grad * tp, timeout_s=60 + 60 * len(some))
            found = [known | new for known, new in zip(found, told, strict=True)]
        for case in of_world:
            got = found[0][case.seed]
            if isinstance(got, str):
                # A made-up step may have no target at all; every rank says so.
                assert re.search(r"step \d: no token .* has a target", got), f"{case}: {got}"
                assert all(isinstance(of_rank[case.seed], str) for of_rank in found)
            else:
                name, error = next(iter(got.items()))
                worst = max(worst, error)
                assert error < TOLERANCE, f"{case}: {name} is off by {error:.1e}"
    print(f"\n{len(cases)} random plans, {len(runnable)} of them trained: the worst is off by {worst:.1e}")


def test_random_plans_train_or_are_refused():
    check_random([draw_case(seed, max_world=4) for seed in SEEDS])


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 200, 20))
def test_more_random_plans_train_or_are_refused(first):
    check_random([draw_case(seed, max_world=8) for seed in range(1000 + first, 1020 + first)])


def test_random_plans_are_of_both_kinds():
    refused = [bool(draw_case(seed, max_world=8).problems()) for seed in range(1000, 1200)]
    assert 50 < sum(refused) < 150
