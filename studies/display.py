"""What optuna-dashboard shows with a study and its trials beside figures: notes in Markdown, and files.

Optuna takes no attributes of trials that are finished, so the dashboard keeps what belongs to these with the study,
under keys of its own. Its `save_note` reads all of a study's attributes at every call, which 2,000 trials make slow:
the keys are written here.
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
from optuna.storages import RDBStorage
from sqlalchemy.engine import make_url

# What the dashboard makes of each edit is the next version. Ours is the first: a later one is the user's own.
OUR_VERSION = 1
# Of databases on a server, which have no folder of their own here.
SERVER_FOLDER = Path("studies")


def artifact_folder(url: str) -> Path:
    """Where the files of a database's trials lie: next to it, or in studies/ of one on a server."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        return Path(str(parsed.database)).with_suffix(".artifacts")
    return SERVER_FOLDER / f"{parsed.database}.artifacts"


# -- Notes -----------------------------------------------------------------------------------------------------------


def write_note(storage: RDBStorage, study_id: int, trial_id: int | None, body: str) -> None:
    """Give a trial that has none a note, or the study itself."""
    from optuna_dashboard._note import note_ver_key, split_body

    # The version last: without it there is no note, however many of its pieces are.
    for key, piece in split_body(body, trial_id).items():
        storage.set_study_system_attr(study_id, key, piece)
    storage.set_study_system_attr(study_id, note_ver_key(trial_id), OUR_VERSION)


def update_notes(storage: RDBStorage, study_id: int, bodies: Mapping[int | None, str]) -> None:
    """Bring notes up to date, of trials or (None) the study; those that a user has edited stay as they are."""
    from optuna_dashboard._note import get_note_from_system_attrs, note_str_key_prefix, note_ver_key, split_body

    attrs = storage.get_study_system_attrs(study_id)
    for trial_id, body in bodies.items():
        version = attrs.get(note_ver_key(trial_id), 0)
        if version > OUR_VERSION:
            continue
        pieces = split_body(body, trial_id)
        old = {key: attrs[key] for key in _numbered(note_str_key_prefix(trial_id), attrs)}
        if (
            version == OUR_VERSION
            and get_note_from_system_attrs({**old, note_ver_key(trial_id): 1}, trial_id)["body"] == body
        ):
            continue
        # Pieces that are left over are emptied, for attributes cannot be deleted.
        for key in old.keys() - pieces.keys():
            storage.set_study_system_attr(study_id, key, "")
        write_note(storage, study_id, trial_id, body)


def _numbered(prefix: str, attrs: Mapping[str, Any]) -> list[str]:
    """The keys prefix0, prefix1, ... that are there."""
    found: list[str] = []
    while (key := f"{prefix}{len(found)}") in attrs:
        found.append(key)
    return found


# -- Files -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Artifact:
    """A file to show with a trial.

    Args:
        name: of the file, its suffix included.
        stamp: changes when what it is made of does.
        make: its content.
    """

    name: str
    stamp: str
    make: Callable[[], bytes]


class Artifacts:
    """The files of one study's trials."""

    def __init__(self, storage: RDBStorage, study_id: int, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.storage, self.study_id = storage, study_id
        self.store = FileSystemArtifactStore(folder)
        self.attrs: dict[str, Any] = storage.get_study_system_attrs(study_id)

    def attach(self, trial_id: int, artifact: Artifact) -> bool:
        """Show a file with a trial, in the place of an older one of that name; False where it is shown already."""
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
        """Take the files away from all other trials."""
        for trial_id, artifact_id, _ in self._all():
            if trial_id not in trial_ids:
                self._remove(trial_id, artifact_id)

    def _all(self) -> list[tuple[int, str, str]]:
        """Trial, artifact_id and name of each file."""
        found = []
        for key, value in self.attrs.items():
            if key.startswith(_PREFIX) and (meta := json.loads(value)) is not None:
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
        # As the dashboard deletes them.
        self._set(trial_id, artifact_id, json.dumps(None))
        if self._is_stored(artifact_id):
            self.store.remove(artifact_id)

    def _set(self, trial_id: int, artifact_id: str, value: str) -> None:
        key = f"{_PREFIX}{trial_id}:{artifact_id}"
        self.storage.set_study_system_attr(self.study_id, key, value)
        self.attrs[key] = value


_PREFIX = "dashboard:artifacts:"
