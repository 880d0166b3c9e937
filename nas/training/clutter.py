"""The embedded data set: real handwritten digits composed with clutter.

scikit-learn ships 1,797 scanned digits of 8x8 pixels. By themselves they are too easy: a linear model reads 94 % of
them. Here each image is one digit under a random affine map, amid three fragments of other digits at half contrast, in
random colour and polarity, over a random low-frequency background, with noise. Training and validation images are made
from disjoint digits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

# Part of the key of cached images, so it has to be raised when the recipe changes.
RECIPE_VERSION = 1

MIN_SCALE, MAX_SCALE = 0.7, 1.0
MAX_ROTATION_DEGREES = 12.0
MAX_SHIFT = 0.2  # share of the image's width
FRAGMENTS = 3
FRAGMENT_CONTRAST = 0.5
FRAGMENT_SIZE = 5  # width in pixels, of a digit's 8
FRAGMENT_SCALE = 0.35  # share of the image's width
BACKGROUND_SIZE = 4  # width in pixels, before upsampling
BACKGROUND_CONTRAST = 0.08
DIGIT_CONTRAST = 1.1
NOISE = 0.15
CHUNK = 1000  # number of images made at a time, to bound memory


@dataclass(frozen=True)
class Digits:
    """Source digits: images (N, 1, 8, 8) in 0..1 and labels (N,)."""

    images: Tensor
    labels: Tensor


def split_digits(seed: int) -> tuple[Digits, Digits]:
    """scikit-learn's digits, 75 % for training and 25 % for validation, stratified by class."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=seed)
    train_images, val_images, train_labels, val_labels = (np.asarray(part) for part in parts)

    def digits(flat: np.ndarray, targets: np.ndarray) -> Digits:
        return Digits(
            torch.from_numpy(flat / 16.0).float().view(-1, 1, 8, 8), torch.from_numpy(targets.astype(np.int64))
        )

    return digits(train_images, train_labels), digits(val_images, val_labels)


def compose(digits: Digits, count: int, resolution: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` cluttered images (count, 3, resolution, resolution) uint8 and labels (count,) int64."""
    rng = torch.Generator().manual_seed(seed)
    images, labels = [], []
    for start in range(0, count, CHUNK):
        chunk_images, chunk_labels = _compose_chunk(digits, min(CHUNK, count - start), resolution, rng)
        images.append(chunk_images)
        labels.append(chunk_labels)
    return torch.cat(images), torch.cat(labels)


def _compose_chunk(digits: Digits, count: int, resolution: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    main = torch.randint(len(digits.labels), (count,), generator=rng)
    ink = _placed(digits.images[main], resolution, _digit_maps(count, rng))
    clutter = torch.zeros_like(ink)
    for _ in range(FRAGMENTS):
        clutter = torch.maximum(
            clutter, _placed(_fragments(digits, count, rng), resolution, _fragment_maps(count, rng))
        )
    # A fragment never covers the digit: at half contrast it only stands beside it.
    ink = torch.maximum(ink, FRAGMENT_CONTRAST * clutter)

    background = torch.randn(count, 3, BACKGROUND_SIZE, BACKGROUND_SIZE, generator=rng) * BACKGROUND_CONTRAST
    background = functional.interpolate(background, size=resolution, mode="bicubic", align_corners=False)
    polarity = torch.randint(2, (count, 1, 1, 1), generator=rng) * 2.0 - 1.0
    colour = 0.4 + 0.6 * torch.rand(count, 3, 1, 1, generator=rng)
    noise = torch.randn(count, 3, resolution, resolution, generator=rng) * NOISE
    image = 0.5 + background + polarity * (ink - 0.3) * DIGIT_CONTRAST * colour + noise
    return (image.clamp(0, 1) * 255).round().to(torch.uint8), digits.labels[main]


def _uniform(count: int, low: float, high: float, rng: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=rng)


def _digit_maps(count: int, rng: torch.Generator) -> Tensor:
    return _affine(
        scale=_uniform(count, MIN_SCALE, MAX_SCALE, rng),
        degrees=_uniform(count, -MAX_ROTATION_DEGREES, MAX_ROTATION_DEGREES, rng),
        # affine_grid's coordinates run from -1 to 1, so a shift of one width is 2.
        shift=torch.stack([_uniform(count, -2 * MAX_SHIFT, 2 * MAX_SHIFT, rng) for _ in range(2)], dim=1),
    )


def _fragment_maps(count: int, rng: torch.Generator) -> Tensor:
    return _affine(
        scale=torch.full((count,), FRAGMENT_SCALE),
        degrees=_uniform(count, -180, 180, rng),
        shift=torch.stack([_uniform(count, -0.9, 0.9, rng) for _ in range(2)], dim=1),
    )


def _fragments(digits: Digits, count: int, rng: torch.Generator) -> Tensor:
    """Random (count, 1, FRAGMENT_SIZE, FRAGMENT_SIZE) windows of random digits."""
    windows = functional.unfold(
        digits.images[torch.randint(len(digits.labels), (count,), generator=rng)], FRAGMENT_SIZE
    )  # (count, pixels of a window, windows)
    which = torch.randint(windows.shape[2], (count, 1, 1), generator=rng).expand(-1, windows.shape[1], 1)
    return windows.gather(2, which).view(count, 1, FRAGMENT_SIZE, FRAGMENT_SIZE)


def _affine(scale: Tensor, degrees: Tensor, shift: Tensor) -> Tensor:
    """Maps (N, 2, 3) from output to input coordinates, as `affine_grid` takes them."""
    angle = degrees * (math.pi / 180)
    rotation = torch.stack([torch.cos(angle), -torch.sin(angle), torch.sin(angle), torch.cos(angle)], dim=1).view(
        -1, 2, 2
    )
    inverse = rotation / scale.view(-1, 1, 1)
    return torch.cat([inverse, -inverse @ shift.unsqueeze(2)], dim=2)


def _placed(patches: Tensor, resolution: int, maps: Tensor) -> Tensor:
    """Patches (N, 1, h, w) upsampled to the resolution and moved by `maps`; (N, 1, resolution, resolution)."""
    large = functional.interpolate(patches, size=resolution, mode="bicubic", align_corners=False).clamp(0, 1)
    grid = functional.affine_grid(maps, list(large.shape), align_corners=False)
    return functional.grid_sample(large, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
