"""A search on a PostgreSQL server that is restarted meanwhile."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from nas import search
from nas.config import SearchConfig
from nas.lab.invented import FakeEvaluator
from nas.search.loop import Silent
from nas.training.proxy import ProxyResult
from search_spaces import ArchSpec
from studies import StorageError, Store
from tests.conftest import PostgresServer, new_postgres

pytestmark = pytest.mark.postgres


@pytest.fixture
def server(tmp_path: Path) -> PostgresServer:
    import psycopg

    (tmp_path / "server").mkdir()
    made = new_postgres(tmp_path / "server")
    made.start()
    with psycopg.connect(f"{made.url.replace('+psycopg', '')}/postgres", autocommit=True) as connection:
        connection.execute("CREATE DATABASE studies")
    return made


class Restarting(FakeEvaluator):
    """Stops the server while the fifth candidate is trained; it comes back after some seconds, or never."""

    def __init__(self, server: PostgresServer, seconds: float | None) -> None:
        super().__init__()
        self.server, self.seconds, self.count = server, seconds, 0
        self.thread: threading.Thread | None = None

    def train_one(self, arch: ArchSpec) -> ProxyResult:
        self.count += 1
        if self.count == 5:
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
        result = search.run(SearchConfig(budget=10, storage=url), evaluator, notes)
        assert result.complete == 10
        (waiting,) = (line for line in notes.lines if "waiting for up to 300 s" in line)
        assert waiting.startswith("the database does not answer (")
        assert notes.lines[notes.lines.index(waiting) + 1] == "the database answers again"
        store = Store.open(url, create=False)
        assert store is not None
        study = store.find_study("convfirst")
        assert study is not None
        rows = store.candidates(study.study_id)
        store.close()
        assert evaluator.count == len(rows) == len({row.arch_id for row in rows})
        assert sum(row.state == "complete" for row in rows) == 10
    finally:
        if evaluator.thread is not None:
            evaluator.thread.join()
        server.stop()


def test_a_database_that_is_gone_ends_the_search(server: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studies.opening.keep_connecting.__defaults__", (1.0,))
    url = f"{server.url}/studies"
    with pytest.raises(StorageError):
        search.run(SearchConfig(budget=10, storage=url), Restarting(server, None))
    server.start()
    try:
        # Nothing was lost that was recorded.
        assert search.run(SearchConfig(budget=10, storage=url), FakeEvaluator()).complete == 10
    finally:
        server.stop()
