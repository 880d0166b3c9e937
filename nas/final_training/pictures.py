"""The training images of a network as timm's loader takes them: pictures and labels, which a transform changes."""

from __future__ import annotations

import copy
import errno
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from nas.config import DataConfig
from nas.errors import CandidateFailed, message_line
from nas.final_training.copies import Copies
from nas.training.data import ImageData
from nas.training.images import ImageReader
from nas.training.recipe import SMOOTHING, Recipe

if TYPE_CHECKING:
    from PIL import Image

# Where torch puts the batches that processes hand over, and how many of them the training itself holds.
SHARED_MEMORY, IN_USE = "/dev/shm", 2
# Parts of torch's messages where it is full.
OUT_OF_SHARED_MEMORY = (
    "killed by signal: Bus error", "shared memory", "unable to write to file </torch", "unable to resize file </torch",
    "unable to mmap", "unable to open file </torch",
)  # fmt: skip


class Pictures(Dataset[tuple[Any, int]]):
    """Images from files, or from memory, in RGB.

    Args:
        config: the source, which says how images are read.
        files: image files with their labels; None stands for the images in memory.
        copies: smaller copies of large photos; None decodes each file in full.

    Attributes:
        transform: function of a picture, which timm's `create_loader` sets.
    """

    transform: Callable[[Any], Any]

    def __init__(
        self, config: DataConfig, data: ImageData, files: Sequence[tuple[Path, int]] | None,
        copies: Copies | None = None,
    ) -> None:  # fmt: skip
        self.reader, self.files, self.copies = ImageReader(config), files, copies
        self.indices: Tensor | None = None
        self.images: Tensor | None = None
        self.labels: Tensor | None = None
        if files is None:
            self.images, self.labels = data.train_images, data.train_labels

    def part(self, indices: Tensor) -> Pictures:
        """Some of these pictures, by their numbers."""
        made = copy.copy(self)
        made.indices = indices
        return made

    def __len__(self) -> int:
        if self.indices is not None:
            return len(self.indices)
        return len(self.labels) if self.labels is not None else len(self.files or ())

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        if self.indices is not None:
            index = int(self.indices[index])
        if self.images is not None and self.labels is not None:
            picture = Image.fromarray(self.images[index].permute(1, 2, 0).numpy())
            return self.transform(picture), int(self.labels[index])
        assert self.files is not None
        path, label = self.files[index]
        try:
            return self.transform(self._picture(path)), label
        except Exception as error:  # Pillow's readers raise many kinds for damaged files
            # What could not be read when the training began was left out.
            raise CandidateFailed(
                f"{path}: cannot be read ({message_line(error)}); put a readable image in its place, under this name: "
                "without it, the images would be split otherwise"
            ) from error

    def _picture(self, path: Path) -> Image.Image:
        from PIL import Image

        if self.copies is not None:
            return self.copies.picture(path)
        with Image.open(path) as image:
            return self.reader.picture(image)


def loader(
    pictures: Pictures, recipe: Recipe, resolution: int, mean: Sequence[float], std: Sequence[float],
    device: torch.device,
) -> Any:  # fmt: skip
    """timm's loader of augmented batches: images (N, 3, H, W), normalised, and labels (N,), on the device or not."""
    from timm.data import create_loader

    own = recipe.augmentation
    on_cuda = device.type == "cuda"
    return create_loader(
        pictures,  # type: ignore[arg-type]
        (3, resolution, resolution), recipe.batch_size, is_training=True, re_prob=own["reprob"],
        re_mode="pixel", scale=tuple(own["scale"]), hflip=recipe.hflip, color_jitter=0.0, auto_augment=own["aa"],
        interpolation="bicubic", mean=tuple(mean), std=tuple(std), num_workers=recipe.workers,
        distributed=recipe.devices > 1, use_prefetcher=on_cuda, pin_memory=on_cuda, device=device,
        # New ones for each epoch, whose random numbers depend on the epoch alone: so a training that goes on is the
        # one that it would have been.
        persistent_workers=False,
    )  # fmt: skip


def most_workers(recipe: Recipe, resolution: int) -> int:
    """The number of processes that prepare images whose batches shared memory holds; no more than the recipe's.

    Docker gives a container 64 MB of it, and where it is full the processes are killed.
    """
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return recipe.workers
    # Bytes on CUDA, where timm normalises them, else numbers of 32 bits.
    batch = recipe.batch_size * 3 * resolution**2 * (1 if recipe.kind == "cuda" else 4)
    # torch has two batches prepared ahead for each process, beside those that are in use.
    ahead = free // (recipe.devices * batch) - IN_USE
    return max(0, min(recipe.workers, ahead // 2))


@contextmanager
def loaders_may_die() -> Iterator[None]:
    """Context in which the death of a process that prepares images is a line.

    It may show at any moment, as torch raises it from a signal handler.

    Raises:
        CandidateFailed: there is no room in shared memory for the images, or the process was killed.
    """
    try:
        yield
    except (RuntimeError, OSError) as error:
        # The signal is told by the first of two errors.
        text = str(error.__cause__ if isinstance(error.__cause__, RuntimeError) else error)
        # An error of a file on a disk has its name; the semaphores of processes have none.
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None
        if full or any(words in text for words in OUT_OF_SHARED_MEMORY):
            raise CandidateFailed(
                f"{SHARED_MEMORY}, the shared memory, is too small for the processes that prepare images: give it more "
                "(docker run --shm-size 8g), or use --workers 0"
            ) from error
        if text.startswith("DataLoader worker"):
            # Who has killed it is not known; most often the system, because memory ran out.
            raise CandidateFailed(f"a process that prepares images died ({text.splitlines()[0]})") from error
        raise


class Epochs:
    """The loaders of each epoch: one, or several in turn with a part of its pictures each, between checkpoints.

    Each part is drawn at random, so that all of them together are a pass over the pictures like any other.

    Args:
        make: function that makes the loader of some pictures.

    Attributes:
        parts: number of parts of an epoch.
        steps: number of steps of an epoch.
    """

    def __init__(self, pictures: Pictures, recipe: Recipe, make: Callable[[Pictures], Any]) -> None:
        self.pictures, self.recipe, self.make = pictures, recipe, make
        self.images = recipe.checkpoint_steps * recipe.images_a_step
        self.parts = max(1, len(pictures) // self.images) if self.images else 1
        self.whole = make(pictures)
        self.steps = sum(len(self.loader(0, part)) for part in range(self.parts))

    def loader(self, epoch: int, part: int) -> Any:
        """The loader of a part of an epoch, both counted from 0."""
        if self.parts == 1:
            made = self.whole
        else:
            seed = int(np.random.SeedSequence([self.recipe.seed, epoch]).generate_state(1)[0])
            order = torch.randperm(len(self.pictures), generator=torch.Generator().manual_seed(seed))
            end = (part + 1) * self.images if part + 1 < self.parts else len(order)
            made = self.make(self.pictures.part(order[part * self.images : end]))
        if self.recipe.devices > 1:
            # Its order is otherwise the same for all seeds.
            made.sampler.set_epoch(self.recipe.epochs * self.recipe.seed + epoch)
        return made


def mixing(recipe: Recipe, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """timm's Mixup and CutMix, which make soft targets of labels; None where there is none."""
    from timm.data import Mixup

    own = recipe.augmentation
    if not (own["mixup"] or own["cutmix"]):
        return None
    mixed: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = Mixup(
        own["mixup"], own["cutmix"], label_smoothing=SMOOTHING, num_classes=classes
    )
    return mixed


def loss_of(recipe: Recipe) -> nn.Module:
    """timm's loss for the targets that there are."""
    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

    own = recipe.augmentation
    return SoftTargetCrossEntropy() if own["mixup"] or own["cutmix"] else LabelSmoothingCrossEntropy(SMOOTHING)
