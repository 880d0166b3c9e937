"""The recipe of a training to the end: what follows from the network, the images and the device."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from nas.errors import UsageError
from nas.export.directories import recipe as regularisation
from nas.final_training.config import FinalConfig, Start

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
        augmentation: what `nas.export.directories.recipe` gives: names are those of timm's options.
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
    config: FinalConfig, params: int, resolution: int, images: int, kind: str, devices: int, cores: int, mirror: bool,
    amp: bool, base_rate: float, base_batch: int,
) -> Recipe:  # fmt: skip
    """The recipe by the rules, with what the user says.

    Args:
        params: number of the network's parameters.
        resolution: width of its images, in pixels.
        images: number of training images.
        kind: kind of the devices that train, `cpu` or `cuda`.
        cores: number of cores of this process.
        base_rate, base_batch: rate and batch of the search's trainings.
    """
    usual = BATCHES[kind]
    while usual > LEAST_BATCH and images / (usual * devices) < LEAST_STEPS:
        usual //= 2
    batch = min(config.batch_size or usual, max(2, images // devices))
    passes = EPOCHS * math.sqrt(OF_IMAGES / max(1, images))
    as_if = AS_MANY_PARAMS * params if images < FEW_IMAGES else params
    # The usual scaling of AdamW's rate.
    rate = config.learning_rate or base_rate * math.sqrt(batch * devices / base_batch)
    return Recipe(
        epochs=config.epochs or round(min(MOST_EPOCHS, max(EPOCHS, passes))), batch_size=batch, learning_rate=rate,
        seed=config.seed, start=config.start, kind=kind, amp=amp, devices=devices,
        workers=max(1, cores // devices // 2) if config.workers is None else config.workers,
        threads=cores if kind == "cpu" else 1, hflip=0.5 if mirror else 0.0,
        augmentation=regularisation(as_if, resolution),
    )  # fmt: skip


def fitted(recipe: Recipe, hours: float, epoch_seconds: float) -> Recipe:
    """A recipe with as many epochs as fit into a time.

    Raises:
        UsageError: not even one does.
    """
    epochs = int(3600 * hours * (1 - SPARE) / epoch_seconds)
    if epochs < 1:
        least = epoch_seconds / (1 - SPARE) / 3600
        raise UsageError(f"--hours {hours:g}: one pass over the training images takes {least:.2g} hours")
    return replace(recipe, epochs=epochs)
