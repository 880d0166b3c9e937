"""A stand-in for CUDA's driver, through which Triton's true launch path runs without a GPU.

    with stub_driver(90) as driver:
        fused(images)
        driver.launches

Triton binds and compiles the calls, builds and loads its own launchers, and these launch. Only the driver's library,
which would pass the kernels on to a GPU, is ours (`driver.c`): it records each launch, or makes it fail. No kernel
runs, and outputs hold whatever the memory held. `kernels.lab.emulator` shows what kernels compute.

Import the names below from here. This package imports only `kernels`; `kernels.lab`, `nas.lab` and tests import it.
"""

from kernels.lab.stub.driver import Faults, Launch, NoCompiler, StubDriver, shared_faults, stub_driver

__all__ = ["Faults", "Launch", "NoCompiler", "StubDriver", "shared_faults", "stub_driver"]
