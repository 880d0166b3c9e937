"""A device of this machine on which latencies are measured: alone, and in one deployment."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch

from kernels.device_info import DeviceInfo
from kernels.peers import cudnn_search
from kernels.tune import Target
from nas.config import LatencyConfig
from nas.errors import memory_may_run_out
from nas.latency.compile_ahead import Compilers, compiler_count
from nas.latency.device_profile import DeviceProfile, measure_profile
from nas.latency.devices import check_device, indexed
from nas.latency.isolation import ArchMeter, anchor_latency, meter_for, runs_fused_kernels
from nas.latency.values import Measurement, ShapeLatency
from nas.locks import device_lock
from nas.reporting import Note
from search_spaces import ArchSpec


class Station:
    """Measures on a device while no other process trains or measures there.

    Args:
        config: the deployment.
        anchor: the anchor network, which shows how the device's speed drifts.
        waiting: function that takes a line on the process that must be waited for, see `nas.locks`.
        note: function that takes a line on each thing that makes latencies there less reliable.
        stations: number of stations on this machine, which share its cores.

    Raises:
        UsageError: there is no such device, or the deployment does not run on it.
    """

    def __init__(
        self, config: LatencyConfig, anchor: ArchSpec, waiting: Note | None = None, note: Note | None = None,
        stations: int = 1,
    ) -> None:  # fmt: skip
        self.config, self.anchor, self.waiting, self.stations = config, anchor, waiting, stations
        self.device = indexed(check_device(config, note))
        self.lock = device_lock(self.device)
        self.meter: ArchMeter | None = None
        self.compilers: Compilers | None = None

    @property
    def info(self) -> DeviceInfo:
        return DeviceInfo.of(self.device)

    def anchor_latency(self, references_ms: Sequence[float]) -> ShapeLatency:
        """Measure the anchor network's latency, on the scale of the yardsticks' references.

        Raises:
            CandidateFailed: the engine cannot run it.
        """
        self._compile([self.anchor])
        with self.lock.measuring(self.waiting), memory_may_run_out():
            return anchor_latency(self.config, self.anchor, references_ms)

    def start(self, anchor_ms: float) -> None:
        """Prepare to measure against the anchor's reference latency.

        Raises:
            CandidateFailed: the engine cannot run the anchor.
        """
        self._compile([self.anchor])
        with self.lock.measuring(self.waiting):
            self.meter = meter_for(self.config, self.anchor, anchor_ms)

    def foresee(self, archs: Sequence[ArchSpec]) -> None:
        """Compile what architectures need that may be measured next, the likeliest first; this returns at once."""
        if compilers := self._started_compilers():
            compilers.foresee(archs)

    def _compile(self, archs: Sequence[ArchSpec]) -> None:
        """Compile what architectures need to be measured, while others may still train here."""
        if compilers := self._started_compilers():
            compilers.ready(archs)

    def _started_compilers(self) -> Compilers | None:
        """The processes that compile, started if they were not; None where the deployment has no fused kernels."""
        if self.compilers is None and runs_fused_kernels(self.config):
            # As `nas.latency.engines.ready` tunes.
            with cudnn_search(self.device):
                target = Target.of(self.device)
            self.compilers = Compilers(self.config, target, compiler_count(self.stations))
        return self.compilers

    def measure_together(self, archs: Sequence[ArchSpec]) -> list[Measurement]:
        """Measure several networks, sampled in turns; see `LatencyMeter.measure_together`."""
        assert self.meter is not None, "start comes first"
        self._compile(archs)
        with self.lock.measuring(self.waiting):
            return self.meter.measure_together(archs)

    def measure_blocks(
        self, archs: Sequence[ArchSpec], known: Mapping[str, float], references_ms: Sequence[float]
    ) -> list[ShapeLatency]:
        """Measure the parts of some networks that are not `known`; see `BlockMeter.measure_archs`."""
        assert self.meter is not None, "start comes first"
        with self.lock.measuring(self.waiting):
            return self.meter.measure_blocks(archs, known, references_ms)

    def profile(self) -> DeviceProfile:
        """Measure the device's limits in the deployment's dtype."""
        with self.lock.measuring(self.waiting):
            try:
                return measure_profile(self.config)
            finally:
                if self.device.type == "cuda":
                    # Some GiB, for which this process has no further use.
                    torch.cuda.empty_cache()

    def timing_seconds(self) -> float:
        """Time that it takes to time a network once."""
        assert self.meter is not None, "start comes first"
        with self.lock.measuring(self.waiting):
            begin = time.perf_counter()
            self.meter.measure_together([self.anchor])
            return time.perf_counter() - begin

    def close(self) -> None:
        """Release the device."""
        if self.meter is not None:
            self.meter.close()
        if self.compilers is not None:
            self.compilers.close()
        self.meter = self.compilers = None
