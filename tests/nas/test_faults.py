"""Fused kernels that fault, hang or end their process, in tuning and in timing: on a stub of CUDA's driver."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kernels import attempts
from kernels.lab.stub import Faults, shared_faults
from kernels.problem import Tiling
from nas.child_process import ChildProcess
from nas.config import LatencyConfig
from nas.errors import CandidateFailed
from nas.lab.stubbed import on_stub, rehearse
from nas.latency import isolation
from nas.latency.isolation import Apart
from search_spaces import ArchSpec
from tests.conftest import make_tiny_space
from tests.kernels.test_launch_path import missing

pytestmark = pytest.mark.fault

SMALLEST = make_tiny_space().smallest()
ON_STUB = LatencyConfig(device="cuda", engine="fused", dtype="float16", resolution=16)
FAULTS = ("illegal address", "hang", "abort")
ROOT = Path(__file__).parents[2]


@dataclass
class Bench:
    """The child processes of a test, whose launches can be made to fail."""

    faults: Faults
    tuned: Path

    def is_tuned(self) -> None:
        """Have the smallest network tuned by an earlier process."""
        shutil.copytree(self.tuned, attempts.folder().parent / "tilings")

    def rehearse(self, arch: ArchSpec = SMALLEST) -> None:
        """Tune and capture a network in a new child, as after a restart."""
        with Apart(ON_STUB) as apart:
            apart.call([arch], rehearse, arch, ON_STUB)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of Triton's that all tests share, beside what was tuned.

    With all kernels in it, a child is never silent for long.
    """
    folder = tmp_path_factory.mktemp("faults") / "triton"
    with pytest.MonkeyPatch.context() as patches, on_stub():
        prepare(patches, folder, folder.parent / "cache")
        with ChildProcess() as child:
            if why := child.call(missing):
                pytest.skip(f"{why}: no launch was made to fail")
        with Apart(ON_STUB) as apart:
            apart.call([SMALLEST], rehearse, SMALLEST, ON_STUB)
    return folder


def prepare(patches: pytest.MonkeyPatch, triton: Path, cache: Path) -> None:
    patches.setenv("TRITON_CACHE_DIR", str(triton))
    patches.setenv("CONVFIRST_CACHE", str(cache))
    patches.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def bench(compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    prepare(monkeypatch, compiled, tmp_path)
    monkeypatch.setattr(isolation, "DEADLINE_S", 10.0)
    with shared_faults() as faults, on_stub():
        yield Bench(faults, compiled.parent / "cache" / "tilings")


def records() -> dict[str, list[list[dict[str, object]]]]:
    """The tilings of each record that a dead process left, by the problem's key."""
    found: dict[str, list[list[dict[str, object]]]] = {}
    for path in attempts.folder().glob("*.json"):
        found.setdefault(path.name.partition(".")[0], []).append(json.loads(path.read_text())["tilings"])
    return found


def tuned(key: str) -> list[dict[str, object]]:
    """The tilings of a problem that was tuned, the fastest first."""
    content = json.loads((attempts.folder().parent / "tilings" / f"{key}.json").read_text())
    tilings: list[dict[str, object]] = content["tilings"]
    return tilings


@pytest.mark.parametrize("result", FAULTS)
def test_a_fault_in_tuning_costs_a_tiling(result: str, bench: Bench) -> None:
    bench.faults.fail("convfirst_kernel", result, times=1)
    bench.rehearse()
    assert bench.faults.failed == 1
    ((key, ((faulty,),)),) = records().items()
    assert tuned(key)
    assert faulty not in tuned(key)


@pytest.mark.parametrize("result", FAULTS)
def test_a_fault_in_timing_costs_the_tiling_that_is_found_to_fault_alone(result: str, bench: Bench) -> None:
    bench.is_tuned()
    # Once in the network, and once when its kernels are examined.
    bench.faults.fail("convfirst_kernel", result, times=2)
    bench.rehearse()
    assert bench.faults.failed == 2
    ((key, ((faulty,),)),) = records().items()
    # The choice that was tuned goes on with its second.
    assert tuned(key)[0] == faulty
    assert len(tuned(key)) > 1


def test_a_fault_that_does_not_come_again_costs_nothing(bench: Bench) -> None:
    bench.is_tuned()
    bench.faults.fail("convfirst_kernel", "abort", times=1)
    bench.rehearse()
    assert bench.faults.failed == 1
    assert not records()


def test_where_everything_faults_the_candidate_has_failed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "MOST_DEATHS", 2)
    bench.faults.fail(result="illegal address")
    with pytest.raises(CandidateFailed, match="illegal memory access"):
        bench.rehearse()
    assert attempts.count_left() == 2


SEARCH = """
import sys
from nas.config import SearchConfig
from nas.lab.soak import SoakingEvaluator
from nas.search.loop import Silent, run
from tests.conftest import make_tiny_space
from tests.kernels.test_launch_path import missing
from tests.nas.test_faults import ON_STUB

evaluator = SoakingEvaluator(ON_STUB, 1, 0.0)
try:
    run(SearchConfig(budget=2, storage=sys.argv[1], space=make_tiny_space(), confirm=0), evaluator, Silent())
finally:
    evaluator.close()
"""


def test_a_search_that_is_killed_while_a_launch_hangs_goes_on_without_that_tiling(
    bench: Bench, sqlite_url: str
) -> None:
    command = [sys.executable, "-c", SEARCH, sqlite_url]
    bench.faults.fail("convfirst_kernel", "hang", times=1)
    with subprocess.Popen(command, cwd=ROOT) as search:
        while not bench.faults.failed:
            assert search.poll() is None, "the search has ended"
            time.sleep(0.1)
        search.kill()
    while not attempts.count_left():
        time.sleep(0.1)
    subprocess.run(command, cwd=ROOT, check=True)
    assert bench.faults.failed == 1
    ((key, ((faulty,),)),) = records().items()
    assert faulty not in tuned(key)
    with contextlib.closing(sqlite3.connect(sqlite_url.removeprefix("sqlite:///"))) as database:
        assert database.execute("SELECT count(*) FROM convfirst_candidates WHERE state = 'complete'").fetchone() == (2,)


# -- Records -----------------------------------------------------------------------------------------------------------


ILLEGAL = "CUDA error: an illegal memory access was encountered"


def fault(records: attempts.Attempts, tilings: list[Tiling], message: str = ILLEGAL, alone: bool = True) -> None:
    with pytest.raises(RuntimeError, match=re.escape(message)), records.of(tilings, alone):
        raise RuntimeError(message)


def test_a_record_is_left_by_faults_and_dead_processes_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVFIRST_CACHE", str(tmp_path))
    one, two = (Tiling(16, 16, "mma", num_stages=stages) for stages in (1, 2))
    of_problem = attempts.Attempts("key", Tiling)
    with of_problem.of([one]):
        # It is locked: another process that tunes the same problem does not take it for a fault.
        assert of_problem.faulty() == set()
        assert len(list(attempts.folder().iterdir())) == 1
    with pytest.raises(KeyboardInterrupt), of_problem.of([one]):
        raise KeyboardInterrupt
    fault(of_problem, [one], "a bug")
    # A neighbour may have filled the memory.
    fault(of_problem, [one], "CUDA error: out of memory")
    assert list(attempts.folder().iterdir()) == []
    fault(of_problem, [two], "Triton Error [CUDA]: an illegal memory access was encountered")
    assert of_problem.faulty() == {two}
    assert not of_problem.suspect()
    assert attempts.Attempts("other", Tiling).faulty() == set()
    # What the cache holds beside them, and records of other versions, say nothing.
    (attempts.folder() / "key.1.7.json").write_text('{"alone": true, "tilings": [{"nosuch": 1}]}')
    (attempts.folder() / "key.1.8.json").write_text("{")
    assert of_problem.faulty() == {two}


def test_of_tilings_that_ran_together_none_is_to_blame_until_each_ran_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONVFIRST_CACHE", str(tmp_path))
    tilings = [Tiling(16, 16, "mma", num_stages=stages) for stages in (1, 2)]
    of_problem = attempts.Attempts("key", Tiling)
    fault(of_problem, tilings, alone=False)
    # Also where only one is left to run with torch's layers.
    fault(of_problem, tilings[:1], alone=False)
    assert of_problem.suspect()
    assert of_problem.faulty() == set()
    fault(of_problem, tilings[1:])
    of_problem.clear_suspicion()
    assert not of_problem.suspect()
    assert of_problem.faulty() == {tilings[1]}


def test_a_process_that_is_ended_on_purpose_is_forgiven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVFIRST_CACHE", str(tmp_path))
    one, two = (Tiling(16, 16, "mma", num_stages=stages) for stages in (1, 2))
    of_problem = attempts.Attempts("key", Tiling)
    monkeypatch.setenv(attempts.TOKEN, "first")
    fault(of_problem, [one])
    monkeypatch.setenv(attempts.TOKEN, "second")
    fault(of_problem, [two])
    attempts.forgive("second")
    assert of_problem.faulty() == {one}
    assert attempts.count_left() == 1


def test_where_nothing_can_be_written_there_is_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CONVFIRST_CACHE", str(tmp_path / "file"))
    with attempts.Attempts("key", Tiling).of([Tiling(16, 16, "mma")]):
        pass
    assert attempts.count_left() == 0
