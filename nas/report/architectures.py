"""The networks of a front drawn as stacks of stages, a column each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from nas import pareto
from nas.display.charts import INK, plain_texts
from search_spaces import ArchSpec, StageSpec
from search_spaces.arch import IDENTITY, STEM_STRIDE

# The letters are small, so the page shows the figure at half of its pixels.
DPI = 200
# Colours light enough for black letters; each is darker than the one before, as kernel sizes have an order.
KERNEL_COLOURS = ("#fdeebf", "#fbcb74", "#f2994a", "#dd6e42", "#c0563f")
ENDS_COLOUR, PALE = "#d5dae0", "#69737d"
MOST_COLUMNS = 12
# Inches: widths of a column and of the left margin; heights of a block, a line of text, a row's gap and the key.
COLUMN, MARGIN, BLOCK, LINE, GAP, KEY = 1.06, 0.95, 0.16, 0.15, 0.14, 0.64


@dataclass(frozen=True)
class _Cell:
    """A network's part of one row: a box, and words below it, two per line.

    Args:
        share: width of the box, as a share of the widest box.
        blocks: number of blocks in the box.
    """

    share: float
    blocks: int
    colour: str
    words: tuple[str, ...]


def chosen_members(front: pd.DataFrame) -> pd.DataFrame:
    """At most `MOST_COLUMNS` members of a front, evenly spaced, both ends among them, from the fastest."""
    return front.iloc[pareto.evenly_spaced(len(front), MOST_COLUMNS)]


def figure_width(columns: int) -> float:
    """Width in inches of the figure that shows this number of networks."""
    return max(MARGIN + COLUMN * columns, 5.5)


@plain_texts()
def plot_architectures(front: pd.DataFrame, path: Path) -> None:
    """Draw networks as stacks of stages, a column each, their stages side by side, into a PNG file.

    A box's width shows the channels of its stage, its height the blocks, and its colour the kernel size. Words that
    differ from those of the column before are bold.

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
    width = figure_width(len(archs))
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
        _word(axes, 0.08, top + max(BLOCK * deepest, LINE) / 2, name, INK, ha="left", va="center")
        before: _Cell | None = None
        for column, cell in enumerate(cells):
            if cell:
                _draw_cell(axes, column, top, deepest, cell, before)
            before = cell
        top += tall + GAP
    _draw_words(axes, top, feet, bold=False)
    figure.savefig(path, dpi=DPI)


def _rows(archs: Sequence[ArchSpec]) -> list[tuple[str, list[_Cell | None]]]:
    """A row for the stem, each stage and the head: its name, and a cell for each network that has it."""
    colours = _kernel_colours(archs)
    widest = max(max(arch.stem_width, *(stage.width for stage in arch.stages)) for arch in archs)
    widest_head = max(1, *(arch.head_width for arch in archs))
    rows: list[tuple[str, list[_Cell | None]]] = [
        ("activation", [_Cell(0, 0, "", (arch.activation,)) for arch in archs])
    ]
    if any(arch.resolution for arch in archs):
        rows.insert(0, ("resolution", [_Cell(0, 0, "", (f"{arch.resolution} px",)) for arch in archs]))
    if any(arch.shortcut != IDENTITY for arch in archs):
        rows.append(("shortcuts", [_Cell(0, 0, "", (arch.shortcut,)) for arch in archs]))
    finest = min(arch.stem_stride for arch in archs)
    stems = [
        f"{arch.stem_width}/{arch.stem_stride}" if finest < STEM_STRIDE else str(arch.stem_width) for arch in archs
    ]
    rows.append((
        "stem",
        [_Cell(arch.stem_width / widest, 1, ENDS_COLOUR, (stem,)) for arch, stem in zip(archs, stems, strict=True)],
    ))  # fmt: skip
    for index in range(max(len(arch.stages) for arch in archs)):
        stages = [arch.stages[index] if index < len(arch.stages) else None for arch in archs]
        strides = {stage.stride for stage in stages if stage}
        differ = len(strides) > 1
        name = f"stage {index + 1}" + ("" if differ else f"\nstride {strides.pop()}")
        rows.append((
            name,
            [
                _Cell(stage.width / widest, stage.blocks, colours[stage.kernel_size], _words(stage, with_stride=differ))
                if stage else None
                for stage in stages
            ],
        ))  # fmt: skip
    heads = [_Cell(arch.head_width / widest_head, 1, ENDS_COLOUR, (str(arch.head_width or "none"),)) for arch in archs]
    return [*rows, ("head\n(own scale)", [*heads])]


def _words(stage: StageSpec, with_stride: bool) -> tuple[str, ...]:
    """The words of a stage, as in the text form of an architecture."""
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
        axes.add_patch(Rectangle((left, 0.1), 0.2, 0.13, facecolor=colour, edgecolor=INK, lw=0.5))
        _word(axes, left + 0.26, 0.165, f"k{size}: kernel {size}×{size}", INK, ha="left", va="center")
        left += 1.35
    _word(axes, 0.08, 0.31, "wide: channels · high: blocks · 2×64: blocks × channels · g: group width", PALE, ha="left")
    _word(axes, 0.08, 0.45, "e: expansion · bold: other than in the column before", PALE, ha="left")


def _draw_words(axes: Any, top: float, lines: Sequence[tuple[str, Sequence[str]]], bold: bool) -> float:
    """Draw a line for each quantity, with its name on the left; return the position below the last line."""
    for index, (name, words) in enumerate(lines):
        y = top + LINE * index
        _word(axes, 0.08, y, name, INK, ha="left")
        for column, word in enumerate(words):
            strong = bold and index < 2
            _word(axes, MARGIN + (column + 0.5) * COLUMN, y, word, INK, weight="bold" if strong else "normal")
    return top + LINE * len(lines)


def _draw_cell(axes: Any, column: int, top: float, deepest: int, cell: _Cell, before: _Cell | None) -> None:
    from matplotlib.patches import Rectangle

    middle, width = MARGIN + (column + 0.5) * COLUMN, 0.86 * COLUMN * cell.share
    # Centred, so that words stand on one line in all columns.
    first = top + BLOCK * (deepest - cell.blocks) / 2
    for block in range(cell.blocks):
        corner = (middle - width / 2, first + BLOCK * block)
        axes.add_patch(Rectangle(corner, width, BLOCK, facecolor=cell.colour, edgecolor=INK, lw=0.7, zorder=2))
    for index, word in enumerate(cell.words):
        alone = len(cell.words) == 1
        x = middle if alone else middle + (0.19 if index % 2 else -0.19) * COLUMN
        y = top + BLOCK * deepest + 0.03 + LINE * (index // 2)
        same = before is not None and before.words[index : index + 1] == (word,)
        new = before is not None and not same
        _word(axes, x, y, word, PALE if same else INK, weight="bold" if new else "normal")


def _word(axes: Any, x: float, y: float, text: str, colour: str, **style: Any) -> None:
    axes.text(x, y, text, color=colour, fontsize=8, zorder=3, **{"ha": "center", "va": "top", **style})
