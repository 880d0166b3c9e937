"""Large photos at the size that a training needs: decoded at a part of their size, and kept as smaller copies.

A camera's photo has some hundred times as many pixels as a network is shown, and each pass over the images would decode
all of them. The crops that are drawn stay the same: they are drawn of the whole photo's size, and cut out of the
smaller picture, which has at least twice as many pixels in a row as the network takes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch

from kernels.machine import cores
from nas.errors import message_line
from nas.files import whole
from nas.training.images import ImageReader

if TYPE_CHECKING:
    from PIL import Image

# Pixels in a row of a crop, as a multiple of those of the network, at least.
SPARE = 2
# A photo of fewer pixels is decoded about as fast as its copy.
LARGE = 1_000_000
# Formats of which Pillow decodes fewer pixels where fewer are needed, and the shares of each side that there are.
DRAFTED, SHARES = ("JPEG", "MPO"), (8, 4, 2, 1)
# The most that the copies of a training take on the disk, also as a share of what is free there.
MOST_BYTES, OF_FREE = 4 * 2**30, 0.5
# Orientations that exchange width and height, that bring the right edge to the left, and the bottom to the top.
LYING, FROM_RIGHT, FROM_BOTTOM = (5, 6, 7, 8), (2, 3, 6, 7), (3, 4, 7, 8)
# Of a training image with an aspect ratio from 3/4 to 4/3, as timm draws them, the smaller of the two.
NARROWEST = 3 / 4


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture in RGB and upright, which may be smaller than what it shows.

    Args:
        size: width and height of the whole photo.
        region: left, top, right and bottom edge of what shows the photo; beyond it are parts of pixels.
    """

    picture: Image.Image
    size: tuple[int, int]
    region: tuple[float, float, float, float]

    @classmethod
    def all_of(cls, picture: Image.Image, size: tuple[int, int] | None = None) -> Shown:
        """A picture, all of which shows the photo."""
        return cls(picture, size or picture.size, (0, 0, *picture.size))


@dataclass
class Copies:
    """Smaller copies of large photos, which are the same whether they are kept or made at each look.

    Args:
        reader: the reader of the images.
        resolution: width of the network's images, in pixels.
        least_area: smallest area of a crop, as a share of the photo's.
        folder: folder in which they are kept; None keeps none.
    """

    reader: ImageReader
    resolution: int
    least_area: float
    folder: Path | None = None
    left_bytes: float = field(default=0.0, init=False)

    def factor(self, size: tuple[int, int]) -> int:
        """The whole number by which a photo's sides are divided; 1 for one that is shown as it is."""
        area = size[0] * size[1]
        if area < LARGE:
            return 1
        narrowest = min(*size, math.sqrt(self.least_area * area * NARROWEST))
        return max(1, int(narrowest / (SPARE * self.resolution)))

    def find(self, path: Path) -> Shown | None:
        """The kept copy of a photo; None where there is none."""
        if self.folder is None:
            return None
        try:
            return _shown((self.folder / _name(path)).read_bytes())
        except Exception:  # a damaged copy is as good as none
            return None

    def of(self, image: Image.Image) -> Shown | None:
        """The copy of a photo that is open and not loaded; None of one that is shown as it is."""
        return None if self.factor(image.size) == 1 else _shown(self._encoded(image))

    def size(self, image: Image.Image) -> tuple[int, int] | None:
        """Width and height of a photo that is open and not loaded; None where that is known later only."""
        if image.format not in DRAFTED:
            return None
        width, height = image.size
        return (height, width) if self.reader.orientation(image) in LYING else (width, height)

    def for_crop(self, image: Image.Image, pixels: int) -> Shown:
        """A photo that is open and not loaded, decoded at a part of its size.

        Args:
            pixels: the smaller side of what is cut out of it.
        """
        most = pixels / (SPARE * self.resolution)
        return self._decoded(image, next((share for share in SHARES if share <= most), 1))

    def keep(
        self, files: Iterable[Path], verified: bool, said: Callable[[], None] = lambda: None
    ) -> list[tuple[Path, str]]:
        """Keep copies of the large photos among some files, as many as there is room for.

        Args:
            verified: whether the others are decoded, too, to see which ones are damaged.
            said: function that is called after each file.

        Returns:
            The files that cannot be read, as far as they were decoded, with the reasons.
        """
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = sum(entry.stat().st_size for entry in os.scandir(self.folder))
        self.left_bytes = min(MOST_BYTES - kept, OF_FREE * shutil.disk_usage(self.folder).free)
        lock, damaged = Lock(), []

        def one(path: Path) -> tuple[Path, str | None]:
            try:
                self._keep(path, verified, lock)
            except Exception as error:  # Pillow's readers raise many kinds for damaged files
                return path, message_line(error)
            return path, None

        try:
            # Pillow decodes in parallel.
            with ThreadPoolExecutor(cores()) as pool:
                for path, reason in pool.map(one, files):
                    said()
                    if reason is not None:
                        damaged.append((path, reason))
        finally:
            # There may be no large photo.
            with contextlib.suppress(OSError):
                self.folder.rmdir()
        return damaged

    def _keep(self, path: Path, verified: bool, lock: Lock) -> None:
        from PIL import Image

        assert self.folder is not None
        place = self.folder / _name(path)
        if place.exists():
            return
        with Image.open(path) as image:
            if self.factor(image.size) == 1:
                if verified:
                    self.reader.picture(image)
                return
            if self.left_bytes <= 0 and not verified:
                return
            made = self._encoded(image)
        with lock:
            self.left_bytes -= len(made)
            if self.left_bytes < 0:
                return
        try:
            with whole(place) as part:
                part.write_bytes(made)
        except OSError:
            # There is no room after all: the photos themselves are there.
            self.left_bytes = 0

    def _encoded(self, image: Image.Image) -> bytes:
        from PIL.Image import Resampling

        factor = self.factor(image.size)
        shown = self._decoded(image, next(share for share in SHARES if share <= factor))
        width, height = shown.size
        small = shown.picture.resize((round(width / factor), round(height / factor)), Resampling.BOX, shown.region)
        made = io.BytesIO()
        small.save(made, "JPEG", quality=95, subsampling=0, comment=f"{width}x{height}")
        return made.getvalue()

    def _decoded(self, image: Image.Image, share: int) -> Shown:
        """A photo whose sides are divided by a share while it is decoded, if its format can do that."""
        size = self.size(image)
        if size is None or share == 1:
            return Shown.all_of(self.reader.picture(image))
        turn, (width, height) = self.reader.orientation(image), image.size
        image.draft(None, (width // share, height // share))
        picture = self.reader.picture(image)
        # The last row and column may show a part of a pixel only; they are the first ones after some turns.
        shown = size[0] / share, size[1] / share
        left = picture.width - shown[0] if turn in FROM_RIGHT else 0.0
        top = picture.height - shown[1] if turn in FROM_BOTTOM else 0.0
        return Shown(picture, size, (left, top, left + shown[0], top + shown[1]))


def cropped(crop: Any, shown: Shown, box: Sequence[int]) -> Image.Image:
    """What timm's `RandomResizedCropAndInterpolation` makes of a picture.

    Args:
        box: top, left, height and width in pixels of the whole photo, as `drawn` returned them.
    """
    from torchvision.transforms import functional

    picture, size = shown.picture, shown.size
    if picture.size == size:
        made: Image.Image = functional.resized_crop(picture, *box, crop.size, crop.interpolation)
        return made
    begin_x, begin_y, end_x, end_y = shown.region
    across, down = (end_x - begin_x) / size[0], (end_y - begin_y) / size[1]
    top, left, height, width = box
    edges = (
        begin_x + left * across, begin_y + top * down, begin_x + (left + width) * across,
        begin_y + (top + height) * down,
    )  # fmt: skip
    # No pixel that lies outside of the box has a share in the result.
    first = math.floor(edges[0] + 1e-6), math.floor(edges[1] + 1e-6)
    last = min(picture.width, math.ceil(edges[2] - 1e-6)), min(picture.height, math.ceil(edges[3] - 1e-6))
    part = picture.crop((*first, *last))
    within = (
        max(0.0, edges[0] - first[0]), max(0.0, edges[1] - first[1]), min(part.width, edges[2] - first[0]),
        min(part.height, edges[3] - first[1]),
    )  # fmt: skip
    return part.resize(crop.size[::-1], functional.pil_modes_mapping[crop.interpolation], within)


def drawn(crop: Any, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The box that timm's `RandomResizedCropAndInterpolation` draws of a photo of this width and height."""
    # It asks for nothing but the size.
    top, left, height, width = crop.get_params(
        torch.empty((3, size[1], size[0]), device="meta"), crop.scale, crop.ratio
    )
    return top, left, height, width


def _shown(encoded: bytes) -> Shown:
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as image:
        image.load()
        width, height = image.info["comment"].decode().split("x")
        return Shown.all_of(image, (int(width), int(height)))


def _name(path: Path) -> str:
    """The name of a photo's copy, which is another after the photo was changed."""
    status = path.stat()
    told = f"{path.absolute()}\0{status.st_mtime_ns}\0{status.st_size}"
    return hashlib.sha256(told.encode(errors="surrogateescape")).hexdigest()[:24] + ".jpg"
