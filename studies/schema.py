"""The version of our tables in a database, and the migrations that bring it up to date.

A change of the schema is a new file in `studies/migrations/versions`, written by hand, and an old database in the
tests that it must bring up to date.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.engine import URL

MIGRATIONS = Path(__file__).parent / "migrations"
VERSION_TABLE = "convfirst_alembic_version"
# Of a PostgreSQL database in another encoding, the server converts what it can and refuses the rest by name; with
# SQL_ASCII the driver would return bytes instead of text.
AS_UTF8: dict[str, Any] = {"client_encoding": "utf8"}


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    return config


def versions() -> list[str]:
    """All schema versions that this code knows, oldest first."""
    return [script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()][::-1]


def head() -> str:
    """The schema version of this code."""
    return versions()[-1]


def current(connection: Connection) -> str | None:
    """The schema version of a database; None if it has no tables of ours."""
    return MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE}).get_current_revision()


def upgrade(url: URL, timeout_s: float) -> None:
    """Bring our tables up to date in one transaction: if it is killed at any moment, nothing has changed.

    Python's sqlite3 would commit each CREATE on its own, so this makes a connection that begins by hand. It takes the
    write lock at once, so one of two processes that start together waits for the other. If somebody holds a lock for
    longer than `timeout_s`, this fails.
    """
    if url.get_backend_name() != "sqlite":
        with _advisory_lock(url, timeout_s) as connection:
            _upgrade(connection)
        return
    engine = create_engine(url, connect_args={"timeout": timeout_s, "isolation_level": None})
    try:
        with engine.connect() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            _upgrade(connection)
            connection.exec_driver_sql("COMMIT")
    finally:
        engine.dispose()


@contextmanager
def alone(url: URL, timeout_s: float) -> Iterator[None]:
    """Let one process at a time run the body, of several that find a PostgreSQL database empty.

    Optuna makes its tables without asking who else does. An SQLite file is made aside and needs no lock.
    """
    if url.get_backend_name() == "sqlite":
        yield
        return
    with _advisory_lock(url, timeout_s):
        yield


@contextmanager
def _advisory_lock(url: URL, timeout_s: float) -> Iterator[Connection]:
    """A transaction on PostgreSQL during which no other process of ours has one."""
    engine = create_engine(url, connect_args=AS_UTF8)
    try:
        with engine.begin() as connection:
            connection.execute(text(f"SET LOCAL lock_timeout = {round(1000 * timeout_s)}"))
            # The number is arbitrary: it only has to be the same for all of us.
            connection.execute(text("SELECT pg_advisory_xact_lock(5027401)"))
            yield connection
    finally:
        engine.dispose()


def _upgrade(connection: Connection) -> None:
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
