"""Where a network's time goes: its parts measured, and held against what the device can do."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import nn

from nas.config import LatencyConfig
from nas.display.efficiency_plots import plot_efficiency_gap, plot_waterline
from nas.errors import UsageError, is_out_of_memory, memory_may_run_out
from nas.latency import ceilings as profile
from nas.latency.block_table import BlockMeter, BlockTable, Sum, network_shape, on_device
from nas.latency.parts import CALL, Part, arch_parts, block_name, layers, shape_id
from nas.latency.roofline import Block, Efficiency, NetworkEfficiency, everything_else, single, waterline
from nas.locks import WAITING, device_lock
from nas.search.evaluation import check_device
from search_spaces import ArchSpec
from studies import BlockLatency, Store

Note = Callable[[str], None]
# What a timm network is run with: `fused` and its layers know ConvFirst networks only.
TIMM_ENGINE = {"cpu": "torchscript", "cuda": "compile"}
COLUMNS = (
    "part", "kind", "MMACs", "KB fused", "KB by layer", "FLOP/B", "t* us", "t us", "of peak", "gap us", "bound by",
    "workspace KB",
)  # fmt: skip
# What is left out below so many columns.
WIDE, WIDE_ONLY = 120, ("kind", "KB fused", "KB by layer", "workspace KB")
CALL_ID = shape_id(CALL)
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
    """A row of the table, in the order of `COLUMNS`; what was not measured is left empty."""
    block = row.block
    taken = "" if row.seconds is None else f"{1e6 * row.seconds:,.1f}"
    if not block.macs:
        return (block.name, block.kind, "", "", "", "", "", taken, "", taken, "", "")
    workspace = block.fused_workspace_bytes if row.fused else block.unfused_workspace_bytes
    share = "" if row.efficiency is None else f"{row.efficiency:.1%}"
    gap = "" if row.gap_seconds is None else f"{1e6 * row.gap_seconds:,.1f}"
    return (
        block.name, block.kind, f"{block.macs / 1e6:,.3f}", f"{block.fused_bytes / 1e3:,.1f}",
        f"{block.unfused_bytes / 1e3:,.1f}", f"{block.intensity(row.fused):.1f}", f"{1e6 * row.ideal_seconds:,.1f}",
        taken, share, gap, row.bound_by, f"{workspace / 1e3:,.1f}",
    )  # fmt: skip


@dataclass(frozen=True)
class Analysis:
    """A network's parts on a device.

    Args:
        efficiency: the rows, and the network's own latency.
        sum_ms: what the parts add up to.
        network_ms: the network's own latency.
        layers: name of a part -> its layers, where they were asked for.
        doubtful: what was measured less precisely than asked for, of parts, call and network.
    """

    efficiency: NetworkEfficiency
    sum_ms: float
    network_ms: float
    layers: dict[str, tuple[Efficiency, ...]]
    doubtful: tuple[BlockLatency, ...]

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
            for layer in self.layers.get(row.block.name, ()):
                by_name = dict(zip(COLUMNS, cells(layer), strict=True))
                table.add_row("  " + by_name[columns[0]], *(by_name[name] for name in columns[1:]), style="dim")
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
        found = [
            f"{self.network_ms:.4f} ms as a network, {self.sum_ms:.4f} ms as the sum of its parts ({self.error:+.1%})",
            f"{macs / 1e6:,.2f} MMACs; efficiency {efficiency.achieved:.1%} of "
            f"{2 * efficiency.machine.macs_per_s / 1e9:,.1f} GFLOP/s, {best}",
        ]
        return found + doubtful_lines(self.doubtful)


def doubtful_lines(rows: Sequence[BlockLatency]) -> list[str]:
    """A line, if there are such rows."""
    if not rows:
        return []
    widest = max(row.interval_share for row in rows)
    throttled = " or measured on a throttling GPU" if any(row.throttled for row in rows) else ""
    return [
        f"{len(rows)} of these figures ended at the time cap{throttled}: known within {widest:.0%} at worst "
        "(--again measures anew)"
    ]


def require_timm_model(name: str, flag: str) -> None:
    """Raises UsageError where timm has no model, or no such variant of it, of that name."""
    import timm
    from timm.models import split_model_name_tag

    model, tag = split_model_name_tag(name)
    if timm.is_model(model) and tag and name not in timm.list_pretrained(f"{model}.*"):
        known = ", ".join(each.partition(".")[2] for each in timm.list_pretrained(f"{model}.*")) or "none"
        raise UsageError(f"{flag} {name}: timm has no such weights of {model} (there: {known})")
    if not timm.is_model(model):
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
    if given.get("engine") == "fused" and all(arch is None for _, arch, _ in found):
        raise UsageError("--engine fused: times ConvFirst networks by their blocks, and no timm models by their layers")
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
    parts = arch_parts(subject.arch, config)
    added = table.add_up(parts)
    where = (
        f"{table.device.name}, {config.engine}, {config.dtype}, batch {config.batch_size}, "
        f"{config.resolution}x{config.resolution}, {config.threads} thread(s)"
    )
    found = [where]
    of_parts = f"{len(added.parts)} parts"
    if added.total_ms is not None:
        found.append(f"{added.total_ms:.4f} ms, the sum of {of_parts}, all of them measured")
    else:
        known = [ms for ms in added.part_ms if ms is not None]
        together = f"{len(known)} of {of_parts} are measured, {sum(known):.4f} ms together"
        found.append(together if known else f"none of {of_parts} is measured")
        missing = [part.block.name for part in added.missing] + ["a call's cost"] * (added.call_ms is None)
        found.append(f"missing: {', '.join(missing)}; --measure measures them")
    if added.total_ms is not None or any(ms is not None for ms in added.part_ms):
        found += doubtful_lines(table.doubtful(parts))
    network_ms = table.median_ms(network_shape(subject.name, config))
    if network_ms is not None:
        found.append(f"{network_ms:.4f} ms measured as a whole")
    return found


def from_table(table: BlockTable, arch: ArchSpec, title: str, network_ms: float) -> NetworkEfficiency | None:
    """What is known of an architecture without measuring anything; None where a part of it is not in the table.

    Args:
        network_ms: its own latency.
    """
    parts = arch_parts(arch, table.config)
    if table.lacks(parts) or table.profile is None:
        return None
    rows = [
        Efficiency(part.block, table.machine, part.fused, max(ms or 0.0, 1e-6) / 1e3)
        for part, ms in zip(parts, table.add_up(parts).part_ms, strict=True)
    ]
    return _network(table.config, title, rows, network_ms)


def _network(config: LatencyConfig, title: str, rows: list[Efficiency], network_ms: float) -> NetworkEfficiency:
    """Rows with what they leave unexplained of a network's latency."""
    left_seconds = network_ms / 1e3 - sum(row.seconds or 0.0 for row in rows)
    if left_seconds > NOISE * network_ms / 1e3:
        rows = [*rows, Efficiency(everything_else(), rows[0].machine, False, left_seconds)]
    subtitle = (
        f"{config.engine}, {config.dtype}, batch {config.batch_size}, {config.resolution}x{config.resolution}, "
        f"{torch.device(config.device).type}"
    )
    return NetworkEfficiency(title, subtitle, tuple(rows), network_ms / 1e3)


def analyse(
    store: Store, subject: Subject, note: Note = lambda line: None, *, again: bool = False, by_layer: bool = False
) -> Analysis:
    """Measure what the table lacks of a network, and hold all of it against the device's profile.

    Args:
        note: told what is measured.
        again: measure all of the network anew.
        by_layer: tell the layers of an architecture's blocks, too; measured where the engine runs them one by one.

    Raises:
        UsageError: the device is not here, or the engine cannot run the network.
        CandidateFailed: the engine cannot compile it, or memory runs out.
    """
    config = subject.config
    check_device(config)
    with memory_may_run_out():
        profile.find_or_measure(store, config, waiting=partial(note, WAITING))
        work = _Work(subject, BlockTable(store, on_device(config), config), note, again)
        if subject.arch is None:
            parts, by_part = work.timm_parts(), {}
        else:
            parts = work.arch_parts(subject.arch)
            by_part = work.layers_of(subject.arch, parts) if by_layer else {}
        return work.analysis(parts, by_part)


class _Work:
    """One network's analysis under way."""

    def __init__(self, subject: Subject, table: BlockTable, note: Note, again: bool) -> None:
        self.subject, self.table, self.note, self.again = subject, table, note, again
        self.config = subject.config
        self.lock = device_lock(torch.device(self.config.device))
        # A layer compiled alone calls the same library as it does uncompiled.
        plain = replace(self.config, engine="eager") if self.config.engine == "compile" else self.config
        self.layer_table = table if plain == self.config else BlockTable(table.store, table.device, plain)
        self.network = network_shape(subject.name, self.config)
        self.sum: Sum | None = None

    def arch_parts(self, arch: ArchSpec) -> list[Part]:
        """The parts of an architecture; all of them, and the network, are in the table now."""
        parts = arch_parts(arch, self.config)

        def known() -> dict[str, float]:
            return self._known(self.table, [CALL_ID, *(part.shape_id for part in parts), shape_id(self.network)])

        def lacking() -> bool:
            lacks = {CALL_ID, shape_id(self.network), *(part.shape_id for part in parts)} - known().keys()
            return bool(lacks)

        def measure() -> None:
            meter = BlockMeter(self.config, self.table.references_ms)
            self.table.add(meter.measure_archs([arch], known(), [arch]))

        self._measure(lacking, measure, f"{len(parts)} parts")
        self.sum = self.table.add_up(parts)
        return parts

    def timm_parts(self) -> list[Part]:
        """The layers of a timm model, likewise."""
        model = timm_model(self.subject.name, self.config.num_classes)
        cut = self._cut(model)
        parts = [part for part, _ in cut]
        self._measure_layers(cut)

        def measure() -> None:
            meter = BlockMeter(self.config, self.table.references_ms)
            macs = sum(part.block.macs for part in parts)
            self.table.add([meter.measure_network(self.subject.name, model, macs)])

        self._measure(lambda: self.again or self.table.median_ms(self.network) is None, measure, "the whole")
        self.sum = self.layer_table.add_up(parts)
        return parts

    def layers_of(self, arch: ArchSpec, parts: Sequence[Part]) -> dict[str, tuple[Efficiency, ...]]:
        """Each part's layers. Within a fused kernel none can be timed: then they are counted only."""
        if self.config.engine == "fused":
            counted = {part.block.name: [single(layer, "layer") for layer in part.block.layers] for part in parts}
            return {name: tuple(self._row(block, False, None) for block in of) for name, of in counted.items()}
        cut = self._cut(arch.build(self.config.num_classes))
        self._measure_layers(cut)
        found: dict[str, tuple[Efficiency, ...]] = {}
        for part, _ in cut:
            name = block_name(part.block.name)
            short = replace(part.block, name=part.block.name.removeprefix("blocks.").split(".", 2)[-1])
            row = self._row(short, False, self.layer_table.median_ms(part.shape))
            found[name] = (*found.get(name, ()), row)
        return found

    def analysis(self, parts: Sequence[Part], by_part: dict[str, tuple[Efficiency, ...]]) -> Analysis:
        network_ms, added = self.table.median_ms(self.network), self.sum
        assert network_ms is not None
        assert added is not None
        assert added.total_ms is not None
        rows = [self._row(part.block, part.fused, ms) for part, ms in zip(parts, added.part_ms, strict=True)]
        efficiency = _network(self.config, self.subject.title, rows, network_ms)
        if self.subject.arch is None and self.layer_table is not self.table:
            by_layer = f"{efficiency.subtitle}; layers alone in {self.layer_table.config.engine}"
            efficiency = replace(efficiency, subtitle=by_layer)
        doubtful = (self.layer_table if self.subject.arch is None else self.table).doubtful(parts)
        doubtful += [row for row in self.table.doubtful_rows([shape_id(self.network)]) if row not in doubtful]
        return Analysis(efficiency, added.total_ms, network_ms, by_part, tuple(doubtful))

    def _row(self, block: Block, fused: bool, ms: float | None) -> Efficiency:
        return Efficiency(block, self.table.machine, fused, None if ms is None else max(ms, 1e-6) / 1e3)

    def _cut(self, network: nn.Module) -> list[tuple[Part, nn.Module]]:
        """A network's layers, of which one forward pass tells the inputs; nobody measures meanwhile."""
        try:
            with self.lock.training(partial(self.note, WAITING)):
                return layers(network, self.layer_table.config)
        except (AssertionError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            size = self.config.resolution
            reason = f"does not run on images of {size}x{size} ({error})"
            raise UsageError(f"analyze: {self.subject.name} {reason}") from error

    def _measure_layers(self, cut: Sequence[tuple[Part, nn.Module]]) -> None:
        table, ids = self.layer_table, {part.shape_id for part, _ in cut}

        def measure() -> None:
            meter = BlockMeter(table.config, table.references_ms)
            table.add(meter.measure_layers(cut, self._known(table, {CALL_ID, *ids})))

        self._measure(
            lambda: bool({CALL_ID, *ids} - self._known(table, ids).keys()), measure, f"{len(ids)} shapes of layers"
        )

    def _known(self, table: BlockTable, ids: Collection[str]) -> dict[str, float]:
        """What needs no measuring, of all that is in a table."""
        return {key: ms for key, ms in table.known.items() if not (self.again and key in ids)}

    def _measure(self, lacking: Callable[[], bool], measure: Callable[[], None], what: str) -> None:
        if not lacking():
            return
        with self.lock.measuring(partial(self.note, WAITING)):
            # Another process may have measured it while we waited.
            self.table.load()
            self.layer_table.load()
            if lacking():
                self.note(f"measuring {self.subject.title}: {what}")
                measure()
        self.table.load()


def errors(
    table: BlockTable, archs: Sequence[ArchSpec], latencies_ms: Sequence[float], anchor_ms: float,
    anchor_in_table_ms: float | None,
) -> list[float]:  # fmt: skip
    """How far the sums of parts are from networks' own latencies, as shares of these.

    A study's latencies are corrected to the day when its anchor was measured, the table's to that of its yardstick. The
    anchor, which is in the table too, tells how these compare; where it is not, nothing does.
    """
    if anchor_in_table_ms is None:
        return []
    scale = anchor_ms / anchor_in_table_ms
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
