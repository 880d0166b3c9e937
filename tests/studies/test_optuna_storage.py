"""Trials are read as Optuna itself reads them, on SQLite and PostgreSQL alike."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import RDBStorage, get_storage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from studies import Store
from tests.statements import statements
from tests.studies.rows import make_study

DISTRIBUTIONS = {
    "kind": CategoricalDistribution(("relu", "silu")), "width": IntDistribution(8, 24, step=8),
    "rate": FloatDistribution(1e-3, 1e-1, log=True),
}  # fmt: skip
PARAMS = {"kind": "silu", "width": 16, "rate": 0.01}


def trial(state: TrialState, **fields: Any) -> FrozenTrial:
    return create_trial(state=state, params=PARAMS, distributions=DISTRIBUTIONS, **fields)


TRIALS = (
    trial(TrialState.COMPLETE, values=[0.5, 2.0], user_attrs={"arch": "a", "macs": [1, 2]}),
    trial(TrialState.RUNNING, system_attrs={"constraints:latency_ms": -0.5}),
    trial(TrialState.COMPLETE, values=[float("inf"), float("-inf")]),
    trial(TrialState.PRUNED, intermediate_values={1: 0.25, 2: float("nan"), 3: float("inf")}),
    create_trial(state=TrialState.WAITING),
    create_trial(state=TrialState.FAIL, user_attrs={"reason": "because"}),
)


@pytest.fixture
def study_id(store: Store) -> int:
    """A study of a trial of each kind, between two trials of another study."""
    study, other = make_study(store), make_study(store, "other")
    store.optuna_storage.create_new_trial(other.study_id, TRIALS[0])
    for each in TRIALS:
        store.optuna_storage.create_new_trial(study.study_id, each)
    store.optuna_storage.create_new_trial(other.study_id, TRIALS[1])
    return study.study_id


@pytest.mark.parametrize("states", [None, (TrialState.RUNNING, TrialState.WAITING), (TrialState.COMPLETE,), ()])
@pytest.mark.parametrize("newer_than", ["none", "the second", "all"])
def test_trials_are_read_as_optuna_reads_them(
    store: Store, study_id: int, states: tuple[TrialState, ...] | None, newer_than: str
) -> None:
    ids = [trial._trial_id for trial in RDBStorage._get_trials(store.optuna_storage, study_id, None, set(), -1)]
    known = {"none": -1, "the second": ids[1], "all": ids[-1]}[newer_than]
    arguments: Any = (study_id, states, {ids[1], ids[4]}, known)
    expected = RDBStorage._get_trials(store.optuna_storage, *arguments)
    found = store.optuna_storage._get_trials(*arguments)
    assert repr(found) == repr(expected)
    assert [trial.datetime_start for trial in found] == [trial.datetime_start for trial in expected]
    assert all(isinstance(trial.datetime_start, datetime) for trial in found if trial.state != TrialState.WAITING)


def test_all_of_optunas_readers_use_it(store: Store, study_id: int) -> None:
    storage = store.optuna_storage
    expected = RDBStorage._get_trials(storage, study_id, None, set(), -1)
    for read in (storage, get_storage(storage)):
        with statements() as sent:
            assert repr(read.get_all_trials(study_id)) == repr(expected)
        assert len(sent) == 7, "the study, its trials, and five tables that refer to them"


def test_a_study_that_is_not_there_has_no_trials(store: Store, study_id: int) -> None:
    with pytest.raises(KeyError):
        store.optuna_storage.get_all_trials(1000)


def test_a_long_study_takes_no_more_statements(store: Store, study_id: int) -> None:
    """Optuna sends one more for each table and 500 trials."""
    for _ in range(600):
        store.optuna_storage.create_new_trial(study_id)
    with statements() as sent:
        assert len(store.optuna_storage.get_all_trials(study_id, deepcopy=False)) == 600 + len(TRIALS)
    assert len(sent) == 7


def test_studies_are_read_as_optuna_reads_them(store: Store, study_id: int) -> None:
    storage = store.optuna_storage
    storage.create_new_study([StudyDirection.MINIMIZE], "without attributes")
    storage.set_study_user_attr(study_id, "of the user", {"b": 1, "a": [None, "\u00e9"]})
    storage.set_study_system_attrs(study_id, {f"dashboard:{number}:note_ver": 1 for number in range(3)})
    expected = RDBStorage.get_all_studies(storage)
    for read in (storage, get_storage(storage)):
        assert [vars(study) for study in read.get_all_studies()] == [vars(study) for study in expected]
    assert [study.study_name for study in expected] == ["one", "other", "without attributes"]
