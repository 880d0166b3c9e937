"""A driver for Triton that compiles for a GPU that is not there, and launches on CPU tensors."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor
from triton.runtime.cache import get_cache_manager

from kernels import convfirst, packing
from kernels.compiling import AbsentGpu
from kernels.cost_model import GPU_SPECS
from kernels.device_functions import EMULATED, INTERPRETED
from kernels.lab.emulator.memory import GlobalMemory, Traffic
from kernels.lab.emulator.program import Program
from kernels.lab.emulator.ptx import Code, parse
from kernels.problem import BlockProblem, Tiling

_TRAFFIC: ContextVar[Traffic | None] = ContextVar("_TRAFFIC", default=None)


def _code(hash_: str, name: str) -> Code:
    """The PTX of a compiled kernel, from Triton's cache, as a launcher does not get it."""
    group = get_cache_manager(hash_).get_group(f"{name[:150]}.json")
    assert group is not None
    return parse(Path(next(path for file, path in group.items() if file.endswith(".ptx"))).read_text())


class _Launcher:
    """A launcher of one compiled kernel, in place of the driver's own."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.code = _code(metadata.hash, source.name)
        self.shared_bytes = metadata.shared
        self.at_run_time = [kind != "constexpr" for kind in source.signature.values()]

    def __call__(self, grid_x: int, grid_y: int, grid_z: int, *rest: Any) -> None:
        # The first are stream, function, metadata twice and two hooks; then come the call's own arguments.
        given = [each for each, wanted in zip(rest[6:], self.at_run_time, strict=True) if wanted]
        traffic = _TRAFFIC.get()
        memory = GlobalMemory([each for each in given if isinstance(each, Tensor)], traffic)
        values = [each.data_ptr() if isinstance(each, Tensor) else int(each) for each in given]
        # They end with two pointers to scratch that these kernels do not use.
        arguments = dict(zip(self.code.params, [*values, 0, 0], strict=True))
        # Hardware promises no order of programs.
        order = list(np.ndindex(grid_z, grid_y, grid_x))
        random.Random(0).shuffle(order)
        for place in order:
            Program(self.code, arguments, memory, self.shared_bytes, place[::-1], traffic).run()


class _Driver(AbsentGpu):
    """A driver for Triton that answers for a GPU of a compute capability, and launches in the emulator."""

    launcher_cls = _Launcher

    def __init__(self, capability: int) -> None:
        super().__init__(capability, GPU_SPECS[capability].shared_bytes)
        self.utils.load_binary = lambda name, binary, shared, device: (object(), 0, 0, 0, 1024)


@contextmanager
def emulated(capability: int, traffic: Traffic | None = None) -> Iterator[None]:
    """Context in which Triton's kernels are compiled for a compute capability such as 90 and run on CPU tensors.

    Args:
        traffic: counts, to which those of the kernels are added.

    Raises:
        ValueError: the cost model does not know the capability.
        RuntimeError: the kernels run under Triton's interpreter, which cannot share a process with its compiler.
    """
    if capability not in GPU_SPECS:
        raise ValueError(f"capability={capability} is none of {', '.join(map(str, GPU_SPECS))}")
    if INTERPRETED:
        raise RuntimeError("the kernels are interpreted: unset TRITON_INTERPRET")
    driver: Any = triton.runtime.driver
    before, token, traffic_token = driver._active, EMULATED.set(True), _TRAFFIC.set(traffic)
    driver.set_active(_Driver(capability))
    try:
        yield
    finally:
        driver._active = before
        EMULATED.reset(token)
        _TRAFFIC.reset(traffic_token)


def rehearse(problem: BlockProblem, tiling: Tiling, capability: int, traffic: Traffic | None = None) -> float:
    """Run a block's compiled kernel on a few of its pixels: with 32-bit offsets, and in one or two tiles of 128 pixels.

    With three launches the products are tiled for few pixels (`tests/kernels/test_layered.py` runs all their tilings).

    Returns:
        The root mean square of its error against float64, over that of the output.

    Raises:
        EmulationError: the kernel does something wrong, even if hardware would let it pass.
    """
    # More tiles per program run the same kernel.
    tiling = replace(tiling, tiles_each=min(tiling.tiles_each, 2))
    few = replace(problem, batch=min(problem.batch, 2), height=min(problem.height, 5), width=min(problem.width, 7))
    assert tiling.fits(few)
    rng = torch.Generator().manual_seed(0)
    dtype = getattr(torch, problem.dtype)

    def draw(*shape: int, fan_in: int = 1) -> Tensor:
        return (torch.randn(shape, generator=rng) / sqrt(fan_in)).to(dtype)

    into, hidden, out, taps = few.in_channels, few.hidden_channels, few.out_channels, few.kernel_size
    layers = [
        draw(into, few.group_width, taps, taps, fan_in=few.group_width * taps**2), draw(into),
        draw(hidden, into, 1, 1, fan_in=into), draw(hidden), draw(out, hidden, 1, 1, fan_in=hidden), draw(out),
    ]  # fmt: skip
    x = draw(few.batch, into, few.height, few.width).contiguous(memory_format=torch.channels_last)
    weights = packing.pack(layers, few)
    deterministic = torch.are_deterministic_algorithms_enabled()
    # This fills new memory with NaN, so that what the kernel forgets to write fails every comparison.
    torch.use_deterministic_algorithms(True)
    try:
        with emulated(capability, traffic):
            scratch = torch.empty(tiling.partial_bytes(few) // 4)
            output = convfirst.launch(x, weights, few, tiling, scratch).double()
    finally:
        torch.use_deterministic_algorithms(deterministic)
    exact = convfirst.layer_by_layer(x.double(), [layer.double() for layer in layers], few)
    return float((output - exact).norm() / exact.norm())
