from __future__ import annotations

import os
import signal
import threading
import time

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
