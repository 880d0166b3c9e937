"""Runs what the compiler made of the kernels, their PTX, where there is no GPU: `with emulated(90): fused(images)`.

It stands between Triton's interpreter, which runs the source, and a GPU. Triton's own launch path binds and compiles
the call for a GPU that is not there; then each program's threads go in lockstep, as vectors of NumPy, over the CPU
tensors that the call was given. It is stricter than hardware: an access outside the tensors or a misaligned one, a read
of shared memory that nobody wrote, a race between warps in shared memory, a use of what is still being copied or
multiplied, all end with an error. Not watched: races in global memory (programs run one after the other, in a shuffled
order), registers that only some threads have set, fences between the ways into shared memory. What it does not tell is
time; what takes time it counts (`Traffic`). Instructions are those that Triton makes of these kernels, by the
definitions of the PTX ISA (https://docs.nvidia.com/cuda/parallel-thread-execution); of any other it says that it is not
known.
"""

from __future__ import annotations

import functools
import operator
import random
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from math import sqrt
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager

from kernels import convfirst
from kernels.cost_model import LIMITS
from kernels.device_functions import EMULATED, INTERPRETED
from kernels.problem import BlockProblem, Tiling

WARP = 32
Array = np.ndarray[Any, Any]


class EmulationError(Exception):
    """What the kernel did wrong, or an instruction that is not known, with its line of PTX."""


# -- Parsing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Address:
    base: Any
    offset: int


@dataclass(frozen=True)
class Literal:
    """An immediate: its bits, or for an integer its value."""

    value: int
    is_float: bool = False


@dataclass(frozen=True)
class Instruction:
    """One line of PTX.

    Args:
        guard: predicate register, and what it must be; None where all threads take part.
        name: operation without its modifiers.
        modifiers: the rest of the operation, split at its points.
        operands: registers by name, `Literal`s, `Address`es, and tuples of these.
    """

    text: str
    guard: tuple[str, bool] | None
    name: str
    modifiers: tuple[str, ...]
    operands: tuple[Any, ...]


@dataclass(frozen=True)
class Code:
    """One kernel.

    Args:
        threads: of a program.
        params: names, in order.
        instructions, labels: the body; labels are places in it.
        bits: of each class of registers, by prefix; 1 for predicates.
    """

    threads: int
    params: tuple[str, ...]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    bits: dict[str, int]


_STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)


def parse(ptx: str) -> Code:
    """The one kernel in a module that Triton made."""
    text = re.sub(r"//[^\n]*", "", ptx)
    entry = re.search(r"\.entry\s+\w+\(([^)]*)\)(.*?)\{(.*)", text, re.DOTALL)
    if entry is None:
        raise EmulationError("no kernel")
    params = tuple(re.findall(r"(\w+)\s*(?:,|$)", entry[1].strip()))
    threads = int(re.search(r"\.reqntid (\d+)", entry[2])[1])  # type: ignore[index]
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    bits: dict[str, int] = {}
    # Statements end with a semicolon; labels with a colon; directives of debuggers with the line.
    body = re.sub(r"^\s*\.(loc|file|pragma)\b[^\n]*", "", entry[3], flags=re.MULTILINE)
    for statement in body.split(";"):
        rest = statement.strip()
        while label := re.match(r"(\$\w+):\s*", rest):
            labels[label[1]] = len(instructions)
            rest = rest[label.end() :]
        if declared := re.match(r"\.reg\s+\.(\w+)\s+%(\w+)<", rest):
            bits[declared[2]] = 1 if declared[1] == "pred" else int(declared[1][1:])
        elif rest.startswith("}"):
            break
        elif rest:
            instructions.append(_instruction(rest))
    return Code(threads, params, tuple(instructions), labels, bits)


def _instruction(text: str) -> Instruction:
    match = _STATEMENT.fullmatch(text)
    if match is None:
        raise EmulationError(f"not understood: {text}")
    negated, guard, operation, operands = match.groups()
    name, *modifiers = operation.replace("::", ":").split(".")
    return Instruction(
        " ".join(text.split()), (guard, not negated) if guard else None, name, tuple(modifiers), _operands(operands)
    )


def _operands(text: str) -> tuple[Any, ...]:
    parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s{}\[\]]+(?:\|[^,\s]+)?", text)
    return tuple(map(_operand, parts))


def _operand(text: str) -> Any:
    if text.startswith("{"):
        return _operands(text[1:-1])
    if text.startswith("["):
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        return Address(_operand(base), int(offset or "0", 0))
    if text.startswith("0f"):
        return Literal(int(text[2:], 16), True)
    if re.fullmatch(r"-?\d\w*", text):
        return Literal(int(text.rstrip("U"), 0))
    return text


# -- Memory ----------------------------------------------------------------------------------------------------------


@dataclass
class Traffic:
    """What launches did, summed over their programs: counts, which unlike time can be had here.

    Args:
        programs: that ran.
        instructions: of programs, by name without modifiers.
        shared_wavefronts: accesses to shared memory as the hardware makes them, 128 bytes each at most; several where
            threads want different words of one bank.
        shared_least: what they would be if no two words shared a bank.
        global_bytes: that threads loaded and stored, copies into shared memory included.
        global_sectors: of 32 bytes, that were touched for it.
        cached_bytes: of `global_bytes` those of plain loads and stores, which go through the first-level cache.
    """

    programs: int = 0
    instructions: Counter[str] = field(default_factory=Counter)
    shared_wavefronts: int = 0
    shared_least: int = 0
    global_bytes: int = 0
    global_sectors: int = 0
    cached_bytes: int = 0

    @property
    def on_chip_bytes(self) -> int:
        """Of shared memory and first-level cache, which have one path of 128 bytes a clock."""
        return 128 * self.shared_wavefronts + self.cached_bytes

    def count_shared(self, addresses: Array, size: int, warps: Array) -> None:
        """One instruction's accesses of `size` bytes a thread, (n,) each: 128 bytes of a warp at a time."""
        together = {8: 16, 16: 8}.get(size, WARP)
        rank = np.arange(len(warps)) - np.searchsorted(warps, warps)
        phase = warps.astype(np.int64) * WARP + rank // together
        words = (addresses.astype(np.int64)[:, None] + np.arange(0, max(size, 4), 4)) // 4
        found = np.unique((phase[:, None] << 32) + words)
        _, phases = np.unique(found >> 32, return_inverse=True)
        banks = np.bincount(phases * WARP + found % WARP, minlength=WARP * (phases[-1] + 1)).reshape(-1, WARP)
        self.shared_wavefronts += int(banks.max(axis=1).sum())
        self.shared_least += int((-(-np.bincount(phases) // WARP)).sum())

    def count_global(self, addresses: Array, size: int) -> None:
        """One instruction's accesses of `size` bytes a thread, (n,)."""
        self.global_bytes += size * len(addresses)
        for begin in range(0, len(addresses), WARP):
            first = addresses[begin : begin + WARP].astype(np.int64)
            self.global_sectors += len(np.unique((first[:, None] + np.arange(0, size, min(size, 4))) // 32))


class GlobalMemory:
    """The tensors of a launch at the addresses they have, and nothing else."""

    def __init__(self, tensors: Sequence[Tensor], traffic: Traffic | None = None) -> None:
        self.traffic = traffic
        held = {(tensor.data_ptr(), _extent_bytes(tensor)) for tensor in tensors if tensor.numel()}
        self.ranges = sorted(held)
        self.starts = [start for start, _ in self.ranges]
        self.bytes = [_memory(start, size) for start, size in self.ranges]

    def _where(self, addresses: Array, size: int) -> tuple[Array, Array]:
        """The tensor's bytes, and where in them the accesses begin: all in one tensor, as an instruction's are."""
        if self.traffic is not None:
            self.traffic.count_global(addresses, size)
        found = bisect_right(self.starts, int(addresses[0])) - 1
        if found >= 0:
            start, length = self.ranges[found]
            offsets = addresses.astype(np.int64) - start
            if offsets.min() >= 0 and offsets.max() + size <= length:
                return self.bytes[found], offsets
        raise EmulationError(f"{size} bytes at {addresses.min():#x} to {addresses.max():#x} are outside the tensors")

    def load(self, addresses: Array, size: int) -> Array:
        """(n,) addresses -> (n, size) bytes."""
        held, offsets = self._where(addresses, size)
        return held[offsets[:, None] + np.arange(size)]

    def store(self, addresses: Array, values: Array) -> None:
        """(n,) addresses, (n, size) bytes."""
        held, offsets = self._where(addresses, values.shape[1])
        held[offsets[:, None] + np.arange(values.shape[1])] = values


def _extent_bytes(tensor: Tensor) -> int:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _memory(start: int, size: int) -> Array:
    import ctypes

    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(start))


NOBODY, SEVERAL = -1, -2


class SharedMemory:
    """A program's shared memory, which remembers who wrote and read each byte since all threads last met."""

    def __init__(self, size: int, traffic: Traffic | None = None) -> None:
        self.traffic = traffic
        self.bytes = np.zeros(size, np.uint8)
        self.written = np.zeros(size, bool)
        self.pending = np.zeros(size, bool)
        # How many products of warp groups that were not waited for read a byte.
        self.reading = np.zeros(size, np.int16)
        self.writer = np.full(size, NOBODY, np.int16)
        self.reader = np.full(size, NOBODY, np.int16)

    def meet(self) -> None:
        """All threads are here: what was done before is done for all of them."""
        self.writer.fill(NOBODY)
        self.reader.fill(NOBODY)

    def _where(self, addresses: Array, size: int) -> Array:
        if addresses.min() < 0 or addresses.max() + size > len(self.bytes):
            raise EmulationError(f"{size} bytes at {addresses.min()} to {addresses.max()} of {len(self.bytes)} shared")
        return addresses.astype(np.int64)[:, None] + np.arange(size)

    def _count(self, addresses: Array, size: int, warps: Array) -> None:
        if self.traffic is None:
            return
        if warps[0] == SEVERAL:
            # A warp group's product reads a matrix whole, and lays it out so that no banks are shared.
            self.traffic.shared_wavefronts += size * len(addresses) // 128
            self.traffic.shared_least += size * len(addresses) // 128
        else:
            self.traffic.count_shared(addresses, size, warps)

    def _settled(self, where: Array) -> Array:
        if self.pending[where].any():
            raise EmulationError("touches what is being copied, before that was waited for")
        return where

    def load(self, addresses: Array, size: int, warps: Array) -> Array:
        self._count(addresses, size, warps)
        where = self._settled(self._where(addresses, size))
        if not self.written[where].all():
            raise EmulationError("reads shared memory that nobody wrote")
        writer = self.writer[where]
        if ((writer != NOBODY) & (writer != warps[:, None])).any():
            raise EmulationError("a warp reads what another wrote, with no barrier between")
        reader = self.reader[where]
        self.reader[where] = np.where((reader == NOBODY) | (reader == warps[:, None]), warps[:, None], SEVERAL)
        # Of several that read a place at once the last was noted.
        self.reader[where[self.reader[where] != warps[:, None]]] = SEVERAL
        return self.bytes[where]

    def store(self, addresses: Array, values: Array, warps: Array) -> None:
        where = self._ours(addresses, values, warps)
        self._write(where, values, warps)

    def begin_copy(self, addresses: Array, values: Array, warps: Array) -> None:
        """Until it is finished, nobody may read or write there."""
        self.pending[self._ours(addresses, values, warps)] = True

    def finish_copy(self, addresses: Array, values: Array, warps: Array) -> None:
        where = self._where(addresses, values.shape[1])
        self.pending[where] = False
        self._write(where, values, warps)

    def _ours(self, addresses: Array, values: Array, warps: Array) -> Array:
        where = self._settled(self._where(addresses, values.shape[1]))
        self._count(addresses, values.shape[1], warps)
        reader, writer = self.reader[where], self.writer[where]
        if ((reader != NOBODY) & (reader != warps[:, None])).any():
            raise EmulationError("a warp overwrites what another reads, with no barrier between")
        # Several may write the same, as they do where a tensor is smaller than a program.
        if ((writer != NOBODY) & (writer != warps[:, None]) & (self.bytes[where] != values)).any():
            raise EmulationError("two warps write to one place, with no barrier between")
        _, first, again = np.unique(where, return_index=True, return_inverse=True)
        if (values.ravel()[first][again.ravel()] != values.ravel()).any():
            raise EmulationError("threads write different values to one place")
        if self.reading[where].any():
            raise EmulationError("overwrites what a product still reads")
        return where

    def _write(self, where: Array, values: Array, warps: Array) -> None:
        self.writer[where] = warps[:, None]
        self.written[where] = True
        self.bytes[where] = values


# -- Types -----------------------------------------------------------------------------------------------------------

_KINDS: dict[str, Any] = {
    "pred": np.bool_, "f16": np.float16, "f32": np.float32, "f64": np.float64, "bf16": np.uint16,
    **{f"{letter}{bits}": np.dtype(f"u{bits // 8}") for letter in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    "f16x2": np.uint32, "bf16x2": np.uint32,
}  # fmt: skip
_UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


def _widened(bits: Array) -> Array:
    """bfloat16's bits as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(values: Array) -> Array:
    """float32 to bfloat16's bits, to nearest, ties to even."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def _rounded_to_bits(values: Array, bits: int) -> Array:
    """float32 with so many bits of mantissa."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.round(mantissa * 2.0**bits) / 2.0**bits, exponent).astype(np.float32)


# Lane l's elements of the matrices of a warp's product m16n8k16, by register and half; 8-bit places of PTX's figures.
_LANE = np.arange(WARP)
_ROW, _PAIR = _LANE // 4, _LANE % 4 * 2


def _fragment_a(registers: Sequence[Array], kind: str) -> Array:
    """(warps, 16, 16) of four registers."""
    halves = [_halves(register, kind) for register in registers]
    matrix = np.zeros((len(halves[0]), 16, 16), np.float32)
    for index, pair in enumerate(halves):
        row = _ROW + 8 * (index % 2)
        for half in range(2):
            matrix[:, row, _PAIR + half + 8 * (index // 2)] = pair[:, :, half]
    return matrix


def _fragment_b(registers: Sequence[Array], kind: str) -> Array:
    """(warps, 16, 8) of two registers."""
    halves = [_halves(register, kind) for register in registers]
    matrix = np.zeros((len(halves[0]), 16, 8), np.float32)
    for index, pair in enumerate(halves):
        for half in range(2):
            matrix[:, _PAIR + half + 8 * index, _ROW] = pair[:, :, half]
    return matrix


def _halves(register: Array, kind: str) -> Array:
    """A register's two 16-bit numbers, (warps, lanes, 2)."""
    pairs = np.ascontiguousarray(register).view(np.uint16).reshape(-1, WARP, 2)
    return _widened(pairs) if kind == "bf16" else pairs.view(np.float16).astype(np.float32)


def described(descriptor: int, rows: int, depth: int, major_rows: bool) -> Array:
    """Shared addresses, (rows, depth), of a 16-bit matrix by its wgmma descriptor.

    The layouts are those of the PTX ISA's section on wgmma's shared memory, as CUTLASS writes them down in
    `cute/arch/mma_sm90_desc.hpp`.

    Args:
        major_rows: whether rows, rather than depth, run along the contiguous dimension.
    """
    start, leading, stride = (((descriptor >> shift) & 0x3FFF) << 4 for shift in (0, 16, 32))
    if (descriptor >> 49) & 7:
        raise EmulationError("a matrix descriptor with a base offset")
    swizzle_bits = {0: 0, 1: 3, 2: 2, 3: 1}[descriptor >> 62]
    # Of a 16-bit type 8 elements make the 16 bytes that stay together.
    chunks = 2**swizzle_bits
    row, k = np.arange(rows)[:, None], np.arange(depth)[None, :]
    if swizzle_bits and major_rows:
        within = 8 * chunks
        address = row % within * 2 + row // within * leading + k % 8 * (16 * chunks) + k // 8 * stride
    elif swizzle_bits:
        address = row % 8 * (16 * chunks) + row // 8 * stride + k * 2
    elif major_rows:
        address = row % 8 * 2 + row // 8 * stride + k % 8 * 16 + k // 8 * leading
    else:
        address = row % 8 * 16 + row // 8 * stride + k % 8 * 2 + k // 8 * leading
    address = address + start
    return np.asarray(address ^ ((address >> 3) & ((chunks - 1) << 4)))


def _divided(a: Array, b: Array) -> Array:
    if a.dtype.kind == "f":
        return np.asarray(a / b)
    # Towards zero, not down; by zero anything.
    return np.asarray(np.sign(a) * np.sign(b) * (np.abs(a) // np.maximum(np.abs(b), 1)), a.dtype)


def _remainder(a: Array, b: Array) -> Array:
    return np.asarray(np.sign(a) * (np.abs(a) % np.maximum(np.abs(b), 1)), a.dtype)


# Instructions that do one thing to their sources, in their own type.
_ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "neg": operator.neg, "abs": np.abs, "div": _divided, "rem": _remainder,
    "and": operator.and_, "or": operator.or_, "xor": operator.xor, "not": operator.invert,
    "ex2": np.exp2, "rcp": np.reciprocal,
    # As inexact as the hardware's, which is off by 2^-11 of the value at most.
    "tanh": lambda x: _rounded_to_bits(np.tanh(x), 11),
    # The product of two float32 is exact in float64.
    "fma": lambda a, b, c: (a.astype(np.float64) * b + c).astype(a.dtype),
}  # fmt: skip
# Those that are followed, or that make no difference here; of products they are looked at one by one.
_MODIFIERS = {
    *_KINDS, "rn", "rzi", "approx", "full", "ftz", "NaN", "lo", "hi", "wide", "uni", "sync", "aligned", "to",
    "eq", "ne", "lt", "le", "gt", "ge", "ls", "hs", "equ", "neu", "ltu", "leu", "gtu", "geu", "nan", "num",
    "global", "shared", "shared:cta", "param", "v2", "v4", "cg", "ca", "relaxed", "acq_rel", "gpu", "cta",
    "async", "commit_group", "wait_group", "wait_all", "proxy", "fence", "mma_async", "warp", "bfly", "idx",
    "m8n8", "x1", "x2", "x4", "trans", "m16n8k16", "row", "col", "and", "or", "xor", "add",
    *(f"m64n{width}k16" for width in range(8, 257, 8)),
}  # fmt: skip
# What all threads of a warp, or of a program, do as one.
_TOGETHER = {"bar", "barrier", "elect", "ldmatrix", "mma", "shfl", "stmatrix", "wgmma"}


# -- Execution -------------------------------------------------------------------------------------------------------


@dataclass
class Program:
    """One program of a launch.

    Args:
        code: the kernel.
        arguments: by parameter's name.
        memory: the launch's tensors.
        shared_bytes: that the launch gives it.
        place: along the axes of the grid.
        traffic: where to count what it does.
    """

    code: Code
    arguments: dict[str, int]
    memory: GlobalMemory
    shared_bytes: int
    place: tuple[int, int, int]
    traffic: Traffic | None = None

    def __post_init__(self) -> None:
        threads = self.code.threads
        self.shared = SharedMemory(self.shared_bytes, self.traffic)
        self.registers: dict[str, Array] = {}
        self.lanes = np.arange(threads, dtype=np.uint32)
        self.warps = np.arange(threads) // WARP
        self.all = np.ones(threads, bool)
        # Products of warp groups that were begun, as registers and places that they use, and in the same way by group.
        self.products: list[tuple[set[str], set[str], list[Array]]] = []
        self.product_groups: list[list[tuple[set[str], set[str], list[Array]]]] = []
        self.results: Counter[str] = Counter()
        self.sources: Counter[str] = Counter()
        # Copies that were begun: those of the group being made, and those of the groups committed.
        self.copies: list[tuple[Array, Array, Array]] = []
        self.groups: list[list[tuple[Array, Array, Array]]] = []
        self.special: dict[str, Any] = {
            "%tid.x": self.lanes, "%tid.y": np.uint32(0), "%tid.z": np.uint32(0), "%ntid.x": np.uint32(threads),
            "%laneid": self.lanes % WARP, "global_smem": np.uint32(0),
            **{f"%ctaid.{axis}": np.uint32(at) for axis, at in zip("xyz", self.place, strict=True)},
        }  # fmt: skip

    def run(self) -> None:
        """To its end.

        Raises:
            EmulationError: see the module.
        """
        instructions, end = self.code.instructions, len(self.code.instructions)
        if self.traffic is not None:
            self.traffic.programs += 1
        # Where each thread is; one number while they are together, as nearly always.
        at: int = 0
        apart: Array | None = None
        with np.errstate(all="ignore"):
            while at < end:
                instruction = instructions[at]
                if self.traffic is not None:
                    self.traffic.instructions[instruction.name] += 1
                here = self.all if apart is None else apart == at
                try:
                    active = self._active(instruction, here)
                    if instruction.name in ("bra", "ret"):
                        target = end if instruction.name == "ret" else self.code.labels[instruction.operands[0]]
                        if apart is None and active.all():
                            at = target
                            continue
                        if active.any():
                            apart = np.full(len(here), at) if apart is None else apart
                            apart[here] = at + 1
                            apart[active] = target
                            at, apart = self._next(apart)
                            continue
                    elif active.any():
                        self._execute(instruction, active)
                except EmulationError as error:
                    raise EmulationError(f"{error}: {instruction.text}") from None
                except Exception as error:
                    raise EmulationError(f"{type(error).__name__}: {error}: {instruction.text}") from error
                if apart is None:
                    at += 1
                    continue
                apart[here] += 1
                at, apart = self._next(apart)

    def _execute(self, instruction: Instruction, active: Array) -> None:
        if unknown := set(instruction.modifiers) - _MODIFIERS:
            raise EmulationError(f".{unknown.pop()} is not known")
        if function := _ELEMENTWISE.get(instruction.name):
            self._each(instruction, active, function)
        elif handler := getattr(self, f"_{instruction.name}", None):
            handler(instruction, active)
        else:
            raise EmulationError("not known")

    def _next(self, apart: Array) -> tuple[int, Array | None]:
        """Which of the threads that parted go on, and where; those behind do, so that they meet where ways join."""
        places = np.unique(apart).tolist()
        if len(places) == 1:
            return places[0], None
        for at in places:
            # What all do together waits for all.
            if at < len(self.code.instructions) and self.code.instructions[at].name not in _TOGETHER:
                return at, apart
        return places[0], apart

    def _active(self, instruction: Instruction, here: Array) -> Array:
        if instruction.guard is None:
            return here
        name, wanted = instruction.guard
        return np.asarray(here & (self.registers[name] == wanted))

    # Operands

    def get(self, operand: Any, kind: str) -> Array:
        """An operand's value in each thread, (threads,), as a type of PTX; of bfloat16 as float32."""
        if isinstance(operand, Literal):
            wanted = np.dtype(_KINDS[kind])
            if operand.is_float:
                raw: Any = np.uint32(operand.value).view(np.float32)
            elif wanted.kind == "f":
                raw = np.array(operand.value, f"u{wanted.itemsize}").view(wanted)[()]
            else:
                raw = np.array(operand.value % 2 ** (8 * wanted.itemsize), f"u{wanted.itemsize}").view(wanted)[()]
            value: Array = np.broadcast_to(raw, (len(self.lanes),))
            return _widened(value) if kind == "bf16" else value
        if operand in self.registers:
            if self.results[operand]:
                raise EmulationError(f"{operand} is the result of a product that was not waited for")
            value = self.registers[operand]
        elif operand in self.special:
            value = np.broadcast_to(self.special[operand], (len(self.lanes),))
        else:
            raise EmulationError(f"{operand} has no value")
        wanted = np.dtype(_KINDS[kind])
        if value.dtype != wanted:
            if value.dtype.itemsize > wanted.itemsize:
                value = value.astype(f"u{wanted.itemsize}")
            value = value.view(wanted)
        return _widened(value) if kind == "bf16" else value

    def put(self, register: str, value: Any, active: Array) -> None:
        """Write a register where threads are active; wider registers are filled with zeros, or the sign."""
        if register == "_":
            return
        if self.results[register] or self.sources[register]:
            raise EmulationError(f"{register} belongs to a product that was not waited for")
        bits = self.code.bits[register[1:].rstrip("0123456789")]
        wanted = np.dtype(_UNSIGNED[bits])
        value = np.broadcast_to(np.asarray(value), (len(self.lanes),))
        if bits > 1 and value.dtype.itemsize != wanted.itemsize:
            value = value.astype(f"{'i' if value.dtype.kind == 'i' else 'u'}{wanted.itemsize}")
        value = value.view(wanted) if bits > 1 else value.astype(bool)
        if active is not self.all:
            before = self.registers.get(register)
            value = np.where(active, value, before if before is not None else np.zeros_like(value))
        # No register shares memory with another.
        self.registers[register] = np.array(value)

    # Arithmetic

    def _each(self, instruction: Instruction, active: Array, function: Callable[..., Any]) -> None:
        """A function of all sources, in the instruction's own type."""
        kind = instruction.modifiers[-1]
        target, *sources = instruction.operands
        if kind in ("f16x2", "bf16x2"):
            single = kind.removesuffix("x2")
            pairs = [_pair(self.get(source, "b32"), single) for source in sources]
            found = np.stack([np.asarray(function(*each)) for each in zip(*pairs, strict=True)], axis=-1)
            self.put(target, _joined(found, single), active)
            return
        found = function(*(self.get(source, kind) for source in sources))
        self.put(target, _to_bfloat16(found) if kind == "bf16" else np.asarray(found, _KINDS[kind]), active)

    def _min(self, instruction: Instruction, active: Array) -> None:
        self._each(instruction, active, np.minimum if "NaN" in instruction.modifiers else np.fmin)

    def _max(self, instruction: Instruction, active: Array) -> None:
        self._each(instruction, active, np.maximum if "NaN" in instruction.modifiers else np.fmax)

    def _mul(self, instruction: Instruction, active: Array) -> None:
        self._product(instruction, active)

    def _mad(self, instruction: Instruction, active: Array) -> None:
        self._product(instruction, active)

    def _product(self, instruction: Instruction, active: Array) -> None:
        kind = instruction.modifiers[-1]
        if kind[0] in "fb":
            self._each(instruction, active, operator.mul)
            return
        target, a, b, *added = instruction.operands
        bits = int(kind[1:])
        wide = f"{kind[0]}{2 * bits}"
        if "lo" in instruction.modifiers:
            product, result = self.get(a, kind) * self.get(b, kind), kind
        elif bits == 64:
            raise EmulationError("not known")
        else:
            product, result = self.get(a, kind).astype(_KINDS[wide]) * self.get(b, kind).astype(_KINDS[wide]), wide
            if "hi" in instruction.modifiers:
                product, result = (product >> bits).astype(_KINDS[kind]), kind
        self.put(target, product + self.get(added[0], result) if added else product, active)

    def _shl(self, instruction: Instruction, active: Array) -> None:
        self._shift(instruction, active, operator.lshift)

    def _shr(self, instruction: Instruction, active: Array) -> None:
        self._shift(instruction, active, operator.rshift)

    def _shift(self, instruction: Instruction, active: Array, function: Callable[..., Any]) -> None:
        kind = instruction.modifiers[-1]
        target, source, by = instruction.operands
        value, places = self.get(source, kind), self.get(by, "u32")
        last = 8 * value.dtype.itemsize - 1
        shifted = function(value, np.minimum(places, last).astype(value.dtype))
        if value.dtype.kind == "u":
            shifted = np.where(places > last, value.dtype.type(0), shifted)
        self.put(target, shifted, active)

    def _bfe(self, instruction: Instruction, active: Array) -> None:
        kind = instruction.modifiers[-1]
        target, source, first, length = instruction.operands
        value, at, bits = self.get(source, kind), self.get(first, "u32"), self.get(length, "u32")
        if value.dtype.itemsize != 4 or (at + bits).max() > 32 or bits.min() < 1:
            raise EmulationError("not known")
        up = (32 - at - bits).astype(value.dtype)
        self.put(target, (value << up) >> (32 - bits).astype(value.dtype), active)

    def _prmt(self, instruction: Instruction, active: Array) -> None:
        target, a, b, selected = instruction.operands
        both = np.stack([self.get(a, "u32"), self.get(b, "u32")], axis=1).view(np.uint8)
        chosen = self.get(selected, "u32")
        if (chosen & 0x8888).any():
            raise EmulationError("not known")
        places = np.stack([(chosen >> (4 * byte)) & 7 for byte in range(4)], axis=1).astype(np.int64)
        self.put(target, np.take_along_axis(both, places, axis=1).view(np.uint32)[:, 0], active)

    def _mov(self, instruction: Instruction, active: Array) -> None:
        target, source = instruction.operands
        kind = instruction.modifiers[-1]
        if isinstance(source, tuple):
            part = f"b{int(kind[1:]) // len(source)}"
            parts = np.stack([self.get(each, part) for each in source], axis=1)
            self.put(target, parts.view(_KINDS[kind])[:, 0], active)
        elif isinstance(target, tuple):
            parts = np.ascontiguousarray(self.get(source, kind)).view(_KINDS[f"b{int(kind[1:]) // len(target)}"])
            for register, column in zip(target, parts.reshape(len(self.lanes), -1).T, strict=True):
                self.put(register, column, active)
        else:
            self.put(target, self.get(source, kind), active)

    def _cvta(self, instruction: Instruction, active: Array) -> None:
        self.put(instruction.operands[0], self.get(instruction.operands[1], instruction.modifiers[-1]), active)

    def _cvt(self, instruction: Instruction, active: Array) -> None:
        *how, to, kind = instruction.modifiers
        target, *sources = instruction.operands
        if to in ("f16x2", "bf16x2"):
            # The first source is the upper half.
            values = np.stack([self.get(source, kind) for source in reversed(sources)], axis=-1)
            self.put(target, _joined(values, to.removesuffix("x2")), active)
            return
        value = self.get(sources[0], kind)
        if to == "bf16":
            found = _to_bfloat16(value)
        elif np.dtype(_KINDS[to]).kind != "f" and value.dtype.kind == "f":
            if "rzi" not in how:
                raise EmulationError("not known")
            found = np.trunc(value).astype(_KINDS[to])
        else:
            found = value.astype(_KINDS[to])
        self.put(target, found, active)

    def _setp(self, instruction: Instruction, active: Array) -> None:
        compared, *combined, kind = instruction.modifiers
        target, a, b, *third = instruction.operands
        left, right = self.get(a, kind), self.get(b, kind)
        name = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(compared, compared)
        if left.dtype.kind == "f" and len(name) == 3 and name.endswith("u"):
            found = getattr(operator, name[:2])(left, right) | np.isnan(left) | np.isnan(right)
        elif name in ("nan", "num"):
            found = (np.isnan(left) | np.isnan(right)) == (name == "nan")
        else:
            found = getattr(operator, name)(left, right)
            if left.dtype.kind == "f" and name == "ne":
                found &= ~(np.isnan(left) | np.isnan(right))
        if third:
            found = getattr(operator, {"and": "and_", "or": "or_", "xor": "xor"}[combined[0]])(
                found, self.get(third[0], "pred")
            )
        self.put(target, found, active)

    def _selp(self, instruction: Instruction, active: Array) -> None:
        target, a, b, chosen = instruction.operands
        kind = instruction.modifiers[-1]
        self.put(target, np.where(self.get(chosen, "pred"), self.get(a, kind), self.get(b, kind)), active)

    # Memory

    def _addresses(self, address: Address, space: str) -> Array:
        return self.get(address.base, "u64" if space == "global" else "u32").astype(np.int64) + address.offset

    def _transfer(self, instruction: Instruction, address: Address, active: Array) -> tuple[str, str, int, Array]:
        """Space, kind, elements a thread, and the active threads' addresses."""
        kind = instruction.modifiers[-1]
        space = "global" if "global" in instruction.modifiers else "shared"
        if not any(each.split(":")[0] == space for each in instruction.modifiers):
            raise EmulationError("neither global nor shared")
        count = next((int(each[1:]) for each in instruction.modifiers if each in ("v2", "v4")), 1)
        addresses = self._addresses(address, space)[active]
        size = count * np.dtype(_KINDS[kind]).itemsize
        if (addresses % size).any():
            raise EmulationError("a misaligned address")
        if space == "global" and self.traffic is not None:
            self.traffic.cached_bytes += size * len(addresses)
        return space, kind, count, addresses

    def _ld(self, instruction: Instruction, active: Array) -> None:
        target, address = instruction.operands
        if instruction.modifiers[0] == "param":
            self.put(target, np.array(self.arguments[address.base] % 2**64, np.uint64), active)
            return
        space, kind, count, addresses = self._transfer(instruction, address, active)
        item = np.dtype(_KINDS[kind])
        if space == "global":
            loaded = self.memory.load(addresses, count * item.itemsize)
        else:
            loaded = self.shared.load(addresses, count * item.itemsize, self.warps[active])
        values = np.zeros((len(self.lanes), count), item)
        values[active] = loaded.view(item)
        for register, column in zip(target if isinstance(target, tuple) else (target,), values.T, strict=True):
            self.put(register, column, active)

    def _st(self, instruction: Instruction, active: Array) -> None:
        address, source = instruction.operands
        space, kind, _, addresses = self._transfer(instruction, address, active)
        sources = source if isinstance(source, tuple) else (source,)
        values = np.stack([self.get(each, kind.replace("f", "b"))[active] for each in sources], axis=1)
        written = values.view(np.uint8).reshape(len(values), -1)
        if space == "global":
            self.memory.store(addresses, written)
        else:
            self.shared.store(addresses, written, self.warps[active])

    def _atom(self, instruction: Instruction, active: Array) -> None:
        if "global" not in instruction.modifiers or "add" not in instruction.modifiers:
            raise EmulationError("not known")
        target, address, source = instruction.operands
        kind = instruction.modifiers[-1]
        addresses, added = self._addresses(address, "global"), self.get(source, kind)
        before = np.zeros(len(self.lanes), _KINDS[kind])
        for lane in np.flatnonzero(active):
            at = addresses[lane : lane + 1]
            before[lane] = self.memory.load(at, before.itemsize).view(before.dtype)[0, 0]
            self.memory.store(at, (before[lane : lane + 1] + added[lane]).view(np.uint8)[None])
        self.put(target, before, active)

    def _cp(self, instruction: Instruction, active: Array) -> None:
        if instruction.modifiers[:2] == ("async", "commit_group"):
            self.groups.append(self.copies)
            self.copies = []
        elif instruction.modifiers[:2] in (("async", "wait_group"), ("async", "wait_all")):
            left = instruction.operands[0].value if instruction.operands else 0
            while len(self.groups) > left:
                for addresses, values, warps in self.groups.pop(0):
                    self.shared.finish_copy(addresses, values, warps)
        else:
            to, source, size, *real = instruction.operands
            addresses = self._addresses(to, "shared")[active]
            sources = self._addresses(source, "global")[active]
            if (addresses % size.value).any() or (sources % size.value).any():
                raise EmulationError("a misaligned address")
            values = np.zeros((len(addresses), size.value), np.uint8)
            wanted = self.get(real[0], "u32")[active] if real else np.full(len(addresses), size.value)
            for count in set(wanted.tolist()) - {0}:
                chosen = wanted == count
                values[chosen, :count] = self.memory.load(sources[chosen], count)
            self.shared.begin_copy(addresses, values, self.warps[active])
            self.copies.append((addresses, values, self.warps[active]))

    def _bar(self, instruction: Instruction, active: Array) -> None:
        if instruction.modifiers[0] == "warp":
            return
        if not active.all() or instruction.operands != (Literal(0),):
            raise EmulationError("a barrier that is not for all")
        self.shared.meet()

    def _barrier(self, instruction: Instruction, active: Array) -> None:
        self._bar(instruction, active)

    def _fence(self, instruction: Instruction, active: Array) -> None:
        """Threads in lockstep see each other's writes in order."""

    def _griddepcontrol(self, instruction: Instruction, active: Array) -> None:
        """Launches do not overlap."""

    # Within warps

    def _shfl(self, instruction: Instruction, active: Array) -> None:
        how = instruction.modifiers[1]
        target, source, by, *_ = instruction.operands
        target = target.split("|")[0]
        lanes = np.arange(len(self.lanes))
        places = self.get(by, "u32").astype(np.int64)
        if how == "bfly":
            other = lanes ^ places
        elif how == "idx":
            other = lanes // WARP * WARP + places % WARP
        else:
            raise EmulationError("not known")
        self.put(target, self.get(source, "b32")[other], active)

    def _elect(self, instruction: Instruction, active: Array) -> None:
        self.put(instruction.operands[0].split("|")[1], self.lanes % WARP == 0, active)

    def _matrices(self, instruction: Instruction, address: Address) -> tuple[int, Array]:
        """How many matrices of 8 x 8, and the addresses of their rows, (warps, matrices, 8)."""
        count = next(int(each[1:]) for each in instruction.modifiers if each in ("x1", "x2", "x4"))
        rows = self._addresses(address, "shared").reshape(-1, WARP)[:, : 8 * count].reshape(-1, count, 8)
        if (rows % 16).any():
            raise EmulationError("a misaligned address")
        return count, rows

    def _ldmatrix(self, instruction: Instruction, active: Array) -> None:
        target, address = instruction.operands
        count, rows = self._matrices(instruction, address)
        warps = np.repeat(np.arange(len(rows)), count * 8)
        loaded = self.shared.load(rows.ravel(), 16, warps).view(np.uint16).reshape(-1, count, 8, 8)
        if "trans" in instruction.modifiers:
            loaded = loaded.transpose(0, 1, 3, 2)
        for index, register in enumerate(target if isinstance(target, tuple) else (target,)):
            pairs = np.stack([loaded[:, index, _ROW, _PAIR + half] for half in range(2)], axis=-1)
            self.put(register, pairs.view(np.uint32).ravel(), active)

    def _stmatrix(self, instruction: Instruction, active: Array) -> None:
        address, source = instruction.operands
        count, rows = self._matrices(instruction, address)
        values = np.zeros((len(rows), count, 8, 8), np.uint16)
        for index, register in enumerate(source if isinstance(source, tuple) else (source,)):
            pairs = np.ascontiguousarray(self.get(register, "b32")).view(np.uint16).reshape(-1, WARP, 2)
            for half in range(2):
                values[:, index, _ROW, _PAIR + half] = pairs[:, :, half]
        if "trans" in instruction.modifiers:
            values = np.ascontiguousarray(values.transpose(0, 1, 3, 2))
        warps = np.repeat(np.arange(len(rows)), count * 8)
        self.shared.store(rows.ravel(), values.view(np.uint8).reshape(-1, 16), warps)

    def _mma(self, instruction: Instruction, active: Array) -> None:
        shape, left, right, kind = (instruction.modifiers[index] for index in (2, 3, 4, 6))
        if (shape, left, right) != ("m16n8k16", "row", "col") or instruction.modifiers[5] != "f32":
            raise EmulationError("not known")
        d, a, b, c = instruction.operands
        product = _fragment_a([self.get(each, "b32") for each in a], kind) @ _fragment_b(
            [self.get(each, "b32") for each in b], kind
        )
        for index, (register, added) in enumerate(zip(d, c, strict=True)):
            values = product[:, _ROW + 8 * (index // 2), _PAIR + index % 2].ravel()
            self.put(register, values + self.get(added, "f32"), active)

    def _wgmma(self, instruction: Instruction, active: Array) -> None:
        if instruction.modifiers[0] == "commit_group":
            self.product_groups.append(self.products)
            self.products = []
        elif instruction.modifiers[0] == "wait_group":
            while len(self.product_groups) > instruction.operands[0].value:
                for results, sources, places in self.product_groups.pop(0):
                    self.results.subtract(results)
                    self.sources.subtract(sources)
                    for where in places:
                        self.shared.reading[where] -= 1
        elif instruction.modifiers[0] == "mma_async":
            self._product_of_groups(instruction, active)
        elif instruction.modifiers[0] != "fence":
            raise EmulationError("not known")

    def _product_of_groups(self, instruction: Instruction, active: Array) -> None:
        """Computed at once; that it is not yet to be had, and still reads, is noted until it is waited for."""
        shape, to, kind = (instruction.modifiers[index] for index in (3, 4, 5))
        match = re.fullmatch(r"m64n(\d+)k16", shape)
        d, a, b, scale, *signs = instruction.operands
        # Of registers only B may be transposed.
        transposed = [bool(each.value) for each in signs[2:]]
        if match is None or to != "f32" or any(sign.value != 1 for sign in signs[:2]):
            raise EmulationError("not known")
        # One product may follow another into the same registers.
        held = {name: self.results.pop(name, 0) for name in d}
        places: list[Array] = []
        width = int(match[1])
        groups = len(self.lanes) // (4 * WARP)
        if isinstance(a, tuple):
            left = _fragment_a([self.get(each, "b32") for each in a], kind).reshape(groups, 64, 16)
        else:
            left = self._described(a, 64, kind, transposed[0], places)
        right = self._described(b, width, kind, transposed[-1], places)
        product = left @ right.transpose(0, 2, 1)
        keep = self.get(scale, "pred") if isinstance(scale, str) else np.full(len(self.lanes), bool(scale.value))
        thread = np.arange(4 * WARP)
        row, column = thread // WARP * 16 + thread % WARP // 4, thread % 4 * 2
        for index, register in enumerate(d):
            values = product[:, row + 8 * (index // 2 % 2), column + 8 * (index // 4) + index % 2].ravel()
            before = self.get(register, "f32") if keep.any() else np.float32(0)
            self.put(register, np.where(keep, values + before, values), active)
        for where in places:
            self.shared.reading[where] += 1
        self.products.append((set(d), set(a) if isinstance(a, tuple) else set(), places))
        self.results.update(held)
        self.results.update(set(d))
        self.sources.update(self.products[-1][1])

    def _described(self, operand: str, rows: int, kind: str, major_rows: bool, places: list[Array]) -> Array:
        """Each warp group's matrix, (groups, rows, 16), in float32; where it lies is added to `places`."""
        descriptors = self.get(operand, "u64").reshape(-1, 4 * WARP)
        if (descriptors != descriptors[:, :1]).any():
            raise EmulationError("threads of a warp group name different matrices")
        matrices = []
        for descriptor in descriptors[:, 0].tolist():
            addresses = described(descriptor, rows, 16, major_rows)
            # Four warps read as one: what any of them wrote needs a barrier.
            warps = np.full(addresses.size, SEVERAL)
            places.append(np.unique(addresses.ravel()[:, None] + np.arange(2)))
            loaded = self.shared.load(addresses.ravel(), 2, warps).view(np.uint16).reshape(addresses.shape)
            matrices.append(_widened(loaded) if kind == "bf16" else loaded.view(np.float16).astype(np.float32))
        return np.stack(matrices)


def _pair(register: Array, kind: str) -> tuple[Array, Array]:
    pairs = np.ascontiguousarray(register).view(np.uint16).reshape(-1, 2)
    lower, upper = np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])
    if kind == "bf16":
        return _widened(lower), _widened(upper)
    return lower.view(np.float16), upper.view(np.float16)


def _joined(values: Array, kind: str) -> Array:
    """(threads, 2) numbers as one register of two halves."""
    halves = _to_bfloat16(values) if kind == "bf16" else values.astype(np.float16).view(np.uint16)
    return np.ascontiguousarray(halves).view(np.uint32)[:, 0]


# -- In Triton's place -----------------------------------------------------------------------------------------------


_TRAFFIC: ContextVar[Traffic | None] = ContextVar("_TRAFFIC", default=None)


@functools.lru_cache(maxsize=64)
def _code(hash_: str, name: str) -> Code:
    group = get_cache_manager(hash_).get_group(f"{name[:150]}.json")
    assert group is not None
    return parse(Path(next(path for file, path in group.items() if file.endswith(".ptx"))).read_text())


class _Launcher:
    """Launches one compiled kernel, as the driver's own would."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.code = _code(metadata.hash, source.name)
        self.shared_bytes = metadata.shared
        self.at_run_time = [kind != "constexpr" for kind in source.signature.values()]

    def __call__(self, grid_x: int, grid_y: int, grid_z: int, *rest: Any) -> None:
        # Stream, function, metadata twice, two hooks; then the call's own arguments.
        given = [each for each, wanted in zip(rest[6:], self.at_run_time, strict=True) if wanted]
        traffic = _TRAFFIC.get()
        memory = GlobalMemory([each for each in given if isinstance(each, Tensor)], traffic)
        values = [each.data_ptr() if isinstance(each, Tensor) else int(each) for each in given]
        # Behind them come two pointers to scratch that these kernels do not use.
        arguments = dict(zip(self.code.params, [*values, 0, 0], strict=True))
        # Which program comes first is nobody's promise.
        order = list(np.ndindex(grid_z, grid_y, grid_x))
        random.Random(0).shuffle(order)
        for place in order:
            Program(self.code, arguments, memory, self.shared_bytes, place[::-1], traffic).run()


class _Driver:
    """A GPU of a compute capability, as far as Triton asks after it."""

    launcher_cls = _Launcher

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": LIMITS[capability].shared_bytes},
            load_binary=lambda name, binary, shared, device: (object(), 0, 0, 0, 1024),
        )

    def get_current_device(self) -> int:
        # Triton keeps what it compiled by device.
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, WARP)


@contextmanager
def emulated(capability: int, traffic: Traffic | None = None) -> Iterator[None]:
    """Within it, Triton's kernels are compiled for a compute capability such as 90 and run on CPU tensors.

    Args:
        traffic: where to count what they do.

    Raises:
        ValueError: the capability is not one that the cost model knows.
        RuntimeError: Triton's interpreter, which cannot share a process with its compiler, has the kernels.
    """
    if capability not in LIMITS:
        raise ValueError(f"capability={capability} is none of {', '.join(map(str, LIMITS))}")
    if INTERPRETED:
        raise RuntimeError("the kernels are interpreted: unset TRITON_INTERPRET")
    driver: Any = triton.runtime.driver
    before, token, traffic_token = driver._active, EMULATED.set(True), _TRAFFIC.set(traffic)
    driver.set_active(_Driver(capability))
    try:
        yield
    finally:
        driver._active = before
        EMULATED.reset(token)
        _TRAFFIC.reset(traffic_token)


def rehearse(problem: BlockProblem, tiling: Tiling, capability: int, traffic: Traffic | None = None) -> float:
    """Run a block's compiled kernel on a few of its pixels: with 32-bit offsets, and at most one tile of 128 rows.

    Returns:
        The root mean square of its error against float64, over that of the output.

    Raises:
        EmulationError: it does what hardware would not allow, or should not.
    """
    few = replace(problem, batch=min(problem.batch, 2), height=min(problem.height, 5), width=min(problem.width, 7))
    assert tiling.fits(few)
    rng = torch.Generator().manual_seed(0)
    dtype = getattr(torch, problem.dtype)

    def draw(*shape: int, fan_in: int = 1) -> Tensor:
        return (torch.randn(shape, generator=rng) / sqrt(fan_in)).to(dtype)

    into, hidden, out, taps = few.in_channels, few.hidden_channels, few.out_channels, few.kernel_size
    layers = [
        draw(into, few.group_width, taps, taps, fan_in=few.group_width * taps**2), draw(into),
        draw(hidden, into, 1, 1, fan_in=into), draw(hidden), draw(out, hidden, 1, 1, fan_in=hidden), draw(out),
    ]  # fmt: skip
    x = draw(few.batch, into, few.height, few.width).contiguous(memory_format=torch.channels_last)
    weights = convfirst.pack(layers, few)
    deterministic = torch.are_deterministic_algorithms_enabled()
    # New memory is NaN then: what the kernel forgets to write fails every comparison.
    torch.use_deterministic_algorithms(True)
    try:
        with emulated(capability, traffic):
            scratch = torch.empty(tiling.partial_bytes(few) // 4)
            found = convfirst.launch(x, weights, few, tiling, scratch).double()
    finally:
        torch.use_deterministic_algorithms(deterministic)
    exact = convfirst.layer_by_layer(x.double(), [layer.double() for layer in layers], few)
    return float((found - exact).norm() / exact.norm())
