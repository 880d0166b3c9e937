"""Runtimes of ONNX graphs on a CPU: ONNX Runtime and OpenVINO. Their packages are imported when they are used.

Every runtime uses the threads of the deployment and no others, is pinned to no core, and computes in the deployment's
dtype (left to itself, OpenVINO takes bfloat16 where the CPU has it). Inputs are bound without a copy.
"""

from __future__ import annotations

import importlib.util
import json
import math
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.child_process import ChildProcess
from nas.errors import CandidateFailed, UsageError, message_line

if TYPE_CHECKING:
    import numpy as np

# What installs each package that a runtime needs.
PACKAGES = {"onnxruntime": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino")}
EXTRAS = {"openvino": "convfirst-nas[openvino]"}


@dataclass(frozen=True)
class Bound:
    """A graph with its inputs bound, which a call runs once.

    Args:
        run: function that runs it.
        outputs: function that returns the arrays of the last run's outputs.
        held: what must live as long as it is run.
    """

    run: Callable[[], object]
    outputs: Callable[[], Sequence[np.ndarray]]
    held: tuple[object, ...]

    def __call__(self) -> None:
        self.run()


class OnnxRuntime:
    """A graph in a session of ONNX Runtime.

    Args:
        graph: the serialized graph.
        threads: CPU threads.
        optimise: whether the graph is optimised before it is run.
    """

    def __init__(self, graph: bytes, threads: int, dtype: str = "float32", *, optimise: bool = True) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 4
        if not optimise:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        # Threads that spin when a run has ended would take the cores of what is timed in turns with it.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.graph = graph
        self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.inputs = [each.name for each in self.session.get_inputs()]
        self.outputs = [each.name for each in self.session.get_outputs()]

    def bound(self, arrays: Sequence[np.ndarray]) -> Bound:
        """A run of the graph on these arrays."""
        from onnxruntime import OrtValue

        binding = self.session.io_binding()
        # Older versions do not keep what is bound.
        held = [OrtValue.ortvalue_from_numpy(array) for array in arrays]
        for name, value in zip(self.inputs, held, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        # From now on, the outputs are written where the first run has put them.
        outputs = binding.get_outputs()
        for name, output in zip(self.outputs, outputs, strict=True):
            binding.bind_ortvalue_output(name, output)
        return Bound(
            partial(self.session.run_with_iobinding, binding), lambda: [each.numpy() for each in outputs],
            (arrays, held, outputs),
        )  # fmt: skip

    def workspace_bytes(self) -> int:
        """The most bytes of results that one run holds at once, in the graph as the runtime has optimised it."""
        import numpy as np
        import onnx
        import onnxruntime

        with tempfile.TemporaryDirectory() as folder:
            options = _saving(folder)
            options.enable_profiling, options.profile_file_prefix = True, f"{folder}/profile"
            session = onnxruntime.InferenceSession(self.graph, options, providers=["CPUExecutionProvider"])
            session.run(None, {each.name: np.zeros(each.shape, np.float32) for each in session.get_inputs()})
            events = json.loads(Path(session.end_profiling()).read_text())
            nodes = {node.name: node for node in onnx.load(options.optimized_model_filepath).graph.node}
        steps = []
        for event in events:
            name = event["name"].removesuffix("_kernel_time")
            if event["cat"] == "Node" and name != event["name"]:
                steps.append((list(nodes[name].input), nodes[name].output[0], int(event["args"]["output_size"])))
        return peak_bytes(steps)


def optimised(graph: bytes) -> Any:
    """A graph as ONNX Runtime optimises it for this machine, an `onnx.ModelProto`."""
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = _saving(folder)
        onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath)


def _saving(folder: str) -> Any:
    """Options of a session that saves its optimised graph in a folder."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    options.optimized_model_filepath = f"{folder}/optimised.onnx"
    return options


class OpenVino:
    """A graph compiled by OpenVINO; the arguments are those of `OnnxRuntime`."""

    def __init__(self, graph: bytes, threads: int, dtype: str = "float32") -> None:
        core = _openvino_core()
        settings = {
            "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False,
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype],
        }  # fmt: skip
        self.compiled = core.compile_model(core.read_model(graph), "CPU", settings)

    def bound(self, arrays: Sequence[np.ndarray]) -> Bound:
        """A run of the graph on these arrays."""
        from openvino import Tensor

        request, tensors = self.compiled.create_infer_request(), [Tensor(array, shared_memory=True) for array in arrays]
        for index, tensor in enumerate(tensors):
            request.set_input_tensor(index, tensor)
        outputs = range(len(self.compiled.outputs))
        return Bound(
            partial(request.infer, share_outputs=True),
            lambda: [request.get_output_tensor(index).data for index in outputs], (arrays, tensors),
        )  # fmt: skip

    def workspace_bytes(self) -> int:
        """The most bytes of results that one run holds at once, in the graph as the runtime has compiled it."""
        steps = []
        for op in self.compiled.get_runtime_model().get_ordered_ops():
            # What reads nothing is an input or a constant.
            if op.input_values():
                size = sum(math.prod(output.shape) * output.element_type.size for output in op.outputs())
                steps.append(([each.get_node().friendly_name for each in op.input_values()], op.friendly_name, size))
        return peak_bytes(steps)


def peak_bytes(steps: Sequence[tuple[Sequence[str], str, int]]) -> int:
    """The most bytes of results that are needed at once.

    A result lives from the step that makes it to the last one that reads it. What an operation needs inside is not
    counted, and neither are weights and inputs.

    Args:
        steps: what each step reads, the name of its result, and that result's bytes.
    """
    last_read = {name: index for index, (read, _, _) in enumerate(steps) for name in read}
    sizes = {made: size for _, made, size in steps}
    alive: set[str] = set()
    peak = 0
    for index, (read, made, _) in enumerate(steps):
        alive.add(made)
        peak = max(peak, sum(sizes[name] for name in alive))
        alive -= {name for name in read if last_read[name] == index}
    return peak


@cache
def _openvino_core() -> Any:
    from openvino import Core

    return Core()


RUNTIMES: dict[str, type[OnnxRuntime | OpenVino]] = {"onnxruntime": OnnxRuntime, "openvino": OpenVino}


# -- Whether a runtime runs here ---------------------------------------------------------------------------------------


def require(engine: str, dtype: str) -> None:
    """Check in a child process that a runtime runs on this machine.

    Raises:
        UsageError: a package is missing or broken, or the CPU lacks instructions that it needs.
    """
    if engine not in RUNTIMES:
        return
    for package in PACKAGES[engine]:
        if importlib.util.find_spec(package) is None:
            wanted = EXTRAS.get(package, package)
            raise UsageError(
                f"--engine {engine}: {package} is not installed (pip install {_quoted(wanted)}); --engine takes another"
            )
    if reason := _trouble(engine, dtype):
        # Nothing that can be installed mends a CPU.
        hint = (
            "" if "this CPU" in reason else f"pip install --force-reinstall {_quoted(EXTRAS.get(engine, engine))}, or "
        )
        raise UsageError(f"--engine {engine}: does not run on this machine ({reason}); {hint}--engine takes another")


def _quoted(requirement: str) -> str:
    return f"'{requirement}'" if "[" in requirement else requirement


@cache
def _trouble(engine: str, dtype: str) -> str:
    """The reason for which a runtime does not run here; empty where it does."""
    try:
        with ChildProcess() as child:
            return child.call(try_out, engine, dtype)
    except (CandidateFailed, RuntimeError) as error:
        lacking = "SIGILL" in str(error) and platform.machine() == "x86_64" and not _has_avx2()
        return f"{error}{'; this CPU has no AVX2' if lacking else ''}"


def try_out(engine: str, dtype: str) -> str:
    """Run a small network; returns the reason for which that does not work, or nothing."""
    try:
        import numpy as np
        from onnx import TensorProto, helper, numpy_helper

        if engine == "openvino" and dtype == "bfloat16":
            # It would silently infer in float32.
            capabilities = _openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
            if "BF16" not in capabilities:
                return "this CPU has no bfloat16"
        # The convolution and the product change nothing.
        weights = {"kernel": np.eye(8, dtype=np.float32).reshape(8, 8, 1, 1), "matrix": np.eye(8, dtype=np.float32)}
        nodes = [
            helper.make_node("Conv", ["x", "kernel"], ["a"], kernel_shape=[1, 1]),
            helper.make_node("Relu", ["a"], ["b"]), helper.make_node("GlobalAveragePool", ["b"], ["c"]),
            helper.make_node("Flatten", ["c"], ["d"]), helper.make_node("Gemm", ["d", "matrix"], ["y"]),
        ]  # fmt: skip
        x, y = (
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in (("x", [1, 8, 4, 4]), ("y", [1, 8]))
        )
        constants = [numpy_helper.from_array(array, name) for name, array in weights.items()]
        graph = helper.make_graph(nodes, "trial", [x], [y], constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        images = np.linspace(-1, 1, 128, dtype=np.float32).reshape(1, 8, 4, 4)
        bound = RUNTIMES[engine](model.SerializeToString(), 1, dtype).bound([images])
        bound()
        right = np.allclose(bound.outputs()[0], np.maximum(images, 0).mean((2, 3)), atol=0.02)
        return "" if right else "it computes a wrong result"
    except BaseException as error:  # a broken package may raise anything, and end the process
        return message_line(error)


def _has_avx2() -> bool:
    try:
        return " avx2 " in Path("/proc/cpuinfo").read_text().replace("\n", " \n")
    except OSError:
        return True
