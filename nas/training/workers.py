"""Worker processes: calls run side by side, each in a process of its own; a process that dies is replaced.

A worker is bound to a device. A call whose process dies (it is killed, memory runs out, CUDA reports an error) runs
once more, alone, when the others have ended: what killed it may have been their memory. If it dies again, it failed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Generic, TypeVar

from nas.child_process import ChildProcess
from nas.errors import CandidateFailed, WorkerDied

Result = TypeVar("Result")

# glibc gives the memory of large tensors back to the system and takes it anew at each step: 1,800 page faults, and 14 %
# of a training's time. Workers keep it until a training ends (`trim_heap`).
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_TOP_PAD_": str(2**26),
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
        self.child = ChildProcess(MALLOC)
        # The system ends a child with the thread that started it, so this one lasts as long as the worker.
        self.thread = ThreadPoolExecutor(1)
        self.ran: str | None = None

    def submit(self, function: Callable[..., Result], *args: object) -> Future[Result]:
        return self.thread.submit(self.child.call, function, *args)

    def close(self) -> None:
        self.child.close()
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
        """End all processes; the next call starts others."""
        for worker in self.workers:
            worker.close()
        self.workers = [Worker(each.number, each.device) for each in self.workers]

    def resize(self, count: int) -> None:
        """Have another number of workers; those that stay keep their processes."""
        for worker in self.workers[count:]:
            worker.close()
        self.workers = self.workers[:count]
        for number in range(len(self.workers), count):
            self.workers.append(Worker(number, self.devices[number % len(self.devices)]))

    @property
    def count(self) -> int:
        return len(self.workers)

    def warm(self) -> None:
        """Start all processes, without waiting until they are there."""
        for worker in self.workers:
            worker.submit(_import)

    def everywhere(self, function: Callable[..., Result], *args: object) -> list[Result]:
        """Run `function(*args, device)` in each worker at once, and return all results.

        Raises:
            CandidateFailed: a call raised it, or its process died.
        """
        futures = [worker.submit(function, *args, worker.device) for worker in self.workers]
        return [future.result() for future in futures]

    def run(self, calls: Sequence[Call[Result]]) -> Generator[Done[Result]]:
        """Run calls in the order in which they stand, as workers become free, and yield each when it ends.

        The iterator must be used up or closed; when it is closed early, the processes end.

        Raises:
            RuntimeError: a call raised what is no result, and its process has printed it.
            OSError: a disk is full.
        """
        waiting, again = deque(range(len(calls))), list[int]()
        free, running = list(reversed(self.workers)), dict[Future[Result], tuple[int, Worker, float]]()
        try:
            while waiting or running:
                while waiting and free:
                    index, worker = waiting.popleft(), free.pop()
                    running[self._submit(worker, calls[index])] = index, worker, time.perf_counter()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    index, worker, begin = running.pop(future)
                    free.append(worker)
                    seconds = time.perf_counter() - begin
                    try:
                        result: Result | CandidateFailed = future.result()
                    except WorkerDied:
                        again.append(index)
                        continue
                    except CandidateFailed as error:
                        result = error
                    yield Done(index, worker.number, seconds, result)
            for index in sorted(again):
                yield self._once_more(index, calls[index])
        except BaseException:
            # A thread that waits for its process would outlast this one.
            self.close()
            raise

    def _once_more(self, index: int, call: Call[Result]) -> Done[Result]:
        """Run a call for the second and last time, while no other runs."""
        # An idle process holds memory, too.
        for worker in self.workers:
            worker.child.close()
        first, begin = self.workers[0], time.perf_counter()
        try:
            result: Result | CandidateFailed = self._submit(first, call).result()
        except CandidateFailed as error:
            result = error
        return Done(index, first.number, time.perf_counter() - begin, result)

    def _submit(self, worker: Worker, call: Call[Result]) -> Future[Result]:
        if worker.ran not in (None, call.alone):
            worker.thread.submit(worker.child.close)
        worker.ran = call.alone
        return worker.submit(call.function, *call.args, worker.device)


def _import() -> None:
    """Import what takes seconds."""
    import timm  # noqa: F401
    import torch  # noqa: F401


def dying_of_cuda(function: Callable[..., Result]) -> Callable[..., Result]:
    """A function after whose CUDA errors its process is not used again, as a CUDA context does not survive them.

    Raises:
        WorkerDied: CUDA reported an error other than a lack of memory.
    """

    @functools.wraps(function)
    def guarded(*args: object, **named: object) -> Result:
        import torch

        try:
            return function(*args, **named)
        except torch.AcceleratorError as error:
            raise WorkerDied(str(error).splitlines()[0]) from error

    return guarded


def trim_heap() -> None:
    """Give freed memory back to the system.

    Each network has tensors of other sizes, and glibc keeps the holes between them: without this call, training some
    twenty candidates grows the process from 0.8 to 1.4 GB.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):  # the libc is not glibc
            ctypes.CDLL(None).malloc_trim(0)
