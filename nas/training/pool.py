"""Parallel trainings in processes of their own, which map their data from one file."""

from __future__ import annotations

import contextlib
import gc
import os
import tempfile
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from kernels.machine import cores, free_memory_bytes
from nas.config import DataConfig, ProxyConfig
from nas.errors import CandidateFailed, UsageError, contained
from nas.files import save_tensors
from nas.locks import device_lock, training_on
from nas.reporting import Note
from nas.training import curves, proxy
from nas.training import data as image_data
from nas.training.data import ImageData
from nas.training.proxy import ProxyResult
from nas.training.stopping import Rule
from nas.training.weights import Images
from nas.training.workers import Call, Done, Workers, trim_heap
from studies import BaselineTraining, CandidateTraining

# A worker with torch and timm needs some 400 MB of its own, and a training as much again.
WORKER_BYTES = 2**30
# Workers of one GPU that a user may ask for.
MOST_WORKERS = 64


def every_cuda(device: torch.device) -> list[torch.device]:
    """All CUDA devices where the given one is of them, else the given one."""
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    return [torch.device("cuda", index) for index in range(count)] or [device]


def require_sense(workers: int | None, gpus: int | None, threads: int = 1) -> None:
    """Check a number of workers that the user asked for.

    Args:
        gpus: number of CUDA devices that train; None on a CPU.
        threads: CPU threads of each training.

    Raises:
        UsageError: more than make sense.
    """
    most = max(1, cores() // threads) if gpus is None else MOST_WORKERS * gpus
    if workers is not None and workers > most:
        each = f" of {threads} threads" if threads > 1 else ""
        what = f"{cores()} cores" if gpus is None else f"{gpus} GPU{'s' if gpus > 1 else ''}"
        raise UsageError(f"--workers {workers}: more than {most}{each} gain nothing on {what}")


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
    """One training, which is stored or repeated as a whole.

    Args:
        seed: seed of weights, order and augmentation; None stands for the trainer's.
        test: whether the network is scored on the test images, if there are any.
    """

    network: Trainable
    steps: int
    learning_rate: float
    seed: int | None = None
    test: bool = False


class DataSource(Protocol):
    """A data set as a worker is told of it: a small value, which compares equal to itself in another process."""

    def __hash__(self) -> int: ...

    def load(self) -> ImageData:
        """The data set, in memory that all processes of a machine share."""
        ...


@dataclass(frozen=True)
class DataFile:
    """A data set in a file of `DataFiles`."""

    path: str

    def load(self) -> ImageData:
        return ImageData(**torch.load(self.path, mmap=True, weights_only=True))


class DataFiles:
    """Data sets in files, which all processes map; a context manager, whose end is theirs.

    On Linux the files have no names, so that nothing is left of them when this process is killed: other processes open
    them through this one.
    """

    def __init__(self) -> None:
        self.files: dict[int, DataFile] = {}
        self.held = contextlib.ExitStack()

    def __enter__(self) -> DataFiles:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.held.close()
        self.files.clear()

    def write(self, data: ImageData) -> DataFile:
        """Write a data set.

        Raises:
            OSError: there is no room for it.
        """
        resolution = data.train_images.shape[-1]
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="convfirst-data-"))
            path = Path(folder) / f"{resolution}.pt"
            save_tensors({field.name: getattr(data, field.name) for field in fields(data)}, path)
            if Path("/proc/self/fd").exists():
                number = os.open(path, os.O_RDONLY)
                self.held.callback(os.close, number)
                self.files[resolution] = DataFile(f"/proc/{os.getpid()}/fd/{number}")
            else:
                self.held.enter_context(stack.pop_all())
                self.files[resolution] = DataFile(str(path))
        return self.files[resolution]


class Captures:
    """Tells the user of the first training whose steps were no CUDA graph where they could have been one."""

    def __init__(self, note: Note) -> None:
        self.note, self.told = note, False

    def watch(self, results: Iterable[Done[ProxyResult]]) -> Iterator[Done[ProxyResult]]:
        """Yield the results of trainings as they are."""
        for done in results:
            if isinstance(done.result, ProxyResult) and done.result.uncaptured and not self.told:
                self.told = True
                self.note(
                    "trainings are slower than they could be: their steps could not be captured as a CUDA graph "
                    f"({done.result.uncaptured})"
                )
            yield done


class Trainer:
    """Trains networks on one data set, in worker processes.

    Args:
        data: the data set, whose resolution is replaced by that of each network.
        config: configuration of the trainings, whose steps and learning rate are replaced by those of each job.
        device: device of the trainings; if it is a CUDA device, all of them train.
        seed: seed of weights, order and augmentation, the same for all networks.
        workers: number of trainings at once; None stands for one for each core for which there is memory, and for each
            CUDA device.
        note: function that takes a line for each step of the work.
        check: function that is called with the data at each resolution when they are loaded, and may raise.
        largest: resolution at which the same images are to fit into memory, see `nas.training.data.load`.
        devices: the devices that train, of one kind (default: those that `device` stands for).
        threads: CPU threads of each training on a CPU.

    Raises:
        UsageError: there are more workers than make sense.

    Attributes:
        classes: number of classes of the data; 0 until they are loaded.
    """

    def __init__(
        self, data: DataConfig, config: ProxyConfig, device: torch.device, seed: int, workers: int | None, note: Note,
        check: Callable[[ImageData], None] = lambda data: None, largest: int = 0,
        devices: Sequence[torch.device] | None = None, threads: int = 1,
    ) -> None:  # fmt: skip
        self.data, self.device, self.seed, self.note, self.check = data, device, seed, note, check
        self.largest = largest
        self.devices = [str(each) for each in devices or every_cuda(device)]
        self.lock, self.waiting, self.captures = device_lock(device), note, Captures(note)
        # The same number for all trainings, because it changes the rounding.
        self.config = replace(config, threads=threads) if device.type == "cpu" else config
        require_sense(workers, len(self.devices) if device.type == "cuda" else None, threads)
        fitting = max(1, min(cores() // threads, free_memory_bytes() // WORKER_BYTES))
        self.count = workers or (fitting if device.type == "cpu" else len(self.devices))
        self.classes = 0

    def __enter__(self) -> Trainer:
        self.files, self.workers = DataFiles(), Workers(self.count, self.devices)
        return self

    def __exit__(self, *exc: object) -> None:
        self.workers.close()
        self.files.close()

    def training(self) -> AbstractContextManager[None]:
        """Context in which no process measures on the devices that train."""
        return training_on(map(torch.device, self.devices), self.waiting)

    def data_file(self, resolution: int) -> DataFile:
        """The file with the data at a resolution, which is written if need be."""
        if resolution not in self.files.files:
            data = image_data.load(replace(self.data, resolution=resolution), self.note, self.largest)
            self.check(data)
            self.note(f"data at {resolution}x{resolution}")
            for line in data.notes:
                self.note(line)
            self.classes = len(data.classes)
            self.files.write(data)
        return self.files.files[resolution]

    def train(
        self, jobs: Sequence[TrainingJob], done: Callable[[TrainingJob, ProxyResult | CandidateFailed], str]
    ) -> None:
        """Train all networks, the slowest first, so that no worker is left with a long one at the end.

        Args:
            done: function that takes each result when its training ends, and returns a line for the user.
        """
        jobs = sorted(jobs, key=lambda job: (-job.network.macs * job.steps, job.network.name))
        # Between rounds, others may measure.
        for begin in range(0, len(jobs), 2 * self.count):
            group = jobs[begin : begin + 2 * self.count]
            with closing(self.results(group)) as results:
                for number, each in enumerate(results, start=begin + 1):
                    self.note(f"{number}/{len(jobs)}  {done(group[each.index], each.result)}")

    def results(self, jobs: Sequence[TrainingJob]) -> Generator[Done[ProxyResult]]:
        """Train networks side by side, those first that stand first, and yield each when it ends."""
        calls = [self._call(job) for job in jobs]
        with self.training(), closing(self.workers.run(calls)) as results:
            yield from self.captures.watch(results)

    def _call(self, job: TrainingJob) -> Call[ProxyResult]:
        config = replace(self.config, steps=job.steps, learning_rate=job.learning_rate)
        data = self.data_file(job.network.resolution)
        # A network that is not ours may break its process.
        seed = self.seed if job.seed is None else job.seed
        return Call(
            train_one, (job.network, data, config, seed, job.test), None if job.network.ours else job.network.name
        )


def storable(path: str) -> str:
    """A path as a database can hold it: bytes that are no text are written as escapes."""
    return path.encode(errors="backslashreplace").decode()


def fill(row: BaselineTraining | CandidateTraining, result: ProxyResult | CandidateFailed) -> str:
    """Write the result of a training into its row; return it in words."""
    if isinstance(result, CandidateFailed):
        row.reason = str(result)
        return f"failed ({row.reason})"
    if not result.stopped:
        row.accuracy, row.loss = result.accuracy, result.loss
    row.train_seconds = result.seconds
    row.curve = curves.to_json(result.curve)
    if isinstance(row, CandidateTraining):
        row.host, row.test_accuracy = result.host, result.test_accuracy
    return f"{result.accuracy:.1%} in {result.seconds:.0f} s"


def train_one(
    network: Trainable, data: DataSource, config: ProxyConfig, seed: int, test: bool, device: str
) -> ProxyResult:  # fmt: skip
    """Train a network from new weights, in this process.

    Raises:
        CandidateFailed: the loss diverges, memory runs out, or a network that is not ours does not train.
    """
    try:
        with network.failing(), contained():
            trained, result = train_new(network.build, data, config, seed, device)
            return tested(trained, result, data, device) if test else result
    finally:
        trim_heap()


def train_new(
    build: Callable[[int], nn.Module], data: DataSource, config: ProxyConfig, seed: int, device: str,
    checkpoints: Collection[int] = (), rule: Rule | None = None,
) -> tuple[nn.Module, ProxyResult]:  # fmt: skip
    """Build a network and train it, in this process; every network sees the same images in the same order.

    Args:
        build: function from a number of classes to a network with new random weights.
        checkpoints, rule: when it is validated too, and when it ends early; see `proxy.train`.
    """
    torch.set_num_threads(config.threads)
    batches, images = mapped(data, device)
    torch.manual_seed(seed)
    network = build(len(images.classes))
    return network, proxy.train(network, batches, config, seed, checkpoints, rule)


def tested(network: nn.Module, result: ProxyResult, data: DataSource, device: str) -> ProxyResult:
    """The result of a training with the accuracy on the test images, if there are any."""
    batches, _ = mapped(data, device)
    if batches.test_images is None or not len(batches.test_images):
        return result
    # Whatever happens there, nothing is chosen by these images.
    with contextlib.suppress(CandidateFailed):
        return replace(result, test_accuracy=proxy.score(network, batches.test(), batches.device)[0])
    return result


@cache
def mapped(source: DataSource, device: str) -> tuple[proxy.Batches, Images]:
    """The data of a source, ready to train on a device; this process keeps them."""
    data = source.load()
    found = proxy.Batches(data, torch.device(device)), Images.of(data)
    # Each training has garbage collected before it measures its memory. To look through all that was imported takes
    # 0.12 s each time, so it is taken out.
    gc.collect()
    gc.freeze()
    return found
