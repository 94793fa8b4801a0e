"""The error family: one base, every problem in one message, the nearest name offered."""

from __future__ import annotations

import inspect

import pytest

from longctx import errors
from longctx.errors import LongCtxError, Problem, did_you_mean, format_problems

FAMILY = [x for x in vars(errors).values() if inspect.isclass(x) and issubclass(x, Exception)]


@pytest.mark.parametrize("cls", FAMILY, ids=lambda c: c.__name__)
def test_users_can_catch_the_whole_family(cls):
    assert issubclass(cls, LongCtxError)
    assert issubclass(cls, ValueError)
    assert cls.__doc__
    with pytest.raises(LongCtxError, match="what happened"):
        raise cls("what happened")


def test_data_errors_are_configuration_errors():
    assert issubclass(errors.DataError, errors.ConfigError)


def test_format_numbers_the_problems_and_indents_the_hints():
    text = format_problems(
        "this plan (ring 8)",
        [Problem("seq_len = 10 is not a multiple of 16", "nearest: 16\nor ring 5"), Problem("no heads")],
    )
    assert text.splitlines() == [
        "2 problems with this plan (ring 8)",
        "  1. seq_len = 10 is not a multiple of 16",
        "       nearest: 16",
        "       or ring 5",
        "  2. no heads",
    ]


def test_one_problem_is_singular():
    assert format_problems("x", [Problem("a")]).startswith("1 problem with x\n")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("zigzga", "did you mean 'zigzag'?"), ("q", "known: contiguous, zigzag"), ("", "known: contiguous, zigzag")],
)
def test_did_you_mean(name, expected):
    assert did_you_mean(name, ["zigzag", "contiguous"]) == expected


def test_did_you_mean_takes_any_iterable():
    assert did_you_mean("aa", (x for x in ["aaa", "b"])) == "did you mean 'aaa'?"
