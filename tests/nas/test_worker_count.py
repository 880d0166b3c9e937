"""How many trainings run at once, where the user leaves it open."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nas import search
from nas.config import DataConfig, LatencyConfig, ProxyConfig, SearchConfig
from nas.errors import CandidateFailed, OutOfMemory, UsageError
from nas.search import machine
from nas.search.machine import Machine, train_devices
from nas.training import pool
from nas.training.data import load
from nas.training.pool import DataFile, DataFiles, DataSource
from nas.training.worker_count import Probe, WorkerCount, on_cpu, on_cuda, probe
from nas.training.workers import Workers
from search_spaces import load_space
from studies import Store
from tests.conftest import make_tiny_space
from tests.nas.conftest import Inline
from tests.nas.test_proxy import easy_data

CPU = LatencyConfig(device="cpu", engine="eager")


@pytest.mark.parametrize(
    ("cores", "threads", "gib", "train_seconds", "count", "first"),
    [
        (64, 1, 100.0, 1000.0, 64, "there are cores"), (64, 4, 100.0, 1000.0, 16, "there are cores"),
        (64, 1, 6.1, 1000.0, 12, "there is memory"), (64, 1, 100.0, 4.1, 8, "timing finds work"),
        (64, 1, 0.2, 1000.0, 1, "there is memory"), (64, 1, 100.0, 0.1, 1, "timing finds work"),
    ],
)  # fmt: skip
def test_the_least_of_cores_memory_and_timing_bounds_it(
    cores: int, threads: int, gib: float, train_seconds: float, count: int, first: str
) -> None:
    chosen = on_cpu(cores // threads, int(gib * 2**30), lambda: Probe(train_seconds, 2**29), lambda: 0.5)
    assert chosen.count == count
    assert str(chosen).startswith(f"{count} training{'s' if count > 1 else ''} at once: {first} for no more (")


def test_few_cores_with_plenty_of_memory_need_no_probe() -> None:
    def never() -> Probe:
        raise AssertionError

    assert str(on_cpu(1, 0, never, lambda: 1.0)) == "1 training at once: there are cores for no more"
    assert on_cpu(2, 8 * 2**30, never, lambda: 1.0).count == 2
    # Little memory may be enough for one only.
    with pytest.raises(AssertionError):
        on_cpu(2, 8 * 2**30 - 1, never, lambda: 1.0)
    with pytest.raises(AssertionError):
        on_cpu(3, 2**40, never, lambda: 1.0)


def rates(per_worker: float, together: float, memory: int = 1000) -> Callable[[int], float]:
    """Workers that are so fast each, and no faster than that together; the memory holds no more than so many."""

    def rate(count: int) -> float:
        if count > memory:
            raise CandidateFailed("out of memory")
        return min(count * per_worker, together)

    return rate


@pytest.mark.parametrize(
    ("devices", "rate", "most", "count", "why"),
    [
        (1, rates(100, 1000), 64, 8, "8 are tried on a GPU, and there are GPUs"),
        (1, rates(100, 420), 64, 4, "a GPU is busy with 400 images a second, and there is reason"),
        (1, rates(100, 110), 64, 1, "a GPU is busy with 100 images a second, and there is reason"),
        (1, rates(100, 1000, memory=3), 64, 2, "there is memory on the GPU"),
        (1, rates(100, 1000), 3, 2, "there are cores"),
        (4, rates(100, 10_000), 64, 32, "8 are tried on a GPU, and there are GPUs"),
    ],
)
def test_on_cuda_workers_are_doubled_while_that_pays(
    devices: int, rate: Callable[[int], float], most: int, count: int, why: str
) -> None:
    chosen = on_cuda(devices, rate, most)
    assert chosen.count == count
    assert str(chosen) == f"{count} training{'s' if count > 1 else ''} at once: {why} for no more"


def test_a_first_training_that_fails_leaves_one_worker() -> None:
    def failing() -> Probe:
        raise CandidateFailed("out of memory")

    chosen = on_cpu(8, 2**40, failing, lambda: 1.0)
    assert str(chosen) == "1 training at once: a first training fails (out of memory), so there is reason for no more"
    with pytest.raises(CandidateFailed):
        on_cuda(1, rates(100, 100, memory=0), 8)


def test_a_probe_trains_in_a_worker(images: Path) -> None:
    """A whole training takes longer than the probe, in proportion to its steps."""
    with DataFiles() as files, Workers(1, ["cpu"]) as workers:
        path = files.write(load(DataConfig(source=str(images), resolution=16)))
        config = ProxyConfig(steps=2000, batch_size=4)
        found = probe(workers, make_tiny_space().anchor(), path, config, seed=0)
        shorter = probe(workers, make_tiny_space().anchor(), path, replace(config, steps=200), seed=0)
    assert found.seconds > 2 * shorter.seconds > 0
    # torch itself takes more than this.
    assert found.bytes > 2**25


def test_there_is_memory_for_the_largest_resolution() -> None:
    points = [SimpleNamespace(step=step, seconds=float(step)) for step in (1, 20)]
    result = SimpleNamespace(curve=points, seconds=21.0, train_memory_bytes=100)
    workers: Any = SimpleNamespace(run=lambda calls: [SimpleNamespace(result=(result, 5))])
    anchor = make_tiny_space(resolution=(16, 24, 32)).anchor()
    assert anchor.resolution == 24
    config = ProxyConfig(steps=100)
    assert probe(workers, anchor, DataFile(""), config, 0) == Probe(101.0, 5 + 3 * 100)
    assert probe(workers, anchor, DataFile(""), config, 0, (16, 24, 32)) == Probe(101.0, 5 + 534)


def test_a_search_trains_side_by_side_as_it_does_one_by_one(
    images: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same networks reach the same accuracies, in whatever worker they are trained."""
    monkeypatch.setattr(pool, "cores", lambda: 2)
    config = SearchConfig(
        budget=5, storage=sqlite_url, space=make_tiny_space(), sampler="random", latency=replace(CPU, seconds=0.02),
        data=DataConfig(source=str(images), resolution=16), proxy=ProxyConfig(steps=3, batch_size=4),
    )  # fmt: skip
    found = {}
    for workers in (1, 2):
        with monkeypatch.context() as patch:
            if workers == 1:
                # The first does without a process, which takes seconds to start.
                patch.setattr("nas.training.workers.ChildProcess", Inline)
            search.run(replace(config, workers=workers, study=str(workers)))
        store = Store.open(sqlite_url, create=False)
        assert store is not None
        study = store.find_study(str(workers))
        assert study is not None
        rows = store.candidates(study.study_id)
        found[workers] = {row.arch_id: row.accuracy for row in rows}
        assert {row.worker for row in rows} == set(range(workers))
        store.close()
    assert found[1] == found[2]


def test_data_files_leave_nothing_behind(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    files = DataFiles()
    path = files.write(load(DataConfig(source=str(images), resolution=16))).path
    if path.startswith("/proc"):
        assert [each for each in (tmp_path / "temporary").rglob("*") if each.is_file()] == []
    assert torch.load(path, mmap=True, weights_only=True)["train_images"].ndim == 4
    files.close()
    assert list((tmp_path / "temporary").glob("convfirst-data-*")) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(workers=5), r"--workers 5: more than 4 gain nothing on 4 cores"),
        (
            dict(workers=3, proxy=ProxyConfig(threads=2)),
            r"--workers 3: more than 2 of 2 threads gain nothing on 4 cores",
        ),
        (dict(train_devices=("cuda:7",)), r"--train-devices cuda:7: (no CUDA device here|there are only)"),
        (dict(train_devices=("cpu", "cpu")), r"--train-devices cpu,cpu: are of two kinds, or one stands twice"),
        (dict(train_devices=("quark",)), r"--train-devices quark: not a device \(cpu, cuda or cuda:N\)"),
    ],
)
def test_workers_and_devices_that_make_no_sense_are_refused(
    changes: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "cores", lambda: 4)
    config = replace(SearchConfig(latency=CPU, space=load_space("small")), **changes)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=f"^{message}"):
        train_devices(config, torch.device("cpu"))


def test_workers_that_cannot_be_started_are_told(
    images: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "get_ready", failing_to_start)
    config = SearchConfig(
        storage=sqlite_url, latency=CPU, data=DataConfig(source=str(images), resolution=16), workers=1
    )
    with pytest.raises(UsageError, match=r"^--workers 1: not all of them can be started \(out of memory\); use fewer"):
        search.run(config)


def failing_to_start(data: DataSource, device: str) -> None:
    raise OutOfMemory("out of memory")


def test_all_gpus_train_unless_some_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    config = SearchConfig(latency=CPU)
    gpu = torch.device("cuda", 1)
    assert train_devices(config, gpu) == [torch.device("cuda", index) for index in range(3)]
    assert train_devices(config, torch.device("cpu")) == [torch.device("cpu")]
    named = replace(config, train_devices=("cuda", "cuda:2"))
    assert train_devices(named, gpu) == [torch.device("cuda", 0), torch.device("cuda", 2)]
    with pytest.raises(UsageError, match=r"^--workers 129: more than 128 gain nothing on 2 GPUs"):
        train_devices(replace(named, workers=129), gpu)
    assert len(train_devices(replace(named, workers=128), gpu)) == 2


def test_they_are_counted_when_somebody_asks_and_again_for_another_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that takes up to half a minute, and a pilot adopts one schedule after another."""
    counted: list[int] = []

    def chosen_workers(self: Machine) -> WorkerCount:
        counted.append(self.config.proxy.steps)
        return WorkerCount(1, {"the test": 1})

    monkeypatch.setattr("nas.training.data.load", lambda config, note, largest: easy_data())
    monkeypatch.setattr(Machine, "_get_ready", lambda self: None)
    monkeypatch.setattr(Machine, "chosen_workers", chosen_workers)
    monkeypatch.setattr("nas.latency.station.Station.start", lambda self, anchor_ms: None)
    evaluator = Machine(SearchConfig(space=make_tiny_space(), data=DataConfig(resolution=16), latency=CPU))
    proxy = evaluator.config.proxy
    evaluator.start(1.0)
    evaluator.adopt(replace(proxy, steps=300))
    assert counted == []
    assert [evaluator.workers, evaluator.workers, counted] == [1, 1, [300]]
    evaluator.adopt(replace(proxy, steps=300, learning_rate=1e-4))
    assert [evaluator.workers, counted] == [1, [300]]
    evaluator.adopt(replace(proxy, steps=400))
    assert [evaluator.workers, counted] == [1, [300, 400]]
    evaluator.close()
