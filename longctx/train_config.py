"""The settings of a run: how long, from where, and where to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from longctx.errors import Problem


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, from where, and where to.

    Args:
        steps: optimizer steps of the whole run, those before a resume included.
        seed: of the initial weights.
        init_from: a folder of weights to start from, in Hugging Face's layout, as `longctx import` checks it; None: random
            ones. A run that is resumed goes on from its checkpoint.
        run_dir: metrics, checkpoints and wandb's files go here; shared by all machines.
        save_every: steps between checkpoints, with one more at the end. 0: only that one; None: none at all, as for a measurement.
        eval_every: steps between measurements of the loss on `data.eval_path`, with one more at the end. 0: only that one.
        eval_sequences: how many of its sequences are read each time, the same ones; rounded up to whole steps' worth, or as
            many as it has.
        keep: checkpoints that are kept.
        async_save: write checkpoints beside the training, from a copy in the host's memory: 12 bytes for each parameter of the
            model, over all processes together.
        resume: "auto": the newest complete checkpoint of `run_dir`, if there is one; "never": from the start; or a path.
        timeout_s: a rank that dies or hangs ends the run within this time.
        device: "auto": CUDA where there is a GPU, else the CPU.
    """

    steps: int = 100
    seed: int = 0
    init_from: str | None = None
    run_dir: str = "runs/default"
    save_every: int | None = 0
    eval_every: int = 0
    eval_sequences: int = 16
    keep: int = 2
    async_save: bool = False
    resume: str = "auto"
    timeout_s: float = 600.0
    device: Literal["auto", "cuda", "cpu"] = "auto"

    def problems(self) -> list[Problem]:
        """What is wrong with these settings."""
        found = []
        for name, least in (
            ("steps", 1),
            ("save_every", 0),
            ("eval_every", 0),
            ("eval_sequences", 1),
            ("keep", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                found.append(Problem(f"train.{name} = {value}: it must be {least} or more"))
        if self.async_save and self.save_every is None:
            found.append(
                Problem(
                    "train.async_save = true, but train.save_every = none saves nothing",
                    "leave train.async_save out, or give train.save_every a number",
                )
            )
        if not 5.0 <= self.timeout_s <= 1e6:
            found.append(
                Problem(
                    f"train.timeout_s = {self.timeout_s:g}: it must be between 5 and 1,000,000 seconds",
                    "heartbeats come once a second, and the first step may compile for minutes",
                )
            )
        for name in ("run_dir", "resume", "init_from"):
            if getattr(self, name) == "":
                found.append(Problem(f"train.{name} is empty", "leave it out for its default"))
        return found

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints of this run are."""
        return Path(self.run_dir).expanduser() / "checkpoints"

    def saves_after(self, steps: int) -> bool:
        """Whether there is a checkpoint of the run after so many steps."""
        if self.save_every is None:
            return False
        return steps == self.steps or (self.save_every > 0 and steps % self.save_every == 0)

    def evaluates_after(self, steps: int) -> bool:
        """Whether the loss on other text is measured after so many steps, where there is such text."""
        return steps == self.steps or (self.eval_every > 0 and steps % self.eval_every == 0)
