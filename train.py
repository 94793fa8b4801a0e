"""Train a transformer on long text.

    python train.py --config configs/debug_cpu.toml
    torchrun --standalone --nproc-per-node 8 train.py --config FILE --parallel.ring=8 --data.seq_len=128k
    deepspeed --num_gpus 8 train.py --config FILE

`--dry-run` shows the settings, who would do what, and the first batch. `longctx train` does the same as this script, which
is here to be read and changed.
"""

from __future__ import annotations

import sys

from longctx.__main__ import TrainArguments, print_once
from longctx.config import load_config
from longctx.launch import Launch, run
from longctx.preparation import dry_run
from longctx.trainer import Trainer


def main(launch: Launch) -> None:
    # What fails in here, on any process, ends all of them with one message and exit code 2.
    with launch.together("the command line"):
        arguments = TrainArguments.parse(sys.argv[1:])
        config = load_config(arguments.config, arguments.overrides) if not arguments.help else None
    if config is None:
        print_once(launch, TrainArguments.usage())
    elif arguments.dry_run:
        print_once(launch, dry_run(config, launch, world_size=arguments.world_size))
    else:
        # The configuration's plan says which process does what; the trainer makes it so.
        Trainer(config, launch).fit()


if __name__ == "__main__":
    sys.exit(run(main))
