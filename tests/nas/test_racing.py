"""Races for the places on a front, of candidates whose true accuracy is known."""

from __future__ import annotations

import numpy as np
import pytest

from nas import pareto
from nas.config import MOST_TRAININGS
from nas.search.model import Scale
from nas.search.racing import CONFIDENCE, TRAININGS, Race

NOISE = 0.024


class Pool:
    """Candidates whose accuracy grows with latency, and their noisy trainings."""

    def __init__(self, count: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.latency_ms = np.exp(self.rng.uniform(np.log(0.03), np.log(0.6), count))
        macs = self.latency_ms * 3e7 * np.exp(self.rng.normal(0, 0.3, count))
        params = macs / 100 * np.exp(self.rng.normal(0, 0.5, count))
        self.accuracy = 0.45 + 0.35 * (1 - np.exp(-self.latency_ms / 0.12)) + self.rng.normal(0, 0.024, count)
        searched = self.accuracy + self.rng.normal(0, NOISE, count)
        features = np.log(np.column_stack([params, macs, self.latency_ms]))
        self.race = Race(searched, self.latency_ms, Scale.of(features)(features))

    def train(self, index: int) -> None:
        self.race.add(index, float(self.accuracy[index] + self.rng.normal(0, NOISE)))

    def run(self, most: int, batch: int = 4) -> int:
        trained = 0
        while trained < most and (chosen := self.race.next(min(batch, most - trained))):
            for index in chosen:
                self.train(index)
            trained += len(chosen)
        return trained

    def volume(self, accuracy: np.ndarray, indices: list[int] | np.ndarray) -> float:
        return pareto.hypervolume(accuracy, self.latency_ms[indices], 0.6)

    def optimism(self) -> tuple[float, float]:
        """By how much the hypervolume of the front as searched, and as confirmed, is greater than the truth."""
        everyone = np.arange(len(self.accuracy))
        searched = pareto.front(self.race.searched, self.latency_ms)
        eligible = self.race.eligible()
        means = np.array([np.mean(self.race.further[index]) for index in eligible])
        confirmed = np.array(eligible)[pareto.front(means, self.latency_ms[eligible])]
        return (
            self.volume(self.race.searched, everyone) - self.volume(self.accuracy[searched], searched),
            self.volume(means, eligible) - self.volume(self.accuracy[confirmed], confirmed),
        )


def test_a_fifth_of_the_trainings_takes_most_of_the_optimism_away() -> None:
    found = []
    for seed in range(12):
        pool = Pool(200, seed)
        assert pool.run(40) == 40
        found.append(pool.optimism())
    searched, confirmed = np.mean(found, axis=0)
    assert searched > 0.025
    assert confirmed < 0.4 * searched


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    held = []
    for seed in range(12):
        pool = Pool(100, seed)
        pool.run(40)
        for index in pool.race.eligible():
            mean, low, high = pool.race.interval(index, images=10**9)
            assert low < mean < high
            held.append(low <= pool.accuracy[index] <= high)
    assert 0.9 <= np.mean(held) <= 0.985


def test_few_validation_images_make_an_interval_wider() -> None:
    pool = Pool(30, 0)
    pool.run(30)
    index = pool.race.eligible()[0]
    _, low, high = pool.race.interval(index, images=10**9)
    _, lower, higher = pool.race.interval(index, images=50)
    assert higher - lower > 2 * (high - low)


def test_an_interval_is_one_where_all_images_are_told_apart() -> None:
    race = Race(np.array([1.0, 1.0]), np.array([1.0, 2.0]), np.zeros((2, 3)), further=[[1.0], [0.0]])
    assert race.interval(0, images=3)[1] < 0.75
    assert race.interval(1, images=3)[2] > 0.25
    # Half of Agresti and Coull's interval for 3 of 3 is 0.34, and the spread between seeds is little beside it.
    assert race.interval(0, images=3)[1] > 0.5


def test_where_all_are_equally_accurate_the_fastest_is_the_front_and_no_other_is_trained() -> None:
    count = 30
    rng = np.random.default_rng(0)
    race = Race(np.full(count, 0.9), rng.permutation(count) + 1.0, rng.standard_normal((count, 3)))
    trained = 0
    while chosen := race.next(4):
        for index in chosen:
            race.add(index, 0.9)
        trained += len(chosen)
    assert race.decided()
    assert trained == TRAININGS
    assert race.eligible() == [int(np.argmin(race.latency_ms))]


def test_those_that_are_far_from_the_front_are_not_trained_again() -> None:
    pool = Pool(60, 1)
    # Accurate in the search, but the slowest of all.
    hopeless = int(np.argmax(pool.latency_ms))
    pool.race.searched[hopeless] = 0.2
    pool.run(60)
    assert pool.race.trained(hopeless) == 0


def test_a_race_ends_when_the_front_is_known() -> None:
    race = Race(np.array([0.3, 0.6, 0.5, 0.9]), np.array([1.0, 2.0, 3.0, 4.0]), np.zeros((4, 3)))
    truth = [0.3, 0.6, 0.5, 0.9]
    trained = 0
    while chosen := race.next(3):
        for index in chosen:
            race.add(index, truth[index])
            trained += 1
        assert trained < 40
    assert race.decided()
    assert [race.trained(index) for index in (0, 1, 3)] == [TRAININGS] * 3
    # Whoever is no member is not eligible before it was trained as often as they.
    assert race.eligible() == [0, 1, 3]
    probability = race.membership()
    assert (probability[[0, 1, 3]] >= CONFIDENCE).all()
    assert probability[2] <= 1 - CONFIDENCE


def test_nothing_is_confirmed_while_a_likely_member_was_not_trained_again() -> None:
    pool = Pool(60, 2)
    for index in pool.race.next(3):
        pool.train(index)
    assert pool.race.eligible() == []
    while missing := pool.race.missing(2):
        for index in missing:
            pool.train(index)
    assert pool.race.eligible()


def test_a_candidate_that_fails_each_time_is_given_up() -> None:
    race = Race(np.array([0.3, 0.9]), np.array([1.0, 2.0]), np.zeros((2, 3)))
    trained = [0, 0]
    while chosen := race.next(2):
        for index in chosen:
            trained[index] += 1
            race.add(index, 0.3 if index == 0 else None)
    assert trained[1] == TRAININGS
    assert trained[0] <= MOST_TRAININGS
    assert race.eligible() == [0]
    assert race.membership()[1] == 0


def test_a_race_makes_the_same_choices_again() -> None:
    first, second = Pool(80, 3), Pool(80, 3)
    assert first.race.next(6) == second.race.next(6)
    first.run(20)
    second.run(20)
    assert first.race.further == second.race.further


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_race_of_few_can_be_run(count: int) -> None:
    pool = Pool(count, 4)
    pool.run(20)
    assert pool.race.eligible()
