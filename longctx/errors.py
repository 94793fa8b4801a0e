"""The errors that users see. Each says what, got, allowed, and what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class LongCtxError(ValueError):
    """Base of every error this library raises on purpose."""


class ConfigError(LongCtxError):
    """A configuration, or a file that it names, cannot be used."""


class PlanError(LongCtxError):
    """A parallel plan does not fit the model, the sequence or the number of processes."""


class ShapeError(LongCtxError):
    """Tensors that should agree in shape, dtype or device do not."""


class KernelError(LongCtxError):
    """No attention kernel, or not the one asked for, can do this work."""


class DataError(ConfigError):
    """The training text cannot be read, or does not suffice."""


class CheckpointError(LongCtxError):
    """A checkpoint is missing, incomplete, or of another model."""


class DistributedError(LongCtxError):
    """A rank failed, disagrees with the others, or stopped answering."""


class NonFiniteError(LongCtxError):
    """The loss or the gradient norm stopped being a finite number."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and what would work instead.

    Args:
        what: the fact, with the numbers that were computed.
        hint: what to do; may be empty only where nothing can be done.
    """

    what: str
    hint: str = ""


def format_problems(title: str, problems: Sequence[Problem]) -> str:
    """One message for all problems, numbered, each hint under its problem."""
    count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
    lines = [f"{count} with {title}"]
    for i, problem in enumerate(problems, 1):
        lines.append(f"  {i}. {problem.what}")
        lines += [f"       {line}" for line in problem.hint.splitlines()]
    return "\n".join(lines)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"did you mean 'x'?"`, or the list of what is known where nothing is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def problems_of(error: LongCtxError) -> list[Problem]:
    """The problems in a message that `format_problems` made; else the first line, with the others as its hint."""
    found: list[tuple[str, list[str]]] = []
    first, *rest = str(error).splitlines()
    for line in rest:
        numbered = re.fullmatch(r"  \d+\. (.*)", line)
        if numbered:
            found.append((numbered[1], []))
        elif found:
            found[-1][1].append(line.strip())
    if not found:
        found = [(first, [line.strip() for line in rest])]
    return [Problem(what, "\n".join(hints)) for what, hints in found]
