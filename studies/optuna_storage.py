"""Optuna's storage, which reads a long study and writes a trial in a fraction of the time."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import (
    StudyDirectionModel,
    StudyModel,
    StudySystemAttributeModel,
    StudyUserAttributeModel,
    TrialIntermediateValueModel,
    TrialModel,
    TrialParamModel,
    TrialSystemAttributeModel,
    TrialUserAttributeModel,
    TrialValueModel,
)
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import insert, or_, select
from sqlalchemy.orm import Session

from studies.errors import StorageError
from studies.reconnecting import repeatable
from studies.sql import insert_into, transaction

# Rows that are fetched at once.
AT_ONCE = 10_000

# A study has a handful of distributions, and each is stored with every value that was drawn from it.
_distribution = functools.lru_cache(json_to_distribution)


class OptunaStorage(RDBStorage):
    """Optuna's storage of a database, with a statement for each table where Optuna sends many.

    To read trials, Optuna makes an object of each row, parses the distribution of each parameter twice, and sends a
    statement for each table and 500 trials: for 11,000 trials of 18 parameters that took the processor 11 s, and this
    1 s. To write a new one, Optuna sends three statements for each parameter and two for each attribute. Optuna also
    makes an object of each attribute of a study, of which there are two or more for each trial that has a note.
    """

    # What a search calls of Optuna's own methods, all of which do no harm when they are called again.
    create_new_study = repeatable(RDBStorage.create_new_study)
    get_study_directions = repeatable(RDBStorage.get_study_directions)
    get_study_id_from_name = repeatable(RDBStorage.get_study_id_from_name)
    get_study_system_attrs = repeatable(RDBStorage.get_study_system_attrs)
    get_trial = repeatable(RDBStorage.get_trial)
    set_study_system_attr = repeatable(RDBStorage.set_study_system_attr)
    set_trial_system_attr = repeatable(RDBStorage.set_trial_system_attr)

    def get_all_studies(self) -> list[FrozenStudy]:
        with transaction(self.engine) as session:
            directions: dict[int, list[StudyDirection]] = {}
            query = select(StudyDirectionModel.study_id, StudyDirectionModel.direction)
            for study_id, direction in session.execute(query.order_by(StudyDirectionModel.objective)):
                directions.setdefault(study_id, []).append(direction)

            def attributes(order: Any) -> dict[int, dict[str, Any]]:
                """The attributes of each study."""
                found: dict[int, dict[str, Any]] = {}
                model = order.class_
                query = select(model.study_id, model.key, model.value_json).order_by(order)
                for study_id, key, text in _rows(session, query):
                    found.setdefault(study_id, {})[key] = json.loads(text)
                return found

            user = attributes(StudyUserAttributeModel.study_user_attribute_id)
            system = attributes(StudySystemAttributeModel.study_system_attribute_id)
            rows = session.execute(select(StudyModel.study_id, StudyModel.study_name).order_by(StudyModel.study_id))
            return [
                FrozenStudy(
                    name, None, user.get(study_id, {}), system.get(study_id, {}), study_id,
                    directions=directions.get(study_id, []),
                )
                for study_id, name in rows
            ]  # fmt: skip

    def get_trial_number_from_id(self, trial_id: int) -> int:
        with transaction(self.engine) as session:
            number = session.scalar(select(TrialModel.number).where(TrialModel.trial_id == trial_id))
        if number is None:
            raise KeyError(f"there is no trial of the id {trial_id}")
        return int(number)

    @repeatable
    def add_trial(self, study_id: int, number: int, trial: FrozenTrial) -> int:
        """Add a trial as that of a number, and return its id. If this very trial is there already, it stays alone.

        Raises:
            StorageError: another program adds trials, too.
        """
        with transaction(self.engine) as session:
            # The number is a count of the trials that are there: nobody else may add one meanwhile.
            StudyModel.find_or_raise_by_id(study_id, session, for_update=True)
            row: Any = self._get_prepared_new_trial(study_id, trial, session)
            trial_id, is_next = int(row.trial_id), row.number == number
            if not is_next:
                session.rollback()
        return trial_id if is_next else self._find_trial(study_id, number, trial)

    def _find_trial(self, study_id: int, number: int, trial: FrozenTrial) -> int:
        """The id of a trial that was added by an attempt of which no answer came.

        Raises:
            StorageError: the trial of that number is another.
        """
        with contextlib.suppress(KeyError):
            trial_id = self.get_trial_id_from_study_id_trial_number(study_id, number)
            found = self.get_trial(trial_id)
            # To the microsecond, no other trial began at the same time.
            if (found.datetime_start, found.user_attrs) == (trial.datetime_start, trial.user_attrs):
                return trial_id
        raise StorageError(f"another program adds trials to the study {self.get_study_name_from_id(study_id)!r}")

    @repeatable
    def finish_trial(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> None:
        """Finish a trial, unless it is finished in this way already."""
        try:
            self.set_trial_state_values(trial_id, state, values)
        except UpdateFinishedTrialError:
            found = self.get_trial(trial_id)
            if (found.state, found.values) != (state, values):
                raise

    @repeatable
    def set_study_system_attrs(self, study_id: int, attrs: Mapping[str, Any]) -> None:
        """Set several attributes of a study, all or none."""
        with transaction(self.engine) as session:
            StudyModel.find_or_raise_by_id(study_id, session)
            _write_attributes(session, StudySystemAttributeModel, {"study_id": study_id}, attrs)

    @repeatable
    def set_trial_user_attrs(self, trial_id: int, attrs: Mapping[str, Any]) -> None:
        """Set several attributes of a trial that is not finished, all or none."""
        with transaction(self.engine) as session:
            trial: Any = TrialModel.find_or_raise_by_id(trial_id, session)
            self.check_trial_is_updatable(trial_id, trial.state)
            _write_attributes(session, TrialUserAttributeModel, {"trial_id": trial_id}, attrs)

    def _get_prepared_new_trial(
        self, study_id: int, template_trial: FrozenTrial | None, session: Session
    ) -> TrialModel:
        # This is the part of `create_new_trial` that writes; the other parts lock the study, and try again, which may
        # add a trial twice: a search calls `add_trial`.
        if template_trial is None or template_trial.values or template_trial.intermediate_values:
            return super()._get_prepared_new_trial(study_id, template_trial, session)
        trial: Any = TrialModel(
            study_id=study_id, number=None, state=template_trial.state, datetime_start=template_trial.datetime_start,
            datetime_complete=template_trial.datetime_complete,
        )  # fmt: skip
        session.add(trial)
        session.flush()
        params = [
            {
                "trial_id": trial.trial_id, "param_name": name, "distribution_json": distribution_to_json(distribution),
                "param_value": distribution.to_internal_repr(template_trial.params[name]),
            }
            for name, distribution in template_trial.distributions.items()
        ]  # fmt: skip
        if params:
            session.execute(insert(TrialParamModel), params)
        owner = {"trial_id": trial.trial_id}
        _write_attributes(session, TrialUserAttributeModel, owner, template_trial.user_attrs)
        _write_attributes(session, TrialSystemAttributeModel, owner, template_trial.system_attrs)
        trial.number = trial.count_past_trials(session)
        made: TrialModel = trial
        return made

    @repeatable
    def _get_trials(
        self, study_id: int, states: Container[TrialState] | None, included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:  # fmt: skip
        # All of Optuna's ways to read many trials, also through its cache, end in the method of this name.
        wanted = [TrialModel.study_id == study_id]
        if states is not None:
            wanted.append(TrialModel.state.in_([state for state in TrialState if state in states]))
        if trial_id_greater_than > -1:
            # The cache asks for what is newer than its last finished trial, and for what was running then.
            older = [trial_id for trial_id in included_trial_ids if trial_id <= trial_id_greater_than]
            wanted.append(or_(TrialModel.trial_id > trial_id_greater_than, TrialModel.trial_id.in_(older)))
        with Session(self.engine) as session:
            StudyModel.find_or_raise_by_id(study_id, session)
            rows = session.scalars(select(TrialModel).where(*wanted).order_by(TrialModel.trial_id))
            trials = {trial._trial_id: trial for trial in map(_without_details, rows)}

            def details(order: Any, *columns: Any) -> Any:
                """The rows of a table that refers to trials: the trial's id, and some columns."""
                model = order.class_
                query = select(model.trial_id, *columns).join(TrialModel, TrialModel.trial_id == model.trial_id)
                for row in _rows(session, query.where(*wanted).order_by(order)):
                    # A trial may have been added since these were read.
                    if row[0] in trials:
                        yield row

            # A parameter has a handful of values.
            known: dict[tuple[str, float], tuple[BaseDistribution, Any]] = {}
            param = TrialParamModel
            for trial_id, name, value, text in details(
                param.param_id, param.param_name, param.param_value, param.distribution_json
            ):
                found = known.get((text, value))
                if found is None:
                    distribution = _distribution(text)
                    found = known[text, value] = distribution, distribution.to_external_repr(value)
                trial = trials[trial_id]
                trial.distributions[name], trial.params[name] = found
            objective = TrialValueModel
            for trial_id, value, kind in details(objective.objective, objective.value, objective.value_type):
                trial = trials[trial_id]
                trial.values = [*(trial.values or ()), objective.stored_repr_to_value(value, kind)]
            user = TrialUserAttributeModel
            for trial_id, key, text in details(user.trial_user_attribute_id, user.key, user.value_json):
                trials[trial_id].user_attrs[key] = json.loads(text)
            system = TrialSystemAttributeModel
            for trial_id, key, text in details(system.trial_system_attribute_id, system.key, system.value_json):
                trials[trial_id].system_attrs[key] = json.loads(text)
            step = TrialIntermediateValueModel
            for trial_id, number, value, kind in details(
                step.step, step.step, step.intermediate_value, step.intermediate_value_type
            ):
                trials[trial_id].intermediate_values[number] = step.stored_repr_to_intermediate_value(value, kind)
        return list(trials.values())


def _rows(session: Session, query: Any) -> Iterator[Any]:
    """The rows of a query, in less time than the session takes, which asks for one after the other."""
    for rows in session.connection().execute(query).partitions(AT_ONCE):
        yield from rows


def _without_details(row: TrialModel) -> FrozenTrial:
    """The trial of a row, without what other tables hold of it."""
    fields: Any = row
    return FrozenTrial(
        number=fields.number, state=fields.state, value=None, values=None, datetime_start=fields.datetime_start,
        datetime_complete=fields.datetime_complete, params={}, distributions={}, user_attrs={}, system_attrs={},
        intermediate_values={}, trial_id=fields.trial_id,
    )  # fmt: skip


def _write_attributes(session: Session, model: Any, owner: dict[str, int], attrs: Mapping[str, Any]) -> None:
    """Write attributes in the place of any older ones.

    Args:
        owner: the column that names the study or the trial of the attributes, with its value.
    """
    if not attrs:
        return
    rows = [{**owner, "key": key, "value_json": json.dumps(value)} for key, value in attrs.items()]
    query = insert_into(session)(model).values(rows)
    replaced = {"value_json": query.excluded.value_json}
    session.execute(query.on_conflict_do_update(index_elements=[*owner, "key"], set_=replaced))
