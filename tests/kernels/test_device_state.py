from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from kernels.device_state import THROTTLING, DeviceState, read_state, why_unreadable
from tests.kernels.fake_nvml import UUID, FakeNvml, forget

GPU = torch.device("cuda", 1)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """What is found out once per process."""
    forget()
    yield
    forget()


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=UUID))
    return fake


def test_a_gpu_tells_its_clocks_and_sensors(nvml: FakeNvml) -> None:
    state = read_state(GPU)
    assert state == DeviceState(1980.0, 60.0, ())
    assert not state.throttled


@pytest.mark.parametrize(
    ("reasons", "names"),
    [
        (0x000, ()),
        # Idle, clocks set for applications, the power cap, sync boost, clocks set for the display, and a bit of the
        # future.
        (0x001, ()),
        (0x002, ()),
        (0x004, ()),
        (0x010, ()),
        (0x100, ()),
        (1 << 40, ()),
        (0x008, ("hardware slowdown",)),
        (0x020, ("software thermal slowdown",)),
        (0x040, ("hardware thermal slowdown",)),
        (0x080, ("hardware power brake",)),
        (0x048, ("hardware slowdown", "hardware thermal slowdown")),
        (0x1FF, tuple(THROTTLING.values())),
    ],
)
def test_only_what_slows_a_gpu_down_is_throttling(nvml: FakeNvml, reasons: int, names: tuple[str, ...]) -> None:
    nvml.reasons = reasons
    state = read_state(GPU)
    assert state is not None
    assert state.throttled_by == names
    assert state.throttled == bool(names)


@pytest.mark.parametrize("missing_in", ["the module", "the driver"])
@pytest.mark.parametrize(
    "name", ["nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons",
             "nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature"],
)  # fmt: skip
def test_either_name_of_a_renamed_function_will_do(nvml: FakeNvml, name: str, missing_in: str) -> None:
    nvml.reasons = 0x40
    if missing_in == "the module":
        delattr(nvml, name)
    else:
        nvml.refused = {name: nvml.NVML_ERROR_NOT_SUPPORTED}
    state = read_state(GPU)
    assert state is not None
    assert state.throttled_by == ("hardware thermal slowdown",)
    assert state.temperature_c == (61 if name == "nvmlDeviceGetTemperature" else 60)


@pytest.mark.parametrize(
    "refused",
    [
        {"nvmlDeviceGetHandleByUUID"},
        {"nvmlDeviceGetClockInfo"},
        {"nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature"},
        {"nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"},
    ],
)
def test_where_nvml_refuses_there_is_no_state(nvml: FakeNvml, refused: set[str]) -> None:
    nvml.refused = dict.fromkeys(refused, nvml.NVML_ERROR_NOT_SUPPORTED)
    assert read_state(GPU) is None
    assert why_unreadable(GPU) == "Not Supported"
    # What is refused now may be allowed later.
    nvml.refused = {}
    assert read_state(GPU) is not None
    assert why_unreadable(GPU) is None


def test_a_gpu_that_nvml_does_not_know_has_no_state(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="another"))
    assert read_state(GPU) is None


def test_nvml_is_initialised_once_and_each_gpu_found_once(nvml: FakeNvml) -> None:
    """A meter asks after every round."""
    for _ in range(3):
        read_state(GPU)
    assert nvml.calls.count("nvmlInit") == 1
    assert nvml.calls.count("nvmlDeviceGetHandleByUUID") == 1
    assert nvml.calls.count("nvmlDeviceGetClockInfo") == 3


def test_a_cpu_has_no_state(nvml: FakeNvml) -> None:
    assert read_state(torch.device("cpu")) is None
    assert not nvml.calls


def test_without_a_driver_there_is_no_state(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver(device: torch.device) -> None:
        raise RuntimeError("Found no NVIDIA driver on your system")

    monkeypatch.setattr(torch.cuda, "get_device_properties", no_driver)
    nvml.refused = {"nvmlInit": nvml.NVML_ERROR_LIBRARY_NOT_FOUND}
    assert read_state(GPU) is None
    assert read_state(GPU) is None
    assert nvml.calls == ["nvmlInit"]


def test_without_nvml_there_is_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert read_state(GPU) is None


def test_the_real_module_has_what_the_fake_pretends() -> None:
    pynvml = pytest.importorskip("pynvml")
    for name in vars(FakeNvml()):
        if name.startswith("nvml"):
            assert callable(getattr(pynvml, name))
    for name in (name for name in vars(FakeNvml) if name.startswith("NVML_")):
        assert getattr(pynvml, name) == getattr(FakeNvml, name)
    assert issubclass(pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError)
    assert pynvml.NVMLError(12).value == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
    bits = ("HwSlowdown", "SwThermalSlowdown", "HwThermalSlowdown", "HwPowerBrakeSlowdown")
    assert [getattr(pynvml, f"nvmlClocksEventReason{name}") for name in bits] == list(THROTTLING)


@pytest.mark.gpu
def test_the_real_gpu_tells_its_state() -> None:
    state = read_state(torch.device("cuda"))
    assert state is not None
    assert 100 < state.sm_clock_mhz < 5000
    assert 0 < state.temperature_c < 110
    assert set(state.throttled_by) <= set(THROTTLING.values())
