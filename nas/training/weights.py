"""Weights that a search keeps of its candidates (`--keep-weights`), each in a safetensors file beside the database."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors
from safetensors.torch import save
from torch import Tensor, nn

from nas.errors import UsageError, unreadable
from nas.files import whole
from nas.training.data import ImageData
from studies.display import artifact_folder

# A running search also keeps the weights of candidates that no other beats at less than this share of their latency:
# these may join the front when it is measured again at the end.
NEAR_FRONT = 0.8
# The preparation of images for which weights were kept before it was recorded.
UNRECORDED = "it was not recorded what was done to the images"


@dataclass(frozen=True)
class Images:
    """The images that weights were trained for.

    Args:
        classes: name of each output.
        resolution: width and height of the images, in pixels.
        mean, std: mean and deviation of each channel, (3,) each, in 0..1, by which the training normalised the images.
        preparation: see `nas.training.data.ImageData`.
    """

    classes: tuple[str, ...]
    resolution: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    preparation: tuple[str, ...] = ()

    @classmethod
    def of(cls, data: ImageData) -> Images:
        mean, std = (tuple(float(value) for value in each) for each in data.mean_std)
        return cls(data.classes, data.train_images.shape[-1], mean, std, data.preparation)

    @classmethod
    def from_json(cls, text: str) -> Images:
        fields = json.loads(text)
        return cls(
            tuple(fields["classes"]), int(fields["resolution"]), tuple(fields["mean"]), tuple(fields["std"]),
            tuple(fields.get("preparation", [UNRECORDED])),
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Trained:
    """A network's weights after its training, in main memory.

    Args:
        accuracy: accuracy of these weights on the validation images; None where it was not recorded.
    """

    weights: dict[str, Tensor]
    images: Images
    accuracy: float | None = None

    @classmethod
    def of(cls, network: nn.Module, images: Images) -> Trained:
        # safetensors refuses tensors that are not contiguous, as channels_last tensors are not.
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
        return cls(weights, images)


def weight_folder(url: str) -> Path:
    """The folder of the weights of a database's candidates."""
    return artifact_folder(url).with_suffix(".weights")


def require_finite(weights: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights whose training diverged.

    Args:
        where: the file that holds them, for the message.

    Raises:
        UsageError: a weight is NaN or infinite.
    """
    for name, tensor in weights.items():
        # Torch has no `isfinite` for some of the types of 8 bits.
        if not tensor.float().isfinite().all():
            raise UsageError(f"{where}: its tensor {name} has NaN or infinite values; its training diverged")


class Weights:
    """The kept weights of one study's candidates.

    Args:
        folder: folder of the files, which is made when the first is written.
    """

    def __init__(self, folder: Path, study_id: int) -> None:
        self.folder, self.study_id = folder, study_id

    def keep_better(self, number: int, arch_id: str, accuracy: float, trained: Trained) -> None:
        """Write a candidate's weights into a file, unless it holds weights of a greater accuracy."""
        path = self._path(number)
        if self._accuracy(path, arch_id) > accuracy:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"arch_id": arch_id, "images": json.dumps(asdict(trained.images)), "accuracy": repr(accuracy)}
        # `save_file` would make files that no other user may read.
        with whole(path) as part:
            part.write_bytes(save(trained.weights, metadata=metadata))

    def _accuracy(self, path: Path, arch_id: str) -> float:
        """The accuracy of the weights in a file; -1 where there are none of that architecture, or none is recorded."""
        try:
            with safetensors.safe_open(path, "pt") as file:
                metadata = file.metadata()
                return float(metadata["accuracy"]) if metadata["arch_id"] == arch_id else -1.0
        except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError):
            # A damaged file is replaced, too.
            return -1.0

    def find(self, number: int, arch_id: str) -> Trained | None:
        """A candidate's weights; None where they were not kept.

        Args:
            arch_id: id of the candidate's architecture; weights of another one belong to a study that was deleted.

        Raises:
            UsageError: the file is damaged, or a weight is NaN or infinite.
        """
        path = self._path(number)
        try:
            with safetensors.safe_open(path, "pt") as file:
                metadata = file.metadata()
                if metadata["arch_id"] != arch_id:
                    return None
                images = Images.from_json(metadata["images"])
                accuracy = float(metadata["accuracy"]) if "accuracy" in metadata else None
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            return None
        except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{path}: cannot be read ({unreadable(path, error)})") from error
        require_finite(weights, str(path))
        return Trained(weights, images, accuracy)

    def any_kept(self) -> bool:
        """Whether weights of any of the study's candidates are kept."""
        return any(self.folder.glob(f"study{self.study_id}_t*.safetensors"))

    def without(self, members: Iterable[tuple[int, str]]) -> str | None:
        """A line on the networks of a front whose weights are not kept; None where all are.

        Args:
            members: number and architecture's id of each.
        """
        lacking = [f"{number}" for number, arch_id in members if not self._holds(self._path(number), arch_id)]
        if not lacking:
            return None
        trials = f"trial{'s' if len(lacking) > 1 else ''} {', '.join(lacking)}"
        return (
            f"no weights are kept of {trials} of the front: trained without --keep-weights, or while far from the front"
        )

    @staticmethod
    def _holds(path: Path, arch_id: str) -> bool:
        """Whether a file can be read and is of that architecture."""
        try:
            with safetensors.safe_open(path, "pt") as file:
                return bool(file.metadata()["arch_id"] == arch_id)
        except (safetensors.SafetensorError, OSError, KeyError, TypeError):
            return False

    def keep_only(self, numbers: Collection[int]) -> None:
        """Delete the weights of all other candidates."""
        kept = {self._path(number) for number in numbers}
        for path in self.folder.glob(f"study{self.study_id}_t*.safetensors"):
            if path not in kept:
                path.unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"study{self.study_id}_t{number:04d}.safetensors"


def near_front(accuracy: float, latency_ms: float, others: Sequence[tuple[float, float]]) -> bool:
    """Whether a candidate may join the front when the front is measured again.

    Args:
        others: pairs (accuracy, latency_ms) of the other candidates.
    """
    return not any(theirs >= accuracy and ms < NEAR_FRONT * latency_ms for theirs, ms in others)
