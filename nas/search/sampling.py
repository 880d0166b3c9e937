"""Proposals of architectures: Optuna's samplers draw from the choices of a space.

Sampling uses a copy of the study in memory, which holds the same trials under the same numbers: a proposal from a
study in SQL takes many small transactions, a proposal from the copy none. A choice that breaks the space's rule is
repaired before it is recorded, so that the sampler learns from what was evaluated and equal architectures always have
equal parameters.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from nas.config import Sampler, SearchConfig
from nas.search.front_sampler import STARTUP_TRIALS, FrontSampler, Memory
from nas.search.parameters import chosen, distribution
from nas.search.recent_trials import RecentTrials
from search_spaces import ArchSpec, SearchSpace

NSGA2_POPULATION = 20
# This is twice Optuna's default: with some twenty parameters, multivariate TPE settles too early on the few points it
# has. On the invented landscape of nas.lab.invented with noise, hypervolume after 80 trials went from .581 to .591 (8
# seeds, +-.004). The value was picked among some two dozen variants tried there, so it may gain less elsewhere.
TPE_STARTUP_TRIALS = 20
FALLBACK_DRAWS = 1000
# In a larger space, a thousand draws in a row miss all architectures that are left only if nearly none is left.
LARGEST_ENUMERATED = 50_000


class OrderedNSGAII(NSGAIISampler):
    """NSGA-II whose parents always come in the order of their numbers.

    Optuna returns them in the order of selection when a generation begins, and in that of their numbers afterwards; a
    search that is resumed within a generation would then draw other children than an unbroken one.
    """

    def get_parent_population(self, study: optuna.Study, generation: int) -> list[FrozenTrial]:
        return sorted(super().get_parent_population(study, generation), key=lambda trial: trial.number)


class FixedSpaceTPE(TPESampler):
    """TPE with a given search space.

    Optuna infers the space from all trials, anew for each new sampler: at 2,000 trials that took two thirds of a
    proposal's time.
    """

    def __init__(self, space: dict[str, BaseDistribution], **options: Any) -> None:
        super().__init__(**options)
        # The parameters stand in Optuna's own order, on which the draws depend.
        self.space = dict(sorted(space.items()))

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.space


def make_sampler(
    name: str, seed: int, space: dict[str, BaseDistribution], pending: Collection[int] = (),
    memory: Memory | None = None, known: Collection[str] = (),
) -> BaseSampler:  # fmt: skip
    """The sampler of one trial, over the parameters of `space`.

    Args:
        pending: numbers of the trials that are running.
        memory: what the sampler that models has in common with those of other trials.
        known: ids of architectures that it is not to propose again.
    """
    if memory is not None:
        return FrontSampler(memory, seed, known)
    if name == Sampler.MODEL:
        raise ValueError("the sampler that models needs a memory")
    if name == "random":
        return RandomSampler(seed=seed)
    if name == "nsga2":
        return OrderedNSGAII(population_size=NSGA2_POPULATION, seed=seed)
    # Without running trials a constant liar changes nothing, and costs time.
    return FixedSpaceTPE(
        space, n_startup_trials=TPE_STARTUP_TRIALS, multivariate=True, constant_liar=bool(pending), seed=seed
    )


def trial_seed(seed: int, number: int) -> int:
    """The sampler's seed for one trial, so that a resumed search goes on instead of repeating its first draws."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def openers(space: SearchSpace, sampler: str) -> tuple[ArchSpec, ...]:
    """The architectures that a search evaluates before it asks the sampler.

    These are the fast end of the front and its middle, so that a sampler has them to build on from the start. Random
    search stays what it is: the plain baseline.
    """
    return () if sampler == Sampler.RANDOM else (space.smallest(), space.anchor())


def first_archs(config: SearchConfig) -> list[ArchSpec]:
    """The architectures that a new search will evaluate first, as far as that can be said before anything is measured.

    Of samplers other than the one that models, nothing is said of what follows the openers.
    """
    deployed = config.latency
    memory = Memory(config.space, deployed.resolution, deployed.num_classes, math.inf, config.limits)
    found = list(openers(config.space, config.sampler))
    if config.sampler == Sampler.MODEL:
        for number in range(len(found), STARTUP_TRIALS):
            known = {arch.arch_id for arch in found}
            found.append(FrontSampler(memory, trial_seed(config.seed, number), known).random())
    # What breaks a limit is never timed.
    return [arch for arch in found if memory.possible(arch)]


@dataclass(frozen=True)
class Proposal:
    """An architecture, and what Optuna's storage records of its trial."""

    number: int
    arch: ArchSpec
    params: dict[str, Any]
    distributions: dict[str, BaseDistribution]
    system_attrs: dict[str, Any]


class Proposer:
    """Asks a sampler for architectures, and tells it their results.

    Args:
        space: the search space.
        sampler: the sampler's name, see `nas.config.Sampler`.
        seed: the search's seed.
        directions: the objectives' directions.
        history: all finished trials of the study, in the order of their numbers.
        memory: of the sampler that models, what those of all trials have in common.
        known: ids of the architectures that the study has; the caller adds those that are proposed.
        repeated: number of trials that were interrupted and in whose places others come, so that draws are those of a
            search that was not interrupted.
    """

    def __init__(
        self,
        space: SearchSpace,
        sampler: str,
        seed: int,
        directions: Sequence[optuna.study.StudyDirection],
        history: Sequence[FrozenTrial],
        memory: Memory | None = None,
        known: Collection[str] = (),
        repeated: int = 0,
    ) -> None:
        self.memory, self.known, self.repeated = memory, known, repeated
        self.space = space
        self.sampler = sampler
        self.seed = seed
        # Samplers gain nothing from a parameter with a single choice.
        self.choices = {name: choices for name, choices in space.choices().items() if len(choices) > 1}
        self.distributions = {name: distribution(choices) for name, choices in self.choices.items()}
        self.fixed = {name: choices[0] for name, choices in space.choices().items() if len(choices) == 1}
        # NSGA-II needs whole generations, and random search looks at no trial.
        self.storage = RecentTrials() if sampler == "tpe" else InMemoryStorage()
        self.study = optuna.create_study(directions=list(directions), storage=self.storage)
        self.study.add_trials(history)
        self.trials = len(history)
        # By number: what was proposed and not told yet.
        self.pending: dict[int, Trial] = {}

    def propose(self) -> Proposal:
        """The sampler's next architecture, which may be a known one; `tell` must follow at some time.

        Of what is proposed and not told yet, the sampler assumes what it guesses, or the worst, so that it does not
        propose it again.
        """
        trial = self._ask(self.sampler)
        values = {name: chosen(choices, trial.params[name]) for name, choices in self.choices.items()} | self.fixed
        return self._proposal(trial, self.space.assemble(values))

    def propose_this(self, arch: ArchSpec) -> Proposal:
        """A given architecture in the place of the sampler's; the sampler learns from it all the same."""
        # NSGA-II marks a trial's generation when it is asked; the answer of any other sampler would be thrown away.
        return self._proposal(self._ask("nsga2" if self.sampler == "nsga2" else "random"), arch)

    def propose_unseen(self, seen: Collection[str]) -> Proposal | None:
        """A uniformly random architecture whose arch_id is not in `seen`; None where there seems to be none left."""
        rng = random.Random(self._seed(self.trials))
        for _ in range(FALLBACK_DRAWS):
            arch = self.space.sample(rng)
            if arch.arch_id not in seen:
                return self.propose_this(arch)
        if self.space.size() > LARGEST_ENUMERATED:
            return None
        left = [arch for arch in self.space.architectures() if arch.arch_id not in seen]
        return self.propose_this(rng.choice(left)) if left else None

    def likely_next(self) -> list[ArchSpec]:
        """Architectures that may be proposed next, the likeliest first: those that the sampler that models thought
        nearly as good as its last proposal. Other samplers do not tell."""
        return [] if self.memory is None else list(self.memory.runners_up)

    def tell(
        self, number: int, values: Sequence[float] | None, state: TrialState, constraints: Mapping[str, float],
        attributes: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        """Close a trial that was proposed, by its number. `values` are for the state COMPLETE only.

        Args:
            attributes: what else is known of it, see `nas.search.rows.beliefs`.
        """
        trial = self.pending.pop(number)
        for key, value in (attributes or {}).items():
            trial.set_user_attr(key, value)
        for key, value in constraints.items():
            trial.set_constraint(key, value)
        self.study.tell(trial, values, state)

    def _seed(self, number: int) -> int:
        return trial_seed(self.seed, number - self.repeated)

    def _ask(self, sampler: str) -> Trial:
        number = self.trials
        self.trials += 1
        memory = self.memory if sampler == self.sampler else None
        self.study.sampler = make_sampler(
            sampler, self._seed(number), self.distributions, self.pending, memory, self.known
        )
        with warnings.catch_warnings():
            # Optuna calls multivariate TPE and the constant liar experimental, and warns at each trial.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            trial = self.study.ask(self.distributions)
        self.pending[number] = trial
        return trial

    def _proposal(self, trial: Trial, arch: ArchSpec) -> Proposal:
        values = self.space.values_of(arch)
        params = {name: values[name] for name in self.distributions}
        for name, value in params.items():
            if trial.params[name] != value:
                internal = self.distributions[name].to_internal_repr(value)
                self.storage.set_trial_param(trial._trial_id, name, internal, self.distributions[name])
        system_attrs = dict(self.storage.get_trial(trial._trial_id).system_attrs)
        return Proposal(trial.number, arch, params, self.distributions, system_attrs)
