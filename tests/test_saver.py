"""Saving beside the training: what is saved is the state of that moment, and what goes wrong is heard of."""

from __future__ import annotations

import itertools
import os
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from train_cases import MODEL, full_step

from longctx import checkpoint_saver
from longctx.checkpoint import TrainState, latest_checkpoint
from longctx.checkpoint_files import Files
from longctx.checkpoint_folder import find_damage, prepare, read_manifest
from longctx.checkpoint_saver import Saver, save_checkpoint
from longctx.checkpoint_shards import StateShards
from longctx.checkpoint_state import KINDS, EngineState
from longctx.checkpoint_weights import parameter_shapes
from longctx.engine import EngineConfig, build_engine
from longctx.errors import CheckpointError, DistributedError
from longctx.optim import OptimConfig
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.plan import ParallelPlan
from longctx.parity import shard_step
from longctx.testing import run_distributed

FINGERPRINT = asdict(MODEL)
NUM_PARAMETERS = len(parameter_shapes(MODEL))


def make_engine(zero: int = 1):
    mesh = ParallelMesh.create(ParallelPlan(ring=2), device="cpu")
    settings = EngineConfig(zero_stage=zero, micro_batch_size=2, kernel="reference", zero3_keep_elements=0)
    return build_engine(MODEL, settings, OptimConfig(lr=1e-2, warmup_steps=0), mesh, total_steps=9)


def take_step(engine, step: int) -> float:
    return engine.train_step(step, shard_step(full_step(step, dp=1, accumulation=1), engine.mesh)).loss


def make_saver(root: Path, engine, *, keep: int = 9) -> Saver:
    return Saver(root, engine, fingerprint=FINGERPRINT, keep=keep, in_background=True)


class Gate(Files):
    """A disk that writes nothing until it is let."""

    opened = threading.Event()

    def save_tensors(self, *args, **kwargs) -> None:
        assert Gate.opened.wait(60)
        super().save_tensors(*args, **kwargs)


def save_beside_training(rank: int, root: str, zero: int, copies: bool) -> list[float]:
    """Two saves of step 2: one at once, one in the background while two more steps are taken."""
    engine = make_engine(zero)
    for step in range(2):
        take_step(engine, step)
    state = TrainState(step=2)
    save_checkpoint(Path(root) / "at_once", engine, state, fingerprint=FINGERPRINT, keep=1)
    checkpoint_saver.Files = Gate
    saver = make_saver(Path(root) / "beside", engine)
    if not copies:
        saver._copied = lambda tensors: tensors
    saver.save(state)
    with pytest.raises(AssertionError, match="finish comes before the next save"):
        saver.save(state)
    losses = [take_step(engine, step) for step in (2, 3)]
    saver.poll()
    assert saver.newest is None
    assert list((Path(root) / "beside").glob("step-*")) == []
    Gate.opened.set()
    saver.finish()
    assert saver.newest == Path(root) / "beside" / "step-00000002"
    # The memory is used again, for the state of now.
    saver.save(TrainState(step=4))
    saver.finish()
    return losses


def shards(path: Path) -> StateShards:
    files = read_manifest(path)["files"]
    assert find_damage(path, files) is None
    return StateShards(path, [file["name"] for file in files])


def different(a: Path, b: Path) -> list[str]:
    """What two checkpoints do not have in common, bit by bit."""
    ours, theirs = shards(a), shards(b)
    assert ours.shapes == theirs.shapes
    return [
        f"{kind} of {name}"
        for name, kind in itertools.product(ours.shapes, KINDS)
        if not torch.equal(ours.whole(name, kind), theirs.whole(name, kind))
    ]


@pytest.mark.parametrize("zero", [0, 3])
def test_a_save_in_the_background_holds_the_state_of_its_moment(tmp_path, zero):
    run_distributed(save_beside_training, str(tmp_path), zero, True, world=2, timeout_s=240)
    at_once, beside = tmp_path / "at_once", tmp_path / "beside"
    assert different(at_once / "step-00000002", beside / "step-00000002") == []
    assert len(different(beside / "step-00000002", beside / "step-00000004")) == 3 * NUM_PARAMETERS


def test_without_a_copy_the_steps_that_follow_would_be_seen(tmp_path):
    run_distributed(save_beside_training, str(tmp_path), 1, False, world=2, timeout_s=240)
    assert different(tmp_path / "at_once" / "step-00000002", tmp_path / "beside" / "step-00000002")


def full_disk(rank: int, root: str, zero: int) -> list[str]:
    """Every file in turn is on a device that is full; each is said once, and the next save goes well."""
    engine = make_engine(zero)
    saver = make_saver(Path(root), engine, keep=1)
    take_step(engine, 0)
    saver.save(TrainState(step=1))
    saver.finish()
    said = []
    for victim in ("state-rank00000.safetensors", "state-rank00001.safetensors", "rng-rank00001.json", "manifest.json"):

        def on_a_full_device(folder: Path, temporary: Path, victim=victim) -> None:
            prepare(folder, temporary)
            (temporary / victim).symlink_to("/dev/full")

        checkpoint_saver.prepare = on_a_full_device
        saver.save(TrainState(step=2))
        deadline = time.monotonic() + 60
        while not said or said[-1][0] != victim:
            assert time.monotonic() < deadline
            take_step(engine, 1)
            try:
                saver.poll()
            except CheckpointError as error:
                said.append((victim, str(error)))
        saver.poll()
        saver.finish()
        assert saver.newest == latest_checkpoint(root) == Path(root) / "step-00000001"
    checkpoint_saver.prepare = prepare
    saver.save(TrainState(step=2))
    saver.finish()
    return said


def test_a_full_disk_is_heard_of_at_the_next_step_on_every_process(tmp_path):
    told = run_distributed(full_disk, str(tmp_path), 1, world=2, timeout_s=240)
    assert told[0] == told[1]
    for victim, message in told[0]:
        assert "[Errno 28] No space left on device" in message
        assert "earlier checkpoints are as they were" in message
        assert message.startswith("[rank 1 | " if "00001" in victim else "[rank 0 | ")
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]


def die_while_writing(rank: int, root: str, victim: int) -> str:
    engine = make_engine()
    saver = make_saver(Path(root), engine)
    saver.save(TrainState(step=1))
    saver.finish()
    if rank == victim:
        Files.save_tensors = lambda *args, **kwargs: os._exit(9)
    saver.save(TrainState(step=2))
    try:
        saver.finish()
    except CheckpointError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_while_it_writes_leaves_the_previous_one(tmp_path, victim):
    with pytest.raises(DistributedError, match="ended without a result"):
        run_distributed(die_while_writing, str(tmp_path), victim, world=2, timeout_s=240)
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000001"
    assert (tmp_path / "tmp-step-00000002").is_dir()


def survive(rank: int, root: str) -> str:
    if rank == 1:
        die_while_writing(rank, root, 1)
    return die_while_writing(rank, root, 1)


def test_the_others_hear_that_it_was_not_completed(tmp_path):
    told = run_distributed(survive, str(tmp_path), world=2, timeout_s=240, abandon=[1])
    assert "step-00000002 was not completed: " in told[0]


def changed_inside(rank: int, root: str) -> list[str]:
    """What would be seen if DeepSpeed kept its state in another way, or the model had what no checkpoint holds."""
    said = []
    engine = make_engine(2)
    own = EngineState(engine).pieces[0]
    own.fp32.add_(1.0)
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(Path(root), engine, TrainState(step=1), fingerprint=FINGERPRINT, keep=1)
    said.append(str(caught.value))
    own.fp32.sub_(1.0)
    engine.ds.module.register_buffer("seen", torch.zeros(1))
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(Path(root), engine, TrainState(step=1), fingerprint=FINGERPRINT, keep=1)
    said.append(str(caught.value))
    del engine.ds.module.seen
    engine.ds.module.lm_head.weight.requires_grad_(False)
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(Path(root), engine, TrainState(step=1), fingerprint=FINGERPRINT, keep=1)
    said.append(str(caught.value))
    return said


def test_what_a_checkpoint_would_not_hold_is_refused(tmp_path):
    (said, _) = run_distributed(changed_inside, str(tmp_path), world=2, timeout_s=240)
    assert "of the optimizer is not that of the model" in said[0]
    assert "buffers of the model's state are in no checkpoint: seen" in said[1]
    assert "parameters that are not trained are in no checkpoint: lm_head.weight" in said[2]
    assert list(tmp_path.glob("step-*")) == []
