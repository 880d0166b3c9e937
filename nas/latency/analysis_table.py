"""Tables and lines for a terminal that show an analysis, or what the block latency table holds of a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from rich.table import Table

from kernels.device_info import DeviceInfo
from nas.latency.analysis import Analysis
from nas.latency.block_table import BlockTable
from nas.latency.parts import arch_parts
from nas.latency.roofline import Efficiency, waterline
from nas.latency.subjects import Subject
from nas.reporting import console_table
from studies import BlockLatency, Store

COLUMNS = (
    "part", "kind", "MMACs", "KB fused", "KB by layer", "FLOP/B", "t* us", "t us", "of peak", "gap us", "bound by",
    "workspace KB",
)  # fmt: skip
# Columns of the table that a terminal of fewer characters than `WIDE` does not show.
WIDE, WIDE_ONLY = 120, ("kind", "KB fused", "KB by layer", "workspace KB")


def analysis_table(analysis: Analysis, width: int) -> Table:
    """The rows of an analysis as a table, with times in microseconds; a narrow terminal does not show all columns.

    Args:
        width: the terminal's width, in characters.
    """
    efficiency = analysis.efficiency
    columns = [name for name in COLUMNS if width >= WIDE or name not in WIDE_ONLY]
    title = f"{efficiency.title}\n{efficiency.subtitle}"
    table = console_table(title)
    for name in columns:
        left = name in ("part", "kind", "bound by")
        table.add_column(name, justify="left" if left else "right", no_wrap=name != "part", overflow="fold")
    for row in efficiency.rows:
        by_name = dict(zip(COLUMNS, cells(row), strict=True))
        table.add_row(*(by_name[name] for name in columns))
        for layer in analysis.layers.get(row.block.name, ()):
            by_name = dict(zip(COLUMNS, cells(layer), strict=True))
            table.add_row("  " + by_name[columns[0]], *(by_name[name] for name in columns[1:]), style="dim")
    return table


def cells(row: Efficiency) -> tuple[str, ...]:
    """The cells of a row, in the order of `COLUMNS`; those of what was not measured are empty."""
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


def analysis_lines(analysis: Analysis) -> list[str]:
    """The totals of an analysis, and a warning if some of it is doubtful."""
    efficiency = analysis.efficiency
    macs = sum(row.block.macs for row in efficiency.rows)
    rows = [row for row in efficiency.rows if row.block.macs]
    best = f"waterline {efficiency.waterline:.1%}"
    if any(len(row.block.layers) > 1 and not row.fused for row in rows):
        best += f" (layer by layer; {waterline([replace(row, fused=True) for row in rows]):.1%} with fused blocks)"
    found = [
        f"{analysis.network_ms:.4f} ms as a network, {analysis.sum_ms:.4f} ms as the sum of its parts "
        f"({analysis.error:+.1%})",
        f"{macs / 1e6:,.2f} MMACs; efficiency {efficiency.achieved:.1%} of "
        f"{2 * efficiency.machine.macs_per_s / 1e9:,.1f} GFLOP/s, {best}",
    ]
    if analysis.launches is not None:
        found.append(analysis.launches)
    return found + doubtful_lines(analysis.doubtful)


def doubtful_lines(rows: Sequence[BlockLatency]) -> list[str]:
    """A warning about doubtful rows, if there are any."""
    if not rows:
        return []
    widest = max(row.interval_share for row in rows)
    throttled = " or measured on a throttling GPU" if any(row.throttled for row in rows) else ""
    return [
        f"{len(rows)} of these figures ended at the time cap{throttled}: known within {widest:.0%} at worst "
        "(--again measures anew)"
    ]


def table_lines(store: Store, subject: Subject) -> list[str]:
    """The latency of an architecture by the block latency table, and what is missing there; nothing is measured."""
    config = subject.config
    assert subject.arch is not None
    table = BlockTable(store, DeviceInfo.of(torch.device(config.device)), config)
    parts = arch_parts(subject.arch, config)
    added = table.add_up(parts)
    where = (
        f"{table.device.name}, {config.engine_label}, {config.dtype}, batch {config.batch_size}, "
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
    network_ms = table.median_ms(subject.shape)
    if network_ms is not None:
        found.append(f"{network_ms:.4f} ms measured as a whole")
    return found
