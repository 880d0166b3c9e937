"""The databases and folders that commands work on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nas.errors import UsageError

if TYPE_CHECKING:
    from nas.recorded import RecordedStudy
    from studies import Store


@contextlib.contextmanager
def writable_store(storage: str) -> Iterator[Store]:
    """A database to write to, which is made if there is none."""
    from studies import Store, check_writable

    check_writable(storage)
    store = Store.open(storage, create=True)
    assert store is not None
    try:
        yield store
    finally:
        store.close()


@contextlib.contextmanager
def store_if_any(storage: str) -> Iterator[Store | None]:
    """A database to read, or None where there is none."""
    from studies import Store

    store = Store.open(storage, create=False)
    try:
        yield store
    finally:
        if store is not None:
            store.close()


@contextlib.contextmanager
def existing_store(storage: str, study: str | None = None, write: bool = False) -> Iterator[Store]:
    """A database that must be there and hold the study, opened to read or to write.

    Raises:
        UsageError: there is no such database or study.
    """
    from nas.recorded import not_there
    from studies import Store, displayed

    store = Store.open(storage, create=False)
    if store is not None and write:
        store.close()
        store = Store.open(storage, create=True)
    if store is None:
        raise UsageError(f"--storage {displayed(storage)}: there is no study database of ours; a search makes one")
    try:
        if study is not None and store.find_study(study) is None:
            raise not_there(store, study)
        yield store
    finally:
        store.close()


@contextlib.contextmanager
def existing_study(storage: str, study: str, write: bool = False) -> Iterator[RecordedStudy]:
    """A study that must be there, in a database opened to read or to write.

    Raises:
        UsageError: there is no such database or study, or another version of the program wrote the study.
    """
    from nas.recorded import RecordedStudy

    with existing_store(storage, write=write) as store:
        yield RecordedStudy.open(store, study)


def require_folder(flag: str, folder: Path) -> None:
    """Check, without making anything, that a folder is there or can be made, and can be written to.

    Raises:
        UsageError: it cannot.
    """
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise UsageError(f"{flag} {folder}: {existing} is not a folder")
    if not os.access(existing, os.W_OK):
        raise UsageError(f"{flag} {folder}: the folder {existing} is read-only")
