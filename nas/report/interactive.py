"""Interactive figures: charts as the plain values of a Plotly figure, which the page passes to Plotly's JavaScript.

Plotly reads texts as a kind of HTML, so all texts from the database or a user are escaped.
"""

from __future__ import annotations

from html import escape
from typing import Any

from nas.display.charts import BAR_OPACITY, DARK_GREY, INK, Chart, Series

PlotlyFigure = dict[str, Any]

SYMBOLS = {"o": "circle", "s": "square", "D": "diamond", "x": "x-thin-open"}
LOG_TICKS = [digit * 10**power for power in range(-4, 6) for digit in (1, 2, 5)]


def plotly_figure(chart: Chart) -> PlotlyFigure:
    """The Plotly figure of a chart; dragging a finger over it scrolls the page."""
    axis: PlotlyFigure = {
        "gridcolor": "#e3e7eb", "zeroline": False, "linecolor": DARK_GREY, "ticks": "outside", "automargin": True,
        "rangemode": "tozero" if chart.from_zero else "normal",
    }  # fmt: skip
    logarithmic = {"type": "log", "tickvals": LOG_TICKS, "ticktext": [f"{tick:g}" for tick in LOG_TICKS]}
    with_legend = len(chart.series) > 1
    layout: PlotlyFigure = {
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK}, "hovermode": "closest",
        "dragmode": False, "paper_bgcolor": "white", "plot_bgcolor": "white", "showlegend": with_legend,
        "margin": {"l": 55, "r": 15, "t": 30, "b": 95 if with_legend else 50},
        "legend": {"orientation": "h", "x": 0, "yref": "container", "y": 0, "yanchor": "bottom"},
        "hoverlabel": {"align": "left", "bgcolor": "white", "font": {"size": 12, "color": INK}},
        "xaxis": {**axis, **(logarithmic if chart.log_x else {}), "title": _title(chart.x_title)},
        "yaxis": {**axis, "title": _title(chart.y_title)},
    }  # fmt: skip
    return {"data": [_trace(each) for each in chart.series], "layout": layout}


def _title(text: str) -> PlotlyFigure:
    # The longest titles in Plotly's own size do not fit the screen of a telephone.
    return {"text": text, "font": {"size": 13}}


def _trace(series: Series) -> PlotlyFigure:
    modes = {"lines": series.stairs, "markers": series.marker, "text": series.labels}
    trace: PlotlyFigure = {
        "type": "scatter", "mode": "+".join(mode for mode, wanted in modes.items() if wanted), "name": series.name,
        "x": list(series.x), "y": list(series.y), "hoverinfo": "text",
        "hovertext": [_hover_text(text) for text in series.details],
        "line": {"shape": "hv", "color": series.colour, "width": 1.6},
        "marker": {"color": series.colour, "size": series.size, "symbol": SYMBOLS.get(series.marker, "circle")},
        # Labels may reach beyond the axes, where a zoomed staircase must not.
        "cliponaxis": series.stairs,
    }  # fmt: skip
    if series.labels:
        position = "top left" if series.stairs else "top center"
        trace |= {"text": [escape(label) for label in series.labels], "textposition": position}
        trace["textfont"] = {"size": 11, "color": INK}
    if series.low:
        trace["error_x"] = _bars(series, *series.bar_lengths)
    if series.below:
        trace["error_y"] = _bars(series, *series.bar_heights)
    return trace


def _bars(series: Series, to_less: list[float], to_more: list[float]) -> PlotlyFigure:
    red, green, blue = bytes.fromhex(series.colour[1:])
    return {
        "type": "data", "symmetric": False, "array": to_more, "arrayminus": to_less, "thickness": 1.2,
        "width": 3, "color": f"rgba({red}, {green}, {blue}, {BAR_OPACITY})",
    }  # fmt: skip


def _hover_text(details: str) -> str:
    """The lines of a text in Plotly's HTML, the first of them bold."""
    first, *others = (escape(line) for line in details.split("\n"))
    return "<br>".join([f"<b>{first}</b>", *others])
