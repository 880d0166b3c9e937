from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from kernels.timing import DeviceInfo, clock_for, peak_memory_bytes, time_interleaved

MIB = 2**20


class FakeMachine:
    """A clock for runs whose speed is known, on a machine that slows down from call to call."""

    def __init__(self, seconds: list[float], drift: float = 0.0) -> None:
        self.drift = drift
        self.now = 0.0
        self.order: list[int] = []
        self.runs = [self._run(index, cost) for index, cost in enumerate(seconds)]

    def _run(self, index: int, cost: float) -> Callable[[], None]:
        def run() -> None:
            self.order.append(index)
            self.now += cost * (1 + self.drift * len(self.order))

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
