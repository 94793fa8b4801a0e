"""Folders of checkpoints: nothing that can happen to one, or while it is written, passes unseen."""

from __future__ import annotations

import json
import os
import resource
import shutil
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from checkpoint_cases import FINGERPRINT, SAVED_AT, at, make_engine, take_steps, uninterrupted
from train_cases import MODEL

from longctx import checkpoint_saver
from longctx.checkpoint import check_checkpoint, latest_checkpoint, load_checkpoint
from longctx.checkpoint_files import WrittenFile
from longctx.checkpoint_folder import complete, prune
from longctx.checkpoint_saver import save_checkpoint
from longctx.errors import CheckpointError, DistributedError
from longctx.testing import run_distributed


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def straight(root):
    return run_distributed(uninterrupted, str(root), ("fp32-zero1", "fp32-zero3"), world=2, timeout_s=240)


# ---- what a folder says of itself


@pytest.fixture
def folder(straight, root, tmp_path) -> Path:
    """A copy of a run's checkpoints to do harm to: of step 3, and an older one of step 2."""
    copy = tmp_path / "checkpoints"
    shutil.copytree(root / "fp32-zero1", copy)
    older = copy / "step-00000002"
    shutil.copytree(copy / "step-00000003", older)
    change_manifest(older, serial=0)
    return copy


def change_manifest(path: Path, **changes) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | changes))


def test_the_manifest_is_plain_and_complete(straight, root):
    path = root / "fp32-zero3" / "step-00000003"
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["state"] == asdict(at(SAVED_AT))
    assert manifest["model"] == FINGERPRINT
    assert {file["name"] for file in manifest["files"]} | {"manifest.json"} == {p.name for p in path.iterdir()}
    assert {"rng-rank00000.json", "rng-rank00001.json"} <= {file["name"] for file in manifest["files"]}
    for file in manifest["files"]:
        content = (path / file["name"]).read_bytes()
        assert (len(content), zlib.crc32(content)) == (file["bytes"], file["crc32"])


def test_the_newest_complete_one_is_found(folder, caplog):
    assert latest_checkpoint(folder) == folder / "step-00000003"
    (folder / "tmp-step-00000009").mkdir()
    (folder / "step-00000008").mkdir()
    with caplog.at_level("WARNING"):
        assert latest_checkpoint(folder) == folder / "step-00000003"
    assert "step-00000008: it has no manifest.json" in caplog.text
    # What was saved last counts, not the highest step: a run may have gone back.
    change_manifest(folder / "step-00000002", serial=7)
    assert latest_checkpoint(folder) == folder / "step-00000002"
    assert latest_checkpoint(folder / "nothing") is None


def truncate(path: Path) -> None:
    file = next(path.glob("state-rank*"))
    file.write_bytes(file.read_bytes()[:-100])


def remove_file(path: Path) -> None:
    next(path.glob("rng-*")).unlink()


def cut_manifest(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text[: len(text) // 2])


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (truncate, "is truncated: "),
        (remove_file, "rng-rank0000\\d.json is missing"),
        (cut_manifest, "its manifest.json cannot be read"),
        (lambda path: (path / "manifest.json").unlink(), "it has no manifest.json"),
        (lambda path: change_manifest(path, format=1), "it has format 1; this version of longctx reads format 2"),
        (lambda path: (path / "manifest.json").write_text("[]"), "its manifest.json cannot be read"),
        (lambda path: (path / "manifest.json").write_text('{"format": 2, "files": []}'), "lacks serial, state, opt"),
        (shutil.rmtree, "there is no such folder"),
    ],
    ids=["truncated", "file_missing", "manifest_cut", "no_manifest", "format", "a_list", "keys_missing", "gone"],
)
def test_an_incomplete_one_is_refused_and_the_previous_offered(folder, harm, words):
    path = folder / "step-00000003"
    harm(path)
    previous = folder / "step-00000002"
    with pytest.raises(CheckpointError, match=words) as caught:
        check_checkpoint(path, FINGERPRINT)
    assert f"--train.resume={previous}" in str(caught.value)
    assert latest_checkpoint(folder) == previous
    shutil.rmtree(previous)
    assert latest_checkpoint(folder) is None


def test_without_another_one_a_new_start_is_offered(folder):
    shutil.rmtree(folder / "step-00000002")
    truncate(folder / "step-00000003")
    with pytest.raises(CheckpointError, match="no complete one beside it; --train"):
        check_checkpoint(folder / "step-00000003", FINGERPRINT)


def test_the_folder_of_checkpoints_is_not_one(folder):
    with pytest.raises(CheckpointError, match=r"is not one itself; the newest is .*step-00000003"):
        check_checkpoint(folder, FINGERPRINT)


def test_another_model_is_refused_with_the_fields_that_differ(folder):
    ours = asdict(replace(MODEL, num_layers=3, tie_embeddings=True)) | {"rope_scaling": {"kind": "yarn", "factor": 8.0}}
    with pytest.raises(CheckpointError) as caught:
        check_checkpoint(folder / "step-00000003", ours)
    message = str(caught.value)
    assert "is of another model" in message
    assert "num_layers: 2 in the checkpoint, 3 here" in message
    assert "tie_embeddings: False in the checkpoint, True here" in message
    assert "rope_scaling.factor: (not set) in the checkpoint, 8.0 here" in message
    assert "hidden_size" not in message


def test_pruning_keeps_what_was_saved_last(folder):
    for step, serial in ((4, 2), (1, 3)):
        shutil.copytree(folder / "step-00000003", folder / f"step-0000000{step}")
        change_manifest(folder / f"step-0000000{step}", serial=serial)
    truncate(folder / "step-00000002")
    prune(folder, keep=2)
    # The truncated one is not ours to judge.
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000001", "step-00000002", "step-00000004"]


# ---- what can happen while saving and loading


def fail_once(rank: int, failing: int, engine, root: Path) -> str:
    """Save with no room on the disk of one rank: the system refuses to let a file grow beyond 1 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == failing:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        with pytest.raises(CheckpointError) as caught:
            save_checkpoint(root, engine, at(2), fingerprint=FINGERPRINT, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return str(caught.value)


class Malicious:
    """Unpickled by Python it would leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def replace_file(path: Path, content: bytes) -> None:
    """With a manifest that agrees."""
    path.write_bytes(content)
    manifest = json.loads((path.parent / "manifest.json").read_text())
    for file in manifest["files"]:
        if file["name"] == path.name:
            file |= {"bytes": len(content), "crc32": zlib.crc32(content)}
    (path.parent / "manifest.json").write_text(json.dumps(manifest))


def trouble(rank: int, root: str, harmed: str) -> dict:
    told: dict = {}
    for run in ("fp32-zero0", "fp32-zero1", "fp32-zero3"):
        here = Path(root) / run
        engine = make_engine(run)
        take_steps(engine, 0, 1)
        first = save_checkpoint(here, engine, at(1), fingerprint=FINGERPRINT, keep=1)
        told[run] = []
        for failing in (0, 1):
            # Without ZeRO the second process writes its random generators only, which are larger than the limit too.
            told[run].append(fail_once(rank, failing, engine, here))
            if rank == 0:
                # The only one that makes and removes folders: the others might look while it makes the next.
                assert sorted(p.name for p in here.iterdir()) == [first.name]
            check_checkpoint(first, FINGERPRINT)
        take_steps(engine, 1, 2)
        told[run].append(str(save_checkpoint(here, engine, at(2), fingerprint=FINGERPRINT, keep=1)))
        # A second one of the same step takes its place.
        save_checkpoint(here, engine, at(2), fingerprint=FINGERPRINT, keep=1)
        told[run].append(sorted(p.name for p in here.iterdir()) if rank == 0 else ["step-00000002"])
    for name in ("damaged", "malicious"):
        engine = make_engine("fp32-zero1")
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(Path(harmed) / name, engine, FINGERPRINT)
        told[name] = str(caught.value)
    return told


@pytest.fixture(scope="module")
def troubled(straight, root, tmp_path_factory):
    harmed = tmp_path_factory.mktemp("harmed")
    for name in ("damaged", "malicious"):
        shutil.copytree(root / "fp32-zero1" / "step-00000003", harmed / name)
    file = next((harmed / "damaged").glob("state-rank00001*"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    torch.save({"module": Malicious(harmed / "was_run")}, harmed / "pickle")
    replace_file(harmed / "malicious" / "state-rank00001.safetensors", (harmed / "pickle").read_bytes())
    told = run_distributed(trouble, str(tmp_path_factory.mktemp("trouble")), str(harmed), world=2, timeout_s=240)
    return told, harmed


@pytest.mark.parametrize("run", ["fp32-zero0", "fp32-zero1", "fp32-zero3"])
def test_a_full_disk_leaves_the_previous_one_and_the_run(troubled, run):
    for of_rank in troubled[0]:
        first, second, _, left = of_rank[run]
        assert first.startswith("[rank 0 | dp0 pp0 ring0 uly0 tp0] checkpoint ")
        assert second.startswith("[rank 1 | dp0 pp0 ring1 uly0 tp0] checkpoint ")
        for message in (first, second):
            assert "File too large" in message
            assert "earlier checkpoints are as they were" in message
        assert left == ["step-00000002"]


def test_damage_is_seen_before_anything_is_loaded(troubled):
    for of_rank in troubled[0]:
        assert "state-rank00001.safetensors is damaged: its checksum is" in of_rank["damaged"]


def test_a_file_cannot_run_code(troubled):
    told, harmed = troubled
    for of_rank in told:
        assert "is as it was written, but is not understood" in of_rank["malicious"]
    assert not (harmed / "was_run").exists()
    # The same file does run when it is unpickled without care.
    torch.load(harmed / "pickle", weights_only=False)
    assert (harmed / "was_run").exists()


def kill(rank: int, root: str) -> None:
    engine = make_engine("fp32-zero1")
    save_checkpoint(Path(root), engine, at(1), fingerprint=FINGERPRINT, keep=1)
    # The first process ends when all files are there, and the manifest is not.
    checkpoint_saver.complete = lambda *args: os._exit(9)
    save_checkpoint(Path(root), engine, at(2), fingerprint=FINGERPRINT, keep=1)


def save_again(rank: int, root: str) -> None:
    engine = make_engine("fp32-zero1")
    load_checkpoint(latest_checkpoint(root), engine, FINGERPRINT)
    save_checkpoint(Path(root), engine, at(3), fingerprint=FINGERPRINT, keep=2)


def test_a_run_killed_while_saving_leaves_the_previous_one(tmp_path):
    with pytest.raises(DistributedError, match="ended without a result"):
        run_distributed(kill, str(tmp_path), world=2, timeout_s=240)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "tmp-step-00000002"]
    assert list((tmp_path / "tmp-step-00000002").glob("state-rank*"))
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000001"
    run_distributed(save_again, str(tmp_path), world=2, timeout_s=240)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def test_files_that_other_machines_wrote_elsewhere_are_missed(tmp_path):
    temporary = tmp_path / "tmp-step-00000001"
    temporary.mkdir()
    written = [WrittenFile("rng-rank00001.json", bytes=1, crc32=0)]
    with pytest.raises(CheckpointError, match=r"rng-rank00001\.json of other processes cannot be seen"):
        complete({}, written, temporary, tmp_path / "step-00000001")
    assert list(tmp_path.glob("step-*")) == []
