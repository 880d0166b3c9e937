"""Records of launches that are under way, by which a tiling that broke its process is known afterwards.

A kernel that reads outside its tensors ends the use of the GPU for its process; one that never returns, or a driver
that aborts, ends the process itself. Before a tiling is launched for the first time a record of it is written and
locked, and when the launch has ended the record is taken away. What remains and is locked by no living process is
therefore what was running when a process died. Such tilings are not launched again on this machine, for as long as the
kernels' sources stay the same.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch

from kernels.cache import cache_folder

# Names the records of this process, if whoever started it wants to take them away afterwards (`forgive`).
TOKEN = "CONVFIRST_ATTEMPTS"

# Words of errors after which a CUDA context is of no more use; those of libraries have no class of their own.
CUDA_FAULTS = (
    "CUDA error", "Triton Error [CUDA]", "CUBLAS_STATUS", "CUDNN_STATUS", "cuDNN error", "CUFFT", "device-side assert",
)  # fmt: skip

# Words of errors that say that memory ran out, which is nobody's fault.
FULL = ("out of memory", "ALLOC_FAILED")

_numbers = itertools.count()
# Process ids come again: in a container, each time it starts.
_own_token = uuid.uuid4().hex


def is_cuda_fault(error: BaseException) -> bool:
    """Whether CUDA reported an error after which its context is of no more use."""
    return isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in CUDA_FAULTS)
    )


def _is_fault(error: BaseException) -> bool:
    return is_cuda_fault(error) and not any(words in str(error) for words in FULL)


def folder() -> Path:
    """The folder of the records."""
    return cache_folder() / "attempts"


class Attempts:
    """The records of one problem.

    Args:
        key: what the records belong to: kernel, problem, machine and sources, as the name of a file.
        tiling: the class of the tilings.
    """

    def __init__(self, key: str, tiling: type) -> None:
        self.key, self.tiling = key, tiling

    @contextlib.contextmanager
    def of(self, tilings: Sequence[Any], alone: bool = True) -> Iterator[None]:
        """Context of launches, of which a record remains if CUDA faults or this process dies.

        Where nothing can be written, there is no record.

        Args:
            alone: whether the one tiling is to blame; otherwise each of them has to be tried alone.
        """
        with contextlib.ExitStack() as stack:
            try:
                record = stack.enter_context(self._record(tilings, alone))
            except OSError:
                record = None
            try:
                yield
            except BaseException as error:
                if record is not None and not _is_fault(error):
                    record.unlink(missing_ok=True)
                raise
            if record is not None:
                record.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _record(self, tilings: Sequence[Any], alone: bool) -> Iterator[Path]:
        folder().mkdir(parents=True, exist_ok=True)
        path = folder() / f"{self.key}.{os.environ.get(TOKEN, _own_token)}.{next(_numbers)}.json"
        part = path.with_suffix(".part")
        with part.open("w") as file:
            try:
                # Locked before it has its name: nobody finds it without its lock.
                fcntl.flock(file, fcntl.LOCK_EX)
                json.dump({"alone": alone, "tilings": [asdict(tiling) for tiling in tilings]}, file)
                file.flush()
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)
            yield path

    def _left(self) -> Iterator[tuple[Path, bool, tuple[Any, ...]]]:
        """Each record that a dead process left: its file, whether its tiling ran alone, and the tilings."""
        for path in sorted(folder().glob(f"{self.key}.*.json")):
            fields = _read_if_left(path) or {}
            # A record that cannot be read, or that another version wrote, says nothing.
            with contextlib.suppress(KeyError, TypeError):
                yield path, bool(fields["alone"]), tuple(self.tiling(**each) for each in fields["tilings"])

    def faulty(self) -> set[Any]:
        """The tilings that broke a process while nothing else ran."""
        return {tiling for _, alone, tilings in self._left() if alone for tiling in tilings}

    def suspect(self) -> bool:
        """Whether a process died while tilings ran of which any may be to blame."""
        return not all(alone for _, alone, _ in self._left())

    def clear_suspicion(self) -> None:
        """Take away the records of tilings that ran together: each has been tried alone since."""
        for path, alone, _ in list(self._left()):
            if not alone:
                path.unlink(missing_ok=True)


def _read_if_left(path: Path) -> dict[str, Any] | None:
    """The content of a record, unless a living process locks it."""
    try:
        with path.open() as file:
            return json.load(file) if _is_free(file) else None
    except (OSError, ValueError):
        return None


def _is_free(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def count_left() -> int:
    """The number of all records that dead processes left."""
    return sum(_read_if_left(path) is not None for path in folder().glob("*.json"))


def forgive(token: str) -> None:
    """Take away the records of a process that was ended on purpose, whatever it was launching.

    Args:
        token: what the process had in its environment as `TOKEN`.
    """
    for path in folder().glob(f"*.{token}.*.json"):
        path.unlink(missing_ok=True)
