"""Measurement of blocks and layers alone.

A part is measured in calls that run it R times over, on as many inputs, and take T; c is what a call costs besides what
it runs, such as the launch of a CUDA graph. Then

    t_i = (T_i - c) / R         of a part on CUDA, where c is a launch, and in ONNX Runtime
    t_i = T_i / R               of a part in torch on a CPU, and in OpenVINO
    t   = c + sum(t_i)          of a network of such parts

with c = T - (T_R - T) / (R - 1) of one block that runs once in a call, and R times. (An empty call would cost too
little: on a CPU torch's first grouped convolution of a call costs some 30 us more than those after it.) Of torch's
engines on a CPU, c is above all the price of code and data that are not in the caches yet. In a network every part pays
it, and of R repeats the first one does: there c / R is left in.

Parts run as they do within a network: in ONNX Runtime in the layout that the network has there, on an input that is in
the cache, with weights that need not be (`nas.latency.onnx_parts`).

Everything is measured in turns with the device's yardsticks (`nas.latency.yardsticks`), so that parts of different days
add up (`nas.latency.block_table`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from nas.config import LatencyConfig
from nas.errors import memory_may_run_out
from nas.latency.engines import Repeated, deploy
from nas.latency.meter import cpu_threads
from nas.latency.onnx_parts import bound_part
from nas.latency.parts import (
    CALL,
    CALL_ID,
    WITHIN_NETWORKS,
    Part,
    arch_modules,
    arch_parts,
    network_shape,
    prepared,
    shape_id,
)
from nas.latency.values import Latency, ShapeLatency
from nas.latency.yardsticks import YARDSTICK_CLASSES, YARDSTICK_RESOLUTION, Timed, Yardsticks
from search_spaces import ArchSpec, cost, load_space

# Parts that are sampled in turns: with more of them the yardsticks take a smaller share of the time, fewer end sooner.
GROUP = 6
# R above. On CUDA a launch is a large part of a small block's call, and what is left of it must not matter.
REPEATS = {"cpu": 4, "cuda": 16}
# The block of the yardstick network from which it is known what a call costs.
REFERENCE_BLOCK = "stage2.1"


@dataclass(frozen=True)
class _Made:
    """A call to time: the shape of what it runs, how often it runs that, and whether a call's cost is subtracted."""

    shape: str
    timed: Timed
    runs: int = 1
    less_call: bool = False


class BlockMeter:
    """Meter of parts of networks, and of whole networks, in one deployment.

    Args:
        config: the deployment.
        references_ms: the yardsticks' latencies in the device's profile; None measures them now.
    """

    def __init__(self, config: LatencyConfig, references_ms: Sequence[float] | None = None) -> None:
        self.config = config
        self.yardsticks = Yardsticks(config, references_ms)
        self.kind = torch.device(config.device).type
        self.repeats = REPEATS[self.kind]

    def measure_archs(
        self, archs: Iterable[ArchSpec], known: Mapping[str, float], whole: Iterable[ArchSpec] = ()
    ) -> list[ShapeLatency]:
        """Measure the shapes that are not known yet and are needed to add up these architectures.

        Args:
            archs: the architectures whose parts are measured.
            known: the latencies in ms of what needs no measuring, by `shape_id`.
            whole: the architectures that are measured as networks, too.

        Raises:
            CandidateFailed: the engine cannot compile one.
        """
        with cpu_threads(self.config.threads):
            found = self._call(known)
            call_ms = self._call_ms(known, found)
            seen = {*known, *(shape_id(each.shape) for each in found)}
            for arch in archs:
                lacking = {p.shape_id: p for p in arch_parts(arch, self.config) if p.shape_id not in seen}
                if lacking:
                    modules = arch_modules(arch, self.config)
                    makers = [partial(self._part, part, modules[part.block.name]) for part in lacking.values()]
                    found += self._time(makers, call_ms)
                    seen |= lacking.keys()
            for arch in whole:
                shape = network_shape(str(arch), self.config)
                if shape_id(shape) not in seen:
                    found += self._time([partial(self._arch, shape, arch)], call_ms)
                    seen.add(shape_id(shape))
        return found

    def measure_layers(
        self, layers: Iterable[tuple[Part, nn.Module]], known: Mapping[str, float]
    ) -> list[ShapeLatency]:
        """Measure the deployed layers that are not known yet."""
        with cpu_threads(self.config.threads):
            found = self._call(known)
            lacking = {part.shape_id: (part, module) for part, module in layers if part.shape_id not in known}
            makers = [partial(self._part, part, module) for part, module in lacking.values()]
            return found + self._time(makers, self._call_ms(known, found))

    def measure_network(self, name: str, network: nn.Module, macs: int) -> ShapeLatency:
        """Measure a network of any kind as a whole, on images of the deployment's resolution.

        Args:
            name: a timm model's name.
            macs: multiply-accumulates of a batch.

        Raises:
            CandidateFailed: the engine cannot compile it, or memory runs out.
        """
        shape = network_shape(name, self.config)
        return self._whole(partial(self._network, shape, network, macs, self.config.resolution))

    def measure_anchor(self, anchor: ArchSpec) -> ShapeLatency:
        """Measure the network whose latency is the reference of a study's latencies.

        Raises:
            CandidateFailed: the engine cannot compile it, or memory runs out.
        """
        return self._whole(partial(self._arch, network_shape(str(anchor), self.config), anchor), reference=True)

    def _whole(self, make: Callable[[], _Made], reference: bool = False) -> ShapeLatency:
        with cpu_threads(self.config.threads), memory_may_run_out():
            (measured,) = self._time([make], 0.0, reference)
        return measured

    def _macs(self, arch: ArchSpec) -> int:
        return self.config.batch_size * cost(arch, self.config.resolution, self.config.num_classes).macs

    def _call(self, known: Mapping[str, float]) -> list[ShapeLatency]:
        """Measure what a call costs, unless that is known."""
        if CALL_ID in known:
            return []
        block, part = self._reference_block()
        makers = [partial(self._part, part, block, repeats, False) for repeats in (1, self.repeats)]
        one, many = (measured.latency for measured in self._time(makers, 0.0))
        # The latency of `many` is that of one run of its call. The call's is a difference: its interval is as wide as
        # both together.
        factor = self.repeats / (self.repeats - 1)
        call_ms = max((one.median_ms - many.median_ms) * factor, 0.0)
        wide_ms = factor * (one.interval_share * one.median_ms + many.interval_share * many.median_ms)
        return [ShapeLatency(CALL, Latency(
            call_ms, call_ms, call_ms, one.repeats, wide_ms / call_ms if call_ms else 0.0, one.capped or many.capped,
            one.throttled or many.throttled,
        ))]  # fmt: skip

    def _call_ms(self, known: Mapping[str, float], found: Sequence[ShapeLatency]) -> float:
        return next((each.latency.median_ms for each in found if each.shape == CALL), known.get(CALL_ID, 0.0))

    def _reference_block(self) -> tuple[nn.Module, Part]:
        """A block of the yardstick as this engine runs it."""
        config = replace(self.config, resolution=YARDSTICK_RESOLUTION, num_classes=YARDSTICK_CLASSES)
        anchor = load_space("small").anchor()
        part = next(part for part in arch_parts(anchor, config) if part.block.name == REFERENCE_BLOCK)
        return arch_modules(anchor, config)[REFERENCE_BLOCK], part

    def _part(self, part: Part, module: nn.Module, repeats: int | None = None, less_call: bool = True) -> _Made:
        """Make calls of a part, each of which runs it several times over."""
        repeats = repeats or self.repeats
        forwards = self._within_network(part, module, repeats) or self._alone(part, module, repeats)
        less_call = less_call and (self.kind == "cuda" or self.config.engine in WITHIN_NETWORKS)
        return _Made(part.shape, Timed(forwards, repeats * part.block.macs), repeats, less_call)

    def _within_network(self, part: Part, module: nn.Module, repeats: int) -> list[Callable[[], object]]:
        """Calls of a part that run it as the engine runs it within a network; none where it runs as it does alone."""
        # A linear layer's features are last: no convolution takes or gives them.
        if self.config.engine not in WITHIN_NETWORKS or part.block.kind == "linear":
            return []
        bound = bound_part(module, part.input_shape, repeats, self.config.threads)
        return [] if bound is None else [bound]

    def _alone(self, part: Part, module: nn.Module, repeats: int) -> list[Callable[[], object]]:
        """Calls of a part alone, on inputs of its own."""
        meter = self.yardsticks.meter
        x = torch.stack([each.contiguous() for each in meter.random_inputs(part.input_shape, repeats)])
        if len(part.input_shape) == 4 and part.block.kind != "linear":
            # Stacking makes a new tensor, whose parts must be channels_last again. A linear layer's are last already.
            x = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
        return meter.forwards(prepared(Repeated(module), x, self.config), [x])

    def _arch(self, shape: str, arch: ArchSpec) -> _Made:
        size = arch.shown(self.config.resolution)
        return self._network(shape, arch.build(self.config.num_classes), self._macs(arch), size)

    def _network(self, shape: str, network: nn.Module, macs: int, size: int) -> _Made:
        meter = self.yardsticks.meter
        inputs = meter.random_inputs((self.config.batch_size, 3, size, size))
        return _Made(shape, Timed(meter.forwards(deploy(network, self.config, inputs[0]), inputs), macs))

    def _time(
        self, makers: Sequence[Callable[[], _Made]], call_ms: float, reference: bool = False
    ) -> list[ShapeLatency]:
        """Time the calls that functions make; only a group of them is in memory at a time."""
        found: list[ShapeLatency] = []
        for begin in range(0, len(makers), GROUP):
            group = [make() for make in makers[begin : begin + GROUP]]
            latencies = self.yardsticks.time([each.timed for each in group], reference)
            for made, latency in zip(group, latencies, strict=True):
                of_a_run = latency.less(call_ms if made.less_call else 0.0).scaled(1 / made.runs)
                found.append(ShapeLatency(made.shape, of_a_run))
        return found
