"""A stand-in for CUDA's driver, through which Triton's true launch path runs without a GPU.

    with stub_driver(90) as driver:
        fused(images)
        driver.launches

Triton binds and compiles the calls, builds and loads its own launchers, and these launch. Only the driver's library,
which would pass the kernels on to a GPU, is ours (`driver.c`): it records each launch, or makes it fail. No kernel
runs, and outputs hold whatever the memory held. `kernels.lab.emulator` shows what kernels compute.

`stub_cuda` goes further: torch's tensors and CUDA graphs are on a GPU, too, as far as anyone can tell, and a capture
refuses what a CUDA graph cannot hold.

    with stub_driver(90) as driver, stub_cuda(driver) as cuda:
        graph = fused.cuda().graph(1, 32)
        cuda.graphs[-1].launches

Import the names below from here. This package imports only `kernels`; `kernels.lab`, `nas.lab` and tests import it.
"""

from kernels.lab.stub.device import CaptureError, StubCuda, stub_cuda
from kernels.lab.stub.driver import Faults, Launch, NoCompiler, StubDriver, shared_faults, stub_driver

__all__ = [
    "CaptureError", "Faults", "Launch", "NoCompiler", "StubCuda", "StubDriver", "shared_faults", "stub_cuda",
    "stub_driver",
]  # fmt: skip
