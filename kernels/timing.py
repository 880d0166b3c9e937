"""The one place that times and measures memory, and what it was measured on."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

# A CUDA build on a machine without a GPU makes the profiler's library print an error on every use; it reads this once.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import numpy as np
import torch

# A sample lasts at least this long, so that a clock tick, an event record or a dispatch hiccup is a small part of it.
MIN_SAMPLE_SECONDS = {"cpu": 5e-3, "cuda": 1e-3}
MIN_ROUNDS = 10
WARMUP_SECONDS = 0.1
CALLS_BEFORE_CAPTURE = 3

Output = TypeVar("Output")


# Named apart from `torch`, which is a field of DeviceInfo.
_Device = torch.device


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What a figure was measured on: the device, its driver and the libraries that ran there."""

    kind: str
    name: str
    driver: str
    torch: str
    triton: str

    @classmethod
    def of(cls, device: _Device) -> DeviceInfo:
        if device.type == "cuda":
            name, driver = torch.cuda.get_device_name(device), f"CUDA {torch.version.cuda}, driver {_nvidia_driver()}"
        else:
            name, driver = _cpu_name(), f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
        return cls(device.type, name, driver, torch.__version__, _triton_version())

    def __str__(self) -> str:
        return f"{self.name} ({self.driver}; torch {self.torch}, triton {self.triton})"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _nvidia_driver() -> str:
    try:
        # "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  ..."
        words = Path("/proc/driver/nvidia/version").read_text().splitlines()[0].split()
        return next(word for word in words if word[:1].isdigit() and "." in word)
    except (OSError, IndexError, StopIteration):
        return "unknown"


def _triton_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"


class Clock(Protocol):
    """Times `calls` runs of a function, in seconds of the device's own time."""

    def __call__(self, run: Callable[[], None], calls: int) -> float: ...


def cpu_clock(run: Callable[[], None], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return time.perf_counter() - begin


def cuda_clock(device: torch.device, run: Callable[[], None], calls: int) -> float:
    with torch.cuda.device(device):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def clock_for(device: torch.device) -> Clock:
    return partial(cuda_clock, device) if device.type == "cuda" else cpu_clock


def captured(run: Callable[[], Output]) -> tuple[torch.cuda.CUDAGraph, Output]:
    """A CUDA graph of one call on the current device, and the call's output, which every replay writes anew.

    A graph knows addresses only: what the call reads must live as long as it is replayed.
    """
    # Libraries set themselves up in the first calls, which capture does not allow; what they set up may belong to the
    # stream, so that it is captured on the very same.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(CALLS_BEFORE_CAPTURE):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        output = run()
    return graph, output


def time_interleaved(
    runs: Sequence[Callable[[], None]], clock: Clock, seconds: float, min_sample_seconds: float
) -> np.ndarray:
    """Time the runs in turn, round after round, so that each sees the same weather.

    Args:
        runs: each enqueues (CUDA) or does (CPU) one forward pass.
        clock: measures a number of calls.
        seconds: of sampling, warm-up excluded; at least `MIN_ROUNDS` rounds are made.
        min_sample_seconds: calls are repeated until a sample lasts this long.

    Returns:
        Seconds per call, (rounds, len(runs)). Row by row the samples are neighbours in time; every other round runs in
        reverse order, so that no run always comes after the same neighbour.
    """
    calls = [_calls_per_sample(run, clock, min_sample_seconds) for run in runs]
    rounds: list[list[float]] = []
    deadline = time.perf_counter() + seconds
    while len(rounds) < MIN_ROUNDS or time.perf_counter() < deadline:
        row = [0.0] * len(runs)
        order = range(len(runs)) if len(rounds) % 2 == 0 else reversed(range(len(runs)))
        for index in order:
            # One call unmeasured: it refills the caches that the neighbour has emptied.
            runs[index]()
            row[index] = clock(runs[index], calls[index]) / calls[index]
        rounds.append(row)
    return np.asarray(rounds)


def _calls_per_sample(run: Callable[[], None], clock: Clock, min_sample_seconds: float) -> int:
    """Warm up for `WARMUP_SECONDS`, doubling the calls until a sample is long enough."""
    calls = 1
    deadline = time.perf_counter() + WARMUP_SECONDS
    while True:
        seconds = clock(run, calls)
        if seconds < min_sample_seconds:
            calls = max(calls + 1, min(2 * calls, int(calls * min_sample_seconds / max(seconds, 1e-9)) + 1))
        elif time.perf_counter() >= deadline:
            return calls


def peak_memory_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most tensor memory that `run` holds at once beyond what was allocated when it began.

    On CUDA the caching allocator tells; on the CPU torch's profiler reports every allocation of its allocator.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        run()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
