"""The proxy: a short training of one network, and its accuracy on held-out images.

Shapes: N batch, H W pixels. The order from top to bottom is data, loop, validation.

The optimizer is AdamW with linear warm-up, cosine to zero and label smoothing; memory is channels_last throughout, and
CUDA uses bfloat16 autocast. On the CPU the same seed, architecture and thread count give the same accuracy; on CUDA
this needs `deterministic`.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.timing import peak_memory_bytes
from nas.config import ProxyConfig
from nas.errors import CandidateFailed
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


class Batches:
    """Random training batches and ordered validation batches from tensors on the device.

    The whole set is moved to a CUDA device if it takes less than half of the free memory there.
    """

    def __init__(self, data: ImageData, device: torch.device) -> None:
        self.device = device
        self.flip = data.flip
        mean, std = data.mean_std
        self.mean = mean.view(1, 3, 1, 1).to(device)
        self.std = std.view(1, 3, 1, 1).to(device)
        resident = torch.device("cpu")
        if device.type == "cuda":
            _take_workspaces(device)
            free, _ = torch.cuda.mem_get_info(device)
            if data.train_images.nbytes + data.val_images.nbytes < free // 2:
                resident = device
        self.train_images, self.train_labels = data.train_images.to(resident), data.train_labels.to(resident)
        self.val_images, self.val_labels = data.val_images.to(resident), data.val_labels.to(resident)
        # They are looked at a few times only.
        self.test_images, self.test_labels = data.test_images, data.test_labels

    def _normalised(self, images: Tensor) -> Tensor:
        images = (images.to(self.device, torch.float32) / 255 - self.mean) / self.std
        return images.contiguous(memory_format=torch.channels_last)

    def train(self, batch_size: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """A random batch: images (N, 3, H, W) float32, shifted and maybe mirrored, and labels (N,)."""
        where = torch.randint(len(self.train_labels), (batch_size,), generator=rng).to(self.train_images.device)
        images = self._augmented(self._normalised(self.train_images[where]), rng)
        return images, self.train_labels[where].to(self.device)

    def _augmented(self, images: Tensor, rng: torch.Generator) -> Tensor:
        n, _, height, width = images.shape
        reach = max(1, round(MAX_SHIFT * width))
        padded = functional.pad(images, (reach,) * 4, mode="reflect")
        down, right = torch.randint(2 * reach + 1, (2, n, 1), generator=rng)
        rows, columns = down + torch.arange(height), right + torch.arange(width)
        if self.flip:
            mirrored = torch.randint(2, (n, 1), generator=rng).bool()
            columns = torch.where(mirrored, columns.flip(1), columns)
        which = torch.arange(n).view(n, 1, 1)
        # Indexed as NHWC, so that the channels_last layout survives the gather.
        index = [part.to(self.device) for part in (which, rows.view(n, height, 1), columns.view(n, 1, width))]
        return padded.permute(0, 2, 3, 1)[index[0], index[1], index[2]].permute(0, 3, 1, 2)

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


def train(
    network: nn.Module, batches: Batches, config: ProxyConfig, seed: int, checkpoints: Collection[int] = (),
    rule: Rule | None = None,
) -> ProxyResult:  # fmt: skip
    """Train `network` from its present weights, in place, and validate it.

    Args:
        seed: seed of the order and the augmentation of the images.
        checkpoints: numbers of steps after which it is validated too, as far as the curve has points there.
        rule: rule by which the training may end early; then the network is not validated.

    Raises:
        CandidateFailed: the loss is no longer finite.
        RuntimeError: with `config.deterministic`, an operation has no deterministic algorithm.
    """
    device = batches.device
    begin = time.perf_counter()
    rng = torch.Generator().manual_seed(seed)
    network = network.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = make_optimizer(network, config)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    def step(number: int) -> tuple[Tensor, Tensor]:
        images, labels = batches.train(config.batch_size, rng)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, config)
        with autocast:
            logits = network(images)
            loss = functional.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach(), (logits.detach().argmax(1) == labels).float().mean()

    curve: list[CurvePoint] = []
    pending: list[tuple[Tensor, Tensor]] = []
    every = max(1, config.steps // CURVE_POINTS)
    verdict: Verdict | None = None

    def first_step() -> None:
        pending.append(step(0))

    with algorithms(config.deterministic):
        # Memory is measured in one step only, as the profiler that measures it on the CPU would slow the others.
        train_memory_bytes = peak_memory_bytes(first_step, device)
        for number in range(1, config.steps + 1):
            if number % every == 0 or number == config.steps:
                # Losses are read only here, because reading one waits for the GPU.
                loss, accuracy = torch.stack([torch.stack(pair) for pair in pending]).mean(dim=0).tolist()
                if not math.isfinite(loss):
                    raise CandidateFailed(f"the loss diverged before step {number} of {config.steps}")
                held_out = validate(network, batches) if number in checkpoints else (None, None)
                network.train()
                curve.append(CurvePoint(number, loss, accuracy, time.perf_counter() - begin, *held_out))
                pending.clear()
                if rule is not None and verdict is None:
                    verdict = rule.verdict(curve)
                    if verdict is not None and rule.ends:
                        seconds = time.perf_counter() - begin
                        return ProxyResult(math.nan, math.nan, tuple(curve), seconds, train_memory_bytes,
                                           verdict=verdict, stopped=True)  # fmt: skip
            if number < config.steps:
                pending.append(step(number))
        accuracy, loss = validate(network, batches)
    seconds = time.perf_counter() - begin
    return ProxyResult(accuracy, loss, tuple(curve), seconds, train_memory_bytes, verdict=verdict)


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
