from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from nas import isolation
from nas.config import LatencyConfig
from nas.errors import CandidateFailed
from nas.isolation import IsolatedMeter
from search_spaces import ArchSpec, StageSpec
from tests.conftest import make_tiny_space

SPACE = make_tiny_space()
QUICK = LatencyConfig(seconds=0.01, resolution=16)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def meter():
    made = IsolatedMeter(QUICK, SPACE.anchor(), None)
    yield made
    made.close()


def pid(meter: IsolatedMeter) -> int:
    assert meter.child is not None
    return meter.child.pid


def test_it_measures_and_replaces_its_process(meter: IsolatedMeter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "LIFETIME", 2)
    reference_ms = meter.reference_ms
    first = pid(meter)
    for _ in range(2):
        latency = meter.measure(SPACE.smallest())
        assert 0 < latency.p20_ms <= latency.median_ms <= latency.p80_ms
    assert meter.child is None
    assert not psutil.pid_exists(first)
    assert meter.measure(SPACE.smallest()).median_ms > 0
    assert pid(meter) != first
    # One study has one reference, whichever process measures.
    assert meter.reference_ms == reference_ms


def test_a_process_killed_while_measuring_fails_that_candidate_only(meter: IsolatedMeter) -> None:
    os.kill(pid(meter), signal.SIGKILL)
    with pytest.raises(CandidateFailed, match="killed by signal 9"):
        meter.measure(SPACE.smallest())
    assert meter.measure(SPACE.smallest()).median_ms > 0


def test_a_bug_in_the_process_is_a_bug(meter: IsolatedMeter) -> None:
    assert meter.child is not None
    with pytest.raises(RuntimeError, match="ended with status 1"):
        meter._ask({"nonsense": 1})


def test_the_process_ends_with_its_parent_however_that_ends() -> None:
    code = """
import sys, time
from nas.config import LatencyConfig
from nas.isolation import IsolatedMeter
from tests.conftest import make_tiny_space
meter = IsolatedMeter(LatencyConfig(seconds=0.01, resolution=16), make_tiny_space().anchor(), 1.0)
print(meter.child.pid, flush=True)
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
            meter.measure(ArchSpec(8, (stage,), "relu", 8192))
    finally:
        meter.close()
