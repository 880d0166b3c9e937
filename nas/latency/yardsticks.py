"""Timing in turns with two fixed yardsticks, which correct latencies so that those of different days compare.

The yardsticks are a network of many small layers and a product. Their latencies, measured once for a device, are the
references of all that is timed with them: latencies are corrected to what they would be if the yardsticks took exactly
so long. So latencies of different days add up, and are shares of the same peak. A busy machine slows one yardstick down
more than the other: a call that would take a share e of its time at the product's rate is corrected by e parts of the
product and 1 - e of the network.
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

# The yardsticks measure the machine and not the deployment: all deployments of one dtype and thread count share them.
YARDSTICK_ENGINE, YARDSTICK_RESOLUTION, YARDSTICK_CLASSES = "eager", 32, 10
# Rows of the square product: large enough that a CUDA graph's launch is a small part of its time.
YARDSTICK_SIDE = {"cpu": 384, "cuda": 4096}
# Each of several things timed in turns has this share of a network's time cap.
CAP_FACTOR = 0.5
# Samples are shorter than those of a network alone, so that more of them fit in the time.
MIN_SAMPLE_SECONDS = 1e-3


@dataclass(frozen=True)
class Timed:
    """Calls to time, which are made in turn, and the MACs of each."""

    forwards: list[Callable[[], object]]
    macs: int = 0


class Yardsticks:
    """Meter that times calls in turns with the yardsticks, in one dtype, on one device, with a number of CPU threads.

    Args:
        config: the deployment; only its device, dtype, threads and precision matter.
        references_ms: reference latencies of the network and the product; None measures them now.

    Attributes:
        interval_share, throttled: precision of the references, if they were measured now; see
            `nas.latency.values.Latency`.
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
                sampled, state = self.meter.sample(
                    self.runs, lambda seconds: list(seconds.T), ANCHOR_FACTOR, reference=True
                )
                references_ms = (1e3 * np.median(sampled.seconds, axis=0)).tolist()
                self.interval_share = max(sampled.interval_shares)
                self.throttled = None if state is None else state.throttled
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
            reference: whether other latencies are scaled by these, which then have to be known more precisely.
        """

        def corrected_ms(seconds: np.ndarray) -> list[np.ndarray]:
            yardsticks = seconds[:, len(group) :]
            return [self.corrected_ms(seconds[:, index], yardsticks, each.macs) for index, each in enumerate(group)]

        runs = [*(in_turn(each.forwards) for each in group), *self.runs]
        factor = max(float(ANCHOR_FACTOR) if reference else 1.0, CAP_FACTOR * len(group))
        with cpu_threads(self.config.threads):
            sampled, state = self.meter.sample(runs, corrected_ms, factor, MIN_SAMPLE_SECONDS, reference)
        return [
            self.meter.latency(own_ms, share, sampled, state)
            for own_ms, share in zip(corrected_ms(sampled.seconds), sampled.interval_shares, strict=True)
        ]

    def corrected_ms(self, own: np.ndarray, yardsticks: np.ndarray, macs: int) -> np.ndarray:
        """Samples of a call in ms, as if the yardsticks had run at their reference latencies.

        Args:
            own: (rounds,) seconds of the call.
            yardsticks: (rounds, 2) seconds of the network and of the product.
            macs: MACs of the call.
        """
        by_network, by_product = (
            own / yardsticks[:, k] * reference_ms for k, reference_ms in enumerate(self.references_ms)
        )
        share = min(1.0, macs / self.side**3 * float(np.median(yardsticks[:, 1] / own)))
        blended: np.ndarray = share * by_product + (1 - share) * by_network
        return blended


class _Product(nn.Module):
    """Module that multiplies its input with a fixed square matrix."""

    def __init__(self, right: Tensor) -> None:
        super().__init__()
        self.right = right
        self.out = torch.empty_like(right)

    def forward(self, left: Tensor) -> Tensor:
        return torch.matmul(left, self.right, out=self.out)
