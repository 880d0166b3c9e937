"""A database that the code of 3c0a121 made is read and written as it is: nothing is migrated, no figure moves."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from nas.config import LatencyConfig, SearchConfig
from studies import CandidateState, LatencyStage, Owner, Store, TrainingStage, schema
from studies.sql import read_view
from tests.studies.rows import OURS, make_baseline_latency, make_training, measured_again

FRONT = {0: 0.14180607225262515, 2: 0.3927642831727998, 3: 0.438256499420289, 1: 0.45320975802702385}
DEVICE = dict(
    kind="cpu", name="AMD EPYC", driver="Linux x86_64, 2 CPUs", torch="2.11.0+cu130", triton="3.6.0"
)  # fmt: skip
ROWS = {
    "convfirst_alembic_version": 1, "convfirst_baseline_latencies": 3, "convfirst_baseline_trainings": 12,
    "convfirst_block_latencies": 28, "convfirst_candidates": 4, "convfirst_devices": 1, "convfirst_evaluations": 4,
    "convfirst_latencies": 8, "convfirst_profiles": 1, "convfirst_retrained": 1,
    "convfirst_studies": 1, "convfirst_trainings": 5, "pareto_front": 4, "retrained_front": 1,
}  # fmt: skip


@pytest.fixture(params=[False, True], ids=["reader", "writer"])
def store(stored_url: str, request: pytest.FixtureRequest) -> Iterator[Store]:
    opened = Store.open(stored_url, create=request.param)
    assert opened is not None
    yield opened
    opened.close()


def sql_of(url: str) -> dict[str, str]:
    """The statements that made our tables, indexes, views and triggers."""
    query = "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL AND sql LIKE '%convfirst_%'"
    with contextlib.closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
        return dict(connection.execute(query).fetchall())


def test_a_new_database_has_the_same_tables_views_and_triggers(stored_url: str, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'new.db'}"
    made = Store.open(url, create=True)
    assert made is not None
    made.close()
    # To open it is to bring it up to date.
    stored = Store.open(stored_url, create=True)
    assert stored is not None
    stored.close()
    assert sql_of(url) == sql_of(stored_url)
    assert set(sql_of(url)) == {
        *ROWS, "convfirst_candidates_once", "convfirst_trial_deleted", "convfirst_study_deleted",
        "convfirst_baselines_deleted", "convfirst_candidate_deleted",
    }  # fmt: skip


def test_every_table_and_view_has_its_rows(store: Store) -> None:
    with store.engine.connect() as connection:
        assert schema.current(connection) == "0010"
        counted = {name: connection.exec_driver_sql(f"SELECT COUNT(*) FROM {name}").scalar_one() for name in ROWS}
    assert counted == ROWS
    assert set(ROWS) >= OURS


def test_the_views_give_what_was_recorded(store: Store) -> None:
    front = store.front("convfirst")
    assert dict(zip(front["number"], front["latency_ms"], strict=True)) == FRONT
    assert list(front["number"]) == list(FRONT)
    assert list(front["accuracy"].round(4)) == [0.3657, 0.671, 0.677, 0.735]
    assert list(front["searched_latency_ms"].round(4)) == [0.1448, 0.3988, 0.4536, 0.4538]
    assert list(front["computational_efficiency"].round(3)) == [0.049, 0.662, 0.524, 0.395]
    assert set(front["latency_stage"]) == {"final"}
    evaluations = store.evaluations("convfirst")
    assert list(evaluations["number"]) == [0, 1, 2, 3]
    assert list(evaluations["latency_ms"]) == [FRONT[number] for number in range(4)]
    retrained_front = read_view(store.engine, "SELECT * FROM retrained_front WHERE study_name = :name", "convfirst")
    for rows in (store.trainings.retrained("convfirst"), retrained_front):
        found = rows[["number", "latency_ms", "retrained_steps", "retrained_accuracy"]]
        assert found.to_numpy().tolist() == [[1, FRONT[1], 2, 0.096]]


def test_every_table_is_read(store: Store) -> None:
    (summary,) = store.summaries()
    assert (summary.name, summary.complete, summary.over_limit, summary.failed) == ("convfirst", 4, 0, 0)
    assert (summary.device, summary.engine) == (DEVICE["name"], "torchscript")
    study = store.find_study("convfirst")
    assert study is not None
    assert (study.device.name, study.owner, study.anchor_ms) == (DEVICE["name"], None, 0.4546809932120879)
    assert LatencyConfig(**json.loads(study.config)["latency"]) == LatencyConfig(
        device="cpu", engine="torchscript", dtype="float32", resolution=32, num_classes=10
    )
    assert json.loads(study.config)["proxy"]["steps"] == SearchConfig().proxy.steps
    candidates = store.candidates(study.study_id)
    assert [row.state for row in candidates] == [CandidateState.COMPLETE] * 4
    assert [[row.stage for row in candidate.latencies] for candidate in candidates] == [list(LatencyStage)] * 4
    for candidate in candidates:
        curve = json.loads(store.learning_curve(candidate.trial_id) or "")
        assert [point[0] for point in curve] == list(range(10, 201, 10))
    optuna_study = store.load_optuna_study("convfirst")
    assert [trial.number for trial in optuna_study.trials] == [0, 1, 2, 3]
    assert [trial.values[0] for trial in optuna_study.trials] == [row.accuracy for row in candidates]
    (profile,) = store.devices.profiles()
    assert store.devices.id_of(DEVICE) == profile.device_id == study.device_id
    found = store.devices.find_profile(DEVICE, "float32", 1)
    assert found is not None
    assert found.macs_per_s == profile.macs_per_s == 53219318808.45436
    blocks = store.devices.block_latencies(DEVICE, engine="torchscript", dtype="float32", batch_size=1, threads=1)
    assert len(blocks) == 28
    assert all(row.median_ms > 0 for row in blocks.values())
    trainings = store.baselines.trainings(study.study_id)
    assert {(row.name, row.steps, row.resolution) for row in trainings} == {
        (name, steps, resolution)
        for name, resolution in (("ConvFirst anchor", 32), ("trial 1", 32), ("resnet18", 64))
        for steps in (2, 4)
    }
    latencies = {row.name: row.median_ms for row in store.baselines.latencies(study.study_id)}
    assert latencies == {
        "ConvFirst anchor": 0.45668854694215866, "resnet18": 5.725173726707022, "trial 1": 0.4730862738969423,
    }  # fmt: skip
    (retraining,) = store.trainings.of_study(study.study_id, TrainingStage.RETRAINING)
    assert (retraining.steps, retraining.seed, retraining.accuracy) == (2, 0, 0.096)
    store.ownership.claim(study.study_id, Owner.me())
    store.ownership.release(study.study_id, Owner.me())


def test_rows_are_written_beside_those_that_are_there(stored_url: str) -> None:
    store = Store.open(stored_url, create=True)
    assert store is not None
    study = store.find_study("convfirst")
    assert study is not None
    store.ownership.claim(study.study_id, Owner.me())
    slower = store.candidates(study.study_id)[0]
    store.add_latencies(study.study_id, [measured_again(slower, 1.0)])
    assert list(store.front("convfirst")["number"]) == [2, 3, 1]
    store.baselines.add(study.study_id, [make_training("a")])
    store.baselines.add(study.study_id, [make_baseline_latency("a", 1.0, device_id=study.device_id)])
    assert [row.name for row in store.baselines.trainings(study.study_id)][-1] == "a"
    assert [row.name for row in store.baselines.latencies(study.study_id)][-1] == "a"
    store.ownership.release(study.study_id, Owner.me())
    store.close()


def test_the_file_names_no_person_or_machine() -> None:
    text = (Path(__file__).parents[1] / "data" / "study_3c0a121.sql").read_text()
    assert re.findall(r"/(?:home|root|tmp|work|usr|mnt)\b", text) == []
