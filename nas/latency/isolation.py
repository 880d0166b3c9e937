"""Meters that take architectures: in this process, or in a child process for engines that never give memory back.

TorchScript keeps every network it has traced for as long as the process lives, some 6 MB each: a study of 200 would end
with more than a gigabyte of them. The meter therefore lives in a child process that is replaced every so often.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from nas.child_process import ChildProcess
from nas.config import LatencyConfig
from nas.errors import CandidateFailed, memory_may_run_out
from nas.latency.block_meter import BlockMeter
from nas.latency.engines import ENGINES
from nas.latency.meter import LatencyMeter
from nas.latency.values import Measurement, ShapeLatency
from search_spaces import ArchSpec

# Candidates that one child measures: starting another costs some 5 seconds, keeping it 6 MB a candidate.
LIFETIME = 50
# A network's parts, each traced four times over, weigh as much as so many networks.
PARTS_WEIGHT = 4

Result = TypeVar("Result")


class ArchMeter(Protocol):
    """Meter of architectures in one deployment; `meter_for` makes the right one.

    Attributes:
        reference_ms: the anchor's reference latency.
    """

    reference_ms: float

    def measure_together(self, archs: Sequence[ArchSpec]) -> list[Measurement]:
        """Measurements of several networks, sampled in turns; see `LatencyMeter.measure_together`.

        Raises:
            CandidateFailed: the engine cannot run one of them, or the measuring process died of it.
        """
        ...

    def measure_blocks(
        self, archs: Sequence[ArchSpec], known: Mapping[str, float], references_ms: Sequence[float]
    ) -> list[ShapeLatency]:
        """Measure what the block latency table lacks of networks and the anchor; see `BlockMeter.measure_archs`."""
        ...

    def close(self) -> None:
        """Free the device; the next measurement takes it again."""
        ...


def meter_for(config: LatencyConfig, anchor: ArchSpec, reference_ms: float | None) -> ArchMeter:
    """The meter that the deployment's engine needs.

    Args:
        reference_ms: the anchor's reference latency; None measures it now.

    Raises:
        CandidateFailed: the engine cannot run the anchor.
    """
    made: type[LocalMeter | IsolatedMeter] = IsolatedMeter if ENGINES[config.engine].isolated else LocalMeter
    return made(config, anchor, reference_ms)


class LocalMeter:
    """An `ArchMeter` that measures in this process."""

    def __init__(self, config: LatencyConfig, anchor: ArchSpec, reference_ms: float | None) -> None:
        self.config, self.anchor = config, anchor
        with memory_may_run_out():
            self.meter = LatencyMeter(
                config, anchor.build(config.num_classes), reference_ms, anchor_size=anchor.shown(config.resolution)
            )
        self.reference_ms = self.meter.reference_ms
        self.blocks: BlockMeter | None = None

    def measure_together(self, archs: Sequence[ArchSpec]) -> list[Measurement]:
        with memory_may_run_out():
            networks = [arch.build(self.config.num_classes) for arch in archs]
            return self.meter.measure_together(networks, [arch.shown(self.config.resolution) for arch in archs])

    def measure_blocks(
        self, archs: Sequence[ArchSpec], known: Mapping[str, float], references_ms: Sequence[float]
    ) -> list[ShapeLatency]:
        with memory_may_run_out():
            if self.blocks is None or self.blocks.yardsticks.references_ms != tuple(references_ms):
                self.blocks = BlockMeter(self.config, references_ms)
            return self.blocks.measure_archs(archs, known, [self.anchor])

    def close(self) -> None:
        self.blocks = None


class IsolatedMeter:
    """An `ArchMeter` that measures in a child process, which is replaced after `LIFETIME` candidates."""

    def __init__(self, config: LatencyConfig, anchor: ArchSpec, reference_ms: float | None) -> None:
        self.config, self.anchor = config, anchor
        self.child = ChildProcess()
        # The first child measures the reference if need be, and later ones are given it.
        self.reference_ms = self._start(reference_ms)

    def measure_together(self, archs: Sequence[ArchSpec]) -> list[Measurement]:
        measurements = self._call(LocalMeter.measure_together, archs)
        self._count(len(archs))
        return measurements

    def measure_blocks(
        self, archs: Sequence[ArchSpec], known: Mapping[str, float], references_ms: Sequence[float]
    ) -> list[ShapeLatency]:
        latencies = self._call(LocalMeter.measure_blocks, archs, known, references_ms)
        # Each part was traced, and is held as long as the child lives; together they are some four networks.
        self._count(PARTS_WEIGHT * len(archs) if latencies else 0)
        return latencies

    def close(self) -> None:
        """End the child process; the next measurement starts another."""
        self.child.close()

    def _call(self, method: Callable[..., Result], *args: object) -> Result:
        """Call a method of the child's meter; a child is started if need be."""
        if self.child.process is None:
            self._start(self.reference_ms)
        try:
            return self.child.call(_call_meter, method, *args)
        except CandidateFailed:
            self._count(1)
            raise

    def _start(self, reference_ms: float | None) -> float:
        """Start a child with a meter; returns the anchor's reference latency."""
        self.measured = 0
        try:
            return self.child.call(_make_meter, self.config, self.anchor, reference_ms)
        except BaseException:
            self.close()
            raise

    def _count(self, measured: int) -> None:
        self.measured += measured
        if self.measured >= LIFETIME:
            self.close()


# The meter of this process, if it is such a child.
_meter: LocalMeter | None = None


def _make_meter(config: LatencyConfig, anchor: ArchSpec, reference_ms: float | None) -> float:
    global _meter
    _meter = LocalMeter(config, anchor, reference_ms)
    return _meter.reference_ms


def _call_meter(method: Callable[..., Result], *args: object) -> Result:
    assert _meter is not None
    return method(_meter, *args)
