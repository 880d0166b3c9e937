from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from nas.config import SearchConfig
from nas.lab import comparison
from nas.lab.invented import FakeEvaluator
from nas.pareto import hypervolume
from nas.search.loop import run


def invoke(main: object, *arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(main)  # type: ignore[type-var]
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


def test_hypervolumes_are_those_of_the_complete_candidates(tmp_path: Path) -> None:
    config = SearchConfig(budget=12, study="tpe0", storage=comparison.url(tmp_path, "tpe0"))
    found = run(config, FakeEvaluator())
    count, volumes = comparison.hypervolumes(tmp_path, "tpe0")
    assert count == 12
    front = found.pareto_front
    # FakeEvaluator's anchor takes 1 ms.
    expected = [hypervolume(front["accuracy"].to_numpy(), front["latency_ms"].to_numpy(), k) for k in (1.0, 2.0, 4.0)]
    assert volumes == pytest.approx(expected)
    assert volumes == sorted(volumes)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(("--sampler", "grid"), "--sampler"), (("--seconds", "0"), "--seconds"), (("--seeds", "0"), "--seeds")],
)
def test_bad_input_is_refused_before_anything_runs(tmp_path: Path, arguments: tuple[str, ...], told: str) -> None:
    code, output = invoke(comparison.main, "--folder", str(tmp_path / "new"), *arguments)
    assert code == 2
    assert told in output
    assert not (tmp_path / "new").exists()


def test_a_folder_that_exists_is_refused(tmp_path: Path) -> None:
    code, output = invoke(comparison.main, "--folder", str(tmp_path))
    assert code == 2
    assert "--folder" in output
    assert not list(tmp_path.iterdir())


def test_a_search_imports_nothing_from_the_folder_that_the_user_stands_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('the json of the user')")
    monkeypatch.chdir(tmp_path)
    # The refusal of an unknown sampler is as far as this needs to come.
    assert comparison.search(tmp_path, "nosuch", 0, 1).wait() == 2
    assert "nosuch" in (tmp_path / "nosuch0.log").read_text()
