"""Baselines and longer trainings, on SQLite and PostgreSQL alike."""

from __future__ import annotations

import optuna
import pytest

from studies import StorageError, Store, TrainingStage
from studies.sql import read_view
from tests.studies.rows import (
    OTHER_DEVICE,
    add,
    counts,
    make_baseline_latency,
    make_candidate_training,
    make_study,
    make_training,
)


def test_baselines_stand_beside_the_candidates(store: Store) -> None:
    """A study has one row for each contender and schedule, and one for each deployment; the newest counts."""
    one, two = make_study(store), make_study(store, "two")
    add(store, one, 0.5, 1.0)
    store.baselines.add(one.study_id, [make_training("a", accuracy=0.1), make_training("a", learning_rate=0.1 + 0.2)])
    store.baselines.add(one.study_id, [make_training("a", accuracy=None, loss=None, curve=None, reason="it diverged")])
    for changes in (dict(steps=400), dict(resolution=64), dict(batch_size=64), dict(name="trial 0", trial=0)):
        store.baselines.add(one.study_id, [make_training(**({"name": "a"} | changes))])
    store.baselines.add(two.study_id, [make_training("a", accuracy=0.9)])
    first, *rest = store.baselines.trainings(one.study_id)
    assert (first.accuracy, first.loss, first.curve, first.reason) == (None, None, None, "it diverged")
    assert (first.params, first.macs) == (10**10, 10**12)
    assert [row.learning_rate for row in rest] == [0.1 + 0.2, 1e-3, 1e-3, 1e-3, 1e-3]
    assert rest[-1].trial == 0
    assert [row.accuracy for row in store.baselines.trainings(two.study_id)] == [0.9]

    device = one.device_id
    store.baselines.add(one.study_id, [make_baseline_latency("a", 1.0, device_id=device)])
    elsewhere = make_baseline_latency("a", 3.0, device_id=store.devices.id_of(OTHER_DEVICE))
    failed = make_baseline_latency("a", None, device_id=device, reason="it does not compile")
    store.baselines.add(one.study_id, [elsewhere, failed])
    store.baselines.add(two.study_id, [make_baseline_latency("a", 4.0, device_id=device)])
    rows = store.baselines.latencies(one.study_id)
    assert [(row.median_ms, row.reason) for row in rows] == [(None, "it does not compile"), (3.0, None)]
    # They are neither among the candidates nor in the sampler's history.
    assert len(store.candidates(one.study_id)) == len(store.load_optuna_study("one").trials) == 1
    assert list(store.front("one")["number"]) == [0]


def test_longer_trainings_have_a_front_of_their_own(store: Store) -> None:
    """Each kind has one; the newest of a kind counts, and a failed training has no accuracy."""
    study = make_study(store)
    rows = [add(store, study, accuracy, ms) for accuracy, ms in ((0.5, 1.0), (0.4, 2.0), (0.6, 3.0), (0.7, 4.0))]
    for row, accuracy in zip(rows, (0.1, 0.8, 0.9, 0.85), strict=True):
        store.trainings.add(make_candidate_training(row, accuracy))
    store.trainings.add(make_candidate_training(rows[0], 0.7))
    store.trainings.add(make_candidate_training(rows[0], 0.2, steps=1600))
    store.trainings.add(make_candidate_training(rows[1], 0.1, steps=1600))
    store.trainings.add(make_candidate_training(rows[2], None, reason="the loss diverged", steps=1600))
    assert list(store.front("one")["number"]) == [0, 2, 3]
    front = read_view(store.engine, "SELECT * FROM retrained_front WHERE study_name = :name", "one")
    found = list(zip(front["number"], front["retrained_steps"], front["retrained_accuracy"], strict=True))
    assert sorted(found) == [(0, 800, 0.7), (0, 1600, 0.2), (1, 800, 0.8), (2, 800, 0.9)]
    assert len(store.trainings.retrained("one")) == 6
    # The proxy's accuracies stay beside them.
    assert set(store.trainings.retrained("one")["accuracy"]) == {0.5, 0.4, 0.6, 0.7}
    assert len(store.trainings.of_study(study.study_id, TrainingStage.RETRAINING)) == 7
    assert store.trainings.of_study(make_study(store, "two").study_id, TrainingStage.RETRAINING) == []


def test_a_longer_training_of_a_candidate_that_is_gone_is_refused(store: Store) -> None:
    row = add(store, make_study(store), 0.5, 1.0)
    optuna.delete_study(study_name="one", storage=store.optuna_storage)
    with pytest.raises(StorageError, match="the study was deleted"):
        store.trainings.add(make_candidate_training(row, 0.5))
    assert counts(store)["convfirst_trainings"] == 0


def test_baselines_of_a_study_that_is_gone_are_refused(store: Store) -> None:
    study = make_study(store)
    optuna.delete_study(study_name="one", storage=store.optuna_storage)
    with pytest.raises(StorageError, match="the study was deleted"):
        store.baselines.add(study.study_id, [make_training("a")])
    with pytest.raises(StorageError, match="the study was deleted"):
        store.baselines.add(study.study_id, [make_baseline_latency("a", 1.0, device_id=study.device_id)])
    assert counts(store)["convfirst_baseline_trainings"] == counts(store)["convfirst_baseline_latencies"] == 0
