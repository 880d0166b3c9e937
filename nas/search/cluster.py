"""The evaluator that trains and times candidates on a Ray cluster."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from kernels.device_info import DeviceInfo
from nas.cluster import tasks
from nas.cluster.connection import connect, disconnect
from nas.cluster.nodes import Node, alive
from nas.cluster.pool import ClusterPool, Places
from nas.cluster.stations import (
    AGAIN_SECONDS,
    GONE_AFTER_S,
    LOOK_SECONDS,
    POLL_SECONDS,
    Stations,
    describe,
    different_versions,
)
from nas.config import SearchConfig
from nas.errors import CandidateFailed, UsageError
from nas.reporting import Note
from nas.search.evaluation import round_of
from nas.search.real_evaluator import RealEvaluator, cost_of_determinism
from nas.training import data as image_data
from nas.training import worker_count
from nas.training.data import ImageData
from nas.training.pool import MOST_WORKERS
from nas.training.proxy import ProxyResult
from nas.training.stopping import Rules
from nas.training.worker_count import WorkerCount
from nas.training.workers import Done
from search_spaces import ArchSpec

# Packages whose versions decide what a training learns; of others it uses only what the driver sends.
TRAINING_PACKAGES = ("torch", "torchvision", "timm", "numpy")


@dataclass(frozen=True)
class StoredData:
    """A data set in the cluster's object store, which all workers of a node share."""

    reference: Any

    @classmethod
    def put(cls, ray: Any, flag: str, data: ImageData) -> StoredData:
        """Put a data set into the store.

        Args:
            flag: the flag and value by which the user asked for the cluster.

        Raises:
            UsageError: there is no room for it.
        """
        values = {field.name: getattr(data, field.name) for field in fields(data)}
        plain = {name: value.numpy() if hasattr(value, "numpy") else value for name, value in values.items()}
        try:
            return cls(ray.put(plain))
        except ray.exceptions.ObjectStoreFullError as error:
            size = sum(value.nbytes for value in plain.values() if hasattr(value, "nbytes"))
            raise UsageError(f"{flag}: the object store has no room for {size / 2**30:.1f} GiB of images") from error

    def load(self) -> ImageData:
        """The data set; the images stay in the store's memory."""
        import warnings

        import ray
        import torch

        plain = ray.get(self.reference)
        with warnings.catch_warnings():
            # Nobody may write to the store's memory, and nobody does.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            made: dict[str, Any] = {
                name: torch.from_numpy(value) if hasattr(value, "dtype") else value for name, value in plain.items()
            }
        return ImageData(**made)


class Cluster(RealEvaluator, Places):
    """Evaluator that trains and times candidates on a Ray cluster; only this process asks, tells and writes.

    Latencies are measured on the nodes that offer the resource `latency`. If there are others, these train, and the
    next candidates are timed meanwhile; else the nodes do both in turns.

    Args:
        config: the search's configuration.
        note: function that receives lines for the user.
        device: the device of a study that is there already.

    Raises:
        UsageError: the cluster cannot be joined, or has no node that can do what is asked.
    """

    pool: ClusterPool
    station: Stations

    def __init__(self, config: SearchConfig, note: Note, device: DeviceInfo | None = None) -> None:
        super().__init__(config, note)
        self.flag = "--ray" if config.ray_address is None else f"--ray-address {config.ray_address}"
        self.kind = self._kind()
        # When the nodes were looked up; the ids of those that train, and of those on which nothing may be trained.
        self.looked = -math.inf
        self.able: set[str] = set()
        self.unable: list[str] = []
        self.told = ""
        self.looking = threading.Lock()
        # By the id of a node, whether it may train.
        self.judged: dict[str, bool] = {}
        self.last_reason = ""
        # By the id of a node that could not tell what it has, when it is asked again.
        self.again: dict[str, float] = {}
        # What is wrong with the images is said before anything is started.
        data = list(image_data.load_all(config.data, config.resolutions, note))
        self.ray = connect(config.ray_address)
        try:
            self.station = Stations(self.ray, self.flag, config.latency, config.space.anchor(), device, note)
            self.device = self.station.device
            self.trainers = self._trainers()
            self.pool = ClusterPool(
                self.ray,
                self._first_workers(),
                self.kind,
                config.proxy.threads,
                self.gpus,
                self,
            )
            self.take(data, lambda data: StoredData.put(self.ray, self.flag, data))
        except BaseException:
            self.close()
            raise
        self.note(self._summary())

    def _kind(self) -> str:
        """The kind of device that trains.

        Raises:
            UsageError: a device has a number.
        """
        config = self.config
        for flag, names in (("--device", (config.latency.device,)), ("--train-devices", config.train_devices or ())):
            for name in names:
                if name not in ("cpu", "cuda"):
                    raise UsageError(f"{flag} {name}: with {self.flag} it is cpu or cuda; Ray chooses which")
        if config.train_devices is not None and len(config.train_devices) > 1:
            raise UsageError(f"--train-devices {','.join(config.train_devices)}: with {self.flag} it is one kind")
        return config.train_devices[0] if config.train_devices else config.latency.device

    # -- nodes -----------------------------------------------------------------------------------------------------

    def _trainers(self) -> list[Node]:
        """The nodes that train: those that do not measure, if there are such.

        Raises:
            UsageError: there are none.
        """
        nodes = [node for node in alive(self.ray.nodes()) if self._has_room(node)]
        others = [node for node in nodes if not node.latencies]
        self.apart = bool(others)
        self._judge(others or [node for node in nodes if node.id in self.station.accepted])
        good = [node for node in nodes if self.judged.get(node.id)]
        if not good:
            what = f"{self.config.proxy.threads} CPUs" if self.kind == "cpu" else "GPUs"
            raise UsageError(f"{self.flag}: {self.last_reason or f'no node has {what} to train on'}")
        return good

    def _has_room(self, node: Node) -> bool:
        return node.cpus >= self.config.proxy.threads if self.kind == "cpu" else node.gpus > 0

    def _judge(self, nodes: Sequence[Node]) -> None:
        """Find out of each node whether it may train, and tell the user where not."""
        with ThreadPoolExecutor(max(1, len(nodes))) as threads:
            found = list(threads.map(lambda node: describe(self.ray, node, None, cuda=self.kind == "cuda"), nodes))
        for node, described in zip(nodes, found, strict=True):
            if isinstance(described, str):
                reason = described
                self.again[node.id] = time.monotonic() + AGAIN_SECONDS
            else:
                reason = different_versions(described, TRAINING_PACKAGES)
                if self.kind == "cuda" and not described.gpus:
                    reason = reason or "torch finds no CUDA device there"
            self.judged[node.id] = not reason
            if reason:
                said, self.last_reason = self.last_reason, f"{node} does not train ({reason})"
                if said != self.last_reason:
                    self.note(self.last_reason)

    def avoided(self) -> list[str]:
        """See `Places`: nodes that only measure, that differ, or that are not known yet."""
        since: float | None = None
        while True:
            with self.looking:
                self._look()
                if self.able or self.closed:
                    return self.unable
            if since is None:
                since = time.monotonic()
                self._note_once(f"no node trains any more: waiting for up to {GONE_AFTER_S:g} s")
            elif time.monotonic() - since > GONE_AFTER_S:
                raise UsageError(f"{self.flag}: no node is left that trains")
            time.sleep(POLL_SECONDS)

    def are_gone(self, avoided: Sequence[str]) -> bool:
        """See `Places`."""
        with self.looking:
            self._look()
            lonely, gone = not self.able, bool(self.able) and self.able <= set(avoided)
        if lonely:
            # The call goes on if Ray finds a place for it; else it is submitted again, when one is known.
            self.avoided()
        return lonely or gone

    def _look(self) -> None:
        """Look the nodes up, from time to time; the caller holds `looking`."""
        if time.monotonic() - self.looked < LOOK_SECONDS:
            return
        self.looked = time.monotonic()
        nodes = alive(self.ray.nodes())
        able = [node for node in nodes if self._has_room(node) and not (self.apart and node.latencies)]
        self.able = {node.id for node in able if self.judged.get(node.id)}
        self.unable = [node.id for node in nodes if node.id not in self.able]
        if self.able:
            self.told = ""
        # Some may have joined since; they are used once they are known.
        late = {id for id, at in self.again.items() if at < self.looked}
        if new := [node for node in able if node.id not in self.judged or node.id in late]:
            self.judged |= {node.id: False for node in new}
            for node in new:
                self.again.pop(node.id, None)
            threading.Thread(target=self._judge, args=(new,), daemon=True).start()

    def _note_once(self, line: str) -> None:
        with self.looking:
            said, self.told = self.told, line
        if said != line:
            self.note(line)

    @cached_property
    def most(self) -> int:
        """Number of trainings for which the nodes have room at once."""
        threads = self.config.proxy.threads
        if self.kind == "cuda":
            return MOST_WORKERS * self.gpus
        return sum(int(node.cpus // threads) for node in self.trainers)

    @cached_property
    def gpus(self) -> int:
        return int(sum(node.gpus for node in self.trainers)) if self.kind == "cuda" else 0

    def _summary(self) -> str:
        timing = len(self.station.accepted)
        measured = f"{timing} measure{'s' if timing == 1 else ''} latency"
        return (
            f"Ray: {len(self.trainers)} node{'s' if len(self.trainers) > 1 else ''} train"
            f"{'s' if len(self.trainers) == 1 else ''}, {measured}" + ("" if self.apart else ", in turns")
        )

    # -- workers ---------------------------------------------------------------------------------------------------

    def _first_workers(self) -> int:
        workers = self.config.workers
        if workers is not None and workers > self.most:
            what = f"{self.gpus} GPUs" if self.kind == "cuda" else f"the cluster's {self.most} places to train"
            raise UsageError(f"--workers {workers}: more than {self.most} gain nothing on {what}")
        return workers or max(1, self.gpus)

    @property
    def timers(self) -> int:  # type: ignore[override]
        # It is that of the beginning, as proposals depend on it.
        return self.station.timers

    @property
    def trains_on(self) -> str:
        return self.kind

    @property
    def devices(self) -> int:
        return max(1, self.gpus if self.kind == "cuda" else len(self.trainers))

    @property
    def round_size(self) -> int:
        # Where the next round is there before this one ends, no worker waits for the last of it.
        return self.workers if self.apart else round_of(self.workers)

    def chosen_workers(self) -> WorkerCount:
        config, anchor = self.config, self.config.space.anchor()
        arguments = (self.pool, anchor, self.data_for(anchor), config.proxy, config.seed)
        if self.kind == "cuda":
            rate = worker_count.images_per_second(*arguments)

            def measured(count: int) -> float:
                self.resize(count)
                return rate(count)

            try:
                return worker_count.on_cuda(self.gpus, measured, self.most)
            except CandidateFailed as error:
                raise UsageError(f"{self.flag}: a first training fails ({error})") from error
        memory = sum(node.memory_bytes for node in self.trainers)
        return worker_count.on_cpu(
            self.most, memory, lambda: worker_count.probe(*arguments, config.space.own_resolutions),
            lambda: self.station.timing_seconds() / self.timers,
        )  # fmt: skip

    def train(
        self, archs: Sequence[ArchSpec], seeds: Sequence[int] | None = None, rules: Rules = None
    ) -> Generator[Done[ProxyResult]]:
        # The next round's trainings begin as workers become free of this one's.
        return self.results(archs, seeds, rules)

    def determinism(self) -> str | None:
        # What trains may be of another kind than what measures, or no CUDA device.
        if self.kind == "cpu" or self.config.latency.device == "cpu" or not self.config.proxy.deterministic:
            return None
        return self.station.call(tasks.determinism, cost_of_determinism, self.config)

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        for each in ("station", "pool"):
            if hasattr(self, each):
                getattr(self, each).close()
        disconnect(self.ray)
