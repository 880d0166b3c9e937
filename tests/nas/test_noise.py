from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import typer

from nas.config import LatencyConfig
from nas.lab import noise
from nas.lab.noise import exchanges, spread
from nas.latency.isolation import LocalMeter
from nas.latency.values import Latency, Measurement
from search_spaces import ArchSpec


def test_the_spread_is_the_greatest_over_the_least() -> None:
    figures = np.array([[1.0, 2.0, 5.0], [1.5, 2.0, 4.0], [1.2, 2.0, 5.0]])
    assert spread(figures) == pytest.approx([0.5, 0.0, 0.25])


@pytest.mark.parametrize(
    ("figures", "changed", "total"),
    [
        ([[1, 2, 3], [10, 20, 30]], 0, 3),
        ([[1, 2, 3], [2, 1, 3]], 1, 3),
        ([[1, 2, 3], [3, 2, 1]], 3, 3),
        # Three pairs of rounds, of which two disagree on the only pair of networks.
        ([[1, 2], [2, 1], [1, 2]], 2, 3),
        # What was equal and is no longer has changed, if the second is now slower.
        ([[1, 1], [1, 2]], 1, 1),
    ],
)
def test_pairs_that_change_places(figures: list[list[float]], changed: int, total: int) -> None:
    assert exchanges(np.array(figures)) == (changed, total)


def test_it_measures_for_real(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # In this process: starting another takes seconds.
    monkeypatch.setattr(noise, "meter_for", LocalMeter)
    noise.main(networks=2, rounds=2, device="cpu", seconds=0.02)
    printed = capsys.readouterr().out
    for words in ("2 networks, 2 rounds", "raw", "corrected", "of 1 pairs", "ended by the cap", "anchor"):
        assert words in printed


class Meter:
    """Each network, known by its place, takes its place in ms, and all of it more from run to run by the clock."""

    reference_ms = 1.0

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.places: dict[str, int] = {}
        self.closed = False

    def measure_together(self, archs: Sequence[ArchSpec]) -> list[Measurement]:
        assert len(archs) == 1
        place = self.places.setdefault(archs[0].arch_id, len(self.places) + 1)
        raw_ms = self.factor * place
        latency = Latency(place, place, place, 20, interval_share=0.03, capped=place == 2)
        return [Measurement(latency, raw_ms, self.factor, weight_bytes=0, workspace_bytes=0)]

    def close(self) -> None:
        self.closed = True


def test_runs_are_compared_with_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs, the second on a machine half as fast: corrected they agree, raw they are 100 % apart."""
    out = tmp_path / "noise.json"
    asked: list[tuple[LatencyConfig, float | None]] = []
    for factor, reference_ms in ((1.0, None), (2.0, 1.0)):
        meter = Meter(factor)

        def make(config: LatencyConfig, _anchor: ArchSpec, reference_ms: float | None, meter: Meter = meter) -> Meter:
            asked.append((config, reference_ms))
            return meter

        monkeypatch.setattr(noise, "meter_for", make)
        noise.main(networks=3, rounds=2, device="cpu", seconds=0.5, reference_ms=reference_ms, out=out)
        assert meter.closed
        assert len(meter.places) == 3
    assert [(config.seconds, config.resolution, reference_ms) for config, reference_ms in asked] == [
        (0.5, 32, None), (0.5, 32, 1.0),
    ]  # fmt: skip
    runs = json.loads(out.read_text())
    assert runs[1] == {"raw": [[2.0, 4.0, 6.0]] * 2, "corrected": [[1, 2, 3]] * 2, "capped": 2}
    lines = capsys.readouterr().out.splitlines()
    compared = [line for line in lines if "medians of 2 runs" in line]
    assert len(compared) == 2
    assert "100.0%" in compared[0]
    assert "0.0%" in compared[1]
    assert "100.0%" not in compared[1]
    assert all("0 of 3 pairs" in line for line in compared)
    assert "ended by the cap: 2 of 6; interval 3.0% of the median" in lines[-1]
    assert "anchor 1.0000 ms" in lines[-1]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (dict(device="foo"), "--device foo: not a device"),
        (dict(space="nosuch"), "nosuch: neither a built-in space"),
        (dict(seconds=0.0), "seconds=0.0 is not positive"),
        (dict(out=Path("nosuch/figures.json")), "--out nosuch/figures.json: its folder does not exist"),
        (dict(out=Path(__file__)), "holds no figures of an earlier run"),
    ],
)
def test_bad_input_gets_one_line(options: dict[str, object], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended:
        noise.main(**{"networks": 2, "rounds": 2, "device": "cpu", **options})  # type: ignore[arg-type]
    assert ended.value.exit_code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Error: ")
    assert told in line
