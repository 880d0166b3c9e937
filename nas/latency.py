"""Latency of a network on the target device, measured against one fixed anchor network.

A machine's speed drifts. Every candidate is therefore timed in turns with the study's anchor, and its latency is the
median ratio to the anchor times the anchor's reference latency, measured once when the study began. The raw figures
are kept beside it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from kernels.timing import MIN_SAMPLE_SECONDS, clock_for, peak_memory_bytes, time_interleaved
from kernels.timing import captured as captured_graph
from nas.config import LatencyConfig
from nas.engines import deploy

# Inputs are rotated, so that a network never finds its own last input in a cache; past the size of an L2 more would
# cost memory only.
INPUT_SETS = 4
# The anchor's reference latency scales all others, so it is sampled longer than a candidate.
ANCHOR_FACTOR = 3


@dataclass(frozen=True, slots=True)
class Latency:
    """One network's latency, per batch.

    Args:
        median_ms: drift-corrected: what searches, fronts and limits use.
        p20_ms, p80_ms: of the same corrected samples.
        repeats: forward passes are timed in this many samples.
        raw_median_ms: as the clock told it.
        anchor_median_ms: the anchor's, in the same minutes, as the clock told it.
        weight_bytes: of the deployed module.
        workspace_bytes: most tensor memory one forward pass holds beside weights and input.
        ready_seconds: from the network to what can be timed: folding, compiling, tuning.
    """

    median_ms: float
    p20_ms: float
    p80_ms: float
    repeats: int
    raw_median_ms: float
    anchor_median_ms: float
    weight_bytes: int
    workspace_bytes: int
    ready_seconds: float = 0.0

    @property
    def memory_mb(self) -> float:
        """Weights and peak workspace, in units of 10^6 bytes."""
        return (self.weight_bytes + self.workspace_bytes) / 1e6


def corrected(samples_ms: np.ndarray, anchor_ms: np.ndarray, reference_ms: float) -> np.ndarray:
    """Candidate samples as if the anchor had always run at its reference latency; all (rounds,) in ms."""
    scaled: np.ndarray = samples_ms / anchor_ms * reference_ms
    return scaled


class LatencyMeter:
    """Measures networks in one deployment, each in turns with the anchor.

    Args:
        config: the deployment.
        anchor: the anchor network, as built by timm.
        reference_ms: the anchor's reference latency; None measures it now.
    """

    def __init__(self, config: LatencyConfig, anchor: nn.Module, reference_ms: float | None = None) -> None:
        self.config = config
        self.device = torch.device(config.device)
        self.clock = clock_for(self.device)
        rng = torch.Generator().manual_seed(0)
        shape = (config.batch_size, 3, config.resolution, config.resolution)
        self.inputs = [
            torch.randn(shape, generator=rng)
            .to(self.device, getattr(torch, config.dtype))
            .contiguous(memory_format=torch.channels_last)
            for _ in range(INPUT_SETS)
        ]
        with _threads(config.threads):
            self.anchor_forwards = self._forwards(deploy(anchor, config, self.inputs[0]))
            self.anchor_run = _in_turn(self.anchor_forwards)
            if reference_ms is None:
                seconds = self._sample([self.anchor_run], ANCHOR_FACTOR * config.seconds)
                reference_ms = float(np.median(seconds)) * 1e3
        self.reference_ms = reference_ms

    def measure(self, network: nn.Module) -> Latency:
        """Latency and inference memory of a network; it is folded in a copy, and moved to evaluation mode.

        Raises:
            CandidateFailed: the engine cannot compile it.
        """
        with _threads(self.config.threads):
            begin = time.perf_counter()
            module = deploy(network, self.config, self.inputs[0])
            ready_seconds = time.perf_counter() - begin
            workspace = self._workspace_bytes(module)
            run = _in_turn(self._forwards(module))
            samples_ms = self._sample([run, self.anchor_run], self.config.seconds) * 1e3
        own_ms, anchor_ms = samples_ms[:, 0], samples_ms[:, 1]
        p20, median, p80 = np.percentile(corrected(own_ms, anchor_ms, self.reference_ms), [20, 50, 80])
        return Latency(
            median_ms=float(median),
            p20_ms=float(p20),
            p80_ms=float(p80),
            repeats=len(own_ms),
            raw_median_ms=float(np.median(own_ms)),
            anchor_median_ms=float(np.median(anchor_ms)),
            weight_bytes=self._weight_bytes(network, module),
            workspace_bytes=workspace,
            ready_seconds=ready_seconds,
        )

    def _sample(self, runs: list[Callable[[], None]], seconds: float) -> np.ndarray:
        return time_interleaved(runs, self.clock, seconds, MIN_SAMPLE_SECONDS[self.device.type])

    def _weight_bytes(self, network: nn.Module, module: nn.Module) -> int:
        # Counted on the network too, as a frozen module hides its own: folded, a norm's four vectors become one bias.
        size = getattr(torch, self.config.dtype).itemsize
        norms = sum(m.num_features for m in network.modules() if isinstance(m, nn.BatchNorm2d))
        counted = int(size) * (sum(p.numel() for p in network.parameters()) - norms)
        return max(counted, sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers())))

    @torch.inference_mode()
    def _workspace_bytes(self, module: nn.Module) -> int:
        return peak_memory_bytes(lambda: module(self.inputs[0]), self.device)

    def _forwards(self, module: nn.Module) -> list[Callable[[], object]]:
        """A forward pass on each of the inputs."""
        return [(_captured if self.device.type == "cuda" else _forward)(module, x) for x in self.inputs]


def _in_turn(forwards: list[Callable[[], object]]) -> Callable[[], None]:
    """A function that makes one forward pass, each time the next."""
    endless = itertools.cycle(forwards)

    def run() -> None:
        next(endless)()

    return run


def _forward(module: nn.Module, x: Tensor) -> Callable[[], object]:
    def forward() -> object:
        with torch.inference_mode():
            return module(x)

    return forward


def _captured(module: nn.Module, x: Tensor) -> Callable[[], object]:
    """The replay of a CUDA graph of one forward pass on `x`.

    A graph knows addresses only: the module's weights and the input must live as long as it is replayed.
    """
    with torch.cuda.device(x.device):
        graph, output = captured_graph(_forward(module, x))

    keep_alive = (module, x, output)

    def replay() -> object:
        graph.replay()
        return keep_alive

    return replay


class _threads:
    """Runs its body with a fixed number of CPU threads."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(self.count)

    def __exit__(self, *exc: object) -> None:
        torch.set_num_threads(self.before)
