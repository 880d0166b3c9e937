"""Meters that take architectures: in this process, or in a child process.

TorchScript keeps every network it has traced for as long as the process lives, some 6 MB each: a study of 200 would end
with more than a gigabyte of them. And a fused kernel that reads where it may not, that never returns, or that ends its
process must not end the search. The meter of such engines therefore lives in a child process, which is replaced every
so often, and when it dies.
"""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

import torch

from kernels import attempts
from nas.child_process import ChildProcess, sign_of_life
from nas.config import LatencyConfig
from nas.errors import CandidateFailed, OutOfMemory, WorkerDied, contained, memory_may_run_out
from nas.latency.block_meter import BlockMeter
from nas.latency.engines import examine, is_isolated
from nas.latency.meter import LatencyMeter
from nas.latency.values import Measurement, ShapeLatency
from search_spaces import ArchSpec

# Candidates that one child measures: starting another costs some 5 seconds, keeping it 6 MB a candidate.
LIFETIME = 50
# A network's parts, each traced four times over, weigh as much as so many networks.
PARTS_WEIGHT = 4
# Seconds without a sign of life after which a child that runs fused kernels is given up. It gives one after each kernel
# that it compiles or times, and between the samples of a network, all of which take a few seconds.
DEADLINE_S = 60.0
# The same while it starts, imports torch and takes the GPU.
STARTING_S = 300.0
# Child processes that may die in one measurement, each of which costs a tiling.
MOST_DEATHS = 8

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
    made: type[LocalMeter | IsolatedMeter] = IsolatedMeter if is_isolated(config) else LocalMeter
    return made(config, anchor, reference_ms)


def anchor_latency(config: LatencyConfig, anchor: ArchSpec, references_ms: Sequence[float]) -> ShapeLatency:
    """Measure the anchor network's latency, on the scale of the yardsticks' references.

    Raises:
        CandidateFailed: the engine cannot run it.
    """
    if not runs_fused_kernels(config):
        return _anchor_latency(config, anchor, references_ms)
    with Apart(config) as apart:
        return apart.call([anchor], _anchor_latency, config, anchor, references_ms)


def _anchor_latency(config: LatencyConfig, anchor: ArchSpec, references_ms: Sequence[float]) -> ShapeLatency:
    return BlockMeter(config, references_ms).measure_anchor(anchor)


def runs_fused_kernels(config: LatencyConfig) -> bool:
    """Whether a deployment runs fused kernels on a GPU, where they may fault."""
    return config.engine == "fused" and torch.device(config.device).type == "cuda"


class Apart:
    """A child process that measures in one deployment; a context manager, whose end is the child's.

    Where fused kernels kill it or hang, another child goes on: what was running is known by its record
    (`kernels.attempts`) and not tried again. Where nothing is known, because the kernels of a whole network ran, each
    of them is examined alone.
    """

    def __init__(self, config: LatencyConfig) -> None:
        self.config = config
        self.survives = runs_fused_kernels(config)
        self.child = ChildProcess()

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def call(self, archs: Sequence[ArchSpec], function: Callable[..., Result], *args: object) -> Result:
        """The result of a module's function, called in the child.

        Args:
            archs: the networks whose kernels it runs.

        Raises:
            CandidateFailed: the function raised it, or child after child died of it.
        """
        death: WorkerDied | None = None
        for _ in range(MOST_DEATHS):
            left = attempts.count_left()
            try:
                return self._ask(function, *args)
            except OutOfMemory:
                raise
            except WorkerDied as error:
                if not self.survives or (attempts.count_left() == left and not self._finds_fault(archs, death)):
                    raise
                death = error
        assert death is not None
        raise death

    def _finds_fault(self, archs: Sequence[ArchSpec], death: WorkerDied | None) -> bool:
        """Whether another attempt is worth it, after a child died and no record says of what.

        A first time it is in any case, as what does not always fault may not be found.
        """
        left = attempts.count_left()
        try:
            self._ask(_examine, archs, self.config)
        except WorkerDied:
            return attempts.count_left() > left
        return death is None

    def close(self) -> None:
        """End the child process; the next call starts another."""
        self.child.close()
        # It was ended on purpose, and not by what it was launching.
        self._forgive()

    def _forgive(self) -> None:
        if token := self.child.environment.get(attempts.TOKEN):
            attempts.forgive(token)

    def _ask(self, function: Callable[..., Result], *args: object) -> Result:
        try:
            if self.survives and self.child.process is None:
                self.child.environment[attempts.TOKEN] = uuid.uuid4().hex
                self.child.deadline_s = STARTING_S
                self.child.call(_contained, _awake, self.config)
                self.child.deadline_s = DEADLINE_S
            return self.child.call(_contained, function, *args)
        except WorkerDied:
            # What it left stays.
            self.child.environment.pop(attempts.TOKEN, None)
            raise
        except Exception:
            raise
        except BaseException:
            # An interrupt, after which the call has ended the child.
            self._forgive()
            raise


def _contained(function: Callable[..., Result], *args: object) -> Result:
    with contained():
        return function(*args)


def _awake(config: LatencyConfig) -> None:
    """Do in a new child what takes long and is silent: imports, the use of the GPU, and what Triton builds for it."""
    from kernels import compiling

    importlib.import_module("kernels.network")
    torch.zeros(1, device=config.device)
    with torch.cuda.device(torch.device(config.device)):
        compiling.prepare_driver()


def _examine(archs: Sequence[ArchSpec], config: LatencyConfig) -> None:
    for arch in archs:
        examine(arch.build(config.num_classes), config, arch.shown(config.resolution), sign_of_life)


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
        self.apart = Apart(config)
        self.measured = 0
        try:
            # The first child measures the reference if need be, and later ones are given it.
            self.reference_ms: float = self.apart.call([anchor], _make_meter, config, anchor, reference_ms)
        except BaseException:
            self.close()
            raise

    @property
    def child(self) -> ChildProcess:
        return self.apart.child

    def measure_together(self, archs: Sequence[ArchSpec]) -> list[Measurement]:
        measurements = self._call([*archs, self.anchor], LocalMeter.measure_together, archs)
        self._count(len(archs))
        return measurements

    def measure_blocks(
        self, archs: Sequence[ArchSpec], known: Mapping[str, float], references_ms: Sequence[float]
    ) -> list[ShapeLatency]:
        latencies = self._call([*archs, self.anchor], LocalMeter.measure_blocks, archs, known, references_ms)
        # Each part was traced, and is held as long as the child lives; together they are some four networks.
        self._count(PARTS_WEIGHT * len(archs) if latencies else 0)
        return latencies

    def close(self) -> None:
        """End the child process; the next measurement starts another."""
        self.apart.close()

    def _call(self, archs: Sequence[ArchSpec], method: Callable[..., Result], *args: object) -> Result:
        """Call a method of the child's meter; a new child makes the meter first."""
        if self.child.process is None:
            self.measured = 0
        try:
            result: Result = self.apart.call(
                archs, _call_meter, self.config, self.anchor, self.reference_ms, method, *args
            )
        except CandidateFailed:
            self._count(1)
            raise
        return result

    def _count(self, measured: int) -> None:
        self.measured += measured
        if self.measured >= LIFETIME:
            self.close()


# The meter of this process, if it is such a child.
_meter: LocalMeter | None = None


def _make_meter(config: LatencyConfig, anchor: ArchSpec, reference_ms: float | None) -> float:
    global _meter
    _meter = _meter or LocalMeter(config, anchor, reference_ms)
    return _meter.reference_ms


def _call_meter(
    config: LatencyConfig, anchor: ArchSpec, reference_ms: float, method: Callable[..., Result], *args: object
) -> Result:
    _make_meter(config, anchor, reference_ms)
    result: Result = method(_meter, *args)
    return result
