"""The versions that a study's figures depend on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("convfirst-nas", "torch", "torchvision", "triton", "timm", "optuna", "numpy", "scikit-learn")


def versions() -> dict[str, str]:
    """Package -> version, with Python's; `none` where a package is not installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found
