"""Networks that nobody trained: trees guess what a training of theirs would come to, from a table of trained ones.

What the trees miss is added again, as it was seen in the table: each architecture has an error of its own, that of a
network of the table with about the same accuracy, and each training has noise, the distance of a training of such a
network from the mean of its seeds. Both are taken whole, with accuracy and learning curve of the same network or
training, so that a curve says as much of its end as real ones do. (Surrogates of benchmarks do the same without
learning curves: Zela et al., *Surrogate NAS Benchmarks*, 2022.)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from nas.lab.testbed import Network, Training
from nas.search.features import matrix
from nas.training.curves import CurvePoint
from nas.training.proxy import ProxyResult
from search_spaces import ArchSpec, SearchSpace

TREES, LEAF, FOLDS = 150, 2, 5
# Networks, and trainings, of about the same accuracy, among which an error is drawn.
NEAR = 50
# Places in a row of figures: accuracy, loss, logarithm of the seconds, and then the curve.
ACCURACY, LOSS, SECONDS, CURVE = 0, 1, 2, 3


class World:
    """Accuracy, latency and trainings of any architecture.

    Args:
        networks: those of a table; those of which no training succeeded are left out.
        space: the space whose anchor tells up to which latency hypervolume counts.
        resolution, classes: those of the table.

    Attributes:
        steps: length of the schedule.
        error, latency_error: root mean square of the trees' errors in cross-validation, in accuracy (of the mean of a
            network's seeds), and in the logarithm of the latency.
        noise: standard deviation of two trainings of one network in accuracy.
        own_error: standard deviation of the error that each architecture has of its own, in accuracy.
        reference_ms: latency up to which hypervolume counts, twice the anchor's.

    Raises:
        ValueError: fewer than `NEAR` networks, or fewer than two with trainings of several seeds.
    """

    def __init__(self, networks: Sequence[Network], space: SearchSpace, resolution: int, classes: int) -> None:
        from sklearn.ensemble import ExtraTreesRegressor
        from sklearn.model_selection import KFold, cross_val_predict

        self.space, self.resolution, self.classes = space, resolution, classes
        known = [(network, _rows(network.short)) for network in networks]
        known = [(network, rows) for network, rows in known if len(rows)]
        several = [rows for _, rows in known if len(rows) > 1]
        if len(known) < NEAR or len(several) < 2:
            raise ValueError(f"{len(known)} networks, {len(several)} of them with several seeds, are too few")
        self.points = [int(point[0]) for point in _complete(known[0][0].short)[0].curve]
        self.steps = self.points[-1] if self.points else 0
        features = matrix([network.arch for network, _ in known], resolution, classes)
        means = np.array([rows.mean(0) for _, rows in known])
        logs = np.log([network.latency_ms for network, _ in known])
        # A mean of n seeds scatters by 1 / n of the variance, and the others around it by the rest.
        self.deviations = np.concatenate([
            (rows - rows.mean(0)) * math.sqrt(len(rows) / (len(rows) - 1)) for rows in several
        ])  # fmt: skip
        self.deviates_at = np.concatenate([np.full(len(rows), rows[:, ACCURACY].mean()) for rows in several])
        self.noise = float(np.sqrt(np.mean(self.deviations[:, ACCURACY] ** 2)))
        # Trees of all figures at once would split by those of the largest variance.
        self.mean, self.scale = means.mean(0), np.maximum(means.std(0), 1e-9)
        scaled = (means - self.mean) / self.scale
        trees = ExtraTreesRegressor(TREES, min_samples_leaf=LEAF, random_state=0)
        of_latency = ExtraTreesRegressor(TREES, random_state=0)
        # The table has random networks first, then found ones.
        folds = KFold(FOLDS, shuffle=True, random_state=0)
        guessed = cross_val_predict(trees, features, scaled, cv=folds) * self.scale + self.mean
        missed = means - guessed
        errors = np.sqrt(np.mean(missed**2, axis=0))
        self.error = float(errors[ACCURACY])
        # Of these errors a part is the noise of the means, and the rest is the networks' own.
        once = float(np.mean([1 / len(rows) for _, rows in known]))
        own = np.sqrt(np.maximum(errors**2 - once * np.mean(self.deviations**2, axis=0), 0.0))
        self.own_error = float(own[ACCURACY])
        self.own, self.own_at = missed * (own / np.maximum(errors, 1e-12)), guessed[:, ACCURACY]
        missed_logs = cross_val_predict(of_latency, features, logs, cv=folds) - logs
        self.latency_error = float(np.sqrt(np.mean(missed_logs**2)))
        self.trees, self.latency_trees = trees.fit(features, scaled), of_latency.fit(features, logs)
        self.cache: dict[str, tuple[np.ndarray, float]] = {}
        self.reference_ms = 2 * self.truth(space.anchor())[1]

    def truth(self, arch: ArchSpec) -> tuple[float, float]:
        """Accuracy and latency in ms, without the noise of measuring them."""
        row, latency_ms = self._known(arch)
        return _accuracy(row), latency_ms

    def train(self, arch: ArchSpec, rng: np.random.Generator) -> ProxyResult:
        """A training of an architecture."""
        row, _ = self._known(arch)
        near = _nearest(self.deviates_at, row[ACCURACY])
        noisy = row + self.deviations[near[rng.integers(len(near))]]
        losses, accuracies = np.split(noisy[CURVE:], 2)
        seconds = float(np.exp(row[SECONDS]))
        curve = tuple(
            CurvePoint(step, max(float(loss), 0.0), float(np.clip(accuracy, 0, 1)), seconds * step / self.steps)
            for step, loss, accuracy in zip(self.points, losses, accuracies, strict=True)
        )
        return ProxyResult(_accuracy(noisy), max(float(noisy[LOSS]), 0.0), curve, seconds, 0)

    def _known(self, arch: ArchSpec) -> tuple[np.ndarray, float]:
        """The figures of an architecture's mean training, and its latency in ms."""
        if arch.arch_id not in self.cache:
            features = matrix([arch], self.resolution, self.classes)
            row = self.trees.predict(features)[0] * self.scale + self.mean
            near = _nearest(self.own_at, row[ACCURACY])
            digest = hashlib.sha256(arch.arch_id.encode()).digest()
            row = row + self.own[near[int.from_bytes(digest[:6], "big") % len(near)]]
            self.cache[arch.arch_id] = row, float(np.exp(self.latency_trees.predict(features)[0]))
        return self.cache[arch.arch_id]


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
