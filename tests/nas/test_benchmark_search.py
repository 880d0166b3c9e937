"""Samplers on a landscape of trees: what a search is judged by."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from nas.config import LatencyConfig, Sampler, SearchConfig
from nas.lab import benchmark_search
from nas.lab.benchmark_search import Known, World, differences, known_networks, look, search
from nas.lab.invented import FakeEvaluator
from nas.search import loop
from search_spaces import ArchSpec, load_space
from tests.nas.test_confirmation import Noisy

SPACE = load_space("small")


def networks(count: int) -> list[Known]:
    rng, fake = random.Random(0), FakeEvaluator()
    found = []
    while len(found) < count:
        arch = SPACE.sample(rng)
        if arch.stages[0].kernel_size == 7 and arch.stages[0].group_width == 16:
            continue
        found.append(Known(arch, fake.train_one(arch).accuracy, fake.measure(arch).median_ms))
    return found


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
    assert 0 < world.error < 0.2
    assert world.own_error == pytest.approx(np.sqrt(max(world.error**2 - benchmark_search.NOISE**2, 0)))


@pytest.mark.parametrize("sampler", Sampler)
def test_a_search_is_looked_at_and_repeats(sampler: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_search, "LOOKS", (6, 14))
    looks = search(world, sampler, seed=1, count=14)
    assert len(looks) == 2
    assert looks == search(world, sampler, seed=1, count=14)
    assert looks != search(world, sampler, seed=2, count=14)
    assert looks[0]["found"] <= looks[1]["found"]
    for each in looks:
        # The confirmed front is part of what was found.
        assert 0 < each["confirmed"] <= each["found"] < 1


def test_optimism_is_what_a_front_claims_too_much(world: World) -> None:
    archs = [known.arch for known in networks(60)]
    truth = np.array([world.truth(arch) for arch in archs])
    rng = np.random.default_rng(0)
    lucky = truth[:, 0] + benchmark_search.NOISE * rng.standard_normal(60)
    points = np.column_stack([truth[:, 0], lucky, truth[:, 1]])
    assert look(world, archs, points, 0)["optimism as searched"] > 0.005
    points[:, 1] = truth[:, 0]
    assert look(world, archs, points, 0)["optimism as searched"] == 0


def test_differences_are_paired() -> None:
    found = {
        "a": [[{"found": 0.5 + 0.1 * seed, "confirmed": 0.4}] for seed in range(4)],
        "b": [[{"found": 0.4 + 0.1 * seed, "confirmed": 0.4}] for seed in range(4)],
    }
    assert differences(found, (20,)) == [
        "a - b, found: +0.1000 ±0.0000 at 20", "a - b, confirmed: +0.0000 ±0.0000 at 20"
    ]  # fmt: skip


def test_networks_come_from_studies_of_one_deployment(tmp_path: Path) -> None:
    urls = [f"sqlite:///{tmp_path / name}.db" for name in ("one", "other")]
    for url, engine in zip(urls, ("eager", "torchscript"), strict=True):
        config = SearchConfig(budget=5, storage=url, latency=LatencyConfig(device="cpu", engine=engine), confirm=0)
        loop.run(config, Noisy())
    known = known_networks((), [f"{urls[0]}#convfirst"])
    assert len(known) == 5
    assert all(isinstance(each.arch, ArchSpec) and each.latency_ms > 0 for each in known)
    with pytest.raises(SystemExit, match=r"other\.db#convfirst: latencies of torchscript.*those before are of others"):
        known_networks((), [f"{url}#convfirst" for url in urls])
