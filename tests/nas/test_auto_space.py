from __future__ import annotations

import math
import random
from collections.abc import Callable
from statistics import median

import pytest

from nas.config import LatencyConfig
from nas.errors import UsageError
from nas.latency.values import Latency
from nas.search import auto_space
from nas.search.auto_space import DRAWN, TIMED, for_images, for_limit, typical
from search_spaces import ArchSpec, cost, ladder_space, load_space


def timer(
    overhead_ms: float = 0.01, noise: float = 0.0, seed: int = 0, share: float = 0.02
) -> Callable[[ArchSpec], Latency]:
    """A device on which a million MACs take 0.01 ms, and a network something besides."""
    rng = random.Random(seed)

    def time(arch: ArchSpec) -> Latency:
        ms = (overhead_ms + cost(arch, 32, 10).macs / 1e8) * math.exp(rng.gauss(0, noise))
        return Latency(ms, ms, ms, 10, share)

    return time


@pytest.mark.parametrize("limit_ms", [0.03, 0.1, 0.5, 2, 8, 50])
@pytest.mark.parametrize("resolutions", [(32,), (32, 48, 64)])
def test_about_half_of_random_networks_keep_the_limit(limit_ms: float, resolutions: tuple[int, ...]) -> None:
    found = for_limit(timer(), resolutions, limit_ms)
    assert found.space.resolution == resolutions
    rng = random.Random(1)
    latencies_ms = sorted(timer()(found.space.sample(rng)).median_ms for _ in range(300))
    keeping = sum(each <= limit_ms for each in latencies_ms) / len(latencies_ms)
    assert 0.35 < keeping < 0.65
    assert len(found.latencies_ms) == TIMED
    assert f"{sum(each <= limit_ms for each in found.latencies_ms)} of them at most {limit_ms:g} ms" in found.reason


def test_noise_rarely_changes_the_choice_and_never_by_much() -> None:
    chosen = [for_limit(timer(noise=0.05, seed=seed), (32,), 0.5).space.name for seed in range(20)]
    rungs = sorted(float(name.removeprefix("rung").partition("@")[0]) for name in chosen)
    assert rungs[-1] - rungs[0] <= 0.25
    assert max(rungs.count(rung) for rung in rungs) >= 14


def test_few_networks_are_timed() -> None:
    timed: list[ArchSpec] = []
    measure = timer()

    def counted(arch: ArchSpec) -> Latency:
        timed.append(arch)
        return measure(arch)

    found = for_limit(counted, (32,), 2.0)
    assert len(timed) <= 4 + 3 * TIMED
    assert len(found.anchors_ms) <= 4


def test_where_all_networks_of_some_rungs_take_as_long_higher_ones_are_found() -> None:
    """As on a GPU, where launches take as long as small networks."""
    found = for_limit(timer(overhead_ms=0.2), (32,), 0.4)
    assert median(found.latencies_ms) == pytest.approx(0.4, rel=0.2)


def test_below_a_plateau_lower_rungs_are_found_or_the_limit_is_refused() -> None:
    """As on a GPU: a network takes as long as its launches, whatever they compute."""

    def by_launches(arch: ArchSpec) -> Latency:
        ms = 0.05 + 0.02 * len(arch.blocks)
        return Latency(ms, ms, ms, 10, 0.02)

    with pytest.raises(
        UsageError, match=r"--max-latency-ms 0.1: the fastest network of the lowest rung .* takes 0.11 ms"
    ):
        for_limit(by_launches, (32,), 0.1)
    found = for_limit(by_launches, (32,), 0.12)
    assert sum(each <= 0.12 for each in found.latencies_ms) >= 2
    with pytest.raises(UsageError, match=r"--max-latency-ms 0.19: the fastest network"):
        for_limit(timer(overhead_ms=0.2), (32,), 0.19)


def test_a_limit_below_the_fastest_network_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--max-latency-ms 1e-06: the fastest network of the lowest rung .rung0@32"):
        for_limit(timer(), (32,), 1e-6)
    # Between the fastest and the middle of the lowest rung, it is the lowest.
    found = for_limit(timer(), (32,), 0.0125)
    assert found.space == ladder_space(32, 0)
    assert "the ladder ends with this rung" in found.reason


def test_a_limit_above_the_slowest_rung_takes_it_or_is_none() -> None:
    found = for_limit(timer(), (32,), 300)
    assert found.space == ladder_space(32, 11)
    assert "12 of them at most 300 ms; the ladder ends with this rung" in found.reason
    with pytest.raises(UsageError, match=r"--max-latency-ms 1e\+06: no limit to the highest rung .rung11@32"):
        for_limit(timer(), (32,), 1e6)


def test_a_device_that_is_too_noisy_is_refused() -> None:
    with pytest.raises(UsageError, match=r"too noisy to choose a rung: a latency of .* ms is known to 60% only"):
        for_limit(timer(share=0.6), (32,), 1.0)


def test_typical_networks_stand_for_the_space() -> None:
    space = load_space("small")
    few = typical(space)
    assert len(few) == TIMED
    assert few == typical(space)
    rng = random.Random(0)
    macs = sorted(cost(space.sample(rng), 32, 10).macs for _ in range(DRAWN))
    counted = [cost(arch, 32, 10).macs for arch in few]
    assert counted == sorted(counted)
    assert median(counted) == pytest.approx(median(macs), rel=0.05)
    assert counted[0] < macs[DRAWN // 10]
    assert counted[-1] > macs[-DRAWN // 10]


def test_without_a_limit_more_images_and_classes_get_a_higher_rung() -> None:
    def rung(images: int, classes: int) -> float:
        return float(for_images(images, classes, (32,)).space.name.removeprefix("rung").partition("@")[0])

    assert rung(100, 2) <= rung(1000, 10) < rung(16_000, 10) < rung(1_280_000, 1000)
    assert rung(16_000, 10) in (4, 5)
    assert rung(45_000, 100) >= rung(45_000, 10)
    assert rung(10**9, 10**4) == rung(10**12, 10**5)
    assert "20,000 images of 10 classes" in for_images(20_000, 10, (32,)).reason


@pytest.mark.slow
def test_networks_are_timed_in_the_deployment() -> None:
    config = LatencyConfig(device="cpu", seconds=0.5, num_classes=3)
    lines: list[str] = []
    with auto_space.timer(config, lines.append) as time:
        small, large = (time(ladder_space((32, 48, 64), rung).anchor()).median_ms for rung in (3, 6))
        assert 0 < small < large
        assert time(ladder_space(32, 3).anchor()).median_ms == pytest.approx(small, rel=2)
