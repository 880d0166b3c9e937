"""The sampler that models: features, models, expected improvement, and what it proposes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from nas import pareto
from nas.config import Limits
from nas.display.notes import INTERRUPTED, REASON
from nas.lab.invented import FakeEvaluator
from nas.search import model
from nas.search.features import SIZES, features, matrix
from nas.search.front_sampler import LATENCY, MEMORY, STARTUP_TRIALS, FrontModel, FrontSampler, Memory
from nas.search.improvement import Staircase
from nas.search.model import MILESTONES, Kernel, Model, Scale, kernel_for
from nas.search.parameters import distribution
from search_spaces import ArchSpec, SearchSpace, cost, load_space
from tests.conftest import make_tiny_space

SMALL = load_space("small")
DIRECTIONS = [optuna.study.StudyDirection.MAXIMIZE, optuna.study.StudyDirection.MINIMIZE]


def draws(count: int, space: SearchSpace = SMALL, seed: int = 0) -> list[ArchSpec]:
    rng = random.Random(seed)
    return [space.sample(rng) for _ in range(count)]


# -- Features ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["small", "imagenet", "rung1@32", "rung5.5@32,48,64", "rung11@224"])
def test_architectures_of_any_space_have_the_same_features(name: str) -> None:
    rows = matrix(draws(50, load_space(name)), 32, 10)
    assert rows.shape == (50, len(features(SMALL.anchor(), 32, 10)))
    assert np.isfinite(rows).all()
    assert len(np.unique(rows, axis=0)) == len(set(draws(50, load_space(name))))


def test_the_first_features_are_the_size() -> None:
    arch = SMALL.anchor()
    counted = cost(arch, 32, 10)
    assert features(arch, 32, 10)[:SIZES] == pytest.approx([np.log(counted.params), np.log(counted.macs)])


def test_features_that_do_not_vary_count_nothing() -> None:
    rows = np.array([[1.0, 2.0, 5.0], [3.0, 2.0, 7.0]])
    scaled = Scale.of(rows)(rows)
    assert scaled[:, 1].tolist() == [0, 0]
    assert scaled[:, 2].tolist() == [-1, 1]
    assert scaled[:, 0].tolist() == [-model.SIZE_WEIGHT, model.SIZE_WEIGHT]
    assert rows.tolist() == [[1, 2, 5], [3, 2, 7]]


# -- The model ---------------------------------------------------------------------------------------------------------


def noisy_values(count: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points, a smooth function of them, and the same with noise."""
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((count, 4))
    truth = 0.6 + 0.1 * np.tanh(points[:, 0]) + 0.05 * points[:, 1] * points[:, 2]
    return points, truth, truth + noise * rng.standard_normal(count)


def test_a_model_knows_the_truth_and_how_well_it_knows_it() -> None:
    points, truth, values = noisy_values(400, 0.03)
    kernel = kernel_for(points[:200], values[:200], {})
    fitted = Model.of(points[:200], values[:200], kernel)
    mean, deviation = fitted.predict(points[200:])
    errors = mean - truth[200:]
    assert np.sqrt(np.mean(errors**2)) < 0.025
    assert 0.7 < np.std(errors / deviation) < 1.4
    assert 0.02 < fitted.noise < 0.045


def test_a_model_is_surest_where_it_has_points() -> None:
    points, _, values = noisy_values(60, 0.01)
    fitted = Model.of(points, values, kernel_for(points, values, {}))
    _, here = fitted.predict(points[:5])
    _, away = fitted.predict(points[:5] + 20)
    assert (here < 0.5 * away).all()
    mean, _ = fitted.predict(points[:1] + 20)
    again, closer = fitted.with_more(points[:1] + 20, np.array([0.1])).predict(points[:1] + 20)
    assert again[0] < mean[0] - 0.2
    assert closer[0] < 0.8 * away[0]


def test_our_own_prediction_is_that_of_scikit_learn() -> None:
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    points, _, values = noisy_values(50, 0.02)
    kernel = Kernel(signal=1.5, length=3.0, noise=0.2)
    ours = Model(points, values, kernel, mean=0.5, deviation=0.1)
    theirs = GaussianProcessRegressor(
        ConstantKernel(1.5) * Matern(3.0, nu=2.5) + WhiteKernel(0.2), alpha=1e-9, optimizer=None
    ).fit(points, (values - 0.5) / 0.1)
    others, *_ = noisy_values(20, 0.02, seed=1)
    mean, deviation = theirs.predict(others, return_std=True)
    ours_mean, ours_deviation = ours.predict(others)
    assert ours_mean == pytest.approx(0.5 + 0.1 * mean)
    # Theirs is that of a value, ours that of the truth.
    assert ours_deviation == pytest.approx(0.1 * np.sqrt(deviation**2 - 0.2), rel=1e-4)


def test_what_is_left_out_is_guessed_from_all_others() -> None:
    points, _, values = noisy_values(30, 0.02)
    kernel = Kernel(signal=1.5, length=3.0, noise=0.2)
    mean, deviation = Model(points, values, kernel, mean=0.5, deviation=0.1).left_out()
    for index in (0, 7, 29):
        others = np.arange(30) != index
        without = Model(points[others], values[others], kernel, mean=0.5, deviation=0.1)
        guessed, spread = without.predict(points[index : index + 1])
        assert mean[index] == pytest.approx(guessed[0])
        assert deviation[index] == pytest.approx(np.hypot(spread[0], without.noise))


def test_what_a_model_knows_at_its_own_points_is_what_it_predicts_there() -> None:
    points, _, values = noisy_values(30, 0.02)
    modelled = Model(points, values, Kernel(1.5, 3.0, 0.2), mean=0.5, deviation=0.1).with_more(
        points[:2] + 1, np.array([0.6, 0.7]), np.array([0.0, 0.05])
    )
    assert modelled.fitted() == pytest.approx(modelled.predict(modelled.points)[0])
    assert modelled.means(points[:3] + 2) == pytest.approx(modelled.predict(points[:3] + 2)[0])


def test_a_mean_counts_as_much_as_the_values_that_it_is_of() -> None:
    points, _, values = noisy_values(30, 0.02)
    kernel = Kernel(1.5, 3.0, 0.2, scale=(0.5, 0.1))
    again = np.array([values[4] - 0.05, values[4] - 0.02])
    apart = Model.of(points, values, kernel).with_more(points[[4, 4]], again)
    averaged = values.copy()
    averaged[4] = (values[4] + again.sum()) / 3
    together = Model.of(points, averaged, kernel, np.where(np.arange(30) == 4, 3.0, 1.0))
    assert np.array(together.predict(points + 0.1)) == pytest.approx(np.array(apart.predict(points + 0.1)), abs=1e-7)
    assert together.fitted() == pytest.approx(together.predict(points)[0])
    # One more is a single value.
    assert together.with_more(points[:1], values[:1]).counts.tolist()[-1] == 1
    assert "_factor" not in vars(together.like(values))


def test_other_figures_at_the_same_points_cost_no_second_factor() -> None:
    points, truth, values = noisy_values(30, 0.02)
    modelled = Model.of(points, values, Kernel(1.5, 3.0, 0.2, scale=(0.5, 0.1)))
    modelled.left_out()
    others = modelled.like(7 + 3 * truth)
    assert others._factor is modelled._factor
    alone = Model.of(points, 7 + 3 * truth, Kernel(1.5, 3.0, 0.2))
    assert np.array(others.left_out()) == pytest.approx(np.array(alone.left_out()))
    assert np.array(others.predict(points[:3] + 1)) == pytest.approx(np.array(alone.predict(points[:3] + 1)))
    # A doubt of a value is one on that value's own scale.
    doubtful = modelled.with_more(points[:1], values[:1], np.array([0.1]))
    doubtful.left_out()
    assert "_factor" not in vars(doubtful.like(doubtful.values))


def test_a_kernel_depends_on_the_first_points_only() -> None:
    points, _, values = noisy_values(79, 0.02)
    known: dict[int, Kernel] = {}
    assert kernel_for(points[:9], values[:9], known) == Kernel(*model.FIRST)
    first = kernel_for(points[:40], values[:40], known)
    assert kernel_for(points, values, known) is first
    assert kernel_for(points, values, {}) == first
    assert list(known) == [40]
    assert 40 in MILESTONES


def test_the_noise_stays_what_it_was_when_a_search_concentrates() -> None:
    """The noise was a share of the variance of the first values, times the variance of those that were given."""
    points, _, first = noisy_values(80, 0.03)
    rng = np.random.default_rng(1)
    near = 0.05 * rng.standard_normal((79, 4))
    values = np.concatenate([first, 0.6 + 0.03 * rng.standard_normal(79)])
    together = np.concatenate([points, near])
    assert values.std() < 0.8 * first.std()
    kernel = kernel_for(together, values, {})
    assert Model.of(together, values, kernel).noise == pytest.approx(Model.of(points, first, kernel).noise)
    assert 0.022 < Model.of(together, values, kernel).noise < 0.04
    # Other figures than those by which a kernel was found have their own scale.
    assert kernel_for(together[:9], values[:9], {}).scale is None


def test_few_points_do_not_make_believe_that_there_is_no_noise() -> None:
    for seed in range(8):
        points, _, values = noisy_values(20, 0.03, seed)
        assert 0.01 < Model.of(points, values, kernel_for(points, values, {})).noise < 0.09


def test_a_kernel_of_equal_values_is_the_usual_one() -> None:
    """A scale of next to nothing would stay until the next milestone."""
    points, *_ = noisy_values(10, 0.03)
    assert kernel_for(points, np.full(10, 0.7), {}) == Kernel(*model.FIRST)


# -- Improvement -------------------------------------------------------------------------------------------------------


def test_the_expected_improvement_is_what_sampling_finds() -> None:
    accuracy, latency_ms = np.array([0.4, 0.7, 0.6, 0.8]), np.array([0.1, 0.2, 0.3, 2.0])
    stairs = Staircase.of(accuracy, latency_ms, 0.05, 1.0)
    assert stairs.edges.tolist() == [0.05, 0.1, 0.2, 1.0]
    assert stairs.heights.tolist() == [0, 0.4, 0.7]
    mean, deviation, own = np.array([0.5, 0.75, 0.3]), np.array([0.1, 0.05, 0.02]), np.array([0.08, 0.5, 0.15])
    drawn = mean + deviation * np.random.default_rng(0).standard_normal((200_000, 3))

    def volume(extra: list[tuple[float, float]], log: bool) -> float:
        grid = np.linspace(np.log(0.05), 0, 4001) if log else np.linspace(0.05, 1, 4001)
        at = np.exp(grid) if log else grid
        best = np.zeros(len(at))
        for height, ms in [*zip(accuracy, latency_ms, strict=True), *extra]:
            best = np.maximum(best, np.where(at >= ms, height, 0))
        return float(best.mean())

    before = [volume([], log) for log in (False, True)]
    for index in range(3):
        # Accuracy grows the volume piecewise linearly, so that a coarse histogram of it is enough.
        shares, ends = np.histogram(drawn[:, index], bins=60)
        heights = (ends[1:] + ends[:-1]) / 2
        found = sum(
            share / drawn.shape[0] * np.mean([
                volume([(height, own[index])], log) - old for log, old in zip((False, True), before, strict=True)
            ])
            for height, share in zip(heights, shares, strict=True)
        )  # fmt: skip
        expected = stairs.improvement(mean, deviation, own)[index]
        assert expected == pytest.approx(found, rel=0.03, abs=2e-5)


def test_what_is_too_slow_adds_nothing_and_a_first_network_adds_much() -> None:
    empty = Staircase.of(np.zeros(0), np.zeros(0), 0.1, 1.0)
    gain = empty.improvement(np.array([0.5, 0.5]), np.array([0.01, 0.01]), np.array([0.1, 1.5]))
    assert gain == pytest.approx([0.5, 0.0])


# -- Proposals ---------------------------------------------------------------------------------------------------------


class Landscape:
    """A search of a space in memory, by the invented accuracies and latencies."""

    def __init__(self, space: SearchSpace = SMALL, seed: int = 0, most_ms: float = 2.0, **options: object) -> None:
        self.memory = Memory(space, 32, 10, most_ms, **options)  # type: ignore[arg-type]
        self.seed = seed
        self.study = optuna.create_study(directions=DIRECTIONS)
        self.distributions = {name: distribution(choices) for name, choices in self.memory.choices.items()}
        self.known: dict[str, int] = {}
        self.fake = FakeEvaluator()
        self.archs: list[ArchSpec] = []

    def trial(self, arch: ArchSpec, state: TrialState, **fields: object) -> FrozenTrial:
        values = self.memory.space.values_of(arch)
        params = {name: values[name] for name in self.distributions}
        return create_trial(params=params, distributions=self.distributions, state=state, **fields)  # type: ignore[arg-type]

    def add(self, arch: ArchSpec, state: TrialState = TrialState.COMPLETE, **fields: object) -> None:
        if state == TrialState.COMPLETE and not fields:
            fields["values"] = list(self.score(arch))
        self.known[arch.arch_id] = len(self.known)
        self.archs.append(arch)
        self.study.add_trial(self.trial(arch, state, **fields))

    def fails(self, arch: ArchSpec) -> bool:
        return arch.stages[0].kernel_size == 7 and arch.stages[0].group_width == 16

    def score(self, arch: ArchSpec) -> tuple[float, float]:
        return self.fake.train_one(arch).accuracy, self.fake.measure(arch).median_ms

    def sampler(self) -> FrontSampler:
        return FrontSampler(self.memory, 1000 * self.seed + len(self.known), self.known)

    def search(self, count: int, random_only: bool = False) -> float:
        """Evaluate so many architectures; returns the hypervolume."""
        while len(self.known) < count:
            arch = self.sampler().random() if random_only else self.sampler().proposed(self.study)
            self.add(arch, *([TrialState.FAIL] if self.fails(arch) else []))
        points = np.array([self.score(arch) for arch in self.archs if not self.fails(arch)])
        return pareto.hypervolume(points[:, 0], points[:, 1], self.memory.most_ms)


def test_it_finds_in_thirty_what_random_search_does_not_find_in_eighty() -> None:
    modelled = [Landscape(seed=seed).search(30) for seed in range(2)]
    drawn = [Landscape(seed=seed).search(80, random_only=True) for seed in range(2)]
    assert min(modelled) > max(drawn)


def test_the_same_history_and_seed_give_the_same_proposal() -> None:
    first, second = Landscape(), Landscape()
    first.search(25)
    for arch in first.archs:
        second.add(arch, *([TrialState.FAIL] if first.fails(arch) else []))
    assert second.sampler().proposed(second.study) == first.sampler().proposed(first.study)
    other = Landscape(seed=1)
    for arch in first.archs:
        other.add(arch, *([TrialState.FAIL] if first.fails(arch) else []))
    assert other.sampler().proposed(other.study) != first.sampler().proposed(first.study)


def test_features_are_kept_of_what_was_evaluated_only() -> None:
    """They were kept of all that a proposal looks at: 3.7 GB after 10,000 trials."""
    found = Landscape()
    found.search(STARTUP_TRIALS + 5)
    assert found.memory.features
    assert set(found.memory.features) <= {arch.arch_id for arch in found.archs}
    mixed = [found.archs[3], *draws(2, seed=7)]
    assert found.memory.points(mixed) == pytest.approx(found.memory.scale(matrix(mixed, 32, 10)))


def test_nothing_known_is_proposed_and_a_small_space_is_used_up() -> None:
    space = make_tiny_space(activation=("relu",), stem_width=(8,))
    found = Landscape(space)
    found.search(30)
    assert len({arch.arch_id for arch in found.archs}) == 30


def test_limits_on_the_size_are_kept() -> None:
    found = Landscape(limits=Limits(macs=3_000_000))
    found.search(STARTUP_TRIALS + 15)
    assert all(cost(arch, 32, 10).macs <= 3_000_000 for arch in found.archs)


def improvements(found: Landscape, archs: Sequence[ArchSpec]) -> np.ndarray:
    return FrontModel.of(found.memory, found.study.get_trials(deepcopy=False)).improvement(archs)


def with_history(change: Callable[[Landscape], None]) -> Landscape:
    found = Landscape()
    for arch in draws(40, seed=5):
        if not found.fails(arch):
            found.add(arch)
    change(found)
    return found


def test_what_fails_is_avoided_but_not_what_was_interrupted() -> None:
    plain = with_history(lambda found: None)
    best = plain.sampler().best(FrontModel.of(plain.memory, plain.study.get_trials(deepcopy=False)))

    def fails(**attrs: object) -> Callable[[Landscape], None]:
        return lambda found: found.add(best, TrialState.FAIL, user_attrs=dict(attrs))

    rng = random.Random(0)
    near = [plain.memory.mutated(best, rng, 1) for _ in range(20)]
    before = improvements(plain, near)
    assert improvements(with_history(fails(**{REASON: "out of memory"})), near).sum() < 0.8 * before.sum()
    assert improvements(with_history(fails(**{REASON: INTERRUPTED})), near) == pytest.approx(before)


def test_what_was_confirmed_is_known_by_all_its_trainings() -> None:
    """The lucky training by which it was found flattered it for good, however often it was trained again."""
    found = with_history(lambda found: None)
    trials = found.study.get_trials(deepcopy=False)
    before = FrontModel.of(found.memory, trials)
    lucky = before.members[-1]
    place, (searched, _) = found.archs.index(lucky), found.score(lucky)
    found.memory.further = {lucky.arch_id: [searched - 0.2, searched - 0.1]}
    after = FrontModel.of(found.memory, trials)
    assert after.accuracy.values[place] == pytest.approx(searched - 0.1)
    assert after.accuracy.counts is not None
    assert after.accuracy.counts[place] == 3
    assert after.accuracy.counts.sum() == len(trials) + 2
    (old,), (doubt,) = before.accuracy.predict(found.memory.points([lucky]))
    (new,), (smaller,) = after.accuracy.predict(found.memory.points([lucky]))
    assert new < old - 0.03
    assert smaller < doubt


def test_what_is_being_evaluated_is_not_proposed_nearby_again() -> None:
    plain = with_history(lambda found: None)
    best = plain.sampler().best(FrontModel.of(plain.memory, plain.study.get_trials(deepcopy=False)))
    pending = with_history(lambda found: found.add(best, TrialState.RUNNING))
    assert improvements(pending, [best])[0] < 0.5 * improvements(plain, [best])[0]


def test_a_latency_over_the_limit_is_learnt() -> None:
    """Networks turn out slower than guessed: others like them are guessed slower, too."""
    plain = with_history(lambda found: None)
    slow = draws(1, seed=9)[0]
    guessed = np.exp(FrontModel.of(plain.memory, plain.study.get_trials(deepcopy=False)).latency.predict(
        plain.memory.points([slow]))[0][0])  # fmt: skip
    excess = {LATENCY: 1.5}

    def over(found: Landscape) -> None:
        found.add(slow, TrialState.PRUNED, constraints=excess)

    learnt = with_history(over)
    later = np.exp(FrontModel.of(learnt.memory, learnt.study.get_trials(deepcopy=False)).latency.predict(
        learnt.memory.points([slow]))[0][0])  # fmt: skip
    assert guessed < later <= 5.5


def test_a_limit_on_the_memory_is_learnt() -> None:
    plain = with_history(lambda found: None)
    best = plain.sampler().best(FrontModel.of(plain.memory, plain.study.get_trials(deepcopy=False)))
    rng = random.Random(0)
    near = [plain.memory.mutated(best, rng, 1) for _ in range(20)]

    def over(found: Landscape) -> None:
        for arch in near[:5]:
            found.add(arch, TrialState.PRUNED, constraints={LATENCY: -0.5, MEMORY: 0.2})

    assert improvements(with_history(over), near[5:]).sum() < 0.7 * improvements(plain, near[5:]).sum()


def test_where_hardly_a_random_network_keeps_the_limit_fast_ones_are_drawn_soon() -> None:
    found = Landscape(most_ms=0.0)
    latencies = sorted(found.fake.measure(arch).median_ms for arch in draws(400, seed=3))
    limit = latencies[12]
    found.memory.most_ms = limit
    while len(found.known) < 60:
        arch = found.sampler().proposed(found.study)
        ms = found.fake.measure(arch).median_ms
        if ms > limit:
            found.add(arch, TrialState.PRUNED, constraints={LATENCY: ms / limit - 1})
        else:
            found.add(arch, *([TrialState.FAIL] if found.fails(arch) else []))
    kept = sum(found.fake.measure(arch).median_ms <= limit for arch in found.archs[20:])
    # Of random ones it would be one or two.
    assert kept >= 12
