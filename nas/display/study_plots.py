"""Figures of a study: its front, and the learning curves of its candidates."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from nas.display.charts import (
    BLUE,
    DARK_GREY,
    ORANGE,
    RED,
    Chart,
    Series,
    new_figure,
    plain_texts,
    save_charts,
    wrapped,
    write_figure,
)
from nas.display.notes import deployment_line
from nas.recorded import is_confirmed
from nas.training.curves import CurvePoint

LATENCY_TITLE = "drift-corrected latency of one batch in ms"
# More trial numbers than this would overlap.
MOST_LABELS = 12


def front_chart(evaluations: pd.DataFrame, front: pd.DataFrame) -> Chart:
    """Accuracy against latency: the front as a staircase with its spreads, other candidates, as searched, in grey.

    Args:
        evaluations: complete candidates of one deployment, rows of the view `convfirst_evaluations`.
        front: rows of `pareto_front` for the same deployment.
    """
    front = front.sort_values("latency_ms")
    over = evaluations["latency_over_limit"].fillna(False).astype(bool)
    dominated = evaluations[~over & ~evaluations["number"].isin(front["number"])]
    confirmed = is_confirmed(front)
    others = f"others as searched ({len(dominated)})" if confirmed else f"dominated ({len(dominated)})"
    series = [_points(dominated, others, colour=DARK_GREY)]
    if over.any():
        series.append(_points(
            evaluations[over], f"over the limit, measured again ({over.sum()})", colour="#555d66", marker="x", size=7,
        ))  # fmt: skip
    bars = "confirmed; bars: 95 %, p20 to p80" if confirmed else "bars from p20 to p80"
    series.append(_points(
        front, f"front ({len(front)}), {bars}", colour=RED, size=9, stairs=True,
        low=list(front["latency_p20_ms"]), high=list(front["latency_p80_ms"]),
        below=[100 * value for value in front["accuracy_low"]] if confirmed else (),
        above=[100 * value for value in front["accuracy_high"]] if confirmed else (),
        labels=[str(number) for number in front["number"]] if len(front) <= MOST_LABELS else (),
    ))  # fmt: skip
    return Chart(LATENCY_TITLE, "accuracy of the proxy training in %", series)


def _points(rows: pd.DataFrame, name: str, **style: Any) -> Series:
    return Series(
        name, list(rows["latency_ms"]), [100 * value for value in rows["accuracy"]],
        details=[_details(row) for row in rows.to_dict("records")], **style,
    )  # fmt: skip


def _details(row: Mapping[Hashable, Any]) -> str:
    """A description of a candidate, with one line for each stage."""
    stages = row["summary"].replace(" | ", "\n")
    confirmed = ""
    # Only rows of the front have these.
    if row.get("confirmed") and not pd.isna(row.get("accuracy_low")):
        confirmed = (
            f"{100 * row['accuracy_low']:.2f} to {100 * row['accuracy_high']:.2f} %, {row['accuracy_trainings']:.0f} "
            f"trainings\nas searched: {100 * row['searched_accuracy']:.2f} %\n"
        )
    return (
        f"trial {row['number']}\n{100 * row['accuracy']:.2f} % at {row['latency_ms']:.4g} ms\n{confirmed}"
        f"p20 to p80: {row['latency_p20_ms']:.4g} to {row['latency_p80_ms']:.4g} ms\n"
        f"{row['params'] / 1e3:,.0f} k parameters, {row['macs'] / 1e6:,.2f} MMACs\n{stages}"
    )


def plot_front(evaluations: pd.DataFrame, front: pd.DataFrame, title: str, path: Path) -> None:
    """Draw `front_chart` under a title and the deployment, into a PNG, SVG or PDF file by its suffix.

    Raises:
        ValueError: Matplotlib does not write files of this suffix.
    """
    save_charts([front_chart(evaluations, front)], path, title=f"{title}\n{deployment_line(front.iloc[0])}")


@plain_texts()
def plot_learning_curve(curve: Sequence[CurvePoint], validation_accuracy: float | None, title: str, path: Path) -> None:
    """Draw loss and accuracy over the steps of a training, and its accuracy on held-out images at the end."""
    figure = new_figure(7, 4)
    axes = figure.add_subplot()
    steps = [point.step for point in curve]
    axes.plot(steps, [100 * point.train_accuracy for point in curve], color=BLUE, label="training accuracy")
    if validation_accuracy is not None:
        axes.axhline(
            100 * validation_accuracy, color=RED, ls="--", lw=1.2,
            label=f"held-out images, at the end: {100 * validation_accuracy:.1f} %",
        )  # fmt: skip
    axes.set_ylim(0, 100)
    axes.set_xlabel("step")
    axes.set_ylabel("accuracy in %")
    axes.grid(alpha=0.3)
    losses = axes.twinx()
    losses.plot(steps, [point.train_loss for point in curve], color=ORANGE, label="training loss")
    losses.set_ylim(bottom=0)
    losses.set_ylabel("loss (label smoothing included)")
    _write_course(figure, [axes, losses], title, path)


def _write_course(figure: Any, both: Sequence[Any], title: str, path: Path) -> None:
    """Write a figure of two axes over one another, with a legend of both."""
    both[0].set_title(wrapped(title, 7), fontsize=10, loc="left")
    handles = [handle for axes in both for handle in axes.get_legend_handles_labels()[0]]
    both[0].legend(handles=handles, loc="center right", frameon=False)
    write_figure(figure, path, dpi=110)


def plot_training(
    epochs: Sequence[int], losses: Sequence[float], accuracies: Sequence[float | None], title: str, path: Path
) -> None:
    """Draw the loss of a long training, and its accuracy on held-out images, over the passes over its images.

    Args:
        accuracies: those of the averaged weights, (n,); None where they were not looked at.
    """
    figure = new_figure(7, 4)
    axes = figure.add_subplot()
    looked = [(epoch, each) for epoch, each in zip(epochs, accuracies, strict=True) if each is not None]
    shown = [100 * accuracy for _, accuracy in looked]
    axes.plot([epoch for epoch, _ in looked], shown, color=RED, marker="o", ms=3, label="accuracy on held-out images")
    axes.set_xlabel("passes over the training images")
    axes.set_ylabel("accuracy in %")
    axes.grid(alpha=0.3)
    own = axes.twinx()
    own.plot(epochs, losses, color=ORANGE, label="training loss")
    own.set_ylim(bottom=0)
    own.set_ylabel("loss (label smoothing and augmentation included)")
    _write_course(figure, [axes, own], title, path)
