"""A lock on each device: on one machine, no process trains on a device while another measures latencies there.

Many processes may train at once; a process that measures is alone. The locks are `flock`s on two files for each device.
The files are in the machine's temporary folder, which all users share, or in the folder that the environment variable
CONVFIRST_LOCKS names; processes that do not share the folder (containers, jobs with a TMPDIR of their own) do not see
each other. A lock ends with its process, however that ends.

The first file is a turnstile: a process holds it while it waits for the second, which is the lock itself, and so keeps
newcomers out. Thus neither a stream of trainings nor one of measurements can starve the other kind.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

FOLDER_VARIABLE = "CONVFIRST_LOCKS"

# The message for the user while this process waits.
WAITING = "waiting for another process that measures or trains on this device"

# What this process does on each device, or waits to do.
_held: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class DeviceLock:
    """The lock of one device; `device_lock` makes it.

    Where there can be no lock (the folder is missing or not writable, or its file system has no locks), a warning says
    so once and the body runs without a lock.

    Args:
        name: the device's name, which is the same in all processes, such as "cpu" or a GPU's UUID.
    """

    name: str

    def measuring(self, on_wait: Callable[[], None] | None = None) -> AbstractContextManager[None]:
        """Be alone on the device while the body runs: no process trains, and no other measures.

        Args:
            on_wait: function that is called once if the lock is not free at once.

        Raises:
            RuntimeError: this process has the device's lock already, on entering, and would wait for itself.
        """
        return self._hold("measuring", fcntl.LOCK_EX, on_wait)

    def training(self, on_wait: Callable[[], None] | None = None) -> AbstractContextManager[None]:
        """Train on the device while the body runs: no process measures, others may train too.

        The arguments and exceptions are those of `measuring`.
        """
        # A second training in this process could wait at the turnstile for a measurement that waits for the first.
        return self._hold("training", fcntl.LOCK_SH, on_wait)

    @contextmanager
    def _hold(self, kind: str, operation: int, on_wait: Callable[[], None] | None) -> Iterator[None]:
        if self.name in _held:
            raise RuntimeError(f"{kind} on {self.name} would wait for ever: this process is {_held[self.name]} on it")

        def wait() -> None:
            nonlocal on_wait
            if on_wait is not None:
                on_wait()
            on_wait = None

        with ExitStack() as stack:
            _held[self.name] = kind
            stack.callback(_held.pop, self.name)
            try:
                with _locked(f"convfirst-{self.name}.turnstile", fcntl.LOCK_EX, wait):
                    stack.enter_context(_locked(f"convfirst-{self.name}.lock", operation, wait))
            except _NoLock as error:
                _warn(f"{error}: what others train and measure on {self.name} may overlap with what this process does")
            yield


def device_lock(device: torch.device) -> DeviceLock:
    """The lock of a device. A GPU's index depends on CUDA_VISIBLE_DEVICES, its UUID does not."""
    if device.type != "cuda":
        return DeviceLock(device.type)
    import torch

    return DeviceLock(str(torch.cuda.get_device_properties(device).uuid))


@contextmanager
def training_on(devices: Iterable[torch.device], on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Train on several devices while the body runs; see `DeviceLock.training`."""
    with ExitStack() as stack:
        # In one order in all processes, so that none waits for another in a circle.
        for lock in sorted({device_lock(device) for device in devices}, key=lambda lock: lock.name):
            stack.enter_context(lock.training(on_wait))
        yield


class _NoLock(Exception):
    """There can be no locks here; the message is the reason. It is no OSError, as a caller's code may raise these."""


@contextmanager
def _locked(file_name: str, operation: int, wait: Callable[[], None]) -> Iterator[None]:
    """Hold a file's lock while the body runs; `wait` is called first if another process holds it.

    Raises:
        _NoLock: there can be no lock here.
    """
    try:
        path = Path(os.environ.get(FOLDER_VARIABLE) or tempfile.gettempdir()) / file_name
        file = _open(path)
    except OSError as error:
        raise _NoLock(f"no device lock ({error})") from error
    try:
        if not _flock(file, operation | fcntl.LOCK_NB):
            wait()
            _flock(file, operation)
        try:
            yield
        finally:
            # To close the file is not enough: a child process that was forked meanwhile has it open too.
            _flock(file, fcntl.LOCK_UN)
    finally:
        os.close(file)


def _flock(file: int, operation: int) -> bool:
    """Take or release a file's lock; False if LOCK_NB is given and another process has it.

    Raises:
        _NoLock: the file system has no locks.
    """
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        raise _NoLock(f"no device lock (flock: {error})") from error
    return True


def _open(path: Path) -> int:
    """Open a file for reading, and create it first if there is none.

    flock needs no more than reading, so the file may belong to another user.
    """
    # In a sticky folder Linux (fs.protected_regular) refuses O_CREAT on another user's file, hence never both at once.
    try:
        return os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        pass
    try:
        file = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        # Another process was faster.
        return os.open(path, os.O_RDONLY)
    # All users can read it, whatever the umask; where the file system has no modes, the lock is as good.
    with suppress(OSError):
        os.fchmod(file, 0o644)
    return file


@cache
def _warn(message: str) -> None:
    """Warn once in a process: the lock is used twice for each candidate."""
    warnings.warn(message, stacklevel=2)
