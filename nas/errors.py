"""The exceptions of nas/, and functions that turn other exceptions into them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# The beginning of the file that Git LFS leaves in the place of one that was not fetched.
_POINTER = b"version https://git-lfs.github.com/spec/"
FETCH = "it is Git LFS's pointer to the file, which `git lfs pull` fetches"


class UsageError(Exception):
    """The user asked for something impossible. The message is one line that names the flag and the value."""


class FieldError(ValueError):
    """A field of a dataclass has a value that it cannot have: "steps=0 is not at least 1".

    Attributes:
        owner: the dataclass.
        expected: the values that are allowed, in words that follow "is not".
    """

    def __init__(self, owner: type[object], field: str, value: object, expected: str) -> None:
        super().__init__(owner, field, value, expected)
        self.owner, self.field, self.value, self.expected = owner, field, value, expected

    def __str__(self) -> str:
        return f"{self.field}={self.value!r} is not {self.expected}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the device or of the machine ran out; some libraries of torch have no class for that."""
    import torch

    words = ("can't allocate memory", "not enough memory", "out of memory", "_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def message_line(error: BaseException, line: int = 0) -> str:
    """A line of an exception's type and message; the last one where there are fewer."""
    lines = f"{type(error).__name__}: {error}".splitlines()
    return lines[min(line, len(lines) - 1)].strip()


def is_pointer(path: Path) -> bool:
    """Whether a file is Git LFS's pointer to one that was not fetched."""
    try:
        with path.open("rb") as file:
            return file.read(len(_POINTER)) == _POINTER
    except OSError:
        return False


def unreadable(path: Path, error: BaseException) -> str:
    """The reason why a file cannot be read, in words."""
    if is_pointer(path):
        return FETCH
    return "it is empty" if path.is_file() and not path.stat().st_size else message_line(error)


class CandidateFailed(Exception):
    """A candidate cannot be evaluated, which is a result; the message is recorded as the reason."""


class WorkerDied(CandidateFailed):
    """The process that evaluated a candidate died, or is of no more use; another may succeed."""


class OutOfMemory(WorkerDied):
    """Memory ran out; when others have ended, there may be enough."""


@contextmanager
def of_this_version(study: str) -> Iterator[None]:
    """Context in which a study's content is read; another version of the program may have written it.

    Raises:
        UsageError: the study holds something that this version does not know.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        reason = message_line(error)
        raise UsageError(f"--study {study}: holds what this version does not know ({reason})") from error


@contextmanager
def memory_may_run_out() -> Iterator[None]:
    """Context in which running out of memory means that the candidate failed.

    Raises:
        CandidateFailed: memory ran out.
    """
    import torch

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise OutOfMemory("out of memory") from error


@contextmanager
def contained() -> Iterator[None]:
    """Context of a child process's work, whose faults of memory and CUDA cost that process and not the search.

    Raises:
        OutOfMemory: memory ran out.
        WorkerDied: CUDA reported an error, after which its context is of no more use.
    """
    from kernels.attempts import is_cuda_fault

    try:
        with memory_may_run_out():
            yield
    except RuntimeError as error:
        if is_cuda_fault(error):
            raise WorkerDied(message_line(error)) from error
        raise
