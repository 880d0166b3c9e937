"""Latencies of baselines: networks timed in turns with one another and the device's yardsticks, and written down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from kernels.timing import DeviceInfo
from nas.config import LatencyConfig
from nas.errors import CandidateFailed
from nas.latency.ceilings import find_or_measure, references_ms
from nas.latency.engines import deploy
from nas.latency.meter import threads
from nas.latency.yardsticks import Corrected, Timed, Yardsticks
from nas.recorded import RecordedStudy
from nas.training.pool import Trainer
from nas.validation.networks import NetworkSpec
from nas.validation.remeasure import TOGETHER
from nas.worker import Worker
from studies import BaselineLatency


class BaselineLatencies:
    """The latencies of a study's baselines in one deployment, but for resolution and engine.

    Args:
        config: the deployment.
        trainer: says the device, how to lock it, and where notes go.
    """

    def __init__(self, study: RecordedStudy, config: LatencyConfig, trainer: Trainer) -> None:
        self.study, self.config = study, config
        self.device, self.lock, self.waiting, self.note = trainer.device, trainer.lock, trainer.waiting, trainer.note

    def measure(self, networks: Sequence[NetworkSpec], earlier: Sequence[NetworkSpec]) -> list[NetworkSpec]:
        """Those of the networks that have a latency, which is measured now unless all were measured together before.

        Args:
            earlier: networks of earlier runs, which are measured in turns with these.
        """
        wanted = [*networks, *earlier]
        if not self._measured_together(wanted):
            known = find_or_measure(self.study.store, self.config, waiting=self.waiting)
            self.note(f"measuring {len(wanted)} networks in turns")
            with self.lock.measuring(self.waiting):
                latencies = self._in_turns(wanted, references_ms(known))
            now = datetime.now(UTC)
            rows = [
                self._row(network.name, network.engine, network.resolution, now, latency)
                for network, latency in zip(wanted, latencies, strict=True)
            ]
            self.study.store.add_baselines(self.study.study_id, rows)
            for row in rows:
                self.note(f"{row.name}: " + (f"failed ({row.reason})" if row.reason else f"{row.median_ms:.4f} ms"))
        failed = {(row.name, row.resolution) for row in self._rows() if row.reason is not None}
        return [network for network in networks if network.key not in failed]

    def add_failure(self, name: str, engine: str, reason: str) -> None:
        """Write down that a network runs at no resolution that suits it."""
        self.note(f"{name}: failed ({reason})")
        self.study.store.add_baselines(self.study.study_id, [self._row(name, engine, 0, datetime.now(UTC), reason)])

    def _in_turns(self, networks: Sequence[NetworkSpec], references_ms: Sequence[float]) -> list[Corrected | str]:
        """A latency for each network, or why it has none; as many are timed at once as run together."""
        half = len(networks) // 2
        if len(networks) <= TOGETHER:
            # Compilers never give their memory back, so in a process that ends.
            with Worker() as worker:
                try:
                    return worker.call(time_in_turns, networks, self.config, references_ms)
                except CandidateFailed as error:
                    if len(networks) == 1:
                        return [str(error)]
        else:
            half = TOGETHER
        return self._in_turns(networks[:half], references_ms) + self._in_turns(networks[half:], references_ms)

    def _rows(self) -> list[BaselineLatency]:
        """The rows of this deployment."""
        here = (self._device_id, self.config.dtype, self.config.batch_size, self.config.threads)
        return [
            row
            for row in self.study.store.baseline_latencies(self.study.study_id)
            if (row.device_id, row.dtype, row.batch_size, row.threads) == here
        ]

    def _measured_together(self, networks: Sequence[NetworkSpec]) -> bool:
        measured_at = {(row.name, row.resolution, row.engine): row.measured_at for row in self._rows()}
        times = {measured_at.get((*network.key, network.engine)) for network in networks}
        return len(times) == 1 and None not in times

    def _row(
        self, name: str, engine: str, resolution: int, when: datetime, latency: Corrected | str
    ) -> BaselineLatency:
        config = self.config
        fields: dict[str, Any] = {"reason": latency} if isinstance(latency, str) else asdict(latency)
        return BaselineLatency(
            name=name, device_id=self._device_id, engine=engine, dtype=config.dtype, batch_size=config.batch_size,
            resolution=resolution, threads=config.threads, measured_at=when, **fields,
        )  # fmt: skip

    @cached_property
    def _device_id(self) -> int:
        return self.study.store.device_id(asdict(DeviceInfo.of(self.device)))


# -- In a process of its own -----------------------------------------------------------------------------------------


def time_in_turns(
    networks: Sequence[NetworkSpec], config: LatencyConfig, references_ms: Sequence[float]
) -> list[Corrected | str]:
    """A latency for each network, timed in turns with the others and the yardsticks, or why it has none."""
    meter = Yardsticks(config, references_ms)
    with threads(config.threads):
        deployed = [_deployed(network, config, meter) for network in networks]
        times = iter(meter.time([each for each in deployed if isinstance(each, Timed)]))
    return [next(times) if isinstance(each, Timed) else each for each in deployed]


def _deployed(network: NetworkSpec, config: LatencyConfig, yardsticks: Yardsticks) -> Timed | str:
    config = replace(config, engine=network.engine, resolution=network.resolution)
    try:
        with network.failing():
            inputs = yardsticks.meter.random_inputs((config.batch_size, 3, config.resolution, config.resolution))
            module = deploy(network.build(config.num_classes), config, inputs[0])
            return Timed(yardsticks.meter.forwards(module, inputs), config.batch_size * network.macs)
    except CandidateFailed as error:
        return str(error)
