"""The identity of the benchmark's machine, and its limits, measured in the benchmark's own run.

The rates are ceilings that real kernels reach: a large copy, a large product, a loop of nothing but tensor-core
instructions. Data sheets name higher rates that nothing reaches.
"""

from __future__ import annotations

import hashlib
import subprocess
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import triton
import triton.language as tl

from kernels.ceilings import MIB, CeilingRun, ceiling_runs, rate
from kernels.cost_model import H200, GpuSpec
from kernels.device_info import DeviceInfo
from kernels.timing import MIN_SAMPLE_SECONDS, clock_for, time_interleaved

FOLDER = Path(__file__).parent
# Seconds of sampling for all ceilings together.
SECONDS = {"cuda": 2.0, "cpu": 0.2}
# Any L2 cache worth measuring holds this much, which is far more than first-level caches hold.
L2_BYTES = 16 * MIB
CLOCK_FIELDS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
# As many as are resident at once, given the registers of either kernel below.
PROGRAMS_PER_MULTIPROCESSOR = 4


@dataclass(frozen=True)
class MachineCeilings:
    """Measured rates and times of a device; None where the device has no such thing.

    Args:
        copy_bytes: bytes per second of a large copy, read and written together.
        product_macs: multiply-accumulates per second of a large square product (on Hopper by warp-group products).
        launch_seconds: time of the smallest operation, launched from Python.
        l2_bytes: bytes per second read from the second-level cache.
        mma_macs: multiply-accumulates per second of mma.sync, the tensor-core instruction before Hopper's.
        graph_launch_seconds: time of the smallest kernel in a CUDA graph of many.
    """

    copy_bytes: float
    product_macs: float
    launch_seconds: float
    l2_bytes: float | None = None
    mma_macs: float | None = None
    graph_launch_seconds: float | None = None

    def gpu_spec(self) -> GpuSpec:
        """The current CUDA device's data for the cost model, as measured; what is not measured is an H200's."""
        assert self.l2_bytes is not None
        assert self.mma_macs is not None
        assert self.graph_launch_seconds is not None
        properties: Any = torch.cuda.get_device_properties()
        return replace(
            H200,
            multiprocessors=properties.multi_processor_count,
            # The highest clock, in kHz, as nothing may beat a bound; not every build of torch knows it.
            clock_hz=1e3 * getattr(properties, "clock_rate", 0) or H200.clock_hz,
            registers=properties.regs_per_multiprocessor,
            shared_bytes=properties.shared_memory_per_block_optin,
            dram_bytes=self.copy_bytes,
            l2_bytes=self.l2_bytes,
            wgmma_macs=self.product_macs,
            mma_macs=self.mma_macs,
            launch_seconds=self.graph_launch_seconds,
        )


# -- Kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def mma_kernel(x, out, STEPS: tl.constexpr, LENGTH: tl.constexpr):
    """Add up STEPS products of 16x16 and 16x8 per warp and 32 of LENGTH: nothing but tensor-core instructions.

    From `tl.dot` the compiler would make Hopper's warp-group products, or put loads from shared memory between the
    older ones; inline assembly leaves it no choice. Which operand is in which lane does not matter to the rate.

    Args:
        x: pointer to 6 * LENGTH words of two random float16 each.
        out: pointer to one float32 per program.
    """
    lane = tl.arange(0, LENGTH)
    a0, a1, a2 = tl.load(x + lane), tl.load(x + LENGTH + lane), tl.load(x + 2 * LENGTH + lane)
    a3, b0, b1 = tl.load(x + 3 * LENGTH + lane), tl.load(x + 4 * LENGTH + lane), tl.load(x + 5 * LENGTH + lane)
    c0 = tl.zeros([LENGTH], tl.float32)
    c1, c2, c3 = c0, c0, c0
    for _ in tl.range(0, STEPS, num_stages=1):
        c0, c1, c2, c3 = tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
            [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    tl.store(out + tl.program_id(0), tl.sum(c0 + c1 + c2 + c3, 0))


MMA_WARPS = 4
# Each thread has eight products in flight, one for each of its elements.
MMA_LENGTH = 8 * 32 * MMA_WARPS
MMA_STEPS = 2048
MACS_PER_MMA = 16 * 16 * 8


@triton.jit
def read_kernel(x, out, tiles, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """Read STEPS tiles of `x`, bypassing L1; each program begins with another tile."""
    total = tl.zeros([BLOCK], tl.float32)
    for step in tl.range(0, STEPS, num_stages=1):
        tile = (tl.program_id(0) + step) % tiles
        total += tl.load(x + tile * BLOCK + tl.arange(0, BLOCK), cache_modifier=".cg")
    tl.store(out + tl.program_id(0), tl.sum(total, 0))


READ_BLOCK = 4096
READ_STEPS = 256


# -- Measuring -------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def measure_ceilings(device: torch.device) -> MachineCeilings:
    """Measure the ceilings of a device: on CUDA in float16, on a CPU in float32."""
    on_cuda = device.type == "cuda"
    runs = ceiling_runs(device, torch.float16 if on_cuda else torch.float32)
    if on_cuda:
        programs = PROGRAMS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
        words = torch.randn(2 * 6 * MMA_LENGTH, dtype=torch.float16, device=device).view(torch.int32)
        cached, sums = torch.randn(L2_BYTES // 4, device=device), torch.empty(programs, device=device)

        def multiply() -> None:
            mma_kernel[(programs,)](words, sums, MMA_STEPS, MMA_LENGTH, num_warps=MMA_WARPS)

        def read() -> None:
            read_kernel[(programs,)](cached, sums, len(cached) // READ_BLOCK, READ_STEPS, READ_BLOCK, num_warps=8)

        runs |= {
            "mma_macs": CeilingRun(multiply, programs * MMA_STEPS * MMA_LENGTH // 32 * MACS_PER_MMA),
            "l2_bytes": CeilingRun(read, programs * READ_STEPS * READ_BLOCK * 4),
        }
    # Triton launches on the current device, whatever device its arguments are on.
    with torch.cuda.device(device) if on_cuda else nullcontext():
        samples = time_interleaved(
            [each.run for each in runs.values()], clock_for(device), SECONDS[device.type],
            MIN_SAMPLE_SECONDS[device.type],
        )  # fmt: skip
    medians = np.median(samples, axis=0)
    return MachineCeilings(**{
        name: rate(name, each, float(median)) for (name, each), median in zip(runs.items(), medians, strict=True)
    })  # fmt: skip


# -- Provenance ------------------------------------------------------------------------------------------------------


def identity(device: torch.device) -> dict[str, str]:
    """The facts that rows must share to be compared: machine, versions, and the code that measured and was measured.

    The code is identified by a digest, which is the same in a copy without git and differs where a checkout was edited.
    """
    info = DeviceInfo.of(device)
    paths = [*FOLDER.parent.glob("*.py"), *(path for path in FOLDER.glob("*.py") if path.name != "benchmark_report.py")]
    sources = b"".join(path.read_bytes() for path in sorted(paths))
    return {
        "device": info.name, "driver": info.driver, "torch": info.torch, "triton": info.triton,
        "cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version()), "timm": timm.__version__,
        "sources": hashlib.sha256(sources).hexdigest()[:12],
    }  # fmt: skip


def commit() -> str:
    """The checkout's commit, with "-dirty" if files were changed since; "unknown" outside of a checkout."""
    command = ("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    return _output(command, FOLDER) or "unknown"


def clocks(device: torch.device) -> dict[str, str]:
    """Clocks in MHz, temperature in degrees Celsius and power in watts, from the driver; empty if it gives none."""
    if device.type != "cuda":
        return {}
    uuid = torch.cuda.get_device_properties(device).uuid
    command = (
        "nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(CLOCK_FIELDS)}", "--format=csv,noheader,nounits",
    )  # fmt: skip
    values = [value.strip() for value in _output(command).split(",")]
    return dict(zip(CLOCK_FIELDS, values, strict=True)) if len(values) == len(CLOCK_FIELDS) else {}


def _output(command: tuple[str, ...], folder: Path | None = None) -> str:
    """The output of a program; empty if it cannot be run or fails."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %Z")


def describe(ceilings: MachineCeilings) -> dict[str, Any]:
    """A line with the ceilings in the units of data sheets."""
    scaled = {
        "copy, read + written, TB/s": ceilings.copy_bytes / 1e12,
        "product, TFLOP/s": 2 * ceilings.product_macs / 1e12,
        "mma.sync, TFLOP/s": ceilings.mma_macs and 2 * ceilings.mma_macs / 1e12,
        "read from L2, TB/s": ceilings.l2_bytes and ceilings.l2_bytes / 1e12,
        "launch in a graph, us": ceilings.graph_launch_seconds and 1e6 * ceilings.graph_launch_seconds,
        "launch from Python, us": ceilings.launch_seconds and 1e6 * ceilings.launch_seconds,
    }
    return {name: round(value, 3) for name, value in scaled.items() if value is not None}
