"""Results of measuring: a latency, and what has one, a network or a shape."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    # A child process that measures imports no database.
    from studies import CandidateLatency


@dataclass(frozen=True, slots=True)
class Latency:
    """A latency, corrected for the drift of the machine, and its precision.

    Args:
        median_ms, p20_ms, p80_ms: percentiles 50, 20 and 80 of the samples.
        repeats: number of samples.
        interval_share: width of the 95 % confidence interval of the median, over the median.
        capped: whether the time cap ended sampling before the interval was narrow enough.
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
        """The latency multiplied by a factor."""
        return replace(
            self, median_ms=factor * self.median_ms, p20_ms=factor * self.p20_ms, p80_ms=factor * self.p80_ms
        )

    def less(self, overhead_ms: float) -> Latency:
        """The latency without an overhead that each sample contains, at least 0; its interval stays as wide."""
        median_ms = max(self.median_ms - overhead_ms, 0.0)
        share = self.interval_share * (self.median_ms / median_ms if median_ms else 1.0)
        return replace(
            self, median_ms=median_ms, p20_ms=max(self.p20_ms - overhead_ms, 0.0),
            p80_ms=max(self.p80_ms - overhead_ms, 0.0), interval_share=share,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Measurement:
    """The measured latency and memory of a network.

    Args:
        latency: the latency of one forward pass of a batch, corrected by the anchor.
        raw_median_ms: the network's median, not corrected.
        anchor_median_ms: the anchor's median, not corrected, over the same rounds.
        weight_bytes: size of the deployed module's weights.
        workspace_bytes: the most tensor memory that one forward pass holds beside weights and input.
        sm_clock_mhz, temperature_c: the GPU's clock and temperature at the last reading while sampling.
        ready_seconds: time to fold, compile and tune the network, until it can be timed.
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
        """The latency's median, which searches, fronts and limits use."""
        return self.latency.median_ms


def memory_mb(measured: Measurement | CandidateLatency) -> float:
    """Weights and peak workspace, in units of 10^6 bytes."""
    return (measured.weight_bytes + measured.workspace_bytes) / 1e6


@dataclass(frozen=True, slots=True)
class ShapeLatency:
    """The latency of a part, a whole network or a call, corrected by the yardsticks.

    Args:
        shape: canonical JSON text that identifies what was measured, see `nas.latency.parts`.
    """

    shape: str
    latency: Latency
