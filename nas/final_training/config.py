"""What a user may say of the training of a network to the end."""

from __future__ import annotations

from dataclasses import dataclass

from nas.config import AUTO, DataConfig
from nas.options import FINITE, Bounds, Checked, at_least, one_of, option, same_as
from nas.training.recipe import Start

TRAINING = "Training"
# A seed of torch's and of numpy's.
SEED = Bounds(lambda value: 0 <= value < 2**32, "between 0 and 4294967295")


@dataclass(frozen=True)
class FinalConfig(Checked):
    """The training of a network to the end.

    What is None was not said: it is chosen by network, images and device, or is what a begun training has.

    Args:
        hours: time that the training may take.
        epochs: passes over the training images.
        learning_rate: peak learning rate; None lets a few short trainings choose it.
        start: the weights to begin with.
        device: device that trains, `cuda` for all GPUs.
        workers: processes that prepare images.

    Raises:
        FieldError: a field has a value that it cannot have.
    """

    hours: float | None = option(
        None, "--hours", "Hours that the training may take; the schedule is fitted to them",
        default="as many as it takes", panel=TRAINING, bounds=FINITE,
    )  # fmt: skip
    epochs: int | None = option(
        None, "--epochs", "Passes over the training images", default="by their number, or what --hours allows",
        panel=TRAINING, bounds=at_least(1),
    )  # fmt: skip
    batch_size: int | None = option(
        None, "--batch", "Images per training step, on each GPU", default="by the number of images and the device",
        panel=TRAINING, bounds=at_least(2),
    )  # fmt: skip
    learning_rate: float | None = option(
        None, "--lr", "Peak learning rate", default="the best of three short trainings", panel=TRAINING, bounds=FINITE
    )
    seed: int | None = option(
        None, "--seed", "Seed of weights, order and augmentation", default="0", panel=TRAINING, bounds=SEED
    )
    start: Start | None = option(
        None, "--start", "Weights to begin with: fresh ones, or those that the search kept", default=Start.FRESH,
        panel=TRAINING, bounds=one_of(Start), typed=Start,
    )  # fmt: skip
    teacher: str | None = option(
        None, "--teacher", "Trained network from whose answers it learns as well: a directory, a trained trial's "
        "number, a timm model with weights, or MODEL=WEIGHTS_FILE", default="none", panel=TRAINING,
    )  # fmt: skip
    device: str = option(
        AUTO, "--device", "Device that trains: auto, cpu, cuda (all GPUs) or cuda:N", default="cuda where there is one",
        panel=TRAINING,
    )  # fmt: skip
    workers: int | None = option(
        None, "--workers", "Processes that prepare images, for each GPU", default="by the cores", panel=TRAINING,
        bounds=at_least(0),
    )  # fmt: skip
    data: str | None = option(
        None,
        "--data",
        "New place of the search's images, if they were moved",
        default="where they were",
        panel=TRAINING,
    )
    data_dir: str = same_as(DataConfig, "data_dir")
    download: bool = same_as(DataConfig, "download")
