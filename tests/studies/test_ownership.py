"""The ownership of studies, on SQLite and PostgreSQL alike."""

from __future__ import annotations

from dataclasses import replace

import optuna
import pytest

from studies import Owner, StorageError, Store
from tests.studies.rows import make_study


def test_one_of_two_processes_gets_a_study(store: Store) -> None:
    study = make_study(store)
    me = Owner.me()
    stranger = replace(me, host="elsewhere")
    store.ownership.claim(study.study_id, stranger)
    with pytest.raises(StorageError, match=f"process {me.pid} on elsewhere .*--take-over"):
        store.ownership.claim(study.study_id, me)
    store.ownership.release(study.study_id, me)
    with pytest.raises(StorageError, match="elsewhere"):
        store.ownership.claim(study.study_id, me)
    store.ownership.disown(study.study_id)
    store.ownership.claim(study.study_id, me)
    store.ownership.disown(study.study_id)
    store.ownership.claim(study.study_id, me)
    store.ownership.release(study.study_id, me)
    store.ownership.claim(study.study_id, stranger)


def test_a_dead_owners_study_is_taken_once(store: Store) -> None:
    study = make_study(store)
    me = Owner.me()
    dead = replace(me, started=me.started - 1000)
    store.ownership.claim(study.study_id, dead)
    store.ownership.claim(study.study_id, me)
    with pytest.raises(StorageError, match="searched by process"):
        store.ownership.claim(study.study_id, dead)


def test_a_study_that_was_claimed_meanwhile_is_not_disowned(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two that take over the same study at once, the second takes nothing away from the first."""
    study = make_study(store)
    me = Owner.me()
    store.ownership.claim(study.study_id, replace(me, host="vanished"))

    def claimed_now(text_: str) -> Owner:
        monkeypatch.undo()
        store.ownership.disown(study.study_id)
        store.ownership.claim(study.study_id, me)
        return Owner.parse(text_)

    monkeypatch.setattr(Owner, "parse", claimed_now)
    store.ownership.disown(study.study_id)
    store.ownership.require(study.study_id, me)


def test_whoever_is_not_the_owner_is_told_why(store: Store) -> None:
    study = make_study(store)
    me = Owner.me()
    store.ownership.claim(study.study_id, me)
    store.ownership.require(study.study_id, me)
    with pytest.raises(StorageError, match="taken over by another process"):
        store.ownership.require(study.study_id, replace(me, pid=me.pid + 1))
    optuna.delete_study(study_name="one", storage=store.optuna_storage)
    with pytest.raises(StorageError, match="deleted while it was searched"):
        store.ownership.require(study.study_id, me)
