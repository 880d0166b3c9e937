"""Figures of the time and the efficiency of a network's blocks, from the values of `nas.latency.roofline`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from nas.display.charts import BLUE, GREY, ORANGE, new_figure, plain_texts, write_figure
from nas.latency.roofline import Efficiency, NetworkEfficiency

BOUND_COLOUR, GAP_COLOUR, REST_COLOUR = BLUE, ORANGE, GREY
# Most colours are from the palette of Okabe and Ito, which people with most kinds of colour blindness can distinguish.
KIND_COLOURS = {
    "stem": "#56b4e9", "convfirst": "#0072b2", "mbconv": "#009e73", "head": "#cc79a7", "conv": "#e69f00",
    "depthwise": "#d55e00", "linear": "#6a51a3",
}  # fmt: skip
SPARE_COLOURS = ("#7f7f7f", "#a6761d", "#1b9e77", "#e7298a")
KIND_NAMES = {"convfirst": "ConvFirst block", "mbconv": "MBConv block", "depthwise": "depthwise conv"}
# The share of the operations whose bars fit the axis of the gap plot.
SHARE_OF_MACS = 0.95
MOST_STAGES = 12
# Areas of the marker that would stand for the whole time, and of the smallest marker, in points^2.
WHOLE_MARKER, SMALLEST_MARKER = 1200, 6
# Width of a character and height of a line of 8-point text, in points.
CHARACTER, LINE = 5, 11


@plain_texts()
def plot_efficiency_gap(networks: Sequence[NetworkEfficiency], path: Path) -> None:
    """Draw latency as area: a bar for each block, F / peak wide and 1 / efficiency high, in two shades.

    The shades are the block's ideal time and its gap. At the right end stand, as areas to the same scale, the time
    without operations and the parts cut off bars that are too high for the axis, so that the areas sum to the time of
    all rows. Two networks share their axes. The figure follows A. Lavin, arXiv 2404.03617.

    Args:
        path: path of a PNG, SVG or PDF file.

    Raises:
        ValueError: there are not one or two networks, a row is not measured, or Matplotlib does not write this suffix.
    """
    _check_measured(networks)
    unit, scale = _time_unit(max(sum(row.compute_seconds for row in network.rows) for network in networks))
    drawn = [_Bars.of(network, scale) for network in networks]
    highest = max(bars.highest for bars in drawn)
    # The stages are named over the heights of cut bars, where there are any.
    above = 34 if any(bars.heights.max() > highest for bars in drawn) else 12
    figure, panels = _panels(networks, height=5.8)
    right = 0.0
    for axes, network, bars in zip(panels, networks, drawn, strict=True):
        handles = _draw_bars(axes, bars, highest)
        areas, end = _draw_areas(axes, network, bars, highest, scale)
        right = max(right, end)
        _set_legend(
            axes, handles + areas, columns=2, title="A bar is a block, in the network's order; its area is its latency."
        )
        axes.set_xlabel(f"ideal compute time F/peak ({unit})")
        axes.grid(axis="y", alpha=0.3)
        _set_title(axes, network, pad=above + 16)
    panels[0].set(xlim=(-0.01 * right, 1.01 * right), ylim=(0, highest))
    panels[0].set_ylabel("time over ideal compute time, 1/efficiency")
    for axes, bars in zip(panels, drawn, strict=True):
        _label_bars(axes, bars, highest, above)
    _save(figure, path, "Efficiency gap", networks)


@plain_texts()
def plot_waterline(networks: Sequence[NetworkEfficiency], path: Path) -> None:
    """Draw throughput over operational intensity under the roofline: each block at its bound and as measured.

    Horizontal lines are the network's waterline and what it achieves. Two networks share their axes. The figure
    follows A. Lavin, arXiv 2404.03617.

    Args:
        path: path of a PNG, SVG or PDF file.

    Raises:
        ValueError: there are not one or two networks, a row is not measured, or Matplotlib does not write this suffix.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    _check_measured(networks)
    peak = 2 * max(network.machine.macs_per_s for network in networks)
    unit, scale = ("TFLOP/s", 1e-12) if peak >= 1e12 else ("GFLOP/s", 1e-9)
    figure, panels = _panels(networks, height=6.4)
    intensities = [row.block.intensity(row.fused) for network in networks for row in _computing(network)]
    intensities += [network.machine.ridge for network in networks]
    limits = min(intensities) / 2, 2 * max(intensities)
    panels[0].set(xscale="log", yscale="log", xlim=limits, ylabel=f"throughput ({unit})")
    for axis in (panels[0].xaxis, panels[0].yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_formatter(NullFormatter())
        axis.set_major_formatter("{x:g}")
    for axes, network in zip(panels, networks, strict=True):
        axes.set_xlabel("operational intensity (FLOP/byte)")
        _draw_waterline(axes, network, limits, unit, scale)
        _set_title(axes, network, pad=6)
    _save(figure, path, "Waterline", networks)


def _check_measured(networks: Sequence[NetworkEfficiency]) -> None:
    if len(networks) not in (1, 2):
        raise ValueError(f"{len(networks)} networks: one or two can be drawn")
    for network in networks:
        if missing := [row.block.name for row in network.rows if row.seconds is None]:
            raise ValueError(f"{network.title}: not measured, seconds=None of {', '.join(missing)}")


def _seconds(row: Efficiency) -> float:
    assert row.seconds is not None
    return row.seconds


def _computing(network: NetworkEfficiency) -> list[Efficiency]:
    return [row for row in network.rows if row.block.macs]


def _without_macs(network: NetworkEfficiency) -> tuple[str, float]:
    """The name of the rows without operations, and their seconds."""
    rows = [row for row in network.rows if not row.block.macs]
    name = rows[0].block.name if len(rows) == 1 else f"{len(rows)} without operations"
    return name, sum(_seconds(row) for row in rows)


def _time_unit(seconds: float) -> tuple[str, float]:
    """The unit in which a time is a short number, and how many of this unit are a second."""
    return ("ms", 1e3) if seconds >= 1e-4 else ("µs", 1e6)


def _time(seconds: float) -> str:
    unit, scale = _time_unit(seconds)
    return f"{scale * seconds:.3g} {unit}"


def _kind(row: Efficiency) -> str:
    return KIND_NAMES.get(row.block.kind, row.block.kind)


def _percent(share: float) -> str:
    return f"{share:.1%}" if share < 0.1 else f"{share:.0%}"


def _panels(networks: Sequence[NetworkEfficiency], height: float) -> tuple[Any, Any]:
    """A figure with axes for each network."""
    figure = new_figure(10 if len(networks) == 1 else 16, height)
    return figure, figure.subplots(1, len(networks), sharex=True, sharey=True, squeeze=False)[0]


def _set_title(axes: Any, network: NetworkEfficiency, pad: float) -> None:
    axes.set_title(f"{network.title}\n{network.subtitle}\n{_summary(network)}", fontsize=10, loc="left", pad=pad)


def _set_legend(axes: Any, handles: Sequence[Any], columns: int, title: str | None = None) -> None:
    """Put a legend below the axes, where it hides nothing."""
    axes.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=columns, fontsize=8, frameon=False,
        title=title, title_fontsize=8,
    )  # fmt: skip


def _summary(network: NetworkEfficiency) -> str:
    one_by_one, share = network.rows_seconds, network.achieved
    assert one_by_one is not None
    time, parts = _time(network.seconds), _time(one_by_one)
    if parts != time:
        time += f" (one by one {parts})"
    return f"{time}; {_percent(share)} of peak achieved, waterline {_percent(network.waterline)}"


def _save(figure: Any, path: Path, what: str, networks: Sequence[NetworkEfficiency]) -> None:
    """Write a figure, with a description for screen readers."""
    text = "; ".join(f"{network.title}, {network.subtitle}: {_summary(network)}" for network in networks)
    key = {".svg": "Description", ".png": "Description", ".pdf": "Subject"}.get(path.suffix.lower())
    write_figure(figure, path, dpi=120, metadata={"Title": what, key: text} if key else None)


# -- The gap plot ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Bars:
    """The bars of the blocks that have operations: (n,) arrays, times in the unit of the axis.

    Args:
        rows: the blocks.
        lefts, widths, heights: left ends, widths and heights of the bars.
        bounds: heights that the bars would have in their ideal times.
    """

    rows: list[Efficiency]
    lefts: np.ndarray
    widths: np.ndarray
    heights: np.ndarray
    bounds: np.ndarray

    @classmethod
    def of(cls, network: NetworkEfficiency, scale: float) -> _Bars:
        rows = _computing(network)
        widths = scale * np.array([row.compute_seconds for row in rows])
        heights = scale * np.array([_seconds(row) for row in rows]) / widths
        return cls(rows, np.cumsum(widths) - widths, widths, heights, np.array([1 / row.bound for row in rows]))

    @property
    def right(self) -> float:
        return float(self.widths.sum())

    @property
    def ideal(self) -> np.ndarray:
        """The height of each bar below its gap: up to its bound, or the whole bar of a block that is faster."""
        ideal: np.ndarray = np.minimum(self.bounds, self.heights)
        return ideal

    @property
    def highest(self) -> float:
        """The upper end of the axis, so low that a few very tall, narrow bars do not flatten all others."""
        order, tallest = np.argsort(self.heights), float(self.heights.max())
        held = np.cumsum(self.widths[order]) >= SHARE_OF_MACS * self.right
        level = float(self.heights[order][held.argmax()])
        # Bars that are only a little taller are not cut, and the line at 1 is always visible.
        return max(1.3, 1.05 * tallest if tallest < 1.5 * level else 1.15 * level)


def _draw_bars(axes: Any, bars: _Bars, highest: float) -> list[Any]:
    """Draw the bars up to the height of the axis; return their legend entries."""
    from matplotlib.patches import Patch

    ideal, heights = np.minimum(bars.ideal, highest), np.minimum(bars.heights, highest)
    for bottom, top, colour in ((0 * ideal, ideal, BOUND_COLOUR), (ideal, heights, GAP_COLOUR)):
        # Without an outline the narrowest bars would vanish between pixels.
        axes.bar(
            bars.lefts, top - bottom, bars.widths, bottom, align="edge", color=colour, edgecolor=colour,
            linewidth=np.where(top > bottom, 0.5, 0), zorder=2,
        )  # fmt: skip
    # Lines between bars would hide the narrow ones.
    wide = bars.widths > 0.005 * bars.right
    axes.vlines(bars.lefts[wide], 0, heights[wide], color="white", lw=0.7, zorder=2.5)
    handles = [
        Patch(color=BOUND_COLOUR, label="ideal time t*: what its operations or its bytes need at least"),
        Patch(color=GAP_COLOUR, label="efficiency gap t - t*"),
        axes.axhline(1, color="black", lw=1, ls="--", zorder=3, label="peak: efficiency 1"),
    ]
    if (faster := bars.heights < bars.bounds).any():
        handles.append(axes.hlines(
            np.minimum(bars.bounds, highest)[faster], bars.lefts[faster], (bars.lefts + bars.widths)[faster],
            color=BOUND_COLOUR, lw=1.2, ls=":", label="t* of blocks that are faster (bytes from caches)",
        ))  # fmt: skip
    return handles


def _draw_areas(
    axes: Any, network: NetworkEfficiency, bars: _Bars, highest: float, scale: float
) -> tuple[list[Any], float]:
    """Draw the time without operations and the parts cut off at the right end; return legend entries and the end."""
    from matplotlib.patches import Patch

    # These areas are as high as the bars are on average, so that widths can be compared, too.
    level, right = float(np.minimum(bars.heights, highest) @ bars.widths) / bars.right, bars.right
    name, seconds = _without_macs(network)
    ideal = float(np.maximum(bars.ideal - highest, 0) @ bars.widths)
    gap = float(np.maximum(bars.heights - highest, 0) @ bars.widths) - ideal
    handles = []
    for label, hatch, parts in (
        (name, "///", [(scale * seconds, REST_COLOUR)]),
        (_cut_name(bars, highest), "...", [(ideal, BOUND_COLOUR), (gap, GAP_COLOUR)]),
    ):
        area = sum(part for part, _ in parts)
        if not area:
            continue
        style: dict[str, Any] = dict(edgecolor="white", linewidth=0.5, hatch=hatch)
        left, width, bottom = right + 0.015 * bars.right, area / level, 0.0
        for part, colour in parts:
            axes.bar(left, part / width, width, bottom, align="edge", color=colour, zorder=2, **style)
            bottom += part / width
        label = f"{label}: {_time(area / scale)}, as an area"
        handles.append(Patch(facecolor=max(parts)[1], label=label, **style))
        right = left + width
    return handles, right


def _cut_name(bars: _Bars, highest: float) -> str:
    cut = bars.heights > highest
    lost: Counter[str] = Counter()
    for row, area in zip(bars.rows, (bars.heights - highest) * bars.widths * cut, strict=True):
        lost[_kind(row)] += area
    kinds = [kind for kind, area in lost.most_common() if area]
    listed = ", ".join(kinds[:2]) + (", ..." if len(kinds) > 2 else "")
    return f"cut off {cut.sum()} bar{'s' if cut.sum() > 1 else ''} ({listed})"


def stages(names: Sequence[str]) -> list[tuple[str, int, int]]:
    """The stages in a list of block names: name, index of the first block, and index after the last block.

    "stage2.3" belongs to "stage2", "blocks.1.0.conv_pw" to "blocks.1" and "head.fc" to "head".
    """
    pattern = re.compile(r"(?:stages?|blocks|layers?|features)[._]?\d+|[^.]+")
    stage_names = [match.group() if (match := pattern.match(name)) else name for name in names]
    runs = [[index for index, _ in run] for _, run in groupby(enumerate(stage_names), key=itemgetter(1))]
    return [(stage_names[run[0]], run[0], run[-1] + 1) for run in runs]


def _label_bars(axes: Any, bars: _Bars, highest: float, above: float) -> None:
    """Write the heights of cut bars over the axes, and the stages `above` points over the axes, where they fit."""
    left, right = axes.get_xlim()
    # Points per unit of x, in the part of the figure that margins and labels leave.
    points = (72 * axes.figure.get_figwidth() / len(axes.figure.axes) - 60) / (right - left)
    middles = bars.lefts + bars.widths / 2
    over: dict[str, Any] = dict(
        xycoords=axes.get_xaxis_transform(), textcoords="offset points", ha="center", va="bottom", fontsize=8
    )
    placed: list[float] = []
    for index in np.argsort(-bars.heights)[: int((bars.heights > highest).sum())]:
        middle, height = middles[index], bars.heights[index]
        axes.plot(middle, 1, "^", color="black", ms=3, transform=over["xycoords"], clip_on=False, zorder=4)
        if all(abs(middle - other) * points >= LINE for other in placed):
            placed.append(middle)
            text = f"{height:,.0f}" if height >= 100 else f"{height:.3g}"
            axes.annotate(text, (middle, 1), (0, 4), rotation=90, **over)
    named = stages([row.block.name for row in bars.rows])
    if len(named) > MOST_STAGES:
        return
    taken = 0.0
    for number, (name, first, past) in enumerate(named):
        begin, end = bars.lefts[first], bars.lefts[past - 1] + bars.widths[past - 1]
        if number % 2:
            axes.axvspan(begin, end, color="black", alpha=0.05, lw=0, zorder=0)
        wanted = ((begin + end) / 2 - left) * points - CHARACTER * len(name) / 2
        moved = max(0, taken - wanted)
        taken = wanted + moved + CHARACTER * (len(name) + 1)
        leader = dict(arrowstyle="-", lw=0.5, color=REST_COLOUR) if moved else None
        axes.annotate(name, ((begin + end) / 2, 1), (moved, above), arrowprops=leader, **over)


# -- The waterline plot ----------------------------------------------------------------------------------------------


def _draw_waterline(
    axes: Any, network: NetworkEfficiency, limits: tuple[float, float], unit: str, scale: float
) -> None:
    """Draw the roofline, the blocks, the waterline and the achieved throughput, and the legend."""
    from matplotlib.lines import Line2D

    machine, rows, total = network.machine, _computing(network), network.rows_seconds
    peak, bandwidth = 2 * scale * machine.macs_per_s, machine.bytes_per_s
    assert total is not None
    corners = np.array([limits[0], machine.ridge, limits[1]])
    roof = axes.plot(
        corners, np.minimum(peak, scale * bandwidth * corners), color="black", lw=1.5, zorder=2,
        label=f"roofline: {peak:.3g} {unit}, {bandwidth / 1e9:.4g} GB/s",
    )  # fmt: skip
    handles = [*roof]
    spare = iter(SPARE_COLOURS)
    for kind in dict.fromkeys(row.block.kind for row in rows):
        colour = KIND_COLOURS.get(kind) or next(spare, "#000000")
        members = [row for row in rows if row.block.kind == kind]
        x = [row.block.intensity(row.fused) for row in members]
        bounds = [peak * row.bound for row in members]
        measured = [peak * row.compute_seconds / _seconds(row) for row in members]
        axes.vlines(x, measured, bounds, color=colour, lw=0.8, alpha=0.6, zorder=3)
        axes.scatter(x, bounds, s=22, facecolors="white", edgecolors=colour, lw=1, zorder=4)
        areas = [max(SMALLEST_MARKER, WHOLE_MARKER * _seconds(row) / total) for row in members]
        axes.scatter(x, measured, s=areas, color=colour, alpha=0.75, lw=0, zorder=5)
        handles.append(Line2D([], [], color=colour, marker="o", ls="", label=_kind(members[0])))
    _draw_level(axes, network.waterline, peak, unit, "waterline", "#1a6fb5", "--", above=True)
    _draw_level(
        axes, network.achieved, peak, unit, "achieved", "#b5301a", "-", above=network.achieved > network.waterline
    )
    handles.append(Line2D([], [], color="#555555", marker="o", mfc="white", ms=5, ls="", label="bound of a block"))
    for share in (0.01, 0.1):
        handles.append(Line2D(
            [], [], color="#555555", marker="o", mew=0, ms=(WHOLE_MARKER * share) ** 0.5, ls="",
            label=f"measured, {share:.0%} of the time",
        ))  # fmt: skip
    name, seconds = _without_macs(network)
    if seconds:
        handles.append(Line2D([], [], ls="", label=f"no point: {name}, {seconds / total:.0%} of the time"))
    _set_legend(axes, handles, columns=3)
    axes.grid(alpha=0.3)


def _draw_level(
    axes: Any, share: float, peak: float, unit: str, name: str, colour: str, style: str, above: bool
) -> None:
    """Draw a horizontal line at a share of the peak, and its name."""
    axes.axhline(share * peak, color=colour, lw=1.3, ls=style, zorder=2.5)
    axes.annotate(
        f"{name}: {_percent(share)} of peak, {share * peak:.3g} {unit}", (0, share * peak), (6, 3 if above else -3),
        axes.get_yaxis_transform(), textcoords="offset points", va="bottom" if above else "top", color=colour,
        fontsize=9, zorder=6, bbox=dict(facecolor="white", alpha=0.75, lw=0, pad=0.5),
    )  # fmt: skip
