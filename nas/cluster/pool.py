"""Workers of a cluster: calls run side by side as Ray tasks."""

from __future__ import annotations

import math
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from nas.cluster import tasks
from nas.errors import CandidateFailed, OutOfMemory, WorkerDied, message_line
from nas.training.workers import Call, Done

Result = TypeVar("Result")

# Time between two looks at whether there is still a node for a call that waits.
CHECK_SECONDS = 10.0
# Longest time for which a result waits until all workers that are free have something to do.
FEED_SECONDS = 2.0


def lost(ray: Any, error: BaseException) -> CandidateFailed:
    """What the loss of a task means: that its candidate failed.

    Raises:
        RuntimeError: the task raised what is no result, which is a bug.
    """
    if isinstance(error, ray.exceptions.RayTaskError):
        raise RuntimeError(f"on a node of the cluster:\n{error}") from error
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return WorkerDied("its worker ran out of memory, twice")
    if isinstance(error, ray.exceptions.WorkerCrashedError):
        return WorkerDied("its worker died, twice")
    return WorkerDied(f"its worker was lost, twice ({message_line(error)})")


class Places:
    """The nodes of a cluster on which calls may run: all of them."""

    def avoided(self) -> list[str]:
        """The ids of the nodes on which nothing may run; waits until there is another.

        Raises:
            UsageError: there has been none for minutes.
        """
        return []

    def are_gone(self, avoided: Sequence[str]) -> bool:
        """Whether all nodes are gone but those that were avoided when a call was submitted, and another has come."""
        return False


class ClusterPool:
    """Workers of a cluster; it has the interface of `nas.training.workers.Workers`.

    A call whose worker or node is lost is repeated by Ray once, on whatever node there is; one whose memory ran out is
    repeated once when the other calls have ended. If that fails, too, it failed. Several threads may run calls at the
    same time: those of the first thread are begun first.

    Args:
        ray: the module, connected to the cluster.
        count: number of workers.
        kind: kind of device on which they work: `cpu` or `cuda`.
        threads: CPU threads of each, which Ray sets aside on a CPU.
        gpus: number of CUDA devices that all workers share; 0 on a CPU.
        places: where calls may run.
        locked: whether a call takes the device's lock on its node, so that nobody measures there.
    """

    def __init__(
        self, ray: Any, count: int, kind: str, threads: int, gpus: int = 0,
        places: Places | None = None, locked: bool = True,
    ) -> None:  # fmt: skip
        self.ray, self.kind, self.threads, self.gpus = ray, kind, threads, gpus
        self.places, self.locked = places or Places(), locked
        self.task = ray.remote(tasks.train)
        self.running: set[Any] = set()
        # Calls that no thread has begun yet.
        self.queued = 0
        self.changed = threading.Condition()
        self.closed = False
        self._start(count)

    @property
    def count(self) -> int:
        return self._count

    def resize(self, count: int) -> None:
        """Have another number of workers, while none works."""
        self.threads_here.shutdown()
        self._start(count)

    def _start(self, count: int) -> None:
        self._count = count
        self.numbers = list(reversed(range(count)))
        # A thread for each, which waits for its worker.
        self.threads_here = ThreadPoolExecutor(count)

    def run(self, calls: Sequence[Call[Result]]) -> Generator[Done[Result]]:
        """Run calls, those that stand first begun first, and yield each when it ends.

        Raises:
            RuntimeError: a call raised what is no result.
            UsageError: there is no node for them any more.
        """
        futures: dict[Future[tuple[Result | CandidateFailed, float, int]], int] = {}
        again: list[int] = []

        def submit(index: int) -> None:
            with self.changed:
                self.queued += 1
            futures[self.threads_here.submit(self._run, calls[index])] = index

        for index in range(len(calls)):
            submit(index)
        try:
            retried = False
            while futures:
                for future in wait(futures, return_when=FIRST_COMPLETED).done:
                    result, seconds, worker = future.result()
                    index = futures.pop(future)
                    if isinstance(result, OutOfMemory) and not retried:
                        again.append(index)
                        continue
                    # Whoever records it takes time that those need who feed the workers.
                    with self.changed:
                        self.changed.wait_for(self._fed, FEED_SECONDS)
                    yield Done(index, worker, seconds, result)
                if not futures and not retried:
                    # It may have been the others' memory.
                    retried = True
                    for index in again:
                        submit(index)
        finally:
            with self.changed:
                self.queued -= sum(future.cancel() for future in futures)

    def _fed(self) -> bool:
        return self.closed or not self.queued or len(self.running) >= self.count

    def _run(self, call: Call[Result]) -> tuple[Result | CandidateFailed, float, int]:
        with self.changed:
            self.queued -= 1
        while True:
            avoided = self.places.avoided()
            task = self.task.options(**self._options(avoided))
            with self.changed:
                if self.closed:
                    return CandidateFailed("its worker was closed"), 0.0, 0
                worker = self.numbers.pop()
                reference = task.remote(call.function, call.args, self.kind, self.locked)
                self.running.add(reference)
                self.changed.notify_all()
            try:
                while not self.ray.wait([reference], timeout=CHECK_SECONDS)[0]:
                    if self.places.are_gone(avoided):
                        # It would wait for ever: Ray keeps to what was avoided when it was submitted.
                        self.ray.cancel(reference, force=True)
                        break
                else:
                    result, seconds = self.ray.get(reference)
                    return result, seconds, worker
            except self.ray.exceptions.RayError as error:
                return lost(self.ray, error), 0.0, worker
            finally:
                with self.changed:
                    self.running.discard(reference)
                    self.numbers.append(worker)

    def _options(self, avoided: Sequence[str]) -> dict[str, Any]:
        options: dict[str, Any] = {"max_retries": 1, "num_cpus": self.threads}
        if self.kind == "cuda":
            # Those that share a device have equal shares of it.
            options |= {"num_cpus": 0, "num_gpus": 1 / math.ceil(self.count / self.gpus)}
        if avoided:
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(avoided)})"}
        return options

    def close(self) -> None:
        """Give up all calls, also those that another thread waits for."""
        with self.changed:
            self.closed = True
            running = list(self.running)
            self.changed.notify_all()
        # Calls that wait for a thread end by themselves now: one that is cancelled would never wake who waits for it.
        for reference in running:
            self.ray.cancel(reference, force=True)
        self.threads_here.shutdown()
