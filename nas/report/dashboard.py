"""optuna-dashboard on a study database, with the files of the front's members beside the figures."""

from __future__ import annotations

import functools
import json
import re
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

from optuna.artifacts import FileSystemArtifactStore
from optuna.storages import get_storage

from nas.errors import UsageError
from studies import Store

# Number of requests that are answered at the same time: a page asks for several things, and several people may look.
THREADS = 4


class Server:
    """A dashboard that listens as soon as it is made, and answers once it is run.

    Args:
        folder: folder of the artifacts, made if need be.
        host, port: address to listen on; port 0 takes a free one.

    Raises:
        UsageError: the server cannot listen on that address.
    """

    def __init__(self, store: Store, folder: Path, host: str, port: int) -> None:
        import optuna_dashboard
        from waitress.server import create_server

        _serialize_once()
        folder.mkdir(parents=True, exist_ok=True)
        # `get_storage` adds a cache of finished trials: reading 2,000 takes seconds, and a page asks for them often.
        storage = get_storage(store.optuna_storage)
        app = _keeping_names(optuna_dashboard.wsgi(storage, FileSystemArtifactStore(folder)))
        self.app = app
        try:
            server: Any = create_server(app, host=host, port=port, threads=THREADS)
        except (OSError, ValueError, socket.gaierror) as error:
            raise UsageError(f"--host {host} --port {port}: cannot listen there ({error})") from error
        self.server, self.host, self.port = server, host, int(server.effective_port)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}/"

    def warm_up(self) -> None:
        """Read all studies once, so that the first look is as quick as the next."""
        for study in self._ask("/api/studies")["study_summaries"]:
            for page in ("", "/param_importances"):
                self._ask(f"/api/studies/{study['study_id']}{page}")

    def _ask(self, path: str) -> dict[str, Any]:
        environ: dict[str, Any] = {"PATH_INFO": path}
        setup_testing_defaults(environ)
        body = b"".join(self.app(environ, lambda status, headers, exc_info=None: lambda data: None))
        answer: dict[str, Any] = json.loads(body)
        return answer

    def run(self) -> None:
        """Answer until Ctrl-C."""
        self.server.run()


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
    """
    from optuna_dashboard import _serializer

    original: Callable[..., dict[str, Any]] = _serializer.serialize_frozen_trial
    if hasattr(original, "__wrapped__"):
        return
    index = _Index()
    finished: dict[tuple[int, int], tuple[dict[str, Any], dict[str, Any]]] = {}

    @functools.wraps(original)
    def serialize(study_id: int, trial: Any, study_system_attrs: Mapping[str, Any]) -> dict[str, Any]:
        key, attrs = (study_id, trial._trial_id), index.of(study_system_attrs, trial._trial_id)
        known = finished.get(key)
        if known is not None and known[0] == attrs:
            return known[1]
        made = original(study_id, trial, attrs)
        if trial.state.is_finished():
            finished[key] = attrs, made
        return made

    _serializer.serialize_frozen_trial = serialize


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
