"""The choice of the tiling that runs a problem: remembered, or tuned on the GPU, or the cost model's first.

Tuning compiles the few tilings that the cost model ranks first in parallel, times each against torch's layer-by-layer
run, and remembers the fastest on disk, by kernel, problem, GPU, libraries and the kernels' own source. A problem is
tuned once per machine.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from kernels import timing
from kernels.cache import cache_folder
from kernels.cost_model import GPU_SPECS, H200, GpuSpec
from kernels.machine import cores

# Tilings that are compiled and timed; the goal is that the best is among the cost model's first three.
TRIED = 4
# Seconds of sampling, in turns, for each tiling that is timed, and of warm-up before. They are short because a search
# meets a new problem in nearly every block, and a network waits while its blocks are tuned.
SECONDS_EACH = 0.02
WARMUP_SECONDS = 0.01
# Seconds that one replay of a CUDA graph should last, and the most calls that it may hold for that: launching a graph
# takes longer than the smallest kernels.
REPLAY_SECONDS = 2e-4
MAX_CALLS = 16
# Replays that are timed to decide on the number of calls.
CALLS_TO_COUNT = 4
# Root mean square of the difference from torch's layers, over that of their output, from which on a result counts as
# wrong: some ten roundings of the dtype.
WRONG = {torch.float16: 1e-2, torch.bfloat16: 8e-2, torch.float32: 1e-3}
# Source files; a change to any of them invalidates the remembered tilings.
SOURCES = (
    "cost_model.py",
    "device_functions.py",
    "convfirst.py",
    "layered.py",
    "mbconv.py",
    "packing.py",
    "stem.py",
    "head.py",
    "problem.py",
)

LAYER_BY_LAYER = "layer by layer"
_REFUSALS = (
    triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError, triton.compiler.errors.CompilationError,
)  # fmt: skip


def refuses(error: BaseException) -> bool:
    """Whether an error says that Triton cannot compile or run a tiling here; any other error is a bug."""
    # A failing pass of the compiler has no exception class of its own.
    return isinstance(error, _REFUSALS) or (isinstance(error, RuntimeError) and "PassManager" in str(error))


@dataclass(frozen=True)
class Choice:
    """The choice of what runs a problem.

    Args:
        tilings: tilings of the fused kernel, the fastest or likeliest first.
        source: origin of the choice: "counted" by the cost model, "tuned", or "remembered".
        times_ms: measured times of the tilings; empty if counted.
        layers_ms: measured time of torch layer by layer; None if counted.
    """

    tilings: tuple[Any, ...]
    source: str
    times_ms: tuple[float, ...] = ()
    layers_ms: float | None = None

    @property
    def tiling(self) -> Any | None:
        """The tiling to run; None if torch's layers are faster, or no tiling fits."""
        if not self.tilings or (self.layers_ms is not None and self.times_ms[0] > self.layers_ms):
            return None
        return self.tilings[0]

    def describe(self) -> str:
        """Describe the choice, such as `fused: 0.0810 ms fused, 0.2030 ms layer by layer`."""
        launches = getattr(self.tilings[0], "launches", 1) if self.tilings else 1
        own = "fused" if launches == 1 else f"in {launches} launches"
        word = LAYER_BY_LAYER if self.tiling is None else own
        if not self.tilings or self.layers_ms is None:
            return f"{word}, not timed"
        return f"{word}: {self.times_ms[0]:.4f} ms {own}, {self.layers_ms:.4f} ms {LAYER_BY_LAYER}"


@dataclass(frozen=True)
class Kernel:
    """A fused kernel as the tuner sees it.

    Args:
        name: part of the key under which choices are remembered.
        tiling: the class of its tilings.
        tilings: function (problem, GPU) -> the tilings that are worth trying, the likeliest first.
        launch: function (x, packed weights and a block's scratch, problem, tiling) -> output.
        layer_by_layer: function (x, layers, problem) -> output, as torch runs it.
    """

    name: str
    tiling: type
    tilings: Callable[[Any, GpuSpec], Sequence[Any]]
    launch: Callable[[Tensor, Sequence[Tensor], Any, Any], Tensor]
    layer_by_layer: Callable[[Tensor, Sequence[Tensor], Any], Tensor]


@functools.cache
def sources_digest() -> str:
    """A digest of the kernels' sources, which identifies results that depend on them."""
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in SOURCES)).hexdigest()[:12]


@functools.cache
def _machine(device: torch.device) -> str:
    if device.type != "cuda":
        return "interpreter"
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return f"{torch.cuda.get_device_name(device)} sm {capability} torch {torch.__version__} triton {triton.__version__}"


@functools.cache
def gpu_spec(device: torch.device) -> GpuSpec:
    """A device's data for the cost model: its own sizes, and the rates of the nearest GPU in `GPU_SPECS`."""
    if device.type != "cuda":
        return H200
    major, minor = torch.cuda.get_device_capability(device)
    nearest = max((known for known in GPU_SPECS if known <= 10 * major + minor), default=min(GPU_SPECS))
    properties: Any = torch.cuda.get_device_properties(device)
    return replace(
        GPU_SPECS[nearest],
        multiprocessors=properties.multi_processor_count,
        registers=properties.regs_per_multiprocessor,
        shared_bytes=properties.shared_memory_per_block_optin,
    )


def _file(kernel: Kernel, problem: Any, device: torch.device) -> Path:
    """The file of a choice: each has its own, so that processes that tune at the same time keep each other's."""
    # Torch's layers take other times if cuDNN searches for its best algorithms.
    searches = torch.backends.cudnn.benchmark
    key = json.dumps([kernel.name, asdict(problem), _machine(device), searches, sources_digest()], sort_keys=True)
    return cache_folder() / "tilings" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


def _read(kernel: Kernel, problem: Any, device: torch.device) -> Choice | None:
    try:
        fields = json.loads(_file(kernel, problem, device).read_text())
        tilings = tuple(kernel.tiling(**each) for each in fields["tilings"])
        times_ms = tuple(map(float, fields["times_ms"]))
        if len(tilings) != len(times_ms):
            return None
        return Choice(tilings, "remembered", times_ms, float(fields["layers_ms"]))
    except (OSError, ValueError, KeyError, TypeError):
        # There is no file, or none that this version can read: the problem is tuned again.
        return None


def _write(kernel: Kernel, problem: Any, device: torch.device, choice: Choice) -> None:
    path = _file(kernel, problem, device)
    fields = {
        "kernel": kernel.name, "problem": asdict(problem), "machine": _machine(device),
        "tilings": [asdict(tiling) for tiling in choice.tilings], "times_ms": choice.times_ms,
        "layers_ms": choice.layers_ms,
    }  # fmt: skip
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        try:
            part.write_text(json.dumps(fields, indent=1))
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError:
        # A cache that cannot be written costs time and changes no result.
        return


def tried(kernel: Kernel, problem: Any, gpu: GpuSpec) -> list[Any]:
    """The tilings that tuning compiles and times: the likeliest `TRIED`."""
    return list(kernel.tilings(problem, gpu)[:TRIED])


_chosen: dict[tuple[str, Any, torch.device], Choice] = {}


def choose(kernel: Kernel, problem: Any, device: torch.device) -> Choice:
    """Choose what runs a supported problem now: the tuned choice if there is one, else the cost model's first."""
    key = (kernel.name, problem, device)
    if key not in _chosen:
        remembered = _read(kernel, problem, device) if device.type == "cuda" else None
        _chosen[key] = remembered or Choice(tuple(tried(kernel, problem, gpu_spec(device))), "counted")
    return _chosen[key]


@dataclass(frozen=True)
class Task:
    """A problem to tune, with the tensors that the kernel's `launch` and `layer_by_layer` take."""

    kernel: Kernel
    problem: Any
    x: Tensor
    weights: Sequence[Tensor]
    layers: Sequence[Tensor]


def tune(tasks: Sequence[Task]) -> list[Choice]:
    """Tune the problems that were not tuned before, on the CUDA device of their tensors.

    All tilings of all tasks compile in parallel first; then each task is timed alone.

    Args:
        tasks: the problems, of which equal ones are tuned once.

    Returns:
        The choices, in the order of the tasks.
    """
    wanted: dict[tuple[str, Any], tuple[Task, list[Any]]] = {}
    for task in tasks:
        if choose(task.kernel, task.problem, task.x.device).source != "counted":
            continue
        tilings = tried(task.kernel, task.problem, gpu_spec(task.x.device))
        wanted[task.kernel.name, task.problem] = (task, tilings)
    if wanted:
        compile_together([(task, tiling) for task, tilings in wanted.values() for tiling in tilings])
    for task, tilings in wanted.values():
        choice = time_tilings(task, tilings)
        _chosen[task.kernel.name, task.problem, task.x.device] = choice
        _write(task.kernel, task.problem, task.x.device, choice)
    return [choose(task.kernel, task.problem, task.x.device) for task in tasks]


def compile_together(jobs: Sequence[tuple[Task, Any]]) -> float:
    """Compile the kernels of several launches in a pool of threads.

    Triton collects the compilations of `warmup` calls, but a launch would wait for its own. Each launch is therefore
    made with the kernels' `run` turned into a warm-up, which runs nothing.

    Returns:
        Seconds that it took.
    """
    begin = time.perf_counter()
    with (
        ThreadPoolExecutor(max(2, cores())) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
        _warming_up(),
    ):
        for task, tiling in jobs:
            # Triton compiles for the current device.
            with torch.cuda.device(task.x.device):
                task.kernel.launch(task.x, task.weights, task.problem, tiling)
    return time.perf_counter() - begin


@contextlib.contextmanager
def _warming_up() -> Iterator[None]:
    """Context in which launches compile and do not run."""
    launchable = triton.runtime.jit.JITFunction
    before = launchable.__getitem__
    launchable.__getitem__ = lambda kernel, grid: functools.partial(kernel.run, grid=grid, warmup=True)
    try:
        yield
    finally:
        launchable.__getitem__ = before


def _graph(run: Callable[[], Tensor], calls: int) -> Callable[[], None]:
    """Capture a CUDA graph of some calls, and return its replay; only the last call's output is kept."""

    def several() -> Tensor:
        for _ in range(calls - 1):
            run()
        return run()

    graph, output = timing.captured(several)

    def replay() -> None:
        graph.replay()
        assert output is not None

    return replay


def is_wrong(output: Tensor, expected: Tensor) -> bool:
    """Whether an output differs from torch's own by more than rounding."""
    error = (output.float() - expected.float()).norm() / expected.float().norm()
    # NaN compares as false.
    return not bool(error < WRONG[expected.dtype])


def exact(dtype: torch.dtype) -> AbstractContextManager[None]:
    """Context in which cuDNN's float32 convolutions, which serve for checking, do not use TF32.

    Nothing else changes: `enabled` is set because the default of `torch.backends.cudnn.flags` would turn cuDNN off.
    """
    if dtype != torch.float32:
        return contextlib.nullcontext()
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def time_tilings(task: Task, tilings: Sequence[Any]) -> Choice:
    """Time torch's layers and the tilings that run and are correct, in turns and in CUDA graphs."""
    device = task.x.device
    clock = timing.clock_for(device)
    runs: dict[Any, Callable[[], None]] = {}
    calls: list[int] = []

    def add(name: Any, run: Callable[[], Tensor]) -> None:
        """Capture a function that has run before, with as many calls as a replay should hold."""
        # The graph's replay is timed, as a call from Python takes many times as long as a small kernel.
        replay = _graph(run, 1)
        replay()
        seconds = max(clock(replay, CALLS_TO_COUNT) / CALLS_TO_COUNT, 1e-9)
        count = max(1, min(MAX_CALLS, round(REPLAY_SECONDS / seconds)))
        runs[name] = replay if count == 1 else _graph(run, count)
        calls.append(count)

    with torch.inference_mode(), torch.cuda.device(device), exact(task.x.dtype):
        layers = functools.partial(task.kernel.layer_by_layer, task.x, task.layers, task.problem)
        expected = layers()
        add(LAYER_BY_LAYER, layers)
        for tiling in tilings:
            launch = functools.partial(task.kernel.launch, task.x, task.weights, task.problem, tiling)
            try:
                if is_wrong(launch(), expected):
                    # A compiler's mistake must cost a tiling, and not make a network wrong.
                    warnings.warn(
                        f"{task.kernel.name}: {tiling} computes {task.problem} wrong, it is not used", stacklevel=2
                    )
                    continue
                add(tiling, launch)
            except Exception as error:
                if not refuses(error):
                    error.add_note(f"{task.kernel.name}: {tiling} of {task.problem}")
                    raise
        samples = timing.time_interleaved(
            list(runs.values()), clock, SECONDS_EACH * len(runs), REPLAY_SECONDS, WARMUP_SECONDS
        )
    medians = dict(zip(runs, (np.median(samples, axis=0) * 1e3 / calls).tolist(), strict=True))
    layers_ms = medians.pop(LAYER_BY_LAYER)
    by_time = sorted(medians, key=medians.__getitem__)
    return Choice(tuple(by_time), "tuned", tuple(medians[tiling] for tiling in by_time), layers_ms)
