"""A teacher: a trained network, whose answers a smaller one learns beside the labels.

The student's loss is a weighted sum of its own and of the divergence from the teacher's answers, both softened by a
temperature (Hinton et al., *Distilling the Knowledge in a Neural Network*, 2015). Both see the same augmented images,
as a patient teacher does (Beyer et al., 2022).
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional

from nas.errors import UsageError, message_line
from nas.export.directories import CONFIG, PROXY_WEIGHTS, SECTION, Exported, read, trained_on
from nas.options import UNPRINTABLE
from nas.reporting import Note
from nas.training.data import ImageData
from nas.training.folders import class_names
from nas.training.proxy import Batches
from search_spaces.timm_config import ARCHITECTURE

TEMPERATURE, WEIGHT = 4.0, 0.7
# So many standard errors above chance begins what is better than it (one-sided, 95 %).
BETTER = 1.645
# Classes that a line names at most.
NAMED = 5


class Teacher:
    """A trained network that answers for a student's images.

    Args:
        module: the network.
        mean, std: mean and deviation of each channel, by which its images are normalised.
        resolution: width and height of its images, in pixels.
        student_mean, student_std: those by which the student's images are normalised.
        judged: what `_judged` found of the network, by the fingerprint of the images.
    """

    def __init__(
        self, module: nn.Module, mean: Sequence[float], std: Sequence[float], resolution: int,
        student_mean: Sequence[float], student_std: Sequence[float], device: torch.device,
        judged: dict[str, tuple[int, float]] | None = None,
    ) -> None:  # fmt: skip
        found: Any = module
        self.judged = {} if judged is None else judged
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
    named: str, classes: Sequence[str], resolution: int, mean: Sequence[float], std: Sequence[float],
    device: torch.device, note: Note = lambda line: None,
) -> Teacher:  # fmt: skip
    """The teacher that `resolved` named; it is loaded once for all students of a process.

    Args:
        classes: names of the student's classes.
        resolution, mean, std: the size of the student's images, and those by which they are normalised.
        note: function that takes a line on what is not known of it and therefore assumed.

    Raises:
        UsageError: there is no such network, it has no weights, or it tells other classes apart.
    """
    found = _loaded(named, tuple(classes), device, _changed(named))
    if found.classes and found.classes != tuple(classes):
        raise _of_other_classes(named, len(found.classes), found.classes, classes)
    assumed = []
    shown = found.shown
    if shown is None:
        shown = _Shown(found.own_size or resolution, tuple(mean), tuple(std))
        size = f"{shown.resolution}x{shown.resolution}"
        assumed.append(
            f"for which images it was trained, and it is shown the study's, at {size}, normalised as the study's are"
        )
    if not found.classes:
        assumed.append(f"how its {len(classes)} classes are named, and they are taken to be the study's in their order")
    if assumed:
        note(f"--teacher {named}: it is not known {'; nor '.join(assumed)}")
    return Teacher(found.module, shown.mean, shown.std, shown.resolution, mean, std, device, found.judged)


def require_knowledge(
    named: str, teacher: Teacher, data: ImageData, reached: float, device: torch.device, note: Note
) -> None:  # fmt: skip
    """Say how accurate a teacher is on the validation images, and refuse one that knows nothing of them.

    Chance is the accuracy that answers have which are as frequent as the teacher's, but have nothing to do with the
    images (Cohen, *A coefficient of agreement for nominal scales*, 1960).

    Args:
        named: the teacher, as `resolved` named it.
        data: the student's images.
        reached: accuracy that the student is known to reach.
        note: function that takes the line.

    Raises:
        UsageError: its accuracy is no better than chance.
    """
    if data.fingerprint not in teacher.judged:
        teacher.judged[data.fingerprint] = _judged(teacher, Batches(data, device), len(data.classes))
    right, chance = teacher.judged[data.fingerprint]
    count = len(data.val_labels)
    accuracy, interval = right / count, stats.binomtest(right, count).proportion_ci(method="wilson")
    found = f"{accuracy:.1%} ({interval.low:.1%} to {interval.high:.1%}) of {count:,} validation images"
    least = chance + BETTER * math.sqrt(chance * (1 - chance) / count)
    # A few images do not show that a network is better than chance, even if it knows them all.
    if accuracy <= chance or (accuracy < 1 and accuracy <= least):
        raise UsageError(
            f"--teacher {named}: is right on {found}, which is no better than chance ({chance:.1%}); nothing is to be "
            "learned from it"
        )
    size = teacher.resolution
    note(f"teacher {named}: is right on {found}, which it is shown at {size}x{size}; chance is {chance:.1%}")
    if accuracy < reached:
        note(
            f"warning: --teacher {named}: {accuracy:.1%} is less than the {reached:.1%} that the student reached in "
            "the search's short training; it will rather keep it back"
        )


@torch.inference_mode()
def _judged(teacher: Teacher, batches: Batches, classes: int) -> tuple[int, float]:
    """The number of validation images on which a teacher is right, and the accuracy that would be chance."""
    device = batches.device
    answered, labelled = torch.zeros(classes), torch.zeros(classes)
    right = 0
    for images, labels in batches.validation():
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            answers = teacher(images).argmax(1)
        right += int((answers == labels).sum())
        answered += torch.bincount(answers.cpu(), minlength=classes)
        labelled += torch.bincount(labels.cpu(), minlength=classes)
    return right, float(answered @ labelled) / float(labelled.sum()) ** 2


# -- Loading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shown:
    """The images that a network is shown: their size in pixels, and the mean and deviation that normalise them."""

    resolution: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, told: Any) -> _Shown:
        """What timm's configurations call `input_size`, `mean` and `std`."""
        return cls(int(told["input_size"][-1]), tuple(told["mean"]), tuple(told["std"]))


@dataclass(eq=False)
class _Loaded:
    """A trained network.

    Args:
        shown: the images for which it was trained; None where that is not known.
        classes: names of what it tells apart; empty where they are not known.
        own_size: the only size of its images, in pixels; None where it takes any.
        judged: what `_judged` found, by the fingerprint of the images.
    """

    module: nn.Module
    shown: _Shown | None
    classes: tuple[str, ...]
    own_size: int | None = None
    judged: dict[str, tuple[int, float]] = field(default_factory=dict)


def _changed(named: str) -> float:
    """When the file of a teacher was written, so that another one is not taken for it."""
    path = Path(named) / CONFIG if Path(named).is_dir() else Path(named.partition("=")[2]).expanduser()
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def forget() -> None:
    """Free the memory of the teacher that was loaded last."""
    _loaded.cache_clear()


@functools.lru_cache(maxsize=1)
def _loaded(named: str, classes: tuple[str, ...], device: torch.device, changed: float) -> _Loaded:
    """The network that `resolved` named, which tells as many classes apart as there are.

    Args:
        changed: what `_changed` returns.

    Raises:
        UsageError: see `teacher_of`.
    """
    path = Path(named)
    if not path.is_dir():
        return _timms(named, classes)
    network = read(path)
    if not _is_trained(network):
        raise UsageError(f"--teacher {named}: is not trained to the end; train it first")
    if network.num_classes != len(classes):
        raise _of_other_classes(named, network.num_classes, network.classes, classes)
    return _Loaded(network.build(), _Shown.of(network.config["pretrained_cfg"]), tuple(network.classes))


def _of_other_classes(named: str, count: int, theirs: Sequence[str], own: Sequence[str]) -> UsageError:
    """The refusal of a teacher of other classes.

    Args:
        count, theirs: number and names of its classes; no names where they are not known.
        own: names of the student's classes.
    """
    if count == len(own) == len(theirs):
        differing = [(one, other) for one, other in zip(theirs, own, strict=True) if one != other]
        told, wanted = zip(*differing, strict=True)
        return UsageError(
            f"--teacher {named}: tells other classes apart, {_listed(told)} where the images have {_listed(wanted)}"
        )
    known = f" ({_listed(theirs)})" if theirs else ""
    return UsageError(
        f"--teacher {named}: tells {count:,} classes apart{known}, and the images have {len(own):,} ({_listed(own)})"
    )


def _listed(names: Sequence[str]) -> str:
    """The first of some names of classes."""
    shown = [UNPRINTABLE.sub("?", name) for name in names[:NAMED]]
    return ", ".join(shown) + (", ..." if len(names) > NAMED else "")


def _timms(named: str, classes: Sequence[str]) -> _Loaded:
    """A model of timm's with weights.

    Raises:
        UsageError: there is none, or it tells other classes apart.
    """
    import timm

    name, _, file = named.partition("=")
    try:
        if file:
            return _from_file(named, name, Path(file).expanduser(), classes)
        module: Any = timm.create_model(name, pretrained=True)
        if (count := int(getattr(module, "num_classes", 0))) != len(classes):
            raise _of_other_classes(named, count, (), classes)
        return _Loaded(module, _Shown.of(module.pretrained_cfg), tuple(module.pretrained_cfg.get("label_names") or ()))
    except UsageError:
        raise
    except Exception as error:  # timm, the hub and damaged files raise anything
        way = "NAME=FILE names a model and its weights"
        if file and name.startswith(f"{ARCHITECTURE}_"):
            way = "for an exported network name its directory, which `export DIRECTORY --checkpoint FILE` gives weights"
        raise UsageError(
            f"--teacher {named}: is no trained directory, and timm has no weights of that name here "
            f"({message_line(error)}); {way}"
        ) from error


def _from_file(named: str, name: str, path: Path, classes: Sequence[str]) -> _Loaded:
    """A model of timm's with the weights of a file.

    How it was trained is told by the arguments that timm's train.py writes into its checkpoints, or by a config.json in
    timm's format beside the file, as exports and files of the hub have it.

    Raises:
        UsageError: there is no such file, or it tells other classes apart.
    """
    import timm
    from timm.data import resolve_data_config
    from timm.models import load_checkpoint

    if not path.is_file():
        raise UsageError(f"--teacher {named}: no such file")
    arguments, config = _arguments(path), _configuration(path, name)
    options = dict(arguments.get("model_kwargs") or {})
    if arguments.get("gp"):
        options["global_pool"] = arguments["gp"]
    own = {key: value for key, value in config.get("model_args", {}).items() if key not in ("num_classes", "in_chans")}
    module: Any = timm.create_model(name, num_classes=len(classes), **own, **options)
    names = tuple(config.get("label_names") or ())
    if arguments and (folder := trained_on(path)) is not None:
        # It may hold anything by now.
        with contextlib.suppress(UsageError, OSError):
            names = tuple(class_names(folder))
    count = _outputs(path, module)
    if count not in (None, len(classes)):
        raise _of_other_classes(named, count, names if len(names) == count else (), classes)
    load_checkpoint(module, str(path))
    names = names if len(names) == len(classes) else ()
    if arguments:
        return _Loaded(module, _Shown.of(resolve_data_config(arguments, model=module)), names)
    if told := config.get("pretrained_cfg"):
        return _Loaded(module, _Shown.of(told), names)
    usual = module.pretrained_cfg
    return _Loaded(module, None, names, int(usual["input_size"][-1]) if usual.get("fixed_input_size") else None)


def _arguments(path: Path) -> dict[str, Any]:
    """The arguments of timm's train.py in a checkpoint; empty where there are none."""
    try:
        with torch.serialization.safe_globals([Namespace]):
            stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return dict(vars(stored["args"]))
    except Exception:  # a file of something else may hold anything; timm's loader says what is wrong with it
        return {}


def _configuration(path: Path, name: str) -> dict[str, Any]:
    """What config.json beside a file says of a model; empty where there is none, or it is of another one."""
    try:
        config = json.loads((path.parent / CONFIG).read_text(encoding="utf-8-sig"))
        return dict(config) if config["architecture"] == name.partition(".")[0] else {}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def _outputs(path: Path, module: Any) -> int | None:
    """The number of classes that the weights in a file tell apart; None where it is not known."""
    from timm.models import load_state_dict

    try:
        layer = module.pretrained_cfg["classifier"]
        name = layer if isinstance(layer, str) else layer[0]
        return int(load_state_dict(str(path), use_ema=True)[f"{name}.weight"].shape[0])
    except Exception:  # see `_arguments`
        return None
