"""The nodes of a cluster that measure latencies, each of them one network at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
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
# Times between two looks at the nodes, and at whether a task has ended.
LOOK_SECONDS, POLL_SECONDS = 2.0, 0.5
# Time after which the user is told that a node is still busy with something else.
PATIENCE_SECONDS = 60.0
# Time after which a node that could not tell what it has is asked again.
AGAIN_SECONDS = 60.0
# Time that a cluster takes, at most, to notice that a node is gone.
NOTICE_SECONDS = 20.0
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

    Nodes that join later are taken in.

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
        accepted: the nodes that measure, by id.
        refused: ids of nodes with another device or other versions.
    """

    def __init__(
        self, ray: Any, flag: str, config: LatencyConfig, anchor: ArchSpec, device: DeviceInfo | None, note: Note
    ) -> None:
        self.ray, self.flag, self.config, self.anchor, self.note = ray, flag, config, anchor, note
        self.anchor_ms: float | None = None
        self.wanted = device
        self.accepted: dict[str, Node] = {}
        self.refused: set[str] = set()
        # By node: how many more networks it could measure now.
        self.free: dict[str, int] = {}
        # Nodes that are asked what they have, and when those may be asked again that could not tell.
        self.asked: set[str] = set()
        self.again: dict[str, float] = {}
        self.last_reason = ""
        self.looked = 0.0
        self.closed = False
        self.calls = 0
        self.changed = threading.Condition()
        self.task = ray.remote(tasks.answer)
        with self.changed:
            self._look()
            while self.asked:
                self.changed.wait(POLL_SECONDS)
        if not self.accepted:
            raise UsageError(f"{flag}: {self._nobody()}")
        self.timers = sum(self._slots(node) for node in self.accepted.values())

    @property
    def device(self) -> DeviceInfo:
        assert self.wanted is not None
        return self.wanted

    def _slots(self, node: Node) -> int:
        # On a CPU a measurement takes the whole node.
        return 1 if self.config.device == "cpu" else max(1, min(node.latencies, int(node.gpus)))

    def _nobody(self) -> str:
        if self.last_reason:
            return self.last_reason
        return f"no node offers the resource {LATENCY!r}; ray start --resources='{{\"{LATENCY}\": 1}}' offers it"

    def _look(self) -> None:
        """Forget nodes that are gone, and ask new ones what they have; the caller holds `changed`."""
        self.looked = time.monotonic()
        there = {node.id: node for node in alive(self.ray.nodes()) if node.latencies}
        for gone in self.accepted.keys() - there.keys():
            del self.accepted[gone], self.free[gone]
        for node in there.values():
            known = node.id in self.accepted or node.id in self.refused or node.id in self.asked
            if not known and self.again.get(node.id, 0.0) < self.looked:
                self.asked.add(node.id)
                threading.Thread(target=self._take_in, args=(node,), daemon=True).start()

    def _take_in(self, node: Node) -> None:
        """Ask a node what it has, and accept or refuse it."""
        described = describe(self.ray, node, self.config, cuda=self.config.device != "cpu")
        with self.changed:
            self.asked.discard(node.id)
            if why := self._refusal(described):
                reason = f"{node} does not measure latency ({why})"
                if reason != self.last_reason:
                    self.note(reason)
                self.last_reason = reason
                if isinstance(described, str):
                    self.again[node.id] = time.monotonic() + AGAIN_SECONDS
                else:
                    self.refused.add(node.id)
            else:
                self.accepted[node.id] = node
                self.free[node.id] = self._slots(node)
                self.last_reason = ""
            self.changed.notify_all()

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
            CandidateFailed: the search ends meanwhile.
        """
        begin, told = time.monotonic(), False
        with self.changed:
            while True:
                if self.closed:
                    raise CandidateFailed("the search has ended")
                if time.monotonic() - self.looked > LOOK_SECONDS:
                    self._look()
                for node_id, count in self.free.items():
                    if count:
                        self.free[node_id] -= 1
                        return self.accepted[node_id]
                if self.accepted:
                    begin = time.monotonic()
                elif time.monotonic() - begin > GONE_AFTER_S:
                    raise UsageError(f"{self.flag}: {self._nobody()}")
                elif not told:
                    self.note(f"no node measures latency any more: waiting for up to {GONE_AFTER_S:g} s")
                    told = True
                self.changed.wait(POLL_SECONDS)

    def _give(self, node: Node) -> None:
        with self.changed:
            if node.id in self.free:
                self.free[node.id] += 1
            self.changed.notify_all()

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
        with self.changed:
            self.calls += 1
        try:
            for _ in range(ATTEMPTS):
                node = self._take()
                try:
                    task = self.task.options(**self._options(node))
                    reply: Any = self._wait_for(task.remote(function, args), node)
                except self.ray.exceptions.RayError as error:
                    failure = lost(self.ray, error)
                    if not isinstance(error, self.ray.exceptions.WorkerCrashedError):
                        self._let_go(node)
                    continue
                finally:
                    self._give(node)
                if isinstance(reply, tasks.RESULTS):
                    raise reply
                result: Result = reply
                return result
            raise failure
        finally:
            with self.changed:
                self.calls -= 1
                self.changed.notify_all()

    def _let_go(self, node: Node) -> None:
        """Wait until the cluster has noticed that a node is gone, or it turns out that it is not."""
        begin = time.monotonic()
        while time.monotonic() - begin < NOTICE_SECONDS and not self.closed:
            with self.changed:
                self._look()
                if node.id not in self.accepted:
                    return
            time.sleep(POLL_SECONDS)

    def _wait_for(self, reference: Any, node: Node) -> Any:
        begin, told = time.monotonic(), False
        while not self.ray.wait([reference], timeout=POLL_SECONDS)[0]:
            if self.closed:
                self.ray.cancel(reference, force=True)
                raise CandidateFailed("the search has ended")
            if time.monotonic() - begin > PATIENCE_SECONDS and not told:
                self.note(f"waiting for {node}, which measures latency")
                told = True
        return self.ray.get(reference)

    def _measure(self, method: str, *args: object) -> Any:
        return self.call(tasks.measure, self.config, self.anchor, self.anchor_ms, method, args)

    def anchor_latency(self, references_ms: Sequence[float]) -> ShapeLatency:
        """See `Station.anchor_latency`; so for the methods below."""
        result: ShapeLatency = self._measure("anchor_latency", references_ms)
        return result

    def foresee(self, archs: Sequence[ArchSpec]) -> None:
        """Each node compiles what it measures, when it measures it."""

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
        """Give up all measurements, also those that another thread waits for; the nodes release their devices when this
        process's connection ends."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
            self.changed.wait_for(lambda: not self.calls, timeout=10 * POLL_SECONDS)


def describe(ray: Any, node: Node, config: LatencyConfig | None, cuda: bool) -> tasks.Described | str:
    """What a node has, or why it cannot tell: a package may be missing there, or the deployment does not run.

    Args:
        config: the deployment, where latencies are to be measured there.
        cuda: whether it is asked about its CUDA devices, too.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    strategy = NodeAffinitySchedulingStrategy(node_id=node.id, soft=False)
    task = ray.remote(tasks.answer).options(
        num_cpus=0, num_gpus=0.01 if cuda else 0, scheduling_strategy=strategy, max_retries=0
    )
    try:
        reference = task.remote(tasks.describe, (config,))
        reply = ray.get(reference, timeout=DESCRIBE_SECONDS)
    except ray.exceptions.GetTimeoutError:
        ray.cancel(reference, force=True)
        return f"it has not answered within {DESCRIBE_SECONDS:g} s"
    except ray.exceptions.RayTaskError as error:
        return message_line(error.cause) if error.cause is not None else str(error).strip().splitlines()[-1]
    except Exception as error:
        # The node may be gone, or this process's connection.
        return message_line(error)
    if isinstance(reply, Exception):
        return str(reply)
    described: tasks.Described = reply
    return described
