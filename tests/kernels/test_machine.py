"""Cores and memory that this process may use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from kernels import machine

GIB = 2**30
NEXT = sorted(os.sched_getaffinity(0))[:1] if hasattr(os, "sched_getaffinity") else []


@pytest.mark.skipif(not NEXT, reason="the system has no affinity: that cores respect it was not tested")
def test_cores_are_those_of_the_affinity() -> None:
    program = f"import os; os.sched_setaffinity(0, {set(NEXT)}); from kernels.machine import cores; print(cores())"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["1"]
    assert 1 <= machine.cores() <= (os.cpu_count() or 1)


def cgroup(folder: Path, limit: str, used: int, version: int = 2, dropped: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}[version]
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    line = "total_inactive_file" if version == 1 else "inactive_file"
    (folder / "memory.stat").write_text(f"anon 5\n{line} {dropped}\n")


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_is_what_the_tightest_cgroup_leaves(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "cgroup"
    monkeypatch.setattr(machine, "CGROUPS", root)
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "own")
    own = {1: "4:memory:/outer/inner\n0::/\n", 2: "0::/outer/inner\n"}[version]
    (tmp_path / "own").write_text(own)
    base = root / "memory" if version == 1 else root
    cgroup(base / "outer" / "inner", str(8 * GIB) if version == 1 else "max", GIB, version)
    cgroup(base / "outer", str(3 * GIB), 2 * GIB, version, dropped=GIB // 2)
    assert machine.free_memory_bytes() == min(GIB + GIB // 2, psutil.virtual_memory().available)
    # A container that sees the host's path: its own limits lie at the root.
    (tmp_path / "own").write_text(own.replace("outer", "of-the-host"))
    cgroup(base, str(GIB), GIB - 1000, version)
    assert machine.free_memory_bytes() == 1000
    cgroup(base, str(GIB), 2 * GIB, version)
    assert machine.free_memory_bytes() == 0


def test_free_memory_without_cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "none")
    assert machine.free_memory_bytes() > GIB // 100


@pytest.mark.parametrize("version", [1, 2])
def test_cores_are_no_more_than_the_quotas_of_the_cgroups(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    (tmp_path / "own").write_text({1: "3:cpu,cpuacct:/outer/inner\n", 2: "0::/outer/inner\n"}[version])
    root = tmp_path / "cgroup" / ("cpu,cpuacct" if version == 1 else "")

    def limit(folder: Path, quota: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if version == 2:
            (folder / "cpu.max").write_text(f"{'max' if quota < 0 else quota} 100000\n")
        else:
            (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
            (folder / "cpu.cfs_period_us").write_text("100000\n")

    limit(root / "outer" / "inner", -1)
    assert machine.cores() == 64
    limit(root / "outer", 250_000)
    assert machine.cores() == 3
    limit(root, 30_000)
    assert machine.cores() == 1
