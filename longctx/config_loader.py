"""Reading a configuration: the values of a TOML file and of a command line, each with where it was written, into dataclasses.

`config` says what a person may write, and composes the sections that are made here.
"""

from __future__ import annotations

import difflib
import importlib
import re
import tomllib
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from functools import cache
from pathlib import Path
from typing import Any

from longctx.errors import ConfigError, LongCtxError, Problem, did_you_mean, problems_of
from longctx.settings import (
    alternatives,
    checked,
    dataclass_of,
    field_types,
    from_text,
    from_toml,
    in_words,
    is_none,
)

# Loaded by name when a configuration is made: importing this module alone needs none of them.
SECTIONS = {
    "model": ("longctx.model", "ModelConfig"),
    "data": ("longctx.data", "DataConfig"),
    "parallel": ("longctx.parallel.plan", "ParallelPlan"),
    "engine": ("longctx.engine", "EngineConfig"),
    "optim": ("longctx.engine", "OptimConfig"),
    "train": ("longctx.train_config", "TrainConfig"),
    "log": ("longctx.metrics", "LogConfig"),
}


@cache
def section_class(name: str) -> type:
    module, attribute = SECTIONS[name]
    return getattr(importlib.import_module(module), attribute)


def key_names() -> list[str]:
    """Every setting, as `section.key`."""
    return [".".join(key) for name in SECTIONS for key in _leaf_keys(section_class(name), (name,))]


class Loader:
    """Collects values with where each was written, then builds the sections; all problems go to one list."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.origins: dict[tuple[str, ...], str] = {}
        self.problems: list[Problem] = []

    def add_file(self, path: Path) -> None:
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            hint = f"look in {path.parent.absolute()}"
            if path.parent.is_dir():
                hint += f": {did_you_mean(path.name, [p.name for p in path.parent.glob('*.toml')])}"
            raise ConfigError(f"there is no configuration {path}\n       {hint}") from error
        except OSError as error:
            raise ConfigError(f"the configuration {path} cannot be read: {error.strerror or error}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"the configuration {path} is not TOML: {error}\n"
                '       text stands in quotes, and so do sizes: seq_len = "128k"; true and false do not'
            ) from error
        self._add_table(table, (), str(path))

    def _add_table(self, table: dict[str, Any], parent: tuple[str, ...], origin: str) -> None:
        for name, value in table.items():
            key = (*parent, name)
            hint = _hint(key)
            if hint is None:
                self._unknown(key, f"{origin}: ")
            elif isinstance(value, dict) and dataclass_of(hint) is not None:
                self._set(key, {}, origin)
                self._add_table(value, key, origin)
            elif len(key) == 1:
                self.problems.append(
                    Problem(
                        f"{origin}: {name} = {value!r} is a section, not a value", f"write [{name}] and its keys below"
                    )
                )
            else:
                self._set(key, from_toml(value, hint), origin)

    def add_overrides(self, words: list[str]) -> None:
        while words:
            word = words.pop(0)
            if not word.startswith("--") or word == "--":
                self.problems.append(Problem(f"{word!r} is not an override", _override_hint(word)))
                continue
            name, equals, text = word[2:].partition("=")
            key = tuple(name.replace("-", "_").split("."))
            hint = _hint(key)
            if not equals:
                has_next = bool(words) and not words[0].startswith("--")
                if has_next:
                    text = words.pop(0)
                elif hint is not None and bool in alternatives(hint):
                    text = "true"
            if hint is None:
                self._unknown(key, "--")
            elif len(key) == 1:
                self.problems.append(Problem(f"--{name} is a section, not a setting", f"write --{name}.key=value"))
            elif not equals and not text:
                self.problems.append(Problem(f"--{name} has no value", f"write --{name}=value"))
            elif dataclass_of(hint) is not None and not is_none(text, hint):
                keys = ", ".join(f.name for f in fields(dataclass_of(hint)))  # type: ignore[arg-type]
                self.problems.append(
                    Problem(f"--{name}={text} is a group of settings", f"write --{name}.key=value; keys: {keys}")
                )
            else:
                self._set(key, from_text(text, hint), f"--{name}")

    def _set(self, key: tuple[str, ...], value: Any, origin: str) -> None:
        table = self.values
        for name in key[:-1]:
            if not isinstance(table.get(name), dict):
                table[name] = {}
            table = table[name]
        table[key[-1]] = value
        self.origins[key] = origin

    def _unknown(self, key: tuple[str, ...], before: str) -> None:
        name = ".".join(key)
        known = key_names()
        same = [k for k in known if k.rsplit(".", 1)[-1] == key[-1]]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
        if same or near:
            hint = f"did you mean {' or '.join(map(repr, same or near))}?"
        elif key[0] in SECTIONS:
            hint = did_you_mean(key[-1], [k.removeprefix(f"{key[0]}.") for k in known if k.startswith(f"{key[0]}.")])
        else:
            hint = did_you_mean(key[0], SECTIONS)
        self.problems.append(Problem(f"{before}{name}: there is no such setting", hint))

    def build(self, cls: type, key: tuple[str, ...]) -> Any:
        """The dataclass `cls` from the values under `key`; None after a problem, which is noted."""
        given = self.values
        for name in key:
            given = given.get(name, {})
        known_problems = len(self.problems)
        built = {}
        for item in fields(cls):
            here = (*key, item.name)
            hint = _hint(here)
            if item.name in given:
                value = given[item.name]
                nested = dataclass_of(hint) if isinstance(value, dict) else None
                built[item.name] = self.build(nested, here) if nested else self._checked(value, hint, here)
            elif _is_required(item):
                self.problems.append(
                    Problem(f"{'.'.join(here)} is missing", f"it is {in_words(hint)} and has no default")
                )
        if len(self.problems) > known_problems:
            return None
        try:
            return cls(**built)
        except LongCtxError as error:
            self.problems += problems_of(error)
            return None

    def _checked(self, value: Any, hint: Any, key: tuple[str, ...]) -> Any:
        try:
            return checked(value, hint)
        except TypeError as error:
            got, expected = error.args
            origin = self.origins[key]
            where = f"{origin}={value}" if origin.startswith("--") else f"{origin}: {'.'.join(key)} = {value!r}"
            self.problems.append(Problem(f"{where} {got}", expected))
            return None


def _override_hint(word: str) -> str:
    if word in ("-c", "-f") or word.endswith(".toml"):
        return f"a file of settings is named by --config {word if word.endswith('.toml') else 'FILE'}"
    return f"write --{word}" if re.fullmatch(r"\w+\.[\w.]+=.*", word) else "write --section.key=value"


def _hint(key: tuple[str, ...]) -> Any:
    """The type of a setting; None if there is no such setting."""
    if key[0] not in SECTIONS:
        return None
    hint: Any = section_class(key[0])
    for name in key[1:]:
        cls = dataclass_of(hint)
        if cls is None or name not in {f.name for f in fields(cls) if f.init}:
            return None
        hint = field_types(cls)[name]
    return hint


def _is_required(item: Field[Any]) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def _leaf_keys(cls: type, key: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for item in fields(cls):
        nested = dataclass_of(field_types(cls)[item.name])
        if nested is not None:
            yield from _leaf_keys(nested, (*key, item.name))
        else:
            yield (*key, item.name)
