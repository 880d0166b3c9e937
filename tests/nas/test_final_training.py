"""Trainings to the end: tiny networks on a handful of images, interrupted, refused, described."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import chain, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import psutil
import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.utils.data import DataLoader
from torchvision.transforms import Compose
from typer.testing import CliRunner

from nas.cli.app import app
from nas.cli.train import _told_within
from nas.config import SearchConfig
from nas.errors import CandidateFailed, OutOfMemory, UsageError
from nas.export.directories import Exported, read, rewrite, trained, write
from nas.final_training import copies as copying
from nas.final_training import fit as fitting
from nas.final_training import rates
from nas.final_training import teacher as teaching
from nas.final_training import train as training
from nas.final_training.config import FinalConfig
from nas.final_training.copies import Copies
from nas.final_training.fit import Epoch, Fitted, Job, Within, read_job
from nas.final_training.pictures import Epochs, Pictures, loaders_may_die, most_workers
from nas.final_training.teacher import Teacher, divergence, require_knowledge, teacher_of
from nas.final_training.train import train
from nas.latency.engines import ENGINES
from nas.recommendation import commands, recommend
from nas.recorded import RecordedStudy
from nas.training import data as image_data
from nas.training import recipe as recipes
from nas.training.images import ImageReader
from nas.training.proxy import Batches, validate
from nas.training.recipe import Recipe, Start, fitted, recipe_for, regularisation
from studies import Store
from tests.nas.test_export import exported, keep_weights, links

QUICK = FinalConfig(epochs=4, learning_rate=2e-3, batch_size=8, workers=0)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CONVFIRST_LOCKS", str(tmp_path))
    # Two processes of two threads each would wait for each other.
    monkeypatch.setattr(training, "cores", lambda: 1)
    monkeypatch.setattr(training.Trials, "is_faster_in_16_bits", lambda self, recipe: False)


@pytest.fixture
def folder(store: Store, config: SearchConfig, tmp_path: Path) -> Path:
    return write(exported(store, config, trials=(1,)), tmp_path / "out")[0]


def silent(line: str) -> None:
    pass


def test_a_directory_is_trained_deployable_and_described(folder: Path, config: SearchConfig) -> None:
    told: list[tuple[Epoch, int]] = []
    notes: list[str] = []
    done = train(folder, QUICK, notes.append, lambda epoch, epochs: told.append((epoch, epochs)))
    assert [(epoch.number, epochs) for epoch, epochs in told] == [(number, 4) for number in (1, 2, 3, 4)]
    assert all(epoch.accuracy is not None and math.isfinite(epoch.train_loss) for epoch, _ in told)
    assert told[-1][0].learning_rate < told[0][0].learning_rate <= 2e-3
    # It says before how long it will take, and what it will do.
    assert any("will take about 0:00:0" in line for line in notes)
    assert any("4 passes over 36 images in steps of 8 on the CPU, AdamW" in line for line in notes)
    again = read(folder)
    trained = again.config["convfirst"]["trained"]
    assert again.config["convfirst"]["weights"] == "trained"
    assert again.classes == ["bright", "dark"]
    # The accuracy is that of the weights that are there, on the validation images.
    data = image_data.load(config.data)
    accuracy, loss = validate(again.build(), Batches(data, torch.device("cpu")))
    assert (trained["accuracy"], trained["val_images"], trained["train_images"]) == (accuracy, 4, 36)
    assert trained["loss"] == pytest.approx(loss)
    assert 0 <= trained["low"] < trained["accuracy"] <= trained["high"] <= 1
    assert trained["test_accuracy"] is None
    card = (folder / "README.md").read_text()
    assert f"As trained: **{100 * accuracy:.2f} %** of 4 held-out images" in card
    assert "As searched: 60.00 %" in card
    assert "4 passes over 36 images in steps of 8" in card
    assert str(done).startswith(f"{folder}: accuracy {accuracy:.1%} (")
    assert (folder / "training" / "curve.png").stat().st_size > 1000
    # The ONNX file has these weights, and says how images are prepared.
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    about = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    mean, std = data.mean_std
    assert about["mean"] == pytest.approx(mean.tolist())
    assert about["classes"] == ["bright", "dark"]
    x = ((data.val_images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)).numpy()
    right = session.run(None, {"images": x})[0].argmax(1) == data.val_labels.numpy()
    assert right.mean() == accuracy


def test_nothing_is_trained_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(folder, QUICK, silent)
    monkeypatch.setattr(training, "fit", lambda *rest, **named: pytest.fail("it is trained"))
    notes: list[str] = []
    assert train(folder, replace(QUICK, epochs=9), notes.append) == first
    assert "is trained already" in notes[0]


@pytest.mark.parametrize(("workers", "moments"), [(0, (0, 3)), (2, (1,))])
def test_an_interrupted_training_goes_on_as_if_nothing_had_happened(
    folder: Path, tmp_path: Path, workers: int, moments: tuple[int, ...]
) -> None:
    config = replace(QUICK, workers=workers)
    others = [shutil.copytree(folder, tmp_path / f"interrupted_at_{at}") for at in moments]
    whole = train(folder, config, silent)
    for at, other in zip(moments, others, strict=True):
        interrupt_and_go_on(config, at, other, folder, whole)


def interrupt_and_go_on(config: FinalConfig, at: int, other: Path, folder: Path, whole: Any) -> None:

    def interrupt(epoch: Epoch, epochs: int) -> None:
        if epoch.number == at + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(other, config, silent, interrupt)
    assert read(other).weights is None
    notes: list[str] = []
    told: list[int] = []
    again = train(other, config, notes.append, lambda epoch, epochs: told.append(epoch.number))
    assert told == list(range(at + 2, 5))
    assert any("its training goes on, with the recipe with which it was begun" in line for line in notes)
    assert (again.section["accuracy"], again.section["loss"]) == (whole.section["accuracy"], whole.section["loss"])
    one, two = read(folder).weights, read(other).weights
    assert one is not None
    assert two is not None
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_long_epoch_has_checkpoints_within(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it takes longer than ten minutes; here each is of two steps."""
    monkeypatch.setattr(training, "checkpoint_steps", lambda tried, steps: 2)
    monkeypatch.setattr(fitting, "SHOWN_SECONDS", 0.0)
    other = shutil.copytree(folder, tmp_path / "interrupted")
    config = replace(QUICK, epochs=2)
    moments: list[Within] = []
    whole = train(folder, config, silent, told_within=lambda within, epochs: moments.append(within))
    assert [(each.number, each.step, each.steps) for each in moments] == [
        (epoch, step, 4) for epoch in (1, 2) for step in (1, 2, 3, 4)
    ]
    assert all(one.seconds < two.seconds for one, two in pairwise(moments))

    def interrupt(within: Within, epochs: int) -> None:
        if (within.number, within.step) == (2, 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(other, config, silent, told_within=interrupt)
    notes: list[str] = []
    steps: list[int] = []
    again = train(other, config, notes.append, told_within=lambda within, epochs: steps.append(within.step))
    assert steps == [3, 4]
    assert any("1.5 of 2 passes are done, about 0:00:0" in line for line in notes)
    assert (again.section["loss"], list(csv_losses(other))) == (whole.section["loss"], list(csv_losses(folder)))
    one, two = read(folder).weights, read(other).weights
    assert one is not None
    assert two is not None
    assert all(torch.equal(one[name], two[name]) for name in one)


def csv_losses(folder: Path) -> Iterator[str]:
    return (line.split(",")[2] for line in csv_rows(folder))


def test_the_parts_of_an_epoch_are_a_pass_over_all_pictures(config: SearchConfig) -> None:
    data = image_data.load(config.data)
    pictures = Pictures(config.data, data, None)
    for steps, sizes in ((0, [36]), (1, [8, 8, 8, 12]), (2, [16, 20]), (3, [36]), (9, [36])):
        recipe = replace(recipe_of(batch_size=8), checkpoint_steps=steps)
        epochs = Epochs(pictures, recipe, lambda part: DataLoader(part, batch_size=8, drop_last=True))
        parts = [epochs.loader(0, part).dataset for part in range(epochs.parts)]
        assert [len(part) for part in parts] == sizes
        assert epochs.steps == sum(size // 8 for size in sizes)
        if len(sizes) > 1:
            first, again, second = (
                [epochs.loader(epoch, part).dataset.indices.tolist() for part in range(epochs.parts)]
                for epoch in (0, 0, 1)
            )
            assert sorted(chain.from_iterable(first)) == list(range(36))
            assert first == again != second
            # They are those pictures.
            parts[1].transform = np.asarray
            assert parts[1][3][0].transpose(2, 0, 1).tobytes() == data.train_images[first[1][3]].numpy().tobytes()


def test_checkpoints_within_an_epoch_are_ten_minutes_apart() -> None:
    tried = [rates.Tried(1e-3, 0.5, 0.5, 1.0)]
    assert [rates.checkpoint_steps(tried, steps) for steps in (100, 2399, 2400, 10**6)] == [0, 0, 1200, 1200]


def test_the_course_of_an_epoch_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    _told_within(Within(3, 1200, 5000, 1e-3, 2.5, 3600.0), 90)
    told = "3/90  step 1,200 of 5,000  loss 2.500  rate 0.001  1:00:00, 1 day, 15:10:43 left"
    assert told in capsys.readouterr().out


def test_a_begun_training_is_not_changed(folder: Path) -> None:
    before = (folder / "config.json").read_bytes()

    def interrupt(epoch: Epoch, epochs: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(folder, QUICK, silent, interrupt)
    unsaid = FinalConfig()
    for changed, told in (
        (replace(unsaid, hours=2.0), "--hours 2.0: the training of {} was begun with none; move {}/training away"),
        (replace(unsaid, workers=3), "--workers 3: the training of {} was begun with 0; move {}/training away"),
        (replace(QUICK, epochs=7), "--epochs 7: the training of {} was begun with 4; move {}/training away"),
        (replace(QUICK, learning_rate=1e-3), "--lr 0.001: the training of {} was begun with 0.002; move {}/training"),
        (replace(QUICK, seed=3), "--seed 3: the training of {} was begun with 0; move {}/training away"),
        (replace(QUICK, start=Start.KEPT), "--start kept: the training of {} was begun with fresh; move {}/training"),
        (replace(QUICK, teacher="resnet18"), "--teacher resnet18: the training of {} was begun with none; move {}"),
    ):
        with pytest.raises(UsageError, match=re.escape(told.format(folder, folder))):
            train(folder, changed, silent)
    # What was not said is no contradiction.
    notes: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        train(folder, unsaid, notes.append, interrupt)
    assert re.search(r"with which it was begun; 1 of 4 passes are done, about 0:00:\d\d left", "".join(notes))
    shutil.rmtree(folder / "training")
    # The same command goes on, also where there are fewer images than it asks for.
    large = replace(QUICK, batch_size=500)
    with pytest.raises(KeyboardInterrupt):
        train(folder, large, silent, interrupt)
    assert read_job(folder / "training")[1].batch_size == 36
    assert train(folder, large, silent).section["epochs"] == 4
    (folder / "config.json").write_bytes(before)
    shutil.rmtree(folder / "training")
    (folder / "model.safetensors").unlink()
    assert train(folder, replace(QUICK, epochs=1), silent).section["epochs"] == 1


def interrupted_before_a_checkpoint(folder: Path, config: FinalConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin a training that ends with its first epoch, whose checkpoint is not written."""

    def save_nothing(content: dict[str, Any], path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "save_tensors", save_nothing)
        with pytest.raises(KeyboardInterrupt):
            train(folder, config, silent)
    assert not (folder / "training" / "last.pth.tar").exists()


def test_before_a_checkpoint_a_training_is_begun_as_it_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def counted(self: rates.Trials, recipe: Recipe, steps: int) -> rates.Tried:
        lengths.append(steps)
        return rates.Tried(recipe.learning_rate, 0.5, 0.1, 0.1)

    monkeypatch.setattr(rates.Trials, "run", counted)
    hours = FinalConfig(hours=0.01, learning_rate=2e-3, batch_size=18, workers=0)
    interrupted_before_a_checkpoint(folder, hours, monkeypatch)
    first = read_job(folder / "training")
    assert lengths[0] == 8
    assert len(lengths) == 2
    # What short trainings showed holds for another time, too.
    interrupted_before_a_checkpoint(folder, replace(hours, hours=0.1), monkeypatch)
    longer = read_job(folder / "training")
    assert len(lengths) == 2
    assert longer[1].epochs > 3 * first[1].epochs
    assert replace(longer[1], epochs=first[1].epochs) == first[1]
    # That of another start has to be found anew.
    interrupted_before_a_checkpoint(folder, replace(hours, seed=1, hours=None, epochs=2), monkeypatch)
    assert len(lengths) == 3
    assert (read_job(folder / "training")[1].seed, read_job(folder / "training")[1].epochs) == (1, 2)
    assert train(folder, replace(hours, hours=None, epochs=1), silent).section["seed"] == 0


def test_the_hours_of_a_begun_training_are_kept(folder: Path) -> None:
    def interrupt(epoch: Epoch, epochs: int) -> None:
        raise KeyboardInterrupt

    hours = FinalConfig(hours=0.002, learning_rate=2e-3, batch_size=18, workers=0, seed=3)
    with pytest.raises(KeyboardInterrupt):
        train(folder, hours, silent, interrupt)
    with pytest.raises(UsageError, match=re.escape(f"--seed 0: the training of {folder} was begun with 3; move ")):
        train(folder, FinalConfig(seed=0), silent)
    told = f"--hours 3: the training of {folder} was begun with 0.002; move "
    with pytest.raises(UsageError, match=re.escape(told)):
        train(folder, replace(hours, hours=3), silent)
    with pytest.raises(KeyboardInterrupt):
        train(folder, hours, silent, interrupt)
    # An older version did not write them.
    fields = json.loads((folder / "training" / "job.json").read_text())
    del fields["asked_hours"]
    (folder / "training" / "job.json").write_text(json.dumps(fields))
    with pytest.raises(KeyboardInterrupt):
        train(folder, replace(hours, hours=3), silent, interrupt)


def test_weights_of_another_training_are_not_lost(folder: Path, tmp_path: Path) -> None:
    network = read(folder)
    checkpoint = tmp_path / "best.pth.tar"
    torch.save({"state_dict": network.arch.build(2).state_dict()}, checkpoint)
    rewrite(folder, trained(network, checkpoint))
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(UsageError, match=r"holds the weights of best\.pth\.tar, which would be lost"):
        train(folder, QUICK, silent)
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.fixture
def few_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the images, only ten fit into memory."""
    monkeypatch.setattr(image_data, "MAX_BYTES", 10 * 3 * 16 * 16)


def test_images_that_the_search_did_not_see_may_be_damaged(few_fit: None, folder: Path, images: Path) -> None:
    config = read(folder).data
    files = image_data.split_files(config)
    assert files is not None
    reader, seen = ImageReader(config), {image.numpy().tobytes() for image in image_data.load(config).train_images}
    unseen = [path for path, _ in files.train if reader.read(path).numpy().tobytes() not in seen]
    assert len(unseen) == 26
    for path in unseen[:2]:
        path.write_text("no image")
    notes: list[str] = []

    def interrupt(epoch: Epoch, epochs: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(folder, replace(QUICK, epochs=2), notes.append, interrupt)
    (line,) = (line for line in notes if line.startswith("left out of the training, as they cannot be read: "))
    assert all(f"{path} (UnidentifiedImageError: " in line for path in unseen[:2])
    job, _ = read_job(folder / "training")
    assert set(job.left_out) == {str(path.relative_to(images)) for path in unseen[:2]}
    assert train(folder, replace(QUICK, epochs=2), silent).section["train_images"] == 34
    # What is deleted changes the split, and so does what the search has seen.
    unseen[2].unlink()
    with pytest.raises(UsageError, match=r"holds other images .* training leaves out what it cannot read"):
        training.check_images(read(folder), config, 0, image_data.load(config))
    unseen[2].touch()
    training.check_images(read(folder), config, 0, image_data.load(config))


def test_a_damaged_image_is_named(folder: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was damaged after the training had begun."""
    files = image_data.split_files(read(folder).data)
    assert files is not None
    (images / "dark" / "broken.png").write_text("no image")
    more = replace(files, train=[*files.train, (images / "dark" / "broken.png", 1)])
    loaded = image_data.load
    monkeypatch.setattr(training, "load", lambda config, *rest: load_without(loaded, images, config, *rest))
    monkeypatch.setattr(fitting, "split_files", lambda config: more)
    monkeypatch.setattr(training, "_looked_through", lambda place, job, *rest: job)
    for workers in (0, 1):
        told = rf"^{images}/dark/broken\.png: cannot be read \(.*\); put a readable image in its place"
        with pytest.raises(CandidateFailed, match=told):
            train(folder, replace(QUICK, workers=workers, epochs=2), silent)


def killed(number: int) -> Any:
    return lambda self, index: os.kill(os.getpid(), number)


def test_a_loader_that_dies_is_a_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared memory of 64 MB, as docker gives it, ends those that write to it with SIGBUS."""
    for number, told in (
        (signal.SIGBUS, r"^/dev/shm, the shared memory, is too small .* use --workers 0$"),
        (signal.SIGKILL, r"^a process that prepares images died \(DataLoader worker .* is killed by signal: Killed\."),
    ):
        monkeypatch.setattr(Pictures, "__getitem__", killed(number))
        with pytest.raises(CandidateFailed, match=told):
            train(folder, replace(QUICK, workers=1), silent)
    # Where there is no room at all, torch's message is the whole course of it.
    text = (
        "Caught RuntimeError in DataLoader worker process 0.\nRuntimeError: unable to write to file </torch_1_2_3>: No"
    )
    with pytest.raises(CandidateFailed, match="too small"), loaders_may_die():
        raise RuntimeError(text)
    with pytest.raises(CandidateFailed, match="too small"), loaders_may_die():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for other in (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "last.pth.tar"), RuntimeError("other")):
        with pytest.raises(type(other), match=re.escape(str(other))), loaders_may_die():
            raise other


def test_there_are_as_many_workers_as_shared_memory_holds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = 64 * 3 * 32 * 32 * 4
    recipe = recipe_of(workers=8)
    for free, workers in ((0, 0), (2 * batch, 0), (4 * batch, 1), (17 * batch, 7), (18 * batch, 8), (10**12, 8)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        assert most_workers(recipe, 32) == workers
    # Batches of several GPUs, in bytes.
    several = replace(recipe, kind="cuda", devices=2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=batch))
    assert most_workers(several, 32) == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4 * batch))
    assert most_workers(several, 32) == 3
    notes: list[str] = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    done = train(folder, replace(QUICK, workers=None, epochs=1), notes.append)
    assert "/dev/shm, the shared memory, is small: 0 processes prepare images instead of 1" in notes
    assert done.section["workers"] == 0


def load_without(load: Any, images: Path, *rest: Any) -> Any:
    hidden = images / "dark" / "broken.png"
    text = hidden.read_text()
    hidden.unlink()
    try:
        return load(*rest)
    finally:
        hidden.write_text(text)


def test_where_no_onnx_file_can_be_made_the_weights_are_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*rest: Any) -> None:
        raise RuntimeError("no such operator\nand more")

    line = ["train", str(folder), "--epochs", "1", "--lr", "2e-3", "--batch", "8", "--workers", "0"]
    with monkeypatch.context() as patched:
        patched.setattr(training, "write_onnx", fail)
        result = CliRunner().invoke(app, line)
    assert result.exit_code == 2
    assert f"{folder}: accuracy " in result.stdout
    assert "classify.py" not in result.stdout
    told = f"Error: {folder}/model.onnx: cannot be made (RuntimeError: no such operator); the weights are in "
    assert result.output.splitlines()[-1].startswith(f"{told}{folder}/model.safetensors")
    assert read(folder).config["convfirst"]["weights"] == "trained"
    assert read(folder).weights is not None
    # The same command makes up for it.
    again = CliRunner().invoke(app, line)
    assert again.exit_code == 0, again.output
    assert (folder / "model.onnx").exists()
    assert f"python {folder}/classify.py" in again.stdout


def test_a_full_disk_costs_an_epoch_at_most(
    folder: Path, monkeypatch: pytest.MonkeyPatch, config: SearchConfig
) -> None:
    save, saved = fitting.save_tensors, [0]

    def full(content: dict[str, Any], path: Path) -> None:
        saved[0] += 1
        if saved[0] == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save(content, path)

    monkeypatch.setattr(fitting, "save_tensors", full)
    line = ["train", str(folder), "--epochs", "4", "--lr", "2e-3", "--batch", "8", "--workers", "0"]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 2
    assert "No space left on device" in result.output.splitlines()[-1]
    assert torch.load(folder / "training" / "last.pth.tar", weights_only=True)["epoch"] == 1
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output
    assert f"{folder}: accuracy " in result.stdout
    assert "3/4 " in result.stdout
    assert "2/4 " not in result.stdout


def too_large(self: fitting.Learner, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A step on a device whose memory holds eight images."""
    if len(images) > 8:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has a total ...")
    return STEP(self, images, labels)


STEP = fitting.Learner.step


def test_a_batch_is_chosen_that_memory_holds(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    monkeypatch.setattr(recipes, "LEAST_STEPS", 1)
    monkeypatch.setattr(fitting.Learner, "step", too_large)
    notes: list[str] = []
    done = train(folder, FinalConfig(epochs=1, workers=0), notes.append)
    assert [line for line in notes if "memory" in line] == [
        "memory ran out in a step of 32 images: steps are of 16",
        "memory ran out in a step of 16 images: steps are of 8",
    ]
    assert done.section["batch_size"] == 8
    usual = read(folder).config["convfirst"]["accuracy"]["training"]
    expected = usual["learning_rate"] * math.sqrt(8 / usual["batch_size"])
    assert any(done.section["learning_rate"] == pytest.approx(expected * factor) for factor in rates.FACTORS)
    # What the user asks for is not changed.
    result = CliRunner().invoke(app, ["train", str(other), "--epochs", "1", "--workers", "0", "--batch", "16"])
    assert result.exit_code == 2
    assert "cannot be trained (--batch 16: memory ran out; a smaller one may fit)" in result.output
    typed = training._smaller(recipe_of(learning_rate=2e-3), FinalConfig(learning_rate=2e-3))
    assert (typed.batch_size, typed.learning_rate) == (32, 2e-3)
    with pytest.raises(OutOfMemory, match="memory ran out in a step of 8 images: end what else uses the device"):
        training._smaller(recipe_of(batch_size=8), FinalConfig())


def test_a_training_that_runs_out_of_memory_goes_on_later(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["train", str(folder), "--epochs", "3", "--lr", "2e-3", "--batch", "8", "--workers", "0"]

    def full(epoch: Epoch, epochs: int) -> None:
        monkeypatch.setattr(fitting.Learner, "step", lambda self, images, _: too_large(self, images[[0] * 9], _))

    with monkeypatch.context() as patch:
        patch.setattr("nas.cli.train._told", full)
        result = CliRunner().invoke(app, line)
    assert result.exit_code == 2
    told = "cannot be trained (memory ran out in a step of 8 images: end what else uses the device and repeat "
    assert told in result.output
    assert len(result.output.splitlines()[-1]) < 400
    monkeypatch.setattr(fitting.Learner, "step", STEP)
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output
    assert "1 of 3 passes are done" in result.output


def test_two_processes_do_not_train_one_directory(folder: Path) -> None:
    def second(epoch: Epoch, epochs: int) -> None:
        with pytest.raises(UsageError, match="another process trains it now"):
            train(folder, QUICK, silent)

    train(folder, replace(QUICK, epochs=1), silent, second)


def test_a_directory_that_is_only_read_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "training").touch()
    with pytest.raises(UsageError, match=rf"^{folder}/training: cannot be read or written \(File exists\)$"):
        train(folder, QUICK, silent)
    (folder / "training").unlink()

    def refuse(path: Path, *rest: Any, **named: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    # Root may write anywhere.
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UsageError, match=rf"^{folder}/training: cannot be read or written \(Permission denied\)$"):
        train(folder, QUICK, silent)


def test_images_must_be_those_of_the_search(folder: Path, images: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    images.rename(moved)
    with pytest.raises(UsageError, match=r"--data .*images: no such folder"):
        train(folder, QUICK, silent)
    others = tmp_path / "others"
    shutil.copytree(moved, others)
    (others / "dark" / "0.png").unlink()
    with pytest.raises(UsageError, match=r"--data .*others: holds other images than those of the search of convfirst"):
        train(folder, replace(QUICK, data=str(others)), silent)
    shutil.rmtree(others / "dark")
    with pytest.raises(UsageError, match=r"--data .*others"):
        train(folder, replace(QUICK, data=str(others)), silent)
    assert not (folder / "training").exists()
    assert train(folder, replace(QUICK, data=str(moved)), silent).section["train_images"] == 36
    # timm's script finds them in the new place, too, in the search's own split; and so does a later training.
    recipe = yaml.safe_load((folder / "train.yaml").read_text())
    linked = (folder / recipe["data_dir"] / recipe["val_split"]).rglob("*.png")
    files = image_data.split_files(read(folder).data)
    assert files is not None
    assert sorted(path.resolve() for path in linked) == sorted(path for path, _ in files.val)
    assert read(folder).data.source == str(moved)


def test_the_recipe_names_images_that_came_back(
    store: Store, config: SearchConfig, images: Path, tmp_path: Path
) -> None:
    """Exported where the images are not, and trained where they are."""
    for part in ("train", "val"):
        shutil.copytree(images, tmp_path / "moved" / part)
    images.rename(tmp_path / "gone")
    (folder,) = write(exported(store, config, trials=(1,)), tmp_path / "out")
    assert "data_dir" not in yaml.safe_load((folder / "train.yaml").read_text())
    network = read(folder)
    place = replace(network.data, source=str(tmp_path / "moved"))
    data = image_data.load(place)
    made = training.finished(network, fitted_as(network), recipe_of(), data, place, 40, "")
    rewrite(folder, made)
    recipe = yaml.safe_load((folder / "train.yaml").read_text())
    assert (recipe["data_dir"], recipe["train_split"], recipe["val_split"]) == (place.source, "train", "val")


def fitted_as(network: Exported) -> Fitted:
    """The result of a training that changed nothing."""
    return Fitted(network.arch.build(2).state_dict(), 0.5, 0.7, None, ())


def test_kept_weights_are_a_start(store: Store, config: SearchConfig, tmp_path: Path) -> None:
    (bare,) = write(exported(store, config, trials=(2,)), tmp_path / "bare")
    with pytest.raises(UsageError, match=r"--start kept: the search kept no weights of convfirst_3ms_t002"):
        train(bare, replace(QUICK, start=Start.KEPT), silent)
    kept = keep_weights(store, config, 2)
    (folder,) = write(exported(store, config, trials=(2,)), tmp_path / "kept")
    train(folder, replace(QUICK, start=Start.KEPT, epochs=1), silent)
    job, recipe = read_job(folder / "training")
    assert recipe.start is Start.KEPT
    # The file has the trained weights by now.
    assert job.start == str(folder / "model.safetensors")
    (again,) = write(exported(store, config, trials=(2,)), tmp_path / "again")

    def interrupt(epoch: Epoch, epochs: int) -> None:
        raise KeyboardInterrupt

    # It goes on where the directory was moved, also before its first checkpoint.
    with pytest.raises(KeyboardInterrupt):
        train(again, replace(QUICK, start=Start.KEPT, epochs=1), silent, interrupt)
    (again / "training" / "last.pth.tar").unlink()
    again = again.rename(tmp_path / "moved")
    train(again, replace(QUICK, start=Start.KEPT, epochs=1), silent)
    (again,) = write(exported(store, config, trials=(2,)), tmp_path / "once more")
    built = replace(job, start=str(again / "model.safetensors")).build(0.0).state_dict()
    assert all(torch.equal(built[name], tensor) for name, tensor in kept.items())


def test_a_training_that_diverges_says_so(folder: Path) -> None:
    line = ["train", str(folder), "--epochs", "2", "--lr", "1e30", "--batch", "8", "--workers", "0"]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 2
    assert f"{folder}: cannot be trained (" in result.output
    assert read(folder).weights is None


def test_the_best_of_three_rates_is_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    train(folder, replace(QUICK, learning_rate=None, epochs=1), notes.append)
    (line,) = (line for line in notes if line.startswith("rates tried: "))
    tried = dict(
        (float(each.split()[0]), float(each.split("loss ")[1].rstrip(")")))
        for each in line.partition(": ")[2].split(", ")
    )
    _, recipe = read_job(folder / "training")
    assert len(tried) == 3
    assert recipe.learning_rate == pytest.approx(min(tried, key=lambda rate: tried[rate]), rel=1e-2)


def test_a_rate_stays_the_one_that_was_typed_on_any_number_of_devices(folder: Path, config: SearchConfig) -> None:
    """Its part for one device, times the root of their number, may differ by a rounding."""
    pairs = [(typed / 10_000, count) for typed in range(1, 10) for count in range(2, 9)]
    assert any(typed / math.sqrt(count) * math.sqrt(count) != typed for typed, count in pairs)
    trials = rates.Trials(job_of(folder, config), image_data.load(config.data), torch.device("cpu"), folder)
    for typed, count in pairs:
        recipe = recipe_of(learning_rate=typed, devices=count)
        tried = [rates.Tried(typed / math.sqrt(count), 0.5, 0.1, 0.1)]
        assert trials.with_best_rate(recipe, (1.0,), tried).learning_rate == typed


def test_an_epoch_takes_more_than_its_steps(
    folder: Path, config: SearchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start of its loader, a validation and a checkpoint, which are most of a short one."""
    now = [0.0]

    def takes(seconds: float, value: Any = None) -> Any:
        now[0] += seconds
        return value

    class Loader:
        def __len__(self) -> int:
            return 4

        def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            takes(3.0)
            for _ in range(4):
                yield torch.zeros(8, 3, 16, 16), torch.zeros(8, dtype=torch.long)

    learned: list[float] = []

    def step(self: fitting.Learner, images: torch.Tensor, labels: torch.Tensor) -> None:
        # The first steps of all take longer, once.
        takes(1.0 if len(learned) >= 2 else 60.0)
        learned.append(now[0])

    monkeypatch.setattr(rates.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(rates, "loader", lambda *rest: Loader())
    monkeypatch.setattr(rates, "validate", lambda *rest: takes(7.0, (0.5, 0.5)))
    monkeypatch.setattr(rates, "save_tensors", lambda content, path: takes(0.25))
    monkeypatch.setattr(fitting.Learner, "step", step)
    trials = rates.Trials(job_of(folder, config), image_data.load(config.data), torch.device("cpu"), folder)
    recipe = recipe_of(epochs=80)
    found = trials.run(recipe, 12)
    assert len(learned) == 12
    assert (found.step_seconds, found.validation_seconds, found.fixed_seconds) == (1.0, 7.0, 3.5)
    # Every second epoch is validated.
    assert rates.epoch_seconds(recipe, [found, found], 100) == 100 + 3.5 + 3.5


def job_of(folder: Path, config: SearchConfig) -> Job:
    return Job(read(folder).arch.to_json(), ("bright", "dark"), asdict(config.data), 0, "")


def test_a_rate_may_be_typed_as_it_was_printed(folder: Path) -> None:
    def interrupt(epoch: Epoch, epochs: int) -> None:
        raise KeyboardInterrupt

    notes: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        train(folder, replace(QUICK, learning_rate=2e-3 / 3), notes.append, interrupt)
    (printed,) = re.findall(r"at a rate of up to ([^,]+),", "".join(notes))
    assert float(printed) != 2e-3 / 3
    with pytest.raises(KeyboardInterrupt):
        train(folder, replace(QUICK, learning_rate=float(printed)), silent, interrupt)
    with pytest.raises(UsageError, match=r"--lr 0\.00066: the training of .* was begun with 0\.00066666"):
        train(folder, replace(QUICK, learning_rate=6.6e-4), silent, interrupt)


def test_hours_fit_the_schedule() -> None:
    recipe = recipe_of()
    assert recipe.epochs == 100
    assert fitted(recipe, 1.0, 0.0, 60.0).epochs == 54
    assert fitted(recipe, 1.0, 0.5, 60.0).epochs == 27
    assert fitted(recipe, 10.0, 0.0, 60.0).epochs == 540
    for spent in (0.0, 0.02):
        least = f"{60.0 / 0.9 / 3600 + spent:.2g}"
        told = rf"--hours 0\.01: one pass over the training images takes {re.escape(least)} hours, all included"
        with pytest.raises(UsageError, match=told):
            fitted(recipe, 0.01, spent, 60.0)


def test_too_little_time_leaves_nothing_behind(folder: Path) -> None:
    line = ["train", str(folder), "--hours", "1e-7", "--workers", "0"]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 2
    assert "one pass over the training images takes" in result.output
    assert not (folder / "training").exists()


def recipe_of(**changes: Any) -> Recipe:
    told = dict(params=10**5, resolution=32, images=20_000, kind="cpu", devices=1, cores=2, mirror=True,
                base_rate=8e-3, base_batch=32)  # fmt: skip
    return recipe_for(**(told | changes))


def test_a_recipe_follows_from_network_images_and_device() -> None:
    usual = recipe_of()
    assert (usual.batch_size, usual.threads, usual.hflip) == (64, 2, 0.5)
    assert usual.learning_rate == pytest.approx(8e-3 * math.sqrt(2))
    # Few images are seen more often, in smaller steps.
    few = recipe_of(images=400)
    assert few.batch_size == 8
    assert few.epochs == 400
    assert recipe_of(images=1_300_000).epochs == 100
    # Larger networks, and those of few images, are regularised more.
    assert recipe_of(params=5 * 10**6).augmentation["mixup"] > usual.augmentation["mixup"] == 0
    assert recipe_of(params=5 * 10**5, images=1000).augmentation["mixup"] > 0
    several = recipe_of(kind="cuda", devices=4, images=10**6, cores=32)
    assert (several.batch_size, several.images_a_step, several.workers) == (256, 1024, 4)
    assert recipe_of(mirror=False).hflip == 0
    assert recipe_of(images=3).batch_size <= 3
    assert Recipe.from_json(several.to_json()) == several


def test_larger_networks_are_regularised_more() -> None:
    made = [regularisation(int(params), 224) for params in (1e6, 5e6, 2e7, 5e7)]
    for key in ("drop_path", "mixup", "cutmix", "reprob"):
        values = [each[key] for each in made]
        assert values == sorted(values)
        assert values[0] < values[-1]


def test_the_course_of_a_training_is_looked_at_some_forty_times() -> None:
    long = replace(recipe_of(), epochs=400)
    looked = [epoch for epoch in range(400) if long.validated_after(epoch)]
    assert len(looked) == 40
    assert looked[-1] == 399
    assert all(replace(long, epochs=3).validated_after(epoch) for epoch in range(3))


def test_pictures_of_a_folder_are_read_from_its_files(config: SearchConfig, images: Path) -> None:
    data, files = image_data.load(config.data), image_data.split_files(config.data)
    assert files is not None
    pictures = Pictures(config.data, data, files.train)
    pictures.transform = np.asarray
    assert len(pictures) == 36
    reader = ImageReader(config.data)
    by_label = sorted(data.train_labels.tolist())
    assert sorted(pictures[index][1] for index in range(36)) == by_label
    read_again = {reader.read(path).numpy().tobytes() for path, _ in pictures.files or ()}
    assert read_again == {image.numpy().tobytes() for image in data.train_images}
    in_memory = Pictures(config.data, data, None)
    in_memory.transform = np.asarray
    for index in (0, 17, 35):
        assert in_memory[index][0].transpose(2, 0, 1).tobytes() == data.train_images[index].numpy().tobytes()


@pytest.fixture
def photos(images: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The images as photos that are large, for such a test: soft colours, some on their sides."""
    monkeypatch.setattr(copying, "LARGE", 1000)
    rng = np.random.default_rng(1)
    for number, path in enumerate(sorted(images.rglob("*.png"))):
        light = rng.integers(0, 100, (4, 5, 3)) + (150 if path.parent.name == "bright" else 0)
        exif = Image.Exif()
        exif[0x0112] = 6 if number % 4 == 0 else 1
        photo = Image.fromarray(light.astype(np.uint8)).resize((240, 180), Image.Resampling.BICUBIC)
        photo.save(path.with_suffix(".jpg"), quality=95, exif=exif)
        path.unlink()
    return images


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_crops_of_large_photos_are_cut_from_smaller_copies(
    config: SearchConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, orientation: int, suffix: str
) -> None:
    monkeypatch.setattr(copying, "LARGE", 1000)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = (tmp_path / "photo").with_suffix(suffix)
    # The colours say where a pixel is. Odd sizes leave a part of a pixel.
    across, down = np.meshgrid(np.linspace(0, 255, 603), np.linspace(0, 255, 451))
    Image.fromarray(np.stack([across, down, across], axis=2).astype(np.uint8)).save(path, quality=95, exif=exif)
    reader, folder = ImageReader(config.data), tmp_path / "copies"
    made, kept = (
        Pictures(config.data, None, [(path, 1)], copies)  # type: ignore[arg-type]
        for copies in (Copies(reader, 16, 0.35), Copies(reader, 16, 0.35, folder))
    )
    assert kept.copies is not None
    assert kept.copies.keep([path], verified=False) == []
    copy, full = kept.copies.find(path), reader.picture(Image.open(path))
    assert copy is not None
    # Of the smallest crop, whose shorter side is .35 ** .5 * .75 ** .5 times the photo's, 2 * 16 pixels are left.
    assert copy.size == (round(full.width / 8), round(full.height / 8))
    expected = np.asarray(full.resize(copy.size, Image.Resampling.BOX)).astype(int)
    # From one of its pixels to the next there are 3 to 5 of 255 colours.
    assert abs(np.asarray(copy) - expected).mean() < 1
    crop = RandomResizedCropAndInterpolation(16, scale=(0.35, 1.0), interpolation="bicubic")
    for seed in range(4):
        pixels = []
        for pictures in (made, kept):
            pictures.transform = Compose([crop, np.asarray])
            random.seed(seed)
            pixels.append(pictures[0][0])
        assert (pixels[0] == pixels[1]).all()
    # A photo that was changed is another.
    os.utime(path, ns=(1, 1))
    assert kept.copies.find(path) is None


def test_a_pass_decodes_no_large_photo_in_full(
    photos: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = shutil.copytree(folder, tmp_path / "other")
    picture, decoded = ImageReader.picture, [0]

    def count(reader: ImageReader, image: Image.Image) -> Image.Image:
        decoded[0] += 1
        return picture(reader, image)

    def at_the_end(epoch: Epoch, epochs: int) -> None:
        assert len(list((folder / "training" / "copies").glob("*.jpg"))) == 36
        if epoch.number == 1:
            decoded[0] = 0

    monkeypatch.setattr(ImageReader, "picture", count)
    notes: list[str] = []
    train(folder, replace(QUICK, epochs=2), notes.append, at_the_end)
    assert decoded == [0]
    assert f"{folder}/training/copies: smaller copies of 36 large photos, until the training ends" in notes
    assert not (folder / "training" / "copies").exists()
    # Where there is no room for them, all is the same, only slower.
    monkeypatch.setattr(copying, "MOST_BYTES", 0)
    train(others, replace(QUICK, epochs=2), silent)
    assert decoded[0] > 2 * 36
    one, two = read(folder).weights, read(others).weights
    assert one is not None
    assert two is not None
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_command_trains_what_is_recommended(store: Store, config: SearchConfig, tmp_path: Path) -> None:
    out = tmp_path / "exports"
    line = ["train", "--storage", config.storage, "--out", str(out), "--epochs", "1", "--lr", "2e-3", "--workers", "0"]
    limited = CliRunner().invoke(app, [*line, "--max-latency-ms", "3.5"])
    assert limited.exit_code == 0, limited.output
    assert {path.name for path in out.iterdir()} == {"convfirst_3ms_t002", links(config)}
    assert f"python {out / 'convfirst_3ms_t002' / 'classify.py'} PHOTO" in limited.stdout
    # Others go beside it, and what is trained stays.
    both = CliRunner().invoke(app, [*line, "--trial", "0", "--trial", "2"])
    assert both.exit_code == 0, both.output
    assert {path.name for path in out.iterdir()} == {"convfirst_1ms_t000", "convfirst_3ms_t002", links(config)}
    assert "is trained already" in both.output


def test_what_is_recommended_works_in_its_order(
    store: Store, config: SearchConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "recipe_for", lambda *rest, **named: replace(recipe_for(*rest, **named), epochs=1))
    monkeypatch.setattr(rates, "LEAST_STEPS", 2)
    monkeypatch.setattr("nas.export.bench.ENGINES", {"eager": ENGINES["eager"]})
    # It takes seconds to make a program of torch's.
    monkeypatch.setattr("nas.export.bench._Formats._program", lambda self: self._onnx())
    chosen = recommend(RecordedStudy.open(store, config.study)).chosen
    for _, line in commands(config.study, config.storage, chosen):
        words = shlex.split(line)
        assert words[:2] == ["python", "run_search.py"]
        done = CliRunner().invoke(app, words[2:])
        assert done.exit_code == 0, done.output
    (folder,) = (tmp_path / "exports").glob("convfirst_*")
    about = onnxruntime.InferenceSession(folder / "model.onnx").get_modelmeta().custom_metadata_map
    assert (about["input"], about["output"]) == ('"0 to 1"', '"probabilities"')
    assert read(folder).config["convfirst"]["weights"] == "trained"


def test_the_command_refuses_what_it_cannot_do(store: Store, config: SearchConfig, folder: Path) -> None:
    for line, told in (
        (["--trial", "77"], "--trial 77: there is no such candidate"),
        (["--max-latency-ms", "0.001"], "--max-latency-ms 0.001: the fastest network takes 1 ms"),
        (["--max-latency-ms", "nan"], "--max-latency-ms nan: is not positive and finite"),
        (["--max-latency-ms", "inf", "--top", "1"], "--max-latency-ms inf: is not positive and finite"),
        (["--max-latency-ms", "-1"], "--max-latency-ms -1.0: is not positive and finite"),
        ([str(folder), "--top", "2"], f"--top: is for networks of a study, not for {folder}"),
        ([str(folder), "--hours", "0"], "--hours 0.0: is not positive and finite"),
        ([str(folder), "--device", "tpu"], "--device tpu: not a device"),
        ([str(folder / "no")], f"{folder / 'no'}: no such directory"),
        ([str(folder), "--seed", "-1"], "--seed -1: is not between 0 and"),
    ):
        own = ["--storage", config.storage] if line[0].startswith("--") else []
        result = CliRunner().invoke(app, ["train", *line, *own])
        assert result.exit_code == 2, result.output
        assert told in result.output


def test_a_student_learns_what_its_teacher_answers(
    store: Store, config: SearchConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, student = write(exported(store, config, trials=(2, 0)), tmp_path / "out")[::-1]
    refused = {
        "77": "--teacher 77: trial 77 has no trained directory beside",
        "2": "--teacher 2: trial 2 has no trained directory beside",
        str(teacher): "is not trained to the end; train it first",
        "no_such_model": "--teacher no_such_model: is no trained directory, and timm has no weights of that name here",
        "resnet18=missing.pth": "--teacher resnet18=missing.pth: no such file",
    }
    (tmp_path / "best.pth").write_text("")
    refused[f"convfirst_3ms_t002={tmp_path / 'best.pth'}"] = "name its directory, which `export DIRECTORY --checkpoint"
    for named, told in refused.items():
        with pytest.raises(UsageError, match=re.escape(told)):
            train(student, replace(QUICK, teacher=named), silent)
    assert not (student / "training" / "recipe.json").exists()
    train(teacher, QUICK, silent)
    notes: list[str] = []
    opened: list[Path] = []
    monkeypatch.setattr(teaching, "read", lambda path: opened.append(path) or read(path))
    done = train(student, replace(QUICK, teacher="2"), notes.append)
    # Once to find trial 2, and once for all trainings, also those of further networks.
    shown_to(str(teacher))
    assert opened == [student, teacher, teacher]
    # Both may be moved.
    moved = shutil.copytree(tmp_path / "out", tmp_path / "moved", symlinks=True)
    assert read_job(moved / student.name / "training")[0].teacher == str(moved / teacher.name)
    assert done.section["teacher"] == {"name": str(teacher), "temperature": 4.0, "weight": 0.7}
    assert any(line.endswith(f", taught by {teacher}") for line in notes)
    known = (
        f"teacher {teacher}: is right on 100.0% (51.0% to 100.0%) of 4 validation images, which it is shown at 16x16"
    )
    assert f"{known}; chance is 50.0%" in notes
    assert f"It also learned the answers of `{teacher}`" in (student / "README.md").read_text()
    # It changes what is learned.
    (alone,) = write(exported(store, config, trials=(0,)), tmp_path / "alone")
    assert train(alone, QUICK, silent).section["loss"] != done.section["loss"]
    # Of other classes nothing can be learned.
    for classes, told in (
        (("a", "dark"), "tells other classes apart, bright where the images have a"),
        (("dark", "bright"), "tells other classes apart, bright, dark where the images have dark, bright"),
        (tuple("abcdefg"), "tells 2 classes apart (bright, dark), and the images have 7 (a, b, c, d, e, ...)"),
    ):
        with pytest.raises(UsageError, match=re.escape(f"--teacher {teacher}: {told}")):
            shown_to(str(teacher), classes)
    # A file has the configuration that lies beside it.
    images = torch.rand(2, 3, 16, 16)
    alike = [shown_to(named)(images) for named in (str(teacher), f"convfirst={teacher / 'model.safetensors'}")]
    assert torch.equal(*alike)


def shown_to(named: str, classes: tuple[str, ...] = ("bright", "dark"), note: Any = silent) -> Teacher:
    """A teacher for images of 16 pixels."""
    return teacher_of(named, classes, 16, (0.4,) * 3, (0.2,) * 3, torch.device("cpu"), note)


def timms_checkpoint(place: Path, count: int = 2, data: Path | None = None, **arguments: Any) -> str:
    """A teacher of timm's that always says the same, as a file, with the arguments of its train.py if there are any."""
    weights = timm.create_model("test_resnet", num_classes=count).state_dict()
    weights["fc.weight"].zero_()
    told = dict(img_size=None, input_size=None, mean=None, std=None, gp=None, model_kwargs={}, class_map="",
                dataset="", data=None, data_dir=data and str(data), train_split="train")  # fmt: skip
    extra = {"args": Namespace(**(told | arguments))} if arguments else {}
    torch.save({"state_dict": weights, **extra}, place)
    return f"test_resnet={place}"


def test_a_file_of_timms_is_shown_images_as_it_was_trained(tmp_path: Path, images: Path) -> None:
    notes: list[str] = []
    told = {"img_size": 48, "mean": [0.1, 0.2, 0.3], "std": [0.5]}
    teacher = shown_to(timms_checkpoint(tmp_path / "1.pth", data=images, **told), note=notes.append)
    assert (teacher.resolution, teacher.mean.flatten().tolist()) == (48, pytest.approx([0.1, 0.2, 0.3]))
    assert teacher.std.flatten().tolist() == [0.5] * 3
    assert notes == []
    # What timm's script was not told, it took from the model.
    teacher = shown_to(timms_checkpoint(tmp_path / "2.pth", input_size=[3, 40, 40]), note=notes.append)
    assert (teacher.resolution, teacher.mean.flatten().tolist()) == (40, [0.5] * 3)
    assert len(notes) == 1
    assert notes[0].endswith(
        "it is not known how its 2 classes are named, and they are taken to be the study's in their order"
    )
    # Of bare weights nothing is known.
    named = timms_checkpoint(tmp_path / "3.pth")
    teacher = shown_to(named, note=notes.append)
    assert (teacher.resolution, teacher.mean.flatten().tolist()) == (16, pytest.approx([0.4] * 3))
    assert notes[1].startswith(f"--teacher {named}: it is not known for which images it was trained, and it is shown ")
    assert "at 16x16, normalised as the study's are" in notes[1]


def test_a_teacher_of_other_classes_is_told_by_both(tmp_path: Path, images: Path) -> None:
    with pytest.raises(UsageError, match=r"tells 5 classes apart, and the images have 2 \(bright, dark\)$"):
        shown_to(timms_checkpoint(tmp_path / "five.pth", 5))
    named = timms_checkpoint(tmp_path / "other.pth", data=images, img_size=16)
    with pytest.raises(UsageError, match=r"other classes apart, bright, dark where the images have cat, dog$"):
        shown_to(named, ("cat", "dog"))


class Says(torch.nn.Module):
    """Answers that do not depend on the images."""

    def __init__(self, answers: list[int]) -> None:
        super().__init__()
        self.answers = torch.tensor(answers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(self.answers, 2).float()


@pytest.mark.parametrize(
    ("labels", "answers", "told"),
    [
        (
            [0] * 18 + [1] * 18,
            [0] * 36,
            "is right on 50.0% (34.5% to 65.5%) of 36 validation images, which is no better",
        ),
        ([0] * 18 + [1] * 18, [0] * 10 + [1] * 15 + [0] * 11, "47.2%"),
        # So many of so few are often right by luck.
        ([0] * 18 + [1] * 18, [0] * 12 + [1] * 6 + [0] * 9 + [1] * 9, "no better than chance (50.0%)"),
        # All of one class are right often where that class is frequent.
        ([0] * 30 + [1] * 6, [0] * 36, "no better than chance (83.3%); nothing is to be learned from it"),
    ],
)
def test_a_teacher_that_knows_nothing_is_refused(
    config: SearchConfig, labels: list[int], answers: list[int], told: str
) -> None:
    data, teacher = labelled(config, labels), telling(answers)
    with pytest.raises(UsageError, match=r"^--teacher spoken: ") as refusal:
        require_knowledge("spoken", teacher, data, 0.9, torch.device("cpu"), silent)
    assert told in str(refusal.value)


def test_a_teacher_behind_its_student_is_warned_of(config: SearchConfig) -> None:
    data = labelled(config, [0] * 30 + [1] * 6)
    teacher = telling([0] * 25 + [1] * 11)
    for reached, warned in ((0.9, True), (0.8, False)):
        notes: list[str] = []
        require_knowledge("spoken", teacher, data, reached, torch.device("cpu"), notes.append)
        assert notes[0].startswith("teacher spoken: is right on 86.1% (")
        assert (len(notes) == 2) == warned
        if warned:
            assert notes[1].startswith("warning: --teacher spoken: 86.1% is less than the 90.0% that the student")


def labelled(config: SearchConfig, labels: list[int]) -> image_data.ImageData:
    data = image_data.load(config.data)
    return replace(data, val_images=data.train_images[: len(labels)], val_labels=torch.tensor(labels))


def telling(answers: list[int]) -> Teacher:
    return Teacher(Says(answers), (0.4,) * 3, (0.2,) * 3, 16, (0.4,) * 3, (0.2,) * 3, torch.device("cpu"))


def test_nothing_is_trained_by_a_teacher_that_knows_nothing(folder: Path, tmp_path: Path) -> None:
    named = timms_checkpoint(tmp_path / "untrained.pth")
    with pytest.raises(UsageError, match=rf"^--teacher {re.escape(named)}: is right on .* no better than chance"):
        train(folder, replace(QUICK, teacher=named), silent)
    assert not (folder / "training").exists()


def test_a_teacher_sees_images_as_it_was_trained_on_them() -> None:
    """At its own size, and normalised its own way, whatever the student's are."""
    shown = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []

    class Spy(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return x.mean((2, 3))

    for size in (16, 32):
        teacher = Teacher(Spy(), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), size, (0.4,) * 3, (0.2,) * 3, torch.device("cpu"))
        teacher((shown - 0.4) / 0.2)
        assert seen[-1].shape == (2, 3, size, size)
        back = seen[-1] * torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1) + torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
        assert back.min() >= -1e-6
        assert back.max() <= 1 + 1e-6
        if size == 16:
            torch.testing.assert_close(back, shown)


def test_the_divergence_is_that_of_softened_answers() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.2, 0.1]])
    assert divergence(logits, logits, 4.0).item() == pytest.approx(0, abs=1e-6)
    other = torch.tensor([[0.0, 1.0, 0.0], [3.0, 0.0, 0.0]])
    p, q = (other / 4).softmax(1), (logits / 4).softmax(1)
    expected = 16 * (p * (p.log() - q.log())).sum(1).mean()
    assert divergence(logits, other, 4.0).item() == pytest.approx(expected.item(), rel=1e-5)


# A command that is killed, torchrun, which stands for itself here, and its worker, which tells its number.
WORKER = "import os, time; launch.end_with_launcher(); print(os.getpid(), flush=True); time.sleep(10); print(1)"
TORCHRUN = f"""import subprocess, sys
launch.torchrun = lambda line: subprocess.run(
    [sys.executable, '-c', 'from nas.final_training import launch; {WORKER}'], start_new_session=True)
launch.main(sys.argv[1:])"""
COMMAND = f"""import os, subprocess, sys
code = 'from nas.final_training import launch; ' + {TORCHRUN!r}
subprocess.run([sys.executable, '-c', code, str(os.getpid())])"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a process that its parent has ended")
@pytest.mark.parametrize("killed", ["command", "torchrun"])
def test_nothing_trains_on_when_the_command_is_killed(killed: str) -> None:
    with subprocess.Popen([sys.executable, "-c", COMMAND], stdout=subprocess.PIPE, text=True) as command:
        assert command.stdout is not None
        worker = psutil.Process(int(command.stdout.readline()))
        torchrun = worker.parent()
        assert torchrun is not None
        assert torchrun.ppid() == command.pid
        (command if killed == "command" else torchrun).kill()
        # The pipe ends with the last of them.
        assert command.stdout.read() == ""


@pytest.mark.slow
def test_several_processes_train_together(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torchrun, as several GPUs would, here on the CPU: gradients are averaged, and only one saves and tells."""
    monkeypatch.setattr(training, "every_cuda", lambda device: [device, device])
    monkeypatch.setattr(training, "recipe_for", lambda *rest, **named: replace(recipe_for(*rest, **named), devices=2))
    told: list[int] = []
    done = train(folder, QUICK, silent, lambda epoch, epochs: told.append(epoch.number))
    assert told == [1, 2, 3, 4]
    assert done.section["devices"] == 2
    assert len(list(csv_rows(folder))) == 4
    assert read(folder).weights is not None


def csv_rows(folder: Path) -> Iterator[str]:
    with contextlib.closing((folder / "training" / "log.csv").open()) as file:
        next(file)
        yield from file
