"""The few exceptions of this project, and what turns others into them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UsageError(Exception):
    """What the user asked for cannot be done. The message is one line that names the flag and the value."""


class FieldError(ValueError):
    """A field of a dataclass has a value that it cannot have: "steps=0 is not at least 1".

    Attributes:
        owner: the dataclass.
        expected: what the value has to be, in words.
    """

    def __init__(self, owner: type[object], field: str, value: object, expected: str) -> None:
        super().__init__(owner, field, value, expected)
        self.owner, self.field, self.value, self.expected = owner, field, value, expected

    def __str__(self) -> str:
        return f"{self.field}={self.value!r} is not {self.expected}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the device or of the machine; not all of torch's libraries have a class for it."""
    import torch

    words = ("can't allocate memory", "not enough memory", "out of memory", "_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


class CandidateFailed(Exception):
    """A candidate cannot be evaluated, which is a result; the message is the reason that is recorded."""


@contextmanager
def of_this_version(study: str) -> Iterator[None]:
    """Reads what a study holds, which another version of the program may have written.

    Raises:
        UsageError: the study holds what this version does not know.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        words = str(error).splitlines()[0]
        raise UsageError(f"--study {study}: holds what this version does not know ({words})") from error


@contextmanager
def memory_may_run_out() -> Iterator[None]:
    """Turns running out of memory into a CandidateFailed."""
    import torch

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise CandidateFailed("out of memory") from error
