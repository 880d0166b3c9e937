from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from triton.runtime.errors import OutOfResources

from kernels.device_info import DeviceInfo
from kernels.device_state import DeviceState
from kernels.timing import Precision, Sampled
from nas.config import DEFAULT_ENGINE, LatencyConfig
from nas.errors import CandidateFailed
from nas.latency import meter as latency_module
from nas.latency.engines import ENGINES, deploy, runs_on
from nas.latency.meter import MAX_RETRIES, REST_SECONDS, LatencyMeter, corrected
from nas.latency.values import Measurement, memory_mb
from search_spaces import load_space
from tests.conftest import make_tiny_space

SPACE = load_space("small")
QUICK = LatencyConfig(device="cpu", seconds=0.05)


def measure(meter: LatencyMeter, network: nn.Module) -> Measurement:
    (measured,) = meter.measure_together([network])
    return measured


def test_drift_is_taken_out_round_by_round() -> None:
    """The machine runs at half speed in the second round; the anchor shows it."""
    own, anchor = np.array([2.0, 4.0, 2.0]), np.array([1.0, 2.0, 1.0])
    assert corrected(own, anchor, reference_ms=1.5).tolist() == [3.0, 3.0, 3.0]


@pytest.mark.parametrize("engine", [name for name, engine in ENGINES.items() if "cpu" in engine.devices])
def test_every_engine_runs_what_was_built(engine: str) -> None:
    network = SPACE.smallest().build(10).eval()
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        module = deploy(network, LatencyConfig(device="cpu", engine=engine, batch_size=2), x)
        torch.testing.assert_close(module(x), network(x), rtol=1e-4, atol=1e-4)


def test_a_measurement_is_whole_and_consistent() -> None:
    meter = LatencyMeter(QUICK, SPACE.anchor().build(10))
    assert meter.reference_ms > 0
    network = SPACE.smallest().build(10)
    measured = measure(meter, network)
    assert 0 < measured.latency.p20_ms <= measured.median_ms <= measured.latency.p80_ms
    assert measured.latency.repeats >= 10
    assert measured.raw_median_ms > 0
    assert measured.anchor_median_ms > 0
    # Folded, each norm is a bias: four bytes for every weight, and for every channel of a norm one bias.
    convolutions = sum(m.weight.numel() for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    biases = sum(m.num_features for m in network.modules() if isinstance(m, nn.BatchNorm2d))
    biases += sum(
        m.bias.numel() for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear) and m.bias is not None
    )
    assert measured.weight_bytes == 4 * (convolutions + biases)
    assert memory_mb(measured) == (measured.weight_bytes + measured.workspace_bytes) / 1e6


def test_workspace_holds_at_least_the_largest_input_and_output_of_a_layer() -> None:
    arch = SPACE.anchor()
    meter = LatencyMeter(QUICK, SPACE.smallest().build(10))
    measured = measure(meter, arch.build(10))
    # In the first block 24 channels of 16x16 pixels become 72, the 24 being kept for the residual.
    assert measured.workspace_bytes >= 4 * 16 * 16 * (24 + 24 + 72)
    double = LatencyMeter(LatencyConfig(device="cpu", seconds=0.05, batch_size=2), SPACE.smallest().build(10))
    assert measure(double, arch.build(10)).workspace_bytes > 1.2 * measured.workspace_bytes


def test_a_given_reference_scales_the_result() -> None:
    network = SPACE.anchor().build(10)
    measured = measure(LatencyMeter(QUICK, network, reference_ms=100.0), network)
    # The anchor against itself: noise aside, its latency is the reference, whatever this machine's speed.
    assert measured.median_ms == pytest.approx(100.0, rel=0.5)
    assert measured.raw_median_ms < 50


def test_what_scales_all_others_is_to_be_known_better_than_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, float]] = []
    real = latency_module.sample_until

    def spy(
        runs: object, clock: object, least: object, precision: Precision, *rest: object, **fields: object
    ) -> Sampled:
        asked.append((precision.share, precision.cap_seconds))
        return real(runs, clock, least, precision, *rest, **fields)  # type: ignore[arg-type]

    monkeypatch.setattr(latency_module, "sample_until", spy)
    config = replace(QUICK, precision=0.06)
    meter = LatencyMeter(config, SPACE.smallest().build(10))
    measure(meter, SPACE.smallest().build(10))
    assert asked == [(pytest.approx(0.02), pytest.approx(0.15)), (0.06, 0.05)]


def test_measuring_leaves_the_thread_count_as_it_was() -> None:
    before = torch.get_num_threads()
    LatencyMeter(QUICK, SPACE.smallest().build(10))
    assert torch.get_num_threads() == before


# -- Several together, and how far they are known --------------------------------------------------------------------


def test_networks_measured_together_share_their_minutes_and_keep_their_order() -> None:
    meter = LatencyMeter(QUICK, SPACE.anchor().build(10), reference_ms=1.0)
    small, anchor = meter.measure_together([SPACE.smallest().build(10), SPACE.anchor().build(10)])
    assert small.anchor_median_ms == anchor.anchor_median_ms
    assert small.latency.repeats == anchor.latency.repeats >= 10
    assert small.weight_bytes < anchor.weight_bytes
    # Twice the blocks and 26 times the operations: no noise turns that round.
    assert small.median_ms < anchor.median_ms
    for measured in (small, anchor):
        assert 0 < measured.latency.p20_ms <= measured.median_ms <= measured.latency.p80_ms
        assert measured.latency.interval_share > 0
        assert measured.ready_seconds > 0


def test_what_the_cap_ended_says_so() -> None:
    hopeless = replace(QUICK, precision=1e-6)
    meter = LatencyMeter(hopeless, SPACE.smallest().build(10), reference_ms=1.0)
    for measured in meter.measure_together([SPACE.smallest().build(10)] * 2):
        assert measured.latency.capped
        assert measured.latency.interval_share > 1e-6


def test_of_several_only_those_that_are_not_known_well_were_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: the anchor, the last, runs at half speed in the third round, and so do the others."""
    meter = LatencyMeter(replace(QUICK, precision=0.05), SPACE.smallest().build(10), reference_ms=3.0)
    seconds = np.array([[0.002, 0.004, 0.001], [0.002, 0.006, 0.001], [0.004, 0.010, 0.002]])
    factors: list[float] = []

    def sample(runs: object, checked: object, factor: float) -> tuple[Sampled, None]:
        factors.append(factor)
        (one, other) = checked(seconds)  # type: ignore[operator]
        assert one.tolist() == [2.0, 2.0, 2.0]
        assert other.tolist() == [4.0, 6.0, 5.0]
        return Sampled(seconds, (0.01, 0.5), capped=True), None

    monkeypatch.setattr(meter, "sample", sample)
    one, other = meter.measure_together([SPACE.smallest().build(10)] * 2)
    # Two networks have twice the time of one.
    assert factors == [2]
    assert (one.latency.capped, other.latency.capped) == (False, True)
    assert (one.latency.interval_share, other.latency.interval_share) == (0.01, 0.5)
    assert one.median_ms == pytest.approx(6.0)
    assert other.median_ms == pytest.approx(15.0)
    assert (one.raw_median_ms, other.raw_median_ms, one.anchor_median_ms) == pytest.approx((2.0, 6.0, 1.0))
    assert one.latency.throttled is None


# -- Throttling ------------------------------------------------------------------------------------------------------


class Heated:
    """A device that throttles until it has been given some rests, and remembers what it was asked for.

    Args:
        rests_needed: before it recovers.
        at: the reading of each measurement at which it says that it throttles; it says so at no other.
    """

    def __init__(self, rests_needed: int, at: int = 0) -> None:
        self.rests_needed, self.at = rests_needed, at
        self.rests: list[float] = []
        self.readings = 0

    def state(self, device: torch.device) -> DeviceState:
        throttled = len(self.rests) < self.rests_needed and self.readings == self.at
        self.readings += 1
        reasons = ("hardware thermal slowdown",) if throttled else ()
        return DeviceState(1980.0 - 100 * throttled, 40.0 + self.readings, reasons)

    def rest(self, seconds: float) -> None:
        self.rests.append(seconds)
        self.readings = 0


@pytest.fixture
def times_sampled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rounds each sampling made."""
    found: list[int] = []
    real = latency_module.sample_until

    def counted(*args: object, **fields: object) -> Sampled:
        sampled = real(*args, **fields)  # type: ignore[arg-type]
        found.append(len(sampled.seconds))
        return sampled

    monkeypatch.setattr(latency_module, "sample_until", counted)
    return found


TINY = make_tiny_space().smallest()
TINY_CONFIG = LatencyConfig(device="cpu", engine="eager", resolution=16, seconds=0.02)


def heated_meter(device: Heated) -> LatencyMeter:
    return LatencyMeter(TINY_CONFIG, TINY.build(10), reference_ms=1.0, state=device.state, rest=device.rest)


@pytest.mark.parametrize("at", [0, 1], ids=["at the first reading", "at a later one"])
def test_a_throttled_measurement_is_made_again_after_a_rest(times_sampled: list[int], at: int) -> None:
    device = Heated(rests_needed=2, at=at)
    measured = measure(heated_meter(device), TINY.build(10))
    assert device.rests == [REST_SECONDS, 2 * REST_SECONDS]
    assert len(times_sampled) == 3
    # What counts is the last of them, which did not throttle.
    assert measured.latency.throttled is False
    assert measured.latency.repeats == times_sampled[-1]
    assert (measured.sm_clock_mhz, measured.temperature_c) == (1980.0, 40.0 + device.readings)


def test_what_throttles_after_every_rest_is_kept_and_says_so(times_sampled: list[int]) -> None:
    device = Heated(rests_needed=100)
    measured = measure(heated_meter(device), TINY.build(10))
    assert len(device.rests) == MAX_RETRIES
    assert len(times_sampled) == MAX_RETRIES + 1
    assert measured.latency.throttled is True
    assert measured.median_ms > 0


def test_where_rests_do_not_help_they_are_taken_once() -> None:
    """Clocks that somebody holds down for good must not cost every measurement its rests."""
    device = Heated(rests_needed=100)
    meter = heated_meter(device)
    for _ in range(3):
        # Held down all the time, not only at the first reading.
        device.readings = 0
        assert measure(meter, TINY.build(10)).latency.throttled is True
    assert len(device.rests) == MAX_RETRIES
    # Once it has been seen to run freely they are worth it again.
    device.rests_needed = 0
    assert measure(meter, TINY.build(10)).latency.throttled is False
    device.readings, device.rests_needed = 0, 100
    measure(meter, TINY.build(10))
    assert len(device.rests) == 2 * MAX_RETRIES


def test_what_does_not_throttle_is_measured_once(times_sampled: list[int]) -> None:
    device = Heated(rests_needed=0)
    measured = measure(heated_meter(device), TINY.build(10))
    assert device.rests == []
    assert len(times_sampled) == 1
    # Read before the first round, and after the last.
    assert device.readings >= 2
    assert measured.latency.throttled is False


def test_the_reference_is_not_taken_from_a_throttled_device(times_sampled: list[int]) -> None:
    device = Heated(rests_needed=1)
    LatencyMeter(TINY_CONFIG, TINY.build(10), state=device.state, rest=device.rest)
    assert len(device.rests) == 1
    assert len(times_sampled) == 2


def test_a_cpu_has_no_sensors() -> None:
    measured = measure(LatencyMeter(TINY_CONFIG, TINY.build(10), reference_ms=1.0), TINY.build(10))
    assert (measured.latency.throttled, measured.sm_clock_mhz, measured.temperature_c) == (None, None, None)


# -- Engines ---------------------------------------------------------------------------------------------------------


def test_a_network_that_a_compiler_refuses_is_a_failed_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_model: nn.Module, _example: torch.Tensor, _config: LatencyConfig) -> nn.Module:
        raise RuntimeError("out of resource: shared memory, Required: 300000")

    network = SPACE.smallest().build(10).eval()
    x = torch.randn(1, 3, 32, 32)
    monkeypatch.setitem(ENGINES, "inductor", replace(ENGINES["inductor"], prepare=refuse))
    with pytest.raises(CandidateFailed, match=r"engine inductor does not compile it \(RuntimeError: out of resource"):
        deploy(network, LatencyConfig(device="cpu", engine="compile"), x)
    # Triton says by its errors what it refuses; any other is a bug.
    monkeypatch.setitem(ENGINES, "fused", replace(ENGINES["fused"], prepare=refuse))
    with pytest.raises(RuntimeError, match="shared memory"):
        deploy(network, LatencyConfig(device="cpu", engine="fused"), x)

    def out_of_shared_memory(_model: nn.Module, _example: torch.Tensor, _config: LatencyConfig) -> nn.Module:
        raise OutOfResources(300000, 232448, "shared memory")

    monkeypatch.setitem(ENGINES, "fused", replace(ENGINES["fused"], prepare=out_of_shared_memory))
    with pytest.raises(CandidateFailed, match="engine fused does not compile it"):
        deploy(network, LatencyConfig(device="cpu", engine="fused"), x)
    # Engines that compile nothing have no such excuse.
    monkeypatch.setitem(ENGINES, "eager", replace(ENGINES["eager"], prepare=refuse))
    with pytest.raises(RuntimeError, match="shared memory"):
        deploy(network, LatencyConfig(device="cpu", engine="eager"), x)


def test_every_device_has_a_default_engine_that_runs_there() -> None:
    for device, engine in DEFAULT_ENGINE.items():
        assert runs_on(ENGINES[engine], torch.device(device))


@pytest.mark.gpu
@pytest.mark.parametrize("engine", [name for name, engine in ENGINES.items() if "cuda" in engine.devices])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_cuda_graphs_are_timed(engine: str, dtype: str) -> None:
    config = LatencyConfig(device="cuda", engine=engine, dtype=dtype, batch_size=8, seconds=0.1)
    meter = LatencyMeter(config, SPACE.anchor().build(10))
    measured = measure(meter, SPACE.anchor().build(10))
    assert measured.median_ms == pytest.approx(meter.reference_ms, rel=0.2)
    assert measured.workspace_bytes > 0
    assert DeviceInfo.of(torch.device("cuda")).kind == "cuda"


@pytest.mark.gpu
def test_the_anchors_graph_still_computes_after_other_networks_were_measured() -> None:
    """A graph replays addresses: were the anchor's weights freed, candidates would be timed against garbage."""
    config = LatencyConfig(device="cuda", seconds=0.05)
    anchor = SPACE.anchor().build(10)
    meter = LatencyMeter(config, anchor)
    for arch in (SPACE.smallest(), SPACE.anchor(), SPACE.smallest()):
        measure(meter, arch.build(10))
    _module, x, output = meter.anchor_forwards[0]()  # type: ignore[misc]
    torch.cuda.synchronize()
    expected = deploy(anchor, config, x)(x)
    torch.testing.assert_close(output, expected, rtol=1e-2, atol=1e-2)
