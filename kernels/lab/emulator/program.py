"""One program of a launch, which executes instruction after instruction for all its threads at once."""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partialmethod
from typing import Any

import numpy as np

from kernels.lab.emulator.memory import SEVERAL, WARP, Array, GlobalMemory, SharedMemory, Traffic
from kernels.lab.emulator.ptx import Address, Code, EmulationError, Instruction, Literal
from kernels.lab.emulator.values import (
    ELEMENTWISE,
    KINDS,
    MODIFIERS,
    PAIR,
    ROW,
    TOGETHER,
    UNSIGNED,
    described,
    fragment_a,
    fragment_b,
    joined,
    parted,
    to_bfloat16,
    widened,
)  # fmt: skip


@dataclass
class Program:
    """One program of a launch.

    Args:
        code: the kernel.
        arguments: the launch's arguments, by the parameter's name.
        memory: the launch's tensors.
        shared_bytes: size of the program's shared memory.
        place: the program's index along the axes of the grid.
        traffic: counts, to which those of the program are added.
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
        # Products of warp groups in flight, as the registers and places that they use, and the same by group.
        self.products: list[tuple[set[str], set[str], list[Array]]] = []
        self.product_groups: list[list[tuple[set[str], set[str], list[Array]]]] = []
        self.results: Counter[str] = Counter()
        self.sources: Counter[str] = Counter()
        # Copies in flight: those of the group being made, and those of the committed groups.
        self.copies: list[tuple[Array, Array, Array]] = []
        self.groups: list[list[tuple[Array, Array, Array]]] = []
        self.special: dict[str, Any] = {
            "%tid.x": self.lanes, "%tid.y": np.uint32(0), "%tid.z": np.uint32(0), "%ntid.x": np.uint32(threads),
            "%laneid": self.lanes % WARP, "global_smem": np.uint32(0),
            **{f"%ctaid.{axis}": np.uint32(at) for axis, at in zip("xyz", self.place, strict=True)},
        }  # fmt: skip

    def run(self) -> None:
        """Run the program to its end.

        Raises:
            EmulationError: it does something wrong (see `kernels.lab.emulator`).
        """
        instructions, end = self.code.instructions, len(self.code.instructions)
        if self.traffic is not None:
            self.traffic.programs += 1
        # The next instruction of each thread; a single number while threads are together, as they nearly always are.
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
        if unknown := set(instruction.modifiers) - MODIFIERS:
            raise EmulationError(f".{unknown.pop()} is not known")
        if function := ELEMENTWISE.get(instruction.name):
            self._each(instruction, active, function)
        elif handler := getattr(self, f"_{instruction.name}", None):
            handler(instruction, active)
        else:
            raise EmulationError("not known")

    def _next(self, apart: Array) -> tuple[int, Array | None]:
        """Choose the threads that go on after a branch: those furthest behind, so that all meet where branches join."""
        places = np.unique(apart).tolist()
        if len(places) == 1:
            return places[0], None
        for at in places:
            # An instruction for all threads waits for all of them.
            if at < len(self.code.instructions) and self.code.instructions[at].name not in TOGETHER:
                return at, apart
        return places[0], apart

    def _active(self, instruction: Instruction, here: Array) -> Array:
        if instruction.guard is None:
            return here
        name, wanted = instruction.guard
        return np.asarray(here & (self.registers[name] == wanted))

    # Operands

    def get(self, operand: Any, kind: str) -> Array:
        """An operand's value in each thread, (threads,), as a PTX type; bfloat16 becomes float32."""
        if isinstance(operand, Literal):
            wanted = np.dtype(KINDS[kind])
            if operand.is_float:
                raw: Any = np.uint32(operand.value).view(np.float32)
            elif wanted.kind == "f":
                raw = np.array(operand.value, f"u{wanted.itemsize}").view(wanted)[()]
            else:
                raw = np.array(operand.value % 2 ** (8 * wanted.itemsize), f"u{wanted.itemsize}").view(wanted)[()]
            value: Array = np.broadcast_to(raw, (len(self.lanes),))
            return widened(value) if kind == "bf16" else value
        if operand in self.registers:
            if self.results[operand]:
                raise EmulationError(f"{operand} is the result of a product that was not waited for")
            value = self.registers[operand]
        elif operand in self.special:
            value = np.broadcast_to(self.special[operand], (len(self.lanes),))
        else:
            raise EmulationError(f"{operand} has no value")
        wanted = np.dtype(KINDS[kind])
        if value.dtype != wanted:
            if value.dtype.itemsize > wanted.itemsize:
                value = value.astype(f"u{wanted.itemsize}")
            value = value.view(wanted)
        return widened(value) if kind == "bf16" else value

    def put(self, register: str, value: Any, active: Array) -> None:
        """Write a register in the active threads; a wider register is filled with zeros, or with the sign."""
        if register == "_":
            return
        if self.results[register] or self.sources[register]:
            raise EmulationError(f"{register} belongs to a product that was not waited for")
        bits = self.code.bits[register[1:].rstrip("0123456789")]
        wanted = np.dtype(UNSIGNED[bits])
        value = np.broadcast_to(np.asarray(value), (len(self.lanes),))
        if bits > 1 and value.dtype.itemsize != wanted.itemsize:
            value = value.astype(f"{'i' if value.dtype.kind == 'i' else 'u'}{wanted.itemsize}")
        value = value.view(wanted) if bits > 1 else value.astype(bool)
        if active is not self.all:
            before = self.registers.get(register)
            # An unset value may be anything; all ones are NaN in a product, and as an address far outside of memory.
            value = np.where(active, value, before if before is not None else ~np.zeros_like(value))
        # No register shares memory with another.
        self.registers[register] = np.array(value)

    # Arithmetic

    def _each(self, instruction: Instruction, active: Array, function: Callable[..., Any]) -> None:
        """Apply a function to all sources, in the instruction's own type."""
        kind = instruction.modifiers[-1]
        target, *sources = instruction.operands
        if kind in ("f16x2", "bf16x2"):
            single = kind.removesuffix("x2")
            pairs = [parted(self.get(source, "b32"), single) for source in sources]
            result = np.stack([np.asarray(function(*each)) for each in zip(*pairs, strict=True)], axis=-1)
            self.put(target, joined(result, single), active)
            return
        result = function(*(self.get(source, kind) for source in sources))
        self.put(target, to_bfloat16(result) if kind == "bf16" else np.asarray(result, KINDS[kind]), active)

    def _min(self, instruction: Instruction, active: Array) -> None:
        self._each(instruction, active, np.minimum if "NaN" in instruction.modifiers else np.fmin)

    def _max(self, instruction: Instruction, active: Array) -> None:
        self._each(instruction, active, np.maximum if "NaN" in instruction.modifiers else np.fmax)

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
            product, result = self.get(a, kind).astype(KINDS[wide]) * self.get(b, kind).astype(KINDS[wide]), wide
            if "hi" in instruction.modifiers:
                product, result = (product >> bits).astype(KINDS[kind]), kind
        self.put(target, product + self.get(added[0], result) if added else product, active)

    _mul = _mad = _product

    def _shift(self, instruction: Instruction, active: Array, function: Callable[..., Any]) -> None:
        kind = instruction.modifiers[-1]
        target, source, by = instruction.operands
        value, places = self.get(source, kind), self.get(by, "u32")
        last = 8 * value.dtype.itemsize - 1
        shifted = function(value, np.minimum(places, last).astype(value.dtype))
        if value.dtype.kind == "u":
            shifted = np.where(places > last, value.dtype.type(0), shifted)
        self.put(target, shifted, active)

    _shl = partialmethod(_shift, function=operator.lshift)
    _shr = partialmethod(_shift, function=operator.rshift)

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
            self.put(target, parts.view(KINDS[kind])[:, 0], active)
        elif isinstance(target, tuple):
            parts = np.ascontiguousarray(self.get(source, kind)).view(KINDS[f"b{int(kind[1:]) // len(target)}"])
            for register, column in zip(target, parts.reshape(len(self.lanes), -1).T, strict=True):
                self.put(register, column, active)
        else:
            self.put(target, self.get(source, kind), active)

    def _cvt(self, instruction: Instruction, active: Array) -> None:
        *how, to, kind = instruction.modifiers
        target, *sources = instruction.operands
        if to in ("f16x2", "bf16x2"):
            # The first source is the upper half.
            values = np.stack([self.get(source, kind) for source in reversed(sources)], axis=-1)
            self.put(target, joined(values, to.removesuffix("x2")), active)
            return
        value = self.get(sources[0], kind)
        if to == "bf16":
            result = to_bfloat16(value)
        elif np.dtype(KINDS[to]).kind != "f" and value.dtype.kind == "f":
            if "rzi" not in how:
                raise EmulationError("not known")
            result = np.trunc(value).astype(KINDS[to])
        else:
            result = value.astype(KINDS[to])
        self.put(target, result, active)

    def _setp(self, instruction: Instruction, active: Array) -> None:
        compared, *combined, kind = instruction.modifiers
        target, a, b, *third = instruction.operands
        left, right = self.get(a, kind), self.get(b, kind)
        name = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(compared, compared)
        if left.dtype.kind == "f" and len(name) == 3 and name.endswith("u"):
            result = getattr(operator, name[:2])(left, right) | np.isnan(left) | np.isnan(right)
        elif name in ("nan", "num"):
            result = (np.isnan(left) | np.isnan(right)) == (name == "nan")
        else:
            result = getattr(operator, name)(left, right)
            if left.dtype.kind == "f" and name == "ne":
                result &= ~(np.isnan(left) | np.isnan(right))
        if third:
            result = getattr(operator, {"and": "and_", "or": "or_", "xor": "xor"}[combined[0]])(
                result, self.get(third[0], "pred")
            )
        self.put(target, result, active)

    def _selp(self, instruction: Instruction, active: Array) -> None:
        target, a, b, chosen = instruction.operands
        kind = instruction.modifiers[-1]
        self.put(target, np.where(self.get(chosen, "pred"), self.get(a, kind), self.get(b, kind)), active)

    # Memory

    def _addresses(self, address: Address, space: str) -> Array:
        return self.get(address.base, "u64" if space == "global" else "u32").astype(np.int64) + address.offset

    def _transfer(self, instruction: Instruction, address: Address, active: Array) -> tuple[str, str, int, Array]:
        """Space, type, elements per thread, and the active threads' addresses."""
        kind = instruction.modifiers[-1]
        space = "global" if "global" in instruction.modifiers else "shared"
        if not any(each.split(":")[0] == space for each in instruction.modifiers):
            raise EmulationError("neither global nor shared")
        count = next((int(each[1:]) for each in instruction.modifiers if each in ("v2", "v4")), 1)
        addresses = self._addresses(address, space)[active]
        size = count * np.dtype(KINDS[kind]).itemsize
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
        item = np.dtype(KINDS[kind])
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
        before = np.zeros(len(self.lanes), KINDS[kind])
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

    def _fence(self, instruction: Instruction, active: Array) -> None:
        """Do nothing, as threads in lockstep see each other's writes in order."""

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

    def _matrices(self, instruction: Instruction, address: Address) -> tuple[int, Array]:
        """Number of 8 x 8 matrices, and the addresses of their rows, (warps, matrices, 8)."""
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
            pairs = np.stack([loaded[:, index, ROW, PAIR + half] for half in range(2)], axis=-1)
            self.put(register, pairs.view(np.uint32).ravel(), active)

    def _stmatrix(self, instruction: Instruction, active: Array) -> None:
        address, source = instruction.operands
        count, rows = self._matrices(instruction, address)
        values = np.zeros((len(rows), count, 8, 8), np.uint16)
        for index, register in enumerate(source if isinstance(source, tuple) else (source,)):
            pairs = np.ascontiguousarray(self.get(register, "b32")).view(np.uint16).reshape(-1, WARP, 2)
            for half in range(2):
                values[:, index, ROW, PAIR + half] = pairs[:, :, half]
        if "trans" in instruction.modifiers:
            values = np.ascontiguousarray(values.transpose(0, 1, 3, 2))
        warps = np.repeat(np.arange(len(rows)), count * 8)
        self.shared.store(rows.ravel(), values.view(np.uint8).reshape(-1, 16), warps)

    def _mma(self, instruction: Instruction, active: Array) -> None:
        shape, left, right, kind = (instruction.modifiers[index] for index in (2, 3, 4, 6))
        if (shape, left, right) != ("m16n8k16", "row", "col") or instruction.modifiers[5] != "f32":
            raise EmulationError("not known")
        d, a, b, c = instruction.operands
        product = fragment_a([self.get(each, "b32") for each in a], kind) @ fragment_b(
            [self.get(each, "b32") for each in b], kind
        )
        for index, (register, added) in enumerate(zip(d, c, strict=True)):
            values = product[:, ROW + 8 * (index // 2), PAIR + index % 2].ravel()
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
        """Compute a product at once; until a wait, note that its result is not ready and its operands are in use."""
        shape, to, kind = (instruction.modifiers[index] for index in (3, 4, 5))
        match = re.fullmatch(r"m64n(\d+)k16", shape)
        d, a, b, scale, *signs = instruction.operands
        # If A is in registers, only B may be transposed.
        transposed = [bool(each.value) for each in signs[2:]]
        if match is None or to != "f32" or any(sign.value != 1 for sign in signs[:2]):
            raise EmulationError("not known")
        # One product may follow another into the same registers.
        held = {name: self.results.pop(name, 0) for name in d}
        places: list[Array] = []
        width = int(match[1])
        groups = len(self.lanes) // (4 * WARP)
        if isinstance(a, tuple):
            left = fragment_a([self.get(each, "b32") for each in a], kind).reshape(groups, 64, 16)
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
        """Each warp group's matrix, (groups, rows, 16), in float32; its bytes' places are added to `places`."""
        descriptors = self.get(operand, "u64").reshape(-1, 4 * WARP)
        if (descriptors != descriptors[:, :1]).any():
            raise EmulationError("threads of a warp group name different matrices")
        matrices = []
        for descriptor in descriptors[:, 0].tolist():
            addresses = described(descriptor, rows, 16, major_rows)
            # Four warps read together: whatever any of them wrote needs a barrier.
            warps = np.full(addresses.size, SEVERAL)
            places.append(np.unique(addresses.ravel()[:, None] + np.arange(2)))
            loaded = self.shared.load(addresses.ravel(), 2, warps).view(np.uint16).reshape(addresses.shape)
            matrices.append(widened(loaded) if kind == "bf16" else loaded.view(np.float16).astype(np.float32))
        return np.stack(matrices)
