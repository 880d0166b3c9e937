"""Which tiling runs a problem: remembered, or tuned on the GPU, or the cost model's first choice.

Tuning compiles the few tilings that the cost model ranks first side by side, times each against torch's layer by layer
run, and remembers the fastest on disk: by kernel, problem, GPU, libraries and the kernels' own source. A problem is
tuned once per machine.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from kernels import timing
from kernels.cost_model import H200, LIMITS, Limits

# Tilings that are compiled and timed; the cost model is meant to have the best among its first three.
TRIED = 4
# The best so far is timed beside each rival for so long.
SECONDS_PER_RIVAL = 0.02
# Sources whose change makes remembered tilings void.
SOURCES = ("device_functions.py", "convfirst.py", "mbconv.py", "stem.py", "head.py", "problem.py")

LAYER_BY_LAYER = "layer by layer"
# How Triton says that it cannot compile or run a tiling here; any other error is a bug.
REFUSALS = (
    triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError, triton.compiler.errors.CompilationError,
)  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """What runs a problem.

    Args:
        tiling: the best of the fused kernel.
        fused: whether that runs, rather than torch layer by layer.
        source: "counted", "tuned" or "remembered".
        fused_ms, layers_ms: as timed when tuned; None otherwise.
    """

    tiling: Any
    fused: bool
    source: str
    fused_ms: float | None = None
    layers_ms: float | None = None


@dataclass(frozen=True)
class Kernel:
    """A kind of fused kernel, as the tuner knows it.

    Args:
        name: by which choices are remembered.
        tiling: the class of its tilings.
        tilings: those worth trying for a problem on a GPU, the likeliest first; never empty for a supported problem.
        launch: (x, packed weights, problem, tiling) -> output.
        layer_by_layer: (x, layers, problem) -> output, as torch runs it.
    """

    name: str
    tiling: type
    tilings: Callable[[Any, Limits], Sequence[Any]]
    launch: Callable[[Tensor, Sequence[Tensor], Any, Any], Tensor]
    layer_by_layer: Callable[[Tensor, Sequence[Tensor], Any], Tensor]


def cache_folder() -> Path:
    """Where choices are remembered: `CONVFIRST_CACHE`, or convfirst-nas in the user's cache folder."""
    if folder := os.environ.get("CONVFIRST_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "convfirst-nas"


@functools.cache
def _sources_digest() -> str:
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in SOURCES)).hexdigest()[:12]


@functools.cache
def _machine(device: torch.device) -> str:
    if device.type != "cuda":
        return "interpreter"
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return f"{torch.cuda.get_device_name(device)} sm {capability} torch {torch.__version__} triton {triton.__version__}"


@functools.cache
def limits_of(device: torch.device) -> Limits:
    """What the cost model counts with on a device: its own sizes, and the rates of the nearest GPU that is known."""
    if device.type != "cuda":
        return H200
    major, minor = torch.cuda.get_device_capability(device)
    nearest = max((known for known in LIMITS if known <= 10 * major + minor), default=min(LIMITS))
    properties: Any = torch.cuda.get_device_properties(device)
    return replace(
        LIMITS[nearest],
        multiprocessors=properties.multi_processor_count,
        registers=properties.regs_per_multiprocessor,
        shared_bytes=properties.shared_memory_per_block_optin,
    )


def _file(kernel: Kernel, problem: Any, device: torch.device) -> Path:
    """One small file a choice: processes that tune at once cannot lose each other's."""
    key = json.dumps([kernel.name, asdict(problem), _machine(device), _sources_digest()], sort_keys=True)
    return cache_folder() / "tilings" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


def _read(kernel: Kernel, problem: Any, device: torch.device) -> Choice | None:
    try:
        fields = json.loads(_file(kernel, problem, device).read_text())
        tiling = kernel.tiling(**fields["tiling"])
        return Choice(tiling, fields["fused"], "remembered", fields["fused_ms"], fields["layers_ms"])
    except (OSError, ValueError, KeyError, TypeError):
        # Nothing there, or nothing that this version can read: it is tuned anew.
        return None


def _write(kernel: Kernel, problem: Any, device: torch.device, choice: Choice) -> None:
    path = _file(kernel, problem, device)
    fields = {
        "kernel": kernel.name, "problem": asdict(problem), "machine": _machine(device),
        "tiling": asdict(choice.tiling), "fused": choice.fused,
        "fused_ms": choice.fused_ms, "layers_ms": choice.layers_ms,
    }  # fmt: skip
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(fields, file, indent=1)
        os.replace(file.name, path)
    except OSError:
        # Remembering saves time and decides nothing.
        return


_chosen: dict[tuple[str, Any, torch.device], Choice] = {}


def choose(kernel: Kernel, problem: Any, device: torch.device) -> Choice:
    """What runs a supported problem now: the tuned choice if there is one, else the cost model's first."""
    key = (kernel.name, problem, device)
    if key not in _chosen:
        remembered = _read(kernel, problem, device) if device.type == "cuda" else None
        _chosen[key] = remembered or Choice(kernel.tilings(problem, limits_of(device))[0], True, "counted")
    return _chosen[key]


def forget() -> None:
    """Forget what this process has chosen; files stay."""
    _chosen.clear()


@dataclass(frozen=True)
class Task:
    """One problem to tune with the tensors it runs on."""

    kernel: Kernel
    problem: Any
    x: Tensor
    weights: Sequence[Tensor]
    layers: Sequence[Tensor]


def tune(tasks: Sequence[Task]) -> list[Choice]:
    """Tune what was not tuned before, on the CUDA device that the tensors are on.

    All tilings of all tasks compile side by side first; then each task is timed alone.

    Args:
        tasks: equal problems are tuned once.

    Returns:
        The choices, in the order of the tasks.
    """
    wanted: dict[tuple[str, Any], tuple[Task, list[Any]]] = {}
    for task in tasks:
        if choose(task.kernel, task.problem, task.x.device).source != "counted":
            continue
        wanted[task.kernel.name, task.problem] = (
            task,
            list(task.kernel.tilings(task.problem, limits_of(task.x.device))[:TRIED]),
        )
    if wanted:
        compile_together([(task, tiling) for task, tilings in wanted.values() for tiling in tilings])
    for task, tilings in wanted.values():
        choice = _fastest(task, tilings)
        _chosen[task.kernel.name, task.problem, task.x.device] = choice
        _write(task.kernel, task.problem, task.x.device, choice)
    return [choose(task.kernel, task.problem, task.x.device) for task in tasks]


def compile_together(jobs: Sequence[tuple[Task, Any]]) -> float:
    """Compile the kernels of several launches in a pool of threads; seconds it took.

    Triton collects the compilations of `warmup` calls; a launch made meanwhile would wait for its own. So each launch
    is made with the kernels' `run` turned into a warm-up, which runs nothing.
    """
    begin = time.perf_counter()
    with (
        ThreadPoolExecutor(max(2, os.cpu_count() or 2)) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
        _warming_up(),
    ):
        for task, tiling in jobs:
            task.kernel.launch(task.x, task.weights, task.problem, tiling)
    return time.perf_counter() - begin


class _warming_up:
    """Within it launches compile and do not run."""

    def __enter__(self) -> None:
        self.before = triton.runtime.jit.JITFunction.__getitem__

        def warming(kernel: Any, grid: Any) -> Callable[..., Any]:
            return functools.partial(kernel.run, grid=grid, warmup=True)

        triton.runtime.jit.JITFunction.__getitem__ = warming

    def __exit__(self, *exc: object) -> None:
        triton.runtime.jit.JITFunction.__getitem__ = self.before


def _graph(run: Callable[[], Tensor]) -> Callable[[], None]:
    """The replay of a CUDA graph of one call, which has been made a few times before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # On the very stream of the first runs: what libraries set up may belong to it.
    with torch.cuda.graph(graph, stream=side):
        kept = run()

    def replay() -> None:
        graph.replay()
        assert kept is not None

    return replay


def _fastest(task: Task, tilings: Sequence[Any]) -> Choice:
    """The fastest of the tilings that run, against torch, timed in turns in CUDA graphs."""
    device = task.x.device
    runs: dict[Any, Callable[[], None]] = {}
    with torch.inference_mode(), torch.cuda.device(device):
        runs[LAYER_BY_LAYER] = _graph(lambda: task.kernel.layer_by_layer(task.x, task.layers, task.problem))
        for tiling in tilings:
            try:
                runs[tiling] = _graph(functools.partial(task.kernel.launch, task.x, task.weights, task.problem, tiling))
            except REFUSALS:
                continue
        samples = timing.time_interleaved(
            list(runs.values()), timing.clock_for(device), SECONDS_PER_RIVAL * len(runs), 2e-4
        )
    medians = dict(zip(runs, np.median(samples, axis=0) * 1e3, strict=True))
    layers_ms = float(medians.pop(LAYER_BY_LAYER))
    if not medians:
        return Choice(tilings[0], False, "tuned", None, layers_ms)
    best = min(medians, key=medians.__getitem__)
    fused_ms = float(medians[best])
    return Choice(best, fused_ms <= layers_ms, "tuned", fused_ms, layers_ms)
