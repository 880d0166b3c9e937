"""An emulator of the kernels' PTX, which needs no GPU: `with emulated(90): fused(images)`.

It stands between Triton's interpreter, which runs the source, and a GPU, which runs the machine code. Triton's own
launch path binds and compiles a call for a GPU that is not there; then each program's threads run in lockstep, as NumPy
vectors, on the call's CPU tensors. The emulator is stricter than hardware. These all end with an error: an access that
is outside the tensors or misaligned, a read of shared memory that nobody wrote, a race between warps in shared memory,
and a use of what is still being copied or multiplied. It does not watch races in global memory (programs run one after
the other, in a shuffled order) nor fences between the ways into shared memory. It cannot tell time, but it counts what
takes time (`Traffic`). It knows the instructions that Triton makes of these kernels, by the definitions of the PTX ISA
(https://docs.nvidia.com/cuda/parallel-thread-execution); any other is an error.

Import the names below from here. This package imports only `kernels`; `kernels.lab`, `nas.lab` and tests import it.
"""

from kernels.lab.emulator.launch import emulated, rehearse
from kernels.lab.emulator.memory import Traffic
from kernels.lab.emulator.ptx import EmulationError

__all__ = ["EmulationError", "Traffic", "emulated", "rehearse"]
