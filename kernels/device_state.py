"""A GPU's clocks and sensors, read through NVML, the driver's own library.

Nothing here raises if NVML is missing or refuses: the state is then None, and the caller measures without it.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

# Bits of NVML's clock event reasons that mean a GPU slower than after a rest. The others do not: idle (0x1), the clocks
# set for applications (0x2) or the display (0x100), sync boost (0x10), and the power cap (0x4), which is part of how
# fast the GPU is: a heavy kernel reaches it after any rest.
THROTTLING = {
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


@dataclass(frozen=True, slots=True)
class DeviceState:
    """The state of a GPU at one moment.

    Args:
        sm_clock_mhz: clock of the multiprocessors.
        temperature_c: temperature in degrees Celsius.
        throttled_by: reasons for which the clocks are lower than requested; values of `THROTTLING`.
    """

    sm_clock_mhz: float
    temperature_c: float
    throttled_by: tuple[str, ...]

    @property
    def throttled(self) -> bool:
        return bool(self.throttled_by)


def read_state(device: torch.device) -> DeviceState | None:
    """The state of a GPU now; None for a CPU, without NVML or a driver, or if NVML refuses."""
    nvml = _nvml() if device.type == "cuda" else None
    if nvml is None:
        return None
    # By UUID: NVML counts the GPUs in another order than CUDA does, and also those that CUDA_VISIBLE_DEVICES hides.
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
    """The NVML module, initialised; None if it is not installed or finds no driver."""
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
    """Call the first function that both the module and the driver have, as NVML renames its functions at times.

    Raises:
        NVMLError: none of the functions answers.
    """
    for name in names:
        with suppress(AttributeError, nvml.NVMLError):
            return getattr(nvml, name)(*args)
    raise nvml.NVMLError(nvml.NVML_ERROR_NOT_SUPPORTED)
