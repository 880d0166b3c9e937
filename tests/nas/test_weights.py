"""Weights that a search keeps: written whole, found again, and gone with the front."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nas.config import DataConfig, LatencyConfig, ProxyConfig, SearchConfig
from nas.errors import UsageError
from nas.search.loop import run
from nas.training.weights import Images, Trained, Weights, near_front, weight_folder
from search_spaces import ArchSpec
from studies import Store
from tests.conftest import LFS_POINTER, make_tiny_space

IMAGES = Images(("a", "b"), 16, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
ARCH = make_tiny_space().smallest()


def trained() -> Trained:
    return Trained.of(ARCH.build(2).to(memory_format=torch.channels_last), IMAGES)  # type: ignore[call-overload]


def test_what_is_kept_is_found(tmp_path: Path) -> None:
    kept, made = Weights(tmp_path / "w", 3), trained()
    assert kept.find(7, ARCH.arch_id) is None
    kept.keep_better(7, ARCH.arch_id, 0.5, made)
    found = kept.find(7, ARCH.arch_id)
    assert found is not None
    assert found.images == IMAGES
    assert found.weights.keys() == made.weights.keys()
    assert all(torch.equal(tensor, made.weights[name]) for name, tensor in found.weights.items())
    # Another trial, another study, another architecture.
    assert kept.find(8, ARCH.arch_id) is None
    assert Weights(tmp_path / "w", 4).find(7, ARCH.arch_id) is None
    assert kept.find(7, "0" * 12) is None


def test_only_this_studys_others_go(tmp_path: Path) -> None:
    mine, others = Weights(tmp_path, 1), Weights(tmp_path, 11)
    for number in (1, 2, 3):
        mine.keep_better(number, ARCH.arch_id, 0.5, trained())
    others.keep_better(1, ARCH.arch_id, 0.5, trained())
    mine.keep_only({2})
    assert [mine.find(number, ARCH.arch_id) is not None for number in (1, 2, 3)] == [False, True, False]
    assert others.find(1, ARCH.arch_id) is not None


@pytest.mark.parametrize(("content", "told"), [(LFS_POINTER, "`git lfs pull`"), ("", "it is empty"), ("x", "Error")])
def test_a_damaged_file_is_told(tmp_path: Path, content: str, told: str) -> None:
    kept = Weights(tmp_path, 3)
    (tmp_path / "study3_t0007.safetensors").write_text(content)
    with pytest.raises(UsageError, match=rf"study3_t0007\.safetensors: cannot be read \(.*{told}") as caught:
        kept.find(7, ARCH.arch_id)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("accuracy", "latency_ms", "near"),
    [(0.8, 2.0, True), (0.7, 1.2, True), (0.7, 1.26, False), (0.71, 2.0, True), (0.5, 0.5, True)],
)
def test_near_the_front(accuracy: float, latency_ms: float, near: bool) -> None:
    """Of .7 in 1 ms: 1.25 ms are as much slower as may turn out to be noise."""
    assert near_front(accuracy, latency_ms, [(0.7, 1.0)]) is near


@pytest.mark.usefixtures("inline")
def test_a_search_keeps_its_front(sqlite_url: str, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For real: the weights are those that were trained, with what they were trained for."""
    # On a busy machine, latencies of so little sampling move farther than a candidate may be off the front.
    monkeypatch.setattr("nas.training.weights.NEAR_FRONT", 0.0)
    config = SearchConfig(
        budget=5, storage=sqlite_url, space=make_tiny_space(), data=DataConfig(str(images), resolution=16), workers=1,
        proxy=ProxyConfig(steps=3, batch_size=8, threads=1), keep_weights=True,
        latency=LatencyConfig(device="cpu", engine="eager", resolution=16, num_classes=2, precision=0.9, seconds=0.05),
    )  # fmt: skip
    result = run(config)
    store = Store.open(sqlite_url, create=False)
    assert store is not None
    study = store.find_study(config.study)
    assert study is not None
    kept = Weights(weight_folder(sqlite_url), study.study_id)
    numbers = {int(number) for number in result.pareto_front["number"]}
    assert {path.name for path in kept.folder.iterdir()} == {f"study1_t{number:04d}.safetensors" for number in numbers}
    for _, row in result.pareto_front.iterrows():
        arch = ArchSpec.from_json(str(row["arch"]))
        found = kept.find(int(row["number"]), arch.arch_id)
        assert found is not None
        assert found.images.classes == ("bright", "dark")
        assert found.images.resolution == 16
        network = arch.build(2)
        network.load_state_dict(found.weights)
        # Trained: batch norms have seen images.
        assert int(found.weights["bn1.num_batches_tracked"]) == 3
    store.close()
    # Not part of the study's identity.
    assert run(replace(config, keep_weights=False)).complete == 5
