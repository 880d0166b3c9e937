"""Measurements of a GPU that is not there: what `nas.latency.isolation` calls in its child processes, on stubs.

A child enters `kernels.lab.stub` once and stays there. Triton's kernels are then compiled, loaded and launched, and do
not run; torch's operations on the device run on the CPU; times are the CPU's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar
from unittest import mock

import psutil
import torch

from kernels import contest
from kernels.lab.stub import stub_cuda, stub_driver
from nas.child_process import sign_of_life
from nas.config import LatencyConfig
from nas.errors import contained
from nas.latency import isolation
from nas.latency.engines import deploy
from nas.latency.meter import captured_forward
from search_spaces import ArchSpec

CAPABILITY = 90

Result = TypeVar("Result")

# What this process has entered for good.
_entered: ExitStack | None = None


def enter(capability: int = CAPABILITY) -> None:
    """Have this process, from now on, a GPU that is not there."""
    global _entered
    if _entered is None:
        _entered = ExitStack()
        driver = _entered.enter_context(stub_driver(capability))
        _entered.enter_context(stub_cuda(driver))
        # No kernel computes anything.
        _entered.enter_context(mock.patch.object(contest, "is_wrong", return_value=False))


def contained_on_stub(function: Callable[..., Result], *args: object) -> Result:
    """What `isolation` calls in a child in place of its own function."""
    enter()
    with contained():
        return function(*args)


@contextmanager
def on_stub() -> Iterator[None]:
    """Context in which the child processes of `isolation.Apart` measure on stubs."""
    with mock.patch.object(isolation, "_contained", contained_on_stub):
        yield


def rehearse(arch: ArchSpec, config: LatencyConfig) -> int:
    """Tune what a network needs, and capture a forward pass of it, as for a measurement.

    Returns:
        Bytes of memory that this process holds.
    """
    size = arch.shown(config.resolution)
    x = torch.zeros(config.batch_size, 3, size, size, dtype=getattr(torch, config.dtype), device=config.device)
    x = x.contiguous(memory_format=torch.channels_last)
    captured_forward(deploy(arch.build(config.num_classes), config, x), x)()
    sign_of_life()
    return int(psutil.Process().memory_info().rss)
