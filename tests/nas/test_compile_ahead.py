"""Kernels that are compiled ahead of need: in which order, with invented processes, and what for, with real ones."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kernels.cost_model import H200
from kernels.tune import Target
from nas.config import DataConfig, LatencyConfig, SearchConfig
from nas.errors import WorkerDied
from nas.lab.stubbed import on_stub, rehearse
from nas.latency import compile_ahead, station
from nas.latency.compile_ahead import Compilers, compiler_count
from nas.latency.isolation import Apart
from nas.search import machine
from nas.search.machine import Machine
from nas.search.sampling import first_archs
from tests.conftest import make_tiny_space
from tests.nas.test_faults import ON_STUB, missing, prepare
from tests.nas.test_proxy import easy_data

TARGET = Target("a stub", H200, 90, searches=True)


class Process:
    """A process that compiles nothing; an architecture needs a kernel of its own, and one that all have in common."""

    done: list[str]
    gate: threading.Event
    broken: bool

    def __init__(self, environment: object, deadline_s: float) -> None:
        pass

    def call(self, function: object, first: Any, *rest: Any) -> Any:
        if function is compile_ahead.plan:
            tasks = [SimpleNamespace(kernel=SimpleNamespace(name="k"), problem=name) for name in (first.arch_id, "all")]
            return [(task, "tiling") for task in tasks]
        self.gate.wait()
        self.done.append(first.problem)
        if self.broken:
            raise WorkerDied("it was killed")
        return 0.5

    def close(self) -> None:
        pass


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Process]]:
    made = type("Made", (Process,), {"done": [], "gate": threading.Event(), "broken": False})
    made.gate.set()
    monkeypatch.setattr(compile_ahead, "ChildProcess", made)
    yield made
    made.gate.set()


def arch(name: str) -> Any:
    return SimpleNamespace(arch_id=name)


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_what_is_ready_was_compiled_once(process: type[Process]) -> None:
    compilers = Compilers(ON_STUB, TARGET, 2)
    compilers.ready([arch("a"), arch("b")])
    assert sorted(process.done) == ["a", "all", "b"]
    compilers.ready([arch("a")])
    assert (len(process.done), compilers.kernels, compilers.cpu_seconds) == (3, 3, 1.5)
    compilers.close()
    assert not any(thread.is_alive() for thread in compilers.threads)


def test_what_is_needed_now_comes_before_what_is_foreseen(process: type[Process]) -> None:
    process.gate.clear()
    compilers = Compilers(ON_STUB, TARGET, 1)
    compilers.foresee([arch(f"f{number}") for number in range(5)])
    # The first is under way.
    wait_until(lambda: compilers.begun)
    waiting = threading.Thread(target=compilers.ready, args=([arch("now")],))
    waiting.start()
    wait_until(lambda: compilers.urgent)
    process.gate.set()
    waiting.join()
    assert process.done.index("now") <= 2
    wait_until(lambda: len(process.done) == 7)
    compilers.close()


def test_what_was_foreseen_and_not_begun_is_given_up(process: type[Process]) -> None:
    process.gate.clear()
    compilers = Compilers(ON_STUB, TARGET, 1)
    compilers.foresee([arch("old"), arch("older")])
    wait_until(lambda: compilers.begun)
    compilers.foresee([arch("new")])
    process.gate.set()
    wait_until(lambda: "new" in process.done)
    assert "older" not in process.done
    # It is compiled all the same when it is needed.
    compilers.ready([arch("older")])
    assert "older" in process.done
    compilers.close()


def test_a_process_that_dies_costs_its_kernel_and_nobody_waits_for_it(process: type[Process]) -> None:
    process.broken = True
    compilers = Compilers(ON_STUB, TARGET, 1)
    compilers.ready([arch("a")])
    assert sorted(process.done) == ["a", "all"]
    compilers.close()


def test_stations_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_ahead, "cores", lambda: 17)
    monkeypatch.setattr(compile_ahead, "free_memory_bytes", lambda: 2**40)
    assert [compiler_count(stations) for stations in (1, 4, 32)] == [16, 4, 1]
    monkeypatch.setattr(compile_ahead, "free_memory_bytes", lambda: 3 * 2**30)
    assert compiler_count() == 3


def test_a_station_compiles_before_it_measures_anything(
    process: type[Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(station, "runs_fused_kernels", lambda config: True)
    monkeypatch.setattr(Target, "of", lambda device: TARGET)
    own = station.Station(LatencyConfig(device="cpu", engine="eager"), make_tiny_space().anchor())
    own.foresee([arch("first")])
    wait_until(lambda: sorted(process.done) == ["all", "first"])
    own.close()


def test_a_search_has_its_first_candidates_compiled_while_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[object] = []

    def load(config: object, note: object, largest: object) -> Any:
        events.append("images")
        return easy_data()

    monkeypatch.setattr("nas.training.data.load", load)
    monkeypatch.setattr(Machine, "_get_ready", lambda self: events.append("workers"))
    monkeypatch.setattr(station.Station, "foresee", lambda self, archs: events.append(list(archs)))
    config = SearchConfig(
        space=make_tiny_space(), data=DataConfig(resolution=16), latency=LatencyConfig(device="cpu", engine="eager")
    )
    Machine(config).close()
    assert events == ["images", "workers"], "where nothing is compiled, nothing is foreseen"
    events.clear()
    monkeypatch.setattr(machine, "runs_fused_kernels", lambda config: True)
    Machine(config).close()
    assert events == [[config.space.anchor(), *first_archs(config)], "images", "workers"]


@pytest.mark.launch_path
def test_who_measures_loads_what_was_compiled_and_compiles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compilers have tensors without content, and a driver that launches nothing."""
    from nas.child_process import ChildProcess

    prepare(monkeypatch, tmp_path / "triton", tmp_path / "cache")
    with ChildProcess() as child:
        if why := child.call(missing):
            pytest.skip(f"{why}: nothing was loaded through Triton's launcher")
    smallest = make_tiny_space().smallest()
    compilers = Compilers(ON_STUB, TARGET, 1)
    compilers.ready([smallest])
    compilers.close()
    compiled = set((tmp_path / "triton").rglob("*.cubin"))
    assert compiled
    with on_stub(), Apart(ON_STUB) as apart:
        apart.call([smallest], rehearse, smallest, ON_STUB)
    assert set((tmp_path / "triton").rglob("*.cubin")) == compiled
