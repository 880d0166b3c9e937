"""Runs what the compiler made of the kernels, their PTX, where there is no GPU: `with emulated(90): fused(images)`.

It stands between Triton's interpreter, which runs the source, and a GPU. Triton's own launch path binds and compiles
the call for a GPU that is not there; then each program's threads go in lockstep, as vectors of NumPy, over the CPU
tensors that the call was given. It is stricter than hardware: an access outside the tensors or a misaligned one, a read
of shared memory that nobody wrote, a race between warps in shared memory, a use of what is still being copied or
multiplied, all end with an error. Not watched: races in global memory (programs run one after the other, in a shuffled
order) and fences between the ways into shared memory. What it does not tell is time; what takes time it counts
(`Traffic`). Instructions are those that Triton makes of these kernels, by the definitions of the PTX ISA
(https://docs.nvidia.com/cuda/parallel-thread-execution); of any other it says that it is not known.
"""

from kernels.lab.emulator.launch import emulated, rehearse
from kernels.lab.emulator.memory import Traffic
from kernels.lab.emulator.ptx import EmulationError

__all__ = ["EmulationError", "Traffic", "emulated", "rehearse"]
