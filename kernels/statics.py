"""What the compiler makes of a kernel, read from the machine code, for a GPU that need not be here.

Triton compiles for a named target without a driver, and brings the tools that read the result.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.convfirst import constants, convfirst_kernel
from kernels.problem import BlockProblem, Tiling

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Shared memory that one program may use, in bytes, by compute capability (CUDA C++ Programming Guide, table of
# technical specifications: 163, 99 and 227 KiB).
SHARED_LIMIT_BYTES = {80: 166_912, 89: 101_376, 90: 232_448}
MAX_REGISTERS = 255
POINTERS = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}


@dataclass(frozen=True)
class Statics:
    """Of one compiled kernel.

    Args:
        registers: a thread.
        stack_bytes: local memory a thread.
        spills: instructions that load or store local memory.
        shared_bytes: a program.
        tensor_core: instructions of Hopper's warp-group products (HGMMA) and of the older ones (HMMA), as written; a
            loop's body counts once.
        global_loads: instructions that load from global memory, by bits a thread, copies into shared memory included.
    """

    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    tensor_core: Mapping[str, int]
    global_loads: Mapping[int, int]

    def complaints(self, capability: int, dtype: str) -> list[str]:
        """What keeps this from being a kernel one would want to run."""
        found = []
        if self.shared_bytes > SHARED_LIMIT_BYTES[capability]:
            found.append(f"{self.shared_bytes} bytes of shared memory, the chip has {SHARED_LIMIT_BYTES[capability]}")
        if self.spills:
            found.append(f"{self.spills} instructions spill registers")
        if dtype != "float32" and not sum(self.tensor_core.values()):
            found.append("no tensor-core instruction")
        return found


def compile_for(
    kernel: Any, signature: Mapping[str, str], constexprs: Mapping[str, object], num_warps: int, capability: int
) -> Any:
    """Compile a Triton kernel for a compute capability; pointers are taken to be 16-byte aligned.

    Args:
        signature: argument -> type, such as "*fp16" or "i32", of all arguments that are no constants.
    """
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    attrs = {
        (index,): [["tt.divisibility", 16]] for index, name in enumerate(kernel.arg_names) if types[name][0] == "*"
    }
    source = ASTSource(kernel, types, dict(constexprs), attrs)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})


def read_statics(compiled: Any) -> Statics:
    """Registers, spills, shared memory, tensor-core instructions and loads of a kernel from `compile_for`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK"))  # type: ignore[union-attr]
    operations = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code, re.MULTILINE)
    names = [operation.split(".") for operation in operations]
    widths = Counter(_bits(parts) for parts in names if parts[0] in ("LDG", "LDGSTS"))
    return Statics(
        registers=registers,
        stack_bytes=stack,
        spills=sum(parts[0] in ("LDL", "STL") for parts in names),
        shared_bytes=compiled.metadata.shared,
        tensor_core={name: sum(parts[0] == name for parts in names) for name in ("HGMMA", "HMMA")},
        global_loads=dict(sorted(widths.items())),
    )


def _bits(parts: list[str]) -> int:
    return next(
        (int(part) for part in parts[1:] if part in ("64", "128")), 8 if "U8" in parts else 16 if "U16" in parts else 32
    )


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout


def compile_block(problem: BlockProblem, tiling: Tiling, capability: int) -> Any:
    """The fused block's kernel, compiled for a compute capability such as 90."""
    pointer = POINTERS[problem.dtype]
    signature = dict.fromkeys(("x", "conv", "expand", "project", "out"), pointer)
    signature |= dict.fromkeys(("conv_bias", "expand_bias", "project_bias", "partial"), "*fp32") | {"counters": "*i32"}
    signature |= dict.fromkeys(("pixels", "height", "width", "out_height", "out_width"), "i32")
    return compile_for(convfirst_kernel, signature, constants(problem, tiling), tiling.num_warps, capability)
