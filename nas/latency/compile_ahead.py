"""Kernels of coming candidates, compiled in processes of their own before they are timed.

A new block costs up to a dozen kernels of some 0.6 s of a core each. The processes here leave them in Triton's cache on
disk, while others train and before the device is locked for a measurement; the process that measures only loads them.
They need no GPU.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kernels import tune
from kernels.compiling import Task, compile_for
from kernels.machine import cores, free_memory_bytes
from kernels.tune import Target
from nas.child_process import ChildProcess
from nas.config import LatencyConfig
from nas.latency.engines import fold
from search_spaces import ArchSpec

# What a process takes that compiles, and the most of them: with more, a search would still wait for its longest kernel.
COMPILER_BYTES, MOST_COMPILERS = 1 << 30, 16
# Launches that one process compiles: each leaves some 0.7 MB behind, and starting another costs 5 seconds.
LIFETIME = 400
# Whoever trains or measures comes first.
NICE = 10
# Seconds after which a measurement no longer waits; what is missing is compiled by the process that measures.
PATIENCE_SECONDS = 300.0


def compiler_count(stations: int = 1) -> int:
    """The number of processes that should compile for each of some stations on this machine: one core is left to the
    search."""
    return max(1, min(cores() - 1, free_memory_bytes() // COMPILER_BYTES, MOST_COMPILERS) // stations)


@dataclass(eq=False)
class _Order:
    """The kernels of an architecture.

    Args:
        urgent: whether somebody waits for them.
        left: kernels that are not compiled yet; None while they are not known.
    """

    arch: ArchSpec
    urgent: bool = False
    left: int | None = None

    @property
    def filled(self) -> bool:
        return self.left == 0


class Compilers:
    """Processes that compile what a deployment's networks launch.

    Args:
        config: the deployment.
        target: the GPU that will run the kernels.
        count: number of processes.

    Attributes:
        kernels: number of launches that were compiled, or found in Triton's cache.
        cpu_seconds: time of the processes' cores for that.
        waited_seconds: time for which `ready` waited.
    """

    def __init__(self, config: LatencyConfig, target: Target, count: int) -> None:
        self.config, self.target = config, target
        self.kernels, self.cpu_seconds, self.waited_seconds = 0, 0.0, 0.0
        self.changed = threading.Condition()
        self.closed = False
        self.orders: dict[str, _Order] = {}
        # What is to be done: an order whose kernels are not known yet, or one of its kernels.
        self.urgent: deque[tuple[_Order, tuple[Task, Any] | None]] = deque()
        self.ahead: deque[tuple[_Order, tuple[Task, Any] | None]] = deque()
        # Launches that are compiled or being compiled, and the orders that wait for the latter.
        self.begun: dict[tuple[str, Any, Any], list[_Order] | None] = {}
        # A compiler that hangs costs its kernel, and not all that wait for it.
        self.children = [ChildProcess({"CUDA_VISIBLE_DEVICES": ""}, PATIENCE_SECONDS / 2) for _ in range(count)]
        # A child ends with the thread that has started it.
        self.threads = [threading.Thread(target=self._work, args=(child,), daemon=True) for child in self.children]
        for thread in self.threads:
            thread.start()

    def foresee(self, archs: Sequence[ArchSpec]) -> None:
        """Compile for architectures that may come next, the likeliest first; this returns at once.

        Those that were foreseen before and not begun are given up.
        """
        with self.changed:
            for order, job in self.ahead:
                if job is None:
                    self.orders.pop(order.arch.arch_id, None)
                elif order.left is not None:
                    order.left -= 1
                    self.orders.pop(order.arch.arch_id, None)
            self.ahead.clear()
            for arch in archs:
                if arch.arch_id not in self.orders:
                    self.ahead.append((self._order(arch), None))
            self.changed.notify_all()

    def ready(self, archs: Sequence[ArchSpec]) -> None:
        """Compile for architectures that are to be timed now, and wait until that is done."""
        begin = time.perf_counter()
        with self.changed:
            orders = []
            for arch in archs:
                order = self.orders.get(arch.arch_id)
                if order is None:
                    order = self._order(arch)
                    self.urgent.append((order, None))
                order.urgent = True
                orders.append(order)
            now = [each for each in self.ahead if each[0] in orders]
            self.ahead = deque(each for each in self.ahead if each[0] not in orders)
            self.urgent.extend(now)
            self.changed.notify_all()
            self.changed.wait_for(
                lambda: self.closed or all(order.filled for order in orders), timeout=PATIENCE_SECONDS
            )
        self.waited_seconds += time.perf_counter() - begin

    def close(self) -> None:
        """End all processes."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        for child in self.children:
            child.close()
        for thread in self.threads:
            thread.join()

    def _order(self, arch: ArchSpec) -> _Order:
        order = self.orders[arch.arch_id] = _Order(arch)
        return order

    def _work(self, child: ChildProcess) -> None:
        """Do what is to be done, in one of the processes."""
        compiled = 0
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.closed or self.urgent or self.ahead)
                if self.closed:
                    child.close()
                    return
                order, job = (self.urgent or self.ahead).popleft()
                if job is not None:
                    if _name(job) in self.begun:
                        waiting = self.begun[_name(job)]
                        if waiting is None:
                            self._end(order)
                        else:
                            # It is under way in another process.
                            waiting.append(order)
                        continue
                    self.begun[_name(job)] = []
            if job is None:
                self._plan(order, child)
            else:
                self._compile(order, job, child)
                compiled += 1
                if compiled % LIFETIME == 0:
                    child.close()

    def _plan(self, order: _Order, child: ChildProcess) -> None:
        jobs: list[tuple[Task, Any]] = []
        try:
            jobs = child.call(plan, order.arch, self.config, self.target)
        # Whatever is wrong with a network shows when it is timed.
        except Exception:
            child.close()
        with self.changed:
            order.left = len(jobs)
            (self.urgent if order.urgent else self.ahead).extend((order, job) for job in jobs)
            self.changed.notify_all()

    def _compile(self, order: _Order, job: tuple[Task, Any], child: ChildProcess) -> None:
        seconds = 0.0
        try:
            seconds = child.call(compile_job, job[0], job[1], self.target)
        except Exception:
            child.close()
        with self.changed:
            self.kernels += 1
            self.cpu_seconds += seconds
            for each in (order, *(self.begun[_name(job)] or ())):
                self._end(each)
            self.begun[_name(job)] = None

    def _end(self, order: _Order) -> None:
        if order.left is not None:
            order.left -= 1
        self.changed.notify_all()


def _name(job: tuple[Task, Any]) -> tuple[str, Any, Any]:
    task, tiling = job
    return task.kernel.name, task.problem, tiling


def plan(arch: ArchSpec, config: LatencyConfig, target: Target) -> list[tuple[Task, Any]]:
    """The launches whose kernels a network needs to be timed, with tensors without content.

    Args:
        target: the GPU that will run them.
    """
    from kernels import fuse

    _be_modest()
    folded = fold(arch.build(config.num_classes), replace(config, device="cpu"))
    fused = fuse(folded, dtype=getattr(torch, config.dtype)).to("meta")
    tasks = fused.tasks(config.batch_size, arch.shown(config.resolution))
    return [(task, tiling) for task in tasks for tiling in tune.wanted(task.kernel, task.problem, target)]


def compile_job(task: Task, tiling: Any, target: Target) -> float:
    """Compile a launch's kernels into Triton's cache; what the compiler refuses will be refused again when it is timed.

    Returns:
        Seconds of a core that it took.
    """
    _be_modest()
    begin = time.process_time() + _of_children()
    with contextlib.suppress(Exception):
        compile_for(target.capability, target.gpu, task, tiling)
    return time.process_time() + _of_children() - begin


def _of_children() -> float:
    """Seconds of a core that processes of this one have taken, such as the assembler."""
    times = os.times()
    return times.children_user + times.children_system


# Whether this process is a compiler that has been made modest.
_modest = False


def _be_modest() -> None:
    """Leave the cores to others, as far as they want them."""
    global _modest
    if not _modest:
        _modest = True
        torch.set_num_threads(1)
        os.nice(NICE)
