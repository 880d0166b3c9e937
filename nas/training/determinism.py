"""What deterministic algorithms cost the proxy training; `nas.lab.determinism` is the command that trains longer.

A search on CUDA prints it when it begins a study, as the choice holds for the whole study. The anchor of the space is
trained with and without them in turns, on random images, in a process of its own: cuBLAS reads its setting before its
first product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median

import torch

from nas.child_process import ChildProcess
from nas.config import ProxyConfig
from nas.errors import CandidateFailed, memory_may_run_out
from nas.training import proxy
from nas.training.data import ImageData
from search_spaces import ArchSpec

# Of each training, and trainings of either kind, when a search begins: some seconds in all.
STEPS = 40
ROUNDS = 3
WARM_UP_STEPS = 10
LEARNING_RATE = 1e-3
CLASSES = 10
# Drawn with repetition, so that a batch may be larger.
TRAIN_IMAGES, VAL_IMAGES = 64, 32


@dataclass(frozen=True)
class Determinism:
    """Equal trainings with and without deterministic algorithms.

    Args:
        default_seconds, deterministic_seconds: of a training, the median.
        default_losses, deterministic_losses: how many different losses the equal trainings of either kind ended with.
        steps: of a training.
        rounds: trainings of either kind.
    """

    default_seconds: float
    deterministic_seconds: float
    default_losses: int
    deterministic_losses: int
    steps: int
    rounds: int

    @property
    def ratio(self) -> float:
        """How many times as long a training takes with deterministic algorithms."""
        return self.deterministic_seconds / self.default_seconds

    def __str__(self) -> str:
        return (
            f"with --deterministic training takes {self.ratio:.2f} times as long here; equal trainings gave "
            f"{_losses(self.deterministic_losses)} with it, {_losses(self.default_losses)} without "
            f"(the anchor, {self.steps} steps, {self.rounds} of either kind in turns)"
        )


def _losses(count: int) -> str:
    return "the same loss" if count == 1 else f"{count} different losses"


def measure_apart(arch: ArchSpec, config: ProxyConfig, device: str, resolution: int) -> Determinism:
    """As `measure`, in a process of its own, which leaves nothing behind in this one and on the device."""
    # At any rate a step takes as long; the user's may diverge on images that show nothing.
    config = replace(config, steps=min(config.steps, STEPS), learning_rate=LEARNING_RATE)
    with ChildProcess() as child:
        return child.call(measure, arch, config, device, resolution, ROUNDS)


def measure(arch: ArchSpec, config: ProxyConfig, device: str, resolution: int, rounds: int) -> Determinism:
    """Train `arch` with and without deterministic algorithms, in turns, from the same seed.

    Args:
        config: says steps, batch and threads.
        device: as torch names it; this process must not have multiplied matrices there before.
        resolution: of the images, in pixels.
        rounds: trainings of either kind.

    Raises:
        CandidateFailed: an operation has no deterministic algorithm there, or memory runs out.
    """
    proxy.prepare_determinism()
    torch.set_num_threads(config.threads)
    batches = proxy.Batches(_random_images(resolution), torch.device(device))
    kinds = {kind: replace(config, deterministic=kind) for kind in (False, True)}
    for each in kinds.values():
        _train(arch, batches, replace(each, steps=min(config.steps, WARM_UP_STEPS)))
    results: dict[bool, list[proxy.ProxyResult]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, each in kinds.items():
            results[kind].append(_train(arch, batches, each))
    seconds = {kind: median(result.seconds for result in found) for kind, found in results.items()}
    losses = {kind: len({result.loss for result in found}) for kind, found in results.items()}
    return Determinism(seconds[False], seconds[True], losses[False], losses[True], config.steps, rounds)


def _random_images(resolution: int) -> ImageData:
    """What they show changes neither the time of a step nor whether it can be repeated."""
    rng = torch.Generator().manual_seed(0)

    def draw(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (count, 3, resolution, resolution)
        labels = torch.randint(CLASSES, (count,), generator=rng)
        return torch.randint(256, shape, generator=rng, dtype=torch.uint8), labels

    return ImageData(*draw(TRAIN_IMAGES), *draw(VAL_IMAGES), classes=tuple("0123456789"), flip=False)


def _train(arch: ArchSpec, batches: proxy.Batches, config: ProxyConfig) -> proxy.ProxyResult:
    """One training from the same seed as all others."""
    torch.manual_seed(0)
    try:
        with memory_may_run_out():
            return proxy.train(arch.build(num_classes=CLASSES), batches, config, seed=0)
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise CandidateFailed(str(error).splitlines()[0]) from error
