"""The way of a launch through Triton's true launcher to a stub of CUDA's driver, in a child process of its own.

Once it is loaded, the stub is what everyone in a process takes for CUDA's driver.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch

from kernels import head
from kernels.head import HeadTiling
from kernels.lab.stub import Faults, NoCompiler, shared_faults, stub_driver
from nas.child_process import ChildProcess

pytestmark = pytest.mark.launch_path


@pytest.fixture(scope="module")
def faults() -> Iterator[Faults]:
    with shared_faults() as shared:
        yield shared


@pytest.fixture(scope="module")
def child(faults: Faults) -> Iterator[ChildProcess]:
    with ChildProcess({"OMP_NUM_THREADS": "1"}) as process:
        if why := process.call(missing):
            pytest.skip(f"{why}: nothing was launched through Triton's launcher")
        yield process


def missing() -> str | None:
    """The reason why nothing can be launched here."""
    try:
        with stub_driver():
            return None
    except NoCompiler as why:
        return str(why)


# -- Faults ------------------------------------------------------------------------------------------------------------


def launch_linear() -> None:
    x, weight, bias = torch.zeros(1, 16).half(), torch.zeros(128, 128).half(), torch.zeros(128)
    head.linear(x, weight, bias, 8, "none", HeadTiling(False, 16, 16, 16))


def launch_with_faults() -> list[str]:
    """What launches do where the second fails, and after that."""
    outcomes = []

    def attempt() -> None:
        try:
            launch_linear()
            outcomes.append("launched")
        except RuntimeError as error:
            outcomes.append(str(error))

    with stub_driver() as driver:
        driver.faults.fail("stem_kernel")
        attempt()
        driver.faults.fail("linear_kernel", times=1, after=1)
        for _ in range(3):
            attempt()
        assert driver.faults.failed == 1
        driver.heal()
        attempt()
        driver.faults.fail(result="out of resources", times=1)
        attempt()
        attempt()
    return outcomes


@pytest.mark.fault
def test_a_fault_ends_the_context_and_a_refusal_does_not(child: ChildProcess) -> None:
    illegal = "Triton Error [CUDA]: an illegal memory access was encountered"
    refused = "Triton Error [CUDA]: too many resources requested for launch"
    assert child.call(launch_with_faults) == [
        "launched", "launched", illegal, illegal, "launched", refused, "launched",
    ]  # fmt: skip


def die_in_a_launch(result: str) -> tuple[int, int]:
    """How a process ends whose launch does this, and the number of launches that failed."""
    with stub_driver() as driver:
        launch_linear()
        driver.faults.fail("linear_kernel", result)
        if (process := os.fork()) == 0:
            with contextlib.suppress(BaseException):
                launch_linear()
            os._exit(0)
        while result == "hang" and driver.faults.failed == 0:
            time.sleep(0.01)
        if result == "hang":
            # It is still there.
            assert os.waitpid(process, os.WNOHANG) == (0, 0)
            os.kill(process, signal.SIGTERM)
        _, status = os.waitpid(process, 0)
        failed = driver.faults.failed
        driver.heal()
        launch_linear()
    return os.waitstatus_to_exitcode(status), failed


@pytest.mark.fault
def test_a_launch_hangs_or_ends_its_process_and_another_is_told(child: ChildProcess) -> None:
    assert child.call(die_in_a_launch, "abort") == (-signal.SIGABRT, 1)
    assert child.call(die_in_a_launch, "hang") == (-signal.SIGTERM, 1)


def launch_alone() -> str:
    with stub_driver():
        try:
            launch_linear()
            return "launched"
        except RuntimeError as error:
            return str(error)


@pytest.mark.fault
def test_a_parent_without_a_driver_lets_launches_of_its_child_fail(child: ChildProcess, faults: Faults) -> None:
    faults.fail("linear_kernel", "out of resources", times=1)
    assert "too many resources" in child.call(launch_alone)
    assert faults.failed == 1
    assert child.call(launch_alone) == "launched"
