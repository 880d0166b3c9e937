"""The versions on which a study's figures depend."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("convfirst-nas", "torch", "torchvision", "triton", "timm", "optuna", "numpy", "scikit-learn")


def versions() -> dict[str, str]:
    """Versions of Python and of each package; `none` where a package is not installed."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = "none"
    return installed
