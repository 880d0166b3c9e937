"""The study database, on SQLite and PostgreSQL alike."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine, inspect, text
from sqlalchemy.exc import IntegrityError

from nas import search
from nas.config import SearchConfig
from nas.overhead import FakeEvaluator
from nas.pareto import front
from studies import Candidate, CandidateState, CurvePoint, Latency, Owner, StorageError, Store, Study, schema
from studies.tables import Base

DEVICE = dict(kind="cpu", name="a CPU", driver="d", torch="2.11.0", triton="3.6.0")
OTHER_DEVICE = DEVICE | dict(name="a GPU", kind="cuda")
OURS = {
    "convfirst_alembic_version", "convfirst_candidates", "convfirst_devices", "convfirst_latencies",
    "convfirst_learning_curves", "convfirst_studies",
}  # fmt: skip


@pytest.fixture
def store(any_url: str) -> Iterator[Store]:
    opened = Store.open(any_url, create=True)
    assert opened is not None
    yield opened
    opened.close()


def make_study(store: Store, name: str = "one", device: dict[str, str] = DEVICE) -> Study:
    return store.create_study(
        name, config='{"latency": {"engine": "eager"}}', data_fingerprint="f", versions="{}", device=device,
        anchor="{}", anchor_ms=1.0,
    )  # fmt: skip


def add(store: Store, study: Study, accuracy: float | None, latency_ms: float | None, **changes: Any) -> Candidate:
    """A candidate with a trial of Optuna's, complete unless `changes` say otherwise."""
    trial_id = store.optuna_storage.create_new_trial(study.study_id)
    number = store.optuna_storage.get_trial_number_from_id(trial_id)
    deployment = dict(
        device_id=study.device_id, engine="eager", dtype="float32", batch_size=1, resolution=32, threads=1
    )
    deployment |= {key: changes.pop(key) for key in list(changes) if key in deployment}
    candidate = Candidate(
        trial_id=trial_id, study_id=study.study_id, number=number, arch=f"arch {number}", summary=f"summary {number}",
        **{
            "arch_id": f"id{number}", "params": 10**10, "macs": 10**12, "state": CandidateState.COMPLETE,
            "seed": 2**32 - 1,
            "total_seconds": 1.0, "accuracy": accuracy, **changes,
        },
    )  # fmt: skip
    if latency_ms is not None:
        candidate.latencies = [
            Latency(
                median_ms=latency_ms, p20_ms=latency_ms, p80_ms=latency_ms, repeats=10, raw_median_ms=latency_ms,
                anchor_median_ms=1.0, weight_bytes=2**40, workspace_bytes=5, **deployment,
            )
        ]  # fmt: skip
    candidate.curve = [CurvePoint(step=step, train_loss=1.0, train_accuracy=0.5, seconds=1.0) for step in (1, 2)]
    me = Owner.me()
    store.claim(study.study_id, me)
    store.add_candidate(candidate, me)
    return candidate


def counts(store: Store) -> dict[str, int]:
    with store.engine.connect() as connection:
        return {
            name: connection.execute(text(f"SELECT COUNT(*) FROM {name}")).scalar_one()
            for name in sorted(OURS - {"convfirst_alembic_version"})
        }


def test_opening_twice_finds_the_same(any_url: str) -> None:
    for _ in range(2):
        store = Store.open(any_url, create=True)
        assert store is not None
        assert set(inspect(store.engine).get_table_names()) >= OURS
        assert {"pareto_front", "convfirst_evaluations"} <= set(inspect(store.engine).get_view_names())
        assert schema.current(store.engine) == schema.head()
        if store.find_study("one") is None:
            make_study(store)
        else:
            assert store.find_study("one").anchor_ms == 1.0  # type: ignore[union-attr]
        store.close()


def test_migrations_make_what_the_classes_say(store: Store) -> None:
    with store.engine.connect() as connection:
        context = MigrationContext.configure(
            connection,
            opts=dict(
                compare_type=True,
                version_table=schema.VERSION_TABLE,
                include_name=lambda name, kind, _: kind != "table" or str(name).startswith("convfirst_"),
            ),
        )
        metadata = Base.metadata
        differences = [
            difference
            for difference in compare_metadata(context, metadata)
            # Optuna's two tables are in the metadata for the foreign keys only.
            if not (difference[0] == "add_table" and difference[1].name in ("studies", "trials"))
        ]
    assert differences == []


def test_all_of_a_candidate_comes_back(store: Store) -> None:
    study = make_study(store)
    added = add(store, study, 0.5, 1.5, reason="because", loss=0.25, train_seconds=7.0, train_memory_bytes=2**40)
    (found,) = store.candidates(study.study_id)
    for column in Candidate.__table__.columns:
        if column.name != "finished_at":
            assert getattr(found, column.name) == getattr(added, column.name), column.name
    assert found.latencies[0].weight_bytes == 2**40
    assert found.latencies[0].median_ms == 1.5


def test_no_architecture_is_complete_twice_whoever_writes(store: Store) -> None:
    study = make_study(store)
    add(store, study, 0.5, 1.0, arch_id="same")
    with pytest.raises(IntegrityError):
        add(store, study, 0.6, 1.0, arch_id="same")
    add(store, study, None, None, arch_id="same", state=CandidateState.FAILED)
    add(store, make_study(store, "two"), 0.5, 1.0, arch_id="same")
    assert counts(store)["convfirst_candidates"] == 3


@pytest.mark.parametrize("seed", range(5))
def test_the_view_is_the_front(store: Store, seed: int) -> None:
    """On a coarse grid, with ties and equal points; failed candidates and other studies must not show."""
    rng = np.random.default_rng(seed)
    study, other = make_study(store), make_study(store, "other")
    points = rng.integers(1, 7, (30, 2)) / 8
    numbers = [add(store, study, a, t).number for a, t in points.tolist()]
    add(store, study, 1.0, 0.01, state=CandidateState.FAILED)
    add(store, study, None, 0.01, state=CandidateState.OVER_LIMIT)
    add(store, other, 1.0, 0.01)
    expected = [numbers[i] for i in front(points[:, 0], points[:, 1])]
    found = store.front("one")
    assert sorted(found["number"]) == sorted(expected)
    assert list(found["latency_ms"]) == sorted(found["latency_ms"])


def test_devices_engines_and_deployments_have_fronts_of_their_own(store: Store) -> None:
    study = make_study(store)
    other = make_study(store, "elsewhere", OTHER_DEVICE)
    best = add(store, study, 0.9, 1.0)
    for changes in (dict(engine="fused"), dict(device_id=other.device_id), dict(batch_size=8), dict(dtype="float16"),
                    dict(resolution=64), dict(threads=2)):  # fmt: skip
        add(store, study, 0.1, 2.0, **changes)
    add(store, study, 0.1, 2.0)
    found = store.front("one")
    assert len(found) == 7
    eager = found[(found.engine == "eager") & (found.device_name == "a CPU")]
    assert best.number in set(eager["number"])
    assert set(found.device_name) == {"a CPU", "a GPU"}


def test_plain_sql_reads_the_front(sqlite_url: str) -> None:
    store = Store.open(sqlite_url, create=True)
    assert store is not None
    add(store, make_study(store), 0.5, 1.0)
    rows = sqlite3.connect(sqlite_url.removeprefix("sqlite:///")).execute("select * from pareto_front").fetchall()
    assert len(rows) == 1


def test_deleting_a_study_as_the_dashboard_does_leaves_nothing_of_ours(any_url: str, store: Store) -> None:
    doomed, kept = make_study(store), make_study(store, "kept")
    for accuracy in (0.5, 0.6):
        add(store, doomed, accuracy, 1.0)
        add(store, kept, accuracy, 1.0)
    # A storage of its own, which like the dashboard's asks SQLite for no foreign keys.
    optuna.delete_study(study_name="one", storage=optuna.storages.RDBStorage(any_url))
    assert store.find_study("one") is None
    assert counts(store) == {
        "convfirst_candidates": 2, "convfirst_devices": 1, "convfirst_latencies": 2, "convfirst_learning_curves": 4,
        "convfirst_studies": 1,
    }  # fmt: skip
    # A new study takes the old one's name, and on SQLite its ids.
    again = make_study(store)
    add(store, again, 0.5, 1.0)
    assert len(store.candidates(again.study_id)) == 1


def test_a_study_of_another_program_is_refused(store: Store, any_url: str) -> None:
    optuna.create_study(study_name="theirs", storage=any_url).add_trial(optuna.trial.create_trial(value=1.0))
    with pytest.raises(StorageError, match="'theirs' was made by another program"):
        store.find_study("theirs")
    assert store.summaries() == []


def test_a_study_of_which_only_optunas_half_was_made_is_begun_anew(store: Store) -> None:
    """Killed between Optuna's row and ours."""
    optuna.create_study(study_name="one", storage=store.optuna_storage, directions=["maximize", "minimize"])
    assert store.find_study("one") is None
    optuna.create_study(study_name="single", storage=store.optuna_storage)
    with pytest.raises(StorageError, match="'single' was made by another program"):
        store.find_study("single")
    add(store, make_study(store), 0.5, 1.0)
    assert len(store.front("one")) == 1


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
    monkeypatch.setattr("studies.store.OPEN_TIMEOUT_S", 0.2)
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
        ("nonsense", "Could not parse"),
        ("nosuch://here", "nosuch"),
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


def test_one_of_two_processes_gets_a_study(store: Store) -> None:
    study = make_study(store)
    me = Owner.me()
    stranger = replace(me, host="elsewhere")
    store.claim(study.study_id, stranger)
    with pytest.raises(StorageError, match=f"process {me.pid} on elsewhere .*--take-over"):
        store.claim(study.study_id, me)
    store.release(study.study_id, me)
    with pytest.raises(StorageError, match="elsewhere"):
        store.claim(study.study_id, me)
    store.disown(study.study_id)
    store.claim(study.study_id, me)
    store.disown(study.study_id)
    store.claim(study.study_id, me)
    store.release(study.study_id, me)
    store.claim(study.study_id, stranger)


def test_a_dead_owners_study_is_taken_once(store: Store) -> None:
    study = make_study(store)
    me = Owner.me()
    dead = replace(me, started=me.started - 1000)
    store.claim(study.study_id, dead)
    store.claim(study.study_id, me)
    with pytest.raises(StorageError, match="searched by process"):
        store.claim(study.study_id, dead)


def test_two_processes_may_make_a_database_at_once(sqlite_url: str) -> None:
    code = f"from studies import Store; Store.open({sqlite_url!r}, create=True)"
    processes = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert Store.open(sqlite_url, create=False) is not None


def test_a_whole_search_runs_on_either(any_url: str) -> None:
    config = SearchConfig(budget=8, storage=any_url)
    assert search.run(config, FakeEvaluator()).complete == 8
    assert search.run(replace(config, budget=11), FakeEvaluator()).complete == 11


def test_readers_neither_disturb_a_search_nor_wait_for_it(sqlite_url: str) -> None:
    """A dashboard polls while a search writes: no trial fails, and nobody meets a lock."""
    config = SearchConfig(budget=25, storage=sqlite_url)
    search.run(replace(config, budget=1), FakeEvaluator())
    errors: list[BaseException] = []
    polls = 0
    done = threading.Event()

    def poll() -> None:
        nonlocal polls
        storage = optuna.storages.RDBStorage(sqlite_url)
        reader = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), timeout=0)
        while not done.is_set():
            try:
                storage.get_all_trials(1)
                reader.execute("select * from pareto_front").fetchall()
            except Exception as error:
                errors.append(error)
            polls += 1
            time.sleep(0.01)

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        assert search.run(config, FakeEvaluator()).complete == 25
    finally:
        done.set()
        thread.join()
    assert not errors
    assert polls > 20


def test_readers_need_no_write_lock(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studies.store.OPEN_TIMEOUT_S", 0.2)
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
    """Killed while the tables are made, a search leaves no file that the next would take for another's."""

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
