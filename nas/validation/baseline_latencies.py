"""Latencies of baselines: networks are timed in turns with one another and the device's yardsticks, and stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from kernels.device_info import DeviceInfo
from nas.child_process import ChildProcess
from nas.config import LatencyConfig
from nas.errors import CandidateFailed
from nas.latency.device_profile import find_or_measure_profile, references_ms
from nas.latency.engines import deploy
from nas.latency.meter import cpu_threads
from nas.latency.values import Latency
from nas.latency.yardsticks import Timed, Yardsticks
from nas.recorded import RecordedStudy, deployment_of
from nas.search.front_measurement import TOGETHER
from nas.training.pool import Trainer
from nas.validation.networks import NetworkSpec
from studies import BaselineLatency, Deployment


class BaselineLatencies:
    """The latencies of a study's baselines in one deployment, in which only resolution and engine vary.

    Args:
        config: the deployment; its resolution and engine are not used.
        trainer: the trainer of the same networks, whose device, lock and notes are used.
    """

    def __init__(self, recorded: RecordedStudy, config: LatencyConfig, trainer: Trainer) -> None:
        self.recorded, self.config = recorded, config
        self.device, self.lock, self.waiting, self.note = trainer.device, trainer.lock, trainer.waiting, trainer.note

    def measure(self, networks: Sequence[NetworkSpec], earlier: Sequence[NetworkSpec]) -> list[NetworkSpec]:
        """The networks that have a latency, which is measured now unless all were measured together before.

        Args:
            earlier: networks of earlier runs, which are measured in turns with these.
        """
        wanted = [*networks, *earlier]
        if not self._measured_together(wanted):
            profile = find_or_measure_profile(self.recorded.store, self.config, waiting=self.waiting)
            self.note(f"measuring {len(wanted)} networks in turns")
            with self.lock.measuring(self.waiting):
                latencies = self._in_turns(wanted, references_ms(profile))
            now = datetime.now(UTC)
            rows = [
                self._row(network.name, network.engine, network.resolution, now, latency)
                for network, latency in zip(wanted, latencies, strict=True)
            ]
            self.recorded.store.baselines.add(self.recorded.study_id, rows)
            for row in rows:
                self.note(f"{row.name}: " + (f"failed ({row.reason})" if row.reason else f"{row.median_ms:.4f} ms"))
        failed = {(row.name, row.resolution, row.engine) for row in self._rows() if row.reason is not None}
        return [each for each in networks if (*each.key, self._label(each.engine)) not in failed]

    def add_failure(self, name: str, engine: str, reason: str) -> None:
        """Store the reason why a network does not run at the resolution that suits it."""
        self.note(f"{name}: failed ({reason})")
        row = self._row(name, engine, 0, datetime.now(UTC), reason)
        self.recorded.store.baselines.add(self.recorded.study_id, [row])

    def _in_turns(self, networks: Sequence[NetworkSpec], yardsticks_ms: Sequence[float]) -> list[Latency | str]:
        """A latency for each network, or the reason why it has none; groups that fail together are halved."""
        half = len(networks) // 2
        if len(networks) <= TOGETHER:
            # In a process that ends, for compilers never give their memory back.
            with ChildProcess() as worker:
                try:
                    return worker.call(time_in_turns, networks, self.config, yardsticks_ms)
                except CandidateFailed as error:
                    if len(networks) == 1:
                        return [str(error)]
        else:
            half = TOGETHER
        return self._in_turns(networks[:half], yardsticks_ms) + self._in_turns(networks[half:], yardsticks_ms)

    def _rows(self) -> list[BaselineLatency]:
        """The study's rows in this deployment, at any resolution and engine."""
        return [
            row
            for row in self.recorded.store.baselines.latencies(self.recorded.study_id)
            if Deployment.of(row) == replace(self._deployment, engine=row.engine, resolution=row.resolution)
        ]

    def _measured_together(self, networks: Sequence[NetworkSpec]) -> bool:
        measured_at = {(row.name, row.resolution, row.engine): row.measured_at for row in self._rows()}
        times = {measured_at.get((*network.key, self._label(network.engine))) for network in networks}
        return len(times) == 1 and None not in times

    def _row(self, name: str, engine: str, resolution: int, when: datetime, latency: Latency | str) -> BaselineLatency:
        fields: dict[str, Any] = {"reason": latency} if isinstance(latency, str) else asdict(latency)
        deployment = replace(self._deployment, engine=self._label(engine), resolution=resolution)
        return BaselineLatency(name=name, **deployment.as_columns(), measured_at=when, **fields)

    def _label(self, engine: str) -> str:
        return replace(self.config, engine=engine).engine_label

    @cached_property
    def _deployment(self) -> Deployment:
        return deployment_of(self.config, self.recorded.store.devices.id_of(asdict(DeviceInfo.of(self.device))))


# -- In a process of its own -----------------------------------------------------------------------------------------


def time_in_turns(
    networks: Sequence[NetworkSpec], config: LatencyConfig, yardsticks_ms: Sequence[float]
) -> list[Latency | str]:
    """A latency for each network, timed in turns with the others and the yardsticks, or the reason why not."""
    meter = Yardsticks(config, yardsticks_ms)
    with cpu_threads(config.threads):
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
