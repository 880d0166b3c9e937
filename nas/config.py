"""What a search does, as values. Everything but the budget, the time limit, where it is stored, what is kept and how
precisely latencies are measured is part of the study's identity: a study is never continued under another one."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from search_spaces import SearchSpace, load_space

DEFAULT_STORAGE = "sqlite:///studies/convfirst.db"
DEFAULT_STUDY = "convfirst"
DEFAULT_ENGINE = {"cpu": "torchscript", "cuda": "fused"}
DEFAULT_DTYPE = {"cpu": "float32", "cuda": "float16"}
# Share of the median that its confidence interval may be wide.
DEFAULT_PRECISION = {"cpu": 0.05, "cuda": 0.02}
AUTO = "auto"
MAX_THREADS = 1024
MAX_RESOLUTION = 2048  # pixels
MAX_BUDGET = 1_000_000


class Sampler(StrEnum):
    TPE = "tpe"
    NSGA2 = "nsga2"
    RANDOM = "random"


class Dtype(StrEnum):
    AUTO = "auto"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


SAMPLERS = tuple(sampler.value for sampler in Sampler)
DTYPES = tuple(dtype.value for dtype in Dtype)


def default_threads() -> int:
    """CPU threads to train with: all, up to four. On two cores two threads trained 1.1 to 1.6 times as fast as one."""
    return min(4, os.cpu_count() or 1)


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value!r} is not {expected}")


def _require_resolution(resolution: int) -> None:
    _require(8 <= resolution <= MAX_RESOLUTION, "resolution", resolution, f"between 8 and {MAX_RESOLUTION} pixels")


def _require_threads(threads: int) -> None:
    # Torch would start as many as it is told to, and a machine drown in them.
    _require(1 <= threads <= MAX_THREADS, "threads", threads, f"between 1 and {MAX_THREADS}")


@dataclass(frozen=True)
class DataConfig:
    """Where images come from.

    Args:
        source: `digits` (embedded), `cifar10`, `cifar100`, a folder of class subfolders, or a name that
            `timm.data.create_dataset` takes.
        resolution: pixels of the square training and validation images.
        data_dir: where CIFAR's and timm's files are.
        download: let torchvision or timm download them.
        to_rgb: convert a folder's images that are not RGB (ImageNet has some) instead of refusing them.
    """

    source: str = "digits"
    resolution: int = 32
    data_dir: str = "data"
    download: bool = False
    to_rgb: bool = False

    def __post_init__(self) -> None:
        _require_resolution(self.resolution)


@dataclass(frozen=True)
class ProxyConfig:
    """The short training: AdamW, linear warm-up, cosine to zero, label smoothing.

    Args:
        steps, batch_size: the schedule; 200 x 32 beat fewer steps of a larger batch at equal CPU time.
        learning_rate: its peak.
        warmup: share of the steps spent warming up.
        threads: CPU threads that train (they change the rounding, so they are part of the identity).
        deterministic: deterministic algorithms on CUDA too; `nas.training.determinism` measures what they cost.
    """

    steps: int = 200
    batch_size: int = 32
    learning_rate: float = 8e-3
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.98)
    warmup: float = 0.2
    label_smoothing: float = 0.1
    threads: int = field(default_factory=default_threads)
    deterministic: bool = False

    def __post_init__(self) -> None:
        _require(self.steps >= 1, "steps", self.steps, "at least 1")
        # One image leaves batch norm nothing to normalise over once the map is a single pixel.
        _require(self.batch_size >= 2, "batch_size", self.batch_size, "at least 2")
        _require(0 < self.learning_rate < math.inf, "learning_rate", self.learning_rate, "positive and finite")
        _require_threads(self.threads)
        object.__setattr__(self, "betas", tuple(self.betas))


@dataclass(frozen=True)
class LatencyConfig:
    """The deployment whose latency is measured, which may differ from the training's set-up.

    Args:
        device: `cpu`, `cuda` or `cuda:N`; it trains, too. `auto` becomes `cuda` where there is a CUDA device.
        engine: what runs the network; see `nas.latency.engines.ENGINES`. `auto` becomes `DEFAULT_ENGINE`'s.
        dtype: of weights and activations. `auto` becomes `DEFAULT_DTYPE`'s.
        batch_size, resolution, num_classes: of the deployed network.
        threads: CPU threads; one by default, so that a figure does not depend on how many cores happen to be free.
        precision: sampling ends when the 95 % confidence interval of the median is no wider than this share of it.
            None becomes `DEFAULT_PRECISION`'s.
        seconds: or when it has lasted so long, which the measurement then says of itself.
    """

    device: str = AUTO
    engine: str = AUTO
    dtype: str = AUTO
    batch_size: int = 1
    resolution: int = 32
    num_classes: int = 10
    threads: int = 1
    precision: float | None = None
    seconds: float = 3.0

    def __post_init__(self) -> None:
        if self.device == AUTO:
            import torch

            object.__setattr__(self, "device", "cuda" if torch.cuda.is_available() else "cpu")
        kind = self.device.partition(":")[0]
        if self.engine == AUTO:
            object.__setattr__(self, "engine", DEFAULT_ENGINE.get(kind, "eager"))
        if self.dtype == AUTO:
            object.__setattr__(self, "dtype", DEFAULT_DTYPE.get(kind, "float32"))
        if self.precision is None:
            object.__setattr__(self, "precision", DEFAULT_PRECISION.get(kind, 0.05))
        _require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        _require_resolution(self.resolution)
        _require(self.num_classes >= 1, "num_classes", self.num_classes, "at least 1")
        _require_threads(self.threads)
        assert self.precision is not None
        _require(0 < self.precision < 1, "precision", self.precision, "a share between 0 and 1")
        _require(self.seconds > 0, "seconds", self.seconds, "positive")


def moved(base: LatencyConfig, **changes: Any) -> LatencyConfig:
    """A deployment with some fields changed; what suits one kind of device is not carried over to another."""
    kind = changes.get("device", base.device).partition(":")[0]
    if kind != base.device.partition(":")[0]:
        changes = {"engine": AUTO, "dtype": AUTO, "precision": None, **changes}
    return dataclasses.replace(base, **changes)


@dataclass(frozen=True)
class Limits:
    """Hard limits on a candidate; one over any of them is not trained. None is no limit."""

    latency_ms: float | None = None
    params: int | None = None
    macs: int | None = None
    memory_mb: float | None = None

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            _require(value is None or value > 0, name, value, "positive")

    def excess(self, **measured: float) -> dict[str, float]:
        """Limit name -> measured / limit - 1 for each measured quantity that has a limit; above 0 is a violation."""
        limits = dataclasses.asdict(self)
        return {name: value / limits[name] - 1 for name, value in measured.items() if limits[name] is not None}


@dataclass(frozen=True)
class SearchConfig:
    """A whole search: `nas.search.run(SearchConfig(budget=200))` is what `python run_search.py --budget 200` does.

    Args:
        budget: distinct architectures fully evaluated in the study when it is done, earlier runs counted in.
        time_limit_s: end earlier, as cleanly; None is no limit.
        storage: any SQLAlchemy URL.
        study: name of the study in that database.
        block_table: measure the blocks of every candidate alone, and not only those of the front at the end.
        keep_weights: keep the proxy-trained weights of the front's members.

    Raises:
        ValueError: naming the field and its value.
    """

    budget: int = 200
    time_limit_s: float | None = None
    storage: str = DEFAULT_STORAGE
    study: str = DEFAULT_STUDY
    space: SearchSpace = field(default_factory=lambda: load_space("small"))
    data: DataConfig = field(default_factory=DataConfig)
    proxy: ProxyConfig = field(default_factory=ProxyConfig)
    latency: LatencyConfig = field(default_factory=LatencyConfig)
    limits: Limits = field(default_factory=Limits)
    sampler: str = "tpe"
    seed: int = 0
    block_table: bool = False
    keep_weights: bool = False

    def __post_init__(self) -> None:
        _require(1 <= self.budget <= MAX_BUDGET, "budget", self.budget, f"between 1 and {MAX_BUDGET:,}")
        _require(self.time_limit_s is None or self.time_limit_s > 0, "time_limit", self.time_limit_s, "positive")
        _require(self.sampler in SAMPLERS, "sampler", self.sampler, f"one of {', '.join(SAMPLERS)}")
        _require(bool(self.study), "study", self.study, "a name")
        _require(0 <= self.seed < 2**32, "seed", self.seed, "between 0 and 2^32 - 1")

    def identity(self) -> dict[str, Any]:
        """What a study remembers and a resumed search must equal, as plain JSON values."""
        fields = dataclasses.asdict(self)
        for transient in ("budget", "time_limit_s", "storage", "study", "block_table", "keep_weights"):
            del fields[transient]
        # Where files lie and how they came there does not change what they hold.
        for transient in ("data_dir", "download"):
            del fields["data"][transient]
        # Studies that were begun before there was a choice do not have it.
        if not self.data.to_rgb:
            del fields["data"]["to_rgb"]
        return fields

    @classmethod
    def of_identity(cls, identity: Mapping[str, Any], **transient: Any) -> SearchConfig:
        """The search that a study remembers: the inverse of `identity`, which went through JSON since.

        Args:
            transient: the fields that are no part of the identity (default: those of the class).

        Raises:
            ValueError: a field is missing, unknown or impossible; another version of the program wrote the study.
        """
        known = {name: {**ABSENT.get(name, {}), **value} if isinstance(value, dict) else value
                 for name, value in identity.items()}  # fmt: skip
        parts = {"data": DataConfig, "proxy": ProxyConfig, "latency": LatencyConfig, "limits": Limits}
        made: dict[str, Any] = {name: _of_fields(part, known.pop(name)) for name, part in parts.items()}
        made["space"] = SearchSpace.from_dict(known.pop("space"))
        for name in ("sampler", "seed"):
            made[name] = known.pop(name)
        if known:
            raise ValueError(f"{', '.join(known)}: unknown")
        return cls(**made, **transient)


# What studies mean by fields that they do not have, as they were begun before there was a choice.
ABSENT: dict[str, dict[str, Any]] = {"data": {"to_rgb": False}, "latency": {"precision": None, "seconds": 3.0}}


def _of_fields(part: type[Any], stored: Mapping[str, Any]) -> Any:
    """A value of stored fields. All that are stored have to be there: a default may have changed since."""
    unstored = {"data_dir", "download"}
    wanted = {each.name for each in dataclasses.fields(part)} - unstored
    if differing := wanted ^ set(stored):
        raise ValueError(f"{', '.join(sorted(differing))}: unknown or missing")
    return part(**stored)
