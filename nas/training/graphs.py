"""Training steps as CUDA graphs: some eager steps, then one step is captured, and the others replay it.

A step of a small network is some 200 launches, which take the host several times as long as the GPU takes to run them.
A graph launches them all at once. It repeats what was captured, on the same memory: whatever changes from one step to
the next has to lie in tensors on the device, which the step itself changes.
https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeAlias

import torch

from kernels import timing
from nas.errors import is_out_of_memory, message_line

# Steps before the capture: libraries set themselves up in the first ones, and the optimizer makes its state.
EAGER_STEPS = timing.CALLS_BEFORE_CAPTURE
# A capture takes the host as long as some eager steps, so fewer replays than this gain nothing.
LEAST_REPLAYS = 10
HOST_RANDOM = "the network draws random numbers on the host, which a graph would repeat"


class Graph(Protocol):
    """A captured step; torch.cuda.CUDAGraph is one."""

    def replay(self) -> None: ...

    def reset(self) -> None: ...


Capture: TypeAlias = Callable[[Callable[[], None]], Graph]


class _Refused:
    """Why this process captures no steps any more; `reason` is None while it does.

    A step that could not be captured will fail again, and torch 2.11 keeps the memory of each failure.
    """

    reason: str | None = None


def capture_on(device: torch.device) -> Capture | None:
    """The function that captures a step on a device; None where there are no graphs."""
    return _capture_cuda if device.type == "cuda" else None


def _capture_cuda(run: Callable[[], None]) -> Graph:
    return timing.captured(run, calls=0)[0]


def stream_of(device: torch.device) -> AbstractContextManager[None]:
    """Context whose work goes to the stream that captures use.

    What libraries set up for a stream, such as the workspace of cuBLAS, then serves eager steps and graphs alike.
    """
    return timing.on_capture_stream(device) if device.type == "cuda" else nullcontext()


class RepeatedStep:
    """A step that is called again and again: eagerly at first, then as a graph, where the device has graphs.

    If the capture fails, the steps go on eagerly. A capture runs nothing on the device, so nothing is lost or done
    twice.

    Args:
        run: the step.
        forget: function that drops what a failed capture may have left in Python's objects.
        device: device on which the step runs.
        calls: number of calls to come.
        capture: whether the step may be captured.

    Attributes:
        graph: the captured step; None while there is none.
        uncaptured: why the step is not captured; None where it is, or where there is nothing to gain.
    """

    def __init__(
        self, run: Callable[[], None], forget: Callable[[], None], device: torch.device, calls: int, capture: bool
    ) -> None:
        self.run, self.forget, self.device = run, forget, device
        self.called = 0
        self.graph: Graph | None = None
        self.uncaptured: str | None = None
        self.capture = capture_on(device) if capture and calls >= EAGER_STEPS + LEAST_REPLAYS else None
        if self.capture is not None and _Refused.reason is not None:
            self._stay_eager(_Refused.reason)

    def __call__(self) -> None:
        if self.capture is not None and self.called == EAGER_STEPS:
            self._begin_replays(self.capture)
        if self.graph is not None:
            self.graph.replay()
        elif self.capture is not None and self.called == EAGER_STEPS - 1:
            before = _host_state()
            self.run()
            if _host_state() != before:
                self._stay_eager(HOST_RANDOM)
        else:
            self.run()
        self.called += 1

    def _begin_replays(self, capture: Capture) -> None:
        try:
            self.graph = capture(self.run)
        except RuntimeError as error:
            self.forget()
            self._stay_eager(message_line(error))
            # The next network may be smaller.
            if not is_out_of_memory(error):
                _Refused.reason = self.uncaptured

    def _stay_eager(self, reason: str) -> None:
        self.capture, self.uncaptured = None, reason

    def close(self) -> None:
        """Drop the graph and its memory, which nothing else can use."""
        graph, self.graph, self.capture = self.graph, None, None
        if graph is not None:
            graph.reset()
            if self.device.type == "cuda":
                # Until then the allocator keeps the memory for a graph that no longer is.
                torch.cuda.empty_cache()


def _host_state() -> tuple[bytes, object]:
    """The state of the host's random generators."""
    return torch.get_rng_state().numpy().tobytes(), random.getstate()
