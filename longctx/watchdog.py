"""A rank that dies, fails or hangs ends all ranks, with its coordinates and its reason in the message.

Collectives wait for ever for a peer that is gone. Each process therefore has two daemon threads that never touch the
process group. One writes a heartbeat to the run's key-value store about once a second and reads the others'. The other
judges what was read, and listens for signals even while the main thread is stuck inside a collective. The first rank
that has evidence writes a verdict to the store; every rank ends as soon as it sees one.

    rank 5 raises   -> writes the verdict itself, with its reason; its own traceback is printed there
    rank 5 is killed -> its process is gone (same machine), or its heartbeats stop (another machine)
    rank 5 hangs    -> heartbeats go on, but no rank makes progress; a table shows where each one stands, down to the
                       layer, the hop, the direction and the peer of the message that it waits for
    rank 0 or the launcher is gone -> the store no longer answers
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from longctx.errors import LongCtxError
from longctx.heartbeat import (
    Heartbeat,
    Verdict,
    is_communication_error,
    machine_name,
    one_line,
    start_time,
    tell_standings,
)
from longctx.launch import Place
from longctx.parallel.journal import Journal, Standing
from longctx.process import EXIT_FAILED, EXIT_INTERRUPTED, SignalPipe, dump_stacks, leave_now, tell

# Without a sign of life for this long, a rank on another machine counts as dead (never more than train.timeout_s).
# Compilers that hold Python's lock silence a healthy rank for seconds, a swapping machine for tens of them.
SILENT_S = 60.0
# Once the launcher ends this process because of another one, the dead one is that whose beats have already stopped.
SILENT_AFTER_SIGTERM_S = 3.5
# How long SIGTERM waits for evidence. Launchers kill 30 s after it.
SIGTERM_PATIENCE_S = 6.0
# How long the main thread gets to leave by itself after Ctrl-C.
INTERRUPT_PATIENCE_S = 5.0

_PACKAGE = str(Path(__file__).parent)


@dataclass(frozen=True)
class _Progress:
    step: int
    phase: str
    since: float
    may_hang: bool
    marks: int


class Watchdog:
    """Watch over the ranks of a run, from `start` to `stop`.

    Args:
        place: which process this is.
        name_of: the coordinates of a rank, for messages.
        timeout_s: a rank that dies or hangs ends the run within this time.
        stacks_dir: where each rank writes the stacks of its threads when the run hangs; None: to stderr.
        before_exit: called with the reason before the process ends; must be quick and must not communicate.
        interval_s: time between heartbeats.
        in_stages: the ranks are of a pipeline, whose stages send different messages.

    With one process there is no store: hangs and signals are still reported.
    """

    def __init__(
        self,
        place: Place,
        *,
        name_of: Callable[[int], str],
        timeout_s: float,
        stacks_dir: Path | None = None,
        before_exit: Callable[[str], None] = lambda reason: None,
        interval_s: float = 1.0,
        in_stages: bool = False,
    ) -> None:
        self.place, self.name_of = place, name_of
        self.timeout_s, self.interval_s = timeout_s, interval_s
        self.stacks_dir, self.before_exit = stacks_dir, before_exit
        self.in_stages = in_stages
        self.prefix = f"[rank {place.rank} | {name_of(place.rank)}]"
        # Leave time for the verdict to travel before the process group's own timeout.
        self.hang_s = max(0.9 * timeout_s - 2 * interval_s, 0.5 * timeout_s)
        # A rank that does not even answer is not behind but gone: this must be found out first.
        self.silent_s = min(SILENT_S, 0.7 * self.hang_s)

        self._me = Heartbeat(host=machine_name(), pid=os.getpid(), born=start_time(os.getpid()) or "")
        self._progress = _Progress(0, "start", time.monotonic(), False, 0)
        self._seen: dict[int, Heartbeat] = {}
        self._changed: dict[int, float] = {}  # when the rank's count last changed, by our clock
        self._round = 0  # complete readings of the others' beats
        self._contact = time.monotonic()
        self._lost: str | None = None
        self._verdict: Verdict | None = None
        self._proposal: Verdict | None = None
        self._sigterm_at: float | None = None
        self._interrupt_at: float | None = None
        self._gone: dict[int, int] = {}  # local ranks found dead -> the reading after which it is certain
        self._stopping = False
        self._ending = threading.Lock()
        self._wake = threading.Event()
        self._threads: list[threading.Thread] = []
        self._store: dist.Store | None = None
        self._main = threading.main_thread().ident
        self._journal: Journal | None = None
        self._signals = SignalPipe()

    def start(self) -> None:
        """Open a connection of its own to the store and start watching. Call it from the main thread, after the ranks
        have met there."""
        if self.place.world_size > 1:
            store = dist.TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=max(self.silent_s, 10.0)),
            )
            self._store = dist.PrefixStore("longctx/watchdog", store)
            self._threads.append(threading.Thread(target=self._beat, name="longctx-heartbeat", daemon=True))
        self._threads.append(threading.Thread(target=self._judge, name="longctx-watchdog", daemon=True))
        self._signals.open()
        for thread in self._threads:
            thread.start()

    def mark(self, step: int, phase: str, *, may_hang: bool = True) -> None:
        """The main thread is now at this step and phase. Every rank must make the same marks in the same order.

        Args:
            may_hang: whether staying here for `timeout_s` is a hang. False for work of unknown length.
        """
        self._progress = _Progress(step, phase, time.monotonic(), may_hang, self._progress.marks + 1)

    def watch(self, journal: Journal) -> None:
        """Report from now on where this rank is in the messages that `journal` notes."""
        self._journal = journal

    def failed(self, error: BaseException) -> None:
        """The main thread is about to leave with `error`: tell the others why. Does not return when the true reason is
        another rank's; afterwards `error.was_told` says whether the message is out already."""
        if self._store is None or self._stopping:
            return
        if is_communication_error(error):
            # A peer went away, most likely. Give the evidence time to appear; `_judge` then ends this process.
            deadline = time.monotonic() + self.silent_s + 3 * self.interval_s
            self._wake.set()
            while time.monotonic() < deadline and self._lost is None:
                time.sleep(0.05)
            time.sleep(2 * self.interval_s)
        has_message = isinstance(error, LongCtxError | KeyboardInterrupt)
        at = f"at step {self._progress.step} ({self._progress.phase})"
        if isinstance(error, KeyboardInterrupt):
            reason = f"was interrupted (Ctrl-C) {at}"
        else:
            reason = f"failed {at}: {str(error).removeprefix(self.prefix + ' ') if has_message else one_line(error)}"
        mine = self._verdict_on(f"rank {self.place.rank} ({self.name_of(self.place.rank)}) {reason}")
        # In this order: a heartbeat thread that stops without a proposal reports this rank as finished.
        self._proposal = mine
        self._stopping = True  # the judge must not end this process before it has told its reason
        self._wake.set()
        deadline = time.monotonic() + 3 * self.interval_s
        while self._verdict is None and self._lost is None and time.monotonic() < deadline:
            time.sleep(0.01)
        verdict = self._verdict or mine
        if has_message:
            # The same reason on several ranks is told once on each machine.
            error.was_told = True  # type: ignore[attr-defined]
            if self._tells(verdict):
                tell(f"{self.prefix} {verdict.text}\n{self.prefix} ending this run")
        self.before_exit(verdict.text)
        self._let_others_read()

    def stop(self) -> None:
        """This rank has finished: stop watching. Takes milliseconds."""
        self._stopping = True
        self._wake.set()
        for thread in self._threads:
            thread.join(timeout=2.0)
        self._threads.clear()
        self._signals.close()

    def _beat(self) -> None:
        """The heartbeat thread: the only one that uses the store, so the only one that a lost network can block."""
        store, rank, world = self._store, self.place.rank, self.place.world_size
        assert store is not None, "heartbeats need a store"
        count = 0
        try:
            while True:
                is_last = self._stopping and self._proposal is None
                count += 1
                store.set(f"beat/{rank}", json.dumps(dataclasses.asdict(self._describe_me(count, is_done=is_last))))
                if self._proposal is not None:
                    store.compare_set("verdict", "", json.dumps(dataclasses.asdict(self._proposal)))
                    self._proposal = None
                if store.check(["verdict"]):
                    self._verdict = Verdict(**json.loads(store.get("verdict")))
                if is_last:
                    return
                # Rank 0 reads all, the others rank 0: the traffic grows with the number of ranks, not its square.
                # Once something is wrong everyone looks everywhere.
                is_alarmed = self._sigterm_at is not None or bool(self._gone)
                watched = [r for r in (range(world) if rank == 0 or is_alarmed else (0,)) if r != rank]
                present = [r for r in watched if r in self._seen or store.check([f"beat/{r}"])]
                for r, text in zip(
                    present, store.multi_get([f"beat/{r}" for r in present]) if present else [], strict=True
                ):
                    beat = Heartbeat(**json.loads(text))
                    if self._seen.get(r) != beat:
                        self._seen[r], self._changed[r] = beat, time.monotonic()
                self._contact = time.monotonic()
                self._round += 1
                self._wake.wait(self.interval_s)
                self._wake.clear()
        except Exception as error:
            self._lost = one_line(error)

    def _describe_me(self, count: int, *, is_done: bool) -> Heartbeat:
        at = self._progress
        standing = self._journal.standing() if self._journal is not None else Standing()
        return dataclasses.replace(
            self._me,
            count=count,
            step=at.step,
            phase=at.phase,
            marks=at.marks,
            # Of a step of many minutes, messages that go on arriving are the sign of life.
            age=min(time.monotonic() - at.since, standing.age) if at.may_hang else 0.0,
            where=self._where(),
            call=standing.call,
            message=standing.message,
            is_waiting=standing.is_waiting,
            messages=standing.text,
            is_done=is_done,
        )

    def _where(self) -> str:
        frame = sys._current_frames().get(self._main or 0)
        innermost = frame
        while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
            frame = frame.f_back
        frame = frame or innermost
        if frame is None:
            return ""
        return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"

    def _judge(self) -> None:
        """The judging thread: never blocks for longer than a fraction of a second."""
        while not self._stopping:
            for number in self._signals.wait(0.25):
                self._on_signal(number)
            if self._stopping:
                return
            if self._verdict is not None:
                self._end(self._verdict)
            verdict = self._look()
            if verdict is not None:
                if self._store is None or self._lost is not None:
                    self._end(verdict)
                self._proposal = verdict
                self._wake.set()
                deadline = time.monotonic() + 2 * self.interval_s
                while self._verdict is None and self._lost is None and time.monotonic() < deadline:
                    time.sleep(0.01)
                if not self._stopping:
                    self._end(self._verdict or verdict)

    def _look(self) -> Verdict | None:
        """The verdict that the present evidence allows, if any."""
        now = time.monotonic()
        at = f"at step {self._progress.step} ({self._progress.phase})"
        if self._lost is not None or (self._store is not None and now - self._contact > self.silent_s + 10.0):
            reason = self._lost or f"no answer for {now - self._contact:.0f} s"
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            who = "the launcher" if self.place.store_is_with_launcher else f"rank 0 ({self.name_of(0)})"
            return self._verdict_on(f"{who} stopped answering {at}: no store at {where} ({reason})")
        dead = self._dead(now)
        if dead is not None:
            beat = self._seen[dead]
            heard = f"last heard at step {beat.step}, {beat.phase}"
            head = f"rank {dead} ({self.name_of(dead)}) stopped answering at step {self._progress.step} ({heard})"
            beats = {self.place.rank: self._describe_me(0, is_done=False), **self._seen}
            standings = self._standings(beats) if any(beat.messages for beat in beats.values()) else []
            return dataclasses.replace(self._verdict_on("\n".join([head, *standings])), culprit=dead)
        stuck = self._stuck()
        if stuck is not None:
            return stuck
        if self._sigterm_at is not None and (
            now - self._sigterm_at > SIGTERM_PATIENCE_S or self._all_alive_since(self._sigterm_at)
        ):
            others = "" if self._store is None else ", while all ranks were alive"
            return self._verdict_on(f"was told to end (SIGTERM) {at}{others}")
        if self._interrupt_at is not None and now - self._interrupt_at > INTERRUPT_PATIENCE_S:
            return self._verdict_on(f"was interrupted (Ctrl-C) {at}")
        return None

    def _all_alive_since(self, moment: float) -> bool:
        """Whether every other rank has given a sign of life well after `moment`."""
        others = [r for r in range(self.place.world_size) if r != self.place.rank]
        return all(self._changed.get(r, 0.0) > moment + 1.5 * self.interval_s for r in others)

    def _dead(self, now: float) -> int | None:
        """A rank whose process is gone, or that has been silent for too long."""
        silent_s = SILENT_AFTER_SIGTERM_S if self._sigterm_at is not None else self.silent_s
        for r, beat in list(self._seen.items()):
            if beat.is_done:
                continue
            if beat.host == self._me.host and start_time(beat.pid) != beat.born:
                # It may have finished since its last beat that we read: certain only after another reading.
                if r not in self._gone:
                    self._gone[r] = self._round + 2
                    self._wake.set()
                if self._round >= self._gone[r] or self._lost is not None:
                    return r
            elif now - self._changed[r] > silent_s and now - self._contact < silent_s:
                return r
        return None

    def _stuck(self) -> Verdict | None:
        """A verdict if no progress was made for too long, naming the rank that is behind."""
        me = self._describe_me(0, is_done=False)
        if me.age < self.hang_s or self.place.rank != 0:
            return None
        beats = {self.place.rank: me, **self._seen}
        working = {r: b for r, b in sorted(beats.items()) if not b.is_done}
        # How many messages a rank has sent tells nothing of one in another stage, but who waits for one waits for somebody.
        orders = {r: (b.marks, b.is_waiting) if self.in_stages else b.order for r, b in working.items()}
        last = [r for r, order in orders.items() if order == min(orders.values())]
        if len(last) < len(beats):
            names = ", ".join(f"rank {r} ({self.name_of(r)})" for r in last)
            head = f"{names} hangs at step {beats[last[0]].step}: no progress for {me.age:.0f} s"
        else:
            head = f"no rank has made progress for {me.age:.0f} s at step {me.step}"
        stacks = f"; stacks of every rank in {self.stacks_dir}" if self.stacks_dir else ""
        text = "\n".join([f"{head} (train.timeout_s = {self.timeout_s:g}){stacks}", *self._standings(beats)])
        return dataclasses.replace(self._verdict_on(text), wants_stacks=True)

    def _standings(self, beats: dict[int, Heartbeat]) -> list[str]:
        silent_s = {r: time.monotonic() - changed for r, changed in list(self._changed.items())}
        return tell_standings(beats, name_of=self.name_of, silent_s=silent_s, patience_s=3 * self.interval_s)

    def _verdict_on(self, text: str) -> Verdict:
        return Verdict(text, self.place.rank, self._me.host)

    def _tells(self, verdict: Verdict) -> bool:
        """One rank tells on each machine: who found it, elsewhere the first of the machine."""
        return verdict.by == self.place.rank or (verdict.host != self._me.host and self.place.local_rank == 0)

    def _end(self, verdict: Verdict) -> None:
        """Tell why, and end this process, whatever its main thread is doing."""
        with self._ending:
            if verdict.wants_stacks:
                dump_stacks(self.stacks_dir and self.stacks_dir / f"rank{self.place.rank}.txt", self.prefix)
            with contextlib.suppress(Exception):  # nothing may keep a broken run alive
                self.before_exit(verdict.text)
            if self._tells(verdict):
                tell(f"{self.prefix} {verdict.text}\n{self.prefix} ending this run")
            elif self._store is not None:
                time.sleep(0.5)  # a launcher ends all when the first one leaves: let the teller finish
            self._let_others_read()
            if verdict.by == self.place.rank and verdict.culprit is not None:
                self._kill(self._seen[verdict.culprit])
            if self._interrupt_at is not None:
                leave_now(EXIT_INTERRUPTED)
            leave_now(128 + signal.SIGTERM if self._sigterm_at is not None else EXIT_FAILED)

    def _let_others_read(self) -> None:
        """The store leaves with this process, if it holds it: the others read the verdict first."""
        if self.place.rank == 0 and self._store is not None and not self.place.store_is_with_launcher:
            time.sleep(1.5 * self.interval_s)

    def _kill(self, beat: Heartbeat) -> None:
        """End a stopped or locked process of this machine; a launcher would wait half a minute before it does."""
        if beat.host == self._me.host and start_time(beat.pid) == beat.born:
            with contextlib.suppress(OSError):
                os.kill(beat.pid, signal.SIGKILL)

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGTERM and self._sigterm_at is None:
            self._sigterm_at = time.monotonic()
            self._wake.set()
        elif number == signal.SIGINT and self._interrupt_at is None:
            # Python raises KeyboardInterrupt in the main thread, if that ever comes back from where it is.
            self._interrupt_at = time.monotonic()
