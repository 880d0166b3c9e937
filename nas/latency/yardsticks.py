"""Latencies that hold for another day: timed in turns with two fixed yardsticks, and corrected by them.

The yardsticks are a network of many small layers and a product. Their latencies, measured once for a device, are the
references of all that is timed with them: figures are told as if the yardsticks always took so long. So figures of
different days add up, and are shares of the same peak. A busy machine slows the one yardstick down more than the other:
what would be computed at the product's rate in a share e of the time is corrected by e parts of the product and 1 - e
of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from kernels.ceilings import tensor_float32
from nas.config import LatencyConfig
from nas.latency.meter import ANCHOR_FACTOR, LatencyMeter, cpu_threads, in_turn
from nas.latency.values import Latency
from search_spaces import load_space

# They measure the machine and not the deployment: in one dtype and so many threads they serve all.
YARDSTICK_ENGINE, YARDSTICK_RESOLUTION, YARDSTICK_CLASSES = "eager", 32, 10
# Large enough that a CUDA graph's launch is a small part of it.
YARDSTICK_SIDE = {"cpu": 384, "cuda": 4096}
# Share of a network's time cap that each of several things timed in turns has.
CAP_FACTOR = 0.5
# Samples are shorter than a network's alone, so that more fit in the time.
MIN_SAMPLE_SECONDS = 1e-3


@dataclass(frozen=True)
class Timed:
    """What is timed: calls to make in turn, and the MACs of each."""

    forwards: list[Callable[[], object]]
    macs: int = 0


class Yardsticks:
    """Times things in one dtype and so many threads on one device.

    Args:
        config: says device, dtype, threads and the precision.
        references_ms: latencies of the network and the product; None measures them now.

    Attributes:
        interval_share, throttled: of the references, if they were measured now; see `nas.latency.values.Latency`.
    """

    def __init__(self, config: LatencyConfig, references_ms: Sequence[float] | None = None) -> None:
        self.config = replace(
            config, engine=YARDSTICK_ENGINE, batch_size=1, resolution=YARDSTICK_RESOLUTION,
            num_classes=YARDSTICK_CLASSES,
        )  # fmt: skip
        anchor = load_space("small").anchor().build(self.config.num_classes)
        # Its own correction is not used.
        self.meter = LatencyMeter(self.config, anchor, reference_ms=1.0)
        with cpu_threads(config.threads):
            self.runs = [self.meter.anchor_run, in_turn(self._product())]
            self.interval_share = 0.0
            self.throttled: bool | None = None
            if references_ms is None:
                sampled, sensors = self.meter.sample(
                    self.runs, lambda seconds: list(seconds.T), ANCHOR_FACTOR, reference=True
                )
                references_ms = (1e3 * np.median(sampled.seconds, axis=0)).tolist()
                self.interval_share, self.throttled = max(sampled.interval_shares), sensors.throttled
        self.references_ms = tuple(references_ms)

    @property
    def side(self) -> int:
        return YARDSTICK_SIDE[self.meter.device.type]

    def _product(self) -> list[Callable[[], object]]:
        left, right = self.meter.random_inputs((self.side, self.side), 2)
        with tensor_float32():
            return self.meter.forwards(_Product(right), [left])

    def time(self, group: Sequence[Timed], reference: bool = False) -> list[Latency]:
        """Latencies of several things, sampled in turns with each other and the yardsticks.

        Args:
            reference: whether others are scaled by them, so that they are to be known so much better.
        """

        def corrected_ms(seconds: np.ndarray) -> list[np.ndarray]:
            yardsticks = seconds[:, len(group) :]
            return [self.corrected_ms(seconds[:, index], yardsticks, each.macs) for index, each in enumerate(group)]

        runs = [*(in_turn(each.forwards) for each in group), *self.runs]
        factor = max(float(ANCHOR_FACTOR) if reference else 1.0, CAP_FACTOR * len(group))
        with cpu_threads(self.config.threads):
            sampled, sensors = self.meter.sample(runs, corrected_ms, factor, MIN_SAMPLE_SECONDS, reference)
        return [
            self.meter.latency(own_ms, share, sampled, sensors)
            for own_ms, share in zip(corrected_ms(sampled.seconds), sampled.interval_shares, strict=True)
        ]

    def corrected_ms(self, own: np.ndarray, yardsticks: np.ndarray, macs: int) -> np.ndarray:
        """Samples as if the yardsticks had run at their reference latencies.

        Args:
            own: (rounds,) seconds of a call of so many MACs.
            yardsticks: (rounds, 2) seconds, of the network and of the product.
        """
        by_network, by_product = (
            own / yardsticks[:, k] * reference_ms for k, reference_ms in enumerate(self.references_ms)
        )
        share = min(1.0, macs / self.side**3 * float(np.median(yardsticks[:, 1] / own)))
        blended: np.ndarray = share * by_product + (1 - share) * by_network
        return blended


class _Product(nn.Module):
    """A square product."""

    def __init__(self, right: Tensor) -> None:
        super().__init__()
        self.right = right
        self.out = torch.empty_like(right)

    def forward(self, left: Tensor) -> Tensor:
        return torch.matmul(left, self.right, out=self.out)
