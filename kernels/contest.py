"""The contest of a problem's tilings with each other and with torch's layers, on a GPU.

Each tiling is launched once and checked against torch's layers. All are then sampled once, behind a kernel that keeps
the GPU busy until the launches are queued, so that the time between two events is the GPU's and not Python's. What is
far behind is dropped. The others are captured in one CUDA graph, in turns and each between two events; its replays are
the samples that decide.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels import timing
from kernels.attempts import Attempts
from kernels.compiling import Task, refuses

# Calls of the one sample, and cycles for which the GPU is kept busy meanwhile: more than a millisecond, in which Python
# queues them, a dozen launches of torch's layers or of a tiling in three launches included.
CALLS, BUSY_CYCLES = 4, 2_000_000
# What took so many times as long as the fastest in its one sample is dropped; torch's layers later, as their launches
# take Python longer to queue.
DROPPED, LAYERS_DROPPED = 1.5, 3.0
# Seconds that a contender's calls in the graph should last, and the most calls for that: a call before them refills the
# caches that the neighbour has emptied, and events add a microsecond.
SECONDS_EACH = 2e-4
MAX_CALLS = 16
# Replays of the graph that are timed, and replays before; each takes about a millisecond.
REPLAYS, WARMUP_REPLAYS = 20, 5
# Root mean square of the difference from torch's layers, over that of their output, from which on a result counts as
# wrong: some ten roundings of the dtype.
WRONG = {torch.float16: 1e-2, torch.bfloat16: 8e-2, torch.float32: 1e-3}

LAYER_BY_LAYER = "layer by layer"


@dataclass(frozen=True)
class Result:
    """The result of a contest.

    Args:
        tilings: the tilings that run and compute correctly, the fastest first.
        times_ms: the time of each.
        layers_ms: the time of torch's layers.
    """

    tilings: tuple[Any, ...]
    times_ms: tuple[float, ...]
    layers_ms: float


class Pool:
    """The memory that the graphs of one contest after the other share.

    It is given back when the last graph is; so the latest is kept until the next one is captured.
    """

    def __init__(self) -> None:
        self.handle: Any = None
        self.latest: object = None

    def captured(self, run: Callable[[], object]) -> torch.cuda.CUDAGraph:
        if self.handle is None:
            self.handle = torch.cuda.graph_pool_handle()
        graph, _ = timing.captured(run, calls=1, pool=self.handle)
        self.latest = graph
        return graph


def is_wrong(output: Tensor, expected: Tensor) -> bool:
    """Whether an output differs from torch's own by more than rounding."""
    error = (output.float() - expected.float()).norm() / expected.float().norm()
    # NaN compares as false.
    return not bool(error < WRONG[expected.dtype])


def exact(dtype: torch.dtype) -> AbstractContextManager[None]:
    """Context in which cuDNN's float32 convolutions, which serve for checking, do not use TF32.

    Nothing else changes: what is not named, `torch.backends.cudnn.flags` would turn off.
    """
    if dtype != torch.float32:
        return contextlib.nullcontext()
    return torch.backends.cudnn.flags(
        enabled=True, benchmark=torch.backends.cudnn.benchmark, deterministic=torch.backends.cudnn.deterministic,
        allow_tf32=False,
    )  # fmt: skip


def hold(
    task: Task, tilings: Sequence[Any], attempts: Attempts, pool: Pool, alive: Callable[[], None] = lambda: None
) -> Result:
    """Time torch's layers and the tilings that run and are correct.

    Args:
        attempts: the records of the problem, in which its launches are written down while they last.
        alive: function that is called now and then, as a sign of life.
    """
    with torch.inference_mode(), torch.cuda.device(task.x.device), exact(task.x.dtype):
        layers = functools.partial(task.kernel.layer_by_layer, task.x, task.layers, task.problem)
        runs: dict[Any, Callable[[], Tensor]] = {LAYER_BY_LAYER: layers}
        expected = layers()
        for tiling in tilings:
            alive()
            launch = functools.partial(task.kernel.launch, task.x, task.weights, task.problem, tiling)
            if _computes(task, tiling, launch, expected, attempts):
                runs[tiling] = launch
        alive()
        seconds = _seconds(runs, attempts, pool)
    alive()
    layers_ms = seconds.pop(LAYER_BY_LAYER) * 1e3
    by_time = sorted(seconds, key=seconds.__getitem__)
    return Result(tuple(by_time), tuple(1e3 * seconds[tiling] for tiling in by_time), layers_ms)


def _computes(task: Task, tiling: Any, launch: Callable[[], Tensor], expected: Tensor, attempts: Attempts) -> bool:
    """Whether a tiling runs and computes what torch's layers do; this waits for the GPU."""
    try:
        with attempts.of([tiling]):
            wrong = is_wrong(launch(), expected)
    except Exception as error:
        if refuses(error):
            return False
        error.add_note(f"{task.kernel.name}: {tiling} of {task.problem}")
        raise
    if wrong:
        # A compiler's mistake must cost a tiling, and not make a network wrong.
        warnings.warn(f"{task.kernel.name}: {tiling} computes {task.problem} wrong, it is not used", stacklevel=2)
    return not wrong


def _seconds(runs: Mapping[Any, Callable[[], Tensor]], attempts: Attempts, pool: Pool) -> dict[Any, float]:
    """Seconds of each run; those of a run that is far behind are known less well."""
    tilings = [name for name in runs if name != LAYER_BY_LAYER]
    if attempts.suspect():
        # One of these has broken a process when they ran together: alone, it will show which.
        alone: dict[Any, float] = {}
        for name, run in runs.items():
            with attempts.of([name] if name != LAYER_BY_LAYER else []):
                alone |= sampled({name: run}, pool)
        attempts.clear_suspicion()
        return alone
    with attempts.of(tilings, alone=False):
        return sampled(runs, pool)


def sampled(runs: Mapping[Any, Callable[[], Tensor]], pool: Pool) -> dict[Any, float]:
    """Seconds of each run that is not far behind from a graph, and of the others from one sample."""
    first = one_sample(runs)
    fastest = min(first.values())
    last = {
        name: run
        for name, run in runs.items()
        if first[name] <= fastest * (LAYERS_DROPPED if name == LAYER_BY_LAYER else DROPPED)
    }
    calls = {name: max(1, min(MAX_CALLS, round(SECONDS_EACH / max(first[name], 1e-9)))) for name in last}
    return first | samples_in_turns(last, calls, pool)


def one_sample(runs: Mapping[Any, Callable[[], Tensor]]) -> dict[Any, float]:
    """The GPU's seconds for a call of each of some functions, from one sample each; this waits for the GPU once."""
    events = {}
    for name, run in runs.items():
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(BUSY_CYCLES)
        begin.record()
        for _ in range(CALLS):
            run()
        end.record()
        events[name] = begin, end
    end.synchronize()
    return {name: begin.elapsed_time(end) / 1e3 / CALLS for name, (begin, end) in events.items()}


def samples_in_turns(
    runs: Mapping[Any, Callable[[], Tensor]], calls: Mapping[Any, int], pool: Pool
) -> dict[Any, float]:
    """The median seconds for a call of each of some functions, which one CUDA graph runs in turns.

    Args:
        calls: number of timed calls of each in the graph.
    """
    # An external event is a node of the graph, and is recorded anew by each replay.
    events = {name: [torch.cuda.Event(enable_timing=True, external=True) for _ in range(2)] for name in runs}

    def in_turns() -> None:
        for name, run in runs.items():
            run()
            events[name][0].record()
            for _ in range(calls[name]):
                run()
            events[name][1].record()

    graph = pool.captured(in_turns)

    def replay() -> None:
        graph.replay()
        # Not the last event: until the graph reaches it, it may stand for its record in the replay before.
        torch.cuda.current_stream().synchronize()

    for _ in range(WARMUP_REPLAYS):
        replay()
    samples = []
    for _ in range(REPLAYS):
        replay()
        samples.append([start.elapsed_time(end) / 1e3 / calls[name] for name, (start, end) in events.items()])
    return dict(zip(runs, np.median(samples, axis=0).tolist(), strict=True))
