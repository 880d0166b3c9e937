"""Studies, candidates and fronts, on SQLite and PostgreSQL alike."""

from __future__ import annotations

import sqlite3
import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import optuna
import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from nas.config import SearchConfig
from nas.lab.invented import FakeEvaluator
from nas.pareto import front
from nas.search import loop as search
from studies import Candidate, CandidateState, Deployment, StorageError, Store
from tests.studies.rows import (
    DEVICE,
    OTHER_DEVICE,
    add,
    counts,
    make_baseline_latency,
    make_block,
    make_candidate,
    make_candidate_training,
    make_profile,
    make_study,
    make_training,
    measured_again,
)


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
    """The points lie on a coarse grid, with ties and equal points; failed candidates and other studies do not show."""
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


def test_the_final_latency_is_shown_with_the_searchs_beside_it(store: Store) -> None:
    study = make_study(store)
    candidate = add(store, study, 0.5, 2.0)
    add(store, study, 0.6, 3.0)
    add(store, study, None, None, state=CandidateState.FAILED)
    final = measured_again(
        candidate, 2.5, interval_share=0.01, capped=True, throttled=False, sm_clock_mhz=1980.0, temperature_c=55.0
    )
    # The second latency is of another deployment, and so has a row of its own.
    store.add_latencies(study.study_id, [final, measured_again(candidate, 9.0, batch_size=8)])
    rows = store.evaluations("one").sort_values(["number", "batch_size"])
    assert list(rows["number"]) == [0, 0, 1]
    assert list(rows["latency_ms"]) == [2.5, 9.0, 3.0]
    assert list(rows["latency_stage"]) == ["final", "final", "search"]
    assert list(rows["searched_latency_ms"].fillna(0)) == [2.0, 0, 3.0]
    shown = rows.iloc[0]
    assert (shown["latency_interval_share"], shown["sm_clock_mhz"], shown["temperature_c"]) == (0.01, 1980.0, 55.0)
    assert shown["latency_capped"] is True
    assert shown["latency_throttled"] is False
    assert rows["latency_capped"].iloc[2] is None
    with store.engine.connect() as connection:
        assert connection.execute(text("SELECT COUNT(*) FROM convfirst_evaluations")).scalar_one() == 4


def test_the_front_follows_final_latencies(store: Store) -> None:
    study = make_study(store)
    fast, slow, best = (add(store, study, a, t) for a, t in ((0.5, 1.0), (0.5, 2.0), (0.9, 3.0)))
    assert list(store.front("one")["number"]) == [fast.number, best.number]
    store.add_latencies(study.study_id, [measured_again(fast, 2.5, interval_share=0.01, capped=False)])
    found = store.front("one")
    assert list(found["number"]) == [slow.number, best.number]
    store.add_latencies(study.study_id, [measured_again(fast, 1.5, interval_share=0.02, capped=False)])
    found = store.front("one")
    assert list(found["number"]) == [fast.number, best.number]
    assert list(found["latency_ms"]) == [1.5, 3.0]
    assert list(found["searched_latency_ms"]) == [1.0, 3.0]
    assert list(found["latency_stage"]) == ["final", "search"]
    assert found["latency_interval_share"][0] == 0.02
    assert found["latency_capped"].tolist() == [False, None]


def test_computational_efficiency_by_hand(store: Store) -> None:
    """10^12 MACs x 8 images in 4 ms are half of what a device does that does 4 x 10^15 MACs a second."""
    study = make_study(store)
    add(store, study, 0.5, 4.0, batch_size=8)
    assert store.front("one")["computational_efficiency"].isna().all()
    # These profiles are not this deployment's.
    for device, profile in (
        (OTHER_DEVICE, make_profile()), (DEVICE, make_profile(dtype="float16")), (DEVICE, make_profile(threads=2)),
    ):  # fmt: skip
        store.devices.add_profile(device, profile)
    assert store.front("one")["computational_efficiency"].isna().all()
    store.devices.add_profile(DEVICE, make_profile(macs_per_s=4e15))
    for shown in (store.front("one"), store.evaluations("one")):
        assert shown["computational_efficiency"].tolist() == pytest.approx([0.5])


def test_the_views_are_quick(store: Store) -> None:
    """3,000 candidates, each timed twice, take a fraction of a second by an index; comparing pairs takes minutes."""
    study = make_study(store)
    ids = range(1, 3001)
    with Session(store.engine) as session, session.begin():
        trials = [dict(id=i, study_id=study.study_id) for i in ids]
        session.execute(
            text("INSERT INTO trials (trial_id, number, study_id, state) VALUES (:id, :id, :study_id, 'COMPLETE')"),
            trials,
        )
        candidates = [make_candidate(study, i, i, accuracy=1 / i, latency_ms=float(i)) for i in ids]
        session.add_all(candidates)
        session.flush()
        session.add_all([measured_again(candidate, candidate.latencies[0].median_ms) for candidate in candidates])
    started = time.perf_counter()
    assert len(store.evaluations("one")) == 3000
    assert list(store.front("one")["number"]) == [1]
    assert time.perf_counter() - started < 5


def test_the_latency_on_a_deployment(store: Store) -> None:
    study = make_study(store)
    candidate = add(store, study, 0.5, 1.0)
    store.add_latencies(
        study.study_id, [measured_again(candidate, 2.0), measured_again(candidate, 3.0, batch_size=8, stage="search")]
    )
    (found,) = store.candidates(study.study_id)
    assert [row.median_ms for row in found.latencies] == [1.0, 2.0, 3.0]

    def median_ms(**changes: Any) -> float | None:
        fields = dict(engine="eager", dtype="float32", batch_size=1, resolution=32, threads=1)
        row = found.latency_in(Deployment(study.device_id, **(fields | changes)))  # type: ignore[arg-type]
        return row.median_ms if row else None

    assert median_ms() == 2.0
    assert median_ms(batch_size=8) == 3.0
    assert median_ms(threads=2) is None


def test_latencies_are_added_to_candidates_that_are_there_all_or_none(store: Store) -> None:
    study, other = make_study(store), make_study(store, "other")
    candidate, elsewhere = add(store, study, 0.5, 1.0), add(store, other, 0.5, 1.0)
    store.add_latencies(study.study_id, [measured_again(candidate, 2.0, capped=True)])
    store.add_latencies(study.study_id, [measured_again(candidate, 3.0)])
    store.add_latencies(study.study_id, [])
    final = store.candidates(study.study_id)[0].latencies[1]
    assert (final.median_ms, final.capped) == (3.0, None)
    gone = measured_again(candidate, 9.0, trial_id=10**6)
    for rows in (
        [measured_again(candidate, 9.0), gone],
        [measured_again(candidate, 9.0), measured_again(elsewhere, 9.0)],
    ):
        with pytest.raises(StorageError, match="the study was deleted, or candidates of it"):
            store.add_latencies(study.study_id, rows)
    # Our own mistake is no StorageError.
    with pytest.raises(IntegrityError):
        store.add_latencies(study.study_id, [measured_again(candidate, 9.0, device_id=10**6)])
    assert [row.median_ms for row in store.candidates(study.study_id)[0].latencies] == [1.0, 3.0]
    assert counts(store)["convfirst_latencies"] == 3


def test_whoever_breaks_the_limit_measured_again_is_not_on_the_front(store: Store) -> None:
    study = make_study(store)
    candidate = add(store, study, 0.9, 1.0)
    add(store, study, 0.5, 2.0)
    assert list(store.front("one")["number"]) == [0]
    store.add_latencies(study.study_id, [measured_again(candidate, 1.1, over_limit=True)])
    assert list(store.front("one")["number"]) == [1]
    rows = store.evaluations("one")
    assert rows["latency_over_limit"].tolist() == [True, False]
    # Measured once more, it is within the limit.
    store.add_latencies(study.study_id, [measured_again(candidate, 1.05, over_limit=False)])
    assert list(store.front("one")["number"]) == [0]


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
    store.add_latencies(doomed.study_id, [measured_again(row, 1.0) for row in store.candidates(doomed.study_id)])
    store.devices.add_profile(DEVICE, make_profile())
    store.devices.add_block_latencies(DEVICE, [make_block("a")])
    for study in (doomed, kept):
        store.baselines.add(study.study_id, [make_training("a")])
        store.baselines.add(study.study_id, [make_baseline_latency("a", 1.0, device_id=study.device_id)])
        store.trainings.add(make_candidate_training(store.candidates(study.study_id)[0], 0.5))
    # This storage, like the dashboard's, asks SQLite for no foreign keys.
    optuna.delete_study(study_name="one", storage=optuna.storages.RDBStorage(any_url))
    assert store.find_study("one") is None
    # What was measured of the device does not belong to the study.
    assert counts(store) == {
        "convfirst_baseline_latencies": 1, "convfirst_baseline_trainings": 1, "convfirst_block_latencies": 1,
        "convfirst_candidates": 2, "convfirst_devices": 1, "convfirst_latencies": 2, "convfirst_profiles": 1,
        "convfirst_studies": 1, "convfirst_trainings": 3,
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
    """The process that made it was killed between Optuna's row and ours."""
    optuna.create_study(study_name="one", storage=store.optuna_storage, directions=["maximize", "minimize"])
    assert store.find_study("one") is None
    optuna.create_study(study_name="single", storage=store.optuna_storage)
    with pytest.raises(StorageError, match="'single' was made by another program"):
        store.find_study("single")
    add(store, make_study(store), 0.5, 1.0)
    assert len(store.front("one")) == 1


def test_a_whole_search_runs_on_either(any_url: str) -> None:
    config = SearchConfig(budget=8, storage=any_url)
    assert search.run(config, FakeEvaluator()).complete == 8
    assert search.run(replace(config, budget=11), FakeEvaluator()).complete == 11


def test_readers_neither_disturb_a_search_nor_wait_for_it(sqlite_url: str) -> None:
    """A dashboard polls while a search writes: no trial fails, and nobody meets a lock."""
    # So long that there are enough polls on any machine.
    config = SearchConfig(budget=100, storage=sqlite_url, sampler="random", early_stopping=False)
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
        assert search.run(config, FakeEvaluator()).complete == 100
    finally:
        done.set()
        thread.join()
    assert not errors
    assert polls > 20
