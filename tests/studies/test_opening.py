"""The safe opening of a database, on SQLite and PostgreSQL alike."""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import optuna
import pytest
from sqlalchemy import create_engine, inspect, text

from studies import StorageError, Store, check_free, check_writable, displayed, schema
from tests.conftest import LFS_POINTER, Room
from tests.studies.rows import OURS, make_study


def test_opening_twice_finds_the_same(any_url: str) -> None:
    for _ in range(2):
        store = Store.open(any_url, create=True)
        assert store is not None
        assert set(inspect(store.engine).get_table_names()) >= OURS
        assert {"pareto_front", "convfirst_evaluations", "convfirst_retrained", "retrained_front"} <= set(
            inspect(store.engine).get_view_names()
        )
        with store.engine.connect() as connection:
            assert schema.current(connection) == schema.head()
        if store.find_study("one") is None:
            make_study(store)
        else:
            assert store.find_study("one").anchor_ms == 1.0  # type: ignore[union-attr]
        store.close()


def test_optunas_own_databases_are_welcome(any_url: str) -> None:
    optuna.create_study(study_name="theirs", storage=any_url)
    store = Store.open(any_url, create=True)
    assert store is not None
    make_study(store)
    assert [summary.name for summary in store.summaries()] == ["one"]
    store.close()


def test_a_database_with_other_tables_is_refused_and_left_alone(any_url: str) -> None:
    engine = create_engine(any_url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE trials (name TEXT)"))
    with pytest.raises(StorageError, match="other tables"):
        Store.open(any_url, create=True)
    assert inspect(engine).get_table_names() == ["trials"]
    engine.dispose()


def test_a_database_of_a_newer_version_is_refused(store: Store, any_url: str) -> None:
    with store.engine.begin() as connection:
        connection.execute(text("UPDATE convfirst_alembic_version SET version_num = '9999'"))
    for create in (True, False):
        with pytest.raises(StorageError, match="version 9999, newer than this program's"):
            Store.open(any_url, create=create)


def test_a_database_that_is_not_there_is_not_made_for_readers(tmp_path: Path) -> None:
    path = tmp_path / "none.db"
    assert Store.open(f"sqlite:///{path}", create=False) is None
    assert not path.exists()


def test_a_locked_database_is_told_soon(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studies.opening.OPEN_TIMEOUT_S", 0.2)
    first = Store.open(sqlite_url, create=True)
    assert first is not None
    first.close()
    holder = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StorageError, match="locked"):
        Store.open(sqlite_url, create=True)
    holder.close()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "no database's URL, such as sqlite:///FILE.db"),
        ("nosuch://here", "nosuch is not supported; use sqlite:///FILE.db or postgresql[+]psycopg"),
        ("mysql+pymysql://a@127.0.0.1/x", "mysql is not supported"),
        ("postgres://a@127.0.0.1/x", "postgres is not supported; use .* postgresql[+]psycopg://"),
        ("sqlite://", "in-memory"),
        ("sqlite://study.db", "names the host study.db; use sqlite:///FILE.db"),
        ("sqlite:////tmp/a\udcff.db", "bytes that are no text"),
        ("sqlite:////tmp/a\nb.db", "control characters"),
        ("sqlite+aiosqlite:///x.db", "driver of sqlite[+]aiosqlite:// is not installed .*; use sqlite:///FILE.db"),
        ("postgresql+psycopg://a@127.0.0.1:1/x", "refused"),
        ("postgresql+psycopg://a@127.0.0.1:port/x", "its port is no number, or"),
        ("postgresql+psycopg://[::1/x", "its port is no number, or"),
        ("postgresql+psycopg://a:secret@more@127.0.0.1/x", "must be percent-encoded: @ is %40"),
        ("postgresql+psycopg://a:secret@more:secret@127.0.0.1/x", "must be percent-encoded: @ is %40"),
        ("postgresql+psycopg://a:secret@more/secret@127.0.0.1/x", "must be percent-encoded: @ is %40"),
        ("postgresql+asyncpg://a:secret@127.0.0.1/x", "convfirst-nas.postgres.' brings that of postgresql[+]psycopg"),
        ("postgresql+nosuch://a:secret@127.0.0.1/x", "nosuch:// is not installed .*convfirst-nas.postgres."),
    ],
)
def test_storages_that_cannot_be_used(url: str, message: str) -> None:
    """Nor do they show their passwords; readers are told the same as writers."""
    if "aiosqlite" in url and importlib.util.find_spec("aiosqlite"):
        pytest.skip("aiosqlite is installed: its lack was not tested")
    for create in (True, False):
        with pytest.raises(StorageError, match=message) as caught:
            Store.open(url, create=create)
        assert "\n" not in str(caught.value)
        assert "secret" not in str(caught.value)
    assert "secret" not in displayed(url)


def test_a_file_in_a_folder_that_cannot_be_made_is_refused() -> None:
    with pytest.raises(StorageError, match=r"No such file|unable|denied"):
        Store.open("sqlite:////proc/nowhere/x.db", create=True)


def test_a_missing_driver_is_told_with_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """None in sys.modules is how a package that is not installed is told from Python."""
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(StorageError, match=r"psycopg:// is not installed .*; pip install 'convfirst-nas\[postgres\]'"):
        Store.open("postgresql+psycopg://a:secret@127.0.0.1:1/x", create=False)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql+psycopg://me:secret@host/name", "postgresql+psycopg://me:***@host/name"),
        ("postgresql+psycopg://me:se@cr/et@host/name", "postgresql+psycopg://me:***@host/name"),
        ("postgresql+psycopg://me@server:secret@host/name", "postgresql+psycopg://me@server:***@host/name"),
        ("postgresql://host/name?user=me&password=secret&x=1", "postgresql://host/name?user=me&password=***&x=1"),
        ("postgresql://me@host:5432/name", "postgresql://me@host:5432/name"),
        ("sqlite:////tmp/a:b@c.db", "sqlite:////tmp/a:b@c.db"),
        ("nonsense", "nonsense"),
    ],
)
def test_passwords_are_hidden_wherever_they_stand(url: str, shown: str) -> None:
    assert displayed(url) == shown


@pytest.mark.postgres
@pytest.mark.parametrize("encoding", ["UTF8", "LATIN1", "SQL_ASCII"])
def test_names_in_a_database_of_another_encoding(encoding: str, postgres_url: str) -> None:
    """Whatever a database can hold comes back equal; the rest is told in one line, and leaves nothing."""
    import psycopg

    server, _, name = postgres_url.rpartition("/")
    with psycopg.connect(server.replace("+psycopg", "") + "/postgres", autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name}")  # type: ignore[call-overload]
        connection.execute(  # type: ignore[call-overload]
            f"CREATE DATABASE {name} ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
        )
    store = Store.open(postgres_url, create=True)
    assert store is not None
    names = ["caf\u00e9", "\u4e2d\u6587"]
    if encoding == "LATIN1":
        for use in (store.find_study, partial(make_study, store)):
            with pytest.raises(StorageError, match=r"no equivalent in encoding .LATIN1.") as caught:
                use(names[1])
            assert "\n" not in str(caught.value)
        names.pop()
    for each in names:
        make_study(store, each)
        assert store.find_study(each) is not None
    assert [summary.name for summary in store.summaries()] == names
    store.close()


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a database\n" * 100)
    with pytest.raises(StorageError, match="not a database"):
        Store.open(f"sqlite:///{path}", create=True)
    assert path.read_text() == "not a database\n" * 100


def test_a_database_that_was_not_fetched_is_told(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    path.write_text(LFS_POINTER)
    for use in (partial(Store.open, create=True), partial(Store.open, create=False), partial(check_free, name="x")):
        with pytest.raises(StorageError, match="Git LFS's pointer to the database, which `git lfs pull` fetches"):
            use(f"sqlite:///{path}")
    assert path.read_text() == LFS_POINTER


def test_three_processes_may_make_a_database_at_once(any_url: str) -> None:
    code = f"from studies import Store; Store.open({any_url!r}, create=True)"
    processes = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert Store.open(any_url, create=False) is not None


def test_readers_need_no_write_lock(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studies.opening.OPEN_TIMEOUT_S", 0.2)
    store = Store.open(sqlite_url, create=True)
    assert store is not None
    make_study(store)
    writer = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    reader = Store.open(sqlite_url, create=False)
    assert reader is not None
    assert len(reader.summaries()) == 1
    writer.close()


def test_a_database_file_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that is killed while the tables are made leaves no file that the next would take for another's."""

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "study.db"
    with monkeypatch.context() as patch:
        patch.setattr("studies.schema.upgrade", die)
        with pytest.raises(KeyboardInterrupt):
            Store.open(f"sqlite:///{path}", create=True)
    assert not path.exists()
    assert Store.open(f"sqlite:///{path}", create=True) is not None
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


# -- Poorer file systems ---------------------------------------------------------------------------------------------


@pytest.fixture(params=["renames without replacing", "has only plain renames"])
def no_links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without hard links."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    if request.param == "has only plain renames":
        monkeypatch.setattr("studies.opening.ctypes.CDLL", lambda *_, **__: object())
    elif not hasattr(ctypes.CDLL(None), "renameat2"):
        pytest.skip("this system's C library has no renameat2: renaming without replacing was not tested")


@pytest.mark.usefixtures("no_links")
def test_without_hard_links_a_database_is_made_all_the_same(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    for _ in range(2):
        store = Store.open(url, create=True)
        assert store is not None
        assert store.summaries() == []
        store.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["study.db"]


@pytest.mark.usefixtures("no_links")
def test_without_hard_links_a_process_that_was_faster_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "study.db"
    real_upgrade = schema.upgrade

    def be_overtaken(*arguments: object) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("studies.schema.upgrade", real_upgrade)
            faster = Store.open(f"sqlite:///{path}", create=True)
        assert faster is not None
        make_study(faster)
        faster.close()
        real_upgrade(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("studies.schema.upgrade", be_overtaken)
    slower = Store.open(f"sqlite:///{path}", create=True)
    assert slower is not None
    assert [summary.name for summary in slower.summaries()] == ["one"]


# Maps no file whose name ends in -shm for several processes, as network file systems map none.
NO_SHARED_MAPS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
static int refused(int flags, int file) {
    char link[64], name[4096];
    if (!(flags & MAP_SHARED) || file < 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, name, sizeof name);
    return length > 4 && !memcmp(name + length - 4, "-shm", 4);
}
#define MAP(NAME) void *NAME(void *at, size_t length, int protection, int flags, int file, off_t offset) { \\
    if (refused(flags, file)) { errno = ENODEV; return MAP_FAILED; } \\
    void *(*real)(void *, size_t, int, int, int, off_t) = dlsym(RTLD_NEXT, #NAME); \\
    return real(at, length, protection, flags, file, offset); }
MAP(mmap)
MAP(mmap64)
"""


@pytest.fixture
def on_network(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A function that runs code in a process that can share no memory by SQLite's files, and returns what it prints."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler: databases on network file systems were not tested")
    folder = tmp_path_factory.mktemp("network")
    (folder / "maps.c").write_text(NO_SHARED_MAPS)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", "maps.so", "maps.c", "-ldl"], cwd=folder, check=True)

    def run(code: str) -> str:
        env = {**os.environ, "LD_PRELOAD": str(folder / "maps.so"), "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


def test_on_a_network_file_system_a_database_does_without_the_wal(
    on_network: Callable[[str], str], tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    opened = f"from studies import Store; store = Store.open({url!r}, create=True); "
    shown = "print(store.summaries(), store.engine.connect().exec_driver_sql('PRAGMA journal_mode').scalar())"
    for _ in range(2):
        assert on_network(opened + shown) == "[] delete"
        assert [entry.name for entry in tmp_path.iterdir()] == ["study.db"]
    # Back on a local disk the same file has what works there.
    store = Store.open(url, create=True)
    assert store is not None
    with store.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
    store.close()


def test_a_database_with_a_wal_is_refused_on_a_network_file_system(
    on_network: Callable[[str], str], tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    store = Store.open(url, create=True)
    assert store is not None
    make_study(store)
    store.close()
    before = (tmp_path / "study.db").read_bytes()
    for create in (True, False):
        told = on_network(
            "from studies import StorageError, Store\n"
            f"try: Store.open({url!r}, create={create})\nexcept StorageError as error: print(error)"
        )
        assert re.fullmatch("its file system does not let processes share memory.* copy .* to a local disk", told)
    assert (tmp_path / "study.db").read_bytes() == before


@pytest.mark.parametrize("kib", [0, 20], ids=["nothing", "not even its WAL"])
def test_a_folder_that_takes_no_database_is_told_beforehand(tmp_path: Path, room: Room, kib: int) -> None:
    with pytest.raises(StorageError, match=rf"no database can be made in {tmp_path} \(.*disk") as caught, room(kib):
        check_writable(f"sqlite:///{tmp_path / 'new' / 'study.db'}")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
