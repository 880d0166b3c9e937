"""Faults at random, and what they cost: `python -m nas.lab.stress` searches on real Ray nodes, into a real PostgreSQL.

While it searches, workers are killed, the search's own process is killed and started again, a node is replaced, and the
database is stopped and started again. Only the evaluations are invented: each sleeps. The command prints what it did,
and how many candidates were lost, duplicated, or beyond the budget; it fails unless these are 0.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import psutil
import typer

from nas.cluster.connection import connect, disconnect
from nas.cluster.pool import ClusterPool
from nas.config import SearchConfig
from nas.lab.cluster_busy import Sleeping
from nas.lab.servers import PostgresServer, RayNodes, postgres_programs
from nas.search import run
from nas.search.loop import Event, Silent
from studies import TRAINED, StorageError, Store

STUDY = "stress"
NO_DATABASE = 2
# The kinds of faults, and how often each comes in relation to the others.
FAULTS = {"worker killed": 6, "search killed": 2, "search interrupted": 2, "database restarted": 3, "node replaced": 1}
INTERRUPTED = 130
INTERRUPT_SECONDS = 60.0


class Lines(Silent):
    """Prints notes, and a line for each candidate."""

    begun = False

    def begin(self, complete: int, budget: int) -> None:
        self.begun = True
        print(f"{complete} are complete", flush=True)

    def note(self, line: str) -> None:
        print(line, flush=True)

    def candidate(self, event: Event) -> None:
        print(f"{event.complete}/{event.budget}", flush=True)


def drive(address: str, storage: str, budget: int, workers: int, seconds: float) -> None:
    """Search in this process, until the budget is met.

    Raises:
        Exit: it was interrupted, or the database does not answer; as in a search of a user's, that ends only one that
            is just begun.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    ray, lines = connect(address), Lines()
    try:
        evaluator = Sleeping(ClusterPool(ray, workers, "cpu", threads=1, locked=False), seconds)
        run(SearchConfig(budget=budget, storage=storage, study=STUDY, confirm=0), evaluator, lines)
    except StorageError as error:
        print(error, flush=True)
        raise typer.Exit(1 if lines.begun else NO_DATABASE) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(INTERRUPTED) from error
    finally:
        disconnect(ray)


class Stress:
    """A search that is disturbed.

    Args:
        nodes: the cluster, whose first node is never killed: with it, a cluster without a second head ends.

    Attributes:
        done: number of faults of each kind.
        seen: ids of the trials that had a candidate's row at some time.
    """

    def __init__(
        self, nodes: RayNodes, server: PostgresServer, budget: int, workers: int, seconds: float, seed: int, log: Path
    ) -> None:  # fmt: skip
        self.nodes, self.server, self.budget, self.log = nodes, server, budget, log
        self.storage = f"{server.url}/postgres"
        self.command = [
            sys.executable, "-m", "nas.lab.stress", "--drive", nodes.address, "--storage", self.storage,
            "--budget", str(budget), "--workers", str(workers), "--seconds", str(seconds),
        ]  # fmt: skip
        self.rng = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.seen: set[int] = set()

    def run(self, pause: float) -> None:
        """Search to the end, with a fault every so many seconds on average.

        Raises:
            RuntimeError: the search ends otherwise than by being killed.
        """
        search = self._start()
        while True:
            time.sleep(self.rng.expovariate(1 / pause))
            if search.poll() == NO_DATABASE:
                # The database was away when it began.
                search = self._start()
            elif search.poll() is not None:
                break
            fault = self.rng.choices(list(FAULTS), list(FAULTS.values()))[0]
            if fault == "worker killed":
                workers = [each for each in psutil.process_iter(["cmdline"]) if self._works(each)]
                if not workers:
                    continue
                os.kill(self.rng.choice(workers).pid, signal.SIGKILL)
            elif fault == "search killed":
                search.kill()
                search.wait()
                self._look()
                search = self._start()
            elif fault == "search interrupted":
                search.send_signal(self.rng.choice([signal.SIGINT, signal.SIGTERM]))
                # One that has just begun is still importing.
                if search.wait(INTERRUPT_SECONDS) not in (INTERRUPTED, 0, NO_DATABASE, -signal.SIGINT, -signal.SIGTERM):
                    break
                self._look()
                search = self._start()
            elif fault == "database restarted":
                self.server.stop()
                time.sleep(self.rng.uniform(0.1, 3.0))
                self.server.start()
            else:
                node = self.nodes.nodes.pop()
                self.nodes.kill(node)
                self.nodes.start(2)
            self.done[fault] += 1
        if search.returncode:
            raise RuntimeError(f"the search ended with {search.returncode}: {self.log.read_text()[-2000:]}")

    def _start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as out:
            return subprocess.Popen(self.command, stdout=out, stderr=out, env=self.nodes.environment)

    def _works(self, process: psutil.Process) -> bool:
        """Whether a process evaluates for this cluster."""
        ours = {node.pid for node in self.nodes.nodes}
        try:
            return process.cmdline()[:1] == ["ray::train"] and bool(ours & {each.pid for each in process.parents()})
        except psutil.Error:
            return False

    def _look(self) -> None:
        """Take note of the candidates that are stored now."""
        try:
            store = Store.open(self.storage, create=False)
        except StorageError:
            return
        if store is None:
            return
        study = store.find_study(STUDY)
        self.seen |= {row.trial_id for row in store.candidates(study.study_id)} if study else set()
        store.close()

    def counts(self) -> dict[str, int]:
        """What is in the database at the end."""
        self._look()
        store = Store.open(self.storage, create=False)
        assert store is not None
        study = store.find_study(STUDY)
        assert study is not None
        rows = store.candidates(study.study_id)
        trials = store.load_optuna_study(STUDY).get_trials(deepcopy=False)
        store.close()
        trained = sum(row.state in TRAINED for row in rows)
        numbers = [trial.number for trial in trials]
        return {
            "candidates": trained,
            "failed": sum(row.state == "failed" for row in rows),
            "lost": len(self.seen - {row.trial_id for row in rows})
            + sum(not trial.state.is_finished() for trial in trials)
            + len(set(range(len(trials))) - set(numbers))
            + max(0, self.budget - trained),
            "duplicated": len(rows) - len({row.arch_id for row in rows}) + len(numbers) - len(set(numbers)),
            "beyond the budget": max(0, trained - self.budget),
        }


def main(
    budget: Annotated[int, typer.Option(min=1, help="Candidates of the search.")] = 300,
    workers: Annotated[int, typer.Option(min=1, help="Number of workers.")] = 6,
    seconds: Annotated[float, typer.Option(min=0, help="Seconds of each evaluation.")] = 2.0,
    pause: Annotated[float, typer.Option(min=0.1, help="Seconds between two faults, on average.")] = 4.0,
    seed: Annotated[int, typer.Option(help="Seed of the faults.")] = 1,
    drive_address: Annotated[str, typer.Option("--drive", hidden=True)] = "",
    storage: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Print the faults, and what became of the candidates."""
    if drive_address:
        drive(drive_address, storage, budget, workers, seconds)
        return
    programs = postgres_programs()
    if programs is None:
        raise typer.BadParameter("PostgreSQL's server programs are not installed")
    with RayNodes() as nodes, tempfile.TemporaryDirectory(dir="/tmp") as made_in:
        folder = Path(made_in)
        (folder / "server").mkdir()
        server = PostgresServer(folder / "server", programs)
        server.start()
        try:
            for _ in range(max(2, -(-workers // 2))):
                nodes.start(2)
            stress = Stress(nodes, server, budget, workers, seconds, seed, folder / "log")
            begin = time.monotonic()
            stress.run(pause)
            counts = stress.counts()
        finally:
            server.stop()
    faults = ", ".join(f"{stress.done[name]} times a {name}" for name in FAULTS)
    print(f"{time.monotonic() - begin:.0f} s with {faults}")
    print(", ".join(f"{count} {name}" for name, count in counts.items()))
    raise typer.Exit(bool(counts["lost"] or counts["duplicated"] or counts["beyond the budget"]))


if __name__ == "__main__":
    typer.run(main)
