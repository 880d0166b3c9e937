"""Networks as ONNX graphs, written node by node from a folded module: what runtimes time and what exports deploy.

torch's exporter takes one to two seconds for these networks, this module some 20 ms. It knows the layers of ConvFirst
networks; a timm model with others is left to torch's exporter.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

# Names of the first input and output.
INPUT, OUTPUT = "images", "logits"
# torch 2.11 writes this one by default: newer ones gain these networks nothing, and fewer runtimes read them.
OPSET, IR_VERSION = 20, 10
BATCH = "batch"


class NotKnown(Exception):
    """A module has an operation that is not translated here; the message names it."""


def onnx_graph(module: nn.Module, shape: Sequence[int], *, runs: int = 1, free_batch: bool = False) -> Any:
    """A module in evaluation mode as an `onnx.ModelProto` in float32.

    Args:
        module: a network or a part of one, with its batch norms folded, on the CPU.
        shape: shape of the input, (N, C, H, W) or (N, features).
        runs: number of times that the graph runs the module, each time on an input of its own.
        free_batch: whether the batch is left open, not fixed to that of `shape`.

    Raises:
        NotKnown: the module has an operation that is not translated here.
    """
    from onnx import TensorProto, helper

    traced = _traced(module)
    writer = _Writer(traced, is_matrix=len(shape) == 2)
    dims: list[int | str] = [BATCH if free_batch else shape[0], *shape[1:]]
    names = [f"{INPUT}{run}" if run else INPUT for run in range(runs)]
    outputs = [writer.run(name, f"{OUTPUT}{run}" if run else OUTPUT) for run, name in enumerate(names)]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name in names]
    # The runtimes infer the shapes of the outputs.
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(writer.nodes, "network", inputs, results, list(writer.weights.values()))
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="convfirst-nas"
    )


def exporters_graph(module: nn.Module, shape: Sequence[int], *, free_batch: bool = False) -> Any:
    """Any module in evaluation mode as an `onnx.ModelProto`, by torch's exporter; the arguments are those of
    `onnx_graph`.

    Raises:
        Exception: whatever torch's exporter raises for a module that it cannot translate.
    """
    # torch.export would take an example's batch of one for the only one.
    example = torch.zeros(max(shape[0], 2) if free_batch else shape[0], *shape[1:])
    dynamic = ({0: torch.export.Dim(BATCH, min=1)},) if free_batch else None
    with quiet():
        program: Any = torch.onnx.export(
            module, (example,), input_names=[INPUT], dynamo=True, verbose=False, opset_version=OPSET,
            dynamic_shapes=dynamic,
        )  # fmt: skip
    return program.model_proto


# -- Operations --------------------------------------------------------------------------------------------------------


def _is_pooled_shortcut(module: nn.Module) -> bool:
    """Whether it is a `PooledShortcut` of `search_spaces.timm_models`, of which each exported network brings a copy."""
    return type(module).__name__ == "PooledShortcut"


class _Tracer(fx.Tracer):
    """Traces into all but torch's layers and pooled shortcuts."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_pooled_shortcut(m) or super().is_leaf_module(m, module_qualified_name)


def _traced(module: nn.Module) -> fx.GraphModule:
    # A layer alone would be traced into, were it not part of something.
    whole = nn.Sequential(module)
    try:
        return fx.GraphModule(whole, _Tracer().trace(whole))
    except Exception as error:  # control flow that depends on tensors raises many kinds
        raise NotKnown(f"torch.fx does not trace it ({error})") from error


class _Writer:
    """Writes the nodes of a traced module; weights are written once, however often it runs.

    Args:
        is_matrix: whether the input has two dimensions.

    Attributes:
        matrices: names of values that have two dimensions.
        nodes: the graph's nodes, in order.
        weights: the graph's constants, by name.
    """

    def __init__(self, traced: fx.GraphModule, is_matrix: bool) -> None:
        self.traced, self.is_matrix = traced, is_matrix
        self.matrices: set[str] = set()
        self.modules = dict(traced.named_modules())
        self.nodes: list[Any] = []
        self.weights: dict[str, Any] = {}

    def run(self, input_name: str, output_name: str) -> str:
        """Write one run of the module; returns the name of its output."""
        values: dict[fx.Node, str] = {}
        for node in self.traced.graph.nodes:
            if node.op == "placeholder":
                if values:
                    raise NotKnown("it has several inputs")
                values[node] = input_name
                self.matrices |= {input_name} if self.is_matrix else set()
            elif node.op == "output":
                (result,) = node.args
                if not isinstance(result, fx.Node):
                    raise NotKnown("it has several outputs")
                return self.add("Identity", values[result], output=output_name)
            elif node.op == "get_attr":
                values[node] = self.weight(str(node.target), _attribute(self.traced, str(node.target)))
            else:
                arguments = [values[each] if isinstance(each, fx.Node) else each for each in node.args]
                named = {key: values[each] if isinstance(each, fx.Node) else each for key, each in node.kwargs.items()}
                values[node] = self._operation(node, arguments, named)
        raise AssertionError("a graph has an output")

    def _operation(self, node: fx.Node, arguments: list[Any], named: dict[str, Any]) -> str:
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            write = next((MODULES[kind] for kind in type(module).__mro__ if kind in MODULES), None)
            if _is_pooled_shortcut(module):
                write = _pooled_shortcut
            if write is None:
                raise NotKnown(f"the layer {type(module).__name__}")
            return write(self, str(node.target), module, *arguments)
        if node.op != "call_function" or node.target not in FUNCTIONS:
            raise NotKnown(f"the operation {node.target}")
        write = FUNCTIONS[node.target]
        try:
            inspect.signature(write).bind(self, *arguments, **named)
        except TypeError as error:
            raise NotKnown(f"the operation {node.target} with such arguments ({error})") from error
        return write(self, *arguments, **named)

    def add(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Write a node; returns the name of its output."""
        from onnx import helper

        name = output or f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def weight(self, name: str, tensor: Tensor) -> str:
        """Write a constant, unless it was written; returns its name."""
        from onnx import numpy_helper

        if name not in self.weights:
            array = np.ascontiguousarray(tensor.detach().float().cpu().numpy())
            self.weights[name] = numpy_helper.from_array(array, name)
        return name


def _attribute(module: nn.Module, name: str) -> Tensor:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    if not isinstance(found, Tensor):
        raise NotKnown(f"the attribute {name}")
    return found


def _convolution(writer: _Writer, name: str, layer: Any, x: str) -> str:
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros" or type(layer) is not nn.Conv2d:
        raise NotKnown(f"the layer {type(layer).__name__} with padding {layer.padding}")
    weights = [writer.weight(f"{name}.weight", layer.weight)]
    weights += [] if layer.bias is None else [writer.weight(f"{name}.bias", layer.bias)]
    return writer.add(
        "Conv", x, *weights, kernel_shape=list(layer.kernel_size), strides=list(layer.stride),
        pads=[*layer.padding, *layer.padding], dilations=list(layer.dilation), group=layer.groups,
    )  # fmt: skip


def _linear(writer: _Writer, x: str, weight: str, bias: str | None = None) -> str:
    if x in writer.matrices:
        product = writer.add("Gemm", x, weight, *([] if bias is None else [bias]), transB=1)
        writer.matrices.add(product)
        return product
    # Gemm takes matrices only; the runtimes transpose a constant once.
    product = writer.add("MatMul", x, writer.add("Transpose", weight, perm=[1, 0]))
    return product if bias is None else writer.add("Add", product, bias)


def _linear_layer(writer: _Writer, name: str, layer: Any, x: str) -> str:
    bias = None if layer.bias is None else writer.weight(f"{name}.bias", layer.bias)
    return _linear(writer, x, writer.weight(f"{name}.weight", layer.weight), bias)


def _pooling(writer: _Writer, name: str, layer: Any, x: str) -> str:
    if layer.output_size not in (1, (1, 1)):
        raise NotKnown(f"a pooling to {layer.output_size}")
    return writer.add("GlobalAveragePool", x)


def _pooled_shortcut(writer: _Writer, name: str, layer: Any, x: str) -> str:
    if layer.stride > 1:
        size = [layer.stride, layer.stride]
        x = writer.add("AveragePool", x, kernel_shape=size, strides=size, ceil_mode=1)
    into, out = layer.in_channels, layer.out_channels
    if into == out:
        return x
    # As a convolution, which takes and gives channels in whatever layout the runtime has chosen, and into which the
    # runtime draws the sum. To pad or cut channels it would change the layout twice.
    weight = writer.weight(f"{name}.identity", torch.eye(out, into)[:, :, None, None])
    return writer.add("Conv", x, weight, kernel_shape=[1, 1])


def _flatten(writer: _Writer, name: str, layer: Any, x: str) -> str:
    if (layer.start_dim, layer.end_dim) != (1, -1):
        raise NotKnown(f"a flattening of dimensions {layer.start_dim} to {layer.end_dim}")
    flat = writer.add("Flatten", x, axis=1)
    writer.matrices.add(flat)
    return flat


def _relu(writer: _Writer, x: str, inplace: bool = False) -> str:
    return writer.add("Relu", x)


def _silu(writer: _Writer, x: str, inplace: bool = False) -> str:
    return writer.add("Mul", x, writer.add("Sigmoid", x))


def _hard_swish(writer: _Writer, x: str, inplace: bool = False) -> str:
    return writer.add("HardSwish", x)


def _gelu(writer: _Writer, x: str, approximate: str = "none") -> str:
    return writer.add("Gelu", x, approximate=approximate)


def _sum(writer: _Writer, left: Any, right: Any) -> str:
    if not (isinstance(left, str) and isinstance(right, str)):
        raise NotKnown("a sum with a number")
    return writer.add("Add", left, right)


MODULES: dict[type[nn.Module], Callable[..., str]] = {
    nn.Identity: lambda writer, name, layer, x: x,
    nn.Dropout: lambda writer, name, layer, x: x,
    nn.Conv2d: _convolution,
    nn.Linear: _linear_layer,
    nn.AdaptiveAvgPool2d: _pooling,
    nn.Flatten: _flatten,
    nn.ReLU: lambda writer, name, layer, x: _relu(writer, x),
    nn.SiLU: lambda writer, name, layer, x: _silu(writer, x),
    nn.Hardswish: lambda writer, name, layer, x: _hard_swish(writer, x),
    nn.GELU: lambda writer, name, layer, x: _gelu(writer, x, layer.approximate),
    nn.Softmax: lambda writer, name, layer, x: writer.add("Softmax", x, axis=layer.dim),
}
FUNCTIONS: dict[Any, Callable[..., str]] = {
    operator.add: _sum,
    operator.iadd: _sum,
    torch.add: _sum,
    functional.linear: _linear,
    functional.relu: _relu,
    functional.silu: _silu,
    functional.hardswish: _hard_swish,
    functional.gelu: _gelu,
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Context without output and logs: exporters and compilers write on every channel."""
    disabled = logging.root.manager.disable
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)
