"""Launches that bind a latency are told of, with a batch at which they do not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernels.device_info import DeviceInfo
from nas.config import LatencyConfig, SearchConfig
from nas.export import bench as benches
from nas.lab.invented import FakeEvaluator
from nas.latency.analysis import analyse
from nas.latency.analysis_table import analysis_lines
from nas.latency.block_table import BlockTable
from nas.latency.device_profile import DeviceProfile, store_profile
from nas.latency.launches import arch_launches_line, launches_line, work_seconds
from nas.latency.parts import CALL, arch_parts
from nas.latency.roofline import Layer, Machine, chain, ideal_seconds
from nas.latency.subjects import Subject
from nas.latency.values import Latency, ShapeLatency
from nas.search import loop as search
from search_spaces import load_space
from studies import Store

ANCHOR = load_space("small").anchor()
EAGER = LatencyConfig(device="cpu", engine="eager")
LATENCY = Latency(0.1, 0.09, 0.11, 10, 0.01)
# 1 MAC and 1 byte a nanosecond.
MACHINE = Machine(1e9, 1e9)
# Of a batch of one, 1 us as one kernel, and 1.6 us as two, each of which is bound by its 1,000 MACs or its bytes.
BLOCK = chain("block", "convfirst", [Layer("one", 1000, 100, 400, 200), Layer("two", 0, 200, 100, 300)])


@contextlib.contextmanager
def opened(url: str) -> Iterator[Store]:
    store = Store.open(url, create=True)
    assert store is not None
    yield store
    store.close()


@pytest.mark.parametrize("fused", [True, False])
def test_work_grows_with_the_batch_and_weights_do_not(fused: bool) -> None:
    """As by the roofline at that batch."""
    machine = Machine(4e14, 4e12)
    for batch in (1, 8, 64):
        parts = arch_parts(ANCHOR, replace(EAGER, batch_size=batch))
        exact = sum(ideal_seconds(part.block, machine, fused) for part in parts)
        one = [(part.block, fused) for part in arch_parts(ANCHOR, EAGER)]
        assert work_seconds(one, machine, batch) == pytest.approx(exact)


def test_the_line_by_hand() -> None:
    # As one kernel: max(1000 b, 500 + 400 b) ns, against a launch of 5 us.
    line = launches_line("its", [(BLOCK, True)], MACHINE, 5e-6, 1, 0.02)
    assert line == (
        "launches bind its latency at batch 1: at least 1 kernels take 5.0 of 20.0 us to launch, and their "
        "operations and bytes 1 us at the device's limits; --latency-batch 8 shows more of them"
    )
    # As two: max(1000 b, 400 + 300 b) + (100 + 500 b) ns, against two launches.
    assert "at least 2 kernels take 10.0 of" in str(launches_line("its", [(BLOCK, False)], MACHINE, 5e-6, 1, 0.02))
    assert "--latency-batch 8 shows" in str(launches_line("its", [(BLOCK, False)], MACHINE, 5e-6, 1, 0.02))
    assert "so they do up to batch 4096" in str(launches_line("its", [(BLOCK, True)], MACHINE, 1.0, 1, 2e3))


@pytest.mark.parametrize(
    ("launch_seconds", "latency_ms"),
    [(None, 0.02), (0.9e-6, 0.02), (5e-6, 0.2)],
    ids=["on a CPU", "work takes longer", "something else takes longer"],
)
def test_where_they_do_not_bind_nothing_is_said(launch_seconds: float | None, latency_ms: float) -> None:
    assert launches_line("its", [(BLOCK, True)], MACHINE, launch_seconds, 1, latency_ms) is None


def test_on_an_h200_the_smallest_space_asks_for_a_batch() -> None:
    """By its numbers in the cost model: batch 1 at 32 pixels times launches, and batch 512 does not."""
    h200 = Machine(395e12, 4.3e12)
    config = LatencyConfig(device="cuda")
    line = arch_launches_line("the anchor network's", ANCHOR, config, h200, 1.5e-6, 0.0458)
    assert line is not None
    assert "at least 8 kernels take 12.0 of 45.8 us" in line
    assert "--latency-batch 512 shows more" in line
    assert arch_launches_line("its", ANCHOR, replace(config, batch_size=512), h200, 1.5e-6, 0.2) is None


def test_a_search_says_it_and_one_on_a_cpu_does_not(sqlite_url: str) -> None:
    class Launching(FakeEvaluator):
        seconds: float | None = 1e-5

        def profile(self) -> DeviceProfile:
            return replace(super().profile(), macs_per_s=4e14, copy_bytes_per_s=4e12, graph_launch_seconds=self.seconds)

    noted: list[str] = []
    progress = search.Silent()
    progress.note = noted.append  # type: ignore[method-assign]
    config = SearchConfig(budget=1, storage=sqlite_url, confirm=0, latency=LatencyConfig(device="cpu"))
    search.run(config, Launching(), progress)
    (line,) = (line for line in noted if "launches" in line)
    assert line.startswith("launches bind the anchor network's latency at batch 1: ")
    quiet: list[str] = []
    progress.note = quiet.append  # type: ignore[method-assign]
    evaluator = Launching()
    evaluator.seconds = None
    search.run(replace(config, storage=f"{sqlite_url}2"), evaluator, progress)
    assert quiet
    assert not any("launches" in line for line in quiet)


def test_analyze_says_it(sqlite_url: str) -> None:
    """All is known here, so that nothing is measured."""
    with opened(sqlite_url) as store:
        info = DeviceInfo.of(torch.device("cpu"))
        profile = DeviceProfile(4e12, 4e14, 1e-5, 5e-6)
        store_profile(store, info, "float32", 1, profile)
        subject = Subject("it", str(ANCHOR), ANCHOR, EAGER)
        shapes = [CALL, subject.shape, *(part.shape for part in arch_parts(ANCHOR, EAGER))]
        BlockTable(store, info, EAGER).add([ShapeLatency(shape, LATENCY) for shape in dict.fromkeys(shapes)])
        lines = analysis_lines(analyse(store, subject))
    (line,) = (line for line in lines if "launches" in line)
    assert line.startswith("launches bind the network's latency at batch 1: at least 22 kernels")


def test_bench_says_it_of_each_networks_fastest_engine() -> None:
    networks: list[Any] = [
        (Path(name), SimpleNamespace(name=name, arch=ANCHOR, resolution=32, num_classes=10)) for name in ("a", "b")
    ]
    rows = [
        benches.Row("a", "eager", "float16", replace(LATENCY, median_ms=0.2)),
        benches.Row("a", "fused", "float16", LATENCY),
        benches.Row("a", "AOTInductor", "float16", replace(LATENCY, median_ms=0.01)),
        benches.Row("b", "fused", "float16", None, "does not run"),
    ]
    limits = {"product_macs": 395e12, "copy_bytes": 4.3e12, "launch_seconds": 4e-6, "graph_launch_seconds": 1.5e-6}
    found = benches._with_launches(rows, networks, LatencyConfig(device="cuda"), None, limits)
    assert [row.launches is not None for row in found] == [False, True, False, False]
    (line,) = (line for line in benches.remarks(found) if "launches" in line)
    assert line.startswith("a, fused: launches bind its latency at batch 1: at least 8 kernels")
