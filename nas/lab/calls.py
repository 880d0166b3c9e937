"""Calls for workers that train nothing. To import this module takes no torch."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from nas.errors import CandidateFailed, OutOfMemory


def sleep(seconds: float, device: str) -> tuple[float, float]:
    """Sleep, and return the times at which that began and ended, in seconds since the epoch."""
    begin = time.time()
    time.sleep(seconds)
    return begin, time.time()


def die(deaths: int, counter: str, device: str) -> int:
    """Kill this process, until as many have died; then return the process's id.

    Args:
        counter: path of a file that counts the deaths, with a byte for each.
    """
    with Path(counter).open("ab") as file:
        if file.tell() < deaths:
            file.write(b".")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()


def fail(device: str) -> None:
    """Fail, as a candidate does whose loss diverges.

    Raises:
        CandidateFailed: always.
    """
    raise CandidateFailed("the loss diverged")


def run_out_of_memory(times: int, counter: str, device: str) -> int:
    """Run out of memory so many times, and then return how often this was called; see `die`."""
    with Path(counter).open("ab") as file:
        file.write(b".")
        file.flush()
        called = file.tell()
    if called <= times:
        raise OutOfMemory("out of memory")
    return called


def name_device(seconds: float, device: str) -> tuple[str, str | None]:
    """The device, and the variable that says which CUDA devices this process sees."""
    time.sleep(seconds)
    return device, os.environ.get("CUDA_VISIBLE_DEVICES")


def break_down(device: str) -> None:
    """Raise what is no result, but a bug."""
    raise ZeroDivisionError("a bug")
