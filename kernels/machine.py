"""What of the machine this process may use: cores and memory, as affinity and a container's limits leave them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
# The names of a cgroup's limit, of what it uses, and of the line of its statistics that counts files which the system
# drops when memory is short: of the second version of cgroups, and of the first.
MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def cores() -> int:
    """CPU cores that this process may use: those of its affinity, and no more than the quotas of its cgroups, at least
    1."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([affinity, *(max(1, math.ceil(quota)) for quota in _quotas())])


def free_memory_bytes() -> int:
    """Bytes of memory that this process may still take: those that the machine and each cgroup around it have left."""
    return min([psutil.virtual_memory().available, *_left_in_cgroups()])


def _quotas() -> Iterator[float]:
    """The cores whose time each cgroup may use; nothing of those without a limit ("max", or -1)."""
    for folder in _cgroups("cpu"):
        try:
            if (folder / "cpu.max").exists():
                quota, period = (float(part) for part in (folder / "cpu.max").read_text().split())
            else:
                quota, period = (float((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        except (OSError, ValueError):
            continue
        if quota > 0:
            yield quota / period


def _left_in_cgroups() -> Iterator[int]:
    for folder in _cgroups("memory"):
        for limit, usage, dropped in MEMORY_FILES:
            try:
                most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            # It has no such file, or no limit ("max").
            except (OSError, ValueError):
                continue
            yield max(0, most - used + int(statistics.get(dropped, 0)))


def _cgroups(controller: str) -> Iterator[Path]:
    """The folders of the cgroups of a controller that this process is in, with all those around them."""
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        # The second version has no list of controllers: each folder has them all.
        if not controllers or controller in controllers.split(","):
            root = CGROUPS / controllers
            own = root / path.lstrip("/")
            # In a container the path may be the host's, which is not there: then the root is the container's own.
            yield from (folder for folder in (own, *own.parents) if folder == root or root in folder.parents)
