"""Data sets as tensors in memory: the embedded digits in clutter, image folders, CIFAR, and data sets of timm."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import IterableDataset

from kernels.cache import cache_folder
from nas.config import TIMM_PREFIXES, DataConfig
from nas.errors import UsageError, message_line
from nas.files import save_tensors
from nas.options import UNPRINTABLE
from nas.reporting import Note
from nas.training import clutter
from nas.training.folders import list_images
from nas.training.images import UNLIKE_TIMM, ImageReader, NotAnImage, NotRGB

DIGITS_TRAIN, DIGITS_VAL = 16_000, 3_000
COMPOSING_SECONDS = 5e-7  # time per pixel, on one core of an EPYC
# The data are the same whatever the search's seed, so that searches of different seeds can be compared.
DATA_SEED = 0
VAL_SHARE = 0.1  # share held out of the training data where there is no validation split
MAX_VAL_IMAGES = 5_000
MAX_BYTES = 2 * 2**30  # size of the training images; a random subset of larger sets is used
# Mean and deviation come from a sample, which is converted to float32: a whole set of 2 GiB would take 16 GiB.
MEAN_IMAGES, MEAN_VALUES = 10_000, 50_000_000
# Fewer validation images than this hardly distinguish one network from another.
FEW_VAL_IMAGES = 200
# Seconds between two lines of progress while images are read.
PROGRESS_SECONDS = 10.0
SHRUNK_AT_ONCE = 1000
# Images that cannot be used and are named before they are only counted.
NAMED = 10


@dataclass(frozen=True, eq=False)
class ImageData:
    """A classification data set in memory.

    Args:
        train_images, val_images: images, (N, 3, H, W) uint8; the validation images are held out of training.
        train_labels, val_labels: labels, (N,) int64.
        classes: name of each label.
        flip: whether training images are mirrored at random, because a mirrored image keeps its label.
        notes: lines that the user should see, for example that a subset is used.
        preparation: what must be done to such images before timm's loaders make the same pixels and labels of them.
        test_images, test_labels: images and labels of a test set, by which nothing is chosen; None where there is none.
    """

    train_images: Tensor
    train_labels: Tensor
    val_images: Tensor
    val_labels: Tensor
    classes: tuple[str, ...]
    flip: bool
    notes: tuple[str, ...] = ()
    preparation: tuple[str, ...] = ()
    test_images: Tensor | None = None
    test_labels: Tensor | None = None

    @cached_property
    def mean_std(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, (3,) each, in 0..1, of an even sample of the training images."""
        stride = max(len(self.train_images) // MEAN_IMAGES, -(-self.train_images.numel() // MEAN_VALUES), 1)
        sample = self.train_images[::stride].float() / 255
        return sample.mean(dim=(0, 2, 3)), sample.std(dim=(0, 2, 3)).clamp_min(1e-3)

    @property
    def summary(self) -> str:
        """A line on the loaded classes and images."""
        names = [UNPRINTABLE.sub("?", name) for name in self.classes]
        shown = ", ".join(names) if len(names) <= 5 else f"{names[0]} to {names[-1]}"
        line = (
            f"data: {len(self.classes)} classes ({shown}), {len(self.train_labels):,} training and "
            f"{len(self.val_labels):,} validation images of {self.val_images.shape[-1]}x{self.val_images.shape[-1]}, "
            + ("mirrored at random in training" if self.flip else "never mirrored")
        )
        few = len(self.val_labels) < FEW_VAL_IMAGES
        return f"{line}; so few validation images give only rough accuracies" if few else line

    @cached_property
    def fingerprint(self) -> str:
        """Twelve hex digits of a hash of the labels and of a sample of the pixels.

        It changes when a source of the same name holds other data.
        """
        digest = hashlib.sha256()
        for images, labels in ((self.train_images, self.train_labels), (self.val_images, self.val_labels)):
            digest.update(repr(tuple(images.shape)).encode())
            digest.update(labels.numpy().tobytes())
            digest.update(images[:: max(1, len(images) // 100)].numpy().tobytes())
        return digest.hexdigest()[:12]


def load(config: DataConfig, note: Note = lambda line: None, largest: int = 0) -> ImageData:
    """The data set that `config` names.

    Args:
        note: function that takes a line before a long step.
        largest: resolution at which the same images are needed, too, if that is greater: no more of them are taken than
            fit into memory there.

    Raises:
        UsageError: unknown data, missing files, an empty or single-class set, an unreadable or non-RGB image.
    """
    name, kind = config.source, kind_of(config)
    most = MAX_BYTES // (3 * max(config.resolution, largest) ** 2)
    if kind is Kind.DIGITS:
        data = _digits(config.resolution, max(config.resolution, largest), most, note)
    elif kind is Kind.CIFAR:
        data = _cifar(config, most, note)
    elif kind is Kind.FOLDER:
        data = _folder(Path(name).expanduser(), config, most, note)
    else:
        data = _timm(config, most, note)
    if len(data.classes) < 2 or len(data.train_labels.unique()) < 2:
        raise UsageError(f"--data {name}: holds images of {len(data.classes)} class(es), at least 2 are needed")
    return replace(data, flip=bool(config.mirror))


class Kind(Enum):
    """Kinds of sources of images."""

    DIGITS = "digits"
    CIFAR = "cifar"
    FOLDER = "folder"
    TIMM = "timm"


def kind_of(config: DataConfig) -> Kind:
    """The kind of the source that `config` names.

    Raises:
        UsageError: it is unknown, or a folder that is not there.
    """
    name = config.source
    if name == "digits":
        return Kind.DIGITS
    if name in ("cifar10", "cifar100"):
        return Kind.CIFAR
    if _is_there(name):
        return Kind.FOLDER
    if name.startswith((".", "/", "~")):
        raise UsageError(f"--data {name}: no such folder")
    if not name.lower().startswith(TIMM_PREFIXES):
        raise UsageError(
            f"--data {name}: not digits, cifar10 or cifar100, no such folder, and not a data set of timm, "
            "whose names begin with torch/ or hfds/"
        )
    return Kind.TIMM


def load_all(
    config: DataConfig, resolutions: Sequence[int], note: Note = lambda line: None
) -> Iterator[tuple[int, ImageData]]:
    """Yield the data set that `config` names at several resolutions in pixels: the same images, in the same order.

    Raises:
        UsageError: see `load`.
    """
    for size in resolutions:
        yield size, load(replace(config, resolution=size), note, max(resolutions))


def _is_there(name: str) -> bool:
    """Whether a source names a folder that exists."""
    try:
        return Path(name).expanduser().is_dir()
    except (OSError, RuntimeError, ValueError):
        # It is too long for a path, say, or `~` is nobody's.
        return False


# -- the embedded digits -------------------------------------------------------------------------------------------


def _digits(resolution: int, composed: int, most: int, note: Note) -> ImageData:
    """The embedded digits.

    Args:
        composed: resolution at which they are composed; other random numbers would be drawn at another.
        most: number of images that fit into memory.
    """
    train_count, val_count = min(DIGITS_TRAIN, most), min(DIGITS_VAL, most)
    fewer = "" if train_count == DIGITS_TRAIN else f"_{train_count}"
    path = cache_folder() / f"digits_v{clutter.RECIPE_VERSION}_{composed}px{fewer}_seed{DATA_SEED}.pt"
    tensors = _read_cache(path)
    if tensors is None:
        seconds = (train_count + val_count) * COMPOSING_SECONDS * composed**2
        note(f"composing {train_count + val_count:,} images of {composed}x{composed}, once: some {seconds:.0f} s")
        train_digits, val_digits = clutter.split_digits(DATA_SEED)
        train_images, train_labels = clutter.compose(train_digits, train_count, composed, seed=DATA_SEED)
        val_images, val_labels = clutter.compose(val_digits, val_count, composed, seed=DATA_SEED + 1)
        tensors = dict(
            train_images=train_images, train_labels=train_labels, val_images=val_images, val_labels=val_labels
        )
        _write_cache(path, tensors)
    if composed > resolution:
        tensors |= {name: _shrunk(tensors[name], resolution) for name in ("train_images", "val_images")}
    return ImageData(
        tensors["train_images"], tensors["train_labels"], tensors["val_images"], tensors["val_labels"],
        classes=tuple("0123456789"), flip=False,
    )  # fmt: skip


def _shrunk(images: Tensor, size: int) -> Tensor:
    """Square images (N, 3, H, W) uint8 at a smaller size in pixels."""
    # As floats, all of them would take four times as much memory.
    parts = [
        functional.interpolate(part.float(), size=size, mode="bilinear", antialias=True).round().to(torch.uint8)
        for part in images.split(SHRUNK_AT_ONCE)
    ]
    return torch.cat(parts)


def _read_cache(path: Path) -> dict[str, Tensor] | None:
    try:
        tensors: dict[str, Tensor] = torch.load(path, weights_only=True)
        return tensors
    except FileNotFoundError:
        return None
    except Exception as error:  # torch.load raises many kinds for damaged files, and the cache can be made again
        warnings.warn(f"{path}: made again, the cached copy cannot be read ({error})", stacklevel=2)
        return None


def _write_cache(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Two processes may make the file at once; each renames a whole one.
        save_tensors(tensors, path)
    except OSError as error:
        warnings.warn(f"{path}: not cached ({error}); it is made anew each time", stacklevel=2)


# -- folders -------------------------------------------------------------------------------------------------------


def _folder(root: Path, config: DataConfig, most: int, note: Note) -> ImageData:
    found = list_images(root, config.reading)
    train, val = found.train, found.val
    preparation = found.preparation
    if val is None:
        train, val = _split(train, [label for _, label in train], str(root), found.classes)
        preparation = (*preparation, "there is no validation folder: the search held out a tenth of each class")
    reader = ImageReader(config)
    loaded = _assemble(
        str(root), train, val, found.classes, reader, lambda item: (reader.read(item[0]), item[1]), most, note
    )
    loaded = replace(loaded, notes=(*found.notes, *loaded.notes), preparation=(*preparation, *loaded.preparation))
    return _with_test(loaded, found.test, root, config, note) if found.test else loaded


@dataclass(frozen=True)
class SplitFiles:
    """All images of a folder with their labels, also those that `load` leaves out for want of memory."""

    classes: tuple[str, ...]
    train: list[tuple[Path, int]]
    val: list[tuple[Path, int]]


def split_files(config: DataConfig) -> SplitFiles | None:
    """The images of a folder, by the search's split; None for a source that is no folder.

    Raises:
        UsageError: see `load`.
    """
    if kind_of(config) is not Kind.FOLDER:
        return None
    root = Path(config.source).expanduser()
    found = list_images(root, config.reading)
    if found.val is not None:
        return SplitFiles(found.classes, found.train, found.val)
    parts = _split(found.train, [label for _, label in found.train], str(root), found.classes)
    return SplitFiles(found.classes, *parts)


def _with_test(
    data: ImageData, test: Sequence[tuple[Path, int]], root: Path, config: DataConfig, note: Note
) -> ImageData:  # fmt: skip
    """A folder's data with its test set, or with a line that says why it is left out: it is no reason not to search."""
    reader = ImageReader(config)
    items, line = _chosen(test, min(MAX_VAL_IMAGES, len(data.train_labels)), "test")
    images, labels, unusable = _read_all(
        items, config.resolution, lambda item: (reader.read(item[0]), item[1]), Progress(len(items), note)
    )
    if unusable:
        return replace(data, notes=(*data.notes, f"{root}: the test images are left out: {_named(unusable)}"))
    notes = (*data.notes, f"{root}: {line}") if line else data.notes
    return replace(data, test_images=images, test_labels=labels, notes=notes)


# -- torchvision and timm ------------------------------------------------------------------------------------------


def _cifar(config: DataConfig, most: int, note: Note) -> ImageData:
    from torchvision import datasets

    dataset_class = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[config.source]
    try:
        dataset = dataset_class(config.data_dir, train=True, download=config.download)
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        hint = "" if config.download else "; --download fetches them"
        raise UsageError(
            f"--data {config.source}: its official files cannot be read in --data-dir {config.data_dir}"
            f" ({message_line(error)}){hint}"
        ) from error
    items = list(zip(dataset.data, dataset.targets, strict=True))
    train, val = _split(items, dataset.targets, config.source)
    reader = ImageReader(config)

    def read(item: tuple[np.ndarray, int]) -> tuple[Tensor, int]:
        from PIL import Image

        return reader.tensor(Image.fromarray(item[0])), item[1]

    return _assemble(config.source, train, val, dataset.classes, reader, read, most, note)


def _timm(config: DataConfig, most: int, note: Note) -> ImageData:
    from timm.data import create_dataset

    # Data sets with names hold whatever they hold; the reader says what it did to it.
    reader = ImageReader(replace(config, to_rgb=True))

    def open_split(split: str) -> Any:
        # timm itself would drop the transparency.
        mode = "RGB" if config.reading == 1 else ""
        return create_dataset(
            config.source, root=config.data_dir, split=split, download=config.download, input_img_mode=mode,
            is_training=False,
        )  # fmt: skip

    def read(index: int) -> tuple[Tensor, int]:
        return reader.tensor(dataset[index][0]), targets[index]

    try:
        dataset = open_split("train")
        if isinstance(dataset, IterableDataset):
            raise TypeError("its images can only be streamed, but the proxy needs them in memory")
        # torchvision's data sets list their labels; other data sets return them with each image.
        known = getattr(dataset, "targets", None)
        labels = (dataset[index][1] for index in range(len(dataset))) if known is None else known
        targets = [int(label) for label in labels]
        train, val = _split(range(len(dataset)), targets, config.source)
        classes = getattr(dataset, "classes", None) or [str(label) for label in range(max(targets) + 1)]
        return _assemble(config.source, train, val, classes, reader, read, most, note)
    except UsageError:
        raise
    except Exception as error:  # these calls let through every exception of the libraries that read the data
        raise UsageError(
            f"--data {config.source}: timm's create_dataset cannot open it in --data-dir {config.data_dir} "
            f"({message_line(error)})"
        ) from error


# -- shared --------------------------------------------------------------------------------------------------------


def _split(
    items: Sequence[Any], labels: Sequence[int], data: str, classes: Sequence[str] | None = None
) -> tuple[list[Any], list[Any]]:
    """Split items into training and validation, with `VAL_SHARE` of every class (at least one image) for validation."""
    by_class = defaultdict(list)
    for index, label in enumerate(labels):
        by_class[label].append(index)
    rng = np.random.default_rng(DATA_SEED)
    held_out: set[int] = set()
    for label, indices in sorted(by_class.items()):
        if len(indices) < 2:
            name = label if classes is None else classes[label]
            raise UsageError(f"--data {data}: class {name} has one image, but training and validation need one each")
        count = max(1, round(VAL_SHARE * len(indices)))
        held_out.update(rng.permutation(indices)[:count].tolist())
    train = [item for index, item in enumerate(items) if index not in held_out]
    return train, [items[index] for index in sorted(held_out)]


def _assemble(
    data: str, train: Sequence[Any], val: Sequence[Any], classes: Sequence[str], reader: ImageReader,
    read: Callable[[Any], tuple[Tensor, int]], fitting: int, note: Note,
) -> ImageData:  # fmt: skip
    """Read the items, or a random subset where they exceed what fits or `MAX_VAL_IMAGES`, into tensors.

    Args:
        fitting: number of images that fit into memory.

    Raises:
        UsageError: images are damaged or not RGB, all of which were tried.
    """
    notes, preparation = [], []
    resolution = reader.config.resolution
    parts: list[Tensor] = []
    rng = np.random.default_rng(DATA_SEED)
    most = {"training": fitting, "validation": min(MAX_VAL_IMAGES, fitting // 2)}
    chosen = {}
    for part, items in (("training", train), ("validation", val)):
        chosen[part], line = _chosen(items, most[part], part, rng)
        if line:
            notes.append(f"{data}: {line}")
            preparation += [line] if part == "validation" else []
    progress = Progress(sum(map(len, chosen.values())), note)
    unusable: list[str] = []
    for items in chosen.values():
        images, labels, more = _read_all(items, resolution, read, progress)
        parts += [images, labels]
        unusable += more
    if unusable:
        raise UsageError(f"--data {data}: {_named(unusable)}")
    notes += [f"{data}: images {what}: {count:,}" for what, count in reader.done.most_common()]
    train_images, train_labels, val_images, val_labels = parts
    return ImageData(
        train_images, train_labels, val_images, val_labels, classes=tuple(classes), flip=True, notes=tuple(notes),
        preparation=(*preparation, *(f"images were {what}" for what in UNLIKE_TIMM if what in reader.done)),
    )  # fmt: skip


def _chosen(
    items: Sequence[Any], most: int, part: str, rng: np.random.Generator | None = None
) -> tuple[Sequence[Any], str | None]:  # fmt: skip
    """At most so many random items, in their order, and a line where these are not all."""
    if len(items) <= most:
        return items, None
    rng = rng or np.random.default_rng(DATA_SEED)
    line = f"{most:,} of {len(items):,} {part} images are used"
    return [items[index] for index in sorted(rng.permutation(len(items))[:most])], line


def _read_all(
    items: Sequence[Any], resolution: int, read: Callable[[Any], tuple[Tensor, int]], progress: Progress
) -> tuple[Tensor, Tensor, list[str]]:
    """The images and labels of all items, and a line for each that cannot be used."""
    images = torch.empty(len(items), 3, resolution, resolution, dtype=torch.uint8)
    labels = torch.empty(len(items), dtype=torch.int64)
    unusable = []
    for index, item in enumerate(items):
        try:
            images[index], labels[index] = read(item)
        except NotAnImage as error:
            unusable.append(f"{item[0]} cannot be read as an image ({error})")
        except NotRGB as error:
            shown = item[0] if isinstance(item, tuple) else f"image {item}"
            unusable.append(f"{shown} is {error}")
        progress.step()
    return images, labels, unusable


def _named(unusable: Sequence[str]) -> str:
    """What is wrong with some images, and how many more there are."""
    if len(unusable) == 1:
        return unusable[0]
    more = f"; and {len(unusable) - NAMED:,} more" if len(unusable) > NAMED else ""
    return f"{len(unusable):,} images cannot be used: {'; '.join(unusable[:NAMED])}{more}"


class Progress:
    """Says every few seconds how many images were read."""

    def __init__(self, total: int, note: Note) -> None:
        self.total, self.note = total, note
        self.count, self.said = 0, time.monotonic()

    def step(self) -> None:
        """Count one image more."""
        self.count += 1
        if time.monotonic() - self.said >= PROGRESS_SECONDS:
            self.said = time.monotonic()
            self.note(f"{self.count:,} of {self.total:,} images were read")
