"""Worker processes: calls run side by side, each in a process of its own; a process that dies is replaced.

A worker is bound to a device. A call whose process dies (it is killed, memory runs out, CUDA reports an error) runs
once more, alone, when the others have ended: what killed it may have been their memory. If it dies again, it failed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from nas.child_process import ChildProcess
from nas.errors import CandidateFailed, WorkerDied

Result = TypeVar("Result")

# glibc gives the memory of large tensors back to the system and takes it anew at each step: 1,800 page faults, and 14 %
# of a training's time. Workers keep it until a training ends (`trim_heap`). Before 2.35, glibc takes no such threshold.
_THRESHOLD = 2**30 if platform.libc_ver()[1].split(".") >= ["2", "35"] else 2**25
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(_THRESHOLD), "MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_TOP_PAD_": str(2**25),
    # cuBLAS reads it at its first product; only `--deterministic` makes use of it.
    "CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8"),
}  # fmt: skip


@dataclass(frozen=True)
class Done(Generic[Result]):
    """A call that has ended.

    Args:
        index: its place among the calls.
        worker: number of the worker that ran it, from 0.
        seconds: time that it took, a first attempt left out.
        result: what it returned, or why it failed.
    """

    index: int
    worker: int
    seconds: float
    result: Result | CandidateFailed


class Worker:
    """A child process on a device, and the thread that speaks with it.

    Attributes:
        ran: name of what its process has run, if no other may run there after it.
    """

    def __init__(self, number: int, device: str) -> None:
        self.number, self.device = number, device
        self.child = ChildProcess(ENVIRONMENT)
        # The system ends a child with the thread that started it, so this one lasts as long as the worker.
        self.thread = ThreadPoolExecutor(1)
        self.ran: str | None = None
        self.closed = False

    def submit(self, function: Callable[..., Result], *args: object) -> Future[tuple[Result | CandidateFailed, float]]:
        """Call a function in the process: its result, or why it failed, and the seconds that it took."""
        return self.thread.submit(self._call, function, *args)

    def _call(self, function: Callable[..., Result], *args: object) -> tuple[Result | CandidateFailed, float]:
        begin = time.perf_counter()
        try:
            if self.closed:
                raise CandidateFailed("its worker was closed")
            result: Result | CandidateFailed = self.child.call(function, *args)
        except CandidateFailed as error:
            result = error
        return result, time.perf_counter() - begin

    def kill(self) -> None:
        """End the process for good; calls that wait for it fail."""
        self.closed = True
        self.child.close()

    def join(self) -> None:
        self.thread.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Call(Generic[Result]):
    """A call to run in a worker: `function(*args, device)`.

    Args:
        alone: name of what must not share its process with anything else, such as a network that may break it.
    """

    function: Callable[..., Result]
    args: tuple[object, ...]
    alone: str | None = None


class Pool(Protocol):
    """Workers that run calls side by side: those of this machine, or of a cluster."""

    @property
    def count(self) -> int:
        """Number of workers."""
        ...

    def resize(self, count: int) -> None:
        """Have another number of workers."""
        ...

    def run(self, calls: Sequence[Call[Result]]) -> Generator[Done[Result]]:
        """Run calls, those that stand first begun first, and yield each when it ends; see `Workers.run`."""
        ...

    def close(self) -> None:
        """End all calls, also those that another thread waits for."""
        ...


class Workers:
    """Worker processes on some devices; a context manager, whose end is theirs.

    Args:
        count: number of workers.
        devices: names of devices, which take turns at getting a worker.
    """

    def __init__(self, count: int, devices: Sequence[str]) -> None:
        self.devices = tuple(devices)
        self.workers: list[Worker] = []
        self.resize(count)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes, also those that another thread waits for; the next call starts others."""
        closed, self.workers = self.workers, [Worker(each.number, each.device) for each in self.workers]
        # All are killed before one is waited for: a second interrupt may come.
        for worker in closed:
            worker.kill()
        for worker in closed:
            worker.join()

    def resize(self, count: int) -> None:
        """Have another number of workers; those that stay keep their processes."""
        for worker in self.workers[count:]:
            worker.kill()
            worker.join()
        self.workers = self.workers[:count]
        for number in range(len(self.workers), count):
            self.workers.append(Worker(number, self.devices[number % len(self.devices)]))

    @property
    def count(self) -> int:
        return len(self.workers)

    def everywhere(self, function: Callable[..., Result], *args: object) -> list[Result]:
        """Run `function(*args, device)` in each worker at once, and return all results.

        Raises:
            CandidateFailed: a call raised it, or its process died.
        """
        futures = [worker.submit(function, *args, worker.device) for worker in self.workers]
        found = []
        for result, _ in [future.result() for future in futures]:
            if isinstance(result, CandidateFailed):
                raise result
            found.append(result)
        return found

    def run(self, calls: Sequence[Call[Result]]) -> Generator[Done[Result]]:
        """Run calls in the order in which they stand, as workers become free, and yield each when it ends.

        The iterator must be used up or closed; when it is closed early, the processes end.

        Raises:
            RuntimeError: a call raised what is no result, and its process has printed it.
            OSError: a disk is full.
        """
        waiting, again = deque(range(len(calls))), dict[int, Worker]()
        # A close from another thread puts others in their place, which are not used here.
        workers = self.workers
        free = list(reversed(workers))
        running: dict[Future[tuple[Result | CandidateFailed, float]], tuple[int, Worker]] = {}

        def feed() -> None:
            while waiting and free:
                index, worker = waiting.popleft(), free.pop()
                running[self._submit(worker, calls[index])] = index, worker

        try:
            feed()
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    index, worker = running.pop(future)
                    result, seconds = future.result()
                    if worker.closed:
                        return
                    free.append(worker)
                    # It does not wait until the result is recorded.
                    feed()
                    if isinstance(result, WorkerDied):
                        again[index] = worker
                    else:
                        yield Done(index, worker.number, seconds, result)
            for index, died in sorted(again.items(), key=lambda each: each[0]):
                # An idle process holds memory, too; and a device may be broken.
                for worker in workers:
                    worker.child.close()
                other = workers[(workers.index(died) + 1) % len(workers)]
                result, seconds = self._submit(other, calls[index]).result()
                if other.closed:
                    return
                yield Done(index, other.number, seconds, result)
        except BaseException:
            # A thread that waits for its process would outlast this one.
            self.close()
            raise

    def _submit(self, worker: Worker, call: Call[Result]) -> Future[tuple[Result | CandidateFailed, float]]:
        if worker.ran not in (None, call.alone):
            worker.thread.submit(worker.child.close)
        worker.ran = call.alone
        return worker.submit(call.function, *call.args, worker.device)


def trim_heap() -> None:
    """Give freed memory back to the system.

    Each network has tensors of other sizes, and glibc keeps the holes between them: without this call, training some
    twenty candidates grows the process from 0.8 to 1.4 GB.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):  # the libc is not glibc
            ctypes.CDLL(None).malloc_trim(0)
