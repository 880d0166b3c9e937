"""Fronts that are confirmed by trainings with other seeds: at the end of a search, and later by a command."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
import torch

from nas.config import LatencyConfig, Limits, SearchConfig
from nas.errors import CandidateFailed, UsageError
from nas.lab.invented import FakeEvaluator
from nas.latency.values import Measurement
from nas.recorded import RecordedStudy
from nas.search import live_study
from nas.search import loop as search
from nas.search.confirmation import nearest_to_front
from nas.search.front_sampler import Memory
from nas.search.loop import SearchResult, Silent
from nas.search.rows import latency_row, training_row
from nas.training.pool import Trainer
from nas.training.proxy import ProxyResult
from nas.training.stopping import Rules
from nas.training.weights import Images, Trained, Weights, weight_folder
from nas.training.workers import Done
from nas.validation.config import ConfirmConfig
from nas.validation.confirm import confirm
from search_spaces import ArchSpec
from studies import CandidateTraining, LatencyStage, Owner, StorageError, Store, TrainingStage
from tests.conftest import copy_database, quicken
from tests.nas.conftest import add_candidates, begun

IMAGES = Images(("a", "b"), 16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


class Noisy(FakeEvaluator):
    """Trainings that scatter: each architecture and seed has an error of its own.

    Args:
        interrupted_at: number of the further training at which Ctrl-C comes.
        failing: seed with which trainings fail.
    """

    def __init__(self, interrupted_at: int | None = None, failing: int | None = None, weights: bool = False) -> None:
        super().__init__()
        self.interrupted_at, self.failing, self.weights = interrupted_at, failing, weights
        self.again: list[tuple[str, int]] = []

    def train_one(self, arch: ArchSpec) -> ProxyResult:
        return self.scattered(arch, 0)

    def train_again(self, arch: ArchSpec, seed: int) -> ProxyResult:
        if len(self.again) == self.interrupted_at:
            raise KeyboardInterrupt
        self.again.append((arch.arch_id, seed))
        if seed == self.failing:
            raise CandidateFailed("the loss diverged")
        return self.scattered(arch, seed)

    def scattered(self, arch: ArchSpec, seed: int) -> ProxyResult:
        result = super().train_one(arch)
        digest = hashlib.sha256(f"{arch.arch_id} {seed}".encode()).digest()
        error = 0.05 * (digest[0] + digest[1] + digest[2] - 3 * 127.5) / 255
        accuracy = min(0.99, max(0.01, result.accuracy + error))
        trained = Trained({"seed": torch.tensor([seed])}, IMAGES) if self.weights else None
        return replace(result, accuracy=accuracy, trained=trained)


def scattering_at(url: str) -> SearchConfig:
    return SearchConfig(budget=40, storage=url, sampler="random", latency=LatencyConfig(device="cpu", engine="eager"))


@pytest.fixture
def scattering(sqlite_url: str) -> SearchConfig:
    return scattering_at(sqlite_url)


def run(config: SearchConfig, evaluator: FakeEvaluator) -> SearchResult:
    return search.run(config, evaluator, Silent())


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, SearchResult]:
    """A whole search, made once: its storage and its result."""
    folder = tmp_path_factory.mktemp("confirmed")
    config = scattering_at(f"sqlite:///{folder / 'study.db'}")
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch, folder)
        return config.storage, run(config, Noisy())


@pytest.fixture
def whole(once: tuple[str, SearchResult], scattering: SearchConfig) -> SearchResult:
    """The result of `run(scattering, Noisy())`, whose database is there."""
    storage, result = once
    copy_database(storage, scattering.storage)
    return result


def opened(config: SearchConfig) -> RecordedStudy:
    store = Store.open(config.storage, create=True)
    assert store is not None
    return RecordedStudy.open(store, config.study)


def further(recorded: RecordedStudy) -> list[CandidateTraining]:
    return recorded.store.trainings.of_study(recorded.study_id, TrainingStage.CONFIRMATION)


def rows_of(recorded: RecordedStudy) -> list[tuple[int, int, float | None]]:
    return [(row.trial_id, row.seed, row.accuracy) for row in further(recorded)]


def test_a_search_ends_with_the_front_of_means_over_other_seeds(scattering: SearchConfig, whole: SearchResult) -> None:
    result = whole
    recorded = opened(scattering)
    front = recorded.front()
    assert set(front["confirmed"]) == {1}
    accuracies: dict[int, list[float]] = {}
    for row in further(recorded):
        assert row.seed != scattering.seed
        assert row.accuracy is not None
        accuracies.setdefault(row.trial_id, []).append(row.accuracy)
    for row in front.to_dict("records"):
        own = accuracies[row["trial_id"]]
        assert row["accuracy"] == pytest.approx(statistics.mean(own))
        assert row["accuracy_trainings"] == len(own)
        assert row["accuracy_low"] < row["accuracy"] < row["accuracy_high"]
    # The training that chose a candidate stands beside its mean, not in it.
    evaluations = recorded.evaluations().set_index("number")
    assert list(front["searched_accuracy"]) == [evaluations["accuracy"][number] for number in front["number"]]
    assert result.hypervolumes == recorded.hypervolumes()
    assert result.hypervolumes.confirmed is not None
    assert result.hypervolumes.optimism is not None
    assert result.hypervolumes.optimism > 0
    assert any(f"networks confirmed by {len(further(recorded))} trainings" in line for line in result.remarks)
    assert result.pareto_front["number"].tolist() == front["number"].tolist()
    # Optuna's objectives stay those of the search.
    trials = recorded.store.load_optuna_study(scattering.study).get_trials(deepcopy=False)
    assert [trial.values[0] for trial in trials if trial.values] == list(evaluations["accuracy"])  # noqa: PD011
    recorded.store.close()


class WithTestImages(Noisy):
    """Whatever confirms is also scored on test images."""

    def train_again(self, arch: ArchSpec, seed: int) -> ProxyResult:
        return replace(super().train_again(arch, seed), test_accuracy=0.25 + 0.01 * seed)


def test_the_final_front_has_the_mean_accuracy_on_test_images(scattering: SearchConfig) -> None:
    front = run(scattering, WithTestImages()).pareto_front
    for row in front.itertuples():
        # The seeds follow that of the search.
        assert row.test_accuracy == pytest.approx(0.25 + 0.01 * (1 + row.accuracy_trainings) / 2)
    searched = run(replace(scattering, study="searched", confirm=0), WithTestImages()).pareto_front
    assert searched["test_accuracy"].isna().all()


def test_few_trainings_suffice_and_no_more_than_the_share_are_made(scattering: SearchConfig) -> None:
    evaluator = Noisy()
    run(replace(scattering, budget=120), evaluator)
    assert evaluator.again
    # More are made only where a likely member was not trained again yet.
    assert {seed for _, seed in evaluator.again[24:]} <= {1}
    assert len(set(evaluator.again)) == len(evaluator.again)


def test_without_a_share_the_front_stays_as_searched(scattering: SearchConfig) -> None:
    evaluator = Noisy()
    result = run(replace(scattering, confirm=0), evaluator)
    assert evaluator.again == []
    assert set(result.pareto_front["confirmed"]) == {0}
    assert result.hypervolumes.confirmed is None
    assert result.pareto_front["accuracy_low"].isna().all()


@pytest.mark.parametrize("at", [0, 1, 5])
def test_an_interrupted_confirmation_goes_on_as_if_nothing_had_happened(
    scattering: SearchConfig, once: tuple[str, SearchResult], at: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(scattering, Noisy(interrupted_at=at))
    recorded = opened(scattering)
    assert len(further(recorded)) == at
    # Nothing counts before it is finished.
    assert set(recorded.front()["confirmed"]) == {0}
    evaluator = Noisy()
    run(scattering, evaluator)
    other = opened(replace(scattering, storage=once[0]))
    assert [(seed, accuracy) for _, seed, accuracy in rows_of(recorded)] == [
        (seed, accuracy) for _, seed, accuracy in rows_of(other)
    ]
    assert len(evaluator.again) == len(further(recorded)) - at
    columns = ["number", "accuracy", "accuracy_low", "accuracy_trainings"]
    pd.testing.assert_frame_equal(recorded.front()[columns], other.front()[columns])
    recorded.store.close()
    other.store.close()


def test_a_confirmed_study_that_is_opened_again_trains_nothing(scattering: SearchConfig, whole: SearchResult) -> None:
    evaluator = Noisy()
    again = run(scattering, evaluator)
    assert evaluator.again == []
    pd.testing.assert_frame_equal(again.pareto_front, whole.pareto_front)


class Breaking(Noisy):
    """Ctrl-C comes at a training of the search."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.trained = at, 0

    def train_one(self, arch: ArchSpec) -> ProxyResult:
        self.trained += 1
        if self.trained == self.at:
            raise KeyboardInterrupt
        return super().train_one(arch)


def test_what_was_confirmed_teaches_the_search_that_goes_on(
    scattering: SearchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both its models get all trainings of a candidate as they are known when it begins, also after an interruption."""
    config = replace(scattering, sampler="model", budget=14)
    run(config, Noisy())
    recorded = opened(config)
    archs = {row.trial_id: row.arch_id for row in recorded.candidates()}
    known: dict[str, list[float]] = {}
    for row in further(recorded):
        if row.accuracy is not None:
            known.setdefault(archs[row.trial_id], []).append(row.accuracy)
    recorded.store.close()
    given: list[Memory] = []

    def remembered(*arguments: Any) -> Memory:
        given.append(Memory(*arguments))
        return given[-1]

    monkeypatch.setattr(live_study, "Memory", remembered)
    copies = [replace(config, budget=20, storage=f"{config.storage}.{name}") for name in ("whole", "parts")]
    for each in copies:
        copy_database(config.storage, each.storage)
    run(copies[0], Noisy())
    with pytest.raises(KeyboardInterrupt):
        run(copies[1], Breaking(4))
    run(copies[1], Noisy())
    assert known
    assert [each.further for each in given] == [known] * 3
    whole, parts = ([row.arch for row in opened(each).candidates()] for each in copies)
    assert whole == parts


@pytest.mark.usefixtures("whole")
def test_a_search_that_goes_on_is_unconfirmed_until_its_end(scattering: SearchConfig) -> None:
    seen: list[set[int]] = []

    class Watching(Noisy):
        def train_one(self, arch: ArchSpec) -> ProxyResult:
            recorded = opened(scattering)
            seen.append(set(recorded.front()["confirmed"]))
            recorded.store.close()
            return super().train_one(arch)

    recorded = opened(scattering)
    before = rows_of(recorded)
    result = run(replace(scattering, budget=46), Watching())
    # The first candidate is trained while the old front still holds, the others when it does no longer.
    assert seen[0] == {1}
    assert all(confirmed == {0} for confirmed in seen[1:])
    assert set(result.pareto_front["confirmed"]) == {1}
    # What was trained before is used.
    assert rows_of(recorded)[: len(before)] == before
    assert len(set(rows_of(recorded))) == len(rows_of(recorded))
    recorded.store.close()


def test_trainings_that_fail_are_recorded_and_confirm_nothing(scattering: SearchConfig) -> None:
    run(scattering, Noisy(failing=1))
    recorded = opened(scattering)
    failed = [row for row in further(recorded) if row.seed == 1]
    assert failed
    assert {(row.accuracy, row.reason) for row in failed} == {(None, "the loss diverged")}
    for row in recorded.front().to_dict("records"):
        own = [each.accuracy for each in further(recorded) if each.trial_id == row["trial_id"] and each.seed != 1]
        assert row["accuracy"] == pytest.approx(statistics.mean(each for each in own if each is not None))
    recorded.store.close()


def test_the_time_limit_holds_for_the_confirmation_too(
    scattering: SearchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    class Slow(Noisy):
        def train_one(self, arch: ArchSpec) -> ProxyResult:
            clock[0] += 10
            return super().train_one(arch)

        def train_again(self, arch: ArchSpec, seed: int) -> ProxyResult:
            clock[0] += 10
            return super().train_again(arch, seed)

    evaluator = Slow()
    result = run(replace(scattering, budget=1000, time_limit_s=600), evaluator)
    # A sixth of the time is a fifth of what the search took, in which some trainings failed.
    assert 45 <= result.complete <= 50
    assert len(evaluator.again) <= 10
    assert clock[0] <= 610
    assert "time limit" in result.why


def test_the_best_weights_of_a_member_are_kept(scattering: SearchConfig) -> None:
    run(replace(scattering, keep_weights=True), Noisy(weights=True))
    recorded = opened(scattering)
    weights = Weights(weight_folder(scattering.storage), recorded.study_id)
    accuracies = {row.trial_id: [row.accuracy] for row in recorded.candidates()}
    seeds: dict[tuple[int, float | None], int] = {(row.trial_id, row.accuracy): 0 for row in recorded.candidates()}
    for row in further(recorded):
        accuracies[row.trial_id].append(row.accuracy)
        seeds[row.trial_id, row.accuracy] = row.seed
    front = recorded.front()
    for member in front.to_dict("records"):
        found = weights.find(member["number"], member["arch_id"])
        assert found is not None
        # Weights of a candidate far from the front are not kept before it is trained again.
        assert found.accuracy in accuracies[member["trial_id"]]
        assert found.accuracy >= max(each for each in accuracies[member["trial_id"]][1:] if each is not None)
        assert found.weights["seed"].item() == seeds[member["trial_id"], found.accuracy]
    kept = {path.name for path in weights.folder.iterdir()}
    assert len(kept) == len(front)
    recorded.store.close()


def test_members_without_weights_are_named(scattering: SearchConfig) -> None:
    """Members that were trained before weights were kept have none; nothing once said so."""
    first = run(scattering, Noisy(weights=True))
    assert not any("weights" in line for line in first.remarks)
    again = run(replace(scattering, keep_weights=True), Noisy(weights=True))
    numbers = ", ".join(str(number) for number in again.pareto_front["number"])
    assert any(line.startswith(f"no weights are kept of trials {numbers} of the front") for line in again.remarks)
    whole = run(replace(scattering, keep_weights=True, study="kept"), Noisy(weights=True))
    assert not any("weights" in line for line in whole.remarks)


# -- The command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def recorded(config: SearchConfig, inline: None) -> RecordedStudy:
    """A study of ten candidates on real images, all on the front as searched."""
    store = begun(config)
    study = store.find_study(config.study)
    assert study is not None
    points = [(0.5 + 0.03 * number, 1.0 + number) for number in range(10)]
    add_candidates(store, config, study.study_id, study.device_id, points)
    return RecordedStudy.open(store, config.study)


def test_the_command_confirms_a_finished_study(recorded: RecordedStudy) -> None:
    lines: list[str] = []
    done = confirm(recorded, ConfirmConfig(share=1.0), lines.append)
    assert done.confirmed
    assert 0 < done.trainings == len(further(recorded)) <= 10
    front = recorded.front()
    assert set(front["confirmed"]) == {1}
    (row,) = [row for row in further(recorded) if row.trial_id == front["trial_id"].iloc[0]][:1]
    assert (row.steps, row.batch_size, row.resolution, row.seed) == (2, 8, 16, 1)
    assert row.host
    assert any("likely members" in line for line in lines)
    # The same again trains nothing new, a greater share goes on.
    again = confirm(recorded, ConfirmConfig(share=1.0), lines.append)
    assert again.trainings == done.trainings
    assert confirm(recorded, ConfirmConfig(share=2.0), lines.append).trainings > done.trainings
    # It is free for others again.
    recorded.store.ownership.claim(recorded.study_id, Owner.me())


def test_the_command_refuses_what_it_cannot_do(recorded: RecordedStudy, tmp_path: Path, config: SearchConfig) -> None:
    with pytest.raises(UsageError, match=r"^--share 0\.01: is less than one training for 10 candidates$"):
        confirm(recorded, ConfirmConfig(share=0.01))
    with pytest.raises(UsageError, match=r"^--data .*nowhere"):
        confirm(recorded, ConfirmConfig(data=str(tmp_path / "nowhere")))
    other = Owner("elsewhere", 1, 0.0)
    recorded.store.ownership.disown(recorded.study_id)
    recorded.store.ownership.claim(recorded.study_id, other)
    with pytest.raises(StorageError, match="elsewhere"):
        confirm(recorded, ConfirmConfig())
    assert further(recorded) == []


def test_the_command_trains_on_the_named_devices_with_the_threads_of_the_search(
    recorded: RecordedStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A study that measured on the CPU and trained on GPUs was once confirmed on the CPU, always with one thread."""
    monkeypatch.setattr("nas.training.pool.cores", lambda: 2)
    threads = replace(recorded.config, proxy=replace(recorded.config.proxy, threads=2))
    two = replace(recorded, config=threads)
    seen = []

    class Watched(Trainer):
        def __init__(self, *args: object, **named: object) -> None:
            super().__init__(*args, **named)  # type: ignore[arg-type]
            seen.append((self.devices, self.config.threads, self.count))

    monkeypatch.setattr("nas.validation.confirm.Trainer", Watched)
    lines: list[str] = []
    confirm(two, ConfirmConfig(share=0.2, train_devices=("cpu",)), lines.append)
    assert seen == [(["cpu"], 2, 1)]
    assert not any("--train-devices" in line for line in lines)
    with pytest.raises(UsageError, match=r"^--train-devices cuda:77: "):
        confirm(two, ConfirmConfig(train_devices=("cuda:77",)))
    # Of which kind the devices of another machine were is not known.
    monkeypatch.setattr("platform.node", lambda: "elsewhere")
    row = training_row(recorded, ArchSpec.from_json(recorded.candidates()[0].arch), TrainingStage.SEARCH, 0)
    row.trial_id, row.host = recorded.candidates()[0].trial_id, "cluster7"
    recorded.store.trainings.add(row)
    confirm(recorded, ConfirmConfig(share=0.2, workers=1), lines.append)
    assert any(line.startswith("the search trained on cluster7, and this trains on cpu of elsewhere") for line in lines)


def test_of_a_long_study_those_nearest_to_the_front_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.search.confirmation.MOST_RACING", 3)
    rows = pd.DataFrame({"latency_ms": [3.0, 1.0, 2.0, 4.0, 5.0], "accuracy": [0.4, 0.5, 0.6, 0.7, 0.65]})
    # At its latency the first lacks .2, the last .05; the others are on the front.
    assert nearest_to_front(rows)["latency_ms"].tolist() == [1.0, 2.0, 4.0]
    monkeypatch.setattr("nas.search.confirmation.MOST_RACING", 4)
    assert nearest_to_front(rows)["latency_ms"].tolist() == [1.0, 2.0, 4.0, 5.0]


class SideBySide(Noisy):
    """Four trainings at once, whose results come in another order."""

    workers = 4

    def train(
        self, archs: Sequence[ArchSpec], seeds: Sequence[int] | None = None, rules: Rules = None
    ) -> Generator[Done[ProxyResult]]:
        for done in reversed(list(super().train(archs, seeds, rules))):
            yield replace(done, worker=done.index % 4)


def test_results_may_come_in_any_order(scattering: SearchConfig) -> None:
    others = replace(scattering, study="others")
    run(scattering, SideBySide())

    class InOrder(Noisy):
        workers = 4

    run(others, InOrder())
    recorded, other = opened(scattering), opened(others)
    columns = ["number", "accuracy", "accuracy_low", "accuracy_trainings"]
    pd.testing.assert_frame_equal(recorded.front()[columns], other.front()[columns])
    assert {row[1:] for row in rows_of(recorded)} == {row[1:] for row in rows_of(other)}
    recorded.store.close()
    other.store.close()


@pytest.mark.usefixtures("whole")
def test_in_another_deployment_the_front_stays_as_searched(scattering: SearchConfig) -> None:
    recorded = opened(scattering)
    elsewhere = replace(recorded.deployment, threads=2)
    rows = []
    for candidate in recorded.candidates():
        if candidate.latencies:
            measured = FakeEvaluator().measure(ArchSpec.from_json(candidate.arch))
            rows.append(latency_row(candidate.trial_id, measured, elsewhere, LatencyStage.SEARCH))
    recorded.store.add_latencies(recorded.study_id, rows)
    fronts = recorded.store.front(scattering.study)
    assert set(elsewhere.rows_of(fronts)["confirmed"]) == {0}
    assert set(recorded.deployment.rows_of(fronts)["confirmed"]) == {1}
    evaluations = elsewhere.rows_of(recorded.store.evaluations(scattering.study))
    best = evaluations["accuracy"].max()
    assert elsewhere.rows_of(fronts)["accuracy"].max() == best
    recorded.store.close()


def test_members_that_turn_out_over_the_limit_are_replaced_by_others_that_are_confirmed(
    scattering: SearchConfig,
) -> None:
    """Measured again, all that was accurate is slower than it seemed."""
    limit_ms = 1.0

    class Slower(Noisy):
        def measure_together(self, archs: Sequence[ArchSpec]) -> list[Measurement]:
            found = super().measure_together(archs)
            return [replace(each, latency=each.latency.scaled(1.6)) for each in found]

    config = replace(scattering, limits=Limits(latency_ms=limit_ms))
    result = run(config, Slower())
    assert any("broke the latency limit" in line for line in result.remarks)
    assert len(result.pareto_front)
    assert set(result.pareto_front["confirmed"]) == {1}
    assert (result.pareto_front["latency_ms"] <= limit_ms).all()


def test_a_study_of_candidates_over_the_limit_has_nothing_to_confirm(scattering: SearchConfig) -> None:
    config = replace(scattering, limits=Limits(latency_ms=0.9), confirm=0, budget=6)
    run(config, Noisy())
    recorded = opened(config)
    rows = []
    for candidate in recorded.candidates():
        for latency in candidate.latencies:
            measured = FakeEvaluator().measure(ArchSpec.from_json(candidate.arch))
            slow = replace(measured, latency=measured.latency.scaled(100))
            rows.append(latency_row(latency.trial_id, slow, recorded.deployment, LatencyStage.FINAL, limit_ms=0.9))
    recorded.store.add_latencies(recorded.study_id, rows)
    recorded.store.close()
    evaluator = Noisy()
    result = run(replace(config, confirm=1.0), evaluator)
    assert evaluator.again == []
    assert result.pareto_front.empty
    assert result.hypervolumes.confirmed is None


def test_a_new_study_has_no_weights_of_one_that_was_deleted(scattering: SearchConfig) -> None:
    config = replace(scattering, keep_weights=True, budget=6)
    run(config, Noisy(weights=True))
    recorded = opened(config)
    folder = weight_folder(config.storage)
    number = recorded.study_id
    assert list(folder.iterdir())
    optuna.delete_study(study_name=config.study, storage=recorded.store.optuna_storage)
    recorded.store.close()
    run(replace(config, keep_weights=False), Noisy())
    again = opened(config)
    assert again.study_id == number
    assert list(folder.iterdir()) == []
    again.store.close()
