"""The folder of what is made once on a machine: tuned tilings and composed data. This module needs no torch."""

from __future__ import annotations

import contextlib
import functools
import getpass
import os
import stat
import tempfile
import warnings
from pathlib import Path

# Where Triton, Matplotlib and most others (torch.hub, Hugging Face, fontconfig; and this project) keep what they keep,
# below the home folder; and the variables that name another place.
PLACES = {"TRITON_HOME": "", "MPLCONFIGDIR": ".config/matplotlib", "XDG_CACHE_HOME": ".cache"}


def cache_folder() -> Path:
    """The cache folder: `$CONVFIRST_CACHE`, or else `convfirst-nas` under `$XDG_CACHE_HOME` (default: `~/.cache`).

    Where nothing can be written in `~/.cache`, as that of an account without a home folder, a temporary folder takes
    its place, and a warning says so once.
    """
    if folder := os.environ.get("CONVFIRST_CACHE"):
        return Path(folder)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or _below_home(".cache") or _stand_in() / ".cache")
    return cache / "convfirst-nas"


def provide_home() -> None:
    """Give libraries, in this process and its children, a temporary folder where they could not write below the home.

    torch also asks for the user's name, which an account may not have either (`docker run --user`).
    """
    for variable, place in PLACES.items():
        if variable not in os.environ and _below_home(place) is None:
            os.environ[variable] = str(_stand_in() / place)
    try:
        getpass.getuser()
    # Until Python 3.12 a KeyError.
    except (KeyError, OSError):
        os.environ["USER"] = f"uid{os.getuid()}"
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_stand_in() / "torchinductor"))


def _below_home(place: str) -> Path | None:
    """A folder below the user's home; None where there is no home, or nothing can be written there."""
    try:
        folder = Path.home() / place
    except RuntimeError:
        return None
    existing = next(parent for parent in (folder, *folder.parents) if os.path.exists(parent))
    return folder if os.access(existing, os.W_OK | os.X_OK) else None


@functools.cache
def _stand_in() -> Path:
    """A temporary folder of this user's own, which takes the place of the home folder."""
    folder = Path(tempfile.gettempdir()) / f"convfirst-nas-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    # Another user may have prepared it: what is read from a cache may be run.
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        folder = Path(tempfile.mkdtemp(prefix=f"{folder.name}-"))
    warnings.warn(f"there is no home folder to write to: caches are in {folder}", stacklevel=2)
    return folder
