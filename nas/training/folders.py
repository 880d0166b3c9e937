"""Folders of images: which files are images of which class, and what is left out."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nas.errors import UsageError

TRAIN_FOLDERS = ("train", "training")
VAL_FOLDERS = ("val", "validation", "valid", "eval", "evaluation")
TEST_FOLDERS = ("test", "testing")
# Suffixes of the images that Pillow reads by itself. The list is fixed, so that a newer Pillow reads the same images.
SUFFIXES = frozenset(
    (
        ".apng", ".avif", ".bmp", ".dds", ".dib", ".gif", ".ico", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe",
        ".jpeg", ".jpf", ".jpg", ".jpx", ".mpo", ".pbm", ".pcx", ".pgm", ".png", ".pnm", ".ppm", ".psd", ".qoi",
        ".ras", ".sgi", ".tga", ".tif", ".tiff", ".webp", ".xbm", ".xpm",
    )
)  # fmt: skip
SUFFIXES_1 = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff", ".gif"))
# Suffixes of the images that timm's folders take by default.
TIMM_SUFFIXES = frozenset((".jpg", ".jpeg", ".png"))
# Names of suffixes or classes that a line lists before it only counts.
LISTED = 3


@dataclass(frozen=True)
class Listing:
    """The images of a folder.

    Args:
        classes: name of each label.
        train: image files with their labels.
        val: held-out image files with their labels; None where the folder has none.
        notes: lines on what was taken for what, and what was left out.
        preparation: what must be done to such a folder before timm's loaders read the same images and labels from it.
    """

    classes: tuple[str, ...]
    train: list[tuple[Path, int]]
    val: list[tuple[Path, int]] | None
    notes: tuple[str, ...]
    preparation: tuple[str, ...]


@dataclass(frozen=True)
class _Layout:
    """The parts of a folder: the folders of each class, in the order of the labels, and those of validation images."""

    train: Path
    classes: dict[str, list[Path]]
    val: Path | None
    notes: list[str]


def natural_order(name: str) -> list[int | str]:
    """The key by which timm sorts names: numbers by value, letters without case (`timm.utils.misc.natural_key`)."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]


def class_count(root: Path, reading: int) -> int:
    """The number of classes of a folder, without looking at its images."""
    return len(_layout(root, reading).classes)


def list_images(root: Path, reading: int) -> Listing:
    """The image files of a folder with one subfolder for each class, or with such folders of each split.

    Args:
        reading: the way in which folders are read, see `nas.config.DataConfig`.

    Raises:
        UsageError: the folder holds no classification, or cannot be read.
    """
    try:
        return _listing(root, reading)
    except OSError as error:
        raise UsageError(
            f"--data {root}: {error.filename or root} cannot be read ({error.strerror or error})"
        ) from error


def _listing(root: Path, reading: int) -> Listing:
    layout = _layout(root, reading)
    scan = _Scan(reading)
    classes = list(layout.classes)
    train = [(path, label) for label, name in enumerate(classes) for path in scan.images(layout.classes[name])]
    if not train:
        raise UsageError(f"--data {root}: no images in class subfolders of {layout.train}")
    present = sorted({label for _, label in train})
    if len(present) < 2:
        raise UsageError(f"--data {root}: all images are of one class ({classes[present[0]]}), at least 2 are needed")
    if empty := [name for label, name in enumerate(classes) if label not in present]:
        raise UsageError(f"--data {root}: class folder {empty[0]} holds no image")
    notes, preparation = list(layout.notes), []
    val = None
    if layout.val is not None:
        folders = _class_folders(layout.val)
        if strangers := sorted(folders.keys() - set(classes)):
            raise UsageError(f"--data {root}: {layout.val.name} has the class {strangers[0]}, which training lacks")
        val = [(path, label) for label, name in enumerate(classes) for path in scan.images(folders.get(name, []))]
        if not val:
            raise UsageError(f"--data {root}: no images in class subfolders of {layout.val}")
        held_out = {label for _, label in val}
        if lacking := [name for label, name in enumerate(classes) if label not in held_out]:
            notes.append(f"{root}: {layout.val.name} holds no image of {_listed(lacking)}")
            preparation.append(
                f"its validation folder lacks {_listed(lacking)}: timm numbers the classes that are there"
            )
    for folder in {layout.train, layout.val} - {None}:
        scan.outside(folder)  # type: ignore[arg-type]
    if scan.left_out or scan.other_suffixes:
        notes.append(f"{root}: left out: {scan.summary()}")
    files = [path for path, _ in (*train, *(val or ()))]
    tops = {folder for folders in layout.classes.values() for folder in folders}
    tops |= {folder for folders in (_class_folders(layout.val).values() if layout.val else ()) for folder in folders}
    if any(path.parent not in tops for path in files):
        preparation.append(
            "timm takes the innermost folder of an image for its class: move images up into class folders"
        )
    if other := sorted({path.suffix.lower() for path in files} - TIMM_SUFFIXES):
        preparation.append(f"timm's folders leave out {', '.join(other)}: convert these files to PNG")
    return Listing(tuple(classes), train, val, tuple(notes), tuple(preparation))


# -- Folders -----------------------------------------------------------------------------------------------------------


def _layout(root: Path, reading: int) -> _Layout:
    if reading == 1:
        return _layout_of_reading_1(root)
    train, val, test = (_split(root, names) for names in (TRAIN_FOLDERS, VAL_FOLDERS, TEST_FOLDERS))
    splits = [folder for folder in (train, val, test) if folder is not None]
    beside = {
        name: kept
        for name, folders in _class_folders(root).items()
        if (kept := [f for f in folders if f not in splits])
    }
    named_as_splits = [name for name in beside if name.lower() in (*TRAIN_FOLDERS, *VAL_FOLDERS, *TEST_FOLDERS)]
    notes = []
    if train or val:
        sources = [f"training images from {train.name}"] if train else []
        sources += [f"validation images from {val.name}"] if val else []
        notes.append(f"{root}: {', '.join(sources)}")
    if test:
        notes.append(f"{root}: {test.name} is taken for a test set, and not read")
    if train:
        if beside:
            notes.append(f"{root}: left out beside {train.name}: {_listed(list(beside))}")
        return _Layout(train, _class_folders(train), val, notes)
    if named_as_splits and len(named_as_splits) == len(beside):
        raise UsageError(f"--data {root}: {_listed(named_as_splits)}: holds no class folders")
    notes += [f"{root}: {name} is taken for a class, because it holds no class folders" for name in named_as_splits]
    return _Layout(root, beside, val, notes)


def _split(root: Path, names: Sequence[str]) -> Path | None:
    """The subfolder with one of these names, in upper or lower case, that holds class folders."""
    folders = {entry.name.lower(): entry for entry in sorted(root.iterdir()) if entry.is_dir()}
    return next((folders[name] for name in names if name in folders and _class_folders(folders[name])), None)


def _class_folders(root: Path) -> dict[str, list[Path]]:
    """The subfolders that are not hidden, by name, in timm's order.

    A name may be spelled with one character or with two for an accented letter: folders whose names differ by that
    alone are one class.
    """
    folders: dict[str, list[Path]] = {}
    for entry in sorted(root.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            folders.setdefault(unicodedata.normalize("NFC", entry.name), []).append(entry)
    return {name: folders[name] for name in sorted(folders, key=lambda name: (natural_order(name), name))}


def _layout_of_reading_1(root: Path) -> _Layout:
    folders = {entry.name.lower(): entry for entry in sorted(root.iterdir()) if entry.is_dir()}
    train, val, test = (
        next((folders[name] for name in names if name in folders), None)
        for names in (TRAIN_FOLDERS, ("val", "validation", "valid"), TEST_FOLDERS)
    )
    names = sorted(
        entry.name for entry in (train or root).iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )
    notes = []
    if train is None:
        names = [name for name in names if name.lower() not in ("val", "validation", "valid", *TEST_FOLDERS)]
        notes = [f"{root}: {test.name} is a test set, not a class"] if test else []
    return _Layout(train or root, {name: [(train or root) / name] for name in names}, val, notes)


# -- Files -------------------------------------------------------------------------------------------------------------


class _Scan:
    """Finds image files, and counts what it leaves out."""

    def __init__(self, reading: int) -> None:
        self.reading = reading
        self.suffixes = SUFFIXES_1 if reading == 1 else SUFFIXES
        self.left_out: Counter[str] = Counter()
        self.other_suffixes: Counter[str] = Counter()

    def images(self, folders: Sequence[Path]) -> list[Path]:
        """The image files in some folders and below, links included, in the order of their paths."""
        return [
            path for folder in folders for path in sorted(self._walk(folder, frozenset({_identity(folder.parent)})))
        ]

    def _walk(self, folder: Path, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
        here = _identity(folder)
        if here in above:
            self.left_out["links to a folder that holds them"] += 1
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    # Editors and systems keep copies and leftovers in them.
                    self.left_out["hidden files and folders"] += 1
                elif entry.is_dir():
                    if self.reading == 1 and entry.is_symlink():
                        self.left_out["links to folders"] += 1
                    else:
                        yield from self._walk(Path(entry.path), above | {here})
                elif not entry.is_file():
                    self.left_out["broken links" if entry.is_symlink() else "pipes and devices"] += 1
                elif (suffix := os.path.splitext(entry.name)[1].lower()) in self.suffixes:
                    yield Path(entry.path)
                else:
                    self.other_suffixes[suffix or "no suffix"] += 1

    def outside(self, folder: Path) -> None:
        """Count the images of a folder that are in none of its class folders."""
        for entry in folder.iterdir():
            if entry.suffix.lower() in self.suffixes and not entry.name.startswith(".") and entry.is_file():
                self.left_out["images outside of class folders"] += 1

    def summary(self) -> str:
        """What was left out, in words."""
        parts = [f"{count:,} {what}" for what, count in self.left_out.items()]
        if total := self.other_suffixes.total():
            kinds = [f"{suffix} {count:,}" for suffix, count in self.other_suffixes.most_common()]
            parts.append(f"{total:,} files that are no images ({_listed(kinds)})")
        return ", ".join(parts)


def _identity(folder: Path) -> tuple[int, int]:
    """What a folder has in common with every link to it."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def _listed(names: Sequence[str]) -> str:
    """Some names, and how many more there are."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
