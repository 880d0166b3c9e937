"""Parallel trainings in processes of their own, which map their data from one file."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from nas.child_process import ChildProcess
from nas.config import DataConfig, ProxyConfig
from nas.errors import CandidateFailed
from nas.files import save_tensors
from nas.locks import WAITING, device_lock
from nas.reporting import Note
from nas.training import data as image_data
from nas.training import proxy
from nas.training.data import ImageData
from nas.training.proxy import ProxyResult
from studies import BaselineTraining, Retraining


class Trainable(Protocol):
    """A network to train; it is sent to another process.

    Attributes:
        resolution: width and height of the training images, in pixels.
        ours: whether it is a ConvFirst network; others may raise errors that are no bugs, and may break their process.
    """

    @property
    def name(self) -> str: ...

    @property
    def resolution(self) -> int: ...

    @property
    def macs(self) -> int: ...

    @property
    def ours(self) -> bool: ...

    def build(self, classes: int) -> nn.Module:
        """The network with new random weights."""
        ...

    def failing(self) -> AbstractContextManager[None]:
        """Context that turns errors for which the network is to blame into a CandidateFailed."""
        ...


@dataclass(frozen=True)
class TrainingJob:
    """One training, which is stored or repeated as a whole."""

    network: Trainable
    steps: int
    learning_rate: float


class Trainer:
    """Trains networks on one data set, which it keeps in files of a temporary folder.

    Args:
        data: the data set, whose resolution is replaced by that of each network.
        config: configuration of the trainings, whose steps and learning rate are replaced by those of each job.
        seed: seed of weights, order and augmentation, the same for all networks.
        note: function that takes a line for each step of the work.
        check: function that is called with the data at each resolution when they are loaded, and may raise.

    Attributes:
        classes: number of classes of the data; 0 until they are loaded.
    """

    def __init__(
        self, data: DataConfig, config: ProxyConfig, device: torch.device, seed: int, note: Note,
        check: Callable[[ImageData], None] = lambda data: None,
    ) -> None:  # fmt: skip
        self.data, self.config, self.device, self.seed, self.note, self.check = data, config, device, seed, note, check
        self.lock, self.waiting = device_lock(device), partial(note, WAITING)
        # On a CPU several processes share the threads: they train more in the same time than one process with all.
        self.processes = min(config.threads, os.cpu_count() or 1) if device.type == "cpu" else 1
        self.classes = 0

    def __enter__(self) -> Trainer:
        with contextlib.ExitStack() as stack:
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="convfirst-data-")))
            self.trained_last: dict[ChildProcess, str | None] = {}
            self.workers = [stack.enter_context(ChildProcess()) for _ in range(self.processes)]
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stack.close()

    def data_path(self, resolution: int) -> str:
        """Path of the file with the data at a resolution, which is written if need be."""
        path = self.folder / f"{resolution}.pt"
        if not path.exists():
            data = image_data.load(replace(self.data, resolution=resolution), self.note)
            self.check(data)
            self.note(f"data at {resolution}x{resolution}")
            for line in data.notes:
                self.note(line)
            self.classes = len(data.classes)
            save_tensors({field.name: getattr(data, field.name) for field in fields(data)}, path)
        return str(path)

    def train(
        self, jobs: Sequence[TrainingJob], done: Callable[[TrainingJob, ProxyResult | CandidateFailed], str]
    ) -> None:
        """Train all networks, the quickest first, so that parallel trainings take about the same time.

        Args:
            done: function that takes each result when its training ends, and returns a line for the user.
        """
        jobs = sorted(jobs, key=lambda job: (job.network.macs, job.network.name))
        for begin in range(0, len(jobs), self.processes):
            group = jobs[begin : begin + self.processes]
            paths = [self.data_path(job.network.resolution) for job in group]
            for worker, job in zip(self.workers, group, strict=False):
                self._make_ready(worker, job.network)
            with self.lock.training(self.waiting), ThreadPoolExecutor(len(group)) as pool:
                futures = {
                    pool.submit(self._one, worker, job, path): job
                    for worker, job, path in zip(self.workers, group, paths, strict=False)
                }
                try:
                    for number, future in enumerate(as_completed(futures), start=begin + 1):
                        self.note(f"{number}/{len(jobs)}  {done(futures[future], future.result())}")
                except BaseException:
                    # The pool would wait for the trainings that have begun.
                    for worker in self.workers:
                        worker.close()
                    raise

    def _make_ready(self, worker: ChildProcess, network: Trainable) -> None:
        """Start a worker's process; start it anew after a network that is not ours, which may have broken it."""
        if self.trained_last.get(worker) not in (None, network.name):
            worker.close()
        self.trained_last[worker] = None if network.ours else network.name
        # Started in this thread: a process ends with the thread that started it, and the pool's threads end soon.
        worker.start()

    def _one(self, worker: ChildProcess, job: TrainingJob, path: str) -> ProxyResult | CandidateFailed:
        # The same number for all trainings, because it changes the rounding.
        threads = self.config.threads // self.processes
        config = replace(self.config, steps=job.steps, learning_rate=job.learning_rate, threads=threads)
        try:
            return worker.call(train_one, job.network, path, config, str(self.device), self.seed)
        except CandidateFailed as error:
            return error


def fill(row: BaselineTraining | Retraining, result: ProxyResult | CandidateFailed) -> str:
    """Write the result of a training into its row; return it in words."""
    if isinstance(result, CandidateFailed):
        row.reason = str(result)
        return f"failed ({row.reason})"
    row.accuracy, row.loss, row.train_seconds = result.accuracy, result.loss, result.seconds
    row.curve = json.dumps([astuple(point) for point in result.curve])
    return f"{result.accuracy:.1%} in {result.seconds:.0f} s"


def train_one(network: Trainable, data_path: str, config: ProxyConfig, device: str, seed: int) -> ProxyResult:
    """Train a network from new weights, in this process.

    Raises:
        CandidateFailed: the loss diverges, memory runs out, or a network that is not ours does not train.
    """
    if config.deterministic:
        proxy.prepare_determinism()
    torch.set_num_threads(config.threads)
    batches, classes = _batches(data_path, device)
    # Every network sees the same images in the same order.
    torch.manual_seed(seed)
    with network.failing():
        return proxy.train(network.build(classes), batches, config, seed)


@cache
def _batches(path: str, device: str) -> tuple[proxy.Batches, int]:
    """The data in a file, which all processes map, and the number of their classes."""
    data = ImageData(**torch.load(path, mmap=True, weights_only=True))
    return proxy.Batches(data, torch.device(device)), len(data.classes)
