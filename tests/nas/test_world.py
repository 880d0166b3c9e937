"""Networks that nobody trained: they are like those of the table."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest

from nas.lab.invented import FakeEvaluator
from nas.lab.world import SURPRISE, World
from search_spaces.cost import steps_cost
from tests.nas.invented_table import NOISE, SPACE, STEPS, networks


@pytest.fixture(scope="module")
def world() -> World:
    return World(networks(150), SPACE, 32, 10)


def test_each_architecture_has_one_truth_that_misses_as_the_trees_do(world: World) -> None:
    rng = random.Random(1)
    archs = [SPACE.sample(rng) for _ in range(40)]
    first = [world.truth(arch) for arch in archs]
    assert [world.truth(arch) for arch in archs] == first
    fake = FakeEvaluator()
    errors = [math.log(world.truth(arch)[1] / fake.measure(arch).median_ms) for arch in archs]
    assert np.median(np.abs(errors)) < 3 * world.latency_error
    assert world.reference_ms == pytest.approx(2 * world.truth(SPACE.anchor())[1])


def test_a_latency_is_a_surprise_to_the_trees_too(world: World) -> None:
    """A world whose latencies are what trees say smoothly has nothing to gain by timing before training."""
    rng = random.Random(4)
    archs = [SPACE.sample(rng) for _ in range(60)]
    guessed = world.guess_of_latency.predict(np.array([world.seen(arch) for arch in archs]))
    errors = np.log([world.truth(arch)[1] for arch in archs]) - guessed
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(SURPRISE * world.latency_error, rel=0.35)


def test_a_network_of_the_table_has_the_figures_of_the_table(world: World) -> None:
    table = networks(150)
    for network in (table[0], table[1]):
        count = len(network.short)
        assert world.truth(network.arch)[1] == network.latency_ms
        for seed in (0, 1):
            for number in range(count):
                one, trained = network.short[(seed + number) % count], world.train(network.arch, seed, number)
                assert (trained.accuracy, trained.loss) == pytest.approx((one.accuracy, one.loss))
                # How long it took depended on what else ran.
                assert trained.seconds == world.train(network.arch, 1 - seed, 0).seconds > 0
                curve = [[point.step, point.train_loss, point.train_accuracy] for point in trained.curve]
                assert np.array(curve) == pytest.approx(np.array(one.curve))
        # What comes after those is drawn, and the same search draws the same.
        drawn = [world.train(network.arch, seed, count).accuracy for seed in (0, 0, 1)]
        assert drawn[0] == drawn[1] != drawn[2]
        assert drawn[0] not in [one.accuracy for one in network.short]


def test_a_network_that_was_trained_once_may_have_been_lucky(world: World) -> None:
    """The most accurate by a single training are so by chance in part, as in a search."""
    once = [network for network in networks(150) if len(network.short) == 1]
    luck = np.array([(network.short[0].accuracy or 0) - world.truth(network.arch)[0] for network in once])
    assert np.std(luck) == pytest.approx(world.noise, rel=0.3)
    best = np.argsort([-(network.short[0].accuracy or 0) for network in once])[:20]
    assert np.mean(luck[best]) > 0.3 * world.noise
    assert abs(np.mean(luck)) < 0.005


def test_trees_see_the_stages_and_what_each_costs(world: World) -> None:
    arch = SPACE.sample(random.Random(5))
    seen = world.seen(arch)
    assert len(seen) == len(SPACE.choices()) + 3 + 2 * len(arch.stages)
    assert seen[:4] == [float(arch.activation == name) for name in SPACE.activation]
    last = arch.stages[-1]
    assert seen[-13:-6] == [last.width, last.kernel_size, last.group_width, last.expansion, last.blocks, last.stride,
                            arch.head_width]  # fmt: skip
    # All but the stem and the head, which the costs of stages do not hold.
    steps = [step for step in arch.walk(32) if step.name.startswith("stage")]
    whole = steps_cost(steps, 10)
    assert sum(map(math.exp, seen[-6::2])) == pytest.approx(whole.params)
    assert sum(map(math.exp, seen[-5::2])) == pytest.approx(whole.macs)


def test_noise_is_that_of_the_seeds_and_the_rest_is_the_networks_own(world: World) -> None:
    assert world.noise == pytest.approx(NOISE, rel=0.25)
    # A fifth of the networks has a mean of three trainings.
    assert world.own_error == pytest.approx(math.sqrt(world.error**2 - world.noise**2 * (0.8 + 0.2 / 3)))
    assert 0 < world.own_error < world.error


def test_trainings_scatter_around_the_truth_by_the_noise(world: World) -> None:
    arch = SPACE.sample(random.Random(2))
    accuracy = [world.train(arch, seed).accuracy for seed in range(400)]
    assert np.mean(accuracy) == pytest.approx(world.truth(arch)[0], abs=0.006)
    assert np.std(accuracy) == pytest.approx(world.noise, rel=0.3)


def test_a_curve_says_as_much_of_its_end_as_those_of_the_table(world: World) -> None:
    """In the table, the last point of a curve is the accuracy itself."""
    draws = random.Random(3)
    for result in (world.train(SPACE.sample(draws), seed) for seed in range(50)):
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
