"""Parts of networks as ONNX Runtime runs them within a network."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nas.config import LatencyConfig
from nas.errors import CandidateFailed
from nas.latency import onnx_parts
from nas.latency.engines import fold
from nas.latency.onnx_graph import onnx_graph
from nas.latency.onnx_parts import bound_part, part_graph, repeated
from nas.latency.parts import arch_modules, arch_parts
from nas.latency.runtimes import OnnxRuntime, optimised
from search_spaces import ArchSpec, load_space

SIZE = 20
CONFIG = LatencyConfig(device="cpu", engine="onnxruntime", batch_size=2, resolution=SIZE)
# Channels that no layout fills, residual blocks, a convolution in groups that the runtime computes in torch's layout.
ODD = ArchSpec.parse("silu stem 16 | 2x16 k3 g8 e2 | 2x40/2 k3 g1 e1 | 2x24/2 k5 g8 e3 | pooled shortcuts | head 72")


def blocked(x: np.ndarray, channels: int) -> np.ndarray:
    """(N, C, H, W) as (N, channels / b, H, W, b), padded with zeros, for the block size b of this machine."""
    block = block_size()
    n, own, h, w = x.shape
    padded = np.zeros((n, channels, h, w), np.float32)
    padded[:, :own] = x
    return np.ascontiguousarray(padded.reshape(n, -1, block, h, w).transpose(0, 1, 3, 4, 2)).reshape(n, channels, h, w)


def plain(y: np.ndarray, channels: int) -> np.ndarray:
    """The inverse of `blocked`."""
    n, padded, h, w = y.shape
    maps = y.reshape(n, padded // block_size(), h, w, block_size()).transpose(0, 1, 4, 2, 3)
    return maps.reshape(n, padded, h, w)[:, :channels]


def block_size() -> int:
    """Channels of a block, which the runtime chooses by the CPU: those to which it pads 20."""
    part = nn.Sequential(nn.Conv2d(20, 20, 1), nn.Conv2d(20, 20, 1)).requires_grad_(False)
    padded = part_graph(part, (1, 20, 4, 4)).graph.input[0].type.tensor_type.shape.dim[1].dim_value
    return {20: 4, 24: 8, 32: 16}[padded]


def run(model: Any, x: np.ndarray) -> np.ndarray:
    bound = OnnxRuntime(model.SerializeToString(), 1, optimise=False).bound([x])
    bound()
    return np.array(bound.outputs()[0])


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("name", [*(part.block.name for part in arch_parts(ODD, CONFIG))])
def test_a_part_within_a_network_computes_what_it_does_alone(name: str, times: int) -> None:
    part = next(part for part in arch_parts(ODD, CONFIG) if part.block.name == name)
    module = arch_modules(ODD, CONFIG)[name].eval()
    x = torch.randn(part.input_shape)
    model = repeated(part_graph(module, part.input_shape), times)
    (channels,) = (each.type.tensor_type.shape.dim[1].dim_value for each in model.graph.input)
    with torch.inference_mode():
        expected = module(x).numpy()
    # Nothing says in which layout a value is.
    found = []
    inputs = [x.numpy()] if channels == x.shape[1] else []
    inputs += [blocked(x.numpy(), channels)] if channels % block_size() == 0 else []
    for fed in inputs:
        actual = run(model, fed)
        found += [actual] if actual.shape == expected.shape else []
        found += [plain(actual, expected.shape[1])] if actual.ndim == 4 else []
    assert any(np.allclose(actual, expected, rtol=1e-4, atol=1e-5) for actual in found)


def sampled_archs() -> list[ArchSpec]:
    rng = random.Random(0)
    return [ODD, *(load_space(name).sample(rng) for name in ("small", "imagenet", "rung4@32") for _ in range(3))]


@pytest.mark.parametrize("arch", sampled_archs(), ids=str)
def test_the_parts_have_the_operations_of_the_network_and_no_others(arch: ArchSpec) -> None:
    """Nothing is changed into another layout, or left unfused, that is not in the whole."""
    network = onnx_graph(fold(arch.build(10), CONFIG), (2, 3, SIZE, SIZE))
    whole = operations(optimised(network.SerializeToString()))
    modules = arch_modules(arch, CONFIG)
    graphs = [part_graph(modules[part.block.name].eval(), part.input_shape) for part in arch_parts(arch, CONFIG)]
    assert sorted(each for graph in graphs for each in operations(graph)) == sorted(whole)


def operations(model: Any) -> list[tuple[str, str]]:
    return [(node.domain, node.op_type) for node in model.graph.node]


def test_each_run_has_weights_of_its_own() -> None:
    part = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 1)).requires_grad_(False)
    graph = part_graph(part, (1, 16, 9, 9))
    made = repeated(graph, 4)
    assert len(made.graph.node) == 4 * len(graph.graph.node)
    assert len({weight.name for weight in made.graph.initializer}) == 4 * len(graph.graph.initializer)
    assert len(made.graph.input) == len(made.graph.output) == 1


def test_what_cannot_be_cut_is_measured_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = nn.LayerNorm(9).eval()
    assert bound_part(norm, (1, 4, 9, 9), 2, 1) is None
    layer = nn.Conv2d(16, 16, 1).requires_grad_(False)
    assert bound_part(layer, (1, 16, 9, 9), 2, 1) is not None
    # Another version may have optimised the neighbours away, or given them other names.
    monkeypatch.setattr(onnx_parts, "BEFORE", "before.in.another.version")
    monkeypatch.setattr(onnx_parts, "_put_before", lambda graph, channels: None)
    with pytest.warns(UserWarning, match=r"^parts are timed alone: ONNX Runtime's graph does not show the convolution"):
        assert bound_part(layer, (1, 16, 9, 9), 2, 1) is None


def test_a_part_that_the_runtime_refuses_is_a_failed_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def __init__(self, *args: object, **named: object) -> None:
            raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(onnx_parts, "OnnxRuntime", Refusing)
    with pytest.raises(CandidateFailed, match=r"does not run a part of it \(.*no such kernel") as caught:
        bound_part(nn.Conv2d(16, 16, 1).requires_grad_(False), (1, 16, 9, 9), 2, 1)
    assert "\n" not in str(caught.value)
