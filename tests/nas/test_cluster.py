"""Searches on a Ray cluster: what is refused, workers and nodes that are lost, and whole searches on two nodes."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from kernels.device_info import DeviceInfo
from nas import search
from nas.cluster import connection
from nas.cluster.connection import connect, disconnect
from nas.cluster.nodes import LATENCY, Node, alive
from nas.config import DataConfig, LatencyConfig, SearchConfig
from nas.errors import CandidateFailed, UsageError, WorkerDied
from nas.lab import calls
from nas.lab.cluster_busy import busy
from nas.lab.servers import RayNodes
from nas.search.machine import Machine
from nas.training.workers import Call
from studies import StorageError, Store
from tests.conftest import TINY_TOML, candidates_of, make_tiny_space

ROOT = Path(__file__).parents[2]
CPU = LatencyConfig(device="cpu", engine="eager")
HERE = DeviceInfo.of(torch.device("cpu"))


def needs_ray() -> None:
    # It is not imported here: Ray reads its settings when it is.
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: searches on a cluster were not tested")


def row(number: int, alive: bool = True, **resources: float) -> dict[str, Any]:
    """A row of `ray.nodes()`."""
    return {
        "NodeID": f"{number:056x}", "NodeManagerHostname": f"host{number}", "NodeManagerAddress": f"10.0.0.{number}",
        "Alive": alive, "Resources": resources,
    }  # fmt: skip


def test_nodes_that_are_alive_come_in_one_order() -> None:
    rows = [row(2, CPU=8.0, memory=2.0e9), row(3, alive=False, CPU=1.0), row(1, CPU=4.0, GPU=2.0, latency=2.0)]
    first, second = alive(rows)
    assert (first.cpus, first.gpus, first.latencies) == (4.0, 2.0, 2)
    assert (second.cpus, second.gpus, second.latencies, second.memory_bytes) == (8.0, 0.0, 0, 2_000_000_000)
    assert str(second) == "node host2 (10.0.0.2, 00000000)"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nonsense", "--ray-address nonsense: is neither auto nor HOST:PORT"),
        ("host:", "--ray-address host:: is neither auto nor HOST:PORT"),
        ("127.0.0.1:99999", "--ray-address 127.0.0.1:99999: does not answer ("),
        ("ray://head:10001", "--ray-address ray://head:10001: Ray Client is not supported; start the search on a node"),
    ],
)
def test_an_address_at_which_there_is_no_cluster_is_refused_at_once(address: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(message)}"):
        connect(address)


def test_a_port_at_which_nothing_listens_is_refused_at_once() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(UsageError, match=f"^--ray-address {address}: does not answer \\(.*refused"):
            connect(address)


def test_where_ray_is_missing_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"^--ray: Ray is not installed; pip install 'convfirst-nas\[ray\]' brings it"):
        connect(None)


def test_a_cluster_of_other_versions_is_told_in_one_line() -> None:
    error = RuntimeError(
        "Version mismatch: The cluster was started with:\n    Ray: 2.9.0\n    Python: 3.12.1\nThis ..."
    )
    assert connection._why(error) == (
        "Version mismatch: The cluster was started with: Ray: 2.9.0 Python: 3.12.1 This ..."
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(ray_address="auto"), "--ray-address auto: not with --ray, which starts a cluster of its own"),
        (
            dict(latency=replace(CPU, device="cuda:1")),
            "--device cuda:1: with --ray it is cpu or cuda; Ray chooses which",
        ),
        (dict(train_devices=("cpu", "cuda")), "--train-devices cpu,cuda: with --ray it is one kind"),
        (dict(train_devices=("cuda:0",)), "--train-devices cuda:0: with --ray it is cpu or cuda; Ray chooses which"),
    ],
)
def test_what_makes_no_sense_on_a_cluster_is_refused(changes: dict[str, Any], message: str, sqlite_url: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(message)}"):
        search.run(replace(SearchConfig(storage=sqlite_url, ray=True, latency=CPU), **changes))


def test_busy_counts_from_the_end_of_the_first() -> None:
    assert busy([(0.0, 1.0), (0.0, 2.0), (1.0, 2.0)], workers=2) == 1.0
    assert busy([(0.0, 1.0), (0.0, 1.0), (2.0, 3.0), (1.0, 2.0)], workers=2) == 0.5


# -- a cluster of one node -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    needs_ray()
    module = connect(None, cpus=2)
    yield module
    disconnect(module)


def make_pool(ray: Any, count: int = 2) -> Any:
    # This module cannot be imported without Ray.
    return importlib.import_module("nas.cluster.pool").ClusterPool(ray, count, "cpu", threads=1, locked=False)


@pytest.mark.slow
def test_it_listens_on_loopback_only(ray: Any) -> None:
    assert [node.address for node in alive(ray.nodes())] == ["127.0.0.1"]
    children = [process.pid for process in psutil.Process().children(recursive=True)]
    listening = [each for each in psutil.net_connections("tcp") if each.status == "LISTEN" and each.pid in children]
    assert listening
    assert {each.laddr.ip.removeprefix("::ffff:") for each in listening} == {"127.0.0.1"}


@pytest.mark.slow
def test_calls_run_side_by_side_and_each_has_a_worker(ray: Any) -> None:
    pool = make_pool(ray)
    done = list(pool.run([Call(calls.sleep, (0.5,))] * 6))
    assert sorted(each.index for each in done) == list(range(6))
    assert {each.worker for each in done} == {0, 1}
    assert all(each.seconds >= 0.5 for each in done)
    slept = sorted(each.result for each in done)
    assert max(sum(begin <= at < end for begin, end in slept) for at, _ in slept) == 2
    pool.close()


@pytest.mark.slow
@pytest.mark.parametrize(("deaths", "lost"), [(1, False), (9, True)])
def test_a_worker_that_dies_costs_one_retry_and_then_its_candidate(
    deaths: int, lost: bool, ray: Any, tmp_path: Path
) -> None:
    pool = make_pool(ray)
    counter = tmp_path / "deaths"
    done = {each.index: each.result for each in pool.run([
        Call(calls.die, (deaths, str(counter))), Call(calls.sleep, (0.1,)), Call(calls.fail, ()),
    ])}  # fmt: skip
    assert counter.stat().st_size == (2 if lost else 1)
    assert isinstance(done[0], WorkerDied) == lost
    if lost:
        assert str(done[0]) == "its worker died, twice"
    assert isinstance(done[1], tuple)
    assert isinstance(done[2], CandidateFailed)
    assert str(done[2]) == "the loss diverged"
    # The pool is as good as before.
    (again,) = pool.run([Call(calls.sleep, (0.0,))])
    assert isinstance(again.result, tuple)
    pool.close()


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_where_memory_runs_out_a_call_is_repeated_when_the_others_have_ended(
    times: int, ray: Any, tmp_path: Path
) -> None:
    pool = make_pool(ray)
    counter = tmp_path / "calls"
    done = list(pool.run([Call(calls.run_out_of_memory, (times, str(counter))), *[Call(calls.sleep, (0.5,))] * 3]))
    assert [each.index for each in done][-1] == 0
    assert counter.stat().st_size == 2
    assert done[-1].result == 2 if times == 1 else str(done[-1].result) == "out of memory"
    pool.close()


@pytest.mark.slow
def test_a_bug_ends_the_search_with_its_traceback(ray: Any) -> None:
    pool = make_pool(ray)
    with pytest.raises(RuntimeError, match=r"(?s)on a node of the cluster:.*in break_down.*ZeroDivisionError: a bug"):
        list(pool.run([Call(calls.break_down, ())]))
    pool.close()


@pytest.mark.slow
def test_closing_gives_up_calls_that_others_wait_for(ray: Any) -> None:
    pool = make_pool(ray)
    results = pool.run([Call(calls.sleep, (0.1,)), *[Call(calls.sleep, (600.0,))] * 5])
    assert next(results).index == 0
    # A second round waits behind the first, in a thread of its own.
    behind: list[Any] = []
    thread = threading.Thread(target=lambda: behind.extend(pool.run([Call(calls.sleep, (600.0,))] * 3)), daemon=True)
    thread.start()
    time.sleep(0.5)
    begin = time.monotonic()
    pool.close()
    results.close()
    thread.join(30)
    assert not thread.is_alive()
    assert time.monotonic() - begin < 30
    assert all(isinstance(each.result, CandidateFailed) for each in behind)
    # The workers are free again.
    fresh = make_pool(ray)
    assert len(list(fresh.run([Call(calls.sleep, (0.1,))] * 2))) == 2
    fresh.close()


@pytest.mark.slow
def test_a_node_with_another_device_is_refused_by_name(ray: Any) -> None:
    from nas.cluster.stations import Stations

    notes: list[str] = []
    other = replace(HERE, name="Another CPU")
    with pytest.raises(UsageError) as refused:
        Stations(ray, "--ray-address auto", CPU, make_tiny_space().anchor(), other, notes.append)
    node: Node = alive(ray.nodes())[0]
    reason = f"{node} does not measure latency (name: study has Another CPU, now {HERE.name})"
    assert str(refused.value) == f"--ray-address auto: {reason}"
    assert notes == [reason]


@pytest.mark.slow
def test_nothing_runs_on_a_node_while_it_measures(ray: Any) -> None:
    from nas.cluster.stations import Stations

    station = Stations(ray, "--ray", CPU, make_tiny_space().anchor(), None, lambda line: None)
    pool = make_pool(ray)
    with ThreadPoolExecutor(2) as threads:
        measured = [threads.submit(station.call, calls.sleep, 0.7, "cpu") for _ in range(2)]
        trained = [done.result for done in pool.run([Call(calls.sleep, (0.3,))] * 8)]
    spans = [each.result() for each in measured]
    for begin, end in spans:
        others = [*trained, *(each for each in spans if each != (begin, end))]
        assert len(others) == 9
        assert all(other_end <= begin or end <= other_begin for other_begin, other_end in others)
    pool.close()
    station.close()


@pytest.mark.slow
def test_a_deployment_that_does_not_run_there_is_told(ray: Any) -> None:
    from nas.cluster.stations import Stations

    missing = replace(CPU, engine="onnxruntime", runtime="onnxruntime 0.1")
    with pytest.raises(UsageError, match=r"does not measure latency \(--engine onnxruntime: the latencies are of"):
        Stations(ray, "--ray", missing, make_tiny_space().anchor(), None, lambda line: None)


# -- clusters of several nodes -------------------------------------------------------------------------------------


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[RayNodes]:
    """A node that measures and one that trains; each takes the other for another machine."""
    needs_ray()
    with RayNodes() as made:
        for number, resources in enumerate(({LATENCY: 1.0}, {})):
            locks = tmp_path / f"locks {number}"
            locks.mkdir()
            made.start(2, resources, {"CONVFIRST_LOCKS": str(locks)})
        yield made


@pytest.fixture
def command(images: Path, sqlite_url: str, tmp_path: Path) -> list[str]:
    """A search of tiny networks on a few images."""
    (tmp_path / "tiny.toml").write_text(TINY_TOML)
    flags = {
        "--space": str(tmp_path / "tiny.toml"), "--data": str(images), "--proxy-steps": "3", "--proxy-batch": "4",
        "--device": "cpu", "--engine": "eager", "--latency-seconds": "0.02", "--storage": sqlite_url,
        "--sampler": "random",
    }  # fmt: skip
    return [sys.executable, "-u", str(ROOT / "run_search.py"), *(word for pair in flags.items() for word in pair)]


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The status of a search that was started with pipes, and all that it printed."""
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def begun(command: list[str], nodes: RayNodes, *more: str) -> subprocess.Popen[str]:
    line = [*command, "--ray-address", nodes.address, *more]
    return subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=nodes.environment, cwd=nodes.folder
    )


@pytest.mark.slow
@pytest.mark.parametrize("resolutions", [(16,), (16, 24)], ids=["one resolution", "two resolutions"])
def test_two_nodes_find_what_one_machine_finds(
    resolutions: tuple[int, ...], nodes: RayNodes, command: list[str], sqlite_url: str, images: Path, tmp_path: Path
) -> None:
    toml = TINY_TOML.replace("resolution = 16", f"resolution = [{', '.join(map(str, resolutions))}]")
    (tmp_path / "tiny.toml").write_text(toml)
    status, output = ended(begun(command, nodes, "--budget", "8", "--workers", "2"))
    assert status == 0, output
    assert "Ray: 1 node trains, 1 measures latency\n" in output
    assert "budget met: 8 of 8 candidates" in output
    rows = candidates_of(sqlite_url)
    assert {row.worker for row in rows} == {0, 1}
    assert all(row.latencies for row in rows)
    assert {row.resolution for row in rows} == (set(resolutions) if len(resolutions) > 1 else {None})

    # The same networks reach the same accuracies on this machine.
    space = make_tiny_space(resolution=resolutions)
    size = space.default_resolution
    here = Machine(
        SearchConfig(
            space=space, data=DataConfig(source=str(images), resolution=size), workers=1,
            latency=replace(CPU, resolution=size, num_classes=2),
            proxy=replace(SearchConfig().proxy, steps=3, batch_size=4),
        )
    )  # fmt: skip
    from search_spaces import ArchSpec

    for each, done in zip(rows, here.train([ArchSpec.from_json(row.arch) for row in rows]), strict=True):
        assert not isinstance(done.result, CandidateFailed)
        assert done.result.accuracy == each.accuracy
    here.close()


LONG = ("--proxy-steps", "4000", "--workers", "2")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_a_search_whose_trainings_are_long(
    number: int, nodes: RayNodes, command: list[str], sqlite_url: str
) -> None:
    process = begun(command, nodes, "--budget", "20", *LONG)
    assert process.stdout is not None
    for line in process.stdout:
        if "measuring" in line:
            break
    # Until two rounds were proposed: one is trained, and one waits behind it.
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not _running(sqlite_url) >= 4:
        time.sleep(0.5)
    process.send_signal(number)
    begin = time.monotonic()
    status, output = ended(process)
    assert time.monotonic() - begin < 60
    assert status == 130, output
    assert "Traceback" not in output
    assert _running(sqlite_url) == 0


def _running(url: str) -> int:
    """Number of trials that are not closed."""
    try:
        store = Store.open(url, create=False)
        if store is None or store.find_study("convfirst") is None:
            return 0
        trials = store.load_optuna_study("convfirst").get_trials(deepcopy=False)
        store.close()
    except StorageError:
        return 0
    return sum(not trial.state.is_finished() for trial in trials)


@pytest.mark.slow
def test_a_search_whose_trainers_are_gone_says_so_and_goes_on_with_others(command: list[str], sqlite_url: str) -> None:
    needs_ray()
    with RayNodes() as nodes:
        # A head that neither measures nor trains.
        nodes.start(0)
        nodes.start(1, {LATENCY: 1.0})
        trainer = nodes.start(1)
        process = begun(command, nodes, "--budget", "8")
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("2/8"):
                nodes.kill(trainer)
            if line.startswith("no node trains any more: waiting for up to 300 s"):
                nodes.start(1)
        assert process.wait() == 0, lines
    assert any(line.startswith("no node trains any more") for line in lines), lines
    assert sum(row.state == "complete" for row in candidates_of(sqlite_url)) == 8


@pytest.mark.slow
def test_each_training_has_the_gpu_that_ray_gave_it(tmp_path: Path) -> None:
    """The processes are the same, whatever GPU a call gets; that of an earlier one would be another's."""
    needs_ray()
    code = """
import json, sys
from nas.cluster.connection import connect, disconnect
from nas.cluster.pool import ClusterPool
from nas.lab.calls import name_device
from nas.training.workers import Call
ray = connect(sys.argv[1])
pool = ClusterPool(ray, 2, "cuda", threads=1, gpus=2, locked=False)
done = list(pool.run([Call(name_device, (0.3,))] * 12))
print(json.dumps([[each.worker, *each.result] for each in done]))
pool.close()
disconnect(ray)
"""
    with RayNodes() as nodes:
        nodes.start(2, gpus=2, environment={"CUDA_VISIBLE_DEVICES": "4,6"})
        line = [sys.executable, "-c", code, nodes.address]
        done = subprocess.run(line, env=nodes.environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {device for _, device, _ in found} == {"cuda:0", "cuda:1"}
    assert {visible for *_, visible in found} == {"4,6"}


@pytest.mark.slow
def test_a_port_of_another_server_is_refused(command: list[str], tmp_path: Path) -> None:
    needs_ray()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        line = [*command, "--ray-address", address]
        done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 2
    assert done.stderr.replace("\n", " ").startswith(f"Error: --ray-address {address}: no Ray cluster answers there;")


@pytest.mark.slow
def test_a_search_outlives_a_node_that_trains(nodes: RayNodes, command: list[str], sqlite_url: str) -> None:
    third = nodes.start(2, {}, {"CONVFIRST_LOCKS": str(nodes.folder)})
    process = begun(command, nodes, "--budget", "20", "--workers", "4", "--proxy-steps", "150")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("4/20"):
            nodes.kill(third)
            break
    else:
        pytest.fail("it ended before the node was killed")
    status, output = ended(process)
    assert status == 0, output
    rows = candidates_of(sqlite_url)
    assert sum(row.state == "complete" for row in rows) == 20
    assert len({row.arch_id for row in rows}) == len(rows)


@pytest.mark.slow
def test_a_killed_driver_goes_on_with_the_same_command(nodes: RayNodes, command: list[str], sqlite_url: str) -> None:
    killed = begun(command, nodes, "--budget", "16")
    assert killed.stdout is not None
    for line in killed.stdout:
        if line.startswith("5/16"):
            killed.send_signal(signal.SIGKILL)
            break
    else:
        pytest.fail("it ended before it was killed")
    killed.communicate()
    before = {row.trial_id for row in candidates_of(sqlite_url)}
    status, output = ended(begun(command, nodes, "--budget", "16"))
    assert status == 0, output
    assert "going on: " in output
    rows = candidates_of(sqlite_url)
    assert before <= {row.trial_id for row in rows}
    assert sum(row.state == "complete" for row in rows) == 16
    assert len({row.arch_id for row in rows}) == len(rows)
    # Nothing that the killed one had begun is left.
    deadline = time.monotonic() + 30
    while left := [each for each in psutil.process_iter(["name"]) if _trains(each, nodes)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


def _trains(process: psutil.Process, nodes: RayNodes) -> bool:
    """Whether a process is a task of one of these nodes."""
    try:
        ours = {node.pid for node in nodes.nodes} & {parent.pid for parent in process.parents()}
        return bool(ours) and process.cmdline()[:1] in (["ray::train"], ["ray::answer"])
    except psutil.Error:
        return False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("resources", "more", "message"),
    [
        (
            {LATENCY: 1.0}, ["--workers", "9"],
            "--workers 9: more than 2 gain nothing on the cluster's 2 places to train",
        ),
        ({}, [], "no node offers the resource 'latency'; ray start --resources='{\"latency\": 1}' offers it"),
        ({LATENCY: 1.0}, ["--threads", "3"], "no node has 3 CPUs to train on"),
    ],
)  # fmt: skip
def test_a_cluster_that_cannot_do_it_is_told_in_one_line(
    resources: dict[str, float], more: list[str], message: str, command: list[str], sqlite_url: str
) -> None:
    needs_ray()
    with RayNodes() as nodes:
        nodes.start(2, resources)
        status, output = ended(begun(command, nodes, *more))
    assert status == 2
    assert output.endswith(f"{message}\n")
    assert output.count("\n") == 2, output
    store = Store.open(sqlite_url, create=False)
    assert store is None or not store.summaries()


def pretending(folder: Path, package: str) -> dict[str, str]:
    """The environment of a node on which another version of a package seems to be installed."""
    installed = folder / f"other {package}" / f"{package}-9.9.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 9.9\n")
    return {"PYTHONPATH": str(installed.parent)}


@pytest.mark.slow
def test_nodes_that_differ_are_refused_by_name(command: list[str], tmp_path: Path) -> None:
    needs_ray()
    with RayNodes() as nodes:
        nodes.start(1, {LATENCY: 1.0})
        nodes.start(1, {LATENCY: 1.0}, pretending(tmp_path, "triton"))
        nodes.start(1)
        nodes.start(1, {}, pretending(tmp_path, "timm"))
        process = begun(command, nodes, "--budget", "2")
        status, output = ended(process)
    assert status == 0, output
    found = re.findall(r"^node (\S+ \(127\.0\.0\.1, \w{8}\)) does not (measure latency|train) \((.*)\)$", output, re.M)
    ((measuring, _, why), (training, _, versions)) = sorted(found, key=lambda each: each[1])
    assert measuring != training
    assert why == f"triton: this process has {HERE.triton}, the node 9.9"
    assert re.fullmatch(r"timm: this process has \S+, the node 9\.9", versions)
    assert "Ray: 1 node trains, 1 measures latency\n" in output


@pytest.mark.slow
def test_a_cluster_of_another_version_is_refused(command: list[str]) -> None:
    needs_ray()
    with RayNodes() as nodes:
        nodes.start(1, {LATENCY: 1.0}, first="import ray; ray.__version__ = '2.1.0'")
        status, output = ended(begun(command, nodes))
    assert status == 2
    said = f"Error: --ray-address {nodes.address}: Ray version mismatch: cluster has Ray version 2.1.0 but local Ray "
    assert said in " ".join(output.split())
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_cluster_with_another_token_is_refused(command: list[str]) -> None:
    needs_ray()
    with RayNodes() as nodes:
        nodes.start(1, {LATENCY: 1.0})
        nodes.environment["RAY_AUTH_TOKEN"] = os.urandom(32).hex()
        status, output = ended(begun(command, nodes))
    assert status == 2
    said = " ".join(output.split())
    assert f"Error: --ray-address {nodes.address}: RPC error: InvalidAuthToken: Authentication token is " in said
    assert "Traceback" not in said
