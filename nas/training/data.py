"""Data sets as tensors in memory: the embedded digits in clutter, image folders, CIFAR, and data sets of timm."""

from __future__ import annotations

import hashlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from kernels.cache import cache_folder
from nas.config import DataConfig
from nas.errors import UsageError, message_line
from nas.files import save_tensors
from nas.reporting import Note
from nas.training import clutter

if TYPE_CHECKING:
    from PIL import Image

DIGITS_TRAIN, DIGITS_VAL = 16_000, 3_000
COMPOSING_SECONDS = 5e-7  # time per pixel, on one core of an EPYC
# The data are the same whatever the search's seed, so that searches of different seeds can be compared.
DATA_SEED = 0
VAL_SHARE = 0.1  # share held out of the training data where there is no validation split
MAX_VAL_IMAGES = 5_000
MAX_BYTES = 2 * 2**30  # size of the training images; a random subset of larger sets is used
# Mean and deviation come from a sample, which is converted to float32: a whole set of 2 GiB would take 16 GiB.
MEAN_IMAGES, MEAN_VALUES = 10_000, 50_000_000
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff", ".gif"}
TRAIN_FOLDERS, VAL_FOLDERS, TEST_FOLDERS = ("train", "training"), ("val", "validation", "valid"), ("test", "testing")
# Modes that Pillow converts to RGB without visible changes; in modes of 16 bits per channel it clips above 255.
CONVERTIBLE = ("1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
# Fewer validation images than this hardly distinguish one network from another.
FEW_VAL_IMAGES = 200
# Prefixes of timm's data set names; timm takes a name without one for a folder of images below --data-dir.
TIMM_PREFIXES = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")
# Data sets of digits: a mirrored 2 is not a 2.
NEVER_MIRRORED = ("mnist", "svhn")


@dataclass(frozen=True, eq=False)
class ImageData:
    """A classification data set in memory.

    Args:
        train_images, val_images: images, (N, 3, H, W) uint8; the validation images are held out of training.
        train_labels, val_labels: labels, (N,) int64.
        classes: name of each label.
        flip: whether a mirrored image keeps its label.
        notes: lines that the user should see, for example that a subset is used.
    """

    train_images: Tensor
    train_labels: Tensor
    val_images: Tensor
    val_labels: Tensor
    classes: tuple[str, ...]
    flip: bool
    notes: tuple[str, ...] = ()

    @cached_property
    def mean_std(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, (3,) each, in 0..1, of an even sample of the training images."""
        stride = max(len(self.train_images) // MEAN_IMAGES, -(-self.train_images.numel() // MEAN_VALUES), 1)
        sample = self.train_images[::stride].float() / 255
        return sample.mean(dim=(0, 2, 3)), sample.std(dim=(0, 2, 3)).clamp_min(1e-3)

    @property
    def summary(self) -> str:
        """A line on the loaded classes and images."""
        shown = ", ".join(self.classes) if len(self.classes) <= 5 else f"{self.classes[0]} to {self.classes[-1]}"
        line = (
            f"data: {len(self.classes)} classes ({shown}), {len(self.train_labels):,} training and "
            f"{len(self.val_labels):,} validation images of {self.val_images.shape[-1]}x{self.val_images.shape[-1]}"
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


def load(config: DataConfig, note: Note = lambda line: None) -> ImageData:
    """The data set that `config` names.

    Args:
        note: function that takes a line before a long step.

    Raises:
        UsageError: unknown data, missing files, an empty or single-class set, an unreadable or non-RGB image.
    """
    name = config.source
    if name == "digits":
        data = _digits(config.resolution, note)
    elif name in ("cifar10", "cifar100"):
        data = _cifar(config)
    elif Path(name).is_dir():
        data = _folder(Path(name), config)
    elif name.startswith((".", "/", "~")):
        raise UsageError(f"--data {name}: no such folder")
    elif not name.lower().startswith(TIMM_PREFIXES):
        raise UsageError(
            f"--data {name}: not digits, cifar10 or cifar100, no such folder, and not a data set of timm, "
            "whose names begin with torch/ or hfds/"
        )
    else:
        data = _timm(config)
    if len(data.classes) < 2 or len(data.train_labels.unique()) < 2:
        raise UsageError(f"--data {name}: holds images of {len(data.classes)} class(es), at least 2 are needed")
    return data


# -- the embedded digits -------------------------------------------------------------------------------------------


def _digits(resolution: int, note: Note) -> ImageData:
    most = MAX_BYTES // (3 * resolution**2)
    train_count, val_count = min(DIGITS_TRAIN, most), min(DIGITS_VAL, most)
    fewer = "" if train_count == DIGITS_TRAIN else f"_{train_count}"
    path = cache_folder() / f"digits_v{clutter.RECIPE_VERSION}_{resolution}px{fewer}_seed{DATA_SEED}.pt"
    tensors = _read_cache(path)
    if tensors is None:
        seconds = (train_count + val_count) * COMPOSING_SECONDS * resolution**2
        note(f"composing {train_count + val_count:,} images of {resolution}x{resolution}, once: some {seconds:.0f} s")
        train_digits, val_digits = clutter.split_digits(DATA_SEED)
        train_images, train_labels = clutter.compose(train_digits, train_count, resolution, seed=DATA_SEED)
        val_images, val_labels = clutter.compose(val_digits, val_count, resolution, seed=DATA_SEED + 1)
        tensors = dict(
            train_images=train_images, train_labels=train_labels, val_images=val_images, val_labels=val_labels
        )
        _write_cache(path, tensors)
    return ImageData(
        tensors["train_images"], tensors["train_labels"], tensors["val_images"], tensors["val_labels"],
        classes=tuple("0123456789"), flip=False,
    )  # fmt: skip


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


# -- image files ---------------------------------------------------------------------------------------------------


def _folder(root: Path, config: DataConfig) -> ImageData:
    train_root, val_root = _subfolder(root, TRAIN_FOLDERS) or root, _subfolder(root, VAL_FOLDERS)
    classes = _class_names(root, train_root)
    train = _image_files(train_root, classes)
    if not train:
        raise UsageError(f"--data {root}: no images in class subfolders of {train_root}")
    present = sorted({label for _, label in train})
    if len(present) < 2:
        raise UsageError(f"--data {root}: all images are of one class ({classes[present[0]]}), at least 2 are needed")
    empty = [name for label, name in enumerate(classes) if label not in present]
    if empty:
        raise UsageError(f"--data {root}: class folder {empty[0]} holds no image")
    if val_root:
        val = _image_files(val_root, classes)
        strangers = sorted(
            {entry.name for entry in val_root.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
            - set(classes)
        )
        if strangers:
            raise UsageError(f"--data {root}: {val_root.name} has the class {strangers[0]}, which training lacks")
        if not val:
            raise UsageError(f"--data {root}: no images in class subfolders of {val_root}")
    else:
        train, val = _split(train, [label for _, label in train], str(root), classes)
    loaded = _assemble(
        str(root), train, val, classes, lambda item: (_read_image(config, item[0]), item[1]), config.resolution
    )
    left_out = _subfolder(root, TEST_FOLDERS) if train_root == root else None
    if left_out is None:
        return loaded
    return replace(loaded, notes=(*loaded.notes, f"{root}: {left_out.name} is a test set, not a class"))


def _subfolder(root: Path, names: Sequence[str]) -> Path | None:
    """The subfolder with one of these names, in upper or lower case."""
    folders = {entry.name.lower(): entry for entry in sorted(root.iterdir()) if entry.is_dir()}
    return next((folders[name] for name in names if name in folders), None)


def _class_names(root: Path, train_root: Path) -> list[str]:
    """Names of the folders of training images; folders of validation and test images beside them are not classes."""
    names = sorted(entry.name for entry in train_root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if train_root != root:
        return names
    return [name for name in names if name.lower() not in (*VAL_FOLDERS, *TEST_FOLDERS)]


def class_count(config: DataConfig) -> int | None:
    """The number of classes, as far as it is known without loading images; None elsewhere."""
    if config.source in ("digits", "cifar10"):
        return 10
    if config.source == "cifar100":
        return 100
    root = Path(config.source)
    try:
        return len(_class_names(root, _subfolder(root, TRAIN_FOLDERS) or root)) or None if root.is_dir() else None
    except OSError:
        return None


def _image_files(root: Path, classes: Sequence[str]) -> list[tuple[Path, int]]:
    """Image files with their labels, except hidden files, in which editors and systems keep copies and leftovers."""
    return [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((root / name).rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
        and path.is_file()
    ]


def _read_image(config: DataConfig, path: Path) -> Tensor:
    from PIL import Image

    data = config.source
    try:
        with Image.open(path) as image:
            if image.mode != "RGB" and not (config.to_rgb and image.mode in CONVERTIBLE):
                remedy = "; --to-rgb converts it" if image.mode in CONVERTIBLE else ", and cannot be converted to one"
                raise UsageError(f"--data {data}: {path} is not an RGB image (its mode is {image.mode}){remedy}")
            return _to_tensor(image if image.mode == "RGB" else image.convert("RGB"), config.resolution)
    # Pillow raises a SyntaxError for a damaged chunk of a PNG.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"--data {data}: {path} cannot be read as an image ({error})") from error


def _to_tensor(image: Image.Image, resolution: int) -> Tensor:
    """A PIL image as (3, resolution, resolution) uint8: shorter side resized, centre cropped."""
    from PIL import Image, ImageOps

    if image.size != (resolution, resolution):
        image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


# -- torchvision and timm ------------------------------------------------------------------------------------------


def _cifar(config: DataConfig) -> ImageData:
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
    return _assemble(
        config.source, train, val, dataset.classes,
        lambda item: (_array_to_tensor(item[0], config.resolution), item[1]), config.resolution,
    )  # fmt: skip


def _array_to_tensor(array: np.ndarray, resolution: int) -> Tensor:
    from PIL import Image

    return _to_tensor(Image.fromarray(array), resolution)


def _timm(config: DataConfig) -> ImageData:
    from timm.data import create_dataset

    def open_split(split: str) -> Any:
        return create_dataset(
            config.source, root=config.data_dir, split=split, download=config.download, input_img_mode="RGB",
            is_training=False,
        )  # fmt: skip

    def read(index: int) -> tuple[Tensor, int]:
        image = dataset[index][0]
        return _to_tensor(image.convert("RGB"), config.resolution), targets[index]

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
        loaded = _assemble(config.source, train, val, classes, read, config.resolution)
        return replace(loaded, flip=not _never_mirrored(config.source))
    except UsageError:
        raise
    except Exception as error:  # these calls let through every exception of the libraries that read the data
        raise UsageError(
            f"--data {config.source}: timm's create_dataset cannot open it in --data-dir {config.data_dir} "
            f"({message_line(error)})"
        ) from error


def _never_mirrored(name: str) -> bool:
    name = name.lower()
    return "fashion" not in name and any(word in name for word in NEVER_MIRRORED)


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
    data: str, train: Sequence[Any], val: Sequence[Any], classes: Sequence[str],
    read: Callable[[Any], tuple[Tensor, int]], resolution: int,
) -> ImageData:  # fmt: skip
    """Read the items, or a random subset where they exceed `MAX_BYTES` or `MAX_VAL_IMAGES`, into tensors."""
    notes = []
    parts: list[Tensor] = []
    rng = np.random.default_rng(DATA_SEED)
    fitting = MAX_BYTES // (3 * resolution**2)
    most = {"training": fitting, "validation": min(MAX_VAL_IMAGES, fitting // 2)}
    for part, items in (("training", train), ("validation", val)):
        if len(items) > most[part]:
            notes.append(f"{data}: {most[part]:,} of {len(items):,} {part} images are used")
            items = [items[index] for index in sorted(rng.permutation(len(items))[: most[part]])]
        images = torch.empty(len(items), 3, resolution, resolution, dtype=torch.uint8)
        labels = torch.empty(len(items), dtype=torch.int64)
        for index, item in enumerate(items):
            images[index], labels[index] = read(item)
        parts += [images, labels]
    train_images, train_labels, val_images, val_labels = parts
    return ImageData(
        train_images, train_labels, val_images, val_labels, classes=tuple(classes), flip=True, notes=tuple(notes),
    )  # fmt: skip
