"""Notes and files of invented studies, and optuna-dashboard's own answers about them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna_dashboard import get_note, save_note

import run_search
from nas.config import LatencyConfig, Limits, SearchConfig
from nas.display import showcase
from nas.errors import UsageError
from nas.lab.invented import FakeEvaluator
from nas.recorded import RecordedStudy
from nas.report.dashboard import Server
from nas.search import loop as search
from search_spaces import ArchSpec, SearchSpace
from studies import Store
from studies.display import artifact_folder, write_note
from tests.nas.test_search import candidates, opened

PNG = b"\x89PNG"


def make_config(url: str) -> SearchConfig:
    """Some candidates break a limit, and some fail."""
    return SearchConfig(budget=12, storage=url, latency=LatencyConfig(device="cpu"), limits=Limits(params=250_000))


@pytest.fixture
def config(sqlite_url: str) -> SearchConfig:
    return make_config(sqlite_url)


class Served:
    """A dashboard on a store, until the test ends."""

    def __init__(self, store: Store, folder: Path, host: str = "127.0.0.1") -> None:
        self.server = Server(store, folder, host, 0)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Ends it in its own thread, which would otherwise wait for sockets that are closed under it."""
        # A request that was just answered may have woken the thread, which then has closed all before it is called.
        server = self.server.server
        of_several = getattr(server, "map", {}).values()
        triggers = [each for each in of_several if hasattr(each, "pull_trigger")] or [server.trigger]
        with contextlib.suppress(OSError):
            triggers[0].pull_trigger(server.close)
        self.thread.join(timeout=30)
        assert not self.thread.is_alive()

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.server.url + path, timeout=30) as answer:
            body: bytes = answer.read()
        return body

    def json(self, path: str) -> Any:
        return json.loads(self.get(path))

    def study(self, name: str = "convfirst") -> dict[str, Any]:
        """The dashboard's own answer about a study."""
        listed = self.json("api/studies")["study_summaries"]
        study_id = next(each["study_id"] for each in listed if each["study_name"] == name)
        found: dict[str, Any] = self.json(f"api/studies/{study_id}")
        return found | {"study_id": study_id}


@pytest.fixture(scope="module")
def served_config(tmp_path_factory: pytest.TempPathFactory) -> SearchConfig:
    # The dashboard's own front is that of the objectives, as searched.
    return replace(make_config(f"sqlite:///{tmp_path_factory.mktemp('served') / 'study.db'}"), confirm=0)


@pytest.fixture(scope="module")
def served(served_config: SearchConfig) -> Iterator[Served]:
    """A finished search in the dashboard."""
    search.run(served_config, FakeEvaluator())
    folder = artifact_folder(served_config.storage)
    store = opened(served_config)
    showcase.show(RecordedStudy.open(store, served_config.study), folder)
    made = Served(store, folder)
    yield made
    made.close()
    store.close()


def attrs(trial: dict[str, Any]) -> dict[str, str]:
    return {each["key"]: each["value"] for each in trial["user_attrs"]}


# -- What the dashboard answers --------------------------------------------------------------------------------------


def test_objectives_have_names_and_the_study_a_note(served: Served) -> None:
    study = served.study()
    assert study["objective_names"] == ["accuracy", "latency_ms"]
    note = study["note"]["body"]
    for words in (
        "study `convfirst`",
        "| device | invented",
        "onnxruntime",
        "params at most 250000",
        "| sampler | model",
    ):
        assert words in note


def test_every_trial_says_what_it_is(served: Served, served_config: SearchConfig) -> None:
    """Parameters as they are, attributes, and a note that has the stages as a table."""
    rows = {row.number: row for row in candidates(served_config)}
    trials = served.study()["trials"]
    assert len(trials) == len(rows) > 12, "nothing is over a limit"
    for trial in trials:
        note, told = trial["note"]["body"], attrs(trial)
        row = rows[trial["number"]]
        arch = ArchSpec.from_json(row.arch)
        values = {param["name"]: param["param_external_value"] for param in trial["params"]}
        assert values["stage2_width"] == str(arch.stages[1].width)
        assert values["activation"] == arch.activation
        assert told["arch"] == str(arch)
        assert note.startswith(f"`{arch}`")
        lines = [line for line in note.splitlines() if line.startswith("| ")]
        assert len(lines) == 2 + 1 + len(arch.stages) + 1
        for number, (line, stage) in enumerate(zip(lines[3:-1], arch.stages, strict=True), start=1):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            kernel = f"{stage.kernel_size}x{stage.kernel_size}"
            expected = (number, stage.blocks, kernel, stage.group_width, f"{stage.expansion:g}", stage.width)
            assert cells[:6] == list(map(str, expected))
        if row.state == "complete":
            for name in ("params", "macs", "latency_p20_p80_ms", "computational_efficiency", "memory_mb", "device",
                         "engine", "seconds"):  # fmt: skip
                assert name in told, name
            assert "**complete**" in note
            assert f"accuracy {row.accuracy:.2%}" in note
        else:
            assert row.reason in note
            assert told["reason"] == row.reason


def test_the_dashboards_front_is_ours_and_holds_nothing_that_failed(
    served: Served, served_config: SearchConfig
) -> None:
    study = served.study()
    ours = sorted(opened(served_config).front(served_config.study)["number"])
    assert sorted(trial["number"] for trial in study["best_trials"]) == ours
    states = {trial["number"]: trial["state"] for trial in study["trials"]}
    for row in candidates(served_config):
        expected = {"complete": "Complete", "over_limit": "Pruned", "failed": "Fail"}[row.state]
        assert states[row.number] == expected
        if expected != "Complete":
            assert row.number not in ours
    assert set(states.values()) >= {"Complete", "Pruned"}


def test_members_of_the_front_carry_their_files(served: Served, served_config: SearchConfig) -> None:
    study = served.study()
    front = set(opened(served_config).front(served_config.study)["number"])
    for trial in study["trials"]:
        names = {each["filename"]: each for each in trial["artifacts"]}
        prefix = f"t{trial['number']:04d}"
        if trial["number"] not in front:
            assert names == {}
            continue
        assert set(names) == {
            f"{prefix}_config.json", f"{prefix}_learning_curve.png", f"{prefix}_efficiency_gap.png",
        }  # fmt: skip
        for name, meta in names.items():
            body = served.get(f"artifacts/{study['study_id']}/{trial['trial_id']}/{meta['artifact_id']}")
            if name.endswith(".png"):
                assert meta["mimetype"] == "image/png"
                assert body.startswith(PNG)
            else:
                made = json.loads(body)
                assert made["num_classes"] == 10
                assert made["convfirst"]["arch"] == attrs(trial)["arch"]


def test_what_was_proposed_again_says_so(sqlite_url: str, tiny_space: SearchSpace, tmp_path: Path) -> None:
    config = SearchConfig(
        budget=25, storage=sqlite_url, latency=LatencyConfig(device="cpu"), space=tiny_space, sampler="tpe"
    )
    search.run(config, FakeEvaluator())
    store = opened(config)
    served = Served(store, tmp_path / "files")
    again = [trial for trial in served.study()["trials"] if "duplicate_of" in attrs(trial)]
    assert again, "no duplicate"
    for trial in again:
        assert f"the architecture of trial {attrs(trial)['duplicate_of']}, not" in trial["note"]["body"]
        assert trial["state"] == "Pruned"
    served.close()
    store.close()


# -- Bringing it up to date ------------------------------------------------------------------------------------------


def test_what_is_up_to_date_is_not_made_again(config: SearchConfig) -> None:
    search.run(replace(config, budget=5), FakeEvaluator())
    store, folder = opened(config), artifact_folder(config.storage)
    size = len(store.front(config.study))
    assert showcase.show(RecordedStudy.open(store, config.study), folder) == 3 * size
    files = sorted(folder.iterdir())
    assert len(files) == 3 * size
    assert showcase.show(RecordedStudy.open(store, config.study), folder) == 0
    assert sorted(folder.iterdir()) == files
    # A file that is lost is made again.
    files[0].unlink()
    assert showcase.show(RecordedStudy.open(store, config.study), folder) == 1
    assert sorted(folder.iterdir()) == files
    # Who leaves the front loses its files.
    before = set(store.front(config.study)["number"])
    search.run(replace(config, budget=12), FakeEvaluator())
    assert before - set(store.front(config.study)["number"]), "nobody has left, so nothing was tested"
    showcase.show(RecordedStudy.open(store, config.study), folder)
    assert len(list(folder.iterdir())) == 3 * len(store.front(config.study))
    store.close()


def test_notes_of_old_studies_are_made_and_those_that_users_wrote_stay(config: SearchConfig) -> None:
    search.run(replace(config, budget=3), FakeEvaluator())
    store = opened(config)
    study = store.find_study(config.study)
    assert study is not None
    with store.engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM study_system_attributes WHERE key LIKE 'dashboard:%%note%%'")
    loaded = optuna.load_study(study_name=config.study, storage=config.storage)
    assert get_note(loaded) == ""
    save_note(loaded, "first")
    save_note(loaded, "what I think of it")
    # An old one of ours, longer than what takes its place.
    first = loaded.trials[0]
    write_note(store.optuna_storage, study.study_id, first._trial_id, "old " * 2000)
    showcase.show(RecordedStudy.open(store, config.study), artifact_folder(config.storage))
    assert get_note(loaded) == "what I think of it"
    trial = optuna.trial.Trial(loaded, first._trial_id)
    assert get_note(trial).startswith(f"`{first.user_attrs['arch']}`")
    assert "old" not in get_note(trial)
    store.close()


def test_while_it_is_searched_each_trial_has_its_note_at_once(config: SearchConfig) -> None:
    seen: list[str] = []

    class Looking(search.Silent):
        def candidate(self, event: search.Event) -> None:
            loaded = optuna.load_study(study_name=config.study, storage=config.storage)
            last = loaded.get_trials()[-1]
            seen.append(get_note(optuna.trial.Trial(loaded, last._trial_id)))
            assert "Search for ConvFirst networks" in get_note(loaded)

    search.run(replace(config, budget=3), FakeEvaluator(), Looking())
    assert len(seen) >= 3
    assert all(note.startswith("`") and "| stage |" in note for note in seen)


@pytest.mark.usefixtures("shown")
def test_a_search_ends_with_its_files(config: SearchConfig) -> None:
    front = search.run(replace(config, budget=3), FakeEvaluator()).pareto_front
    assert len(list(artifact_folder(config.storage).iterdir())) == 3 * len(front)


def test_studies_of_nothing_can_be_shown(config: SearchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """None complete; one; and failures only."""
    monkeypatch.setattr("nas.search.rounds.MAX_BARREN", 10)
    search.run(replace(config, time_limit_s=1e-6), FakeEvaluator())
    search.run(replace(config, study="one", budget=1), FakeEvaluator())
    search.run(replace(config, study="none", budget=1, limits=Limits(latency_ms=1e-6)), FakeEvaluator())
    store, folder = opened(config), artifact_folder(config.storage)
    assert showcase.show(RecordedStudy.open(store, config.study), folder) == 0
    assert showcase.show(RecordedStudy.open(store, "one"), folder) == 3
    assert showcase.show(RecordedStudy.open(store, "none"), folder) == 0
    served = Served(store, folder)
    assert served.study()["trials"] == []
    assert len(served.study("one")["best_trials"]) == 1
    assert served.study("none")["best_trials"] == []
    served.close()
    store.close()


# -- Serving ---------------------------------------------------------------------------------------------------------


def test_a_study_is_not_renamed(served: Served, served_config: SearchConfig) -> None:
    """optuna-dashboard copies its trials to another study and deletes it, and all of our rows would go with it."""
    before = served.study()
    request = urllib.request.Request(
        f"{served.server.url}api/studies/{before['study_id']}/rename", b'{"study_name": "mine"}',
        {"Content-Type": "application/json"},
    )  # fmt: skip
    with pytest.raises(urllib.error.HTTPError, match="Conflict") as caught:
        urllib.request.urlopen(request, timeout=30)
    assert "keep their names" in json.loads(caught.value.read())["reason"]
    assert [each["study_name"] for each in served.json("api/studies")["study_summaries"]] == ["convfirst"]
    assert len([row for row in candidates(served_config) if row.accuracy is not None]) == 12


def test_a_search_whose_files_cannot_be_written_ends_with_a_remark(config: SearchConfig, shown: None) -> None:
    folder = artifact_folder(config.storage)
    folder.write_text("in the way")
    result = search.run(config, FakeEvaluator())
    assert result.complete == 12
    assert any(f"the dashboard's files could not be written to {folder}" in remark for remark in result.remarks)


def test_an_address_that_is_taken_gets_one_line(config: SearchConfig, tmp_path: Path) -> None:
    store = Store.open(config.storage, create=True)
    assert store is not None
    first = Served(store, tmp_path / "files")
    with pytest.raises(UsageError, match=rf"--host 127\.0\.0\.1 --port {first.server.port}: cannot listen"):
        Server(store, tmp_path / "files", "127.0.0.1", first.server.port)
    with pytest.raises(UsageError, match=r"--host nosuch\.invalid --port 0: cannot listen"):
        Server(store, tmp_path / "files", "nosuch.invalid", 0)
    first.close()
    store.close()


@pytest.mark.parametrize("host", ["", "a b", "127.0.0.1:80", "a" * 80, "\u00fc..de", "http://localhost"])
def test_a_host_that_is_none_gets_one_line_and_leaves_nothing(host: str, config: SearchConfig, tmp_path: Path) -> None:
    store = Store.open(config.storage, create=True)
    assert store is not None
    with pytest.raises(UsageError, match=rf"^--host {re.escape(host)} --port 0: cannot listen there \(.+\)$"):
        Server(store, tmp_path / "files", host, 0)
    assert not (tmp_path / "files").exists()
    store.close()


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def resolve_to(*addresses: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every name has these addresses."""
    original = socket.getaddrinfo

    def several(host: Any, port: Any, *rest: Any, **named: Any) -> list[Any]:
        if host != "localhost":
            return list(original(host, port, *rest, **named))
        return [entry for address in addresses for entry in original(address, port, *rest, **named)]

    monkeypatch.setattr(socket, "getaddrinfo", several)


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here: a host of two kinds of addresses was not tested")
def test_a_host_with_two_addresses_is_served_at_both(
    config: SearchConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """waitress makes another kind of server then, and once gave each address a port of its own."""
    resolve_to("127.0.0.1", "::1", "127.0.0.1", monkeypatch=monkeypatch)
    store = Store.open(config.storage, create=True)
    assert store is not None
    served = Served(store, tmp_path / "files", "localhost")
    assert served.server.url == f"http://localhost:{served.server.port}/"
    for address in ("127.0.0.1", "[::1]"):
        with urllib.request.urlopen(f"http://{address}:{served.server.port}/api/studies", timeout=30) as answer:
            assert json.loads(answer.read()) == {"study_summaries": []}
    with pytest.raises(UsageError, match=r"--host ::1 --port \d+: cannot listen there \(Address already in use\)"):
        Server(store, tmp_path / "files", "::1", served.server.port)
    served.close()
    store.close()


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here: its addresses in URLs were not tested")
@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_an_ipv6_address_stands_in_brackets(host: str, config: SearchConfig, tmp_path: Path) -> None:
    store = Store.open(config.storage, create=True)
    assert store is not None
    served = Served(store, tmp_path / "files", host)
    assert served.server.url == f"http://[::1]:{served.server.port}/"
    assert served.json("api/studies") == {"study_summaries": []}
    served.close()
    store.close()


def test_an_address_that_this_machine_lacks_does_not_matter_beside_another(
    config: SearchConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """192.0.2.1 is nobody's: it stands for the ::1 of containers without IPv6, whose localhost has it all the same."""
    resolve_to("192.0.2.1", "127.0.0.1", monkeypatch=monkeypatch)
    store = Store.open(config.storage, create=True)
    assert store is not None
    served = Served(store, tmp_path / "files", "localhost")
    assert served.json("api/studies") == {"study_summaries": []}
    served.close()
    with pytest.raises(UsageError, match=r"--host 192\.0\.2\.1 --port 0: cannot listen there \(Cannot assign"):
        Server(store, tmp_path / "files", "192.0.2.1", 0)
    store.close()


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:8080/"),
        ("::", "http://[::1]:8080/"),
        ("::1", "http://[::1]:8080/"),
        ("127.0.0.1", "http://name:8080/"),
    ],
)
def test_the_url_is_one_that_a_browser_opens(address: str, url: str) -> None:
    """Of a server that is not made: the test would let others in."""
    server = object.__new__(Server)
    server.host, server.address, server.port = address if ":" in address else "name", address, 8080
    assert server.url == url


def test_trials_are_told_as_the_dashboard_tells_them(served: Served) -> None:
    """Values that are equal and not the same, like 1 and True, stay apart."""
    from optuna_dashboard import _serializer

    ours: Any = _serializer.serialize_frozen_trial
    mixed = CategoricalDistribution((1, True, 1.0, "1", None, 0))
    others = IntDistribution(0, 4)
    for number, value in enumerate(2 * mixed.choices):
        trial = optuna.trial.create_trial(
            params={"mixed": value, "number": 1}, distributions={"mixed": mixed, "number": others}, values=[0.5, 1.0],
            user_attrs={"arch": "a"},
        )  # fmt: skip
        trial._trial_id = number
        attrs = {f"dashboard:{number}:note_ver": 1, f"dashboard:{number}:note_str:0": "a note"}
        assert repr(ours(10**6, trial, attrs)) == repr(ours.__wrapped__(10**6, trial, attrs))


def test_a_look_at_a_study_is_noticed(served: Served) -> None:
    served.server.looked_at.clear()
    served.server.warm_up()
    served.json("api/studies")
    assert not served.server.looked_at.is_set()
    served.study()
    assert served.server.looked_at.is_set()


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.7, 1.4, 2.1])
def test_the_dashboard_ends_quietly_while_it_draws(config: SearchConfig, seconds: float) -> None:
    """It draws after the first look. One end in twenty, or so, was an abort: by C++ in the thread that draws."""
    search.run(config, FakeEvaluator())
    command = [sys.executable, "-u", run_search.__file__, "dashboard", "--storage", config.storage]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = next(line for line in process.stdout if "http://" in line).split()[1]
        urllib.request.urlopen(f"{url}api/studies/1").read()
        time.sleep(seconds)
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")


@pytest.mark.slow
def test_looking_does_not_disturb_a_running_search(config: SearchConfig, tmp_path: Path) -> None:
    """A search writes for some seconds in a process of its own, while three lookers ask for everything all the time."""
    script = (
        "import sys; from nas import search; from nas.config import *; from nas.lab.invented import FakeEvaluator\n"
        "config = SearchConfig(budget=15, storage=sys.argv[1], latency=LatencyConfig(device='cpu'))\n"
        "print(search.run(config, FakeEvaluator()).complete)"
    )
    search.run(replace(config, study="first", budget=1), FakeEvaluator())
    store, folder = opened(config), tmp_path / "files"
    served = Served(store, folder)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", script, config.storage]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        answers, errors = [0] * 3, list[BaseException]()

        def look(number: int) -> None:
            while process.poll() is None:
                try:
                    for each in served.json("api/studies")["study_summaries"]:
                        served.json(f"api/studies/{each['study_id']}")
                        answers[number] += 1
                except BaseException as error:
                    errors.append(error)
                    return
                time.sleep(0.05)

        lookers = [threading.Thread(target=look, args=(number,)) for number in range(3)]
        for looker in lookers:
            looker.start()
        out, err = process.communicate(timeout=300)
        for looker in lookers:
            looker.join()
    assert errors == []
    assert (process.returncode, out.strip()) == (0, "15"), err
    assert min(answers) > 5
    states = {trial["state"] for trial in served.study()["trials"]}
    assert "Running" not in states
    failed = [trial for trial in served.study()["trials"] if trial["state"] == "Fail"]
    assert all("invented" in attrs(trial)["reason"] for trial in failed)
    served.close()
    store.close()
