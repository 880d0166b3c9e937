"""Inspection of the machine code that the compiler makes: `python -m kernels.lab.inspect --channels 64`.

No GPU is needed: Triton compiles for a named target without a driver, and brings the tools that read the machine code.
With `--run` the kernels also run in the emulator (`kernels.lab.emulator`), which counts what they do.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import triton
import typer
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import cost_model, layered
from kernels.convfirst import constants, convfirst_kernel
from kernels.cost_model import GPU_SPECS
from kernels.lab.commands import capability_option, fail, known_capabilities
from kernels.lab.emulator import Traffic, rehearse
from kernels.problem import MAX_SPLITS, BlockProblem, Tiling, unsupported

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}


@dataclass(frozen=True)
class Statics:
    """The resources and instructions of one compiled kernel.

    Args:
        registers: registers per thread.
        stack_bytes: local memory per thread.
        spills: number of instructions that load or store local memory.
        shared_bytes: shared memory per program.
        tensor_core: number of instructions of Hopper's warp-group products (HGMMA) and of the older ones (HMMA), as
            written: the body of a loop counts once.
        global_loads: number of instructions that load from global memory, by bits per thread, copies into shared
            memory included.
        barriers: number of instructions at which all warps wait for one another.
    """

    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    tensor_core: Mapping[str, int]
    global_loads: Mapping[int, int]
    barriers: int

    def complaints(self, capability: int, dtype: str) -> list[str]:
        """Reasons not to run this kernel: too much shared memory, spills, no tensor-core instruction."""
        reasons = []
        shared_bytes = GPU_SPECS[capability].shared_bytes
        if self.shared_bytes > shared_bytes:
            reasons.append(f"{self.shared_bytes} bytes of shared memory, the chip has {shared_bytes}")
        if self.spills:
            reasons.append(f"{self.spills} instructions spill registers")
        if dtype != "float32" and not sum(self.tensor_core.values()):
            reasons.append("no tensor-core instruction")
        return reasons


# Types of the kernels' arguments, by name, that are not pointers to the dtype of the input.
OTHER_ARGUMENTS = {
    **dict.fromkeys(("conv_bias", "expand_bias", "project_bias", "bias", "partial"), "*fp32"), "counters": "*i32",
    **dict.fromkeys(("pixels", "height", "width", "out_height", "out_width", "taps", "tiles", "rows"), "i32"),
}  # fmt: skip


def compile_for(kernel: Any, constexprs: Mapping[str, object], dtype: str, num_warps: int, capability: int) -> Any:
    """Compile a kernel for a compute capability such as 90, with pointers aligned to 16 bytes.

    Args:
        kernel: a function of `triton.jit`.
        constexprs: all compile-time arguments of the kernel.
        dtype: data type of the input, such as "float16".
    """
    types = {
        name: "constexpr" if name in constexprs else OTHER_ARGUMENTS.get(name, POINTERS[dtype])
        for name in kernel.arg_names
    }
    attrs = {
        (index,): [["tt.divisibility", 16]] for index, name in enumerate(kernel.arg_names) if types[name][0] == "*"
    }
    source = ASTSource(kernel, types, dict(constexprs), attrs)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})


def read_statics(compiled: Any) -> Statics:
    """Read registers, spills, shared memory and instructions from a kernel that `compile_for` made."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK"))  # type: ignore[union-attr]
    operations = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code, re.MULTILINE)
    names = [operation.split(".") for operation in operations]
    widths = Counter(_bits(words) for words in names if words[0] in ("LDG", "LDGSTS"))
    return Statics(
        registers=registers,
        stack_bytes=stack,
        spills=sum(words[0] in ("LDL", "STL") for words in names),
        shared_bytes=compiled.metadata.shared,
        tensor_core={name: sum(words[0] == name for words in names) for name in ("HGMMA", "HMMA")},
        global_loads=dict(sorted(widths.items())),
        barriers=sum(words[0] == "BAR" for words in names),
    )


def _bits(words: list[str]) -> int:
    """Bits per thread of a load such as LDG.E.128, given as its words."""
    return next(
        (int(word) for word in words[1:] if word in ("64", "128")), 8 if "U8" in words else 16 if "U16" in words else 32
    )


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout


def compile_block(problem: BlockProblem, tiling: Tiling, capability: int) -> list[Any]:
    """Compile a block's kernel, or those of its three launches, for a compute capability such as 90."""
    if tiling.launches == 1:
        fixed = constants(problem, tiling)
        return [compile_for(convfirst_kernel, fixed, problem.dtype, tiling.num_warps, capability)]
    fixed = layered.conv_constants(problem, tiling)
    compiled = [compile_for(layered.conv_kernel, fixed, problem.dtype, tiling.num_warps, capability)]
    for fixed, cut in layered.product_constants(problem):
        compiled.append(compile_for(layered.product_kernel, fixed, problem.dtype, cut.num_warps, capability))
    return compiled


def block_statics(problem: BlockProblem, tiling: Tiling, capability: int) -> Statics:
    """The resources and instructions of a block: the most memory of one of its launches, and all instructions."""
    compiled = [read_statics(each) for each in compile_block(problem, tiling, capability)]
    loads: Counter[int] = sum((Counter(each.global_loads) for each in compiled), Counter())
    return Statics(
        registers=max(each.registers for each in compiled),
        stack_bytes=max(each.stack_bytes for each in compiled),
        spills=sum(each.spills for each in compiled),
        shared_bytes=max(each.shared_bytes for each in compiled),
        tensor_core={name: sum(each.tensor_core[name] for each in compiled) for name in compiled[0].tensor_core},
        global_loads=dict(sorted(loads.items())),
        barriers=sum(each.barriers for each in compiled),
    )


def shorthand(tiling: Tiling) -> str:
    """A tiling in a few letters, such as `m128 e64 mma w8 s2`; for three launches only what the first one uses."""
    shape = f"{tiling.rows}x{tiling.columns}" if tiling.rows > 1 else f"m{tiling.block_m}"
    if tiling.launches > 1:
        return (
            f"{tiling.launches} launches {shape} {tiling.conv} w{tiling.num_warps} c{tiling.conv_stages} p{tiling.part}"
        )
    word = f"{shape} e{tiling.block_e} {tiling.conv}"
    word += f" x{tiling.splits}" if tiling.splits > 1 else ""
    word += f" o{tiling.out_splits}" if tiling.out_splits > 1 else ""
    word += f" t{tiling.tiles_each}" if tiling.tiles_each > 1 else ""
    word += f" w{tiling.num_warps} s{tiling.num_stages}"
    word += f" c{tiling.conv_stages}" if tiling.conv_stages > 1 else ""
    return word + (f" p{tiling.part}" if tiling.part != 128 else "")


def main(
    channels: Annotated[int, typer.Option(help="Input channels.")] = 64,
    out_channels: Annotated[int | None, typer.Option(help="Output channels (default: the input channels).")] = None,
    expansion: Annotated[float, typer.Option(help="Hidden over input channels.")] = 4.0,
    kernel_size: Annotated[int, typer.Option(help="Kernel size: 3, 5 or 7.")] = 3,
    group_width: Annotated[int, typer.Option(help="Channels per group; 1 is depthwise.")] = 8,
    stride: Annotated[int, typer.Option(help="Stride: 1 or 2.")] = 1,
    shortcut: Annotated[bool, typer.Option("--shortcut", help="Add the input where the shape changes, too.")] = False,
    activation: Annotated[str, typer.Option(help="Activation: silu, relu, gelu or hard_swish.")] = "silu",
    dtype: Annotated[str, typer.Option(help="Data type: float16, bfloat16 or float32.")] = "float16",
    batch: Annotated[int, typer.Option(help="Images per batch.")] = 128,
    resolution: Annotated[int, typer.Option(help="Height and width of the input, in pixels.")] = 56,
    capability: Annotated[list[int] | None, capability_option("all three")] = None,
    tilings: Annotated[int, typer.Option(min=1, help="Show this many tilings, the likeliest first.")] = 3,
    run: Annotated[bool, typer.Option("--run", help="Also run the kernels in the emulator, and count.")] = False,
) -> None:
    """Compile a fused block without a GPU, and show registers, spills, memory and instructions."""
    capabilities = known_capabilities(capability or GPU_SPECS)
    out = channels if out_channels is None else out_channels
    hidden = max(8, round(channels * expansion / 8) * 8)
    problem = BlockProblem(
        batch, resolution, resolution, channels, hidden, out, kernel_size, group_width, stride, activation,
        shortcut or (stride == 1 and out == channels), dtype, MAX_SPLITS,
    )  # fmt: skip
    if why := unsupported(problem):
        fail(why)
    columns = [
        "sm", "tiling", "predicted us", "registers", "spills", "shared KiB", "HGMMA", "HMMA", "loads by bits", "s",
    ]  # fmt: skip
    if run:
        columns += ["instr", "on-chip KiB", "predicted KiB", "conflicts", "error"]
    table = Table(*columns, title=f"{channels} -> {hidden} -> {out}, k{kernel_size} g{group_width}, {dtype}")
    for number in capabilities:
        gpu = GPU_SPECS[number]
        for tiling in cost_model.ranked(problem, gpu)[:tilings]:
            begin = time.perf_counter()
            statics = block_statics(problem, tiling, number)
            seconds = time.perf_counter() - begin
            loads = " ".join(f"{bits}:{count}" for bits, count in statics.global_loads.items())
            ran: tuple[str, ...] = ()
            if run and statics.shared_bytes <= gpu.shared_bytes:
                traffic = Traffic()
                error = rehearse(problem, tiling, number, traffic)
                # `rehearse` runs two tiles per program at most; several launches have no single figure.
                two = replace(tiling, tiles_each=min(tiling.tiles_each, 2))
                counted = cost_model.on_chip_bytes(problem, two, gpu.wgmma_macs > gpu.mma_macs)
                ran = (
                    str(sum(traffic.instructions.values()) // traffic.programs),
                    f"{traffic.on_chip_bytes / traffic.programs / 1024:.0f}",
                    f"{counted / 1024:.0f}" if tiling.launches == 1 else "",
                    f"{traffic.shared_wavefronts / traffic.shared_least:.2f}", f"{error:.1e}",
                )  # fmt: skip
            table.add_row(
                str(number), shorthand(tiling), f"{1e6 * cost_model.estimate(problem, tiling, gpu):.1f}",
                str(statics.registers), str(statics.spills), f"{statics.shared_bytes / 1024:.1f}",
                *(str(statics.tensor_core[name]) for name in ("HGMMA", "HMMA")), loads, f"{seconds:.1f}", *ran,
            )  # fmt: skip
    Console(width=160 if run else 120).print(table)


if __name__ == "__main__":
    typer.run(main)
