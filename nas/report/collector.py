"""Python's collector of unreachable objects, which rests while a long study is read."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def resting_collector() -> Iterator[None]:
    """Context in which no cycles of objects are collected.

    Each time that the collector runs, it goes through all objects. A study of 10,000 is millions of them, which stay:
    without this context half the time of reading it is the collector's.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
