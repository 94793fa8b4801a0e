"""One configuration: a TOML file and `--section.key=value` overrides, checked as a whole before anything starts.

The settings themselves stand beside what they configure (`ModelConfig` in `model`, `DataConfig` in `data`, ...); this
module only composes them. What a person may write:

    [data]                              --data.seq_len=128k         128k = 131072, 1M = 1048576, for integers
    seq_len = "128k"                    --data.seq_len 128k         the same
    path = "none"                       --data.path=none            no value, where a setting is optional
    [model.rope_scaling]                --model.rope_scaling.kind=yarn
    kind = "yarn"                       --optim.betas=0.9,0.95      a list
                                        --data.shuffle=false        `--data.shuffle` alone is true
"""

from __future__ import annotations

import difflib
import importlib
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longctx.errors import ConfigError, DataError, LongCtxError, PlanError, Problem, did_you_mean, format_problems
from longctx.parallel.nearest import changes, nearest_plans
from longctx.parallel.nodes import node_problems
from longctx.settings import (
    alternatives,
    checked,
    dataclass_of,
    field_types,
    from_text,
    from_toml,
    in_words,
    is_none,
    toml_tables,
)
from longctx.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from longctx.data import DataConfig
    from longctx.engine import EngineConfig, OptimConfig
    from longctx.metrics import LogConfig
    from longctx.model import ModelConfig
    from longctx.parallel.plan import ParallelPlan
    from longctx.train_config import TrainConfig

# Loaded by name when a configuration is made: importing this module alone needs none of them.
_SECTIONS = {
    "model": ("longctx.model", "ModelConfig"),
    "data": ("longctx.data", "DataConfig"),
    "parallel": ("longctx.parallel.plan", "ParallelPlan"),
    "engine": ("longctx.engine", "EngineConfig"),
    "optim": ("longctx.engine", "OptimConfig"),
    "train": ("longctx.train_config", "TrainConfig"),
    "log": ("longctx.metrics", "LogConfig"),
}


@cache
def _section_class(name: str) -> type:
    module, attribute = _SECTIONS[name]
    return getattr(importlib.import_module(module), attribute)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything about a run, one section for each part of the library. `load_config` makes one from a file."""

    model: ModelConfig = field(default_factory=lambda: _section_class("model")())
    data: DataConfig = field(default_factory=lambda: _section_class("data")())
    parallel: ParallelPlan = field(default_factory=lambda: _section_class("parallel")())
    engine: EngineConfig = field(default_factory=lambda: _section_class("engine")())
    optim: OptimConfig = field(default_factory=lambda: _section_class("optim")())
    train: TrainConfig = field(default_factory=lambda: _section_class("train")())
    log: LogConfig = field(default_factory=lambda: _section_class("log")())

    def check(self, world_size: int, node_size: int | None = None) -> list[Problem]:
        """Everything that keeps this run from starting on `world_size` processes; empty if nothing does.

        Args:
            node_size: how many of them are on each machine; None: not known.

        Looks at the numbers, at the text's and the tokenizer's files, and at whether there is a GPU; tokenises nothing and
        touches no GPU.
        """
        device = self.train.device
        found = [*self.model.problems(), *self.data.problems()]
        found += self.engine.problems(None if device == "auto" else device)
        found += [*self.optim.problems(), *self.train.problems(), *self.log.problems()]
        if self.train.eval_every and self.data.eval_path is None:
            found.append(
                Problem(
                    f"train.eval_every = {self.train.eval_every}, but there is no text to evaluate on",
                    "set data.eval_path to text that is not trained on, or leave train.eval_every out",
                )
            )
        return [*found, *self.plan_problems(self.parallel, world_size, node_size), *self._vocab_problems()]

    def plan_problems(self, plan: ParallelPlan, world_size: int, node_size: int | None = None) -> list[Problem]:
        """Everything that keeps `plan` from training this model on such sequences and processes; empty if nothing does."""
        model = self.model
        # The plan's check asks about the model's sizes; where the model has said what is wrong with them, once is enough.
        is_known = not model.problems()
        if plan.context is not None and is_known and not plan.problems():
            try:
                plan, _ = replace(self, parallel=plan).choose_plan(node_size)
            except PlanError as error:
                return _problems_of(error)
        found = plan.check(
            num_heads=model.num_heads if is_known else 1,
            num_kv_heads=model.kv_heads if is_known else 1,
            seq_len=self.data.seq_len,
            num_layers=model.num_layers if is_known else None,
            mlp_size=model.mlp_size if is_known else None,
            vocab_size=model.vocab_size if is_known else None,
        )
        found += self.engine.plan_problems(plan)
        if not plan.problems() and plan.context is None:
            try:
                plan.resolve(world_size)
            except PlanError as error:
                found += _problems_of(error)
            if node_size is not None:
                found += node_problems(plan, node_size=node_size, world_size=world_size)
        return found

    def refusal(self, title: str, problems: Sequence[Problem], world_size: int, node_size: int | None = None) -> str:
        """One message for all problems; where the plan has some, with the nearest plans that have none.

        Args:
            title: what has these problems.
        """
        message = format_problems(title, problems)
        if self.parallel.context is not None or self.model.problems():
            return message
        if not self.plan_problems(self.parallel, world_size, node_size):
            return message

        def works(plan: ParallelPlan) -> bool:
            return not self.plan_problems(plan, world_size, node_size)

        plans = nearest_plans(self.parallel, world_size, works)
        if not plans:
            return message
        processes = f"{world_size} process{'es' * (world_size > 1)}"
        lines = [f"       {changes(self.parallel, plan)}" for plan in plans]
        return "\n".join([message, f"  plans for {processes} that work, nearest first:", *lines])

    def choose_plan(self, node_size: int | None = None) -> tuple[ParallelPlan, str]:
        """`parallel` with the degrees chosen that `parallel.context` leaves open, and why; as it is and "" otherwise.

        Args:
            node_size: processes on each machine; None: all on one.

        Raises:
            PlanError: no degrees serve this model.
        """
        return self.parallel.choose_degrees(
            num_heads=self.model.num_heads,
            num_kv_heads=self.model.kv_heads,
            head_dim=self.model.head_size,
            seq_len=self.data.seq_len,
            mask=self.model.causal_mask,
            batch=self.engine.micro_batch_size,
            # "auto" is bf16 on every GPU that these estimates are of.
            itemsize=4 if self.engine.dtype == "fp32" else 2,
            node_size=node_size,
        )

    def _vocab_problems(self) -> list[Problem]:
        try:
            tokenizer = load_tokenizer(self.data.tokenizer)
        except DataError:
            return []  # the data section has said so
        # Every document ends with this id, so it is certain to occur; other ids are checked against the text itself.
        if tokenizer.end_of_document < self.model.vocab_size:
            return []
        return [
            Problem(
                f"model.vocab_size = {self.model.vocab_size:_}, but data.tokenizer = {self.data.tokenizer!r} ends every "
                f"document with id {tokenizer.end_of_document:_}",
                f"set model.vocab_size to {tokenizer.vocab_size:_} or more "
                f"({-(-tokenizer.vocab_size // 8) * 8:_} is a multiple of 8)",
            )
        ]

    def dump(self) -> str:
        """The whole configuration as TOML, defaults included; `load_config` reads it back equal."""
        blocks: list[str] = []
        for name in _SECTIONS:
            blocks += toml_tables(name, getattr(self, name))
        return "\n".join(blocks)

    def as_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries."""
        return asdict(self)


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a TOML file, with command-line overrides.

    Args:
        path: the file; None: every setting has its default.
        overrides: as on a command line: `--section.key=value`, or `--section.key` and `value` one after the other. The
            last of several for one key holds.

    Raises:
        ConfigError: with every unknown key, wrong type and missing value, and where each was written.
    """
    loader = _Loader()
    if path is not None:
        loader.add_file(Path(path).expanduser())
    loader.add_overrides(list(overrides))
    sections = {name: loader.build(_section_class(name), (name,)) for name in _SECTIONS}
    if loader.problems:
        what = "this configuration" if path is None else f"the configuration {path}"
        raise ConfigError(format_problems(what, loader.problems))
    return Config(**sections)


def key_names() -> list[str]:
    """Every setting, as `section.key`."""
    return [".".join(key) for name in _SECTIONS for key in _leaf_keys(_section_class(name), (name,))]


class _Loader:
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
        elif key[0] in _SECTIONS:
            hint = did_you_mean(key[-1], [k.removeprefix(f"{key[0]}.") for k in known if k.startswith(f"{key[0]}.")])
        else:
            hint = did_you_mean(key[0], _SECTIONS)
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
            self.problems += _problems_of(error)
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
    if key[0] not in _SECTIONS:
        return None
    hint: Any = _section_class(key[0])
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


def _problems_of(error: LongCtxError) -> list[Problem]:
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
