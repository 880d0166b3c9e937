"""The streams that commands print on, and the ways in which they end."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn

import typer
from rich.console import Console

from nas.errors import FieldError, UsageError
from nas.options import UNPRINTABLE, options

# In a pipe or a file there is no edge at which lines would have to be broken.
WIDTH = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160


# Brackets and colons in names and paths are the user's own.
out = Console(markup=False, emoji=False, highlight=False, width=WIDTH)
err = Console(stderr=True, markup=False, emoji=False, highlight=False)


def say(line: str) -> None:
    """Print a line of what the command prints, however long it is."""
    out.print(line, soft_wrap=True)


def note(line: str) -> None:
    """Print a line of progress, apart from what the command prints."""
    err.print(line, soft_wrap=True)


def fail(message: str) -> NoReturn:
    """End the command with one line and exit code 2; line ends within names are shown as \\n."""
    line = UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), message)
    err.print(f"Error: {line}", soft_wrap=True)
    raise typer.Exit(2)


@contextlib.contextmanager
def reported(storage: str) -> Iterator[None]:
    """Turns errors that a user can mend into one line and exit code 2; any other is a bug and keeps its traceback."""
    from studies import StorageError, displayed

    try:
        yield
    except UsageError as error:
        fail(str(error))
    except FieldError as error:
        # The field is told by the flag that declares it.
        values = error.value if isinstance(error.value, tuple) else (error.value,)
        flag = options(error.owner)[error.field].flag
        fail(f"{flag} {','.join(map(str, values))}: is not {error.expected}")
    except StorageError as error:
        fail(f"--storage {displayed(storage)}: {error}")


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ends a command by Ctrl-C with one line and exit code 130, if all that was finished is kept. SIGTERM, which
    schedulers and containers send, does the same."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        err.print("Interrupted. What was finished is kept; the same command goes on from there.")
        sys.stdout.flush()
        # Not sys.exit: worker threads of torch and OpenMP may take seconds to be joined.
        os._exit(130)
