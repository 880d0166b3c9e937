"""A fake of NVML's module, and a fixture's work: what is found out once per process is forgotten."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from kernels import device_state, diagnosis

UUID = "2f7b1c0e-0000-1111-2222-333344445555"


class FakeNvml:
    """Of NVML what is asked here: GPUs of one kind, of which one is known by its UUID.

    Attributes:
        reasons: bits for which its clocks are low.
        refused: functions that the driver lacks or forbids, and with which error.
        count, driver, cuda: the number of GPUs, and the versions of the driver and of CUDA in it, as NVML gives them.
        busy, processes: how busy the GPU is in percent, and the number and bytes of each process on it.
    """

    class NVMLError(Exception):
        def __init__(self, value: int = 3) -> None:
            super().__init__({4: "Insufficient Permissions"}.get(value, "Not Supported"))
            self.value = value

    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU, NVML_ERROR_NOT_SUPPORTED = 1, 0, 3
    NVML_ERROR_DRIVER_NOT_LOADED, NVML_ERROR_LIBRARY_NOT_FOUND, NVML_ERROR_NO_PERMISSION = 9, 12, 4

    def __init__(self) -> None:
        self.reasons = 0
        self.refused: dict[str, int] = {}
        self.calls: list[str] = []
        self.count, self.driver, self.cuda = 1, "580.65.06", 13000
        self.busy, self.processes = 0, dict[int, int | None]()
        answers: dict[str, Callable[..., object]] = {
            "nvmlInit": lambda: None,
            "nvmlDeviceGetHandleByUUID": self.handle,
            "nvmlDeviceGetClockInfo": lambda handle, clock: {1: 1980}[clock],
            "nvmlDeviceGetTemperatureV": lambda handle, sensor: 61,
            "nvmlDeviceGetTemperature": lambda handle, sensor: 60,
            "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: self.reasons,
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: self.reasons,
            "nvmlDeviceGetCount": lambda: self.count,
            "nvmlDeviceGetHandleByIndex": lambda index: f"handle {index}",
            "nvmlDeviceGetName": lambda handle: "NVIDIA H200",
            "nvmlSystemGetDriverVersion": lambda: self.driver,
            "nvmlSystemGetCudaDriverVersion": lambda: self.cuda,
            "nvmlDeviceGetUtilizationRates": lambda handle: SimpleNamespace(gpu=self.busy, memory=0),
            "nvmlDeviceGetComputeRunningProcesses": lambda handle: [
                SimpleNamespace(pid=pid, usedGpuMemory=held) for pid, held in self.processes.items()
            ],
        }
        for name, answer in answers.items():
            setattr(self, name, self.function(name, answer))

    def function(self, name: str, answer: Callable[..., object]) -> Callable[..., Any]:
        def asked(*args: object) -> object:
            self.calls.append(name)
            if name in self.refused:
                raise self.NVMLError(self.refused[name])
            return answer(*args)

        return asked

    def handle(self, uuid: str) -> str:
        if uuid != f"GPU-{UUID}":
            raise self.NVMLError()
        return "handle"


def forget() -> None:
    """Forget what is found out once per process."""
    for cached in (device_state._initialised, device_state._handle, diagnosis._without_cuda):
        cached.cache_clear()
