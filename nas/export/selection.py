"""The selection of a study's networks for export."""

from __future__ import annotations

from dataclasses import dataclass

from nas.options import Bounds, Checked, at_least, option

PANEL = "Which networks"


@dataclass(frozen=True)
class Selection(Checked):
    """The candidates of a study to export: members of the front or given trials, within the bounds.

    Args:
        trials: numbers of complete trials, on the front or not; empty means the front.
        top: number of networks, the most accurate of those within the bounds.

    Raises:
        FieldError: a field has a value that it cannot have.
    """

    trials: tuple[int, ...] = option(
        (), "--trial", "Number of a trial to export, on the front or not; may be repeated", default="the front",
        panel=PANEL, typed=list[int], parse=tuple,
    )  # fmt: skip
    top: int | None = option(
        None, "--top", "Number of networks to export, the most accurate", default="all", panel=PANEL,
        bounds=at_least(1),
    )  # fmt: skip
    max_latency_ms: float | None = option(
        None, "--max-latency-ms", "Export only networks at or below this latency", panel=PANEL, bounds=at_least(0)
    )
    min_accuracy: float | None = option(
        None, "--min-accuracy", "Export only networks at or above this accuracy, from 0 to 1", panel=PANEL,
        bounds=Bounds(lambda accuracy: 0 <= accuracy <= 1, "between 0 and 1, which is 100 %"),
    )  # fmt: skip
