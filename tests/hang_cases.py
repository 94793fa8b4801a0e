"""Real runs of three ranks on a ring, one of which meets with something in the middle of a hop: for `test_hangs`."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from run_cases import free_port, write_config

from longctx.config import load_config
from longctx.evaluation import evaluate
from longctx.launch import Launch, Place, run
from longctx.parallel.exchange import RingExchange
from longctx.testing import forked
from longctx.trainer import Trainer

WORLD = 3
VICTIM = 1
# A healthy rank of a busy machine may be silent for some seconds while it starts.
TIMEOUT_S = 20.0
# It happens in this step, in this layer, at this message.
STEP = 2
LAYER = 1
FORWARD = "forward, K/V for hop 2"
BACKWARD = "backward, dK/dV after hop 2"
# Longer than the others need to notice that they wait and to tell so: hops of long sequences take seconds.
STANDS_S = 2.2

STAGE = "the computing of a stage"
MICRO_BATCHES = 2
_ALWAYS = (
    "--data.seq_len=96",
    f"--train.timeout_s={TIMEOUT_S:g}",
    "--train.steps=1000",
    "--engine.kernel=reference",
)
# The relay's messages are named above.
WORDS = ("--parallel.ring=3", "--parallel.strategy=relay", *_ALWAYS)
STAGES = (
    "--parallel.pp=3",
    "--model.num_layers=3",
    f"--engine.accumulation_steps={MICRO_BATCHES}",
    "--engine.zero_stage=0",
    *_ALWAYS,
)


def befall(case: str) -> None:
    time.sleep(STANDS_S)
    if case == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif case == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        time.sleep(3600)


def arm(case: str, what: str) -> None:
    """Let it happen at the message `what` of `LAYER` in `STEP`: before it is posted when killed or hanging, else after."""
    rotate = RingExchange.rotate
    met = 0

    def armed(self: RingExchange, *args: Any, **settings: Any) -> Any:
        nonlocal met
        is_it = settings["what"] == what and self.journal._layer == LAYER
        met += is_it
        is_time = is_it and met == STEP + 1
        if is_time and case != "freeze":
            befall(case)
        flying = rotate(self, *args, **settings)
        if is_time:
            befall(case)
        return flying

    RingExchange.rotate = armed  # type: ignore[method-assign]


def arm_stage(case: str) -> None:
    """Let it happen before a stage computes the first micro-batch of `STEP`."""
    from longctx import pipeline

    forward, met = pipeline.PipelineTransformer.forward, 0

    def armed(self: Any, received: Any) -> Any:
        nonlocal met
        met += 1
        if met == STEP * MICRO_BATCHES + 1:
            befall(case)
        return forward(self, received)

    pipeline.PipelineTransformer.forward = armed  # type: ignore[method-assign]


def _rank_main(rank: int, port: int, config: Path, case: str, what: str, folder: Path, weights: Path | None) -> None:
    log = os.open(folder / f"log{rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"})
    if rank == VICTIM:
        if what == STAGE:
            arm_stage(case)
        else:
            arm(case, what)

    def body(launch: Launch) -> None:
        settings = load_config(config, STAGES if what == STAGE else WORDS)
        if weights is None:
            Trainer(settings, launch).fit()
        else:
            evaluate(settings, launch, weights=str(weights), samples=None)

    code = run(body, Place.from_env())
    sys.stdout.flush()
    os._exit(code)


def run_until_it_happens(
    folder: Path, case: str, what: str, weights: Path | None = None
) -> tuple[list[int | None], list[str]]:
    """Exit codes and outputs of the ranks, which train; with `weights` they evaluate these."""
    context = forked()
    config, port = write_config(folder), free_port()
    processes = [
        context.Process(target=_rank_main, args=(rank, port, config, case, what, folder, weights), daemon=True)
        for rank in range(WORLD)
    ]
    try:
        for process in processes:
            process.start()
        deadline = time.monotonic() + 120
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    return codes, [(folder / f"log{rank}").read_text() for rank in range(WORLD)]
