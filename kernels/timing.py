"""The one place that measures time and memory."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol, TypeVar

# A CUDA build on a machine without a GPU makes the profiler's library print an error on every use; it reads this once.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import numpy as np
import torch

# Shortest sample, in seconds, so that a clock tick, an event record or a dispatch hiccup is a small part of it.
MIN_SAMPLE_SECONDS = {"cpu": 5e-3, "cuda": 1e-3}
MIN_ROUNDS = 10
WARMUP_SECONDS = 0.1
WARMUP_CAP_SECONDS = 1.0
WARMUP_WINDOW = 5
WARMUP_TOLERANCE = 0.03
CALLS_BEFORE_CAPTURE = 3
# Bytes that tensors asked the allocator for; the blocks that it hands out may be larger by up to a MiB.
REQUESTED = "requested_bytes.all"

Output = TypeVar("Output")


class Clock(Protocol):
    """Function that times `calls` runs of another, in seconds on the device's own clock."""

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


def captured(
    run: Callable[[], Output], calls: int = CALLS_BEFORE_CAPTURE, pool: Any = None
) -> tuple[torch.cuda.CUDAGraph, Output]:
    """Capture a CUDA graph of one call on the current device; returns it with the call's output.

    Every replay overwrites the output. A graph holds addresses only: what the call reads must live as long as the graph
    is replayed.

    Args:
        calls: number of calls before the capture; 0 where the same has run before on the stream that is captured
            (`on_capture_stream`).
        pool: handle of the memory that the graph shares with others; None stands for memory of its own.

    Raises:
        RuntimeError: the call does what cannot be captured. This process can go on, also with random numbers on CUDA.
    """
    # Libraries set themselves up in the first calls, which a capture does not allow. What they set up may belong to the
    # stream, so the same stream is captured.
    index = torch.cuda.current_device()
    before = torch.cuda.current_stream()
    with on_capture_stream(torch.device("cuda", index)):
        for _ in range(calls):
            run()
    graph, pool = torch.cuda.CUDAGraph(), pool or torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=_side_stream(index)):
            output = run()
    except BaseException:
        # If a capture cannot be ended, torch leaves its stream the current one.
        torch.cuda.set_stream(before)
        _abandon(index, pool)
        raise
    return graph, output


def _abandon(index: int, pool: tuple[int, int]) -> None:
    """Undo what torch leaves behind of a capture that could not be ended."""
    # Up to 2.11 the allocator goes on as if the capture were under way, and frees nothing that several streams use
    # (https://github.com/pytorch/pytorch/pull/180395). Where it has been told of the end, it refuses to be told again.
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(index, pool)
    # The generator takes itself for captured, too: the next dropout would raise "Offset increment outside graph
    # capture". A copy of its state does not.
    generator = torch.cuda.default_generators[index]
    generator.graphsafe_set_state(generator.clone_state())


@contextlib.contextmanager
def on_capture_stream(device: torch.device) -> Iterator[None]:
    """Context whose work goes to the stream of a CUDA device that `captured` captures."""
    with torch.cuda.device(device):
        side, before = _side_stream(torch.cuda.current_device()), torch.cuda.current_stream()
        side.wait_stream(before)
        try:
            with torch.cuda.stream(side):
                yield
        finally:
            before.wait_stream(side)


@cache
def _side_stream(index: int) -> torch.cuda.Stream:
    """The one stream of a device for all captures, as cuBLAS keeps a workspace for each stream it was used on."""
    return torch.cuda.Stream(index)


def time_interleaved(
    runs: Sequence[Callable[[], None]], clock: Clock, seconds: float, min_sample_seconds: float,
    warmup_seconds: float | None = None,
) -> np.ndarray:  # fmt: skip
    """Time the runs in turn, round after round, so that disturbances meet all of them alike.

    Args:
        runs: functions, each of which enqueues (CUDA) or does (CPU) one forward pass.
        clock: clock that times a number of calls.
        seconds: time of sampling, without warm-up; there are at least `MIN_ROUNDS` rounds.
        min_sample_seconds: least duration of a sample, which repeats calls for as long.
        warmup_seconds: least warm-up of each run (default: `WARMUP_SECONDS`).

    Returns:
        Seconds per call, (rounds, len(runs)). The samples of a row are neighbours in time; every other round runs in
        reverse order, so that no run always follows the same neighbour.
    """
    calls = [warm_up(run, clock, min_sample_seconds, warmup_seconds) for run in runs]
    rounds: list[list[float]] = []
    deadline = time.perf_counter() + seconds
    for row in _rounds(runs, calls, clock):
        rounds.append(row)
        if len(rounds) >= MIN_ROUNDS and time.perf_counter() >= deadline:
            break
    return np.asarray(rounds)


def _rounds(runs: Sequence[Callable[[], None]], calls: Sequence[int], clock: Clock) -> Iterator[list[float]]:
    """Yield rounds without end: the seconds per call of each run."""
    for number in itertools.count():
        row = [0.0] * len(runs)
        order = range(len(runs)) if number % 2 == 0 else reversed(range(len(runs)))
        for index in order:
            # This call is not measured: it refills the caches that the neighbour has emptied.
            runs[index]()
            row[index] = clock(runs[index], calls[index]) / calls[index]
        yield row


def warm_up(
    run: Callable[[], None], clock: Clock, min_sample_seconds: float, seconds: float | None = None
) -> int:  # fmt: skip
    """Call a run until it gets no faster.

    It gets faster as long as the median of `WARMUP_WINDOW` samples falls by more than `WARMUP_TOLERANCE`.

    Args:
        seconds: least duration (default: `WARMUP_SECONDS`).

    Returns:
        The number of calls that make a sample of `min_sample_seconds`.
    """
    at_least = WARMUP_SECONDS if seconds is None else seconds
    # The first call is not measured: what it loads or compiles says nothing about how many calls make a sample.
    run()
    begin = time.perf_counter()
    calls, window, before = 1, list[float](), float("inf")
    while True:
        sample = clock(run, calls)
        passed = time.perf_counter() - begin
        if sample < min_sample_seconds:
            calls = max(calls + 1, min(2 * calls, int(calls * min_sample_seconds / max(sample, 1e-9)) + 1))
            window = []
            continue
        window.append(sample / calls)
        if passed >= WARMUP_CAP_SECONDS:
            return calls
        if len(window) == WARMUP_WINDOW:
            median = float(np.median(window))
            if median >= (1 - WARMUP_TOLERANCE) * before and passed >= at_least:
                return calls
            before, window = median, []


# -- How long to go on -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Precision:
    """The precision at which sampling ends, and the cap at which it ends in any case.

    Args:
        share: greatest width of the median's 95 % confidence interval, as a share of the median.
        cap_seconds: time after which sampling ends in any case.
    """

    share: float
    cap_seconds: float


@dataclass(frozen=True, slots=True)
class Sampled:
    """The result of sampling.

    Args:
        seconds: samples, (rounds, runs), in seconds per call.
        interval_shares: width of each checked median's confidence interval, over the median.
        capped: whether the cap ended sampling.
    """

    seconds: np.ndarray
    interval_shares: tuple[float, ...]
    capped: bool


def median_interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % confidence interval of the median of independent samples, whatever their distribution.

    It lies between two order statistics, by the normal approximation to the binomial distribution. With fewer than six
    samples no two are far enough apart, and it reaches from the least to the greatest. (W. J. Conover, Practical
    Nonparametric Statistics, 3.2.)

    Args:
        values: (n,), n at least 1.
    """
    ordered = np.sort(values)
    below = max(0, int((len(ordered) - 1.96 * len(ordered) ** 0.5) / 2))
    return float(ordered[below]), float(ordered[-1 - below])


def interval_share(values: np.ndarray) -> float:
    """Width of the median's confidence interval over the median."""
    low, high = median_interval(values)
    return (high - low) / float(np.median(values))


def sample_until(
    runs: Sequence[Callable[[], None]], clock: Clock, min_sample_seconds: float, precision: Precision,
    checked: Callable[[np.ndarray], Sequence[np.ndarray]], between: Callable[[], None] = lambda: None,
    now: Callable[[], float] = time.perf_counter, warmup_seconds: float | None = None,
    alive: Callable[[], None] = lambda: None,
) -> Sampled:  # fmt: skip
    """Time the runs like `time_interleaved`, until the medians that matter are known to the required precision.

    Neighbouring samples are not quite independent, and frequent checks make it likelier to stop by luck. The interval
    is therefore a stopping rule and a measure of noise, and covers somewhat less than 95 %.

    Args:
        checked: function from (rounds, runs) seconds per call to the quantities, (rounds,) each, whose medians are
            wanted.
        between: function that is called at every check, including the first and the last.
        now: the clock of the cap, in seconds.
        warmup_seconds: least warm-up of each run (default: `WARMUP_SECONDS`).
        alive: function that is called after the warm-up of each run, as a sign of life.
    """
    calls = []
    for run in runs:
        calls.append(warm_up(run, clock, min_sample_seconds, warmup_seconds))
        alive()
    rounds: list[list[float]] = []
    begin, check_at = now(), MIN_ROUNDS
    between()
    for row in _rounds(runs, calls, clock):
        rounds.append(row)
        capped = now() - begin >= precision.cap_seconds
        if len(rounds) < MIN_ROUNDS or (len(rounds) < check_at and not capped):
            continue
        # Checking each of thousands of rounds would cost more than the rounds.
        check_at = max(len(rounds) + 1, int(1.1 * len(rounds)))
        between()
        seconds = np.asarray(rounds)
        shares = tuple(interval_share(values) for values in checked(seconds))
        known = max(shares) <= precision.share
        if known or capped:
            return Sampled(seconds, shares, capped and not known)
    raise AssertionError("rounds never end")


def peak_memory_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most tensor memory that `run` holds at once, beyond what was allocated when it began.

    On CUDA the caching allocator reports it; on the CPU torch's profiler reports every allocation of its allocator.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_stats(device).get(f"{REQUESTED}.current", 0)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.memory_stats(device).get(f"{REQUESTED}.peak", 0) - before)
    from torch.profiler import ProfilerActivity, profile

    # The profiler would warn of tensors that are freed while it runs and were allocated before.
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        run()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
