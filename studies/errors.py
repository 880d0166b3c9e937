"""The one error of this room, and the ways in which other libraries' errors become it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError


class StorageError(Exception):
    """A database cannot be used; the message is one line that says why."""


@contextmanager
def guarded() -> Iterator[None]:
    """Turn the errors of a database that is gone, full or locked for good into a StorageError.

    An IntegrityError passes: whoever writes knows what it means.
    """
    try:
        yield
    except IntegrityError:
        raise
    except (SQLAlchemyError, StorageInternalError) as error:
        raise StorageError(reason(error)) from error


def is_lost(error: BaseException) -> bool:
    """Whether an error, or its cause, is that a connection to a server was lost while it was used."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, DBAPIError) and cause.connection_invalidated:
            return True
        cause = cause.__cause__
    return False


def is_full(error: sqlite3.Error) -> bool:
    """Whether a disk is full; SQLite also says "disk I/O error" where there is no room for the memory of a WAL."""
    return error.sqlite_errorname in ("SQLITE_FULL", "SQLITE_IOERR_SHMSIZE")


def reason(error: BaseException) -> str:
    """The first line of an error's innermost cause: that has the database's own words, the wrappers add pages."""
    while inner := getattr(error, "orig", None) or error.__cause__:
        error = inner
    if isinstance(error, sqlite3.Error) and is_full(error):
        return "database or disk is full"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
