"""The report's figures as PNGs: the course of a search, its networks as stacks of stages, its contenders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nas.display.plots import BOUND_COLOUR, FRONT_COLOUR, GAP_COLOUR, OTHERS_COLOUR
from nas.validation.contenders import Contender, ContenderKind
from search_spaces import ArchSpec, StageSpec

DPI = 150
# Of the architectures, whose letters are small; the page shows them at half of it.
FINE_DPI = 200
PARTS = {"training": BOUND_COLOUR, "latency": GAP_COLOUR, "all else": OTHERS_COLOUR}
KIND_STYLES = {
    ContenderKind.TIMM: ("s", "#3d6f9e", "known network"),
    ContenderKind.DEFAULT: ("D", "#7a5195", "ConvFirst, not searched"),
    ContenderKind.FOUND: ("o", FRONT_COLOUR, "found by this search"),
}
# Light enough for black letters, each darker than the one before: kernel sizes have an order.
KERNEL_COLOURS = ("#fdeebf", "#fbcb74", "#f2994a", "#dd6e42", "#c0563f")
ENDS_COLOUR = "#d5dae0"
MOST_COLUMNS = 12


def time_unit(seconds: float) -> tuple[str, float]:
    """One in which a span of time is no long number, and its seconds."""
    if seconds < 300:
        return "seconds", 1
    return ("minutes", 60) if seconds < 3 * 3600 else ("hours", 3600)


def _figure(width: float, height: float) -> Any:
    # Without a display and without the state of pyplot.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def plot_hypervolume(course: pd.DataFrame, reference_ms: float, path: Path) -> None:
    """Hypervolume over candidates and over seconds.

    Args:
        course: a row a candidate, with `seconds` since the beginning and `hypervolume`.
        reference_ms: the latency up to which it is counted.
    """
    figure = _figure(9, 3.4)
    unit, scale = time_unit(course["seconds"].iloc[-1])
    for axes, values, label in zip(
        figure.subplots(1, 2, sharey=True), (range(len(course) + 1), [0, *course["seconds"] / scale]),
        ("candidates", f"{unit} of evaluating candidates"), strict=True,
    ):  # fmt: skip
        axes.step(values, [0, *course["hypervolume"]], where="post", color=FRONT_COLOUR, lw=1.6)
        axes.set_xlabel(label)
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel(f"hypervolume up to {reference_ms:.3g} ms")
    figure.savefig(path, dpi=DPI)


def plot_time(course: pd.DataFrame, path: Path) -> None:
    """Time by part, piled up over the candidates.

    Args:
        course: a row a candidate, with a column for each of `PARTS`, in seconds.
    """
    figure = _figure(9, 3.2)
    axes = figure.add_subplot()
    total = sum(course[part].sum() for part in PARTS)
    unit, scale = time_unit(total)
    piled = [np.append(0, course[part].cumsum() / scale) for part in PARTS]
    axes.stackplot(range(len(course) + 1), piled, labels=list(PARTS), colors=list(PARTS.values()))
    axes.set_xlabel("candidates")
    axes.set_ylabel(f"{unit}, piled up")
    axes.set_xlim(0, len(course))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="upper left", frameon=False)
    figure.savefig(path, dpi=DPI)


def plot_contenders(contenders: Sequence[Contender], path: Path) -> None:
    """Accuracy against latency of networks that were trained alike, each with its name."""
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = _figure(8, 5)
    axes = figure.add_subplot()
    for kind, (marker, colour, label) in KIND_STYLES.items():
        members = [contender for contender in contenders if contender.kind == kind]
        if not members:
            continue
        latency = np.array([member.latency_ms for member in members])
        spread = [
            np.maximum(0, latency - [member.latency_p20_ms for member in members]),
            np.maximum(0, [member.latency_p80_ms for member in members] - latency),
        ]
        axes.errorbar(
            latency, [100 * member.accuracy for member in members], xerr=spread, fmt=marker, ms=6, lw=1, color=colour,
            label=label, zorder=3,
        )  # fmt: skip
        for member in members:
            axes.annotate(
                plain(member.name), (member.latency_ms, 100 * member.accuracy), (0, 6), textcoords="offset points",
                ha="center", va="bottom", fontsize=8,
            )  # fmt: skip
    if spans_decades([contender.latency_ms for contender in contenders]):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.12, y=0.1)
    axes.set_xlabel("latency of one batch in ms, drift-corrected median; bars from p20 to p80")
    axes.set_ylabel("accuracy of the long training in %")
    axes.grid(alpha=0.3)
    # Below the axes, where it hides nothing.
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, frameon=False)
    figure.savefig(path, dpi=DPI)


def spans_decades(latencies_ms: Sequence[float]) -> bool:
    """Whether latencies want an axis of equal ratios."""
    return max(latencies_ms) > 8 * min(latencies_ms)


def plain(text: str) -> str:
    """A text in which matplotlib finds no formulas."""
    return text.replace("$", r"\$")


# -- Architectures ---------------------------------------------------------------------------------------------------

# In inches: a column, the margin on the left, a block, a line of text, the space between rows, the height of the key.
COLUMN, MARGIN, BLOCK, LINE, GAP, KEY = 1.06, 0.95, 0.16, 0.15, 0.14, 0.64
DARK, PALE = "#1b1f24", "#69737d"


@dataclass(frozen=True)
class _Cell:
    """A network's part of one row: a box, and words below it, two a line.

    Args:
        share: of the widest box.
        blocks: how many are piled up.
    """

    share: float
    blocks: int
    colour: str
    words: tuple[str, ...]


def chosen_members(front: pd.DataFrame) -> pd.DataFrame:
    """The members of a front that there is room to draw, both ends among them, from the fastest."""
    if len(front) <= MOST_COLUMNS:
        return front
    return front.iloc[np.unique(np.linspace(0, len(front) - 1, MOST_COLUMNS).round().astype(int))]


def plot_architectures(front: pd.DataFrame, path: Path) -> None:
    """Networks as stacks of stages, a column each, their stages side by side.

    A box is as wide as its stage has channels, as high as it has blocks, and has the colour of its kernel size. Words
    that differ from those of the column before are bold.

    Args:
        front: rows of `pareto_front`, from the fastest to the most accurate.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    archs = [ArchSpec.from_json(text) for text in front["arch"]]
    rows = _rows(archs)
    heads = [
        ("accuracy", [f"{100 * value:.1f} %" for value in front["accuracy"]]),
        ("latency", [f"{value:#.3g} ms" for value in front["latency_ms"]]),
        ("trial", [str(value) for value in front["number"]]),
    ]
    feet = [
        ("parameters", [f"{value / 1e3:,.0f} k" for value in front["params"]]),
        ("MACs", [f"{value / 1e6:,.1f} M" for value in front["macs"]]),
    ]
    heights = [_height(cells) for _, cells in rows]
    width = max(MARGIN + COLUMN * len(archs), 5.5)
    height = KEY + 0.12 + LINE * (len(heads) + len(feet)) + sum(heights) + GAP * (len(rows) + 1)
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    for column in range(0, len(archs), 2):
        corner = (MARGIN + column * COLUMN, KEY)
        axes.add_patch(Rectangle(corner, COLUMN, height - KEY, facecolor="#f3f5f7", lw=0, zorder=0))
    _draw_key(axes, archs)
    top = _draw_words(axes, KEY + 0.06, heads, bold=True) + GAP
    for (name, cells), tall in zip(rows, heights, strict=True):
        deepest = max(cell.blocks for cell in cells if cell)
        _word(axes, 0.08, top + max(BLOCK * deepest, LINE) / 2, name, DARK, ha="left", va="center")
        before: _Cell | None = None
        for column, cell in enumerate(cells):
            if cell:
                _draw_cell(axes, column, top, deepest, cell, before)
            before = cell
        top += tall + GAP
    _draw_words(axes, top, feet, bold=False)
    figure.savefig(path, dpi=FINE_DPI)


def _rows(archs: Sequence[ArchSpec]) -> list[tuple[str, list[_Cell | None]]]:
    """Stem, stages and head: what a row is called, and a cell for each network that has it."""
    colours = _kernel_colours(archs)
    widest = max(max(arch.stem_width, *(stage.width for stage in arch.stages)) for arch in archs)
    widest_head = max(arch.head_width for arch in archs)
    rows: list[tuple[str, list[_Cell | None]]] = [
        ("activation", [_Cell(0, 0, "", (arch.activation,)) for arch in archs]),
        ("stem", [_Cell(arch.stem_width / widest, 1, ENDS_COLOUR, (str(arch.stem_width),)) for arch in archs]),
    ]
    for index in range(max(len(arch.stages) for arch in archs)):
        stages = [arch.stages[index] if index < len(arch.stages) else None for arch in archs]
        strides = {stage.stride for stage in stages if stage}
        told = len(strides) > 1
        name = f"stage {index + 1}" + ("" if told else f"\nstride {strides.pop()}")
        rows.append((
            name,
            [
                _Cell(stage.width / widest, stage.blocks, colours[stage.kernel_size], _words(stage, told))
                if stage else None
                for stage in stages
            ],
        ))  # fmt: skip
    heads = [_Cell(arch.head_width / widest_head, 1, ENDS_COLOUR, (str(arch.head_width),)) for arch in archs]
    return [*rows, ("head\n(own scale)", [*heads])]


def _words(stage: StageSpec, with_stride: bool) -> tuple[str, ...]:
    """As in an architecture's line."""
    stride = f"/{stage.stride}" if with_stride and stage.stride > 1 else ""
    return (
        f"{stage.blocks}×{stage.width}{stride}", f"k{stage.kernel_size}", f"g{stage.group_width}",
        f"e{stage.expansion:g}",
    )  # fmt: skip


def _kernel_colours(archs: Sequence[ArchSpec]) -> dict[int, str]:
    sizes = sorted({stage.kernel_size for arch in archs for stage in arch.stages})
    return {size: KERNEL_COLOURS[min(index, len(KERNEL_COLOURS) - 1)] for index, size in enumerate(sizes)}


def _height(cells: Sequence[_Cell | None]) -> float:
    return max(BLOCK * cell.blocks + LINE * ((len(cell.words) + 1) // 2) for cell in cells if cell)


def _draw_key(axes: Any, archs: Sequence[ArchSpec]) -> None:
    from matplotlib.patches import Rectangle

    left = 0.08
    for size, colour in _kernel_colours(archs).items():
        axes.add_patch(Rectangle((left, 0.1), 0.2, 0.13, facecolor=colour, edgecolor=DARK, lw=0.5))
        _word(axes, left + 0.26, 0.165, f"k{size}: kernel {size}×{size}", DARK, ha="left", va="center")
        left += 1.35
    _word(axes, 0.08, 0.31, "wide: channels · high: blocks · 2×64: blocks × channels · g: group width", PALE, ha="left")
    _word(axes, 0.08, 0.45, "e: expansion · bold: other than in the column before", PALE, ha="left")


def _draw_words(axes: Any, top: float, lines: Sequence[tuple[str, Sequence[str]]], bold: bool) -> float:
    """A line a quantity, its name on the left; returns where they end."""
    for index, (name, words) in enumerate(lines):
        y = top + LINE * index
        _word(axes, 0.08, y, name, DARK, ha="left")
        for column, word in enumerate(words):
            strong = bold and index < 2
            _word(axes, MARGIN + (column + 0.5) * COLUMN, y, word, DARK, weight="bold" if strong else "normal")
    return top + LINE * len(lines)


def _draw_cell(axes: Any, column: int, top: float, deepest: int, cell: _Cell, before: _Cell | None) -> None:
    from matplotlib.patches import Rectangle

    middle, width = MARGIN + (column + 0.5) * COLUMN, 0.86 * COLUMN * cell.share
    # Centred, so that words stand on one line in all columns.
    first = top + BLOCK * (deepest - cell.blocks) / 2
    for block in range(cell.blocks):
        corner = (middle - width / 2, first + BLOCK * block)
        axes.add_patch(Rectangle(corner, width, BLOCK, facecolor=cell.colour, edgecolor=DARK, lw=0.7, zorder=2))
    for index, word in enumerate(cell.words):
        alone = len(cell.words) == 1
        x = middle if alone else middle + (0.19 if index % 2 else -0.19) * COLUMN
        y = top + BLOCK * deepest + 0.03 + LINE * (index // 2)
        same = before is not None and before.words[index : index + 1] == (word,)
        new = before is not None and not same
        _word(axes, x, y, word, PALE if same else DARK, weight="bold" if new else "normal")


def _word(axes: Any, x: float, y: float, text: str, colour: str, **style: Any) -> None:
    axes.text(x, y, text, color=colour, fontsize=8, zorder=3, **{"ha": "center", "va": "top", **style})
