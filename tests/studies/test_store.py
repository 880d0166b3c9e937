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
from sqlalchemy import create_engine, inspect, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from nas.config import SearchConfig
from nas.lab.invented import FakeEvaluator
from nas.pareto import front
from nas.search import loop as search
from studies import (
    BaselineLatency,
    BaselineTraining,
    BlockLatency,
    Candidate,
    CandidateState,
    CurvePoint,
    Latency,
    LatencyStage,
    Owner,
    Profile,
    Retraining,
    StorageError,
    Store,
    Study,
    schema,
)

DEVICE = dict(kind="cpu", name="a CPU", driver="d", torch="2.11.0", triton="3.6.0")
OTHER_DEVICE = DEVICE | dict(name="a GPU", kind="cuda")
OURS = {
    "convfirst_alembic_version", "convfirst_baseline_latencies", "convfirst_baseline_trainings",
    "convfirst_block_latencies", "convfirst_candidates", "convfirst_devices",
    "convfirst_latencies", "convfirst_learning_curves", "convfirst_profiles", "convfirst_retrainings",
    "convfirst_studies",
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


def make_latency(median_ms: float, **fields: Any) -> Latency:
    return Latency(
        median_ms=median_ms, p20_ms=median_ms, p80_ms=median_ms, repeats=10, raw_median_ms=median_ms,
        anchor_median_ms=1.0, weight_bytes=2**40, workspace_bytes=5, **fields,
    )  # fmt: skip


def measured_again(candidate: Candidate, median_ms: float, **changes: Any) -> Latency:
    """The final latency of a candidate in the deployment of its first."""
    first = candidate.latencies[0]
    deployment = {name: getattr(first, name) for name in ("engine", "dtype", "batch_size", "resolution", "threads")}
    fields = deployment | dict(trial_id=candidate.trial_id, device_id=first.device_id, stage=LatencyStage.FINAL)
    return make_latency(median_ms, **(fields | changes))


def make_profile(**changes: Any) -> Profile:
    fields = dict(
        dtype="float32", threads=1, copy_bytes_per_s=1e12, macs_per_s=4e15, launch_seconds=1e-6,
        network_yardstick_ms=0.5, product_yardstick_ms=0.7, interval_share=0.01,
    )  # fmt: skip
    return Profile(**(fields | changes))


def make_block(shape_id: str, median_ms: float = 1.0, **changes: Any) -> BlockLatency:
    fields = dict(
        engine="eager", dtype="float32", batch_size=1, threads=1, shape_id=shape_id, shape="{}", median_ms=median_ms,
        p20_ms=median_ms, p80_ms=median_ms, repeats=10, interval_share=0.01, capped=False,
    )  # fmt: skip
    return BlockLatency(**(fields | changes))


def make_training(name: str, **changes: Any) -> BaselineTraining:
    fields = dict(
        name=name, resolution=128, steps=800, batch_size=32, learning_rate=1e-3, kind="timm", summary=name,
        params=10**10, macs=10**12, classes=10, accuracy=0.5, loss=1.0, curve="[]", train_seconds=1.0,
    )  # fmt: skip
    return BaselineTraining(**(fields | changes))


def make_baseline_latency(name: str, median_ms: float | None, **changes: Any) -> BaselineLatency:
    fields = dict(
        name=name, engine="eager", dtype="float32", batch_size=1, resolution=128, threads=1, median_ms=median_ms,
        p20_ms=median_ms, p80_ms=median_ms, repeats=10, interval_share=0.01, capped=False,
    )  # fmt: skip
    return BaselineLatency(**(fields | changes))


def make_retraining(candidate: Candidate, accuracy: float | None, **changes: Any) -> Retraining:
    fields = dict(
        trial_id=candidate.trial_id, data="digits", data_fingerprint="f", resolution=32, steps=800, batch_size=32,
        learning_rate=8e-3, seed=0, accuracy=accuracy, loss=1.0, train_seconds=2.0,
    )  # fmt: skip
    return Retraining(**(fields | changes))


def make_candidate(
    study: Study, trial_id: int, number: int, accuracy: float | None, latency_ms: float | None, **changes: Any
) -> Candidate:
    """Complete unless `changes` say otherwise."""
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
        candidate.latencies = [make_latency(latency_ms, **deployment)]
    candidate.curve = [CurvePoint(step=step, train_loss=1.0, train_accuracy=0.5, seconds=1.0) for step in (1, 2)]
    return candidate


def add(store: Store, study: Study, accuracy: float | None, latency_ms: float | None, **changes: Any) -> Candidate:
    """A candidate with a trial of Optuna's."""
    trial_id = store.optuna_storage.create_new_trial(study.study_id)
    number = store.optuna_storage.get_trial_number_from_id(trial_id)
    candidate = make_candidate(study, trial_id, number, accuracy, latency_ms, **changes)
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
        assert {"pareto_front", "convfirst_evaluations", "convfirst_retrained", "retrained_front"} <= set(
            inspect(store.engine).get_view_names()
        )
        assert schema.current(store.engine) == schema.head()
        if store.find_study("one") is None:
            make_study(store)
        else:
            assert store.find_study("one").anchor_ms == 1.0  # type: ignore[union-attr]
        store.close()


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


def test_the_final_latency_is_shown_with_the_searchs_beside_it(store: Store) -> None:
    study = make_study(store)
    candidate = add(store, study, 0.5, 2.0)
    add(store, study, 0.6, 3.0)
    add(store, study, None, None, state=CandidateState.FAILED)
    final = measured_again(
        candidate, 2.5, interval_share=0.01, capped=True, throttled=False, sm_clock_mhz=1980.0, temperature_c=55.0
    )
    # Of a deployment of its own, and so a row of its own.
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
    """10^12 MACs x 8 images in 4 ms, on a device that does 4 x 10^15 MACs a second: half of it."""
    study = make_study(store)
    add(store, study, 0.5, 4.0, batch_size=8)
    assert store.front("one")["computational_efficiency"].isna().all()
    # Profiles that are not this deployment's.
    for device, profile in (
        (OTHER_DEVICE, make_profile()), (DEVICE, make_profile(dtype="float16")), (DEVICE, make_profile(threads=2)),
    ):  # fmt: skip
        store.add_profile(device, profile)
    assert store.front("one")["computational_efficiency"].isna().all()
    store.add_profile(DEVICE, make_profile(macs_per_s=4e15))
    for shown in (store.front("one"), store.evaluations("one")):
        assert shown["computational_efficiency"].tolist() == pytest.approx([0.5])


def test_the_views_are_quick(store: Store) -> None:
    """3,000 candidates, timed twice each: a fraction of a second by the keys' index, minutes if pairs were compared."""
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
        row = found.latency_on(study.device_id, **(fields | changes))  # type: ignore[arg-type]
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
    # A mistake of ours is none of the database's.
    with pytest.raises(IntegrityError):
        store.add_latencies(study.study_id, [measured_again(candidate, 9.0, device_id=10**6)])
    assert [row.median_ms for row in store.candidates(study.study_id)[0].latencies] == [1.0, 3.0]
    assert counts(store)["convfirst_latencies"] == 3


def test_baselines_stand_beside_the_candidates(store: Store) -> None:
    """One row for each contender and schedule, one for each deployment, of each study; the newest counts."""
    one, two = make_study(store), make_study(store, "two")
    add(store, one, 0.5, 1.0)
    store.add_baselines(one.study_id, [make_training("a", accuracy=0.1), make_training("a", learning_rate=0.1 + 0.2)])
    store.add_baselines(one.study_id, [make_training("a", accuracy=None, loss=None, curve=None, reason="it diverged")])
    for changes in (dict(steps=400), dict(resolution=64), dict(batch_size=64), dict(name="trial 0", trial=0)):
        store.add_baselines(one.study_id, [make_training(**({"name": "a"} | changes))])
    store.add_baselines(two.study_id, [make_training("a", accuracy=0.9)])
    first, *rest = store.baseline_trainings(one.study_id)
    assert (first.accuracy, first.loss, first.curve, first.reason) == (None, None, None, "it diverged")
    assert (first.params, first.macs) == (10**10, 10**12)
    assert [row.learning_rate for row in rest] == [0.1 + 0.2, 1e-3, 1e-3, 1e-3, 1e-3]
    assert rest[-1].trial == 0
    assert [row.accuracy for row in store.baseline_trainings(two.study_id)] == [0.9]

    device = one.device_id
    store.add_baselines(one.study_id, [make_baseline_latency("a", 1.0, device_id=device)])
    elsewhere = make_baseline_latency("a", 3.0, device_id=store.device_id(OTHER_DEVICE))
    failed = make_baseline_latency("a", None, device_id=device, reason="it does not compile")
    store.add_baselines(one.study_id, [elsewhere, failed])
    store.add_baselines(two.study_id, [make_baseline_latency("a", 4.0, device_id=device)])
    rows = store.baseline_latencies(one.study_id)
    assert [(row.median_ms, row.reason) for row in rows] == [(None, "it does not compile"), (3.0, None)]
    # Neither the candidates nor the sampler's history know of them.
    assert len(store.candidates(one.study_id)) == len(store.load_optuna_study("one").trials) == 1
    assert list(store.front("one")["number"]) == [0]


def test_longer_trainings_have_a_front_of_their_own(store: Store) -> None:
    """Each kind of them; the newest of a kind counts, and what failed has no accuracy."""
    study = make_study(store)
    rows = [add(store, study, accuracy, ms) for accuracy, ms in ((0.5, 1.0), (0.4, 2.0), (0.6, 3.0), (0.7, 4.0))]
    for row, accuracy in zip(rows, (0.1, 0.8, 0.9, 0.85), strict=True):
        store.add_retraining(make_retraining(row, accuracy))
    store.add_retraining(make_retraining(rows[0], 0.7))
    store.add_retraining(make_retraining(rows[0], 0.2, steps=1600))
    store.add_retraining(make_retraining(rows[1], 0.1, steps=1600))
    store.add_retraining(make_retraining(rows[2], None, reason="the loss diverged", steps=1600))
    assert list(store.front("one")["number"]) == [0, 2, 3]
    front = store.retrained_front("one")
    found = list(zip(front["number"], front["retrained_steps"], front["retrained_accuracy"], strict=True))
    assert sorted(found) == [(0, 800, 0.7), (0, 1600, 0.2), (1, 800, 0.8), (2, 800, 0.9)]
    assert len(store.retrained("one")) == 6
    # The proxy's stay beside them.
    assert set(store.retrained("one")["accuracy"]) == {0.5, 0.4, 0.6, 0.7}
    assert len(store.retrainings(study.study_id)) == 7
    assert store.retrainings(make_study(store, "two").study_id) == []


def test_a_longer_training_of_a_candidate_that_is_gone_is_refused(store: Store) -> None:
    row = add(store, make_study(store), 0.5, 1.0)
    optuna.delete_study(study_name="one", storage=store.optuna_storage)
    with pytest.raises(StorageError, match="the study was deleted"):
        store.add_retraining(make_retraining(row, 0.5))
    assert counts(store)["convfirst_retrainings"] == 0


def test_baselines_of_a_study_that_is_gone_are_refused(store: Store) -> None:
    study = make_study(store)
    optuna.delete_study(study_name="one", storage=store.optuna_storage)
    with pytest.raises(StorageError, match="the study was deleted"):
        store.add_baselines(study.study_id, [make_training("a")])
    with pytest.raises(StorageError, match="the study was deleted"):
        store.add_baselines(study.study_id, [make_baseline_latency("a", 1.0, device_id=study.device_id)])
    assert counts(store)["convfirst_baseline_trainings"] == counts(store)["convfirst_baseline_latencies"] == 0


def test_a_device_has_one_profile_per_dtype_and_threads(store: Store) -> None:
    assert store.find_profile(DEVICE, "float32", 1) is None
    assert counts(store)["convfirst_devices"] == 0
    first = store.add_profile(DEVICE, make_profile(graph_launch_seconds=1e-7))
    assert first.device.name == "a CPU"
    store.add_profile(DEVICE, make_profile(dtype="float16"))
    # Of two processes that measure it at once the first one's counts, unless it is measured anew.
    assert store.add_profile(DEVICE, make_profile(macs_per_s=3e15)).macs_per_s == first.macs_per_s
    # What was told on the older scale goes with it: no other device's, threads' or dtype's.
    store.add_block_latencies(DEVICE, [make_block("a"), make_block("a", dtype="float16"), make_block("a", threads=2)])
    store.add_block_latencies(OTHER_DEVICE, [make_block("a")])
    again = store.add_profile(DEVICE, make_profile(macs_per_s=5e15), replace=True)
    assert counts(store)["convfirst_block_latencies"] == 3
    assert store.block_latencies(DEVICE, engine="eager", dtype="float32", batch_size=1, threads=1) == {}
    assert again.profile_id == first.profile_id
    assert again.measured_at > first.measured_at
    assert (again.macs_per_s, again.graph_launch_seconds) == (5e15, None)
    found = store.find_profile(DEVICE, "float32", 1)
    assert found is not None
    assert found.macs_per_s == 5e15
    assert store.find_profile(OTHER_DEVICE, "float32", 1) is None
    assert [(row.device.name, row.dtype) for row in store.profiles()] == [("a CPU", "float16"), ("a CPU", "float32")]
    assert store.device_id(DEVICE) == found.device_id
    assert store.device_id(OTHER_DEVICE) != found.device_id


def test_latencies_of_blocks_are_those_of_one_version_of_the_kernels(store: Store) -> None:
    fused = dict(engine="fused", dtype="float16", batch_size=1, threads=1)
    for kernels, median_ms in (("old", 2.0), ("new", 1.0)):
        store.add_block_latencies(DEVICE, [make_block("a", median_ms, kernels=kernels, throttled=True, **fused)])
    for kernels, expected in (("old", [2.0]), ("new", [1.0]), ("", [])):
        found = store.block_latencies(DEVICE, **fused, kernels=kernels)  # type: ignore[arg-type]
        assert [row.median_ms for row in found.values()] == expected
        assert all(row.throttled for row in found.values())


def test_whoever_breaks_the_limit_measured_again_is_not_on_the_front(store: Store) -> None:
    study = make_study(store)
    candidate = add(store, study, 0.9, 1.0)
    add(store, study, 0.5, 2.0)
    assert list(store.front("one")["number"]) == [0]
    store.add_latencies(study.study_id, [measured_again(candidate, 1.1, over_limit=True)])
    assert list(store.front("one")["number"]) == [1]
    rows = store.evaluations("one")
    assert rows["latency_over_limit"].tolist() == [True, False]
    # Measured once more it is within it.
    store.add_latencies(study.study_id, [measured_again(candidate, 1.05, over_limit=False)])
    assert list(store.front("one")["number"]) == [0]


def test_latencies_of_blocks_are_kept_per_deployment(store: Store) -> None:
    here = dict(engine="eager", dtype="float32", batch_size=1, threads=1)
    assert store.block_latencies(DEVICE, **here) == {}  # type: ignore[arg-type]
    assert counts(store)["convfirst_devices"] == 0
    store.add_block_latencies(DEVICE, [make_block("b", 2.0), make_block("a", 1.0), make_block("a", engine="fused")])
    store.add_block_latencies(DEVICE, [make_block("b", 3.0, capped=True), make_block("c", 4.0)])
    store.add_block_latencies(OTHER_DEVICE, [make_block("a", 9.0)])
    with pytest.raises(IntegrityError):
        store.add_block_latencies(DEVICE, [make_block("a", 7.0), make_block("d", shape=None)])
    found = store.block_latencies(DEVICE, **here)  # type: ignore[arg-type]
    assert {name: row.median_ms for name, row in found.items()} == {"a": 1.0, "b": 3.0, "c": 4.0}
    assert found["b"].capped is True
    assert counts(store)["convfirst_block_latencies"] == 5


def test_processes_may_write_the_same_measurements_at_once(any_url: str, store: Store) -> None:
    """In opposite orders, at which PostgreSQL would stop one of them for a deadlock if they locked rows so."""
    names = [f"block{i}" for i in range(20)]
    barrier = threading.Barrier(4)
    errors: list[BaseException] = []

    def write(order: int) -> None:
        try:
            mine = Store.open(any_url, create=True)
            assert mine is not None
            barrier.wait()
            for turn in range(5):
                device = DEVICE | dict(driver=str(turn))
                mine.add_profile(device, make_profile())
                mine.add_block_latencies(device, [make_block(name) for name in names[::order]])
            mine.close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(order,)) for order in (1, -1, 1, -1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    found = counts(store)
    assert (found["convfirst_devices"], found["convfirst_profiles"]) == (5, 5)
    assert found["convfirst_block_latencies"] == 100


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
    store.add_profile(DEVICE, make_profile())
    store.add_block_latencies(DEVICE, [make_block("a")])
    for study in (doomed, kept):
        store.add_baselines(study.study_id, [make_training("a")])
        store.add_baselines(study.study_id, [make_baseline_latency("a", 1.0, device_id=study.device_id)])
        store.add_retraining(make_retraining(store.candidates(study.study_id)[0], 0.5))
    # A storage of its own, which like the dashboard's asks SQLite for no foreign keys.
    optuna.delete_study(study_name="one", storage=optuna.storages.RDBStorage(any_url))
    assert store.find_study("one") is None
    # What was measured of the device is not the study's.
    assert counts(store) == {
        "convfirst_baseline_latencies": 1, "convfirst_baseline_trainings": 1, "convfirst_block_latencies": 1,
        "convfirst_candidates": 2, "convfirst_devices": 1, "convfirst_latencies": 2, "convfirst_learning_curves": 4,
        "convfirst_profiles": 1, "convfirst_retrainings": 1, "convfirst_studies": 1,
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


def test_a_study_that_was_claimed_meanwhile_is_not_disowned(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two that take over the same study at once, the second takes nothing away from the first."""
    study = make_study(store)
    me = Owner.me()
    store.claim(study.study_id, replace(me, host="vanished"))

    def claimed_now(text_: str) -> Owner:
        monkeypatch.undo()
        store.disown(study.study_id)
        store.claim(study.study_id, me)
        return Owner.parse(text_)

    monkeypatch.setattr(Owner, "parse", claimed_now)
    store.disown(study.study_id)
    store.require_owner(study.study_id, me)


def test_whoever_is_not_the_owner_is_told_why(store: Store) -> None:
    study = make_study(store)
    me = Owner.me()
    store.claim(study.study_id, me)
    store.require_owner(study.study_id, me)
    with pytest.raises(StorageError, match="taken over by another process"):
        store.require_owner(study.study_id, replace(me, pid=me.pid + 1))
    optuna.delete_study(study_name="one", storage=store.optuna_storage)
    with pytest.raises(StorageError, match="deleted while it was searched"):
        store.require_owner(study.study_id, me)


def test_three_processes_may_make_a_database_at_once(any_url: str) -> None:
    code = f"from studies import Store; Store.open({any_url!r}, create=True)"
    processes = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert Store.open(any_url, create=False) is not None


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
