"""The ownership of studies: one process at a time searches a study, and its row says which."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

import psutil
from sqlalchemy import Engine, select, update
from sqlalchemy.orm import Session

from studies.errors import StorageError
from studies.reconnecting import repeatable
from studies.sql import transaction
from studies.tables import Study


@dataclass(frozen=True, slots=True)
class Owner:
    """A process that searches a study. Process ids are used again; together with the start time they are unique."""

    host: str
    pid: int
    started: float

    @classmethod
    def me(cls) -> Owner:
        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time())

    @classmethod
    def parse(cls, text: str) -> Owner:
        host, pid, started = text.rsplit(" ", 2)
        return cls(host, int(pid), float(started))

    def __str__(self) -> str:
        return f"{self.host} {self.pid} {self.started}"

    def describe(self) -> str:
        """The owner in words, with what can be done about one on another host."""
        if self.host == socket.gethostname():
            return f"process {self.pid}"
        return f"process {self.pid} on {self.host} (if that is gone for good, --take-over)"

    def may_live(self) -> bool:
        """Whether the process still runs, or could: nothing can be known of a process on another host."""
        if self.host != socket.gethostname():
            return True
        if self.pid == os.getpid():
            # It is this process, or one before it: in a container that is started anew all begin with the same number.
            return self.started == psutil.Process().create_time()
        try:
            process = psutil.Process(self.pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            # A start time may differ by some seconds: it moves when the system's clock is set.
            return abs(process.create_time() - self.started) < 10.0
        except psutil.NoSuchProcess:
            return False


def check_claimable(held: str | None, owner: Owner) -> None:
    """Check that `owner` may claim a study whose column `owner` is `held`.

    Raises:
        StorageError: another process holds the study and still runs, or nobody can know whether it does.
    """
    if held is not None and held != str(owner) and Owner.parse(held).may_live():
        raise StorageError(f"its study is being searched by {Owner.parse(held).describe()}")


def require_owner(session: Session, study_id: int, owner: Owner) -> None:
    """Check that a study is `owner`'s, and keep it so until the transaction ends.

    Raises:
        StorageError: the study was deleted, or another process has claimed it.
    """
    # This is an update because that takes the lock that a reader would not.
    kept = update(Study).where(Study.study_id == study_id, Study.owner == str(owner)).values(owner=str(owner))
    if session.execute(kept).rowcount != 1:  # type: ignore[attr-defined]
        deleted = session.get(Study, study_id) is None
        why = "deleted while it was searched" if deleted else "taken over by another process"
        raise StorageError(f"the study was {why}")


class Ownership:
    """The owners of the studies in a database."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @repeatable
    def claim(self, study_id: int, owner: Owner) -> None:
        """Make `owner` the one process that searches the study.

        Raises:
            StorageError: another process holds the study and still runs, or nobody can know whether it does.
        """
        with transaction(self.engine) as session:
            held = session.scalar(select(Study.owner).where(Study.study_id == study_id))
            check_claimable(held, owner)
            # Compare and swap: of two processes that read the same dead owner, one wins.
            unchanged = Study.owner.is_(None) if held is None else Study.owner == held
            taken = session.execute(update(Study).where(Study.study_id == study_id, unchanged).values(owner=str(owner)))
            if taken.rowcount != 1:  # type: ignore[attr-defined]
                raise StorageError("its study has just been taken by another process")

    @repeatable
    def require(self, study_id: int, owner: Owner) -> None:
        """Raise StorageError if the study is no longer `owner`'s."""
        with transaction(self.engine) as session:
            require_owner(session, study_id, owner)

    @repeatable
    def release(self, study_id: int, owner: Owner) -> None:
        """Give the study up if it is `owner`'s."""
        with transaction(self.engine) as session:
            _forget(session, study_id, str(owner))

    def disown(self, study_id: int) -> None:
        """Forget an owner on another host, which the user knows to be gone.

        Raises:
            StorageError: the owner runs on this host.
        """
        with transaction(self.engine) as session:
            held = session.scalar(select(Study.owner).where(Study.study_id == study_id))
            if held is None:
                return
            if Owner.parse(held).host == socket.gethostname():
                check_claimable(held, Owner.me())
            _forget(session, study_id, held)


def _forget(session: Session, study_id: int, held: str) -> None:
    # Only that owner is forgotten: another process may have claimed the study since.
    session.execute(update(Study).where(Study.study_id == study_id, Study.owner == held).values(owner=None))
