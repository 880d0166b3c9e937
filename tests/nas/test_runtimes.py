"""ONNX Runtime and OpenVINO as engines."""

from __future__ import annotations

import gc
import importlib.util
import os
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nas import config as configs
from nas.config import LatencyConfig, SearchConfig
from nas.errors import CandidateFailed, UsageError
from nas.latency import runtimes
from nas.latency.devices import check_device
from nas.latency.engines import ENGINES, InRuntime, Repeated, deploy, ready
from nas.latency.meter import LatencyMeter
from nas.latency.runtimes import peak_bytes
from search_spaces import load_space

ON_CPU = [name for name, engine in ENGINES.items() if "cpu" in engine.devices]
SLOW = {"inductor"}


@pytest.mark.parametrize(
    "engine", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in ON_CPU]
)
@pytest.mark.parametrize(("space", "size"), [("small", 37), ("imagenet", 43)])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_engine_runs_networks_of_each_space(engine: str, space: str, size: int, batch: int, threads: int) -> None:
    network = load_space(space).anchor().build(10).eval()
    config = LatencyConfig(device="cpu", engine=engine, batch_size=batch, resolution=size, threads=threads)
    x = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = network(x)
        actual = deploy(network, config, x)(x)
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("engine", runtimes.RUNTIMES)
def test_inputs_are_bound_without_a_copy(engine: str) -> None:
    """What lies in the bound tensor when the network runs is what it runs on."""
    module = deploy(load_space("small").smallest().build(10), LatencyConfig(device="cpu", engine=engine), X)
    assert isinstance(module, InRuntime)
    x = torch.randn(1, 3, 32, 32)
    run = module.bound(x)
    run()
    first = np.array(run.outputs()[0])
    x.copy_(torch.randn(1, 3, 32, 32))
    run()
    second = np.array(run.outputs()[0])
    assert not np.allclose(first, second)
    torch.testing.assert_close(torch.from_numpy(second), module(x))


X = torch.zeros(1, 3, 32, 32)


@pytest.mark.parametrize("engine", runtimes.RUNTIMES)
def test_what_is_bound_lives_as_long_as_it_is_run(engine: str) -> None:
    """The meter's inputs are channels_last, and so are copied for the runtime: nothing else holds the copy."""
    module = deploy(load_space("small").smallest().build(10), LatencyConfig(device="cpu", engine=engine), X)
    x = torch.randn(1, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    expected = module(x)
    run = module.bound(x)  # type: ignore[operator]
    del x
    gc.collect()
    others = [np.full((1, 3, 32, 32), 1e9, np.float32) for _ in range(50)]
    run()
    torch.testing.assert_close(torch.from_numpy(run.outputs()[0].copy()), expected)
    del others


@pytest.mark.parametrize("engine", runtimes.RUNTIMES)
def test_a_part_is_repeated_on_inputs_of_its_own(engine: str) -> None:
    part = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Hardswish()).eval().requires_grad_(False)
    x = torch.randn(3, 2, 4, 9, 9)
    made = ready(Repeated(part), LatencyConfig(device="cpu", engine=engine), x)
    for actual, each in zip(made(x), x.unbind(0), strict=True):
        torch.testing.assert_close(actual, part(each), rtol=1e-4, atol=1e-5)
    # A layer that is not known here, torch's exporter translates.
    norm = nn.LayerNorm(9).eval().requires_grad_(False)
    made = ready(Repeated(norm), LatencyConfig(device="cpu", engine=engine), x)
    assert isinstance(made, InRuntime)
    torch.testing.assert_close(made(x)[0], norm(x[0]), rtol=1e-4, atol=1e-5)


def test_openvino_infers_in_the_dtype_that_it_is_told() -> None:
    capabilities = runtimes._openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    module = deploy(load_space("small").smallest().build(10), LatencyConfig(device="cpu", engine="openvino"), X)
    told = str(module.runtime.compiled.get_property("INFERENCE_PRECISION_HINT"))  # type: ignore[union-attr]
    assert "float32" in told or "f32" in told
    if "BF16" not in capabilities:
        pytest.skip("this CPU has no bfloat16: OpenVINO's inference in it was not tested")
    config = LatencyConfig(device="cpu", engine="openvino", dtype="bfloat16")
    module = deploy(load_space("small").smallest().build(10), config, X.bfloat16())
    assert "b" in str(module.runtime.compiled.get_property("INFERENCE_PRECISION_HINT"))  # type: ignore[union-attr]


@pytest.mark.parametrize("engine", runtimes.RUNTIMES)
def test_threads_are_those_of_the_deployment(engine: str) -> None:
    for threads in (1, 2):
        config = LatencyConfig(device="cpu", engine=engine, threads=threads)
        runtime = deploy(load_space("small").smallest().build(10), config, X).runtime
        if engine == "openvino":
            assert runtime.compiled.get_property("INFERENCE_NUM_THREADS") == threads  # type: ignore[union-attr]
        else:
            assert runtime.session.get_session_options().intra_op_num_threads == threads  # type: ignore[union-attr]


@pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="needs /proc: that threads are not pinned was not tested"
)
@pytest.mark.parametrize("engine", runtimes.RUNTIMES)
def test_threads_are_pinned_to_no_core(engine: str) -> None:
    module = deploy(load_space("small").smallest().build(10), LatencyConfig(device="cpu", engine=engine, threads=2), X)
    module(X)
    allowed = {
        line
        for task in Path("/proc/self/task").iterdir()
        for line in (task / "status").read_text().splitlines()
        if line.startswith("Cpus_allowed_list")
    }
    assert len(allowed) == 1


# -- Memory ------------------------------------------------------------------------------------------------------------


def test_the_peak_of_results_that_are_needed_at_once() -> None:
    steps = [(["x"], "a", 10), (["a"], "b", 30), (["b"], "c", 5), (["c", "a"], "d", 5), (["d"], "e", 1)]
    # a waits for d while b becomes c.
    assert peak_bytes(steps) == 10 + 30 + 5
    assert peak_bytes([]) == 0


@pytest.mark.parametrize("engine", runtimes.RUNTIMES)
def test_the_memory_of_a_run_is_that_of_the_runtimes_own_tensors(engine: str) -> None:
    """Two convolutions of many channels: the result of the first and of the second are there at once."""
    network = nn.Sequential(nn.Conv2d(16, 64, 1), nn.ReLU(), nn.Conv2d(64, 32, 1)).eval().requires_grad_(False)
    sizes = []
    for batch in (1, 4):
        x = torch.randn(batch, 16, 40, 40)
        made = ready(network, LatencyConfig(device="cpu", engine=engine, batch_size=batch), x)
        assert isinstance(made, InRuntime)
        sizes.append(made.workspace_bytes())
        least = 4 * batch * 40 * 40 * (64 + 32)
        # Layouts are changed at the input and the output.
        assert least <= sizes[-1] <= least + 4 * batch * 40 * 40 * (16 + 32)
    assert sizes[1] == pytest.approx(4 * sizes[0], rel=0.01)


@pytest.mark.parametrize("engine", runtimes.RUNTIMES)
def test_a_meter_measures_latency_and_memory(engine: str) -> None:
    config = LatencyConfig(device="cpu", engine=engine, seconds=0.05)
    meter = LatencyMeter(config, load_space("small").smallest().build(10))
    (measured,) = meter.measure_together([load_space("small").anchor().build(10)])
    assert measured.median_ms > meter.reference_ms
    assert measured.workspace_bytes >= 4 * 16 * 16 * (24 + 72)
    assert 0 < measured.ready_seconds < 10


# -- What does not work ------------------------------------------------------------------------------------------------


@pytest.fixture
def asked_again() -> Iterator[None]:
    runtimes._trouble.cache_clear()
    yield
    runtimes._trouble.cache_clear()


@pytest.mark.parametrize(
    ("engine", "package", "hint"),
    [("onnxruntime", "onnxruntime", "pip install onnxruntime"), ("onnxruntime", "onnx", "pip install onnx"),
     ("openvino", "openvino", "pip install 'convfirst-nas[openvino]'")],
)  # fmt: skip
def test_a_missing_package_is_named_with_what_installs_it(
    engine: str, package: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(
        UsageError, match=rf"--engine {engine}: {package} is not installed \({re.escape(hint)}"
    ) as caught:
        check_device(LatencyConfig(device="cpu", engine=engine))
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("asked_again")
def test_a_broken_package_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a shared library that it needs is missing."""
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text("raise ImportError('libgomp.so.1: cannot open\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=r"--engine onnxruntime: does not run on this machine .*libgomp") as caught:
        runtimes.require("onnxruntime", "float32")
    assert "\n" not in str(caught.value)


def killed(_engine: str, _dtype: str) -> NoReturn:
    os.kill(os.getpid(), signal.SIGILL)
    raise AssertionError


@pytest.mark.usefixtures("asked_again")
def test_a_cpu_without_avx2_ends_a_child_and_not_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "try_out", killed)
    monkeypatch.setattr(runtimes, "_has_avx2", lambda: False)
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2]), *sys.path])
    with pytest.raises(UsageError, match=r"killed by SIGILL; this CPU has no AVX2\); --engine takes another"):
        runtimes.require("openvino", "float32")


@pytest.mark.parametrize("engine", runtimes.RUNTIMES)
def test_a_graph_that_a_runtime_refuses_is_a_failed_candidate(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused:
        def SerializeToString(self) -> bytes:
            return b"no graph"

    monkeypatch.setattr("nas.latency.engines.onnx_graph", lambda *args, **kwargs: Refused())
    with pytest.raises(CandidateFailed, match=f"engine {engine} does not compile it") as caught:
        deploy(load_space("small").smallest().build(10), LatencyConfig(device="cpu", engine=engine), X)
    assert "\n" not in str(caught.value)


def test_a_dtype_that_an_engine_lacks_is_refused() -> None:
    with pytest.raises(UsageError, match="--dtype bfloat16: --engine onnxruntime computes in float32"):
        check_device(LatencyConfig(device="cpu", engine="onnxruntime", dtype="bfloat16"))


def test_bfloat16_is_refused_where_the_cpu_has_none() -> None:
    """OpenVINO would silently infer in float32."""
    capabilities = runtimes._openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    config = LatencyConfig(device="cpu", engine="openvino", dtype="bfloat16")
    if "BF16" in capabilities:
        assert check_device(config).type == "cpu"
        return
    with pytest.raises(UsageError, match=r"--engine openvino: does not run on this machine .this CPU has no bfloat16"):
        check_device(config)


# -- Identity ----------------------------------------------------------------------------------------------------------


def test_the_version_of_a_runtime_is_part_of_a_deployment(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LatencyConfig(device="cpu")
    assert config.engine == "onnxruntime"
    assert config.engine_label == config.runtime
    assert config.runtime is not None
    assert config.runtime.startswith("onnxruntime 1.")
    assert replace(config, engine="eager").engine_label == "eager"
    assert str(replace(config, engine="openvino").runtime).startswith("openvino 20")
    older = replace(config, runtime="onnxruntime 1.0.0")
    assert replace(older, resolution=64).runtime == "onnxruntime 1.0.0"
    with pytest.raises(UsageError, match=r"are of onnxruntime 1\.0\.0, .*pip install onnxruntime==1\.0\.0"):
        check_device(older)
    monkeypatch.setattr(configs, "packages_distributions", lambda: {"onnxruntime": ["onnxruntime-gpu"]})
    monkeypatch.setattr(
        configs,
        "version",
        lambda name: {"onnxruntime-gpu": "1.2.3"}[name] if name in ("onnxruntime-gpu",) else missing(name),
    )
    assert LatencyConfig(device="cpu").runtime == "onnxruntime 1.2.3"


def missing(name: str) -> str:
    raise configs.PackageNotFoundError(name)


def test_compile_is_another_name_of_inductor() -> None:
    assert LatencyConfig(device="cpu", engine="compile") == LatencyConfig(device="cpu", engine="inductor")


def test_studies_of_other_engines_store_no_runtime() -> None:
    """As studies that were begun before there were runtimes."""
    eager = SearchConfig(latency=LatencyConfig(device="cpu", engine="eager"))
    assert "runtime" not in eager.identity()["latency"]
    assert SearchConfig.of_identity(eager.identity()) == eager
    default = SearchConfig(latency=LatencyConfig(device="cpu"))
    assert default.identity()["latency"]["runtime"] == default.latency.runtime
    assert SearchConfig.of_identity(default.identity()) == default


def test_every_tensor_of_a_runtime_is_float32() -> None:
    x: Tensor = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    module = deploy(load_space("small").smallest().build(10), LatencyConfig(device="cpu"), X)
    assert module(x).dtype == torch.float32
