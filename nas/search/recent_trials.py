"""The part of a long study that TPE learns from."""

from __future__ import annotations

import copy
from collections.abc import Container, Sequence

from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

from nas.pareto import GrowingFront, evenly_spaced

# TPE's time grows with the trials that it models: on one core of an AMD EPYC from 24 ms a proposal at 1,000 to 160 ms
# at 10,000. A study of more trials shows it the front and the latest ones. docs/measurements.md compares the results.
MOST_TRIALS = 1000


class RecentTrials(InMemoryStorage):
    """A storage in memory for one study of (accuracy up, latency down), which lists at most `MOST_TRIALS` trials.

    Up to half of them are members of the front of all trials, evenly spaced; the others are the latest. Which they are
    depends on the study alone, and not on when it was opened. Every trial can still be had by its id.
    """

    def __init__(self) -> None:
        super().__init__()
        self.front = GrowingFront()

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        trial_id = super().create_new_trial(study_id, template_trial)
        if template_trial is not None and template_trial.state == TrialState.COMPLETE:
            self._add(trial_id, template_trial.values)
        return trial_id

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        changed = super().set_trial_state_values(trial_id, state, values)
        if changed and state == TrialState.COMPLETE and values is not None:
            self._add(trial_id, values)
        return changed

    def _add(self, trial_id: int, values: Sequence[float]) -> None:
        accuracy, latency_ms = values
        self.front.add(trial_id, accuracy, latency_ms)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        trials = super().get_all_trials(study_id, deepcopy=False)
        if len(trials) > MOST_TRIALS:
            spaced = evenly_spaced(len(self.front), MOST_TRIALS // 2)
            members = [self.get_trial(int(self.front.keys[place])) for place in spaced]
            latest = trials[len(members) - MOST_TRIALS :]
            # A member may be among the latest.
            listed = {trial.number: trial for trial in [*members, *latest]}
            trials = [listed[number] for number in sorted(listed)]
        if states is not None:
            trials = [trial for trial in trials if trial.state in states]
        return copy.deepcopy(trials) if deepcopy else trials
