"""Baselines, on a study that is written down and not searched: a handful of images, tiny networks, a step or two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from torch import nn

from nas.config import LatencyConfig, SearchConfig
from nas.errors import CandidateFailed, UsageError
from nas.latency.values import Latency
from nas.recorded import RecordedStudy
from nas.training import pool as trainings
from nas.validation import baseline_latencies
from nas.validation.baselines import compare
from nas.validation.config import BaselineConfig
from nas.validation.contenders import Contender, ContenderKind, contenders, convergence, failures
from nas.validation.networks import (
    NetworkSpec,
    default_map_size,
    own_map_size,
    suited_resolution,
    timm_model,
    total_stride,
)
from nas.validation.verdict import table, training_lines, verdict
from search_spaces import load_space
from studies import Store
from tests.nas.conftest import archs, begun, study_id

RATES = (1e-3, 1e-2)


def small(*models: str, **changes: Any) -> BaselineConfig:
    """One pixel of final map: 32 pixels for a network of stride 32."""
    fields: dict[str, Any] = dict(models=models, found=1, steps=2, learning_rates=(1e-3,), map_size=1)
    return BaselineConfig(**(fields | changes))


def trained(store: Store, config: SearchConfig) -> list[tuple[str, int, float]]:
    rows = store.baselines.trainings(study_id(store, config))
    return [(row.name, row.steps, row.learning_rate) for row in rows]


def recorded(store: Store, config: SearchConfig) -> RecordedStudy:
    return RecordedStudy.open(store, config.study)


# -- Which resolution suits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stride", "map_size", "pixels"), [(8, 4, 32), (32, 4, 128), (16, 4, 64), (32, 7, 224), (2, 1, 8), (32, 128, 2048)]
)
def test_resolutions_that_suit(stride: int, map_size: int, pixels: int) -> None:
    """By hand: 4x4 at the end of stride 32 are 128 pixels at its beginning."""
    assert suited_resolution(stride, map_size) == pixels


def test_the_map_is_that_of_the_studys_own_networks() -> None:
    anchor = load_space("small").anchor()
    assert anchor.total_stride == 8
    # 33 pixels are halved to 17, 9 and 5.
    assert [own_map_size(anchor, pixels) for pixels in (32, 33, 64)] == [4, 5, 8]
    assert [default_map_size(4, kind) for kind in ("cuda", "cpu")] == [4, 2]
    assert default_map_size(1, "cpu") == 1


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_the_stride_that_timm_tells_is_the_one_that_shows(name: str) -> None:
    model = timm_model(name, 10)
    assert total_stride(model) == 32
    model.feature_info = None  # type: ignore[assignment]
    assert total_stride(model) == 32


def test_features_that_are_no_map_have_no_stride() -> None:
    class Tokens(nn.Module):
        def forward_features(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(2)

    with pytest.raises(CandidateFailed, match="not a map"):
        total_stride(Tokens())


# -- What converged is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracies", "half", "converged", "words"),
    [
        ({1e-3: 0.70, 4e-3: 0.90, 1e-2: 0.88}, 0.89, True, "gained +1.0 points"),
        ({1e-3: 0.70, 4e-3: 0.90, 1e-2: 0.79}, 0.80, False, "still gained 10.0 points"),
        # Chance of ten classes is .1; a quarter of the way from there to 1 is .325.
        ({1e-3: 0.30, 4e-3: 0.32, 1e-2: 0.31}, 0.32, False, "hardly above chance"),
        ({1e-3: 0.30, 4e-3: 0.33, 1e-2: 0.31}, 0.32, True, "gained +1.0 points"),
        # At the edge, ahead by much or by little.
        ({4e-3: 0.90, 1e-2: 0.80}, 0.89, False, "a lower learning rate"),
        ({1e-3: 0.80, 4e-3: 0.90}, 0.89, False, "a higher learning rate"),
        ({1e-3: 0.89, 4e-3: 0.90}, 0.89, True, "gained +1.0 points"),
        ({4e-3: 0.90}, 0.89, True, "gained +1.0 points"),
        ({4e-3: 0.90, 1e-3: 0.89}, None, False, "no shorter training"),
        ({1e-3: 0.70, 4e-3: 0.85, 1e-2: 0.84}, 0.89, True, "gained -4.0 points"),
    ],
)
def test_convergence(accuracies: dict[float, float], half: float | None, converged: bool, words: str) -> None:
    found, reason = convergence(accuracies, 4e-3, half, chance=0.1)
    assert found is converged
    assert words in reason


# -- The verdict ---------------------------------------------------------------------------------------------------


def contender(
    name: str, accuracy: float, latency_ms: float, kind: ContenderKind = ContenderKind.FOUND, converged: bool = True
) -> Contender:
    return Contender(
        name=name, kind=kind, summary=name, trial=None, params=1, macs=1, accuracy=accuracy,
        latency=Latency(latency_ms, latency_ms, latency_ms, repeats=1), engine="eager", resolution=32,
        learning_rate=1e-3, steps=800, batch_size=32, rates=3, converged=converged,
        reason="doubling the steps gained 9 points",
    )  # fmt: skip


FOUND = [contender("trial 1", 0.80, 0.5), contender("trial 2", 0.90, 1.0), contender("trial 3", 0.95, 2.0)]
TIMM = ContenderKind.TIMM


def test_equal_accuracy_and_equal_latency() -> None:
    """The fastest that is at least as accurate is trial 2, the most accurate that is at most as slow trial 3."""
    first, *rest = verdict([*FOUND, contender("resnet", 0.85, 2.5, TIMM)])
    assert first == (
        "resnet (85.0% in 2.5 ms at 32 px): at equal accuracy trial 2 is 2.5 times as fast (90.0% in 1 ms at 32 px); "
        "at equal latency trial 3 is 10.0 points more accurate (95.0% in 2 ms at 32 px)."
    )
    assert rest == ["All of these have converged: doubling the steps to 800 gained each at most 2 points."]


@pytest.mark.parametrize(
    ("accuracy", "latency_ms", "words"),
    [
        (0.99, 2.5, "no found network is as accurate, the best, trial 3, 95.0%"),
        (0.70, 0.1, "no found network is as fast, the fastest, trial 1, 80.0%"),
        (0.70, 0.1, "at equal accuracy trial 1 is slower, 5.0 times its latency"),
        (0.90, 1.05, "at equal accuracy trial 2 is about as fast"),
        (0.99, 2.0, "at equal latency trial 3 is 4.0 points less accurate"),
    ],
)
def test_a_baseline_that_is_better_is_told_as_such(accuracy: float, latency_ms: float, words: str) -> None:
    assert words in verdict([*FOUND, contender("resnet", accuracy, latency_ms, TIMM)])[0]


def test_what_has_not_converged_is_not_compared() -> None:
    fast = contender("trial 0", 0.99, 0.01, converged=False)
    slow = contender("late", 0.5, 9.0, TIMM, converged=False)
    lines = verdict([fast, *FOUND, contender("resnet", 0.85, 2.5, TIMM), slow])
    assert "trial 2 is 2.5 times" in lines[0]
    assert lines[-1] == (
        "Not compared, as not converged: trial 0 (doubling the steps gained 9 points); late (doubling the steps "
        "gained 9 points)."
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "no baseline has been trained"),
        (FOUND, "no baseline has been trained"),
        ([contender("resnet", 0.8, 1.0, TIMM)], "no found network has been trained"),
        ([*FOUND, contender("resnet", 0.8, 1.0, TIMM, converged=False)], "of no baseline has converged (resnet: doubl"),
        ([contender("trial 1", 0.8, 1.0, converged=False), contender("resnet", 0.8, 1.0, TIMM)], "(trial 1: doubling"),
    ],
)
def test_no_verdict_says_why(given: list[Contender], words: str) -> None:
    (line,) = verdict(given)
    assert line.startswith("No verdict: ")
    assert words in line


# -- For real --------------------------------------------------------------------------------------------------------


def test_networks_side_by_side(store: Store, config: SearchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """In processes of their own, from images in a folder to the table."""
    # One that trains and one that measures: each imports torch and timm.
    monkeypatch.setattr(trainings, "cores", lambda: 1)
    before = len(store.load_optuna_study(config.study).trials)
    compare(recorded(store, config), small("test_resnet", found=3))
    found = {each.name: each for each in contenders(recorded(store, config))}
    assert set(found) == {"ConvFirst anchor", "trial 0", "trial 2", "trial 3", "test_resnet"}
    ours, theirs = found["trial 3"], found["test_resnet"]
    assert (ours.kind, ours.trial, ours.resolution, ours.engine) == (ContenderKind.FOUND, 3, 16, "torchscript")
    assert ours.summary == str(archs(config, 4)[3])
    assert (theirs.kind, theirs.trial, theirs.resolution) == (ContenderKind.TIMM, None, 32)
    assert (theirs.steps, theirs.batch_size, theirs.learning_rate) == (2, 8, 1e-3)
    assert theirs.training.startswith("2 steps of 8 images at learning rate 0.001, the only one; ")
    assert theirs.params == sum(p.numel() for p in timm_model("test_resnet", 2).parameters())
    assert theirs.macs > 1e5
    assert all(0 < each.latency.p20_ms <= each.latency.median_ms <= each.latency.p80_ms for each in found.values())
    latencies = [each.latency.median_ms for each in contenders(recorded(store, config))]
    assert latencies == sorted(latencies)
    assert len(verdict(list(found.values()))) >= 1
    assert table(list(found.values()), "title").row_count == 5
    assert any(line.startswith("test_resnet: 2 steps of 8") for line in training_lines(list(found.values())))
    rows = store.baselines.latencies(study_id(store, config))
    assert len({row.measured_at for row in rows}) == 1
    # The sampler's history knows nothing of it.
    assert len(store.load_optuna_study(config.study).trials) == before
    assert len(store.candidates(study_id(store, config))) == before


@pytest.mark.usefixtures("inline")
def test_a_run_makes_what_is_lacking(store: Store, config: SearchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(recorded(store, config), small("test_resnet", learning_rates=RATES))
    first = trained(store, config)
    # Each on the whole schedule at every rate, then at the best of them on half of it.
    assert sorted(name for name, steps, _ in first if steps == 1) == ["ConvFirst anchor", "test_resnet", "trial 3"]
    assert sum(steps == 2 for _, steps, _ in first) == 6
    accuracies = {
        (row.name, row.steps, row.learning_rate): row.accuracy or 0.0
        for row in store.baselines.trainings(study_id(store, config))
    }
    for name, steps, rate in first:
        if steps == 1:
            assert accuracies[name, 2, rate] == max(accuracies[name, 2, other] for other in RATES)
    assert "the best of 2" in contenders(recorded(store, config))[0].training
    when = store.baselines.latencies(study_id(store, config))[0].measured_at
    with monkeypatch.context() as patch:
        patch.delattr(trainings, "train_one")
        patch.delattr(baseline_latencies, "time_in_turns")
        compare(recorded(store, config), small("test_resnet", learning_rates=RATES))
    assert trained(store, config) == first
    # Another one is trained by itself, and measured with all.
    compare(recorded(store, config), small("test_efficientnet", learning_rates=RATES))
    assert {name for name, _, _ in trained(store, config)[len(first) :]} == {"test_efficientnet"}
    rows = store.baselines.latencies(study_id(store, config))
    assert len(rows) == 4
    assert {row.measured_at for row in rows} != {when}
    assert len({row.measured_at for row in rows}) == 1
    # Another schedule, and another resolution, are rows of their own; of schedules the longest is shown.
    compare(recorded(store, config), small("test_resnet", steps=4, map_size=2))
    shown = {(each.name, each.resolution, each.steps) for each in contenders(recorded(store, config))}
    assert shown == {("ConvFirst anchor", 16, 4), ("trial 3", 16, 4), ("test_resnet", 64, 4)}


@pytest.mark.usefixtures("inline")
def test_interrupted_it_keeps_what_was_finished(store: Store, config: SearchConfig) -> None:
    lines: list[str] = []

    def interrupting(line: str) -> None:
        lines.append(line)
        if line.startswith("2/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(recorded(store, config), small("test_resnet"), interrupting)
    kept = trained(store, config)
    assert len(kept) == 2
    lines.clear()
    compare(recorded(store, config), small("test_resnet"), lines.append)
    assert trained(store, config)[:2] == kept
    assert next(line for line in lines if "/1 " in line).startswith("1/1")
    assert not any("in turns" in line for line in lines)
    assert len(contenders(recorded(store, config))) == 3


@pytest.mark.usefixtures("inline")
def test_what_fails_is_written_down_and_stops_nothing(store: Store, config: SearchConfig) -> None:
    """A network for images of another size; one that does not compile; a learning rate at which all diverge."""
    compare(
        recorded(store, config),
        small("vit_tiny_patch16_224", "test_resnet", steps=4, learning_rates=(1e-3, 1e30)),
    )  # fmt: skip
    assert {each.name for each in contenders(recorded(store, config))} == {"ConvFirst anchor", "trial 3", "test_resnet"}
    assert all(each.learning_rate == 1e-3 for each in contenders(recorded(store, config)))
    (line,) = failures(recorded(store, config))
    assert line.startswith("vit_tiny_patch16_224: does not run on images of 16x16 (")
    reasons = [row.reason for row in store.baselines.trainings(study_id(store, config)) if row.learning_rate == 1e30]
    assert len(reasons) == 3
    assert all(reason and ("diverged" in reason or "not finite" in reason) for reason in reasons)


@pytest.mark.usefixtures("inline")
def test_what_cannot_be_measured_is_not_trained(
    store: Store, config: SearchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deploy(network: nn.Module, deployment: LatencyConfig, example: torch.Tensor) -> nn.Module:
        if deployment.resolution == 32:
            raise CandidateFailed("engine x does not compile it")
        return network.eval()

    monkeypatch.setattr(baseline_latencies, "deploy", deploy)
    compare(recorded(store, config), small("test_resnet"))
    assert {each.name for each in contenders(recorded(store, config))} == {"ConvFirst anchor", "trial 3"}
    assert failures(recorded(store, config)) == ["test_resnet: engine x does not compile it"]
    assert "test_resnet" not in {name for name, _, _ in trained(store, config)}


@pytest.mark.usefixtures("inline")
def test_one_that_kills_its_process_is_found_out(
    store: Store, config: SearchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured together all would fall with it; trained it is the only one that does."""
    measured, train = baseline_latencies.time_in_turns, trainings.train_one

    def fatal(networks: list[NetworkSpec], *rest: Any) -> list[Any]:
        if any(each.name == "test_efficientnet" for each in networks):
            raise CandidateFailed("its process was killed by SIGSEGV")
        return measured(networks, *rest)

    def crashing(network: NetworkSpec, *rest: Any) -> Any:
        if network.name == "test_resnet":
            raise CandidateFailed("its process was killed by SIGABRT")
        return train(network, *rest)

    monkeypatch.setattr(baseline_latencies, "time_in_turns", fatal)
    monkeypatch.setattr(trainings, "train_one", crashing)
    compare(recorded(store, config), small("test_resnet", "test_efficientnet"))
    assert {each.name for each in contenders(recorded(store, config))} == {"ConvFirst anchor", "trial 3"}
    assert sorted(failures(recorded(store, config))) == [
        "test_efficientnet: its process was killed by SIGSEGV",
        "test_resnet, trained at 0.001: its process was killed by SIGABRT",
    ]


# -- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(steps=1), "steps=1 is not at least 2"),
        (dict(found=0), "found=0 is not at least 1"),
        (dict(learning_rates=(1e-3, 0.0)), "learning_rates=(0.001, 0.0) is not positive numbers"),
        (dict(learning_rates=()), "learning_rates=() is not positive"),
        (dict(learning_rates=(float("nan"),)), "learning_rates=(nan,) is not positive"),
        (dict(map_size=0), "map_size=0 is not at least 1"),
        (dict(models=()), "models=() is not a list"),
    ],
)
def test_impossible_settings(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="is not") as caught:
        BaselineConfig(**fields)
    assert words in str(caught.value)


def test_an_unknown_model_is_refused(store: Store, config: SearchConfig) -> None:
    with pytest.raises(UsageError, match=r"--models resnet19: timm has no such model \(did you mean"):
        compare(recorded(store, config), small("resnet19"))


def test_a_study_without_candidates_is_refused(config: SearchConfig) -> None:
    store = begun(config)
    with pytest.raises(UsageError, match="--study convfirst: has no complete candidate"):
        compare(recorded(store, config), small("test_resnet"))
    assert contenders(recorded(store, config)) == []
    with pytest.raises(UsageError, match="--study another: not in"):
        RecordedStudy.open(store, "another")
    store.close()


def test_other_data_are_refused(store: Store, config: SearchConfig, images: Path) -> None:
    (images / "dark" / "0.png").unlink()
    with pytest.raises(UsageError, match=r"--data .*holds other images"):
        compare(recorded(store, config), small("test_resnet"))


@pytest.mark.usefixtures("inline")
def test_the_images_may_have_been_moved(store: Store, config: SearchConfig, images: Path, tmp_path: Path) -> None:
    images.rename(tmp_path / "moved")
    with pytest.raises(UsageError, match="no such folder"):
        compare(recorded(store, config), small("test_resnet"))
    compare(recorded(store, config), small("test_resnet", data=str(tmp_path / "moved")))
    assert len(trained(store, config)) > 0
    next((tmp_path / "moved").rglob("*.png")).unlink()
    with pytest.raises(UsageError, match=f"--data {tmp_path}/moved: holds other images"):
        compare(recorded(store, config), small("test_resnet", data=str(tmp_path / "moved")))


@pytest.mark.usefixtures("inline")
def test_nothing_is_left_behind_when_the_study_is_deleted(store: Store, config: SearchConfig) -> None:
    compare(recorded(store, config), small("test_resnet"))
    number = study_id(store, config)
    optuna.delete_study(study_name=config.study, storage=store.optuna_storage)
    assert store.baselines.trainings(number) == []
    assert store.baselines.latencies(number) == []
