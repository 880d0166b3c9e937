"""The choice of the tiling that runs a problem: remembered, or tuned on the GPU, or the cost model's first.

Tuning compiles the few tilings that the cost model ranks first, lets them contend with each other and with torch's
layer-by-layer run (`kernels.contest`), and remembers the fastest on disk, by kernel, problem, GPU, libraries and the
kernels' own source. A problem is tuned once per machine. A tiling that faulted, hung or ended its process is never
tried again (`kernels.attempts`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton

from kernels import contest
from kernels.attempts import Attempts
from kernels.cache import cache_folder
from kernels.compiling import Kernel, Task, compile_together, forget_all_but, kernels_of, loaded_kernels
from kernels.cost_model import GPU_SPECS, H200, GpuSpec

# Tilings that are compiled and timed; the goal is that the best is among the cost model's first three.
TRIED = 4
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
# Launches of each tiling, one after the other, by which one that breaks a process now and then shows itself.
EXAMINED = 200


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

    def without(self, tilings: Set[Any]) -> Choice:
        """The choice without some tilings."""
        kept = [index for index, tiling in enumerate(self.tilings) if tiling not in tilings]
        times_ms = tuple(self.times_ms[index] for index in kept) if self.times_ms else ()
        return replace(self, tilings=tuple(self.tilings[index] for index in kept), times_ms=times_ms)

    def describe(self) -> str:
        """Describe the choice, such as `fused: 0.0810 ms fused, 0.2030 ms layer by layer`."""
        launches = getattr(self.tilings[0], "launches", 1) if self.tilings else 1
        own = "fused" if launches == 1 else f"in {launches} launches"
        word = contest.LAYER_BY_LAYER if self.tiling is None else own
        if not self.tilings or self.layers_ms is None:
            return f"{word}, not timed"
        return f"{word}: {self.times_ms[0]:.4f} ms {own}, {self.layers_ms:.4f} ms {contest.LAYER_BY_LAYER}"


@dataclass(frozen=True)
class Target:
    """What choices depend on beside the problem; a process without the GPU is told it by one that has it.

    Args:
        machine: names of the GPU and of the libraries.
        gpu: the GPU's data for the cost model.
        capability: its compute capability, such as 90.
        searches: whether cuDNN searches for its best algorithms, by which torch's layers take other times.
    """

    machine: str
    gpu: GpuSpec
    capability: int
    searches: bool

    @classmethod
    def of(cls, device: torch.device) -> Target:
        capability = 0
        if device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            capability = 10 * major + minor
        return cls(_machine(device), gpu_spec(device), capability, bool(torch.backends.cudnn.benchmark))


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


def _key(kernel: Kernel, problem: Any, target: Target) -> str:
    """The name under which a choice is remembered."""
    fields = [kernel.name, asdict(problem), target.machine, target.searches, sources_digest()]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:24]


def _file(kernel: Kernel, problem: Any, target: Target) -> Path:
    """The file of a choice: each has its own, so that processes that tune at the same time keep each other's."""
    return cache_folder() / "tilings" / f"{_key(kernel, problem, target)}.json"


def attempts(kernel: Kernel, problem: Any, target: Target) -> Attempts:
    """The records of a problem's launches."""
    return Attempts(_key(kernel, problem, target), kernel.tiling)


def remembered(kernel: Kernel, problem: Any, target: Target) -> Choice | None:
    """The choice that this machine has tuned before, without the tilings that have broken a process since."""
    try:
        fields = json.loads(_file(kernel, problem, target).read_text())
        tilings = tuple(kernel.tiling(**each) for each in fields["tilings"])
        times_ms = tuple(map(float, fields["times_ms"]))
        if len(tilings) != len(times_ms):
            return None
        found = Choice(tilings, "remembered", times_ms, float(fields["layers_ms"]))
    except (OSError, ValueError, KeyError, TypeError):
        # There is no file, or none that this version can read: the problem is tuned again.
        return None
    return found.without(attempts(kernel, problem, target).faulty())


def _write(kernel: Kernel, problem: Any, target: Target, choice: Choice) -> None:
    path = _file(kernel, problem, target)
    fields = {
        "kernel": kernel.name, "problem": asdict(problem), "machine": target.machine,
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


def tried(kernel: Kernel, problem: Any, gpu: GpuSpec, faulty: Set[Any] = frozenset()) -> list[Any]:
    """The tilings that tuning compiles and times: the likeliest `TRIED` of those that are not faulty."""
    return [tiling for tiling in kernel.tilings(problem, gpu) if tiling not in faulty][:TRIED]


def wanted(kernel: Kernel, problem: Any, target: Target) -> list[Any]:
    """The tilings whose kernels a process will launch that prepares for the problem."""
    choice = remembered(kernel, problem, target)
    if choice is not None:
        return [] if choice.tiling is None else [choice.tiling]
    return tried(kernel, problem, target.gpu, attempts(kernel, problem, target).faulty())


_chosen: dict[tuple[str, Any, torch.device], Choice] = {}


def choose(kernel: Kernel, problem: Any, device: torch.device) -> Choice:
    """Choose what runs a supported problem now: the tuned choice if there is one, else the cost model's first."""
    key = (kernel.name, problem, device)
    if key not in _chosen:
        found, faulty = None, set[Any]()
        if device.type == "cuda":
            target = Target.of(device)
            found, faulty = remembered(kernel, problem, target), attempts(kernel, problem, target).faulty()
        _chosen[key] = found or Choice(tuple(tried(kernel, problem, gpu_spec(device), faulty)), "counted")
    return _chosen[key]


def tune(tasks: Sequence[Task], alive: Callable[[], None] = lambda: None) -> list[Choice]:
    """Tune the problems that were not tuned before, on the CUDA device of their tensors.

    The kernels of all tasks are compiled first, as far as Triton's cache on disk lacks them; then each task is timed
    alone.

    Args:
        tasks: the problems, of which equal ones are tuned once.
        alive: function that is called now and then, as a sign of life.

    Returns:
        The choices, in the order of the tasks.
    """
    new: dict[tuple[str, Any], tuple[Task, list[Any], Attempts]] = {}
    for task in tasks:
        device = task.x.device
        if choose(task.kernel, task.problem, device).source != "counted":
            continue
        target = Target.of(device)
        records = attempts(task.kernel, task.problem, target)
        tilings = tried(task.kernel, task.problem, target.gpu, records.faulty())
        new[task.kernel.name, task.problem] = (task, tilings, records)
    kept = loaded_kernels()
    if new:
        compile_together([(task, tiling) for task, tilings, _ in new.values() for tiling in tilings], alive)
    pool = contest.Pool()
    for task, tilings, records in new.values():
        choice = time_tilings(task, tilings, records, pool, alive)
        _chosen[task.kernel.name, task.problem, task.x.device] = choice
        _write(task.kernel, task.problem, Target.of(task.x.device), choice)
        if choice.tiling is not None:
            with torch.cuda.device(task.x.device):
                kept += kernels_of(functools.partial(_launch, task, choice.tiling))
    if new:
        # Those that lost are most of them.
        forget_all_but(kept)
    return [choose(task.kernel, task.problem, task.x.device) for task in tasks]


def time_tilings(
    task: Task, tilings: Sequence[Any], records: Attempts | None = None, pool: contest.Pool | None = None,
    alive: Callable[[], None] = lambda: None,
) -> Choice:  # fmt: skip
    """Time torch's layers and the tilings that run and are correct; see `contest.hold`."""
    records = records or attempts(task.kernel, task.problem, Target.of(task.x.device))
    result = contest.hold(task, tilings, records, pool or contest.Pool(), alive)
    return Choice(result.tilings, "tuned", result.times_ms, result.layers_ms)


def examine(tasks: Sequence[Task], alive: Callable[[], None] = lambda: None) -> None:
    """Launch what runs each problem many times over, with a record of it, after a network broke its process.

    The network's launches have no records. If one of them breaks this process in the same way, its record remains, and
    another of the tilings is chosen from then on.
    """
    for task in tasks:
        device = task.x.device
        tiling = choose(task.kernel, task.problem, device).tiling
        alive()
        if tiling is not None:
            # What still has to be compiled is not the tiling's fault.
            compile_together([(task, tiling)], alive)
            records = attempts(task.kernel, task.problem, Target.of(device))
            with torch.inference_mode(), torch.cuda.device(device), records.of([tiling]):
                for _ in range(EXAMINED):
                    _launch(task, tiling)
                torch.cuda.synchronize(device)
        alive()


def _launch(task: Task, tiling: Any) -> Any:
    return task.kernel.launch(task.x, task.weights, task.problem, tiling)
