"""Evaluation of one candidate, which is counted, timed and, unless it breaks a limit, trained."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from kernels.device_info import DeviceInfo
from nas.config import Limits
from nas.errors import CandidateFailed, memory_may_run_out
from nas.latency.device_profile import DeviceProfile
from nas.latency.values import Measurement, ShapeLatency, memory_mb
from nas.training.proxy import ProxyResult
from nas.training.stopping import Rules, Verdict
from nas.training.weights import Images
from nas.training.workers import Done
from search_spaces import ArchSpec, Cost
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
        if done.result.stopped and done.result.verdict:
            reason = given_up(done.result.verdict, self.latency.median_ms)
            return replace(outcome, state=CandidateState.STOPPED, reason=reason, proxy=done.result)
        return replace(outcome, proxy=done.result)


def given_up(verdict: Verdict, latency_ms: float) -> str:
    """The reason for which a training was given up, in words."""
    return (
        f"given up after {verdict.step} steps: {verdict.predicted:.1%} +- {verdict.deviation:.1%} expected, "
        f"{verdict.needed:.1%} needed at {latency_ms:.3g} ms"
    )


class Evaluator(Protocol):
    """Interface to what measures and trains candidates for the search; tests put a fast fake in its place."""

    device: DeviceInfo
    data_fingerprint: str
    # Numbers of training and of validation images.
    train_images: int
    val_images: int
    # The images at the anchor's resolution; None where there are none.
    images: Images | None
    notes: tuple[str, ...]

    @property
    def workers(self) -> int:
        """Number of trainings at once, which is known after `start`."""
        ...

    @property
    def apart(self) -> bool:
        """Whether candidates may be timed while others train."""
        ...

    @property
    def round_size(self) -> int:
        """Number of candidates that are proposed at once, which is known after `start`."""
        ...

    @property
    def timers(self) -> int:
        """Number of candidates that may be timed at once, each on a device of its own."""
        ...

    @property
    def compiles(self) -> bool:
        """Whether what `foresee` prepares takes long, so that candidates had better be proposed before one is timed."""
        ...

    def anchor(self, references_ms: Sequence[float]) -> ShapeLatency:
        """Measure the anchor network's latency, on the scale of the yardsticks' references."""
        ...

    def start(self, anchor_ms: float) -> None:
        """Prepare to measure against the anchor's reference latency."""
        ...

    def cost(self, arch: ArchSpec) -> Cost: ...

    def measure(self, arch: ArchSpec) -> Measurement: ...

    def foresee(self, archs: Sequence[ArchSpec]) -> None:
        """Prepare to measure architectures that may come next, the likeliest first; this returns at once."""
        ...

    def train(
        self, archs: Sequence[ArchSpec], seeds: Sequence[int] | None = None, rules: Rules = None
    ) -> Generator[Done[ProxyResult]]:
        """Train networks side by side, those first that stand first, and yield each when it ends.

        Args:
            seeds: seed of each training; None stands for the search's, which all have in common.
            rules: rule by which each training may end early; None stands for none.
        """
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


def round_of(workers: int) -> int:
    """The size of a round whose end all workers wait for: with two candidates for each, none waits long."""
    return 1 if workers == 1 else 2 * workers


class OneByOne:
    """Base of evaluators that train one network after the other, by a method `train_one`."""

    workers = 1
    apart = False
    timers = 1
    compiles = False
    train_images = 16_000
    val_images = 3000
    images: Images | None = None

    @property
    def round_size(self) -> int:
        return round_of(self.workers)

    def foresee(self, archs: Sequence[ArchSpec]) -> None:
        """There is nothing to prepare."""

    def train_one(self, arch: ArchSpec) -> ProxyResult:
        """Train a network.

        Raises:
            CandidateFailed: it cannot be trained.
        """
        raise NotImplementedError

    def train_again(self, arch: ArchSpec, seed: int) -> ProxyResult:
        """Train a network with another seed; by default the seed changes nothing."""
        return self.train_one(arch)

    def train(
        self, archs: Sequence[ArchSpec], seeds: Sequence[int] | None = None, rules: Rules = None
    ) -> Generator[Done[ProxyResult]]:
        """See `Evaluator.train`."""
        for index, arch in enumerate(archs):
            begin = time.perf_counter()
            try:
                with memory_may_run_out():
                    result: ProxyResult | CandidateFailed
                    result = self.train_one(arch) if seeds is None else self.train_again(arch, seeds[index])
                    rule = rules[index] if rules else None
                    result = result.under(rule) if rule else result
            except CandidateFailed as error:
                result = error
            yield Done(index, 0, time.perf_counter() - begin, result)


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
        measured: dict[str, float] = {"params": counted.params, "macs": counted.macs}
        constraints |= limits.excess(**measured)
        if broken := limits.broken(**measured):
            return outcome(CandidateState.OVER_LIMIT, broken)
        latency_begin = time.perf_counter()
        with memory_may_run_out():
            latency = evaluator.measure(arch)
        latency_seconds = time.perf_counter() - latency_begin
        measured = {"latency_ms": latency.median_ms, "memory_mb": memory_mb(latency)}
        constraints |= limits.excess(**measured)
        if broken := limits.broken(**measured):
            return outcome(CandidateState.OVER_LIMIT, broken)
        return Screened(counted, time.perf_counter() - begin, latency, latency_seconds, constraints)
    except CandidateFailed as error:
        return outcome(CandidateState.FAILED, str(error))
