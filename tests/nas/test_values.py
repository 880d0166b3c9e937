from __future__ import annotations

import numpy as np
import pytest

from nas.latency.values import Latency, Measurement, memory_mb

LATENCY = Latency(4.0, 2.0, 8.0, 10, 0.01, capped=True, throttled=False)


def test_a_latency_of_samples() -> None:
    """Eleven samples, of which the third, the sixth and the ninth are its percentiles."""
    samples_ms = np.arange(11.0)[::-1]
    assert Latency.of(samples_ms, 0.5, True, None) == Latency(5.0, 2.0, 8.0, 11, 0.5, True, None)


def test_a_latency_is_scaled_and_freed_of_overheads_as_a_whole() -> None:
    assert LATENCY.scaled(0.25) == Latency(1.0, 0.5, 2.0, 10, 0.01, True, False)
    # Noise makes nothing faster than nothing.
    assert LATENCY.less(3.0) == Latency(1.0, 0.0, 5.0, 10, 0.04, True, False)
    assert LATENCY.less(5.0).median_ms == 0.0


def test_a_networks_measurement() -> None:
    measured = Measurement(LATENCY, 4.1, 1.0, weight_bytes=2_000_000, workspace_bytes=500_000)
    assert (measured.median_ms, memory_mb(measured)) == (4.0, pytest.approx(2.5))
