"""The runs by which a device's ceilings are measured: a large copy, a large product, the smallest operation.

Apart from `kernels.lab.benchmark_machine`, for these need torch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

MIB = 2**20
# Of each kind of device: bytes copied, side of the square product.
COPY_BYTES = {"cuda": 1024 * MIB, "cpu": 64 * MIB}
PRODUCT_SIDE = {"cuda": 8192, "cpu": 768}
LAUNCHES = 1000


@dataclass(frozen=True)
class CeilingRun:
    """Something to time: the quotient of `amount` and its seconds is a rate, or the other way round.

    Args:
        run: enqueues (CUDA) or does (CPU) it once.
        amount: of bytes, MACs or launches.
        macs: of these, for whoever corrects by them.
    """

    run: Callable[[], None]
    amount: float
    macs: int = 0


def ceiling_runs(device: torch.device, dtype: torch.dtype) -> dict[str, CeilingRun]:
    """What is timed for `copy_bytes`, `product_macs`, `launch_seconds` and, on CUDA, `graph_launch_seconds`.

    On random values: products of zeros draw less power and so run faster.
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
        # Read and written.
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
    """A CUDA graph of so many launches, which have been made before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            launch()
    return graph


def rate(name: str, run: CeilingRun, seconds: float) -> float:
    """What a run of so many seconds says: seconds of one launch, or bytes or MACs a second."""
    return seconds / run.amount if name.endswith("seconds") else run.amount / seconds


@contextmanager
def tensor_float32() -> Iterator[None]:
    """Float32 products on CUDA take TF32, as cuDNN's convolutions do by default."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
