"""Image files as pixels: upright, on white where they are transparent, in RGB, and at the size that networks take."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nas.config import DataConfig
from nas.errors import FETCH, is_pointer

if TYPE_CHECKING:
    from PIL import Image

# What may be done to images, in words that follow "images were"; timm's loaders do the first three to none.
UPRIGHT = "turned upright as their EXIF orientation says"
ON_WHITE = "laid on white where they are transparent"
EIGHT_BITS = "reduced from 16 bits a channel to 8"
FIRST_FRAME = "reduced to their first frame or page"
CONVERTED = "converted from {mode} to RGB"
UNLIKE_TIMM = (UPRIGHT, ON_WHITE, EIGHT_BITS)
# Modes that `Image.convert` makes RGB. Those of 16 bits are reduced first; those of 32 bits have no known white.
CONVERTIBLE = ("1", "L", "LA", "La", "P", "PA", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
# Formats whose images of 16 bits Pillow opens as 32 (PNG before Pillow 11.3).
SCALED_TO_16_BITS = ("PNG", "PPM")
# Formats of animations and of several pages; a second frame of other formats is a preview.
SEVERAL_FRAMES = ("GIF", "PNG", "WEBP", "AVIF", "TIFF")
# Of images that are longer than so many times their width, only the middle is resized: the whole would take gigabytes.
MOST_ELONGATED = 32
# Modes that studies of reading 1 converted, with the colours that lie under transparency.
CONVERTIBLE_1 = ("1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
# The tag of EXIF data, and how its values turn an image, as names of `Image.Transpose`. (Pillow's own function also
# writes the EXIF data anew, which fails where another tag is damaged.)
ORIENTATION = 0x0112
TURNED = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
    8: "ROTATE_90",
}  # fmt: skip


class NotAnImage(Exception):
    """A file cannot be read as an image; the message is the reason."""


class NotRGB(Exception):
    """An image is not RGB, and was not to be converted; the message is what follows "is"."""


@dataclass
class ImageReader:
    """Reads images for one data set, and counts what it did to them.

    Args:
        config: the data set, whose `resolution`, `to_rgb` and `reading` are used.

    Attributes:
        done: the number of images that were treated in each way, in words that follow "images were".
    """

    config: DataConfig
    done: Counter[str] = field(default_factory=Counter)

    def read(self, path: Path) -> Tensor:
        """The image in a file, (3, resolution, resolution) uint8.

        Raises:
            NotAnImage: the file is missing, damaged or of no known kind.
            NotRGB: the image is not RGB.
        """
        from PIL import Image

        try:
            with Image.open(path) as image:
                return self.tensor(image)
        except NotRGB:
            raise
        except Exception as error:  # Pillow's readers raise many kinds for damaged files, MemoryError among them
            words = str(error).strip().splitlines() or [type(error).__name__]
            raise NotAnImage(FETCH if is_pointer(path) else words[0]) from error

    def tensor(self, image: Image.Image) -> Tensor:
        """An image as (3, resolution, resolution) uint8: its shorter side is resized, and the middle is cropped.

        Raises:
            NotRGB: the image is not RGB.
            Exception: whatever Pillow raises for a damaged image.
        """
        size = self.config.resolution
        fit = _fitted if self.config.reading == 1 else _resized
        return _pixels(fit(self.picture(image), size))

    def picture(self, image: Image.Image) -> Image.Image:
        """An image in RGB and upright, at its own size.

        Raises:
            NotRGB: the image is not RGB.
            Exception: whatever Pillow raises for a damaged image.
        """
        if self.config.reading == 1:
            return self._rgb_of_reading_1(image)
        # Pillow turns a TIFF itself, when its pixels are loaded.
        image.load()
        if image.format in SEVERAL_FRAMES and getattr(image, "is_animated", False):
            self.done[FIRST_FRAME] += 1
        turned = TURNED.get(_orientation(image))
        return self._upright(self._rgb(image), turned)

    def _upright(self, image: Image.Image, turned: str | None) -> Image.Image:
        from PIL import Image

        if turned is None:
            return image
        self.done[UPRIGHT] += 1
        return image.transpose(Image.Transpose[turned])

    def _rgb(self, image: Image.Image) -> Image.Image:
        from PIL import Image

        mode, transparent = image.mode, image.has_transparency_data
        if mode == "RGB" and not transparent:
            return image
        deep = mode in SIXTEEN_BITS or (mode == "I" and image.format in SCALED_TO_16_BITS)
        if not (deep or mode == "RGB" or mode in CONVERTIBLE):
            raise NotRGB(f"not an RGB image (its mode is {mode}), and cannot be converted to one")
        if not self.config.to_rgb:
            shown = f"{mode} with transparency" if transparent and mode in ("1", "L", "P", "RGB") else mode
            raise NotRGB(f"not an RGB image (its mode is {shown}); --to-rgb converts it")
        if deep:
            self.done[EIGHT_BITS] += 1
            values = np.asarray(image).astype(np.uint32)
            # The upper byte of each value: Pillow's own conversion clips at 255.
            grey = (values >> 8).astype(np.uint8)
            see_through = values == image.info.get("transparency", -1)
            if see_through.any():
                self.done[ON_WHITE] += 1
                grey[see_through] = 255
            return Image.fromarray(grey).convert("RGB")
        if not transparent:
            if mode not in ("1", "L", "P", "RGBX"):
                # Any program makes the same of grey and of palettes, but not of other colours.
                self.done[CONVERTED.format(mode=mode)] += 1
            return image.convert("RGB")
        if mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            self.done[ON_WHITE] += 1
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")

    def _rgb_of_reading_1(self, image: Image.Image) -> Image.Image:
        if image.mode == "RGB":
            return image
        if not (self.config.to_rgb and image.mode in CONVERTIBLE_1):
            remedy = "; --to-rgb converts it" if image.mode in CONVERTIBLE_1 else ", and cannot be converted to one"
            raise NotRGB(f"not an RGB image (its mode is {image.mode}){remedy}")
        return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF data raise many kinds, and say nothing about the pixels
        return 1


def _resized(image: Image.Image, size: int) -> Image.Image:
    """The image at the size of the network, as timm's evaluation makes it where nothing but the middle is cropped."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as transforms

    longest = MOST_ELONGATED * min(image.size)
    if max(image.size) > longest:
        image = transforms.center_crop(image, [min(longest, side) for side in (image.height, image.width)])
    resized = transforms.resize(image, size, InterpolationMode.BICUBIC)
    cropped: Image.Image = transforms.center_crop(resized, [size, size])
    return cropped


def _fitted(image: Image.Image, size: int) -> Image.Image:
    from PIL import Image, ImageOps

    return image if image.size == (size, size) else ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
