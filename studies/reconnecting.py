"""Restarts of a PostgreSQL server, which a search outlasts: it waits, and repeats what was lost with a connection.

Whether a transaction took effect cannot be known if the connection was lost during its COMMIT. Therefore what is marked
as `repeatable` can be done twice: it replaces a row by an equal one, or finds out that the first attempt took effect.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from sqlalchemy import Engine, event

from studies.errors import is_lost, reason

# So long a search waits for a server that does not answer, and so long between two attempts.
GONE_AFTER_S = 300
RETRY_S = 0.5
# Connections in a row that one operation may lose. Each may follow a wait: a server that comes and goes gets no more.
MOST_LOSSES = 10

# The engine's execution option of this name is its `Patience`.
_OPTION = "convfirst_patience"


class _HasEngine(Protocol):
    engine: Engine


User = TypeVar("User", bound=_HasEngine)
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class Patience:
    """How long a program bears with a server that does not answer, or that ends its connections.

    Args:
        waiting: function that receives a line when a wait begins, and one when the server is back.
        seconds: time after which the server is taken for gone.

    Attributes:
        gone: whether the server was given up; then nothing is waited for or repeated any more.
    """

    def __init__(self, waiting: Callable[[str], None], seconds: float) -> None:
        self.waiting, self.seconds = waiting, seconds
        self.gone = False

    def connect(self, dialect: Any, _record: object, arguments: Any, named: Any) -> Any:
        """Make a connection, once the server answers; SQLAlchemy calls this in the place of the driver's function."""
        begin, told = time.monotonic(), False
        while True:
            try:
                connection = dialect.connect(*arguments, **named)
            except dialect.loaded_dbapi.OperationalError as error:
                self.gone = self.gone or time.monotonic() - begin > self.seconds
                if self.gone:
                    raise
                if not told:
                    self.waiting(
                        f"the database does not answer ({reason(error)}): waiting for up to {self.seconds:g} s"
                    )
                    told = True
                time.sleep(RETRY_S)
            else:
                if told:
                    self.waiting("the database answers again")
                return connection

    def outlasts(self, losses: int) -> bool:
        """Whether an operation is to be repeated that lost so many connections in a row; pauses before a late one."""
        self.gone = self.gone or losses > MOST_LOSSES
        if self.gone:
            return False
        if losses > 1:
            # A server that is about to stop may still take connections.
            time.sleep(RETRY_S)
        return True


def keep_connecting(engine: Engine, waiting: Callable[[str], None], seconds: float = GONE_AFTER_S) -> None:
    """From now on, outlast restarts of a PostgreSQL server: new connections wait for it, and what is `repeatable` is
    repeated if it lost its connection.

    Args:
        waiting: function that receives a line when a wait begins, and one when the server is back.
        seconds: time after which the server is taken for gone.
    """
    if engine.dialect.name != "postgresql":
        return
    # It warns of what it could not tidy up on a connection that was lost.
    logging.getLogger("psycopg").setLevel(logging.ERROR)
    patience = Patience(waiting, seconds)
    event.listen(engine, "do_connect", patience.connect)
    engine.update_execution_options(**{_OPTION: patience})


def repeatable(
    operation: Callable[Concatenate[User, Parameters], Result],
) -> Callable[Concatenate[User, Parameters], Result]:
    """A method that is repeated if it lost its connection, where `keep_connecting` was called for its object's engine.

    It must do no harm to call it again after it took effect, in whole or in part.
    """

    @functools.wraps(operation)
    def repeat(self: User, /, *args: Parameters.args, **named: Parameters.kwargs) -> Result:
        losses = 0
        while True:
            try:
                return operation(self, *args, **named)
            except Exception as error:
                losses += 1
                patience: Patience | None = self.engine.get_execution_options().get(_OPTION)
                if patience is None or not is_lost(error) or not patience.outlasts(losses):
                    raise

    return repeat
