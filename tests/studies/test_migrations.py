"""Old databases are brought up to date, on SQLite and PostgreSQL alike."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import optuna
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Engine, create_engine, inspect, text

from studies import Latency, LatencyStage, Owner, Profile, StorageError, Store, schema
from studies.tables import Base
from tests.studies.test_store import make_baseline_latency, make_training

WHEN = "2026-01-02 03:04:05.678901"
DEVICE = dict(kind="cpu", name="a CPU", driver="d", torch="2.11.0", triton="3.6.0")
DEPLOYMENT = dict(device_id=1, engine="eager", dtype="float32", batch_size=1, resolution=32, threads=1)
FIGURES = dict(
    p20_ms=0.9, p80_ms=1.1, repeats=10, raw_median_ms=1.05, anchor_median_ms=1.0, weight_bytes=2**40, workspace_bytes=5,
    measured_at=WHEN,
)  # fmt: skip
# (trial_id, accuracy, latency_id, median_ms): the ids have gaps, as after a deletion.
POINTS = ((1, 0.5, 3, 1.0), (2, 0.4, 7, 2.0), (3, 0.9, 5, 4.0))


def insert(database: Engine, table: str, /, **values: Any) -> None:
    names = ", ".join(values)
    with database.begin() as connection:
        marks = ", ".join(f":{name}" for name in values)
        connection.execute(text(f"INSERT INTO {table} ({names}) VALUES ({marks})"), values)


@pytest.fixture
def old_url(any_url: str) -> str:
    """A database of version 0001, with a study of three candidates."""
    storage = optuna.storages.RDBStorage(any_url)
    study_id = storage.create_new_study([optuna.study.StudyDirection.MAXIMIZE] * 2, "one")
    engine = storage.engine
    with engine.begin() as connection:
        config = schema._config()
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
    insert(engine, "convfirst_devices", device_id=1, **DEVICE)
    insert(
        engine, "convfirst_studies", study_id=study_id, config='{"latency": {"engine": "eager"}}', versions="{}",
        data_fingerprint="f", device_id=1, anchor="{}", anchor_ms=1.0, created_at=WHEN,
    )  # fmt: skip
    for trial_id, accuracy, latency_id, median_ms in POINTS:
        assert storage.create_new_trial(study_id) == trial_id
        insert(
            engine, "convfirst_candidates", trial_id=trial_id, study_id=study_id, number=trial_id - 1,
            arch_id=f"id{trial_id}", arch="{}", summary="s", params=1, macs=2, state="complete", seed=0,
            accuracy=accuracy, total_seconds=1.0, finished_at=WHEN,
        )  # fmt: skip
        insert(
            engine, "convfirst_latencies", latency_id=latency_id, trial_id=trial_id, median_ms=median_ms, **DEPLOYMENT,
            **FIGURES,
        )  # fmt: skip
        insert(
            engine, "convfirst_learning_curves", trial_id=trial_id, step=1, train_loss=1.0, train_accuracy=0.5,
            seconds=1.0,
        )  # fmt: skip
    if engine.dialect.name == "postgresql":
        with engine.begin() as connection:
            connection.execute(text("SELECT setval('convfirst_latencies_latency_id_seq', 7)"))
    storage.remove_session()
    engine.dispose()
    return any_url


@pytest.fixture
def engine(old_url: str) -> Iterator[Engine]:
    made = create_engine(old_url)
    yield made
    made.dispose()


def rows(engine: Engine, query: str) -> list[dict[str, Any]]:
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(text(query)).mappings()]


def opened(url: str, *, create: bool = True) -> Store:
    store = Store.open(url, create=create)
    assert store is not None
    return store


def differences(engine: Engine) -> list[Any]:
    """Between the tables of a database and the classes."""
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection,
            opts=dict(
                compare_type=True,
                compare_server_default=True,
                version_table=schema.VERSION_TABLE,
                include_name=lambda name, kind, _: kind != "table" or str(name).startswith("convfirst_"),
            ),
        )
        return [
            difference
            for difference in compare_metadata(context, Base.metadata)
            # Optuna's two tables are in the metadata for the foreign keys only.
            if not (difference[0] == "add_table" and difference[1].name in ("studies", "trials"))
        ]


def test_migrations_make_what_the_classes_say(any_url: str) -> None:
    store = opened(any_url)
    assert differences(store.engine) == []
    store.close()


@pytest.mark.parametrize("create", [True, False], ids=["search", "reader"])
def test_an_old_database_keeps_its_rows(old_url: str, engine: Engine, create: bool) -> None:
    tables = [name for name in inspect(engine).get_table_names() if name.startswith("convfirst_")]
    queries = {name: f"SELECT * FROM {name} ORDER BY 1" for name in tables if name != schema.VERSION_TABLE}
    queries |= {view: f"SELECT * FROM {view} ORDER BY number" for view in ("convfirst_evaluations", "pareto_front")}
    before = {name: rows(engine, query) for name, query in queries.items()}
    assert [row["latency_id"] for row in before["convfirst_latencies"]] == [3, 5, 7]

    opened(old_url, create=create).close()
    assert schema.current(engine) == schema.head()
    assert differences(engine) == []
    new = dict.fromkeys(("interval_share", "capped", "throttled", "sm_clock_mhz", "temperature_c")) | {
        "stage": "search"
    }
    for name, query in queries.items():
        after = rows(engine, query)
        assert [{key: row[key] for key in kept} for row, kept in zip(after, before[name], strict=True)] == before[name]
        # The columns that were there come first in the views, in their order.
        if name in ("convfirst_evaluations", "pareto_front"):
            assert list(after[0])[: len(before[name][0])] == list(before[name][0])
        elif name == "convfirst_latencies":
            assert all({key: row[key] for key in new} == new for row in after)
    assert {name for name in inspect(engine).get_table_names() if name.startswith("convfirst_")} == {
        *tables, "convfirst_profiles", "convfirst_block_latencies", "convfirst_baseline_trainings",
        "convfirst_baseline_latencies", "convfirst_retrainings",
    }  # fmt: skip


def test_an_old_study_is_gone_on_with(old_url: str, engine: Engine) -> None:
    store = opened(old_url)
    study = store.find_study("one")
    assert study is not None
    assert [summary.complete for summary in store.summaries()] == [3]
    assert list(store.front("one")["number"]) == [0, 2]
    final = Latency(
        trial_id=1, median_ms=3.0, stage=LatencyStage.FINAL, **DEPLOYMENT, **(FIGURES | {"measured_at": None})
    )
    store.add_latencies(study.study_id, [final])
    assert [row.latency_id for row in store.candidates(study.study_id)[0].latencies] == [3, 8]
    assert list(store.front("one")["number"]) == [1, 0, 2]
    store.claim(study.study_id, Owner.me())
    store.add_profile(
        DEVICE,
        Profile(
            dtype="float32", threads=1, copy_bytes_per_s=1.0, macs_per_s=1e3, launch_seconds=1,
            network_yardstick_ms=1.0, product_yardstick_ms=1.0, interval_share=0.1,
        ),
    )  # fmt: skip
    store.add_baselines(study.study_id, [make_training("a")])
    store.add_baselines(study.study_id, [make_baseline_latency("a", 1.0, device_id=1)])
    # 2 MACs in 4 ms at 1,000 MACs a second.
    assert store.front("one")["computational_efficiency"].iloc[-1] == pytest.approx(0.5)
    store.close()
    # The triggers of 0001 and the foreign keys hold for the new tables.
    optuna.delete_study(study_name="one", storage=optuna.storages.RDBStorage(old_url))
    for table in ("studies", "candidates", "latencies", "learning_curves", "baseline_trainings", "baseline_latencies"):
        assert rows(engine, f"SELECT * FROM convfirst_{table}") == []
    assert len(rows(engine, "SELECT * FROM convfirst_profiles")) == 1


def test_an_older_program_that_still_searches_can_write(old_url: str, engine: Engine) -> None:
    """Begun before the database was brought up to date, it knows no stages."""
    opened(old_url).close()
    insert(engine, "convfirst_latencies", trial_id=1, median_ms=1.0, **(DEPLOYMENT | {"threads": 2}), **FIGURES)
    assert rows(engine, "SELECT stage FROM convfirst_latencies WHERE threads = 2") == [{"stage": "search"}]


def test_a_migration_that_fails_changes_nothing(old_url: str, engine: Engine) -> None:
    """What a killed one does too. Here it meets a table of the user's after it has remade the latencies."""
    before = rows(engine, "SELECT * FROM convfirst_latencies ORDER BY 1")
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE convfirst_profiles (name TEXT)"))
    with pytest.raises(StorageError, match=r"convfirst_profiles.* already exists") as caught:
        Store.open(old_url, create=True)
    assert "\n" not in str(caught.value)
    assert schema.current(engine) == "0001"
    assert rows(engine, "SELECT * FROM convfirst_latencies ORDER BY 1") == before
    assert len(rows(engine, "SELECT * FROM pareto_front")) == 2
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE convfirst_profiles"))
    opened(old_url).close()
    assert schema.current(engine) == schema.head()


@pytest.mark.parametrize("any_url", ["sqlite"], indirect=True)
def test_an_old_database_that_is_read_only_is_refused(old_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: not mode & os.W_OK)
    with pytest.raises(StorageError, match="read-only, and its tables are of an older version"):
        Store.open(old_url, create=False)


def test_an_old_database_that_somebody_holds_is_told_soon(
    old_url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("studies.store.OPEN_TIMEOUT_S", 0.2)
    with engine.connect() as holder:
        if engine.dialect.name == "sqlite":
            holder.exec_driver_sql("BEGIN IMMEDIATE")
        holder.execute(text("SELECT * FROM pareto_front"))
        with pytest.raises(StorageError, match=r"locked|lock timeout"):
            Store.open(old_url, create=False)
    assert schema.current(engine) == "0001"
    opened(old_url).close()
