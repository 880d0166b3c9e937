"""What is known of a data set before it is loaded: the number of its classes and images, and their size."""

from __future__ import annotations

import warnings
from pathlib import Path
from statistics import median

from nas.config import DataConfig
from nas.errors import UsageError
from nas.training.data import DIGITS_TRAIN, is_there
from nas.training.folders import count_classes, list_images

# Classes and training images of the data sets that have a name of their own; a tenth of CIFAR's is held out.
CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100}
IMAGES = {"digits": DIGITS_TRAIN, "cifar10": 45_000, "cifar100": 45_000}
SIZES = {"digits": 32, "cifar10": 32, "cifar100": 32}
# Files whose size is looked at.
LOOKED_AT = 100


def class_count(config: DataConfig) -> int | None:
    """The number of classes; None where only loading the images would tell."""
    if config.source in CLASSES:
        return CLASSES[config.source]
    try:
        return count_classes(_folder(config), config.reading) or None
    except (OSError, UsageError):
        # Loading says what is wrong.
        return None


def image_count(config: DataConfig) -> int | None:
    """The number of training images; None where only loading them would tell."""
    if config.source in IMAGES:
        return IMAGES[config.source]
    try:
        return len(list_images(_folder(config), config.reading).train) or None
    except (OSError, UsageError):
        return None


def image_size(config: DataConfig) -> int | None:
    """The median of the shorter sides of some training images, in pixels; None where only loading them would tell."""
    if config.source in SIZES:
        return SIZES[config.source]
    try:
        found = list_images(_folder(config), config.reading).train
    except (OSError, UsageError):
        return None
    shorter = [size for path, _ in found[:: max(1, len(found) // LOOKED_AT)] if (size := _shorter_side(path))]
    return round(median(shorter)) if shorter else None


def _folder(config: DataConfig) -> Path:
    """The folder of images that is the source.

    Raises:
        UsageError: it is none.
    """
    if not is_there(config.source):
        raise UsageError(f"--data {config.source}: no such folder")
    return Path(config.source).expanduser()


def _shorter_side(path: Path) -> int | None:
    from PIL import Image

    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")
            return min(image.size)
    except Exception:  # Pillow raises many kinds for damaged files, of which loading tells
        return None
