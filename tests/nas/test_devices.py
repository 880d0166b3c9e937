"""Devices that are not as a deployment needs them: refused or told of before anything runs on them."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from kernels import diagnosis
from kernels.peers import inductor_options
from nas.config import LatencyConfig, SearchConfig
from nas.errors import UsageError
from nas.export.bench import device_here
from nas.latency import devices, engines
from nas.latency.devices import check_device
from nas.search import machine

CUDA = LatencyConfig(device="cuda")
REASON = "NVML sees NVIDIA H200, but its driver 550.54.15 is too old"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with one CUDA device, with which nothing is wrong."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(diagnosis, "no_compiler", lambda: None)
    monkeypatch.setattr(diagnosis, "disturbances", lambda device: [])
    monkeypatch.setattr(devices, "_looked_at", set())


@pytest.fixture
def unused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU that torch does not find."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(diagnosis, "_without_cuda", lambda: REASON)


@pytest.mark.usefixtures("unused")
def test_a_gpu_that_cannot_be_used_is_told_of_where_the_cpu_is_taken_instead() -> None:
    with pytest.warns(UserWarning, match=f"^the CPU is used and the GPU is not: {REASON}$"):
        assert LatencyConfig().device == "cpu"
    # An exported network's deployment names its device.
    with pytest.warns(UserWarning, match="the CPU is used"):
        assert device_here("cuda:1") == "cpu"
    with warnings.catch_warnings(action="error"):
        # Whoever asks for the CPU knows.
        assert LatencyConfig(device="cpu").device == device_here("cpu") == "cpu"
    with pytest.raises(UsageError, match=f"^--device cuda: no CUDA device here \\({REASON}\\)$"):
        check_device(CUDA)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("engine", ["fused", "inductor"])
def test_without_a_compiler_nothing_that_compiles_is_begun(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    config = replace(CUDA, engine=engine)
    assert check_device(config).type == "cuda"
    monkeypatch.setattr(diagnosis, "no_compiler", lambda: "Triton needs a C compiler")
    with pytest.raises(UsageError, match=f"^--engine {engine}: Triton needs a C compiler$"):
        check_device(config)
    assert check_device(replace(CUDA, engine="eager")).type == "cuda"


@pytest.mark.usefixtures("gpu")
def test_a_gpu_too_old_for_the_kernels_runs_other_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(UsageError, match=r"^--engine fused: needs a GPU of .* 8\.0 .* has 7\.5; use --engine inductor"):
        check_device(CUDA)
    assert check_device(replace(CUDA, engine="inductor")).type == "cuda"


@pytest.mark.usefixtures("gpu")
def test_what_disturbs_is_told_once_and_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "disturbances", lambda device: [f"{device}: others use it"])
    lines = list[str]()
    check_device(CUDA)
    for device in ("cuda", "cuda:0"):
        check_device(replace(CUDA, device=device), lines.append)
    assert lines == ["cuda:0: others use it"]


def test_a_search_tells_it_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = list[str]()

    def station(config: LatencyConfig, anchor: object, waiting: object, note: Any) -> None:
        note("others use it")
        raise UsageError("enough")

    monkeypatch.setattr(machine, "Station", station)
    with pytest.raises(UsageError, match="enough"):
        machine.Machine(SearchConfig(), lines.append)
    assert lines == ["others use it"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_others_run_at_their_best_beside_our_kernels(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor once ran in its default mode there, and cuDNN without its search."""
    config = LatencyConfig(device=device, engine="inductor", dtype="float32")
    example, seen = torch.zeros(1, 3, 8, 8), list[Any]()

    class Compiled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.backends.cudnn.benchmark)
            return x

    def compile_(module: nn.Module, **given: Any) -> nn.Module:
        seen.append(given.get("options", {}))
        seen.append(torch.backends.cudnn.benchmark)
        return Compiled()

    monkeypatch.setattr(torch, "compile", compile_)
    engines.ready(nn.Conv2d(3, 4, 3).eval().requires_grad_(False), config, example)
    on_cuda = device == "cuda"
    assert seen == [inductor_options(torch.device(device)), on_cuda, on_cuda]
    assert bool(seen[0]) == on_cuda
    assert not torch.backends.cudnn.benchmark
