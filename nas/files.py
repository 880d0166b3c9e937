"""Files that are written whole or not at all, and what tells that there was no room for one."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

# A full disk, a full quota, a limit on the size of files.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; the file gets its name when the block ends, and is deleted if that fails."""
    # A link stays one. The suffix stays, as writers choose the format by it; a name may be as long as names can be.
    path = path.resolve()
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]
    part = path.with_name(f".part-{os.getpid()}-{digest}{path.suffix}")
    try:
        yield part
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def folder_for(folder: Path) -> Iterator[None]:
    """Make a folder, unless it is there; if the block fails, what was made is removed, as far as it is empty."""
    made = [each for each in (folder, *folder.absolute().parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for each in made:
            with suppress(OSError):
                each.rmdir()
        raise


def no_room(error: BaseException) -> OSError | None:
    """The error that says that a disk is full, of an exception and those that it came from; None where none does."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        if isinstance(found, OSError) and found.errno in NO_ROOM:
            return found
        # Compilers are programs, whose words are all that there is.
        if os.strerror(errno.ENOSPC) in str(found) or f"SystemError : {errno.ENOSPC}" in str(found):
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        found = found.__cause__ or found.__context__
    return None


def save_tensors(content: dict[str, Any], path: Path) -> None:
    """Save what `torch.load` loads.

    Raises:
        OSError: the file cannot be written.
    """
    import torch

    with whole(path) as part, part.open("wb") as file:
        writer = _Writer(file)
        torch.save(content, writer)  # type: ignore[arg-type]
        if writer.error is not None:
            raise writer.error


class _Writer:
    """A file that keeps its first error to itself: of one that it sees torch 2.11 may end (`terminate called`)."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            if self.error is None:
                self.file.write(data)
        except OSError as error:
            self.error = error
        return len(data)

    def flush(self) -> None:
        pass
