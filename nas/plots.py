"""Figures of a study, drawn from its tables."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

FRONT_COLOUR, OTHERS_COLOUR = "#d1495b", "#9aa5b1"


def deployment_line(row: pd.Series) -> str:
    """What a row of `pareto_front` was measured on, in words."""
    return (
        f"{row['device_name']}, {row['engine']}, {row['dtype']}, batch {row['batch_size']}, "
        f"{row['resolution']}x{row['resolution']}, {row['threads']} thread(s)"
    )


def plot_front(evaluations: pd.DataFrame, front: pd.DataFrame, title: str, path: Path) -> None:
    """Accuracy against latency, the front as a staircase with the spread of each latency; PNG, SVG or PDF by suffix.

    Args:
        evaluations: complete candidates of one deployment, as the view `convfirst_evaluations` has them.
        front: the rows of `pareto_front` for the same deployment.

    Raises:
        ValueError: the suffix is none that matplotlib writes.
    """
    # Without a display and without the state of pyplot.
    from matplotlib.figure import Figure

    front = front.sort_values("latency_ms")
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.scatter(
        evaluations["latency_ms"], 100 * evaluations["accuracy"], s=14, color=OTHERS_COLOUR,
        label=f"all {len(evaluations)} candidates", zorder=2,
    )  # fmt: skip
    axes.step(front["latency_ms"], 100 * front["accuracy"], where="post", color=FRONT_COLOUR, lw=1.2, zorder=3)
    spread = [front["latency_ms"] - front["latency_p20_ms"], front["latency_p80_ms"] - front["latency_ms"]]
    axes.errorbar(
        front["latency_ms"], 100 * front["accuracy"], xerr=spread, fmt="o", ms=5, lw=1, color=FRONT_COLOUR,
        label=f"Pareto front ({len(front)}), bars from p20 to p80", zorder=4,
    )  # fmt: skip
    axes.set_xlabel("latency of one batch in ms, drift-corrected median")
    axes.set_ylabel("accuracy of the proxy training in %")
    axes.set_title(f"{title}\n{deployment_line(front.iloc[0])}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=120)
