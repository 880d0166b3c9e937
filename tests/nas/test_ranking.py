"""Rank correlations against hand-made cases."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nas.validation.ranking import bands, gain, rankings


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.validation.ranking.RESAMPLES", 100)


def test_kendall_and_spearman_by_hand() -> None:
    """Of the ten pairs of 1 2 3 4 5 and 1 2 3 5 4 nine agree and one does not: tau .8; rho is 1 - 6 * 2 / 120 = .9."""
    (found,) = [each for each in rankings({"proxy": [1, 2, 3, 4, 5]}, [1, 2, 3, 5, 4], [1.0] * 5) if each.band == "all"]
    assert found.kendall.value == pytest.approx(0.8)
    assert found.spearman.value == pytest.approx(0.9)
    assert found.count == 5


def test_intervals_hold_the_value_and_narrow_with_more_networks() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=200)
    noisy = truth + rng.normal(size=200)

    def width(count: int) -> float:
        found = rankings({"proxy": list(noisy[:count])}, list(truth[:count]), list(range(1, count + 1)))[0]
        assert found.kendall.low < found.kendall.value < found.kendall.high
        assert -1 <= found.spearman.low < found.spearman.value < found.spearman.high <= 1
        return found.kendall.high - found.kendall.low

    assert width(200) < width(20)
    # Independent of chance: the same networks give the same interval.
    assert width(50) == width(50)


def test_what_does_not_vary_ranks_nothing() -> None:
    found = rankings({"flat": [1.0] * 6}, [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6])
    assert all(math.isnan(each.kendall.value) and math.isnan(each.spearman.value) for each in found)
    assert {str(each.kendall) for each in found} == {"-"}


def test_the_gain_over_a_rival_is_of_the_same_networks() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=60)
    good, bad = truth + 0.3 * rng.normal(size=60), rng.normal(size=60)
    better = gain(list(good), list(bad), list(truth))
    assert 0 < better.low < better.value < better.high
    found = rankings({"good": list(good), "bad": list(bad)}, list(truth), [1.0] * 60)
    assert better.value == pytest.approx(found[0].kendall.value - found[1].kendall.value)
    equal = gain(list(good), list(good), list(truth))
    assert (equal.low, equal.value, equal.high) == (0, 0, 0)


def test_bands_of_latency() -> None:
    found = bands([5, 1, 2, 6, 3, 4, 7, 8, 9, 10, 11, 12])
    assert [name for name, _ in found] == ["all", "1 to 4 ms", "5 to 8 ms", "9 to 12 ms"]
    assert [int(mask.sum()) for _, mask in found] == [12, 4, 4, 4]
    assert list(np.flatnonzero(found[1][1])) == [1, 2, 4, 5]
    # Too few for bands.
    assert [name for name, _ in bands([1, 2, 3, 4, 5])] == ["all"]
