"""Evaluation of one candidate, which is counted, timed and, unless it breaks a limit, trained."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from kernels.timing import DeviceInfo
from nas.config import Limits, SearchConfig
from nas.errors import CandidateFailed, UsageError, memory_may_run_out
from nas.latency.block_meter import BlockMeter
from nas.latency.device_profile import DeviceProfile, measure_profile
from nas.latency.devices import anchor_must_run, check_device
from nas.latency.isolation import ArchMeter, meter_for
from nas.latency.values import Measurement, ShapeLatency, memory_mb
from nas.locks import WAITING, device_lock
from nas.reporting import Note
from nas.training import data as image_data
from nas.training import proxy
from nas.training.determinism import measure_apart
from nas.training.proxy import ProxyResult
from nas.training.weights import Images, Trained
from search_spaces import ArchSpec, Cost, cost
from studies import CandidateState


@dataclass(frozen=True)
class Outcome:
    """Result of evaluating a candidate.

    Args:
        cost: parameters and MACs.
        total_seconds: duration of the evaluation.
        reason: reason for which the candidate failed, or the limits that it broke.
        latency_seconds: duration of the latency's measurement.
        constraints: excess over each limit as a share of the limit, above 0 where it is broken.
    """

    state: CandidateState
    cost: Cost
    total_seconds: float
    reason: str | None = None
    latency: Measurement | None = None
    latency_seconds: float | None = None
    proxy: ProxyResult | None = None
    constraints: dict[str, float] | None = None


class Evaluator(Protocol):
    """Interface to what measures and trains candidates for the search; tests put a fast fake in its place."""

    device: DeviceInfo
    data_fingerprint: str
    notes: tuple[str, ...]

    def anchor(self, references_ms: Sequence[float]) -> ShapeLatency:
        """Measure the anchor network's latency, on the scale of the yardsticks' references."""
        ...

    def start(self, anchor_ms: float) -> None:
        """Prepare to measure against the anchor's reference latency."""
        ...

    def cost(self, arch: ArchSpec) -> Cost: ...

    def measure(self, arch: ArchSpec) -> Measurement: ...

    def train(self, arch: ArchSpec) -> ProxyResult: ...

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


class RealEvaluator:
    """Evaluator that trains and times candidates for real.

    While it trains, no process measures on the device; while it measures, no other process trains or measures there.

    Args:
        config: the search's configuration.
        note: function that receives lines about the data, and one when another process must be waited for.

    Raises:
        UsageError: the data cannot be loaded, or the device does not exist.
    """

    def __init__(self, config: SearchConfig, note: Note = lambda line: None) -> None:
        self.config = config
        self.note = note
        self.torch_device = check_device(config.latency)
        if config.proxy.deterministic:
            proxy.prepare_determinism()
        data = image_data.load(config.data, note)
        self.device = DeviceInfo.of(self.torch_device)
        self.data_fingerprint = data.fingerprint
        self.notes = (*data.notes, data.summary)
        self.images = Images.of(data)
        torch.set_num_threads(config.proxy.threads)
        self.batches = proxy.Batches(data, self.torch_device)
        self.meter: ArchMeter | None = None
        self.lock = device_lock(self.torch_device)

    def _waiting(self) -> None:
        self.note(WAITING)
        self.note = lambda line: None

    def anchor(self, references_ms: Sequence[float]) -> ShapeLatency:
        with anchor_must_run(self.config.latency), self.lock.measuring(self._waiting), memory_may_run_out():
            return BlockMeter(self.config.latency, references_ms).measure_anchor(self.config.space.anchor())

    def start(self, anchor_ms: float) -> None:
        with anchor_must_run(self.config.latency), self.lock.measuring(self._waiting):
            self.meter = meter_for(self.config.latency, self.config.space.anchor(), anchor_ms)

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

    def train(self, arch: ArchSpec) -> ProxyResult:
        # Every candidate starts from the same seed and sees the same images in the same order.
        torch.manual_seed(self.config.seed)
        network = arch.build(len(self.images.classes))
        try:
            with self.lock.training(self._waiting):
                result = proxy.train(network, self.batches, self.config.proxy, self.config.seed)
            return replace(result, trained=Trained.of(network, self.images)) if self.config.keep_weights else result
        finally:
            trim_heap()

    def close(self) -> None:
        """Release the device; `start` may be called again."""
        if self.meter is not None:
            self.meter.close()
        self.meter = None


def trim_heap() -> None:
    """Give freed memory back to the system.

    Each network has tensors of other sizes, and glibc keeps the holes between them: without this call, training some
    twenty candidates grows the process from 0.8 to 1.4 GB.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):  # the libc is not glibc
            ctypes.CDLL(None).malloc_trim(0)


def evaluate(arch: ArchSpec, evaluator: Evaluator, limits: Limits) -> Outcome:
    """Count, time and train one candidate, in this order of cost, and stop at the first broken limit.

    A candidate that cannot run is a result; every other exception is a bug and is raised.
    """
    begin = time.perf_counter()
    counted = evaluator.cost(arch)
    latency, latency_seconds = None, None
    constraints: dict[str, float] = {}

    def outcome(state: CandidateState, reason: str | None = None, result: ProxyResult | None = None) -> Outcome:
        seconds = time.perf_counter() - begin
        return Outcome(state, counted, seconds, reason, latency, latency_seconds, result, constraints)

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
        with memory_may_run_out():
            return outcome(CandidateState.COMPLETE, result=evaluator.train(arch))
    except CandidateFailed as error:
        return outcome(CandidateState.FAILED, str(error))


def _broken(constraints: dict[str, float]) -> str | None:
    """The broken limits in words; None where there are none."""
    parts = [f"{name} {excess:+.0%} over the limit" for name, excess in constraints.items() if excess > 0]
    return ", ".join(parts) or None
