"""Networks as ONNX graphs, held to torch's output."""

from __future__ import annotations

import random

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from torch import Tensor, nn

from kernels.fold import fold_batch_norms
from nas.latency.onnx_graph import BATCH, INPUT, NotKnown, exporters_graph, onnx_graph
from nas.validation.baselines import MODELS
from search_spaces import load_space


def outputs(graph: object, *inputs: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])  # type: ignore[attr-defined]
    names = [each.name for each in session.get_inputs()]
    fed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return [torch.from_numpy(array) for array in session.run(None, fed)]


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    """Equal but for the order in which float32 is summed."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


def folded(network: nn.Module) -> nn.Module:
    """With norms that are not those of an untrained network, which do nothing."""
    rng = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn(module.num_features, generator=rng)
            module.running_var = 0.5 + torch.rand(module.num_features, generator=rng)
    return fold_batch_norms(network.eval()).requires_grad_(False)


@pytest.mark.parametrize(("space", "size", "networks"), [("small", 33, 6), ("imagenet", 65, 2), ("rung4@32", 33, 6)])
@pytest.mark.parametrize("batch", [1, 8])
@torch.no_grad()
def test_random_networks_of_every_space_compute_what_torch_does(
    space: str, size: int, networks: int, batch: int
) -> None:
    rng = random.Random(batch)
    loaded = load_space(space)
    archs = [loaded.sample(rng) for _ in range(networks)]
    for arch in archs:
        network = folded(arch.build(7))
        x = torch.randn(batch, 3, size, size)
        (actual,) = outputs(onnx_graph(network, x.shape), x)
        assert_equal(actual, network(x))


@pytest.mark.parametrize("activation", ["silu", "relu", "hard_swish", "gelu"])
@torch.no_grad()
def test_every_activation(activation: str) -> None:
    arch = load_space("small").anchor()
    network = folded(type(arch).parse(str(arch).replace("hard_swish", activation)).build(3))
    x = torch.randn(2, 3, 32, 32)
    (actual,) = outputs(onnx_graph(network, x.shape), x)
    assert_equal(actual, network(x))


@torch.no_grad()
def test_the_batch_may_be_left_open() -> None:
    network = folded(load_space("small").smallest().build(3))
    graph = onnx_graph(network, (1, 3, 32, 32), free_batch=True)
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param == BATCH
    for batch in (1, 5):
        x = torch.randn(batch, 3, 32, 32)
        assert_equal(outputs(graph, x)[0], network(x))


@pytest.mark.parametrize(
    "part", [nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(3, 3, 3, groups=3), nn.Linear(5, 2)]
)
@torch.no_grad()
@pytest.mark.parametrize("dimensions", [2, 3, 4])
def test_a_part_may_run_on_several_inputs_with_the_same_weights(part: nn.Module, dimensions: int) -> None:
    shape = (2, 3, 4, 5)[4 - dimensions :] if isinstance(part, nn.Linear) else (2, 3, 9, 9)
    inputs = [torch.randn(shape) for _ in range(3)]
    graph = onnx_graph(part.eval(), shape, runs=3)
    assert [each.name for each in graph.graph.input] == [INPUT, f"{INPUT}1", f"{INPUT}2"]
    assert len(graph.graph.initializer) == 2
    for actual, x in zip(outputs(graph, *inputs), inputs, strict=True):
        assert_equal(actual, part(x))


# Of all, the quick tier has one that is translated here, and one that is left to torch's exporter.
@pytest.mark.parametrize(
    "name",
    [name if name in ("repvgg_a0", "regnety_002") else pytest.param(name, marks=pytest.mark.slow) for name in MODELS],
)
@torch.no_grad()
def test_timm_models_are_translated_here_or_by_torchs_exporter(name: str) -> None:
    # With other norms, float32 itself loses its way in the deepest of them.
    network = fold_batch_norms(timm.create_model(name, num_classes=5).eval()).requires_grad_(False)
    x = torch.randn(1, 3, 32, 32)
    try:
        graph = onnx_graph(network, x.shape)
    except NotKnown:
        graph = exporters_graph(network, x.shape)
    assert_equal(outputs(graph, x)[0], network(x))


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.LayerNorm(4), "the layer LayerNorm"), (Doubled(), "the operation"), (Branching(), "does not trace it"),
        (nn.Conv2d(4, 4, 3, padding="same"), "padding same"), (nn.AdaptiveAvgPool2d(2), "a pooling to 2"),
        (nn.Flatten(2), "a flattening of dimensions 2 to -1"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_named(module: nn.Module, words: str) -> None:
    with pytest.raises(NotKnown, match=words):
        onnx_graph(module.eval(), (1, 4, 4, 4))


def test_graphs_are_small() -> None:
    """An operation of ours is one node, but for SiLU."""
    arch = load_space("small").smallest()
    graph = onnx_graph(folded(arch.build(10)), (1, 3, 32, 32)).graph
    kinds = sorted({node.op_type for node in graph.node})
    assert kinds == ["Add", "Conv", "Flatten", "Gemm", "GlobalAveragePool", "Identity", "Mul", "Sigmoid"]
    weights = sum(int(np.prod(each.dims)) for each in graph.initializer)
    assert weights == sum(each.numel() for each in folded(arch.build(10)).parameters())
