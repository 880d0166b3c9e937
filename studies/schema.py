"""The version of our tables in a database, and how it is brought up to date.

A change of the schema is a new file in `studies/migrations/versions`, written by hand, and an old database in the
tests that it must bring up to date.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.engine import URL

VERSION_TABLE = "convfirst_alembic_version"


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config


def head() -> str:
    """The schema version of this code."""
    revision = ScriptDirectory.from_config(_config()).get_current_head()
    assert revision is not None
    return revision


def known_versions() -> set[str]:
    return {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}


def current(engine: Engine) -> str | None:
    """The schema version of a database; None where our tables are not yet."""
    with engine.connect() as connection:
        return MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE}).get_current_revision()


def upgrade(url: str, timeout_s: float) -> None:
    """Bring our tables up to date, in one transaction: killed at any moment, all of it is there or nothing.

    Python's sqlite3 would commit each CREATE on its own, hence a connection of our own that begins by hand; taking the
    write lock at once, it also lets one of two processes that start together wait for the other. Whoever holds a lock
    for longer than `timeout_s` makes it fail.
    """
    connect_args = {"timeout": timeout_s, "isolation_level": None} if url.startswith("sqlite") else {}
    engine = create_engine(url, connect_args=connect_args)
    try:
        if engine.dialect.name == "sqlite":
            with engine.connect() as connection:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
                _upgrade(connection)
                connection.exec_driver_sql("COMMIT")
        else:
            with engine.begin() as connection:
                _wait_for_others(connection, timeout_s)
                _upgrade(connection)
    finally:
        engine.dispose()


@contextmanager
def alone(url: URL, timeout_s: float) -> Iterator[None]:
    """Of several processes that find a PostgreSQL database empty, one at a time runs its body: Optuna makes its tables
    without asking who else does. SQLite's are made aside."""
    if url.get_backend_name() != "postgresql":
        yield
        return
    engine = create_engine(url)
    try:
        with engine.begin() as connection:
            _wait_for_others(connection, timeout_s)
            yield
    finally:
        engine.dispose()


def _wait_for_others(connection: Connection, timeout_s: float) -> None:
    connection.execute(text(f"SET LOCAL lock_timeout = {round(1000 * timeout_s)}"))
    # Any number: it only has to be the same for all of us.
    connection.execute(text("SELECT pg_advisory_xact_lock(5027401)"))


def _upgrade(connection: Connection) -> None:
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
