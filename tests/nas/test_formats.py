"""ONNX and torch.export's programs of an exported network, and all of them timed side by side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nas.config import LatencyConfig
from nas.errors import UsageError
from nas.export import bench as benches
from nas.export import formats
from nas.export.bench import bench, remarks, tables
from nas.export.directories import COMPILED, FUSED, ONNX, PROGRAM, Exported, read, write
from nas.export.formats import ExportFormat, makers, write_onnx, write_programs
from nas.latency import onnx_graph
from nas.latency.engines import ENGINES
from search_spaces.timm_config import timm_config
from tests.conftest import LFS_POINTER, make_tiny_space

CLASSES, RESOLUTION = 3, 16
DEPLOYMENT = LatencyConfig(device="cpu", engine="torchscript", resolution=RESOLUTION, num_classes=2, precision=0.9,
                           seconds=0.1)  # fmt: skip


def network(activation: str = "silu", weights: bool = True) -> Exported:
    """As `export` makes one, of a tiny architecture."""
    import json

    arch = replace(make_tiny_space().anchor(), activation=activation, shortcut="pooled")
    section = {
        "name": "convfirst_1ms_t001", "arch": str(arch), "arch_id": arch.arch_id,
        "arch_spec": json.loads(arch.to_json()), "weights": "proxy" if weights else None,
        "study": {"name": "s", "trial": 1, "storage": "x", "space": "tiny", "begun": "now", "versions": {}},
        "accuracy": {
            "proxy": 0.5, "data": {"source": "digits", "resolution": 16}, "seed": 0,
            "training": {"steps": 2, "batch_size": 8, "learning_rate": 1e-3},
        },
        "latency": {
            "median_ms": 0.25, "p20_ms": 0.2, "p80_ms": 0.3, "interval_share": None, "stage": "search", "blocks": [],
            "capped": False, "throttled": False,
            "computational_efficiency": None, "peak_macs_per_s": None, "deployment": DEPLOYMENT.__dict__,
            "device": {"kind": "cpu", "name": "another", "driver": "", "torch": "", "triton": ""},
            "anchor": {"arch_spec": json.loads(make_tiny_space().anchor().to_json()), "median_ms": 0.5},
        },
    }  # fmt: skip
    torch.manual_seed(0)
    own = arch.build(CLASSES)
    for module in own.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
    config = timm_config(arch, CLASSES, RESOLUTION, convfirst=section)
    return Exported(config, dict(own.state_dict()) if weights else None)


def images(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("activation", ["silu", "relu", "hard_swish", "gelu"])
def test_onnx_runtime_gives_torchs_logits_of_any_batch(activation: str, tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    made = network(activation)
    path = write_onnx(made, tmp_path)
    assert path == tmp_path / ONNX
    onnx.checker.check_model(onnx.load(path), full_check=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for count in (1, 2, 5):
        x = images(count)
        expected = made.build()(x).detach().numpy()
        np.testing.assert_allclose(session.run(None, {"images": x.numpy()})[0], expected, atol=1e-4)
    graph = onnx.load(path).graph
    assert [value.name for value in (*graph.input, *graph.output)] == ["images", "logits"]
    # Folded into the convolutions.
    assert not [node for node in graph.node if node.op_type == "BatchNormalization"]
    assert [(each.domain, each.version) for each in onnx.load(path).opset_import] == [("", onnx_graph.OPSET)]
    # Of one file, which can be copied.
    assert [path.name for path in tmp_path.iterdir()] == [ONNX]


def test_a_program_gives_torchs_logits_of_any_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_has_compiler", lambda: False)
    notes: list[str] = []
    made = network()
    assert write_programs(made, tmp_path, notes.append) == [tmp_path / PROGRAM]
    assert notes == [
        f"{COMPILED}: left out, there is no C++ compiler here", f"{FUSED}: left out, it is made on a CUDA device"
    ]  # fmt: skip
    program = torch.export.load(tmp_path / PROGRAM).module()
    for count in (1, 2, 5):
        torch.testing.assert_close(program(images(count)), made.build()(images(count)), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not formats._has_compiler(), reason="no C++ compiler: AOTInductor was not tested")
def test_a_compiled_package_gives_torchs_logits_of_any_batch(tmp_path: Path) -> None:
    made = network()
    assert tmp_path / COMPILED in write_programs(made, tmp_path, lambda line: None)
    loaded: Any = torch._inductor.aoti_load_package(str(tmp_path / COMPILED))
    for count in (1, 3):
        x = images(count).contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(loaded(x), made.build()(x), atol=1e-4, rtol=1e-4)


@pytest.mark.kernels
def test_a_program_of_the_fused_operators(tmp_path: Path, kernel_device: torch.device) -> None:
    made = network()
    path = formats._fused_file(made.build(), RESOLUTION, kernel_device, torch.float32, tmp_path / FUSED)
    program = torch.export.load(path)
    assert any("convfirst.block" in str(node.target) for node in program.graph.nodes)
    x = images(3).to(kernel_device).contiguous(memory_format=torch.channels_last)
    expected = made.build().to(kernel_device)(x)
    torch.testing.assert_close(program.module()(x), expected, atol=1e-3, rtol=1e-3)


def test_what_does_not_compile_here_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("CppCompileError: no headers\nand more")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", failing)
    monkeypatch.setattr(formats, "_has_compiler", lambda: True)
    notes: list[str] = []
    assert write_programs(network(), tmp_path, notes.append) == [tmp_path / PROGRAM]
    assert notes[0] == f"{COMPILED}: left out, it does not compile here (RuntimeError: CppCompileError: no headers)"


@pytest.mark.kernels
def test_a_directory_is_served_with_fused_kernels(tmp_path: Path, kernel_device: torch.device) -> None:
    """As its README says."""
    import timm

    import kernels

    made = network()
    (folder,) = write([made], tmp_path / "out")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval().to(kernel_device)
    fused = kernels.fuse(model, dtype=torch.float32)
    assert all(status.fused for status in fused.fusion)
    x = images(2).to(kernel_device).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(fused(x), made.build().to(kernel_device)(x), atol=1e-3, rtol=1e-3)


def test_what_gives_other_logits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = torch.export.load

    class Wrong:
        def __init__(self, path: Path) -> None:
            self.program = load(path)

        def module(self) -> Any:
            right = self.program.module()
            return lambda x: right(x) * 1.01

    monkeypatch.setattr(torch.export, "load", Wrong)
    with pytest.raises(UsageError, match=rf"{PROGRAM}: gives other logits than torch"):
        formats.program_file(network().build(), RESOLUTION, tmp_path / PROGRAM)


@pytest.mark.parametrize("wanted", [ExportFormat.ONNX, ExportFormat.TORCH_EXPORT])
def test_without_weights_nothing_is_deployed(wanted: ExportFormat, tmp_path: Path) -> None:
    (make,) = makers([wanted, ExportFormat.TIMM], lambda line: None)
    with pytest.raises(UsageError, match=f"--format {wanted}: convfirst_1ms_t001 has no weights"):
        write([network(weights=False)], tmp_path / "out", [make])
    assert not (tmp_path / "out").exists()


def test_without_its_packages_onnx_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(UsageError, match=r"--format onnx: onnxruntime is not installed \(pip install"):
        write_onnx(network(), tmp_path)


# -- Side by side ----------------------------------------------------------------------------------------------------


@pytest.fixture
def quick_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the compiler, which takes half a minute a network."""
    monkeypatch.setattr(benches, "ENGINES", {name: ENGINES[name] for name in ("eager", "torchscript")})


@pytest.mark.usefixtures("quick_engines")
@pytest.mark.parametrize("weights", [False, True])
def test_every_format_is_timed(weights: bool, tmp_path: Path) -> None:
    make = makers([ExportFormat.ONNX], lambda line: None) if weights else []
    (folder,) = write([network(weights=weights)], tmp_path / "out", make)
    rows = bench([(folder, read(folder))], DEPLOYMENT)
    files = {"model.onnx"} if weights else set()
    assert {row.what for row in rows} == {"eager", "torchscript", "torch.export", *files}
    for row in rows:
        assert row.latency is not None, row.reason
        assert 0 < row.latency.p20_ms <= row.latency.median_ms <= row.latency.p80_ms
    assert {row.what: row.recorded_ms for row in rows if row.recorded_ms} == {"torchscript": 0.25}
    (table,) = tables(rows, "here")
    assert table.row_count == len(rows)
    assert all("left out" not in line for line in remarks(rows))


@pytest.mark.usefixtures("quick_engines")
def test_a_file_that_does_not_run_here_is_told_and_the_rest_timed(tmp_path: Path) -> None:
    (folder,) = write([network()], tmp_path / "out")
    for name in (COMPILED, PROGRAM):
        (folder / name).write_bytes(b"of another machine")
    (folder / ONNX).write_text(LFS_POINTER)
    rows = bench([(folder, read(folder))], DEPLOYMENT)
    broken = {row.what for row in rows if row.latency is None}
    assert broken == {"AOTInductor", "torch.export", "model.onnx"}
    assert {row.what for row in rows if row.latency} == {"eager", "torchscript"}
    for what in broken:
        assert any(line.startswith(f"convfirst_1ms_t001, {what}: left out (") for line in remarks(rows))
    assert any("model.onnx: left out (model.onnx: " in line and "`git lfs pull`" in line for line in remarks(rows))
    # In another deployment files of one resolution are made anew, and what was recorded is no measure.
    rows = bench([(folder, read(folder))], DEPLOYMENT, resolution=24)
    assert all(row.latency is not None and row.recorded_ms is None for row in rows)


@pytest.mark.usefixtures("quick_engines")
def test_on_the_device_of_the_search_its_anchor_is_the_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told by a clock on which everything takes 2 ms: where the anchor then took 0.5 ms, that is 0.5 ms."""
    made = network()
    made.config["convfirst"]["latency"]["device"] = benches.asdict(benches.DeviceInfo.of(torch.device("cpu")))
    (folder,) = write([made], tmp_path / "out")
    latency = benches.Latency(2.0, 1.0, 3.0, 5, 0.01)
    monkeypatch.setattr(benches.Yardsticks, "time", lambda self, group: [latency] * len(group))
    for row in bench([(folder, read(folder))], DEPLOYMENT):
        assert row.latency is not None
        assert (row.latency.median_ms, row.latency.p20_ms, row.latency.p80_ms) == (0.5, 0.25, 0.75)
    # With other threads it is another measure.
    for row in bench([(folder, read(folder))], replace(DEPLOYMENT, threads=2)):
        assert row.latency == latency
