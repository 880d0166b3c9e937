"""Analysis of where a network's time goes: its parts' measured latencies, compared with the device's limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from kernels.device_info import DeviceInfo
from nas.config import LatencyConfig
from nas.errors import UsageError, is_out_of_memory, memory_may_run_out
from nas.latency.block_table import BlockTable
from nas.latency.device_profile import find_or_measure_profile
from nas.latency.devices import check_device
from nas.latency.launches import launches_line
from nas.latency.parts import CALL_ID, Part, arch_parts, block_name, layer_parts, shape_id
from nas.latency.roofline import Efficiency, NetworkEfficiency, everything_else, single
from nas.latency.subjects import Subject
from nas.latency.table_filler import TableFiller
from nas.latency.timm_networks import timm_model
from nas.reporting import Note
from search_spaces import ArchSpec
from studies import BlockLatency, Store

# What the parts leave unexplained is noise below this share of the network's time.
NOISE = 0.01


@dataclass(frozen=True)
class Analysis:
    """A network's parts on a device.

    Args:
        efficiency: the efficiencies of the parts and of the network.
        sum_ms: the latency that the parts add up to.
        network_ms: the latency of the network measured as a whole.
        layers: the layers of each part, by the part's name, if they were asked for.
        launches: a line that says that launches bind the latency, if they do.
        doubtful: the table's rows of parts, call and network that were measured less precisely than asked for.
    """

    efficiency: NetworkEfficiency
    sum_ms: float
    network_ms: float
    layers: dict[str, tuple[Efficiency, ...]]
    doubtful: tuple[BlockLatency, ...]
    launches: str | None = None

    @property
    def error(self) -> float:
        """Error of the sum, as a share of the network's latency."""
        return self.sum_ms / self.network_ms - 1


def from_table(table: BlockTable, arch: ArchSpec, title: str, network_ms: float) -> NetworkEfficiency | None:
    """The efficiency of an architecture by the table alone, without measuring; None where a part is not in it.

    Args:
        title: the title of the network's figures.
        network_ms: the latency of the network measured as a whole.
    """
    parts = arch_parts(arch, table.config)
    if table.lacks(parts) or table.profile is None:
        return None
    own = replace(table.config, resolution=arch.shown(table.config.resolution))
    return _network(own, title, _rows(table, parts), network_ms)


def _rows(table: BlockTable, parts: Sequence[Part]) -> list[Efficiency]:
    """The efficiencies of parts that are all in the table, on the table's device."""
    rows = []
    for part, ms in zip(parts, table.add_up(parts).part_ms, strict=True):
        assert ms is not None
        # What is measured as a difference may come to nothing.
        rows.append(Efficiency(part.block, table.machine, part.fused, max(ms, 1e-6) / 1e3))
    return rows


def _network(config: LatencyConfig, title: str, rows: list[Efficiency], network_ms: float) -> NetworkEfficiency:
    """A network's efficiency: its rows, and one more for what they leave unexplained of its latency."""
    left_seconds = network_ms / 1e3 - sum(row.seconds or 0.0 for row in rows)
    if left_seconds > NOISE * network_ms / 1e3:
        rows = [*rows, Efficiency(everything_else(), rows[0].machine, False, left_seconds)]
    subtitle = (
        f"{config.engine_label}, {config.dtype}, batch {config.batch_size}, {config.resolution}x{config.resolution}, "
        f"{torch.device(config.device).type}"
    )
    return NetworkEfficiency(title, subtitle, tuple(rows), network_ms / 1e3)


def analyse(
    store: Store, subject: Subject, note: Note = lambda line: None, *, again: bool = False, by_layer: bool = False
) -> Analysis:
    """Measure what the table lacks of a network, and compare all of it with the device's profile.

    Args:
        note: function that receives a line about each thing that is measured.
        again: whether all of the network is measured again.
        by_layer: whether the layers of an architecture's blocks are analysed, too. They are measured where the engine
            runs them one by one, and else only counted.

    Raises:
        UsageError: the device is not here, or the engine cannot run the network.
        CandidateFailed: the engine cannot compile it, or memory runs out.
    """
    config = subject.config
    device = check_device(config, note)
    with memory_may_run_out():
        find_or_measure_profile(store, config, waiting=note)
        table = BlockTable(store, DeviceInfo.of(device), config)
        filler = TableFiller(subject.title, config.device, note, again)
        if subject.arch is None:
            return _analyse_timm(subject, table, filler)
        return _analyse_arch(subject, subject.arch, table, filler, by_layer)


def _analyse_arch(subject: Subject, arch: ArchSpec, table: BlockTable, filler: TableFiller, by_layer: bool) -> Analysis:
    parts = arch_parts(arch, subject.config)
    ids = {CALL_ID, shape_id(subject.shape), *(part.shape_id for part in parts)}
    filler.fill(table, ids, lambda meter, known: meter.measure_archs([arch], known, [arch]), f"{len(parts)} parts")
    analysis = _analysis(subject, table, table, parts)
    if not by_layer:
        return analysis
    if subject.config.engine == "fused":
        # Within a fused kernel no layer can be timed.
        counted = {part.block.name: [single(layer, "layer") for layer in part.block.layers] for part in parts}
        by_part = {
            name: tuple(Efficiency(layer, table.machine, False, None) for layer in layers)
            for name, layers in counted.items()
        }
    else:
        by_part = _layers_by_part(subject, arch, table, filler)
    return replace(analysis, layers=by_part)


def _layers_by_part(
    subject: Subject, arch: ArchSpec, table: BlockTable, filler: TableFiller
) -> dict[str, tuple[Efficiency, ...]]:
    """The layers of each part, by the part's name, each measured alone."""
    layer_table, layers = _measured_layers(subject, arch.build(subject.config.num_classes), table, filler)
    by_part: dict[str, tuple[Efficiency, ...]] = {}
    for row in _rows(layer_table, layers):
        name = block_name(row.block.name)
        short = replace(row.block, name=row.block.name.removeprefix("blocks.").split(".", 2)[-1])
        by_part[name] = (*by_part.get(name, ()), replace(row, block=short))
    return by_part


def _analyse_timm(subject: Subject, table: BlockTable, filler: TableFiller) -> Analysis:
    model = timm_model(subject.name, subject.config.num_classes)
    layer_table, layers = _measured_layers(subject, model, table, filler)
    macs = sum(part.block.macs for part in layers)
    filler.fill(
        table, {shape_id(subject.shape)}, lambda meter, _: [meter.measure_network(subject.name, model, macs)],
        "the whole",
    )  # fmt: skip
    return _analysis(subject, table, layer_table, layers)


def _measured_layers(
    subject: Subject, network: nn.Module, table: BlockTable, filler: TableFiller
) -> tuple[BlockTable, list[Part]]:
    """A network's layers, and the table that now holds all of them."""
    config = subject.config
    if config.engine == "inductor":
        # A layer compiled alone calls the same library as it does uncompiled.
        table = BlockTable(table.store, table.device, replace(config, engine="eager"))
    try:
        # Nobody measures during the forward pass that shows the layers' inputs.
        with filler.lock.training(filler.waiting):
            layers = layer_parts(network, table.config)
    except (AssertionError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        reason = f"does not run on images of {config.resolution}x{config.resolution} ({error})"
        raise UsageError(f"analyze: {subject.name} {reason}") from error
    shapes = {part.shape_id for part, _ in layers}
    filler.fill(
        table, {CALL_ID, *shapes}, lambda meter, known: meter.measure_layers(layers, known),
        f"{len(shapes)} shapes of layers",
    )  # fmt: skip
    return table, [part for part, _ in layers]


def _analysis(subject: Subject, table: BlockTable, part_table: BlockTable, parts: Sequence[Part]) -> Analysis:
    """The analysis of a network whose own latency is in one table, and whose parts' are in the same or another."""
    network_ms, sum_ms = table.median_ms(subject.shape), part_table.add_up(parts).total_ms
    assert network_ms is not None
    assert sum_ms is not None
    efficiency = _network(subject.config, subject.title, _rows(part_table, parts), network_ms)
    if part_table is not table:
        subtitle = f"{efficiency.subtitle}; layers alone in {part_table.config.engine}"
        efficiency = replace(efficiency, subtitle=subtitle)
    doubtful = part_table.doubtful(parts)
    doubtful += [row for row in table.doubtful_rows([shape_id(subject.shape)]) if row not in doubtful]
    assert table.profile is not None
    blocks = [(part.block, part.fused) for part in parts]
    launch_seconds, batch = table.profile.graph_launch_seconds, subject.config.batch_size
    launches = launches_line("the network's", blocks, table.machine, launch_seconds, batch, network_ms)
    return Analysis(efficiency, sum_ms, network_ms, {}, tuple(doubtful), launches)
