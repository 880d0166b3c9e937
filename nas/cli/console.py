"""The streams that commands print on, and the ways in which they end."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from typing import NoReturn

import typer
from rich.console import Console

from kernels.cache import provide_home
from nas.errors import FieldError, UsageError
from nas.files import no_room
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
    # The disk that is full may be the one that errors are written to.
    with contextlib.suppress(OSError):
        err.print(f"Error: {line}", soft_wrap=True)
    raise typer.Exit(2)


def prepare() -> None:
    """Prepare the process for any command: warnings are a line each, and caches have a place."""

    def line(message: Warning | str, category: type[Warning], *_: object, **__: object) -> str:
        return f"{'Warning' if category is UserWarning else category.__name__}: {message}\n"

    warnings.formatwarning = line
    # It tells of caches that it could not write, which costs time and changes no result.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    try:
        # The locks, the caches of an account without a home and the data of trainings lie there.
        tempfile.gettempdir()
        provide_home()
    except OSError as error:
        fail(f"TMPDIR: there is no folder for temporary files ({error.strerror or error})")


@contextlib.contextmanager
def reported(storage: str) -> Iterator[None]:
    """Turns errors that a user can mend into one line and exit code 2; any other is a bug and keeps its traceback."""
    from studies import StorageError, displayed, guarded

    try:
        with guarded():
            yield
        # What is printed to a file comes there at last, or not.
        sys.stdout.flush()
    except UsageError as error:
        fail(str(error))
    except FieldError as error:
        # The field is told by the flag that declares it.
        values = error.value if isinstance(error.value, tuple) else (error.value,)
        flag = options(error.owner)[error.field].flag
        fail(f"{flag} {','.join(map(str, values))}: is not {error.expected}")
    except StorageError as error:
        fail(f"--storage {displayed(storage)}: {error}")
    except Exception as error:
        full = no_room(error)
        if full is None:
            raise
        try:
            sys.stdout.flush()
        except OSError:
            # Python would try once more to write what was printed, when it ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        fail(f"{full.filename or 'standard output or a temporary file'}: {full.strerror}")


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ends a command by Ctrl-C with one line and exit code 130, if all that was finished is kept. SIGTERM, which
    schedulers and containers send, and SIGHUP, which a lost terminal sends, do the same."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # A command under nohup goes on.
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        # To a full disk nothing can be told.
        with contextlib.suppress(OSError):
            err.print("Interrupted. What was finished is kept; the same command goes on from there.")
            sys.stdout.flush()
        # Not sys.exit: worker threads of torch and OpenMP may take seconds to be joined.
        os._exit(130)
