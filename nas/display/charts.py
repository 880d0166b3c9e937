"""Charts as values: Matplotlib draws them into files here, and Plotly shows them in the report."""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.cells import chop_cells

from nas.files import whole

RED, BLUE, ORANGE, GREY, DARK_GREY, INK = "#d1495b", "#3d6f9e", "#f0a35e", "#9aa5b1", "#8a949f", "#1b1f24"
DPI = 150
# Size of a Matplotlib marker in points per pixel of the interactive figures, whose markers are larger on a screen.
POINTS = 0.6
# Opacity of the bars, because those of close points overlap.
BAR_OPACITY = 0.5
# Families that systems and their packages commonly have, for letters that Matplotlib's own font lacks.
FALLBACKS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN", "PingFang SC",
    "Hiragino Sans GB", "Hiragino Sans", "Heiti TC", "Microsoft YaHei", "SimHei", "Yu Gothic", "Malgun Gothic",
    "Apple SD Gothic Neo", "NanumGothic", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Droid Sans Fallback",
    "Noto Sans Arabic", "Noto Sans Hebrew", "Noto Sans Devanagari", "Noto Sans Bengali", "Noto Sans Tamil",
    "Noto Sans Thai", "Nirmala UI", "Leelawadee UI", "Arial Unicode MS", "Segoe UI Symbol", "Noto Sans Symbols2",
    "FreeSans", "Unifont",
)  # fmt: skip
# Letters of 10 points in an inch, as terminals count them: a Chinese one is two.
CELLS_PER_INCH = 10


@dataclass(frozen=True)
class Series:
    """Points of one kind in a chart.

    Args:
        name: name in the legend.
        x, y: coordinates of the points, (n,) each.
        colour: colour of points, line and bars, as #rrggbb.
        marker: shape of the points: "o", "s", "D", "x", or "" for none.
        size: width of a marker, in pixels of an interactive figure.
        stairs: whether a line joins the points, which keeps its height up to the next point.
        low, high: ends of a horizontal bar through each point, (n,) each; empty for no bars.
        below, above: ends of a vertical bar through each point, (n,) each; empty for no bars.
        labels: words beside the points, (n,); empty for none.
        details: texts of several lines, (n,), which an interactive figure shows for the point under the pointer.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    marker: str = "o"
    size: int = 6
    stairs: bool = False
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    below: Sequence[float] = ()
    above: Sequence[float] = ()
    labels: Sequence[str] = ()
    details: Sequence[str] = ()

    @property
    def bar_lengths(self) -> tuple[list[float], list[float]]:
        """Lengths of the parts of each horizontal bar to the left and to the right of its point."""
        return _lengths(self.x, self.low, self.high)

    @property
    def bar_heights(self) -> tuple[list[float], list[float]]:
        """Lengths of the parts of each vertical bar below and above its point."""
        return _lengths(self.y, self.below, self.above)


def _lengths(points: Sequence[float], low: Sequence[float], high: Sequence[float]) -> tuple[list[float], list[float]]:
    return (
        [max(0.0, point - end) for point, end in zip(points, low, strict=False)],
        [max(0.0, end - point) for point, end in zip(points, high, strict=False)],
    )


@dataclass(frozen=True)
class Chart:
    """Series over common axes.

    Args:
        log_x: whether the x axis is logarithmic.
        from_zero: whether both axes begin at 0.
    """

    x_title: str
    y_title: str
    series: Sequence[Series]
    log_x: bool = False
    from_zero: bool = False


@contextmanager
def plain_texts() -> Iterator[None]:
    """Context, or decorator of a function, in which Matplotlib draws texts as they are: it reads no formulas, and takes
    letters that its own font lacks from the fonts that are installed."""
    import matplotlib
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    families = [*matplotlib.rcParams["font.family"], *(name for name in FALLBACKS if name in installed)]
    settings: dict[Any, Any] = {"text.parse_math": False, "text.usetex": False, "font.family": families}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # A letter that no font has is a box in the figure, which says enough.
        warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from|Matplotlib currently does not support")
        # Some of those fonts have no weight that is called normal, of which it would warn.
        log = logging.getLogger("matplotlib.font_manager")
        level = log.level
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(level)


def wrapped(text: str, inches: float) -> str:
    """The lines of a text of 10 points, broken where they are longer than a figure is wide."""
    lines = [chop_cells(line, int(CELLS_PER_INCH * inches)) or [""] for line in text.split("\n")]
    return "\n".join(itertools.chain.from_iterable(lines))


def new_figure(width: float, height: float) -> Any:
    """A Matplotlib figure of this size in inches, which needs no display and does not touch the state of pyplot."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


@plain_texts()
def save_charts(charts: Iterable[Chart], path: Path, width: float = 8, height: float = 5, title: str = "") -> None:
    """Draw charts side by side with a common y axis into a PNG, SVG or PDF file, by its suffix.

    Args:
        width, height: size of the figure, in inches.

    Raises:
        ValueError: Matplotlib does not write files of this suffix.
    """
    charts = list(charts)
    figure = new_figure(width, height)
    panels = figure.subplots(1, len(charts), sharey=True, squeeze=False)[0]
    for axes, chart in zip(panels, charts, strict=True):
        _draw(axes, chart)
    panels[0].set_ylabel(charts[0].y_title)
    panels[0].set_title(wrapped(title, width), fontsize=10)
    if len(charts[0].series) > 1:
        # The legend is below the axes, where it hides nothing.
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
    write_figure(figure, path, dpi=DPI)


def write_figure(figure: Any, path: Path, **options: Any) -> None:
    """Write a figure of Matplotlib's into a file, whole or not at all; the options are those of `savefig`."""
    with whole(path) as part:
        figure.savefig(part, **options)


def _draw(axes: Any, chart: Chart) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    for layer, each in enumerate(chart.series, start=2):
        axes.errorbar(
            each.x, each.y, xerr=each.bar_lengths if each.low else None, yerr=each.bar_heights if each.below else None,
            marker=each.marker,
            ls="-" if each.stairs else "", drawstyle="steps-post", color=each.colour, ms=POINTS * each.size, lw=1.2,
            ecolor=(each.colour, BAR_OPACITY), label=each.name, zorder=layer,
        )  # fmt: skip
        # Above and to the left of a staircase there is no line.
        offset, align = ((-2, 3), "right") if each.stairs else ((0, 5), "center")
        for x, y, label in zip(each.x, each.y, each.labels, strict=False):
            axes.annotate(label, (x, y), offset, textcoords="offset points", ha=align, va="bottom", fontsize=8)
    if chart.log_x:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter("{x:g}")
    if chart.from_zero:
        axes.set(xlim=(0, None), ylim=(0, None))
    else:
        axes.margins(x=0.1, y=0.1)
    axes.set_xlabel(chart.x_title)
    axes.grid(alpha=0.3)
