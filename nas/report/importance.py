"""Importances: the shares of an objective's variation that the parameters of a space explain."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

from nas.pareto import evenly_spaced

# Optuna's own 64 trees of a depth of 64 take 12 to 19 s for an objective of 2,000 trials, on two cores of an AMD EPYC,
# and these 1.2 s; no share moved by more than 0.05.
TREES, DEPTH = 32, 8
# The time grows with the trials: of a longer study, so many are taken, evenly spaced.
MOST_TRIALS = 2000
EVALUATOR = f"fANOVA, {TREES} trees of a depth of up to {DEPTH}, of at most {MOST_TRIALS:,} trials"
# A forest has nothing to learn from fewer trials.
FEWEST_TRIALS = 10


@dataclass(frozen=True)
class Importances:
    """The importances of the parameters for one objective.

    Args:
        objective: name of the objective.
        shares: share of each parameter in what all explain, 0 to 1, by the parameter's name; the greatest first.
        why_not: a sentence with the reason where there are no shares; None elsewhere.
    """

    objective: str
    shares: dict[str, float]
    why_not: str | None = None


class _Trials(InMemoryStorage):
    """A storage of one study, whose trials are not copied.

    Optuna reads the trials several times for each objective, which takes long from a database.
    """

    def __init__(self, trials: Sequence[FrozenTrial]) -> None:
        super().__init__()
        self.trials = trials

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        return [trial for trial in self.trials if states is None or trial.state in states]


def importances(trials: Sequence[FrozenTrial], objectives: Sequence[str]) -> list[Importances]:
    """Importances for each objective, in Optuna's order of values.

    Args:
        trials: Optuna's trials of the study, of which the complete ones count.
    """
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    complete = [complete[index] for index in evenly_spaced(len(complete), MOST_TRIALS)]
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=["minimize"] * len(objectives), storage=_Trials(complete))
    return [_of_objective(study, complete, index, name) for index, name in enumerate(objectives)]


def _of_objective(study: optuna.Study, trials: Sequence[FrozenTrial], index: int, name: str) -> Importances:
    if len(trials) < FEWEST_TRIALS:
        return Importances(name, {}, f"{len(trials)} complete trial(s) are too few; {FEWEST_TRIALS} are needed.")
    if np.ptp([trial.values[index] for trial in trials]) == 0:
        return Importances(name, {}, f"All trials have the same {name}: it depends on nothing that was varied.")
    target: Callable[[FrozenTrial], float] = lambda trial: trial.values[index]  # noqa: E731
    evaluator = FanovaImportanceEvaluator(n_trees=TREES, max_depth=DEPTH, seed=0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            shares = get_param_importances(study, evaluator=evaluator, target=target)
    # Optuna and scikit-learn raise these for unusual values, and a report has more to show than importances.
    except (ArithmeticError, RuntimeError, ValueError) as error:
        return Importances(name, {}, f"Optuna could not compute them ({error}).")
    shares = {parameter: float(share) for parameter, share in shares.items()}
    if not any(shares.values()):
        return Importances(name, {}, "No parameter explains any of it.")
    return Importances(name, dict(sorted(shares.items(), key=lambda item: -item[1])))
