"""Servers for tests and for the stress command: PostgreSQL and Ray nodes, on loopback, each gone when it is stopped."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nas.cluster.connection import LOOPBACK_VARIABLE


def postgres_programs() -> Path | None:
    """The folder of PostgreSQL's server programs; Debian keeps them off the PATH."""
    if found := shutil.which("initdb"):
        return Path(found).parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return folders[-1].parent if folders else None


def free_port() -> int:
    """A port on loopback at which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class PostgresServer:
    """A PostgreSQL server on loopback, in a folder of its own.

    Attributes:
        url: its URL without a database.
    """

    def __init__(self, folder: Path, programs: Path) -> None:
        self.folder, self.programs = folder, programs
        # The server refuses to run as root, so root runs it as the account that Debian's package makes.
        self.as_user: dict[str, object] = {}
        if os.geteuid() == 0:
            account = pwd.getpwnam("postgres")
            self.as_user = dict(user=account.pw_uid, group=account.pw_gid, extra_groups=[])
            for parent in (folder, *folder.parents):
                if parent.stat().st_uid == 0 and parent not in (Path("/"), Path("/tmp")):
                    parent.chmod(parent.stat().st_mode | 0o011)
            os.chown(folder, account.pw_uid, account.pw_gid)
        self.port = free_port()
        self.url = f"postgresql+psycopg://tester@127.0.0.1:{self.port}"
        self._run("initdb", "-U", "tester", "--auth=trust", "--no-sync")

    def start(self) -> None:
        folder = self.folder
        options = f"-c listen_addresses=127.0.0.1 -c port={self.port} -c unix_socket_directories={folder} -c fsync=off"
        self._run("pg_ctl", "-w", "-l", str(folder / "log"), "-o", options, "start")

    def stop(self, mode: str = "immediate") -> None:
        self._run("pg_ctl", "-m", mode, "stop")

    def connect(self, database: str) -> Any:
        """A connection of the driver's, on which each statement is a transaction."""
        import psycopg

        return psycopg.connect(f"{self.url.replace('+psycopg', '')}/{database}", autocommit=True)

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self.programs / program), "-D", str(self.folder / "data"), *arguments]
        subprocess.run(command, check=True, cwd=self.folder, capture_output=True, **self.as_user)  # type: ignore[call-overload]


# `ray start` of nodes that all have the loopback address, which Ray otherwise takes for that of a single machine.
RAY_START = """
import sys
from ray._private import services
services.get_node_ip_address = lambda *arguments: "127.0.0.1"
from ray.scripts.scripts import main
sys.argv[0] = "ray"
main()
"""


class RayNodes:
    """The nodes of a Ray cluster on loopback; a context manager, whose end is theirs.

    Attributes:
        address: that of the cluster.
        environment: the environment of searches that join them.
    """

    def __init__(self) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        # The paths of its sockets must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="convfirst-ray-", dir="/tmp"))
        self.environment = os.environ | {
            LOOPBACK_VARIABLE: "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": os.urandom(32).hex(),
        }  # fmt: skip
        self.nodes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> RayNodes:
        return self

    def __exit__(self, *exc: object) -> None:
        for node in reversed(self.nodes):
            self.kill(node)
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(
        self, cpus: int, resources: Mapping[str, float] | None = None, environment: Mapping[str, str] | None = None,
        first: str = "", gpus: int = 0,
    ) -> subprocess.Popen[bytes]:  # fmt: skip
        """Start a node, the first of which is the head, and wait until it has joined.

        Args:
            first: code that the node runs before anything else.
            gpus: number of CUDA devices that it offers, whether it has them or not.

        Raises:
            RuntimeError: it does not start.
        """
        here = ["--head", f"--port={self.address.partition(':')[2]}", "--include-dashboard=false",
                f"--temp-dir={self.folder}"]  # fmt: skip
        role = [f"--address={self.address}"] if self.nodes else here
        command = [
            sys.executable, "-c", first + RAY_START, "start", *role, "--block", f"--num-cpus={cpus}",
            f"--num-gpus={gpus}",
            "--node-ip-address=127.0.0.1", f"--resources={json.dumps(dict(resources or {}))}",
            f"--object-store-memory={2**28}",
        ]  # fmt: skip
        log = self.folder.with_name(f"{self.folder.name}-{len(self.nodes)}.log")
        with log.open("wb") as out:
            node = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
                env=self.environment | {LOOPBACK_VARIABLE: "1"} | dict(environment or {}),
            )  # fmt: skip
        self.nodes.append(node)
        begin = time.monotonic()
        while "Ray runtime started" not in log.read_text():
            if node.poll() is not None or time.monotonic() - begin > 60:
                raise RuntimeError(f"Ray does not start: {log.read_text()[-2000:]}")
            time.sleep(0.2)
        log.unlink()
        return node

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """End a node as a power failure would."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGKILL)
        node.wait()
