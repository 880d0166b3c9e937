"""Real processes that train and measure, or pretend to, and tell when."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nas import locks
from nas.locks import DeviceLock, device_lock

ROOT = Path(__file__).parents[2]
# How long a process is watched that must not get on: where it wrongly does, that takes a thousandth of it.
WATCHED_SECONDS = 0.2

# Takes the lock and keeps it until a line comes in.
ACTOR = """
import signal, sys
from nas.locks import DeviceLock
# A shell may have started the tests with Ctrl-C ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
name, kind = sys.argv[1:]
with getattr(DeviceLock(name), kind)(on_wait=lambda line: print("waits", flush=True)):
    print("holds", flush=True)
    sys.stdin.readline()
"""

# Trains and measures at random; prints what it did, from when to when, on the clock that all processes share.
RANDOM_ACTOR = """
import random, sys, time
from nas.locks import DeviceLock
seed, seconds = int(sys.argv[1]), float(sys.argv[2])
rng = random.Random(seed)
lock = DeviceLock("cpu")
done = []
deadline = time.monotonic() + seconds
while time.monotonic() < deadline:
    kind = rng.choice(["training", "training", "measuring"])
    with getattr(lock, kind)():
        begin = time.monotonic_ns()
        time.sleep(rng.choice([0, rng.uniform(0, 0.01)]))
        done.append((kind, begin, time.monotonic_ns()))
    time.sleep(rng.choice([0, 0, rng.uniform(0, 0.01)]))
for words in done:
    print(*words)
"""


class Actor:
    """Another process that takes a lock."""

    def __init__(self, name: str, kind: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", ACTOR, name, kind], cwd=ROOT, bufsize=0, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.input, self.output = self.process.stdin, self.process.stdout

    def says(self, word: str, seconds: float = 20.0) -> None:
        assert select.select([self.output], [], [], seconds)[0], f"no {word!r} in {seconds} s"
        assert self.output.readline().decode().strip() == word

    def is_silent(self) -> None:
        assert not select.select([self.output], [], [], WATCHED_SECONDS)[0], self.output.readline()

    def release(self) -> None:
        self.input.write(b"\n")
        assert self.process.wait(timeout=20) == 0

    def kill(self, sent: signal.Signals = signal.SIGKILL) -> None:
        self.process.send_signal(sent)
        assert self.process.wait(timeout=20) == -sent


Start = Callable[..., Actor]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of this test's own, for its processes too."""
    monkeypatch.setenv("CONVFIRST_LOCKS", str(tmp_path))
    locks._warn.cache_clear()
    yield tmp_path
    assert not locks._held


@pytest.fixture
def start() -> Iterator[Start]:
    actors: list[Actor] = []

    def begin(kind: str, name: str = "cpu") -> Actor:
        actors.append(Actor(name, kind))
        return actors[-1]

    yield begin
    for actor in actors:
        actor.process.kill()
        actor.process.communicate()


def enter(kind: str) -> None:
    with getattr(DeviceLock("cpu"), kind)():
        pass


def assert_silent(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enter(kind)


# -- Between processes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [
    ("training", "measuring"), ("measuring", "training"), ("measuring", "measuring"),
])  # fmt: skip
def test_a_measurement_overlaps_with_nothing(start: Start, first: str, second: str) -> None:
    holder = start(first)
    holder.says("holds")
    waiter = start(second)
    waiter.says("waits")
    waiter.is_silent()
    holder.release()
    waiter.says("holds")
    waiter.release()


def test_several_train_at_once(start: Start) -> None:
    for _ in range(3):
        # One after the other: at the turnstile they may have to wait for a moment.
        start("training").says("holds")


def test_other_devices_do_not_wait(start: Start) -> None:
    for name in ("cpu", "GPU-0", "GPU-1"):
        start("measuring", name).says("holds")


def test_a_waiting_measurer_goes_before_trainers_who_come_later(start: Start) -> None:
    """A stream of overlapping trainings would otherwise keep it waiting for ever."""
    early = start("training")
    early.says("holds")
    measurer = start("measuring")
    measurer.says("waits")
    late = [start("training") for _ in range(2)]
    for trainer in late:
        trainer.says("waits")
        trainer.is_silent()
    early.release()
    measurer.says("holds")
    for trainer in late:
        trainer.is_silent()
    measurer.release()
    for trainer in late:
        trainer.says("holds")


def test_who_waits_is_told_for_whom_at_once_and_again(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "AGAIN_SECONDS", 0.2)
    holder = start("measuring")
    holder.says("holds")
    lines: list[str] = []
    before, begin = locks.waited_seconds(), locks.working_clock()
    threading.Timer(0.7, lambda: holder.input.write(b"\n")).start()
    with DeviceLock("cpu").training(on_wait=lines.append):
        told = list(lines)
    who = rf"process {holder.process.pid}, which measures on this device \(begun at \d\d:\d\d: .*python.* -c .*\)"
    assert re.fullmatch(rf"waiting for {who}", told[0], re.DOTALL)
    assert len(told) >= 2
    assert all(re.fullmatch(rf"still waiting, for 0 min now, for {who}", line, re.DOTALL) for line in told[1:])
    assert locks.waited_seconds() - before > 0.5
    # The working clock stood still meanwhile.
    assert locks.working_clock() - begin < 0.4
    time.sleep(0.3)
    assert lines == told


def test_of_several_processes_some_are_named(start: Start) -> None:
    trainers = [start("training") for _ in range(4)]
    for trainer in trainers:
        trainer.says("holds")
    words = locks.holders("convfirst-cpu.lock")
    assert words.count("which trains on this device") == 2
    assert words.endswith(" and 2 more")
    assert locks.holders("convfirst-other.lock") == "another process that measures or trains on this device"


def test_a_stream_of_measurements_lets_a_trainer_in(start: Start) -> None:
    """Whoever lets go is quicker to take the lock again than a waiter to wake up."""

    class HasToWait(Exception):
        pass

    def give_up(line: str) -> None:
        raise HasToWait

    with DeviceLock("cpu").measuring():
        trainer = start("training")
        trainer.says("waits")
    with pytest.raises(HasToWait), DeviceLock("cpu").measuring(on_wait=give_up):
        pass
    trainer.says("holds")


@pytest.mark.parametrize("kind", ["training", "measuring"])
def test_a_killed_process_holds_nothing(start: Start, kind: str) -> None:
    holder = start(kind)
    holder.says("holds")
    waiter = start("measuring")
    waiter.says("waits")
    holder.kill()
    waiter.says("holds")


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("kind", ["training", "measuring"])
def test_a_waiting_process_can_be_ended_and_holds_nobody_up(start: Start, kind: str, sent: signal.Signals) -> None:
    holder = start("measuring")
    holder.says("holds")
    waiter = start(kind)
    waiter.says("waits")
    waiter.is_silent()
    waiter.kill(sent)
    holder.release()
    with DeviceLock("cpu").measuring(on_wait=lambda line: pytest.fail("nobody is left")):
        pass


def test_a_forked_child_does_not_keep_the_lock(start: Start) -> None:
    """It has the file open too, and would keep the lock of a training that is over."""
    with DeviceLock("cpu").training():
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        start("measuring").says("holds")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_at_random_no_measurement_ever_overlaps() -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANDOM_ACTOR, str(seed), "2"], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for seed in range(6)
    ]
    done: list[tuple[int, int, str, int]] = []
    for number, process in enumerate(processes):
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        lines = [line.split() for line in output.splitlines()]
        done += [(int(begin), int(end), kind, number) for kind, begin, end in lines]
        # Nobody starves.
        assert {kind for kind, _, _ in lines} == {"training", "measuring"}
    assert len(done) > 100
    done.sort()
    shared = 0
    # Who began and has not ended yet; it is enough to look at what was running when each began.
    running: list[tuple[int, str]] = []
    for begin, end, kind, _ in done:
        running = [(other_end, other) for other_end, other in running if other_end > begin]
        assert not running or {kind, *(other for _, other in running)} == {"training"}
        shared += bool(running)
        running.append((end, kind))
    # Otherwise the test would pass for a lock that is always exclusive.
    assert shared > 10


# -- In one process ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("outer", "inner"), list(itertools.product(["training", "measuring"], repeat=2)))
def test_a_process_does_not_wait_for_itself(outer: str, inner: str) -> None:
    lock = DeviceLock("GPU-7")
    message = f"{inner} on GPU-7 would wait for ever: this process is {outer} on it"
    with getattr(lock, outer)():
        with pytest.raises(RuntimeError, match=re.escape(message)), getattr(lock, inner)():
            pass
        # It was refused, and no harm done.
        with DeviceLock("cpu").measuring():
            pass
    with getattr(lock, inner)(on_wait=lambda line: pytest.fail("nobody holds it")):
        pass


@pytest.mark.parametrize("kind", ["training", "measuring"])
def test_an_exception_lets_go(start: Start, kind: str) -> None:
    with pytest.raises(OSError, match="disk"), getattr(DeviceLock("cpu"), kind)():
        raise OSError("disk full")
    start("measuring").says("holds")


def test_what_fails_while_waiting_is_not_taken_for_a_missing_lock(start: Start) -> None:
    start("measuring").says("holds")

    def tell(line: str) -> None:
        raise BrokenPipeError("nobody reads")

    with pytest.raises(BrokenPipeError, match="nobody reads"), DeviceLock("cpu").training(on_wait=tell):
        pytest.fail("somebody measures")


# -- Files ---------------------------------------------------------------------------------------------------------


def test_the_files_are_readable_by_all_whatever_the_umask(folder: Path) -> None:
    before = os.umask(0o077)
    try:
        with DeviceLock("cpu").training():
            pass
    finally:
        os.umask(before)
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == ["convfirst-cpu.lock", "convfirst-cpu.turnstile"]
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in files)


def test_a_file_that_is_there_is_neither_created_nor_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux refuses O_CREAT on another user's file in a sticky folder, and it may not be writable anyway."""
    with DeviceLock("cpu").training():
        pass
    real = os.open

    def careful(path: Path, flags: int, *mode: int) -> int:
        assert flags == os.O_RDONLY
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", careful)
    with DeviceLock("cpu").measuring():
        pass


def test_two_processes_may_create_the_file_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def overtaken(path: Path, flags: int, *mode: int) -> int:
        if flags & os.O_CREAT:
            os.close(real(path, flags, *mode))
            if not flags & os.O_EXCL:
                raise PermissionError("as Linux does if it was another user")
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", overtaken)
    assert_silent("measuring")


def test_without_the_variable_the_files_are_in_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CONVFIRST_LOCKS")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with DeviceLock("cpu").training():
        pass
    assert (tmp_path / "convfirst-cpu.lock").is_file()


def test_where_the_folder_is_missing_it_warns_once_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVFIRST_LOCKS", str(tmp_path / "missing"))
    with pytest.warns(UserWarning, match="no device lock .*missing.*on cpu may overlap"):
        enter("measuring")
    assert_silent("measuring")


def test_where_flock_is_not_supported_it_warns_once_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    open_files = len(os.listdir("/proc/self/fd"))
    with pytest.warns(UserWarning, match="No locks available.*on cpu may overlap"):
        enter("training")
    assert_silent("training")
    assert len(os.listdir("/proc/self/fd")) == open_files


# -- Devices -------------------------------------------------------------------------------------------------------


def test_a_device_has_one_lock_whatever_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    uuids = {0: "aaaa", 1: "bbbb"}
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuids[device.index or 0])
    )
    assert device_lock(torch.device("cpu")) == DeviceLock("cpu")
    assert device_lock(torch.device("cuda")) == device_lock(torch.device("cuda:0")) == DeviceLock("aaaa")
    assert device_lock(torch.device("cuda:1")) == DeviceLock("bbbb")


@pytest.mark.gpu
def test_the_real_gpu_has_a_lock() -> None:
    lock = device_lock(torch.device("cuda"))
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", lock.name)
    with lock.measuring():
        pass


def test_a_file_system_without_modes_has_locks_all_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.fchmod", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with device_lock(torch.device("cpu")).training():
            assert sorted(path.name for path in folder.iterdir()) == ["convfirst-cpu.lock", "convfirst-cpu.turnstile"]
