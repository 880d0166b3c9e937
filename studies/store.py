"""The study database: studies, their candidates and fronts, and the parts for everything else.

One engine serves Optuna's storage and ours. A candidate's rows are written in one transaction, before Optuna learns of
the result: if the process is killed at any moment, a trial that Optuna holds for running has either its complete row
here or none.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import optuna
from sqlalchemy import func, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, subqueryload

from studies.deployment import Deployment
from studies.devices import Devices
from studies.errors import StorageError, guarded
from studies.opening import OBJECTIVES, open_storage, require_ours
from studies.optuna_storage import OptunaStorage
from studies.ownership import Owner, Ownership, require_owner
from studies.reconnecting import repeatable
from studies.sql import device_row, read_view, transaction, transaction_on, upsert
from studies.tables import Candidate, CandidateLatency, CandidateState, CandidateTraining, Study, TrainingStage, now
from studies.validation import Baselines, Trainings

if TYPE_CHECKING:
    import pandas as pd

METRIC_NAMES_KEY = "study:metric_names"
NOT_CONFIRMED: dict[str, Any] = dict(confirmed_at=None, confirmed_in=None)


@dataclass(frozen=True, slots=True)
class Confirmed:
    """A candidate's accuracy over further trainings; see `tables.Candidate`."""

    trial_id: int
    accuracy: float
    low: float
    high: float
    trainings: int


@dataclass(frozen=True, slots=True)
class StudySummary:
    """A study of ours in a database, and how many candidates of each state it has."""

    name: str
    complete: int
    stopped: int
    over_limit: int
    failed: int
    device: str
    engine: str
    created_at: str


class Store:
    """A study database at any URL that `open` takes.

    Attributes:
        optuna_storage: Optuna's view of the same database.
        ownership: which process searches which study.
        devices: devices, their profiles, and latencies of blocks.
        baselines: networks that candidates are compared with.
        trainings: trainings of candidates.
    """

    def __init__(self, optuna_storage: OptunaStorage) -> None:
        self.optuna_storage = optuna_storage
        self.engine = optuna_storage.engine
        self.ownership = Ownership(self.engine)
        self.devices = Devices(self.engine)
        self.baselines = Baselines(self.engine)
        self.trainings = Trainings(self.engine)

    @classmethod
    def open(cls, url: str, *, create: bool) -> Store | None:
        """Open the database at `url`; see `opening.open_storage` for what is made, returned and raised."""
        storage = open_storage(url, create=create)
        return cls(storage) if storage else None

    def close(self) -> None:
        self.optuna_storage.remove_session()
        self.engine.dispose()

    # -- studies ---------------------------------------------------------------------------------------------------

    @repeatable
    def find_study(self, name: str) -> Study | None:
        """The study of that name.

        Raises:
            StorageError: another program made it.
        """
        with guarded():
            try:
                study_id = self.optuna_storage.get_study_id_from_name(name)
            except KeyError:
                return None
            with transaction(self.engine) as session:
                study = session.get(Study, study_id)
            if study is None:
                trials = self.optuna_storage.get_n_trials(study_id)
                require_ours(name, trials, self.optuna_storage.get_study_directions(study_id))
            return study

    def create_study(
        self, name: str, *, config: str, data_fingerprint: str, versions: str, device: dict[str, str], anchor: str,
        anchor_ms: float, pilot: str | None = None, images: str | None = None,
    ) -> Study:  # fmt: skip
        """Make a study, in Optuna's tables and ours. The fields are those of `tables.Study`."""
        with guarded():
            try:
                study_id = self.optuna_storage.create_new_study([direction for direction, _ in OBJECTIVES], name)
            except optuna.exceptions.DuplicatedStudyError:
                study_id = self.optuna_storage.get_study_id_from_name(name)
            self.optuna_storage.set_study_system_attr(study_id, METRIC_NAMES_KEY, [name for _, name in OBJECTIVES])
        fields = dict(
            study_id=study_id, config=config, data_fingerprint=data_fingerprint, versions=versions, anchor=anchor,
            anchor_ms=anchor_ms, pilot=pilot, images=images, created_at=now(),
        )  # fmt: skip
        try:
            return self._add_study(fields, device)
        except IntegrityError as error:
            study = self.find_study(name)
            # It is this very row if it was written by an attempt of which no answer came.
            if study is None or study.created_at != fields["created_at"]:
                raise StorageError(f"its study {name!r} has just been made by another process") from error
            return study

    @repeatable
    def _add_study(self, fields: dict[str, Any], device: dict[str, str]) -> Study:
        study = Study(**fields)
        with transaction(self.engine) as session:
            study.device = device_row(session, device)
            session.add(study)
        return study

    def load_optuna_study(self, name: str) -> optuna.Study:
        # The sampler is never asked: proposals are made in memory (nas.search.sampling).
        return optuna.load_study(study_name=name, storage=self.optuna_storage, sampler=optuna.samplers.RandomSampler())

    def summaries(self) -> list[StudySummary]:
        """All studies of ours, oldest first."""
        with transaction(self.engine) as session:
            names = {row[0]: row[1] for row in session.execute(text("SELECT study_id, study_name FROM studies"))}
            rows = session.execute(
                select(Candidate.study_id, Candidate.state, func.count()).group_by(Candidate.study_id, Candidate.state)
            ).all()
            per_state = {(study_id, state): count for study_id, state, count in rows}
            return [
                StudySummary(
                    name=names[study.study_id],
                    complete=per_state.get((study.study_id, CandidateState.COMPLETE), 0),
                    stopped=per_state.get((study.study_id, CandidateState.STOPPED), 0),
                    over_limit=per_state.get((study.study_id, CandidateState.OVER_LIMIT), 0),
                    failed=per_state.get((study.study_id, CandidateState.FAILED), 0),
                    device=study.device.name,
                    engine=_engine(json.loads(study.config)["latency"]),
                    created_at=f"{study.created_at:%Y-%m-%d %H:%M}",
                )
                for study in session.scalars(select(Study).order_by(Study.study_id))
            ]

    # -- candidates ------------------------------------------------------------------------------------------------

    @repeatable
    def add_candidate(self, candidate: Candidate, owner: Owner) -> None:
        """Write a candidate with its latencies and its training, all or nothing.

        Raises:
            StorageError: the study was deleted meanwhile, or is no longer `owner`'s.
        """
        # A lost attempt leaves them ids, which a server that crashed may give to other rows.
        for latency in candidate.latencies:
            latency.latency_id = None  # type: ignore[assignment]
        for training in candidate.trainings:
            training.training_id = None  # type: ignore[assignment]
        try:
            with transaction_on(self.engine, candidate.study_id) as session:
                session.add(candidate)
                # Rows are locked in the order in which deleting a study locks them: its trials, then our rows.
                session.flush()
                require_owner(session, candidate.study_id, owner)
                if candidate.state == CandidateState.COMPLETE:
                    # The front may be another one now.
                    session.execute(update(Study).where(Study.study_id == candidate.study_id).values(NOT_CONFIRMED))
        except IntegrityError:
            # Only the owner writes candidates: that of this trial was written by an attempt of which no answer came.
            if not self._has_candidate(candidate):
                raise

    def _has_candidate(self, candidate: Candidate) -> bool:
        with transaction(self.engine) as session:
            stored = session.get(Candidate, candidate.trial_id)
        return stored is not None and stored.arch_id == candidate.arch_id and stored.state == candidate.state

    @repeatable
    def confirm(self, study_id: int, owner: Owner, deployment: Deployment, confirmed: Sequence[Confirmed]) -> None:
        """Write the confirmed accuracies of a study, in the place of any older ones, all or nothing.

        With them `pareto_front` becomes the front of these candidates; without any it is the searched one, as it is in
        other deployments than that whose front was confirmed.

        Raises:
            StorageError: the study was deleted meanwhile, or is no longer `owner`'s.
        """
        with transaction(self.engine) as session:
            columns = ("confirmed_accuracy", "confirmed_low", "confirmed_high", "confirmed_trainings")
            candidates = update(Candidate).where(Candidate.study_id == study_id)
            session.execute(candidates.values(dict.fromkeys(columns)))
            for each in confirmed:
                values = dict(zip(columns, (each.accuracy, each.low, each.high, each.trainings), strict=True))
                session.execute(candidates.where(Candidate.trial_id == each.trial_id).values(values))
            # Rows are locked in the order in which deleting a study locks them: its candidates, then the study.
            require_owner(session, study_id, owner)
            state = dict(confirmed_at=now(), confirmed_in=deployment.key) if confirmed else NOT_CONFIRMED
            session.execute(update(Study).where(Study.study_id == study_id).values(state))

    @repeatable
    def add_latencies(self, study_id: int, rows: Sequence[CandidateLatency]) -> None:
        """Write latencies of candidates that are stored, in the place of any older ones, all or nothing.

        Raises:
            StorageError: the study, or one of the candidates, was deleted meanwhile.
        """
        trial_ids = {row.trial_id for row in rows}
        try:
            with transaction(self.engine) as session:
                upsert(session, CandidateLatency, rows)
                # The candidates are counted last, because from here until the commit nobody can delete them.
                _require_candidates(session, study_id, trial_ids)
        except IntegrityError:
            with transaction(self.engine) as session:
                _require_candidates(session, study_id, trial_ids)
            raise

    @repeatable
    def candidates(self, study_id: int) -> list[Candidate]:
        """All candidates of a study with their latencies, in the order of their trials."""
        query = (
            select(Candidate)
            .where(Candidate.study_id == study_id)
            .options(subqueryload(Candidate.latencies))
            .order_by(Candidate.number)
        )
        with transaction(self.engine) as session:
            return list(session.scalars(query))

    @repeatable
    def learning_curve(self, trial_id: int) -> str | None:
        """The learning curve of a candidate's training in the search, as text; None where there is none."""
        query = select(CandidateTraining.curve).where(
            CandidateTraining.trial_id == trial_id, CandidateTraining.stage == TrainingStage.SEARCH
        )
        with transaction(self.engine) as session:
            return session.scalar(query)

    @repeatable
    def front(self, name: str) -> pd.DataFrame:
        """The rows of one study in the view `pareto_front`, fastest first."""
        query = "SELECT * FROM pareto_front WHERE study_name = :name ORDER BY latency_ms, accuracy DESC, number"
        return read_view(self.engine, query, name)

    @repeatable
    def evaluations(self, name: str) -> pd.DataFrame:
        """The complete rows of one study in the view `convfirst_evaluations`, in the order of their trials."""
        query = "SELECT * FROM convfirst_evaluations WHERE study_name = :name AND state = 'complete' ORDER BY number"
        return read_view(self.engine, query, name)


def _engine(latency: dict[str, str]) -> str:
    """The engine of a stored deployment, with the version of its package where it has one."""
    return latency.get("runtime") or latency["engine"]


def _require_candidates(session: Session, study_id: int, trial_ids: set[int]) -> None:
    query = select(func.count()).where(Candidate.study_id == study_id, Candidate.trial_id.in_(trial_ids))
    if session.scalar(query) != len(trial_ids):
        raise StorageError("the study was deleted, or candidates of it")
