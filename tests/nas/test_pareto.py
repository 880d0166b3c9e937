from __future__ import annotations

import numpy as np
import pytest

from nas.pareto import GrowingFront, evenly_spaced, front, hypervolume, running_hypervolume


def dominates(a: tuple[float, float], b: tuple[float, float]) -> bool:
    """(accuracy, latency): at least as good in both, better in one."""
    return a[0] >= b[0] and a[1] <= b[1] and a != b


def brute_front(points: list[tuple[float, float]]) -> set[int]:
    return {i for i, p in enumerate(points) if not any(dominates(q, p) for q in points)}


@pytest.mark.parametrize("seed", range(50))
def test_front_equals_brute_force(seed: int) -> None:
    """On a coarse grid, so that ties in one objective, and equal points, are common."""
    rng = np.random.default_rng(seed)
    points = [(float(a), float(b)) for a, b in rng.integers(0, 8, (rng.integers(1, 40), 2))]
    members = front([p[0] for p in points], [p[1] for p in points])
    assert set(members) == brute_front(points)
    assert len(set(members)) == len(members)
    assert [points[i][1] for i in members] == sorted(points[i][1] for i in members)


@pytest.mark.parametrize("seed", range(20))
def test_hypervolume_equals_counted_cells(seed: int) -> None:
    """All coordinates are multiples of 1/16, so that the dominated area is a whole number of cells."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(0, 12))
    accuracy, latency = rng.integers(0, 17, n) / 16, rng.integers(0, 20, n) / 16
    cells = 0
    for row in range(16):
        for column in range(16):
            height, width = (row + 0.5) / 16, (column + 0.5) / 16
            cells += bool(np.any((accuracy > height) & (latency < width)))
    assert hypervolume(accuracy, latency, 1.0) == pytest.approx(cells / 256)
    assert hypervolume(accuracy, 3 * latency, 3.0) == pytest.approx(cells / 256)


@pytest.mark.parametrize(
    ("points", "members"),
    [
        ([], []),
        ([(0.5, 1.0)], [0]),
        ([(0.5, 1.0), (0.5, 1.0)], [0, 1]),
        ([(0.5, 1.0), (0.5, 2.0)], [0]),
        ([(0.5, 1.0), (0.6, 1.0)], [1]),
        ([(0.6, 2.0), (0.5, 1.0)], [1, 0]),
        ([(0.6, 1.0), (0.5, 1.0), (0.6, 1.0)], [0, 2]),
    ],
)
def test_small_truth_table(points: list[tuple[float, float]], members: list[int]) -> None:
    assert front([p[0] for p in points], [p[1] for p in points]).tolist() == members


def test_points_slower_than_the_reference_count_for_nothing() -> None:
    assert hypervolume([0.9], [2.0], 1.0) == 0.0
    assert hypervolume([0.9, 0.5], [2.0, 0.5], 1.0) == pytest.approx(0.25)


def test_members_of_the_front_from_one_end_to_the_other() -> None:
    assert evenly_spaced(9, 3) == [0, 4, 8]
    assert evenly_spaced(4, 3) == [0, 2, 3]
    assert evenly_spaced(2, 3) == [0, 1]
    assert evenly_spaced(5, 1) == [4]
    assert evenly_spaced(0, 3) == []


@pytest.mark.parametrize("seed", range(20))
def test_a_growing_front_is_at_any_time_that_of_all_its_points(seed: int) -> None:
    rng = np.random.default_rng(seed)
    accuracy, latency_ms = rng.integers(0, 8, 60) / 8, rng.integers(1, 8, 60) / 4
    volumes = running_hypervolume(accuracy, latency_ms, 1.5)
    growing = GrowingFront()
    assert growing.best_accuracy == 0
    for count in range(1, 61):
        growing.add(count - 1, accuracy[count - 1], latency_ms[count - 1])
        members = front(accuracy[:count], latency_ms[:count])
        assert sorted(growing.keys) == sorted(members)
        assert list(growing.latency_ms) == sorted(latency_ms[members])
        assert growing.best_accuracy == accuracy[:count].max()
        whole = hypervolume(accuracy[:count], latency_ms[:count], 1.5)
        assert growing.hypervolume(1.5) == pytest.approx(whole)
        assert volumes[count - 1] == pytest.approx(whole)
