"""The proxy: a short training of one network, and its accuracy on held-out images.

Shapes: N batch, H W pixels. The order from top to bottom is data, loop, validation.

The optimizer is AdamW with linear warm-up, cosine to zero and label smoothing; memory is channels_last throughout, and
CUDA uses bfloat16 autocast. All random numbers are drawn before the first step; a step is a function of tensors on the
device, which CUDA captures as a graph (`nas.training.graphs`). On the CPU the same seed, architecture and thread count
give the same accuracy; on CUDA this needs `deterministic`.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.timing import peak_memory_bytes
from nas.config import ProxyConfig
from nas.errors import CandidateFailed
from nas.training import graphs
from nas.training.curves import CurvePoint
from nas.training.data import ImageData
from nas.training.stopping import Rule, Verdict
from nas.training.weights import Trained

CURVE_POINTS = 20
MAX_SHIFT = 1 / 16  # greatest random shift of training images, as a share of their width
# On a CPU small batches stay in its caches (125 took 0.7 of the time of 500); a GPU needs large ones to be busy.
EVAL_BATCH = {"cpu": 125, "cuda": 1000}
# Batches of larger images are smaller: 1,000 of 224 pixels would take some 13 GB in the largest networks.
EVAL_RESOLUTION = 64
MIN_EVAL_BATCH = 16


@dataclass(frozen=True)
class ProxyResult:
    """The result of a training.

    Args:
        accuracy, loss: accuracy and plain cross-entropy on the validation images; not a number where the training was
            ended early.
        curve: learning curve of the training.
        host: name of the machine that trained.
        seconds: time of training and validation.
        train_memory_bytes: peak of the tensor memory that the first training step took beside the weights and the
            data set: activations, gradients and the optimizer's state.
        trained: the weights; None where they are not to be kept.
        verdict: what a rule said of the training that would give it up; None where none did.
        stopped: whether the training ended with that.
        test_accuracy: accuracy on the test images; None where it was not looked at.
        uncaptured: why the steps were no CUDA graph; None where they were, and where there are no such graphs.
    """

    accuracy: float
    loss: float
    curve: tuple[CurvePoint, ...]
    seconds: float
    train_memory_bytes: int
    trained: Trained | None = None
    host: str = field(default_factory=platform.node)
    verdict: Verdict | None = None
    stopped: bool = False
    test_accuracy: float | None = None
    uncaptured: str | None = None

    @property
    def step_seconds(self) -> float:
        """Seconds of a step, by the second half of the curve: before it lies what happens once, such as a capture."""
        first, last = self.curve[(len(self.curve) - 1) // 2], self.curve[-1]
        if first is last:
            return last.seconds / last.step
        return (last.seconds - first.seconds) / (last.step - first.step)

    def under(self, rule: Rule) -> ProxyResult:
        """What this training, which was not ended early, would have come to under a rule."""
        for number, point in enumerate(self.curve, start=1):
            verdict = rule.verdict(self.curve[:number])
            if verdict is not None:
                if not rule.ends:
                    return replace(self, verdict=verdict)
                seconds = self.seconds * point.step / self.curve[-1].step
                return replace(self, accuracy=math.nan, loss=math.nan, curve=self.curve[:number], seconds=seconds,
                               trained=None, verdict=verdict, stopped=True)  # fmt: skip
        return self


# -- data ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draws:
    """Random numbers of the batches of some steps.

    They take 9 bytes an image: 46 MB for 20,000 steps of 256 images.

    Args:
        images: numbers of the training images, (steps, N) int32.
        shifts: pixels by which they are moved down and right, (steps, 2, N) int16; the greatest shift is added to them.
        mirrored: whether they are mirrored, (steps, N); None where none is.
    """

    images: Tensor
    shifts: Tensor
    mirrored: Tensor | None

    def to(self, device: torch.device) -> Draws:
        return self._each(lambda part: part.to(device))

    def at(self, number: Tensor) -> Draws:
        """Those of one step, without the first dimension.

        Args:
            number: number of the step, (1,) int64, on the device of the draws.
        """
        return self._each(lambda part: part.index_select(0, number).squeeze(0))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Draws:
        mirrored = None if self.mirrored is None else change(self.mirrored)
        return Draws(change(self.images), change(self.shifts), mirrored)


class Batches:
    """Random training batches and ordered validation batches from tensors on the device.

    The whole set is moved to a CUDA device if it takes less than half of the free memory there.

    Attributes:
        resident: whether the images lie on the device; the labels of the training images always do.
    """

    def __init__(self, data: ImageData, device: torch.device) -> None:
        self.device = device
        self.flip = data.flip
        mean, std = data.mean_std
        self.mean = mean.view(1, 3, 1, 1).to(device)
        self.std = std.view(1, 3, 1, 1).to(device)
        self.resident = True
        if device.type == "cuda":
            with graphs.stream_of(device):
                _take_workspaces(device)
            free, _ = torch.cuda.mem_get_info(device)
            self.resident = data.train_images.nbytes + data.val_images.nbytes < free // 2
        where = device if self.resident else torch.device("cpu")
        self.train_images, self.train_labels = data.train_images.to(where), data.train_labels.to(device)
        self.val_images, self.val_labels = data.val_images.to(where), data.val_labels.to(where)
        # They are looked at a few times only.
        self.test_images, self.test_labels = data.test_images, data.test_labels

    def _normalised(self, images: Tensor) -> Tensor:
        images = (images.to(self.device, torch.float32) / 255 - self.mean) / self.std
        return images.contiguous(memory_format=torch.channels_last)

    def draw(self, steps: int, batch_size: int, rng: torch.Generator) -> Draws:
        """The random numbers of all training batches, on the CPU."""
        reach = self._reach
        images = torch.empty(steps, batch_size, dtype=torch.int32)
        shifts = torch.empty(steps, 2, batch_size, dtype=torch.int16)
        mirrored = torch.empty(steps, batch_size, dtype=torch.bool) if self.flip else None
        # Step by step, because stored accuracies were reached with the numbers in this order.
        for step in range(steps):
            images[step] = torch.randint(len(self.train_labels), (batch_size,), generator=rng)
            shifts[step] = torch.randint(2 * reach + 1, (2, batch_size), generator=rng)
            if mirrored is not None:
                mirrored[step] = torch.randint(2, (batch_size,), generator=rng)
        return Draws(images, shifts, mirrored)

    @property
    def _reach(self) -> int:
        """The greatest shift, in pixels."""
        return max(1, round(MAX_SHIFT * self.train_images.shape[-1]))

    def training(self, draws: Draws, staged: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A training batch: images (N, 3, H, W) float32, shifted and maybe mirrored, and labels (N,).

        Args:
            draws: the draws of one step, on the device.
            staged: the step's images, (N, 3, H, W) uint8 on the device, where the data set is not there.
        """
        chosen = draws.images.long()
        source = self.train_images if staged is None else staged
        which = chosen if staged is None else torch.arange(len(chosen), device=self.device)
        n, (height, width) = len(chosen), source.shape[2:]
        down, right = draws.shifts.long().view(2, n, 1) - self._reach
        rows = _reflected(down + torch.arange(height, device=self.device), height)
        columns = _reflected(right + torch.arange(width, device=self.device), width)
        if draws.mirrored is not None:
            columns = torch.where(draws.mirrored.view(n, 1), columns.flip(1), columns)
        # Indexed as NHWC, so that the result is channels_last.
        images = source[which.view(n, 1, 1), :, rows.view(n, height, 1), columns.view(n, 1, width)]
        return self._normalised(images.permute(0, 3, 1, 2)), self.train_labels[chosen]

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The validation images (N, 3, H, W) in batches, with their labels (N,)."""
        yield from self._in_order(self.val_images, self.val_labels)

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The test images (N, 3, H, W) in batches, with their labels (N,); none where there is no test set."""
        if self.test_images is not None and self.test_labels is not None:
            yield from self._in_order(self.test_images, self.test_labels)

    def _in_order(self, all_images: Tensor, all_labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        size = eval_batch(self.device.type, all_images.shape[-1])
        for images, labels in zip(all_images.split(size), all_labels.split(size), strict=True):
            yield self._normalised(images), labels.to(self.device)


def _reflected(places: Tensor, size: int) -> Tensor:
    """Places beyond the border of `size` pixels, mirrored into it, with the pixel at the border as the mirror."""
    return (size - 1) - ((size - 1) - places.abs()).abs()


def _take_workspaces(device: torch.device) -> None:
    """Multiply once, forward and backward, so that the first training does not count memory that cuBLAS then keeps."""
    x = torch.zeros(8, 8, device=device, requires_grad=True)
    with torch.autocast(device.type, torch.bfloat16):
        functional.linear(x, x).sum().backward()


def eval_batch(kind: str, resolution: int) -> int:
    """The number of validation images in a batch, on a kind of device."""
    most = EVAL_BATCH[kind]
    return max(MIN_EVAL_BATCH, min(most, most * EVAL_RESOLUTION**2 // resolution**2))


# -- loop ----------------------------------------------------------------------------------------------------------


def learning_rate(step: int, config: ProxyConfig) -> float:
    """Rate of a step, counted from 0: linear up to the peak, then a cosine that reaches zero after the last step."""
    warmup_steps = config.warmup * config.steps
    if step + 1 <= warmup_steps:
        return config.learning_rate * (step + 1) / warmup_steps
    done = (step + 1 - warmup_steps) / (config.steps + 1 - warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(network: nn.Module, config: ProxyConfig) -> torch.optim.Optimizer:
    """AdamW without weight decay on norms and biases."""
    matrices = [p for p in network.parameters() if p.ndim > 1]
    vectors = [p for p in network.parameters() if p.ndim <= 1]
    groups = [dict(params=matrices, weight_decay=config.weight_decay), dict(params=vectors, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


@contextmanager
def algorithms(deterministic: bool) -> Iterator[None]:
    """Context in which torch uses deterministic algorithms only, or any; its end restores the previous settings.

    On CUDA the environment variable CUBLAS_WORKSPACE_CONFIG has to be set before the process multiplies its first
    matrices (`prepare_determinism`).
    """
    # This module makes its attribute at run time, so mypy does not know it.
    settings: Any = torch.utils.deterministic
    before, filling = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(deterministic)
    # By default torch then also fills each new tensor, for programs that read memory which they never wrote.
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = filling


def prepare_determinism() -> None:
    """Let cuBLAS be deterministic; the call must come before the first use of cuBLAS."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


class TrainingStep:
    """A step of a training, as a function of tensors on the device: `run` can be captured as a CUDA graph.

    Args:
        seed: seed of the order and the augmentation of the images.

    Attributes:
        number: number of the next step, (1,) int64.
        outcomes: loss and accuracy of each step that is done, (steps, 2) float32.
    """

    def __init__(self, network: nn.Module, batches: Batches, config: ProxyConfig, seed: int) -> None:
        self.network, self.batches, self.config = network, batches, config
        device = batches.device
        self.drawn = batches.draw(config.steps, config.batch_size, torch.Generator().manual_seed(seed))
        self.draws = self.drawn.to(device)
        self.staged: Tensor | None = None
        if not batches.resident:
            shape = (config.batch_size, *batches.train_images.shape[1:])
            self.staged = torch.empty(shape, dtype=torch.uint8, device=device)
        self.number = torch.zeros(1, dtype=torch.int64, device=device)
        self.numbers = torch.arange(config.steps, device=device).view(-1, 1)
        self.outcomes = torch.zeros(config.steps, 2, device=device)
        # Fused AdamW reads a rate on CUDA as float32; on the CPU it takes it as the Python number, without rounding.
        dtype = torch.float32 if device.type == "cuda" else torch.float64
        rates = [learning_rate(number, config) for number in range(config.steps)]
        self.rates = torch.tensor(rates, dtype=dtype, device=device)
        self.rate = torch.zeros((), dtype=dtype, device=device)
        self.optimizer = make_optimizer(network, config)
        self.forget()
        for group in self.optimizer.param_groups:
            group.update(lr=self.rate, capturable=device.type == "cuda")
        # A capture allows no cached casts of weights; each is used once in a step anyway.
        self.autocast = partial(
            torch.autocast, device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False
        )

    def stage(self, number: int) -> None:
        """Send the images of a step to the device, where the data set is not there."""
        if self.staged is not None:
            # Pinned memory is not used again before the device has read it; the host need not wait for that.
            picked = torch.empty(self.staged.shape, dtype=torch.uint8, pin_memory=self.staged.is_cuda)
            torch.index_select(self.batches.train_images, 0, self.drawn.images[number], out=picked)
            self.staged.copy_(picked, non_blocking=True)

    def run(self) -> None:
        """Do the next step."""
        images, labels = self.batches.training(self.draws.at(self.number), self.staged)
        self.rate.copy_(self.rates.index_select(0, self.number).squeeze(0))
        with self.autocast():
            logits = self.network(images)
            loss = functional.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        loss.backward()
        self.optimizer.step()
        # Gradients do not outlive a step, so that those of a graph do not outlive the graph.
        self.forget()
        accuracy = (logits.detach().argmax(1) == labels).float().mean()
        outcome = torch.stack([loss.detach(), accuracy])
        # Written by a comparison: to write at an index, deterministic algorithms sort.
        torch.where(self.numbers == self.number, outcome, self.outcomes, out=self.outcomes)
        self.number += 1

    def forget(self) -> None:
        """Drop all gradients."""
        self.optimizer.zero_grad(set_to_none=True)


def train(
    network: nn.Module, batches: Batches, config: ProxyConfig, seed: int, checkpoints: Collection[int] = (),
    rule: Rule | None = None, capture: bool = True,
) -> ProxyResult:  # fmt: skip
    """Train `network` from its present weights, in place, and validate it.

    Args:
        seed: seed of the order and the augmentation of the images.
        checkpoints: numbers of steps after which it is validated too, as far as the curve has points there.
        rule: rule by which the training may end early; then the network is not validated.
        capture: whether CUDA captures the steps as a graph.

    Raises:
        CandidateFailed: the loss is no longer finite.
        RuntimeError: with `config.deterministic`, an operation has no deterministic algorithm.
    """
    device = batches.device
    begin = time.perf_counter()
    network = network.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    curve: list[CurvePoint] = []
    every = max(1, config.steps // CURVE_POINTS)
    verdict: Verdict | None = None
    accuracy = loss = math.nan
    with algorithms(config.deterministic), graphs.stream_of(device):
        step = TrainingStep(network, batches, config, seed)
        repeated = graphs.RepeatedStep(step.run, step.forget, device, config.steps, capture)

        def do(number: int) -> None:
            step.stage(number)
            repeated()

        with closing(repeated):
            # Memory is measured in one step only, as the profiler that measures it on the CPU would slow the others.
            train_memory_bytes = peak_memory_bytes(partial(do, 0), device)
            read = 0
            for number in range(1, config.steps + 1):
                if number % every == 0 or number == config.steps:
                    # Losses are read only here, because reading one waits for the GPU.
                    train_loss, train_accuracy = step.outcomes[read:number].mean(dim=0).tolist()
                    read = number
                    if not math.isfinite(train_loss):
                        raise CandidateFailed(f"the loss diverged before step {number} of {config.steps}")
                    held_out = validate(network, batches) if number in checkpoints else (None, None)
                    network.train()
                    curve.append(CurvePoint(number, train_loss, train_accuracy, time.perf_counter() - begin, *held_out))
                    if rule is not None and verdict is None:
                        verdict = rule.verdict(curve)
                        if verdict is not None and rule.ends:
                            break
                if number < config.steps:
                    do(number)
        stopped = verdict is not None and rule is not None and rule.ends
        if not stopped:
            accuracy, loss = validate(network, batches)
    seconds = time.perf_counter() - begin
    return ProxyResult(
        accuracy, loss, tuple(curve), seconds, train_memory_bytes, verdict=verdict, stopped=stopped,
        uncaptured=repeated.uncaptured,
    )  # fmt: skip


# -- validation ----------------------------------------------------------------------------------------------------


def validate(network: nn.Module, batches: Batches) -> tuple[float, float]:
    """Accuracy and mean cross-entropy on the validation images.

    Raises:
        CandidateFailed: the loss is not finite.
    """
    return score(network, batches.validation(), batches.device)


@torch.inference_mode()
def score(network: nn.Module, labelled: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> tuple[float, float]:
    """Accuracy and mean cross-entropy on some images.

    Args:
        labelled: batches of images (N, 3, H, W) and labels (N,), at least one.

    Raises:
        CandidateFailed: the loss is not finite.
    """
    network.eval()
    correct = torch.zeros((), device=device)
    total_loss = torch.zeros((), device=device)
    count = 0
    for images, labels in labelled:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = network(images)
        total_loss += functional.cross_entropy(logits.float(), labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
        count += len(labels)
    loss = total_loss.item() / count
    if not math.isfinite(loss):
        raise CandidateFailed("the validation loss is not finite")
    return correct.item() / count, loss
