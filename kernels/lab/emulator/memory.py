"""The memory of a program's threads, watched and counted: the launch's tensors, and shared memory of its own."""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from kernels.lab.emulator.ptx import EmulationError

WARP = 32
Array = np.ndarray[Any, Any]


@dataclass
class Traffic:
    """Counts of what launches did, summed over their programs; unlike time, an emulator can tell them.

    Args:
        programs: number of programs that ran.
        instructions: number of the programs' instructions, by name without modifiers.
        shared_wavefronts: number of accesses to shared memory as the hardware makes them, at most 128 bytes each;
            several where threads need different words of one bank.
        shared_least: number of these accesses if no two words shared a bank.
        global_bytes: bytes that threads loaded and stored, copies into shared memory included.
        global_sectors: number of sectors of 32 bytes that these accesses touched.
        cached_bytes: the part of `global_bytes` that goes through the first-level cache, by plain loads and stores.
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
        """Bytes through shared memory and first-level cache, which share one path of 128 bytes per clock."""
        return 128 * self.shared_wavefronts + self.cached_bytes

    def count_shared(self, addresses: Array, size: int, warps: Array) -> None:
        """Count one instruction's accesses of `size` bytes per thread, (n,) each: 128 bytes of a warp at a time."""
        together = {8: 16, 16: 8}.get(size, WARP)
        rank = np.arange(len(warps)) - np.searchsorted(warps, warps)
        phase = warps.astype(np.int64) * WARP + rank // together
        words = (addresses.astype(np.int64)[:, None] + np.arange(0, max(size, 4), 4)) // 4
        distinct = np.unique((phase[:, None] << 32) + words)
        _, phases = np.unique(distinct >> 32, return_inverse=True)
        banks = np.bincount(phases * WARP + distinct % WARP, minlength=WARP * (phases[-1] + 1)).reshape(-1, WARP)
        self.shared_wavefronts += int(banks.max(axis=1).sum())
        self.shared_least += int((-(-np.bincount(phases) // WARP)).sum())

    def count_global(self, addresses: Array, size: int) -> None:
        """Count one instruction's accesses of `size` bytes per thread, (n,)."""
        self.global_bytes += size * len(addresses)
        for begin in range(0, len(addresses), WARP):
            first = addresses[begin : begin + WARP].astype(np.int64)
            self.global_sectors += len(np.unique((first[:, None] + np.arange(0, size, min(size, 4))) // 32))


class GlobalMemory:
    """Global memory that holds the tensors of a launch at their addresses, and nothing else."""

    def __init__(self, tensors: Sequence[Tensor], traffic: Traffic | None = None) -> None:
        self.traffic = traffic
        held = {(tensor.data_ptr(), _extent_bytes(tensor)) for tensor in tensors if tensor.numel()}
        self.ranges = sorted(held)
        self.starts = [start for start, _ in self.ranges]
        self.bytes = [_memory(start, size) for start, size in self.ranges]

    def _where(self, addresses: Array, size: int) -> tuple[Array, Array]:
        """A tensor's bytes, and the offsets of the accesses in it: an instruction accesses a single tensor."""
        if self.traffic is not None:
            self.traffic.count_global(addresses, size)
        index = bisect_right(self.starts, int(addresses[0])) - 1
        if index >= 0:
            start, length = self.ranges[index]
            offsets = addresses.astype(np.int64) - start
            if offsets.min() >= 0 and offsets.max() + size <= length:
                return self.bytes[index], offsets
        raise EmulationError(f"{size} bytes at {addresses.min():#x} to {addresses.max():#x} are outside the tensors")

    def load(self, addresses: Array, size: int) -> Array:
        """Load from (n,) addresses (n, size) bytes."""
        held, offsets = self._where(addresses, size)
        return held[offsets[:, None] + np.arange(size)]

    def store(self, addresses: Array, values: Array) -> None:
        """Store (n, size) bytes at (n,) addresses."""
        held, offsets = self._where(addresses, values.shape[1])
        held[offsets[:, None] + np.arange(values.shape[1])] = values


def _extent_bytes(tensor: Tensor) -> int:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _memory(start: int, size: int) -> Array:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(start))


NOBODY, SEVERAL = -1, -2


class SharedMemory:
    """A program's shared memory, which remembers who wrote and read each byte since the last barrier."""

    def __init__(self, size: int, traffic: Traffic | None = None) -> None:
        self.traffic = traffic
        self.bytes = np.zeros(size, np.uint8)
        self.written = np.zeros(size, bool)
        self.pending = np.zeros(size, bool)
        # Number of warp groups' products in flight that read a byte.
        self.reading = np.zeros(size, np.int16)
        self.writer = np.full(size, NOBODY, np.int16)
        self.reader = np.full(size, NOBODY, np.int16)

    def meet(self) -> None:
        """Pass a barrier: all threads see what was done before."""
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
            # A warp group's product reads a whole matrix, in a layout without bank conflicts.
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
        # If several read a place at once, only the last was noted.
        self.reader[where[self.reader[where] != warps[:, None]]] = SEVERAL
        return self.bytes[where]

    def store(self, addresses: Array, values: Array, warps: Array) -> None:
        where = self._ours(addresses, values, warps)
        self._write(where, values, warps)

    def begin_copy(self, addresses: Array, values: Array, warps: Array) -> None:
        """Begin an asynchronous copy; until it is finished, nobody may read or write there."""
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
        # Several warps may write the same value, as they do if a tensor is smaller than a program.
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
