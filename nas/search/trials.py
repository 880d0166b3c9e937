"""The trials of a study in Optuna's tables, from which samplers learn and which the dashboard shows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from nas.display import notes
from nas.display.notes import DUPLICATE_OF, INTERRUPTED, REASON
from nas.latency.values import memory_mb
from nas.recorded import RecordedStudy
from nas.search.rows import beliefs, objectives
from nas.search.sampling import Proposal
from search_spaces import ArchSpec
from studies import Candidate, CandidateState
from studies.display import write_note

# Optuna's state for each of our outcomes.
TRIAL_STATES = {
    CandidateState.COMPLETE: TrialState.COMPLETE,
    # It is never COMPLETE: the dashboard does not read Optuna 5's constraints, and would draw it on the front.
    CandidateState.OVER_LIMIT: TrialState.PRUNED,
    CandidateState.FAILED: TrialState.FAIL,
    CandidateState.STOPPED: TrialState.PRUNED,
}

# An architecture that was interrupted so often is not begun again: it may be what ends the search.
MOST_BEGUN = 3


@dataclass(frozen=True)
class Interrupted:
    """Candidates whose evaluation was interrupted.

    Args:
        again: those that are to be evaluated again, unless a later trial did so, in the order of their trials.
        given_up: the others, as texts.
        repeated: number of interrupted trials in whose places others come.
    """

    again: tuple[ArchSpec, ...]
    given_up: frozenset[str]
    repeated: int


class Trials:
    """Writes the trials of a study that is searched.

    Args:
        peak_macs_per_s: the device's peak in MACs per second; efficiencies are shares of it.
    """

    def __init__(self, recorded: RecordedStudy, peak_macs_per_s: float) -> None:
        self.recorded, self.peak_macs_per_s = recorded, peak_macs_per_s
        self.storage = recorded.store.optuna_storage
        self.study = recorded.store.load_optuna_study(recorded.name)

    def unfinished(self) -> list[FrozenTrial]:
        """The trials that were never closed."""
        return self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING))

    def interrupted(self) -> Interrupted:
        """What the interruptions of the study leave to do."""
        failed = self.study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
        found = [trial.user_attrs for trial in failed if trial.user_attrs.get(REASON) == INTERRUPTED]
        # Trials that another program added have no architecture.
        counts = Counter(str(attributes["arch"]) for attributes in found if "arch" in attributes)
        given_up = {text for text, count in counts.items() if count >= MOST_BEGUN}
        again = tuple(ArchSpec.parse(text) for text in counts if text not in given_up)
        return Interrupted(again, frozenset(given_up), counts.total() - len(given_up))

    def begin(self, proposal: Proposal) -> int:
        """Add a running trial and return its id.

        Raises:
            StorageError: another program adds trials, too.
        """
        arch, device, engine = proposal.arch, self.recorded.row.device.name, self.recorded.config.latency.engine_label
        attrs = {"arch": str(arch), "arch_id": arch.arch_id, "device": device, "engine": engine}
        return self._add(proposal, TrialState.RUNNING, attrs)

    def add_duplicate(self, proposal: Proposal, first: int) -> None:
        """Add a pruned trial that proposed the architecture of trial number `first` again.

        Raises:
            StorageError: another program adds trials, too.
        """
        attrs = {DUPLICATE_OF: first, "arch": str(proposal.arch)}
        trial_id = self._add(proposal, TrialState.PRUNED, attrs)
        self._write_note(trial_id, notes.duplicate_note(proposal.arch, first))

    def interrupt(self, trial: FrozenTrial) -> None:
        """Close a trial that was interrupted, as failed."""
        self.storage.set_trial_user_attrs(trial._trial_id, {REASON: INTERRUPTED})
        self.storage.finish_trial(trial._trial_id, TrialState.FAIL)

    def finish(self, trial_id: int, row: Candidate, constraints: dict[str, float]) -> None:
        """Close a trial as the candidate's row says, with the note and attributes that the dashboard shows.

        Args:
            constraints: the excess over each limit, as `Limits.excess` counts it.
        """
        self.storage.set_trial_user_attrs(trial_id, self._attributes(row))
        latency = row.latency_in(self.recorded.deployment)
        curve = self.recorded.store.learning_curve(trial_id) if row.state == CandidateState.STOPPED else None
        self._write_note(trial_id, notes.trial_note(row, latency, self.recorded.config, curve))
        self._set_constraints(trial_id, constraints)
        # `study.tell` looks for the trial by its number, which no index of Optuna's tables holds: it goes through all.
        self.storage.finish_trial(trial_id, TRIAL_STATES[CandidateState(row.state)], objectives(row))

    def _set_constraints(self, trial_id: int, constraints: dict[str, float]) -> None:
        if not constraints:
            return
        # Some may be stored already, if an earlier process was killed here.
        missing = constraints.keys() - self.storage.get_trial(trial_id).constraints.keys()
        live = Trial(self.study, trial_id)
        for key in sorted(missing):
            live.set_constraint(key, constraints[key])

    def _add(self, proposal: Proposal, state: TrialState, attrs: dict[str, Any]) -> int:
        trial = create_trial(
            state=state, params=proposal.params, distributions=proposal.distributions, user_attrs=attrs,
            system_attrs=proposal.system_attrs,
        )  # fmt: skip
        return self.storage.add_trial(self.recorded.study_id, proposal.number, trial)

    def _attributes(self, row: Candidate) -> dict[str, Any]:
        attrs: dict[str, Any] = {"params": row.params, "macs": row.macs, **beliefs(row)}
        if row.reason:
            attrs[REASON] = row.reason
        if latency := row.latency_in(self.recorded.deployment):
            attrs["latency_p20_p80_ms"] = f"{latency.p20_ms:.4g} to {latency.p80_ms:.4g}"
            attrs["memory_mb"] = round(memory_mb(latency), 3)
            macs_per_s = row.macs * latency.batch_size / latency.median_ms * 1e3
            attrs["computational_efficiency"] = round(macs_per_s / self.peak_macs_per_s, 4)
            if latency.capped or latency.throttled:
                attrs["latency_doubtful"] = "throttled" if latency.throttled else "ended by the time cap"
        attrs["seconds"] = round(row.total_seconds, 2)
        return attrs

    def _write_note(self, trial_id: int, body: str) -> None:
        write_note(self.storage, self.recorded.study_id, trial_id, body)
