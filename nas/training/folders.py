"""Folders of images: which files are images of which class, and what is left out."""

from __future__ import annotations

import itertools
import os
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
BROKEN = "broken links"
# Names of suffixes or classes that a line lists before it only counts.
LISTED = 3


@dataclass(frozen=True)
class Listing:
    """The images of a folder.

    Args:
        classes: name of each label.
        train: image files with their labels.
        val: held-out image files with their labels; None where the folder has none.
        test: image files of a test set with their labels; None where there is none, or one of other classes.
        notes: lines on what was taken for what, and what was left out.
        preparation: what must be done to such a folder before timm's loaders read the same images and labels from it.
    """

    classes: tuple[str, ...]
    train: list[tuple[Path, int]]
    val: list[tuple[Path, int]] | None
    test: list[tuple[Path, int]] | None
    notes: tuple[str, ...]
    preparation: tuple[str, ...]


@dataclass(frozen=True)
class _Layout:
    """The parts of a folder: the folders of each class, in the order of the labels, and those of validation images.

    Classes are keyed by their names in Unicode's composed form, and called as their first folder is.
    """

    train: Path
    classes: dict[str, list[Path]]
    val: Path | None
    test: Path | None
    notes: list[str]


def natural_order(name: str) -> list[int | str]:
    """The key by which timm sorts names: numbers by value, letters without case."""
    from timm.utils.misc import natural_key

    try:
        key: list[int | str] = natural_key(name)
    except ValueError:
        # A name of superscripts alone is one of digits to Python, but no number; timm itself fails there.
        return [name.lower()]
    return key


def count_classes(root: Path, reading: int) -> int:
    """The number of classes of a folder, without looking at its images."""
    return len(_layout(root, reading).classes)


def class_names(root: Path) -> list[str]:
    """The names of a folder's classes, in the order in which timm numbers them; those of training, if it has splits.

    Raises:
        UsageError: the folder holds nothing but splits without images.
        OSError: it cannot be read.
    """
    return [folders[0].name for folders in _layout(root, 2).classes.values()]


def split_folders(root: Path, reading: int) -> tuple[Path, Path | None]:
    """The folders of training and of validation images, which may be the root itself; None where none are held out.

    Raises:
        UsageError: the folder holds no classification.
        OSError: it cannot be read.
    """
    layout = _layout(root, reading)
    return layout.train, layout.val


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
    keys = list(layout.classes)
    classes = [layout.classes[key][0].name for key in keys]
    train = [(path, label) for label, key in enumerate(keys) for path in scan.images(layout.classes[key])]
    if not train:
        raise UsageError(f"--data {root}: no images in class subfolders of {layout.train}")
    present = sorted({label for _, label in train})
    if len(present) < 2:
        raise UsageError(f"--data {root}: all images are of one class ({classes[present[0]]}), at least 2 are needed")
    if empty := [name for label, name in enumerate(classes) if label not in present]:
        raise UsageError(f"--data {root}: class folder {empty[0]} holds no image")
    notes = list(layout.notes)
    val, held_out = None, dict[str, list[Path]]()
    if layout.val is not None:
        held_out = _class_folders(layout.val, reading)
        if strangers := sorted(held_out.keys() - set(keys)):
            raise UsageError(f"--data {root}: {layout.val.name} has the class {strangers[0]}, which training lacks")
        val = [(path, label) for label, key in enumerate(keys) for path in scan.images(held_out.get(key, []))]
        if not val:
            raise UsageError(f"--data {root}: no images in class subfolders of {layout.val}")
    seen = {label for _, label in val or ()}
    lacking = [] if val is None else [name for label, name in enumerate(classes) if label not in seen]
    if layout.val is not None and lacking:
        notes.append(f"{root}: {layout.val.name} holds no image of {_listed(lacking)}")
    test = None
    if layout.test is not None:
        tested = _class_folders(layout.test, reading)
        if strangers := sorted(tested.keys() - set(keys)):
            notes.append(
                f"{root}: {layout.test.name} is left out: it has the class {strangers[0]}, which training lacks"
            )
        else:
            test = [(path, label) for label, key in enumerate(keys) for path in scan.images(tested.get(key, []))]
    for folder in dict.fromkeys(each for each in (root, layout.train, layout.val) if each is not None):
        scan.outside(folder, images=folder != root or folder == layout.train)
    if scan.left_out.total() or scan.other_suffixes:
        notes.append(f"{root}: left out: {scan.summary()}")
    folders = [folder for each in (layout.classes, held_out) for folder in each.values()]
    preparation = _preparation(classes, folders, [path for path, _ in (*train, *(val or ()))], lacking)
    return Listing(tuple(classes), train, val, test, tuple(notes), tuple(preparation))


def _preparation(
    classes: Sequence[str], folders: Sequence[list[Path]], files: Sequence[Path], lacking: Sequence[str]
) -> Iterator[str]:
    """Lines on what timm's loaders do not make of such files what the search does."""
    if lacking:
        yield f"the validation folder lacks {_listed(lacking)}: timm numbers the classes that are there"
    spelled = {folder.name for each in folders for folder in each} - set(classes)
    if spelled:
        yield f"the folders {_listed(sorted(spelled))} spell a class with other accents: rename them"
    if awkward := [name for name in classes if name != name.strip() or not name.isprintable()]:
        yield f"timm's class map cannot hold class names such as {awkward[0]!r} ({len(awkward)} in all): rename them"
    tops = {folder for each in folders for folder in each}
    if any(path.parent not in tops for path in files):
        yield "timm takes the innermost folder of an image for its class: move images up into class folders"
    if other := sorted({path.suffix.lower() for path in files} - TIMM_SUFFIXES):
        yield f"timm's folders leave out {', '.join(other)}: convert these files to PNG"


# -- Folders -----------------------------------------------------------------------------------------------------------


def _layout(root: Path, reading: int) -> _Layout:
    if reading == 1:
        return _layout_of_reading_1(root)
    train, val, test = (_split(root, names) for names in (TRAIN_FOLDERS, VAL_FOLDERS, TEST_FOLDERS))
    splits = [folder for folder in (train, val, test) if folder is not None]
    beside = {
        key: kept
        for key, folders in _class_folders(root, reading).items()
        if (kept := [folder for folder in folders if folder not in splits])
    }
    named_as_splits = [name for name in beside if name.lower() in (*TRAIN_FOLDERS, *VAL_FOLDERS, *TEST_FOLDERS)]
    notes = []
    if train or val:
        sources = [f"training images from {train.name}"] if train else []
        sources += [f"validation images from {val.name}"] if val else []
        notes.append(f"{root}: {', '.join(sources)}")
    if test:
        notes.append(f"{root}: test images, which are only for the final front, from {test.name}")
    if train:
        if beside:
            notes.append(f"{root}: left out beside {train.name}: {_listed(list(beside))}")
        return _Layout(train, _class_folders(train, reading), val, test, notes)
    if named_as_splits and len(named_as_splits) == len(beside):
        raise UsageError(f"--data {root}: {_listed(named_as_splits)}: no folders of images in them")
    notes += [f"{root}: {name} is taken for a class, as it holds no folders of images" for name in named_as_splits]
    return _Layout(root, beside, val, test, notes)


def _split(root: Path, names: Sequence[str]) -> Path | None:
    """The subfolder with one of these names, in upper or lower case, whose images lie in class folders."""
    folders = [entry for entry in sorted(root.iterdir()) if entry.is_dir()]
    named = (folder for name in names for folder in folders if folder.name.lower() == name)
    return next((folder for folder in named if _holds_classes(folder)), None)


def _holds_classes(folder: Path) -> bool:
    """Whether more of a folder's images lie in folders of it than outside of them: some may have strayed."""
    outside = sum(path.suffix.lower() in SUFFIXES and path.is_file() for path in folder.iterdir())
    below = (path for each in _class_folders(folder, 2).values() for sub in each for path in _Scan(2).walk(sub))
    return len(list(itertools.islice(below, outside + 1))) > outside


def _class_folders(root: Path, reading: int) -> dict[str, list[Path]]:
    """The subfolders that may be classes, in timm's order, by their names.

    An accented letter may be written as one character or as two: folders whose names differ by that alone are one
    class, whose key has the accents in one character.
    """
    folders: dict[str, list[Path]] = {}
    for entry in sorted(root.iterdir()):
        # A Mac's archives bring __MACOSX, which holds no image.
        if entry.is_dir() and not entry.name.startswith(".") and (reading == 1 or entry.name != "__MACOSX"):
            key = entry.name if reading == 1 else unicodedata.normalize("NFC", entry.name)
            folders.setdefault(key, []).append(entry)
    named = {key: folders[key][0].name for key in folders}
    return {key: folders[key] for key in sorted(folders, key=lambda key: (natural_order(named[key]), named[key]))}


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
    return _Layout(train or root, {name: [(train or root) / name] for name in names}, val, None, notes)


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
        return [path for folder in folders for path in sorted(self.walk(folder, frozenset({_identity(folder.parent)})))]

    def walk(self, folder: Path, above: frozenset[tuple[int, int]] | None = None) -> Iterator[Path]:
        """The image files in a folder and below.

        Args:
            above: the folders that lead to it (default: its own).
        """
        above = frozenset({_identity(folder.parent)}) if above is None else above
        here = _identity(folder)
        if here in above:
            self.left_out["links to a folder that holds them"] += 1
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                kind = _kind(entry)
                if entry.name.startswith("."):
                    # Editors and systems keep copies and leftovers in them.
                    self.left_out["hidden files and folders"] += 1
                elif kind == "folder":
                    if self.reading == 1 and entry.is_symlink():
                        self.left_out["links to folders"] += 1
                    else:
                        yield from self.walk(Path(entry.path), above | {here})
                elif kind != "file":
                    self.left_out[kind] += 1
                elif (suffix := os.path.splitext(entry.name)[1].lower()) in self.suffixes:
                    yield Path(entry.path)
                else:
                    self.other_suffixes[suffix or "no suffix"] += 1

    def outside(self, folder: Path, images: bool) -> None:
        """Count what a folder holds beside its class folders: broken links, which may have been classes, and images."""
        with os.scandir(folder) as entries:
            for entry in entries:
                kind = _kind(entry)
                if kind == BROKEN and not entry.name.startswith("."):
                    self.left_out[BROKEN] += 1
                elif images and kind == "file" and os.path.splitext(entry.name)[1].lower() in self.suffixes:
                    self.left_out["images outside of class folders"] += not entry.name.startswith(".")

    def summary(self) -> str:
        """What was left out, in words."""
        parts = [f"{what} ({count:,})" for what, count in self.left_out.items() if count]
        if total := self.other_suffixes.total():
            kinds = [f"{suffix} {count:,}" for suffix, count in self.other_suffixes.most_common()]
            parts.append(f"files that are no images ({total:,}: {_listed(kinds)})")
        return ", ".join(parts)


def _kind(entry: os.DirEntry[str]) -> str:
    """What an entry of a folder is, links followed."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    except OSError:
        # A link to itself, say.
        if not entry.is_symlink():
            raise
    return BROKEN if entry.is_symlink() else "pipes and devices"


def _identity(folder: Path) -> tuple[int, int]:
    """What a folder has in common with every link to it."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def _listed(names: Sequence[str]) -> str:
    """Some names, and how many more there are."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
