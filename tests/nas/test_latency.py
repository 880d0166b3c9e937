from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from triton.runtime.errors import OutOfResources

from kernels.timing import DeviceInfo
from nas.config import DEFAULT_ENGINE, LatencyConfig
from nas.engines import ENGINES, deploy, runs_on
from nas.errors import CandidateFailed
from nas.latency import LatencyMeter, corrected
from search_spaces import load_space

SPACE = load_space("small")
QUICK = LatencyConfig(device="cpu", seconds=0.05)


def test_drift_is_taken_out_round_by_round() -> None:
    """The machine runs at half speed in the second round; the anchor shows it."""
    own, anchor = np.array([2.0, 4.0, 2.0]), np.array([1.0, 2.0, 1.0])
    assert corrected(own, anchor, reference_ms=1.5).tolist() == [3.0, 3.0, 3.0]


@pytest.mark.parametrize("engine", [name for name, engine in ENGINES.items() if "cpu" in engine.devices])
def test_every_engine_runs_what_was_built(engine: str) -> None:
    network = SPACE.smallest().build(10).eval()
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        module = deploy(network, LatencyConfig(device="cpu", engine=engine, batch_size=2), x)
        torch.testing.assert_close(module(x), network(x), rtol=1e-4, atol=1e-4)


def test_a_measurement_is_whole_and_consistent() -> None:
    meter = LatencyMeter(QUICK, SPACE.anchor().build(10))
    assert meter.reference_ms > 0
    network = SPACE.smallest().build(10)
    latency = meter.measure(network)
    assert 0 < latency.p20_ms <= latency.median_ms <= latency.p80_ms
    assert latency.repeats >= 10
    assert latency.raw_median_ms > 0
    assert latency.anchor_median_ms > 0
    # Folded, each norm is a bias: four bytes for every weight, and for every channel of a norm one bias.
    convolutions = sum(m.weight.numel() for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    biases = sum(m.num_features for m in network.modules() if isinstance(m, nn.BatchNorm2d))
    biases += sum(
        m.bias.numel() for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear) and m.bias is not None
    )
    assert latency.weight_bytes == 4 * (convolutions + biases)
    assert latency.memory_mb == (latency.weight_bytes + latency.workspace_bytes) / 1e6


def test_workspace_holds_at_least_the_largest_input_and_output_of_a_layer() -> None:
    arch = SPACE.anchor()
    meter = LatencyMeter(QUICK, SPACE.smallest().build(10))
    latency = meter.measure(arch.build(10))
    # In the first block 24 channels of 16x16 pixels become 72, the 24 being kept for the residual.
    assert latency.workspace_bytes >= 4 * 16 * 16 * (24 + 24 + 72)
    double = LatencyMeter(LatencyConfig(device="cpu", seconds=0.05, batch_size=2), SPACE.smallest().build(10))
    assert double.measure(arch.build(10)).workspace_bytes > 1.2 * latency.workspace_bytes


def test_a_given_reference_scales_the_result() -> None:
    network = SPACE.anchor().build(10)
    latency = LatencyMeter(QUICK, network, reference_ms=100.0).measure(network)
    # The anchor against itself: noise aside, its latency is the reference, whatever this machine's speed.
    assert latency.median_ms == pytest.approx(100.0, rel=0.5)
    assert latency.raw_median_ms < 50


def test_measuring_leaves_the_thread_count_as_it_was() -> None:
    before = torch.get_num_threads()
    LatencyMeter(QUICK, SPACE.smallest().build(10))
    assert torch.get_num_threads() == before


def test_a_network_that_a_compiler_refuses_is_a_failed_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_model: nn.Module, _example: torch.Tensor) -> nn.Module:
        raise RuntimeError("out of resource: shared memory, Required: 300000")

    network = SPACE.smallest().build(10).eval()
    x = torch.randn(1, 3, 32, 32)
    monkeypatch.setitem(ENGINES, "compile", replace(ENGINES["compile"], prepare=refuse))
    with pytest.raises(CandidateFailed, match=r"engine compile does not compile it \(RuntimeError: out of resource"):
        deploy(network, LatencyConfig(device="cpu", engine="compile"), x)
    # Triton says by its errors what it refuses; any other is a bug.
    monkeypatch.setitem(ENGINES, "fused", replace(ENGINES["fused"], prepare=refuse))
    with pytest.raises(RuntimeError, match="shared memory"):
        deploy(network, LatencyConfig(device="cpu", engine="fused"), x)

    def out_of_shared_memory(_model: nn.Module, _example: torch.Tensor) -> nn.Module:
        raise OutOfResources(300000, 232448, "shared memory")

    monkeypatch.setitem(ENGINES, "fused", replace(ENGINES["fused"], prepare=out_of_shared_memory))
    with pytest.raises(CandidateFailed, match="engine fused does not compile it"):
        deploy(network, LatencyConfig(device="cpu", engine="fused"), x)
    # Engines that compile nothing have no such excuse.
    monkeypatch.setitem(ENGINES, "eager", replace(ENGINES["eager"], prepare=refuse))
    with pytest.raises(RuntimeError, match="shared memory"):
        deploy(network, LatencyConfig(device="cpu", engine="eager"), x)


def test_every_device_has_a_default_engine_that_runs_there() -> None:
    for device, engine in DEFAULT_ENGINE.items():
        assert runs_on(ENGINES[engine], torch.device(device))


@pytest.mark.gpu
@pytest.mark.parametrize("engine", [name for name, engine in ENGINES.items() if "cuda" in engine.devices])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_cuda_graphs_are_timed(engine: str, dtype: str) -> None:
    config = LatencyConfig(device="cuda", engine=engine, dtype=dtype, batch_size=8, seconds=0.1)
    meter = LatencyMeter(config, SPACE.anchor().build(10))
    latency = meter.measure(SPACE.anchor().build(10))
    assert latency.median_ms == pytest.approx(meter.reference_ms, rel=0.2)
    assert latency.workspace_bytes > 0
    assert DeviceInfo.of(torch.device("cuda")).kind == "cuda"


@pytest.mark.gpu
def test_the_anchors_graph_still_computes_after_other_networks_were_measured() -> None:
    """A graph replays addresses: were the anchor's weights freed, candidates would be timed against garbage."""
    config = LatencyConfig(device="cuda", seconds=0.05)
    anchor = SPACE.anchor().build(10)
    meter = LatencyMeter(config, anchor)
    for arch in (SPACE.smallest(), SPACE.anchor(), SPACE.smallest()):
        meter.measure(arch.build(10))
    _module, x, output = meter.anchor_forwards[0]()  # type: ignore[misc]
    torch.cuda.synchronize()
    expected = deploy(anchor, config, x)(x)
    torch.testing.assert_close(output, expected, rtol=1e-2, atol=1e-2)
