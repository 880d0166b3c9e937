"""Rules by which a training ends early: it is given up once it will hardly reach the accuracy that it needs.

Optuna's own pruners refuse two objectives. Here latency is known before the training, and with it the accuracy that a
network needs to be on the front; only whether it gets there is open. The search makes a rule for each training
(`nas.search.stopper`); this module is what a worker needs of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypeAlias

from nas.training.curves import CurvePoint

# Points of a curve that are averaged: one is that of a few batches.
RECENT = 3
LEAST_POINTS = 5
# The place of the loss among the figures of a curve.
LOSS = 1


@dataclass(frozen=True)
class Verdict:
    """What a rule says of a training that it gives up.

    Args:
        step: number of steps after which it says so.
        predicted, deviation: accuracy that it expects at the end of the training, and its standard deviation.
        needed: accuracy that the training will hardly reach.
    """

    step: int
    predicted: float
    deviation: float
    needed: float


@dataclass(frozen=True)
class Check:
    """A look at a training.

    Args:
        step: number of steps after which it looks.
        intercept, weights: the final accuracy that it expects is `intercept` plus the weighted `figures` of the curve.
        deviation: standard deviation of the final accuracy around that.
        margin: distance from the needed accuracy, in accuracy, from which on the training is given up.
    """

    step: int
    intercept: float
    weights: tuple[float, ...]
    deviation: float
    margin: float


@dataclass(frozen=True)
class Rule:
    """The rule of one training.

    Args:
        needed: accuracy that the network needs to be on the front at its latency.
        checks: the looks at the training, in the order of their steps.
        ends: whether the training ends when it is given up; a few are trained to the end all the same, which tells how
            often the rule is wrong.
    """

    needed: float
    checks: tuple[Check, ...]
    ends: bool

    def verdict(self, curve: Sequence[CurvePoint]) -> Verdict | None:
        """The first verdict on a training with this curve so far; None while it is not given up."""
        for check in self.checks:
            seen = figures(curve, check.step)
            if seen is None or curve[-1].step < check.step:
                break
            predicted = check.intercept + sum(
                weight * figure for weight, figure in zip(check.weights, seen, strict=True)
            )
            if predicted + check.margin < self.needed:
                return Verdict(curve[-1].step, predicted, check.deviation, self.needed)
        return None


# Of some trainings side by side the rule of each, where it has one; None stands for none.
Rules: TypeAlias = Sequence[Rule | None] | None


def figures(curve: Sequence[CurvePoint], step: int) -> tuple[float, ...] | None:
    """What a curve up to a step says of its end: accuracy and loss of late, and how much the loss has just fallen.

    None where it has too few points for that.
    """
    seen = [point for point in curve if point.step <= step]
    if len(seen) < LEAST_POINTS:
        return None
    late, before = seen[-RECENT:], seen[-2 * RECENT : -RECENT]
    loss = fmean(point.train_loss for point in late)
    return fmean(point.train_accuracy for point in late), loss, fmean(point.train_loss for point in before) - loss
