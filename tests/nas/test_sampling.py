from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from nas.config import Limits, Sampler, SearchConfig
from nas.lab.invented import FakeEvaluator
from nas.latency.values import Measurement
from nas.search import recent_trials
from nas.search.front_sampler import Memory
from nas.search.loop import run
from nas.search.parameters import distribution
from nas.search.sampling import Proposer, first_archs
from search_spaces import ArchSpec, load_space

DIRECTIONS = (StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE)
FAKE = FakeEvaluator()


def proposer(sampler: str, seed: int = 0, history: list[FrozenTrial] | None = None) -> Proposer:
    space = load_space("small")
    memory = Memory(space, 32, 10, most_ms=2.0) if sampler == Sampler.MODEL else None
    return Proposer(space, sampler, seed, DIRECTIONS, history or [], memory)


def advance(into: Proposer, trials: int) -> list[str]:
    """Propose and tell; returns the arch_ids in order."""
    arch_ids = []
    for _ in range(trials):
        proposal = into.propose()
        arch = proposal.arch
        arch_ids.append(arch.arch_id)
        into.tell(proposal.number, [FAKE.cost(arch).macs / 1e7, FAKE.measure(arch).median_ms], TrialState.COMPLETE, {})
    return arch_ids


@pytest.mark.parametrize("sampler", Sampler)
def test_the_same_seed_and_values_give_the_same_proposals_also_after_a_restart(sampler: str) -> None:
    # TPE and NSGA-II draw more at random before they look at what was found.
    count, restart = (24, 16) if sampler == Sampler.MODEL else (45, 30)
    expected = advance(proposer(sampler), count)
    first = proposer(sampler)
    assert advance(first, restart) == expected[:restart]
    resumed = proposer(sampler, history=first.study.get_trials())
    assert advance(resumed, count - restart) == expected[restart:]


@pytest.mark.parametrize("sampler", Sampler)
def test_a_restart_does_not_repeat_the_first_proposals(sampler: str) -> None:
    """A sampler built with a fixed seed would: every trial has a seed of its own."""
    first = proposer(sampler)
    beginning = advance(first, 5)
    assert not set(beginning) & set(advance(proposer(sampler, history=first.study.get_trials()), 5))


@pytest.mark.parametrize("sampler", Sampler)
def test_what_a_search_begins_with_is_known_beforehand(sampler: Sampler, tmp_path: Path) -> None:
    timed: list[str] = []

    class Noting(FakeEvaluator):
        def measure(self, arch: ArchSpec) -> Measurement:
            timed.append(arch.arch_id)
            return super().measure(arch)

    limits = Limits(params=100_000)
    config = SearchConfig(space=load_space("small"), budget=12, storage=f"sqlite:///{tmp_path}/study.db",
                          sampler=sampler, seed=3, limits=limits, confirm=0.0, pilot=())  # fmt: skip
    run(config, Noting())
    foreseen = [arch.arch_id for arch in first_archs(config)]
    assert timed[: len(foreseen)] == foreseen
    # The anchor breaks the limit.
    assert len(foreseen) == {Sampler.MODEL: 9, Sampler.RANDOM: 0}.get(sampler, 1)


@pytest.mark.parametrize("sampler", Sampler)
def test_another_seed_gives_other_proposals(sampler: str) -> None:
    assert advance(proposer(sampler, seed=0), 3) != advance(proposer(sampler, seed=1), 3)


def test_recorded_parameters_are_those_of_the_repaired_architecture() -> None:
    into = proposer("random")
    space = into.space
    repaired = 0
    for _ in range(200):
        proposal = into.propose()
        assert space.assemble(proposal.params | into.fixed) == proposal.arch
        values = space.values_of(proposal.arch)
        assert all(values[name] == value for name, value in proposal.params.items())
        in_memory = into.study.get_trials(deepcopy=False)[-1]
        assert in_memory.params == proposal.params
        repaired += any(group in (16, 32) for name, group in proposal.params.items() if name.endswith("group_width"))
        into.tell(proposal.number, None, TrialState.FAIL, {})
    assert repaired, "no group width above 8 was ever proposed, so nothing was tested"


def test_proposals_cover_every_choice() -> None:
    into = proposer("random")
    seen: dict[str, set[object]] = {name: set() for name in into.distributions}
    for _ in range(300):
        proposal = into.propose()
        for name, value in proposal.params.items():
            seen[name].add(value)
        into.tell(proposal.number, None, TrialState.FAIL, {})
    choices = into.space.choices()
    assert all(seen[name] == set(choices[name]) for name in seen)


def test_constraints_reach_the_sampler() -> None:
    into = proposer("tpe")
    into.tell(into.propose().number, None, TrialState.PRUNED, {"latency_ms": 0.5})
    assert into.study.get_trials(deepcopy=False)[-1].constraints == {"latency_ms": 0.5}


def test_unseen_architectures_are_found_until_there_are_none() -> None:
    from tests.conftest import make_tiny_space

    space = make_tiny_space()
    into = Proposer(space, "tpe", 0, DIRECTIONS, [])
    seen: set[str] = set()
    while (proposal := into.propose_unseen(seen)) is not None:
        assert proposal.arch.arch_id not in seen
        seen.add(proposal.arch.arch_id)
        into.tell(proposal.number, [0.5, 1.0], TrialState.COMPLETE, {})
    assert len(seen) == space.size()


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ((16, 24, 32), IntDistribution(16, 32, step=8)),
        ((3, 5, 7), IntDistribution(3, 7, step=2)),
        ((1.0, 1.5, 2.0), FloatDistribution(1.0, 2.0, step=0.5)),
        ((1.2, 1.4, 1.6), FloatDistribution(1.2, 1.6, step=0.2)),
        ((1.1, 1.2, 1.4), CategoricalDistribution((1.1, 1.2, 1.4))),
        ((1, 8, 16), CategoricalDistribution((1, 8, 16))),
        (("relu", "silu"), CategoricalDistribution(("relu", "silu"))),
    ],
)
def test_evenly_spaced_numbers_are_ordered_and_all_else_are_categories(
    choices: tuple[object, ...], expected: optuna.distributions.BaseDistribution
) -> None:
    assert distribution(choices) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("expansion", [(1.2, 1.4, 1.6), (1.4, 1.6), (1.1, 1.2, 1.3), (2.3, 3.4, 4.5, 5.6)])
@pytest.mark.parametrize("sampler", Sampler)
def test_decimal_choices_are_proposed_as_they_are_written(sampler: str, expansion: tuple[float, ...]) -> None:
    """1.2 + 2 * (1.4 - 1.2) is 1.5999999999999999: another architecture to us, and to Optuna no value of 1.2 to 1.6."""
    from tests.conftest import make_tiny_space

    stage = replace(make_tiny_space().stages[0], expansion=expansion)
    space = make_tiny_space(stages=(stage,))
    memory = Memory(space, 16, 10, most_ms=100.0) if sampler == Sampler.MODEL else None
    into = Proposer(space, sampler, 0, DIRECTIONS, [], memory)
    seen = set()
    for number in range(60):
        proposal = into.propose_unseen(set()) if number % 3 == 0 else into.propose()
        assert proposal is not None
        seen.add(proposal.arch.stages[0].expansion)
        create_trial(state=TrialState.RUNNING, params=proposal.params, distributions=proposal.distributions)
        into.tell(proposal.number, [0.5, 1.0 + number], TrialState.COMPLETE, {})
    assert seen == set(expansion)


def test_up_to_a_thousand_trials_tpe_learns_from_all() -> None:
    assert recent_trials.MOST_TRIALS == 1000
    into = proposer("tpe")
    advance(into, 40)
    assert [trial.number for trial in into.storage.get_all_trials(into.study._study_id)] == list(range(40))


@pytest.fixture
def short_memory(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(recent_trials, "MOST_TRIALS", 30)
    return 30


def test_of_a_longer_study_tpe_learns_from_the_front_and_the_latest(short_memory: int) -> None:
    into = proposer("tpe")
    values = [(0.5, 1.0), (0.9, 0.5)] + [(0.4 - 0.001 * number, 2.0) for number in range(60)]
    for number, (accuracy, latency_ms) in enumerate(values):
        assert into.propose().number == number
        into.tell(number, [accuracy, latency_ms], TrialState.COMPLETE, {})
    listed = into.study.get_trials(deepcopy=False)
    assert [trial.number for trial in listed] == [1, *range(len(values) - short_memory + 1, len(values))]
    assert into.study.get_trials(states=(TrialState.FAIL,)) == []
    into.propose()
    running = into.study.get_trials(states=(TrialState.RUNNING,))
    assert [trial.number for trial in running] == [len(values)]


def test_of_a_long_front_half_of_what_tpe_learns_from_is_left_to_the_latest(short_memory: int) -> None:
    into = proposer("tpe")
    for number in range(80):
        # Each is on the front.
        into.propose_this(into.space.anchor())
        into.tell(number, [0.01 * number, 1.0 + number], TrialState.COMPLETE, {})
    numbers = [trial.number for trial in into.study.get_trials(deepcopy=False)]
    assert len(numbers) <= short_memory
    assert numbers[0] == 0
    assert numbers[-15:] == list(range(65, 80))


def test_a_long_study_that_is_opened_again_proposes_the_same(short_memory: int) -> None:
    whole = proposer("tpe")
    expected = advance(whole, 60)
    # The trials' ids in memory are their numbers.
    history = [whole.storage.get_trial(number) for number in range(45)]
    assert advance(proposer("tpe", history=history), 15) == expected[45:]
