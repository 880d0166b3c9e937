"""Fixtures that several rooms' tests share."""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import sqlite3
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

# Several workers share the cores: threads of torch's that spin while they wait for one another would stop each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import optuna
import pytest
import torch
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy.engine import URL, make_url

from nas.config import LatencyConfig
from nas.lab.servers import PostgresServer, postgres_programs
from nas.latency import device_profile
from search_spaces import SearchSpace, StageChoices
from studies import Candidate, Store, opening

# For deterministic trainings on CUDA; cuBLAS reads it once, at the first product of the process.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests neither read nor write the user's cache; all tests of a run share one."""
    base = tmp_path_factory.getbasetemp()
    # Of several workers each has a folder of its own in that of the run.
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    monkeypatch.delenv("CONVFIRST_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(shared))


@pytest.fixture(autouse=True)
def _own_locks(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests wait for no other process that trains or measures here; of several workers each has locks of its own."""
    folder = tmp_path_factory.getbasetemp() / "locks"
    folder.mkdir(exist_ok=True)
    monkeypatch.setenv("CONVFIRST_LOCKS", str(folder))


@pytest.fixture(autouse=True)
def _own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands prepare the process that they run in, which here is that of all tests."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr("nas.cli.console.provide_home", lambda: None)


@functools.cache
def _new_database() -> bytes:
    """A new SQLite file with all tables, made as a search makes it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "study.db"
        opening._make_sqlite_file(make_url(f"sqlite:///{path}"))
        return path.read_bytes()


READ_MIGRATIONS = ScriptDirectory.from_config
# Optuna's migrations and ours by their folder; a database's opening reads both several times.
_migrations: dict[str | None, ScriptDirectory] = {}


def _migrations_of(config: Config) -> ScriptDirectory:
    folder = config.get_main_option("script_location")
    if folder not in _migrations:
        _migrations[folder] = READ_MIGRATIONS(config)
    return _migrations[folder]


@pytest.fixture
def databases_made_anew() -> None:
    """For tests of how databases are made and opened: in others new ones are copies."""


@pytest.fixture
def shown() -> None:
    """For tests that want a search to end with notes and files for the dashboard."""


MEASURE_PROFILE = device_profile.measure_profile
_profiles: dict[object, device_profile.DeviceProfile] = {}


def _measured_once(config: LatencyConfig) -> device_profile.DeviceProfile:
    """The limits of the device, which are measured once a run for each dtype and number of threads."""
    key = (config.device, config.dtype, config.threads, device_profile.SECONDS)
    if key not in _profiles:
        _profiles[key] = MEASURE_PROFILE(config)
    return _profiles[key]


def quicken(patch: pytest.MonkeyPatch, folder: Path, *, shown: bool = False, anew: bool = False) -> None:
    """What makes searches quick, for all tests and for fixtures of a whole module.

    Drawing the front's files takes longer than an invented search of a hundred candidates; so does measuring what the
    device can do, which need not be known well here, nor measured anew for each database. Making a database takes
    longer than what most tests do with it, so theirs are copies of one.
    """

    def copy(url: URL) -> None:
        path = Path(str(url.database))
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=opening.ASIDE) as aside:
            (Path(aside) / "study.db").write_bytes(made)
            opening._name(Path(aside) / "study.db", path)

    if INTERPRETED:
        return
    patch.setattr("studies.display.SERVER_FOLDER", folder)
    patch.setattr(device_profile, "SECONDS", 0.02)
    patch.setattr(device_profile, "measure_profile", _measured_once)
    if not shown:
        patch.setattr("nas.search.loop.show", lambda recorded, folder: 0)
    if not anew:
        made = _new_database()
        patch.setattr(opening, "_make_sqlite_file", copy)
        patch.setattr(ScriptDirectory, "from_config", _migrations_of)


@pytest.fixture(autouse=True)
def _quick(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = request.fixturenames
    quicken(monkeypatch, tmp_path, shown="shown" in names, anew="databases_made_anew" in names)


def copy_database(source: str, target: str) -> None:
    """Copy an SQLite database that a fixture made, by URLs."""
    with (
        contextlib.closing(sqlite3.connect(source.removeprefix("sqlite:///"))) as there,
        contextlib.closing(sqlite3.connect(target.removeprefix("sqlite:///"))) as here,
    ):
        there.backup(here)


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--emulate", type=int, metavar="CAPABILITY",
        help="run the tests marked `kernels` as compiled for a GPU of that compute capability, emulated: 80, 89 or 90",
    )  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what needs a server or a browser as slow, and choose what this run can run.

    The interpreter and the compiler cannot share a process, so there are two runs. With TRITON_INTERPRET=1 only the
    tests marked `kernels` run, on the CPU; without it they run where there is a GPU, or with --emulate.
    """
    for item in items:
        if item.get_closest_marker("postgres") or item.get_closest_marker("browser"):
            item.add_marker("slow")
    if INTERPRETED:
        config.hook.pytest_deselected(items=[item for item in items if not item.get_closest_marker("kernels")])
        items[:] = [item for item in items if item.get_closest_marker("kernels")]
        return
    # Those that last for minutes come first: at the end one worker would be alone with them.
    items.sort(key=lambda item: item.path.name not in ("test_kill.py", "test_browser.py"))
    for item in items:
        if torch.cuda.is_available():
            continue
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device: what this test holds on a GPU was not tested"))
        if item.get_closest_marker("kernels") and config.getoption("--emulate") is None:
            item.add_marker(
                pytest.mark.skip(reason="no CUDA device: not tested as compiled (see TRITON_INTERPRET=1 and --emulate)")
            )


@pytest.fixture(autouse=True)
def _device_alive(request: pytest.FixtureRequest) -> Iterator[None]:
    """After a kernel's fault nothing runs on CUDA in this process: the run ends where the fault was, or, of several
    workers, this one, so that the next test gets a new one."""
    yield
    if torch.cuda.is_initialized() and {"gpu", "kernels"} & {mark.name for mark in request.node.iter_markers()}:
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            if "PYTEST_XDIST_WORKER" in os.environ:
                os._exit(3)
            # With another code pytest would not show what failed.
            why = str(error).splitlines()[0]
            pytest.exit(f"{request.node.nodeid}: the CUDA device was lost ({why})", returncode=1)


def make_tiny_space(**changes: object) -> SearchSpace:
    """A space of a few hundred architectures that holds every kind of choice, an invalid combination included."""
    stage = StageChoices(
        width=(8, 16), kernel_size=(3, 5), group_width=(1, 8, 16), expansion=(1.0, 1.5), blocks=(1, 2), stride=(1, 2)
    )
    fields: dict[str, object] = dict(
        name="tiny", description="for tests", resolution=16, stem_width=(8, 16), head_width=(16,),
        activation=("relu", "silu"), stages=(stage,),
    )  # fmt: skip
    return SearchSpace(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.fixture
def tiny_space() -> SearchSpace:
    return make_tiny_space()


TINY_TOML = """
name = "tiny"
resolution = 16
stem_width = [8, 16]
head_width = 16
activation = ["relu", "silu"]

[[stages]]
width = [8, 16]
kernel_size = [3, 5]
group_width = [1, 8, 16]
expansion = [1, 1.5, 2]
blocks = [1, 2]
stride = [1, 2]
"""


# What Git LFS leaves in the place of a file that was not fetched.
LFS_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456\n"


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'study.db'}"


@pytest.fixture
def stored_url(sqlite_url: str) -> str:
    """A database that the code of 3c0a121 made; the file's first line says how."""
    with contextlib.closing(sqlite3.connect(sqlite_url.removeprefix("sqlite:///"))) as connection:
        connection.executescript((Path(__file__).parent / "data" / "study_3c0a121.sql").read_text())
    return sqlite_url


def candidates_of(url: str, study: str = "convfirst") -> list[Candidate]:
    """All candidates of a stored study."""
    store = Store.open(url, create=False)
    assert store is not None
    found = store.find_study(study)
    assert found is not None
    rows = store.candidates(found.study_id)
    store.close()
    return rows


Room = Callable[[int], AbstractContextManager[None]]


@pytest.fixture
def room() -> Room:
    """A context in which no file grows beyond so many KiB, as on a full disk."""

    @contextlib.contextmanager
    def limited(kib: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * kib, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


# -- PostgreSQL ----------------------------------------------------------------------------------------------------


def new_postgres(folder: Path) -> PostgresServer:
    """A server that is not started yet; the test is skipped where there are no programs."""
    programs = postgres_programs()
    if programs is None:
        pytest.skip("PostgreSQL's server programs are not installed: the study database was not tested on PostgreSQL")
    return PostgresServer(folder, programs)


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PostgreSQL server of this run's own, gone with the run; yields its URL without a database."""
    server = new_postgres(tmp_path_factory.mktemp("postgres"))
    server.start()
    try:
        yield server.url
    finally:
        server.stop()


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[str]:
    """The URL of an empty database."""
    import uuid

    import psycopg

    name = f"test_{uuid.uuid4().hex}"
    admin = postgres_server.replace("+psycopg", "") + "/postgres"
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")  # type: ignore[call-overload]
    yield f"{postgres_server}/{name}"
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")  # type: ignore[call-overload]


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def any_url(request: pytest.FixtureRequest) -> str:
    """A fresh database of every kind that is supported."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


# -- Kernels -------------------------------------------------------------------------------------------------------


@pytest.fixture
def kernel_device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where Triton's kernels can run now: a GPU, or the CPU, interpreted or emulated."""
    capability = request.config.getoption("--emulate")
    if capability is None:
        yield torch.device("cpu" if INTERPRETED else "cuda")
        return
    from kernels.lab.emulator import emulated

    with emulated(capability):
        yield torch.device("cpu")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that kernels get is full of NaN, so that what they forget to write shows."""
    empty = torch.empty

    def full_of_nan(*args: object, **options: object) -> torch.Tensor:
        made: torch.Tensor = empty(*args, **options)  # type: ignore[call-overload]
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", full_of_nan)
