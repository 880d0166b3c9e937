from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from nas.config import LatencyConfig
from nas.errors import CandidateFailed
from nas.latency import isolation
from nas.latency.isolation import PARTS_WEIGHT, IsolatedMeter, LocalMeter, meter_for
from nas.latency.parts import CALL, arch_parts, network_shape, shape_id
from nas.latency.values import Latency
from search_spaces import ArchSpec, StageSpec
from tests.conftest import make_tiny_space

SPACE = make_tiny_space()
QUICK = LatencyConfig(device="cpu", seconds=0.01, resolution=16)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def meter():
    made = IsolatedMeter(QUICK, SPACE.anchor(), None)
    yield made
    made.close()


def measured(meter: IsolatedMeter, arch: ArchSpec) -> Latency:
    (measurement,) = meter.measure_together([arch])
    return measurement.latency


def pid(meter: IsolatedMeter) -> int:
    assert meter.child.process is not None
    return meter.child.process.pid


def test_it_measures_and_replaces_its_process(meter: IsolatedMeter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "LIFETIME", 2)
    reference_ms = meter.reference_ms
    first = pid(meter)
    for _ in range(2):
        latency = measured(meter, SPACE.smallest())
        assert 0 < latency.p20_ms <= latency.median_ms <= latency.p80_ms
    assert meter.child.process is None
    assert not psutil.pid_exists(first)
    assert measured(meter, SPACE.smallest()).median_ms > 0
    assert pid(meter) != first
    # One study has one reference, whichever process measures.
    assert meter.reference_ms == reference_ms


def test_several_are_measured_together_and_all_of_their_figures_come_back(
    meter: IsolatedMeter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolation, "LIFETIME", 4)
    archs = [SPACE.smallest(), SPACE.anchor(), SPACE.smallest()]
    found = meter.measure_together(archs)
    assert len({(each.latency.repeats, each.anchor_median_ms) for each in found}) == 1
    assert found[0].weight_bytes == found[2].weight_bytes < found[1].weight_bytes
    assert all(each.latency.interval_share > 0 and each.ready_seconds > 0 for each in found)
    # Three of four networks that one process measures.
    assert meter.child.process is not None
    measured(meter, SPACE.smallest())
    assert meter.child.process is None


def test_blocks_are_measured_in_the_process_too(meter: IsolatedMeter) -> None:
    """What the table lacks of an architecture, and of the anchor as a whole; then nothing."""
    smallest, anchor = SPACE.smallest(), SPACE.anchor()
    call = {shape_id(CALL): 1e-4}
    parts = arch_parts(smallest, QUICK)
    latencies = meter.measure_blocks([smallest], {**call, parts[0].shape_id: 1.0}, [1.0, 2.0])
    whole = network_shape(str(anchor), QUICK)
    assert {each.shape for each in latencies} == {part.shape for part in parts[1:]} | {whole}
    assert all(0 < each.latency.p20_ms <= each.latency.median_ms <= each.latency.p80_ms for each in latencies)
    # The table's references stand, and a process keeps its yardsticks.
    known = {**call, **{part.shape_id: 1.0 for part in parts}, shape_id(whole): 1.0}
    assert meter.measure_blocks([smallest], known, [1.0, 2.0]) == []
    # All of its parts are held as long as it lives, each several times; what was known took nothing.
    assert meter.measured == PARTS_WEIGHT
    assert measured(meter, smallest).median_ms > 0


def test_engines_that_give_memory_back_are_measured_here() -> None:
    eager = LatencyConfig(device="cpu", engine="eager", seconds=0.01, resolution=16)
    meter = meter_for(eager, SPACE.smallest(), 2.0)
    assert isinstance(meter, LocalMeter)
    assert meter.reference_ms == 2.0
    small, anchor = meter.measure_together([SPACE.smallest(), SPACE.anchor()])
    assert small.weight_bytes < anchor.weight_bytes
    known = {shape_id(CALL): 0.01, **{part.shape_id: 1.0 for part in arch_parts(SPACE.anchor(), eager)}}
    (measured_whole,) = meter.measure_blocks([SPACE.anchor()], known, [1.0, 2.0])
    assert measured_whole.shape == network_shape(str(SPACE.smallest()), eager)
    assert meter.blocks is not None
    # Yardsticks hold memory of the device.
    meter.close()
    assert meter.blocks is None


def test_an_anchor_that_does_not_run_is_told() -> None:
    """By the child, which then is gone."""
    with pytest.raises(CandidateFailed, match="out of memory"):
        IsolatedMeter(replace(QUICK, batch_size=10**9), SPACE.smallest(), 1.0)


def test_a_process_killed_while_measuring_fails_that_candidate_only(meter: IsolatedMeter) -> None:
    os.kill(pid(meter), signal.SIGKILL)
    with pytest.raises(CandidateFailed, match="killed by SIGKILL"):
        measured(meter, SPACE.smallest())
    assert measured(meter, SPACE.smallest()).median_ms > 0
    os.kill(pid(meter), signal.SIGKILL)
    with pytest.raises(CandidateFailed, match="killed by SIGKILL"):
        meter.measure_blocks([SPACE.smallest()], {}, [1.0, 2.0])
    assert meter.child.process is None


def test_a_bug_in_the_process_is_a_bug(meter: IsolatedMeter) -> None:
    with pytest.raises(RuntimeError, match="ended with status 1"):
        meter.measure_together([None])  # type: ignore[list-item]


def test_the_process_ends_with_its_parent_however_that_ends() -> None:
    code = """
import sys, time
from nas.config import LatencyConfig
from nas.latency.isolation import IsolatedMeter
from tests.conftest import make_tiny_space
meter = IsolatedMeter(LatencyConfig(device="cpu", seconds=0.01, resolution=16), make_tiny_space().anchor(), 1.0)
print(meter.child.process.pid, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 30
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_running_out_of_memory_fails_the_candidate() -> None:
    """With the address space limited in the child, its allocator fails as it does on a full machine."""
    huge = LatencyConfig(seconds=0.01, resolution=16, batch_size=1, device="cpu")
    meter = IsolatedMeter(huge, SPACE.smallest(), None)
    try:
        process = psutil.Process(pid(meter))
        process.rlimit(psutil.RLIMIT_AS, (process.memory_info().vms + 2**20,) * 2)
        stage = StageSpec(width=1024, kernel_size=3, group_width=1, expansion=8, blocks=8, stride=1)
        with pytest.raises(CandidateFailed, match="out of memory"):
            measured(meter, ArchSpec(8, (stage,), "relu", 8192))
    finally:
        meter.close()
