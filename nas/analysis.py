"""Where a network's time goes: its parts measured, and held against what the device can do."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import nn

from nas.block_table import BlockMeter, BlockTable, Sum, network_shape, on_device
from nas.config import LatencyConfig
from nas.efficiency import Efficiency, Machine, NetworkEfficiency, everything_else, waterline
from nas.errors import UsageError, is_out_of_memory
from nas.evaluate import check_device
from nas.locks import device_lock
from nas.parts import Part, arch_parts, layers
from nas.plots import plot_efficiency_gap, plot_waterline
from search_spaces import ArchSpec
from studies import Store

Note = Callable[[str], None]
WAITING = "waiting for another process that measures or trains on this device"
# What a timm network is run with: `fused` and its layers know ConvFirst networks only.
TIMM_ENGINE = {"cpu": "torchscript", "cuda": "compile"}
COLUMNS = (
    "part", "kind", "MMACs", "KB fused", "KB by layer", "FLOP/B", "t* us", "t us", "of peak", "gap us", "bound by",
    "workspace KB",
)  # fmt: skip
# What is left out below so many columns.
WIDE, WIDE_ONLY = 120, ("kind", "KB fused", "KB by layer", "workspace KB")
# Of what the parts leave unexplained, less than this share of the network's time is noise.
NOISE = 0.01


@dataclass(frozen=True)
class Subject:
    """A network to analyse.

    Args:
        title: for people.
        name: by which the table knows it: an architecture's line, or a timm model's name.
        arch: None of a timm model.
        config: the deployment.
    """

    title: str
    name: str
    arch: ArchSpec | None
    config: LatencyConfig


def cells(row: Efficiency) -> tuple[str, ...]:
    """A row of the table, in the order of `COLUMNS`."""
    block, seconds = row.block, row.seconds or 0.0
    if not block.macs:
        taken = f"{1e6 * seconds:,.1f}"
        return (block.name, block.kind, "", "", "", "", "", taken, "", taken, "", "")
    workspace = block.fused_workspace_bytes if row.fused else block.unfused_workspace_bytes
    return (
        block.name, block.kind, f"{block.macs / 1e6:,.3f}", f"{block.fused_bytes / 1e3:,.1f}",
        f"{block.unfused_bytes / 1e3:,.1f}", f"{block.intensity(row.fused):.1f}", f"{1e6 * row.ideal_seconds:,.1f}",
        f"{1e6 * seconds:,.1f}", f"{row.efficiency or 0:.1%}", f"{1e6 * (row.gap_seconds or 0):,.1f}", row.bound_by,
        f"{workspace / 1e3:,.1f}",
    )  # fmt: skip


@dataclass(frozen=True)
class Analysis:
    """A network's parts on a device.

    Args:
        efficiency: the rows, and the network's own latency.
        parts: what the rows are measurements of, without what is left over.
        sum_ms: what the parts add up to.
        network_ms: the network's own latency.
    """

    efficiency: NetworkEfficiency
    parts: tuple[Part, ...]
    sum_ms: float
    network_ms: float

    @property
    def error(self) -> float:
        """Of the sum, as a share of the network's latency."""
        return self.sum_ms / self.network_ms - 1

    def table(self, width: int) -> Table:
        """The rows for a person, times in microseconds; on a narrow terminal not all columns."""
        efficiency = self.efficiency
        columns = [name for name in COLUMNS if width >= WIDE or name not in WIDE_ONLY]
        title = f"{efficiency.title}\n{efficiency.subtitle}"
        table = Table(title=title, title_justify="left", show_edge=False, padding=(0, 0, 0, 1))
        for name in columns:
            left = name in ("part", "kind", "bound by")
            table.add_column(name, justify="left" if left else "right", no_wrap=name != "part", overflow="fold")
        for row in efficiency.rows:
            by_name = dict(zip(COLUMNS, cells(row), strict=True))
            table.add_row(*(by_name[name] for name in columns))
        return table

    def lines(self) -> list[str]:
        """What the rows come to."""
        efficiency = self.efficiency
        macs = sum(row.block.macs for row in efficiency.rows)
        assert efficiency.achieved is not None
        rows = [row for row in efficiency.rows if row.block.macs]
        best = f"waterline {efficiency.waterline:.1%}"
        if any(len(row.block.layers) > 1 and not row.fused for row in rows):
            best += f" (layer by layer; {waterline([replace(row, fused=True) for row in rows]):.1%} with fused blocks)"
        return [
            f"{self.network_ms:.4f} ms as a network, {self.sum_ms:.4f} ms as the sum of its parts ({self.error:+.1%})",
            f"{macs / 1e6:,.2f} MMACs; efficiency {efficiency.achieved:.1%} of "
            f"{2 * efficiency.machine.macs_per_s / 1e9:,.1f} GFLOP/s, {best}",
        ]


def require_timm_model(name: str, flag: str) -> None:
    """Raises UsageError where timm has no model of that name."""
    import timm

    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f" (did you mean {' or '.join(close)}?)" if close else ""
        raise UsageError(f"{flag} {name}: timm has no such model{hint}")


def timm_model(name: str, classes: int) -> nn.Module:
    """A timm model with random weights, in evaluation mode."""
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=classes)
    return model.eval()


def timm_resolution(name: str) -> int:
    """Pixels of the images that a timm model was made for."""
    import timm

    config = timm.get_pretrained_cfg(name)
    return int(config.input_size[-1]) if config is not None else 224


# Of a ConvFirst network, by its total stride, where nobody says: pixels and classes.
DEPLOYED_AT = {32: (224, 1000)}
SMALL_AT = (32, 10)


def choose(
    store: Store | None, study: str, chosen: tuple[str, Any], against: str | None, given: dict[str, Any],
    make: Callable[..., LatencyConfig],
) -> list[Subject]:  # fmt: skip
    """The one or two networks that are meant, in one deployment but for the engine.

    Args:
        store: None where there is no database yet.
        study: where trials are looked up.
        chosen: "--trial", "--arch" or "--timm", and its value.
        against: the other one: a trial's number, an architecture or a timm model; None for none.
        given: the fields of `LatencyConfig` that the user gave, None for none; others are those of a trial's study, or
            the networks' own.
        make: (base, **fields) -> the deployment.

    Raises:
        UsageError: something is not there, or does not parse.
    """
    given = {name: value for name, value in given.items() if value is not None}
    wanted = [(*chosen, chosen[0])]
    if against is not None:
        is_arch = "|" in against or against.lstrip().startswith("{")
        wanted.append(("--trial" if against.isdecimal() else "--arch" if is_arch else "--timm", against, "--against"))
    found = [_named(store, study, kind, str(value), flag) for kind, value, flag in wanted]
    base = next((config for _, _, config in found if config is not None), None)
    if base is None:
        models = [name for name, arch, _ in found if arch is None]
        archs = [arch for _, arch, _ in found if arch is not None]
        pixels, classes = (
            (timm_resolution(models[0]), 1000) if models else DEPLOYED_AT.get(archs[0].total_stride, SMALL_AT)
        )
        given = {"resolution": pixels, "num_classes": classes, **given}
    config = make(base, **given)
    subjects = []
    for name, arch, _ in found:
        if arch is not None:
            subjects.append(Subject(f"ConvFirst {arch.arch_id}", name, arch, config))
            continue
        kind = config.device.partition(":")[0]
        plain = config.engine == "fused" or "engine" not in given
        # Of a kind of device that is none, whoever checks it says so.
        engine = TIMM_ENGINE.get(kind, config.engine) if plain else config.engine
        subjects.append(Subject(name, name, None, replace(config, engine=engine)))
    return subjects


def _named(
    store: Store | None, study: str, kind: str, value: str, flag: str
) -> tuple[str, ArchSpec | None, LatencyConfig | None]:
    """Name, architecture and study's deployment of a network; the last two None where there is none."""
    if kind == "--timm":
        require_timm_model(value, flag)
        return value, None, None
    if kind == "--arch":
        try:
            arch = ArchSpec.parse(value)
        except ValueError as error:
            raise UsageError(f"{flag} {value}: {error}") from error
        return str(arch), arch, None
    row = store.find_study(study) if store else None
    if store is None or row is None:
        raise UsageError(f"--study {study}: not in the database, so there is no {flag} {value}")
    candidate = next((c for c in store.candidates(row.study_id) if c.number == int(value)), None)
    if candidate is None:
        raise UsageError(f"{flag} {value}: the study {study} has no such candidate")
    arch = ArchSpec.from_json(candidate.arch)
    return str(arch), arch, LatencyConfig(**json.loads(row.config)["latency"])


def draw(analyses: Sequence[Analysis], folder: Path) -> list[Path]:
    """Write the plots of one or two networks, as PNG and SVG; returns the files."""
    networks = [analysis.efficiency for analysis in analyses]
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, plot in (("efficiency_gap", plot_efficiency_gap), ("waterline", plot_waterline)):
        for suffix in (".png", ".svg"):
            files.append(folder / f"{name}{suffix}")
            plot(networks, files[-1])
    return files


def table_lines(store: Store, subject: Subject) -> list[str]:
    """What the table says of an architecture, for a person: nothing is measured."""
    config = subject.config
    assert subject.arch is not None
    table = BlockTable(store, on_device(config), config)
    added = table.add_up_arch(subject.arch)
    where = (
        f"{table.device.name}, {config.engine}, {config.dtype}, batch {config.batch_size}, "
        f"{config.resolution}x{config.resolution}, {config.threads} thread(s)"
    )
    found = [where]
    parts = f"{len(added.parts)} parts"
    if added.total_ms is not None:
        found.append(f"{added.total_ms:.4f} ms, the sum of {parts}, all of them measured")
    else:
        known = [ms for ms in added.part_ms if ms is not None]
        found.append(f"{len(known)} of {parts} are measured, {sum(known):.4f} ms together; missing:")
        found += [f"  {part.block.name}: {part.shape}" for part in added.missing]
        found += ["  what a call costs"] if added.call_ms is None else []
        found.append("--measure measures them")
    network_ms = table.median_ms(network_shape(subject.name, config))
    if network_ms is not None:
        found.append(f"{network_ms:.4f} ms measured as a whole")
    return found


def analyse(store: Store, subject: Subject, note: Note = lambda line: None) -> Analysis:
    """Measure what the table lacks of a network, and hold all of it against the device's profile.

    Args:
        note: told what is measured.

    Raises:
        UsageError: the device is not here, or the engine cannot run the network.
        CandidateFailed: the engine cannot compile it.
    """
    device = check_device(subject.config)
    table = BlockTable(store, on_device(subject.config), subject.config)
    added = (
        _measured_arch(table, subject, device, note) if subject.arch else _measured_timm(table, subject, device, note)
    )
    return _analysis(subject, table.machine, added, table.median_ms(network_shape(subject.name, subject.config)))


def _measured_arch(table: BlockTable, subject: Subject, device: torch.device, note: Note) -> Sum:
    config = subject.config
    assert subject.arch is not None
    parts = arch_parts(subject.arch, config)
    if table.lacks(parts) or table.median_ms(network_shape(subject.name, config)) is None:
        note(f"measuring {subject.title}: {len(table.add_up(parts).missing)} of its parts are not in the table")
        with device_lock(device).measuring(lambda: note(WAITING)):
            meter = BlockMeter(config, table.references_ms)
            table.add(meter.measure_archs([subject.arch], table.rows.keys(), [subject.arch]))
    return table.add_up(parts)


def _measured_timm(table: BlockTable, subject: Subject, device: torch.device, note: Note) -> Sum:
    config = subject.config
    model = timm_model(subject.name, config.num_classes)
    # A layer compiled alone calls the same library as it does uncompiled.
    plain = replace(config, engine="eager") if config.engine == "compile" else config
    try:
        cut = layers(model, plain)
    except (AssertionError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        size = config.resolution
        raise UsageError(f"analyze: {subject.name} does not run on images of {size}x{size} ({error})") from error
    parts = [part for part, _ in cut]
    by_layer = BlockTable(table.store, table.device, plain)
    with device_lock(device).measuring(lambda: note(WAITING)):
        if by_layer.lacks(parts):
            note(f"measuring {subject.title}: {len(by_layer.add_up(parts).missing)} of its layers are not in the table")
            by_layer.add(BlockMeter(plain, by_layer.references_ms).measure_layers(cut, by_layer.rows.keys()))
            table.load()
        if table.median_ms(network_shape(subject.name, config)) is None:
            note(f"measuring {subject.title} as a whole")
            meter = BlockMeter(config, table.references_ms)
            macs = sum(part.block.macs for part in parts)
            table.add(meter.measure_network(subject.name, model, macs, table.rows.keys()))
    return by_layer.add_up(parts)


def _analysis(subject: Subject, machine: Machine, added: Sum, network_ms: float | None) -> Analysis:
    assert network_ms is not None
    assert added.total_ms is not None
    fused = subject.config.engine == "fused"
    rows = [
        Efficiency(part.block, machine, fused, max(ms, 1e-6) / 1e3)
        for part, ms in zip(added.parts, added.part_ms, strict=True)
        if ms is not None
    ]
    left_ms = network_ms - sum(ms for ms in added.part_ms if ms is not None)
    if left_ms > NOISE * network_ms:
        rows.append(Efficiency(everything_else(), machine, fused, left_ms / 1e3))
    config = subject.config
    subtitle = (
        f"{config.engine}, {config.dtype}, batch {config.batch_size}, {config.resolution}x{config.resolution}, "
        f"{torch.device(config.device).type}"
    )
    efficiency = NetworkEfficiency(subject.title, subtitle, tuple(rows), network_ms / 1e3)
    return Analysis(efficiency, added.parts, added.total_ms, network_ms)


def errors(
    table: BlockTable, archs: Sequence[ArchSpec], latencies_ms: Sequence[float], anchor_ms: float,
    anchor_in_table_ms: float | None,
) -> list[float]:  # fmt: skip
    """How far the sums of parts are from networks' own latencies, as shares of these.

    A study's latencies are corrected to the day when its anchor was measured, the table's to that of its yardstick. The
    anchor, which is in the table too, tells how these compare.
    """
    scale = anchor_ms / anchor_in_table_ms if anchor_in_table_ms else 1.0
    found = []
    for arch, latency_ms in zip(archs, latencies_ms, strict=True):
        total_ms = table.add_up_arch(arch).total_ms
        if total_ms is not None:
            found.append(total_ms * scale / latency_ms - 1)
    return found


def errors_line(found: Sequence[float]) -> str:
    sizes = [abs(error) for error in found]
    return (
        f"parts measured alone add up to the networks' latencies within {median(sizes):.1%} "
        f"(median of {len(sizes)}; at most {max(sizes):.1%})"
    )
