"""The runs that measure a device's ceilings: a large copy, a large product, the smallest operation.

They need torch alone; `kernels.lab.benchmark_machine` adds those that need Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

MIB = 2**20
# Bytes copied and side of the square product, by kind of device.
COPY_BYTES = {"cuda": 1024 * MIB, "cpu": 64 * MIB}
PRODUCT_SIDE = {"cuda": 8192, "cpu": 768}
LAUNCHES = 1000


@dataclass(frozen=True)
class CeilingRun:
    """A run to time; `rate` turns its time into a ceiling.

    Args:
        run: function that enqueues (CUDA) or does (CPU) the work once.
        amount: number of bytes, MACs or launches of one run.
        macs: multiply-accumulates of one run, for a caller that corrects times by them.
    """

    run: Callable[[], None]
    amount: float
    macs: int = 0


def ceiling_runs(device: torch.device, dtype: torch.dtype) -> dict[str, CeilingRun]:
    """The runs to time, by name: `copy_bytes`, `product_macs`, `launch_seconds` and, on CUDA, `graph_launch_seconds`.

    They take random values: products of zeros draw less power and so run faster.
    """
    side, size = PRODUCT_SIDE[device.type], COPY_BYTES[device.type]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    source = random(size // dtype.itemsize)
    target = torch.empty_like(source)
    left, right, product = random(side, side), random(side, side), random(side, side)
    one = torch.zeros(1, device=device)

    @torch.inference_mode()
    def copy() -> None:
        target.copy_(source)

    @torch.inference_mode()
    def multiply() -> None:
        with tensor_float32():
            torch.matmul(left, right, out=product)

    def launch() -> None:
        one.add_(1)

    @torch.inference_mode()
    def launch_many() -> None:
        for _ in range(LAUNCHES):
            launch()

    launch()
    runs = {
        # Each byte is read and written.
        "copy_bytes": CeilingRun(copy, 2 * size),
        "product_macs": CeilingRun(multiply, side**3, side**3),
        "launch_seconds": CeilingRun(launch_many, LAUNCHES),
    }
    if device.type == "cuda":
        with torch.cuda.device(device):
            graph = graph_of(launch, LAUNCHES)
        runs["graph_launch_seconds"] = CeilingRun(graph.replay, LAUNCHES)
    return runs


def graph_of(launch: Callable[[], object], launches: int) -> torch.cuda.CUDAGraph:
    """Capture a CUDA graph of `launches` launches; `launch` must have run once before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            launch()
    return graph


def rate(name: str, run: CeilingRun, seconds: float) -> float:
    """Turn a run's seconds into the ceiling of that name: seconds per launch, or bytes or MACs per second."""
    return seconds / run.amount if name.endswith("seconds") else run.amount / seconds


@contextmanager
def tensor_float32() -> Iterator[None]:
    """Context in which float32 products on CUDA use TF32, as cuDNN's convolutions do by default."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
