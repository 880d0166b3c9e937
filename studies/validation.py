"""What stands beside a study's candidates: their trainings, and baselines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sqlalchemy import Engine, select
from sqlalchemy.exc import IntegrityError

from studies.errors import StorageError
from studies.reconnecting import repeatable
from studies.sql import read_view, transaction, transaction_on, upsert
from studies.tables import BaselineLatency, BaselineTraining, Candidate, CandidateTraining, TrainingStage

if TYPE_CHECKING:
    import pandas as pd


class Baselines:
    """Trainings and latencies of networks that studies' candidates are compared with."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def add(self, study_id: int, rows: Sequence[BaselineTraining] | Sequence[BaselineLatency]) -> None:
        """Write trainings or latencies of baselines in the place of any older ones, all or nothing.

        Raises:
            StorageError: the study was deleted meanwhile.
        """
        with transaction_on(self.engine, study_id) as session:
            for row in rows:
                row.study_id = study_id
            upsert(session, type(rows[0]), rows)

    def trainings(self, study_id: int) -> list[BaselineTraining]:
        """All trainings of a study's baselines, in the order in which they were first made."""
        query = select(BaselineTraining).where(BaselineTraining.study_id == study_id)
        with transaction(self.engine) as session:
            return list(session.scalars(query.order_by(BaselineTraining.baseline_training_id)))

    def latencies(self, study_id: int) -> list[BaselineLatency]:
        """All latencies of a study's baselines, in the order in which they were first measured."""
        query = select(BaselineLatency).where(BaselineLatency.study_id == study_id)
        with transaction(self.engine) as session:
            return list(session.scalars(query.order_by(BaselineLatency.baseline_latency_id)))


class Trainings:
    """Trainings of studies' candidates: those of the searches, and later ones."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @repeatable
    def add(self, row: CandidateTraining) -> None:
        """Write a training of a candidate, in the place of an older one of the same stage with the same settings.

        Raises:
            StorageError: the candidate was deleted meanwhile.
        """
        try:
            with transaction(self.engine) as session:
                upsert(session, CandidateTraining, [row])
        except IntegrityError as error:
            raise StorageError("the study was deleted, or candidates of it") from error

    @repeatable
    def of_study(self, study_id: int, stage: TrainingStage) -> list[CandidateTraining]:
        """The trainings of a study's candidates in one stage, failed ones too, in the order in which they were made."""
        query = select(CandidateTraining).join(Candidate, Candidate.trial_id == CandidateTraining.trial_id)
        query = query.where(Candidate.study_id == study_id, CandidateTraining.stage == stage)
        with transaction(self.engine) as session:
            return list(session.scalars(query.order_by(CandidateTraining.training_id)))

    def retrained(self, name: str) -> pd.DataFrame:
        """The rows of one study in the view `convfirst_retrained`, fastest first."""
        query = "SELECT * FROM convfirst_retrained WHERE study_name = :name ORDER BY latency_ms, number"
        return read_view(self.engine, query, name)
