"""ONNX and torch.export's programs of an exported network, and all of them timed side by side."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torch import Tensor

from nas.config import DataConfig, LatencyConfig
from nas.errors import UsageError
from nas.export import bench as benches
from nas.export import formats
from nas.export.bench import bench, remarks, tables
from nas.export.directories import COMPILED, FUSED, ONNX, PROGRAM, Exported, read, write
from nas.export.formats import ExportFormat, Within, makers, write_onnx, write_programs
from nas.latency import onnx_graph
from nas.latency.engines import ENGINES
from nas.training.images import ImageReader
from search_spaces.timm_config import timm_config
from tests.conftest import LFS_POINTER, make_tiny_space

CLASSES, RESOLUTION = 3, 16
DEPLOYMENT = LatencyConfig(device="cpu", engine="torchscript", resolution=RESOLUTION, num_classes=2, precision=0.9,
                           seconds=0.1)  # fmt: skip


def network(activation: str = "silu", weights: bool = True) -> Exported:
    """As `export` makes one, of a tiny architecture."""
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


# -- What an ONNX file says of itself, and what needs nothing else -----------------------------------------------------


@pytest.mark.parametrize("within", [Within(), Within(normalise=True), Within(softmax=True), Within(True, True)])
def test_an_onnx_file_may_normalise_and_give_probabilities_itself(within: Within, tmp_path: Path) -> None:
    import onnxruntime

    made = network()
    session = onnxruntime.InferenceSession(write_onnx(made, tmp_path, within), providers=["CPUExecutionProvider"])
    mean, std = (torch.tensor(made.config["pretrained_cfg"][name]).view(3, 1, 1) for name in ("mean", "std"))
    shown = torch.rand(2, 3, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(0))
    logits = made.build()((shown - mean) / std)
    expected = (logits.softmax(1) if within.softmax else logits).detach().numpy()
    given = shown if within.normalise else (shown - mean) / std
    np.testing.assert_allclose(session.run(None, {"images": given.numpy()})[0], expected, atol=1e-4)


def test_an_onnx_file_says_what_it_is(tmp_path: Path) -> None:
    import onnxruntime

    made = named(network())
    session = onnxruntime.InferenceSession(write_onnx(made, tmp_path), providers=["CPUExecutionProvider"])
    about = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert about["classes"] == ["cat", "dög", 'naïve \\ " fish']
    assert about["input_size"] == [3, RESOLUTION, RESOLUTION]
    assert (about["mean"], about["std"]) == ([0.4, 0.5, 0.6], [0.2, 0.25, 0.3])
    assert (about["input"], about["output"]) == ("normalised", "logits")
    assert about["origin"]["study"] == "s"
    assert about["origin"]["weights"] == "proxy"


def named(made: Exported) -> Exported:
    config = json.loads(json.dumps(made.config))
    config["label_names"] = ["cat", "dög", 'naïve \\ " fish']
    config["pretrained_cfg"] |= {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
    return Exported(config, made.weights)


def photos(folder: Path) -> list[Path]:
    """Photos of many kinds: large, tall, turned by EXIF, grey, with transparency, tiny."""
    rng = np.random.default_rng(0)

    def pixels(height: int, width: int, channels: int = 3) -> np.ndarray:
        coarse = rng.integers(0, 256, (4, 4, channels)).astype(np.uint8)
        return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))

    folder.mkdir()
    Image.fromarray(pixels(40, 61)).save(folder / "wide.png")
    Image.fromarray(pixels(83, 37)).save(folder / "tall.jpg", quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels(30, 50)).save(folder / "turned.jpg", exif=exif, quality=95)
    Image.fromarray(pixels(30, 30)).convert("L").save(folder / "grey.png")
    Image.fromarray(pixels(25, 31, 4), "RGBA").save(folder / "see-through.png")
    Image.fromarray(pixels(5, 9)).save(folder / "tiny.webp", lossless=True)
    deep = np.asarray(Image.fromarray(pixels(33, 33)).convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(folder / "deep.png")
    # Of other modes: 16 bits in either order, one of them with a colour that is transparent; palettes; print.
    Image.fromarray(deep).save(folder / "deep.tif")
    Image.frombytes("I;16B", (33, 33), deep.byteswap().tobytes()).save(folder / "big-endian.tif")
    holes = np.where(deep > 40_000, 999, deep).astype(np.uint16)
    Image.fromarray(holes).save(folder / "holes.png", transparency=999)
    coloured = Image.fromarray(pixels(31, 41, 4), "RGBA")
    coloured.convert("LA").save(folder / "grey-see-through.png")
    coloured.convert("RGB").quantize(30).save(folder / "palette.png", transparency=3)
    coloured.convert("RGB").quantize(30).save(folder / "palette.gif")
    for mode, name in (("CMYK", "print.jpg"), ("CMYK", "print.tif"), ("1", "bits.png"), ("LAB", "lab.tif")):
        image = coloured.convert("RGB")
        (ImageCms.profileToProfile(image, *map(ImageCms.createProfile, ("sRGB", "LAB")), outputMode="LAB")
         if mode == "LAB" else image.convert(mode)).save(folder / name)  # fmt: skip
    return sorted(folder.iterdir())


@pytest.mark.parametrize("within", [Within(), Within(True, True)])
def test_a_dozen_lines_say_what_is_on_photos_as_the_network_does(within: Within, tmp_path: Path) -> None:
    made = named(network())
    (folder,) = write([made], tmp_path / "out", makers([ExportFormat.ONNX], print, within))
    paths = photos(tmp_path / "photos")
    said = subprocess.run([sys.executable, folder / "classify.py", *paths], capture_output=True, text=True, check=True)
    assert said.stdout.splitlines() == [expected_line(made, path) for path in paths]


def expected_line(made: Exported, path: Path) -> str:
    reader = ImageReader(DataConfig(resolution=RESOLUTION, to_rgb=True))
    mean, std = (torch.tensor(made.config["pretrained_cfg"][name]).view(3, 1, 1) for name in ("mean", "std"))
    probabilities = made.build()(((reader.read(path) / 255 - mean) / std)[None]).softmax(1)[0]
    best = probabilities.argsort(descending=True)[:3]
    return f"{path}: " + ", ".join(f"{made.classes[index]} {probabilities[index]:.1%}" for index in best)


def test_it_says_what_is_missing(tmp_path: Path) -> None:
    (folder,) = write([network()], tmp_path / "out")

    def said(*words: object) -> str:
        return subprocess.run(
            [sys.executable, folder / "classify.py", *map(str, words)], capture_output=True, text=True, check=False
        ).stderr.strip()

    assert said("a.png").endswith(
        "model.onnx: is not there; python run_search.py export DIRECTORY --format onnx makes it of a trained network"
    )
    write_onnx(network(), folder)
    assert said() == "usage: python classify.py PHOTO ..."
    (tmp_path / "no.png").write_text("no image")
    values = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "floats.tif")
    Image.fromarray((values * 1e6).astype(np.int32)).save(tmp_path / "long.tif")
    for path in (tmp_path / name for name in ("no.png", "missing.png", "floats.tif", "long.tif")):
        line = said(path)
        assert line.startswith(f"{path}: cannot be read (")
        assert ("of 32 bits, no value is known to be white" in line) == (path.suffix == ".tif")
        assert "\n" not in line
    # The others are named all the same.
    good = photos(tmp_path / "photos")[0]
    done = subprocess.run(
        [sys.executable, folder / "classify.py", tmp_path / "no.png", good], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stdout.startswith(f"{good}: ")


@pytest.mark.slow
def test_classify_needs_three_packages_and_nothing_else(tmp_path: Path) -> None:
    (folder,) = write([named(network())], tmp_path / "out", makers([ExportFormat.ONNX], print))
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "onnxruntime", "numpy", "pillow"]
    if (done := subprocess.run(install, capture_output=True, text=True, check=False)).returncode:
        pytest.skip(f"not tested: classify.py in an environment of its own; pip says {done.stderr.strip()[-200:]}")
    paths = photos(tmp_path / "photos")
    said = subprocess.run([python, folder / "classify.py", *paths], capture_output=True, text=True, check=True)
    assert said.stdout.splitlines() == [expected_line(named(network()), path) for path in paths]
