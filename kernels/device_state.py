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
    library = nvml() if device.type == "cuda" else None
    if library is None:
        return None
    try:
        return _read(library, device)
    except library.NVMLError:
        return None


def why_unreadable(device: torch.device) -> str | None:
    """The reason why `read_state` gives None for a GPU; None where it gives a state."""
    library = nvml()
    if library is None:
        return nvml_refusal() or "there is no NVML"
    try:
        _read(library, device)
    except library.NVMLError as error:
        return str(error)
    return None


def _read(library: Any, device: torch.device) -> DeviceState:
    handle = handle_of(device)
    sm_clock_mhz = library.nvmlDeviceGetClockInfo(handle, library.NVML_CLOCK_SM)
    temperature_c = _first_that_answers(
        library, ("nvmlDeviceGetTemperature", "nvmlDeviceGetTemperatureV"), handle, library.NVML_TEMPERATURE_GPU
    )
    reasons = _first_that_answers(
        library, ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"), handle
    )
    throttled_by = tuple(name for bit, name in THROTTLING.items() if reasons & bit)
    return DeviceState(float(sm_clock_mhz), float(temperature_c), throttled_by)


def nvml() -> Any:
    """The NVML module, initialised; None if it is not installed or finds no driver."""
    return _initialised()[0]


def nvml_refusal() -> str | None:
    """The reason why NVML does not start although a driver is there; None where it starts, or finds no driver."""
    return _initialised()[1]


@cache
def _initialised() -> tuple[Any, str | None]:
    try:
        import pynvml
    except ImportError:
        return None, None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        absent = (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
        return None, None if error.value in absent else f"NVML does not start ({error})"
    return pynvml, None


def handle_of(device: torch.device) -> Any:
    """NVML's handle of a CUDA device.

    Raises:
        NVMLError: NVML does not know it.
    """
    # By UUID: NVML counts the GPUs in another order than CUDA does, and also those that CUDA_VISIBLE_DEVICES hides.
    return _handle(f"GPU-{torch.cuda.get_device_properties(device).uuid}")


@cache
def _handle(uuid: str) -> Any:
    return nvml().nvmlDeviceGetHandleByUUID(uuid)


def _first_that_answers(library: Any, names: tuple[str, ...], *args: object) -> Any:
    """Call the first function that both the module and the driver have, as NVML renames its functions at times.

    Raises:
        NVMLError: none of the functions answers.
    """
    for name in names:
        with suppress(AttributeError, library.NVMLError):
            return getattr(library, name)(*args)
    raise library.NVMLError(library.NVML_ERROR_NOT_SUPPORTED)
