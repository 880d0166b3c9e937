"""A call for workers that does nothing, and imports nothing."""

import time


def sleep(seconds: float, device: str) -> tuple[float, float]:
    """Sleep, and return the times at which that began and ended, in seconds since the epoch."""
    begin = time.time()
    time.sleep(seconds)
    return begin, time.time()
