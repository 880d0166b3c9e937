"""The study database: opening one safely, and every read and write of our own tables.

One engine serves Optuna's storage and ours. A candidate's rows are written in one transaction, before Optuna is told of
it: whatever is killed when, a trial that Optuna holds for running either has its complete row here or has none.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import psutil
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from sqlalchemy import Boolean, Select, create_engine, delete, event, func, inspect, select, text, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.orm import Session, selectinload

from studies import schema
from studies.tables import (
    Base,
    BaselineLatency,
    BaselineTraining,
    BlockLatency,
    Candidate,
    CandidateState,
    CurvePoint,
    Device,
    Latency,
    Profile,
    Retraining,
    Study,
)

if TYPE_CHECKING:
    import pandas as pd

# Opening fails soon where somebody holds a lock for good; a running search waits out a long one.
OPEN_TIMEOUT_S = 10
BUSY_TIMEOUT_S = 120

# (direction, name) of the objectives, in Optuna's order of values.
OBJECTIVES = ((StudyDirection.MAXIMIZE, "accuracy"), (StudyDirection.MINIMIZE, "latency_ms"))
_ANOTHERS = "its study {!r} was made by another program; choose another --study"
NO_URL = "is no database's URL, such as sqlite:///FILE.db or postgresql+psycopg://USER@HOST/NAME"
BACKENDS = ("sqlite", "postgresql")
OPTUNAS_TABLES = {"studies", "trials", "version_info"}
METRIC_NAMES_KEY = "study:metric_names"
# Columns of the views that SQLite would hand over as 0 and 1.
TRUTH_VALUES = {"latency_capped": Boolean, "latency_throttled": Boolean, "latency_over_limit": Boolean}


class StorageError(Exception):
    """A database cannot be used; the message is one line that says why."""


def displayed(url: str) -> str:
    """The URL as it was typed, but for its password, which is hidden, for people and logs."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        return url
    return url if parsed.password is None else parsed.render_as_string()


@dataclass(frozen=True, slots=True)
class Owner:
    """A process that searches a study. Process ids come round again; with the start time they do not."""

    host: str
    pid: int
    started: float

    @classmethod
    def me(cls) -> Owner:
        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time())

    @classmethod
    def parse(cls, text_: str) -> Owner:
        host, pid, started = text_.rsplit(" ", 2)
        return cls(host, int(pid), float(started))

    def __str__(self) -> str:
        return f"{self.host} {self.pid} {self.started}"

    def may_live(self) -> bool:
        """Whether the process still runs. Of another host's process nothing can be known: it may."""
        if self.host != socket.gethostname():
            return True
        if self.pid == os.getpid():
            # It is this process, or one before it: in a container that is started anew all begin with the same number.
            return self.started == psutil.Process().create_time()
        try:
            process = psutil.Process(self.pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            # Some seconds of tolerance: the figure moves when the system's clock is set.
            return abs(process.create_time() - self.started) < 10.0
        except psutil.NoSuchProcess:
            return False


@dataclass(frozen=True, slots=True)
class StudySummary:
    """A study of ours in a database, and how many candidates it has of each state."""

    name: str
    complete: int
    over_limit: int
    failed: int
    device: str
    engine: str
    created_at: str


class Store:
    """A study database of any SQLAlchemy URL. Make one with `Store.open`."""

    def __init__(self, optuna_storage: RDBStorage) -> None:
        self.optuna_storage = optuna_storage
        self.engine = optuna_storage.engine

    @classmethod
    def open(cls, url: str, *, create: bool) -> Store | None:
        """Open the database at `url`, with Optuna's tables and ours in their newest version.

        Args:
            url: such as `sqlite:///studies/convfirst.db` or `postgresql+psycopg://user@host/name`.
            create: open it to write, and make the database and its tables where they are missing. Otherwise it is
                opened to read, and None is returned where there is nothing of ours. Tables of an older version are
                brought up to date for readers too.

        Raises:
            StorageError: the database is unreachable, locked, not writable, not a database, or not ours.
        """
        try:
            parsed = make_url(url)
            _require_supported(parsed)
            if parsed.get_backend_name() == "sqlite" and not _is_sqlite_file(parsed):
                raise StorageError("an in-memory database would be lost with the process; name a file")
            if not _sqlite_file_exists(parsed):
                if not create:
                    return None
                _make_sqlite_file(parsed)
            names = _table_names(parsed, to_write=create)
            ours = "convfirst_studies" in names
            if not ours and not create:
                return None
            if names and not names >= OPTUNAS_TABLES:
                listed = ", ".join(sorted(names)[:3])
                raise StorageError(f"it holds other tables ({listed}) and no studies: it is not ours to write to")
            up_to_date = ours and _require_known_version(parsed)
            if ours and not up_to_date and not _is_writable(parsed):
                raise StorageError("the file is read-only, and its tables are of an older version than this program's")
            with contextlib.nullcontext() if up_to_date else schema.alone(parsed, OPEN_TIMEOUT_S):
                storage = _optuna_storage(parsed)
            if not up_to_date:
                schema.upgrade(url, OPEN_TIMEOUT_S)
            return cls(storage)
        # The first is an ArgumentError, too.
        except (NoSuchModuleError, ImportError, OSError) as error:
            raise StorageError(_first_line(error)) from error
        except ArgumentError as error:
            raise StorageError(NO_URL) from error
        except (SQLAlchemyError, StorageInternalError, RuntimeError) as error:
            raise StorageError(_reason(error)) from error

    @staticmethod
    def check_writable(url: str) -> None:
        """Raises StorageError where an SQLite file that is not there yet could not be made; makes nothing."""
        try:
            parsed = make_url(url)
        except ArgumentError as error:
            raise StorageError(NO_URL) from error
        _require_supported(parsed)
        if _is_sqlite_file(parsed) and not _sqlite_file_exists(parsed):
            folder = Path(str(parsed.database)).absolute().parent
            existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
            if not existing.is_dir():
                raise StorageError(f"{existing} is not a folder")
            if not os.access(existing, os.W_OK):
                raise StorageError(f"the folder {existing} is read-only")

    @staticmethod
    def check_free(url: str, name: str) -> None:
        """Raises StorageError where another program has a study of that name, in a database that has nothing of ours
        yet; makes nothing."""
        parsed = make_url(url)
        if not _sqlite_file_exists(parsed):
            return
        try:
            names = _table_names(parsed, to_write=False)
            if "convfirst_studies" in names or not names >= OPTUNAS_TABLES:
                return
            engine = create_engine(parsed, connect_args=_probe_args(parsed))
            try:
                with engine.connect() as connection:
                    of_study = "JOIN studies USING (study_id) WHERE study_name = :name"
                    trials = text(f"SELECT COUNT(*) FROM trials {of_study}")
                    directions = text(f"SELECT direction FROM study_directions {of_study} ORDER BY objective")
                    found = [row[0] for row in connection.execute(directions, {"name": name})]
                    ours = [direction.name for direction, _ in OBJECTIVES]
                    if connection.execute(trials, {"name": name}).scalar_one() or (found and found != ours):
                        raise StorageError(_ANOTHERS.format(name))
            finally:
                engine.dispose()
        except (SQLAlchemyError, ImportError, OSError) as error:
            raise StorageError(_reason(error)) from error

    def close(self) -> None:
        self.optuna_storage.remove_session()
        self.engine.dispose()

    @contextmanager
    def _session(self) -> Iterator[Session]:
        """Commits at the end, rolls back on any error."""
        with guarded(), Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    # -- studies ---------------------------------------------------------------------------------------------------

    def find_study(self, name: str) -> Study | None:
        """The study of that name.

        Raises:
            StorageError: it has trials, but was not made by us.
        """
        with guarded():
            try:
                study_id = self.optuna_storage.get_study_id_from_name(name)
            except KeyError:
                return None
            with self._session() as session:
                study = session.get(Study, study_id)
            # Killed between Optuna's row and ours, a study is empty, and is as good as none.
            directions = [direction for direction, _ in OBJECTIVES]
            if study is None and (
                self.optuna_storage.get_n_trials(study_id)
                or self.optuna_storage.get_study_directions(study_id) != directions
            ):
                raise StorageError(_ANOTHERS.format(name))
            return study

    def create_study(
        self, name: str, *, config: str, data_fingerprint: str, versions: str, device: dict[str, str], anchor: str,
        anchor_ms: float,
    ) -> Study:  # fmt: skip
        """Make a study, in Optuna's tables and ours. The fields are those of `tables.Study`."""
        with guarded():
            try:
                study_id = self.optuna_storage.create_new_study([direction for direction, _ in OBJECTIVES], name)
            except optuna.exceptions.DuplicatedStudyError:
                study_id = self.optuna_storage.get_study_id_from_name(name)
            self.optuna_storage.set_study_system_attr(study_id, METRIC_NAMES_KEY, [name for _, name in OBJECTIVES])
        try:
            return self._insert_study(
                Study(
                    study_id=study_id, config=config, data_fingerprint=data_fingerprint, versions=versions,
                    anchor=anchor, anchor_ms=anchor_ms,
                ),
                device,
            )  # fmt: skip
        except IntegrityError as error:
            raise StorageError(f"its study {name!r} has just been made by another process") from error

    def _insert_study(self, study: Study, device: dict[str, str]) -> Study:
        with self._session() as session:
            study.device = _device_row(session, device)
            session.add(study)
        return study

    def load_optuna_study(self, name: str) -> optuna.Study:
        # The sampler is never asked: proposals are made in memory (nas.search.sampling).
        return optuna.load_study(study_name=name, storage=self.optuna_storage, sampler=optuna.samplers.RandomSampler())

    def claim(self, study_id: int, owner: Owner) -> None:
        """Make `owner` the one process that searches the study.

        Raises:
            StorageError: another process, which still lives or whose life cannot be known, holds it.
        """
        with self._session() as session:
            held = session.scalar(select(Study.owner).where(Study.study_id == study_id))
            _require_dead(held, owner)
            # Compare and swap: of two that read the same dead owner, one wins.
            unchanged = Study.owner.is_(None) if held is None else Study.owner == held
            taken = session.execute(update(Study).where(Study.study_id == study_id, unchanged).values(owner=str(owner)))
            if taken.rowcount != 1:  # type: ignore[attr-defined]
                raise StorageError("its study has just been taken by another process")

    def check_claimable(self, study: Study, owner: Owner) -> None:
        """Raises StorageError where `claim` would; changes nothing."""
        _require_dead(study.owner, owner)

    def require_owner(self, study_id: int, owner: Owner) -> None:
        """Raises StorageError where the study is no longer `owner`'s."""
        with self._session() as session:
            _require_owner(session, study_id, owner)

    def release(self, study_id: int, owner: Owner) -> None:
        with self._session() as session:
            session.execute(
                update(Study).where(Study.study_id == study_id, Study.owner == str(owner)).values(owner=None)
            )

    def disown(self, study_id: int) -> None:
        """Forget an owner on another host, of which the user knows that it is gone.

        Raises:
            StorageError: the owner lives on this host.
        """
        with self._session() as session:
            held = session.scalar(select(Study.owner).where(Study.study_id == study_id))
            if held is not None and Owner.parse(held).host == socket.gethostname():
                _require_dead(held, Owner.me())
            # Of that owner only: another process may have claimed the study since.
            session.execute(update(Study).where(Study.study_id == study_id, Study.owner == held).values(owner=None))

    def summaries(self) -> list[StudySummary]:
        """All studies of ours, oldest first."""
        with self._session() as session:
            names = {row[0]: row[1] for row in session.execute(text("SELECT study_id, study_name FROM studies"))}
            rows = session.execute(
                select(Candidate.study_id, Candidate.state, func.count()).group_by(Candidate.study_id, Candidate.state)
            ).all()
            per_state = {(study_id, state): count for study_id, state, count in rows}
            return [
                StudySummary(
                    name=names[study.study_id],
                    complete=per_state.get((study.study_id, CandidateState.COMPLETE), 0),
                    over_limit=per_state.get((study.study_id, CandidateState.OVER_LIMIT), 0),
                    failed=per_state.get((study.study_id, CandidateState.FAILED), 0),
                    device=study.device.name,
                    engine=json.loads(study.config)["latency"]["engine"],
                    created_at=f"{study.created_at:%Y-%m-%d %H:%M}",
                )
                for study in session.scalars(select(Study).order_by(Study.study_id))
            ]

    # -- devices ---------------------------------------------------------------------------------------------------

    def device_id(self, device: dict[str, str]) -> int:
        """The id of a device, which is written down if it is new. The fields are those of `tables.Device`."""
        with self._session() as session:
            return _device_row(session, device).device_id

    def find_profile(self, device: dict[str, str], dtype: str, threads: int) -> Profile | None:
        with self._session() as session:
            return session.scalar(_profile(device, dtype, threads))

    def add_profile(self, device: dict[str, str], profile: Profile, replace: bool = False) -> Profile:
        """Write a device's profile unless there is one, and return the one that is stored.

        With `replace` it takes the place of the older one, and latencies of blocks that were told on its scale go.
        """
        with self._session() as session:
            profile.device_id = _device_row(session, device).device_id
            if replace:
                session.execute(delete(BlockLatency).where(
                    BlockLatency.device_id == profile.device_id, BlockLatency.dtype == profile.dtype,
                    BlockLatency.threads == profile.threads,
                ))  # fmt: skip
            _upsert(session, Profile, [profile], replace)
            return session.scalars(_profile(device, profile.dtype, profile.threads)).one()

    def profiles(self) -> list[Profile]:
        """All profiles, in the order of their devices."""
        with self._session() as session:
            return list(session.scalars(select(Profile).order_by(Profile.device_id, Profile.dtype, Profile.threads)))

    def block_latencies(
        self, device: dict[str, str], engine: str, dtype: str, batch_size: int, threads: int, kernels: str = ""
    ) -> dict[str, BlockLatency]:
        """shape_id -> latency of every block that was measured by itself in one deployment."""
        query = (
            select(BlockLatency)
            .join(Device, Device.device_id == BlockLatency.device_id)
            .filter_by(**device)
            .where(
                BlockLatency.engine == engine, BlockLatency.dtype == dtype, BlockLatency.batch_size == batch_size,
                BlockLatency.threads == threads, BlockLatency.kernels == kernels,
            )
        )  # fmt: skip
        with self._session() as session:
            return {row.shape_id: row for row in session.scalars(query)}

    def add_block_latencies(self, device: dict[str, str], rows: Sequence[BlockLatency]) -> None:
        """Write latencies of blocks in the place of any older ones, all or nothing."""
        with self._session() as session:
            device_id = _device_row(session, device).device_id
            for row in rows:
                row.device_id = device_id
            _upsert(session, BlockLatency, rows)

    # -- baselines -------------------------------------------------------------------------------------------------

    def add_baselines(self, study_id: int, rows: Sequence[BaselineTraining] | Sequence[BaselineLatency]) -> None:
        """Write trainings or latencies of baselines in the place of any older ones, all or nothing.

        Raises:
            StorageError: the study was deleted meanwhile.
        """
        try:
            with self._session() as session:
                for row in rows:
                    row.study_id = study_id
                _upsert(session, type(rows[0]), rows)
        except IntegrityError as error:
            if self.has_study(study_id):
                raise
            raise StorageError("the study was deleted") from error

    def baseline_trainings(self, study_id: int) -> list[BaselineTraining]:
        """All trainings of a study's baselines, in the order in which they were first made."""
        query = select(BaselineTraining).where(BaselineTraining.study_id == study_id)
        with self._session() as session:
            return list(session.scalars(query.order_by(BaselineTraining.baseline_training_id)))

    def baseline_latencies(self, study_id: int) -> list[BaselineLatency]:
        """All latencies of a study's baselines, in the order in which they were first measured."""
        query = select(BaselineLatency).where(BaselineLatency.study_id == study_id)
        with self._session() as session:
            return list(session.scalars(query.order_by(BaselineLatency.baseline_latency_id)))

    # -- retrainings -----------------------------------------------------------------------------------------------

    def add_retraining(self, row: Retraining) -> None:
        """Write a longer training of a candidate, in the place of an older one of its kind.

        Raises:
            StorageError: the candidate was deleted meanwhile.
        """
        try:
            with self._session() as session:
                _upsert(session, Retraining, [row])
        except IntegrityError as error:
            raise StorageError("the study was deleted, or candidates of it") from error

    def retrainings(self, study_id: int) -> list[Retraining]:
        """All longer trainings of a study's candidates, failed ones too."""
        query = select(Retraining).join(Candidate, Candidate.trial_id == Retraining.trial_id)
        with self._session() as session:
            return list(session.scalars(query.where(Candidate.study_id == study_id).order_by(Retraining.retraining_id)))

    def retrained(self, name: str) -> pd.DataFrame:
        """The view `convfirst_retrained` of one study, fastest first."""
        return self._rows(
            "SELECT * FROM convfirst_retrained WHERE study_name = :name ORDER BY latency_ms, number", name
        )

    def retrained_front(self, name: str) -> pd.DataFrame:
        """The view `retrained_front` of one study, fastest first."""
        return self._rows("SELECT * FROM retrained_front WHERE study_name = :name ORDER BY latency_ms, number", name)

    def _rows(self, query: str, name: str) -> pd.DataFrame:
        import pandas as pd

        with guarded(), self.engine.connect() as connection:
            return pd.read_sql(text(query).columns(**TRUTH_VALUES), connection, params={"name": name})

    # -- candidates ------------------------------------------------------------------------------------------------

    def add_candidate(self, candidate: Candidate, owner: Owner) -> None:
        """Write a candidate with its latencies and learning curve, all or nothing.

        Raises:
            StorageError: the study was deleted meanwhile, or is no longer `owner`'s.
        """
        try:
            with self._session() as session:
                session.add(candidate)
                # In the order in which deleting a study locks: its trials, then what is ours.
                session.flush()
                _require_owner(session, candidate.study_id, owner)
        except IntegrityError as error:
            if self.has_study(candidate.study_id):
                raise
            raise StorageError("the study was deleted") from error

    def add_latencies(self, study_id: int, rows: Sequence[Latency]) -> None:
        """Write latencies of candidates that are stored, in the place of any older ones, all or nothing.

        Raises:
            StorageError: the study, or one of the candidates, was deleted meanwhile.
        """
        trial_ids = {row.trial_id for row in rows}
        try:
            with self._session() as session:
                _upsert(session, Latency, rows)
                # Only now nobody can delete them before the commit.
                self._require_candidates(session, study_id, trial_ids)
        except IntegrityError:
            with self._session() as session:
                self._require_candidates(session, study_id, trial_ids)
            raise

    def _require_candidates(self, session: Session, study_id: int, trial_ids: set[int]) -> None:
        query = select(func.count()).where(Candidate.study_id == study_id, Candidate.trial_id.in_(trial_ids))
        if session.scalar(query) != len(trial_ids):
            raise StorageError("the study was deleted, or candidates of it")

    def has_study(self, study_id: int) -> bool:
        with self._session() as session:
            return session.get(Study, study_id) is not None

    def candidates(self, study_id: int) -> list[Candidate]:
        """All candidates of a study with their latencies, in the order of their trials."""
        query = (
            select(Candidate)
            .where(Candidate.study_id == study_id)
            .options(selectinload(Candidate.latencies))
            .order_by(Candidate.number)
        )
        with self._session() as session:
            return list(session.scalars(query))

    def learning_curve(self, trial_id: int) -> list[CurvePoint]:
        """A candidate's training, step by step."""
        query = select(CurvePoint).where(CurvePoint.trial_id == trial_id).order_by(CurvePoint.step)
        with self._session() as session:
            return list(session.scalars(query))

    def front(self, name: str) -> pd.DataFrame:
        """The view `pareto_front` of one study, fastest first."""
        return self._rows(
            "SELECT * FROM pareto_front WHERE study_name = :name ORDER BY latency_ms, accuracy DESC, number", name
        )

    def evaluations(self, name: str) -> pd.DataFrame:
        """The complete rows of the view `convfirst_evaluations` of one study, in the order of their trials."""
        return self._rows(
            "SELECT * FROM convfirst_evaluations WHERE study_name = :name AND state = 'complete' ORDER BY number", name
        )


@contextmanager
def guarded() -> Iterator[None]:
    """Turns a database that is gone, full or locked for good into a StorageError."""
    try:
        yield
    except IntegrityError:
        raise
    except (SQLAlchemyError, StorageInternalError) as error:
        raise StorageError(_reason(error)) from error


def _device_row(session: Session, device: dict[str, str]) -> Device:
    query = select(Device).filter_by(**device)
    if row := session.scalar(query):
        return row
    # Another process may make it at this moment: then that one is ours too.
    session.execute(_insert(session)(Device).values(device).on_conflict_do_nothing())
    return session.scalars(query).one()


def _profile(device: dict[str, str], dtype: str, threads: int) -> Select[Profile]:
    return (
        select(Profile)
        .join(Profile.device)
        .filter_by(**device)
        .where(Profile.dtype == dtype, Profile.threads == threads)
    )


def _insert(session: Session) -> Any:
    """The database's own INSERT, which knows ON CONFLICT."""
    return postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert


def _upsert(session: Session, table: type[Base], rows: Sequence[Base], replace: bool = True) -> None:
    """Insert rows of a table, each in the place of the one with the same unique key if there is one, or not at all."""
    columns = [column for column in table.__table__.columns if not column.primary_key]
    key = table.__table_args__[0].columns.keys()
    # In one order, or two processes would each wait for a row that the other holds.
    for row in sorted(rows, key=lambda row: [str(getattr(row, name)) for name in key]):
        # What is None is left to the column's default.
        values = {column.name: value for column in columns if (value := getattr(row, column.name)) is not None}
        insert = _insert(session)(table).values(values)
        if not replace:
            session.execute(insert.on_conflict_do_nothing(index_elements=key))
            continue
        replaced = {column.name: insert.excluded[column.name] for column in columns if column.name not in key}
        session.execute(insert.on_conflict_do_update(index_elements=key, set_=replaced))


def _require_dead(held: str | None, owner: Owner) -> None:
    if held is not None and held != str(owner) and Owner.parse(held).may_live():
        raise StorageError(f"its study is being searched by {_describe(Owner.parse(held))}")


def _require_owner(session: Session, study_id: int, owner: Owner) -> None:
    """Raises StorageError where the study is not `owner`'s; otherwise it stays so until the transaction ends."""
    # An update, as that takes the lock that a reader would not.
    kept = update(Study).where(Study.study_id == study_id, Study.owner == str(owner)).values(owner=str(owner))
    if session.execute(kept).rowcount != 1:  # type: ignore[attr-defined]
        why = (
            "deleted while it was searched" if session.get(Study, study_id) is None else "taken over by another process"
        )
        raise StorageError(f"the study was {why}")


def _describe(owner: Owner) -> str:
    if owner.host == socket.gethostname():
        return f"process {owner.pid}"
    return f"process {owner.pid} on {owner.host} (if that is gone for good, --take-over)"


# -- opening -------------------------------------------------------------------------------------------------------


def _require_supported(url: URL) -> None:
    """The front is a view, and a row is replaced, in the words of these two."""
    if url.get_backend_name() not in BACKENDS:
        raise StorageError(f"{url.get_backend_name()} is not supported; use {' or '.join(BACKENDS)}")


def _is_sqlite_file(url: URL) -> bool:
    return url.get_backend_name() == "sqlite" and bool(url.database) and url.database != ":memory:"


def _sqlite_file_exists(url: URL) -> bool:
    return not _is_sqlite_file(url) or Path(str(url.database)).is_file()


def _is_writable(url: URL) -> bool:
    return not _is_sqlite_file(url) or os.access(str(url.database), os.W_OK)


def _probe_args(url: URL) -> dict[str, Any]:
    if url.get_backend_name() == "sqlite":
        return {"timeout": OPEN_TIMEOUT_S}
    return {"connect_timeout": OPEN_TIMEOUT_S}


def _make_sqlite_file(url: URL) -> None:
    """Make a database file with all tables, whole or not at all.

    Optuna's tables are made one by one; a process killed in between would leave a file that looks like another
    program's. So it is made aside, and linked to its name when it is done; of two processes one wins.
    """
    path = Path(str(url.database))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-study-") as folder:
        aside = url.set(database=str(Path(folder) / "study.db"))
        storage = _optuna_storage(aside)
        storage.remove_session()
        schema.upgrade(str(aside), OPEN_TIMEOUT_S)
        storage.engine.dispose()
        with contextlib.suppress(FileExistsError):
            os.link(str(aside.database), path)


def _table_names(url: URL, *, to_write: bool) -> set[str]:
    """Names of the tables in a database.

    With `to_write` it must take a write lock: the first write that a user learns of must not be the one after an hour's
    training.
    """
    engine = create_engine(url, connect_args=_probe_args(url))
    try:
        with engine.connect() as connection:
            if to_write and url.get_backend_name() == "sqlite":
                connection.exec_driver_sql("BEGIN IMMEDIATE")
                if not _is_writable(url):
                    raise StorageError("the file is read-only")
            return set(inspect(connection).get_table_names())
    finally:
        engine.dispose()


def _require_known_version(url: URL) -> bool:
    """Whether our tables are of this program's version; raises StorageError where they are newer."""
    engine = create_engine(url, connect_args=_probe_args(url))
    try:
        version = schema.current(engine)
    finally:
        engine.dispose()
    if version is not None and version not in schema.known_versions():
        raise StorageError(f"its tables are of version {version}, newer than this program's {schema.head()}")
    return version == schema.head()


def _optuna_storage(url: URL) -> RDBStorage:
    engine_kwargs: dict[str, Any] = {}
    if url.get_backend_name() == "sqlite":
        engine_kwargs["connect_args"] = {"timeout": BUSY_TIMEOUT_S}
    else:
        engine_kwargs["pool_pre_ping"] = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = RDBStorage(url.render_as_string(hide_password=False), engine_kwargs=engine_kwargs)
    if url.get_backend_name() == "sqlite":
        event.listen(storage.engine, "connect", _tune_sqlite)
        # Connections made before the listener was there would not have been tuned.
        storage.engine.dispose()
    return storage


def _tune_sqlite(connection: Any, _record: object) -> None:
    # Readers (the dashboard) then never block the search nor the search them; half the time of a write, too. With WAL,
    # NORMAL loses nothing that was committed when a process dies.
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA foreign_keys=ON")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _reason(error: BaseException) -> str:
    """The database's own words: the innermost cause has them, the wrappers add pages."""
    while True:
        inner = getattr(error, "orig", None) or error.__cause__
        if inner is None:
            return _first_line(error)
        error = inner
