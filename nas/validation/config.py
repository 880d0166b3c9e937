"""Configurations of longer trainings and of the comparison with known networks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from nas.config import AUTO, MAX_CONFIRM, MAX_WORKERS, PIXELS, USUAL_CONFIRM, DataConfig, worker_number
from nas.options import Bounds, Checked, at_least, between, listed, option, same_as

# Length of the long schedule, in steps of the study's proxy, and its learning rates, in units of the study's.
LONG = 4
RATES = (1 / 8, 1 / 2, 2.0)
ALL = "all"

LONG_STEPS = f"{LONG} times the study's"


def _listed(factors: Sequence[float]) -> str:
    """Factors in words, such as 1/8, 1/2 and 2."""
    *first, last = (str(Fraction(factor)) for factor in factors)
    return f"{', '.join(first)} and {last}"


def _rates(text: str) -> tuple[float, ...]:
    """The learning rates that a user typed, separated by commas.

    Raises:
        ValueError: one of them is not a number.
    """
    try:
        return tuple(float(rate) for rate in text.split(","))
    except ValueError as error:
        raise ValueError(f"{text}: not numbers separated by commas") from error


@dataclass(frozen=True)
class BaselineConfig(Checked):
    """The networks to compare with a study's own, and the schedule on which all are trained.

    Args:
        models: names of timm models; `("all",)` stands for all of `nas.validation.baselines.MODELS`.
        steps: length of the whole schedule; it is at least 2 because half of it is trained, too.
        map_size: width of the final feature map, which sets the resolution of networks that are not ours, see
            `nas.validation.networks.suited_resolution`; None stands for `default_map_size` there.

    Raises:
        FieldError: a field has a value that it cannot have.
    """

    models: tuple[str, ...] | None = option(
        None, "--models", f"Comma-separated names of timm models, or {ALL}", default="those that suit the device",
        bounds=Bounds(bool, "a list of timm models"), typed=str, parse=listed("timm models"),
    )  # fmt: skip
    found: int = option(3, "--found", "Number of the front's networks to compare, evenly spaced", bounds=at_least(1))
    steps: int | None = option(None, "--steps", "Training steps per network", default=LONG_STEPS, bounds=at_least(2))
    learning_rates: tuple[float, ...] | None = option(
        None, "--learning-rates", "Comma-separated rates; each network keeps its best",
        default=f"{_listed(RATES)} times the study's rate", typed=str, parse=_rates,
        bounds=Bounds(lambda rates: rates and all(0 < rate < math.inf for rate in rates), "positive numbers"),
    )  # fmt: skip
    map_size: int | None = option(
        None, "--map", "Width of the last feature map of timm's networks in pixels, which sets their resolution",
        default="the study's, on a CPU half of it", bounds=at_least(1),
    )  # fmt: skip
    data: str | None = option(None, "--data", "Folder of the study's images, if they were moved", default="the study's")
    data_dir: str = same_as(DataConfig, "data_dir")
    download: bool = same_as(DataConfig, "download")
    workers: int | None = option(
        None, "--workers", "Number of trainings at once, or auto: one for each GPU, on a CPU one for each core",
        default=AUTO, bounds=between(1, MAX_WORKERS), typed=str, parse=worker_number,
    )  # fmt: skip


@dataclass(frozen=True)
class ConfirmConfig(Checked):
    """The trainings that confirm a front.

    Raises:
        FieldError: a field has a value that it cannot have.
    """

    share: float = option(
        USUAL_CONFIRM, "--share",
        "Largest number of confirming trainings, as a share of the search's; earlier ones count",
        bounds=between(0, MAX_CONFIRM),
    )  # fmt: skip
    data: str | None = same_as(BaselineConfig, "data")
    data_dir: str = same_as(DataConfig, "data_dir")
    download: bool = same_as(DataConfig, "download")
    workers: int | None = same_as(BaselineConfig, "workers")
    train_devices: tuple[str, ...] | None = option(
        None, "--train-devices", "Comma-separated devices that train, of the kind on which the search trained",
        default="the study's --device, and all CUDA devices if that is one", typed=str, parse=listed("devices"),
    )  # fmt: skip


@dataclass(frozen=True)
class RetrainConfig(Checked):
    """The candidates to train for longer, and the images and schedule of these trainings.

    Args:
        to_rgb: whether to convert images to RGB; a study whose search converts them does so here in any case.

    Raises:
        FieldError: a field has a value that it cannot have.
    """

    top: int | None = option(
        None, "--top", "Number of the front's networks, the most accurate", default="all", bounds=at_least(1)
    )
    dominated: int = option(
        20, "--dominated", "Number of networks off the front, spread over the latencies", bounds=at_least(0)
    )
    steps: int | None = option(None, "--steps", "Training steps per network", default=LONG_STEPS, bounds=at_least(1))
    data: str | None = option(None, "--data", "Images, named as for the search", default="the study's")
    resolution: int | None = option(
        None, "--resolution", "Width and height of the training images, in pixels", default="the study's",
        bounds=PIXELS,
    )  # fmt: skip
    data_dir: str = same_as(DataConfig, "data_dir")
    download: bool = same_as(DataConfig, "download")
    workers: int | None = same_as(BaselineConfig, "workers")
    to_rgb: bool = same_as(DataConfig, "to_rgb")
