"""What an installation contains."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_all_rooms_are_installed_but_the_labs() -> None:
    """A room that is forgotten in pyproject.toml works in a checkout, and is missing where the project is installed."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {
        path.parent.relative_to(ROOT)
        for top in ("nas", "search_spaces", "kernels", "studies")
        for path in (ROOT / top).rglob("*.py")
    }
    assert sorted(listed) == sorted(".".join(folder.parts) for folder in folders if "lab" not in folder.parts)


def test_what_the_rooms_read_is_installed_with_them() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    installed = {
        path for package, patterns in data.items() for pattern in patterns for path in
        ROOT.joinpath(*package.split(".")).glob(pattern)
    }  # fmt: skip
    for folder in ("nas/report/templates", "nas/export/templates", "search_spaces/spaces"):
        assert set((ROOT / folder).iterdir()) <= installed
