"""Charts as Matplotlib and as Plotly draw them, from the same values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
    assert [text.get_text() for text in axes.texts] == ["<a>", r"\$b\$"]
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


def test_dollars_are_no_formulas(tmp_path: Path) -> None:
    save_charts([Chart("x", "y", [DOTS])], tmp_path / "figure.svg", title=r"$\frac$")
    notes = re.findall(r"<!-- (.*?) -->", (tmp_path / "figure.svg").read_text())
    assert r"$\frac$" in "".join(notes).replace(r"\$", "$")
    assert charts.escaped("$") == r"\$"
