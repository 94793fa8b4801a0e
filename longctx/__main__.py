"""`longctx` on the command line, the same as `python -m longctx`: `longctx train`, `longctx layout` and so on."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from longctx.config import load_config
from longctx.errors import ConfigError, LongCtxError, did_you_mean
from longctx.launch import Launch, run
from longctx.preparation import dry_run
from longctx.process import EXIT_USER_ERROR, tell
from longctx.trainer import Trainer

# command -> (module with `main(argv)`, or module:function, what it is for)
COMMANDS = {
    "train": ("longctx.__main__", "train a model; the same as train.py"),
    "plan": ("longctx.planner", "which plans of N GPUs fit, how fast each would be, and which to take"),
    "layout": ("longctx.draw", "draw who holds what, and the work of each hop"),
    "info": ("longctx.info", "versions, devices, and which kernels can be used here and why not"),
    "check": ("longctx.check", "compare a plan's attention, gradients and loss with one process's, on this machine"),
    "eval": ("longctx.evaluation", "the loss of weights on a text, by how much context a token has"),
    "export": ("longctx.weights:main_export", "write a checkpoint's weights as Hugging Face's safetensors"),
    "import": ("longctx.weights:main_import", "settings of a run that starts from such weights"),
    "bench": ("longctx.bench", "measure attention against the hardware's limit and other libraries"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("usage: longctx COMMAND ...\n")
        print("\n".join(f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items()))
        print("\n`longctx COMMAND --help` says more.")
        return 0 if words else EXIT_USER_ERROR
    command, *rest = words
    if command not in COMMANDS:
        tell(f"longctx has no command {command!r}: {did_you_mean(command, COMMANDS)}")
        return EXIT_USER_ERROR
    if command == "train":
        return train(rest)
    try:
        module, _, function = COMMANDS[command][0].partition(":")
        return getattr(importlib.import_module(module), function or "main")(rest)
    except LongCtxError as error:
        tell(f"{type(error).__name__}: {error}")
        return EXIT_USER_ERROR


def train(argv: Sequence[str]) -> int:
    """Train, or with `--dry-run` say what a run would be; returns the exit code."""

    def body(launch: Launch) -> None:
        with launch.together("the command line"):
            arguments = TrainArguments.parse(argv)
            config = load_config(arguments.config, arguments.overrides) if not arguments.help else None
        if config is None:
            print_once(launch, TrainArguments.usage())
        elif arguments.dry_run:
            print_once(launch, dry_run(config, launch, world_size=arguments.world_size))
        else:
            Trainer(config, launch).fit()

    return run(body)


def print_once(launch: Launch, text: str) -> None:
    """Print on rank 0."""
    if launch.place.rank == 0:
        print(text, flush=True)


@dataclass(frozen=True)
class TrainArguments:
    """The command line of a training run.

    Args:
        config: the TOML file; None: every setting has its default.
        overrides: `--section.key=value`, for `load_config`.
        dry_run: say what would be trained, and stop.
        world_size: with `dry_run`: for so many processes.
        help: show the usage, and stop.
    """

    config: str | None
    overrides: tuple[str, ...]
    dry_run: bool
    world_size: int | None
    help: bool

    @staticmethod
    def parse(argv: Sequence[str]) -> TrainArguments:
        """From the words after `train.py` or `longctx train`.

        Raises:
            ConfigError: a flag is unknown or lacks its value.
        """
        parser = _parser()
        known, rest = parser.parse_known_args(list(argv))
        flags = [flag for action in parser._actions for flag in action.option_strings]
        for word in rest:
            name = word.partition("=")[0]
            hint = did_you_mean(name, flags)
            if word.startswith("--") and "." not in name and hint.startswith("did you mean"):
                raise ConfigError(f"there is no flag {name}: {hint}")
        if known.world_size is not None and not known.dry_run:
            raise ConfigError(
                "--world-size pretends, so it goes with --dry-run only\n"
                "       to train on several processes start them with torchrun --nproc-per-node N"
            )
        resume = () if known.resume is None else (f"--train.resume={known.resume}",)
        return TrainArguments(known.config, (*rest, *resume), known.dry_run, known.world_size, known.help)

    @staticmethod
    def usage() -> str:
        """The text of `--help`."""
        return _parser().format_help()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}\n       `--help` lists the flags")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="train.py",
        usage="train.py [--config FILE] [--section.key=value ...] [--resume auto|never|PATH] [--dry-run]",
        description="Train a transformer. Start it with python, torchrun or deepspeed.",
        epilog="Every setting can be given as --section.key=value, such as --data.seq_len=128k --parallel.ring=4; "
        "--dry-run prints all of them with their values.",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="a TOML file, such as one in configs/")
    parser.add_argument(
        "--resume", metavar="WHERE", help="auto (the newest checkpoint of the run's folder), never, or a checkpoint"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print configuration, plan and first batch, train nothing"
    )
    parser.add_argument("--world-size", type=int, metavar="N", help="with --dry-run: as if on N processes")
    parser.add_argument("-h", "--help", action="store_true", help="show this and stop")
    # The deepspeed launcher passes it; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
