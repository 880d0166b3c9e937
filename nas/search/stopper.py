"""Early stopping for two objectives: which accuracy a candidate needs, and what its curve says of its end.

A candidate's latency is known before it is trained, so a training may end as soon as it will hardly reach the front at
that latency. What it will reach is predicted from its learning curve so far and from the model of accuracy together, by
a regression on the study's own trainings; so the prediction's errors are those of this study (docs/measurements.md,
"Early stopping").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy import stats

from nas.search.front_sampler import Memory
from nas.search.model import Model, kernel_for
from nas.search.subset import kept
from nas.training.curves import CurvePoint
from nas.training.stopping import LOSS, Check, Rule, figures
from search_spaces import ArchSpec

# Shares of the schedule after which a training is looked at.
SHARES = (0.25, 0.35, 0.5, 0.75)
# Probability of reaching the needed accuracy, below which a training is given up. It was set so that of the trainings
# that would reach it one in twenty is given up (docs/measurements.md, "Early stopping").
LEAST_CHANCE = 0.04
# A network is compared with those that are at most so much slower, as latencies have errors of their own.
SLOWER = 1.05
# Complete trainings without which nothing is predicted.
LEAST_TRAININGS = 20
# Of so many candidates one is trained to the end, whatever the rule says.
CONTROL_EVERY = 10
# Weight of the regression's penalty, in trainings.
RIDGE = 1.0


@dataclass
class Stopper:
    """Makes the rules of a search's trainings.

    Args:
        memory: the features and kernels of the search.
        steps: length of the schedule.
        chance: probability of reaching the needed accuracy, below which a training is given up.

    Attributes:
        archs, accuracy, latency_ms: the complete trainings, in the order of their candidates' numbers.
        of_curves: of each of them, the figures of its curve at each of `SHARES`; None where there are too few points.
    """

    memory: Memory
    steps: int
    archs: list[ArchSpec] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    latency_ms: list[float] = field(default_factory=list)
    of_curves: list[list[tuple[float, ...] | None]] = field(default_factory=list)
    chance: float = LEAST_CHANCE

    def add(self, arch: ArchSpec, accuracy: float, latency_ms: float, curve: Sequence[CurvePoint]) -> None:
        """Take a training that was completed."""
        self.archs.append(arch)
        self.accuracy.append(accuracy)
        self.latency_ms.append(latency_ms)
        self.of_curves.append([figures(curve, step) for step in self._steps])

    @property
    def _steps(self) -> list[int]:
        """The steps after which a training is looked at."""
        return [round(share * self.steps) for share in SHARES]

    def rules(self, archs: Sequence[ArchSpec], latency_ms: Sequence[float]) -> list[Rule | None]:
        """The rules of trainings that are to begin; None where a training cannot be judged.

        Args:
            latency_ms: latencies of the architectures, (n,).
        """
        accuracy, known_ms = np.array(self.accuracy), np.array(self.latency_ms)
        if len(self.archs) < LEAST_TRAININGS or not archs or np.ptp(accuracy) == 0:
            return [None] * len(archs)
        points = self.memory.evaluated(self.archs)
        kernel = kernel_for(points, accuracy, self.memory.accuracy_kernels)
        averaged, counts = self.memory.averaged(self.archs, accuracy)
        indices = kept(points, averaged, known_ms, kernel, self.memory.next_to_front)
        model = Model.of(points[indices], averaged[indices], kernel, None if counts is None else counts[indices])
        own_points = self.memory.points(archs)
        guessed = model.means(own_points)
        # A single training flatters those that it ranks first; the front that counts is one of means.
        means = model.fitted()
        looks = self._looks(indices, model, accuracy[indices])
        losses = [look.losses.means(own_points) for look in looks]
        rules: list[Rule | None] = []
        for number, (arch, own_ms) in enumerate(zip(archs, latency_ms, strict=True)):
            faster = means[known_ms[indices] <= SLOWER * own_ms]
            if not len(faster) or not looks:
                rules.append(None)
                continue
            own = tuple(
                look.check(float(guessed[number]), float(loss[number]))
                for look, loss in zip(looks, losses, strict=True)
            )
            rules.append(Rule(float(faster.max()), own, not is_control(arch)))
        return rules

    def _looks(self, indices: np.ndarray, model: Model, accuracy: np.ndarray) -> list[Look]:
        """The looks at trainings of which enough is known.

        Args:
            indices: the trainings that the model of accuracy was given.
            accuracy: what these trainings themselves came to, (n,), which is where their curves lead.
        """
        guessed, _ = model.left_out()
        found: list[Look] = []
        before = model
        for look, step in enumerate(self._steps):
            seen = [(place, self.of_curves[index][look]) for place, index in enumerate(indices)]
            usable = [(place, each) for place, each in seen if each is not None]
            if len(usable) < LEAST_TRAININGS:
                continue
            places, curves = [place for place, _ in usable], np.array([each for _, each in usable])
            # Some kinds of networks learn late: what counts is a loss beside those that such networks have by then.
            at = model.points[places]
            same = at.shape == before.points.shape and (at == before.points).all()
            losses = (
                before.like(curves[:, LOSS])
                if same
                else Model.of(at, curves[:, LOSS], replace(model.kernel, scale=None))
            )
            before = losses
            columns = np.column_stack([guessed[places], losses.left_out()[0], curves])
            weights, errors = regression(columns, accuracy[places])
            deviation = float(np.sqrt(np.mean(errors**2)))
            quantile = float(stats.t.ppf(1 - self.chance, len(places) - len(weights)))
            # Errors may have longer tails, as where most networks are equally good and a few are not.
            tail = float(np.quantile(errors, 1 - self.chance, method="higher"))
            found.append(Look(step, losses, weights, deviation, max(quantile * deviation, tail)))
        return found


@dataclass(frozen=True)
class Look:
    """What is known of trainings after a number of steps.

    Args:
        losses: model of the losses then.
        weights: those of the regression: the intercept, and the weights of the guessed accuracy, the guessed loss, and
            the curve's figures, (3 + f,).
        deviation: standard deviation of the final accuracy around what is predicted.
        margin: distance from the needed accuracy from which on a training is given up.
    """

    step: int
    losses: Model
    weights: np.ndarray
    deviation: float
    margin: float

    def check(self, accuracy: float, loss: float) -> Check:
        """The look at a training whose accuracy and loss are guessed."""
        intercept = float(self.weights[0] + self.weights[1] * accuracy + self.weights[2] * loss)
        return Check(self.step, intercept, tuple(map(float, self.weights[3:])), self.deviation, self.margin)


def regression(columns: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A ridge regression: the intercept with the columns' weights, (1 + f,), and the errors at left-out values, (n,).

    Args:
        columns: the figures, (n, f); each is scaled, so that the penalty treats all alike.
        values: what they are to explain, (n,).
    """
    mean, scale = columns.mean(0), np.maximum(columns.std(0), 1e-9)
    design = np.column_stack([np.ones(len(values)), (columns - mean) / scale])
    penalty = RIDGE * np.eye(design.shape[1])
    penalty[0, 0] = 0.0
    inverse = np.linalg.inv(design.T @ design + penalty)
    scaled = inverse @ design.T @ values
    leverage = np.einsum("ij,jk,ik->i", design, inverse, design)
    errors = (values - design @ scaled) / np.maximum(1 - leverage, 1e-9)
    weights = scaled[1:] / scale
    return np.array([scaled[0] - weights @ mean, *weights]), errors


def is_control(arch: ArchSpec) -> bool:
    """Whether an architecture is one of those that are trained to the end, whatever the rule says."""
    return int(arch.arch_id, 16) % CONTROL_EVERY == 0
