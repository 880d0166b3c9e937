"""The folder of what is made once on a machine: tuned tilings and composed data. This module needs no torch."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The cache folder: `$CONVFIRST_CACHE`, or else `convfirst-nas` under `$XDG_CACHE_HOME` (default: `~/.cache`)."""
    if folder := os.environ.get("CONVFIRST_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "convfirst-nas"
