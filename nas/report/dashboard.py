"""optuna-dashboard on a study database, with the files of the front's members beside the figures."""

from __future__ import annotations

import contextlib
import copy
import errno
import functools
import gc
import json
import re
import socket
import sys
import threading
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

from optuna.artifacts import FileSystemArtifactStore
from optuna.distributions import BaseDistribution
from optuna.storages import get_storage

from nas.errors import UsageError
from nas.report.collector import resting_collector
from studies import Store

# Number of requests that are answered at the same time: a page asks for several things, and several people may look.
THREADS = 4
# Addresses that stand for all of this machine's, and one of these, as browsers open no others.
EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class Server:
    """A dashboard that listens as soon as it is made, and answers once it is run.

    Args:
        folder: folder of the artifacts, made if need be.
        host, port: name or address to listen on, at all addresses that the name has; port 0 takes a free one.

    Attributes:
        looked_at: set once somebody was shown a study.

    Raises:
        UsageError: the server cannot listen there.
    """

    def __init__(self, store: Store, folder: Path, host: str, port: int) -> None:
        import optuna_dashboard
        from waitress.server import create_server

        # In a URL, the brackets tell an IPv6 address from a port.
        self.host = host.removeprefix("[").removesuffix("]")
        sockets = _bound(self.host, port)
        self.address, self.port = sockets[0].getsockname()[:2]
        _serialize_once()
        _look_at_spaces_once()
        folder.mkdir(parents=True, exist_ok=True)
        # `get_storage` adds a cache of finished trials: reading 2,000 takes seconds, and a page asks for them often.
        storage = get_storage(store.optuna_storage)
        self.app = _keeping_names(optuna_dashboard.wsgi(storage, FileSystemArtifactStore(folder)))
        self.server: Any = create_server(self._answer, sockets=sockets, threads=THREADS)
        self.looked_at = threading.Event()

    @property
    def everywhere(self) -> bool:
        """Whether it listens at all addresses of this machine."""
        return self.address in EVERY_ADDRESS

    @property
    def url(self) -> str:
        """The URL to open in a browser on this machine."""
        host = EVERY_ADDRESS.get(self.address, self.host)
        return f"http://[{host}]:{self.port}/" if ":" in host else f"http://{host}:{self.port}/"

    def warm_up(self) -> None:
        """Read all studies once, so that the first look need not wait for the database."""
        with resting_collector():
            for study in json.loads(self._ask("/api/studies"))["study_summaries"]:
                page = f"/api/studies/{study['study_id']}"
                # Any answer reads all trials, and to list them in one that nobody looks at takes seconds.
                self._ask(page, f"after={sys.maxsize}")
                self._ask(f"{page}/param_importances")
        # What was read is kept as long as the server runs, so no later collection need go through it.
        gc.freeze()

    def _ask(self, path: str, query: str = "") -> bytes:
        environ: dict[str, Any] = {"PATH_INFO": path, "QUERY_STRING": query}
        setup_testing_defaults(environ)
        return b"".join(self.app(environ, lambda status, headers, exc_info=None: lambda data: None))

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        try:
            return self.app(environ, start_response)
        finally:
            if re.fullmatch(r"/api/studies/\d+", environ["PATH_INFO"]):
                self.looked_at.set()

    def run(self) -> None:
        """Answer until Ctrl-C."""
        self.server.run()


def _bound(host: str, port: int) -> list[socket.socket]:
    """Sockets on one port, one for each address of a host that this machine has.

    Raises:
        UsageError: the host has no address here, or the port cannot be had at one of them.
    """
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    with contextlib.ExitStack() as made:
        try:
            for family, kind, protocol, _, address in dict.fromkeys(
                socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            ):
                try:
                    bound = made.enter_context(socket.socket(family, kind, protocol))
                    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    if family == socket.AF_INET6:
                        bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                    # The first address chooses the free port.
                    bound.bind((address[0], port, *address[2:]))
                    bound.listen()
                except OSError as error:
                    # Containers often have the name localhost for ::1, too, but no IPv6.
                    if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                        raise
                    missing = error
                    continue
                port = bound.getsockname()[1]
                sockets.append(bound)
            if missing and not sockets:
                raise missing
        # A name that cannot be one is a UnicodeError.
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"--host {host} --port {port}: cannot listen there ({reason})") from error
        made.pop_all()
    return sockets


def _keeping_names(app: Any) -> Any:
    """The dashboard's application, which refuses to rename a study.

    The dashboard would copy the trials into a new study and delete the old one together with our rows.
    """

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        if not re.fullmatch(r"/api/studies/\d+/rename", environ["PATH_INFO"]):
            return app(environ, start_response)
        body = json.dumps(
            {"reason": "Studies of this search keep their names: renaming one would delete its candidates."}
        )
        start_response("409 Conflict", [("Content-Type", "application/json")])
        return [body.encode()]

    return answer


def _serialize_once() -> None:
    """Let the dashboard serialize a finished trial once, and find its notes and files without those of all others.

    optuna-dashboard 0.21 serializes all trials for each page, and for each of them goes through all attributes of the
    study twice: with a note for each of 2,000 trials that is sixteen million comparisons. The result is the same with
    the attributes of the trial alone, and while these do not change, a finished trial does not change either.

    Equal values of a parameter become one object, for which the original is asked once: 25,000 trials of 18 parameters
    would be millions of objects.
    """
    from optuna_dashboard import _serializer

    original: Callable[..., dict[str, Any]] = _serializer.serialize_frozen_trial
    if hasattr(original, "__wrapped__"):
        return
    index = _Index()
    finished: dict[tuple[int, int], tuple[dict[str, Any], dict[str, Any]]] = {}
    params: dict[Hashable, tuple[BaseDistribution, dict[str, Any]]] = {}

    def param(trial: Any, name: str) -> dict[str, Any]:
        value, distribution = trial.params[name], trial.distributions[name]
        # The storage makes equal distributions one object; 1 and 1.0 and True are equal and not the same.
        key = (name, id(distribution), type(value), value)
        if key not in params:
            alone = copy.copy(trial)
            alone.params, alone.distributions = {name: value}, {name: distribution}
            # The distribution is kept so that the id stays its own.
            params[key] = distribution, original(0, alone, {})["params"][0]
        return params[key][1]

    @functools.wraps(original)
    def serialize(study_id: int, trial: Any, study_system_attrs: Mapping[str, Any]) -> dict[str, Any]:
        key, attrs = (study_id, trial._trial_id), index.of(study_system_attrs, trial._trial_id)
        known = finished.get(key)
        if known is not None and known[0] == attrs:
            return known[1]
        without_params = copy.copy(trial)
        without_params.params = {}
        made = original(study_id, without_params, attrs)
        made["params"] = [param(trial, name) for name in trial.params if name in trial.distributions]
        if trial.state.is_finished():
            finished[key] = attrs, made
        return made

    _serializer.serialize_frozen_trial = serialize


def _look_at_spaces_once() -> None:
    """Let the dashboard unite the search spaces of trials that differ in them only.

    optuna-dashboard 0.21 compares each trial's parameters with all that it has seen: at 10,000 trials of one space that
    took two fifths of the first answer, and changed nothing after the first trial.
    """
    from optuna_dashboard._inmemory_cache import _CachedExtraStudyProperty as Property

    original: Callable[..., None] = Property._update_search_space
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def update(self: Any, trial: Any) -> None:
        # The storage makes equal distributions one object.
        space = tuple((name, id(distribution)) for name, distribution in trial.distributions.items())
        # The trial is kept so that the ids stay those of its distributions.
        seen = self.__dict__.setdefault("_spaces_seen", {})
        if space not in seen:
            original(self, trial)
            seen[space] = trial

    Property._update_search_space = update


class _Index(threading.local):
    """The attributes "dashboard:<trial_id>:..." and "dashboard:artifacts:<trial_id>:..." of a study, by trial.

    Each thread keeps the attributes of the mapping that it was last asked for.
    """

    indexed: Mapping[str, Any] | None = None
    by_trial: dict[int, dict[str, Any]]

    def of(self, attrs: Mapping[str, Any], trial_id: int) -> dict[str, Any]:
        """The attributes of one trial."""
        if self.indexed is not attrs:
            self.by_trial, self.indexed = {}, attrs
            for key, value in attrs.items():
                owner = next((piece for piece in key.split(":")[1:3] if piece.isdecimal()), None)
                if key.startswith("dashboard:") and owner is not None:
                    self.by_trial.setdefault(int(owner), {})[key] = value
        return self.by_trial.get(trial_id, {})
