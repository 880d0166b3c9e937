"""Engines, each of which is one way to run a network when its latency is measured, by name in `ENGINES`.

An engine takes a timm network in evaluation mode and returns the module that would be deployed, on the device and in
the dtype asked for. The latency meter knows nothing else about it, so that a new engine is one entry of `ENGINES`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from kernels.fold import fold_batch_norms
from kernels.peers import cudnn_search, inductor_options
from nas.child_process import sign_of_life
from nas.config import LatencyConfig
from nas.errors import CandidateFailed, is_out_of_memory, message_line
from nas.files import no_room
from nas.latency.onnx_graph import NotKnown, exporters_graph, onnx_graph
from nas.latency.runtimes import RUNTIMES, Bound, OnnxRuntime, OpenVino

Prepare = Callable[[nn.Module, Tensor, LatencyConfig], nn.Module]


class Repeated(nn.Module):
    """Module that runs another on each of several inputs, (repeats, N, ...); it returns all outputs, so that no run is
    optimised away."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.module(each) for each in x.unbind(0)]


class InRuntime(nn.Module):
    """A network as a graph in a runtime, which runs it on torch's tensors.

    Args:
        apart: whether each of several inputs that are stacked in a tensor is one of the graph's own.
        listed: whether the network returns a list, as `Repeated` does.
    """

    def __init__(self, runtime: OnnxRuntime | OpenVino, apart: bool = False, listed: bool = False) -> None:
        super().__init__()
        self.runtime, self.apart, self.listed = runtime, apart, listed

    def bound(self, x: Tensor) -> Bound:
        """A run of the network on an input, which is converted once and then read where it lies.

        Raises:
            Refused: the runtime does not run it.
        """
        inputs = x.unbind(0) if self.apart else [x]
        with refusing():
            return self.runtime.bound([each.detach().float().contiguous().numpy() for each in inputs])

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        bound = self.bound(x)
        with refusing():
            bound()
        outputs = [torch.from_numpy(array.copy()) for array in bound.outputs()]
        return outputs if self.listed else outputs[0]

    def workspace_bytes(self) -> int:
        """See `OnnxRuntime.workspace_bytes`.

        Raises:
            CandidateFailed: the runtime does not tell.
            OSError: there is no room for what it writes.
        """
        try:
            with refusing():
                return self.runtime.workspace_bytes()
        except Refused as error:
            raise CandidateFailed(f"its memory is not known ({error})") from error


class Refused(Exception):
    """A runtime or an exporter does not take a network; the message is its own."""


@contextmanager
def refusing() -> Iterator[None]:
    """Context of calls of libraries that raise whatever they raise.

    Raises:
        Refused: a library raised an error that does not say that the memory or a disk is full.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if full := no_room(error):
            raise full from error
        raise Refused(message_line(error)) from error


@dataclass(frozen=True)
class Engine:
    """One way to run a network.

    Args:
        prepare: function from a folded channels_last module, an example input (N, C, H, W) and the deployment to the
            deployed module.
        devices: kinds of device it runs on; "interpreter" is a CPU under TRITON_INTERPRET=1.
        isolated: kinds of device on which it is measured in a child process (see `nas.latency.isolation`).
        refuses: whether an error means that its compiler refuses the network, which is no bug but a failed candidate.
        dtypes: data types that it computes in.
    """

    prepare: Prepare
    devices: tuple[str, ...]
    isolated: tuple[str, ...] = ()
    refuses: Callable[[Exception], bool] = lambda error: False
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")


def _eager(model: nn.Module, example: Tensor, config: LatencyConfig) -> nn.Module:
    return model


def _torchscript(model: nn.Module, example: Tensor, config: LatencyConfig) -> nn.Module:
    """Trace and freeze a module: at batch 1 half of the eager time on a CPU is dispatch."""
    with warnings.catch_warnings():
        # Deprecated in torch 2.11; it stays for as long as torch has it.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, example, check_trace=False)
        module: nn.Module = torch.jit.freeze(traced)
        return module


def _inductor(model: nn.Module, example: Tensor, config: LatencyConfig) -> nn.Module:
    # Compiled code is kept per code object, up to a limit past which torch falls back to eager without a word, and all
    # networks share timm's forward. An exported one has a forward of its own.
    exported = torch.export.export(model, (example,)).module()
    options = inductor_options(torch.device(config.device))
    return cast(nn.Module, torch.compile(exported, options=options) if options else torch.compile(exported))


def _in_runtime(name: str) -> Prepare:
    def prepare(model: nn.Module, example: Tensor, config: LatencyConfig) -> nn.Module:
        repeated = apart = isinstance(model, Repeated)
        try:
            if isinstance(model, Repeated):
                graph = onnx_graph(model.module, example.shape[1:], runs=len(example))
            else:
                graph = onnx_graph(model, example.shape)
        except NotKnown:
            # A layer of timm's. Torch's exporter makes one input of several.
            with refusing():
                graph, apart = exporters_graph(model.float(), example.shape), False
        with refusing():
            runtime = RUNTIMES[name](graph.SerializeToString(), config.threads, config.dtype)
        return InRuntime(runtime, apart, repeated)

    return prepare


def _fused(model: nn.Module, example: Tensor, config: LatencyConfig) -> nn.Module:
    """Replace blocks by fused Triton kernels, and tune the problems that this machine has not met."""
    from kernels import fuse

    fused = fuse(model, dtype=example.dtype)
    fused.prepare(example.shape[0], example.shape[2], sign_of_life)
    return fused


def examine(network: nn.Module, config: LatencyConfig, size: int, alive: Callable[[], None]) -> None:
    """Launch each fused kernel of a network many times over, see `kernels.tune.examine`.

    Args:
        size: width and height of the images in pixels.
        alive: function that is called now and then, as a sign of life.
    """
    from kernels import fuse, tune

    fused = fuse(fold(network, config), dtype=getattr(torch, config.dtype))
    # As in `ready`, under which the kernels were tuned.
    with cudnn_search(torch.device(config.device)):
        tune.examine(fused.tasks(config.batch_size, size), alive)


def _is_refused(error: Exception) -> bool:
    return isinstance(error, Refused)


def _triton_refuses(error: Exception) -> bool:
    from kernels.compiling import refuses

    return refuses(error)


ENGINES = {
    "onnxruntime": Engine(_in_runtime("onnxruntime"), ("cpu",), refuses=_is_refused, dtypes=("float32",)),
    "openvino": Engine(_in_runtime("openvino"), ("cpu",), refuses=_is_refused, dtypes=("float32", "bfloat16")),
    "eager": Engine(_eager, ("cpu", "cuda")),
    "torchscript": Engine(_torchscript, ("cpu",), isolated=("cpu",)),
    # Compilers raise whatever their stages raise.
    "inductor": Engine(_inductor, ("cpu", "cuda"), isolated=("cpu", "cuda"), refuses=lambda error: True),
    "fused": Engine(_fused, ("cuda", "interpreter"), isolated=("cuda",), refuses=_triton_refuses),
}


def is_isolated(config: LatencyConfig) -> bool:
    """Whether a deployment is measured in a child process."""
    return torch.device(config.device).type in ENGINES[config.engine].isolated


def runs_on(engine: Engine, device: torch.device) -> bool:
    """Whether an engine runs on a device, in this process's environment."""
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return device.type in engine.devices or (interpreted and "interpreter" in engine.devices)


def fold(network: nn.Module, config: LatencyConfig) -> nn.Module:
    """A copy of a network with its batch norms folded, channels_last, in the deployment's dtype and on its device."""
    folded: nn.Module = fold_batch_norms(network.eval()).to(  # type: ignore[call-overload]
        torch.device(config.device), getattr(torch, config.dtype), memory_format=torch.channels_last
    )
    return folded.requires_grad_(False)


def deploy(network: nn.Module, config: LatencyConfig, example: Tensor) -> nn.Module:
    """The module that the engine of `config` runs: batch norms folded, channels_last, in the deployment's dtype.

    Raises:
        CandidateFailed: the engine cannot compile this network.
    """
    return ready(fold(network, config), config, example)


def ready(folded: nn.Module, config: LatencyConfig, example: Tensor) -> nn.Module:
    """A folded module as the engine runs it, after its first run, in which compilers work.

    Raises:
        CandidateFailed: the engine cannot compile it.
        OSError: there is no room for what it compiles.
    """
    engine = ENGINES[config.engine]
    try:
        with torch.inference_mode(), cudnn_search(torch.device(config.device)):
            module = engine.prepare(folded, example, config)
            module(example)
    except Exception as error:
        # The network is not to blame for a full disk.
        if full := no_room(error):
            raise full from error
        # Running out of memory is handled further out.
        if is_out_of_memory(error) or not engine.refuses(error):
            raise
        raise CandidateFailed(f"engine {config.engine} does not compile it ({message_line(error)})") from error
    return module
