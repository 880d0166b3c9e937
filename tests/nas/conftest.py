"""A study that is written down and not searched: a handful of images, tiny networks, a step or two."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kernels.device_info import DeviceInfo
from nas.child_process import ChildProcess
from nas.config import DataConfig, LatencyConfig, ProxyConfig, SearchConfig
from nas.training import data as image_data
from nas.training import pool as trainings
from nas.training import workers
from nas.validation import baseline_latencies
from search_spaces import ArchSpec
from studies import Candidate, CandidateLatency, CandidateState, Owner, Profile, Store
from tests.conftest import make_tiny_space

HERE = asdict(DeviceInfo.of(torch.device("cpu")))
FRONT = ((0.5, 1.0), (0.6, 2.0), (0.7, 3.0), (0.8, 4.0))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of two classes that differ in brightness."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(("dark", "bright")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(20):
            pixels = rng.integers(0, 100, (16, 16, 3)) + 150 * label
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "images" / name / f"{number}.png")
    return tmp_path / "images"


@pytest.fixture
def config(sqlite_url: str, images: Path) -> SearchConfig:
    return SearchConfig(
        storage=sqlite_url, space=make_tiny_space(), data=DataConfig(source=str(images), resolution=16),
        proxy=ProxyConfig(steps=2, batch_size=8, threads=1),
        latency=LatencyConfig(
            device="cpu", engine="torchscript", resolution=16, num_classes=2, precision=0.9, seconds=0.1
        ),
    )  # fmt: skip


def archs(config: SearchConfig, count: int) -> list[ArchSpec]:
    anchor = config.space.anchor()
    return [replace(anchor, stages=(replace(anchor.stages[0], blocks=blocks),)) for blocks in range(1, count + 1)]


def add_candidates(
    store: Store, config: SearchConfig, study_id: int, device_id: int, points: Sequence[tuple[float, float]] = FRONT
) -> None:
    """Complete ones of (accuracy, latency_ms), of one block and more."""
    me = Owner.me()
    store.ownership.claim(study_id, me)
    deployment = config.latency
    for (accuracy, latency_ms), arch in zip(points, archs(config, len(points)), strict=True):
        trial_id = store.optuna_storage.create_new_trial(study_id)
        candidate = Candidate(
            trial_id=trial_id, study_id=study_id, number=store.optuna_storage.get_trial_number_from_id(trial_id),
            arch_id=arch.arch_id, arch=arch.to_json(), summary=str(arch), params=1, macs=1,
            state=CandidateState.COMPLETE, seed=0, accuracy=accuracy, total_seconds=1.0,
        )  # fmt: skip
        candidate.latencies = [CandidateLatency(
            device_id=device_id, engine=deployment.engine, dtype=deployment.dtype, batch_size=1, resolution=16,
            threads=1, median_ms=latency_ms, p20_ms=1.0, p80_ms=1.0, repeats=1, raw_median_ms=1.0,
            anchor_median_ms=1.0, weight_bytes=1, workspace_bytes=1,
        )]  # fmt: skip
        store.add_candidate(candidate, me)
    store.ownership.release(study_id, me)


def begun(config: SearchConfig) -> Store:
    """A study without candidates; its device's profile is known."""
    store = Store.open(config.storage, create=True)
    assert store is not None
    store.create_study(
        config.study, config=json.dumps(config.identity()), data_fingerprint=image_data.load(config.data).fingerprint,
        versions="{}", device=HERE, anchor=config.space.anchor().to_json(), anchor_ms=1.0,
    )  # fmt: skip
    store.devices.add_profile(HERE, Profile(
        dtype="float32", threads=1, copy_bytes_per_s=1e10, macs_per_s=1e10, launch_seconds=1e-6,
        network_yardstick_ms=1.0, product_yardstick_ms=1.0, interval_share=0.1,
    ))  # fmt: skip
    return store


@pytest.fixture
def store(config: SearchConfig) -> Iterator[Store]:
    """A study of four candidates, all on its front."""
    store = begun(config)
    study = store.find_study(config.study)
    assert study is not None
    add_candidates(store, config, study.study_id, study.device_id)
    yield store
    store.close()


def study_id(store: Store, config: SearchConfig) -> int:
    study = store.find_study(config.study)
    assert study is not None
    return study.study_id


class Inline(ChildProcess):
    """Calls in this process: quick."""

    def start(self) -> None:
        pass

    def call(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline_latencies, "ChildProcess", Inline)
    monkeypatch.setattr(workers, "ChildProcess", Inline)
    # Threads of one process share a random generator.
    monkeypatch.setattr(trainings, "cores", lambda: 1)
    # A worker's images go with it; here another test's may have had the same place.
    trainings.mapped.cache_clear()
