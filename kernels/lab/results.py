"""Files of results that a command adds to, and from which it goes on when it is started again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, without the half line that a killed run leaves.

    Raises:
        OSError: the file cannot be read.
    """
    for line in path.read_text().splitlines():
        with suppress(json.JSONDecodeError):
            if isinstance(record := json.loads(line), dict):
                yield record


class ResultFile:
    """Results of one command under the same conditions, each written as soon as it is known.

    Args:
        path: the file, which the first result makes.
        conditions: fields that all results of this run share; lines with other values stay in the file and are ignored.
        key: names of the fields that tell one result from another.
    """

    def __init__(self, path: Path, conditions: Mapping[str, Any], key: tuple[str, ...]) -> None:
        self.path, self.conditions, self.key = path, conditions, key
        self._by_key: dict[str, dict[str, Any]] = {}
        for record in read_lines(path) if path.exists() else ():
            if conditions.items() <= record.items():
                self._by_key[_as_text([record.get(name) for name in key])] = record

    @property
    def records(self) -> list[dict[str, Any]]:
        return list(self._by_key.values())

    def find(self, *values: object) -> dict[str, Any] | None:
        """The result whose key fields have these values, None if there is none yet."""
        return self._by_key.get(_as_text(values))

    def add(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Write a result with the conditions as a line of its own, and return it."""
        written = {**record, **self.conditions}
        with self.path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                # The half line of a killed run ends here.
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(written).encode() + b"\n")
        self._by_key[_as_text([written[name] for name in self.key])] = written
        return written


def _as_text(values: object) -> str:
    return json.dumps(values, sort_keys=True)
