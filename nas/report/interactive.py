"""The report's interactive figures, as Plotly's JSON: plain values that the page hands to Plotly's JavaScript.

Plotly takes texts for a kind of HTML, so all that comes from the database or from a user is escaped.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from html import escape
from typing import Any

import pandas as pd

from nas.display.plots import FRONT_COLOUR
from nas.report.figures import KIND_STYLES, spans_decades, time_unit
from nas.validation.contenders import Contender, ContenderKind

Figure = dict[str, Any]

# Darker than in the PNGs: its points are smaller, and drawn one over the other.
OTHERS_COLOUR = "#8a949f"
# Of a front of many members bars lie over bars.
SPREAD_COLOUR = "rgba(209, 73, 91, 0.5)"
SYMBOLS = {ContenderKind.TIMM: "square", ContenderKind.DEFAULT: "diamond", ContenderKind.FOUND: "circle"}
# More names than this would lie on top of each other.
MOST_NAMES = 12
MOST_MARKERS = 40


def _layout(x_title: str, y_title: str, **changes: Any) -> Figure:
    """A light figure; a finger that is drawn over it scrolls the page."""
    axis = {"gridcolor": "#e3e7eb", "zeroline": False, "linecolor": "#8a949f", "ticks": "outside", "automargin": True}
    layout: Figure = {
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#1b1f24"}, "hovermode": "closest",
        "dragmode": False, "paper_bgcolor": "white", "plot_bgcolor": "white",
        "margin": {"l": 55, "r": 15, "t": 30, "b": 95},
        "legend": {"orientation": "h", "x": 0, "yref": "container", "y": 0, "yanchor": "bottom"},
        "hoverlabel": {"align": "left", "bgcolor": "white", "font": {"size": 12, "color": "#1b1f24"}},
        "xaxis": {**axis, "title": {"text": x_title}}, "yaxis": {**axis, "title": {"text": y_title}},
    }  # fmt: skip
    return {**layout, **changes}


def _hover(row: Mapping[Hashable, Any]) -> str:
    """A candidate, with its architecture a stage a line."""
    lines = escape(row["summary"]).replace(" | ", "<br>")
    return (
        f"<b>trial {row['number']}</b><br>{100 * row['accuracy']:.2f} % at {row['latency_ms']:.4g} ms<br>"
        f"p20 to p80: {row['latency_p20_ms']:.4g} to {row['latency_p80_ms']:.4g} ms<br>"
        f"{row['params'] / 1e3:,.0f} k parameters, {row['macs'] / 1e6:,.2f} MMACs<br>{lines}"
    )


def _points(rows: pd.DataFrame, name: str, **style: Any) -> Figure:
    return {
        "type": "scatter", "mode": "markers", "name": name, "x": list(rows["latency_ms"]),
        "y": [100 * value for value in rows["accuracy"]], "hoverinfo": "text",
        "hovertext": [_hover(row) for row in rows.to_dict("records")], **style,
    }  # fmt: skip


def _spread(latencies: Sequence[float], p20: Sequence[float], p80: Sequence[float], colour: str) -> Figure:
    return {
        "type": "data", "symmetric": False, "color": colour, "thickness": 1.2, "width": 3,
        "array": [max(0.0, high - value) for high, value in zip(p80, latencies, strict=True)],
        "arrayminus": [max(0.0, value - low) for low, value in zip(p20, latencies, strict=True)],
    }  # fmt: skip


def front_plot(evaluations: pd.DataFrame, front: pd.DataFrame, marks: Sequence[Contender]) -> Figure:
    """Accuracy against latency: the front as a staircase, all else in grey.

    Args:
        evaluations: complete candidates of the study's deployment, as the view `convfirst_evaluations` has them.
        front: the rows of `pareto_front` for the same deployment, fastest first.
        marks: contenders whose accuracies compare with these.
    """
    over = evaluations["latency_over_limit"].fillna(False).astype(bool)
    others = evaluations[~over & ~evaluations["number"].isin(front["number"])]
    latencies = list(front["latency_ms"])
    spread = _spread(latencies, list(front["latency_p20_ms"]), list(front["latency_p80_ms"]), SPREAD_COLOUR)
    traces = [_points(others, f"dominated ({len(others)})", marker={"color": OTHERS_COLOUR, "size": 6})]
    if over.any():
        marker = {"color": "#555d66", "size": 7, "symbol": "x-thin-open"}
        traces.append(_points(evaluations[over], "over the limit, measured again", marker=marker))
    members: Figure = {"marker": {"color": FRONT_COLOUR, "size": 9}, "error_x": spread}
    members |= {"mode": "lines+markers", "line": {"shape": "hv", "color": FRONT_COLOUR, "width": 1.5}}
    if len(front) <= MOST_NAMES:
        members |= {"mode": "lines+markers+text", "text": [str(number) for number in front["number"]]}
        members |= {"textposition": "top left", "textfont": {"size": 11, "color": "#a3293b"}}
    traces.append(_points(front, f"front ({len(front)}), bars from p20 to p80", **members))
    traces += _contender_traces(marks)
    return {"data": traces, "layout": _layout("latency of one batch in ms", "accuracy of the proxy training in %")}


def _contender_traces(contenders: Sequence[Contender]) -> list[Figure]:
    traces: list[Figure] = []
    for kind, (_, colour, label) in KIND_STYLES.items():
        members = [contender for contender in contenders if contender.kind == kind]
        if not members:
            continue
        latencies = [member.latency_ms for member in members]
        p20, p80 = [member.latency_p20_ms for member in members], [member.latency_p80_ms for member in members]
        traces.append({
            "type": "scatter", "mode": "markers+text", "name": label, "x": latencies,
            "y": [100 * member.accuracy for member in members], "text": [escape(member.name) for member in members],
            "textposition": "top center", "textfont": {"size": 11, "color": "#1b1f24"}, "cliponaxis": False,
            "marker": {"color": colour, "size": 10, "symbol": SYMBOLS[kind]}, "hoverinfo": "text",
            "hovertext": [_contender_hover(member) for member in members],
            "error_x": _spread(latencies, p20, p80, colour),
        })  # fmt: skip
    return traces


def _contender_hover(contender: Contender) -> str:
    summary = escape(contender.summary).replace(" | ", "<br>")
    return (
        f"<b>{escape(contender.name)}</b><br>{100 * contender.accuracy:.2f} % at {contender.latency_ms:.4g} ms "
        f"({escape(contender.engine)})<br>{contender.resolution}x{contender.resolution}, {contender.steps} steps, "
        f"learning rate {contender.learning_rate:g}<br>{escape(contender.training)}<br>{summary}"
    )


def contenders_plot(contenders: Sequence[Contender]) -> Figure:
    """Networks that were trained alike, each under its name."""
    layout = _layout("latency of one batch in ms", "accuracy of the long training in %")
    if spans_decades([contender.latency_ms for contender in contenders]):
        ticks = [digit * 10**power for power in range(-4, 6) for digit in (1, 2, 5)]
        layout["xaxis"] |= {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    return {"data": _contender_traces(contenders), "layout": layout}


def hypervolume_plots(course: pd.DataFrame) -> tuple[Figure, Figure]:
    """Hypervolume over candidates and over seconds.

    Args:
        course: a row a candidate, with `number`, `seconds` since the beginning and `hypervolume`.
    """
    # Of 2,000 candidates a few dozen change it, and the last tells how long it has stayed.
    changed = course["hypervolume"].diff().fillna(1) != 0
    changed.iloc[-1] = True
    rows = course.assign(place=range(1, len(course) + 1))[changed]
    unit, scale = time_unit(course["seconds"].iloc[-1])
    hover = [
        f"{row['hypervolume']:.4f} after {row['place']} candidates<br>trial {row['number']}, "
        f"{row['seconds'] / scale:.1f} {unit}"
        for row in rows.to_dict("records")
    ]
    found = []
    for values, title in ((rows["place"], "candidates"), (rows["seconds"] / scale, f"{unit} of evaluating")):
        trace = {
            "type": "scatter", "mode": "lines" if len(rows) > MOST_MARKERS else "lines+markers",
            "x": [0, *values], "y": [0, *rows["hypervolume"]], "hovertext": ["", *hover], "hoverinfo": "text",
            "line": {"shape": "hv", "color": FRONT_COLOUR, "width": 2},
        }  # fmt: skip
        layout = _layout(title, "hypervolume", showlegend=False)
        layout["margin"]["b"] = 50
        for axis in ("xaxis", "yaxis"):
            layout[axis]["rangemode"] = "tozero"
        found.append({"data": [trace], "layout": layout})
    return found[0], found[1]
