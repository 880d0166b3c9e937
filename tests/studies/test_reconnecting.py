"""What a search does to its database can be done twice, as after a commit whose answer was lost."""

from __future__ import annotations

from typing import Any

import pytest
from optuna.distributions import IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError, OperationalError

from studies import Owner, StorageError, Store, keep_connecting
from studies.reconnecting import MOST_LOSSES, repeatable
from tests.studies.rows import add, counts, make_candidate, make_study


def new_trial(state: TrialState = TrialState.RUNNING) -> FrozenTrial:
    return create_trial(
        state=state, params={"width": 8}, distributions={"width": IntDistribution(8, 16)}, user_attrs={"arch": "a"}
    )


def test_a_trial_that_is_there_is_not_added_again(store: Store) -> None:
    study_id, storage = make_study(store).study_id, store.optuna_storage
    for number, state in enumerate((TrialState.RUNNING, TrialState.PRUNED)):
        trial = new_trial(state)
        assert storage.add_trial(study_id, number, trial) == storage.add_trial(study_id, number, trial)
    assert [trial.number for trial in storage.get_all_trials(study_id)] == [0, 1]


def test_another_programs_trial_is_not_taken_for_ones_own(store: Store) -> None:
    study_id, storage = make_study(store).study_id, store.optuna_storage
    storage.add_trial(study_id, 0, new_trial())
    for number in (0, 2):
        # It is the same but for the time at which it began; or the one before it is missing.
        with pytest.raises(StorageError, match="another program adds trials to the study 'one'"):
            storage.add_trial(study_id, number, new_trial())
    assert [trial.number for trial in storage.get_all_trials(study_id)] == [0]


def test_a_trial_is_finished_once_in_one_way(store: Store) -> None:
    study_id, storage = make_study(store).study_id, store.optuna_storage
    complete, failed = (storage.add_trial(study_id, number, new_trial()) for number in range(2))
    for _ in range(2):
        storage.finish_trial(complete, TrialState.COMPLETE, [0.1, 2.0])
        storage.finish_trial(failed, TrialState.FAIL)
    for state, values in ((TrialState.COMPLETE, [0.1, 3.0]), (TrialState.PRUNED, None)):
        with pytest.raises(UpdateFinishedTrialError):
            storage.finish_trial(complete, state, values)
    assert [trial.values for trial in storage.get_all_trials(study_id)] == [[0.1, 2.0], None]


def test_a_candidate_is_written_once(store: Store) -> None:
    study = make_study(store)
    candidate = add(store, study, 0.5, 1.0)
    before = counts(store)
    store.add_candidate(make_candidate(study, candidate.trial_id, candidate.number, 0.5, 1.0), Owner.me())
    assert counts(store) == before
    with pytest.raises(IntegrityError):
        store.add_candidate(
            make_candidate(study, candidate.trial_id, candidate.number, 0.5, 1.0, arch_id="other"), Owner.me()
        )


def test_a_second_attempt_does_not_keep_the_ids_of_the_first(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that crashed may give them to other rows, which then could not be written."""
    study = make_study(store)
    trial_id = store.optuna_storage.add_trial(study.study_id, 0, new_trial())
    candidate = make_candidate(study, trial_id, 0, 0.5, 1.0)
    # The study is not claimed: the transaction is rolled back after its rows were sent.
    with pytest.raises(StorageError, match="taken over"):
        store.add_candidate(candidate, Owner.me())
    given = 7
    candidate.latencies[0].latency_id = given
    add(store, study, 0.6, 2.0)
    with store.engine.begin() as connection:
        connection.execute(text(f"UPDATE convfirst_latencies SET latency_id = {given}"))
    store.add_candidate(candidate, Owner.me())
    assert len(store.candidates(study.study_id)) == 2


@pytest.mark.postgres
def test_a_study_of_which_no_answer_came_is_ones_own(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(postgres_url, create=True)
    assert store is not None
    write = Store._add_study

    def twice(self: Store, *arguments: Any) -> Any:
        write(self, *arguments)
        return write(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "_add_study", twice)
        made, found = make_study(store), store.find_study("one")
    assert found is not None
    assert (made.study_id, made.created_at) == (found.study_id, found.created_at)
    with pytest.raises(StorageError, match="just been made by another process"):
        make_study(store)
    store.close()


class Losing:
    """Loses its connection so many times."""

    def __init__(self, store: Store, losses: int, **error: Any) -> None:
        self.engine = store.engine
        self.left, self.calls, self.error = losses, 0, error

    @repeatable
    def work(self) -> int:
        self.calls += 1
        if self.calls <= self.left:
            raise StorageError("lost") from OperationalError("COMMIT", {}, Exception("gone"), **self.error)
        return self.calls


LOST = {"connection_invalidated": True}


@pytest.mark.parametrize(
    ("losses", "error", "patient", "calls"),
    [
        (3, LOST, True, 4),
        (MOST_LOSSES, LOST, True, MOST_LOSSES + 1),
        (MOST_LOSSES + 1, LOST, True, MOST_LOSSES + 1),
        (3, LOST, False, 1),
        (3, {}, True, 1),
    ],
    ids=["some", "many", "too many", "another command", "another error"],
)
def test_what_is_repeated(
    store: Store, losses: int, error: dict[str, Any], patient: bool, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("studies.reconnecting.RETRY_S", 0.0)
    if patient:
        keep_connecting(store.engine, lambda line: None)
    if store.engine.name == "sqlite":
        # There is no server to wait for.
        calls = 1
    losing = Losing(store, losses, **error)
    if calls > losses:
        assert losing.work() == calls
    else:
        with pytest.raises(StorageError, match="lost"):
            losing.work()
    assert losing.calls == calls
