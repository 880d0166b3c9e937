"""Evaluation of one candidate, which is counted, timed and, unless it breaks a limit, trained."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from kernels.device_info import DeviceInfo
from kernels.machine import cores, free_memory_bytes
from nas.config import Limits, ProxyConfig, SearchConfig
from nas.errors import CandidateFailed, UsageError, memory_may_run_out
from nas.latency.block_meter import BlockMeter
from nas.latency.device_profile import DeviceProfile, measure_profile
from nas.latency.devices import anchor_must_run, check_device
from nas.latency.isolation import ArchMeter, meter_for
from nas.latency.values import Measurement, ShapeLatency, memory_mb
from nas.locks import WAITING, device_lock, training_on
from nas.reporting import Note
from nas.search import worker_count
from nas.search.worker_count import WorkerCount, get_ready
from nas.training import data as image_data
from nas.training.determinism import measure_apart
from nas.training.pool import WORKER_BYTES, DataFiles, every_cuda, mapped, require_sense, train_new
from nas.training.proxy import ProxyResult
from nas.training.weights import Trained
from nas.training.workers import Call, Done, Workers, contained, trim_heap
from search_spaces import ArchSpec, Cost, cost
from studies import CandidateState

# Workers that are started before it is known how many pay.
FIRST_WORKERS = 8


@dataclass(frozen=True)
class Outcome:
    """Result of evaluating a candidate.

    Args:
        cost: parameters and MACs.
        total_seconds: duration of the evaluation.
        reason: reason for which the candidate failed, or the limits that it broke.
        latency_seconds: duration of the latency's measurement.
        constraints: excess over each limit as a share of the limit, above 0 where it is broken.
        worker: number of the worker that trained it, from 0.
    """

    state: CandidateState
    cost: Cost
    total_seconds: float
    reason: str | None = None
    latency: Measurement | None = None
    latency_seconds: float | None = None
    proxy: ProxyResult | None = None
    constraints: dict[str, float] | None = None
    worker: int | None = None


@dataclass(frozen=True)
class Screened:
    """A candidate that was counted and timed, and that keeps all limits: it is to be trained. See `Outcome`."""

    cost: Cost
    seconds: float
    latency: Measurement
    latency_seconds: float
    constraints: dict[str, float]

    def trained(self, done: Done[ProxyResult]) -> Outcome:
        """The outcome after a training."""
        outcome = Outcome(
            CandidateState.COMPLETE, self.cost, self.seconds + done.seconds, None, self.latency, self.latency_seconds,
            None, self.constraints, done.worker,
        )  # fmt: skip
        if isinstance(done.result, CandidateFailed):
            return replace(outcome, state=CandidateState.FAILED, reason=str(done.result))
        return replace(outcome, proxy=done.result)


class Evaluator(Protocol):
    """Interface to what measures and trains candidates for the search; tests put a fast fake in its place."""

    device: DeviceInfo
    data_fingerprint: str
    notes: tuple[str, ...]

    @property
    def workers(self) -> int:
        """Number of trainings at once, which is known after `start`."""
        ...

    @property
    def apart(self) -> bool:
        """Whether candidates may be timed while others train."""
        ...

    def anchor(self, references_ms: Sequence[float]) -> ShapeLatency:
        """Measure the anchor network's latency, on the scale of the yardsticks' references."""
        ...

    def start(self, anchor_ms: float) -> None:
        """Prepare to measure against the anchor's reference latency."""
        ...

    def cost(self, arch: ArchSpec) -> Cost: ...

    def measure(self, arch: ArchSpec) -> Measurement: ...

    def train(self, archs: Sequence[ArchSpec]) -> Generator[Done[ProxyResult]]:
        """Train networks side by side, those first that stand first, and yield each when it ends."""
        ...

    def measure_together(self, archs: Sequence[ArchSpec]) -> list[Measurement]:
        """Measure the latencies of several networks, sampled in turns with each other."""
        ...

    def measure_blocks(
        self, archs: Sequence[ArchSpec], known: Mapping[str, float], references_ms: Sequence[float]
    ) -> list[ShapeLatency]:
        """Measure the blocks of some architectures that are not `known`; see `BlockMeter.measure_archs`."""
        ...

    def profile(self) -> DeviceProfile:
        """Measure the device's limits in the deployment's dtype."""
        ...

    def determinism(self) -> str | None:
        """Measure the cost of deterministic trainings, and return it as a line; None where all are deterministic."""
        ...

    def close(self) -> None:
        """End the search's use of the device."""
        ...


class OneByOne:
    """Base of evaluators that train one network after the other, by a method `train_one`."""

    workers = 1
    apart = False

    def train_one(self, arch: ArchSpec) -> ProxyResult:
        """Train a network.

        Raises:
            CandidateFailed: it cannot be trained.
        """
        raise NotImplementedError

    def train(self, archs: Sequence[ArchSpec]) -> Generator[Done[ProxyResult]]:
        """See `Evaluator.train`."""
        for index, arch in enumerate(archs):
            begin = time.perf_counter()
            try:
                with memory_may_run_out():
                    result: ProxyResult | CandidateFailed = self.train_one(arch)
            except CandidateFailed as error:
                result = error
            yield Done(index, 0, time.perf_counter() - begin, result)


class RealEvaluator:
    """Evaluator that trains and times candidates for real.

    While it trains, no process measures on the device; while it measures, no other process trains or measures there.

    Args:
        config: the search's configuration.
        note: function that receives lines about the data, and one when another process must be waited for.

    Raises:
        UsageError: the data cannot be loaded, or a device does not exist.
    """

    def __init__(self, config: SearchConfig, note: Note = lambda line: None) -> None:
        self.config = config
        self.note = note
        (self.torch_device,) = indexed([check_device(config.latency)])
        self.train_devices = train_devices(config, self.torch_device)
        self.lock = device_lock(self.torch_device)
        self.meter: ArchMeter | None = None
        self.told = False
        self.free_bytes = free_memory_bytes()
        self.pool = Workers(self._first_workers(), [str(device) for device in self.train_devices])
        self.files = DataFiles()
        try:
            data = image_data.load(config.data, note)
            self.data_path = self.files.write(data)
            self._get_ready()
        except CandidateFailed as error:
            self.close()
            raise self._no_worker(error) from error
        except BaseException:
            self.close()
            raise
        self.device = DeviceInfo.of(self.torch_device)
        self.data_fingerprint = data.fingerprint
        self.notes = (*data.notes, data.summary)

    def _first_workers(self) -> int:
        """The workers to begin with: those that were asked for, or those that may turn out to pay."""
        devices = len(self.train_devices)
        if self.config.workers is not None:
            return self.config.workers
        if self.train_devices[0].type == "cuda":
            return devices
        fitting = self.free_bytes // WORKER_BYTES
        return max(1, min(cores() // self.config.proxy.threads, fitting, FIRST_WORKERS))

    def _get_ready(self) -> None:
        """Have all workers import what they need, while nobody measures."""
        with self._training():
            self.pool.everywhere(get_ready, self.data_path)

    def _waiting(self) -> None:
        if not self.told:
            self.note(WAITING)
        self.told = True

    def anchor(self, references_ms: Sequence[float]) -> ShapeLatency:
        with anchor_must_run(self.config.latency), self.lock.measuring(self._waiting), memory_may_run_out():
            return BlockMeter(self.config.latency, references_ms).measure_anchor(self.config.space.anchor())

    def start(self, anchor_ms: float) -> None:
        with anchor_must_run(self.config.latency), self.lock.measuring(self._waiting):
            self.meter = meter_for(self.config.latency, self.config.space.anchor(), anchor_ms)
        if self.config.workers is None:
            chosen = self._chosen_workers()
            self.note(str(chosen))
            self.pool.resize(chosen.count)
            try:
                self._get_ready()
            except CandidateFailed as error:
                raise self._no_worker(error) from error

    def _no_worker(self, error: CandidateFailed) -> UsageError:
        return UsageError(f"--workers {self.pool.count}: not all of them can be started ({error}); use fewer")

    @property
    def workers(self) -> int:
        return self.pool.count

    @property
    def apart(self) -> bool:
        # A training takes a core, also on CUDA, which a measurement on the CPU would feel; and one on the CPU takes
        # those that launch what is measured.
        kinds = {self.torch_device.type, *(device.type for device in self.train_devices)}
        return kinds == {"cuda"} and self.torch_device not in self.train_devices

    def _chosen_workers(self) -> WorkerCount:
        """The number of workers that pays."""
        config, anchor = self.config, self.config.space.anchor()
        arguments = (self.pool, anchor, self.data_path, config.proxy, config.seed)
        if self.train_devices[0].type == "cuda":
            rate = worker_count.images_per_second(*arguments)

            def measured(count: int) -> float:
                self.pool.resize(max(count, self.pool.count))
                self._get_ready()
                with self._training():
                    return rate(count)

            try:
                # One core is left to what is timed meanwhile.
                return worker_count.on_cuda(len(self.train_devices), measured, max(1, cores() - self.apart))
            except CandidateFailed as error:
                devices = ",".join(map(str, self.train_devices))
                raise UsageError(f"--train-devices {devices}: a first training fails ({error})") from error

        def probe() -> worker_count.Probe:
            with self._training():
                return worker_count.probe(*arguments)

        def timing_seconds() -> float:
            assert self.meter is not None
            with self.lock.measuring(self._waiting):
                begin = time.perf_counter()
                self.meter.measure_together([anchor])
                return time.perf_counter() - begin

        return worker_count.on_cpu(config.proxy.threads, self.free_bytes, probe, timing_seconds)

    def cost(self, arch: ArchSpec) -> Cost:
        return cost(arch, self.config.latency.resolution, self.config.latency.num_classes)

    def measure(self, arch: ArchSpec) -> Measurement:
        return self.measure_together([arch])[0]

    def measure_together(self, archs: Sequence[ArchSpec]) -> list[Measurement]:
        assert self.meter is not None, "start comes first"
        with self.lock.measuring(self._waiting):
            return self.meter.measure_together(archs)

    def measure_blocks(
        self, archs: Sequence[ArchSpec], known: Mapping[str, float], references_ms: Sequence[float]
    ) -> list[ShapeLatency]:
        assert self.meter is not None, "start comes first"
        with self.lock.measuring(self._waiting):
            return self.meter.measure_blocks(archs, known, references_ms)

    def profile(self) -> DeviceProfile:
        with self.lock.measuring(self._waiting):
            return measure_profile(self.config.latency)

    def determinism(self) -> str | None:
        if self.torch_device.type != "cuda":
            return None
        config = self.config
        try:
            with self.lock.measuring(self._waiting):
                anchor, resolution = config.space.anchor(), config.data.resolution
                return str(measure_apart(anchor, config.proxy, config.latency.device, resolution))
        except CandidateFailed as error:
            if config.proxy.deterministic:
                raise UsageError(f"--deterministic: not on {self.torch_device} ({error})") from error
            return f"--deterministic would not work here ({error})"
        except RuntimeError as error:
            # The child process has printed the reason: a GPU may admit one process only, for example. The search goes
            # on without this figure.
            return f"what --deterministic costs here could not be measured ({error})"

    def train(self, archs: Sequence[ArchSpec]) -> Generator[Done[ProxyResult]]:
        config = self.config
        calls = [Call(train_one, (arch, self.data_path, config.proxy, config.seed, config.keep_weights))
                 for arch in archs]  # fmt: skip
        with self._training(), closing(self.pool.run(calls)) as results:
            yield from results

    def _training(self) -> contextlib.AbstractContextManager[None]:
        """Context in which no process measures on the devices that train."""
        return training_on(self.train_devices, self._waiting)

    def close(self) -> None:
        """Release the devices, also where another thread trains."""
        if self.meter is not None:
            self.meter.close()
        self.meter = None
        self.pool.close()
        self.files.close()


def train_devices(config: SearchConfig, device: torch.device) -> list[torch.device]:
    """The devices that train: those that are named, or else the latency's; all CUDA devices, where that is one.

    Raises:
        UsageError: one of them is not here, or there are more workers than make sense.
    """
    if config.train_devices is None:
        found = every_cuda(device)
    else:
        found = []
        for name in config.train_devices:
            try:
                found += indexed([check_device(replace(config.latency, device=name, engine="eager"))])
            except UsageError as error:
                raise UsageError(f"--train-devices {name}: {str(error).partition(': ')[2]}") from error
        if len({each.type for each in found}) > 1 or len(set(found)) < len(found):
            raise UsageError(f"--train-devices {','.join(config.train_devices)}: are of two kinds, or one stands twice")
    require_sense(config.workers, len(found) if found[0].type == "cuda" else None, config.proxy.threads)
    return found


def indexed(devices: Sequence[torch.device]) -> list[torch.device]:
    """Devices with their indices, so that `cuda` and `cuda:0` are equal."""
    return [torch.device(each.type, each.index or 0) if each.type == "cuda" else each for each in devices]


def train_one(
    arch: ArchSpec, data_path: str, config: ProxyConfig, seed: int, keep_weights: bool, device: str
) -> ProxyResult:
    """Train a candidate in this process, which is a worker.

    Raises:
        CandidateFailed: the loss diverges, or memory runs out.
    """
    try:
        with contained():
            network, result = train_new(arch.build, data_path, config, seed, device)
        if keep_weights:
            result = replace(result, trained=Trained.of(network, mapped(data_path, device)[1]))
        return result
    finally:
        trim_heap()


def screen(arch: ArchSpec, evaluator: Evaluator, limits: Limits) -> Outcome | Screened:
    """Count and time one candidate, in this order of cost, and stop at the first broken limit.

    A candidate that cannot run is a result; every other exception is a bug and is raised.
    """
    begin = time.perf_counter()
    counted = evaluator.cost(arch)
    latency, latency_seconds = None, None
    constraints: dict[str, float] = {}

    def outcome(state: CandidateState, reason: str) -> Outcome:
        seconds = time.perf_counter() - begin
        return Outcome(state, counted, seconds, reason, latency, latency_seconds, None, constraints)

    try:
        constraints |= limits.excess(params=counted.params, macs=counted.macs)
        if broken := _broken(constraints):
            return outcome(CandidateState.OVER_LIMIT, broken)
        latency_begin = time.perf_counter()
        with memory_may_run_out():
            latency = evaluator.measure(arch)
        latency_seconds = time.perf_counter() - latency_begin
        constraints |= limits.excess(latency_ms=latency.median_ms, memory_mb=memory_mb(latency))
        if broken := _broken(constraints):
            return outcome(CandidateState.OVER_LIMIT, broken)
        return Screened(counted, time.perf_counter() - begin, latency, latency_seconds, constraints)
    except CandidateFailed as error:
        return outcome(CandidateState.FAILED, str(error))


def _broken(constraints: dict[str, float]) -> str | None:
    """The broken limits in words; None where there are none."""
    parts = [f"{name} {excess:+.0%} over the limit" for name, excess in constraints.items() if excess > 0]
    return ", ".join(parts) or None
