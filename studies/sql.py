"""Transactions and statements that all writers and readers of our tables share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from sqlalchemy import Boolean, Engine, select, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from studies.errors import StorageError, guarded, reason
from studies.tables import Base, Device, Study

if TYPE_CHECKING:
    import pandas as pd

# These columns of the views would come from SQLite as 0 and 1.
TRUTH_VALUES = {"latency_capped": Boolean, "latency_throttled": Boolean, "latency_over_limit": Boolean}


@contextmanager
def transaction(engine: Engine) -> Iterator[Session]:
    """A session that commits at the end and rolls back on any error."""
    with guarded(), Session(engine, expire_on_commit=False) as session, session.begin():
        yield session


@contextmanager
def transaction_on(engine: Engine, study_id: int) -> Iterator[Session]:
    """A transaction that writes rows of one study.

    Raises:
        StorageError: the study was deleted meanwhile.
    """
    try:
        with transaction(engine) as session:
            yield session
    except IntegrityError as error:
        with transaction(engine) as session:
            if session.get(Study, study_id) is not None:
                raise
        raise StorageError("the study was deleted") from error


def read_view(engine: Engine, query: str, study_name: str) -> pd.DataFrame:
    """The rows of a query on one of our views, which has the parameter `:name` for the study."""
    import pandas as pd

    with guarded(), engine.connect() as connection:
        columns = text(query).columns(**TRUTH_VALUES)
        try:
            # `read_sql` would first look for a table of that name, and go on whatever went wrong there.
            return pd.read_sql_query(columns, connection, params={"name": study_name})
        except pd.errors.DatabaseError as error:
            # It stands for an error of SQLAlchemy's.
            raise StorageError(reason(error)) from error


def device_row(session: Session, device: dict[str, str]) -> Device:
    """The row of a device, which is written if it is new. The fields are those of `tables.Device`."""
    query = select(Device).filter_by(**device)
    if row := session.scalar(query):
        return row
    # Another process may write it at this moment: then its row is also ours.
    session.execute(insert_into(session)(Device).values(device).on_conflict_do_nothing())
    return session.scalars(query).one()


def upsert(session: Session, table: type[Base], rows: Sequence[Base], replace: bool = True) -> None:
    """Insert rows of a table, each in the place of the row with the same unique key.

    Without `replace`, a row whose key is there already is not written.
    """
    columns = [column for column in table.__table__.columns if not column.primary_key]
    key = table.__table_args__[0].columns.keys()
    # All processes write in one order, or two would each wait for a row that the other holds.
    for row in sorted(rows, key=lambda row: [str(getattr(row, name)) for name in key]):
        # What is None is left to the column's default.
        values = {column.name: value for column in columns if (value := getattr(row, column.name)) is not None}
        session.execute(_upsert_statement(insert_into(session), table, replace), values)


@cache
def _upsert_statement(insert_of: Any, table: type[Base], replace: bool) -> Any:
    """The statement of `upsert`, for values of any columns. To make it takes longer than to run it."""
    insert = insert_of(table.__table__)
    key = table.__table_args__[0].columns.keys()
    if not replace:
        return insert.on_conflict_do_nothing(index_elements=key)
    replaced = {
        column.name: insert.excluded[column.name]
        for column in table.__table__.columns
        if not column.primary_key and column.name not in key
    }
    return insert.on_conflict_do_update(index_elements=key, set_=replaced)


def insert_into(session: Session) -> Any:
    """The INSERT of the database's own dialect, which knows ON CONFLICT."""
    return postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
