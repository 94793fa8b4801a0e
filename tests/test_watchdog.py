"""A rank that dies, fails or hangs ends all ranks in time, and is named; a run that is well is left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist
from watchdog_cases import TIMEOUT_S, Ranks

from longctx.errors import DistributedError, NonFiniteError
from longctx.heartbeat import Heartbeat, is_communication_error, machine_name, one_line, start_time
from longctx.launch import Place
from longctx.parallel.journal import Journal
from longctx.watchdog import Watchdog


def test_a_healthy_run_is_left_alone_and_leaves_at_once(tmp_path):
    with Ranks(tmp_path, "none") as ranks:
        ranks.wait_until_it_happens()
        start = time.monotonic()
        assert ranks.codes() == [0, 0, 0], ranks.logs
    # 15 more steps of 0.1 s and a little; stopping costs no heartbeat interval and no timeout.
    assert time.monotonic() - start < 6
    assert ranks.logs.strip() == ""


@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_rank(victim, tmp_path):
    with Ranks(tmp_path, "kill", victim) as ranks:
        codes = ranks.codes()
        logs = ranks.logs
    assert codes[victim] == -signal.SIGKILL
    assert [code for r, code in enumerate(codes) if r != victim] == [1, 1], logs
    named = f"] rank {victim} (dp0 ring{victim}) stopped answering at step 5"
    tellers = [r for r in range(3) if named in ranks.log(r)]
    if victim == 1:
        assert len(tellers) == 1, f"one rank tells:\n{logs}"
    else:
        # The store went with rank 0, so the others cannot ask each other who tells.
        assert tellers, logs
    for rank in {0, 1, 2} - {victim}:
        assert f"rank {victim} (dp0 ring{victim}) stopped answering" in (tmp_path / f"reason{rank}").read_text()


def test_a_stopped_rank_is_found_by_its_silence_and_ended(tmp_path):
    with Ranks(tmp_path, "stop") as ranks:
        ranks.wait_until_it_happens()
        start = time.monotonic()
        codes = ranks.codes()
        logs = ranks.logs
    assert time.monotonic() - start < TIMEOUT_S + 3, "timeout_s, and what the launcher's absence costs"
    assert codes == [1, -signal.SIGKILL, 1], logs
    assert "[rank 0 | dp0 ring0] rank 1 (dp0 ring1) stopped answering at step 5 (last heard at step" in logs


def test_a_hanging_rank_is_named_with_where_everyone_stands(tmp_path):
    with Ranks(tmp_path, "hang", 2) as ranks:
        ranks.wait_until_it_happens()
        start = time.monotonic()
        codes = ranks.codes()
        log = ranks.log(0)
    assert time.monotonic() - start < TIMEOUT_S + 3
    assert codes == [1, 1, 1], ranks.logs
    assert "rank 2 (dp0 ring2) hangs at step 5: no progress for" in log
    assert "rank 0 (dp0 ring0): step 5, computing for" in log
    assert "rank 2 (dp0 ring2): step 5, waiting for data for" in log
    for rank in range(3):
        stacks = (tmp_path / "stacks" / f"rank{rank}.txt").read_text()
        assert "in _train" in stacks
    assert "in befall" in (tmp_path / "stacks" / "rank2.txt").read_text()


@pytest.mark.parametrize("case", ["raise", "non-finite"])
def test_a_failing_rank_tells_its_reason_and_ends_all(case, tmp_path):
    with Ranks(tmp_path, case, 2) as ranks:
        assert ranks.codes() == [1, 1, 1], ranks.logs
    if case == "raise":
        assert "KeyError: 'lost key'" in ranks.log(2)
        assert "Traceback" in ranks.log(2)
    else:
        assert (
            "[rank 2 | dp0 ring2] rank 2 (dp0 ring2) failed at step 5 (waiting for data): the loss is nan"
            in ranks.log(2)
        )
        assert "Traceback" not in ranks.logs
    assert "failed at step 5" in (tmp_path / "reason0").read_text()
    assert ranks.log(0) == ""
    assert ranks.log(1) == ""


def test_sigterm_of_one_rank_ends_all(tmp_path):
    with Ranks(tmp_path, "none") as ranks:
        ranks.wait_until_it_happens()
        os.kill(ranks.processes[1].pid, signal.SIGTERM)
        codes = ranks.codes()
    assert codes == [1, 143, 1], ranks.logs
    assert "[rank 1 | dp0 ring1] was told to end (SIGTERM)" in ranks.log(1)


def test_without_a_watchdog_a_dead_rank_is_waited_for(tmp_path):
    """The broken twin: the same run, unguarded, does not end. The tests above would see it."""
    with Ranks(tmp_path, "kill", is_guarded=False) as ranks:
        ranks.wait_until_it_happens()
        assert ranks.codes(4) == [None, -signal.SIGKILL, None], ranks.logs


def alone(**settings):
    return Watchdog(Place(), name_of=lambda r: f"ring{r}", timeout_s=10.0, **settings)


def test_one_process_needs_no_store(tmp_path):
    before = threading.active_count()
    dog = alone()
    dog.start()
    dog.mark(0, "computing")
    dog.failed(KeyError("told by the caller"))
    start = time.monotonic()
    dog.stop()
    assert time.monotonic() - start < 1
    assert threading.active_count() == before


def test_who_is_behind_is_read_from_the_marks():
    dog = Watchdog(Place(world_size=4), name_of=lambda r: f"ring{r}", timeout_s=10.0)
    for _ in range(7):
        dog.mark(3, "computing")
    dog._progress = dog._progress.__class__(3, "computing", time.monotonic() - 100, True, 7)
    stuck = {"step": 3, "age": 100.0}
    dog._seen = {r: Heartbeat(phase="computing", marks=7, **stuck) for r in (1, 2, 3)}
    verdict = dog._stuck()
    assert verdict.text.startswith("no rank has made progress for 100 s at step 3")
    assert verdict.wants_stacks
    dog._seen[2] = Heartbeat(phase="waiting for data", marks=6, where="data.py:1 read", **stuck)
    verdict = dog._stuck()
    assert verdict.text.startswith("rank 2 (ring2) hangs at step 3")
    assert "rank 2 (ring2): step 3, waiting for data for 100 s, in data.py:1 read" in verdict.text
    dog._seen[1] = Heartbeat(phase="finishing", marks=1, is_done=True, **stuck)
    assert dog._stuck().text.startswith("rank 2 (ring2) hangs"), "a rank that is done is not behind"
    dog.mark(3, "preparing", may_hang=False)
    dog._progress = dog._progress.__class__(3, "preparing", time.monotonic() - 100, False, 8)
    assert dog._stuck() is None, "work of unknown length is no hang"


def test_messages_that_arrive_are_progress_within_a_step():
    """A step of a very long sequence may take longer than timeout_s."""
    dog = Watchdog(Place(), name_of=lambda r: f"ring{r}", timeout_s=10.0)
    journal = Journal()
    dog.watch(journal)
    dog.mark(3, "computing")
    dog._progress = dog._progress.__class__(3, "computing", time.monotonic() - 100, True, 7)
    journal.enter(5)
    journal.wait(journal.post("forward, K/V for hop 1", to=(1,), source=(2,), num_bytes=1), lambda: None)
    assert dog._stuck() is None
    journal._stood = (journal.standing().order, time.monotonic() - 50)
    text = dog._stuck().text
    assert text.startswith("no rank has made progress for 50 s at step 3")
    assert "last message, arrived: layer 5, forward, K/V for hop 1 (to rank 1, from rank 2)" in text


def test_a_rank_that_is_done_is_never_dead():
    dog = Watchdog(Place(world_size=2), name_of=lambda r: f"ring{r}", timeout_s=10.0)
    gone = Heartbeat(host=machine_name(), pid=2**22 - 1, born="0")
    now = time.monotonic()
    dog._seen, dog._changed = {1: Heartbeat(host=gone.host, pid=gone.pid, born="0", is_done=True)}, {1: now - 1000}
    assert dog._dead(now) is None
    dog._seen = {1: gone}
    assert dog._dead(now) is None, "it may have said that it is done since: read again first"
    dog._round += 2
    assert dog._dead(now) == 1


def test_silence_on_another_machine_is_death_only_while_the_store_answers():
    dog = Watchdog(Place(world_size=2), name_of=lambda r: f"ring{r}", timeout_s=1000.0)
    now = time.monotonic()
    dog._seen, dog._changed, dog._contact = {1: Heartbeat(host="elsewhere")}, {1: now - 50}, now
    assert dog._dead(now) is None, "50 s may be a compiler"
    dog._changed = {1: now - 70}
    assert dog._dead(now) == 1
    dog._contact = now - 65
    assert dog._dead(now) is None, "we have not been able to hear anyone"
    assert dog._look() is None
    dog._store = dist.HashStore()
    dog._contact = now - 100
    os.environ.setdefault("MASTER_ADDR", "node0")
    os.environ.setdefault("MASTER_PORT", "1")
    assert "rank 0 (ring0) stopped answering" in dog._look().text


def test_communication_errors_are_told_from_others():
    assert is_communication_error(RuntimeError("[../gloo/transport/tcp/pair.cc:1] Connection closed by peer [::1]:1"))
    assert is_communication_error(dist.DistNetworkError("x"))
    with pytest.raises(DistributedError) as wrapped:
        raise DistributedError("hop 1 failed") from RuntimeError("NCCL error: remote process exited")
    assert is_communication_error(wrapped.value)
    assert not is_communication_error(DistributedError("the processes are not at the same step"))
    assert not is_communication_error(RuntimeError("CUDA out of memory"))
    assert not is_communication_error(NonFiniteError("nan"))


def test_start_time_tells_living_processes_from_dead_ones():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    born = start_time(child.pid)
    assert born is not None
    assert start_time(child.pid) == born
    child.kill()
    deadline = time.monotonic() + 10
    while start_time(child.pid) is not None:
        assert time.monotonic() < deadline, "a zombie is dead too"
    child.wait()
    assert start_time(child.pid) is None


def test_one_line():
    assert one_line(ValueError("first\nsecond")) == "ValueError: first"
    assert one_line(ValueError()) == "ValueError"
