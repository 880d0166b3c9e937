"""The expected improvement of a front's hypervolume by a candidate whose accuracy is uncertain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

# Accuracy 0 of nothing.
FLOOR = 0.0


@dataclass(frozen=True)
class Staircase:
    """The best accuracy at each latency, and how much each latency counts.

    Between `edges[k]` and `edges[k + 1]` the best accuracy is `heights[k]`.

    Args:
        edges: latencies in ms, rising, (k + 1,); the last is the one up to which hypervolume counts.
        heights: accuracies, (k,).
    """

    edges: np.ndarray
    heights: np.ndarray

    @classmethod
    def of(cls, accuracy: np.ndarray, latency_ms: np.ndarray, least_ms: float, most_ms: float) -> Staircase:
        """The staircase of some networks, between two latencies.

        Args:
            accuracy, latency_ms: (n,) each.
        """
        inside = latency_ms < most_ms
        order = np.argsort(latency_ms[inside], kind="stable")
        latencies, best = latency_ms[inside][order], np.maximum.accumulate(accuracy[inside][order])
        rises = np.append(True, best[1:] > best[:-1]) if len(best) else np.zeros(0, dtype=bool)
        edges = np.concatenate([[min(least_ms, most_ms)], latencies[rises], [most_ms]])
        return cls(np.maximum.accumulate(edges), np.concatenate([[FLOOR], best[rises]]))

    def improvement(self, mean: np.ndarray, deviation: np.ndarray, latency_ms: np.ndarray) -> np.ndarray:
        """The hypervolume that candidates are expected to add, (m,), as a share of the whole.

        Half of the weight is on latencies as they are, as the hypervolume that is reported counts them, and half on
        their logarithms, so that networks that are ten times as fast count as much as the others.

        Args:
            mean, deviation: mean and standard deviation of the candidates' accuracies, (m,) each.
            latency_ms: their latencies, (m,).
        """
        z = (mean[:, None] - self.heights) / deviation[:, None]
        gain = deviation[:, None] * (z * ndtr(z) + np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi))
        weights = (self._widths(latency_ms) + self._widths(latency_ms, log=True)) / 2
        expected: np.ndarray = (gain * weights).sum(1)
        return expected

    def _widths(self, latency_ms: np.ndarray, log: bool = False) -> np.ndarray:
        """The share of all latencies that each step has above each candidate's latency, (m, k)."""
        edges = np.log(self.edges) if log else self.edges
        own = np.log(latency_ms) if log else latency_ms
        whole = max(float(edges[-1] - edges[0]), 1e-12)
        widths: np.ndarray = np.maximum(edges[1:] - np.maximum(edges[:-1], own[:, None]), 0) / whole
        return widths
