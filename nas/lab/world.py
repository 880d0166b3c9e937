"""A table of trained networks as a world to search in: what is not in the table, trees guess from it.

A network of the table has the table's own latency, and its trainings are those of the table, with their curves. What
they leave open is drawn once for each network: its true accuracy is what its trainings and the trees make likely
together. Were it the mean of the trainings, a network that was trained once would never be lucky.

To what the trees say of other networks, what they miss is added again, as it was seen in the table: each architecture
has errors of its own, in its trainings that of a network of the table with about the same accuracy, and in its latency
a share of that of one with about the same latency. Further trainings have noise, the distance of a training of such a
network from the mean of its seeds. Errors and noise of trainings are taken whole, with accuracy and learning curve of
the same network or training, so that a curve says as much of its end as real ones do. (Surrogates of benchmarks do the
same without learning curves: Zela et al., *Surrogate NAS Benchmarks*, 2022.) Seconds are guessed for all networks:
those of the table depend on what else ran when it was made.

The trees, and a line from which they start, see the parameters of each stage and its cost, and not the figures that the
sampler's model sees (`nas.search.features`): a model that is given what makes the truth would be flattered. Without the
line and the costs they miss latencies by far more than the sampler's model does after a hundred real networks, and a
search in their world would be harder than a real one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nas.lab.testbed import Network, Training
from nas.training.curves import CurvePoint
from nas.training.proxy import ProxyResult
from search_spaces import ArchSpec, SearchSpace
from search_spaces.arch import strided
from search_spaces.cost import stage_cost
from search_spaces.space import Choice

TREES, LEAF, FOLDS = 150, 2, 5
# Penalties among which the line's is chosen.
PENALTIES = tuple(10.0**power for power in range(-2, 4))
# What one model misses others miss, too, so that with all of the trees' errors in latency other models would miss
# more than in reality. With half of them the sampler's model, fitted to a hundred networks, misses the logarithms of
# others' latencies by .24 (root mean square), as it does in the table (.23); with none by .20, with all by .32.
# Between random choices of the hundred these differ by .02.
SURPRISE = 0.5
# Networks, and trainings, of about the same accuracy or latency, among which an error is drawn.
NEAR = 50
# Places in a row of figures: accuracy, loss, logarithm of the seconds, and then the curve.
ACCURACY, LOSS, SECONDS, CURVE = 0, 1, 2, 3


@dataclass(frozen=True)
class Known:
    """An architecture.

    Args:
        truth: the figures of its mean training, (f,).
        trainings: those of the table, (n, f).
    """

    truth: np.ndarray
    latency_ms: float
    trainings: np.ndarray | Sequence[np.ndarray] = ()


@dataclass(frozen=True)
class Guess:
    """A line, and trees of what it misses."""

    line: Any
    trees: Any

    @classmethod
    def of(cls, seen: np.ndarray, values: np.ndarray) -> Guess:
        """Fit to what is seen of networks, (n, p), and their values, (n,) or (n, f)."""
        from sklearn.ensemble import ExtraTreesRegressor
        from sklearn.linear_model import RidgeCV
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        line = make_pipeline(StandardScaler(), RidgeCV(PENALTIES)).fit(seen, values)
        trees = ExtraTreesRegressor(TREES, min_samples_leaf=LEAF, random_state=0)
        return cls(line, trees.fit(seen, values - line.predict(seen)))

    def predict(self, seen: np.ndarray) -> np.ndarray:
        """The values of other networks, (m,) or (m, f), from what is seen of them, (m, p)."""
        guessed: np.ndarray = self.line.predict(seen) + self.trees.predict(seen)
        return guessed


def left_out(seen: np.ndarray, values: np.ndarray) -> np.ndarray:
    """What is guessed of each network by those of other folds."""
    from sklearn.model_selection import KFold

    found = np.empty_like(values)
    # The table has random networks first, then found ones.
    for known, others in KFold(FOLDS, shuffle=True, random_state=0).split(seen):
        found[others] = Guess.of(seen[known], values[known]).predict(seen[others])
    return found


class World:
    """Accuracy, latency and trainings of any architecture.

    Args:
        networks: those of a table; those of which no training succeeded are left out.
        space: the space whose anchor tells up to which latency hypervolume counts.
        resolution, classes: those of the table.
        surprise: share of the trees' error in the latency that each architecture outside the table has of its own.

    Attributes:
        steps: length of the schedule.
        error, latency_error: root mean square of the trees' errors in cross-validation, in accuracy (of the mean of a
            network's seeds), and in the logarithm of the latency.
        noise: standard deviation of two trainings of one network in accuracy.
        own_error: standard deviation of the error that each architecture outside the table has of its own, in accuracy.
        reference_ms: latency up to which hypervolume counts, twice the anchor's.

    Raises:
        ValueError: fewer than `NEAR` networks, or fewer than two with trainings of several seeds.
    """

    def __init__(
        self, networks: Sequence[Network], space: SearchSpace, resolution: int, classes: int, surprise: float = SURPRISE
    ) -> None:
        self.space, self.resolution, self.classes = space, resolution, classes
        known = [(network, _rows(network.short)) for network in networks]
        known = [(network, rows) for network, rows in known if len(rows)]
        several = [rows for _, rows in known if len(rows) > 1]
        if len(known) < NEAR or len(several) < 2:
            raise ValueError(f"{len(known)} networks, {len(several)} of them with several seeds, are too few")
        self.points = [int(point[0]) for point in _complete(known[0][0].short)[0].curve]
        self.steps = self.points[-1] if self.points else 0
        archs = [network.arch for network, _ in known]
        seen = np.array([self.seen(arch) for arch in archs])
        means = np.array([rows.mean(0) for _, rows in known])
        logs = np.log([network.latency_ms for network, _ in known])
        # A mean of n seeds scatters by 1 / n of the variance, and the others around it by the rest.
        self.deviations = np.concatenate([
            (rows - rows.mean(0)) * math.sqrt(len(rows) / (len(rows) - 1)) for rows in several
        ])  # fmt: skip
        self.deviates_at = np.concatenate([np.full(len(rows), rows[:, ACCURACY].mean()) for rows in several])
        # How long a training takes is no matter of luck, but of what else ran when the table was made.
        self.deviations[:, SECONDS] = 0.0
        self.noise = float(np.sqrt(np.mean(self.deviations[:, ACCURACY] ** 2)))
        # Trees of all figures at once would split by those of the largest variance.
        self.mean, self.scale = means.mean(0), np.maximum(means.std(0), 1e-9)
        scaled = (means - self.mean) / self.scale
        guessed = left_out(seen, scaled) * self.scale + self.mean
        missed = means - guessed
        errors = np.sqrt(np.mean(missed**2, axis=0))
        self.error = float(errors[ACCURACY])
        # Of these errors a part is the noise of the means, and the rest is the networks' own.
        once = float(np.mean([1 / len(rows) for _, rows in known]))
        own = np.sqrt(np.maximum(errors**2 - once * np.mean(self.deviations**2, axis=0), 0.0))
        self.own_error = float(own[ACCURACY])
        self.own, self.own_at = missed * (own / np.maximum(errors, 1e-12)), guessed[:, ACCURACY]
        self.logs_at = left_out(seen, logs)
        # Next to what the trees miss, the noise of timing is nothing.
        missed_logs = logs - self.logs_at
        self.latency_error = float(np.sqrt(np.mean(missed_logs**2)))
        self.own_logs = surprise * missed_logs
        self.guess, self.guess_of_latency = Guess.of(seen, scaled), Guess.of(seen, logs)
        for (_, rows), guess in zip(known, guessed, strict=True):
            rows[:, SECONDS] = guess[SECONDS]
        self.known = {
            network.arch.arch_id: Known(self._likely(network.arch, rows, guess, own), network.latency_ms, rows)
            for (network, rows), guess in zip(known, guessed, strict=True)
        }
        self.reference_ms = 2 * self.truth(space.anchor())[1]

    def seen(self, arch: ArchSpec) -> list[float]:
        """What the trees see of an architecture: its parameters by the names of the space, and its stages' costs."""
        values, found = self.space.values_of(arch), list[float]()
        for name, choices in self.space.choices().items():
            found += _numbers(values.get(name), choices)
        channels, size = arch.stem_width, strided(arch.shown(self.resolution), arch.stem_stride)
        for stage in arch.stages:
            counted = stage_cost(channels, stage, size)
            found += [math.log(counted.params), math.log(counted.macs)]
            channels, size = stage.width, strided(size, stage.stride)
        return found

    def truth(self, arch: ArchSpec) -> tuple[float, float]:
        """Accuracy and latency in ms, without the noise of measuring them."""
        known = self._known(arch)
        return _accuracy(known.truth), known.latency_ms

    def train(self, arch: ArchSpec, seed: int, number: int = 0) -> ProxyResult:
        """A training of an architecture: one of the table, until each has come once, then others.

        Args:
            seed: seed of the search; with it changes which training of the table comes first.
            number: number of trainings that this search made of the architecture before.
        """
        known = self._known(arch)
        if number < len(known.trainings):
            row = known.trainings[(seed + number) % len(known.trainings)]
        else:
            near = _nearest(self.deviates_at, known.truth[ACCURACY])
            rng = np.random.default_rng([seed, number, int(arch.arch_id, 16)])
            row = known.truth + self.deviations[near[rng.integers(len(near))]]
        losses, accuracies = np.split(row[CURVE:], 2)
        seconds = float(np.exp(row[SECONDS]))
        curve = tuple(
            CurvePoint(step, max(float(loss), 0.0), float(np.clip(accuracy, 0, 1)), seconds * step / self.steps)
            for step, loss, accuracy in zip(self.points, losses, accuracies, strict=True)
        )
        return ProxyResult(_accuracy(row), max(float(row[LOSS]), 0.0), curve, seconds, 0)

    def _known(self, arch: ArchSpec) -> Known:
        """What is known of an architecture, which is guessed where the table does not hold it."""
        if arch.arch_id not in self.known:
            seen = np.array([self.seen(arch)])
            row = self.guess.predict(seen)[0] * self.scale + self.mean
            row = row + self.own[_drawn(arch, "accuracy", _nearest(self.own_at, row[ACCURACY]))]
            log_ms = float(self.guess_of_latency.predict(seen)[0])
            log_ms += self.own_logs[_drawn(arch, "latency", _nearest(self.logs_at, log_ms))]
            self.known[arch.arch_id] = Known(row, math.exp(log_ms))
        return self.known[arch.arch_id]

    def _likely(self, arch: ArchSpec, rows: np.ndarray, guess: np.ndarray, own: np.ndarray) -> np.ndarray:
        """The figures of a tabulated network's mean training, (f,): one draw of what it may be.

        Args:
            rows: its trainings, (n, f).
            guess: what trees say that were not shown it, (f,).
            own: standard deviation of the networks around that, (f,).
        """
        noise = np.mean(self.deviations**2, axis=0) / len(rows)
        # Trainings and guess count by their precisions, as of normal distributions.
        share = own**2 / np.maximum(own**2 + noise, 1e-12)
        mean = guess + share * (rows.mean(0) - guess)
        drawn = _drawn(arch, "truth", _nearest(self.deviates_at, mean[ACCURACY]))
        likely: np.ndarray = mean + np.sqrt(share / len(rows)) * self.deviations[drawn]
        return likely


def _numbers(value: Choice | None, choices: Sequence[Choice]) -> list[float]:
    """A parameter as numbers: a number is itself, and of names the one that it is has 1, the others 0."""
    if any(isinstance(choice, str) for choice in choices):
        return [float(value == choice) for choice in choices]
    return [float(value or 0)]


def _drawn(arch: ArchSpec, what: str, indices: np.ndarray) -> int:
    """One of the indices, which depends on nothing but the architecture and what is drawn."""
    digest = hashlib.sha256(f"{what} {arch.arch_id}".encode()).digest()
    return int(indices[int.from_bytes(digest[:6], "big") % len(indices)])


def _complete(trainings: Sequence[Training]) -> list[Training]:
    return [training for training in trainings if training.accuracy is not None and training.loss is not None]


def _rows(trainings: Sequence[Training]) -> np.ndarray:
    """The figures of the trainings that succeeded, (n, f)."""
    return np.array([
        [training.accuracy, training.loss, math.log(max(training.seconds, 1e-3)),
         *(point[1] for point in training.curve), *(point[2] for point in training.curve)]
        for training in _complete(trainings)
    ])  # fmt: skip


def _accuracy(row: np.ndarray) -> float:
    return float(np.clip(row[ACCURACY], 0.01, 0.99))


def _nearest(values: np.ndarray, value: float) -> np.ndarray:
    """The indices of the values that are nearest to one."""
    return np.argsort(np.abs(values - value), kind="stable")[:NEAR]
