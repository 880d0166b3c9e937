"""Reports of a benchmark: tables, statistics beside their goals, a summary in JSON, and a plot.

A record is one line of `results.jsonl`, see `kernels.lab.benchmark`, which also explains the engines.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any, cast

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

Record = Mapping[str, Any]

ENGINES = ("fused", "compiled", "eager")
COLOURS = {"fused": "#d1495b", "compiled": "#30638e", "eager": "#9aa5b1"}
# Width of the tables in a file, which would otherwise be folded to 80 columns.
WIDTH = 190
# Characters in a cell of a table; a longer reason is printed below the tables.
LONGEST_CELL = 12
# The reference network that is compared with a peer of its size, and that peer.
REFERENCE, PEER = "b128 convfirst_4.5g", "b128 convnext_tiny"


# -- Reading records -------------------------------------------------------------------------------------------------


def measured(record: Record, engine: str) -> Mapping[str, Any]:
    """The measured values of an engine, the fields of `benchmark.Measured`; empty if it did not take part."""
    return cast(Mapping[str, Any], record.get("contenders", {}).get(engine, {}))


def median_ms(record: Record, engine: str) -> float | None:
    """The engine's time; None if it failed or was wrong."""
    return measured(record, engine).get("median_ms")


def speed_up(record: Record, engine: str, over: str) -> float | None:
    """The speed of one engine over that of another; None if either has no time."""
    own, other = median_ms(record, engine), median_ms(record, over)
    return other / own if own and other else None


def share(record: Record, engine: str, of: str) -> float | None:
    """A bound of the row, such as "bound_ms", as a share of an engine's time; None if either is missing."""
    own = median_ms(record, engine)
    return record[of] / own if own and of in record else None


def images_per_second(record: Record, engine: str) -> float | None:
    own = median_ms(record, engine)
    return 1e3 * record["row"]["batch"] / own if own else None


def of_kind(records: Iterable[Record], kind: str) -> list[Record]:
    return [record for record in records if record["kind"] == kind]


# -- Statistics and goals --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Statistic:
    """One number that summarises rows.

    Args:
        name: name of the number.
        value: a geometric mean, a ratio or a share; None if no row has one.
        rows: number of rows that it summarises.
        goal: the least value that counts as success; None if there is no goal.
    """

    name: str
    value: float | None
    rows: int
    goal: float | None = None

    @property
    def met(self) -> bool | None:
        return None if self.value is None or self.goal is None else self.value >= self.goal


def _mean(name: str, values: Iterable[float | None], goal: float | None = None) -> Statistic:
    known = [value for value in values if value is not None]
    return Statistic(name, geometric_mean(known) if known else None, len(known), goal)


def statistics(records: Sequence[Record]) -> list[Statistic]:
    """Means of blocks and the networks' two goals, then means of blocks by batch."""
    blocks = of_kind(records, "block")

    def select(wanted: Callable[[Mapping[str, Any]], bool]) -> list[Record]:
        return [record for record in blocks if wanted(record["row"])]

    narrow = select(lambda row: row["batch"] == 128 and row["channels"] <= 128)
    middle = select(lambda row: row["batch"] == 128 and 64 <= row["channels"] <= 256)
    summarised = [
        _mean("fused over compiled, batch 128, C <= 128", (speed_up(r, "fused", "compiled") for r in narrow), 2.5),
        _mean("share of bound, batch 128, C 64 to 256", (share(r, "fused", "bound_ms") for r in middle), 0.7),
        _mean("share of roofline, batch 128, C 64 to 256", (share(r, "fused", "roofline_ms") for r in middle)),
    ]
    # The tuner runs a block layer by layer if that is faster.
    chosen = [
        speed_up(record, "fused", "eager") if measured(record, "fused")["notes"]["chosen"] else 1.0
        for record in blocks
        if median_ms(record, "fused")
    ]
    slowest = min((value for value in chosen if value is not None), default=None)
    summarised.append(Statistic("what the tuner chose over eager, least of all blocks", slowest, len(chosen), 1.0))
    by_name = {record["name"]: record for record in of_kind(records, "network")}
    reference, peer = by_name.get(REFERENCE, {}), by_name.get(PEER, {})
    own, other = median_ms(reference, "fused"), median_ms(peer, "compiled")
    summarised += [
        _mean(f"{REFERENCE} fused over {PEER} compiled, images/s", [other / own if own and other else None], 1.5),
        _mean(f"{REFERENCE} fused, share of measured peak", [measured(reference, "fused").get("efficiency")], 0.55),
    ]
    for batch in sorted({record["row"]["batch"] for record in blocks}):
        of_batch = [record for record in blocks if record["row"]["batch"] == batch]
        summarised += [
            _mean(f"fused over {over}, batch {batch}", (speed_up(r, "fused", over) for r in of_batch), goal)
            for over, goal in (("compiled", 1.5 if batch == 1 else None), ("eager", None))
        ]
    return summarised


# -- Text ------------------------------------------------------------------------------------------------------------


def _text(value: float | None, form: str = ".3g") -> str:
    return "" if value is None else format(value, form)


def _time(record: Record, engine: str) -> str:
    """An engine's time in ms, or the reason why it has none."""
    result = measured(record, engine)
    return result.get("error") or _text(result.get("median_ms"), ".4g")


def _cell(record: Record, engine: str) -> str:
    """An engine's time as `_time` gives it, without the long reasons, which `failures` lists below the tables."""
    text = _time(record, engine)
    return text if len(text) <= LONGEST_CELL else "failed"


def failures(records: Iterable[Record]) -> list[str]:
    """The reasons why rows, and engines in them, have no time, if they do not fit into a cell."""
    lines = []
    for record in records:
        if "error" in record:
            lines.append(f"{record['kind']} {record['name']}: {record['error']}")
        lines += [
            f"{record['kind']} {record['name']}, {engine}: {_time(record, engine)}"
            for engine in ENGINES
            if _cell(record, engine) == "failed"
        ]
    return lines


def line(record: Record) -> str:
    """A row in one line, printed as soon as it is measured."""
    head = f"{record['kind']} {record['name']}: "
    tail = f" ({record['seconds']:.0f} s)"
    if "error" in record:
        return f"{head}{record['error']}{tail}"
    return (
        head + ", ".join(f"{name} {_time(record, name)}" for name in ENGINES if measured(record, name)) + " ms" + tail
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=not index)
    return table


def _megabytes(record: Record, engine: str) -> str:
    held = measured(record, engine).get("workspace_bytes")
    return _text(held and held / 1e6, ".4g")


def blocks_table(records: Sequence[Record]) -> Table:
    """A table of the blocks.

    Its columns are the roofline, the bound of any kernel and what sets it, times, speed-ups of the fused kernel, its
    shares of both, the resource on which its tiling takes longest by count, and memory.
    """
    times = [f"{engine} ms" for engine in ENGINES]
    table = _table(
        "Blocks", "block", "roofline ms", "bound ms", "set by", *times, "over compiled", "over eager", "of roofline",
        "of bound", "binds", *(f"{engine} MB" for engine in ENGINES), "tuner",
    )  # fmt: skip
    for record in of_kind(records, "block"):
        if "error" in record:
            table.add_row(record["name"], "failed")
            continue
        table.add_row(
            record["name"], *(_text(record.get(key)) for key in ("roofline_ms", "bound_ms")),
            record.get("bound_term", ""),
            *(_cell(record, engine) for engine in ENGINES),
            *(_text(speed_up(record, "fused", over), ".2f") for over in ("compiled", "eager")),
            *(_text(share(record, "fused", of), ".0%") for of in ("roofline_ms", "bound_ms")),
            record.get("largest_term", ""),
            *(_megabytes(record, engine) for engine in ENGINES),
            measured(record, "fused").get("notes", {}).get("tuner", ""),
        )  # fmt: skip
    return table


def networks_table(records: Sequence[Record]) -> Table:
    """A table with a row for each network and engine.

    Its columns are images per second, latency of a batch, work, share of peak, memory, and the seconds to compile, tune
    and run the network once.
    """
    table = _table("Networks", "network", "engine", "images/s", "latency ms", "GMAC", "of peak", "MB", "ready s")
    for record in of_kind(records, "network"):
        if "error" in record:
            table.add_row(record["name"], "failed")
            continue
        for engine in filter(record["contenders"].__contains__, ENGINES):
            table.add_row(
                record["name"], engine, _text(images_per_second(record, engine), ".0f"), _cell(record, engine),
                _text(record["macs"] / record["row"]["batch"] / 1e9, ".3g"),
                _text(measured(record, engine).get("efficiency"), ".1%"), _megabytes(record, engine),
                _text(measured(record, engine).get("ready_seconds"), ".1f"),
            )  # fmt: skip
    return table


def statistics_table(rows: Iterable[Statistic]) -> Table:
    table = _table("Geometric means, and the goals", "of", "value", "goal", "rows")
    for each in rows:
        met = {True: " met", False: " missed", None: ""}[each.met]
        table.add_row(each.name, _text(each.value, ".2f"), _text(each.goal, ".2f") + met, str(each.rows))
    return table


# -- Plot ------------------------------------------------------------------------------------------------------------


def plot(records: Sequence[Record], title: str, path: Path) -> None:
    """Plot the blocks' speed-up over Inductor and share of the bound, and the networks' images per second over GMAC."""
    # Unlike pyplot it needs no display and keeps no state.
    from matplotlib.figure import Figure

    blocks, networks = of_kind(records, "block"), of_kind(records, "network")
    blocks = [record for record in blocks if median_ms(record, "compiled")][::-1]
    figure = Figure(figsize=(15, 3 + 0.3 * len(blocks)), layout="constrained")
    speed, bound, rates = figure.subplots(1, 3, width_ratios=(3, 2, 4))
    places = range(len(blocks))
    for offset, engine in ((0.2, "fused"), (-0.2, "eager")):
        lengths = [speed_up(record, engine, "compiled") or 0 for record in blocks]
        speed.barh([place + offset for place in places], lengths, 0.4, color=COLOURS[engine], label=engine)
    speed.axvline(1, color=COLOURS["compiled"], lw=1, label="compiled")
    speed.set_yticks(places, [record["name"] for record in blocks], fontsize=8)
    speed.set_xlabel("times as fast as torch.compile, max-autotune")
    speed.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)

    shares = [100 * (share(record, "fused", "bound_ms") or 0) for record in blocks]
    bound.barh(places, shares, 0.6, color=COLOURS["fused"])
    bound.set_yticks(places, [record.get("bound_term", "") for record in blocks], fontsize=8)
    bound.set_xlim(0, max([100, *shares]))
    bound.set_xlabel("fused, % of the bound that is named")

    for engine in ENGINES:
        label: str | None = engine
        for record in networks:
            rate = images_per_second(record, engine)
            if rate is None:
                continue
            row = record["row"]
            at = (record["macs"] / row["batch"] / 1e9, rate)
            marker = "^" if row["batch"] == 1 else "o"
            rates.scatter(*at, s=24, color=COLOURS[engine], marker=marker, label=label)
            label = None
            if engine != "eager":
                rates.annotate(row["model"], at, (4, 3), textcoords="offset points", fontsize=7)
    if rates.collections:
        rates.set(xscale="log", yscale="log")
        # Room for the names beside the points.
        rates.margins(x=0.2)
        rates.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)
    rates.set_xlabel("GMAC an image; triangles are batch 1")
    rates.set_ylabel("images a second")
    for axes in (speed, bound, rates):
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120, format="png")


# -- All of it -------------------------------------------------------------------------------------------------------


def write(folder: Path, records: Sequence[Record], provenance: Mapping[str, Any]) -> None:
    """Write summary.json and plot.png into the folder, each whole or not at all, and print the tables.

    Args:
        records: records of one machine, with the same versions and sources.
        provenance: device, versions, limits, clocks and command, which belong beside every number.
    """
    summarised = statistics(records)
    summary = {
        **provenance,
        "figures": [{**asdict(each), "met": each.met} for each in summarised],
        "records": list(records),
    }
    title = f"{provenance['device']}, torch {provenance['torch']}, {provenance['commit']}, {provenance['end']}"
    _replace(folder / "summary.json", lambda path: path.write_text(json.dumps(summary, indent=1) + "\n"))
    _replace(folder / "plot.png", lambda path: plot(records, title, path))
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    for name, value in provenance["limits"].items():
        console.print(f"{name}: {value:g}")
    for table in (blocks_table(records), networks_table(records), statistics_table(summarised)):
        if table.row_count:
            console.print(table)
    for failure in failures(records):
        console.print(failure, soft_wrap=True, markup=False)
    console.print(f"{folder}: results.jsonl, summary.json, plot.png", soft_wrap=True)


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    """Make a file beside the path, and put it in the path's place once it is whole."""
    part = path.with_name(path.name + ".part")
    make(part)
    os.replace(part, path)
