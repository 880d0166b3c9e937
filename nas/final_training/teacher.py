"""A teacher: a trained network, whose answers a smaller one learns beside the labels.

The student's loss is a weighted sum of its own and of the divergence from the teacher's answers, both softened by a
temperature (Hinton et al., *Distilling the Knowledge in a Neural Network*, 2015). Both see the same augmented images,
as a patient teacher does (Beyer et al., 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nas.errors import UsageError, message_line
from nas.export.directories import CONFIG, PROXY_WEIGHTS, SECTION, Exported, read

TEMPERATURE, WEIGHT = 4.0, 0.7


class Teacher:
    """A trained network that answers for a student's images.

    Args:
        module: the network.
        mean, std: mean and deviation of each channel, by which its images are normalised.
        resolution: width and height of its images, in pixels.
        student_mean, student_std: those by which the student's images are normalised.
    """

    def __init__(
        self, module: nn.Module, mean: Sequence[float], std: Sequence[float], resolution: int,
        student_mean: Sequence[float], student_std: Sequence[float], device: torch.device,
    ) -> None:  # fmt: skip
        found: Any = module
        self.module: nn.Module = found.to(device, memory_format=torch.channels_last).eval()
        self.resolution = resolution
        self.mean, self.std, self.student_mean, self.student_std = (
            torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (mean, std, student_mean, student_std)
        )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits (N, classes) for images (N, 3, H, W) that are normalised for the student."""
        shown = images * self.student_std + self.student_mean
        if shown.shape[-1] != self.resolution:
            size = (self.resolution, self.resolution)
            shown = functional.interpolate(shown, size, mode="bicubic", antialias=True).clamp(0, 1)
        logits: Tensor = self.module((shown - self.mean) / self.std).float()
        return logits


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The divergence of softened answers, on the scale of a loss by labels.

    Args:
        student, teacher: logits, (N, classes).
    """
    own, told = (functional.log_softmax(logits / temperature, dim=1) for logits in (student, teacher))
    return functional.kl_div(own, told, reduction="batchmean", log_target=True) * temperature**2


def resolved(named: str, folder: Path) -> str:
    """A teacher as other processes find it, too.

    Args:
        named: what `--teacher` says: a trained directory, the number of a trial whose directory lies beside that of the
            student, a model of timm's with weights, or a model and a file of weights, as `resnet18=weights.pth`.
        folder: the student's directory.

    Raises:
        UsageError: a trial has no directory, or a directory is no trained network.
    """
    if named.isdecimal():
        own = read(folder).config[SECTION]["study"]
        for path in sorted(folder.absolute().parent.glob(f"*_t{int(named):03d}")):
            if (path / CONFIG).exists() and _is_trained(there := read(path)):
                told = there.config[SECTION]["study"]
                if (told["name"], told["begun"], told["trial"]) == (own["name"], own["begun"], int(named)):
                    return str(path)
        raise UsageError(f"--teacher {named}: trial {named} has no trained directory beside {folder}; train it first")
    path = Path(named).expanduser()
    return str(path.absolute()) if path.is_dir() else named


def _is_trained(network: Exported) -> bool:
    """Whether a network has weights that are not those of the search's short training."""
    return network.weights is not None and network.config[SECTION]["weights"] != PROXY_WEIGHTS


def teacher_of(
    named: str, classes: Sequence[str], mean: Sequence[float], std: Sequence[float], device: torch.device
) -> Teacher:
    """The teacher that `resolved` named.

    Args:
        classes: names of the student's classes.
        mean, std: those by which the student's images are normalised.

    Raises:
        UsageError: there is no such network, it has no weights, or it tells other classes apart.
    """
    path = Path(named)
    if path.is_dir():
        network = read(path)
        if not _is_trained(network):
            raise UsageError(f"--teacher {named}: is not trained to the end; train it first")
        if network.classes != list(classes):
            raise UsageError(f"--teacher {named}: tells other classes apart than {', '.join(classes[:5])}...")
        told = network.config["pretrained_cfg"]
        return Teacher(network.build(), told["mean"], told["std"], network.resolution, mean, std, device)
    module = _timms(named, len(classes))
    told = module.pretrained_cfg
    if (count := int(getattr(module, "num_classes", 0))) != len(classes):
        raise UsageError(f"--teacher {named}: tells {count} classes apart, and the images have {len(classes)}")
    return Teacher(module, told["mean"], told["std"], int(told["input_size"][-1]), mean, std, device)


def _timms(named: str, classes: int) -> Any:
    """A model of timm's with weights.

    Raises:
        UsageError: there is none.
    """
    import timm

    name, _, file = named.partition("=")
    try:
        if file:
            return timm.create_model(name, num_classes=classes, checkpoint_path=file)
        return timm.create_model(name, pretrained=True)
    except Exception as error:  # timm, the hub and damaged files raise anything
        raise UsageError(
            f"--teacher {named}: is no trained directory, and timm has no weights of that name here "
            f"({message_line(error)}); NAME=FILE names a model and its weights"
        ) from error
