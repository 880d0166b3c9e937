"""A timm network with its blocks, stem and head replaced by fused kernels: `fuse(model, dtype=torch.float16)`.

`fuse` looks at the modules to see which can be fused. The others stay torch's, channels_last and with their batch norms
folded, and the report says why.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import timm.layers
import torch
from timm.models import EfficientNet, MobileNetV3
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual, UniversalInvertedResidual
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode

from kernels import head, mbconv, ops, packing, stem, timing, tune
from kernels.compiling import Kernel, Task
from kernels.fold import fold_batch_norms
from kernels.problem import DTYPE_BYTES, parts, unsupported

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Partial sums may raise a network's peak workspace by this share.
WORKSPACE_MARGIN = 0.05
# But this much scratch every block of a network may have. Of 40 random networks of the space `small` (32 pixels, batch
# 1), whose tensors are smaller than that, 5 are predicted to take 2 to 7 % less time with it, and more gains nothing.
LEAST_SCRATCH_BYTES = 128 * 2**10
NOMINAL_RESOLUTION = 224

# timm has classes of its own beside torch's for some of these.
_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.SiLU: "silu", nn.ReLU: "relu", nn.GELU: "gelu", nn.Hardswish: "hard_swish", nn.Identity: "none",
    timm.layers.Swish: "silu", timm.layers.GELU: "gelu", timm.layers.HardSwish: "hard_swish",
}  # fmt: skip


class NotFused(Exception):
    """The reason why a module of a network is left to torch."""


# -- Modules ---------------------------------------------------------------------------------------------------------


class _Fused(nn.Module):
    """A fused module: its packed weights and its plain layers, between which the tuner chooses for each problem."""

    kernel: Kernel

    def __init__(self, weights: Sequence[Tensor], layers: Sequence[Tensor], stride: int, activation: str) -> None:
        super().__init__()
        self.stride, self.activation = stride, activation
        self.counts = len(weights), len(layers)
        for index, tensor in enumerate(weights):
            self.register_buffer(f"weight_{index}", tensor)
        for index, tensor in enumerate(layers):
            self.register_buffer(f"layer_{index}", tensor)

    @property
    def weights(self) -> list[Tensor]:
        return [getattr(self, f"weight_{index}") for index in range(self.counts[0])]

    @property
    def layers(self) -> list[Tensor]:
        return [getattr(self, f"layer_{index}") for index in range(self.counts[1])]

    def problem(self, shape: Sequence[int]) -> Any:
        """The problem on an input of shape (N, C, H, W)."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        shapes = ", ".join("x".join(map(str, tensor.shape)) for tensor in self.layers[::2])
        return f"{shapes}, stride={self.stride}, {self.activation}"


class _FusedBlock(_Fused):
    """A fused block; it may split its tiles if the network lends it scratch.

    It allocates its output, and with three launches the tensors between them.
    """

    operator: Callable[..., Tensor]
    make_problem: Callable[..., Any]
    # The most programs that may share a tile's hidden channels, at any size of the input; `_limit_splits` raises it
    # where there is memory.
    max_splits = 1
    # Scratch that the block may have in any case; at small sizes it allows more splits.
    least_scratch_bytes = 0

    def __init__(
        self, weights: Sequence[Tensor], layers: Sequence[Tensor], stride: int, activation: str, residual: bool
    ) -> None:
        super().__init__(weights, layers, stride, activation)
        self.residual = residual

    def problem(self, shape: Sequence[int]) -> Any:
        layers = self.layers
        problem = type(self).make_problem(shape, layers[0].dtype, layers, self.stride, self.activation, self.residual)
        fitting = ops.max_splits(problem.out_pixels, problem.padded_out, self.least_scratch_bytes)
        return ops.with_splits(problem, max(self.max_splits, fitting))

    def new_scratch(self, x: Tensor) -> Tensor:
        """Allocate float32 memory for the partial sums of split tiles."""
        if not torch.compiler.is_compiling():
            return x.new_empty(self.problem(x.shape).scratch_elements, dtype=torch.float32)
        # Sizes may be symbols here, which a problem cannot hold.
        elements, least = 0, self.least_scratch_bytes // 4
        if self.max_splits > 1:
            batch, _, height, width = x.shape
            pixels = batch * ((height - 1) // self.stride + 1) * ((width - 1) // self.stride + 1)
            elements = self.max_splits * pixels * sum(parts(self.layers[-2].shape[0]))
        # Dynamo takes Python's `max`, and torch.export, whose symbols are no int, torch's.
        largest = max if isinstance(elements, int) else torch.sym_max
        return x.new_empty(largest(elements, least), dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        scratch = self.new_scratch(x)
        return type(self).operator(x, self.weights, self.layers, scratch, self.stride, self.activation, self.residual)


class FusedBlock(_FusedBlock):
    """A ConvFirst block (`kernels.convfirst`)."""

    kernel = ops.BLOCK
    operator = ops.block
    make_problem = staticmethod(ops.block_problem)

    def __init__(self, layers: Sequence[Tensor], stride: int, activation: str, residual: bool) -> None:
        problem = ops.block_problem(
            (1, layers[0].shape[0], 1, 1), layers[0].dtype, layers, stride, activation, residual
        )
        if why := unsupported(problem):
            raise NotFused(why)
        packed = packing.pack(layers, problem)
        super().__init__(list(vars(packed).values()), layers, stride, activation, residual)


class FusedMBConv(_FusedBlock):
    """A block with its convolution in the middle, or a depthwise-separable one (`kernels.mbconv`)."""

    kernel = ops.MBCONV
    operator = ops.mbconv_block
    make_problem = staticmethod(ops.mbconv_problem)

    def __init__(self, layers: Sequence[Tensor], stride: int, activation: str, residual: bool) -> None:
        channels = layers[0].shape[1] if len(layers) == 6 else layers[0].shape[0]
        problem = ops.mbconv_problem((1, channels, 1, 1), layers[0].dtype, layers, stride, activation, residual)
        if why := mbconv.unsupported(problem):
            raise NotFused(why)
        super().__init__(mbconv.pack(layers, problem), layers, stride, activation, residual)


class _Started(nn.Module):
    """A convolution of torch's followed by a fused block, with a residual around both or none."""

    def __init__(self, begin: nn.Module, rest: nn.Module, residual: bool) -> None:
        super().__init__()
        self.begin, self.rest, self.residual = begin, rest, residual

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.rest(self.begin(x))
        return out + x if self.residual else out


class FusedStem(_Fused):
    """Convolution, bias and activation (`kernels.stem`)."""

    kernel = ops.STEM

    def __init__(self, layers: Sequence[Tensor], stride: int, activation: str) -> None:
        problem = ops.stem_problem((1, layers[0].shape[1], 1, 1), layers[0].dtype, layers, stride, activation)
        if why := stem.unsupported(problem):
            raise NotFused(why)
        super().__init__(stem.pack(layers, problem), layers, stride, activation)

    def problem(self, shape: Sequence[int]) -> Any:
        return ops.stem_problem(shape, self.layers[0].dtype, self.layers, self.stride, self.activation)

    def forward(self, x: Tensor) -> Tensor:
        return ops.stem_layer(x, self.weights, self.layers, self.stride, self.activation)  # type: ignore[no-any-return]


class FusedHead(_Fused):
    """Pool, 1x1 convolution and activation if there are any, and classifier (`kernels.head`)."""

    kernel = ops.HEAD

    def __init__(self, layers: Sequence[Tensor], activation: str) -> None:
        problem = ops.head_problem((1, layers[0].shape[1], 1, 1), layers[0].dtype, layers, activation)
        if why := head.unsupported(problem):
            raise NotFused(why)
        super().__init__(head.pack(layers, problem), layers, 1, activation)

    def problem(self, shape: Sequence[int]) -> Any:
        return ops.head_problem(shape, self.layers[0].dtype, self.layers, self.activation)

    def forward(self, x: Tensor) -> Tensor:
        return ops.head_layers(x, self.weights, self.layers, self.activation)  # type: ignore[no-any-return]


# -- Reading timm's modules ------------------------------------------------------------------------------------------


def _activation(module: nn.Module, where: str) -> str:
    """The kernels' name of an activation; like all checks below it raises NotFused."""
    name = _ACTIVATIONS.get(type(module))
    if name is None or (isinstance(module, nn.GELU) and getattr(module, "approximate", "none") != "none"):
        raise NotFused(f"{where}={module} is no activation that a fused kernel has")
    return name


def _require_identity(block: nn.Module, *names: str) -> None:
    for name in names:
        module = getattr(block, name, None)
        if module is not None and not isinstance(module, nn.Identity):
            raise NotFused(f"{name}={type(module).__name__} has no place in a fused kernel")


def _conv(conv: nn.Module, where: str, kernel_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Weight and bias of a plain convolution that is padded by half its kernel and has its batch norm folded."""
    if type(conv) is not nn.Conv2d:
        raise NotFused(f"{where}={type(conv).__name__} is not a plain convolution")
    size = conv.kernel_size[0]
    if conv.kernel_size != (size, size) or (kernel_size is not None and size != kernel_size):
        raise NotFused(f"{where} has kernel_size={conv.kernel_size}")
    if conv.dilation != (1, 1):
        raise NotFused(f"{where} has dilation={conv.dilation}")
    if conv.padding != (size // 2, size // 2) or conv.padding_mode != "zeros":
        raise NotFused(f"{where} has padding={conv.padding} with kernel_size={size}")
    if conv.stride[0] != conv.stride[1]:
        raise NotFused(f"{where} has stride={conv.stride}")
    if kernel_size == 1 and (conv.stride != (1, 1) or conv.groups != 1):
        raise NotFused(f"{where} has stride={conv.stride}, groups={conv.groups}")
    bias = conv.bias if conv.bias is not None else conv.weight.new_zeros(conv.out_channels)
    return conv.weight.detach(), bias.detach()


def _scaled(weight: Tensor, bias: Tensor, block: nn.Module) -> tuple[Tensor, Tensor]:
    """A projection with the block's layer scale folded in."""
    scale = getattr(block, "layer_scale", None)
    if scale is None or isinstance(scale, nn.Identity):
        return weight, bias
    if not isinstance(getattr(scale, "gamma", None), Tensor):
        raise NotFused(f"layer_scale={type(scale).__name__} is no layer scale that folds")
    return weight * scale.gamma.detach().view(-1, 1, 1, 1), bias * scale.gamma.detach()


def _no_activation(module: nn.Module, where: str) -> None:
    if _activation(module, where) != "none":
        raise NotFused(f"{where}={module} activates where a fused kernel does not")


def _has_pooled_shortcut(block: nn.Module) -> TypeGuard[UniversalInvertedResidual]:
    """Whether a block is a `PooledResidual` of `search_spaces.timm_models`.

    Each exported network brings copies of that module's classes, so they are known by their names.
    """
    names = type(block).__name__, type(getattr(block, "shortcut", None)).__name__
    return isinstance(block, UniversalInvertedResidual) and names == ("PooledResidual", "PooledShortcut")


class _Fuser:
    """Maker of fused modules in one dtype, from modules whose batch norms are folded."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def _cast(self, *layers: Tensor) -> list[Tensor]:
        return [
            tensor.to(self.dtype).contiguous(
                memory_format=torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
            )
            for tensor in layers
        ]

    def universal(self, block: UniversalInvertedResidual) -> nn.Module:
        """Fuse a universal block: ConvFirst, or MBConv, perhaps after a convolution of torch's."""
        _require_identity(block, "se", "dw_end")
        act = _activation(block.pw_exp.bn, "pw_exp.bn")
        _require_identity(block.pw_exp, "aa")
        _no_activation(block.pw_proj.bn, "pw_proj.bn")
        expand = _conv(block.pw_exp.conv, "pw_exp", 1)
        project = _scaled(*_conv(block.pw_proj.conv, "pw_proj", 1), block)
        starts = not isinstance(block.dw_start, nn.Identity)
        if isinstance(block.dw_mid, nn.Identity):
            if not starts:
                raise NotFused("no convolution of more than one pixel")
            _require_identity(block.dw_start, "aa")
            _no_activation(block.dw_start.bn, "dw_start.bn")
            conv = _conv(block.dw_start.conv, "dw_start")
            stride = block.dw_start.conv.stride[0]
            return FusedBlock(
                self._cast(*conv, *expand, *project), stride, act, block.has_skip or _has_pooled_shortcut(block)
            )
        if _has_pooled_shortcut(block):
            raise NotFused(f"a pooled shortcut has no place around dw_mid={type(block.dw_mid).__name__}")
        _require_identity(block.dw_mid, "aa")
        if _activation(block.dw_mid.bn, "dw_mid.bn") != act:
            raise NotFused(f"dw_mid.bn={block.dw_mid.bn} activates differently from the expansion")
        layers = self._cast(*expand, *_conv(block.dw_mid.conv, "dw_mid"), *project)
        fused = FusedMBConv(layers, block.dw_mid.conv.stride[0], act, block.has_skip and not starts)
        return _Started(block.dw_start, fused, block.has_skip) if starts else fused

    def inverted(self, block: InvertedResidual) -> nn.Module:
        _require_identity(block, "aa", "se", "conv_s2d")
        act = _activation(block.bn1, "bn1")
        if _activation(block.bn2, "bn2") != act:
            raise NotFused(f"bn2={block.bn2} activates differently from the expansion")
        _no_activation(block.bn3, "bn3")
        layers = [*_conv(block.conv_pw, "conv_pw", 1), *_conv(block.conv_dw, "conv_dw")]
        layers += _scaled(*_conv(block.conv_pwl, "conv_pwl", 1), block)
        return FusedMBConv(self._cast(*layers), block.conv_dw.stride[0], act, block.has_skip)

    def separable(self, block: DepthwiseSeparableConv) -> nn.Module:
        _require_identity(block, "aa", "se", "conv_s2d")
        _no_activation(block.bn2, "bn2")
        layers = [*_conv(block.conv_dw, "conv_dw"), *_conv(block.conv_pw, "conv_pw", 1)]
        return FusedMBConv(self._cast(*layers), block.conv_dw.stride[0], _activation(block.bn1, "bn1"), block.has_skip)

    def stem(self, model: Any) -> nn.Module:
        layers = _conv(model.conv_stem, "conv_stem")
        if model.conv_stem.groups != 1:
            raise NotFused(f"conv_stem has groups={model.conv_stem.groups}")
        return FusedStem(self._cast(*layers), model.conv_stem.stride[0], _activation(model.bn1, "bn1"))

    def head(self, model: Any) -> nn.Module:
        if not isinstance(model, MobileNetV3):
            raise NotFused(f"{type(model).__name__} pools after its 1x1 convolution")
        if model.global_pool.pool_type != "avg":
            raise NotFused(f"global_pool={model.global_pool.pool_type!r}")
        if not isinstance(model.classifier, nn.Linear):
            raise NotFused("num_classes=0: there is no classifier")
        acts = [_activation(module, "act2") for module in (model.norm_head, model.act2)]
        act = next((name for name in acts if name != "none"), "none")
        classifier = model.classifier
        bias = classifier.bias if classifier.bias is not None else classifier.weight.new_zeros(classifier.out_features)
        layers = [classifier.weight.detach(), bias.detach()]
        if not isinstance(model.conv_head, nn.Identity):
            layers = [*_conv(model.conv_head, "conv_head", 1), *layers]
        elif act != "none":
            raise NotFused(f"act2={model.act2} follows no 1x1 convolution")
        return FusedHead(self._cast(*layers), act)

    def block(self, block: nn.Module) -> nn.Module:
        if type(block) is UniversalInvertedResidual or _has_pooled_shortcut(block):
            return self.universal(block)
        if type(block) is InvertedResidual:
            return self.inverted(block)
        if type(block) is DepthwiseSeparableConv:
            return self.separable(block)
        raise NotFused(f"{type(block).__name__} has no fused form")


# -- Networks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FusionStatus:
    """The status of a module of a network, which is fused or not: a block, the stem or the head.

    Args:
        name: the module's name in timm's network.
        kind: the name of the module's class in timm.
        fused: whether a fused kernel can run it.
        reason: reason for which it is not fused; empty if it is.
    """

    name: str
    kind: str
    fused: bool
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.kind}, {'fused' if self.fused else f'not fused: {self.reason}'}"


class Graph:
    """A CUDA graph of one forward pass: call it with a batch, or `replay` it on the last one.

    The output is the graph's own tensor, which the next replay overwrites.

    Raises:
        ValueError: the network is not on a CUDA device.
    """

    def __init__(self, network: FusedNetwork, batch: int, resolution: int) -> None:
        device = network.device
        if device.type != "cuda":
            raise ValueError(f"the network is on {device}: CUDA graphs need a CUDA device")
        shape = (batch, network.in_channels, resolution, resolution)
        self.input: Tensor = torch.zeros(shape, dtype=network.dtype, device=device).to(
            memory_format=torch.channels_last
        )
        with torch.inference_mode(), torch.cuda.device(device):
            self._graph, output = timing.captured(lambda: network(self.input))
        self.output: Tensor = output
        # A graph holds addresses only, so the weights must live as long as it does.
        self._network = network

    def replay(self) -> Tensor:
        self._graph.replay()
        return self.output

    def __call__(self, x: Tensor) -> Tensor:
        """Compute logits (batch, classes) of images (batch, C, H, W), channels_last, in the network's dtype.

        Raises:
            ValueError: the shape is not the captured one, or the input is not what the network takes.
        """
        if x.shape != self.input.shape:
            raise ValueError(f"input has shape {tuple(x.shape)}, the graph {tuple(self.input.shape)}")
        self._network._require(x)
        self.input.copy_(x)
        return self.replay()


def _steps(network: Any) -> tuple[nn.Module, ...]:
    """A timm network's modules in the order of its forward pass; none contains another.

    Called one after the other, each frees its input when it has run. timm's own forward passes hold the stem's output,
    and each stage's input, until all blocks of the stage have run.
    """
    blocks = [block for stage in network.blocks for block in stage]
    if isinstance(network, MobileNetV3):
        end = [network.global_pool, network.conv_head, network.norm_head, network.act2, network.flatten]
    else:
        end = [network.conv_head, network.bn2, network.global_pool]
    return (network.conv_stem, network.bn1, *blocks, *end, network.classifier)


class FusedNetwork(nn.Module):
    """A timm network for inference, made by `fuse`, with fused modules where possible.

    Attributes:
        fusion: the status of each module, in the order of the network.
        dtype: data type of input, weights and output.
        in_channels: number of the input's channels.
    """

    def __init__(
        self, network: nn.Module, fusion: Sequence[FusionStatus], dtype: torch.dtype, in_channels: int
    ) -> None:
        super().__init__()
        self.network = network
        self.fusion = tuple(fusion)
        self.dtype = dtype
        self.in_channels = in_channels
        self.eval().requires_grad_(False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> FusedNetwork:
        """Move the network to another device; the dtype is fixed, as weights are packed for it.

        Raises:
            ValueError: the dtype would change.
        """
        sample = torch.empty(0, dtype=self.dtype, device=self.device)
        if (made := fn(sample)).dtype != self.dtype:
            raise ValueError(f"dtype={made.dtype}: the network is packed for {self.dtype}; fuse it anew")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    @property
    def device(self) -> torch.device:
        return next(tensor.device for tensor in (*self.buffers(), *self.parameters()))

    @property
    def fused_modules(self) -> dict[str, _Fused]:
        return {name: module for name, module in self.network.named_modules() if isinstance(module, _Fused)}

    def train(self, mode: bool = True) -> FusedNetwork:
        """Refuse training mode.

        Raises:
            ValueError: `mode` is True.
        """
        if mode:
            raise ValueError("mode=True: a fused network is for inference; train the network it was made of")
        super().train(False)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits (N, classes) of images (N, C, H, W), channels_last, in the network's dtype.

        Raises:
            ValueError: the input has another layout, dtype, device or number of channels.
        """
        if not torch.compiler.is_compiling():
            self._require(x)
        for step in _steps(self.network):
            x = step(x)
        return x

    def _require(self, x: Tensor) -> None:
        if self.fused_modules and not isinstance(x, FakeTensor):
            ops.require(x, self.in_channels, self.dtype, self.device)

    def report(self, batch: int | None = None, resolution: int | None = None) -> str:
        """Describe each module in a line: fused, or why not; for a given input also what runs, and its times."""
        if batch is None or resolution is None:
            return "\n".join(map(str, self.fusion))
        modules, running = self.fused_modules, {}
        for name, problem in self.problems(batch, resolution).items():
            choice = tune.choose(modules[name].kernel, problem, self.device)
            running[name] = choice.describe()
        return "\n".join(
            f"{status}" + "".join(f" [{text}]" for name, text in running.items() if _belongs(name, status.name))
            for status in self.fusion
        )

    def problems(self, batch: int, resolution: int) -> dict[str, Any]:
        """The problem of each fused module on a batch of square images, by module name, without computing anything."""
        shapes: dict[str, Sequence[int]] = {}
        hooks = [
            module.register_forward_pre_hook(
                lambda module, args, name=name: shapes.__setitem__(name, tuple(args[0].shape))
            )
            for name, module in self.fused_modules.items()
        ]
        try:
            with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
                shape = (batch, self.in_channels, resolution, resolution)
                x = torch.empty(shape, dtype=self.dtype, device=self.device, memory_format=torch.channels_last)
                self(x)
        finally:
            for hook in hooks:
                hook.remove()
        modules = self.fused_modules
        return {name: modules[name].problem(into) for name, into in shapes.items()}

    def tasks(self, batch: int, resolution: int) -> list[Task]:
        """The distinct problems of the fused modules on a batch of square images, with tensors of their shapes on the
        network's device, which may be "meta"."""
        modules = self.fused_modules
        tasks: dict[Any, Task] = {}
        for name, problem in self.problems(batch, resolution).items():
            module = modules[name]
            if (module.kernel.name, problem) not in tasks:
                tasks[module.kernel.name, problem] = _task(module, problem)
        return list(tasks.values())

    def prepare(self, batch: int, resolution: int, alive: Callable[[], None] = lambda: None) -> float:
        """Prepare for batches of this shape: on CUDA, tune every problem that is new to this machine.

        Args:
            alive: function that is called now and then, as a sign of life.

        Returns:
            Duration in seconds.
        """
        begin = time.perf_counter()
        if self.device.type == "cuda":
            tune.tune(self.tasks(batch, resolution), alive)
        return time.perf_counter() - begin

    def graph(self, batch: int, resolution: int) -> Graph:
        """Tune for a batch of square images, and capture a CUDA graph of the forward pass on it.

        Raises:
            ValueError: the network is not on a CUDA device.
        """
        if self.device.type == "cuda":
            self.prepare(batch, resolution)
        return Graph(self, batch, resolution)


def _belongs(fused: str, module: str) -> bool:
    """Whether a fused module stands for timm's module or lies within it; the head's stands in place of the pool."""
    return fused == module or fused.startswith(f"{module}.") or (module, fused) == ("head", "global_pool")


def _limit_splits(network: FusedNetwork) -> None:
    """Set each block's `max_splits` so that partial sums raise the peak workspace by `WORKSPACE_MARGIN` at most, or by
    `LEAST_SCRATCH_BYTES` where that is more.

    Partial sums, input and output grow alike with batch and resolution. One resolution that every total stride divides
    therefore decides for all.
    """
    problems, modules = network.problems(1, NOMINAL_RESOLUTION), network.fused_modules
    largest = max(map(moved_bytes, problems.values()), default=0)
    for name, problem in problems.items():
        module = modules[name]
        if isinstance(module, _FusedBlock):
            left = int((1 + WORKSPACE_MARGIN) * largest) - moved_bytes(problem)
            module.max_splits = ops.max_splits(problem.out_pixels, problem.padded_out, left)
    for module in modules.values():
        if isinstance(module, _FusedBlock):
            module.least_scratch_bytes = LEAST_SCRATCH_BYTES


def _input_shape(problem: Any) -> tuple[int, int, int, int]:
    if isinstance(problem, head.HeadProblem):
        return (problem.batch, problem.in_channels, problem.pixels, 1)
    return (problem.batch, problem.in_channels, problem.height, problem.width)


def moved_bytes(problem: Any) -> int:
    """Bytes of a problem's input and output."""
    batch, channels, height, width = _input_shape(problem)
    is_head = isinstance(problem, head.HeadProblem)
    out: int = problem.batch * problem.classes if is_head else problem.out_pixels * problem.out_channels
    return DTYPE_BYTES[problem.dtype] * (batch * channels * height * width + out)


def _task(module: _Fused, problem: Any) -> Task:
    layers = module.layers
    # Random, as products of zeros draw less power and so run faster.
    x = torch.randn(_input_shape(problem), dtype=layers[0].dtype, device=layers[0].device)
    scratch = [module.new_scratch(x)] if isinstance(module, _FusedBlock) else []
    weights = [*module.weights, *scratch]
    return Task(module.kernel, problem, x.to(memory_format=torch.channels_last), weights, layers)


def fuse(model: nn.Module, dtype: torch.dtype = torch.float16) -> FusedNetwork:
    """Copy a timm network for inference, and fuse its blocks, stem and head where possible.

    Args:
        model: a `MobileNetV3` (as ConvFirst networks are) or `EfficientNet` of timm, in evaluation mode; left as it is.
        dtype: float16, bfloat16 or float32; float32 is for checking, as products on tensor cores need 16 bits.

    Raises:
        ValueError: the model is in training mode or of another class, or the dtype is none of these.
    """
    if not isinstance(model, MobileNetV3 | EfficientNet):
        raise ValueError(f"model={type(model).__name__} is neither timm's MobileNetV3 nor its EfficientNet")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype} is none of {', '.join(map(str, DTYPES))}")
    folded: Any = fold_batch_norms(model).requires_grad_(False)
    fuser = _Fuser(dtype)
    fusion: list[FusionStatus] = []

    def attempt(name: str, module: nn.Module, make: Callable[[], nn.Module]) -> nn.Module | None:
        try:
            made = make()
        except NotFused as why:
            fusion.append(FusionStatus(name, type(module).__name__, False, str(why)))
            return None
        fusion.append(FusionStatus(name, type(module).__name__, True))
        return made

    if made := attempt("conv_stem", folded.conv_stem, lambda: fuser.stem(folded)):
        folded.conv_stem, folded.bn1 = made, nn.Identity()
    for stage_index, stage in enumerate(folded.blocks):
        for index, block in enumerate(stage):
            name = f"blocks.{stage_index}.{index}"
            if made := attempt(name, block, lambda block=block: fuser.block(block)):  # type: ignore[misc]
                stage[index] = made
    if made := attempt("head", folded, lambda: fuser.head(folded)):
        # timm runs these one after the other.
        folded.global_pool, folded.conv_head, folded.norm_head = made, nn.Identity(), nn.Identity()
        folded.act2, folded.flatten, folded.classifier = nn.Identity(), nn.Identity(), nn.Identity()
    folded = folded.to(memory_format=torch.channels_last)
    for module in folded.modules():
        # Fused modules hold float32 biases beside their weights.
        if not isinstance(module, _Fused):
            for parameter in module._parameters.values():
                if parameter is not None:
                    parameter.data = parameter.data.to(dtype)
            for key, buffer in module._buffers.items():
                if buffer is not None and buffer.is_floating_point():
                    module._buffers[key] = buffer.to(dtype)
    fused = FusedNetwork(folded, fusion, dtype, model.conv_stem.in_channels)
    _limit_splits(fused)
    return fused
