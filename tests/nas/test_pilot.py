"""The pilot, which chooses the schedule when a study begins."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Generator, Sequence
from dataclasses import replace

import numpy as np
import pytest

from nas.config import PILOT, LatencyConfig, Limits, ProxyConfig, SearchConfig
from nas.errors import CandidateFailed, UsageError
from nas.lab.invented import FakeEvaluator
from nas.recorded import RecordedStudy
from nas.search import loop as search
from nas.search.pilot import AFFORDABLE_SECONDS, PROBE_STEPS, Adjustable, Pilot, Piloting, PilotTraining
from nas.training.curves import CurvePoint
from nas.training.proxy import ProxyResult
from nas.training.workers import Done
from search_spaces import cost
from studies import Store


class Trainer(FakeEvaluator):
    """Trainings by any schedule; networks differ by their operations, and each training by what its seed adds.

    Args:
        noise, spread: standard deviations of accuracy between seeds, and roughly between networks.
        step_seconds: seconds of a step of 32 images.
        best_rate: learning rate beyond which accuracy falls.
    """

    workers = 2
    trains_on = "cpu"
    devices = 1
    val_images = 3000

    def __init__(
        self, images: int = 16_000, noise: float = 0.01, spread: float = 0.05, step_seconds: float = 0.01,
        best_rate: float = 1.0, failing: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.train_images, self.noise, self.spread = images, noise, spread
        self.each, self.best_rate, self.failing = step_seconds, best_rate, failing
        self.done: list[PilotTraining] = []
        self.adopted: ProxyConfig | None = None

    def train_as(self, trainings: Sequence[PilotTraining]) -> Generator[Done[ProxyResult]]:
        for index, each in enumerate(trainings):
            self.done.append(each)
            seconds = self.seconds_of(each.proxy)
            result: ProxyResult | CandidateFailed
            failing = self.failing and each.proxy.steps > PROBE_STEPS
            result = CandidateFailed("the loss diverged") if failing else self.result(each, seconds)
            yield Done(index, 0, seconds, result)

    def seconds_of(self, proxy: ProxyConfig) -> float:
        return self.each * proxy.steps * proxy.batch_size / 32

    def result(self, each: PilotTraining, seconds: float) -> ProxyResult | CandidateFailed:
        digest = hashlib.sha256(f"{each.arch.arch_id} {each.seed} {each.proxy.steps}".encode()).digest()
        error = float(np.random.default_rng(list(digest)).standard_normal())
        size = math.log(cost(each.arch, 32, 10).macs / 1e7)
        accuracy = 0.6 + self.spread * size + self.noise * error - max(0.0, each.proxy.learning_rate - self.best_rate)
        curve = tuple(CurvePoint(step, 1.0, 0.5, seconds * step / each.proxy.steps) for step in (1, each.proxy.steps))
        return ProxyResult(accuracy, 1.0, curve, seconds, 0)

    def adopt(self, proxy: ProxyConfig) -> None:
        self.adopted = proxy


def config_of(budget: int = 200, **rest: object) -> SearchConfig:
    fields = {"latency": LatencyConfig(device="cpu", engine="eager"), "pilot": PILOT, **rest}
    return SearchConfig(budget=budget, **fields)  # type: ignore[arg-type]


def pilot_of(trainer: Trainer, config: SearchConfig | None = None) -> Pilot:
    return Piloting(config or config_of(), trainer).run()


def test_the_length_is_about_one_pass_over_the_images() -> None:
    chosen = {images: pilot_of(Trainer(images)).proxy.steps for images in (100, 6_000, 16_000, 20_000, 50_000, 10**6)}
    assert chosen == {100: 200, 6_000: 200, 16_000: 400, 20_000: 800, 50_000: 1600, 10**6: 3200}


def test_two_lines_say_what_was_chosen_and_found() -> None:
    trainer = Trainer(noise=0.005)
    pilot = pilot_of(trainer)
    assert trainer.adopted == pilot.proxy == ProxyConfig(steps=400)
    assert len(pilot.lines) == 2
    assert pilot.lines[0] == (
        "schedule of a candidate: 400 steps of 32 images at a rate of up to 0.008, 0.8 passes over the training "
        "images; trainings will take about 0:08:00, less what is stopped early"
    )
    measured = pilot.measured
    assert measured is not None
    assert measured.noise == pytest.approx(0.005, abs=0.003)
    assert measured.spread == pytest.approx(0.02, abs=0.01)
    assert measured.agreement is not None
    assert pilot.lines[1] == (
        f"pilot of 6 networks, 400 steps: accuracy {measured.accuracy:.1%}, noise between seeds "
        f"{100 * measured.noise:.1f} points, spread between networks {100 * (measured.spread or 0):.1f} points, "
        f"tau to half as many steps {measured.agreement:.2f}"
    )
    assert json.loads(pilot.to_json())["measured"]["steps"] == 400


@pytest.mark.parametrize("budget", [20, 49, 59, 60, 99, 100, 200, 1000])
@pytest.mark.parametrize("images", [3_000, 16_000, 40_000])
def test_a_pilot_costs_a_tenth_of_the_search_at_most(budget: int, images: int) -> None:
    trainer = Trainer(images)
    pilot = pilot_of(trainer, config_of(budget, confirm=0.0))
    spent = sum(each.proxy.steps for each in trainer.done[trainer.workers :])
    assert spent <= 0.1 * budget * pilot.proxy.steps
    assert pilot.seconds == pytest.approx(sum(trainer.seconds_of(each.proxy) for each in trainer.done[2:]))


def test_half_the_rate_is_taken_where_that_is_more_accurate() -> None:
    assert pilot_of(Trainer(best_rate=0.004, noise=0.0)).proxy.learning_rate == 0.004
    assert pilot_of(Trainer()).proxy.learning_rate == 0.008
    # What the user gives stays.
    fixed = config_of(proxy=ProxyConfig(learning_rate=0.01), pilot=("steps", "batch_size"))
    assert pilot_of(Trainer(best_rate=0.001), fixed).proxy == ProxyConfig(steps=400, learning_rate=0.01)


def test_a_longer_schedule_is_taken_where_noise_hides_the_networks() -> None:
    config = config_of(seed=2)
    assert pilot_of(Trainer(noise=0.05, spread=0.04), config).proxy.steps == 800
    # So few networks do not say so.
    assert pilot_of(Trainer(noise=0.05, spread=0.04), replace(config, budget=100)).proxy.steps == 400
    hopeless = pilot_of(Trainer(noise=0.05, spread=0.0, images=10**6, step_seconds=0.001), config)
    assert hopeless.proxy.steps == 3200
    assert hopeless.lines[-1].startswith("warning: one training hardly tells these networks apart, and no longer")
    # Where more steps are taken and are not known to suffice, both is said.
    doubtful = pilot_of(Trainer(noise=0.05, spread=0.0), config)
    assert doubtful.proxy.steps == 800
    assert doubtful.lines[-1].startswith("warning: one training hardly tells these networks apart; 1600 steps might")


def test_few_validation_images_are_a_reason_to_warn() -> None:
    trainer = Trainer(noise=0.05, spread=0.0)
    trainer.val_images = 3
    expected = "warning: one training hardly tells these networks apart: 3 validation images know an accuracy to +-"
    assert pilot_of(trainer, config_of(seed=2)).lines[-1].startswith(expected)
    equal = Trainer(noise=0.0, spread=0.0)
    equal.val_images = 3
    assert pilot_of(equal).lines[-1].startswith(expected)


def test_networks_that_are_all_as_accurate_are_a_reason_to_look_at_the_images() -> None:
    """One class dominates, say: to train longer is no help."""
    pilot = pilot_of(Trainer(noise=0.0, spread=0.0))
    assert pilot.proxy.steps == 400
    assert pilot.lines[-1].startswith("warning: all networks of the pilot are as accurate as each other (60.0%)")


def test_a_schedule_is_no_longer_than_the_user_can_wait() -> None:
    slow = pilot_of(Trainer(20_000, step_seconds=0.1))
    assert slow.proxy.steps == 400 < 800
    assert 240 * 400 * 0.1 / 2 <= AFFORDABLE_SECONDS < 240 * 800 * 0.1 / 2
    assert slow.lines[-1] == "800 steps would suit 20,000 images, but the search would take about 2:40:00"
    hurried = pilot_of(Trainer(20_000), config_of(time_limit_s=1000.0))
    assert hurried.proxy.steps == 400
    # A budget that is not to be met is none.
    assert pilot_of(Trainer(20_000), config_of(10**6, time_limit_s=1000.0)).proxy.steps == 400


def test_a_time_limit_that_leaves_no_time_for_a_pilot_is_kept() -> None:
    trainer = Trainer(step_seconds=1.0)
    pilot = pilot_of(trainer, config_of(20, time_limit_s=100.0))
    assert all(each.proxy.steps <= 20 for each in trainer.done)
    assert (pilot.proxy.steps, pilot.measured) == (200, None)
    assert pilot.lines[0].endswith("(the time limit leaves too little time for it); trainings will take about 0:40:00")


def test_where_all_trainings_fail_a_lower_rate_is_taken() -> None:
    trainer = Trainer(failing=True)
    pilot = pilot_of(trainer)
    assert trainer.adopted == pilot.proxy == ProxyConfig(steps=400, learning_rate=0.002)
    assert "there was no pilot (its trainings fail: the loss diverged)" in pilot.lines[0]
    # What the user gives stays.
    fixed = config_of(proxy=ProxyConfig(learning_rate=0.1), pilot=("steps",))
    assert pilot_of(Trainer(failing=True), fixed).proxy == ProxyConfig(steps=400, learning_rate=0.1)


def test_trainings_that_fail_are_told() -> None:
    class Sometimes(Trainer):
        def result(self, each: PilotTraining, seconds: float) -> ProxyResult | CandidateFailed:
            diverges = each.proxy.learning_rate > 0.004 and each.arch.activation != "relu" and each.proxy.steps > 20
            return CandidateFailed("the loss diverged") if diverges else super().result(each, seconds)

    pilot = pilot_of(Sometimes())
    assert pilot.proxy.learning_rate == 0.004
    assert re.match(r"warning: [0-9]+ of 24 trainings of the pilot failed \(the loss diverged\)", pilot.lines[2])


def test_the_networks_of_a_pilot_keep_the_limits_on_size() -> None:
    trainer, most = Trainer(), 6_000_000
    pilot_of(trainer, config_of(limits=Limits(macs=most)))
    assert {cost(each.arch, 32, 10).macs <= most for each in trainer.done[2:]} == {True}
    assert len({each.arch for each in trainer.done[2:]}) > 1


def test_what_is_not_to_be_chosen_stays() -> None:
    fixed = config_of(proxy=ProxyConfig(steps=700), pilot=("learning_rate",))
    assert pilot_of(Trainer(best_rate=0.004, noise=0.0), fixed).proxy == ProxyConfig(steps=700, learning_rate=0.004)


class Gpu(Trainer):
    """A GPU on which a step takes a millisecond, and from 128 images on longer."""

    trains_on = "cuda"
    workers = 1

    def seconds_of(self, proxy: ProxyConfig) -> float:
        return 0.001 * proxy.steps * max(1.0, proxy.batch_size / 128)


def test_a_gpu_gets_batches_and_steps_that_keep_it_busy() -> None:
    proxy = pilot_of(Gpu()).proxy
    assert (proxy.batch_size, proxy.learning_rate) == (128, 0.016)
    # 128,000 images a second, where one pass over the images would be 16,000.
    assert proxy.steps == 800
    assert pilot_of(Gpu(), config_of(pilot=("steps",))).proxy.batch_size == 32


# -- in a search ----------------------------------------------------------------------------------------------------


def test_a_study_keeps_what_its_pilot_chose(sqlite_url: str) -> None:
    config = config_of(20, storage=sqlite_url, confirm=0)
    assert isinstance(Trainer(), Adjustable)
    assert not isinstance(FakeEvaluator(), Adjustable)
    search.run(config, Trainer())
    again = Trainer()
    assert search.run(replace(config, budget=23), again).complete == 23
    # The schedule is the study's.
    assert again.done == []
    assert again.adopted == ProxyConfig(steps=400)
    store = Store.open(sqlite_url, create=False)
    assert store is not None
    recorded = RecordedStudy.open(store, config.study)
    assert recorded.config.proxy.steps == 400
    assert recorded.pilot_lines[0].startswith("schedule of a candidate: 400 steps of 32 images")
    store.close()
    with pytest.raises(UsageError, match=r"proxy\.steps: study has 400, now 300"):
        search.run(replace(config, proxy=ProxyConfig(steps=300), pilot=("learning_rate",)), Trainer())


def test_a_small_budget_has_no_pilot(sqlite_url: str) -> None:
    trainer = Trainer()
    search.run(config_of(19, storage=sqlite_url, confirm=0), trainer)
    assert trainer.done == []
