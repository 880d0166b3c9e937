"""The connection to a Ray cluster, which is started on this machine or is there already."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kernels.machine import cores
from nas.cluster import tasks
from nas.cluster.nodes import LATENCY
from nas.errors import UsageError, message_line
from nas.training.workers import ENVIRONMENT

CONNECT_SECONDS = 5.0
HEALTH_SECONDS = 20.0
NO_CLUSTER = "no Ray cluster answers there; the cluster's token must be known here, see docs/cluster.md"
# Python's own interval is 5 ms.
SWITCH_SECONDS, DEFAULT_SWITCH_SECONDS = 5e-4, sys.getswitchinterval()
PACKAGES = ("nas", "search_spaces", "kernels", "studies")
# A token is where Ray looks for one; it takes it only if it is told to.
TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
# Where it is 0, Ray's nodes take 127.0.0.1 for their address.
LOOPBACK_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
TOKEN_FILE = Path(".ray", "auth_token")


def ray_module(flag: str) -> Any:
    """The module ray, with settings that it reads when it is imported.

    Raises:
        UsageError: it is not installed.
    """
    # Nothing is sent to Ray's makers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A task that takes more memory than there is would be repeated for ever.
    os.environ.setdefault("RAY_task_oom_retries", "1")
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise UsageError(f"{flag}: Ray is not installed; pip install 'convfirst-nas[ray]' brings it") from error


def connect(address: str | None, cpus: int | None = None) -> Any:
    """Connect this process to a cluster, and return the module ray; `disconnect` ends it.

    Args:
        address: `auto` or HOST:PORT of a cluster that is up; None starts one on this machine, which ends with this
            process.
        cpus: CPUs that a new cluster offers (default: the cores that this process may use).

    Raises:
        UsageError: Ray is not installed, or the cluster cannot be started or joined.
    """
    flag = "--ray" if address is None else f"--ray-address {address}"
    if address is not None:
        _require_answer(flag, address)
        _use_token()
        _require_cluster(flag, address)
    else:
        # Nobody else needs to reach it: it listens on loopback only.
        os.environ.setdefault(LOOPBACK_VARIABLE, "0")
    ray = ray_module(flag)
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    environment: dict[str, Any] = {"env_vars": ENVIRONMENT | tasks.ENVIRONMENT}
    if address is None:
        options |= {
            # Without this, Ray joins a cluster that happens to be up.
            "address": "local", "num_cpus": cores() if cpus is None else cpus, "resources": {LATENCY: 1.0},
            "include_dashboard": False,
        }  # fmt: skip
    else:
        options["address"] = address
        # The nodes run the code of this process.
        environment |= {"py_modules": _own_packages(), "excludes": ["**/__pycache__"]}
    # Ray would end this process at once when it is told to end.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        ray.init(**options, runtime_env=environment)
    # Ray raises whatever comes: a RuntimeError for other versions, a ConnectionError for a wrong token.
    except Exception as error:
        with contextlib.suppress(Exception):
            ray.shutdown()
        raise UsageError(f"{flag}: {_why(error)}") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)
    _be_silent()
    # A thread that waits for a worker has little to do, and would wait as long again for the one that records.
    sys.setswitchinterval(SWITCH_SECONDS)
    return ray


def disconnect(ray: Any) -> None:
    """End the connection, and a cluster that was started by it."""
    sys.setswitchinterval(DEFAULT_SWITCH_SECONDS)
    with contextlib.suppress(Exception):
        ray.shutdown()


def _require_answer(flag: str, address: str) -> None:
    """Check that something listens there: Ray would try for minutes.

    Raises:
        UsageError: nothing does.
    """
    if address == "auto":
        return
    if address.startswith("ray://"):
        raise UsageError(f"{flag}: Ray Client is not supported; start the search on a node, with --ray-address auto")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"{flag}: is neither auto nor HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UsageError(f"{flag}: does not answer ({error})") from error


def _require_cluster(flag: str, address: str) -> None:
    """Check that what listens there is a Ray cluster that takes this process's token: Ray itself would try for minutes,
    and print a line of its own each second.

    Raises:
        UsageError: it is not, or Ray is not installed.
    """
    if address == "auto":
        return
    ray_module(flag)
    command = "from ray.scripts.scripts import main; main()"
    line = [sys.executable, "-c", command, "health-check", "--address", address]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=HEALTH_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise UsageError(f"{flag}: {NO_CLUSTER}") from error
    if done.returncode:
        said = [each.strip() for each in done.stderr.splitlines() if "Error" in each]
        # "ray.exceptions.AuthenticationError: RPC error: InvalidAuthToken: ... is missing. Ensure that ..."
        raise UsageError(f"{flag}: {said[-1].partition(': ')[2].partition('. ')[0] if said else NO_CLUSTER}")


def _use_token() -> None:
    """Have Ray show its token, where there is one; Ray reads this when it is imported."""
    there = any(os.environ.get(name) for name in TOKEN_VARIABLES) or (Path.home() / TOKEN_FILE).is_file()
    if there:
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _own_packages() -> Sequence[str]:
    return [str(Path(str(importlib.import_module(name).__file__)).parent) for name in PACKAGES]


def _why(error: BaseException) -> str:
    """The reason why Ray did not start or join, in a line."""
    text = str(error)
    if "Version mismatch" in text:
        # "Version mismatch: The cluster was started with:\n    Ray: 2.9.0\n    Python: 3.11.7\nThis process ..."
        return " ".join(text.split())
    if isinstance(error, ConnectionError):
        return f"{message_line(error)}; a node must run on this machine, and know the cluster's token"
    return message_line(error)


def _be_silent() -> None:
    """Keep Ray from printing, between the lines of this process's own, what befalls its workers: that becomes the
    reason of a candidate that failed."""
    with contextlib.suppress(ImportError):
        worker: Any = importlib.import_module("ray._private.worker")
        if hasattr(worker, "print_to_stdstream"):
            worker.print_to_stdstream = lambda *arguments, **named: None
