"""The safe opening of a database, on SQLite and PostgreSQL alike."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from sqlalchemy import create_engine, inspect, text

from studies import StorageError, Store, schema
from tests.studies.rows import OURS, make_study


def test_opening_twice_finds_the_same(any_url: str) -> None:
    for _ in range(2):
        store = Store.open(any_url, create=True)
        assert store is not None
        assert set(inspect(store.engine).get_table_names()) >= OURS
        assert {"pareto_front", "convfirst_evaluations", "convfirst_retrained", "retrained_front"} <= set(
            inspect(store.engine).get_view_names()
        )
        with store.engine.connect() as connection:
            assert schema.current(connection) == schema.head()
        if store.find_study("one") is None:
            make_study(store)
        else:
            assert store.find_study("one").anchor_ms == 1.0  # type: ignore[union-attr]
        store.close()


def test_optunas_own_databases_are_welcome(any_url: str) -> None:
    optuna.create_study(study_name="theirs", storage=any_url)
    store = Store.open(any_url, create=True)
    assert store is not None
    make_study(store)
    assert [summary.name for summary in store.summaries()] == ["one"]
    store.close()


def test_a_database_with_other_tables_is_refused_and_left_alone(any_url: str) -> None:
    engine = create_engine(any_url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE trials (name TEXT)"))
    with pytest.raises(StorageError, match="other tables"):
        Store.open(any_url, create=True)
    assert inspect(engine).get_table_names() == ["trials"]
    engine.dispose()


def test_a_database_of_a_newer_version_is_refused(store: Store, any_url: str) -> None:
    with store.engine.begin() as connection:
        connection.execute(text("UPDATE convfirst_alembic_version SET version_num = '9999'"))
    for create in (True, False):
        with pytest.raises(StorageError, match="version 9999, newer than this program's"):
            Store.open(any_url, create=create)


def test_a_database_that_is_not_there_is_not_made_for_readers(tmp_path: Path) -> None:
    path = tmp_path / "none.db"
    assert Store.open(f"sqlite:///{path}", create=False) is None
    assert not path.exists()


def test_a_locked_database_is_told_soon(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studies.opening.OPEN_TIMEOUT_S", 0.2)
    first = Store.open(sqlite_url, create=True)
    assert first is not None
    first.close()
    holder = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StorageError, match="locked"):
        Store.open(sqlite_url, create=True)
    holder.close()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "no database's URL, such as sqlite:///FILE.db"),
        ("nosuch://here", "nosuch is not supported; use sqlite or postgresql"),
        ("mysql+pymysql://a@127.0.0.1/x", "mysql is not supported"),
        ("sqlite://", "in-memory"),
        ("sqlite:////proc/nowhere/x.db", "No such file|unable|denied"),
        ("postgresql+psycopg://a@127.0.0.1:1/x", "refused"),
    ],
)
def test_storages_that_cannot_be_used(url: str, message: str) -> None:
    with pytest.raises(StorageError, match=message) as caught:
        Store.open(url, create=True)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a database\n" * 100)
    with pytest.raises(StorageError, match="not a database"):
        Store.open(f"sqlite:///{path}", create=True)
    assert path.read_text() == "not a database\n" * 100


def test_three_processes_may_make_a_database_at_once(any_url: str) -> None:
    code = f"from studies import Store; Store.open({any_url!r}, create=True)"
    processes = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert Store.open(any_url, create=False) is not None


def test_readers_need_no_write_lock(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studies.opening.OPEN_TIMEOUT_S", 0.2)
    store = Store.open(sqlite_url, create=True)
    assert store is not None
    make_study(store)
    writer = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    reader = Store.open(sqlite_url, create=False)
    assert reader is not None
    assert len(reader.summaries()) == 1
    writer.close()


def test_a_database_file_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that is killed while the tables are made leaves no file that the next would take for another's."""

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "study.db"
    with monkeypatch.context() as patch:
        patch.setattr("studies.schema.upgrade", die)
        with pytest.raises(KeyboardInterrupt):
            Store.open(f"sqlite:///{path}", create=True)
    assert not path.exists()
    assert Store.open(f"sqlite:///{path}", create=True) is not None
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []
