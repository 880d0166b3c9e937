"""Databases of older versions are brought up to date or refused, on SQLite and PostgreSQL alike."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Engine, create_engine, inspect, text

from studies import CandidateLatency, LatencyStage, Owner, Profile, StorageError, Store, schema
from studies.tables import Base
from tests.studies.rows import make_baseline_latency, make_training

WHEN = "2026-01-02 03:04:05.678901"
DEVICE = dict(kind="cpu", name="a CPU", driver="d", torch="2.11.0", triton="3.6.0")
DEPLOYMENT = dict(device_id=1, engine="eager", dtype="float32", batch_size=1, resolution=32, threads=1)
FIGURES = dict(
    p20_ms=0.9, p80_ms=1.1, repeats=10, raw_median_ms=1.05, anchor_median_ms=1.0, weight_bytes=2**40, workspace_bytes=5,
    measured_at=WHEN,
)  # fmt: skip
# (trial_id, accuracy, latency_id, median_ms): the ids have gaps, as after a deletion.
POINTS = ((1, 0.5, 3, 1.0), (2, 0.4, 7, 2.0), (3, 0.9, 5, 4.0))


TRAINING = dict(
    data="digits", data_fingerprint="f", resolution=32, steps=200, batch_size=32, learning_rate=8e-3, seed=0
)  # fmt: skip


def insert(database: Engine, table: str, /, **values: Any) -> None:
    names = ", ".join(values)
    with database.begin() as connection:
        marks = ", ".join(f":{name}" for name in values)
        connection.execute(text(f"INSERT INTO {table} ({names}) VALUES ({marks})"), values)


def fill(url: str) -> None:
    """Make a database of the newest version that is known, with a study of three candidates."""
    store = opened(url)
    storage, engine = store.optuna_storage, store.engine
    study_id = storage.create_new_study([optuna.study.StudyDirection.MAXIMIZE] * 2, "one")
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
        if inspect(engine).has_table("convfirst_learning_curves"):
            for step in (2, 1):
                insert(
                    engine, "convfirst_learning_curves", trial_id=trial_id, step=step, train_loss=1.0 / step,
                    train_accuracy=0.5, seconds=1.0,
                )  # fmt: skip
        else:
            insert(
                engine, "convfirst_trainings", trial_id=trial_id, stage="search", accuracy=accuracy, finished_at=WHEN,
                **TRAINING,
            )  # fmt: skip
    if engine.dialect.name == "postgresql":
        with engine.begin() as connection:
            connection.execute(text("SELECT setval('convfirst_latencies_latency_id_seq', 7)"))
    store.close()


def fill_as_before(url: str, first_unknown: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a database as a program did that did not know a migration and those after it."""
    shutil.copytree(schema.MIGRATIONS, folder)
    for path in (folder / "versions").glob("0*.py"):
        if path.name >= first_unknown:
            path.unlink()
    with monkeypatch.context() as earlier:
        earlier.setattr("studies.schema.MIGRATIONS", folder)
        fill(url)


@pytest.fixture
def old_url(any_url: str) -> str:
    """A database of the oldest version that is known, with a study of three candidates."""
    fill(any_url)
    return any_url


NEXT = """
import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade():
    op.add_column("convfirst_devices", sa.Column("memory_bytes", sa.BigInteger))
    op.create_table("convfirst_next", sa.Column("next_id", sa.Integer, primary_key=True))
"""


@pytest.fixture
def next_version(old_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on this is a later program, with one more migration: the database of `old_url` is old."""
    folder = tmp_path / "migrations"
    shutil.copytree(schema.MIGRATIONS, folder)
    (folder / "versions" / "0011_next.py").write_text(NEXT)
    monkeypatch.setattr("studies.schema.MIGRATIONS", folder)


@pytest.fixture
def engine(old_url: str) -> Iterator[Engine]:
    made = create_engine(old_url)
    yield made
    made.dispose()


def rows(engine: Engine, query: str) -> list[dict[str, Any]]:
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(text(query)).mappings()]


def version(engine: Engine) -> str | None:
    with engine.connect() as connection:
        return schema.current(connection)


def opened(url: str, *, create: bool = True) -> Store:
    store = Store.open(url, create=create)
    assert store is not None
    return store


def differences(engine: Engine) -> list[Any]:
    """The differences between the tables of a database and the classes."""
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


def everything(engine: Engine) -> dict[str, list[dict[str, Any]]]:
    """All rows of all tables and views."""
    names = inspect(engine).get_table_names() + inspect(engine).get_view_names()
    return {name: sorted(rows(engine, f"SELECT * FROM {name}"), key=str) for name in names}


@pytest.mark.parametrize("create", [True, False], ids=["search", "reader"])
@pytest.mark.parametrize("found", ["0001", "0002", "0003"])
def test_a_database_from_before_the_first_release_is_refused(
    old_url: str, engine: Engine, found: str, create: bool
) -> None:
    with engine.begin() as connection:
        connection.execute(text("UPDATE convfirst_alembic_version SET version_num = :found"), {"found": found})
    before = everything(engine)
    message = rf"^its tables are of version {found}, from before the first release; make a new database$"
    with pytest.raises(StorageError, match=message):
        Store.open(old_url, create=create)
    assert version(engine) == found
    assert everything(engine) == before


@pytest.mark.usefixtures("next_version")
@pytest.mark.parametrize("create", [True, False], ids=["search", "reader"])
def test_an_old_database_keeps_its_rows(old_url: str, engine: Engine, create: bool) -> None:
    before = everything(engine)
    assert [row["latency_id"] for row in before["convfirst_latencies"]] == [3, 5, 7]
    opened(old_url, create=create).close()
    assert version(engine) == schema.head() == "0011"
    after = everything(engine)
    assert after.pop("convfirst_next") == []
    assert [row.pop("memory_bytes") for row in after["convfirst_devices"]] == [None]
    for name in before.keys() - {schema.VERSION_TABLE}:
        assert after[name] == before[name], name
    assert after.keys() == before.keys()
    assert [difference[0] for difference in differences(engine)] == ["remove_table", "remove_column"]


@pytest.mark.usefixtures("next_version")
def test_an_old_study_is_gone_on_with(old_url: str, engine: Engine) -> None:
    store = opened(old_url)
    study = store.find_study("one")
    assert study is not None
    assert [summary.complete for summary in store.summaries()] == [3]
    assert list(store.front("one")["number"]) == [0, 2]
    final = CandidateLatency(
        trial_id=1, median_ms=3.0, stage=LatencyStage.FINAL, **DEPLOYMENT, **(FIGURES | {"measured_at": None})
    )
    store.add_latencies(study.study_id, [final])
    assert [row.latency_id for row in store.candidates(study.study_id)[0].latencies] == [3, 8]
    assert list(store.front("one")["number"]) == [1, 0, 2]
    store.ownership.claim(study.study_id, Owner.me())
    store.devices.add_profile(
        DEVICE,
        Profile(
            dtype="float32", threads=1, copy_bytes_per_s=1.0, macs_per_s=1e3, launch_seconds=1,
            network_yardstick_ms=1.0, product_yardstick_ms=1.0, interval_share=0.1,
        ),
    )  # fmt: skip
    store.baselines.add(study.study_id, [make_training("a")])
    store.baselines.add(study.study_id, [make_baseline_latency("a", 1.0, device_id=1)])
    # 2 MACs in 4 ms at 1,000 MACs a second.
    assert store.front("one")["computational_efficiency"].iloc[-1] == pytest.approx(0.5)
    store.close()
    # The triggers and the foreign keys hold for all tables.
    optuna.delete_study(study_name="one", storage=optuna.storages.RDBStorage(old_url))
    for table in ("studies", "candidates", "latencies", "trainings", "baseline_trainings", "baseline_latencies"):
        assert rows(engine, f"SELECT * FROM convfirst_{table}") == []
    assert len(rows(engine, "SELECT * FROM convfirst_profiles")) == 1


def test_a_row_may_be_written_without_what_the_first_versions_did_not_know(old_url: str, engine: Engine) -> None:
    insert(engine, "convfirst_latencies", trial_id=1, median_ms=1.0, **(DEPLOYMENT | {"threads": 2}), **FIGURES)
    found = rows(engine, "SELECT stage, over_limit FROM convfirst_latencies WHERE threads = 2")
    assert found == [{"stage": "search", "over_limit": False}]


def test_candidates_from_before_there_were_resolutions_have_those_of_their_trainings(
    any_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_as_before(any_url, "0007", tmp_path / "migrations", monkeypatch)
    database = create_engine(any_url)
    assert version(database) == "0006"
    # At the deployment's resolution the second is dominated, at another one the third.
    for number, (trial_id, resolution, accuracy) in enumerate(
        [(1, 32, 0.6), (2, 32, 0.5), (3, 32, 0.9), (1, 64, 0.6), (2, 64, 0.8), (3, 64, 0.7)], start=1
    ):
        insert(
            database, "convfirst_retrainings", retraining_id=number, trial_id=trial_id, accuracy=accuracy,
            train_seconds=2.0, finished_at=WHEN, **(TRAINING | dict(resolution=resolution, steps=800)),
        )  # fmt: skip
    searched = rows(database, "SELECT number, accuracy FROM pareto_front ORDER BY number")

    opened(any_url).close()
    assert version(database) == schema.head()
    assert differences(database) == []
    found = rows(database, "SELECT number, accuracy, network_resolution FROM pareto_front ORDER BY number")
    assert found == [row | {"network_resolution": 32} for row in searched]
    columns = "retrained_resolution, trial_id, one_resolution"
    trained = rows(database, f"SELECT {columns} FROM retrained_front ORDER BY {columns}")
    assert [tuple(row.values()) for row in trained] == [(32, 1, None), (32, 3, None), (64, 1, 64), (64, 2, 64)]
    assert rows(database, "SELECT DISTINCT resolution FROM convfirst_candidates") == [{"resolution": None}]
    database.dispose()


def test_trainings_from_before_they_had_a_table_are_there(
    any_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_as_before(any_url, "0008", tmp_path / "migrations", monkeypatch)
    database = create_engine(any_url)
    proxy, data = dict(steps=100, batch_size=16, learning_rate=4e-3), dict(source="a folder", resolution=64)
    with database.begin() as connection:
        config = json.dumps(dict(latency={"engine": "eager"}, proxy=proxy, data=data))
        connection.execute(text("UPDATE convfirst_studies SET config = :config"), {"config": config})
        connection.execute(text("UPDATE convfirst_candidates SET resolution = 48, seed = 3 WHERE trial_id = 2"))
        connection.execute(text("UPDATE convfirst_candidates SET accuracy = NULL, state = 'failed' WHERE trial_id = 3"))
    longer = TRAINING | dict(steps=800)
    insert(database, "convfirst_retrainings", retraining_id=7, trial_id=1, accuracy=0.6, finished_at=WHEN, **longer)
    before = rows(database, "SELECT * FROM pareto_front ORDER BY number")

    store = opened(any_url)
    assert store.learning_curve(1) == "[[1, 1.0, 0.5, 1.0], [2, 0.5, 0.5, 1.0]]"
    assert store.learning_curve(3) is None
    store.close()
    assert not inspect(database).has_table("convfirst_learning_curves")
    columns = "trial_id, stage, data, resolution, steps, batch_size, learning_rate, seed, accuracy, host"
    assert [tuple(row.values()) for row in rows(database, f"SELECT {columns} FROM convfirst_trainings")] == [
        (1, "search", "a folder", 64, 100, 16, 4e-3, 0, 0.5, None),
        (2, "search", "a folder", 48, 100, 16, 4e-3, 3, 0.4, None),
        (1, "retraining", "digits", 32, 800, 32, 8e-3, 0, 0.6, None),
    ]
    # Nothing is confirmed yet.
    after = rows(database, "SELECT * FROM pareto_front ORDER BY number")
    assert [{name: row[name] for name in before[0]} for row in after] == before
    assert [(row["confirmed"], row["searched_accuracy"], row["accuracy_low"]) for row in after] == [(0, 0.5, None)]
    database.dispose()


@pytest.mark.usefixtures("next_version")
def test_a_migration_that_fails_changes_nothing(old_url: str, engine: Engine) -> None:
    """A killed one changes nothing either. This one meets a table of the user's after it has added a column."""
    before = everything(engine)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE convfirst_next (name TEXT)"))
    with pytest.raises(StorageError, match=r"convfirst_next.* already exists") as caught:
        Store.open(old_url, create=True)
    assert "\n" not in str(caught.value)
    assert version(engine) == "0010"
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE convfirst_next"))
    assert everything(engine) == before
    assert len(rows(engine, "SELECT * FROM pareto_front")) == 2
    opened(old_url).close()
    assert version(engine) == schema.head()


@pytest.mark.usefixtures("next_version")
@pytest.mark.parametrize("any_url", ["sqlite"], indirect=True)
def test_an_old_database_that_is_read_only_is_refused(old_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: not mode & os.W_OK)
    with pytest.raises(StorageError, match="read-only, and its tables are of an older version"):
        Store.open(old_url, create=False)


@pytest.mark.usefixtures("next_version")
def test_an_old_database_that_somebody_holds_is_told_soon(
    old_url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("studies.opening.OPEN_TIMEOUT_S", 0.2)
    with engine.connect() as holder:
        if engine.dialect.name == "sqlite":
            holder.exec_driver_sql("BEGIN IMMEDIATE")
        holder.execute(text("SELECT * FROM pareto_front"))
        with pytest.raises(StorageError, match=r"locked|lock timeout"):
            Store.open(old_url, create=False)
    assert version(engine) == "0010"
    opened(old_url).close()


def test_the_engine_compile_becomes_inductor(any_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the database of a version that did not know the name: latencies stay with their study."""
    fill_as_before(any_url, "0005", tmp_path / "migrations", monkeypatch)
    engine = create_engine(any_url)
    of_a_block = DEPLOYMENT | {"engine": "compile", "kernels": "", "shape_id": "a", "shape": "{}", "median_ms": 1.0}
    del of_a_block["resolution"]
    insert(
        engine,
        "convfirst_block_latencies",
        p20_ms=1,
        p80_ms=1,
        repeats=1,
        interval_share=0,
        capped=False,
        measured_at=WHEN,
        **of_a_block,
    )
    of_a_baseline = DEPLOYMENT | {"engine": "compile", "name": "a", "study_id": 1, "median_ms": 1.0}
    insert(engine, "convfirst_baseline_latencies", measured_at=WHEN, **of_a_baseline)
    with engine.begin() as connection:
        connection.execute(text("UPDATE convfirst_latencies SET engine = 'compile'"))
        connection.execute(text("""UPDATE convfirst_studies SET config = '{"latency": {"engine": "compile"}}'"""))
    store = opened(any_url, create=False)
    assert [summary.engine for summary in store.summaries()] == ["inductor"]
    assert set(store.front("one")["engine"]) == {"inductor"}
    assert [row.shape for row in store.devices.block_latencies(DEVICE, "inductor", "float32", 1, 1).values()] == ["{}"]
    assert [row.engine for row in store.baselines.latencies(1)] == ["inductor"]
    store.close()
    assert version(engine) == schema.head()
    engine.dispose()
