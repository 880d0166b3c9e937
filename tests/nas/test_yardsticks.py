"""Corrections on written figures; real yardsticks on the machine at hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nas.config import LatencyConfig
from nas.latency.yardsticks import Timed, Yardsticks

TINY = LatencyConfig(device="cpu", engine="eager", resolution=16, seconds=0.02)


@pytest.fixture(scope="module")
def yardsticks() -> Yardsticks:
    """They took 2 and 4 ms when they were first measured."""
    return Yardsticks(TINY, references_ms=[2.0, 4.0])


@pytest.mark.parametrize(
    ("share", "expected"), [(1.0, (8.0, 8.0)), (0.0, (1.0, 2.0)), (0.25, (2.75, 3.5)), (3.0, (8.0, 8.0))]
)
def test_what_computes_is_corrected_by_the_product_and_the_rest_by_the_network(
    yardsticks: Yardsticks, share: float, expected: tuple[float, float]
) -> None:
    """In the first round the network yardstick took four times its reference, in the second twice; the product half.

    What is timed took 4 ms each time; the product yardstick 2 ms, so twice its operations are what it has if it
    computes all of the time.
    """
    own = np.array([0.004, 0.004])
    of_yardsticks = np.array([[0.008, 0.002], [0.004, 0.002]])
    macs = int(2 * share * yardsticks.side**3)
    assert yardsticks.corrected_ms(own, of_yardsticks, macs).tolist() == pytest.approx(list(expected))


def test_the_yardsticks_own_latencies_are_their_references(yardsticks: Yardsticks) -> None:
    seconds = np.array([[0.007, 0.003], [0.005, 0.006]])
    assert yardsticks.corrected_ms(seconds[:, 0], seconds, 0).tolist() == pytest.approx([2.0, 2.0])
    product = yardsticks.corrected_ms(seconds[:, 1], seconds, yardsticks.side**3)
    assert product.tolist() == pytest.approx([4.0, 4.0])


def test_several_things_are_timed_in_turns(yardsticks: Yardsticks) -> None:
    """Matrices of which one takes eight times the work of the other."""
    before = torch.get_num_threads()
    small, large = torch.randn(192, 192), torch.randn(384, 384)
    one, eight = yardsticks.time([Timed([lambda: small @ small], 192**3), Timed([lambda: large @ large], 384**3)])
    assert 0 < one.p20_ms <= one.median_ms <= one.p80_ms
    assert one.repeats == eight.repeats >= 10
    assert 3 < eight.median_ms / one.median_ms < 24
    assert one.throttled is None
    assert torch.get_num_threads() == before


def test_without_references_they_are_measured(yardsticks: Yardsticks) -> None:
    measured = Yardsticks(TINY)
    assert len(measured.references_ms) == 2
    assert all(ms > 0 for ms in measured.references_ms)
    # How well they are known is told, for all else is told by them.
    assert measured.interval_share > 0 == yardsticks.interval_share
    assert measured.throttled is None


def test_they_are_the_same_whatever_is_deployed() -> None:
    """One engine, batch, resolution: what is measured in one deployment adds up with another's."""
    other = LatencyConfig(device="cpu", engine="inductor", resolution=64, batch_size=8, num_classes=3, seconds=0.02)
    made = Yardsticks(other, [1.0, 1.0]).config
    assert (made.engine, made.resolution, made.batch_size, made.num_classes) == ("eager", 32, 1, 10)
