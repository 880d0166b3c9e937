"""Trainings that end early: the rule, what it is made of, and a search that has it."""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch

from nas.config import LatencyConfig, ProxyConfig, SearchConfig
from nas.display.notes import curve_table, stopping_line
from nas.display.showcase import show
from nas.lab.invented import FakeEvaluator
from nas.recorded import RecordedStudy
from nas.search import loop as search
from nas.search.front_sampler import Memory
from nas.search.stopper import LEAST_CHANCE, LEAST_TRAININGS, Stopper, is_control, regression
from nas.training import curves
from nas.training.curves import CurvePoint
from nas.training.proxy import Batches, ProxyResult, train
from nas.training.stopping import LEAST_POINTS, Check, Rule, figures
from search_spaces import ArchSpec, load_space
from studies import Candidate, CandidateState, Store, TrainingStage
from tests.nas.test_proxy import build, easy_data

SMALL = load_space("small")


class Learning(FakeEvaluator):
    """Trainings whose curves lead to their ends only roughly, as real ones do.

    Args:
        interrupted_at: number of the training at which Ctrl-C comes.
    """

    def __init__(self, interrupted_at: int | None = None) -> None:
        super().__init__()
        self.interrupted_at, self.trainings = interrupted_at, 0

    def train_one(self, arch: ArchSpec) -> ProxyResult:
        if self.trainings == self.interrupted_at:
            raise KeyboardInterrupt
        self.trainings += 1
        return learning(arch, super().train_one(arch).accuracy)


def learning(arch: ArchSpec, truth: float) -> ProxyResult:
    """A training of 200 steps that ends near the truth."""
    rng = np.random.default_rng(int(hashlib.sha256(arch.arch_id.encode()).hexdigest()[:8], 16))
    accuracy = float(np.clip(truth + 0.02 * rng.standard_normal(), 0.05, 0.95))
    curve = []
    for number in range(1, 21):
        reached = accuracy * (1 - math.exp(-number / 6)) + 0.02 * float(rng.standard_normal())
        curve.append(CurvePoint(10 * number, 2.3 - 2 * reached, reached, 0.1 * number))
    return ProxyResult(accuracy, 1 - accuracy, tuple(curve), 2.0, 1_000_000)


@pytest.fixture
def config(sqlite_url: str) -> SearchConfig:
    return SearchConfig(budget=50, storage=sqlite_url, latency=LatencyConfig(device="cpu", engine="eager"))


def candidates(config: SearchConfig) -> list[Candidate]:
    store = Store.open(config.storage, create=False)
    assert store is not None
    found = RecordedStudy.open(store, config.study).candidates()
    store.close()
    return found


# -- the rule -------------------------------------------------------------------------------------------------------


def curve_of(accuracies: list[float]) -> list[CurvePoint]:
    return [CurvePoint(number, 1 - each, each, 1.0) for number, each in enumerate(accuracies, start=1)]


def test_figures_are_of_the_last_points_up_to_a_step() -> None:
    curve = curve_of([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.9])
    assert figures(curve, LEAST_POINTS - 1) is None
    assert figures(curve, 6) == pytest.approx((0.4, 0.6, 0.3))
    # The first look has two earlier points.
    assert figures(curve, 5) == pytest.approx((0.3, 0.7, 0.25))


def test_a_rule_gives_up_at_the_first_look_that_misses_the_needed_accuracy() -> None:
    checks = tuple(Check(step, 0.1, (1.0, 0.0, 0.0), 0.02, 0.05) for step in (6, 8))
    rule = Rule(0.7, checks, ends=True)
    assert rule.verdict(curve_of([0.4] * 5)) is None
    verdict = rule.verdict(curve_of([0.4] * 6))
    assert verdict is not None
    assert (verdict.step, verdict.predicted, verdict.deviation, verdict.needed) == (6, pytest.approx(0.5), 0.02, 0.7)
    # 0.1 + 0.56 lacks less than the margin, until the last points fall.
    assert rule.verdict(curve_of([0.56] * 7)) is None
    assert rule.verdict(curve_of([0.56] * 8)) is None
    late = rule.verdict(curve_of([0.56] * 6 + [0.3] * 2))
    assert late is not None
    assert late.step == 8


@pytest.mark.parametrize("ends", [True, False])
def test_a_training_under_a_rule_is_the_beginning_of_one_without(ends: bool) -> None:
    batches, config = Batches(easy_data(), torch.device("cpu")), ProxyConfig(steps=40, batch_size=16)
    plain = train(build(), batches, config, seed=0)
    rule = Rule(2.0, (Check(20, 0.0, (1.0, 0.0, 0.0), 0.1, 0.1),), ends)
    ruled = train(build(), batches, config, seed=0, rule=rule)
    steps = [point.step for point in ruled.curve]
    assert [point.train_loss for point in ruled.curve] == [point.train_loss for point in plain.curve[: len(steps)]]
    assert steps[-1] == (20 if ends else 40)
    assert ruled.stopped == ends
    assert ruled.verdict is not None
    assert (math.isnan(ruled.accuracy), math.isnan(ruled.loss)) == (ends, ends)
    assert ends or (ruled.accuracy, ruled.loss) == (plain.accuracy, plain.loss)
    replayed = plain.under(rule)
    assert (replayed.verdict, replayed.stopped, len(replayed.curve)) == (ruled.verdict, ends, len(ruled.curve))


# -- what it is made of ---------------------------------------------------------------------------------------------


def test_the_errors_of_a_regression_are_those_of_values_that_it_does_not_know() -> None:
    rng = np.random.default_rng(0)
    columns = rng.standard_normal((30, 3))
    values = columns @ np.array([1.0, -0.5, 0.0]) + 0.1 * rng.standard_normal(30)
    weights, errors = regression(columns, values)
    # The scale of the columns hardly depends on a single row.
    for left_out in range(0, 30, 7):
        others = np.delete(np.arange(30), left_out)
        again, _ = regression(columns[others], values[others])
        assert errors[left_out] == pytest.approx(values[left_out] - again[0] - columns[left_out] @ again[1:], abs=0.01)
    assert weights[1:] == pytest.approx([1.0, -0.5, 0.0], abs=0.1)


def stopper_of(archs: list[ArchSpec], fake: FakeEvaluator) -> Stopper:
    stopper = Stopper(Memory(SMALL, 32, 10, 2.0), 200)
    for arch in archs:
        result = learning(arch, fake.train_one(arch).accuracy)
        stopper.add(arch, result.accuracy, fake.measure(arch).median_ms, result.curve)
    return stopper


def test_few_that_would_have_reached_the_front_are_given_up() -> None:
    """Their share is the stated probability, or less, as the network must miss it at several looks."""
    fake, rng = FakeEvaluator(), random.Random(1)
    drawn = [arch for arch in (SMALL.sample(rng) for _ in range(900)) if arch.stages[0].kernel_size != 7]
    known, fresh = drawn[:100], drawn[100:600]
    stopper = stopper_of(known, fake)
    latencies = [fake.measure(arch).median_ms for arch in fresh]
    given_up, wrong, reached, saved = 0, 0, 0, 0.0
    for arch, rule in zip(fresh, stopper.rules(fresh, latencies), strict=True):
        if rule is None:  # the fastest of all
            continue
        result = learning(arch, fake.train_one(arch).accuracy)
        ended = result.under(replace(rule, ends=True))
        reached += result.accuracy >= rule.needed
        if ended.verdict is not None:
            given_up += 1
            wrong += result.accuracy >= rule.needed
            saved += 1 - ended.verdict.step / 200
    assert given_up > 250
    assert saved > 0.25 * len(fresh)
    assert reached > 20
    assert wrong <= 2 * LEAST_CHANCE * reached


def test_nothing_is_given_up_before_enough_is_known_or_where_nothing_is_faster() -> None:
    fake = FakeEvaluator()
    archs = list(dict.fromkeys(SMALL.sample(random.Random(number)) for number in range(60)))
    few = stopper_of([arch for arch in archs if arch.stages[0].kernel_size != 7][: LEAST_TRAININGS - 1], fake)
    assert few.rules(archs[:2], [1.0, 1.0]) == [None, None]
    enough = stopper_of([arch for arch in archs if arch.stages[0].kernel_size != 7][:LEAST_TRAININGS], fake)
    rule, none = enough.rules(archs[:2], [1.0, 0.0])
    assert rule is not None
    assert none is None
    short = Stopper(enough.memory, 200)
    for arch in enough.archs:
        short.add(arch, 0.5, 1.0, ())
    assert short.rules(archs[:1], [1.0]) == [None]


def test_a_front_that_was_confirmed_lower_asks_less_of_what_comes() -> None:
    fake, rng = FakeEvaluator(), random.Random(1)
    drawn = [arch for arch in (SMALL.sample(rng) for _ in range(90)) if arch.stages[0].kernel_size != 7]
    stopper = stopper_of(drawn[:40], fake)
    slow = [SMALL.sample(rng)], [100.0]
    (before,) = stopper.rules(*slow)
    stopper.memory.further = {
        arch.arch_id: [accuracy - 0.1] * 3 for arch, accuracy in zip(stopper.archs, stopper.accuracy, strict=True)
    }
    (after,) = stopper.rules(*slow)
    assert before is not None
    assert after is not None
    assert after.needed == pytest.approx(before.needed - 0.075, abs=0.03)
    # Where a curve leads is still told by the trainings that the curves are of.
    assert after.checks[-1].deviation == pytest.approx(before.checks[-1].deviation, rel=0.2)


# -- a search -------------------------------------------------------------------------------------------------------


def test_a_search_gives_up_what_will_hardly_reach_the_front(config: SearchConfig, tmp_path: Path) -> None:
    evaluator = Learning()
    result = search.run(config, evaluator)
    rows = candidates(config)
    states = Counter(CandidateState(row.state) for row in rows)
    assert result.complete == 50 == states[CandidateState.COMPLETE] + states[CandidateState.STOPPED]
    assert result.stopped == states[CandidateState.STOPPED] > 2
    stopped = [row for row in rows if row.state == CandidateState.STOPPED]
    assert not any(is_control(ArchSpec.from_json(row.arch)) for row in stopped)
    for row in stopped:
        assert (row.accuracy, row.loss) == (None, None)
        assert row.given_up_at in (50, 70, 100, 150)
        assert row.predicted_accuracy is not None
        assert row.needed_accuracy is not None
        assert row.predicted_accuracy < row.needed_accuracy
        assert row.reason is not None
        assert row.reason.startswith(f"given up after {row.given_up_at} steps")
    # A training that was given up has its curve up to there, and never is on a front.
    store = Store.open(config.storage, create=False)
    assert store is not None
    recorded = RecordedStudy.open(store, config.study)
    trainings = recorded.store.trainings.of_study(recorded.study_id, TrainingStage.SEARCH)
    by_trial = {row.trial_id: row for row in trainings}
    for row in stopped:
        training = by_trial[row.trial_id]
        assert curves.from_json(training.curve)[-1].step == row.given_up_at
        assert (training.accuracy, training.steps, training.reason) == (None, 200, row.reason)
        assert curve_table(training.curve).count("\n") == (row.given_up_at or 0) / 10 + 1
    assert not set(result.pareto_front["number"]) & {row.number for row in stopped}
    assert result.pareto_front["confirmed"].eq(1).all()
    trials = {trial.number: trial for trial in store.load_optuna_study(config.study).get_trials()}
    for row in stopped:
        trial = trials[row.number]
        assert trial.state == optuna.trial.TrialState.PRUNED
        assert trial.user_attrs["predicted_accuracy"] == row.predicted_accuracy
        assert trial.user_attrs["latency_ms"] == row.latencies[0].median_ms
    # At the end the notes are written again, which other tests leave out.
    show(recorded, tmp_path)
    attributes = store.optuna_storage.get_study_system_attrs(recorded.study_id)
    for row in stopped:
        note = "".join(
            str(value) for key, value in attributes.items() if key.startswith(f"dashboard:{row.trial_id}:note_str")
        )
        assert "**stopped early**: given up after" in note
        assert f"| {row.given_up_at} | " in note
    passes = recorded.passes()
    assert passes == pytest.approx(
        states[CandidateState.COMPLETE] + sum((row.given_up_at or 0) / 200 for row in stopped)
    )
    assert any(
        line.startswith(f"stopped early: {result.stopped} of 50 trainings, which saved ") for line in result.remarks
    )
    store.close()


def test_an_interrupted_search_goes_on_as_if_it_had_not_been(config: SearchConfig) -> None:
    whole = replace(config, study="whole", budget=38, confirm=0)
    search.run(whole, Learning())
    with pytest.raises(KeyboardInterrupt):
        search.run(replace(whole, study="parts"), Learning(interrupted_at=30))
    search.run(replace(whole, study="parts"), Learning())

    def kept(config: SearchConfig) -> list[tuple[object, ...]]:
        return [
            (row.arch, row.state, row.given_up_at, row.predicted_accuracy, row.needed_accuracy)
            for row in candidates(config)
        ]

    assert Counter(state for _, state, *_ in kept(whole))["stopped"] > 0
    assert kept(whole) == kept(replace(whole, study="parts"))


def test_some_are_trained_to_the_end_to_check_the_rule(config: SearchConfig) -> None:
    search.run(replace(config, budget=110, sampler="random", confirm=0), Learning())
    rows = candidates(config)
    checked = [row for row in rows if row.state == CandidateState.COMPLETE and row.given_up_at is not None]
    assert checked
    assert all(is_control(ArchSpec.from_json(row.arch)) and row.accuracy is not None for row in checked)
    line = stopping_line(rows, 200)
    assert line is not None
    assert f"of {len(checked)} that w" in line
    stopped = sum(row.state == CandidateState.STOPPED for row in rows)
    assert line.startswith(f"stopped early: {stopped} of 110 trainings")


def test_a_search_without_early_stopping_trains_all(config: SearchConfig) -> None:
    result = search.run(replace(config, budget=40, sampler="random", confirm=0, early_stopping=False), Learning())
    assert (result.complete, result.stopped) == (40, 0)
    assert {row.state for row in candidates(config)} == {"complete", "failed"}
    assert stopping_line(candidates(config), 200) is None


def test_a_study_from_before_there_was_early_stopping_goes_on_without(config: SearchConfig) -> None:
    without = replace(config, early_stopping=False)
    assert "early_stopping" not in without.identity()
    assert SearchConfig.of_identity(without.identity()).early_stopping is False
    assert SearchConfig.of_identity(config.identity()).early_stopping is True


class Equal(Learning):
    """Nearly all trainings come to the same accuracy, as where one class dominates, and a few break out."""

    def train_one(self, arch: ArchSpec) -> ProxyResult:
        result = super().train_one(arch)
        lucky = int(arch.arch_id, 16) % 12 == 1
        curve = tuple(replace(point, train_loss=0.3, train_accuracy=0.9) for point in result.curve)
        return replace(result, accuracy=0.92 if lucky else 0.9, curve=curve)


def test_errors_with_long_tails_are_no_reason_to_give_all_up(config: SearchConfig) -> None:
    result = search.run(replace(config, budget=80, sampler="random", confirm=0), Equal())
    rows = candidates(config)
    assert any(row.accuracy == 0.92 for row in rows)
    assert result.stopped <= 4


def test_nothing_is_given_up_where_all_are_as_good(config: SearchConfig) -> None:
    class Constant(Learning):
        def train_one(self, arch: ArchSpec) -> ProxyResult:
            return replace(super().train_one(arch), accuracy=2 / 3)

    assert search.run(replace(config, sampler="random", confirm=0), Constant()).stopped == 0
