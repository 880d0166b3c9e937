"""The cost of deterministic algorithms in the proxy training; the command `nas.lab.determinism` trains for longer.

A search on CUDA that asks for these algorithms prints this cost when it begins a study, because the choice cannot be
changed later. The anchor of the space is trained with and without them in turns, on random images, in a process of its
own: cuBLAS has to be set up before its first product.
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

# Number of steps of each training, and of trainings of each kind, when a search begins: some seconds in all.
STEPS = 40
ROUNDS = 3
WARM_UP_STEPS = 10
LEARNING_RATE = 1e-3
CLASSES = 10
# Batches are drawn with repetition, so that a batch may be larger than the set.
TRAIN_IMAGES, VAL_IMAGES = 64, 32


@dataclass(frozen=True)
class Determinism:
    """Equal trainings with and without deterministic algorithms.

    Args:
        default_seconds, deterministic_seconds: median time of the steps of a training of each kind.
        default_losses, deterministic_losses: number of different final losses among the equal trainings of each kind.
        steps: number of steps of each training.
        rounds: number of trainings of each kind.
    """

    default_seconds: float
    deterministic_seconds: float
    default_losses: int
    deterministic_losses: int
    steps: int
    rounds: int

    @property
    def ratio(self) -> float:
        """The time of a training with deterministic algorithms over that of one without."""
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
    """Call `measure` in a process of its own, which leaves nothing behind in this process and on the device."""
    # A step takes the same time at any learning rate, and the user's rate may diverge on random images.
    config = replace(config, steps=min(config.steps, STEPS), learning_rate=LEARNING_RATE)
    with ChildProcess() as child:
        return child.call(measure, arch, config, device, resolution, ROUNDS)


def measure(arch: ArchSpec, config: ProxyConfig, device: str, resolution: int, rounds: int) -> Determinism:
    """Train an architecture with and without deterministic algorithms, in turns, from the same seed.

    Args:
        config: configuration whose steps, batch size and threads are used.
        device: torch's name of the device, on which this process must not have multiplied matrices before.
        resolution: width and height of the images, in pixels.
        rounds: number of trainings of each kind.

    Raises:
        CandidateFailed: an operation has no deterministic algorithm there, or memory runs out.
    """
    proxy.prepare_determinism()
    torch.set_num_threads(config.threads)
    batches = proxy.Batches(random_images(resolution), torch.device(device))
    kinds = {kind: replace(config, deterministic=kind) for kind in (False, True)}
    for each in kinds.values():
        _train(arch, batches, replace(each, steps=min(config.steps, WARM_UP_STEPS)))
    results: dict[bool, list[proxy.ProxyResult]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, each in kinds.items():
            results[kind].append(_train(arch, batches, each))
    # A capture takes either kind the same time, and these trainings are short.
    seconds = {kind: config.steps * median(result.step_seconds for result in each) for kind, each in results.items()}
    losses = {kind: len({result.loss for result in each}) for kind, each in results.items()}
    return Determinism(seconds[False], seconds[True], losses[False], losses[True], config.steps, rounds)


def random_images(resolution: int) -> ImageData:
    """Random images: the content changes neither the time of a step nor whether it can be repeated exactly."""
    rng = torch.Generator().manual_seed(0)

    def draw(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (count, 3, resolution, resolution)
        labels = torch.randint(CLASSES, (count,), generator=rng)
        return torch.randint(256, shape, generator=rng, dtype=torch.uint8), labels

    return ImageData(*draw(TRAIN_IMAGES), *draw(VAL_IMAGES), classes=tuple("0123456789"), flip=False)


def _train(arch: ArchSpec, batches: proxy.Batches, config: ProxyConfig) -> proxy.ProxyResult:
    """Train a new network from the seed that all trainings share."""
    torch.manual_seed(0)
    try:
        with memory_may_run_out():
            return proxy.train(arch.build(num_classes=CLASSES), batches, config, seed=0)
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise CandidateFailed(str(error).splitlines()[0]) from error
