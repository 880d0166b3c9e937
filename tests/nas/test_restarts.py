"""A search on a PostgreSQL server that is restarted meanwhile."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
from optuna.trial import TrialState

from nas import search
from nas.config import SearchConfig
from nas.lab.invented import FakeEvaluator
from nas.search.loop import Silent
from nas.training.proxy import ProxyResult
from search_spaces import ArchSpec
from studies import TRAINED, StorageError, Store
from tests.conftest import PostgresServer, candidates_of, new_postgres

pytestmark = pytest.mark.postgres


@pytest.fixture
def server(tmp_path: Path) -> PostgresServer:
    (tmp_path / "server").mkdir()
    made = new_postgres(tmp_path / "server")
    made.start()
    with made.connect("postgres") as connection:
        connection.execute("CREATE DATABASE studies")
    return made


class Restarting(FakeEvaluator):
    """Stops the server while a candidate is trained; it comes back after some seconds, or never.

    Args:
        at: number of the candidate, from 1; 0 for none.
    """

    def __init__(self, server: PostgresServer, seconds: float | None, at: int = 5) -> None:
        super().__init__()
        self.server, self.seconds, self.at, self.count = server, seconds, at, 0
        self.thread: threading.Thread | None = None

    def train_one(self, arch: ArchSpec) -> ProxyResult:
        self.count += 1
        if self.count == self.at:
            self.server.stop()
            if self.seconds is not None:
                self.thread = threading.Thread(target=self.bring_back)
                self.thread.start()
        return super().train_one(arch)

    def bring_back(self) -> None:
        time.sleep(self.seconds or 0.0)
        self.server.start()


class Notes(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


def test_a_search_waits_for_its_database(server: PostgresServer) -> None:
    url = f"{server.url}/studies"
    evaluator, notes = Restarting(server, 1.5), Notes()
    try:
        result = search.run(SearchConfig(budget=10, storage=url, confirm=0), evaluator, notes)
        assert result.complete == 10
        (waiting,) = (line for line in notes.lines if "waiting for up to 300 s" in line)
        assert waiting.startswith("the database does not answer (")
        assert notes.lines[notes.lines.index(waiting) + 1] == "the database answers again"
        rows = candidates_of(url)
        assert evaluator.count == len(rows) == len({row.arch_id for row in rows})
        assert sum(row.state == "complete" for row in rows) == 10
    finally:
        if evaluator.thread is not None:
            evaluator.thread.join()
        server.stop()


def test_a_database_that_is_gone_ends_the_search(server: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studies.reconnecting.keep_connecting.__defaults__", (1.0,))
    url = f"{server.url}/studies"
    with pytest.raises(StorageError):
        search.run(SearchConfig(budget=10, storage=url, confirm=0), Restarting(server, None))
    server.start()
    try:
        # Nothing was lost that was recorded.
        assert search.run(SearchConfig(budget=10, storage=url, confirm=0), FakeEvaluator()).complete == 10
    finally:
        server.stop()


class Faulty(Notes):
    """Stops the server in several ways at random moments of a search, again and again until it is over."""

    def __init__(self, server: PostgresServer) -> None:
        super().__init__()
        self.server, self.rng = server, random.Random(0)
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.break_often)
        self.faults: list[str] = []

    def begin(self, complete: int, budget: int) -> None:
        self.thread.start()

    def end(self) -> None:
        self.over.set()
        self.thread.join()

    def break_often(self) -> None:
        ways = ("immediate", "fast", "a killed process")
        while not self.over.wait(self.rng.uniform(0.05, 0.5)):
            way = ways[len(self.faults) % len(ways)]
            if way == "a killed process":
                self.kill()
            else:
                self.server.stop(way)
                time.sleep(self.rng.uniform(0.0, 0.5))
                self.server.start()
            self.faults.append(way)

    def kill(self) -> None:
        """Kill the search's process on the server, which then ends all others, and recovers by itself."""
        with self.server.connect("studies") as connection:
            others = "backend_type = 'client backend' AND pid <> pg_backend_pid()"
            rows = connection.execute(f"SELECT pid FROM pg_stat_activity WHERE {others}").fetchall()  # type: ignore[call-overload]
            for (pid,) in rows:
                # It may have just ended.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def test_restarts_in_the_middle_of_whatever_it_does(server: PostgresServer) -> None:
    """A search that trains nothing is nearly always in the middle of a statement."""
    config = SearchConfig(budget=80, storage=f"{server.url}/studies", sampler="random", confirm=0)
    evaluator, faulty = Restarting(server, None, at=0), Faulty(server)
    try:
        try:
            assert search.run(config, evaluator, faulty).complete == 80
        finally:
            faulty.end()
        assert len(faulty.faults) >= 3
        assert faulty.lines.count("the database answers again") == sum("waiting for" in line for line in faulty.lines)
        store = Store.open(config.storage, create=False)
        assert store is not None
        study = store.find_study("convfirst")
        assert study is not None
        rows, trials = store.candidates(study.study_id), store.optuna_storage.get_all_trials(study.study_id)
        store.close()
        assert evaluator.count == len(rows) == len({row.arch_id for row in rows})
        assert sum(row.state in TRAINED for row in rows) == 80
        assert [trial.number for trial in trials] == [row.number for row in rows] == list(range(len(rows)))
        assert [trial._trial_id for trial in trials] == [row.trial_id for row in rows]
        states = {"complete": TrialState.COMPLETE, "failed": TrialState.FAIL, "stopped": TrialState.PRUNED}
        assert [trial.state for trial in trials] == [states[row.state] for row in rows]
        assert study.owner is None
    finally:
        server.stop()
