"""Search spaces by name: those that come with the package, rungs of the ladder, and users' own in TOML files.

Schema of the TOML file, every key required but `description`, `stem_stride` and `shortcut`; a choice may be a list or
one value:

    name = "mine"
    description = "what it is for"
    resolution = 32                    # pixels; the default for training and latency. Of a list each network has one
                                       # of its own, to which its images are resized; the total stride divides all
    stem_width = [16, 24, 32]          # multiples of 8
    stem_stride = [1, 2]               # may be left out: 2
    shortcut = "pooled"                # may be left out: "identity", only around the blocks that keep the shape
    head_width = 256                   # multiples of 8; 0 for a classifier right after the pool
    activation = ["silu", "relu"]      # of silu, relu, hard_swish, gelu

    [[stages]]                         # one table a stage, from the stem to the head
    width = [16, 24, 32]               # multiples of 8
    kernel_size = [3, 5, 7]            # odd
    group_width = [1, 8, 16]           # 1 is depthwise
    expansion = [2, 3, 4]              # fractions allowed
    blocks = [1, 2, 3]
    stride = 1                         # 1 or 2; the stem's stride of 2 comes first, at most 32 in total

Instead of choices of its own, a file may name a rung of the ladder (see `search_spaces.ladder`):

    name = "mine"                      # may be left out
    resolution = [32, 48, 64]
    rung = 5.5
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from search_spaces.ladder import ladder_space
from search_spaces.space import SearchSpace

BUILTIN = resources.files("search_spaces") / "spaces"
# The name of a rung, such as rung5@32 or rung5.25@32,48,64.
_RUNG = re.compile(r"rung([0-9]+(?:\.[0-9]+)?)@([0-9]{1,4}(?:,[0-9]{1,4})*)")
# The keys of a file that names a rung.
_RUNG_KEYS = ("name", "description", "resolution", "rung")


def builtin_spaces() -> tuple[str, ...]:
    """Names of the spaces that come with the package."""
    return tuple(
        sorted(entry.name.removesuffix(".toml") for entry in BUILTIN.iterdir() if entry.name.endswith(".toml"))
    )


def load_space(name_or_path: str) -> SearchSpace:
    """A built-in space or a rung of the ladder by name, or a user's own from a TOML file (see the module's docstring).

    Raises:
        ValueError: no such space, rung or file, not TOML, a wrong key, or an impossible choice.
    """
    if rung := _RUNG.fullmatch(name_or_path):
        try:
            return ladder_space(tuple(map(int, rung[2].split(","))), float(rung[1]))
        except ValueError as error:
            raise ValueError(f"{name_or_path}: {error}") from error
    if name_or_path in builtin_spaces():
        text = (BUILTIN / f"{name_or_path}.toml").read_text(encoding="utf-8")
    # Unlike Path.is_file, this takes names that are too long for any file.
    elif os.path.isfile(name_or_path):
        try:
            # Editors on Windows begin files with a byte-order mark.
            text = Path(name_or_path).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{name_or_path}: is not encoded in UTF-8, which TOML is") from error
        except OSError as error:
            raise ValueError(f"{name_or_path}: cannot be read ({error.strerror})") from error
    else:
        raise ValueError(
            f"{name_or_path}: neither a built-in space ({', '.join(builtin_spaces())}), nor a rung such as rung5@32, "
            "nor a TOML file that exists"
        )
    if text.startswith("version https://git-lfs.github.com/spec/"):
        raise ValueError(f"{name_or_path}: is Git LFS's pointer to the file, which `git lfs pull` fetches")
    try:
        return _of_tables(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name_or_path}: {error}") from error


def _of_tables(tables: Mapping[str, Any]) -> SearchSpace:
    """The space of a TOML file's tables.

    Raises:
        ValueError: a key is wrong or missing, or a choice is impossible; the message names it.
    """
    if "rung" not in tables:
        return SearchSpace.from_dict(tables)
    rung, resolution = tables["rung"], tables.get("resolution")
    if own := [key for key in tables if key not in _RUNG_KEYS]:
        raise ValueError(f"rung={rung!r} makes all choices, so that {own[0]!r} cannot stand beside it")
    if not isinstance(rung, int | float) or isinstance(rung, bool):
        raise ValueError(f"rung={rung!r} is not a number")
    sizes: list[Any] = resolution if isinstance(resolution, list) else [resolution]
    if not sizes or not all(isinstance(size, int) and not isinstance(size, bool) for size in sizes):
        raise ValueError(f"resolution={resolution!r} is neither a number of pixels nor a list of such numbers")
    space = ladder_space(tuple(sizes), rung)
    return replace(space, **{key: tables[key] for key in ("name", "description") if key in tables})
