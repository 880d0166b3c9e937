"""PTX's types and functions in NumPy, and the layouts of a matrix product's elements."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kernels.lab.emulator.memory import WARP, Array
from kernels.lab.emulator.ptx import EmulationError

KINDS: dict[str, Any] = {
    "pred": np.bool_, "f16": np.float16, "f32": np.float32, "f64": np.float64, "bf16": np.uint16,
    **{f"{letter}{bits}": np.dtype(f"u{bits // 8}") for letter in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    "f16x2": np.uint32, "bf16x2": np.uint32,
}  # fmt: skip
UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


def widened(bits: Array) -> Array:
    """Convert bfloat16's bits to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: Array) -> Array:
    """Round float32 to bfloat16's bits, to nearest, ties to even."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def _rounded_to_bits(values: Array, bits: int) -> Array:
    """Round float32 to a mantissa of this many bits."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.round(mantissa * 2.0**bits) / 2.0**bits, exponent).astype(np.float32)


# Row and first column of each lane's elements in the 8x8 quarters of the matrices of a warp's product m16n8k16.
LANE = np.arange(WARP)
ROW, PAIR = LANE // 4, LANE % 4 * 2


def fragment_a(registers: Sequence[Array], kind: str) -> Array:
    """The first operand of m16n8k16, (warps, 16, 16), from its four registers."""
    halves = [_halves(register, kind) for register in registers]
    matrix = np.zeros((len(halves[0]), 16, 16), np.float32)
    for index, pair in enumerate(halves):
        row = ROW + 8 * (index % 2)
        for half in range(2):
            matrix[:, row, PAIR + half + 8 * (index // 2)] = pair[:, :, half]
    return matrix


def fragment_b(registers: Sequence[Array], kind: str) -> Array:
    """The second operand of m16n8k16, (warps, 16, 8), from its two registers."""
    halves = [_halves(register, kind) for register in registers]
    matrix = np.zeros((len(halves[0]), 16, 8), np.float32)
    for index, pair in enumerate(halves):
        for half in range(2):
            matrix[:, PAIR + half + 8 * index, ROW] = pair[:, :, half]
    return matrix


def _halves(register: Array, kind: str) -> Array:
    """The two 16-bit numbers of a register, (warps, lanes, 2)."""
    pairs = np.ascontiguousarray(register).view(np.uint16).reshape(-1, WARP, 2)
    return widened(pairs) if kind == "bf16" else pairs.view(np.float16).astype(np.float32)


def described(descriptor: int, rows: int, depth: int, major_rows: bool) -> Array:
    """Decode a wgmma descriptor into the shared addresses, (rows, depth), of a 16-bit matrix.

    The layouts are those of the PTX ISA's section on wgmma's shared memory, as CUTLASS writes them down in
    `cute/arch/mma_sm90_desc.hpp`.

    Args:
        major_rows: whether rows, rather than depth, are the contiguous dimension.
    """
    start, leading, stride = (((descriptor >> shift) & 0x3FFF) << 4 for shift in (0, 16, 32))
    if (descriptor >> 49) & 7:
        raise EmulationError("a matrix descriptor with a base offset")
    swizzle_bits = {0: 0, 1: 3, 2: 2, 3: 1}[descriptor >> 62]
    # The 16 bytes that stay together are 8 elements of 16 bits.
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
    # Division is towards zero, not down; by zero the result may be anything.
    return np.asarray(np.sign(a) * np.sign(b) * (np.abs(a) // np.maximum(np.abs(b), 1)), a.dtype)


def _remainder(a: Array, b: Array) -> Array:
    return np.asarray(np.sign(a) * (np.abs(a) % np.maximum(np.abs(b), 1)), a.dtype)


# Instructions that apply one function to their sources, in their own type.
ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "neg": operator.neg, "abs": np.abs, "div": _divided, "rem": _remainder,
    "and": operator.and_, "or": operator.or_, "xor": operator.xor, "not": operator.invert,
    "ex2": np.exp2, "rcp": np.reciprocal,
    # As inexact as the hardware's, whose relative error is 2^-11 at most.
    "tanh": lambda x: _rounded_to_bits(np.tanh(x), 11),
    # The product of two float32 is exact in float64.
    "fma": lambda a, b, c: (a.astype(np.float64) * b + c).astype(a.dtype),
}  # fmt: skip
# Modifiers that are obeyed, or that make no difference here; products check theirs one by one.
MODIFIERS = {
    *KINDS, "rn", "rzi", "approx", "full", "ftz", "NaN", "lo", "hi", "wide", "uni", "sync", "aligned",
    "eq", "ne", "lt", "le", "gt", "ge", "ls", "hs", "equ", "neu", "ltu", "leu", "gtu", "geu", "nan", "num",
    "global", "shared", "shared:cta", "param", "v2", "v4", "cg", "ca", "relaxed", "acq_rel", "gpu", "cta",
    "async", "commit_group", "wait_group", "wait_all", "proxy", "fence", "mma_async", "warp", "bfly", "idx",
    "m8n8", "x1", "x2", "x4", "trans", "m16n8k16", "row", "col", "and", "or", "xor", "add",
    *(f"m64n{width}k16" for width in range(8, 257, 8)),
}  # fmt: skip
# Instructions that all threads of a warp, or of a program, execute together.
TOGETHER = {"bar", "ldmatrix", "mma", "shfl", "stmatrix", "wgmma"}


def parted(register: Array, kind: str) -> tuple[Array, Array]:
    """Split each thread's register into its two numbers, (threads,) each, the lower half first."""
    pairs = np.ascontiguousarray(register).view(np.uint16).reshape(-1, 2)
    lower, upper = np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])
    if kind == "bf16":
        return widened(lower), widened(upper)
    return lower.view(np.float16), upper.view(np.float16)


def joined(values: Array, kind: str) -> Array:
    """Join (threads, 2) numbers into a register of two halves."""
    halves = to_bfloat16(values) if kind == "bf16" else values.astype(np.float16).view(np.uint16)
    return np.ascontiguousarray(halves).view(np.uint32)[:, 0]
