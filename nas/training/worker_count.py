"""How many trainings run at once, where the user leaves it open: the least of what cores, memory and timing allow.

Candidates are timed one after the other, while nothing trains. So if a training takes as long as k timings, more than k
workers wait for networks to train. On CUDA as many train at once as pay: twice as many while these train more.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import psutil
import torch

from nas.config import ProxyConfig
from nas.errors import CandidateFailed, contained
from nas.training.pool import DataSource, mapped, train_new
from nas.training.proxy import ProxyResult
from nas.training.workers import Call, Pool, trim_heap
from search_spaces import ArchSpec

# Steps of the anchor's training from which a whole one is extrapolated; on a GPU the first ones come before the capture
# of the others.
PROBE_STEPS, CUDA_PROBE_STEPS = 20, 400
# So many workers are started unasked if there is so much memory for each.
FEW, PLENTY_BYTES = 2, 4 * 2**30
# Networks of a space may need so many times the memory of its anchor's training, at equal resolution.
MEMORY_FACTOR = 3
# On CUDA, twice as many workers must train so many times as much.
MIN_GAIN = 1.15
MOST_ON_A_GPU = 8
GENTLE_RATE = 1e-4


@dataclass(frozen=True)
class Probe:
    """What a short training of the anchor in one worker shows.

    Args:
        seconds: duration of a whole training.
        bytes: memory of its process that it shares with no other, at most.
    """

    seconds: float
    bytes: int


@dataclass(frozen=True)
class WorkerCount:
    """A number of workers, and what bound it.

    Args:
        bounds: what each thing allows, the least of which is the number.
    """

    count: int
    bounds: dict[str, int]

    def __str__(self) -> str:
        first, *others = sorted(self.bounds.items(), key=lambda each: each[1])
        allowed = f" ({', '.join(f'{name} for {count:,}' for name, count in others)})" if others else ""
        return f"{self.count} training{'s' if self.count > 1 else ''} at once: {first[0]} for no more{allowed}"


def on_cpu(most: int, free_bytes: int, probe: Callable[[], Probe], timing_seconds: Callable[[], float]) -> WorkerCount:
    """The number of workers on a CPU.

    Args:
        most: greatest number of workers, for which there are cores.
        free_bytes: memory that was free before there were workers.
        probe: function that trains the anchor for a moment; it is not called where there are few cores and plenty of
            memory.
        timing_seconds: function that times a network once and returns how long that took.
    """
    bounds = {"there are cores": most}
    # A probe takes as long as it could save where there are few cores, each with plenty of memory.
    if most > FEW or (most > 1 and free_bytes < most * PLENTY_BYTES):
        try:
            probed = probe()
        except CandidateFailed as error:
            # Whatever it is, it will show with the first candidates.
            return WorkerCount(1, {f"a first training fails ({error}), so there is reason": 1})
        bounds["there is memory"] = max(1, free_bytes // probed.bytes)
        bounds["timing finds work"] = max(1, round(probed.seconds / timing_seconds()))
    return WorkerCount(min(bounds.values()), bounds)


def on_cuda(devices: int, images_per_second: Callable[[int], float], most: int) -> WorkerCount:
    """The number of workers on CUDA devices: the least at which twice as many would not train much more.

    Args:
        devices: number of devices; each has as many workers as the others.
        images_per_second: function from a number of workers to the images that they train on in a second, all together.
        most: greatest number of workers, for which there are cores.

    Raises:
        CandidateFailed: not even one worker on each device can train.
    """
    count, rate = devices, images_per_second(devices)
    bound = f"{MOST_ON_A_GPU} are tried on a GPU, and there are GPUs"
    while 2 * count <= MOST_ON_A_GPU * devices:
        if 2 * count > most:
            bound = "there are cores"
            break
        try:
            doubled = images_per_second(2 * count)
        except CandidateFailed:
            bound = "there is memory on the GPU"
            break
        if doubled < MIN_GAIN * rate:
            bound = f"a GPU is busy with {rate / devices:,.0f} images a second, and there is reason"
            break
        count, rate = 2 * count, doubled
    return WorkerCount(count, {bound: count})


def probe(
    pool: Pool, arch: ArchSpec, data: DataSource, config: ProxyConfig, seed: int, resolutions: Sequence[int] = ()
) -> Probe:
    """Train a network for a moment in one worker, and extrapolate.

    Args:
        resolutions: resolutions in pixels of the networks for whose training there has to be memory, if they have
            resolutions of their own.

    Raises:
        CandidateFailed: it cannot be trained.
    """
    (done,) = pool.run([Call(_probe, (arch, data, gently(config, PROBE_STEPS), seed))])
    if isinstance(done.result, CandidateFailed):
        raise done.result
    result, own_bytes = done.result
    first, last = result.curve[0], result.curve[-1]
    seconds_each = (last.seconds - first.seconds) / max(1, last.step - first.step)
    # Before the first point of the curve lies what a process does once.
    seconds = seconds_each * config.steps + result.seconds - last.seconds
    pixels = (max(resolutions) / arch.resolution) ** 2 if resolutions and arch.resolution else 1
    return Probe(seconds, own_bytes + math.ceil(MEMORY_FACTOR * pixels * result.train_memory_bytes))


def images_per_second(
    pool: Pool, arch: ArchSpec, data: DataSource, config: ProxyConfig, seed: int
) -> Callable[[int], float]:
    """Function from a number of workers, at most those there are, to the images that they train on in a second.

    Raises:
        CandidateFailed: the function raises it where one of them cannot train.
    """

    def rate(count: int) -> float:
        seconds = 0.0
        # The first time, libraries load their kernels.
        for steps in (PROBE_STEPS, CUDA_PROBE_STEPS):
            call = Call(_probe, (arch, data, gently(config, steps), seed))
            begin = time.perf_counter()
            for done in list(pool.run([call] * count)):
                if isinstance(done.result, CandidateFailed):
                    raise done.result
            seconds = time.perf_counter() - begin
        return count * CUDA_PROBE_STEPS * config.batch_size / seconds

    return rate


def gently(config: ProxyConfig, steps: int) -> ProxyConfig:
    """A short training that does not diverge: in a few steps the rate reaches its peak before the weights are ready."""
    return replace(config, steps=steps, learning_rate=min(config.learning_rate, GENTLE_RATE))


def _probe(arch: ArchSpec, data: DataSource, config: ProxyConfig, seed: int, device: str) -> tuple[ProxyResult, int]:
    """The result of a short training, and the bytes of this process that no other shares."""
    try:
        with contained():
            _, result = train_new(arch.build, data, config, seed, device)
        return result, int(psutil.Process().memory_full_info().uss)
    finally:
        trim_heap()


def get_ready(data: DataSource, device: str) -> None:
    """Import what trains, and map the data."""
    torch.set_num_threads(1)
    with contained():
        mapped(data, device)
