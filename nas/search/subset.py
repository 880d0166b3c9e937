"""The choice of the trainings that a model is given, where a study has more than it takes.

A model of more points costs more than it gains. It is given the latest trainings, and of the earlier ones those that
are likely next to the front. No training is chosen by its own outcome: of those next to the front by their observed
accuracy most were lucky, and a model of them believes all networks to be better than they are.
"""

from __future__ import annotations

import numpy as np

from nas.search.model import Kernel, Model

MOST_POINTS = 500
# Of those, so many are the latest.
LATEST = 250
# Those next to the front are chosen anew after so many trainings.
EVERY = 50


def kept(
    points: np.ndarray, accuracy: np.ndarray, latency_ms: np.ndarray, kernel: Kernel, known: dict[int, np.ndarray]
) -> np.ndarray:
    """The indices of the trainings that a model is given, in order; they depend on the trainings alone.

    Args:
        points: scaled features of all trainings, (n, f), in their order.
        accuracy, latency_ms: their results, (n,) each.
        kernel: the kernel of accuracy.
        known: the earlier choices, by the number of trainings that they are of, to which a new one is added.
    """
    count = len(accuracy)
    if count <= MOST_POINTS:
        return np.arange(count)
    earlier = (count - LATEST) // EVERY * EVERY
    if earlier not in known:
        known[earlier] = next_to_front(
            points[:earlier], accuracy[:earlier], latency_ms[:earlier], kernel, MOST_POINTS - LATEST
        )
    return np.concatenate([known[earlier], np.arange(count - LATEST, count)])


def next_to_front(
    points: np.ndarray, accuracy: np.ndarray, latency_ms: np.ndarray, kernel: Kernel, most: int
) -> np.ndarray:
    """The indices of at most so many trainings whose guessed accuracies lack least to be on the front, in order.

    Each half of the trainings is guessed from the other half, or from a part of it that is spread over the latencies,
    so that no guess knows the training's own outcome.
    """
    guessed = np.empty(len(accuracy))
    for half in (0, 1):
        own, others = np.arange(half, len(accuracy), 2), np.arange(1 - half, len(accuracy), 2)
        fastest_first = others[np.argsort(latency_ms[others], kind="stable")]
        spread = np.linspace(0, len(others) - 1, min(len(others), MOST_POINTS // 2)).round().astype(int)
        given = fastest_first[spread]
        guessed[own] = Model.of(points[given], accuracy[given], kernel).means(points[own])
    order = np.argsort(latency_ms, kind="stable")
    lacks = np.empty(len(accuracy))
    lacks[order] = np.maximum.accumulate(guessed[order]) - guessed[order]
    return np.sort(np.argsort(lacks, kind="stable")[:most])
