"""Charts as Matplotlib and as Plotly draw them, from the same values."""

from __future__ import annotations

import html
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager

from nas.display import charts
from nas.display.charts import Chart, Series, save_charts
from nas.report.interactive import plotly_figure

DOTS = Series("dots", [1.0, 2.0], [30.0, 40.0], "#102030", "s", low=[0.5, 2.5], high=[1.25, 3.0], labels=["<a>", "$b$"])


def drawn(chart: Chart, monkeypatch: pytest.MonkeyPatch) -> Axes:
    figures: list[Figure] = []
    monkeypatch.setattr("nas.display.charts.write_figure", lambda figure, *_, **__: figures.append(figure))
    save_charts([chart], Path("unused.png"))
    axes: Axes = figures[0].axes[0]
    return axes


@pytest.mark.parametrize("marker", ["o", ""])
def test_stairs_keep_their_height_up_to_the_next_point(marker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With markers and without: a line without markers was once not drawn at all."""
    chart = Chart("x", "y", [Series("stairs", [0, 1, 4], [0, 2, 3], "#000000", marker, stairs=True)], from_zero=True)
    axes = drawn(chart, monkeypatch)
    (line,) = axes.lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0, 1, 4], [0, 2, 3])
    assert (line.get_drawstyle(), line.get_linestyle()) == ("steps-post", "-")
    assert axes.get_xlim()[0] == axes.get_ylim()[0] == 0
    assert axes.get_xlim()[1] >= 4
    figure = plotly_figure(chart)
    assert figure["data"][0]["line"]["shape"] == "hv"
    assert figure["data"][0]["mode"] == ("lines+markers" if marker else "lines")
    assert figure["layout"]["xaxis"]["rangemode"] == "tozero"


def test_both_show_the_same_points_bars_and_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar whose end lies on the wrong side of its point ends at the point."""
    chart = Chart("x", "y", [DOTS], log_x=True)
    axes = drawn(chart, monkeypatch)
    assert list(axes.lines[0].get_xdata()) == [1.0, 2.0]
    (bars,) = axes.collections
    ends: Any = bars
    assert [segment[:, 0].tolist() for segment in ends.get_segments()] == [[0.5, 1.25], [2.0, 3.0]]
    assert [text.get_text() for text in axes.texts] == ["<a>", "$b$"]
    assert axes.get_xscale() == "log"
    figure = plotly_figure(chart)
    (trace,) = figure["data"]
    assert trace["x"] == [1.0, 2.0]
    assert (trace["error_x"]["arrayminus"], trace["error_x"]["array"]) == ([0.5, 0.0], [0.25, 1.0])
    assert trace["text"] == ["&lt;a&gt;", "$b$"]
    assert trace["marker"]["symbol"] == "square"
    assert figure["layout"]["xaxis"]["type"] == "log"


def test_several_lines_about_a_point_are_escaped_and_the_first_is_bold() -> None:
    details = Series("dots", [1], [1], "#000000", details=["trial <3>\n98 % & more\nstem"])
    (trace,) = plotly_figure(Chart("x", "y", [details]))["data"]
    assert trace["hovertext"] == ["<b>trial &lt;3&gt;</b><br>98 % &amp; more<br>stem"]


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_files_by_suffix(suffix: str, tmp_path: Path) -> None:
    save_charts([Chart("x", "y", [DOTS]), Chart("x", "y", [DOTS])], tmp_path / f"figure{suffix}", title="$ and $")
    assert (tmp_path / f"figure{suffix}").stat().st_size > 5_000


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="docx"):
        save_charts([Chart("x", "y", [DOTS])], tmp_path / "figure.docx")


# As Matplotlib reads formulas, the second is wrong and would raise an error, and the third loses its signs.
NAMES = ["plain", r"$\frac$", "$a_b$", r"{x} \alpha_1 ^2 %d <b> & --", "$"]


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_drawn_as_they_are(name: str, tmp_path: Path) -> None:
    """As an axis, a label, a name in the legend and a title, in an SVG that has its texts as such."""
    chart = Chart(name, "y", [replace(DOTS, labels=[name, ""]), replace(DOTS, name=name, labels=())])
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        save_charts([chart], tmp_path / "figure.svg", title=name)
    texts = re.findall(r"<text[^>]*>(.*?)</text>", (tmp_path / "figure.svg").read_text(encoding="utf-8"), re.DOTALL)
    assert [html.unescape(text) for text in texts].count(name) == 4


def tiny_font(path: Path, family: str, letter: str) -> None:
    """A font of one letter, which is a square."""
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord(letter): "square"})
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for corner in ((100, 700), (800, 700), (800, 0)):
        pen.lineTo(corner)
    pen.closePath()
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (900, 0), "square": (900, 100)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": family, "styleName": "Regular", "psName": "TinyFont"})
    # A weight that Matplotlib remarks on.
    builder.setupOS2(sTypoAscender=800, usWeightClass=500)
    builder.setupPost()
    builder.save(path)


def test_letters_come_from_fonts_that_are_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """U+4E2D is in no font of Matplotlib's own; all families that are not installed are passed over."""
    tiny_font(tmp_path / "tiny.ttf", charts.FALLBACKS[0], "\u4e2d")
    own = [font for font in fontManager.ttflist if font.name not in charts.FALLBACKS]
    monkeypatch.setattr(fontManager, "ttflist", own)
    fontManager.addfont(tmp_path / "tiny.ttf")
    before = dict(matplotlib.rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # The second letter is in no font at all.
        save_charts([Chart("x", "y", [DOTS])], tmp_path / "figure.svg", title="x\u4e2d\U000e0fff")
    assert "TinyFont-" in (tmp_path / "figure.svg").read_text(encoding="utf-8")
    assert not caplog.records
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("letter", ["a", "\u4e2d"])
def test_a_long_title_is_shown_as_a_whole(letter: str, tmp_path: Path) -> None:
    title = f"{512 * letter}: 3 candidates\nsecond"
    lines = charts.wrapped(title, 8).split("\n")
    assert "".join(lines) == title.replace("\n", "")
    assert lines[-1] == "second"
    assert charts.wrapped("a\n\nb", 8) == "a\n\nb"
    figures: list[Figure] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nas.display.charts.write_figure", lambda figure, *_, **__: figures.append(figure))
        save_charts([Chart("x", "y", [DOTS])], tmp_path / "figure.png", title=f"{512 * 'a'}: 3 candidates\nsecond")
    (figure,) = figures
    figure.draw_without_rendering()
    extent = figure.axes[0].title.get_window_extent()
    assert extent.x0 >= 0
    assert extent.x1 <= figure.bbox.x1
    assert extent.y1 <= figure.bbox.y1 + 1
    # There is room for the points, too.
    assert figure.axes[0].get_position().height > 0.3
