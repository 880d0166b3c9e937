"""Notes in Markdown and files, which optuna-dashboard shows with a study and its trials.

Optuna takes no attributes of finished trials, so the dashboard keeps the notes and files of trials with the study,
under keys of its own. Its `save_note` reads all of a study's attributes at every call, which is slow with 2,000 trials;
therefore this module writes the keys itself.
"""

from __future__ import annotations

import hashlib
import json
import mimetypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from optuna.artifacts import FileSystemArtifactStore
from optuna.artifacts.exceptions import ArtifactNotFound

from studies.opening import parse
from studies.optuna_storage import OptunaStorage

# The dashboard gives each edit of a note the next version. Ours is the first: a later one is the user's own.
OUR_VERSION = 1
# The files of a database on a server lie here, as it has no folder of its own on this machine.
SERVER_FOLDER = Path("studies")
# Attributes in one statement: each is three of its parameters, of which SQLite takes 32,766.
AT_ONCE = 1000
_PREFIX = "dashboard:artifacts:"


def artifact_folder(url: str) -> Path:
    """The folder for the files of a database's trials: next to the database's file, or in studies/ if it is on a
    server.

    Raises:
        StorageError: the URL is of no database that is supported.
    """
    parsed = parse(url)
    if parsed.get_backend_name() == "sqlite":
        return Path(str(parsed.database)).with_suffix(".artifacts")
    return SERVER_FOLDER / f"{parsed.database}.artifacts"


# -- Notes -----------------------------------------------------------------------------------------------------------


def write_note(storage: OptunaStorage, study_id: int, trial_id: int | None, body: str) -> None:
    """Write the first note of a trial, or of the study if `trial_id` is None."""
    storage.set_study_system_attrs(study_id, _note(body, trial_id))


def _note(body: str, trial_id: int | None) -> dict[str, Any]:
    """The attributes of the first note of a trial, or of the study."""
    from optuna_dashboard._note import note_ver_key, split_body

    return {**split_body(body, trial_id), note_ver_key(trial_id): OUR_VERSION}


def update_notes(storage: OptunaStorage, study_id: int, bodies: Mapping[int | None, str]) -> None:
    """Bring the notes of trials, or of the study (None), up to date. A note that a user has edited stays as it is."""
    from optuna_dashboard._note import get_note_from_system_attrs, note_str_key_prefix, note_ver_key

    attrs = storage.get_study_system_attrs(study_id)
    changed: dict[str, Any] = {}
    for trial_id, body in bodies.items():
        version = attrs.get(note_ver_key(trial_id), 0)
        if version > OUR_VERSION:
            continue
        old = {key: attrs[key] for key in _numbered(note_str_key_prefix(trial_id), attrs)}
        if (
            version == OUR_VERSION
            and get_note_from_system_attrs({**old, note_ver_key(trial_id): 1}, trial_id)["body"] == body
        ):
            continue
        # Pieces that are left over are emptied, because attributes cannot be deleted.
        changed |= {**dict.fromkeys(old, ""), **_note(body, trial_id)}
    keys = list(changed)
    for begin in range(0, len(keys), AT_ONCE):
        storage.set_study_system_attrs(study_id, {key: changed[key] for key in keys[begin : begin + AT_ONCE]})


def _numbered(prefix: str, attrs: Mapping[str, Any]) -> list[str]:
    """The keys prefix0, prefix1, ... up to the first that is missing."""
    found: list[str] = []
    while (key := f"{prefix}{len(found)}") in attrs:
        found.append(key)
    return found


# -- Files -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Artifact:
    """A file to show with a trial.

    Args:
        name: name of the file, with its suffix.
        stamp: text that changes when the data change from which the file is made.
        make: function that returns the file's content.
    """

    name: str
    stamp: str
    make: Callable[[], bytes]


class Artifacts:
    """The files of one study's trials."""

    def __init__(self, storage: OptunaStorage, study_id: int, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.storage, self.study_id = storage, study_id
        self.store = FileSystemArtifactStore(folder)
        # The notes of all trials, which are many, are attributes, too.
        attrs = storage.get_study_system_attrs(study_id)
        self.attrs: dict[str, Any] = {key: value for key, value in attrs.items() if key.startswith(_PREFIX)}

    def attach(self, trial_id: int, artifact: Artifact) -> bool:
        """Show a file with a trial, in the place of an older one of that name.

        Returns:
            False if the file was shown already.
        """
        identity = f"{self.study_id} {trial_id} {artifact.name} {artifact.stamp}"
        artifact_id = hashlib.sha256(identity.encode()).hexdigest()[:32]
        known = artifact_id in self._shown(trial_id, artifact.name)
        if known and self._is_stored(artifact_id):
            return False
        self.store.write(artifact_id, BytesIO(artifact.make()))
        mimetype, encoding = mimetypes.guess_type(artifact.name)
        meta = dict(artifact_id=artifact_id, filename=artifact.name, mimetype=mimetype, encoding=encoding)
        self._set(trial_id, artifact_id, json.dumps(meta))
        for older in self._shown(trial_id, artifact.name) - {artifact_id}:
            self._remove(trial_id, older)
        return True

    def keep_only(self, trial_ids: set[int]) -> None:
        """Remove the files of all other trials."""
        for trial_id, artifact_id, _ in self._all():
            if trial_id not in trial_ids:
                self._remove(trial_id, artifact_id)

    def _all(self) -> list[tuple[int, str, str]]:
        """(trial_id, artifact_id, name) of each file."""
        found = []
        for key, value in self.attrs.items():
            if (meta := json.loads(value)) is not None:
                found.append((int(key.split(":")[2]), meta["artifact_id"], meta["filename"]))
        return found

    def _shown(self, trial_id: int, name: str) -> set[str]:
        return {artifact_id for of, artifact_id, named in self._all() if (of, named) == (trial_id, name)}

    def _is_stored(self, artifact_id: str) -> bool:
        try:
            self.store.open_reader(artifact_id).close()
        except ArtifactNotFound:
            return False
        return True

    def _remove(self, trial_id: int, artifact_id: str) -> None:
        # The dashboard deletes files in the same way.
        self._set(trial_id, artifact_id, json.dumps(None))
        if self._is_stored(artifact_id):
            self.store.remove(artifact_id)

    def _set(self, trial_id: int, artifact_id: str, value: str) -> None:
        key = f"{_PREFIX}{trial_id}:{artifact_id}"
        self.storage.set_study_system_attrs(self.study_id, {key: value})
        self.attrs[key] = value
