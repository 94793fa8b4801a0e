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

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longctx.config_loader import SECTIONS, Loader, section_class
from longctx.errors import ConfigError, DataError, PlanError, Problem, format_problems, problems_of
from longctx.parallel.nearest import changes, nearest_plans
from longctx.parallel.nodes import node_problems
from longctx.settings import toml_tables
from longctx.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from longctx.data import DataConfig
    from longctx.engine import EngineConfig, OptimConfig
    from longctx.metrics import LogConfig
    from longctx.model import ModelConfig
    from longctx.parallel.plan import ParallelPlan
    from longctx.train_config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything about a run, one section for each part of the library. `load_config` makes one from a file."""

    model: ModelConfig = field(default_factory=lambda: section_class("model")())
    data: DataConfig = field(default_factory=lambda: section_class("data")())
    parallel: ParallelPlan = field(default_factory=lambda: section_class("parallel")())
    engine: EngineConfig = field(default_factory=lambda: section_class("engine")())
    optim: OptimConfig = field(default_factory=lambda: section_class("optim")())
    train: TrainConfig = field(default_factory=lambda: section_class("train")())
    log: LogConfig = field(default_factory=lambda: section_class("log")())

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
                return problems_of(error)
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
                found += problems_of(error)
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
        for name in SECTIONS:
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
    loader = Loader()
    if path is not None:
        loader.add_file(Path(path).expanduser())
    loader.add_overrides(list(overrides))
    sections = {name: loader.build(section_class(name), (name,)) for name in SECTIONS}
    if loader.problems:
        what = "this configuration" if path is None else f"the configuration {path}"
        raise ConfigError(format_problems(what, loader.problems))
    return Config(**sections)
