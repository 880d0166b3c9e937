"""The description of a device that is measured on. Without a device to describe, this module needs no torch.

The commands that only read a study take its description from the database; torch takes a second to import.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # A name without `torch`, which is a field of DeviceInfo.
    from torch import device as _Device


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """Identity of what a measurement ran on: the device, its driver and the libraries."""

    kind: str
    name: str
    driver: str
    torch: str
    triton: str

    @classmethod
    def of(cls, device: _Device) -> DeviceInfo:
        import torch

        if device.type == "cuda":
            name, driver = torch.cuda.get_device_name(device), f"CUDA {torch.version.cuda}, driver {_nvidia_driver()}"
        else:
            name, driver = _cpu_name(), f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
        return cls(device.type, name, driver, torch.__version__, _triton_version())

    def __str__(self) -> str:
        return f"{self.name} ({self.driver}; torch {self.torch}, triton {self.triton})"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _nvidia_driver() -> str:
    try:
        # "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  ..."
        words = Path("/proc/driver/nvidia/version").read_text().splitlines()[0].split()
        return next(word for word in words if word[:1].isdigit() and "." in word)
    except (OSError, IndexError, StopIteration):
        return "unknown"


def _triton_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"
