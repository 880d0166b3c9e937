"""The data of a report, gathered from a study's database."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np
import pandas as pd
from optuna.trial import FrozenTrial, TrialState

from nas.display.notes import DUPLICATE_OF, REASON, candidates_words, deployment_line
from nas.pareto import running_hypervolume
from nas.recorded import Hypervolumes, RecordedStudy
from nas.report.importance import Importances, importances
from studies import OBJECTIVES, Candidate, CandidateState, Deployment, Owner

# Numbers within a reason: trials with the same fault differ in losses, steps and excesses.
_NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:[.,]\d+)*(?:e[-+]?\d+)?(?: ?%)?(?![\w])")
_SHOWN_TRIALS = 5


@dataclass(frozen=True)
class IncompleteTrials:
    """Trials that gave no complete candidate, all for one reason.

    Args:
        outcome: outcome of the trials: "failed", "over a limit", "duplicate" or "interrupted".
        reason: the common reason, without its numbers where these differ between the trials.
        numbers: numbers of the trials, in order.
    """

    outcome: str
    reason: str
    numbers: tuple[int, ...]

    @property
    def shown(self) -> str:
        """The first numbers, as text."""
        listed = ", ".join(map(str, self.numbers[:_SHOWN_TRIALS]))
        return listed + (", ..." if len(self.numbers) > _SHOWN_TRIALS else "")


@dataclass(frozen=True)
class Material:
    """All that a report shows, read at nearly the same moment: the database answers several queries.

    Args:
        candidates: all evaluated candidates, in order.
        history: a row for each complete candidate of the study's own deployment: `number`, `accuracy`, `latency_ms`,
            `hypervolume` up to it, and the `seconds` of the search in which all candidates up to it were evaluated.
        time_spent: a row for each candidate, with the seconds of `training`, `latency` and `all else`.
        trainings: a row for each training in a worker: `worker`, and `begin` and `end` in seconds of the search.
        evaluations, front: rows of the two views in the study's own deployment, the front fastest first.
        hypervolumes: those of the front.
        elsewhere: fronts in other deployments, each with the deployment in words.
        incomplete: trials without a result, the most frequent reason first.
    """

    recorded: RecordedStudy
    candidates: list[Candidate]
    history: pd.DataFrame
    time_spent: pd.DataFrame
    trainings: pd.DataFrame
    evaluations: pd.DataFrame
    front: pd.DataFrame
    hypervolumes: Hypervolumes
    elsewhere: list[tuple[str, pd.DataFrame]]
    importances: list[Importances]
    incomplete: list[IncompleteTrials]

    @property
    def deployment(self) -> str:
        """The study's own deployment in words."""
        recorded = self.recorded
        columns = {"device_name": recorded.device.name, "arch": recorded.row.anchor}
        return deployment_line({**columns, **recorded.deployment.as_columns()})

    @property
    def complete(self) -> int:
        """Number of complete candidates."""
        return len(self.history)

    @property
    def stopped(self) -> int:
        """Number of candidates whose training was given up."""
        return sum(each.state == CandidateState.STOPPED for each in self.candidates)

    @property
    def counted(self) -> str:
        """The number of candidates that were trained, in words."""
        return candidates_words(self.complete, self.stopped)

    @property
    def workers(self) -> int:
        """Number of workers that trained."""
        return int(self.trainings["worker"].nunique())

    @property
    def busy(self) -> float:
        """The share of the time of the search in which a worker trained, on average."""
        seconds = self.trainings["end"].max() - self.trainings["begin"].min()
        return float((self.trainings["end"] - self.trainings["begin"]).sum() / (self.workers * seconds))

    @property
    def is_searched(self) -> bool:
        """Whether a process may be searching the study now."""
        owner = self.recorded.row.owner
        return owner is not None and Owner.parse(owner).may_live()


def gather(recorded: RecordedStudy) -> Material:
    """Read what the database holds of a study."""
    candidates, every_front = recorded.candidates(), recorded.store.front(recorded.name)
    front = recorded.deployment.rows_of(every_front)
    others = every_front[~every_front.index.isin(front.index)]
    trials = recorded.store.load_optuna_study(recorded.name).get_trials(deepcopy=False)
    clock = clock_of(candidates, trials)
    return Material(
        recorded=recorded,
        candidates=candidates,
        history=_history(candidates, clock, recorded.deployment, recorded.reference_latency_ms),
        time_spent=_time_spent(candidates),
        trainings=trainings_of(candidates, clock),
        evaluations=recorded.evaluations(),
        front=front.reset_index(drop=True),
        hypervolumes=recorded.hypervolumes(),
        elsewhere=[
            (deployment_line(members.iloc[0]), members)
            for _, members in others.groupby(Deployment.columns(), sort=False)
        ],
        importances=importances(trials, [objective for _, objective in OBJECTIVES]),
        incomplete=incomplete_trials(candidates, trials),
    )


def _history(
    candidates: Sequence[Candidate], clock: Callable[[datetime], float], deployment: Deployment,
    reference_latency_ms: float,
) -> pd.DataFrame:  # fmt: skip
    rows: list[tuple[int, float, float, float]] = []
    seconds = 0.0
    for candidate in candidates:
        # Of trainings side by side, one may end before another of a smaller number.
        seconds = max(seconds, clock(candidate.finished_at))
        latency = candidate.latency_in(deployment)
        if candidate.state == CandidateState.COMPLETE and candidate.accuracy is not None and latency is not None:
            rows.append((candidate.number, candidate.accuracy, latency.median_ms, seconds))
    history = pd.DataFrame(rows, columns=["number", "accuracy", "latency_ms", "seconds"])
    volumes = running_hypervolume(list(history["accuracy"]), list(history["latency_ms"]), reference_latency_ms)
    return history.assign(hypervolume=volumes)


def clock_of(candidates: Sequence[Candidate], trials: Sequence[FrozenTrial]) -> Callable[[datetime], float]:
    """Function from a moment to the seconds before it in which some candidate was evaluated: pauses do not count.

    Args:
        trials: Optuna's trials, which know how long it took from a proposal to its result.
    """
    took = {trial.number: trial.duration.total_seconds() for trial in trials if trial.duration is not None}
    ends = np.array([candidate.finished_at.timestamp() for candidate in candidates])
    begins = ends - np.array([max(each.total_seconds, took.get(each.number, 0.0)) for each in candidates])
    order = np.argsort(begins)
    begins, ends = begins[order], np.maximum.accumulate(ends[order])
    # Each stretch begins where the one before it ends, or later.
    begins = np.maximum(begins, np.append(-np.inf, ends)[: len(ends)])
    before = np.append(0.0, np.cumsum(ends - begins))

    def seconds(moment: datetime) -> float:
        number = int(np.searchsorted(ends, moment.timestamp()))
        return float(before[number] + (max(0.0, moment.timestamp() - begins[number]) if number < len(ends) else 0.0))

    return seconds


def trainings_of(candidates: Sequence[Candidate], clock: Callable[[datetime], float]) -> pd.DataFrame:
    """The trainings in workers; see `Material`."""
    rows = []
    for each in candidates:
        if each.worker is not None and each.train_seconds is not None:
            begin = each.finished_at - timedelta(seconds=each.train_seconds)
            rows.append((each.worker, clock(begin), clock(each.finished_at)))
    return pd.DataFrame(rows, columns=["worker", "begin", "end"])


def _time_spent(candidates: Sequence[Candidate]) -> pd.DataFrame:
    rows = []
    for candidate in candidates:
        training, latency = candidate.train_seconds or 0.0, candidate.latency_seconds or 0.0
        rows.append((training, latency, max(0.0, candidate.total_seconds - training - latency)))
    return pd.DataFrame(rows, columns=["training", "latency", "all else"], dtype=float)


def incomplete_trials(candidates: Sequence[Candidate], trials: Sequence[FrozenTrial]) -> list[IncompleteTrials]:
    """The trials that did not become complete candidates, grouped by reason, the most frequent first.

    Args:
        trials: Optuna's trials, among them duplicates and interrupted ones, which were never evaluated.
    """
    outcomes = {
        CandidateState.FAILED: "failed", CandidateState.OVER_LIMIT: "over a limit",
        CandidateState.STOPPED: "stopped early",
    }  # fmt: skip
    rows: list[tuple[int, str, str]] = []
    for candidate in candidates:
        if candidate.state in outcomes:
            outcome = outcomes[CandidateState(candidate.state)]
            rows.append((candidate.number, outcome, candidate.reason or "unknown"))
    evaluated = {candidate.number for candidate in candidates}
    for trial in trials:
        if trial.number in evaluated:
            continue
        if DUPLICATE_OF in trial.user_attrs:
            rows.append((trial.number, "duplicate", "architecture of an earlier trial, not evaluated again"))
        elif trial.state == TrialState.FAIL:
            rows.append((trial.number, "interrupted", str(trial.user_attrs.get(REASON, "unknown"))))
    groups: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for number, outcome, reason in rows:
        groups.setdefault((outcome, _NUMBER.sub("…", reason)), []).append((number, reason))
    incomplete = []
    for (outcome, _), members in groups.items():
        reason = _common([reason for _, reason in members])
        incomplete.append(IncompleteTrials(outcome, reason, tuple(number for number, _ in members)))
    return sorted(incomplete, key=lambda group: -len(group.numbers))


def _common(reasons: Sequence[str]) -> str:
    """Reasons that differ in numbers alone as one, with a mark in the place of those that differ."""
    places = zip(*(_NUMBER.findall(reason) for reason in reasons), strict=True)
    shown = iter([numbers[0] if len(set(numbers)) == 1 else "…" for numbers in places])
    return _NUMBER.sub(lambda match: next(shown), reasons[0])
