from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from nas.child_process import ChildProcess
from nas.errors import CandidateFailed


def test_a_child_that_dies_is_followed_by_another() -> None:
    with ChildProcess() as child:
        first = child.call(os.getpid)
        assert first != os.getpid()
        assert child.call(os.getpid) == first
        with pytest.raises(CandidateFailed, match="killed by SIGABRT"):
            child.call(os.abort)
        with pytest.raises(RuntimeError, match="ended with status 1"):
            child.call(int, "no number")
        assert child.call(os.getpid) not in (first, os.getpid())


def test_what_a_function_prints_comes_between_no_answers() -> None:
    with ChildProcess() as child:
        assert child.call(print, "no answer", flush=True) is None
        assert child.call(os.getpid) != os.getpid()


def test_a_bug_prints_its_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    with ChildProcess() as child, pytest.raises(RuntimeError, match="ended with status 1"):
        child.call(int, "no number")
    assert "ValueError: invalid literal for int()" in capfd.readouterr().err


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where the tests run in the background of a shell, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_the_answer_of_an_interrupted_call_is_never_the_next_ones() -> None:
    """A signal comes while the child is still working: Ctrl-C reaches the parent alone."""
    with ChildProcess() as child:
        child.start()
        timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            child.call(time.sleep, 60)
        timer.join()
        assert child.process is None
        assert child.call(abs, -1) == 1


def test_a_stream_that_another_thread_closes_while_it_is_read_tells_of_a_dead_child() -> None:
    """The reader finds the stream closed before it finds its end."""
    with ChildProcess() as child:
        child.start()
        assert child.stream is not None
        stream = child.stream

        def close_then_read(size: int = -1) -> bytes:
            child.close()
            return stream.read(size)

        child.stream = SimpleNamespace(  # type: ignore[assignment]
            write=stream.write,
            flush=stream.flush,
            read=close_then_read,
            readline=close_then_read,
            close=stream.close,
            closed=True,
        )
        with pytest.raises(CandidateFailed, match="killed by SIGKILL"):
            child.call(abs, -1)
        assert child.call(abs, -1) == 1


def find_no_room() -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "/tmp/cache")


def test_a_child_tells_of_a_full_disk(capfd: pytest.CaptureFixture[str]) -> None:
    with ChildProcess() as child:
        with pytest.raises(OSError, match="No space left on device: '/tmp/cache'"):
            child.call(find_no_room)
        assert child.process is not None
    assert capfd.readouterr().err == ""


@pytest.fixture
def in_time() -> Iterator[None]:
    """A test that would wait for ever fails instead."""

    def fail(*_: object) -> None:
        raise TimeoutError("waited for ever")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("empty_entry", [False, True], ids=["as it is", "the folder is on the path"])
def test_modules_of_the_folder_that_the_user_stands_in_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_entry: bool
) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('the random of the user')")
    for package in ("json", "nas"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise SystemExit('a package of the user')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*[""] * empty_entry, *sys.path])
    with ChildProcess() as child:
        assert child.call(os.getpid) != os.getpid()


@pytest.mark.usefixtures("in_time")
def test_a_child_that_prints_before_it_listens_answers_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('a banner')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with ChildProcess() as child:
        assert child.call(abs, -1) == 1
    shown = capfd.readouterr()
    assert "a banner" in shown.err
    assert shown.out == ""


@pytest.mark.usefixtures("in_time")
def test_a_child_has_nothing_to_read_from_the_terminal() -> None:
    with ChildProcess() as child, pytest.raises(RuntimeError, match="status 1"):
        child.call(input)


def answer_garbage_and_stay() -> None:
    os.write(int(sys.argv[2]), b"no pickle")
    time.sleep(60)


def hang_up_and_stay() -> None:
    os.close(int(sys.argv[2]))
    time.sleep(60)


def leave_a_thread_and_fail() -> None:
    threading.Thread(target=time.sleep, args=(60,)).start()
    raise ValueError("a bug")


def leave_a_process_and_die() -> None:
    subprocess.Popen(["sleep", "30"], close_fds=False)
    os.abort()


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize(
    ("function", "told"),
    [
        (answer_garbage_and_stay, "lives, but gives no answers"),
        (hang_up_and_stay, "lives, but gives no answers"),
        (leave_a_thread_and_fail, "ended with status 1"),
        (leave_a_process_and_die, "killed by SIGABRT"),
    ],
)
def test_a_parent_waits_for_no_child_that_will_not_answer(
    function: Callable[[], None], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "lives" in told:
        monkeypatch.setattr("nas.child_process.DYING_SECONDS", 0.2)
    with ChildProcess() as child:
        with pytest.raises((RuntimeError, CandidateFailed), match=told):
            child.call(function)
        assert child.process is None
        assert child.call(abs, -1) == 1
