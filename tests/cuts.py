"""Connections to a PostgreSQL server that are cut at chosen moments, as when the server is stopped there.

Ending one connection takes some milliseconds, restarting a server a second or more.
"""

from __future__ import annotations

import select
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from psycopg.pq import TransactionStatus
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg

import studies

# Whether a message is sent, and the moment before or after its effect: the second is an answer that never came.
BEFORE, AFTER = "before", "after"
ENDS = ("COMMIT", "ROLLBACK")
# Is told of the message's number, the texts of its transaction so far (its own is the last), and the moment.
Chooser = Callable[[int, tuple[str, ...], str], bool]


class Wire:
    """The messages that searches send from `studies.keep_connecting` on.

    Attributes:
        sent: number of messages, those that were cut off included.
        cuts: number of connections that were cut.
    """

    def __init__(self, server: str, cut: Chooser) -> None:
        self.admin = psycopg.connect(f"{server.replace('+psycopg', '')}/postgres", autocommit=True)
        self.cut = cut
        self.live = False
        self.sent = self.cuts = 0
        self.texts: tuple[str, ...] = ()

    def send(self, connection: Any, text: str, really: Callable[[], None]) -> None:
        # Of a transaction that has not begun, the driver sends no end.
        idle = text in ENDS and connection.info.transaction_status == TransactionStatus.IDLE
        if idle or not self.live:
            really()
            return
        number, texts = self.sent, (*self.texts, text)
        self.sent += 1
        self.texts = () if text in ENDS else texts
        if self.cut(number, texts, BEFORE):
            self.end(connection)
            really()
            raise AssertionError("the connection was ended, and something was sent on it")
        really()
        if self.cut(number, texts, AFTER):
            self.end(connection)
            # This raises what the driver raises.
            connection.execute("SELECT 1")

    def end(self, connection: Any) -> None:
        self.cuts += 1
        self.texts = ()
        self.admin.execute("SELECT pg_terminate_backend(%s)", [connection.info.backend_pid])
        # It is gone when its last words arrive; the server's own way to wait for that takes a tenth of a second.
        assert select.select([connection.fileno()], [], [], 10.0)[0]


@contextmanager
def cutting(server: str, cut: Chooser) -> Iterator[Wire]:
    """Cut connections where `cut` says so, while the block runs.

    Args:
        server: URL of the server, without a database.
    """
    wire = Wire(server, cut)
    keep_connecting = studies.keep_connecting

    def kept(*args: Any, **named: Any) -> None:
        keep_connecting(*args, **named)
        wire.live = True

    def sender(name: str, text: Callable[..., str], of: Callable[..., Any]) -> Callable[..., None]:
        original = getattr(PGDialect_psycopg, name)

        def send(self: Any, first: Any, *args: Any, **named: Any) -> None:
            wire.send(of(first), text(*args), lambda: original(self, first, *args, **named))

        return send

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studies, "keep_connecting", kept)
        for name in ("do_execute", "do_executemany", "do_execute_no_params"):
            patch.setattr(
                PGDialect_psycopg, name, sender(name, lambda statement, *_: statement, lambda cursor: cursor.connection)
            )
        for name, word in zip(("do_commit", "do_rollback"), ENDS, strict=True):
            patch.setattr(
                PGDialect_psycopg, name, sender(name, lambda word=word: word, lambda fairy: fairy.driver_connection)
            )
        with wire.admin:
            yield wire
