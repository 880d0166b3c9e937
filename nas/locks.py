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
import hashlib
import os
import re
import shlex
import tempfile
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from nas.reporting import Note

if TYPE_CHECKING:
    import torch

FOLDER_VARIABLE = "CONVFIRST_LOCKS"

# Seconds after which a waiting process is told again.
AGAIN_SECONDS = 60.0
# Processes that a line names before it only counts.
NAMED = 2
# Letters of a command line that are shown.
MOST_LETTERS = 80

# What this process does on each device, or waits to do.
_held: dict[str, str] = {}
# Seconds that this process has waited for others.
_waited = 0.0


def waited_seconds() -> float:
    """The time in seconds that this process has waited for others so far."""
    return _waited


def working_clock() -> float:
    """A clock in seconds that stands still while this process waits for others."""
    return time.perf_counter() - _waited


@dataclass(frozen=True, slots=True)
class DeviceLock:
    """The lock of one device; `device_lock` makes it.

    Where there can be no lock (the folder is missing or not writable, or its file system has no locks), a warning says
    so once and the body runs without a lock.

    Args:
        name: the device's name, which is the same in all processes, such as "cpu" or a GPU's UUID.
    """

    name: str

    def measuring(self, on_wait: Note | None = None) -> AbstractContextManager[None]:
        """Be alone on the device while the body runs: no process trains, and no other measures.

        Args:
            on_wait: function that is called if the lock is not free at once, and again every minute, with a line that
                says whom this process waits for. All calls but the first come from another thread.

        Raises:
            RuntimeError: this process has the device's lock already, on entering, and would wait for itself.
        """
        return self._hold("measuring", fcntl.LOCK_EX, on_wait)

    def training(self, on_wait: Note | None = None) -> AbstractContextManager[None]:
        """Train on the device while the body runs: no process measures, others may train too.

        The arguments and exceptions are those of `measuring`.
        """
        # A second training in this process could wait at the turnstile for a measurement that waits for the first.
        return self._hold("training", fcntl.LOCK_SH, on_wait)

    @contextmanager
    def _hold(self, kind: str, operation: int, on_wait: Note | None) -> Iterator[None]:
        if self.name in _held:
            raise RuntimeError(f"{kind} on {self.name} would wait for ever: this process is {_held[self.name]} on it")
        lock = f"convfirst-{self.name}.lock"
        waiting = _Waiting(lock, on_wait)
        with ExitStack() as stack:
            _held[self.name] = kind
            stack.callback(_held.pop, self.name)
            try:
                with _locked(f"convfirst-{self.name}.turnstile", fcntl.LOCK_EX, waiting):
                    stack.enter_context(_locked(lock, operation, waiting))
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
def training_on(devices: Iterable[torch.device], on_wait: Note | None = None) -> Iterator[None]:
    """Train on several devices while the body runs; see `DeviceLock.training`."""
    with ExitStack() as stack:
        # In one order in all processes, so that none waits for another in a circle.
        for lock in sorted({device_lock(device) for device in devices}, key=lambda lock: lock.name):
            stack.enter_context(lock.training(on_wait))
        yield


@contextmanager
def only_one(what: str) -> Iterator[bool]:
    """Context of which there is one at a time on this machine; its value is False in any other.

    Args:
        what: what is done within.
    """
    digest = hashlib.sha256(os.fsencode(what)).hexdigest()[:16]
    try:
        file = _open(_folder() / f"convfirst-{digest}.lock")
    except OSError:
        # There can be no lock here.
        yield True
        return
    try:
        try:
            alone = _flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except _NoLock:
            alone = True
        yield alone
    finally:
        os.close(file)


class _NoLock(Exception):
    """There can be no locks here; the message is the reason. It is no OSError, as a caller's code may raise these."""


class _Waiting:
    """Tells a user whom this process waits for, at once and every minute, and counts the time.

    Args:
        lock: name of the file that those hold who are waited for.
        tell: function that takes a line.
    """

    def __init__(self, lock: str, tell: Note | None) -> None:
        self.lock, self.tell = lock, tell
        self.begin: float | None = None

    @contextmanager
    def while_(self) -> Iterator[None]:
        """Context in which this process waits."""
        global _waited
        began = time.monotonic()
        if self.begin is None:
            self.begin = began
            if self.tell is not None:
                self.tell(f"waiting for {holders(self.lock)}")
        ended = threading.Event()
        teller = threading.Thread(target=self._tell_again, args=(ended,), daemon=True)
        teller.start()
        try:
            yield
        finally:
            ended.set()
            teller.join()
            _waited += time.monotonic() - began

    def _tell_again(self, ended: threading.Event) -> None:
        while not ended.wait(AGAIN_SECONDS):
            if self.tell is not None and self.begin is not None:
                minutes = (time.monotonic() - self.begin) / 60
                # Whatever goes wrong with the line, the wait goes on.
                with suppress(Exception):
                    self.tell(f"still waiting, for {minutes:.0f} min now, for {holders(self.lock)}")


def holders(lock: str) -> str:
    """The processes that hold a lock, in words: what they do, since when, and by which command.

    Args:
        lock: name of the lock's file.
    """
    unknown = "another process that measures or trains on this device"
    try:
        found = _holders(_folder() / lock)
    except (OSError, ValueError, LookupError):
        # There is no such list on this system.
        return unknown
    words = [_process(number, kind) for number, kind in found]
    more = f" and {len(words) - NAMED} more" if len(words) > NAMED else ""
    return " and ".join(words[:NAMED]) + more if words else unknown


def _holders(path: Path) -> list[tuple[int, str]]:
    """Number of each process that holds a file's lock, and what it does.

    Linux lists all locks, each as `1: FLOCK ADVISORY WRITE 123 00:2d:4711 0 EOF`, with process, device and inode.
    """
    status = path.stat()
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    found = []
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        # After an arrow stand those that wait.
        if words[1] == "FLOCK" and words[5] == device and int(words[4]) != os.getpid():
            found.append((int(words[4]), "measures" if words[3] == "WRITE" else "trains"))
    return sorted(set(found))


def _process(number: int, kind: str) -> str:
    import psutil

    try:
        process = psutil.Process(number)
        # A database's password is nobody else's.
        command = re.sub(r"://([^:/@\s]*):[^@\s]+@", r"://\1:***@", shlex.join(process.cmdline()))
        since = datetime.fromtimestamp(process.create_time()).strftime("%H:%M")
    except psutil.Error:
        # It is another user's, or has just ended.
        return f"process {number}, which {kind} on this device"
    shown = command if len(command) <= MOST_LETTERS else f"{command[:MOST_LETTERS]}..."
    return f"process {number}, which {kind} on this device (begun at {since}: {shown})"


def _folder() -> Path:
    return Path(os.environ.get(FOLDER_VARIABLE) or tempfile.gettempdir())


@contextmanager
def _locked(file_name: str, operation: int, waiting: _Waiting) -> Iterator[None]:
    """Hold a file's lock while the body runs.

    Raises:
        _NoLock: there can be no lock here.
    """
    try:
        file = _open(_folder() / file_name)
    except OSError as error:
        raise _NoLock(f"no device lock ({error})") from error
    try:
        if not _flock(file, operation | fcntl.LOCK_NB):
            with waiting.while_():
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
