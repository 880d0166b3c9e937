"""Latencies of blocks and layers measured alone, and what they add up to.

A part is measured in calls that run it R times over, on as many inputs, and take T; c is what a call costs beside what
is in it, the launch of a CUDA graph, say. Then

    t_i = (T_i - c) / R         of a part on CUDA, where c is a launch
    t_i = T_i / R               of a part on a CPU
    t   = c + sum(t_i)          of a network of such parts

with c = T - (T_R - T) / (R - 1) of one block that is called once in a call, and R times. (Calling nothing would tell
too little: on a CPU the first grouped convolution of a call costs some 30 us more than those after it.) On a CPU c is
above all the price of coming to code and data that are not at hand, which in a network every part pays, and of R
repeats the first: there c / R is left in.

Everything here is measured in turns with two fixed yardsticks, a network of many small layers and a product, and
corrected by them to the day when they were first measured. So figures of different days add up, also to those of a
large product and a large copy, which are the device's limits here. A busy machine slows the one yardstick down more
than the other: what would be computed at the product's rate in a share e of the time is corrected by e parts of the
product and 1 - e of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from kernels.benchmark_machine import COPY_BYTES, PRODUCT_SIDE, tensor_float32
from kernels.timing import DeviceInfo
from nas.config import LatencyConfig
from nas.efficiency import Machine
from nas.engines import deploy
from nas.latency import ANCHOR_FACTOR, LatencyMeter, in_turn, threads
from nas.parts import (
    CALL,
    COPY,
    PRODUCT,
    YARDSTICKS,
    Part,
    arch_modules,
    arch_parts,
    canonical,
    itemsize,
    prepared,
    shape_id,
)
from search_spaces import ArchSpec, load_space
from studies import BlockLatency, Store

# Parts that are sampled in turns: more share the yardstick's time, fewer end sooner.
GROUP = 6
# Share of a network's time cap that each part of a group has.
CAP_FACTOR = 0.5
# A sample of a group of parts is shorter than a network's, so that more fit in the time.
MIN_SAMPLE_SECONDS = 1e-3
# R above.
REPEATS = 4
# Yardsticks measure the machine and not the engine: they serve all, also those that take no ConvFirst network.
YARDSTICK_ENGINE, YARDSTICK_RESOLUTION, YARDSTICK_CLASSES = "eager", 32, 10
# Large enough that a CUDA graph's launch is a small part of it.
YARDSTICK_SIDE = {"cpu": 384, "cuda": 4096}
# Rows that no engine has a say in.
SHARED = (*YARDSTICKS, PRODUCT, COPY)
# Of the yardstick's blocks the one that tells what a call costs.
REFERENCE_BLOCK = "stage2.1"


@dataclass(frozen=True, slots=True)
class Figure:
    """The latency of a call of what has this shape, corrected by a yardstick; fields as `nas.latency.Latency`'s.

    A call runs a network once and a part `REPEATS` times.
    """

    shape: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    repeats: int
    interval_share: float
    capped: bool


@dataclass(frozen=True)
class _Timed:
    """What is timed: its shape, calls to make in turn, and the MACs of each."""

    shape: str
    forwards: list[Callable[[], object]]
    macs: int


class _Repeated(nn.Module):
    """Runs a module on each of several inputs, (repeats, N, ...); all outputs are wanted, lest some be left out."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.module(each) for each in x.unbind(0)]


class _Product(nn.Module):
    """A square product."""

    def __init__(self, right: Tensor) -> None:
        super().__init__()
        self.right = right
        self.out = torch.empty_like(right)

    def forward(self, left: Tensor) -> Tensor:
        return torch.matmul(left, self.right, out=self.out)


class _Copy(nn.Module):
    """A copy into memory of its own."""

    def __init__(self, source: Tensor) -> None:
        super().__init__()
        self.target = torch.empty_like(source)

    def forward(self, x: Tensor) -> Tensor:
        return self.target.copy_(x)


def network_shape(name: str, config: LatencyConfig) -> str:
    """The shape of a whole network, an architecture's line or a timm model's name."""
    return canonical(kind="network", name=name, size=config.resolution, classes=config.num_classes)


class BlockMeter:
    """Measures parts of networks, and networks, in one deployment.

    Args:
        config: the deployment.
        references_ms: the yardsticks' latencies in the table; None measures them now.
    """

    def __init__(self, config: LatencyConfig, references_ms: Sequence[float] | None = None) -> None:
        self.config = config
        own = replace(
            config, engine=YARDSTICK_ENGINE, resolution=YARDSTICK_RESOLUTION, num_classes=YARDSTICK_CLASSES
        )  # fmt: skip
        # Its own correction is not used.
        self.meter = LatencyMeter(own, load_space("small").anchor().build(YARDSTICK_CLASSES), reference_ms=1.0)
        with threads(config.threads):
            self.yardsticks = [self.meter.anchor_run, in_turn(self._product(self.yardstick_side))]
            if references_ms is None:
                sampled, _ = self.meter.sample(
                    self.yardsticks, lambda seconds: list(seconds.T), ANCHOR_FACTOR, reference=True
                )
                references_ms = (1e3 * np.median(sampled.seconds, axis=0)).tolist()
        self.references_ms = tuple(references_ms)

    @property
    def yardstick_side(self) -> int:
        return YARDSTICK_SIDE[self.meter.device.type]

    def _product(self, side: int) -> list[Callable[[], object]]:
        left, right = self.meter.random_inputs((side, side), 2)
        with tensor_float32():
            return self.meter.forwards(_Product(right), [left])

    def measure_archs(
        self, archs: Iterable[ArchSpec], known: Collection[str], whole: Iterable[ArchSpec] = ()
    ) -> list[Figure]:
        """What the table lacks to add up these architectures.

        Args:
            archs: those whose parts are wanted.
            known: ids of shapes that need no measuring.
            whole: those that are wanted as networks, too.

        Raises:
            CandidateFailed: the engine cannot compile one.
        """
        with threads(self.config.threads):
            found = self._basics(known)
            seen = {*known, *(shape_id(figure.shape) for figure in found)}
            for arch in archs:
                lacking = {p.shape_id: p for p in arch_parts(arch, self.config) if p.shape_id not in seen}
                if lacking:
                    modules = arch_modules(arch, self.config)
                    found += self._time([partial(self._part, p, modules[p.block.name]) for p in lacking.values()])
                    seen |= lacking.keys()
            for arch in whole:
                shape = network_shape(str(arch), self.config)
                if shape_id(shape) not in seen:
                    macs = sum(part.block.macs for part in arch_parts(arch, self.config))
                    network = arch.build(self.config.num_classes)
                    found += self._time([partial(self._network, shape, network, macs)])
                    seen.add(shape_id(shape))
        return found

    def measure_layers(self, layers: Iterable[tuple[Part, nn.Module]], known: Collection[str]) -> list[Figure]:
        """What the table lacks of deployed layers."""
        with threads(self.config.threads):
            found = self._basics(known)
            lacking = {part.shape_id: (part, module) for part, module in layers if part.shape_id not in known}
            return found + self._time([partial(self._part, part, module) for part, module in lacking.values()])

    def measure_network(self, name: str, network: nn.Module, macs: int, known: Collection[str]) -> list[Figure]:
        """A network of whatever kind and so many MACs, under this name."""
        shape = network_shape(name, self.config)
        with threads(self.config.threads):
            return self._basics(known) + self._time([partial(self._network, shape, network, macs)])

    def _basics(self, known: Collection[str]) -> list[Figure]:
        found = []
        if not {shape_id(shape) for shape in YARDSTICKS} <= {*known}:
            found = [
                Figure(shape, ms, ms, ms, 1, 0.0, False)
                for shape, ms in zip(YARDSTICKS, self.references_ms, strict=True)
            ]
        if not {shape_id(PRODUCT), shape_id(COPY)} <= {*known}:
            side = PRODUCT_SIDE[self.meter.device.type]
            found += self._time([lambda: _Timed(PRODUCT, self._product(side), side**3), self._copy])
        if shape_id(CALL) not in known:
            block, part = self._reference_block()
            one, many = self._time([partial(self._part, part, block, repeats) for repeats in (1, REPEATS)])
            call_ms = max(one.median_ms - (many.median_ms - one.median_ms) / (REPEATS - 1), 0.0)
            found.append(replace(one, shape=CALL, median_ms=call_ms, p20_ms=call_ms, p80_ms=call_ms))
        return found

    def _reference_block(self) -> tuple[nn.Module, Part]:
        """A block of the yardstick as this engine runs it."""
        config = replace(self.config, resolution=YARDSTICK_RESOLUTION, num_classes=YARDSTICK_CLASSES)
        anchor = load_space("small").anchor()
        part = next(part for part in arch_parts(anchor, config) if part.block.name == REFERENCE_BLOCK)
        return arch_modules(anchor, config)[REFERENCE_BLOCK], part

    def _part(self, part: Part, module: nn.Module, repeats: int = REPEATS) -> _Timed:
        """Calls of a part, each of which runs it `repeats` times over."""
        x = torch.stack([each.contiguous() for each in self.meter.random_inputs(part.input_shape, repeats)])
        if len(part.input_shape) == 4 and part.block.kind != "linear":
            # Each of them channels_last, as x is made anew by stacking. A linear layer's channels are last as it is.
            x = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
        forwards = self.meter.forwards(prepared(_Repeated(module), x, self.config), [x])
        return _Timed(part.shape, forwards, repeats * part.block.macs)

    def _copy(self) -> _Timed:
        # Made where it is, for it may be a gigabyte.
        count = COPY_BYTES[self.meter.device.type] // itemsize(self.config)
        source = torch.randn(count, dtype=getattr(torch, self.config.dtype), device=self.meter.device)
        return _Timed(COPY, self.meter.forwards(_Copy(source), [source]), 0)

    def _network(self, shape: str, network: nn.Module, macs: int) -> _Timed:
        size = self.config.resolution
        inputs = self.meter.random_inputs((self.config.batch_size, 3, size, size))
        return _Timed(shape, self.meter.forwards(deploy(network, self.config, inputs[0]), inputs), macs)

    def _time(self, makers: Sequence[Callable[[], _Timed]]) -> list[Figure]:
        """Time what these make, of which only a group at a time is in memory."""
        found: list[Figure] = []
        for begin in range(0, len(makers), GROUP):
            found += self._time_group([make() for make in makers[begin : begin + GROUP]])
        return found

    def _time_group(self, group: Sequence[_Timed]) -> list[Figure]:
        def corrected_ms(seconds: np.ndarray) -> list[np.ndarray]:
            yardsticks = seconds[:, len(group) :]
            return [self._corrected_ms(seconds[:, index], yardsticks, each.macs) for index, each in enumerate(group)]

        runs = [*(in_turn(each.forwards) for each in group), *self.yardsticks]
        factor = max(1.0, CAP_FACTOR * len(group))
        sampled, _ = self.meter.sample(runs, corrected_ms, factor, MIN_SAMPLE_SECONDS)
        found = []
        for each, own_ms, share in zip(group, corrected_ms(sampled.seconds), sampled.interval_shares, strict=True):
            p20, median, p80 = map(float, np.percentile(own_ms, [20, 50, 80]))
            capped = sampled.capped and share > self.meter.precision.share
            found.append(Figure(each.shape, median, p20, p80, len(own_ms), share, capped))
        return found

    def _corrected_ms(self, own: np.ndarray, yardsticks: np.ndarray, macs: int) -> np.ndarray:
        """Samples as if the yardsticks had run at their reference latencies.

        Args:
            own: (rounds,) seconds of a call of so many MACs.
            yardsticks: (rounds, 2) seconds, of the network and of the product.
        """
        by_network, by_product = (
            own / yardsticks[:, k] * reference_ms for k, reference_ms in enumerate(self.references_ms)
        )
        share = min(1.0, macs / self.yardstick_side**3 * float(np.median(yardsticks[:, 1] / own)))
        blended: np.ndarray = share * by_product + (1 - share) * by_network
        return blended


@dataclass(frozen=True)
class Sum:
    """What a network's parts add up to.

    Args:
        parts: of the network, in order.
        part_ms: what each adds to the network, t_i above; None where it was not measured.
        call_ms: what a call costs beside, c; None if not measured.
    """

    parts: tuple[Part, ...]
    part_ms: tuple[float | None, ...]
    call_ms: float | None

    @property
    def missing(self) -> tuple[Part, ...]:
        """Parts that were not measured, one of each shape."""
        lacking = {p.shape_id: p for p, ms in zip(self.parts, self.part_ms, strict=True) if ms is None}
        return tuple(lacking.values())

    @property
    def total_ms(self) -> float | None:
        """The network's latency by its parts; None where one is missing."""
        known = [ms for ms in self.part_ms if ms is not None]
        return None if self.call_ms is None or len(known) < len(self.parts) else self.call_ms + sum(known)


class BlockTable:
    """The rows of one deployment in a study database.

    Args:
        store: the database.
        device: what the figures are of.
        config: the deployment; of its resolution and classes the table's rows know by themselves.
    """

    def __init__(self, store: Store, device: DeviceInfo, config: LatencyConfig) -> None:
        self.store, self.device, self.config = store, device, config
        self.rows: dict[str, BlockLatency] = {}
        self.load()

    def load(self) -> None:
        self.rows = self._rows(self.config.engine)
        # One for all engines.
        shared = self._rows(YARDSTICK_ENGINE)
        self.rows |= {shape_id(shape): shared[shape_id(shape)] for shape in SHARED if shape_id(shape) in shared}

    def _rows(self, engine: str) -> dict[str, BlockLatency]:
        config = self.config
        return self.store.block_latencies(
            asdict(self.device), engine, config.dtype, config.batch_size, config.threads
        )  # fmt: skip

    def median_ms(self, shape: str) -> float | None:
        row = self.rows.get(shape_id(shape))
        return None if row is None else row.median_ms

    @property
    def references_ms(self) -> list[float] | None:
        """The yardsticks'; None before they were measured."""
        found = [ms for ms in map(self.median_ms, YARDSTICKS) if ms is not None]
        return found if len(found) == len(YARDSTICKS) else None

    @property
    def machine(self) -> Machine:
        """The device's limits, measured and corrected as the rows are.

        Raises:
            KeyError: they were not measured.
        """
        kind = self.device.kind
        product_ms, copy_ms = (self.rows[shape_id(shape)].median_ms for shape in (PRODUCT, COPY))
        return Machine(PRODUCT_SIDE[kind] ** 3 / product_ms * 1e3, 2 * COPY_BYTES[kind] / copy_ms * 1e3)

    def add(self, figures: Sequence[Figure]) -> None:
        config = self.config
        rows = [
            BlockLatency(
                engine=YARDSTICK_ENGINE if figure.shape in SHARED else config.engine, dtype=config.dtype,
                batch_size=config.batch_size, threads=config.threads, shape_id=shape_id(figure.shape),
                **asdict(figure),
            )
            for figure in figures
        ]  # fmt: skip
        if rows:
            self.store.add_block_latencies(asdict(self.device), rows)
            self.load()

    def add_up(self, parts: Sequence[Part]) -> Sum:
        call_ms = self.median_ms(CALL)
        found = [self.median_ms(part.shape) for part in parts]
        launch_ms = call_ms if call_ms is not None and self.device.kind == "cuda" else 0.0
        own = [None if ms is None else max(ms - launch_ms, 0.0) / REPEATS for ms in found]
        return Sum(tuple(parts), tuple(own), call_ms)

    def lacks(self, parts: Sequence[Part]) -> bool:
        """Whether something must be measured before these parts add up."""
        return self.add_up(parts).total_ms is None

    def add_up_arch(self, arch: ArchSpec) -> Sum:
        return self.add_up(arch_parts(arch, self.config))


def on_device(config: LatencyConfig) -> DeviceInfo:
    return DeviceInfo.of(torch.device(config.device))
