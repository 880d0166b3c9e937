"""The benchmark's own code, without a GPU: what it measures, what it refuses, what it writes and how it goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from kernels import cost_model
from kernels.lab import benchmark, benchmark_machine, benchmark_report, benchmark_rows
from kernels.lab.benchmark import Case, DeviceLost, Engine, Unavailable
from kernels.lab.benchmark_machine import MachineCeilings
from kernels.lab.benchmark_rows import BLOCKS, CONVFIRST, NETWORKS, PEERS, Block, Network

CPU = torch.device("cpu")
CEILINGS = MachineCeilings(copy_bytes=1e10, product_macs=1e10, launch_seconds=1e-6)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(benchmark.app, [str(argument) for argument in arguments])


# -- What is measured ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axis", "values"),
    [
        ("channels", {32, 64, 128, 256, 512}),
        ("resolution", {112, 56, 28, 14, 7}),
        ("kernel_size", {3, 5, 7}),
        ("group_width", {1, 8, 16}),
        ("expansion", {2, 4, 6}),
        ("activation", {"silu", "relu"}),
        ("batch", {1, 32, 128}),
    ],
)
def test_blocks_cover_the_ranges(axis: str, values: set[object]) -> None:
    assert values <= {getattr(row, axis) for row in BLOCKS}


def test_rows_are_few_distinct_and_all_there() -> None:
    assert len(BLOCKS) <= 24
    for device in ("cuda", "cpu"):
        every = benchmark_rows.rows(device, "all")
        assert len({(row.kind, row.name) for row in every}) == len(every)
        alone = benchmark_rows.rows(device, "blocks") + benchmark_rows.rows(device, "networks")
        assert set(alone) == set(every)
    assert {row.model for row in NETWORKS} == {*CONVFIRST, *PEERS} - {"convfirst_tiny"}
    assert {row.batch for row in NETWORKS} == {1, 128}


def test_a_short_run_has_the_pair_that_a_goal_compares() -> None:
    first = [row.name for row in benchmark_rows.rows("cuda", "all")[:8]]
    assert {benchmark_report.REFERENCE, benchmark_report.PEER} <= set(first)


@pytest.mark.parametrize("row", BLOCKS, ids=lambda row: row.name)
def test_every_block_is_supported_and_has_a_bound(row: Block) -> None:
    found = benchmark.bounds(row, None, cost_model.H200)
    assert found["terms_ms"][found["largest_term"]] == max(found["terms_ms"].values())
    # One launch moves less than three and wastes no more than everything.
    assert 0 < found["roofline_ms"] <= 1.001 * found["layers_roofline_ms"]
    assert found["bound_ms"] >= 0.9 * found["roofline_ms"]


# -- Networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONVFIRST)
def test_reference_networks_have_the_macs_they_claim(name: str) -> None:
    macs, _ = benchmark_rows.count_macs(CONVFIRST[name].build(num_classes=1000), 224)
    assert macs == pytest.approx(1e9 * CONVFIRST[name].gmacs, rel=0.1)


def test_macs_are_those_written_out_by_hand() -> None:
    """Stem 8, one stage of two blocks of width 16: at 32 pixels maps are 16 after the stem and 8 in the blocks."""
    macs, layers = benchmark_rows.count_macs(CONVFIRST["convfirst_tiny"].build(num_classes=10), 32)
    stem = 16 * 16 * 8 * 3 * 9
    first = 8 * 8 * (8 * 9 * 8 + 8 * 32 + 32 * 16)
    second = 8 * 8 * (16 * 9 * 8 + 16 * 64 + 64 * 16)
    head = 16 * 1280 + 1280 * 10
    assert (macs, layers) == (stem + first + second + head, 1 + 3 + 3 + 2)


@pytest.mark.parametrize("name", ["convfirst_tiny", "resnet50"])
def test_folding_keeps_a_network_that_looks_trained(name: str) -> None:
    """Also a ResNet's, whose norms `fold_batch_norms` leaves alone."""
    model = benchmark_rows.as_if_trained(Network(name, 1, 64, 10).build(), 64).double()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.inference_mode():
        expected = model(images)
        torch.testing.assert_close(benchmark_rows.folded(model)(images), expected, rtol=1e-9, atol=1e-9)
    assert expected.std() > 0.01, "the logits of a network whose activations vanish show no error"


# -- What is refused -------------------------------------------------------------------------------------------------


def double(x: Tensor) -> Tensor:
    return 2 * x


def case_of(**forwards: Callable[[Tensor], Tensor]) -> Case:
    """A case whose reference doubles its input, which its engines should do, too."""
    inputs = [torch.randn(3, 4, 5, 5) for _ in range(2)]
    engines = {name: lambda forward=forward: Engine(forward) for name, forward in forwards.items()}
    return Case(inputs, double, 1, 1, engines)  # type: ignore[arg-type]


def broken(x: Tensor) -> Tensor:
    raise RuntimeError("no kernel for this\nand many more lines")


def last_image_wrong(x: Tensor) -> Tensor:
    out = 2 * x
    out[-1, 0, 0, 0] += 0.1
    return out


def not_finite(x: Tensor) -> Tensor:
    # In an image that is not held against the reference.
    out = (2 * x).repeat(3, 1, 1, 1)[: len(x)]
    out[len(x) // 2] = math.inf
    return out


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.timing.WARMUP_SECONDS", 0.0)


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("forward", [last_image_wrong, not_finite])
def test_a_wrong_result_has_no_time(forward: Callable[[Tensor], Tensor]) -> None:
    found = benchmark.measure(case_of(eager=double, fused=forward, compiled=double), CPU, 0.0)
    assert found["fused"].median_ms is None
    assert "wrong result" in str(found["fused"].error)
    for name in ("eager", "compiled"):
        assert found[name].error is None
        assert found[name].relative_error == 0
        assert 0 < found[name].p20_ms <= found[name].median_ms <= found[name].p80_ms  # type: ignore[operator]


@pytest.mark.usefixtures("_quick")
def test_one_engines_failure_is_its_own() -> None:
    case = case_of(eager=double, compiled=broken)

    def absent() -> Engine:
        raise Unavailable("needs CUDA")

    case.engines["fused"] = absent
    found = benchmark.measure(case, CPU, 0.0)
    assert found["compiled"].error == "RuntimeError: no kernel for this"
    assert found["fused"].error == "needs CUDA"
    assert found["eager"].median_ms is not None


def test_the_fused_form_may_be_off_by_twice_eagers_error() -> None:
    assert benchmark.wrong("fused", 2e-4, 1e-4, 1e-2) is None
    assert benchmark.wrong("fused", 2.1e-4, 1e-4, 1e-2) is not None
    assert benchmark.wrong("compiled", 2.1e-4, 1e-4, 1e-2) is None
    assert benchmark.wrong("fused", 9e-3, None, 1e-2) is None
    assert benchmark.wrong("eager", math.nan, None, 1e-2) is not None


@pytest.mark.parametrize(("batch", "images"), [(1, [0]), (3, [0, 1, 2]), (128, [0, 1, 126, 127])])
def test_both_ends_of_a_batch_are_checked(batch: int, images: list[int]) -> None:
    assert benchmark.checked_images(batch) == images


def test_no_memory_is_a_rows_error_and_not_the_runs_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> Case:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")

    monkeypatch.setattr(benchmark, "block_case", no_memory)
    assert "out of memory" in benchmark.measured_row(Block(16, 7, 1), CPU, CEILINGS)["error"]


# -- What is written -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_small_version_end_to_end_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("--device", "cpu", "--minutes", 10, "--out", tmp_path / "out")
    first = invoke(*arguments)
    assert first.exit_code == 0, first.output
    records = [json.loads(text) for text in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [record["kind"] for record in records] == ["machine", "block", "block", "network"]
    for record in records[1:]:
        for engine in ("eager", "compiled"):
            measured = record["contenders"][engine]
            assert measured["error"] is None
            assert measured["relative_error"] < 1e-5
            assert 0 < measured["p20_ms"] <= measured["median_ms"] <= measured["p80_ms"]
            assert measured["workspace_bytes"] > 0
        assert record["contenders"]["fused"]["error"] == "needs CUDA"
        assert record["commit"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["left"] == []
    assert summary["records"] == records
    assert {"device", "driver", "torch", "triton", "timm", "commit", "command", "limits"} <= set(summary)
    assert (tmp_path / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")

    def again(*_: object) -> None:
        raise AssertionError("measured twice")

    monkeypatch.setattr(benchmark, "measured_row", again)
    monkeypatch.setattr(benchmark_machine, "measure_ceilings", again)
    second = invoke(*arguments)
    assert second.exit_code == 0, second.output
    assert "3 rows, 3 of them measured before" in second.output
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == len(records)


@pytest.fixture
def _invented(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and ceilings that cost no time."""

    def row(row: benchmark_rows.Row, *_: object) -> dict[str, Any]:
        return {"macs": 1, "contenders": {"eager": {"median_ms": 1.0, "error": None}}}

    monkeypatch.setattr(benchmark, "measured_row", row)
    monkeypatch.setattr(benchmark_machine, "measure_ceilings", lambda device: CEILINGS)


@pytest.mark.usefixtures("_invented")
def test_what_does_not_fit_the_minutes_is_left_and_named(tmp_path: Path) -> None:
    clock = iter([0.0, 0.0, 40.0, 40.0, 50.0, 55.0])

    def monotonic() -> float:
        return next(clock)

    with pytest.MonkeyPatch.context() as patch:
        # The first block takes 40 seconds, so that the second would end after the minute; the network may still fit.
        patch.setattr(benchmark.time, "monotonic", monotonic)
        done = invoke("--device", "cpu", "--minutes", 1, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    left = json.loads((tmp_path / "summary.json").read_text())["left"]
    assert left == [f"block {benchmark_rows.CPU_BLOCKS[1].name}"]
    assert f"1 rows left, the same command goes on with them: {left[0]}" in done.output


@pytest.mark.usefixtures("_invented")
def test_a_lost_device_ends_the_run_and_not_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing runs after an illegal access; the row that made it must not come first again."""
    with monkeypatch.context() as patch:

        def lost(*_: object) -> dict[str, Any]:
            raise DeviceLost("fused: illegal memory access")

        patch.setattr(benchmark, "measured_row", lost)
        first = invoke("--device", "cpu", "--out", tmp_path)
    assert first.exit_code == 1
    second = invoke("--device", "cpu", "--out", tmp_path)
    assert second.exit_code == 0, second.output
    assert "3 rows, 1 of them measured before" in second.output
    records = json.loads((tmp_path / "summary.json").read_text())["records"]
    assert "illegal memory access" in records[1]["error"]
    assert len(records) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "cuda"), "--device cuda: "),
        (("--device", "tpu"), "--device tpu: "),
        (("--device", "cpu", "--minutes", "0"), "--minutes 0: "),
        (("--device", "cpu", "--minutes", "nan"), "--minutes nan: "),
        (("--device", "cpu", "--only", "stems"), "--only stems: "),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = invoke(*arguments, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert done.output.startswith(message)
    assert len(done.output.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_file_is_no_folder_for_results(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    done = invoke("--device", "cpu", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert done.output.startswith("--out ")
    assert (tmp_path / "out").read_text() == "mine"


# -- What it comes to ------------------------------------------------------------------------------------------------


def record_of(row: benchmark_rows.Row, tuner: str = "fused", **medians_ms: float | None) -> dict[str, Any]:
    contenders = {
        name: {"median_ms": value, "error": None if value else "wrong result", "efficiency": 0.6, "notes": {}}
        for name, value in medians_ms.items()
    }
    if "fused" in contenders:
        contenders["fused"]["notes"] = {"tuner": tuner, "chosen": tuner == "fused"}
    fields = {name: getattr(row, name) for name in row.__dataclass_fields__}
    head = {"kind": row.kind, "name": row.name, "row": fields, "macs": 10**9, "seconds": 1.0}
    return {**head, "contenders": contenders, "bound_ms": 0.5, "bound_term": "dram", "roofline_ms": 0.25}


def synthetic_records() -> list[dict[str, Any]]:
    return [
        record_of(Block(64, 56, 128), fused=1.0, compiled=2.0, eager=4.0),
        record_of(Block(128, 28, 128), fused=1.0, compiled=8.0, eager=9.0),
        # Too wide for the first goal, not for the second.
        record_of(Block(256, 14, 128), fused=2.0, compiled=2.0, eager=1.0, tuner="layer by layer"),
        # Wrong, so in no mean.
        record_of(Block(32, 112, 128), fused=None, compiled=1.0, eager=1.0),
        record_of(Block(64, 56, 1), fused=1.0, compiled=3.0, eager=0.8),
        record_of(Network("convfirst_4.5g", 128), fused=10.0, compiled=30.0, eager=40.0),
        record_of(Network("convnext_tiny", 128), compiled=16.0, eager=20.0),
        {**record_of(Network("resnet50", 128)), "error": "OutOfMemoryError: no memory"},
    ]


def test_means_are_geometric_and_stand_beside_their_goals() -> None:
    found = {each.name: each for each in benchmark_report.statistics(synthetic_records())}

    def value(name: str) -> tuple[float, int, bool | None]:
        each = found[name]
        assert each.value is not None
        return pytest.approx(each.value), each.rows, each.met

    assert value("fused over compiled, batch 128, C <= 128") == ((2 * 8) ** 0.5, 2, True)
    assert value("fused over compiled, batch 128") == ((2 * 8 * 1) ** (1 / 3), 3, None)
    assert value("fused over eager, batch 128") == ((4 * 9 * 0.5) ** (1 / 3), 3, None)
    assert value("fused over compiled, batch 1") == (3, 1, True)
    assert value("share of bound, batch 128, C 64 to 256") == ((0.5 * 0.5 * 0.25) ** (1 / 3), 3, False)
    assert value("share of roofline, batch 128, C 64 to 256") == ((0.25 * 0.25 * 0.125) ** (1 / 3), 3, None)
    assert value("what the tuner chose over eager, least of all blocks") == (0.8, 4, False)
    assert value("b128 convfirst_4.5g fused over b128 convnext_tiny compiled, images/s") == (1.6, 1, True)
    assert value("b128 convfirst_4.5g fused, share of measured peak") == (0.6, 1, True)


@pytest.mark.parametrize("records", [[], synthetic_records()], ids=["nothing measured", "some rows"])
def test_a_report_is_written_of_whatever_there_is(records: list[dict[str, Any]], tmp_path: Path) -> None:
    provenance = {"device": "d", "torch": "2", "commit": "c", "end": "now", "limits": {"copy, TB/s": 4.3}}
    benchmark_report.write(tmp_path, records, provenance)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["records"] == records
    assert {"name", "value", "rows", "goal", "met"} == set(summary["figures"][0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plot.png", "summary.json"]


def test_the_predictions_show_roofline_bound_prediction_and_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "rows", lambda device, only: [BLOCKS[0], Network("convfirst_tiny", 4096, 64, 10)])
    done = invoke("--predict")
    assert done.exit_code == 0, done.output
    titles, _, block, network = ([cell.strip() for cell in text.split("|")[1:-1]] for text in done.output.splitlines())
    first, second = (dict(zip(titles, cells, strict=True)) for cells in (block, network))
    assert (first["roofline us"], first["set by"]) == ("38.0", "tensor")
    for each in (first, second):
        roofline, bound, predicted = (float(each[name]) for name in ("roofline us", "bound us", "predicted us"))
        assert 0 < roofline <= bound <= predicted
        assert each["of roofline"] == f"{roofline / predicted:.0%}"
    problem = benchmark.block_problem(BLOCKS[0], BLOCKS[0].layers(torch.float16, torch.device("meta")), torch.float16)
    tiling = cost_model.ranked(problem)[0]
    assert first["binds"] == cost_model.largest_term(problem, tiling)[0]
    assert first["layer by layer at its floor us"] == "159.9"


def test_long_reasons_are_told_below_the_tables() -> None:
    records = synthetic_records()
    records[0]["contenders"]["compiled"] = {"median_ms": None, "error": "InductorError: this and that"}
    records[1]["contenders"]["fused"] = {"median_ms": None, "error": "needs CUDA", "notes": {}}
    assert benchmark_report.failures(records) == [
        f"block {records[0]['name']}, compiled: InductorError: this and that",
        "network b128 resnet50: OutOfMemoryError: no memory",
    ]


def test_a_line_tells_times_and_reasons() -> None:
    *_, wrong, _, _, _, failed = synthetic_records()
    assert benchmark_report.line(wrong).endswith("fused wrong result, compiled 1, eager 1 ms (1 s)")
    assert benchmark_report.line(failed).endswith("OutOfMemoryError: no memory (1 s)")


# -- On a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_one_block_on_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_rows, "BLOCKS", (Block(64, 28, 32),))
    monkeypatch.setattr(benchmark_rows, "NETWORKS", ())
    done = invoke("--minutes", 3, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    machine, block = json.loads((tmp_path / "summary.json").read_text())["records"]
    # Nothing is faster than the bound, but for the noise of both.
    assert 0 < block["bound_ms"] < 1.2 * block["contenders"]["fused"]["median_ms"]
    for name in ("fused", "compiled", "eager"):
        assert block["contenders"][name]["error"] is None
    limits = machine["limits"]
    assert limits["l2_bytes"] > limits["copy_bytes"]
    assert limits["product_macs"] > 0.9 * limits["mma_macs"]
    assert limits["launch_seconds"] > limits["graph_launch_seconds"] > 0
