"""The sampler that models: it proposes what is expected to add most to the front's hypervolume.

Accuracy and log latency of the evaluated architectures are modelled from closed-form features. Of many random
architectures and mutations of the front's members, the one is proposed by which the hypervolume of the denoised front
(that of the model's means) is expected to grow most, as in BANANAS (White et al. 2021, whose mutations explain much of
its success: Schneider et al. 2021) and in expected hypervolume improvement (Emmerich et al. 2006).
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from nas import pareto
from nas.config import Limits
from nas.display.notes import DEVIATION, INTERRUPTED, PREDICTED, REASON, TIMED
from nas.search.features import matrix
from nas.search.improvement import Staircase
from nas.search.model import FIRST, Kernel, Model, Scale, kernel_for
from nas.search.parameters import chosen, distribution
from nas.search.subset import kept
from search_spaces import ArchSpec, SearchSpace, cost
from search_spaces.space import Choice

# Trials before the model: random ones.
STARTUP_TRIALS = 10
# Random architectures by which the features are scaled.
SCALE_DRAWS = 300
# Candidates of a proposal: random ones, mutations of the front, and mutations of the best of these.
RANDOM, MUTATED, REFINED = 200, 300, 200
# Of what was not proposed, so many of the best are remembered.
RUNNERS_UP = 16
# Of so many of the best candidates mutations are looked at, too.
BEST = 10
# Greatest number of parameters that a mutation changes.
MOST_CHANGES = 3
# The fastest architecture that may come is so much faster than the fastest seen.
FASTER = 0.8
# Of trials that failed or broke the limit on the latency, the latest so many are taken into account.
MOST_FAILED = 100
# And so many of those whose training was given up.
MOST_GIVEN_UP = 200
# Failures are rarer than what does not fail; and nothing is so likely to fail that it is never tried.
DEVIATION_OF_FAILURES, LEAST_LIKELY = 0.3, 0.02
# The names of limits among a trial's constraints.
LATENCY, MEMORY = "latency_ms", "memory_mb"


@dataclass
class Memory:
    """What the samplers of one search have in common, so that nothing is computed twice.

    Args:
        space: the search space.
        resolution, classes: those of the deployment.
        most_ms: latency up to which hypervolume counts.
        limits: limits on candidates; what breaks one on parameters or MACs is never proposed.

    Attributes:
        further: arch_id -> accuracies of further trainings, which confirmed it before this search went on.
        features: arch_id -> scaled features, (f,), of what was evaluated.
        runners_up: what came next to the last proposal, the best first.
    """

    space: SearchSpace
    resolution: int
    classes: int
    most_ms: float
    limits: Limits = field(default_factory=Limits)
    further: Mapping[str, Sequence[float]] = field(default_factory=dict)
    features: dict[str, np.ndarray] = field(default_factory=dict)
    archs: dict[int, ArchSpec] = field(default_factory=dict)
    accuracy_kernels: dict[int, Kernel] = field(default_factory=dict)
    latency_kernels: dict[int, Kernel] = field(default_factory=dict)
    next_to_front: dict[int, np.ndarray] = field(default_factory=dict)
    runners_up: list[ArchSpec] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = random.Random(0)
        draws = [self.space.sample(rng) for _ in range(SCALE_DRAWS)]
        self.scale = Scale.of(matrix(draws, self.resolution, self.classes))
        self.choices = {name: choices for name, choices in self.space.choices().items() if len(choices) > 1}
        self.fixed = {name: choices[0] for name, choices in self.space.choices().items() if len(choices) == 1}

    def points(self, archs: Sequence[ArchSpec]) -> np.ndarray:
        """The scaled features of architectures, (n, f); those of drawn ones, hundreds a trial, are not kept."""
        rows = [self.features.get(arch.arch_id) for arch in archs]
        lacking = [place for place, row in enumerate(rows) if row is None]
        if lacking:
            fresh = self.scale(matrix([archs[place] for place in lacking], self.resolution, self.classes))
            for place, row in zip(lacking, fresh, strict=True):
                rows[place] = row
        return np.array(rows).reshape(len(archs), len(self.scale.mean))

    def evaluated(self, archs: Sequence[ArchSpec]) -> np.ndarray:
        """The scaled features of evaluated architectures, (n, f), which are kept."""
        points = self.points(archs)
        for arch, row in zip(archs, points, strict=True):
            if arch.arch_id not in self.features:
                self.features[arch.arch_id] = row.copy()
        return points

    def averaged(self, archs: Sequence[ArchSpec], accuracy: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """The mean accuracy of all trainings of architectures, and their numbers, (n,) each; None where all are one.

        Args:
            accuracy: that of the training by which the search judged each, (n,).
        """
        if not self.further:
            return accuracy, None
        further = [self.further.get(arch.arch_id, ()) for arch in archs]
        counts = np.array([1.0 + len(each) for each in further])
        return (accuracy + np.array([sum(each) for each in further])) / counts, counts

    def possible(self, arch: ArchSpec) -> bool:
        """Whether an architecture keeps the limits that are known before it is timed."""
        if self.limits.params is None and self.limits.macs is None:
            return True
        counted = cost(arch, self.resolution, self.classes)
        return not any(excess > 0 for excess in self.limits.excess(params=counted.params, macs=counted.macs).values())

    def arch_of(self, trial: FrozenTrial) -> ArchSpec:
        if trial.number not in self.archs:
            self.archs[trial.number] = self.space.assemble(self.chosen(trial.params) | self.fixed)
        return self.archs[trial.number]

    def latency_ms(self, trial: FrozenTrial) -> float:
        """The latency of a trial that was timed, also of one over the limit."""
        if trial.state == TrialState.COMPLETE:
            return float(trial.values[1])
        if TIMED in trial.user_attrs:
            return float(trial.user_attrs[TIMED])
        return self.most_ms * (1 + trial.constraints[LATENCY])

    def chosen(self, params: Mapping[str, Any]) -> dict[str, Choice]:
        """The choices of the space that a trial's parameters stand for."""
        return {name: chosen(choices, params[name]) for name, choices in self.choices.items()}

    def mutated(self, arch: ArchSpec, rng: random.Random, most_changes: int) -> ArchSpec:
        """An architecture in which a few parameters have other values."""
        values = self.space.values_of(arch)
        for name in rng.sample(sorted(self.choices), min(len(self.choices), rng.randint(1, most_changes))):
            values[name] = rng.choice([choice for choice in self.choices[name] if choice != values[name]])
        return self.space.assemble(values)


class FrontSampler(BaseSampler):
    """The sampler of one trial.

    Args:
        memory: what it has in common with the samplers of other trials.
        seed: seed of this trial's draws.
        known: ids of the architectures that are not to be proposed again.
    """

    def __init__(self, memory: Memory, seed: int, known: Collection[str] = ()) -> None:
        self.memory, self.rng, self.known = memory, random.Random(seed), known

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        # All parameters are chosen at once, by `sample_relative`.
        return {name: distribution(choices) for name, choices in self.memory.choices.items()}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        values = self.memory.space.values_of(self.proposed(study))
        return {name: values[name] for name in search_space}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self.rng.choice(self.memory.choices[param_name])

    def proposed(self, study: optuna.Study) -> ArchSpec:
        """The architecture to evaluate next."""
        trials = [trial for trial in study.get_trials(deepcopy=False) if trial.params]
        complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        if len(complete) < STARTUP_TRIALS:
            return self.random([*complete, *over_latency(trials)])
        return self.best(FrontModel.of(self.memory, trials))

    def random(self, timed: Sequence[FrozenTrial] = ()) -> ArchSpec:
        """A random architecture that is possible, if one is found soon; it depends on no trial before some are timed.

        Args:
            timed: trials whose latency is known. Once there are several, architectures that are likely too slow to
                count are left out, or a tight limit would hardly ever be kept.
        """
        memory = self.memory
        drawn = [memory.space.sample(self.rng) for _ in range(RANDOM)]
        found = self._new(drawn) or drawn[:1]
        if len(timed) < STARTUP_TRIALS:
            return found[0]
        points = memory.evaluated([memory.arch_of(trial) for trial in timed])
        latency = Model.of(points, np.log([memory.latency_ms(trial) for trial in timed]), Kernel(*FIRST))
        likely = latency.below(memory.points(found), np.log(memory.most_ms))
        # Of those that are likely fast enough the first, else the likeliest.
        return found[int(np.argmax(np.minimum(likely, 0.5)))]

    def best(self, model: FrontModel) -> ArchSpec:
        """The candidate by which the front is expected to grow most."""
        memory, rng = self.memory, self.rng
        drawn = [memory.space.sample(rng) for _ in range(RANDOM)]
        parents = model.members or [memory.space.anchor()]
        drawn += [memory.mutated(rng.choice(parents), rng, MOST_CHANGES) for _ in range(MUTATED)]
        found = self._new(drawn)
        if not found:
            return self.random()
        gains = model.improvement(found)
        leaders = [found[index] for index in np.argsort(-gains, kind="stable")[:BEST]]
        refined = self._new([memory.mutated(rng.choice(leaders), rng, 1) for _ in range(REFINED)])
        found += refined
        gains = np.append(gains, model.improvement(refined)) if refined else gains
        memory.runners_up = [found[index] for index in np.argsort(-gains, kind="stable")[1 : 1 + RUNNERS_UP]]
        return found[int(np.argmax(gains))]

    def _new(self, archs: Sequence[ArchSpec]) -> list[ArchSpec]:
        """The possible architectures that are not known, each once."""
        new = {arch.arch_id: arch for arch in archs if arch.arch_id not in self.known}
        return [arch for arch in new.values() if self.memory.possible(arch)]


@dataclass(frozen=True)
class FrontModel:
    """The models of accuracy and latency, and the front of their means.

    Args:
        runs: model of what fails, of 0 for those that did and 1 for others; None where nothing did.
        members: the denoised front.
    """

    memory: Memory
    accuracy: Model
    latency: Model
    runs: Model | None
    stairs: Staircase
    members: list[ArchSpec]

    @classmethod
    def of(cls, memory: Memory, trials: Sequence[FrozenTrial]) -> FrontModel:
        """The models after some trials, of which several are complete.

        What is being evaluated counts with its guessed values. What failed makes its neighbours less likely to be
        worth a trial, and a latency over the limit is a latency all the same.
        """
        by_state: dict[TrialState, list[FrozenTrial]] = {state: [] for state in TrialState}
        for trial in trials:
            by_state[trial.state].append(trial)
        complete = by_state[TrialState.COMPLETE]
        archs = [memory.arch_of(trial) for trial in complete]
        accuracy = np.array([trial.values[0] for trial in complete])
        latency_ms = np.array([trial.values[1] for trial in complete])
        points = memory.evaluated(archs)
        kernel = kernel_for(points, accuracy, memory.accuracy_kernels)
        averaged, counts = memory.averaged(archs, accuracy)
        given = kept(points, averaged, latency_ms, kernel, memory.next_to_front)
        failed = [trial for trial in by_state[TrialState.FAIL] if trial.user_attrs.get(REASON) != INTERRUPTED]
        # A limit on the memory is kept or not, as a network runs or not.
        failed += [trial for trial in by_state[TrialState.PRUNED] if trial.constraints.get(MEMORY, 0) > 0]
        failed.sort(key=lambda trial: trial.number)
        bad = memory.evaluated([memory.arch_of(trial) for trial in failed[-MOST_FAILED:]])
        runs = Model(points[given], np.ones(len(given)), Kernel(*FIRST), mean=1.0, deviation=DEVIATION_OF_FAILURES)
        of_accuracy = Model.of(points[given], averaged[given], kernel, None if counts is None else counts[given])
        given_up = [trial for trial in by_state[TrialState.PRUNED] if PREDICTED in trial.user_attrs][-MOST_GIVEN_UP:]
        # What was expected of a training that was given up is known less well than the result of one.
        if given_up:
            of_accuracy = of_accuracy.with_more(
                memory.evaluated([memory.arch_of(trial) for trial in given_up]),
                np.array([trial.user_attrs[PREDICTED] for trial in given_up]),
                np.array([trial.user_attrs[DEVIATION] for trial in given_up]),
            )
        over = [*over_latency(by_state[TrialState.PRUNED])[-MOST_FAILED:], *given_up]
        of_latency = Model.of(
            points[given], np.log(latency_ms[given]), kernel_for(points, np.log(latency_ms), memory.latency_kernels)
        ).with_more(
            memory.evaluated([memory.arch_of(trial) for trial in over]),
            np.log([memory.latency_ms(trial) for trial in over]),
        )
        means = of_accuracy.fitted()[: len(given)]
        known, known_ms = [archs[index] for index in given], latency_ms[given]
        if pending := [memory.arch_of(trial) for trial in by_state[TrialState.RUNNING]]:
            ahead = memory.evaluated(pending)
            guessed = of_accuracy.means(ahead)
            of_accuracy = of_accuracy.with_more(ahead, guessed)
            means = np.concatenate([means, guessed])
            known_ms = np.concatenate([known_ms, np.exp(of_latency.means(ahead))])
            known = [*known, *pending]
        stairs = Staircase.of(means, known_ms, FASTER * float(latency_ms.min()), memory.most_ms)
        members = [known[index] for index in pareto.front(means, known_ms) if known_ms[index] < memory.most_ms]
        runs_or_fails = runs.with_more(bad, np.zeros(len(bad))) if len(bad) else None
        return cls(memory, of_accuracy, of_latency, runs_or_fails, stairs, members)

    def improvement(self, archs: Sequence[ArchSpec], latency_ms: np.ndarray | None = None) -> np.ndarray:
        """The hypervolume that architectures are expected to add, (m,).

        Args:
            latency_ms: their measured latencies, (m,); None stands for guessed ones.
        """
        points = self.memory.points(archs)
        mean, deviation = self.accuracy.predict(points)
        if latency_ms is not None:
            return self.stairs.improvement(mean, deviation, latency_ms)
        likely = np.ones(len(archs)) if self.runs is None else np.clip(self.runs.means(points), LEAST_LIKELY, 1)
        guessed, spread = self.latency.predict(points)
        # A network that turns out slower than all that counts adds nothing.
        fast_enough = self.latency.chance_below(guessed, spread, np.log(self.memory.most_ms))
        expected: np.ndarray = likely * fast_enough * self.stairs.improvement(mean, deviation, np.exp(guessed))
        return expected


def over_latency(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that were pruned because they broke the limit on the latency."""
    return [trial for trial in trials if trial.state == TrialState.PRUNED and trial.constraints.get(LATENCY, 0) > 0]
