"""Triton's own CUDA driver and launchers, on a library of ours in place of `libcuda.so.1`."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import triton
from triton import knobs
from triton.backends.nvidia import driver as nvidia

from kernels.cache import cache_folder
from kernels.cost_model import GPU_SPECS
from kernels.device_functions import EMULATED, INTERPRETED

SOURCE = Path(__file__).with_name("driver.c")
LIBRARY = "libcuda.so.1"
# Triton keeps compiled kernels by device, and the emulator's devices have the numbers of their capabilities.
FIRST_ORDINAL = 1000
# Names the file of faults to child processes.
FAULTS = "CONVFIRST_STUB_FAULTS"

# What a launch may be made to do, by the names of CUDA's errors.
RESULTS: Mapping[str, int] = MappingProxyType({
    "hang": -1, "abort": -2, "out of memory": 2, "illegal address": 700, "out of resources": 701, "timeout": 702,
    "misaligned address": 716, "launch failure": 719,
})  # fmt: skip


class NoCompiler(RuntimeError):
    """There is no C compiler, or it does not compile the stub driver."""


# -- Structs of driver.c -----------------------------------------------------------------------------------------------

MAX_PARAMS, PARAM_BYTES, MAX_ATTRIBUTES, KEPT, NAME = 64, 1024, 4, 1024, 128


class _Device(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int) for name in ("ordinal", "capability", "shared_bytes", "registers", "multiprocessors")
    )


class _Function(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char * NAME),
        *((name, ctypes.c_int) for name in ("registers", "local_bytes", "required_threads", "dynamic_limit", "params")),
        ("offset", ctypes.c_int * MAX_PARAMS), ("size", ctypes.c_int * MAX_PARAMS), ("next", ctypes.c_void_p),
    )  # fmt: skip


class _Launch(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.POINTER(_Function)),
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint), ("attributes", ctypes.c_uint),
        ("attribute_id", ctypes.c_uint * MAX_ATTRIBUTES), ("attribute_value", ctypes.c_uint64 * MAX_ATTRIBUTES),
        ("stream", ctypes.c_uint64), ("bytes", ctypes.c_ubyte * PARAM_BYTES),
    )  # fmt: skip


class _Fault(ctypes.Structure):
    _fields_ = (
        ("result", ctypes.c_int32), ("left", ctypes.c_int32), ("passes", ctypes.c_int32), ("failed", ctypes.c_int32),
        ("kernel", ctypes.c_char * NAME),
    )  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A launch as the driver got it.

    Args:
        kernel: the kernel's name.
        grid: number of programs along each axis.
        threads: threads of a program.
        shared_bytes: dynamic shared memory of a program.
        arguments: values of all of the kernel's parameters, as unsigned integers; the last two are Triton's pointers to
            scratch of its own.
        sizes: bytes of each parameter, as the machine code declares them.
        stream: the stream's address.
        attributes: the launch's attributes, each a number of CUlaunchAttributeID and the first 8 bytes of its value.
    """

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    arguments: tuple[int, ...]
    sizes: tuple[int, ...]
    stream: int = 0
    attributes: tuple[tuple[int, int], ...] = ()


# -- The library -------------------------------------------------------------------------------------------------------


def build_library() -> Path:
    """Compile the library, or find it in the cache folder, where its folder has a name by content and compiler.

    Raises:
        NoCompiler: there is no C compiler, or it does not compile the library.
    """
    # As Triton looks for a compiler for its launchers.
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise NoCompiler("there is no C compiler: neither gcc nor clang, and CC names none")
    include = Path(nvidia.__file__).parent / "include"
    command = [compiler, "-O2", "-shared", "-fPIC", "-fvisibility=hidden", f"-Wl,-soname,{LIBRARY}", f"-I{include}"]
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join(command).encode()).hexdigest()[:24]
    library = cache_folder() / "stub" / key / LIBRARY
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        part = library.with_suffix(f".{os.getpid()}")
        try:
            subprocess.run([*command, str(SOURCE), "-o", str(part)], check=True, capture_output=True, text=True)
        except OSError as error:
            raise NoCompiler(f"CC={compiler} does not run: {error}") from error
        except subprocess.CalledProcessError as error:
            raise NoCompiler(f"{compiler} does not compile {SOURCE.name}: {error.stderr.strip()}") from error
        os.replace(part, library)
    return library


@functools.cache
def _load() -> tuple[Any, Path]:
    """The library and its folder; from now on whoever in this process looks for CUDA's driver finds it."""
    with suppress(OSError):
        ctypes.CDLL(LIBRARY, mode=os.RTLD_NOLOAD)
        raise RuntimeError(f"{LIBRARY} is loaded: the stub driver needs a process in which nothing has asked for CUDA")
    library = build_library()
    loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    loaded.stub_count.restype = ctypes.c_uint64
    loaded.stub_launch.argtypes = [ctypes.c_uint64, ctypes.POINTER(_Launch)]
    loaded.stub_share_faults.argtypes = [ctypes.c_char_p]
    return loaded, library.parent


# -- Faults ------------------------------------------------------------------------------------------------------------


class Faults:
    """What launches are made to do, in a file that processes share; `shared_faults` makes one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fail(self, kernel: str = "", result: str = "illegal address", times: int = -1, after: int = 0) -> None:
        """Let launches fail from now on, in all processes that share this; replaces what was to fail before.

        After an "illegal address", "misaligned address", "timeout" or "launch failure" all that a process asks of its
        driver fails, as with CUDA, until it ends or heals. Unlike CUDA, which reports them at a later call, the launch
        itself fails.

        Args:
            kernel: name of the kernel that fails (default: every kernel).
            result: what a launch does: "hang" and never return, "abort" the process, or fail with one of CUDA's errors:
                see `RESULTS`.
            times: number of launches that fail (default: all).
            after: number of the kernel's launches that succeed before.

        Raises:
            ValueError: there is no such result.
        """
        if result not in RESULTS:
            raise ValueError(f"result={result!r} is none of {', '.join(RESULTS)}")
        self._write(_Fault(RESULTS[result], times, after, 0, kernel.encode()))

    def heal(self) -> None:
        """Let no more launches fail. A process in which one did stays as it is."""
        self._write(_Fault())

    @property
    def failed(self) -> int:
        """Number of launches that failed since the last `fail`, in all processes."""
        return int(_Fault.from_buffer_copy(self.path.read_bytes()).failed)

    def _write(self, fault: _Fault) -> None:
        # In place, as processes have mapped the file.
        with self.path.open("r+b") as file:
            file.write(bytes(fault))


@contextmanager
def shared_faults() -> Iterator[Faults]:
    """Context with the faults of the parent process, or else with new ones; child processes inherit them.

    This loads no driver: a process may use it to let launches of its child processes fail.
    """
    if FAULTS in os.environ:
        yield Faults(Path(os.environ[FAULTS]))
        return
    handle, name = tempfile.mkstemp(prefix="convfirst-faults-")
    with os.fdopen(handle, "wb") as file:
        file.write(bytes(_Fault()))
    os.environ[FAULTS] = name
    try:
        yield Faults(Path(name))
    finally:
        del os.environ[FAULTS]
        os.unlink(name)


# -- The driver --------------------------------------------------------------------------------------------------------


class StubDriver(nvidia.CudaDriver):  # type: ignore[misc]
    """Triton's driver for CUDA, on a GPU that is not there. `stub_driver` makes it and makes it Triton's own.

    Attributes:
        capability: compute capability, such as 90.
        faults: what launches are made to do.
    """

    def __init__(self, library: Any, capability: int, faults: Faults) -> None:
        self._library, self.faults = library, faults
        self._cleared = self.total
        self.capability = capability
        self.ordinal = FIRST_ORDINAL + capability
        gpu = GPU_SPECS[capability]
        library.stub_set_device(
            ctypes.byref(_Device(self.ordinal, capability, gpu.shared_bytes, gpu.registers, gpu.multiprocessors))
        )
        super().__init__()
        # These ask torch for the current device, which knows of none here.
        self.get_current_device = lambda: self.ordinal
        self.set_current_device = lambda device: None
        self.get_current_stream = lambda device: 0
        self.get_device_capability = lambda device: divmod(capability, 10)

    @property
    def total(self) -> int:
        """Number of all launches of this process with the stub."""
        return int(self._library.stub_count())

    @property
    def count(self) -> int:
        """Number of launches since the driver was made, or `clear` called."""
        return self.total - self._cleared

    @property
    def launches(self) -> list[Launch]:
        """The launches since the driver was made, or `clear` called, in order.

        Raises:
            RuntimeError: there were more than the driver keeps.
        """
        return self.launches_from(self._cleared)

    def launches_from(self, first: int) -> list[Launch]:
        """All launches but the `first` ones of `total`."""
        record, launches = _Launch(), []
        for index in range(first, self.total):
            if not self._library.stub_launch(index, ctypes.byref(record)):
                raise RuntimeError(f"there were more than {KEPT} launches, which are all that is kept: clear() earlier")
            launches.append(_read(record))
        return launches

    def clear(self) -> None:
        """Forget the launches so far."""
        self._cleared = self.total

    def heal(self) -> None:
        """Let no more launches fail, and forget in this process that one did."""
        self.faults.heal()
        self._library.stub_recover()


def _read(record: _Launch) -> Launch:
    function, content = record.function.contents, bytes(record.bytes)
    offsets, sizes = (tuple(values[: function.params]) for values in (function.offset, function.size))
    grid_x, grid_y, grid_z = record.grid
    return Launch(
        function.name.decode(), (grid_x, grid_y, grid_z), record.block[0] * record.block[1] * record.block[2],
        record.shared_bytes,
        tuple(
            int.from_bytes(content[at : at + size], "little") for at, size in zip(offsets, sizes, strict=True)
        ),
        sizes, record.stream,
        tuple(zip(record.attribute_id[: record.attributes], record.attribute_value, strict=False)),
    )  # fmt: skip


@contextmanager
def stub_driver(capability: int = 90) -> Iterator[StubDriver]:
    """Context in which Triton compiles for a compute capability such as 90, and launches with the stub driver.

    Kernels take CPU tensors, and do not run. A child process that enters this context, too, shares the faults.

    Raises:
        ValueError: the cost model does not know the capability.
        NoCompiler: there is no C compiler, which Triton needs for its launchers as well.
        RuntimeError: the kernels run under Triton's interpreter, or the process has loaded CUDA's true driver.
    """
    if capability not in GPU_SPECS:
        raise ValueError(f"capability={capability} is none of {', '.join(map(str, GPU_SPECS))}")
    if INTERPRETED:
        raise RuntimeError("the kernels are interpreted: unset TRITON_INTERPRET")
    library, folder = _load()
    with shared_faults() as faults, knobs.nvidia.scope():
        if not library.stub_share_faults(os.fsencode(faults.path)):
            raise RuntimeError(f"{FAULTS}={faults.path} cannot be mapped")
        knobs.nvidia.libcuda_path = str(folder)
        nvidia.libcuda_dirs.cache_clear()
        nvidia.library_dirs.cache_clear()
        active: Any = triton.runtime.driver
        before, token = active._active, EMULATED.set(True)
        driver = StubDriver(library, capability, faults)
        active.set_active(driver)
        try:
            yield driver
        finally:
            active._active = before
            EMULATED.reset(token)
            nvidia.libcuda_dirs.cache_clear()
            nvidia.library_dirs.cache_clear()
