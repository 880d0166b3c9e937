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

Everything is measured in turns with the device's yardsticks, see `nas.latency.yardsticks`: so parts of different days
add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from kernels.timing import DeviceInfo
from nas.config import LatencyConfig
from nas.errors import memory_may_run_out
from nas.latency import ceilings as profile
from nas.latency.engines import deploy
from nas.latency.meter import threads
from nas.latency.parts import CALL, Part, arch_modules, arch_parts, canonical, prepared, shape_id
from nas.latency.roofline import Machine
from nas.latency.yardsticks import YARDSTICK_CLASSES, YARDSTICK_RESOLUTION, Timed, Yardsticks
from search_spaces import ArchSpec, load_space
from studies import BlockLatency, Profile, Store

# Parts that are sampled in turns: more share the yardsticks' time, fewer end sooner.
GROUP = 6
# R above. On CUDA a launch is so large a part of a small block's call that what is left of it must not matter.
REPEATS = {"cpu": 4, "cuda": 16}
# Of the yardstick network's blocks the one that tells what a call costs.
REFERENCE_BLOCK = "stage2.1"


@dataclass(frozen=True, slots=True)
class Figure:
    """The latency of what has this shape, t_i above or a network's, corrected by the yardsticks; other fields as
    `nas.latency.meter.Latency`'s."""

    shape: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    repeats: int
    interval_share: float
    capped: bool
    throttled: bool | None = None


@dataclass(frozen=True)
class _Made:
    """What is timed under its shape: a call, how often that runs it, and whether a launch is to be taken off."""

    shape: str
    timed: Timed
    runs: int = 1
    launched: bool = False


class _Repeated(nn.Module):
    """Runs a module on each of several inputs, (repeats, N, ...); all outputs are wanted, lest some be left out."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.module(each) for each in x.unbind(0)]


def network_shape(name: str, config: LatencyConfig) -> str:
    """The shape of a whole network, an architecture's line or a timm model's name."""
    return canonical(kind="network", name=name, size=config.resolution, classes=config.num_classes)


class BlockMeter:
    """Measures parts of networks, and networks, in one deployment.

    Args:
        config: the deployment.
        references_ms: the yardsticks' latencies, as the device's profile has them; None measures them now.
    """

    def __init__(self, config: LatencyConfig, references_ms: Sequence[float] | None = None) -> None:
        self.config = config
        self.yardsticks = Yardsticks(config, references_ms)
        self.kind = torch.device(config.device).type
        self.repeats = REPEATS[self.kind]

    def measure_archs(
        self, archs: Iterable[ArchSpec], known: Mapping[str, float], whole: Iterable[ArchSpec] = ()
    ) -> list[Figure]:
        """What the table lacks to add up these architectures.

        Args:
            archs: those whose parts are wanted.
            known: shape_id -> latency in ms of what needs no measuring.
            whole: those that are wanted as networks, too.

        Raises:
            CandidateFailed: the engine cannot compile one.
        """
        with threads(self.config.threads):
            found = self._call(known)
            call_ms = self._call_ms(known, found)
            seen = {*known, *(shape_id(figure.shape) for figure in found)}
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
                    macs = sum(part.block.macs for part in arch_parts(arch, self.config))
                    network = arch.build(self.config.num_classes)
                    found += self._time([partial(self._network, shape, network, macs)], call_ms)
                    seen.add(shape_id(shape))
        return found

    def measure_layers(self, layers: Iterable[tuple[Part, nn.Module]], known: Mapping[str, float]) -> list[Figure]:
        """What the table lacks of deployed layers."""
        with threads(self.config.threads):
            found = self._call(known)
            lacking = {part.shape_id: (part, module) for part, module in layers if part.shape_id not in known}
            makers = [partial(self._part, part, module) for part, module in lacking.values()]
            return found + self._time(makers, self._call_ms(known, found))

    def measure_network(self, name: str, network: nn.Module, macs: int, reference: bool = False) -> Figure:
        """A network of whatever kind and so many MACs, under this name.

        Args:
            reference: whether others are scaled by it.

        Raises:
            CandidateFailed: the engine cannot compile it, or memory runs out.
        """
        with threads(self.config.threads), memory_may_run_out():
            make = partial(self._network, network_shape(name, self.config), network, macs)
            (figure,) = self._time([make], 0.0, reference)
        return figure

    def measure_anchor(self, anchor: ArchSpec) -> Figure:
        """The network whose latency is the reference of a study's."""
        macs = sum(part.block.macs for part in arch_parts(anchor, self.config))
        return self.measure_network(str(anchor), anchor.build(self.config.num_classes), macs, reference=True)

    def _call(self, known: Mapping[str, float]) -> list[Figure]:
        """What a call costs, unless that is known."""
        if shape_id(CALL) in known:
            return []
        block, part = self._reference_block()
        one, many = self._time([partial(self._part, part, block, repeats, False) for repeats in (1, self.repeats)], 0.0)
        # Of `many` a run is told, and not the call. It is a difference: its interval is as wide as both together.
        factor = self.repeats / (self.repeats - 1)
        call_ms = max((one.median_ms - many.median_ms) * factor, 0.0)
        wide_ms = factor * (one.interval_share * one.median_ms + many.interval_share * many.median_ms)
        return [replace(
            one, shape=CALL, median_ms=call_ms, p20_ms=call_ms, p80_ms=call_ms,
            interval_share=wide_ms / call_ms if call_ms else 0.0, capped=one.capped or many.capped,
            throttled=one.throttled or many.throttled,
        )]  # fmt: skip

    def _call_ms(self, known: Mapping[str, float], found: Sequence[Figure]) -> float:
        return next((figure.median_ms for figure in found if figure.shape == CALL), known.get(shape_id(CALL), 0.0))

    def _reference_block(self) -> tuple[nn.Module, Part]:
        """A block of the yardstick as this engine runs it."""
        config = replace(
            self.config, resolution=YARDSTICK_RESOLUTION, num_classes=YARDSTICK_CLASSES
        )  # fmt: skip
        anchor = load_space("small").anchor()
        part = next(part for part in arch_parts(anchor, config) if part.block.name == REFERENCE_BLOCK)
        return arch_modules(anchor, config)[REFERENCE_BLOCK], part

    def _part(self, part: Part, module: nn.Module, repeats: int | None = None, launched: bool = True) -> _Made:
        """Calls of a part, each of which runs it several times over."""
        meter, repeats = self.yardsticks.meter, repeats or self.repeats
        x = torch.stack([each.contiguous() for each in meter.random_inputs(part.input_shape, repeats)])
        if len(part.input_shape) == 4 and part.block.kind != "linear":
            # Each of them channels_last, as x is made anew by stacking. A linear layer's channels are last as it is.
            x = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
        forwards = meter.forwards(prepared(_Repeated(module), x, self.config), [x])
        launched = launched and self.kind == "cuda"
        return _Made(part.shape, Timed(forwards, repeats * part.block.macs), repeats, launched)

    def _network(self, shape: str, network: nn.Module, macs: int) -> _Made:
        meter, size = self.yardsticks.meter, self.config.resolution
        inputs = meter.random_inputs((self.config.batch_size, 3, size, size))
        return _Made(shape, Timed(meter.forwards(deploy(network, self.config, inputs[0]), inputs), macs))

    def _time(
        self, makers: Sequence[Callable[[], _Made]], call_ms: float, reference: bool = False
    ) -> list[Figure]:  # fmt: skip
        """Time what these make, of which only a group at a time is in memory."""
        found: list[Figure] = []
        for begin in range(0, len(makers), GROUP):
            group = [make() for make in makers[begin : begin + GROUP]]
            for made, of in zip(group, self.yardsticks.time([each.timed for each in group], reference), strict=True):
                off_ms = call_ms if made.launched else 0.0

                def of_a_run(ms: float, made: _Made = made, off_ms: float = off_ms) -> float:
                    return max(ms - off_ms, 0.0) / made.runs

                found.append(Figure(
                    made.shape, of_a_run(of.median_ms), of_a_run(of.p20_ms), of_a_run(of.p80_ms), of.repeats,
                    of.interval_share, of.capped, of.throttled,
                ))  # fmt: skip
        return found


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

    Attributes:
        rows: shape_id -> row.
        profile: of the device; None before it was measured.
    """

    def __init__(self, store: Store, device: DeviceInfo, config: LatencyConfig) -> None:
        self.store, self.device, self.config = store, device, config
        self.kernels = _kernels(config)
        self.rows: dict[str, BlockLatency] = {}
        self.profile: Profile | None = None
        self.load()

    def load(self) -> None:
        """Read the rows anew: other processes write some, too."""
        config, device = self.config, asdict(self.device)
        self.profile = self.store.devices.find_profile(device, config.dtype, config.threads)
        self.rows = self.store.devices.block_latencies(
            device, config.engine, config.dtype, config.batch_size, config.threads, self.kernels
        )

    @property
    def known(self) -> dict[str, float]:
        """shape_id -> latency in ms."""
        return {key: row.median_ms for key, row in self.rows.items()}

    def median_ms(self, shape: str) -> float | None:
        row = self.rows.get(shape_id(shape))
        return None if row is None else row.median_ms

    @property
    def references_ms(self) -> tuple[float, float]:
        """The yardsticks' latencies; the profile must have been measured."""
        assert self.profile is not None
        return profile.references_ms(self.profile)

    @property
    def machine(self) -> Machine:
        """What efficiencies are shares of; the profile must have been measured."""
        assert self.profile is not None
        return profile.machine(self.profile)

    def add(self, figures: Sequence[Figure]) -> None:
        config = self.config
        rows = [
            BlockLatency(
                engine=config.engine, dtype=config.dtype, batch_size=config.batch_size, threads=config.threads,
                kernels=self.kernels, shape_id=shape_id(figure.shape), **asdict(figure),
            )
            for figure in figures
        ]  # fmt: skip
        if rows:
            self.store.devices.add_block_latencies(asdict(self.device), rows)
            self.load()

    def add_up(self, parts: Sequence[Part]) -> Sum:
        return Sum(tuple(parts), tuple(self.median_ms(part.shape) for part in parts), self.median_ms(CALL))

    def doubtful(self, parts: Sequence[Part]) -> list[BlockLatency]:
        """Rows of these parts, and of what a call costs, that the time cap ended or a throttling GPU."""
        return self.doubtful_rows([shape_id(CALL), *(part.shape_id for part in parts)])

    def doubtful_rows(self, ids: Iterable[str]) -> list[BlockLatency]:
        """Likewise, of rows by their ids."""
        rows = [self.rows[key] for key in dict.fromkeys(ids) if key in self.rows]
        return [row for row in rows if row.capped or row.throttled]

    def lacks(self, parts: Sequence[Part]) -> bool:
        """Whether something must be measured before these parts add up."""
        return self.add_up(parts).total_ms is None

    def add_up_arch(self, arch: ArchSpec) -> Sum:
        return self.add_up(arch_parts(arch, self.config))


def _kernels(config: LatencyConfig) -> str:
    """Which kernels of ours ran: a digest of their sources; empty of engines that have none of ours."""
    if config.engine != "fused":
        return ""
    from kernels.tune import sources_digest

    return sources_digest()


def on_device(config: LatencyConfig) -> DeviceInfo:
    return DeviceInfo.of(torch.device(config.device))
