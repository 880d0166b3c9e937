"""Figures of the report other than the front: contenders, hypervolume, and the time spent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from nas.display.charts import BLUE, DPI, GREY, ORANGE, RED, Chart, Series, new_figure, plain_texts
from nas.display.study_plots import LATENCY_TITLE
from nas.validation.contenders import Contender, ContenderKind

PARTS = {"training": BLUE, "latency": ORANGE, "all else": GREY}
KIND_STYLES = {
    ContenderKind.TIMM: ("s", BLUE, "known network"),
    ContenderKind.DEFAULT: ("D", "#7a5195", "ConvFirst, not searched"),
    ContenderKind.FOUND: ("o", RED, "found by this search"),
}
MOST_MARKERS = 40
# Ratio of the longest to the shortest latency above which the axis is logarithmic.
WIDE_RATIO = 8


def time_unit(seconds: float) -> tuple[str, float]:
    """The unit in which a time is a short number, and the length of the unit in seconds."""
    if seconds < 300:
        return "seconds", 1
    return ("minutes", 60) if seconds < 3 * 3600 else ("hours", 3600)


def contender_series(contenders: Sequence[Contender]) -> list[Series]:
    """A series for each kind of contender, with the contenders' names as labels."""
    series = []
    for kind, (marker, colour, name) in KIND_STYLES.items():
        members = [contender for contender in contenders if contender.kind == kind]
        if members:
            series.append(Series(
                name, [each.latency.median_ms for each in members], [100 * each.accuracy for each in members], colour,
                marker, size=10, low=[each.latency.p20_ms for each in members],
                high=[each.latency.p80_ms for each in members], labels=[each.name for each in members],
                details=[_details(each) for each in members],
            ))  # fmt: skip
    return series


def _details(contender: Contender) -> str:
    stages = contender.summary.replace(" | ", "\n")
    return (
        f"{contender.name}\n{100 * contender.accuracy:.2f} % at {contender.latency.median_ms:.4g} ms "
        f"({contender.engine})\n{contender.resolution}x{contender.resolution}, {contender.steps} steps, learning rate "
        f"{contender.learning_rate:g}\n{contender.training}\n{stages}"
    )


def contenders_chart(contenders: Sequence[Contender]) -> Chart:
    """Accuracy against latency of networks that were trained alike."""
    latencies_ms = [contender.latency.median_ms for contender in contenders]
    log_x = max(latencies_ms) > WIDE_RATIO * min(latencies_ms)
    return Chart(LATENCY_TITLE, "accuracy of the long training in %", contender_series(contenders), log_x=log_x)


def hypervolume_charts(history: pd.DataFrame, reference_latency_ms: float) -> dict[str, Chart]:
    """Charts of hypervolume over candidates and over time, by their names in the page.

    Args:
        history: a row for each complete candidate, with `number`, `seconds` since the beginning and `hypervolume`.
        reference_latency_ms: latency up to which hypervolume is counted.
    """
    # Of 2,000 candidates a few dozen change it, and the last shows for how long it has not changed.
    changed = history["hypervolume"].diff().fillna(1) != 0
    changed.iloc[-1] = True
    rows = history.assign(count=range(1, len(history) + 1))[changed]
    unit, scale = time_unit(history["seconds"].iloc[-1])
    details = [
        f"{row['hypervolume']:.4f}\nafter {row['count']} candidates\ntrial {row['number']}, "
        f"{row['seconds'] / scale:.1f} {unit}"
        for row in rows.to_dict("records")
    ]
    marker = "" if len(rows) > MOST_MARKERS else "o"
    y_title = f"hypervolume as searched, up to {reference_latency_ms:.3g} ms"
    axes = {
        "hypervolume_trials": ("candidates", rows["count"]),
        "hypervolume_seconds": (f"{unit} of evaluating candidates", rows["seconds"] / scale),
    }
    charts = {}
    for name, (x_title, values) in axes.items():
        stairs = Series(
            "hypervolume as searched",
            [0, *values],
            [0, *rows["hypervolume"]],
            RED,
            marker,
            stairs=True,
            details=["", *details],
        )
        charts[name] = Chart(x_title, y_title, [stairs], from_zero=True)
    return charts


@plain_texts()
def plot_workers(trainings: pd.DataFrame, path: Path) -> None:
    """Draw the trainings of each worker over the time of the search.

    Args:
        trainings: see `nas.report.data.Material`.
    """
    workers = sorted(trainings["worker"].unique())
    figure = new_figure(9, min(1.2 + 0.28 * len(workers), 12.0))
    axes = figure.add_subplot()
    unit, scale = time_unit(trainings["end"].max())
    for row, worker in enumerate(workers):
        own = trainings[trainings["worker"] == worker]
        bars = list(zip(own["begin"] / scale, (own["end"] - own["begin"]) / scale, strict=True))
        axes.broken_barh(bars, (row - 0.4, 0.8), facecolors=PARTS["training"], edgecolors="white", linewidth=0.4)
    axes.set_yticks(range(len(workers)), [str(int(worker)) for worker in workers])
    axes.set_ylabel("worker")
    axes.set_xlabel(unit)
    axes.set_xlim(0, trainings["end"].max() / scale)
    axes.set_ylim(len(workers) - 0.5, -0.5)
    figure.savefig(path, dpi=DPI)


def plot_time(time_spent: pd.DataFrame, path: Path) -> None:
    """Draw the time spent on each part, stacked and summed over the candidates.

    Args:
        time_spent: a row for each candidate, with a column for each of `PARTS`, in seconds.
    """
    figure = new_figure(9, 3.2)
    axes = figure.add_subplot()
    unit, scale = time_unit(time_spent[list(PARTS)].to_numpy().sum())
    piled = [np.append(0, time_spent[part].cumsum() / scale) for part in PARTS]
    axes.stackplot(range(len(time_spent) + 1), piled, labels=list(PARTS), colors=list(PARTS.values()))
    axes.set_xlabel("candidates")
    axes.set_ylabel(f"{unit}, piled up")
    axes.set_xlim(0, len(time_spent))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="upper left", frameon=False)
    figure.savefig(path, dpi=DPI)
