"""The nodes of a cluster that measure latencies, each of them one network at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, TypeVar

from kernels.device_info import DeviceInfo
from nas.cluster import tasks
from nas.cluster.nodes import LATENCY, Node, alive
from nas.cluster.pool import lost
from nas.config import LatencyConfig
from nas.errors import CandidateFailed, UsageError, message_line
from nas.latency.device_profile import DeviceProfile
from nas.latency.values import Measurement, ShapeLatency
from nas.reporting import Note
from nas.versions import versions
from search_spaces import ArchSpec

Result = TypeVar("Result")

# Time within which a node has to describe itself: torch is imported, and Ray may install the code first.
DESCRIBE_SECONDS = 180.0
# Time for which a search waits for a node that measures, when none is left.
GONE_AFTER_S = 300.0
LOOK_SECONDS = 2.0
# Time after which the user is told that a node is still busy with something else.
PATIENCE_SECONDS = 30.0
# Attempts at a measurement whose node or process is lost.
ATTEMPTS = 2
MEASURING_PACKAGES = ("torch", "triton")


def different_versions(described: tasks.Described, packages: Sequence[str]) -> str:
    """The packages of which a node has another version than this process, in words; empty where there are none."""
    here, there = versions(), described.versions
    return "; ".join(
        f"{name}: this process has {here[name]}, the node {there[name]}"
        for name in packages
        if here[name] != there[name]
    )


class Stations:
    """Measures latencies on the nodes that offer the resource `latency`, and that have the right device.

    Args:
        ray: the module, connected to the cluster.
        flag: the flag and value by which the user asked for the cluster.
        config: the deployment.
        anchor: the anchor network.
        device: the device of the study's latencies; None takes that of the first node.
        note: function that receives a line for the user.

    Raises:
        UsageError: no node can measure.

    Attributes:
        device: the device of all of them.
        refused: ids of nodes with another device.
    """

    def __init__(
        self, ray: Any, flag: str, config: LatencyConfig, anchor: ArchSpec, device: DeviceInfo | None, note: Note
    ) -> None:
        self.ray, self.flag, self.config, self.anchor, self.note = ray, flag, config, anchor, note
        self.anchor_ms: float | None = None
        self.refused: set[str] = set()
        self.accepted: dict[str, Node] = {}
        # By node: how many more networks it could measure now.
        self.free: dict[str, int] = {}
        self.changed = threading.Condition()
        self.wanted = device
        self.last_reason = ""
        with self.changed:
            self._look()
        if not self.accepted:
            raise UsageError(f"{flag}: {self._nobody()}")

    @property
    def device(self) -> DeviceInfo:
        assert self.wanted is not None
        return self.wanted

    @property
    def timers(self) -> int:
        """Number of networks that are measured at once."""
        with self.changed:
            return max(1, sum(self._slots(node) for node in self.accepted.values()))

    def _slots(self, node: Node) -> int:
        # On a CPU a measurement takes the whole node.
        return 1 if self.config.device == "cpu" else max(1, min(node.latencies, int(node.gpus)))

    def _nobody(self) -> str:
        if self.last_reason:
            return self.last_reason
        return f"no node offers the resource {LATENCY!r}; ray start --resources='{{\"{LATENCY}\": 1}}' offers it"

    def _look(self) -> None:
        """Take in nodes that have joined, and forget those that are gone."""
        there = {node.id: node for node in alive(self.ray.nodes()) if node.latencies}
        for gone in self.accepted.keys() - there.keys():
            del self.accepted[gone], self.free[gone]
        new = [node for node in there.values() if node.id not in self.accepted and node.id not in self.refused]
        if not new:
            return
        with ThreadPoolExecutor(len(new)) as threads:
            found = list(threads.map(self._described, new))
        for node, described in zip(new, found, strict=True):
            if why := self._refusal(described):
                self.last_reason = f"{node} does not measure latency ({why})"
                self.note(self.last_reason)
                self.refused.add(node.id)
            else:
                self.accepted[node.id] = node
                self.free[node.id] = self._slots(node)

    def _described(self, node: Node) -> tasks.Described | str:
        return describe(self.ray, node, self.config, cuda=self.config.device != "cpu")

    def _refusal(self, described: tasks.Described | str) -> str:
        """The reason why a node cannot measure; empty where it can. The first that can decides on the device."""
        if isinstance(described, str):
            return described
        if why := different_versions(described, MEASURING_PACKAGES):
            return why
        device = DeviceInfo(**described.device or {})
        self.wanted = self.wanted or device
        ours, its = asdict(self.wanted), asdict(device)
        return "; ".join(f"{name}: study has {ours[name]}, now {its[name]}" for name in ours if ours[name] != its[name])

    def _take(self) -> Node:
        """A node that is free, which is marked as busy.

        Raises:
            UsageError: there has been none for minutes.
        """
        begin, told = time.monotonic(), False
        with self.changed:
            while True:
                for node_id, count in self.free.items():
                    if count:
                        self.free[node_id] -= 1
                        return self.accepted[node_id]
                if self.accepted:
                    self.changed.wait(LOOK_SECONDS)
                self._look()
                if self.accepted:
                    begin = time.monotonic()
                    continue
                if time.monotonic() - begin > GONE_AFTER_S:
                    raise UsageError(f"{self.flag}: {self._nobody()}")
                if not told:
                    self.note(f"no node measures latency any more: waiting for up to {GONE_AFTER_S:g} s")
                    told = True
                self.changed.wait(LOOK_SECONDS)

    def _give(self, node: Node) -> None:
        with self.changed:
            if node.id in self.free:
                self.free[node.id] += 1
            self.changed.notify()

    def _options(self, node: Node) -> dict[str, Any]:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        asked = {"num_cpus": node.cpus} if self.config.device == "cpu" else {"num_cpus": 0, "num_gpus": 1}
        strategy = NodeAffinitySchedulingStrategy(node_id=node.id, soft=False)
        return asked | {"resources": {LATENCY: 1}, "scheduling_strategy": strategy, "max_retries": 0}

    def call(self, function: Callable[..., Result], *args: object) -> Result:
        """Call a function on a node that measures, where nothing else runs meanwhile.

        Raises:
            CandidateFailed: the function raised it, or its process or node was lost, and so was another.
            UsageError: the function raised it, or no node is left.
        """
        failure = CandidateFailed("its measurement was lost")
        for _ in range(ATTEMPTS):
            node = self._take()
            try:
                task = self.ray.remote(tasks.answer).options(**self._options(node))
                reply: Any = self._wait_for(task.remote(function, args), node)
            except self.ray.exceptions.RayError as error:
                failure = lost(self.ray, error)
                with self.changed:
                    self._look()
                continue
            finally:
                self._give(node)
            if isinstance(reply, tasks.RESULTS):
                raise reply
            result: Result = reply
            return result
        raise failure

    def _wait_for(self, reference: Any, node: Node) -> Any:
        ready, _ = self.ray.wait([reference], timeout=PATIENCE_SECONDS)
        if not ready:
            self.note(f"waiting for {node}, which measures latency and is busy")
        return self.ray.get(reference)

    def _measure(self, method: str, *args: object) -> Any:
        return self.call(tasks.measure, self.config, self.anchor, self.anchor_ms, method, args)

    def anchor_latency(self, references_ms: Sequence[float]) -> ShapeLatency:
        """See `Station.anchor_latency`; so for the methods below."""
        result: ShapeLatency = self._measure("anchor_latency", references_ms)
        return result

    def start(self, anchor_ms: float) -> None:
        self.anchor_ms = anchor_ms
        # All that the next measurement needs is made on one node; the others follow when they are called.
        self.timing_seconds()

    def measure_together(self, archs: Sequence[ArchSpec]) -> list[Measurement]:
        result: list[Measurement] = self._measure("measure_together", archs)
        return result

    def measure_blocks(
        self, archs: Sequence[ArchSpec], known: Mapping[str, float], references_ms: Sequence[float]
    ) -> list[ShapeLatency]:
        result: list[ShapeLatency] = self._measure("measure_blocks", archs, known, references_ms)
        return result

    def profile(self) -> DeviceProfile:
        result: DeviceProfile = self._measure("profile")
        return result

    def timing_seconds(self) -> float:
        result: float = self._measure("timing_seconds")
        return result

    def close(self) -> None:
        """The nodes release their devices when this process's connection ends."""


def describe(ray: Any, node: Node, config: LatencyConfig | None, cuda: bool) -> tasks.Described | str:
    """What a node has, or why it cannot tell: a package may be missing there, or the deployment does not run.

    Args:
        config: the deployment, where latencies are to be measured there.
        cuda: whether it is asked about its CUDA devices, too.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    strategy = NodeAffinitySchedulingStrategy(node_id=node.id, soft=False)
    # Ray hides the devices of a node from a task that takes nothing of them.
    task = ray.remote(tasks.answer).options(
        num_cpus=0, num_gpus=0.01 if cuda else 0, scheduling_strategy=strategy, max_retries=0
    )
    reference = task.remote(tasks.describe, (config,))
    try:
        reply = ray.get(reference, timeout=DESCRIBE_SECONDS)
    except ray.exceptions.GetTimeoutError:
        ray.cancel(reference, force=True)
        return f"it has not answered within {DESCRIBE_SECONDS:g} s"
    except ray.exceptions.RayTaskError as error:
        return message_line(error.cause) if error.cause is not None else str(error).strip().splitlines()[-1]
    except ray.exceptions.RayError as error:
        return message_line(error)
    if isinstance(reply, Exception):
        return str(reply)
    described: tasks.Described = reply
    return described
