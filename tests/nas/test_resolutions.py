"""Networks with resolutions of their own, from the images to the exports; with real trainings and latencies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch.nn import functional

from nas.config import DataConfig, LatencyConfig, ProxyConfig, SearchConfig
from nas.errors import UsageError
from nas.export.directories import chosen, of_study, render
from nas.export.selection import Selection
from nas.latency.meter import LatencyMeter
from nas.latency.subjects import choose
from nas.recorded import RecordedStudy
from nas.search import run
from nas.training import data as image_data
from nas.validation.baselines import compare
from nas.validation.config import BaselineConfig, RetrainConfig
from nas.validation.contenders import contenders
from nas.validation.retrain import retrain
from search_spaces import ArchSpec, cost
from studies import Store
from studies.sql import read_view
from tests.conftest import make_tiny_space

# Each process of a worker takes seconds to start, and none of this depends on it.
pytestmark = pytest.mark.usefixtures("inline")
SELECT = "SELECT * FROM"
SPACE = make_tiny_space(resolution=(16, 24, 32), stem_stride=(1, 2))


@pytest.fixture
def config(sqlite_url: str, images: Path) -> SearchConfig:
    return SearchConfig(
        budget=6, storage=sqlite_url, space=SPACE, data=DataConfig(str(images), resolution=24), workers=1,
        proxy=ProxyConfig(steps=2, batch_size=8, threads=1), keep_weights=True,
        latency=LatencyConfig(device="cpu", engine="eager", resolution=24, num_classes=2, precision=0.9, seconds=0.05),
    )  # fmt: skip


def test_a_study_of_several_resolutions(config: SearchConfig) -> None:
    result = run(config)
    assert result.complete == 6
    store = Store.open(config.storage, create=False)
    assert store is not None
    recorded = RecordedStudy.open(store, config.study)
    archs = {each.number: ArchSpec.from_json(each.arch) for each in recorded.candidates()}
    assert len({arch.resolution for arch in archs.values()}) > 1

    # Each is counted at its own resolution, and all are in one deployment and on one front.
    rows = recorded.evaluations().set_index("number")
    for number, arch in archs.items():
        row = rows.loc[number]
        assert (row["resolution"], row["network_resolution"]) == (24, arch.resolution)
        assert row["macs"] == cost(arch, arch.resolution or 0, 2).macs
    for view in ("convfirst_evaluations", "pareto_front"):
        frame: pd.DataFrame = read_view(store.engine, f"{SELECT} {view} WHERE study_name = :name", config.study)
        shown = [ArchSpec.from_json(text).resolution for text in frame["arch"]]
        assert list(frame["network_resolution"]) == shown
    front = recorded.front()
    assert set(front["number"]) == set(result.pareto_front["number"])
    assert list(front["accuracy"]) == sorted(front["accuracy"])

    # Weights and exports are for the network's own resolution.
    for exported in of_study(recorded, config.storage, chosen(recorded, Selection())):
        assert exported.resolution == exported.deployment.resolution == exported.arch.resolution
        assert f"input_size: [3, {exported.resolution}, {exported.resolution}]" in render(exported)["train.yaml"]

    # Longer trainings, too; they have one front.
    found = retrain(recorded, RetrainConfig(steps=3, dominated=6, workers=1))
    assert len(found.rows) == 6
    assert list(found.rows["retrained_resolution"]) == list(found.rows["network_resolution"])
    front_after = read_view(store.engine, f"{SELECT} retrained_front WHERE study_name = :name", config.study)
    on_front = found.rows[found.rows["on_retrained_front"]]
    assert set(front_after["number"]) == set(on_front["number"])
    # Nothing is left to be done a second time; at a resolution of all there is.
    assert len(retrain(recorded, RetrainConfig(steps=3, dominated=6, workers=1)).rows) == 6
    elsewhere = retrain(recorded, RetrainConfig(steps=3, dominated=6, workers=1, resolution=16)).rows
    assert set(elsewhere["retrained_resolution"]) == {16}
    # Those are a front of their own, on which are also networks that have this resolution anyway.
    assert 16 in [archs[number].resolution for number in elsewhere["number"]]
    fronts = read_view(store.engine, f"{SELECT} retrained_front WHERE study_name = :name", config.study)
    at_one = fronts[fronts["one_resolution"] == 16]
    assert set(at_one["number"]) == set(elsewhere[elsewhere["on_retrained_front"]]["number"])
    assert set(fronts[fronts["one_resolution"].isna()]["number"]) == set(on_front["number"])

    compare(recorded, BaselineConfig(models=("test_efficientnet",), steps=2, found=2, workers=1))
    own = {each.name: each.resolution for each in contenders(recorded)}
    assert own["ConvFirst anchor"] == 24
    for name, resolution in own.items():
        if name.startswith("trial"):
            assert resolution == archs[int(name.split()[1])].resolution

    # A trial is analysed as it was timed, or at a resolution that is asked for.
    number = next(iter(archs))
    (subject,) = choose(store, config.study, ("--trial", number), None, {})
    assert subject.config.resolution == archs[number].resolution
    (asked,) = choose(store, config.study, ("--trial", number), None, {"resolution": 48})
    assert asked.config.resolution == 48
    assert asked.arch is not None
    assert asked.arch.shown(asked.config.resolution) == 48
    store.close()


def test_the_same_images_are_loaded_at_every_resolution(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where not all of them fit at the largest."""
    config = DataConfig(str(images), resolution=16)
    every = dict(image_data.load_all(config, (16, 32)))
    assert {size: data.train_images.shape[-1] for size, data in every.items()} == {16: 16, 32: 32}
    assert torch.equal(every[16].train_labels, every[32].train_labels)
    monkeypatch.setattr(image_data, "MAX_BYTES", 10 * 3 * 32 * 32)
    few = dict(image_data.load_all(config, (16, 32)))
    assert len(few[16].train_images) == len(few[32].train_images) == 10
    assert torch.equal(few[16].train_labels, few[32].train_labels)
    assert len(image_data.load(config).train_images) > 10


def test_a_subset_of_the_images_is_the_same_later(config: SearchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many are taken as fit at the largest resolution, also by trainings that need another one."""
    monkeypatch.setattr(image_data, "MAX_BYTES", 10 * 3 * 32 * 32)
    run(replace(config, budget=3))
    store = Store.open(config.storage, create=False)
    assert store is not None
    recorded = RecordedStudy.open(store, config.study)
    assert len(retrain(recorded, RetrainConfig(steps=2, workers=1)).rows) > 1
    store.close()


def test_digits_of_several_resolutions_are_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CONVFIRST_CACHE", str(tmp_path))
    monkeypatch.setattr(image_data, "DIGITS_TRAIN", 60)
    monkeypatch.setattr(image_data, "DIGITS_VAL", 20)
    # Images are composed in chunks, and labels drawn after the pixels of the chunk before.
    monkeypatch.setattr("nas.training.clutter.CHUNK", 10)
    every = dict(image_data.load_all(DataConfig(), (16, 32)))
    small, large = every[16], every[32]
    assert torch.equal(small.train_labels, large.train_labels)
    assert torch.equal(small.val_labels, large.val_labels)
    shrunk = functional.avg_pool2d(large.train_images.float(), 2)
    assert float((shrunk - small.train_images.float()).abs().mean()) < 10
    # One resolution alone is what it was.
    assert torch.equal(image_data.load(DataConfig()).train_images, large.train_images)


def test_networks_of_several_sizes_are_timed_in_turns() -> None:
    config = LatencyConfig(device="cpu", engine="eager", seconds=0.2, precision=0.9)
    anchor = SPACE.anchor()
    meter = LatencyMeter(config, anchor.build(10), anchor_size=24)
    assert meter.anchor_forwards
    network = SPACE.smallest().build(10)
    small, large = meter.measure_together([network, network], [16, 128])
    assert large.latency.median_ms > small.latency.median_ms
    assert large.workspace_bytes > small.workspace_bytes
    with pytest.raises(ValueError, match="longer"):
        meter.measure_together([network], [16, 32])


def test_images_that_have_changed_are_refused_at_any_resolution(config: SearchConfig, images: Path) -> None:
    run(replace(config, budget=1))
    from PIL import Image

    for path in images.rglob("*.png"):
        Image.new("RGB", (20, 20), "red").save(path)
    store = Store.open(config.storage, create=False)
    assert store is not None
    recorded = RecordedStudy.open(store, config.study)
    with pytest.raises(UsageError, match="holds other images"):
        retrain(recorded, RetrainConfig(steps=2, workers=1))
    store.close()
