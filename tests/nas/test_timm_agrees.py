"""What the search recorded of a folder of images, and what timm makes of the exported network on that folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_data_config

from nas import search
from nas.config import READING, DataConfig, LatencyConfig, ProxyConfig, SearchConfig
from nas.export.directories import CARD, CLASSES, chosen, of_study, write
from nas.export.selection import Selection
from nas.recorded import RecordedStudy
from search_spaces import SearchSpace
from studies import Store

# Each process of a worker takes seconds to start, and none of this depends on it.
pytestmark = pytest.mark.usefixtures("inline")
# Numbers that are no text, and names in both cases: sorted as text they come in another order.
CLASSES_IN_TIMMS_ORDER = ("2", "10", "apple", "Banana")
RESOLUTION = 144


def make_images(root: Path, suffix: str, train: int = 30, val: int = 50) -> Path:
    """Images of other sizes than the network's, whose class can be seen in the rows at their upper and lower edge only.

    A network that is given the middle of the image, channels in another order or labels in another order sees no class.
    """
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(CLASSES_IN_TIMMS_ORDER):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                height = int(rng.integers(150, 190))
                pixels = rng.integers(90, 170, (height, height + 30, 3))
                colour = np.full(3, 70)
                colour[label % 3] += 110 if label < 3 else 60
                # Some images are hard, so that networks differ.
                edge = rng.normal(colour, 45, (3, height + 30, 3))
                pixels[:3], pixels[-3:] = edge, edge
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                image.save(folder / f"{index:03d}{suffix}", **({"quality": 95} if suffix == ".jpg" else {}))
    return root


def searched(source: Path, space: SearchSpace, storage: str, **data: object) -> SearchConfig:
    """A study of one trained network on a folder of images."""
    config = SearchConfig(
        budget=1, storage=storage, space=space, keep_weights=True, workers=1,
        data=DataConfig(source=str(source), resolution=RESOLUTION, **data),  # type: ignore[arg-type]
        proxy=ProxyConfig(steps=40, batch_size=16, threads=1),
        latency=LatencyConfig(device="cpu", engine="eager", resolution=32, num_classes=4, seconds=0.1),
    )  # fmt: skip
    search.run(config)
    return config


def exported(config: SearchConfig, out: Path) -> tuple[Path, float]:
    """The directory of the study's network, and the accuracy that the study recorded."""
    store = Store.open(config.storage, create=False)
    assert store is not None
    recorded = RecordedStudy.open(store, config.study)
    rows = chosen(recorded, Selection())
    (folder,) = write(of_study(recorded, config.storage, rows), out)
    store.close()
    return folder, float(rows["accuracy"].iloc[0])


@torch.no_grad()
def accuracy_by_timm(folder: Path, images: Path, class_map: str = "") -> float:
    """The accuracy of an exported network on a folder's validation images, by timm's own data sets and loaders."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = resolve_data_config({}, model=model)
    dataset = create_dataset("", root=str(images), split="validation", class_map=class_map)
    loader = create_loader(
        dataset, batch_size=50, use_prefetcher=False, num_workers=0,
        **{key: config[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")},
    )  # fmt: skip
    hits = [model(batch).argmax(1) == labels for batch, labels in loader]
    return float(torch.cat(hits).float().mean())


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_timm_finds_the_recorded_accuracy(
    suffix: str, tmp_path: Path, tiny_space: SearchSpace, sqlite_url: str
) -> None:
    images = make_images(tmp_path / "images", suffix)
    folder, recorded = exported(searched(images, tiny_space, sqlite_url), tmp_path / "out")
    # Neither chance, with which any labels would agree, nor perfect.
    assert 0.4 < recorded < 1
    assert accuracy_by_timm(folder, images) == pytest.approx(recorded, abs=0.0051)
    assert (folder / CLASSES).read_text().split() == list(CLASSES_IN_TIMMS_ORDER)
    assert "It is the order in which timm numbers such folders." in (folder / CARD).read_text()


def test_a_study_with_the_old_order_keeps_it_and_its_export_says_so(
    tmp_path: Path, tiny_space: SearchSpace, sqlite_url: str
) -> None:
    images = make_images(tmp_path / "images", ".png")
    config = searched(images, tiny_space, sqlite_url, reading=1)
    # It goes on with the old order: the fingerprint covers the labels.
    search.run(replace(config, data=replace(config.data, reading=READING)))
    folder, recorded = exported(config, tmp_path / "out")
    assert (folder / CLASSES).read_text().split() == ["10", "2", "Banana", "apple"]
    assert "**It is not the order in which timm numbers such folders**" in (folder / CARD).read_text()
    assert accuracy_by_timm(folder, images) < recorded - 0.1
    # Such a study also scales images a little otherwise than timm does.
    assert accuracy_by_timm(folder, images, str(folder / CLASSES)) == pytest.approx(recorded, abs=0.02)
