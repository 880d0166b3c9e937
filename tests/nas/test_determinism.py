"""What deterministic trainings cost, and that a study says it when it begins."""

from __future__ import annotations

import os
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

from nas.config import DataConfig, LatencyConfig, ProxyConfig, SearchConfig
from nas.errors import CandidateFailed, UsageError
from nas.lab import determinism as determinism_lab
from nas.lab.invented import FakeEvaluator
from nas.search import real_evaluator as evaluate
from nas.search.loop import run
from nas.search.machine import Machine
from nas.search.progress import PlainProgress
from nas.training import determinism, proxy
from studies import Store
from tests.conftest import TINY_TOML, make_tiny_space
from tests.nas.test_proxy import easy_data

QUICK = ProxyConfig(steps=2, batch_size=4, threads=1)


def invoke(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(determinism_lab.main)
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


def make_evaluator(monkeypatch: pytest.MonkeyPatch, deterministic: bool = True) -> Machine:
    """One that takes its device for a GPU, once it is made."""
    monkeypatch.setattr("nas.training.data.load", lambda config, note, largest: easy_data())
    # Its workers, which train nothing here, would be started.
    monkeypatch.setattr(Machine, "_get_ready", lambda self: None)
    config = SearchConfig(
        space=make_tiny_space(), data=DataConfig(resolution=16), proxy=replace(QUICK, deterministic=deterministic),
        latency=LatencyConfig(device="cpu", engine="eager"),
    )  # fmt: skip
    evaluator = Machine(config)
    evaluator.station.device = SimpleNamespace(type="cuda")  # type: ignore[assignment]
    return evaluator


@pytest.fixture
def quick(tmp_path: Path) -> tuple[str, ...]:
    """The command's arguments for small trainings."""
    (tmp_path / "tiny.toml").write_text(TINY_TOML)
    return ("--device", "cpu", "--space", str(tmp_path / "tiny.toml"), "--steps", "2", "--rounds", "2")


def test_both_kinds_of_training_are_timed_side_by_side(quick: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    train = proxy.train

    def watched(*args: object, **kwargs: object) -> proxy.ProxyResult:
        asked.append(args[2].deterministic)  # type: ignore[attr-defined]
        return train(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(proxy, "train", watched)
    code, output = invoke(*quick)
    assert code == 0, output
    assert "deterministic / default" in output
    assert output.count("1 different losses in 2") == 2
    # Warmed up both, then in turns.
    assert asked == [False, True] * 3


def test_an_operation_without_a_deterministic_algorithm_is_told(
    quick: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*args: object, **kwargs: object) -> None:
        raise RuntimeError("histc does not have a deterministic implementation, but you set ...\nand so on")

    monkeypatch.setattr(proxy, "train", train)
    code, output = invoke(*quick)
    assert code == 1
    assert output == "--device cpu: histc does not have a deterministic implementation, but you set ...\n"


def test_an_unknown_space_gets_one_line() -> None:
    code, output = invoke("--device", "cpu", "--space", "nosuch")
    assert code == 2
    assert "--space" in output


def test_the_line_says_what_it_costs_and_what_it_gives() -> None:
    found = determinism.Determinism(2.0, 3.0, default_losses=3, deterministic_losses=1, steps=40, rounds=3)
    assert str(found) == (
        "with --deterministic training takes 1.50 times as long here; equal trainings gave the same loss with it, "
        "3 different losses without (the anchor, 40 steps, 3 of either kind in turns)"
    )


def test_it_is_measured_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    line = make_evaluator(monkeypatch).determinism()
    assert line is not None
    assert "the same loss with it, the same loss without (the anchor, 2 steps, 3 of either kind" in line
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_on_a_cpu_or_where_nobody_asks_there_is_nothing_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = make_evaluator(monkeypatch)
    evaluator.station.device = torch.device("cpu")
    assert evaluator.determinism() is None
    # The measurement takes some ten seconds, which a search has better use for.
    assert make_evaluator(monkeypatch, deterministic=False).determinism() is None


def test_where_it_does_not_work_a_search_that_asks_for_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise CandidateFailed("histc has none")

    evaluator = make_evaluator(monkeypatch)
    monkeypatch.setattr(evaluate, "measure_apart", fail)
    with pytest.raises(UsageError, match=r"--deterministic: not on .*histc has none"):
        evaluator.determinism()


def test_what_else_goes_wrong_stops_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second process may find no place on a GPU that is for one alone, say."""

    def fail(*args: object) -> None:
        raise RuntimeError("the child process ended with status 1")

    evaluator = make_evaluator(monkeypatch)
    monkeypatch.setattr(evaluate, "measure_apart", fail)
    assert "could not be measured (the child process ended with status 1)" in str(evaluator.determinism())


class Costly(FakeEvaluator):
    def determinism(self) -> str:
        return "it costs a lot"


class Refusing(FakeEvaluator):
    def determinism(self) -> str:
        raise UsageError("--deterministic: not here")


def test_a_study_says_it_when_it_begins_and_not_again(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    for budget, said in ((2, 1), (3, 0)):
        text = StringIO()
        run(SearchConfig(budget=budget, storage=storage), Costly(), PlainProgress(Console(file=text)))
        assert text.getvalue().count("it costs a lot") == said


def test_a_refused_study_is_not_made(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    with pytest.raises(UsageError, match="not here"):
        run(SearchConfig(budget=2, storage=storage), Refusing())
    store = Store.open(storage, create=False)
    assert store is None or not store.summaries()


@pytest.mark.gpu
def test_deterministic_trainings_agree_on_cuda() -> None:
    code, output = invoke("--steps", "20", "--rounds", "2")
    assert code == 0, output
    assert "1 different losses" in output.splitlines()[-2]


@pytest.mark.gpu
def test_a_search_on_cuda_measures_it() -> None:
    found = determinism.measure_apart(make_tiny_space().anchor(), ProxyConfig(steps=20), "cuda", 16)
    assert found.deterministic_losses == 1
    assert found.ratio > 0


def test_random_images_are_the_same_each_time() -> None:
    one, two = determinism.random_images(8), determinism.random_images(8)
    tensors: list[tuple[Tensor, Tensor]] = [
        (one.train_images, two.train_images), (one.train_labels, two.train_labels), (one.val_images, two.val_images),
    ]  # fmt: skip
    assert all(torch.equal(first, second) for first, second in tensors)
