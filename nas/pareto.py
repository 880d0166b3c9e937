"""Dominance, Pareto fronts and hypervolume of (accuracy up, latency down), of arrays and of points that come singly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
    members = front(accuracy, latency_ms)
    return _volume(accuracy[members], latency_ms[members], reference_latency_ms)


def _volume(accuracy: np.ndarray, latency_ms: np.ndarray, reference_latency_ms: float) -> float:
    """The hypervolume of the members of a front, from the fastest to the slowest."""
    inside = latency_ms < reference_latency_ms
    # A member's accuracy is the height from its latency to that of the next slower one, or to the reference.
    edges = np.append(latency_ms[inside], reference_latency_ms)
    return float((np.diff(edges) * accuracy[inside]).sum() / reference_latency_ms)


class GrowingFront:
    """The front of points that come one after the other: each costs a comparison with the front's members only.

    Attributes:
        keys: the names by which the members were added, from the fastest member to the slowest.
        accuracy, latency_ms: the members' coordinates, (n,) each, in the same order.
    """

    def __init__(self, points: Iterable[tuple[int, float, float]] = ()) -> None:
        self.keys = np.empty(0, dtype=int)
        self.accuracy, self.latency_ms = np.empty(0), np.empty(0)
        for key, accuracy, latency_ms in points:
            self.add(key, accuracy, latency_ms)

    def __len__(self) -> int:
        return len(self.keys)

    def add(self, key: int, accuracy: float, latency_ms: float) -> bool:
        """Add a point, and return whether it is a member of the front now."""
        equal = (self.accuracy == accuracy) & (self.latency_ms == latency_ms)
        if ((self.accuracy >= accuracy) & (self.latency_ms <= latency_ms) & ~equal).any():
            return False
        stays = (self.accuracy > accuracy) | (self.latency_ms < latency_ms) | equal
        place = int(np.searchsorted(self.latency_ms[stays], latency_ms, side="right"))
        self.keys = np.insert(self.keys[stays], place, key)
        self.accuracy = np.insert(self.accuracy[stays], place, accuracy)
        self.latency_ms = np.insert(self.latency_ms[stays], place, latency_ms)
        return True

    @property
    def best_accuracy(self) -> float:
        """The greatest accuracy of all points; 0 where there are none."""
        return float(self.accuracy[-1]) if len(self) else 0.0

    def hypervolume(self, reference_latency_ms: float) -> float:
        """The hypervolume of all points, in 0..1; see the function of that name."""
        return _volume(self.accuracy, self.latency_ms, reference_latency_ms)


def running_hypervolume(accuracy: Vector, latency_ms: Vector, reference_latency_ms: float) -> np.ndarray:
    """The hypervolume of the first point, of the first two, and so on: (n,), in 0..1.

    Args:
        accuracy, latency_ms: the points' coordinates, (n,) each, in the order of the search.
    """
    volumes = np.zeros(len(accuracy))
    growing, volume = GrowingFront(), 0.0
    for index, point in enumerate(zip(accuracy, latency_ms, strict=True)):
        if growing.add(index, *point):
            volume = growing.hypervolume(reference_latency_ms)
        volumes[index] = volume
    return volumes


def evenly_spaced(size: int, count: int) -> list[int]:
    """At most `count` indices of a front of `size` members, evenly spaced, with both ends; the last if `count` is 1."""
    if count >= size:
        return list(range(size))
    if count == 1:
        return [size - 1]
    return [round(index * (size - 1) / (count - 1)) for index in range(count)]
