"""The configuration of a search, as values.

A study stores what its figures depend on, and every later run must equal it; `Keep` in `nas.options` says for each
option whether it is stored.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from typing import Any

from nas.options import (
    FINITE,
    NAME,
    POSITIVE,
    SHARE,
    Checked,
    Keep,
    at_least,
    between,
    listed,
    one_of,
    option,
    options,
    parts,
)
from search_spaces import SearchSpace, load_space

DEFAULT_STORAGE = "sqlite:///studies/convfirst.db"
DEFAULT_STUDY = "convfirst"
DEFAULT_ENGINE = {"cpu": "onnxruntime", "cuda": "fused"}
# Engines that are packages of their own, whose versions are part of a latency's identity as torch's is.
RUNTIME_ENGINES = ("onnxruntime", "openvino")
# Other names of engines.
ENGINE_ALIASES = {"compile": "inductor"}
DEFAULT_DTYPE = {"cpu": "float32", "cuda": "float16"}
# Share of the median that its confidence interval may be wide.
DEFAULT_PRECISION = {"cpu": 0.05, "cuda": 0.02}
AUTO = "auto"
MAX_THREADS = 1024
MAX_RESOLUTION = 2048  # pixels
MAX_WORKERS = 1024
MAX_BUDGET = 1_000_000
# Trainings that confirm a front, as a share of the search's, and of each network at most.
USUAL_CONFIRM, MAX_CONFIRM, MOST_TRAININGS = 0.2, 10, 12
# The least budget for which a pilot chooses what the user leaves open of the schedule.
PILOT_BUDGET = 20
PILOT = ("steps", "batch_size", "learning_rate")
# Data sets that have a name of their own; a name with one of timm's prefixes is that of a data set of timm, which takes
# one without a prefix for a folder of images below --data-dir.
NAMED_DATA = ("digits", "cifar10", "cifar100")
TIMM_PREFIXES = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")
# Data sets of digits: a mirrored 2 is not a 2.
NEVER_MIRRORED = ("mnist", "svhn")
# The way in which image folders are read today; see `DataConfig`.
READING = 2


class Sampler(StrEnum):
    MODEL = "model"
    TPE = "tpe"
    NSGA2 = "nsga2"
    RANDOM = "random"


class Dtype(StrEnum):
    AUTO = "auto"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


def _by_device(defaults: dict[str, Any]) -> str:
    """The defaults of each kind of device, in words."""
    return ", ".join(f"{value} on {kind}" for kind, value in defaults.items())


def _unless_auto(typed: str) -> str | None:
    """What was typed; None for `auto`, which leaves the choice to the study or to the device."""
    return None if typed == AUTO else str(typed)


def named_space(typed: str) -> SearchSpace | str:
    """The space that was typed; `auto` itself, which stands for one that is chosen when a study begins.

    Raises:
        ValueError: there is no such space.
    """
    return AUTO if typed == AUTO else load_space(typed)


def worker_number(typed: str) -> int | None:
    """The number of workers that was typed; None for `auto`.

    Raises:
        ValueError: it is no whole number.
    """
    try:
        return None if typed == AUTO else int(typed)
    except ValueError as error:
        raise ValueError(f"{typed}: is neither {AUTO} nor a number") from error


PIXELS = between(8, MAX_RESOLUTION, "pixels")
# Torch would start as many as it is told to, and a machine drown in them.
THREADS = between(1, MAX_THREADS)

DATA = "Data and training"
LATENCY = "Latency"


@dataclass(frozen=True)
class DataConfig(Checked):
    """The source and size of the images.

    Args:
        source: `digits` (embedded), `cifar10`, `cifar100`, a folder of class subfolders, or a name that
            `timm.data.create_dataset` takes.
        resolution: width and height of the training and validation images, in pixels, for networks that have no
            resolution of their own.
        data_dir: folder of CIFAR's and timm's files.
        download: whether torchvision or timm may download them.
        to_rgb: whether a folder's images that are not RGB (ImageNet has some) are converted instead of refused.
        mirror: whether training images are mirrored at random; None becomes what suits the source, see `is_mirrored`.
        reading: the way in which files become images and labels. Since 2, classes are numbered in timm's order,
            transparent images are laid on white, EXIF orientations are applied, links are followed, a split is a folder
            of class folders, and images are resized as timm does. Studies that were begun with 1 keep it.
    """

    source: str = option(
        "digits", "--data", "Images: digits (embedded), cifar10, cifar100, a folder with one subfolder per class, or "
        "timm's name of a data set, such as torch/mnist", panel=DATA,
    )  # fmt: skip
    resolution: int = option(
        32, "--resolution", "Width and height of the training images, in pixels", default="the space's", panel=DATA,
        bounds=PIXELS,
    )  # fmt: skip
    data_dir: str = option(
        "data", "--data-dir", "Folder of the files of CIFAR and of timm's data sets", panel=DATA, keep=Keep.TRANSIENT
    )
    download: bool = option(
        False, "--download", "Download the data set of CIFAR or timm", panel=DATA, keep=Keep.TRANSIENT
    )
    to_rgb: bool = option(
        False, "--to-rgb", "Convert images that are not RGB, which are refused otherwise; what is transparent becomes "
        "white", panel=DATA,
    )  # fmt: skip
    mirror: bool | None = option(
        None, "--mirror/--no-mirror",
        "Mirror training images at random, or not: --no-mirror is for classes such as left and right",
        default="mirror, but for digits, MNIST and SVHN", panel=DATA,
    )  # fmt: skip
    reading: int = READING

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mirror is None:
            object.__setattr__(self, "mirror", is_mirrored(self.source))


def is_folder(source: str) -> bool:
    """Whether a source of images is a path, of which the same folder may have several."""
    return source not in NAMED_DATA and not source.lower().startswith(TIMM_PREFIXES)


def is_mirrored(source: str) -> bool:
    """Whether training images of a source are mirrored where nothing is said: all but digits."""
    name = source.lower()
    of_digits = "fashion" not in name and any(word in name for word in NEVER_MIRRORED)
    return source != "digits" and not (of_digits and name.startswith(TIMM_PREFIXES))


@dataclass(frozen=True)
class ProxyConfig(Checked):
    """The short training: AdamW, linear warm-up, cosine to zero, label smoothing.

    Args:
        steps, batch_size: the schedule, if no pilot chooses it; batches of 32 beat fewer steps of a larger batch at
            equal CPU time.
        learning_rate: peak learning rate.
        warmup: share of the steps during which the learning rate rises.
        threads: CPU threads of each training (they change the rounding, so they are part of the identity).
        deterministic: whether algorithms are deterministic on CUDA, too; `nas.training.determinism` measures the cost.
    """

    steps: int = option(
        200, "--proxy-steps", "Training steps per candidate", default="as a pilot finds for a budget of 20 or "
        "more, else 200", panel=DATA, bounds=at_least(1),
    )  # fmt: skip
    # One image leaves batch norm nothing to normalise over once the map is a single pixel.
    batch_size: int = option(
        32, "--proxy-batch", "Images per training step", default="as the pilot finds, else 32", panel=DATA,
        bounds=at_least(2),
    )  # fmt: skip
    learning_rate: float = option(
        8e-3, "--proxy-lr", "Peak learning rate", default="as the pilot finds, else 0.008", panel=DATA, bounds=FINITE
    )
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.98)
    warmup: float = 0.2
    label_smoothing: float = 0.1
    threads: int = option(
        1, "--threads", "CPU threads of each training; more --workers usually gain more", panel=DATA, bounds=THREADS
    )
    deterministic: bool = option(
        False, "--deterministic", "Make trainings on CUDA repeatable; a new study says what that costs", panel=DATA
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "betas", tuple(self.betas))


@dataclass(frozen=True)
class LatencyConfig(Checked):
    """The deployment in which latency is measured; it may differ from the training's set-up.

    Args:
        device: `cpu`, `cuda` or `cuda:N`; candidates are trained on it, too, unless `train_devices` or a Ray cluster
            says otherwise. `auto` becomes `cuda` where there is a CUDA device, else `cpu`.
        engine: name of the engine that runs the network, see `nas.latency.engines.ENGINES`. `auto` becomes the
            device's `DEFAULT_ENGINE`, and an alias the name that it stands for.
        runtime: name and version of the engine's package, such as `onnxruntime 1.32.0`; empty where the engine is
            torch's or ours. None, and a runtime of another engine, become what is installed.
        dtype: data type of weights and activations. `auto` becomes the device's `DEFAULT_DTYPE`.
        batch_size, resolution, num_classes: sizes of the deployed network's input (in pixels) and output; a network
            that has a resolution of its own is measured at that.
        threads: CPU threads; one by default, so that a figure does not depend on how many cores happen to be free.
        precision: share of the median; sampling ends when the median's 95 % confidence interval is no wider. None
            becomes the device's `DEFAULT_PRECISION`.
        seconds: time after which sampling ends anyway; the measurement is then marked as capped.
    """

    device: str = option(
        AUTO, "--device", "Device: auto, cpu, cuda or cuda:N", default="cuda where there is one, else cpu",
        panel=LATENCY, parse=_unless_auto,
    )  # fmt: skip
    engine: str = option(
        AUTO, "--engine", "Engine that runs the deployed network: auto, onnxruntime, openvino, fused, inductor, "
        "eager or torchscript",
        default=_by_device(DEFAULT_ENGINE), panel=LATENCY, parse=_unless_auto,
    )  # fmt: skip
    runtime: str | None = None
    dtype: str = option(
        AUTO, "--dtype", "Data type of weights and activations", default=_by_device(DEFAULT_DTYPE), panel=LATENCY,
        bounds=one_of(Dtype), typed=Dtype, parse=_unless_auto,
    )  # fmt: skip
    batch_size: int = option(1, "--latency-batch", "Images per measured batch", panel=LATENCY, bounds=at_least(1))
    resolution: int = option(
        32, "--latency-resolution", "Width and height of the measured images, in pixels", default="the training's",
        panel=LATENCY, bounds=PIXELS,
    )  # fmt: skip
    num_classes: int = option(
        10, "--latency-classes", "Classes of the deployed network",
        default="the data's if known, else 10; 1000 in the imagenet space", panel=LATENCY, bounds=at_least(1),
    )  # fmt: skip
    threads: int = option(1, "--latency-threads", "CPU threads of a measurement", panel=LATENCY, bounds=THREADS)
    precision: float | None = option(
        None, "--latency-precision",
        "Stop timing when the 95 % confidence interval of the median is at most this share of it",
        default=_by_device(DEFAULT_PRECISION), panel=LATENCY, bounds=SHARE, keep=Keep.STORED,
    )  # fmt: skip
    seconds: float = option(
        3.0, "--latency-seconds", "Time cap per measurement, in seconds", panel=LATENCY, bounds=POSITIVE,
        keep=Keep.STORED,
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.device == AUTO:
            object.__setattr__(self, "device", "cuda" if cuda_or_warning() else "cpu")
        kind = self.device.partition(":")[0]
        if self.engine == AUTO:
            object.__setattr__(self, "engine", DEFAULT_ENGINE.get(kind, "eager"))
        object.__setattr__(self, "engine", ENGINE_ALIASES.get(self.engine, self.engine))
        if not (self.runtime or "").startswith(f"{self.engine} "):
            object.__setattr__(self, "runtime", installed_runtime(self.engine))
        if self.dtype == AUTO:
            object.__setattr__(self, "dtype", DEFAULT_DTYPE.get(kind, "float32"))
        if self.precision is None:
            object.__setattr__(self, "precision", DEFAULT_PRECISION.get(kind, 0.05))
        super().__post_init__()

    @property
    def engine_label(self) -> str:
        """The engine with the version of its package, where it has one: the column `engine` of all tables and views."""
        return self.runtime or self.engine


def cuda_or_warning() -> bool:
    """Whether there is a CUDA device. Where a GPU is there that cannot be used, a warning says why, for whatever takes
    the CPU instead would take it without a word."""
    import torch

    if torch.cuda.is_available():
        return True
    from kernels.diagnosis import unused_gpu

    if reason := unused_gpu():
        warnings.warn(f"the CPU is used and the GPU is not: {reason}", stacklevel=2)
    return False


def installed_runtime(engine: str) -> str:
    """Name and version of an engine's package; empty where the engine has none, or none is installed."""
    if engine not in RUNTIME_ENGINES:
        return ""
    try:
        return f"{engine} {version(engine)}"
    except PackageNotFoundError:
        # The module may come from another distribution, such as onnxruntime-gpu.
        names = packages_distributions().get(engine, ())
        return f"{engine} {version(names[0])}" if names else ""


def moved(base: LatencyConfig | None, **changes: Any) -> LatencyConfig:
    """A deployment with some fields changed; what suits one kind of device is not carried over to another.

    Args:
        base: the deployment that has the other fields (default: `LatencyConfig()`).

    Raises:
        FieldError: a field has a value that it cannot have.
    """
    if base is None:
        return LatencyConfig(**changes)
    kind = changes.get("device", base.device).partition(":")[0]
    if kind != base.device.partition(":")[0]:
        changes = {"engine": AUTO, "dtype": AUTO, "precision": None, **changes}
    return replace(base, **changes)


@dataclass(frozen=True)
class Limits(Checked):
    """Hard limits on a candidate; a candidate over any of them is not trained. None means no limit."""

    latency_ms: float | None = option(
        None, "--max-latency-ms", "Upper limit on a batch's latency in ms; slower candidates are not trained",
        panel="Limits", bounds=FINITE,
    )  # fmt: skip
    params: int | None = option(None, "--max-params", "Upper limit on the parameters", panel="Limits", bounds=POSITIVE)
    macs: int | None = option(
        None, "--max-macs", "Upper limit on the multiply-accumulates of one image", panel="Limits", bounds=POSITIVE
    )
    memory_mb: float | None = option(
        None, "--max-memory-mb", "Upper limit on the MB of inference: weights and peak workspace", panel="Limits",
        bounds=POSITIVE,
    )  # fmt: skip

    def excess(self, **measured: float) -> dict[str, float]:
        """Limit name -> measured / limit - 1 for each measured quantity that has a limit; above 0 is a violation."""
        limits = dataclasses.asdict(self)
        return {name: value / limits[name] - 1 for name, value in measured.items() if limits[name] is not None}

    def broken(self, **measured: float) -> str | None:
        """Which limits the measured quantities break, and by how much, in words; None where there is none."""
        limits = dataclasses.asdict(self)
        broken = [name for name, excess in self.excess(**measured).items() if excess > 0]
        return "; ".join(limit_words(name, measured[name], limits[name]) for name in broken) or None


def limit_words(name: str, value: float, limit: float) -> str:
    """A value over a limit, such as `latency 0.621 ms, limit 0.6 ms`, with digits enough that the two differ.

    Args:
        name: the limit's field of `Limits`.
    """
    what, unit = {"latency_ms": ("latency", " ms"), "memory_mb": ("memory", " MB"), "params": ("parameters", ""),
                  "macs": ("MACs", "")}[name]  # fmt: skip
    if not unit:
        return f"{what} {value:,.0f}, limit {limit:,.0f}"
    # Three digits, or as many as it takes.
    least = max(0, 2 - math.floor(math.log10(value)))
    texts = (f"{value:.{digits}f}" for digits in range(least, least + 9))
    shown = next((text for text in texts if float(text) > limit), repr(value))
    return f"{what} {shown}{unit}, limit {limit:g}{unit}"


@dataclass(frozen=True)
class SearchConfig(Checked):
    """A whole search: `nas.search.loop.run(SearchConfig(budget=200, pilot=PILOT))` does what
    `python run_search.py --budget 200` does.

    Args:
        budget: number of distinct architectures that were timed and trained in the study at the end, earlier runs and
            trainings that were given up included.
        time_limit_s: seconds after which the search ends as if the budget were met, with the time in which the front
            is confirmed; None means no limit.
        confirm: trainings with other seeds that confirm the front, as a share of those of the search, but one for each
            likely member at least; 0 means none.
        storage: SQLAlchemy URL of the study database.
        study: name of the study in that database.
        block_table: whether the blocks of every candidate are measured alone, not only those of the front at the end.
        keep_weights: whether the proxy-trained weights of the front's members are kept.
        workers: number of trainings at once; None stands for the greatest that pays. Candidates are proposed in rounds
            of twice as many, so the proposals of a seed depend on it.
        pilot: names of the fields of `proxy` that a pilot chooses when a study begins with a budget of 20 or more; none
            leaves the schedule as it is. On the command line all are chosen that are not given, unless `--proxy-steps`
            is.
        train_devices: names of the devices that train; None stands for the latency's device, and for all CUDA devices
            where that is one.
        ray: whether a Ray cluster is started on this machine, on which candidates are trained and timed.
        ray_address: address of a Ray cluster that is up, on which they are instead.

    Raises:
        FieldError: a field has a value that it cannot have.
    """

    budget: int = option(
        200, "--budget", "Distinct architectures that the study holds at the end, trained and timed", panel="Search",
        bounds=between(1, MAX_BUDGET), keep=Keep.TRANSIENT,
    )  # fmt: skip
    time_limit_s: float | None = option(
        None, "--time-limit", "Time limit in seconds, including the confirmation of the front", panel="Search",
        bounds=POSITIVE, keep=Keep.TRANSIENT,
    )  # fmt: skip
    confirm: float = option(
        USUAL_CONFIRM, "--confirm", "Trainings with other seeds at the end, as a share of the search's trainings, to "
        "confirm the front's accuracies; 0 for none", panel="Search",
        bounds=between(0, MAX_CONFIRM), keep=Keep.TRANSIENT,
    )  # fmt: skip
    storage: str = option(
        DEFAULT_STORAGE, "--storage", "SQLAlchemy URL of the study database: SQLite or PostgreSQL", panel="Study",
        keep=Keep.TRANSIENT,
    )  # fmt: skip
    study: str = option(
        DEFAULT_STUDY, "--study", "Name of the study in that database", panel="Study", bounds=NAME, keep=Keep.TRANSIENT
    )
    space: SearchSpace = option(
        lambda: load_space("small"), "--space", "Search space: auto (one that fits the latency's limit or the images), "
        "small, imagenet, a rung such as rung5@32, or a TOML file; see the command space",
        default="auto; small for digits without --max-latency-ms", panel="Search", typed=str, parse=named_space,
    )  # fmt: skip
    data: DataConfig = field(default_factory=DataConfig)
    proxy: ProxyConfig = field(default_factory=ProxyConfig)
    latency: LatencyConfig = field(default_factory=LatencyConfig)
    limits: Limits = field(default_factory=Limits)
    sampler: str = option(
        "model", "--sampler", "Method that proposes candidates: a model of accuracy and latency, or Optuna's TPE, "
        "NSGA-II or random sampler", panel="Search", bounds=one_of(Sampler), typed=Sampler, parse=str,
    )  # fmt: skip
    early_stopping: bool = option(
        True, "--early-stopping/--no-early-stopping", "End a training early if its network will probably not "
        "reach the front, or train all to the end", default="end early", panel="Search",
    )  # fmt: skip
    seed: int = option(0, "--seed", "Seed of the proposals and trainings", panel="Search", bounds=between(0, 2**32 - 1))
    block_table: bool = option(
        False, "--block-table", "Also time each block of every candidate alone, not only of the front's networks",
        panel=LATENCY, keep=Keep.TRANSIENT,
    )  # fmt: skip
    keep_weights: bool = option(
        False, "--keep-weights", "Keep the trained weights of the front's networks, for export", panel="Study",
        keep=Keep.TRANSIENT,
    )  # fmt: skip

    workers: int | None = option(
        None, "--workers", "Number of trainings at once, or auto: as many as cores, memory and timing allow",
        default=AUTO, panel="Search", bounds=between(1, MAX_WORKERS), typed=str, parse=worker_number,
        keep=Keep.TRANSIENT,
    )  # fmt: skip
    pilot: tuple[str, ...] = ()
    train_devices: tuple[str, ...] | None = option(
        None, "--train-devices", "Comma-separated devices that train; if --device is not among them, the next "
        "candidates are timed there meanwhile",
        default="--device, and all CUDA devices if that is one", panel="Search", typed=str, parse=listed("devices"),
        keep=Keep.TRANSIENT,
    )  # fmt: skip
    ray: bool = option(
        False, "--ray", "Start a Ray cluster on this machine, and train and time there", panel="Search",
        keep=Keep.TRANSIENT,
    )  # fmt: skip
    ray_address: str | None = option(
        None, "--ray-address", "HOST:PORT of a Ray cluster that is up, or auto for that of this machine: train and "
        "time there", panel="Search", keep=Keep.TRANSIENT,
    )  # fmt: skip

    @property
    def resolutions(self) -> tuple[int, ...]:
        """All resolutions at which images are needed for training, in pixels."""
        return self.space.own_resolutions or (self.data.resolution,)

    def identity(self) -> dict[str, Any]:
        """The configuration that a study stores and that every later run must equal, as plain JSON values."""
        fields = dataclasses.asdict(self)
        for name in (*_transient(type(self)), "pilot"):
            del fields[name]
        fields["space"] = self.space.to_dict()
        # Where files lie and how they came there does not change what they hold.
        for name in _transient(DataConfig):
            del fields["data"][name]
        if not self.latency.runtime:
            del fields["latency"]["runtime"]
        # Studies that were begun before there was a choice do not have it.
        if not self.data.to_rgb:
            del fields["data"]["to_rgb"]
        if not self.early_stopping:
            del fields["early_stopping"]
        if self.data.reading == 1:
            del fields["data"]["reading"]
            if self.data.mirror == is_mirrored(self.data.source):
                del fields["data"]["mirror"]
        return fields

    @classmethod
    def of_identity(cls, identity: Mapping[str, Any], **transient: Any) -> SearchConfig:
        """The search that a study stores: the inverse of `identity`, also after a round trip through JSON.

        Args:
            transient: values of fields that are no part of the identity (default: those of the class).

        Raises:
            ValueError: a field is missing, unknown or impossible; another version of the program wrote the study.
        """
        known = dict(identity)
        made = {
            name: _of_fields(part, {**ABSENT.get(name, {}), **known.pop(name)}) for name, part in parts(cls).items()
        }
        made["space"] = SearchSpace.from_dict(known.pop("space"))
        made |= {name: known.pop(name) for name in ("sampler", "seed")}
        made["early_stopping"] = known.pop("early_stopping", False)
        if known:
            raise ValueError(f"{', '.join(known)}: unknown")
        return cls(**made, **transient)


def _transient(owner: type[Any]) -> set[str]:
    """Names of the fields that a study does not store."""
    return {name for name, each in options(owner).items() if each.keep is Keep.TRANSIENT}


# What studies mean by fields that they do not have, because they were begun before there was a choice.
ABSENT: dict[str, dict[str, Any]] = {
    "data": {"to_rgb": False, "mirror": None, "reading": 1},
    "latency": {"precision": None, "seconds": 3.0, "runtime": ""},
}


def respelled(config: SearchConfig, stored: SearchConfig) -> SearchConfig:
    """A configuration in the spelling of a stored one, where another spelling may mean the same.

    Of two folders nobody knows whether they hold the same images until these are loaded: then their fingerprint tells.
    """
    # A reading is no choice of the user's: a study goes on with its own.
    data, latency = replace(config.data, reading=stored.data.reading), config.latency
    if is_folder(data.source) and is_folder(stored.data.source):
        data = replace(data, source=stored.data.source)
    if _indexed(latency.device) == _indexed(stored.latency.device):
        latency = replace(latency, device=stored.latency.device)
    # What a pilot is to choose was chosen when the study began.
    proxy = replace(config.proxy, **{name: getattr(stored.proxy, name) for name in config.pilot})
    return replace(config, data=data, latency=latency, proxy=proxy)


def _indexed(device: str) -> str:
    return "cuda:0" if device == "cuda" else device


def _of_fields(part: type[Any], stored: Mapping[str, Any]) -> Any:
    """A value made from stored fields, all of which must be there, as a default may have changed since.

    Raises:
        ValueError: a field is missing, unknown or impossible.
    """
    wanted = {each.name for each in dataclasses.fields(part)} - _transient(part)
    if differing := wanted ^ set(stored):
        raise ValueError(f"{', '.join(sorted(differing))}: unknown or missing")
    return part(**stored)
