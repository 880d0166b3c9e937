"""Parts of networks as graphs of the operations that ONNX Runtime runs of them within a network.

ONNX Runtime keeps the maps of a network in blocks of channels, pads them to whole blocks, and lets a convolution add
the residual branch. A part that is cut out first and optimised then does none of that at its ends: the parts of a
network of 20 operations have 29. So a part is optimised between two 1x1 convolutions, which take and give maps in
whatever layout pays, and cut out afterwards.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from nas.errors import CandidateFailed
from nas.latency.engines import Refused, refusing
from nas.latency.onnx_graph import NotKnown, onnx_graph
from nas.latency.runtimes import Bound, OnnxRuntime, optimised

# The channels of images, before which there is no other part.
IMAGE_CHANNELS = 3
BEFORE, AFTER = "before", "after"


class NotCut(Exception):
    """The optimised graph does not show where a part begins and ends; the message names what is missing."""


def bound_part(module: nn.Module, shape: Sequence[int], runs: int, threads: int) -> Bound | None:
    """A call that runs a part several times as ONNX Runtime runs it within a network, on random inputs; None where such
    a graph cannot be had.

    Args:
        module: a part with its batch norms folded, on the CPU.
        shape: shape of its input, (N, C, H, W) or (N, features).
        runs: number of times that a call runs it.
        threads: CPU threads.

    Raises:
        CandidateFailed: ONNX Runtime refuses the graph.
    """
    try:
        graph = repeated(part_graph(module.eval(), shape), runs)
        with refusing():
            runtime = OnnxRuntime(graph.SerializeToString(), threads, optimise=False)
            (x,) = runtime.session.get_inputs()
            return runtime.bound([np.random.default_rng(0).standard_normal(x.shape, np.float32)])
    except NotKnown:
        return None
    except NotCut as error:
        # Another version of the runtime may write its graphs differently.
        warnings.warn(f"parts are timed alone: ONNX Runtime's graph does not show {error}", stacklevel=2)
        return None
    except Refused as error:
        raise CandidateFailed(f"engine onnxruntime does not run a part of it ({error})") from error


def part_graph(module: nn.Module, shape: Sequence[int]) -> Any:
    """The operations that a part is within a network, as an `onnx.ModelProto` that ONNX Runtime has optimised.

    Its input and output may be in the runtime's layout, in which channels are padded: the graph says its input's shape.

    Args:
        module: a part with its batch norms folded, on the CPU.
        shape: shape of its input, (N, C, H, W) or (N, features).

    Raises:
        NotKnown: the module has an operation that `onnx_graph` does not translate.
        NotCut: the runtime has optimised the neighbours away.
        Refused: the runtime does not take the graph.
    """
    with torch.inference_mode():
        out: Any = module(torch.zeros(tuple(shape)))
    model = onnx_graph(module, shape)
    has_before, has_after = len(shape) == 4 and shape[1] > IMAGE_CHANNELS, out.ndim == 4
    if has_before:
        _put_before(model.graph, shape[1])
    if has_after:
        _put_after(model.graph, out.shape[1])
    with refusing():
        made = optimised(model.SerializeToString())
    return _cut(made, list(shape), has_before, has_after)


def repeated(model: Any, runs: int) -> Any:
    """A graph that runs another several times in a row on one input, each time with weights of its own.

    A part of a network finds its input in a cache, where the part before it has left it, but not its own weights of the
    last run, if those of the network are more than the cache holds. The graph's output is that of the last run.

    Args:
        model: an `onnx.ModelProto` with one input and one output.
        runs: number of runs.
    """
    from onnx import helper

    graph = model.graph
    (x,), (y,) = graph.input, graph.output

    def renamed(names: Iterable[str], run: int) -> list[str]:
        return [name if name in ("", x.name) else f"{name}/{run}" for name in names]

    nodes, weights = [], []
    for run in range(runs):
        for node in graph.node:
            node = copy.deepcopy(node)
            inputs, outputs = renamed(node.input, run), renamed(node.output, run)
            node.name, node.input[:], node.output[:] = f"{node.name}/{run}", inputs, outputs
            nodes.append(node)
        for weight in graph.initializer:
            weight = copy.deepcopy(weight)
            (weight.name,) = renamed([weight.name], run)
            weights.append(weight)
    y = copy.deepcopy(y)
    (y.name,) = renamed([y.name], runs - 1)
    return _model(helper.make_graph(nodes, graph.name, [x], [y], weights), model)


def _model(graph: Any, like: Any) -> Any:
    from onnx import helper

    return helper.make_model(graph, opset_imports=like.opset_import, ir_version=like.ir_version)


def _neighbour(graph: Any, name: str, x: str, channels: int) -> Any:
    """A 1x1 convolution of as many channels to as many, whose output has its name."""
    from onnx import helper, numpy_helper

    kernel = torch.eye(channels).reshape(channels, channels, 1, 1).numpy()
    graph.initializer.append(numpy_helper.from_array(kernel, f"{name}.weight"))
    return helper.make_node("Conv", [x, f"{name}.weight"], [name], name=name, kernel_shape=[1, 1])


def _put_before(graph: Any, channels: int) -> None:
    (x,) = graph.input
    for node in graph.node:
        node.input[:] = [BEFORE if name == x.name else name for name in node.input]
    graph.node.insert(0, _neighbour(graph, BEFORE, x.name, channels))


def _put_after(graph: Any, channels: int) -> None:
    (y,) = graph.output
    graph.node.append(_neighbour(graph, AFTER, y.name, channels))
    y.name = AFTER


def _cut(model: Any, shape: list[int], has_before: bool, has_after: bool) -> Any:
    """An optimised graph without the neighbours, and without what only they need.

    Args:
        shape: shape of the part's input before it was optimised.
    """
    from onnx import TensorProto, helper

    graph = model.graph
    weights = {weight.name: weight for weight in graph.initializer}
    (x,), (y,) = ([each.name for each in ends] for ends in (graph.input, graph.output))
    nodes = list(graph.node)
    if has_before:
        before = _found(nodes, BEFORE)
        nodes = _without(nodes, before, lambda node: node.input, lambda node: node.output)
        x, shape[1] = before.output[0], weights[before.input[1]].dims[0]
    if has_after:
        after = _found(nodes, AFTER)
        nodes = _without(nodes, after, lambda node: node.output, lambda node: node.input)
        y = after.input[0]
    used = {name for node in nodes for name in node.input}
    if x not in used or not any(y in node.output for node in nodes):
        raise NotCut("the part's input or output")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name, size in ((x, shape), (y, None))]
    kept = [weight for name, weight in weights.items() if name in used]
    return _model(helper.make_graph(nodes, graph.name, ends[:1], ends[1:], kept), model)


def _found(nodes: Collection[Any], name: str) -> Any:
    """The neighbour of a name, in whichever layout it computes."""
    found = [node for node in nodes if node.op_type == "Conv" and node.name in (name, f"{name}_nchwc")]
    if len(found) != 1:
        raise NotCut(f"the convolution {name} it")
    return found[0]


def _without(
    nodes: Collection[Any], neighbour: Any, ahead: Callable[[Any], Iterable[str]],
    behind: Callable[[Any], Iterable[str]],
) -> list[Any]:  # fmt: skip
    """The nodes without a neighbour and all those beyond it.

    Args:
        ahead: function from a node to the names of the values through which the way leads on, away from the part.
        behind: function from a node to the names by which it is reached from there.
    """
    beyond, reached = [neighbour], set(ahead(neighbour))
    while found := [node for node in nodes if node not in beyond and reached & set(behind(node))]:
        beyond += found
        reached |= {name for node in found for name in ahead(node)}
    return [node for node in nodes if node not in beyond]
