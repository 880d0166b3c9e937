"""Learning curves of trainings, and the text as which the database holds them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """A point of a learning curve.

    Args:
        step: number of steps that were done.
        train_loss, train_accuracy: averages over the steps since the last point.
        seconds: time since the beginning.
        val_accuracy, val_loss: accuracy and cross-entropy on the validation images; None where they were not looked at.
    """

    step: int
    train_loss: float
    train_accuracy: float
    seconds: float
    val_accuracy: float | None = None
    val_loss: float | None = None


def to_json(curve: Sequence[CurvePoint]) -> str:
    def stored(point: CurvePoint) -> tuple[float | None, ...]:
        values = astuple(point)
        return values[:4] if point.val_accuracy is None else values

    return json.dumps([stored(point) for point in curve])


def from_json(text: str | None) -> tuple[CurvePoint, ...]:
    """The points of a stored curve; none where there is no curve."""
    return tuple(CurvePoint(*values) for values in json.loads(text or "[]"))
