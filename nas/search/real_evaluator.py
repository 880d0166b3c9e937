"""The evaluators that train and time for real, on this machine or on a cluster: what they have in common."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Protocol

from kernels.device_info import DeviceInfo
from nas.config import ProxyConfig, SearchConfig
from nas.errors import CandidateFailed, UsageError, contained
from nas.latency.device_profile import DeviceProfile
from nas.latency.devices import anchor_must_run
from nas.latency.values import Measurement, ShapeLatency
from nas.reporting import Note
from nas.search.pilot import PilotTraining
from nas.training.data import ImageData
from nas.training.determinism import measure_apart
from nas.training.pool import Captures, DataSource, mapped, tested, train_new
from nas.training.proxy import ProxyResult
from nas.training.stopping import Rule, Rules
from nas.training.weights import Images, Trained
from nas.training.worker_count import WorkerCount
from nas.training.workers import Call, Done, Pool, trim_heap
from search_spaces import ArchSpec, Cost, cost


class Timing(Protocol):
    """Where latencies are measured: a `Station` of this machine, or those of a cluster."""

    def anchor_latency(self, references_ms: Sequence[float]) -> ShapeLatency: ...

    def foresee(self, archs: Sequence[ArchSpec]) -> None: ...

    def start(self, anchor_ms: float) -> None: ...

    def measure_together(self, archs: Sequence[ArchSpec]) -> list[Measurement]: ...

    def measure_blocks(
        self, archs: Sequence[ArchSpec], known: Mapping[str, float], references_ms: Sequence[float]
    ) -> list[ShapeLatency]: ...

    def profile(self) -> DeviceProfile: ...

    def timing_seconds(self) -> float: ...

    def close(self) -> None: ...


class RealEvaluator:
    """Base of the evaluators that train and time candidates for real; see `Evaluator`.

    Args:
        config: the search's configuration.
        note: function that receives a line for the user.

    Attributes:
        pool: the workers that train.
        station: where latencies are measured.
        data: the images at each resolution, as workers are told of them.
        train_images, val_images: number of training and of validation images.
        images: the images at the anchor's resolution.
    """

    pool: Pool
    station: Timing
    device: DeviceInfo
    data: dict[int, DataSource]
    data_fingerprint: str
    train_images: int
    val_images: int
    images: Images | None
    notes: tuple[str, ...]
    apart: bool
    timers: int
    compiles = False

    def __init__(self, config: SearchConfig, note: Note) -> None:
        self.config, self.note, self.captures = config, note, Captures(note)
        self.closed = self.started = False
        # Whether it is still open how many workers pay, which takes some trainings to find out.
        self.undecided = config.workers is None
        self.told_workers = ""
        # Rounds follow each other without a pause, also while the one before is trained.
        self.turn = threading.Lock()

    def take(self, found: Iterable[tuple[int, ImageData]], share: Callable[[ImageData], DataSource]) -> None:
        """Take the images at each resolution, and share them with the workers."""
        self.data = {}
        for resolution, data in found:
            self.data[resolution] = share(data)
            # At all resolutions the images are the same; the anchor's stand for them.
            if resolution == self.config.space.anchor().shown(self.config.data.resolution):
                self.data_fingerprint = data.fingerprint
                self.train_images, self.val_images = len(data.train_labels), len(data.val_labels)
                self.images = Images.of(data)
                self.notes = (*data.notes, data.summary)
        if len(self.data) > 1:
            sizes = ", ".join(map(str, self.data))
            self.notes += (f"each network is shown them at its own resolution, one of {sizes} pixels",)

    def data_for(self, arch: ArchSpec) -> DataSource:
        """The images at the resolution at which a network sees them."""
        return self.data[arch.shown(self.config.data.resolution)]

    @property
    def workers(self) -> int:
        # It is found out when somebody asks: until then the schedule, on which it depends, may change.
        if self.started and self.undecided:
            self.undecided = False
            self._choose_workers()
        return self.pool.count

    @property
    def round_size(self) -> int:
        raise NotImplementedError

    def training(self) -> contextlib.AbstractContextManager[None]:
        """Context in which a round is trained."""
        return contextlib.nullcontext()

    def chosen_workers(self) -> WorkerCount:
        """The number of workers that pays, where the user leaves it open."""
        raise NotImplementedError

    def resize(self, count: int) -> None:
        """Have so many workers."""
        self.pool.resize(count)

    def determinism(self) -> str | None:
        raise NotImplementedError

    def anchor(self, references_ms: Sequence[float]) -> ShapeLatency:
        with anchor_must_run(self.config.latency):
            return self.station.anchor_latency(references_ms)

    def start(self, anchor_ms: float) -> None:
        with anchor_must_run(self.config.latency):
            self.station.start(anchor_ms)
        self.started = True

    def _choose_workers(self) -> None:
        chosen = self.chosen_workers()
        if str(chosen) != self.told_workers:
            self.told_workers = str(chosen)
            self.note(self.told_workers)
        self.resize(chosen.count)

    def cost(self, arch: ArchSpec) -> Cost:
        return cost(arch, self.config.latency.resolution, self.config.latency.num_classes)

    def foresee(self, archs: Sequence[ArchSpec]) -> None:
        self.station.foresee(archs)

    def measure(self, arch: ArchSpec) -> Measurement:
        return self.station.measure_together([arch])[0]

    def measure_together(self, archs: Sequence[ArchSpec]) -> list[Measurement]:
        return self.station.measure_together(archs)

    def measure_blocks(
        self, archs: Sequence[ArchSpec], known: Mapping[str, float], references_ms: Sequence[float]
    ) -> list[ShapeLatency]:
        return self.station.measure_blocks(archs, known, references_ms)

    def profile(self) -> DeviceProfile:
        return self.station.profile()

    def train(
        self, archs: Sequence[ArchSpec], seeds: Sequence[int] | None = None, rules: Rules = None
    ) -> Generator[Done[ProxyResult]]:
        with self.turn:
            # It may have been closed while this round waited for the one before.
            if not self.closed:
                with self.training():
                    yield from self.results(archs, seeds, rules)

    def results(
        self, archs: Sequence[ArchSpec], seeds: Sequence[int] | None, rules: Rules
    ) -> Generator[Done[ProxyResult]]:
        """Train networks in the pool."""
        config, count, tests = self.config, len(archs), seeds is not None
        calls = [Call(train_candidate,
                      (arch, self.data_for(arch), config.proxy, seed, config.keep_weights, rule, tests))
                 for arch, seed, rule
                 in zip(archs, seeds or [config.seed] * count, rules or [None] * count, strict=True)]  # fmt: skip
        with closing(self.pool.run(calls)) as results:
            yield from self.captures.watch(results)

    @property
    def trains_on(self) -> str:
        """The kind of the devices that train."""
        raise NotImplementedError

    @property
    def devices(self) -> int:
        """The number of the devices that train."""
        raise NotImplementedError

    def train_as(self, trainings: Sequence[PilotTraining]) -> Generator[Done[ProxyResult]]:
        """See `nas.search.pilot.Adjustable`."""
        calls = [Call(train_candidate, (each.arch, self.data_for(each.arch), each.proxy, each.seed, False, None, False))
                 for each in trainings]  # fmt: skip
        with self.training(), closing(self.pool.run(calls)) as results:
            yield from self.captures.watch(results)

    def adopt(self, proxy: ProxyConfig) -> None:
        """Train candidates by this schedule from now on."""
        before, self.config = self.config.proxy, replace(self.config, proxy=proxy)
        # How many workers pay depends on how long a training takes, which is the same at any rate.
        if proxy != replace(before, learning_rate=proxy.learning_rate):
            self.undecided = self.config.workers is None

    def close(self) -> None:
        """Release the devices, also where another thread trains."""
        self.closed = True
        self.station.close()
        self.pool.close()


def train_candidate(
    arch: ArchSpec, data: DataSource, config: ProxyConfig, seed: int, keep_weights: bool, rule: Rule | None,
    tests: bool, device: str,
) -> ProxyResult:  # fmt: skip
    """Train a candidate in this process, which is a worker.

    Raises:
        CandidateFailed: the loss diverges, or memory runs out.
    """
    try:
        with contained():
            network, result = train_new(arch.build, data, config, seed, device, rule=rule)
            if tests:
                result = tested(network, result, data, device)
        if keep_weights and not result.stopped:
            result = replace(result, trained=Trained.of(network, mapped(data, device)[1]))
        return result
    finally:
        trim_heap()


def cost_of_determinism(config: SearchConfig) -> str:
    """The cost of deterministic trainings on the latency's device, which is a CUDA device, as a line.

    Raises:
        UsageError: they are not possible.
    """
    device, anchor = config.latency.device, config.space.anchor()
    try:
        return str(measure_apart(anchor, config.proxy, device, anchor.shown(config.data.resolution)))
    except CandidateFailed as error:
        raise UsageError(f"--deterministic: not on {device} ({error})") from error
    except RuntimeError as error:
        # The child process has printed the reason: a GPU may admit one process only, for example. The search goes on
        # without this figure.
        return f"what --deterministic costs here could not be measured ({error})"
