"""The evaluator that trains and times candidates on this machine."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from kernels.machine import cores, free_memory_bytes
from nas.config import SearchConfig
from nas.errors import CandidateFailed, UsageError
from nas.latency.devices import check_device, indexed
from nas.latency.isolation import runs_fused_kernels
from nas.latency.station import Station
from nas.locks import AGAIN_SECONDS, training_on
from nas.reporting import Note
from nas.search.evaluation import round_of
from nas.search.real_evaluator import RealEvaluator, cost_of_determinism
from nas.search.sampling import first_archs
from nas.training import data as image_data
from nas.training import worker_count
from nas.training.pool import WORKER_BYTES, DataFiles, every_cuda, require_sense
from nas.training.worker_count import WorkerCount, get_ready
from nas.training.workers import Workers

# Workers that are started before it is known how many pay.
FIRST_WORKERS = 8


class Machine(RealEvaluator):
    """Evaluator that trains and times candidates on this machine.

    While it trains, no process measures on the device; while it measures, no other process trains or measures there.

    Args:
        config: the search's configuration.
        note: function that receives lines about the data, and one when another process must be waited for.

    Raises:
        UsageError: the data cannot be loaded, or a device does not exist.
    """

    pool: Workers
    timers = 1

    def __init__(self, config: SearchConfig, note: Note = lambda line: None) -> None:
        super().__init__(config, note)
        self.told_at = -math.inf
        self.station: Station = Station(config.latency, config.space.anchor(), self._waiting, note)
        self.train_devices = train_devices(config, self.station.device)
        self.device = self.station.info
        self.compiles = runs_fused_kernels(config.latency)
        self.free_bytes = free_memory_bytes()
        self.pool = Workers(self._first_workers(), [str(device) for device in self.train_devices])
        self.files = DataFiles()
        try:
            if self.compiles:
                # Some cores are idle while images are loaded and workers are started.
                self.station.foresee([config.space.anchor(), *first_archs(config)])
            self.take(image_data.load_all(config.data, config.resolutions, note), self.files.write)
            self._get_ready()
        except BaseException:
            self.close()
            raise

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
        """Have all workers import what they need, while nobody measures.

        Raises:
            UsageError: not all of them can be started.
        """
        try:
            with self.training():
                self.pool.everywhere(get_ready, self.data_for(self.config.space.anchor()))
        except CandidateFailed as error:
            raise UsageError(
                f"--workers {self.pool.count}: not all of them can be started ({error}); use fewer"
            ) from error

    def _waiting(self, line: str) -> None:
        # There may be a short wait for each candidate.
        if time.monotonic() - self.told_at >= AGAIN_SECONDS:
            self.note(line)
            self.told_at = time.monotonic()

    @property
    def apart(self) -> bool:  # type: ignore[override]
        # A training takes a core, also on CUDA, which a measurement on the CPU would feel; and one on the CPU takes
        # those that launch what is measured.
        kinds = {self.station.device.type, *(device.type for device in self.train_devices)}
        return kinds == {"cuda"} and self.station.device not in self.train_devices

    @property
    def trains_on(self) -> str:
        return self.train_devices[0].type

    @property
    def devices(self) -> int:
        return len(self.train_devices)

    @property
    def round_size(self) -> int:
        return round_of(self.workers)

    def training(self) -> contextlib.AbstractContextManager[None]:
        """Context in which no process measures on the devices that train."""
        return training_on(self.train_devices, self._waiting)

    def resize(self, count: int) -> None:
        super().resize(count)
        self._get_ready()

    def chosen_workers(self) -> WorkerCount:
        config, anchor = self.config, self.config.space.anchor()
        if self.train_devices[0].type == "cuda":
            rate = worker_count.images_per_second(self.pool, anchor, self.data_for(anchor), config.proxy, config.seed)

            def measured(count: int) -> float:
                self.resize(max(count, self.pool.count))
                with self.training():
                    return rate(count)

            try:
                # One core is left to what is timed meanwhile.
                return worker_count.on_cuda(len(self.train_devices), measured, max(1, cores() - self.apart))
            except CandidateFailed as error:
                devices = ",".join(map(str, self.train_devices))
                raise UsageError(f"--train-devices {devices}: a first training fails ({error})") from error

        def probe() -> worker_count.Probe:
            with self.training():
                return worker_count.probe(
                    self.pool, anchor, self.data_for(anchor), config.proxy, config.seed, config.space.own_resolutions
                )

        most = max(1, cores() // config.proxy.threads)
        return worker_count.on_cpu(most, self.free_bytes, probe, self.station.timing_seconds)

    def determinism(self) -> str | None:
        if self.station.device.type != "cuda" or not self.config.proxy.deterministic:
            return None
        with self.station.lock.measuring(self._waiting):
            return cost_of_determinism(self.config)

    def close(self) -> None:
        super().close()
        self.files.close()


def train_devices(config: SearchConfig, device: torch.device) -> list[torch.device]:
    """The devices that train: those that are named, or else the latency's; all CUDA devices, where that is one.

    Raises:
        UsageError: one of them is not here, or there are more workers than make sense.
    """
    if config.train_devices is None:
        found: Sequence[torch.device] = every_cuda(device)
    else:
        found = []
        for name in config.train_devices:
            try:
                found.append(indexed(check_device(replace(config.latency, device=name, engine="eager"))))
            except UsageError as error:
                raise UsageError(f"--train-devices {name}: {str(error).partition(': ')[2]}") from error
        if len({each.type for each in found}) > 1 or len(set(found)) < len(found):
            raise UsageError(f"--train-devices {','.join(config.train_devices)}: are of two kinds, or one stands twice")
    require_sense(config.workers, len(found) if found[0].type == "cuda" else None, config.proxy.threads)
    return list(found)
