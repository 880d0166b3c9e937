"""What measuring yields: a latency, and the two things that have one, a network and a shape."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Latency:
    """A latency, corrected for the drift of the machine, and how well it is known.

    Args:
        median_ms, p20_ms, p80_ms: of the samples.
        repeats: number of samples.
        interval_share: width of the 95 % confidence interval of the median, over the median.
        capped: whether the time cap ended sampling before that was narrow enough.
        throttled: whether the GPU throttled, also when it was measured again; None where nothing tells.
    """

    median_ms: float
    p20_ms: float
    p80_ms: float
    repeats: int
    interval_share: float = 0.0
    capped: bool = False
    throttled: bool | None = None

    @classmethod
    def of(cls, samples_ms: np.ndarray, interval_share: float, capped: bool, throttled: bool | None) -> Latency:
        """The latency that (repeats,) samples show."""
        p20, median, p80 = map(float, np.percentile(samples_ms, [20, 50, 80]))
        return cls(median, p20, p80, len(samples_ms), interval_share, capped, throttled)

    @classmethod
    def of_row(cls, row: Any) -> Latency:
        """The latency of a row of a table, which has the columns as attributes."""
        interval_share, capped = row.interval_share or 0.0, bool(row.capped)
        return cls(row.median_ms, row.p20_ms, row.p80_ms, row.repeats, interval_share, capped, row.throttled)

    def scaled(self, factor: float) -> Latency:
        """The same measurement as it would be where everything takes `factor` times as long."""
        return replace(
            self, median_ms=factor * self.median_ms, p20_ms=factor * self.p20_ms, p80_ms=factor * self.p80_ms
        )

    def less(self, overhead_ms: float) -> Latency:
        """The latency without an overhead that each sample contains, at least 0."""
        return replace(
            self, median_ms=max(self.median_ms - overhead_ms, 0.0), p20_ms=max(self.p20_ms - overhead_ms, 0.0),
            p80_ms=max(self.p80_ms - overhead_ms, 0.0),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Measurement:
    """What measuring a network yields.

    Args:
        latency: of one forward pass of a batch, corrected by the anchor.
        raw_median_ms: the network's median by the clock alone.
        anchor_median_ms: the anchor's median by the clock alone, in the same minutes.
        weight_bytes: of the deployed module.
        workspace_bytes: most tensor memory one forward pass holds beside weights and input.
        sm_clock_mhz, temperature_c: of the GPU, as it was last read while sampling.
        ready_seconds: from the network to what can be timed: folding, compiling, tuning.
    """

    latency: Latency
    raw_median_ms: float
    anchor_median_ms: float
    weight_bytes: int
    workspace_bytes: int
    sm_clock_mhz: float | None = None
    temperature_c: float | None = None
    ready_seconds: float = 0.0

    @property
    def median_ms(self) -> float:
        """The latency's median: what searches, fronts and limits use."""
        return self.latency.median_ms

    @property
    def memory_mb(self) -> float:
        """Weights and peak workspace, in units of 10^6 bytes."""
        return (self.weight_bytes + self.workspace_bytes) / 1e6


@dataclass(frozen=True, slots=True)
class ShapeLatency:
    """The latency of whatever has a shape (a part, a whole network, a call), corrected by the yardsticks.

    Args:
        shape: canonical JSON, see `nas.latency.parts`.
    """

    shape: str
    latency: Latency
