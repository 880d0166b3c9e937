"""What runs on the nodes of a cluster. To import this module takes no torch: some tasks need none."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from nas.errors import CandidateFailed, OutOfMemory, UsageError, WorkerDied

if TYPE_CHECKING:
    from nas.config import LatencyConfig
    from nas.latency.station import Station
    from search_spaces import ArchSpec

# What a call may raise as a result, and what its process outlives.
RESULTS = (CandidateFailed, UsageError)


def train(function: Callable[..., Any], args: Sequence[object], kind: str, locked: bool) -> tuple[Any, float]:
    """Call `function(*args, device)` while no process measures on the device: its result, and its seconds.

    Args:
        kind: kind of the device; on CUDA it is the one that Ray shows this process, or the first of them.
        locked: whether the device's lock is taken.
    """
    if locked:
        import torch

        from nas.locks import training_on

        with training_on([torch.device(kind)]):
            return train(function, args, kind, locked=False)
    begin = time.perf_counter()
    try:
        result = function(*args, kind)
    except OutOfMemory as error:
        # The process may go on.
        result = CandidateFailed(str(error))
    except WorkerDied as error:
        # The device's context is of no more use: Ray repeats the call in another process.
        print(error, file=sys.stderr, flush=True)
        os._exit(1)
    except CandidateFailed as error:
        result = error
    return result, time.perf_counter() - begin


def answer(function: Callable[..., Any], args: Sequence[object]) -> Any:
    """Call a function; what is a result is returned, also where the function raises it."""
    try:
        return function(*args)
    except WorkerDied as error:
        return CandidateFailed(str(error))
    except RESULTS as error:
        return error


@dataclass(frozen=True)
class Described:
    """What a node has.

    Args:
        versions: the packages on which figures depend.
        device: the latency's device, as fields of `DeviceInfo`; None where that was not asked.
        gpus: number of CUDA devices that torch finds.
        cores: number of cores that a process there may use.
    """

    versions: Mapping[str, str]
    device: Mapping[str, str] | None
    gpus: int
    cores: int


def describe(config: LatencyConfig | None) -> Described:
    """Describe the node on which this runs.

    Args:
        config: the deployment, where latencies are to be measured here.

    Raises:
        UsageError: the deployment does not run here.
    """
    import torch

    from kernels.device_info import DeviceInfo
    from kernels.machine import cores
    from nas.latency.devices import check_device
    from nas.versions import versions

    device = None if config is None else asdict(DeviceInfo.of(check_device(config)))
    return Described(versions(), device, torch.cuda.device_count(), cores())


@cache
def station(config: LatencyConfig, anchor: ArchSpec) -> Station:
    """The station of this process, which it keeps."""
    from nas.latency.station import Station

    return Station(config, anchor)


def measure(
    config: LatencyConfig, anchor: ArchSpec, anchor_ms: float | None, method: str, args: Sequence[object]
) -> Any:
    """Call a method of this process's station.

    Args:
        anchor_ms: the anchor's reference latency, once it is known.
    """
    here = station(config, anchor)
    if anchor_ms is not None and here.meter is None:
        here.start(anchor_ms)
    return getattr(here, method)(*args)
