from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from kernels import timing
from kernels.device_info import DeviceInfo
from kernels.timing import (
    MIN_ROUNDS,
    Precision,
    clock_for,
    interval_share,
    median_interval,
    peak_memory_bytes,
    sample_until,
    time_interleaved,
    warm_up,
)

MIB = 2**20


class FakeMachine:
    """A clock for runs whose speed is known, on a machine that slows down from call to call, or is noisy.

    Args:
        noise: standard deviation of the logarithm of a call's seconds, of each run.
    """

    def __init__(self, seconds: list[float], drift: float = 0.0, noise: tuple[float, ...] = ()) -> None:
        self.drift = drift
        self.rng = np.random.default_rng(0)
        self.noise = noise or (0.0,) * len(seconds)
        self.now = 0.0
        self.order: list[int] = []
        self.runs = [self._run(index, cost) for index, cost in enumerate(seconds)]

    def _run(self, index: int, cost: float) -> Callable[[], None]:
        def run() -> None:
            self.order.append(index)
            own = float(np.exp(self.noise[index] * self.rng.standard_normal()))
            self.now += cost * (1 + self.drift * len(self.order)) * own

        return run

    def clock(self, run: Callable[[], None], calls: int) -> float:
        begin = self.now
        for _ in range(calls):
            run()
        return self.now - begin


@pytest.fixture(autouse=True)
def _no_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warming up lasts real time, of which the fake machine knows nothing."""
    monkeypatch.setattr("kernels.timing.WARMUP_SECONDS", 0.0)


def test_seconds_per_call_are_told() -> None:
    machine = FakeMachine([0.001, 0.003])
    samples = time_interleaved(machine.runs, machine.clock, 0.0, 0.01)
    assert samples.shape[0] >= 10
    assert np.allclose(samples, [[0.001, 0.003]] * len(samples))


def test_neighbouring_samples_share_the_drift() -> None:
    """The machine becomes much slower in the run, and yet the ratio within a round stays within a few per cent."""
    machine = FakeMachine([0.002, 0.004], drift=1e-2)
    samples = time_interleaved(machine.runs, machine.clock, 0.0, 0.002)
    assert samples[-1, 0] > 1.3 * samples[0, 0]
    assert np.median(samples[:, 1] / samples[:, 0]) == pytest.approx(2.0, rel=0.03)


def test_rounds_alternate_their_order() -> None:
    machine = FakeMachine([0.01, 0.01])
    time_interleaved(machine.runs, machine.clock, 0.0, 0.001)
    # In each turn of one measured call and the unmeasured one before it, the runs come in pairs.
    tail = machine.order[-8:]
    assert tail in ([0, 0, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 1, 1])


def test_short_runs_are_repeated_until_a_sample_is_long_enough() -> None:
    machine = FakeMachine([1e-5])
    machine.order.clear()
    time_interleaved(machine.runs, machine.clock, 0.0, 0.002)
    assert len(machine.order) >= 10 * 200


# -- Warming up --------------------------------------------------------------------------------------------------------


class Warming(FakeMachine):
    """Its calls get faster by 5 % each, sixty calls long."""

    def __init__(self) -> None:
        super().__init__([0.01])
        self.runs = [self.warming]

    def warming(self) -> None:
        self.order.append(0)
        self.now += 0.01 * 0.95 ** min(len(self.order), 60)


def test_warming_up_waits_until_it_gets_no_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Warming()
    warm_up(machine.runs[0], machine.clock, 1e-4)
    assert len(machine.order) >= 60
    # A machine that is warm shows it in two windows, after a first call that is not timed.
    machine = FakeMachine([0.01])
    warm_up(machine.runs[0], machine.clock, 1e-4)
    assert len(machine.order) == 1 + 2 * timing.WARMUP_WINDOW
    # At the cap no more is asked.
    monkeypatch.setattr(timing, "WARMUP_CAP_SECONDS", 0.0)
    machine = Warming()
    warm_up(machine.runs[0], machine.clock, 1e-4)
    assert len(machine.order) == 2


def test_a_first_call_that_loads_or_compiles_does_not_tell_how_many_make_a_sample() -> None:
    machine = FakeMachine([0.001])
    run = machine.runs[0]

    def compiling() -> None:
        machine.now += 0.0 if machine.order else 60.0
        run()

    assert 10 <= warm_up(compiling, machine.clock, 0.01) <= 11


def test_warming_up_lasts_its_least_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "WARMUP_SECONDS", 0.05)
    machine = FakeMachine([0.01])
    begin = time.perf_counter()
    warm_up(machine.runs[0], machine.clock, 1e-4)
    assert time.perf_counter() - begin >= 0.05


@pytest.mark.parametrize("seconds", [1e-7, 1e-4, 1e-3, 0.5])
def test_warming_up_tells_how_many_calls_make_a_sample(seconds: float) -> None:
    machine = FakeMachine([seconds])
    calls = warm_up(machine.runs[0], machine.clock, 0.01)
    assert calls * seconds >= 0.01 * (1 - 1e-9)
    assert calls == 1 or calls * seconds < 0.03


# -- How long to go on -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "low", "high"), [(1, 0, 0), (2, 0, 1), (5, 0, 4), (6, 0, 5), (10, 1, 8), (30, 9, 20), (100, 40, 59)]
)
def test_the_interval_of_a_median_by_hand(count: int, low: int, high: int) -> None:
    """By the binomial, the second and ninth of ten samples have the median between them in 1002 of 1024 cases."""
    values = np.random.default_rng(0).permutation(count).astype(float)
    assert median_interval(values) == (low, high)
    values += 10
    assert interval_share(values) == pytest.approx((high - low) / (10 + (count - 1) / 2))


@pytest.mark.parametrize("count", [10, 30, 100])
@pytest.mark.parametrize("distribution", ["exponential", "lognormal", "two humps"])
def test_the_interval_covers_the_median(count: int, distribution: str) -> None:
    rng = np.random.default_rng(count)
    draws, median = {
        "exponential": (rng.exponential(1.0, (2000, count)), np.log(2)),
        "lognormal": (rng.lognormal(0.0, 2.0, (2000, count)), 1.0),
        # A machine with two speeds, the slower one in 40 % of the samples.
        "two humps": (rng.uniform(0, 1, (2000, count)) + 10 * (rng.uniform(0, 1, (2000, count)) < 0.4), 5 / 6),
    }[distribution]
    covered = 0
    for values in draws:
        low, high = median_interval(values)
        covered += low <= median <= high
    assert covered >= 0.93 * len(draws)


def sampled(machine: FakeMachine, precision: Precision, **changes: object) -> timing.Sampled:
    """All runs of a machine, by its own time; what is checked are the runs' own medians."""
    fields: dict[str, object] = dict(checked=lambda seconds: list(seconds.T), now=lambda: machine.now)
    return sample_until(machine.runs, machine.clock, 1e-3, precision, **(fields | changes))  # type: ignore[arg-type]


def test_a_steady_machine_is_sampled_no_longer_than_it_must_be() -> None:
    found = sampled(FakeMachine([0.01, 0.02]), Precision(0.02, 1000.0))
    assert found.seconds == pytest.approx(np.asarray([[0.01, 0.02]] * MIN_ROUNDS))
    assert found.interval_shares == pytest.approx((0.0, 0.0))
    assert not found.capped


def test_a_noisy_machine_is_sampled_until_the_median_is_known() -> None:
    found = sampled(FakeMachine([0.01], noise=(0.2,)), Precision(0.05, 1000.0))
    assert len(found.seconds) > 5 * MIN_ROUNDS
    assert not found.capped
    assert found.interval_shares == (interval_share(found.seconds[:, 0]),)
    assert found.interval_shares[0] <= 0.05
    assert np.median(found.seconds) == pytest.approx(0.01, rel=0.05)


def test_at_the_cap_sampling_ends_and_says_so() -> None:
    machine = FakeMachine([0.01], noise=(0.5,))
    found = sampled(machine, Precision(1e-6, 3.0))
    assert found.capped
    assert found.interval_shares[0] > 1e-6
    # Of each round half is the call that is not measured.
    assert 2 * found.seconds.sum() == pytest.approx(3.0, rel=0.2)


def test_however_early_the_cap_enough_rounds_are_made() -> None:
    noisy = sampled(FakeMachine([0.01], noise=(0.5,)), Precision(0.02, 1e-9))
    assert len(noisy.seconds) == MIN_ROUNDS
    assert noisy.capped
    # What is known by then was not ended by the cap.
    assert not sampled(FakeMachine([0.01]), Precision(0.02, 1e-9)).capped


def test_only_what_is_checked_must_be_known() -> None:
    """A machine that slows down for good never has one latency; the ratio of two it has."""
    drifting = dict(seconds=[0.002, 0.004], drift=1e-2)
    assert sampled(FakeMachine(**drifting), Precision(0.05, 20.0)).capped  # type: ignore[arg-type]
    found = sampled(
        FakeMachine(**drifting), Precision(0.05, 20.0), checked=lambda seconds: [seconds[:, 1] / seconds[:, 0]]
    )  # type: ignore[arg-type]
    assert not found.capped
    assert len(found.interval_shares) == 1
    # And one that is noisy keeps the others going.
    found = sampled(FakeMachine([0.01, 0.01], noise=(0.0, 0.2)), Precision(0.05, 1000.0))
    assert len(found.seconds) > MIN_ROUNDS
    assert found.interval_shares[0] < 1e-6 < found.interval_shares[1] <= 0.05


def test_somebody_may_look_between_rounds() -> None:
    looks: list[int] = []
    machine = FakeMachine([0.01], noise=(0.5,))
    found = sampled(machine, Precision(1e-6, 30.0), between=lambda: looks.append(len(machine.order)))
    rounds = [(order - looks[0]) // 2 for order in looks]
    assert rounds[:2] == [0, MIN_ROUNDS]
    assert rounds[-1] == len(found.seconds)
    # Seldom, as there are more rounds.
    assert 5 < len(looks) < len(found.seconds) / 10


def test_peak_memory_is_that_of_the_tensors_held_at_once() -> None:
    device = torch.device("cpu")

    def two_at_once() -> None:
        one = torch.empty(4 * MIB, dtype=torch.uint8)
        two = torch.empty(2 * MIB, dtype=torch.uint8)
        del one, two
        torch.empty(3 * MIB, dtype=torch.uint8)

    assert peak_memory_bytes(two_at_once, device) == 6 * MIB
    kept = []
    assert peak_memory_bytes(lambda: kept.append(torch.empty(MIB, dtype=torch.uint8)), device) == MIB


def test_device_info_names_the_device_and_the_versions() -> None:
    info = DeviceInfo.of(torch.device("cpu"))
    assert info.kind == "cpu"
    assert info.name
    assert info.torch == torch.__version__
    assert info == DeviceInfo.of(torch.device("cpu"))


@pytest.mark.gpu
def test_cuda_events_time_the_device_and_not_the_launch() -> None:
    device = torch.device("cuda")
    product = nn.Linear(8192, 8192, bias=False, device=device, dtype=torch.float16)
    x = torch.randn(8192, 8192, device=device, dtype=torch.float16)
    with torch.inference_mode():
        product(x)
        seconds = clock_for(device)(lambda: product(x), 10) / 10
    # 1.1 TFLOP take any GPU more than 0.2 ms; enqueueing it takes some microseconds.
    assert seconds > 2e-4


@pytest.mark.gpu
def test_cuda_peak_memory_is_the_allocators() -> None:
    device = torch.device("cuda")
    held = peak_memory_bytes(lambda: torch.empty(64 * MIB, dtype=torch.uint8, device=device), device)
    assert held == 64 * MIB
