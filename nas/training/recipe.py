"""The recipe of a training to the end: what follows from the network, the images and the device."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from nas.errors import UsageError

# Passes over so many images, and the least and greatest number of passes. Of few images there are more passes, but not
# as many steps.
EPOCHS, OF_IMAGES, MOST_EPOCHS = 100, 20_000, 400
# Steps of an epoch, at least: a larger batch would leave too few of them.
LEAST_STEPS = 50
BATCHES = {"cpu": 64, "cuda": 256}
LEAST_BATCH = 8
# The usual recipe of AdamW for convolutional networks (ConvNeXt, arXiv 2201.03545).
WEIGHT_DECAY, SMOOTHING = 0.05, 0.1
# Share of the steps in which the rate rises, and over which the weights are averaged.
WARMUP, AVERAGED = 0.05, 0.05
# Of few images for each parameter, regularisation is that of a larger network.
FEW_IMAGES, AS_MANY_PARAMS = 5_000, 10
# Seconds of validation and of saving, as a share of those of training, which --hours leaves room for.
SPARE = 0.1
# Number of validations of a training.
VALIDATIONS = 40


class Start(StrEnum):
    """The weights that a training begins with."""

    FRESH = "fresh"
    KEPT = "kept"


@dataclass(frozen=True)
class Recipe:
    """A training to the end.

    Args:
        batch_size: images of a step, of each device.
        learning_rate: peak rate of a step of `batch_size` images on each of `devices`.
        amp: whether matrices are multiplied in bfloat16.
        devices: number of devices that train side by side.
        workers: number of processes that prepare images, of each device.
        threads: threads of the computation on a CPU.
        augmentation: see `regularisation`.
        checkpoint_steps: steps after which there is a checkpoint within an epoch; 0 stands for its end alone.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    seed: int
    start: Start
    kind: str
    amp: bool
    devices: int
    workers: int
    threads: int
    hflip: float
    augmentation: dict[str, Any]
    checkpoint_steps: int = 0

    @property
    def images_a_step(self) -> int:
        return self.batch_size * self.devices

    def ema_decay(self, steps: int) -> float:
        """The decay of the averaged weights, by which they are those of the last steps.

        Args:
            steps: number of steps of an epoch.
        """
        return 1 - 1 / max(10.0, AVERAGED * self.epochs * steps)

    def validated_after(self, epoch: int) -> bool:
        """Whether the network is validated after an epoch, counted from 0."""
        every = max(1, self.epochs // VALIDATIONS)
        return (epoch + 1) % every == 0 or epoch + 1 == self.epochs

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        fields = json.loads(text)
        return cls(**{**fields, "start": Start(fields["start"])})

    def words(self, images: int) -> str:
        """The recipe in a line.

        Args:
            images: number of training images.
        """
        mixed = ", in bfloat16" if self.amp else ""
        where = f"{self.devices} GPUs" if self.devices > 1 else {"cpu": "the CPU", "cuda": "the GPU"}[self.kind]
        return (
            f"{self.epochs} passes over {images:,} images in steps of {self.images_a_step} on {where}{mixed}, AdamW at "
            f"a rate of up to {self.learning_rate:g}, {self.start} weights, {self.augmentation['aa']}"
        )


def recipe_for(
    params: int, resolution: int, images: int, kind: str, *, devices: int, cores: int, mirror: bool, base_rate: float,
    base_batch: int, epochs: int | None = None, batch_size: int | None = None, learning_rate: float | None = None,
    seed: int = 0, start: Start = Start.FRESH, workers: int | None = None,
) -> Recipe:  # fmt: skip
    """The recipe by the rules, but for what is given.

    Args:
        params: number of the network's parameters.
        resolution: width of its images, in pixels.
        images: number of training images.
        kind: kind of the devices that train, `cpu` or `cuda`.
        devices: number of these.
        cores: number of cores of this process.
        mirror: whether images are mirrored at random.
        base_rate, base_batch: rate and batch of the search's trainings.
    """
    usual = BATCHES[kind]
    while usual > LEAST_BATCH and images / (usual * devices) < LEAST_STEPS:
        usual //= 2
    batch = min(batch_size or usual, max(2, images // devices))
    passes = EPOCHS * math.sqrt(OF_IMAGES / max(1, images))
    # The usual scaling of AdamW's rate.
    rate = learning_rate or base_rate * math.sqrt(batch * devices / base_batch)
    return Recipe(
        epochs=epochs or round(min(MOST_EPOCHS, max(EPOCHS, passes))), batch_size=batch, learning_rate=rate,
        seed=seed, start=start, kind=kind, amp=False, devices=devices,
        workers=max(1, cores // devices // 2) if workers is None else workers,
        threads=cores if kind == "cpu" else 1, hflip=0.5 if mirror else 0.0,
        augmentation=regularisation(AS_MANY_PARAMS * params if images < FEW_IMAGES else params, resolution),
    )  # fmt: skip


def regularisation(params: int, resolution: int) -> dict[str, Any]:
    """Augmentation and regularisation, which are stronger for larger networks, by the names of timm's options.

    Small networks underfit: strong augmentation costs them accuracy (Steiner et al., arXiv 2106.10270; Tan and Le,
    arXiv 2104.00298, table 6). The strongest recipe is that of ConvNeXt (arXiv 2201.03545), and so is the schedule.
    """
    # Upper bound in millions of parameters; RandAugment's magnitude, mixup, cutmix, random erasing, stochastic depth.
    steps = (
        (3, 5, 0.0, 0.0, 0.0, 0.0), (12, 7, 0.2, 0.2, 0.1, 0.05), (30, 9, 0.8, 1.0, 0.25, 0.1),
        (math.inf, 9, 0.8, 1.0, 0.25, 0.2),
    )  # fmt: skip
    _, magnitude, mixup, cutmix, reprob, drop_path = next(step for step in steps if params < 1e6 * step[0])
    return {
        "aa": f"rand-m{magnitude}-mstd0.5-inc1", "mixup": mixup, "cutmix": cutmix, "reprob": reprob,
        "drop_path": drop_path,
        "scale": [least_area(resolution), 1.0],
    }  # fmt: skip


def least_area(resolution: int) -> float:
    """The smallest area of a random crop, as a share of the image's: a small part of a small image shows nothing."""
    return 0.35 if resolution < 128 else 0.08


def fitted(recipe: Recipe, hours: float, spent: float, epoch_seconds: float) -> Recipe:
    """A recipe with as many epochs as fit into a time.

    Args:
        hours: the whole time, in hours.
        spent: hours of it that are gone.

    Raises:
        UsageError: not even one does.
    """
    epochs = int(3600 * (hours - spent) * (1 - SPARE) / epoch_seconds)
    if epochs < 1:
        least = spent + epoch_seconds / (1 - SPARE) / 3600
        raise UsageError(f"--hours {hours:g}: one pass over the training images takes {least:.2g} hours, all included")
    return replace(recipe, epochs=epochs)
