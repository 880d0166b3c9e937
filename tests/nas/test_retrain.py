"""Longer trainings, on a study that is written down and not searched."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from PIL import Image

from nas.config import SearchConfig
from nas.errors import CandidateFailed, UsageError
from nas.recorded import RecordedStudy
from nas.training import pool as trainings
from nas.training.proxy import ProxyResult
from nas.validation.config import RetrainConfig
from nas.validation.retrain import (
    MACS,
    PARAMS,
    PROXY,
    remarks,
    retrain,
    spread_over,
    tables,
    undominated,
)
from studies import Store, TrainingStage
from studies.sql import read_view
from tests.nas.conftest import add_candidates, begun, study_id

# Two on the front, (.7, 1) and (.9, 3), and four that are not.
POINTS = ((0.7, 1.0), (0.6, 1.5), (0.65, 2.0), (0.9, 3.0), (0.8, 4.0), (0.5, 8.0))


@pytest.fixture
def store(config: SearchConfig) -> Any:
    store = begun(config)
    study = store.find_study(config.study)
    assert study is not None
    add_candidates(store, config, study.study_id, study.device_id, POINTS)
    yield store
    store.close()


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, inline: None) -> dict[str, float | CandidateFailed]:
    """Trainings that end as a test says, at once; by name, else with an accuracy of .5."""
    results: dict[str, float | CandidateFailed] = {}

    def train_one(network: trainings.Trainable, *_: object) -> ProxyResult:
        found = results.get(network.name, 0.5)
        if isinstance(found, CandidateFailed):
            raise found
        return ProxyResult(found, 1.0, (), 2.0, 0)

    monkeypatch.setattr(trainings, "train_one", train_one)
    return results


@pytest.mark.usefixtures("inline")
def test_for_real(store: Store, config: SearchConfig) -> None:
    lines: list[str] = []
    found = retrain(RecordedStudy.open(store, config.study), RetrainConfig(top=1, dominated=2, steps=3), lines.append)
    assert list(found.rows["number"]) == [1, 3, 5]
    assert found.rows["retrained_accuracy"].between(0, 1).all()
    rows = store.trainings.of_study(study_id(store, config), TrainingStage.RETRAINING)
    assert {(row.steps, row.batch_size, row.resolution, row.data) for row in rows} == {(3, 8, 16, config.data.source)}
    assert "3 networks, 3 to be trained: 3 steps of 8 images" in lines[-4]
    assert lines[-1].startswith("3/3  trial 5: ")
    # What was trained is not trained again.
    lines.clear()
    retrain(RecordedStudy.open(store, config.study), RetrainConfig(top=1, dominated=3, steps=3), lines.append)
    assert "4 networks, 1 to be trained" in lines[-2]
    # A schedule of its own, by default of four times the study's steps.
    retrain(RecordedStudy.open(store, config.study), RetrainConfig(top=1, dominated=0), lines.append)
    assert {row.steps for row in store.trainings.of_study(study_id(store, config), TrainingStage.RETRAINING)} == {3, 8}


def test_the_front_by_the_longer_trainings(
    store: Store, config: SearchConfig, told: dict[str, float | CandidateFailed]
) -> None:
    told |= {f"trial {number}": accuracy for number, accuracy in enumerate((0.6, 0.8, 0.7, 0.75, 0.9, 0.95))}
    found = retrain(RecordedStudy.open(store, config.study), RetrainConfig())
    assert list(found.rows["number"]) == [0, 1, 2, 3, 4, 5]
    assert list(found.rows["on_front"]) == [True, False, False, True, False, False]
    assert list(found.rows["on_retrained_front"]) == [True, True, False, False, True, True]
    # The database's own view agrees.
    view = "SELECT number FROM retrained_front WHERE study_name = :name ORDER BY latency_ms, number"
    assert list(read_view(store.engine, view, config.study)["number"]) == [0, 1, 4, 5]
    assert list(store.front(config.study)["number"]) == [0, 3]
    lines = remarks(found)
    assert "The front among these is left by trial 3 and joined by trials 1, 4, 5." in lines
    assert [table.row_count for table in tables(found, "title")] == [6, len(found.rankings)]
    of_all = {each.predictor: each for each in found.rankings if each.band == "all"}
    assert set(of_all) == {PROXY, PARAMS, MACS}
    assert {each.count for each in of_all.values()} == {6}


def test_a_training_that_fails_is_told_and_ranks_nothing(
    store: Store, config: SearchConfig, told: dict[str, float | CandidateFailed]
) -> None:
    told["trial 1"] = CandidateFailed("the loss diverged")
    found = retrain(RecordedStudy.open(store, config.study), RetrainConfig())
    assert 1 not in set(found.rows["number"])
    assert found.failed == ["trial 1: the loss diverged"]
    lines = remarks(found)
    assert lines[0] == "trial 1: the loss diverged"
    # All others ended alike.
    assert lines[-1] == "The accuracies do not vary: nothing can be said of the ranking."


@pytest.mark.usefixtures("inline")
def test_images_of_other_data_that_are_not_rgb_are_converted_if_asked(
    store: Store, config: SearchConfig, images: Path, tmp_path: Path
) -> None:
    other = tmp_path / "grey"
    shutil.copytree(images, other)
    path = next(other.rglob("*.png"))
    with Image.open(path) as image:
        grey = image.convert("L")
    grey.save(path)
    asked = RetrainConfig(top=1, dominated=0, steps=2, data=str(other))
    with pytest.raises(UsageError, match="--to-rgb converts it"):
        retrain(RecordedStudy.open(store, config.study), asked)
    assert len(retrain(RecordedStudy.open(store, config.study), replace(asked, to_rgb=True)).rows) == 1


@pytest.mark.usefixtures("told")
def test_other_data_are_another_kind(store: Store, config: SearchConfig, images: Path, tmp_path: Path) -> None:
    retrain(RecordedStudy.open(store, config.study), RetrainConfig(dominated=0))
    other = tmp_path / "other"
    images.rename(other)
    (other / "dark" / "0.png").unlink()
    found = retrain(RecordedStudy.open(store, config.study), RetrainConfig(dominated=0, data=str(other), resolution=24))
    assert len(found.rows) == 2
    assert set(found.rows["retrained_resolution"]) == {24}
    assert len(store.trainings.retrained(config.study)) == 4
    assert str(other) in found.set_up


@pytest.mark.usefixtures("told")
def test_a_study_is_retrained_from_another_folder(
    store: Store, config: SearchConfig, images: Path, tmp_path: Path
) -> None:
    """What was trained before the move counts."""
    before = retrain(RecordedStudy.open(store, config.study), RetrainConfig(dominated=0, top=1))
    moved = images.rename(tmp_path / "moved")
    after = retrain(RecordedStudy.open(store, config.study), RetrainConfig(dominated=0, data=f"{moved}/"))
    assert set(before.rows["number"]) < set(after.rows["number"])
    assert len(store.trainings.retrained(config.study)) == len(after.rows)


def test_the_studys_own_data_may_not_have_changed(store: Store, config: SearchConfig, images: Path) -> None:
    (images / "dark" / "0.png").unlink()
    with pytest.raises(UsageError, match=r"--data .*holds other images"):
        retrain(RecordedStudy.open(store, config.study), RetrainConfig())


def test_a_study_without_candidates_is_refused(config: SearchConfig) -> None:
    store = begun(config)
    with pytest.raises(UsageError, match="--study convfirst: has no complete candidate"):
        retrain(RecordedStudy.open(store, config.study), RetrainConfig())
    store.close()


@pytest.mark.usefixtures("told")
def test_they_go_with_their_study(store: Store, config: SearchConfig) -> None:
    retrain(RecordedStudy.open(store, config.study), RetrainConfig())
    number = study_id(store, config)
    assert len(store.trainings.of_study(number, TrainingStage.RETRAINING)) == 6
    optuna.delete_study(study_name=config.study, storage=store.optuna_storage)
    with store.engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM convfirst_trainings").scalar() == 0


def test_dominated_ones_are_spread_over_the_latencies() -> None:
    assert spread_over([1.0, 1.01, 1.02, 1.03, 10.0, 100.0], 3) == [0, 4, 5]
    assert spread_over([1.0, 2.0], 3) == [0, 1]
    assert spread_over([], 3) == []
    assert spread_over([1.0, 2.0, 4.0], 0) == []


def test_undominated() -> None:
    assert undominated([0.5, 0.6, 0.55], [1.0, 2.0, 3.0]) == [True, True, False]


@pytest.mark.parametrize("fields", [{"top": 0}, {"dominated": -1}, {"steps": 0}, {"resolution": 7}])
def test_impossible_settings(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"is not (at least|between 8 and 2048 pixels)"):
        RetrainConfig(**fields)
