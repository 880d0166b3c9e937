"""Which trainings of a long study the models are given."""

from __future__ import annotations

import numpy as np
import pytest

from nas.search.model import FIRST, Kernel, Model, kernel_for
from nas.search.subset import EVERY, LATEST, MOST_POINTS, kept

NOISE = 0.03


@pytest.fixture(scope="module")
def trained() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Points, the truth there, accuracies with noise, and latencies, on which the truth depends little."""
    rng = np.random.default_rng(0)
    points = rng.standard_normal((1600, 4))
    truth = 0.6 + 0.05 * np.tanh(points[:, 0]) + 0.02 * points[:, 1]
    latency_ms = np.exp(0.3 * points[:, 0] + 0.5 * points[:, 2])
    return points, truth, truth + NOISE * rng.standard_normal(1600), latency_ms


def test_none_is_given_for_its_own_luck(trained: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]) -> None:
    """Chosen by the observed accuracy, half were those with lucky draws, and everything was overrated by two points."""
    points, truth, accuracy, latency_ms = trained
    count = 1200
    kernel = kernel_for(points[:count], accuracy[:count], {})
    given = kept(points[:count], accuracy[:count], latency_ms[:count], kernel, {})
    assert len(given) == len(set(given)) == MOST_POINTS
    earlier = given[given < count - LATEST]
    luck = accuracy[earlier] - truth[earlier]
    assert abs(luck.mean()) < 3 * NOISE / np.sqrt(len(earlier))
    assert luck.std() == pytest.approx(NOISE, rel=0.15)
    # They are next to the front all the same.
    lacks = lacking(truth[:count], latency_ms[:count])
    assert np.median(lacks[earlier]) < 0.5 * np.median(lacks)
    model = Model.of(points[given], accuracy[given], kernel)
    assert abs(float((model.predict(points[count:])[0] - truth[count:]).mean())) < 0.005


def lacking(accuracy: np.ndarray, latency_ms: np.ndarray) -> np.ndarray:
    order = np.argsort(latency_ms)
    lacks = np.empty(len(accuracy))
    lacks[order] = np.maximum.accumulate(accuracy[order]) - accuracy[order]
    return lacks


def test_what_is_given_depends_on_the_trainings_alone(
    trained: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
) -> None:
    """A search that goes on knows no earlier choices, and gives its models the same."""
    points, _, accuracy, latency_ms = trained
    known: dict[int, np.ndarray] = {}
    for count in (MOST_POINTS, MOST_POINTS + 1, 777, 778, 1000):
        arguments = points[:count], accuracy[:count], latency_ms[:count], Kernel(*FIRST)
        given = kept(*arguments, known)
        assert given.tolist() == kept(*arguments, {}).tolist()
        assert given[-LATEST:].tolist() == list(range(count - LATEST, count))
    assert all(earlier % EVERY == 0 for earlier in known)
    assert len(known) == 3
