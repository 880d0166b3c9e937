"""The pilot, which chooses the schedule when a study begins."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Generator, Sequence
from dataclasses import replace

import numpy as np
import pytest

from nas.config import PILOT, LatencyConfig, ProxyConfig, SearchConfig
from nas.errors import CandidateFailed, UsageError
from nas.lab.invented import FakeEvaluator
from nas.recorded import RecordedStudy
from nas.search import loop as search
from nas.search.pilot import AFFORDABLE_SECONDS, Adjustable, Pilot, Piloting, PilotTraining
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
            result = CandidateFailed("the loss diverged") if self.failing else self.result(each, seconds)
            yield Done(index, 0, seconds, result)

    def seconds_of(self, proxy: ProxyConfig) -> float:
        return self.each * proxy.steps * proxy.batch_size / 32

    def result(self, each: PilotTraining, seconds: float) -> ProxyResult:
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
    return Piloting(config or config_of(), trainer, lambda line: None).run()


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
        f"pilot of 8 networks, 400 steps: accuracy {measured.accuracy:.1%}, noise between seeds "
        f"{100 * measured.noise:.1f} points, spread between networks {100 * (measured.spread or 0):.1f} points, "
        f"tau to half as many steps {measured.agreement:.2f}"
    )
    assert json.loads(pilot.to_json())["measured"]["steps"] == 400


@pytest.mark.parametrize("budget", [20, 49, 50, 99, 100, 200, 1000])
@pytest.mark.parametrize("images", [3_000, 16_000, 40_000])
def test_a_pilot_costs_a_tenth_of_the_search_at_most(budget: int, images: int) -> None:
    trainer = Trainer(images)
    pilot = pilot_of(trainer, config_of(budget))
    spent = sum(each.proxy.steps for each in trainer.done)
    # The seconds of the timings, of which a search has as many as candidates, are not counted.
    assert spent <= 0.1 * 1.2 * budget * pilot.proxy.steps + 2 * 20
    assert pilot.seconds == pytest.approx(sum(trainer.seconds_of(each.proxy) for each in trainer.done[2:]))


def test_half_the_rate_is_taken_where_that_is_more_accurate() -> None:
    assert pilot_of(Trainer(best_rate=0.004, noise=0.0)).proxy.learning_rate == 0.004
    assert pilot_of(Trainer()).proxy.learning_rate == 0.008
    # What the user gives stays.
    fixed = config_of(proxy=ProxyConfig(learning_rate=0.01), pilot=("steps", "batch_size"))
    assert pilot_of(Trainer(best_rate=0.001), fixed).proxy == ProxyConfig(steps=400, learning_rate=0.01)


def test_a_longer_schedule_is_taken_where_noise_hides_the_networks() -> None:
    assert pilot_of(Trainer(noise=0.05, spread=0.06)).proxy.steps == 800
    trainer = Trainer(noise=0.05, spread=0.0, images=10**6, step_seconds=0.001)
    trainer.val_images = 10**6
    hopeless = pilot_of(trainer)
    assert hopeless.proxy.steps == 3200
    # Where more steps are taken and are not known to suffice, both is said.
    doubtful = pilot_of(Trainer(noise=0.05, spread=0.0))
    assert doubtful.proxy.steps == 800
    assert doubtful.lines[-1].startswith("warning: one training hardly tells these networks apart; 1600 steps might")
    assert hopeless.lines[-1].startswith("warning: one training hardly tells these networks apart, and no longer")


def test_few_validation_images_are_a_reason_to_warn() -> None:
    trainer = Trainer(noise=0.05, spread=0.0, step_seconds=3.0)
    trainer.val_images = 3
    lines = pilot_of(trainer).lines
    assert lines[-1].startswith("warning: one training hardly tells these networks apart: 3 validation images know an")


def test_a_schedule_is_no_longer_than_the_user_can_wait() -> None:
    slow = pilot_of(Trainer(20_000, step_seconds=0.1))
    assert slow.proxy.steps == 400 < 800
    assert 240 * 400 * 0.1 / 2 <= AFFORDABLE_SECONDS < 240 * 800 * 0.1 / 2
    assert slow.lines[-1] == "800 steps would suit 20,000 images, but the search would take about 2:40:00"
    hurried = pilot_of(Trainer(20_000), config_of(time_limit_s=600.0))
    assert hurried.proxy.steps == 400


def test_a_time_limit_that_leaves_no_time_for_a_pilot_is_kept() -> None:
    trainer = Trainer(step_seconds=1.0)
    pilot = pilot_of(trainer, config_of(20, time_limit_s=100.0))
    assert all(each.proxy.steps <= 20 for each in trainer.done)
    assert (pilot.proxy.steps, pilot.measured) == (200, None)
    assert pilot.lines[0].endswith("there was no pilot (the time limit leaves too little time for it)")


def test_trainings_that_fail_leave_the_usual_schedule() -> None:
    pilot = pilot_of(Trainer(failing=True))
    assert pilot.proxy == ProxyConfig()
    assert pilot.lines[0].endswith("there was no pilot (the loss diverged)")


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
    config = config_of(25, storage=sqlite_url, confirm=0)
    assert isinstance(Trainer(), Adjustable)
    assert not isinstance(FakeEvaluator(), Adjustable)
    search.run(config, Trainer())
    again = Trainer()
    assert search.run(replace(config, budget=30), again).complete == 30
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
    search.run(config_of(19, storage=sqlite_url), trainer)
    assert trainer.done == []
