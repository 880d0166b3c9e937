"""Networks that nobody trained: they are like those of the table."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest

from nas.lab.invented import FakeEvaluator
from nas.lab.world import World
from tests.nas.invented_table import NOISE, SPACE, STEPS, networks


@pytest.fixture(scope="module")
def world() -> World:
    return World(networks(150), SPACE, 32, 10)


def test_each_architecture_has_one_truth_near_what_the_trees_guess(world: World) -> None:
    rng = random.Random(1)
    archs = [SPACE.sample(rng) for _ in range(40)]
    first = [world.truth(arch) for arch in archs]
    assert [world.truth(arch) for arch in archs] == first
    fake = FakeEvaluator()
    errors = [world.truth(arch)[1] / fake.measure(arch).median_ms - 1 for arch in archs]
    assert np.median(np.abs(errors)) < 3 * world.latency_error
    assert world.reference_ms == pytest.approx(2 * world.truth(SPACE.anchor())[1])


def test_noise_is_that_of_the_seeds_and_the_rest_is_the_networks_own(world: World) -> None:
    assert world.noise == pytest.approx(NOISE, rel=0.25)
    # A fifth of the networks has a mean of three trainings.
    assert world.own_error == pytest.approx(math.sqrt(world.error**2 - world.noise**2 * (0.8 + 0.2 / 3)))
    assert 0 < world.own_error < world.error


def test_trainings_scatter_around_the_truth_by_the_noise(world: World) -> None:
    arch = SPACE.sample(random.Random(2))
    rng = np.random.default_rng(0)
    accuracy = [world.train(arch, rng).accuracy for _ in range(400)]
    assert np.mean(accuracy) == pytest.approx(world.truth(arch)[0], abs=0.006)
    assert np.std(accuracy) == pytest.approx(world.noise, rel=0.3)


def test_a_curve_says_as_much_of_its_end_as_those_of_the_table(world: World) -> None:
    """In the table, the last point of a curve is the accuracy itself."""
    rng = np.random.default_rng(1)
    draws = random.Random(3)
    for result in (world.train(SPACE.sample(draws), rng) for _ in range(50)):
        assert [point.step for point in result.curve] == list(range(5, STEPS + 1, 5))
        assert result.curve[-1].train_accuracy == pytest.approx(result.accuracy, abs=1e-6)
        assert result.curve[9].train_loss == pytest.approx(2.5 - result.accuracy / 2, abs=1e-6)
        assert result.curve[-1].seconds == pytest.approx(result.seconds)
        assert 1 < result.seconds < 2


def test_a_table_needs_networks_and_seeds() -> None:
    table = networks(60)
    with pytest.raises(ValueError, match="40 networks, 8 of them with several seeds, are too few"):
        World(table[:40], SPACE, 32, 10)
    once = [replace(network, short=network.short[:1]) for network in table]
    with pytest.raises(ValueError, match="60 networks, 0 of them"):
        World(once, SPACE, 32, 10)
    failed = [replace(network.short[0], accuracy=None, loss=None, curve=[]) for network in table]
    assert World([*table, replace(table[0], short=tuple(failed[:1]))], SPACE, 32, 10).noise > 0
