from __future__ import annotations

import dataclasses
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from matplotlib.colors import to_hex
from PIL import Image

from nas.display import efficiency_plots as plots
from nas.display.efficiency_plots import plot_efficiency_gap, plot_waterline, stages
from nas.latency.roofline import (
    Block,
    Efficiency,
    Machine,
    NetworkEfficiency,
    arch_blocks,
    conv_layer,
    everything_else,
    ideal_seconds,
    linear_layer,
    single,
)
from search_spaces import load_space

H200 = Machine(macs_per_s=395e12, bytes_per_s=4.3e12)
CPU = Machine(macs_per_s=80e9, bytes_per_s=12e9)
PLOTS = [plot_efficiency_gap, plot_waterline]
Plot = Callable[[Sequence[NetworkEfficiency], Path], None]


def rows(blocks: Sequence[Block], machine: Machine, fused: bool, **slower: float) -> tuple[Efficiency, ...]:
    """Invented times: the ideal one, slower by a factor of the block's kind and some noise, 2 us at least."""
    rng = random.Random(0)
    return tuple(
        Efficiency(
            block, machine, fused,
            max(2e-6, ideal_seconds(block, machine, fused) * slower.get(block.kind, 1.6) * rng.uniform(0.9, 1.1)),
        )
        for block in blocks
    )  # fmt: skip


def anchor(space: str, batch: int, resolution: int, machine: Machine = H200) -> NetworkEfficiency:
    blocks = arch_blocks(load_space(space).anchor(), batch, resolution, 10, itemsize=2)
    # The stem is faster than its bytes allow, as if they came from a cache.
    return NetworkEfficiency(f"{space} anchor", "invented times", rows(blocks, machine, True, stem=0.8), seconds=1e-3)


def of_layers(batch: int = 32) -> NetworkEfficiency:
    """Like a ConvNeXt: 7x7 depthwise layers of few operations that take most of the time."""
    blocks, size = [], 56
    for number, (channels, count) in enumerate(((96, 3), (192, 3), (384, 9), (768, 3))):
        for index in range(count):
            name, pixels = f"stages.{number}.blocks.{index}", batch * size**2
            blocks += [
                single(conv_layer(f"{name}.conv_dw", batch, size, size, channels, channels, 7, 1, 1, 2), "depthwise"),
                single(linear_layer(f"{name}.mlp.fc1", pixels, channels, 4 * channels, 2), "linear"),
                single(linear_layer(f"{name}.mlp.fc2", pixels, 4 * channels, channels, 2), "linear"),
            ]
        size //= 2
    measured = rows(blocks, H200, False, depthwise=9)
    rest = Efficiency(everything_else(), H200, False, 4e-4)
    every = (*measured, rest)
    seconds = sum(row.seconds for row in every if row.seconds is not None)
    return NetworkEfficiency("like a ConvNeXt", "invented times", every, seconds)


@pytest.mark.parametrize("plot", PLOTS)
@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_one_network_and_two_side_by_side(plot: Plot, suffix: str, tmp_path: Path) -> None:
    for number, networks in enumerate(([anchor("small", 256, 32)], [anchor("imagenet", 32, 224), of_layers()])):
        path = tmp_path / f"{number}{suffix}"
        plot(networks, path)
        assert path.stat().st_size > 10_000


def svg_text(plot: Plot, networks: Sequence[NetworkEfficiency], folder: Path) -> str:
    path = folder / "figure.svg"
    plot(networks, path)
    # Matplotlib draws the letters, and notes the text in a comment.
    return "\n".join(re.findall(r"<!-- (.*?) -->", path.read_text(), re.DOTALL))


def test_gap_plot_says_what_it_shows(tmp_path: Path) -> None:
    text = svg_text(plot_efficiency_gap, [anchor("imagenet", 32, 224), of_layers()], tmp_path)
    for expected in (
        "ideal compute time F/peak (ms)", "time over ideal compute time, 1/efficiency", "efficiency gap", "peak",
        "everything else: 0.4 ms", "imagenet anchor", "like a ConvNeXt", "1 ms (one by one", "% of peak achieved",
        "stage1", "stages.3", "depthwise conv", "from caches",
    ):  # fmt: skip
        assert expected in text, expected


def test_areas_of_the_gap_plot_sum_to_the_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is cut off is drawn elsewhere, in the shade that it had."""
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, *_: figures.append(figure))
    # The left network keeps the axis low; depthwise layers are bounded, and not only measured, above it.
    networks = [anchor("imagenet", 32, 224), of_layers()]
    plot_efficiency_gap(networks, Path("unused.png"))
    for axes, network in zip(figures[0].axes, networks, strict=True):
        area: Counter[str] = Counter()
        for bar in (bar for container in axes.containers for bar in container):
            area[to_hex(bar.get_facecolor())] += bar.get_width() * bar.get_height() / 1e3
        computing = [row for row in network.rows if row.block.macs]
        ideal = sum(min(row.ideal_seconds, row.seconds or 0) for row in computing)
        rest = sum(row.seconds or 0 for row in network.rows if not row.block.macs)
        assert area[plots.BOUND_COLOUR] == pytest.approx(ideal)
        assert area[plots.REST_COLOUR] == pytest.approx(rest)
        assert sum(area.values()) == pytest.approx(network.rows_seconds)
        assert any(row.seconds and row.seconds / row.compute_seconds > axes.get_ylim()[1] for row in computing)


def test_waterline_plot_says_what_it_shows(tmp_path: Path) -> None:
    text = svg_text(plot_waterline, [anchor("imagenet", 32, 224), of_layers()], tmp_path)
    for expected in (
        "operational intensity (FLOP/byte)", "throughput (TFLOP/s)", "roofline: 790 TFLOP/s, 4300 GB/s", "waterline: ",
        "achieved: ", "ConvFirst block", "depthwise conv", "no point: everything else", "10% of the time",
    ):  # fmt: skip
        assert expected in text, expected


def test_a_slow_machine_has_smaller_units(tmp_path: Path) -> None:
    assert "throughput (GFLOP/s)" in svg_text(plot_waterline, [anchor("small", 1, 32, CPU)], tmp_path)
    text = svg_text(plot_efficiency_gap, [anchor("small", 1, 32)], tmp_path)
    assert "ideal compute time F/peak (µs)" in text


@pytest.mark.parametrize("plot", PLOTS)
def test_a_single_block_of_an_unknown_kind(plot: Plot, tmp_path: Path) -> None:
    block = dataclasses.replace(single(linear_layer("attention", 64, 64, 64, 2), "linear"), kind="attention")
    network = NetworkEfficiency("one", "invented", (Efficiency(block, CPU, True, 1e-3),), 1e-3)
    assert "attention" in svg_text(plot, [network], tmp_path)


@pytest.mark.parametrize("plot", PLOTS)
def test_what_is_not_measured_is_named(plot: Plot, tmp_path: Path) -> None:
    network = anchor("small", 1, 32)
    missing = (
        network.rows[0],
        *(dataclasses.replace(row, seconds=None) for row in network.rows[1:3]),
        *network.rows[3:],
    )
    with pytest.raises(ValueError, match=r"small anchor: not measured, seconds=None of stage1\.0, stage1\.1$"):
        plot([dataclasses.replace(network, rows=missing)], tmp_path / "figure.png")
    for networks in ([], [network] * 3):
        with pytest.raises(ValueError, match=f"^{len(networks)} networks"):
            plot(networks, tmp_path / "figure.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("plot", PLOTS)
def test_the_suffix_is_one_that_can_be_written(plot: Plot, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="docx"):
        plot([anchor("small", 1, 32)], tmp_path / "figure.docx")


@pytest.mark.parametrize("plot", PLOTS)
def test_a_png_holds_its_description(plot: Plot, tmp_path: Path) -> None:
    plot([anchor("small", 1, 32)], tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as image:
        assert "small anchor, invented times: 1 ms" in image.info["Description"]


def test_stages_of_names() -> None:
    assert stages(["stem", "stage1.0", "stage1.1", "stage2.0", "head"]) == [
        ("stem", 0, 1), ("stage1", 1, 3), ("stage2", 3, 4), ("head", 4, 5),
    ]  # fmt: skip
    names = ["conv_stem", "blocks.0.0.conv_dw", "blocks.0.1.conv_pw", "blocks.1.0.conv", "head.fc", "head.out"]
    assert stages(names) == [("conv_stem", 0, 1), ("blocks.0", 1, 3), ("blocks.1", 3, 4), ("head", 4, 6)]
    assert stages(["layer1.0.conv1"]) == [("layer1", 0, 1)]
    assert stages([]) == []


@pytest.mark.parametrize("plot", PLOTS)
def test_names_are_no_formulas(plot: Plot, tmp_path: Path) -> None:
    """As a formula, this one is wrong and would raise an error."""
    network = dataclasses.replace(anchor("small", 1, 32), title=r"$\frac$", subtitle="$a_b$")
    plot([network], tmp_path / "figure.svg")
    assert r"<!-- $\frac$ -->" in (tmp_path / "figure.svg").read_text(encoding="utf-8")
