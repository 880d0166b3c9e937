"""Checks that a deployment's device is here, and that its engine runs on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kernels import diagnosis
from nas.config import LatencyConfig, installed_runtime
from nas.errors import CandidateFailed, UsageError
from nas.latency.engines import ENGINES, runs_on
from nas.latency.runtimes import require
from nas.reporting import Note

# What engines of ours and of others compile with on CUDA.
TRITON_ENGINES = ("fused", "inductor")

# Devices of which it was told what disturbs measurements there.
_looked_at = set[torch.device]()


def check_device(config: LatencyConfig, note: Note | None = None) -> torch.device:
    """The device of a deployment.

    Args:
        note: function that takes a line on each thing that makes latencies on the device less reliable.

    Raises:
        UsageError: there is no such device here, or the engine or dtype does not run on it.
    """
    name, engine = config.device, config.engine
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: not a device (cpu, cuda or cuda:N)") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: not a device (cpu, cuda or cuda:N)")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            reason = diagnosis.why_no_cuda()
            raise UsageError(f"--device {name}: no CUDA device here" + (f" ({reason})" if reason else ""))
        if (device.index or 0) >= torch.cuda.device_count():
            raise UsageError(f"--device {name}: there are only {torch.cuda.device_count()} CUDA devices here")
    if engine not in ENGINES:
        raise UsageError(f"--engine {engine}: none of {', '.join(ENGINES)}")
    if device.type == "cpu" and config.dtype == "float16":
        raise UsageError("--dtype float16: not on the CPU, which takes float32 or bfloat16")
    if config.dtype not in ENGINES[engine].dtypes:
        raise UsageError(f"--dtype {config.dtype}: --engine {engine} computes in {' or '.join(ENGINES[engine].dtypes)}")
    if not runs_on(ENGINES[engine], device):
        hint = " (its Triton kernels run there with TRITON_INTERPRET=1, slowly)" if engine == "fused" else ""
        raise UsageError(f"--engine {engine}: does not run on {device.type}{hint}")
    require_triton(engine, device)
    require(engine, config.dtype)
    if config.runtime != (here := installed_runtime(engine)):
        raise UsageError(
            f"--engine {engine}: the latencies are of {config.runtime}, and installed is {here or 'another'}; "
            f"pip install {str(config.runtime).replace(' ', '==')}, or use another --study"
        )
    if note is not None and indexed(device) not in _looked_at:
        # Later on, the processes on the device are our own.
        _looked_at.add(indexed(device))
        for line in diagnosis.disturbances(indexed(device)):
            note(line)
    return device


def require_triton(engine: str, device: torch.device) -> None:
    """Check that the kernels that an engine compiles can be made for a device, and run on it.

    Raises:
        UsageError: there is no C compiler here, or the GPU is too old.
    """
    if device.type != "cuda" or engine not in TRITON_ENGINES:
        return
    if engine == "fused" and (reason := diagnosis.too_old(device)):
        raise UsageError(f"--engine fused: {reason}; use --engine inductor or eager")
    if reason := diagnosis.no_compiler():
        raise UsageError(f"--engine {engine}: {reason}")


def indexed(device: torch.device) -> torch.device:
    """A device with its index, so that `cuda` and `cuda:0` are equal."""
    return torch.device(device.type, device.index or 0) if device.type == "cuda" else device


@contextmanager
def anchor_must_run(config: LatencyConfig) -> Iterator[None]:
    """Context in which the anchor network is deployed or measured.

    Raises:
        UsageError: the engine cannot run the anchor network, or memory runs out.
    """
    try:
        yield
    except CandidateFailed as error:
        raise UsageError(f"--engine {config.engine}: does not run even the anchor network ({error})") from error
