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
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch

from kernels.cache import cache_folder

# Words of errors after which a CUDA context is of no more use; those of libraries have no class of their own.
CUDA_FAULTS = (
    "CUDA error", "Triton Error [CUDA]", "CUBLAS_STATUS", "CUDNN_STATUS", "cuDNN error", "CUFFT", "device-side assert",
)  # fmt: skip

_numbers = itertools.count()


def is_cuda_fault(error: BaseException) -> bool:
    """Whether CUDA reported an error after which its context is of no more use."""
    return isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in CUDA_FAULTS)
    )


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
    def of(self, tilings: Sequence[Any]) -> Iterator[None]:
        """Context of launches, of which a record remains if CUDA faults or this process dies.

        Where nothing can be written, there is no record.
        """
        with contextlib.ExitStack() as stack:
            try:
                record = stack.enter_context(self._record(tilings))
            except OSError:
                record = None
            try:
                yield
            except BaseException as error:
                if record is not None and not is_cuda_fault(error):
                    record.unlink(missing_ok=True)
                raise
            if record is not None:
                record.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _record(self, tilings: Sequence[Any]) -> Iterator[Path]:
        folder().mkdir(parents=True, exist_ok=True)
        path = folder() / f"{self.key}.{os.getpid()}.{next(_numbers)}.json"
        part = path.with_suffix(".part")
        with part.open("w") as file:
            # Locked before it has its name: nobody finds it without its lock.
            fcntl.flock(file, fcntl.LOCK_EX)
            json.dump({"pid": os.getpid(), "tilings": [asdict(tiling) for tiling in tilings]}, file)
            file.flush()
            os.replace(part, path)
            yield path

    def left(self) -> list[tuple[Any, ...]]:
        """The tilings of each record that a dead process left; several where they ran together."""
        found = []
        for path in sorted(folder().glob(f"{self.key}.*.json")):
            fields = _read_if_left(path)
            # A record that cannot be read, or that another version wrote, says nothing.
            with contextlib.suppress(KeyError, TypeError):
                found.append(tuple(self.tiling(**each) for each in (fields or {})["tilings"]))
        return found

    def faulty(self) -> set[Any]:
        """The tilings that broke a process while nothing else ran."""
        return {tilings[0] for tilings in self.left() if len(tilings) == 1}

    def suspect(self) -> bool:
        """Whether several tilings ran together when a process died."""
        return any(len(tilings) > 1 for tilings in self.left())


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


def forgive(pid: int) -> None:
    """Take away the records of a process that was ended on purpose, whatever it was launching."""
    for path in folder().glob(f"*.{pid}.*.json"):
        path.unlink(missing_ok=True)
