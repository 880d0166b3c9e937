"""Dominance, the Pareto front and hypervolume of (accuracy up, latency down): pure functions on arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Vector = Sequence[float] | np.ndarray


def front(accuracy: Vector, latency_ms: Vector) -> np.ndarray:
    """Indices of the points that no other point dominates, from the fastest to the slowest.

    A point dominates another if it is at least as accurate and at least as fast, and better in one of the two. Equal
    points do not dominate each other: both are in the front.

    Args:
        accuracy, latency_ms: the points' coordinates, (n,) each.
    """
    accuracy, latency_ms = np.asarray(accuracy, float), np.asarray(latency_ms, float)
    # The order is by latency, and at equal latency from the most accurate down.
    order = np.lexsort((-accuracy, latency_ms))
    members: list[int] = []
    best, best_latency = -np.inf, np.nan
    for index in order:
        equal = accuracy[index] == best and latency_ms[index] == best_latency
        if accuracy[index] > best or equal:
            members.append(int(index))
            best, best_latency = accuracy[index], latency_ms[index]
    return np.asarray(members, dtype=int)


def hypervolume(accuracy: Vector, latency_ms: Vector, reference_latency_ms: float) -> float:
    """Share of the rectangle (accuracy 0 to 1) x (latency 0 to the reference) that the points dominate, in 0..1.

    Points slower than the reference do not count.
    """
    accuracy, latency_ms = np.asarray(accuracy, float), np.asarray(latency_ms, float)
    inside = latency_ms < reference_latency_ms
    accuracy, latency_ms = accuracy[inside], latency_ms[inside]
    members = front(accuracy, latency_ms)
    # A member's accuracy is the height from its latency to that of the next slower one, or to the reference.
    edges = np.append(latency_ms[members], reference_latency_ms)
    return float((np.diff(edges) * accuracy[members]).sum() / reference_latency_ms)


def running_hypervolume(accuracy: Vector, latency_ms: Vector, reference_latency_ms: float) -> np.ndarray:
    """The hypervolume of the first point, of the first two, and so on: (n,), in 0..1.

    Only a point that enters the front costs more than a comparison with its members.

    Args:
        accuracy, latency_ms: the points' coordinates, (n,) each, in the order of the search.
    """
    accuracy, latency_ms = np.asarray(accuracy, float), np.asarray(latency_ms, float)
    volumes = np.zeros(len(accuracy))
    members, volume = np.empty(0, dtype=int), 0.0
    for index in range(len(accuracy)):
        covered = (accuracy[members] >= accuracy[index]) & (latency_ms[members] <= latency_ms[index])
        if latency_ms[index] < reference_latency_ms and not covered.any():
            members = np.append(members, index)
            members = members[front(accuracy[members], latency_ms[members])]
            volume = hypervolume(accuracy[members], latency_ms[members], reference_latency_ms)
        volumes[index] = volume
    return volumes


def evenly_spaced(size: int, count: int) -> list[int]:
    """At most `count` indices of a front of `size` members, evenly spaced, with both ends; the last if `count` is 1."""
    if count >= size:
        return list(range(size))
    if count == 1:
        return [size - 1]
    return [round(index * (size - 1) / (count - 1)) for index in range(count)]
