"""Short trainings before a long one: which rate learns best, whether bfloat16 is faster, and how long a step takes."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

from kernels.device_info import DeviceInfo
from nas.errors import CandidateFailed
from nas.files import save_tensors, whole
from nas.final_training.fit import Job, Learner, batches_of, copies_of
from nas.final_training.pictures import Pictures, loader
from nas.training.data import ImageData
from nas.training.proxy import Batches, validate
from nas.training.recipe import Recipe

# Rates that are tried, in units of the one that is expected.
FACTORS = (0.5, 1.0, 2.0)
# Length of each such training, as a share of the steps of the long one, and at least and at most.
SHARE, LEAST_STEPS, MOST_STEPS = 1 / 60, 30, 400
WARMUP = 0.2
# Steps by which two precisions are compared, and by how much bfloat16 has to be faster.
TIMED_STEPS, WORTH = 6, 1.15
# The steps of a loader that show how long its start takes.
STARTING = 2
# Seconds between two checkpoints within an epoch that takes at least twice as long.
CHECKPOINT_SECONDS = 600.0
# File in which they are kept within the folder of a training, and by how many times their length may be another one.
MEASURED, LIKE = "measured.json", 2.0


@dataclass(frozen=True)
class Tried:
    """A short training.

    Args:
        loss: loss on the validation images at its end; infinite where it diverged.
        step_seconds: seconds of a step, with the preparation of its images.
        validation_seconds: seconds of the validation.
        fixed_seconds: seconds of what an epoch takes beside its steps: the start and end of its loader, a checkpoint.
    """

    rate: float
    loss: float
    step_seconds: float
    validation_seconds: float
    fixed_seconds: float = 0.0


@dataclass(frozen=True)
class Measured:
    """What short trainings showed.

    Args:
        inputs: what it depends on, but for their length; see `Trials.inputs`.
        amp: whether they were in bfloat16.
        steps: the length of each.
    """

    inputs: dict[str, Any]
    amp: bool
    steps: int
    tried: tuple[Tried, ...]

    @classmethod
    def read(cls, path: Path, inputs: dict[str, Any]) -> Measured | None:
        """What `write` wrote; None where it wrote nothing, or of other inputs."""
        try:
            fields = json.loads(path.read_text())
            found = cls(**{**fields, "tried": tuple(Tried(**each) for each in fields["tried"])})
        except (OSError, ValueError, KeyError, TypeError):
            # Another version may have written it.
            return None
        return found if found.inputs == inputs else None

    def write(self, path: Path) -> None:
        with whole(path) as part:
            part.write_text(json.dumps(asdict(self), indent=2) + "\n")


class Trials:
    """Short trainings of one network.

    Args:
        job: the network and its images.
        data: the images.
        device: the device that trains.
        folder: folder of the long training, to which a checkpoint is written to see how long that takes.
    """

    def __init__(self, job: Job, data: ImageData, device: torch.device, folder: Path) -> None:
        self.job, self.data, self.device, self.folder = job, data, device, folder
        self.copies = copies_of(folder, job)
        # Precision and batch of the steps that were made before.
        self.warm: set[tuple[bool, int]] = set()
        self.batches = Batches(data, device)
        self.files = job.files()
        self.mean, self.std = (tuple(map(float, each)) for each in data.mean_std)

    def steps_an_epoch(self, recipe: Recipe) -> int:
        """The number of steps of an epoch."""
        images = len(self.files) if self.files is not None else len(self.data.train_labels)
        return max(1, images // recipe.images_a_step)

    def inputs(self, recipe: Recipe, factors: Sequence[float]) -> dict[str, Any]:
        """What short trainings at these factors of a recipe's rate depend on, but for their length, as JSON has it."""
        job, own = asdict(self.job), asdict(recipe)
        for name in ("asked_batch", "asked_hours"):
            del job[name]
        for name in ("epochs", "amp"):
            del own[name]
        device = asdict(DeviceInfo.of(self.device))
        told = {"job": job, "recipe": own, "factors": factors, "device": device, "images": self.data.fingerprint}
        found: dict[str, Any] = json.loads(json.dumps(told))
        return found

    def length(self, recipe: Recipe) -> int:
        """The number of steps of each short training for a recipe's rate."""
        return round(min(MOST_STEPS, max(LEAST_STEPS, SHARE * recipe.epochs * self.steps_an_epoch(recipe))))

    def tried(self, recipe: Recipe, factors: Sequence[float], steps: int) -> list[Tried]:
        """Short trainings at several rates, in units of the recipe's."""
        # Here one device trains, with a part of the images of a step, to which a lower rate belongs.
        alone = recipe.learning_rate / math.sqrt(recipe.devices)
        return [self.run(replace(recipe, learning_rate=alone * each), steps) for each in factors]

    def with_best_rate(self, recipe: Recipe, factors: Sequence[float], tried: Sequence[Tried]) -> Recipe:
        """A recipe with the rate that learned best in a short time.

        Raises:
            CandidateFailed: all of them diverge.
        """
        best, factor = min(zip(tried, factors, strict=True), key=lambda each: each[0].loss)
        if not math.isfinite(best.loss):
            raise CandidateFailed("its loss diverges at every rate")
        # Not the one that was tried times the root of the number of devices, which may differ by a rounding.
        return replace(recipe, learning_rate=recipe.learning_rate * factor)

    def is_faster_in_16_bits(self, recipe: Recipe) -> bool:
        """Whether steps are faster in bfloat16 by so much that it pays."""
        if self.device.type == "cuda":
            return has_bfloat16()
        seconds = [
            min(self.run(replace(recipe, amp=amp), TIMED_STEPS, validated=False).step_seconds for _ in range(2))
            for amp in (False, True)
        ]
        return seconds[0] >= WORTH * seconds[1]

    def run(self, recipe: Recipe, steps: int, validated: bool = True) -> Tried:
        """Train for so many steps, with a warm-up and a cosine of their own."""
        if self.device.type == "cpu":
            torch.set_num_threads(recipe.threads)
        alone = replace(recipe, devices=1)
        pictures = Pictures(self.job.data_config, self.data, self.files, self.copies)
        resolution = self.job.data_config.resolution
        made = loader(pictures, alone, resolution, self.mean, self.std, self.device)
        learner = Learner(self.job, recipe, self.device, self.mean, self.std)
        learner.model.train()
        schedule = learner.schedule(recipe, 1, WARMUP, steps)
        passes: list[Pass] = []
        done = 0
        while done < steps:
            # The first steps of all take longer, which is not what each epoch takes.
            cold = (recipe.amp, recipe.batch_size) not in self.warm
            size = min(len(made), steps - done, STARTING if cold else steps)
            batches = batches_of(made)
            moments = [time.perf_counter()]
            for number, (images, labels) in enumerate(itertools.islice(batches, size), start=1):
                learner.step(images, labels)
                schedule.step_update(done + number)
                if number in (STARTING, size):
                    _finish(self.device)
                    moments.append(time.perf_counter())
            # Its processes end.
            batches.close()
            done += size
            if cold:
                self.warm.add((recipe.amp, recipe.batch_size))
            if not cold or done == steps:
                passes.append(Pass(size, moments[0], moments[1], moments[-1], time.perf_counter()))
        step_seconds, fixed_seconds = times(passes)
        if not validated:
            return Tried(recipe.learning_rate, math.inf, step_seconds, 0.0, fixed_seconds)
        begin = time.perf_counter()
        try:
            _, loss = validate(learner.model, self.batches)
        except CandidateFailed:
            loss = math.inf
        validation_seconds = time.perf_counter() - begin
        fixed_seconds += self.saving_seconds(learner)
        return Tried(recipe.learning_rate, loss, step_seconds, validation_seconds, fixed_seconds)

    def saving_seconds(self, learner: Learner) -> float:
        """The time of a checkpoint, which holds the averaged weights, too."""
        begin = time.perf_counter()
        weights = learner.model.state_dict()
        path = self.folder / "measured.pth.tar"
        try:
            save_tensors({"weights": weights, "optimizer": learner.optimizer.state_dict()}, path)
            save_tensors({"averaged": weights}, path)
        finally:
            path.unlink(missing_ok=True)
        return time.perf_counter() - begin


class Pass(NamedTuple):
    """A loader from its start to its end.

    Args:
        steps: number of steps that were made.
        begin, started, stepped, end: the times of its begin, of the end of the first steps (`STARTING`), of the last
            step, and of its end.
    """

    steps: int
    begin: float
    started: float
    stepped: float
    end: float


def times(passes: Sequence[Pass]) -> tuple[float, float]:
    """Seconds of a step, and what a pass takes beside its steps."""
    steady = [each for each in passes if each.steps > STARTING]
    whole = sum(each.end - each.begin for each in passes)
    if not steady:
        return whole / sum(each.steps for each in passes), 0.0
    step_seconds = sum(each.stepped - each.started for each in steady) / sum(each.steps - STARTING for each in steady)
    beside = fmean(each.end - each.begin - each.steps * step_seconds for each in passes)
    return step_seconds, max(0.0, beside)


def has_bfloat16() -> bool:
    """Whether the GPUs multiply in bfloat16, and do not only emulate it."""
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def checkpoint_steps(tried: Sequence[Tried], steps: int) -> int:
    """The steps between two checkpoints within an epoch; 0 where one at its end is enough.

    Args:
        steps: number of steps of an epoch.
    """
    between = max(1, int(CHECKPOINT_SECONDS / fmean(each.step_seconds for each in tried)))
    return between if steps >= 2 * between else 0


def epoch_seconds(recipe: Recipe, tried: Sequence[Tried], steps: int) -> float:
    """Seconds of an epoch, with its share of the validations, the start of its loader and its checkpoint.

    Args:
        steps: number of steps of an epoch.
    """
    validations = sum(map(recipe.validated_after, range(recipe.epochs))) / recipe.epochs
    usual = fmean(each.step_seconds for each in tried)
    fixed = fmean(each.fixed_seconds for each in tried)
    return usual * steps + fixed + validations * fmean(each.validation_seconds for each in tried)
