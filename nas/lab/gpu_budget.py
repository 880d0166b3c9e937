"""The time of a search on a GPU, predicted from counts: `python -m nas.lab.gpu_budget --soak FILE`.

A training step of each network is run once on the CPU, and what it would launch on a GPU is counted: kernels, the bytes
that they read and write, and multiply-accumulates. With an H200's rates that gives the seconds of a step as a CUDA
graph; the pilot itself then chooses a schedule by them, and the parts of a search are added up. What kernels compile
comes from a soak (`nas.lab.soak --json`). No figure here was measured on a GPU.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import contest
from kernels.cost_model import H200
from nas.config import PILOT, LatencyConfig, ProxyConfig, SearchConfig
from nas.lab.invented import FakeEvaluator
from nas.lab.options import Space
from nas.latency.isolation import LIFETIME
from nas.latency.meter import WARMUP_SECONDS
from nas.reporting import console_table
from nas.search.pilot import Piloting, PilotTraining
from nas.training.curves import CurvePoint
from nas.training.data import ImageData
from nas.training.proxy import Batches, ProxyResult, TrainingStep
from nas.training.workers import Done
from search_spaces import ArchSpec, SearchSpace, load_space

# The least time of a kernel in a CUDA graph, in seconds: its launch, and a load that waits.
KERNEL_SECONDS = H200.launch_seconds + 1e-6
# The share of the rate of products that convolutions reach in training, most of which are small or grouped; assumed.
CONVOLVING = 0.2
# Batches of which a step is counted; bytes grow with the batch, and some do not.
COUNTED = (4, 8)
# Networks that stand for those of a search.
NETWORKS = 12
# Seconds, assumed: of Python before the first candidate (imports, the workers' start, images); of the device's limits
# and the anchor's latency; of finding out how many workers pay; and of timing the front again with its blocks.
STARTING, DEVICE, COUNTING_WORKERS, FINISHING = 15.0, 10.0, 10.0, 40.0
# Seconds, assumed: of a training beside its steps (building the network, three eager steps, a capture, a validation);
# of a capture of a small network; and of starting a process that measures.
BESIDE_STEPS, CAPTURE, CHILD = 0.15, 0.01, 5.0
# Seconds of Python to build, fold, pack and trace a network before it is timed, as on one core here; and of sampling it
# and the anchor, warm-up included, until the median is known.
DEPLOYING, SAMPLING = 0.3, 2 * WARMUP_SECONDS["cuda"] + 0.1
# Candidates that are timed for each that is trained, as a few fail or break a limit; assumed.
TIMED = 1.05
# Images for which the validation is counted at once.
VALIDATED = 1000


class _Counter(TorchDispatchMode):
    """Counts torch's operations that launch kernels, with the bytes and multiply-accumulates of each."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: list[tuple[int, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        done = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith(("empty", "new_empty", "detach", "_unsafe_view")):
            given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
            made = [each for each in tree_leaves(done) if isinstance(each, Tensor)]
            size = sum(each.nbytes for each in (*given, *made))
            if name == "convolution":
                weight = args[1]
                self.kernels.append((size, done.numel() * weight[0].numel()))
            elif name == "convolution_backward":
                gradient, _, weight = args[:3]
                # Of the input, and of the weights.
                self.kernels += [(size, gradient.numel() * weight[0].numel())] * 2
            else:
                self.kernels.append((size, 0))
        return done


def images(count: int, resolution: int) -> ImageData:
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, resolution, resolution), generator=rng).to(torch.uint8)
    labels = torch.arange(count) % 10
    return ImageData(pixels, labels, pixels, labels, tuple("0123456789"), flip=True)


def count(arch: ArchSpec, batch: int, resolution: int) -> list[tuple[int, int]]:
    """The kernels of a training step, with the bytes and multiply-accumulates of each."""
    step = TrainingStep(
        arch.build(10).to(memory_format=torch.channels_last).train(),  # type: ignore[call-overload]
        Batches(images(2 * batch, resolution), torch.device("cpu")), ProxyConfig(steps=2, batch_size=batch), 0,
    )  # fmt: skip
    # What CUDA computes in 16 bits.
    step.autocast = lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False)  # type: ignore[assignment]
    step.run()
    with _Counter() as counter:
        step.run()
    kernels: list[tuple[int, int]] = counter.kernels
    return kernels


@cache
def counts(arch: ArchSpec, resolution: int) -> list[list[tuple[int, int]]]:
    return [count(arch, batch, resolution) for batch in COUNTED]


def step_seconds(arch: ArchSpec, batch: int, resolution: int) -> float:
    """The predicted seconds of a captured step."""
    few, many = counts(arch, resolution)
    assert len(few) == len(many)
    seconds = 0.0
    for (bytes_few, macs_few), (bytes_many, macs_many) in zip(few, many, strict=True):
        share = (batch - COUNTED[0]) / (COUNTED[1] - COUNTED[0])
        size, macs = bytes_few + share * (bytes_many - bytes_few), macs_few + share * (macs_many - macs_few)
        seconds += max(KERNEL_SECONDS, size / H200.dram_bytes, macs / (CONVOLVING * H200.mma_macs))
    return seconds


class Counted(FakeEvaluator):
    """An evaluator for the pilot, whose trainings take the seconds that were counted on a GPU with one worker."""

    workers = 1
    devices = 1
    trains_on = "cuda"

    def __init__(self, train_images: int, val_images: int, resolution: int) -> None:
        super().__init__()
        self.train_images, self.val_images, self.resolution = train_images, val_images, resolution
        self.spent = 0.0

    def training_seconds(self, arch: ArchSpec, proxy: ProxyConfig) -> float:
        each = step_seconds(arch, proxy.batch_size, self.resolution)
        # A validation is about a third of a step on as many images.
        validation = step_seconds(arch, VALIDATED, self.resolution) / 3 * self.val_images / VALIDATED
        return BESIDE_STEPS + each * proxy.steps + validation

    def train_as(self, trainings: Sequence[PilotTraining]) -> Generator[Done[ProxyResult]]:
        for index, each in enumerate(trainings):
            seconds = self.training_seconds(each.arch, each.proxy)
            self.spent += seconds
            # Networks are told apart by their size, so that the pilot has no reason to train longer.
            accuracy = 0.6 + 0.05 * math.log(self.cost(each.arch).macs / 1e7)
            curve = tuple(
                CurvePoint(step, 1.0, 0.5, seconds * step / each.proxy.steps)
                for step in (1, max(1, each.proxy.steps // 2), each.proxy.steps)
            )
            yield Done(index, 0, seconds, ProxyResult(accuracy, 1.0, curve, seconds, 0))

    def adopt(self, proxy: ProxyConfig) -> None:
        pass


@dataclass(frozen=True)
class Part:
    """A part of a search: its seconds, and what they come from."""

    name: str
    seconds: float
    origin: str


def contest_seconds(tilings: int = 4, launches: int = 1) -> float:
    """The predicted seconds of tuning one problem whose kernels are compiled."""
    contenders = tilings + 1
    # Kernels of a small problem; half of the tilings are dropped.
    each = 2 * launches * KERNEL_SECONDS
    sampled = contenders * (contest.BUSY_CYCLES / H200.clock_hz + contest.CALLS * each)
    replays = (contest.REPLAYS + contest.WARMUP_REPLAYS) * (1 + contenders // 2) * contest.SECONDS_EACH
    return sampled + replays + CAPTURE


def parts(
    space: SearchSpace, budget: int, data: tuple[int, int], soaked: Mapping[str, float], cores: int
) -> tuple[list[Part], str]:
    """The parts of a search on one H200, and its schedule in words."""
    resolution = space.resolution[0]
    evaluator = Counted(*data, resolution)
    deployed = LatencyConfig(device="cuda", engine="fused", dtype="float16", resolution=resolution)
    config = SearchConfig(budget=budget, space=space, latency=deployed, pilot=PILOT)
    pilot = Piloting(config, evaluator).run()
    spent, proxy = evaluator.spent, pilot.proxy
    rng = random.Random(0)
    archs = [space.anchor(), *(space.sample(rng) for _ in range(NETWORKS))]
    each = fmean(evaluator.training_seconds(arch, proxy) for arch in archs)
    kernels = fmean(len(counts(arch, resolution)[0]) for arch in archs)
    step = fmean(step_seconds(arch, proxy.batch_size, resolution) for arch in archs)
    # Of the soak's candidates many fail, by its invention.
    share = TIMED * budget / soaked["candidates"]
    problems = soaked["launches"] / 4 / soaked["candidates"]
    # A soak waits for what was not foreseen, with fewer cores; what was foreseen is hidden by training.
    unforeseen = min(1.0, soaked["waited_seconds"] * soaked["compilers"] / soaked["cpu_seconds"])
    compiling = share * soaked["cpu_seconds"] / (cores - 2)
    children = math.ceil(TIMED * budget / LIFETIME)
    tuned = TIMED * budget * problems * contest_seconds()
    timed = TIMED * budget * (DEPLOYING + 8 * CAPTURE + SAMPLING)
    trained = budget * each
    found = [
        Part("start", STARTING, "assumed"),
        Part("device and anchor", DEVICE, "assumed"),
        Part("number of workers", COUNTING_WORKERS, "assumed"),
        Part("pilot", spent, f"{evaluator.spent / each:.0f} trainings' worth, as the pilot chose"),
        Part("compiling that is waited for", unforeseen * compiling,
             f"{share * soaked['kernels']:.0f} kernels, {compiling:.0f} s on {cores - 2} cores; of the soak's, "
             f"{unforeseen:.0%} was waited for"),
        Part("tuning", tuned, f"{problems:.1f} new problems a candidate, {1e3 * contest_seconds():.0f} ms each"),
        Part("timing", timed, f"{DEPLOYING + 8 * CAPTURE + SAMPLING:.2f} s a candidate"),
        Part("processes that measure", children * CHILD, f"{children}, each for {LIFETIME} candidates"),
        Part("training", trained, f"{each:.2f} s a candidate: {kernels:.0f} kernels and {1e3 * step:.2f} ms a step"),
        Part("confirmation", config.confirm * trained, f"{config.confirm:.0%} of the trainings"),
        Part("front again, and its blocks", FINISHING, "assumed"),
    ]  # fmt: skip
    return found, f"{proxy.steps} steps of {proxy.batch_size} images, chosen by the pilot"


def main(
    soak: Annotated[Path, typer.Option(help="Result of `python -m nas.lab.soak --json`.")],
    budget: Annotated[int, typer.Option(min=1, help="Number of candidates.")] = 200,
    space: Space = "small",
    train_images: Annotated[int, typer.Option(min=1, help="Training images.")] = 16_000,
    val_images: Annotated[int, typer.Option(min=1, help="Validation images.")] = 3000,
    cores: Annotated[int, typer.Option(min=3, help="CPU cores of the machine with the GPU.")] = 16,
) -> None:
    """Print the predicted seconds of a search on one H200, part by part."""
    torch.set_num_threads(1)
    soaked = json.loads(soak.read_text())[-1]
    found, schedule = parts(load_space(space), budget, (train_images, val_images), soaked, cores)
    table = console_table(
        f"A search of {budget} on one H200, by counts ({schedule})", "part", "s", "from", text=["from"]
    )
    for part in found:
        table.add_row(part.name, f"{part.seconds:.0f}", part.origin)
    table.add_row("all", f"{sum(part.seconds for part in found):.0f}", "")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
