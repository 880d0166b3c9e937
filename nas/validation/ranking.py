"""Rank correlations of predictors with accuracy: Kendall's tau and Spearman's rho, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 500
# Number of bands of latency: a user chooses among networks of about the same latency.
BANDS = 3
# Fewer networks than this are not ranked.
MIN_COUNT = 4


@dataclass(frozen=True)
class Coefficient:
    """A correlation in -1..1 and its 95 % interval; all three are nan where nothing varies."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if np.isnan(self.value):
            return "-"
        return f"{self.value:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


@dataclass(frozen=True)
class Ranking:
    """Rank correlations of a predictor with the accuracy of `count` networks.

    Args:
        band: description of the ranked networks: "all", or a range of latencies.
    """

    predictor: str
    band: str
    count: int
    kendall: Coefficient
    spearman: Coefficient


def bands(latency_ms: Sequence[float], count: int = BANDS) -> list[tuple[str, np.ndarray]]:
    """All networks, and `count` bands of latency with equally many networks each: a name and a mask of each band."""
    values = np.asarray(latency_ms, dtype=float)
    named = [("all", np.full(len(values), True))]
    order = np.argsort(values, kind="stable")
    for members in np.array_split(order, count):
        if len(members) < MIN_COUNT:
            continue
        mask = np.full(len(values), False)
        mask[members] = True
        named.append((f"{values[members].min():.3g} to {values[members].max():.3g} ms", mask))
    return named


def rankings(
    predictors: Mapping[str, Sequence[float]], accuracy: Sequence[float], latency_ms: Sequence[float], seed: int = 0
) -> list[Ranking]:
    """Rank correlations of each predictor with the accuracy, over all networks and within bands of latency.

    Args:
        predictors: values of each predictor, by its name; a greater value predicts a higher accuracy.
        accuracy, latency_ms: accuracy and latency of each network.
        seed: seed of the resampling.
    """
    truth = np.asarray(accuracy, dtype=float)
    ranked = []
    for band, mask in bands(latency_ms):
        for name, values in predictors.items():
            pair, count = (np.asarray(values, dtype=float)[mask], truth[mask]), int(mask.sum())
            kendall, spearman = (
                _interval(lambda picked, of=of, pair=pair: of(*(each[picked] for each in pair)), count, seed)  # type: ignore[misc]
                for of in (_kendall, _spearman)
            )
            ranked.append(Ranking(name, band, count, kendall, spearman))
    return ranked


def gain(predictor: Sequence[float], rival: Sequence[float], accuracy: Sequence[float], seed: int = 0) -> Coefficient:
    """The difference between the taus of a predictor and of a rival on the same networks, resampled together."""
    columns = [np.asarray(values, dtype=float) for values in (predictor, rival, accuracy)]

    def difference(picked: np.ndarray) -> float:
        first, second, truth = (column[picked] for column in columns)
        return _kendall(first, truth) - _kendall(second, truth)

    return _interval(difference, len(columns[0]), seed)


def _kendall(one: np.ndarray, other: np.ndarray) -> float:
    return float(stats.kendalltau(one, other).statistic)


def _spearman(one: np.ndarray, other: np.ndarray) -> float:
    # Computed from ranks: scipy's own function warns of constant input, which some resamples are.
    ranks = stats.rankdata(one), stats.rankdata(other)
    if any(np.ptp(each) == 0 for each in ranks):
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])


def _interval(statistic: Callable[[np.ndarray], float], count: int, seed: int) -> Coefficient:
    """A statistic of all `count` networks, with percentiles of its values for resampled networks.

    Args:
        statistic: function of the indices of some networks.
    """
    value = statistic(np.arange(count)) if count > 1 else float("nan")
    if np.isnan(value):
        return Coefficient(value, value, value)
    rng = np.random.default_rng(seed)
    resampled = [statistic(picked) for picked in rng.integers(0, count, (RESAMPLES, count))]
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return Coefficient(value, float(low), float(high))
