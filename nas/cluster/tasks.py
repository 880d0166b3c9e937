"""What runs on the nodes of a cluster. To import this module takes no torch: some tasks need none."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from kernels.attempts import is_cuda_fault
from nas.errors import CandidateFailed, OutOfMemory, UsageError, WorkerDied

if TYPE_CHECKING:
    from nas.config import LatencyConfig
    from nas.latency.station import Station
    from search_spaces import ArchSpec

# Tells Ray to leave CUDA_VISIBLE_DEVICES alone. Ray sets it for each task, but a process reads it once, at its first
# use of CUDA; later tasks of the process would run on the device of the first.
ENVIRONMENT = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
# What a call may raise as a result, and what its process outlives.
RESULTS = (CandidateFailed, UsageError)


def own_device(kind: str) -> str:
    """The device of a kind that Ray has set aside for this task."""
    if kind == "cpu":
        return kind
    import ray

    number = str(ray.get_runtime_context().get_accelerator_ids()["GPU"][0])
    # The node may have been started with some of the machine's devices.
    visible = [each.strip() for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each.strip()]
    return f"cuda:{visible.index(number) if number in visible else number}"


@contextlib.contextmanager
def _faults_end_the_process() -> Iterator[None]:
    """Context after whose CUDA errors this process is of no more use: Ray repeats the call in another."""
    try:
        yield
    except RuntimeError as error:
        if not is_cuda_fault(error):
            raise
        _end(error)


def _end(error: BaseException) -> None:
    print(error, file=sys.stderr, flush=True)
    os._exit(1)


def train(function: Callable[..., Any], args: Sequence[object], kind: str, locked: bool) -> tuple[Any, float]:
    """Call `function(*args, device)` while no process measures on the device: its result, and its seconds.

    Args:
        kind: kind of the device.
        locked: whether the device's lock is taken.
    """
    with _faults_end_the_process(), _not_measuring(own_device(kind), locked) as device:
        begin = time.perf_counter()
        try:
            result = function(*args, device)
        except OutOfMemory as error:
            # The process is as good as before.
            result = error
        except WorkerDied as error:
            _end(error)
        except CandidateFailed as error:
            result = error
        return result, time.perf_counter() - begin


@contextlib.contextmanager
def _not_measuring(device: str, locked: bool) -> Iterator[str]:
    if not locked:
        yield device
        return
    import torch

    from nas.locks import training_on

    _forget_other_devices(device)
    with training_on([torch.device(device)]):
        yield device


_last_device = ""


def _forget_other_devices(device: str) -> None:
    """Free what this process keeps on another device, which is no longer its own."""
    global _last_device
    if _last_device not in ("", device):
        import torch

        from nas.training.pool import mapped

        mapped.cache_clear()
        torch.cuda.empty_cache()
    _last_device = device


def answer(function: Callable[..., Any], args: Sequence[object]) -> Any:
    """Call a function; what is a result is returned, also where the function raises it."""
    with _faults_end_the_process():
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
    """

    versions: Mapping[str, str]
    device: Mapping[str, str] | None
    gpus: int


def describe(config: LatencyConfig | None) -> Described:
    """Describe the node on which this runs.

    Args:
        config: the deployment, where latencies are to be measured here.

    Raises:
        UsageError: the deployment does not run here.
    """
    import torch

    from kernels.device_info import DeviceInfo
    from nas.latency.devices import check_device
    from nas.versions import versions

    device = None if config is None else asdict(DeviceInfo.of(check_device(_here(config))))
    return Described(versions(), device, torch.cuda.device_count())


def _here(config: LatencyConfig) -> LatencyConfig:
    """A deployment on the device that Ray has set aside for this task."""
    return replace(config, device=own_device(config.device))


@cache
def _station(config: LatencyConfig, anchor: ArchSpec) -> Station:
    """The station of this process on a device, which it keeps."""
    import torch

    from nas.latency.station import Station

    return Station(config, anchor, stations=max(1, torch.cuda.device_count()))


def measure(
    config: LatencyConfig, anchor: ArchSpec, anchor_ms: float | None, method: str, args: Sequence[object]
) -> Any:
    """Call a method of this process's station.

    Args:
        anchor_ms: the anchor's reference latency, once it is known.
    """
    here = _station(_here(config), anchor)
    if anchor_ms is not None and here.meter is None:
        here.start(anchor_ms)
    return getattr(here, method)(*args)


def determinism(function: Callable[[Any], str], config: Any) -> str:
    """Call a function that measures the cost of deterministic trainings, alone on this task's device.

    Args:
        config: the search's configuration.
    """
    import torch

    from nas.locks import device_lock

    latency = _here(config.latency)
    with device_lock(torch.device(latency.device)).measuring():
        return function(replace(config, latency=latency))
