"""What is known of a data set before it is loaded: the number of its classes and images, and their size."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from nas.config import DataConfig
from nas.errors import UsageError
from nas.training.data import DIGITS_TRAIN, VAL_SHARE, Kind, kind_of
from nas.training.folders import count_classes, list_images

# Files whose size is looked at.
LOOKED_AT = 100


@dataclass(frozen=True)
class Facts:
    """Facts of a data set; None where only loading it would tell.

    Args:
        images: number of training images.
        classes: number of classes.
        size: median of the images' shorter sides, in pixels.
    """

    images: int | None = None
    classes: int | None = None
    size: int | None = None


# A tenth of CIFAR's images is held out.
NAMED = {
    "digits": Facts(DIGITS_TRAIN, 10, 32), "cifar10": Facts(45_000, 10, 32), "cifar100": Facts(45_000, 100, 32)
}  # fmt: skip


def facts(config: DataConfig) -> Facts:
    """What is known of the data set that `config` names.

    Raises:
        UsageError: it is unknown, or its folder holds no classification.
    """
    kind = kind_of(config)
    if kind is not Kind.FOLDER:
        return NAMED.get(config.source, Facts())
    found = list_images(Path(config.source).expanduser(), config.reading)
    paths = [path for path, _ in found.train[:: max(1, len(found.train) // LOOKED_AT)]]
    sizes = [size for path in paths if (size := _shorter_side(path))]
    # Without validation images some are held out.
    images = len(found.train) if found.val is not None else round((1 - VAL_SHARE) * len(found.train))
    return Facts(images or None, len(found.classes) or None, round(median(sizes)) if sizes else None)


def class_count(config: DataConfig) -> int | None:
    """The number of classes, as far as it is known without looking at each image; None elsewhere."""
    # Loading says what is wrong.
    with contextlib.suppress(OSError, UsageError):
        if kind_of(config) is Kind.FOLDER:
            return count_classes(Path(config.source).expanduser(), config.reading) or None
        return NAMED.get(config.source, Facts()).classes
    return None


def _shorter_side(path: Path) -> int | None:
    from PIL import Image

    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")
            return min(image.size)
    except Exception:  # Pillow raises many kinds for damaged files, of which loading tells
        return None
