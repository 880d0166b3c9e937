"""The training loop: timm's optimizer, schedule, loader, loss, averaged weights and checkpoints, epoch by epoch.

A training is a folder: `job.json` says what is trained on what, `recipe.json` how, `last.pth.tar` is timm's checkpoint
of the last epoch or of a part of a long one, `log.csv` has a line for each epoch, and `copies` holds large photos at a
smaller size until it ends. It goes on from there, and comes to what it would have come to, on a CPU exactly: all random
numbers follow from the seed, the epoch and the part.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import random
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import Tensor, nn

from nas.config import DataConfig
from nas.errors import CandidateFailed, OutOfMemory, memory_may_run_out
from nas.files import save_tensors, whole
from nas.final_training.copies import Copies
from nas.final_training.pictures import Epochs, Pictures, loader, loaders_may_die, loss_of, mixing
from nas.final_training.teacher import TEMPERATURE, WEIGHT, Teacher, divergence, teacher_of
from nas.reporting import Note
from nas.training.data import ImageData, load, split_files
from nas.training.images import ImageReader
from nas.training.proxy import Batches, score, validate
from nas.training.recipe import WARMUP, WEIGHT_DECAY, Recipe, least_area
from search_spaces import ArchSpec
from search_spaces.timm_config import model_args
from search_spaces.timm_models import network

# A warm-up has so many steps at least.
WARMUP_STEPS = 20
# Seconds between two lines on the course of an epoch.
SHOWN_SECONDS = 10.0
JOB, RECIPE, LAST, LOG = "job.json", "recipe.json", "last.pth.tar", "log.csv"
# The folder of smaller copies of large photos, until the training ends.
COPIES = "copies"
# What to do where memory is short.
FREE_MEMORY = "end what else uses the device"


@dataclass(frozen=True)
class Job:
    """What is trained, and on what.

    Args:
        arch: the architecture, as JSON.
        classes: names of the classes.
        data: the source of the images, at the network's resolution.
        largest: see `nas.training.data.load`.
        start: safetensors file of the weights to begin with; empty for fresh ones.
        teacher: the teacher, as `nas.final_training.teacher.resolved` names it; empty for none.
        asked_batch: the batch that the user asked for, which few images may not allow; None for none.
        left_out: training images that cannot be read, as paths within the source.
        asked_hours: the hours that the user asked for; 0 for none, None where an older version did not write it.
    """

    arch: str
    classes: tuple[str, ...]
    data: dict[str, Any]
    largest: int
    start: str
    teacher: str = ""
    asked_batch: int | None = None
    left_out: tuple[str, ...] = ()
    asked_hours: float | None = None

    @property
    def data_config(self) -> DataConfig:
        return DataConfig(**self.data)

    def files(self) -> list[tuple[Path, int]] | None:
        """The training images with their labels, without those that are left out; None for a source that is no folder.

        Raises:
            UsageError: see `nas.training.data.load`.
        """
        found = split_files(self.data_config)
        if found is None:
            return None
        root = Path(self.data_config.source).expanduser()
        without = {root / name for name in self.left_out}
        return [each for each in found.train if each[0] not in without]

    def build(self, drop_path: float) -> nn.Module:
        """The network with its first weights."""
        arch = ArchSpec.from_json(self.arch)
        made = network(num_classes=len(self.classes), drop_path_rate=drop_path, **model_args(arch))
        if self.start:
            from safetensors.torch import load_file

            made.load_state_dict(load_file(self.start))
        return made


@dataclass(frozen=True)
class Epoch:
    """An epoch of a training.

    Args:
        number: its number, counted from 1.
        learning_rate: rate at its end.
        train_loss: mean loss over its steps.
        accuracy, loss: those of the averaged weights on the validation images; None where they were not looked at.
        seconds: seconds of the training so far, those before an interruption included.
    """

    number: int
    learning_rate: float
    train_loss: float
    accuracy: float | None
    loss: float | None
    seconds: float


@dataclass(frozen=True)
class Within:
    """A moment within an epoch.

    Args:
        number: the epoch's number, counted from 1.
        step, steps: steps that it has made, and those of all of it.
        learning_rate: the rate at this moment.
        train_loss: mean loss over the steps that it has made.
        seconds: seconds of the training so far, those before an interruption included.
    """

    number: int
    step: int
    steps: int
    learning_rate: float
    train_loss: float
    seconds: float


@dataclass(frozen=True, eq=False)
class Fitted:
    """The result of a training.

    Args:
        weights: the averaged weights at its end.
        accuracy, loss: those on the validation images.
        test_accuracy: accuracy on the test images; None where there are none.
    """

    weights: dict[str, Tensor]
    accuracy: float
    loss: float
    test_accuracy: float | None
    epochs: tuple[Epoch, ...]


class Learner:
    """A network that learns from batches of images.

    Args:
        mean, std: those by which the images are normalised.

    Attributes:
        model: the network.
        wrapped: what is called in its place, which may average gradients over several devices.
    """

    def __init__(
        self, job: Job, recipe: Recipe, device: torch.device, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.job, self.recipe, self.device = job, recipe, device
        seeded(recipe.seed, 0)
        model: Any = job.build(recipe.augmentation["drop_path"])
        self.model: nn.Module = model.to(device, memory_format=torch.channels_last)
        self.wrapped: Any = self.model
        self.optimizer = create_optimizer_v2(self.model, "adamw", lr=recipe.learning_rate, weight_decay=WEIGHT_DECAY)
        self.mixed, self.loss = mixing(recipe, len(job.classes)), loss_of(recipe)
        self.teacher = teacher_of_job(job, mean, std, device) if job.teacher else None
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=recipe.amp)

    def schedule(self, recipe: Recipe, epochs: float, warmup: float, steps: int) -> Any:
        """timm's cosine to zero with a linear warm-up, both in epochs of so many steps."""
        made, _ = create_scheduler_v2(
            self.optimizer, "cosine", num_epochs=epochs, warmup_epochs=warmup,  # type: ignore[arg-type]
            warmup_lr=recipe.learning_rate / 100, step_on_epochs=False, updates_per_epoch=steps,
        )  # fmt: skip
        return made

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Learn from images (N, 3, H, W) with their labels (N,); returns the loss."""
        images = images.to(self.device, memory_format=torch.channels_last)
        labels = labels.to(self.device)
        if self.mixed is not None:
            # It mixes pairs.
            even = len(images) - len(images) % 2
            images, labels = self.mixed(images[:even], labels[:even])
        with self.autocast:
            logits = self.wrapped(images).float()
            loss: Tensor = self.loss(logits, labels)
            if self.teacher is not None:
                taught = divergence(logits, self.teacher(images), TEMPERATURE)
                loss = (1 - WEIGHT) * loss + WEIGHT * taught
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def teacher_of_job(
    job: Job, mean: Sequence[float], std: Sequence[float], device: torch.device, note: Note = lambda line: None
) -> Teacher:
    """The teacher of a training, see `nas.final_training.teacher.teacher_of`."""
    return teacher_of(job.teacher, job.classes, job.data_config.resolution, mean, std, device, note)


class Saver(CheckpointSaver):
    """timm's saver, which writes whole files only, and survives a full disk.

    Args:
        extra: what else each checkpoint holds.
    """

    def __init__(self, *args: Any, extra: Callable[[], dict[str, Any]], **options: Any) -> None:
        super().__init__(*args, **options)  # type: ignore[no-untyped-call]
        self.extra = extra

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
        content = {
            "epoch": epoch, "arch": "convfirst", "version": 2, "optimizer": self.optimizer.state_dict(),
            "state_dict": self.unwrap_fn(self.model).state_dict(), "state_dict_ema": self.model_ema.module.state_dict(),
            "saver": self.state_dict(epoch, metric),  # type: ignore[no-untyped-call]
            **self.extra(),
        }  # fmt: skip
        if metric is not None:
            content["metric"] = metric
        save_tensors(content, Path(save_path))

    def save_part(self, epoch: int) -> None:
        """Save the state within an epoch, counted from 0, as the last checkpoint."""
        self._save(str(Path(self.checkpoint_dir) / LAST), epoch - 1)


def fit(
    folder: Path, recipe: Recipe, job: Job, device: torch.device, *, data: ImageData | None = None,
    told: Callable[[Epoch, int], None] = lambda epoch, epochs: None,
    told_within: Callable[[Within, int], None] = lambda within, epochs: None,
    turn: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Fitted:  # fmt: skip
    """Train a network to the end, going on where an earlier call stopped.

    With several devices, this is one of as many processes that torchrun started.

    Args:
        folder: folder of the training.
        data: the images, if they are loaded already.
        told: function that is called after each epoch, with the number of all.
        told_within: function that is called every ten seconds within an epoch, with the number of all.
        turn: function that makes the context in which an epoch, or a part of a long one, trains.

    Raises:
        CandidateFailed: the loss is no longer finite, or a process that prepares images died.
        OutOfMemory: memory ran out; the last checkpoint stays.
        OSError: there is no room for a checkpoint; the one before it stays.
    """
    try:
        with memory_may_run_out(), loaders_may_die():
            return _fit(folder, recipe, job, device, data, told, told_within, turn)
    except OutOfMemory as error:
        raise OutOfMemory(
            f"memory ran out in a step of {recipe.batch_size} images: {FREE_MEMORY} and repeat the command, which goes "
            f"on; or move {folder} away and begin anew with a smaller --batch"
        ) from error


def _fit(
    folder: Path, recipe: Recipe, job: Job, device: torch.device, data: ImageData | None,
    told: Callable[[Epoch, int], None], told_within: Callable[[Within, int], None],
    turn: Callable[[], AbstractContextManager[None]],
) -> Fitted:  # fmt: skip
    first = rank() == 0
    if device.type == "cpu":
        torch.set_num_threads(recipe.threads)
    data = data or load(job.data_config, largest=job.largest)
    batches = Batches(data, device)
    mean, std = (tuple(map(float, each)) for each in data.mean_std)
    pictures = Pictures(job.data_config, data, job.files(), copies_of(folder, job))
    epochs = Epochs(
        pictures, recipe, lambda part: loader(part, recipe, job.data_config.resolution, mean, std, device)
    )  # fmt: skip
    steps = epochs.steps
    learner = Learner(job, recipe, device, mean, std)
    model, optimizer = learner.model, learner.optimizer
    ema = ModelEmaV3(model, decay=recipe.ema_decay(steps), use_warmup=True)
    # Also a training of one epoch has a warm-up, and ends with a low rate.
    warmup = min(max(WARMUP * recipe.epochs, WARMUP_STEPS / steps), recipe.epochs / 2)
    schedule = learner.schedule(recipe, recipe.epochs, warmup, steps)
    log = Log(folder / LOG)
    elapsed = 0.0
    # Of the epoch that is being trained: the parts and steps that it has made, and the sum of their losses.
    parts, count, total = 0, 0, torch.zeros((), device=device)
    saver = Saver(
        model, optimizer, model_ema=ema, checkpoint_dir=str(folder), recovery_dir=str(folder), max_history=1,
        extra=lambda: {"seconds": elapsed, "parts": parts, "step": count, "steps": steps, "loss": float(total)},
    )  # fmt: skip
    begin_at = 0
    if (folder / LAST).exists():
        # The file is this project's own.
        stored = torch.load(folder / LAST, map_location="cpu", weights_only=True)
        model.load_state_dict(stored["state_dict"])
        ema.module.load_state_dict(stored["state_dict_ema"])
        optimizer.load_state_dict(stored["optimizer"])
        begin_at, elapsed = stored["epoch"] + 1, float(stored["seconds"])
        saver.load_state_dict(stored["saver"])  # type: ignore[no-untyped-call]
        # An older version made checkpoints of whole epochs only.
        parts, count = stored.get("parts", 0), stored.get("step", 0)
        total += stored.get("loss", 0.0)
    log.keep(begin_at)
    if recipe.devices > 1:
        ids = [device] if device.type == "cuda" else None
        learner.wrapped = nn.parallel.DistributedDataParallel(model, device_ids=ids)
    held_out: tuple[float | None, float | None] = (None, None)
    shown = time.perf_counter()
    for epoch in range(begin_at, recipe.epochs):
        while parts < epochs.parts:
            with turn():
                begin = time.perf_counter()
                seeded(recipe.seed, epoch + 1, parts)
                learner.wrapped.train()
                for images, labels in batches_of(epochs.loader(epoch, parts)):
                    total += learner.step(images, labels)
                    count += 1
                    ema.update(model, step=epoch * steps + count)
                    schedule.step_update(epoch * steps + count)
                    if first and (now := time.perf_counter()) >= shown + SHOWN_SECONDS:
                        shown, rate = now, optimizer.param_groups[0]["lr"]
                        at = Within(epoch + 1, count, steps, rate, float(total) / count, elapsed + now - begin)
                        told_within(at, recipe.epochs)
                parts += 1
                train_loss = float(total) / max(1, count)
                if not math.isfinite(train_loss):
                    raise CandidateFailed(f"the loss diverged in epoch {epoch + 1} of {recipe.epochs}")
                held_out = (None, None)
                if parts == epochs.parts and recipe.validated_after(epoch):
                    held_out = validate(ema.module, batches)
                elapsed += time.perf_counter() - begin
            if first and parts < epochs.parts:
                begin = time.perf_counter()
                saver.save_part(epoch)
                elapsed += time.perf_counter() - begin
        parts, count, total = 0, 0, torch.zeros((), device=device)
        if first:
            begin = time.perf_counter()
            done = Epoch(epoch + 1, optimizer.param_groups[0]["lr"], train_loss, held_out[0], held_out[1], elapsed)
            log.add(done)
            saver.save_checkpoint(epoch)  # type: ignore[no-untyped-call]
            elapsed += time.perf_counter() - begin
            told(done, recipe.epochs)
            shown = time.perf_counter()
    with turn():
        # The last epoch ends with it, unless it was one of an earlier call.
        accuracy, loss_value = held_out if begin_at < recipe.epochs else validate(ema.module, batches)
        assert accuracy is not None
        assert loss_value is not None
        tested = score(ema.module, batches.test(), device)[0] if batches.test_images is not None else None
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in ema.module.state_dict().items()}
    return Fitted(weights, accuracy, loss_value, tested, tuple(log.epochs))


def copies_of(folder: Path, job: Job) -> Copies:
    """The smaller copies of a training's large photos."""
    resolution = job.data_config.resolution
    return Copies(ImageReader(job.data_config), resolution, least_area(resolution), folder / COPIES)


def batches_of(made: Iterable[tuple[Tensor, Tensor]]) -> Generator[tuple[Tensor, Tensor]]:
    """The batches of a loader.

    Raises:
        CandidateFailed: an image cannot be read; the message says which one.
    """
    try:
        yield from made
    except CandidateFailed as error:
        # Of an error in a process that loads, torch makes one whose text is the whole course of it.
        last = str(error).strip().splitlines()[-1]
        raise CandidateFailed(last.removeprefix("nas.errors.CandidateFailed: ")) from None


def seeded(seed: int, epoch: int, part: int = 0) -> None:
    """Set all random numbers of a part of an epoch, which then do not depend on those before."""
    own = int(np.random.SeedSequence([seed, epoch, rank(), *([part] if part else [])]).generate_state(1)[0])
    random.seed(own)
    np.random.seed(own)  # noqa: NPY002 (timm's Mixup draws from it)
    torch.manual_seed(own)


def rank() -> int:
    """The number of this process among those that torchrun started; 0 for one alone."""
    return int(os.environ.get("RANK", "0"))


class Log:
    """The epochs of a training, as lines of a CSV file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.epochs: list[Epoch] = []
        if path.exists():
            with path.open(newline="") as file:
                self.epochs = list(_epochs(csv.DictReader(file)))

    def keep(self, count: int) -> None:
        """Forget what comes after so many epochs: it was interrupted before its checkpoint."""
        self.epochs = self.epochs[:count]

    def add(self, epoch: Epoch) -> None:
        self.epochs.append(epoch)
        with whole(self.path) as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Epoch)])
            writer.writeheader()
            writer.writerows(asdict(each) for each in self.epochs)


def _epochs(rows: Sequence[dict[str, str]] | csv.DictReader[str]) -> Iterator[Epoch]:
    for row in rows:
        values = {name: float(text) if text else None for name, text in row.items()}
        number = int(values.pop("number") or 0)
        yield Epoch(number, **values)  # type: ignore[arg-type]


def done_so_far(folder: Path) -> tuple[float, float]:
    """The epochs and parts of one that the checkpoint of a training has made, and the seconds that they took."""
    # Its tensors stay on the disk.
    stored = torch.load(folder / LAST, map_location="cpu", weights_only=True, mmap=True)
    return stored["epoch"] + 1 + stored.get("step", 0) / stored.get("steps", 1), float(stored["seconds"])


def write_job(folder: Path, job: Job, recipe: Recipe) -> None:
    """Write what a training is, so that another process makes it."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = asdict(job)
    # The directory may be moved, alone or with that of its teacher.
    if job.start:
        fields["start"] = os.path.relpath(job.start, folder)
    if os.path.isabs(job.teacher):
        fields["teacher"] = os.path.relpath(job.teacher, folder)
    for name, text in ((JOB, json.dumps(fields, indent=2) + "\n"), (RECIPE, recipe.to_json())):
        with whole(folder / name) as part:
            part.write_text(text)


def read_job(folder: Path) -> tuple[Job, Recipe]:
    """What `write_job` wrote."""
    fields, place = json.loads((folder / JOB).read_text()), folder.absolute()
    # These weights are those of the directory; an older version wrote where it was then.
    fields["start"] = str(place.parent / Path(fields["start"]).name) if fields["start"] else ""
    teacher = fields.get("teacher", "")
    if teacher.startswith(os.pardir + os.sep):
        fields["teacher"] = os.path.normpath(place / teacher)
    # Lists of names are tuples; those that an older version wrote lack the last.
    names = {key: tuple(fields.get(key, ())) for key in ("classes", "left_out")}
    return Job(**{**fields, **names}), Recipe.from_json((folder / RECIPE).read_text())
