"""Start-up: which process this is, agreement on errors, devices, threads, exit codes."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from run_cases import Forked, free_port

from longctx import launch, process
from longctx.config_loader import key_names
from longctx.errors import ConfigError, DistributedError
from longctx.launch import Launch, Place, StartError, choose_device, run
from longctx.process import SignalPipe, set_cpu_threads

FULL = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("extra", "launcher"),
    [({"TORCHELASTIC_RUN_ID": "x"}, "torchrun"), ({"CROSS_RANK": "0"}, "deepspeed"), ({}, "other")],
    ids=["torchrun", "deepspeed", "other"],
)
def test_place_from_a_launcher(extra, launcher):
    assert Place.from_env(FULL | extra) == Place(rank=3, world_size=8, local_rank=1, launcher=launcher)


def test_place_without_a_launcher_sets_what_deepspeed_reads():
    env = {}
    assert Place.from_env(env) == Place(rank=0, world_size=1, local_rank=0, local_world_size=1, launcher="python")
    assert {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= env.keys()
    assert Place.from_env(env).launcher == "python", "reading twice changes nothing"


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "missing: LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        (FULL | {"RANK": "8"}, "do not fit together"),
        (FULL | {"LOCAL_RANK": "5"}, "do not fit together"),
        (FULL | {"RANK": "two"}, "whole numbers"),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "1"}, "each would train alone"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"}, "each would train alone"),
    ],
    ids=["incomplete", "rank-outside", "local-rank-outside", "not-a-number", "slurm", "mpi"],
)
def test_place_refuses_what_does_not_fit(env, says):
    with pytest.raises(ConfigError, match=says):
        Place.from_env(env)


def test_choose_device(monkeypatch):
    assert choose_device(Place(), "cpu")[0] == torch.device("cpu")
    monkeypatch.setattr(launch.torch.cuda, "is_available", lambda: False)
    assert choose_device(Place(), "auto") == (torch.device("cpu"), "no CUDA device")
    with pytest.raises(ConfigError, match="sees no CUDA device"):
        choose_device(Place(), "cuda")
    monkeypatch.setattr(launch.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(launch.torch.cuda, "get_device_name", lambda i: "GPU of a test")
    place = Place(rank=5, world_size=6, local_rank=1)
    assert choose_device(place, "auto") == (torch.device("cuda", 1), "GPU of a test, GPU 1 of 2")
    with pytest.raises(ConfigError, match="process 2 of this machine has no GPU: 2 visible"):
        choose_device(Place(rank=2, world_size=3, local_rank=2), "auto")


def test_cpu_threads_are_shared_unless_told_otherwise(monkeypatch):
    set_to = []
    monkeypatch.setattr(process.torch, "set_num_threads", set_to.append)
    monkeypatch.setattr(process.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert "OMP_NUM_THREADS = 1" in set_cpu_threads(4, {"OMP_NUM_THREADS": "1"})
    assert "torch's choice" in set_cpu_threads(1, {})
    assert set_to == []
    assert "8 cores for 2 processes" in set_cpu_threads(4, {"LOCAL_WORLD_SIZE": "2"})
    set_cpu_threads(16, {"LOCAL_SIZE": "16"})
    assert set_to == [4, 1]


def test_one_process_agrees_with_itself():
    alone = Launch(Place())
    with alone.together("nothing"):
        pass
    assert alone.from_first("a name", lambda: "x") == "x"
    with pytest.raises(StartError, match="ConfigError: no text"), alone.together("the text"):
        raise ConfigError("no text")
    with pytest.raises(KeyError), alone.together("the text"):
        raise KeyError("a mistake of ours")


@pytest.mark.parametrize(
    ("error", "is_working", "code", "says"),
    [
        (None, False, 0, ""),
        (ConfigError("seq_len"), False, 2, "ConfigError: seq_len\n"),
        (ConfigError("seq_len"), True, 1, "ConfigError: seq_len\n"),
        (KeyboardInterrupt(), True, 130, "interrupted\n"),
    ],
    ids=["fine", "user-error", "while-working", "ctrl-c"],
)
def test_exit_codes(error, is_working, code, says, capsys):
    def body(started):
        started.is_working = is_working
        if error is not None:
            raise error

    assert run(body, Place()) == code
    assert capsys.readouterr().err == says


def test_a_full_gpu_is_told_what_frees_memory(capsys):
    def body(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert run(body, Place()) == 1
    told = capsys.readouterr().err
    assert "CUDA out of memory" in told
    for setting in re.findall(r"--(\w+\.\w+)", launch.OUT_OF_MEMORY):
        assert setting in key_names(), setting
    assert launch.OUT_OF_MEMORY in told


def test_a_mistake_of_ours_keeps_its_traceback(capsys):
    def body(started):
        raise KeyError("oops")

    assert run(body, Place()) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "KeyError: 'oops'" in err


def test_a_broken_environment_is_a_user_error(capsys, monkeypatch):
    monkeypatch.setattr(os, "environ", {"RANK": "0", "WORLD_SIZE": "2"})
    assert run(lambda started: None) == 2
    assert "missing: LOCAL_RANK" in capsys.readouterr().err


def meet(words: list[str]) -> int:
    """What each of three processes does, and which of them fail how."""
    (case,) = words

    def body(launch: Launch) -> None:
        rank = launch.place.rank
        with launch.together("the start"):
            pass
        assert launch.from_first("a path", lambda: f"from {rank}") == "from 0"
        with launch.together("the data"):
            if case == "all":
                raise ConfigError("no text")
            if case == "one" and rank == 1:
                raise ConfigError("disk 1 is broken")
            if case == "two" and rank > 0:
                raise ConfigError(f"disk {rank} is broken")
            if case == "ours" and rank == 2:
                raise KeyError("a mistake")
        launch.finish()
        print(f"rank {rank} went on", flush=True)

    return run(body)


def start_three(folder: Path, case: str) -> tuple[list[int | None], list[str]]:
    """The exit codes and outputs of three processes, rank 0 last and so the last to arrive."""
    logs = [folder / f"{case}{rank}" for rank in range(3)]
    with Forked(3, folder / case, case, main=meet, logs=logs) as started:
        started.wait(90)
        return started.codes, [log.read_text() for log in logs]


def test_agreement_over_three_processes(tmp_path):
    codes, texts = start_three(tmp_path, "none")
    assert codes == [0, 0, 0], texts
    assert texts == [f"rank {r} went on\n" for r in range(3)]

    codes, texts = start_three(tmp_path, "all")
    assert codes == [2, 2, 2], texts
    assert texts == ["ConfigError: no text\n", "", ""], "the same everywhere is told once"


def test_errors_of_single_ranks_are_told_by_them_and_end_all(tmp_path):
    codes, texts = start_three(tmp_path, "one")
    assert codes == [2, 2, 2], texts
    assert texts == ["", "[rank 1], the data: ConfigError: disk 1 is broken\n", ""]

    codes, texts = start_three(tmp_path, "two")
    assert codes == [2, 2, 2], texts
    assert texts[0] == ""
    assert [f"disk {r} is broken" in texts[r] for r in (1, 2)] == [True, True]

    codes, texts = start_three(tmp_path, "ours")
    assert codes == [2, 2, 1], texts
    assert "Traceback" in texts[2]


def test_a_process_that_does_not_come_is_an_error(monkeypatch):
    env = FULL | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (env | {"MASTER_PORT": str(free_port())}).items():
        monkeypatch.setenv(name, value)
    lonely = Launch(Place.from_env(), timeout_s=1.0)
    with pytest.raises(DistributedError, match="could not meet the other 1 process"):
        lonely.agree("the start", None)


def test_signal_pipe_catches_and_restores():
    import signal

    before = signal.getsignal(signal.SIGTERM)
    pipe = SignalPipe()
    pipe.open()
    os.kill(os.getpid(), signal.SIGTERM)
    assert pipe.wait(5.0) == bytes([signal.SIGTERM])
    assert pipe.wait(0.01) == b""
    pipe.close()
    assert signal.getsignal(signal.SIGTERM) is before
    pipe.close()
