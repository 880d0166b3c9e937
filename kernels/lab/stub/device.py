"""A CUDA device that is not there: tensors in the CPU's memory that are on `cuda:0` for whoever asks, and CUDA graphs.

torch's operations run on the CPU, and Triton's kernels are launched with the stub driver, which runs none. What is
written for CUDA therefore runs as it is: streams, events, copies and captures. Results of kernels are missing, and time
is made up: each operation and each launch takes `OPERATION_SECONDS`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._subclasses import fake_tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from kernels.cost_model import GPU_SPECS
from kernels.lab.stub.driver import Launch, StubDriver

HERE = torch.device("cuda", 0)
OPERATION_SECONDS = 1e-6
aten = torch.ops.aten
ALLOCATIONS = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided)
COPIES = (aten._to_copy, aten.copy_)
PINS = (aten._pin_memory, aten.pin_memory)
# The CPU has to know the result, or the size of the result.
WAITS = (
    aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten._unique2,
    aten.unique_dim, aten.unique_consecutive, aten.bincount, aten.repeat_interleave,
)  # fmt: skip


class CaptureError(RuntimeError):
    """Something was done in a capture that a CUDA graph does not hold.

    That is: waiting for the GPU, a copy between CPU and GPU, pinned memory, the first compilation or loading of a
    Triton kernel, a launch on another stream. CUDA would allow a few of these, which then have no place in a replay.
    """


# -- What torch.cuda has -----------------------------------------------------------------------------------------------


class DeviceTensor(Tensor):
    """A tensor that is on the device, `held` in the CPU's memory.

    For torch's own code it is a "meta" tensor: with one on CUDA torch would set CUDA's runtime up.
    """

    held: Tensor
    device = HERE
    is_cuda = True
    is_meta = False

    @staticmethod
    def __new__(cls, held: Tensor) -> DeviceTensor:
        made: DeviceTensor = Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, layout=held.layout,
            device=torch.device("meta"),
            requires_grad=held.requires_grad,
        )  # fmt: skip
        made.held = held
        return made

    def data_ptr(self) -> int:
        # Triton's launcher asks for it.
        StubCuda.current().uses(self)
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = DeviceTensor(self.held.clone())
        memo[id(self)] = copied = nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
        return copied

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.held!r})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return StubCuda.current().run(func, args, dict(kwargs or {}))


class Stream:
    """A stream, in which everything is done at once."""

    numbers = itertools.count(1)

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        # Like a stream's address; the default stream's is 0.
        self.cuda_stream = 16 * next(Stream.numbers)
        self.device, self.device_index = HERE, 0

    def wait_stream(self, other: Stream) -> None:
        pass

    def synchronize(self) -> None:
        StubCuda.current().wait("Stream.synchronize")


class Event:
    """An event, which keeps the made-up time. In a capture an external one is a part of the graph, and is recorded
    anew by each replay."""

    def __init__(self, enable_timing: bool = False, external: bool = False, **options: Any) -> None:
        self.external = external
        self.seconds: float | None = None

    def record(self, stream: Stream | None = None) -> None:
        cuda = StubCuda.current()
        if cuda.capturing is None:
            self.seconds = cuda.seconds
        elif self.external:
            cuda.capturing.events.append((self, cuda.capturing.seconds))

    def synchronize(self) -> None:
        StubCuda.current().wait("Event.synchronize")

    def elapsed_time(self, end: Event) -> float:
        if self.seconds is None or end.seconds is None:
            raise ValueError("an event was not recorded")
        return 1e3 * (end.seconds - self.seconds)


class Graph:
    """A CUDA graph, in place of `torch.cuda.CUDAGraph`; torch's own `torch.cuda.graph` captures it.

    Attributes:
        launches: the Triton kernels' launches that it holds, in order.
        operations: the names of torch's operations that it holds, in order.
        events: the external events that it holds, with the seconds from its beginning.
        replays: number of its replays.
        error: the first thing that was done in the capture and must not be.
    """

    def __init__(self, keep_graph: bool = False) -> None:
        self.launches: list[Launch] = []
        self.operations: list[str] = []
        self.events: list[tuple[Event, float]] = []
        self.replays = 0
        self.error: CaptureError | None = None
        self.captured = False
        # A graph keeps the memory that was allocated in its capture; all other that it uses, somebody else must keep.
        self.own: dict[int, torch.UntypedStorage] = {}
        self.foreign: dict[int, StorageWeakRef] = {}

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        cuda = StubCuda.current()
        if cuda.capturing is not None:
            raise CaptureError("a capture within a capture")
        self.stream, self.first = cuda.stream.cuda_stream, cuda.driver.total
        cuda.capturing = self

    def capture_end(self) -> None:
        cuda = StubCuda.current()
        cuda.capturing = None
        self.launches = cuda.driver.launches_from(self.first)
        if self.error is None and any(launch.stream != self.stream for launch in self.launches):
            self.error = CaptureError("in a capture: a kernel is launched on another stream")
        if self.error is not None:
            # As CUDA does after an error; `torch.cuda.graph` then leaves its stream the current one.
            raise CaptureError("the capture was invalidated") from self.error
        self.captured = True

    @property
    def seconds(self) -> float:
        """The made-up time of what was captured so far."""
        return OPERATION_SECONDS * (len(self.operations) + StubCuda.current().driver.total - self.first)

    def replay(self) -> None:
        """Count a replay.

        Raises:
            RuntimeError: nothing was captured, or memory that the graph uses has been freed since.
        """
        if not self.captured:
            raise RuntimeError("nothing was captured")
        if any(storage.expired() for storage in self.foreign.values()):
            raise RuntimeError("the graph uses memory that has been freed since its capture")
        self.replays += 1
        cuda = StubCuda.current()
        for event, offset in self.events:
            event.seconds = cuda.seconds + offset
        cuda.operations += len(self.launches) + len(self.operations)

    def pool(self) -> tuple[int, int]:
        return (0, id(self))

    def reset(self) -> None:
        self.captured = False


# -- The device --------------------------------------------------------------------------------------------------------


class StubCuda(TorchDispatchMode):
    """The device: what torch's operations do with its tensors. `stub_cuda` makes it.

    Attributes:
        graphs: all graphs that were made, in order.
        stream: the current stream.
        capturing: the graph that is being captured.
        operations: number of torch's operations so far, and of all that replays held.
        waits: number of times that the CPU has waited for the device.
    """

    _active: StubCuda | None = None

    def __init__(self, driver: StubDriver) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.driver = driver
        self.default_stream = self.stream = Stream()
        self.stream.cuda_stream = 0
        self.capturing: Graph | None = None
        self.graphs: list[Graph] = []
        self.operations = self.waits = 0

    @classmethod
    def current(cls) -> StubCuda:
        assert cls._active is not None, "a tensor of stub_cuda is used after its end"
        return cls._active

    @property
    def seconds(self) -> float:
        """The made-up time."""
        return OPERATION_SECONDS * (self.operations + self.driver.total)

    def refuse(self, what: str) -> None:
        """Invalidate a capture, if there is one, by what is done in it."""
        if self.capturing is not None:
            error = CaptureError(f"in a capture: {what}")
            self.capturing.error = self.capturing.error or error
            raise error

    def wait(self, what: str) -> None:
        self.refuse(f"{what} waits for the GPU")
        self.waits += 1

    def uses(self, tensor: DeviceTensor) -> None:
        """Note in a capture that the graph uses a tensor's memory."""
        if self.capturing is not None:
            storage = tensor.held.untyped_storage()
            if storage.nbytes() and storage._cdata not in self.capturing.own:
                self.capturing.foreign[storage._cdata] = StorageWeakRef(storage)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self.run(func, args, dict(kwargs or {}))

    def run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run one of torch's operations."""
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
            return _shapes_alone(func, args, kwargs)
        if (ours := OPDEFS.get(func._schema.name)) is not None:
            # An operator of ours: what it does with tensors comes here again.
            with self:
                return ours._init_fn(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            # In inference mode torch leaves it to us to take such an operation apart.
            with self:
                if (done := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return done
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        there = [each for each in tensors if isinstance(each, DeviceTensor)]
        asked = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
        # For torch's own code the device's tensors are on "meta".
        stays = asked == "cuda" or (bool(there) and asked in (None, "meta"))
        if stays and asked is not None:
            kwargs["device"] = torch.device("cpu")
        if kwargs.get("pin_memory") or func.overloadpacket in PINS:
            self.refuse("pinned memory is allocated")
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
        if there and func.overloadpacket in WAITS:
            self.wait(func.name())
        if func.overloadpacket in COPIES and (0 < len(there) < len(tensors) or bool(there) != stays):
            self.refuse(f"{func.name()} copies between CPU and GPU")
        elif there and any(each.ndim for each in tensors if not isinstance(each, DeviceTensor)):
            raise RuntimeError(f"{func.name()}: some tensors are on the CPU, some on {HERE}")
        return self._run_on_cpu(func, args, kwargs, there, stays)

    def _run_on_cpu(
        self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], there: list[DeviceTensor], stays: bool
    ) -> Any:
        """Run an operation on the CPU; what it makes is on the device if it stays there."""
        if stays and not func.is_view and func.overloadpacket not in ALLOCATIONS:
            if self.capturing is None:
                self.operations += 1
            else:
                self.capturing.operations.append(func.name())
                for each in there:
                    self.uses(each)
        known = {id(each.held): each for each in there}
        before = {each.held.untyped_storage()._cdata for each in there}

        def held(each: Any) -> Any:
            return each.held if isinstance(each, DeviceTensor) else each

        def on_device(each: Any) -> Any:
            if not isinstance(each, Tensor):
                return each
            storage = each.untyped_storage()
            if self.capturing is not None and storage._cdata not in before:
                self.capturing.own[storage._cdata] = storage
            # Operations in place return what they were given.
            return known[id(each)] if id(each) in known else DeviceTensor(each)

        done = func(*tree_map(held, args), **tree_map(held, kwargs))
        return tree_map(on_device, done) if stays else done


def _shapes_alone(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """An operation in torch's mode that computes shapes alone, which comes after the device's."""

    def fake(each: Any) -> Any:
        if not isinstance(each, DeviceTensor):
            return each
        return torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device=HERE)

    return func(*tree_map(fake, args), **tree_map(fake, kwargs))


class _Indexed(TorchFunctionMode):
    """Says "cuda:0" for "cuda", for which torch would ask CUDA's runtime for the current device."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        def indexed(each: Any) -> Any:
            return HERE if isinstance(each, str | torch.device) and str(each) == "cuda" else each

        if func is torch.device and len(args) > 1:
            # It has its index.
            return func(*args)
        args, kwargs = tuple(map(indexed, args)), {name: indexed(each) for name, each in (kwargs or {}).items()}
        if func is Tensor.cuda:
            return args[0].to(HERE)
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == HERE:
            # The data are the CPU's.
            return func(*args, **{**kwargs, "device": "cpu"}).to(HERE)
        return func(*args, **kwargs)


@contextmanager
def stub_cuda(driver: StubDriver) -> Iterator[StubCuda]:
    """Context in which torch has one CUDA device, in this thread: `tensor.cuda()` is on it, `torch.cuda` tells of it.

    Args:
        driver: the driver with which Triton launches meanwhile.
    """
    cuda = StubCuda(driver)
    gpu, capability = GPU_SPECS[driver.capability], divmod(driver.capability, 10)

    def new_graph(*args: Any, **options: Any) -> Graph:
        cuda.graphs.append(Graph(*args, **options))
        return cuda.graphs[-1]

    def set_stream(stream: Stream) -> None:
        cuda.stream = stream

    def compiles(**compilation: Any) -> None:
        cuda.refuse(f"{compilation['fn'].name} is compiled")

    def loads(module: Any, function: Any, name: str, *rest: Any) -> None:
        cuda.refuse(f"{name} is loaded")

    properties = SimpleNamespace(
        name=f"stub {driver.capability}", major=capability[0], minor=capability[1], total_memory=2**37,
        multi_processor_count=gpu.multiprocessors, regs_per_multiprocessor=gpu.registers,
        shared_memory_per_block_optin=gpu.shared_bytes, L2_cache_size=50 * 2**20,
    )  # fmt: skip
    answers: dict[str, Any] = {
        "_lazy_init": lambda: None, "is_available": lambda: True, "is_initialized": lambda: True,
        "is_bf16_supported": lambda *args: True, "is_current_stream_capturing": lambda: cuda.capturing is not None,
        "device_count": lambda: 1, "current_device": lambda: 0, "set_device": lambda device: None,
        "_exchange_device": lambda index: 0, "_maybe_exchange_device": lambda index: 0,
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: capability,
        "get_device_properties": lambda device=None: properties,
        "Stream": Stream, "Event": Event, "CUDAGraph": new_graph, "set_stream": set_stream,
        "current_stream": lambda device=None: cuda.stream, "default_stream": lambda device=None: cuda.default_stream,
        "synchronize": lambda device=None: cuda.wait("torch.cuda.synchronize"), "empty_cache": lambda: None,
        "_sleep": lambda cycles: None, "graph_pool_handle": lambda: (0, 1),
        # A failed capture repairs its state.
        "default_generators": [SimpleNamespace(clone_state=lambda: None, graphsafe_set_state=lambda state: None)],
        "memory_stats": lambda device=None: {}, "reset_peak_memory_stats": lambda device=None: None,
        "mem_get_info": lambda device=None: (2**37, 2**37),
    }  # fmt: skip
    with ExitStack() as stack:
        for owner, name, answer in (
            *((torch.cuda, name, answer) for name, answer in answers.items()),
            # `torch.cuda.graph` frees pinned memory.
            (torch._C, "_host_emptyCache", lambda: None),
            (torch._C, "_cuda_endAllocateToPool", lambda index, pool: None),
            (fake_tensor, "init_gpu_context", lambda device: None),
            (driver, "get_current_stream", lambda device: cuda.stream.cuda_stream),
            (StubCuda, "_active", cuda),
        ):
            stack.enter_context(mock.patch.object(owner, name, answer))
        runtime = triton.knobs.runtime
        stack.enter_context(runtime.scope())
        runtime.jit_cache_hook, runtime.kernel_load_start_hook = compiles, loads
        stack.enter_context(_Indexed())
        stack.enter_context(cuda)
        yield cuda
