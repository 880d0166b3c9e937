"""What the rows of a benchmark come to: tables, means beside their goals, a summary in JSON, and a plot.

A record is one line of `results.jsonl`, see `kernels.lab.benchmark`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

Record = Mapping[str, Any]

ENGINES = ("fused", "compiled", "eager")
COLOURS = {"fused": "#d1495b", "compiled": "#30638e", "eager": "#9aa5b1"}
# Where output goes to a file, tables are not folded to 80 columns.
WIDTH = 170
# Of a table, in characters; what is longer is told below it.
LONGEST_CELL = 12
# The reference network of the size of this peer, and that peer.
REFERENCE, PEER = "b128 convfirst_4.5g", "b128 convnext_tiny"


# -- Reading records -------------------------------------------------------------------------------------------------


def contender(record: Record, engine: str) -> Mapping[str, Any]:
    """What a row tells of an engine; empty if it was no contender."""
    found: Mapping[str, Any] = record.get("contenders", {}).get(engine, {})
    return found


def median_ms(record: Record, engine: str) -> float | None:
    """None where the engine has no time, as it failed or was wrong."""
    return contender(record, engine).get("median_ms")


def speed_up(record: Record, engine: str, over: str) -> float | None:
    """How many times as fast one engine is as another; None where either has no time."""
    own, other = median_ms(record, engine), median_ms(record, over)
    return other / own if own and other else None


def share(record: Record, engine: str, of: str) -> float | None:
    """A bound of the row, such as "bound_ms", as a share of an engine's time."""
    own = median_ms(record, engine)
    return record[of] / own if own and of in record else None


def images_per_second(record: Record, engine: str) -> float | None:
    own = median_ms(record, engine)
    return 1e3 * record["row"]["batch"] / own if own else None


def of_kind(records: Iterable[Record], kind: str) -> list[Record]:
    return [record for record in records if record["kind"] == kind]


# -- Means and goals -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Figure:
    """One number that sums up rows.

    Args:
        name: what it is of.
        value: a geometric mean, a ratio or a share; None if no row gives it.
        rows: how many rows it is of.
        goal: to be reached; None where there is none.
    """

    name: str
    value: float | None
    rows: int
    goal: float | None = None

    @property
    def met(self) -> bool | None:
        return None if self.value is None or self.goal is None else self.value >= self.goal


def _mean(name: str, values: Iterable[float | None], goal: float | None = None) -> Figure:
    known = [value for value in values if value is not None]
    return Figure(name, geometric_mean(known) if known else None, len(known), goal)


def figures(records: Sequence[Record]) -> list[Figure]:
    """Means of blocks and the networks' two goals, then blocks by batch."""
    blocks = of_kind(records, "block")

    def select(wanted: Callable[[Mapping[str, Any]], bool]) -> list[Record]:
        return [record for record in blocks if wanted(record["row"])]

    narrow = select(lambda row: row["batch"] == 128 and row["channels"] <= 128)
    middle = select(lambda row: row["batch"] == 128 and 64 <= row["channels"] <= 256)
    found = [
        _mean("fused over compiled, batch 128, C <= 128", (speed_up(r, "fused", "compiled") for r in narrow), 2.5),
        _mean("share of bound, batch 128, C 64 to 256", (share(r, "fused", "bound_ms") for r in middle), 0.7),
        _mean("share of roofline, batch 128, C 64 to 256", (share(r, "fused", "roofline_ms") for r in middle)),
    ]
    # A block that is better unfused runs so.
    chosen = [
        speed_up(record, "fused", "eager") if contender(record, "fused")["notes"]["chosen"] else 1.0
        for record in blocks
        if median_ms(record, "fused")
    ]
    slowest = min((value for value in chosen if value is not None), default=None)
    found.append(Figure("what the tuner chose over eager, least of all blocks", slowest, len(chosen), 1.0))
    by_name = {record["name"]: record for record in of_kind(records, "network")}
    reference, peer = by_name.get(REFERENCE, {}), by_name.get(PEER, {})
    own, other = median_ms(reference, "fused"), median_ms(peer, "compiled")
    found += [
        _mean(f"{REFERENCE} fused over {PEER} compiled, images/s", [other / own if own and other else None], 1.5),
        _mean(f"{REFERENCE} fused, share of measured peak", [contender(reference, "fused").get("efficiency")], 0.55),
    ]
    for batch in sorted({record["row"]["batch"] for record in blocks}):
        of_batch = [record for record in blocks if record["row"]["batch"] == batch]
        found += [
            _mean(f"fused over {over}, batch {batch}", (speed_up(r, "fused", over) for r in of_batch), goal)
            for over, goal in (("compiled", 1.5 if batch == 1 else None), ("eager", None))
        ]
    return found


# -- Text ------------------------------------------------------------------------------------------------------------


def _text(value: float | None, form: str = ".3g") -> str:
    return "" if value is None else format(value, form)


def _time(record: Record, engine: str) -> str:
    """An engine's time in ms, or why it has none."""
    found = contender(record, engine)
    return found.get("error") or _text(found.get("median_ms"), ".4g")


def _cell(record: Record, engine: str) -> str:
    """As `_time`, but for long reasons, which `failures` tells below the tables."""
    text = _time(record, engine)
    return text if len(text) <= LONGEST_CELL else "failed"


def failures(records: Iterable[Record]) -> list[str]:
    """Why rows, and engines in them, have no time, where that does not fit a cell."""
    found = []
    for record in records:
        if "error" in record:
            found.append(f"{record['kind']} {record['name']}: {record['error']}")
        found += [
            f"{record['kind']} {record['name']}, {engine}: {_time(record, engine)}"
            for engine in ENGINES
            if _cell(record, engine) == "failed"
        ]
    return found


def line(record: Record) -> str:
    """A row as one line, for a run that goes on."""
    head = f"{record['kind']} {record['name']}: "
    tail = f" ({record['seconds']:.0f} s)"
    if "error" in record:
        return f"{head}{record['error']}{tail}"
    return (
        head + ", ".join(f"{name} {_time(record, name)}" for name in ENGINES if contender(record, name)) + " ms" + tail
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=not index)
    return table


def _megabytes(record: Record, engine: str) -> str:
    held = contender(record, engine).get("workspace_bytes")
    return _text(held and held / 1e6, ".4g")


def blocks_table(records: Sequence[Record]) -> Table:
    """A row each: the bound and what sets it, times, speed-ups of the fused kernel, shares, memory."""
    times = [f"{engine} ms" for engine in ENGINES]
    table = _table(
        "Blocks", "block", "bound ms", "set by", *times, "over compiled", "over eager", "of bound", "of roofline",
        *(f"{engine} MB" for engine in ENGINES), "tuner",
    )  # fmt: skip
    for record in of_kind(records, "block"):
        if "error" in record:
            table.add_row(record["name"], "failed")
            continue
        table.add_row(
            record["name"], _text(record.get("bound_ms")), record.get("bound_term", ""),
            *(_cell(record, engine) for engine in ENGINES),
            *(_text(speed_up(record, "fused", over), ".2f") for over in ("compiled", "eager")),
            *(_text(share(record, "fused", of), ".0%") for of in ("bound_ms", "roofline_ms")),
            *(_megabytes(record, engine) for engine in ENGINES),
            contender(record, "fused").get("notes", {}).get("tuner", ""),
        )  # fmt: skip
    return table


def networks_table(records: Sequence[Record]) -> Table:
    """A row for each network and engine: images a second, latency of a batch, work, share of peak, memory, and the
    seconds to compile, tune and run it once."""
    table = _table("Networks", "network", "engine", "images/s", "latency ms", "GMAC", "of peak", "MB", "ready s")
    for record in of_kind(records, "network"):
        if "error" in record:
            table.add_row(record["name"], "failed")
            continue
        for engine in filter(record["contenders"].__contains__, ENGINES):
            table.add_row(
                record["name"], engine, _text(images_per_second(record, engine), ".0f"), _cell(record, engine),
                _text(record["macs"] / record["row"]["batch"] / 1e9, ".3g"),
                _text(contender(record, engine).get("efficiency"), ".1%"), _megabytes(record, engine),
                _text(contender(record, engine).get("ready_seconds"), ".1f"),
            )  # fmt: skip
    return table


def figures_table(found: Iterable[Figure]) -> Table:
    table = _table("Geometric means, and the goals", "of", "value", "goal", "rows")
    for figure in found:
        met = {True: " met", False: " missed", None: ""}[figure.met]
        table.add_row(figure.name, _text(figure.value, ".2f"), _text(figure.goal, ".2f") + met, str(figure.rows))
    return table


# -- Plot ------------------------------------------------------------------------------------------------------------


def plot(records: Sequence[Record], title: str, path: Path) -> None:
    """Blocks: speed-up over Inductor and share of the bound. Networks: images a second against GMAC."""
    # Without a display and without the state of pyplot.
    from matplotlib.figure import Figure as Drawing

    blocks, networks = of_kind(records, "block"), of_kind(records, "network")
    blocks = [record for record in blocks if median_ms(record, "compiled")][::-1]
    drawing = Drawing(figsize=(15, 3 + 0.3 * len(blocks)), layout="constrained")
    speed, bound, rates = drawing.subplots(1, 3, width_ratios=(3, 2, 4))
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
        # For the names beside the points.
        rates.margins(x=0.2)
        rates.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)
    rates.set_xlabel("GMAC an image; triangles are batch 1")
    rates.set_ylabel("images a second")
    for axes in (speed, bound, rates):
        axes.grid(alpha=0.3)
    drawing.suptitle(title, fontsize=10)
    drawing.savefig(path, dpi=120, format="png")


# -- All of it -------------------------------------------------------------------------------------------------------


def write(folder: Path, records: Sequence[Record], provenance: Mapping[str, Any]) -> None:
    """Write summary.json and plot.png into the folder, each whole or not at all, and print the tables.

    Args:
        records: of one machine, versions and sources.
        provenance: device, versions, limits, clocks and command, as they belong beside every figure.
    """
    found = figures(records)
    summary = {
        **provenance,
        "figures": [{**asdict(figure), "met": figure.met} for figure in found],
        "records": list(records),
    }
    title = f"{provenance['device']}, torch {provenance['torch']}, {provenance['commit']}, {provenance['end']}"
    _replace(folder / "summary.json", lambda path: _write_text(path, json.dumps(summary, indent=1) + "\n"))
    _replace(folder / "plot.png", lambda path: plot(records, title, path))
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    for name, value in provenance["limits"].items():
        console.print(f"{name}: {value:g}")
    for table in (blocks_table(records), networks_table(records), figures_table(found)):
        if table.row_count:
            console.print(table)
    for failure in failures(records):
        console.print(failure, soft_wrap=True, markup=False)
    console.print(f"{folder}: results.jsonl, summary.json, plot.png", soft_wrap=True)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    part = path.with_name(path.name + ".part")
    make(part)
    os.replace(part, path)
