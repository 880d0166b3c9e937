"""How many trainings run at once, where the user leaves it open: the least of what cores, memory and timing allow.

Candidates are timed one after the other, while nothing trains. So if a training takes as long as k timings, more than k
workers wait for networks to train. On CUDA as many train at once as pay: twice as many while these train more.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import psutil
import torch

from kernels.machine import cores, free_memory_bytes
from nas.config import ProxyConfig
from nas.errors import CandidateFailed
from nas.training.pool import mapped, train_new
from nas.training.proxy import ProxyResult
from nas.training.workers import Call, Workers, dying_of_cuda
from search_spaces import ArchSpec

# Steps of the anchor's training from which a whole one is extrapolated.
PROBE_STEPS = 20
# Networks of a space may need so many times the memory of its anchor's training.
MEMORY_FACTOR = 3
# On CUDA, twice as many workers must train so many times as much.
MIN_GAIN = 1.15
MOST_ON_A_GPU = 8


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


def on_cpu(threads: int, probe: Callable[[], Probe], timing_seconds: Callable[[], float]) -> WorkerCount:
    """The number of workers on a CPU.

    Args:
        threads: threads of each training.
        probe: function that trains the anchor for a moment, which is not called where one worker takes all cores.
        timing_seconds: function that times a network once and returns how long that took.
    """
    bounds = {"there are cores": max(1, cores() // threads)}
    if bounds["there are cores"] > 1:
        probed = probe()
        bounds["there is memory"] = max(1, free_memory_bytes() // probed.bytes)
        bounds["timing finds work"] = max(1, round(probed.seconds / timing_seconds()))
    return WorkerCount(min(bounds.values()), bounds)


def on_cuda(devices: int, images_per_second: Callable[[int], float], most: int) -> WorkerCount:
    """The number of workers on CUDA devices: the least at which twice as many would not train much more.

    Args:
        devices: number of devices; each has as many workers as the others.
        images_per_second: function from a number of workers to the images that they train on in a second, all together.
        most: greatest number of workers, for which there are cores.
    """
    count, rate = devices, images_per_second(devices)
    while 2 * count <= min(most, MOST_ON_A_GPU * devices):
        try:
            doubled = images_per_second(2 * count)
        except CandidateFailed:
            # Their memory does not fit.
            break
        if doubled < MIN_GAIN * rate:
            break
        count, rate = 2 * count, doubled
    return WorkerCount(count, {f"more than {rate:,.0f} images a second are not to be had": count})


def probe(workers: Workers, arch: ArchSpec, data_path: str, config: ProxyConfig, seed: int) -> Probe:
    """Train a network for a moment in one worker, and extrapolate.

    Raises:
        CandidateFailed: it cannot be trained.
    """
    (done,) = workers.run([Call(_probe, (arch, data_path, replace(config, steps=PROBE_STEPS), seed))])
    if isinstance(done.result, CandidateFailed):
        raise done.result
    result, own_bytes = done.result
    first, last = result.curve[0], result.curve[-1]
    seconds_each = (last.seconds - first.seconds) / max(1, last.step - first.step)
    seconds = result.seconds + seconds_each * (config.steps - PROBE_STEPS)
    return Probe(seconds, own_bytes + MEMORY_FACTOR * result.train_memory_bytes)


def images_per_second(
    workers: Workers, arch: ArchSpec, data_path: str, config: ProxyConfig, seed: int
) -> Callable[[int], float]:
    """Function from a number of workers, at most those there are, to the images that they train on in a second.

    Raises:
        CandidateFailed: the function raises it where one of them cannot train.
    """

    def rate(count: int) -> float:
        call = Call(_probe, (arch, data_path, replace(config, steps=5 * PROBE_STEPS), seed))
        begin = time.perf_counter()
        for done in list(workers.run([call] * count)):
            if isinstance(done.result, CandidateFailed):
                raise done.result
        return count * 5 * PROBE_STEPS * config.batch_size / (time.perf_counter() - begin)

    return rate


@dying_of_cuda
def _probe(arch: ArchSpec, data_path: str, config: ProxyConfig, seed: int, device: str) -> tuple[ProxyResult, int]:
    """The result of a short training, and the bytes of this process that no other shares."""
    _, result = train_new(arch.build, data_path, config, seed, device)
    return result, int(psutil.Process().memory_full_info().uss)


def get_ready(data_path: str, device: str) -> None:
    """Import what trains, and map the data."""
    torch.set_num_threads(1)
    mapped(data_path, device)
