"""A race for the places on a front: who of many candidates is trained again, and when enough is known.

A single training ranks candidates badly, and those that it ranks first are those that it flatters most. So candidates
that may be on the front are trained again with other seeds, most where the front is undecided, as in Maron and Moore's
races (Hoeffding Races, 1993) and in procedures that select the best by posterior probability (Chen et al., OCBA, 2000).
Nothing here knows networks: a candidate is a latency, some figures, an accuracy and those of its further trainings.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from scipy import stats

from nas.config import MOST_TRAININGS
from nas.search.model import Model, kernel_for

# Probability of being on the front, or of not being there, at which a candidate is decided.
CONFIDENCE = 0.9
# A member's accuracy is the mean of so many further trainings at least, if there are as many.
TRAININGS = 2
# Standard deviation of one training in accuracy, that of the embedded digits at 200 steps, where nothing else is known;
# and the number of trainings that such an expectation is worth.
NOISE, NOISE_TRAININGS = 0.024, 4
# Degrees of freedom below which a standard deviation is not worth being told.
LEAST_FREEDOM = 4
DRAWS = 4000
# Accuracies that differ by less, which is less than an image of a million, are equal.
TIE = 1e-6
# Fewer candidates do not say how accuracy depends on what an architecture is.
LEAST_FITTED = 12


@dataclass
class Race:
    """The state of a race.

    Args:
        searched: accuracy of each candidate in the training by which it was found, (n,).
        latency_ms: its latency, (n,).
        points: what is known of each candidate in figures from which accuracy may be guessed, (n, f), scaled.
        further: for each candidate, the accuracies of its further trainings, failed ones left out.
        failed: for each candidate, the number of further trainings that failed.
    """

    searched: np.ndarray
    latency_ms: np.ndarray
    points: np.ndarray
    further: list[list[float]] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.further = self.further or [[] for _ in self.searched]
        self.failed = self.failed or [0] * len(self.searched)

    def add(self, index: int, accuracy: float | None) -> None:
        """Take the result of a further training of a candidate; None if it failed."""
        if accuracy is None:
            self.failed[index] += 1
        else:
            self.further[index].append(accuracy)

    def trained(self, index: int) -> int:
        """Number of further trainings of a candidate, failed ones included."""
        return len(self.further[index]) + self.failed[index]

    def lost(self, index: int) -> bool:
        """Whether all further trainings of a candidate failed, and there were enough of them."""
        return not self.further[index] and self.failed[index] >= TRAININGS

    @property
    def noise(self) -> float:
        """Standard deviation of one training, from the further trainings so far and from what is expected."""
        squares, freedom = self._spread()
        return float(np.sqrt((NOISE_TRAININGS * self.expected_noise**2 + squares) / (NOISE_TRAININGS + freedom)))

    @cached_property
    def expected_noise(self) -> float:
        """What is expected of the noise before a network was trained twice.

        Of what the model does not explain, half the variance is taken for noise, and half for what each network has of
        its own: so it was on the embedded digits. Of few candidates it is the usual noise.
        """
        return NOISE if self.model is None else self.model.noise / np.sqrt(2)

    @property
    def measured_noise(self) -> float | None:
        """Standard deviation of one training from the further trainings alone; None where too few show it."""
        squares, freedom = self._spread()
        return float(np.sqrt(squares / freedom)) if freedom >= LEAST_FREEDOM else None

    def _spread(self) -> tuple[float, int]:
        """Sum of squares of the further trainings around their candidates' means, and its degrees of freedom."""
        several = [each for each in self.further if len(each) > 1]
        return sum(float(np.var(each) * len(each)) for each in several), sum(len(each) - 1 for each in several)

    def posterior(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each candidate's accuracy, (n,) each, given all that is known."""
        variance = self.noise**2
        mean, spread = self._guess(variance)
        count = np.array([1 + len(each) for each in self.further])
        total = self.searched + np.array([sum(each) for each in self.further])
        precision = 1 / spread + count / variance
        return (mean / spread + total / variance) / precision, np.sqrt(1 / precision)

    def _guess(self, noise_variance: float) -> tuple[np.ndarray, np.ndarray]:
        """What is known of each candidate's accuracy without its own trainings: mean and variance, (n,) each."""
        if self.guessed is None:
            variance = max(float(np.var(self.searched)), noise_variance)
            return np.full(len(self.searched), self.searched.mean()), np.full(len(self.searched), variance)
        mean, deviation = self.guessed
        # They are of one training, which scatters around the truth.
        return mean, np.maximum(deviation**2 - noise_variance, noise_variance / 16)

    @cached_property
    def model(self) -> Model | None:
        """The model of the searched accuracies; None for too few."""
        if len(self.searched) < LEAST_FITTED:
            return None
        return Model.of(self.points, self.searched, kernel_for(self.points, self.searched, {}))

    @cached_property
    def guessed(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Mean and standard deviation of the training of each candidate, guessed from all others; None for too few."""
        return None if self.model is None else self.model.left_out()

    def membership(self) -> np.ndarray:
        """The probability that each candidate is on the front of the true accuracies, (n,)."""
        mean, deviation = self.posterior()
        # What fails whenever it is trained again is on no front.
        mean[[self.lost(index) for index in range(len(mean))]] = -np.inf
        order = np.argsort(self.latency_ms, kind="stable")
        draws = np.random.default_rng(0).standard_normal((DRAWS, len(order)))
        drawn = mean[order] + deviation[order] * draws
        best = np.maximum.accumulate(drawn, axis=1)
        faster = np.column_stack([np.full(DRAWS, -np.inf), best[:, :-1]])
        # Where all are equally accurate, the fastest is the front.
        faster += TIE
        probability = np.empty(len(order))
        probability[order] = (drawn > faster).mean(0)
        return probability

    def next(self, count: int) -> list[int]:
        """At most `count` candidates to train again; none when the front is decided.

        First come likely members that have fewer than `TRAININGS` further trainings, then those whose place is least
        certain and becomes most certain by one more.
        """
        probability = self.membership()
        trained = np.array([self.trained(index) for index in range(len(probability))])
        open_ = trained < MOST_TRAININGS
        lacking = np.flatnonzero((probability >= 0.5) & (trained < TRAININGS) & open_)
        chosen = sorted(lacking, key=lambda index: (trained[index], -probability[index], index))[:count]
        undecided = np.minimum(probability, 1 - probability) > 1 - CONFIDENCE
        _, deviation = self.posterior()
        gain = probability * (1 - probability) * deviation**4 / (deviation**2 + self.noise**2)
        others = [index for index in np.flatnonzero(undecided & open_) if index not in chosen]
        chosen += sorted(others, key=lambda index: (-gain[index], index))[: count - len(chosen)]
        return [int(index) for index in chosen]

    def missing(self, count: int) -> list[int]:
        """At most `count` likely members that have no further accuracy, without whom nothing is confirmed."""
        probability = self.membership()
        found = [index for index in np.flatnonzero(probability >= 0.5).tolist() if not self.further[index]]
        return sorted(found, key=lambda index: (-probability[index], index))[:count]

    def decided(self) -> bool:
        """Whether every candidate is on the front, or off it, with the stated probability."""
        probability = self.membership()
        return bool((np.minimum(probability, 1 - probability) <= 1 - CONFIDENCE).all())

    def eligible(self) -> list[int]:
        """The candidates whose accuracy is confirmed: none while a likely member was not trained again."""
        probability = self.membership()
        likely = [len(each) for index, each in enumerate(self.further) if probability[index] >= 0.5]
        least = min(TRAININGS, min(likely, default=0))
        return [index for index, each in enumerate(self.further) if least and len(each) >= least]

    def interval(self, index: int, images: int) -> tuple[float, float, float]:
        """Mean of a candidate's further trainings, and the ends of its 95 % interval.

        The spread between seeds is that of all candidates together, and as long as few were trained several times,
        what is expected of it. Another set of validation images would add what a share of so many images scatters, by
        Agresti and Coull (1998), who allow for a share of 0 or 1 as well.

        Args:
            images: number of validation images.
        """
        mean = float(np.mean(self.further[index]))
        _, freedom = self._spread()
        of_seeds = stats.t.ppf(0.975, NOISE_TRAININGS + freedom) * self.noise / np.sqrt(len(self.further[index]))
        z = stats.norm.ppf(0.975)
        share = (mean * images + z**2 / 2) / (images + z**2)
        of_images = z * np.sqrt(share * (1 - share) / (images + z**2))
        half = float(np.hypot(of_seeds, of_images))
        return mean, max(0.0, mean - half), min(1.0, mean + half)
