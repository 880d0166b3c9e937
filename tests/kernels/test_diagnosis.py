"""What is wrong with a machine's GPUs, told by faked drivers; the GPU's own test holds the real ones."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kernels import diagnosis
from tests.kernels.fake_nvml import UUID, FakeNvml, forget

GPU = torch.device("cuda", 1)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    forget()
    yield
    forget()


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """A machine with a GPU that torch, built for CUDA 13.0, does not find."""
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=UUID))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return fake


def starts(monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    def init() -> None:
        raise RuntimeError(error)

    monkeypatch.setattr(torch.cuda, "init", init)


def test_a_driver_that_is_too_old_is_named_with_what_to_install(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml.driver, nvml.cuda, nvml.count = "550.54.15", 12040, 2
    assert diagnosis.unused_gpu() == (
        "NVML sees 2 x NVIDIA H200, but its driver 550.54.15 is too old: it is for CUDA 12.4 at most, and torch "
        f"{torch.__version__} is built for CUDA 13.0; install driver 580 or later, or a torch built for CUDA 12"
    )
    # Within a generation of CUDA an older driver will do.
    forget()
    nvml.cuda = 13000
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    starts(monkeypatch, "no")
    assert "too old" not in str(diagnosis.unused_gpu())


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("Unexpected error from cudaGetDeviceCount(). Did you ...? Error 802: system not yet initialized",
         "CUDA does not start (Error 802: system not yet initialized); start the service nvidia-fabricmanager"),
        ("CUDA unknown error - this may be due to ...\nmore", "CUDA does not start (CUDA unknown error - this may be "
         "due to ...); see the system's log"),
    ],
)  # fmt: skip
def test_where_cuda_does_not_start_its_own_error_is_told(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, said: str, line: str
) -> None:
    starts(monkeypatch, said)
    assert diagnosis.unused_gpu() == f"NVML sees NVIDIA H200, but {line}"


def test_a_torch_without_cuda_and_a_driver_that_refuses_are_told(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA; install a torch built for CUDA" in str(diagnosis.unused_gpu())
    forget()
    nvml.refused = {"nvmlInit": nvml.NVML_ERROR_NO_PERMISSION}
    assert diagnosis.unused_gpu() == "NVML does not start (Insufficient Permissions); nvidia-smi should say more"


def test_gpus_hidden_on_purpose_are_no_fault(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert diagnosis.unused_gpu() is None
        assert diagnosis.why_no_cuda() == f"CUDA_VISIBLE_DEVICES={hidden} hides all GPUs"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert "CUDA_VISIBLE_DEVICES=7 names none of what is there" in str(diagnosis.unused_gpu())


@pytest.mark.parametrize("refusal", ["NVML_ERROR_LIBRARY_NOT_FOUND", "NVML_ERROR_DRIVER_NOT_LOADED", None])
def test_where_nothing_is_of_nvidias_nothing_is_found(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, refusal: str | None
) -> None:
    if refusal is None:
        nvml.count = 0
    else:
        nvml.refused = {"nvmlInit": getattr(nvml, refusal)}
    assert diagnosis.unused_gpu() is None
    assert diagnosis.why_no_cuda() is None
    assert diagnosis.disturbances(torch.device("cpu")) == []


def test_a_gpu_that_torch_finds_is_used(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert diagnosis.unused_gpu() is None
    assert not nvml.calls


def test_the_compiler_is_looked_for_as_triton_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    include = tmp_path / "include"
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(include)})
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "finds neither gcc nor clang" in str(diagnosis.no_compiler())
    (tmp_path / "clang").write_text("#!/bin/sh\n")
    (tmp_path / "clang").chmod(0o755)
    assert f"{include} has no Python.h; install the package python3-dev" in str(diagnosis.no_compiler())
    include.mkdir()
    (include / "Python.h").touch()
    assert diagnosis.no_compiler() is None
    # CC is taken at its word.
    monkeypatch.setenv("CC", "icc")
    assert "CC=icc is no program here" in str(diagnosis.no_compiler())
    monkeypatch.setenv("CC", str(tmp_path / "clang"))
    assert diagnosis.no_compiler() is None


def test_triton_still_looks_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Triton's own build fails where we say that it will, and not for another reason."""
    build = pytest.importorskip("triton.runtime.build")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="Failed to find C compiler"):
        build._build("x", str(tmp_path / "x.c"), str(tmp_path), [], [], [], [])
    assert diagnosis.no_compiler()


@pytest.mark.parametrize(("capability", "fit"), [((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)])
def test_the_kernels_need_sm_80(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], fit: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    expected = "needs a GPU of compute capability 8.0 or later, and Tesla T4 has 7.5"
    assert diagnosis.too_old(GPU) == (None if fit else expected)


def test_others_on_the_gpu_are_counted_and_this_program_is_not(nvml: FakeNvml) -> None:
    nvml.processes = {os.getpid(): 2**30, os.getppid(): None}
    assert diagnosis.disturbances(GPU) == []
    nvml.processes |= {4194301: 3 * 2**30, 4194302: None, 4194303: 2**30, 4194304: 2**30}
    nvml.busy = 87
    (line,) = diagnosis.disturbances(GPU)
    assert line == (
        "cuda:1: others use it (process 4194301 with 3.0 GiB, process 4194302, process 4194303 with 1.0 GiB, 1 more, "
        "87 % busy), which makes latencies longer and less certain; wait until they have ended, or take another "
        "--device"
    )
    # From within a container NVML may know the load alone.
    nvml.processes = {}
    assert "others use it (87 % busy)" in diagnosis.disturbances(GPU)[0]


def test_clocks_that_are_refused_are_told(nvml: FakeNvml) -> None:
    nvml.refused = {"nvmlDeviceGetClockInfo": nvml.NVML_ERROR_NO_PERMISSION}
    (line,) = diagnosis.disturbances(GPU)
    assert line.startswith("cuda:1: its clocks cannot be read (Insufficient Permissions), so throttling goes unnoticed")


@pytest.mark.gpu
def test_on_the_real_gpu_every_question_has_an_answer() -> None:
    """A compiler is there, as the kernels' tests need one; what else is found depends on the machine."""
    device = torch.device("cuda", torch.cuda.current_device())
    assert diagnosis.unused_gpu() is None
    assert diagnosis.why_no_cuda() is None
    assert diagnosis.no_compiler() is None
    assert diagnosis.too_old(device) is None
    assert all(line.startswith(str(device)) for line in diagnosis.disturbances(device))
