"""What a GPU's clocks and sensors say, through NVML, the driver's own library.

Nothing here raises where NVML is missing or refuses: what cannot be read is None, and whoever measures goes on without.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

# Bits of NVML's clock event reasons that mean a GPU slower than when it has rested. The others do not: idle (0x1), the
# clocks somebody set for applications (0x2) or the display (0x100), sync boost (0x10), and the power cap (0x4), which
# is how fast the GPU is: a heavy kernel runs into it after any rest.
THROTTLING = {
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


@dataclass(frozen=True, slots=True)
class DeviceState:
    """What a GPU told at one moment.

    Args:
        throttled_by: why the clocks are below what was asked for; values of `THROTTLING`.
    """

    sm_clock_mhz: float
    temperature_c: float
    throttled_by: tuple[str, ...]

    @property
    def throttled(self) -> bool:
        return bool(self.throttled_by)


def read_state(device: torch.device) -> DeviceState | None:
    """The state of a GPU now; None of a CPU, without NVML or a driver, or where NVML refuses."""
    nvml = _nvml() if device.type == "cuda" else None
    if nvml is None:
        return None
    # By UUID, for NVML counts the GPUs in another order than CUDA, and those that CUDA_VISIBLE_DEVICES hides too.
    uuid = torch.cuda.get_device_properties(device).uuid
    try:
        handle = _handle(f"GPU-{uuid}")
        sm_clock_mhz = nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
        temperature_c = _first_that_answers(
            nvml, ("nvmlDeviceGetTemperature", "nvmlDeviceGetTemperatureV"), handle, nvml.NVML_TEMPERATURE_GPU
        )
        reasons = _first_that_answers(
            nvml, ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"), handle
        )
    except nvml.NVMLError:
        return None
    throttled_by = tuple(name for bit, name in THROTTLING.items() if reasons & bit)
    return DeviceState(float(sm_clock_mhz), float(temperature_c), throttled_by)


@cache
def _nvml() -> Any:
    """The module, initialised; None where it is not installed or finds no driver."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


@cache
def _handle(uuid: str) -> Any:
    return _nvml().nvmlDeviceGetHandleByUUID(uuid)


def _first_that_answers(nvml: Any, names: tuple[str, ...], *args: object) -> Any:
    """What the first function says that both the module and the driver have: NVML renames its functions at times.

    Raises:
        NVMLError: none of them answers.
    """
    for name in names:
        with suppress(AttributeError, nvml.NVMLError):
            return getattr(nvml, name)(*args)
    raise nvml.NVMLError(nvml.NVML_ERROR_NOT_SUPPORTED)
