"""The safe opening of a study database: what is refused, and how an SQLite file is made on any file system.

Every refusal is a StorageError, and leaves the database as it was.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import sqlite3
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.study import StudyDirection
from sqlalchemy import Connection, create_engine, event, inspect, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from studies import schema
from studies.errors import StorageError, is_full, reason
from studies.optuna_storage import OptunaStorage

# Opening fails soon if somebody holds a lock for good; a running search waits for a long time.
OPEN_TIMEOUT_S = 10
BUSY_TIMEOUT_S = 120

# (direction, name) of the objectives, in Optuna's order of values. No other study is ours.
OBJECTIVES = ((StudyDirection.MAXIMIZE, "accuracy"), (StudyDirection.MINIMIZE, "latency_ms"))
# The front is a view, and a row is replaced, in SQL that only these two understand.
BACKENDS = ("sqlite", "postgresql")
EXAMPLES = "sqlite:///FILE.db or postgresql+psycopg://USER@HOST/NAME"
ENCODED = (
    "a user name or password holds a character that must be percent-encoded: @ is %40, : is %3A, / is %2F, % is %25"
)
OPTUNAS_TABLES = {"studies", "trials", "version_info"}
# The beginning of the names of folders in which files are made aside.
ASIDE = ".new-study-"
# Of <fcntl.h> and <linux/fs.h>.
AT_FDCWD, RENAME_NOREPLACE = -100, 1


def displayed(url: str) -> str:
    """The URL as it was typed, but with its passwords hidden, for people and logs."""
    # Up to the last @, as a password may hold one that should have been percent-encoded.
    hidden = re.sub(r"://([^:/]*):.*@", r"://\1:***@", url, flags=re.DOTALL)
    return re.sub(r"([?&](?:ssl)?password=)[^&]*", r"\1***", hidden)


def open_storage(url: str, *, create: bool) -> OptunaStorage | None:
    """Open the database at `url`, with Optuna's tables and ours in their newest version.

    Args:
        url: for example `sqlite:///studies/convfirst.db` or `postgresql+psycopg://user@host/name`.
        create: open the database to write, and make it and its tables if they are missing. Otherwise the database is
            opened to read, and the result is None if it has no tables of ours. Tables of an older version are brought
            up to date for readers too.

    Raises:
        StorageError: the database is unreachable, locked, not writable, not a database, not ours, of a version that
            this program does not know, or an SQLite file that its file system does not let processes share.
    """
    parsed = parse(url)
    if parsed.get_backend_name() == "sqlite" and not _is_sqlite_file(parsed):
        raise StorageError("an in-memory database would be lost with the process; name a file")
    try:
        if not _exists(parsed):
            if not create:
                return None
            _make_sqlite_file(parsed)
        tables, version = _look_into(parsed, to_write=create)
        ours = "convfirst_studies" in tables
        if not ours and not create:
            return None
        if tables and not tables >= OPTUNAS_TABLES:
            listed = ", ".join(sorted(tables)[:3])
            raise StorageError(f"it holds other tables ({listed}) and no studies: it is not ours to write to")
        if version is not None:
            _require_known(version)
        if create and not _is_wal(parsed):
            _prefer_wal(parsed)
        if version == schema.head():
            return _optuna_storage(parsed)
        if ours and not _is_writable(parsed):
            raise StorageError("the file is read-only, and its tables are of an older version than this program's")
        with schema.alone(parsed, OPEN_TIMEOUT_S):
            storage = _optuna_storage(parsed)
        schema.upgrade(parsed, OPEN_TIMEOUT_S)
        return storage
    # Optuna raises RuntimeError where its own tables are of another version.
    except (SQLAlchemyError, StorageInternalError, RuntimeError, ImportError, OSError, sqlite3.Error) as error:
        raise _refusal(parsed, error) from error


def check_writable(url: str) -> None:
    """Check that an SQLite file that is not there yet could be made; leave nothing behind.

    Raises:
        StorageError: the URL is of no database that is supported, or the file's folder or its file system takes none.
    """
    parsed = parse(url)
    if not _exists(parsed):
        folder = Path(str(parsed.database)).absolute().parent
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        if not existing.is_dir():
            raise StorageError(f"{existing} is not a folder")
        if not os.access(existing, os.W_OK):
            raise StorageError(f"the folder {existing} is read-only")
        try:
            _wal_works(existing)
        except (OSError, sqlite3.Error) as error:
            raise StorageError(f"no database can be made in {existing} ({reason(error)})") from error


def check_free(url: str, name: str) -> None:
    """Check that no other program has a study of that name, in a database without tables of ours; make nothing.

    Raises:
        StorageError: another program has such a study, or the database cannot be read.
    """
    parsed = parse(url)
    if not _exists(parsed):
        return
    try:
        tables, _ = _look_into(parsed, to_write=False)
        if "convfirst_studies" in tables or not tables >= OPTUNAS_TABLES:
            return
        with _probing(parsed) as connection:
            of_study = "JOIN studies USING (study_id) WHERE study_name = :name"
            trials = text(f"SELECT COUNT(*) FROM trials {of_study}")
            directions = text(f"SELECT direction FROM study_directions {of_study} ORDER BY objective")
            found = [StudyDirection[row[0]] for row in connection.execute(directions, {"name": name})]
            if found:
                require_ours(name, connection.execute(trials, {"name": name}).scalar_one(), found)
    except (SQLAlchemyError, ImportError, OSError) as error:
        raise _refusal(parsed, error) from error


def require_ours(name: str, trials: int, directions: list[StudyDirection]) -> None:
    """Check that an Optuna study without a row of ours is one whose making was interrupted: empty, with our directions.

    Raises:
        StorageError: another program made the study.
    """
    if trials or directions != [direction for direction, _ in OBJECTIVES]:
        raise StorageError(f"its study {name!r} was made by another program; choose another --study")


def parse(url: str) -> URL:
    """A URL's parts.

    Raises:
        StorageError: it is none, of no database that is supported, or of one whose driver is not installed.
    """
    if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", url):
        raise StorageError("holds control characters, or bytes that are no text")
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise StorageError(f"is no database's URL, such as {EXAMPLES}") from error
    except ValueError as error:
        raise StorageError(f"its port is no number, or {ENCODED}") from error
    if parsed.get_backend_name() not in BACKENDS:
        raise StorageError(f"{parsed.get_backend_name()} is not supported; use {EXAMPLES}")
    if parsed.get_backend_name() == "sqlite" and parsed.host:
        raise StorageError(f"names the host {parsed.host}; use sqlite:///FILE.db, or sqlite:////FILE.db from the root")
    # SQLAlchemy takes a password up to its first @.
    if parsed.password is not None and "@" in f"{parsed.host}{parsed.database}":
        raise StorageError(ENCODED)
    _require_driver(parsed)
    return parsed


def _require_driver(url: URL) -> None:
    """Check that a database's driver is installed and of the kind that waits for answers.

    Raises:
        StorageError: it is not.
    """
    try:
        dialect = url.get_dialect()
        dialect.import_dbapi()
        if not dialect.is_async:
            return
        fault = "is for asyncio"
    except (NoSuchModuleError, ImportError) as error:
        fault = f"is not installed ({reason(error)})"
    use = "use sqlite:///FILE.db"
    if url.get_backend_name() == "postgresql":
        use = "pip install 'convfirst-nas[postgres]' brings that of postgresql+psycopg://USER@HOST/NAME"
    raise StorageError(f"the driver of {url.drivername}:// {fault}; {use}")


def _refusal(url: URL, error: BaseException) -> StorageError:
    """The refusal of a database that raised an error."""
    if _is_sqlite_file(url):
        with contextlib.suppress(OSError), Path(str(url.database)).open("rb") as file:
            if file.read(40) == b"version https://git-lfs.github.com/spec/":
                return StorageError("the file is Git LFS's pointer to the database, which `git lfs pull` fetches")
    return StorageError(_why(url, error))


def _is_sqlite_file(url: URL) -> bool:
    return url.get_backend_name() == "sqlite" and bool(url.database) and url.database != ":memory:"


def _exists(url: URL) -> bool:
    """Whether a database's file is there; a server's database is taken to be."""
    return not _is_sqlite_file(url) or Path(str(url.database)).is_file()


def _is_writable(url: URL) -> bool:
    return not _is_sqlite_file(url) or os.access(str(url.database), os.W_OK)


def _make_sqlite_file(url: URL) -> None:
    """Make a database file with all tables, whole or not at all.

    Optuna's tables are made one by one; a process killed in between would leave a file that looks like another
    program's. Therefore the file is made aside, and gets its name when it is done; of two processes one wins.
    """
    path = Path(str(url.database))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=ASIDE) as folder:
        made = Path(folder) / "study.db"
        aside = url.set(database=str(made))
        storage = _optuna_storage(aside)
        storage.remove_session()
        schema.upgrade(aside, OPEN_TIMEOUT_S)
        storage.engine.dispose()
        _prefer_wal(aside)
        _name(made, path)


def _name(made: Path, path: Path) -> None:
    """Give a file its name, unless there is a file of that name already."""
    try:
        os.link(made, path)
    except FileExistsError:
        return
    except OSError:
        # SMB and exFAT have no hard links, but may rename without replacing.
        if not _rename(made, path) and not path.exists():
            os.rename(made, path)


def _rename(made: Path, path: Path) -> bool:
    """Rename a file unless there is one of the new name; False where the system cannot do that."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        done = libc.renameat2(AT_FDCWD, os.fsencode(made), AT_FDCWD, os.fsencode(path), RENAME_NOREPLACE) == 0
    except (AttributeError, OSError):
        return False
    return done or ctypes.get_errno() == errno.EEXIST


def _wal_works(folder: Path) -> bool:
    """Whether SQLite's WAL works on a folder's file system: processes map a file together, which network ones forbid.

    Raises:
        OSError, sqlite3.Error: not even another database can be made there.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=ASIDE) as aside:
        path = str(Path(aside) / "probe.db")
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("CREATE TABLE probe (number)")
        with closing(sqlite3.connect(path)) as connection:
            try:
                connection.execute("PRAGMA journal_mode=WAL")
                # SQLite answers "wal" in any case; what does not work is whatever comes next.
                connection.execute("INSERT INTO probe VALUES (1)")
                connection.commit()
            except sqlite3.OperationalError as error:
                if is_full(error):
                    raise
                return False
        return _is_wal(URL.create("sqlite", database=path))


def _is_wal(url: URL) -> bool:
    """Whether a database is an SQLite file whose header says that it has a WAL."""
    if not _is_sqlite_file(url) or not _exists(url):
        return False
    with open(str(url.database), "rb") as file:
        return file.read(20)[18:] == b"\x02\x02"


def _prefer_wal(url: URL) -> None:
    """Have an SQLite file use the WAL where that works; elsewhere it stays without.

    With WAL, readers (the dashboard) never block the search, nor does the search block them, and a write takes half the
    time.
    """
    if _is_sqlite_file(url) and _wal_works(Path(str(url.database)).absolute().parent):
        with closing(sqlite3.connect(str(url.database), timeout=OPEN_TIMEOUT_S)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")


def _why(url: URL, error: BaseException) -> str:
    """The reason for which a database cannot be opened, in words."""
    # What these find impossible has another reason.
    with contextlib.suppress(OSError, sqlite3.Error):
        if _is_wal(url) and not _wal_works(Path(str(url.database)).absolute().parent):
            return (
                "its file system does not let processes share memory, which its WAL needs; copy the file, and any -wal "
                "beside it, to a local disk"
            )
    return reason(error)


@contextmanager
def _probing(url: URL) -> Iterator[Connection]:
    """A connection that is made and closed again, and waits for locks only as long as opening may."""
    sqlite = url.get_backend_name() == "sqlite"
    arguments = {"timeout": OPEN_TIMEOUT_S} if sqlite else {"connect_timeout": OPEN_TIMEOUT_S, **schema.AS_UTF8}
    engine = create_engine(url, connect_args=arguments)
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


def _look_into(url: URL, *, to_write: bool) -> tuple[set[str], str | None]:
    """The names of all tables in a database, and the version of ours.

    With `to_write` this must get a write lock: the first write whose failure a user sees must not be the one after an
    hour's training.
    """
    with _probing(url) as connection:
        if to_write and url.get_backend_name() == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            if not _is_writable(url):
                raise StorageError("the file is read-only")
        return set(inspect(connection).get_table_names()), schema.current(connection)


def _require_known(version: str) -> None:
    known = schema.versions()
    if version < known[0]:
        raise StorageError(f"its tables are of version {version}, from before the first release; make a new database")
    if version not in known:
        raise StorageError(f"its tables are of version {version}, newer than this program's {known[-1]}")


def _optuna_storage(url: URL) -> OptunaStorage:
    sqlite = url.get_backend_name() == "sqlite"
    arguments = {"timeout": BUSY_TIMEOUT_S} if sqlite else schema.AS_UTF8
    engine_kwargs: dict[str, Any] = {"connect_args": arguments, "pool_pre_ping": not sqlite}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = OptunaStorage(url.render_as_string(hide_password=False), engine_kwargs=engine_kwargs)
    if sqlite:
        event.listen(storage.engine, "connect", _tune_sqlite)
        # Connections made before the listener was there would not have been tuned.
        storage.engine.dispose()
    return storage


def _tune_sqlite(connection: Any, _record: object) -> None:
    if connection.execute("PRAGMA journal_mode").fetchone() == ("wal",):
        # This loses nothing that was committed when a process dies.
        connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA foreign_keys=ON")
