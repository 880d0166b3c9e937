"""Large photos at the size that a training needs.

A camera's photo has some hundred times as many pixels as a network is shown, and each pass over the images would decode
all of them. So a smaller copy is made of each before the first pass, as far as there is room.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

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
# The most that the copies of a training take on the disk, also as a share of what is free there.
MOST_BYTES, OF_FREE = 4 * 2**30, 0.5
# Of a training image with an aspect ratio from 3/4 to 4/3, as timm draws them, the smaller of the two.
NARROWEST = 3 / 4


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

    def picture(self, path: Path) -> Image.Image:
        """A photo's copy, or the photo where it is shown as it is; in RGB and upright.

        Raises:
            NotRGB: the image is not RGB.
            Exception: whatever Pillow raises for a damaged image.
        """
        from PIL import Image

        if (kept := self.find(path)) is not None:
            return kept
        with Image.open(path) as image:
            return self.reader.picture(image) if self.factor(image.size) == 1 else _decoded(self._encoded(image))

    def find(self, path: Path) -> Image.Image | None:
        """The kept copy of a photo; None where there is none."""
        if self.folder is None:
            return None
        try:
            return _decoded((self.folder / _name(path)).read_bytes())
        except Exception:  # a damaged copy is as good as none
            return None

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
        """The copy of a photo that is open and not loaded, as a JPEG file."""
        from PIL.Image import Resampling

        width, height = image.size
        factor = self.factor(image.size)
        size = round(width / factor), round(height / factor)
        # Of a JPEG, Pillow decodes no more pixels than are needed, and a part of a pixel more at two edges.
        image.draft(None, (2 * size[0], 2 * size[1]))
        picture = self.reader.picture(image)
        # Some photos lie on their sides.
        turned = (picture.width < picture.height) != (width < height)
        made = io.BytesIO()
        picture.resize(size[::-1] if turned else size, Resampling.BOX).save(made, "JPEG", quality=95, subsampling=0)
        return made.getvalue()


def _decoded(encoded: bytes) -> Image.Image:
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as image:
        image.load()
        return image


def _name(path: Path) -> str:
    """The name of a photo's copy, which is another after the photo was changed."""
    status = path.stat()
    told = f"{path.absolute()}\0{status.st_mtime_ns}\0{status.st_size}"
    return hashlib.sha256(told.encode(errors="surrogateescape")).hexdigest()[:24] + ".jpg"
