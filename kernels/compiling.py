"""Compilation ahead of launches: side by side in threads, or in a process without a GPU, into Triton's cache on disk.

Compiling a kernel takes some 0.6 s of a core, a third of it under Python's interpreter lock, so that threads gain
little beyond three. A search therefore compiles in processes of their own (`nas.latency.compile_ahead`), which need no
GPU: what they leave in Triton's cache is loaded in a millisecond by the process that launches.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from kernels.cost_model import GpuSpec
from kernels.machine import cores

WARP = 32
_REFUSALS = (
    triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError, triton.compiler.errors.CompilationError,
)  # fmt: skip


def refuses(error: BaseException) -> bool:
    """Whether an error says that Triton cannot compile or run a tiling here; any other error is a bug."""
    # A failing pass of the compiler has no exception class of its own.
    return isinstance(error, _REFUSALS) or (isinstance(error, RuntimeError) and "PassManager" in str(error))


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


@dataclass(frozen=True)
class Task:
    """A problem to tune, with the tensors that the kernel's `launch` and `layer_by_layer` take."""

    kernel: Kernel
    problem: Any
    x: Tensor
    weights: Sequence[Tensor]
    layers: Sequence[Tensor]


def compile_together(jobs: Sequence[tuple[Task, Any]], alive: Callable[[], None] = lambda: None) -> float:
    """Compile the kernels of several launches in a pool of threads.

    Triton collects the compilations of `warmup` calls, but a launch would wait for its own. Each launch is therefore
    made with the kernels' `run` turned into a warm-up, which runs nothing.

    Args:
        alive: function that is called after each, from several threads.

    Returns:
        Seconds that it took.
    """
    begin = time.perf_counter()
    with (
        _Signalling(max(2, cores()), alive) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
        warming_up(),
    ):
        for task, tiling in jobs:
            # Triton compiles for the current device.
            with torch.cuda.device(task.x.device):
                task.kernel.launch(task.x, task.weights, task.problem, tiling)
    return time.perf_counter() - begin


class _Signalling(ThreadPoolExecutor):
    """Threads that give a sign of life after each thing that they do."""

    def __init__(self, count: int, alive: Callable[[], None]) -> None:
        super().__init__(count)
        self.alive = alive

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = super().submit(fn, *args, **kwargs)
        future.add_done_callback(lambda _: self.alive())
        return future


@contextlib.contextmanager
def warming_up() -> Iterator[list[Any]]:
    """Context in which launches compile and do not run; yields a list, which gets their kernels."""
    launchable, found = triton.runtime.jit.JITFunction, list[Any]()
    before = launchable.__getitem__

    def warmed(kernel: Any, grid: Any) -> Callable[..., None]:
        return lambda *args, **options: found.append(kernel.run(*args, grid=grid, warmup=True, **options))

    launchable.__getitem__ = warmed
    try:
        yield found
    finally:
        launchable.__getitem__ = before


def prepare_driver() -> None:
    """Have Triton build and load what it calls the current GPU's driver with, which takes a compiler some seconds."""
    triton.runtime.driver.active.utils  # noqa: B018


class AbsentGpu:
    """A driver for Triton that answers for a GPU which is not here; by itself it launches nothing."""

    launcher_cls: type | None = None

    def __init__(self, capability: int, shared_bytes: int) -> None:
        self.capability = capability
        self.utils = SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": shared_bytes})

    def get_current_device(self) -> int:
        # Triton keeps compiled kernels by device.
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, WARP)


def compile_for(capability: int, gpu: GpuSpec, task: Task, tiling: Any) -> None:
    """Compile a launch's kernels into Triton's cache, in a process that uses no GPU for anything else.

    Args:
        capability: compute capability of the GPU that will run them, such as 90.
        task: the problem, whose tensors may be on the device "meta".

    Raises:
        Exception: the compiler refuses the tiling; see `refuses`.
    """
    driver: Any = triton.runtime.driver
    before = driver._active
    driver.set_active(AbsentGpu(capability, gpu.shared_bytes))
    try:
        with warming_up():
            task.kernel.launch(task.x, task.weights, task.problem, tiling)
    finally:
        driver._active = before
        forget_all_but(())


def kernels_of(launch: Callable[[], object]) -> list[Any]:
    """The compiled kernels of a launch, which is not run."""
    with warming_up() as found:
        launch()
    return found


def loaded_kernels() -> list[Any]:
    """All compiled kernels that this process holds."""
    return [kernel for function in kernel_functions() for cache in _caches(function) for kernel in cache.values()]


def forget_all_but(kept: Iterable[Any]) -> None:
    """Drop compiled kernels from this process, at 2 to 3 MB each; those on disk stay.

    Args:
        kept: compiled kernels that stay.
    """
    stay = {id(kernel) for kernel in kept}
    for function in kernel_functions():
        for cache in _caches(function):
            for key in [key for key, kernel in cache.items() if id(kernel) not in stay]:
                del cache[key]


def _caches(function: Any) -> list[dict[str, Any]]:
    """The compiled kernels of a function by their keys, for each device."""
    return [cached[0] for cached in function.device_caches.values()]


def kernel_functions() -> list[Any]:
    """Triton's functions of all kernels in this package that are launched."""
    from kernels import convfirst, head, layered, mbconv, stem

    return [
        value
        for module in (convfirst, head, layered, mbconv, stem)
        for value in vars(module).values()
        if isinstance(value, triton.runtime.jit.JITFunction) and value.fn.__module__ == module.__name__
    ]
