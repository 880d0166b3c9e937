"""Latency of a network on the target device, measured against one fixed anchor network.

A machine's speed drifts. Every candidate is therefore timed in turns with the study's anchor, and its latency is the
median ratio to the anchor times the anchor's reference latency, which is measured once for all studies of a database
(`nas.latency.block_table`). The raw medians are kept beside it. Sampling goes on until that median is known well
enough, or a time cap is reached; if the GPU throttled meanwhile, it is given a rest and the measurement is repeated.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from kernels.device_state import DeviceState, read_state
from kernels.timing import MIN_SAMPLE_SECONDS, Precision, Sampled, clock_for, peak_memory_bytes, sample_until
from kernels.timing import captured as captured_graph
from nas.child_process import sign_of_life
from nas.config import LatencyConfig
from nas.latency.engines import InRuntime, deploy
from nas.latency.values import Latency, Measurement

# Inputs are rotated, so that a network never finds its own last input in a cache; more of them than fit an L2 cache
# would only cost memory.
INPUT_SETS = 4
# The anchor's reference latency scales all others: by this factor its interval must be narrower than a candidate's, and
# its time cap is longer.
ANCHOR_FACTOR = 3
# Least warm-up of a network in seconds, where it is not the usual one: a GPU is warm from the training before, and the
# warm-up goes on in any case while a network gets faster.
WARMUP_SECONDS = {"cuda": 0.05}
# A throttled measurement is repeated at most so often, after a rest of so many seconds, then of twice as many.
MAX_RETRIES = 2
REST_SECONDS = 5.0


def corrected(samples_ms: np.ndarray, anchor_ms: np.ndarray, reference_ms: float) -> np.ndarray:
    """Samples of a candidate as if the anchor had always run at its reference latency; all (rounds,), in ms."""
    scaled: np.ndarray = samples_ms / anchor_ms * reference_ms
    return scaled


@dataclass(frozen=True)
class Deployed:
    """A network that is ready to be timed: the module, its forward passes, and what is known before any timing."""

    module: nn.Module
    forwards: list[Callable[[], object]]
    weight_bytes: int
    workspace_bytes: int
    ready_seconds: float


class LatencyMeter:
    """Meter of networks in one deployment, each sampled in turns with the anchor.

    Args:
        config: the deployment.
        anchor: the anchor network, as built by timm.
        anchor_size: width and height of its images in pixels (default: the deployment's).
        reference_ms: the anchor's reference latency; None measures it now.
        state: function that reads the device's clocks and sensors.
        rest: function that sleeps for a number of seconds.

    Attributes:
        reference_ms: the anchor's reference latency.
        rest_helps: whether the GPU ran freely again after the last rests.
    """

    def __init__(
        self, config: LatencyConfig, anchor: nn.Module, reference_ms: float | None = None, *,
        anchor_size: int | None = None, state: Callable[[torch.device], DeviceState | None] = read_state,
        rest: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        self.config = config
        self.device = torch.device(config.device)
        self.clock = clock_for(self.device)
        self.state, self.rest = state, rest
        self.rest_helps = True
        self.batches: dict[int, list[Tensor]] = {}
        with cpu_threads(config.threads):
            images = self.images(anchor_size or config.resolution)
            self.anchor_forwards = self.forwards(deploy(anchor, config, images[0]), images)
            self.anchor_run = in_turn(self.anchor_forwards)
            if reference_ms is None:
                sampled, _ = self.sample(
                    [self.anchor_run], lambda seconds: [seconds[:, 0]], ANCHOR_FACTOR, reference=True
                )
                reference_ms = float(np.median(sampled.seconds)) * 1e3
        self.reference_ms = reference_ms

    def random_inputs(self, shape: Sequence[int], count: int = INPUT_SETS) -> list[Tensor]:
        """Normally distributed inputs of a shape, always the same, in the deployment's dtype; (N, C, H, W) ones are
        channels_last."""
        rng = torch.Generator().manual_seed(0)
        made = [
            torch.randn(tuple(shape), generator=rng).to(self.device, getattr(torch, self.config.dtype))
            for _ in range(count)
        ]
        return [x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for x in made]

    def images(self, size: int) -> list[Tensor]:
        """Random batches of square images of a size in pixels, which all networks of that size share."""
        if size not in self.batches:
            self.batches[size] = self.random_inputs((self.config.batch_size, 3, size, size))
        return self.batches[size]

    def measure_together(self, networks: Sequence[nn.Module], sizes: Sequence[int] | None = None) -> list[Measurement]:
        """Latency and inference memory of several networks, sampled in turns with each other and the anchor.

        The networks are moved to evaluation mode; batch norms are folded in a copy.

        Args:
            sizes: width and height of each network's images in pixels (default: the deployment's).

        Raises:
            CandidateFailed: the engine cannot compile one of them.
        """

        def ratios(seconds: np.ndarray) -> list[np.ndarray]:
            return [seconds[:, index] / seconds[:, -1] for index in range(len(networks))]

        with cpu_threads(self.config.threads):
            sizes = sizes or [self.config.resolution] * len(networks)
            deployed = [self._deploy(network, size) for network, size in zip(networks, sizes, strict=True)]
            runs = [in_turn(each.forwards) for each in deployed]
            sampled, state = self.sample([*runs, self.anchor_run], ratios, len(deployed))
        anchor_ms = sampled.seconds[:, -1] * 1e3
        clock_mhz, temperature_c = (None, None) if state is None else (state.sm_clock_mhz, state.temperature_c)
        measured = []
        for index, each in enumerate(deployed):
            own_ms, share = sampled.seconds[:, index] * 1e3, sampled.interval_shares[index]
            measured.append(Measurement(
                self.latency(corrected(own_ms, anchor_ms, self.reference_ms), share, sampled, state),
                raw_median_ms=float(np.median(own_ms)), anchor_median_ms=float(np.median(anchor_ms)),
                weight_bytes=each.weight_bytes, workspace_bytes=each.workspace_bytes,
                sm_clock_mhz=clock_mhz, temperature_c=temperature_c, ready_seconds=each.ready_seconds,
            ))  # fmt: skip
        return measured

    def _deploy(self, network: nn.Module, size: int) -> Deployed:
        images = self.images(size)
        begin = time.perf_counter()
        module = deploy(network, self.config, images[0])
        ready_seconds = time.perf_counter() - begin
        workspace = self._workspace_bytes(module, images[0])
        forwards = self.forwards(module, images)
        # Nothing is tuned, which would give one, where all shapes are known; and there may be many networks.
        sign_of_life()
        return Deployed(module, forwards, self._weight_bytes(network, module), workspace, ready_seconds)

    def latency(
        self, samples_ms: np.ndarray, interval_share: float, sampled: Sampled, state: DeviceState | None
    ) -> Latency:
        """The latency that (repeats,) corrected samples of one of several things sampled together show."""
        # The cap may have ended all of them while this one was known well enough.
        capped = sampled.capped and interval_share > self.precision.share
        return Latency.of(samples_ms, interval_share, capped, None if state is None else state.throttled)

    @property
    def precision(self) -> Precision:
        assert self.config.precision is not None
        return Precision(self.config.precision, self.config.seconds)

    def sample(
        self, runs: list[Callable[[], None]], checked: Callable[[np.ndarray], list[np.ndarray]], factor: float = 1,
        min_sample_seconds: float | None = None, reference: bool = False,
    ) -> tuple[Sampled, DeviceState | None]:  # fmt: skip
        """Sample to the precision asked for; where the GPU throttled, again after a rest, at most `MAX_RETRIES` times.

        Args:
            checked: function from samples to the quantities whose medians are wanted, see `sample_until`.
            factor: factor by which the time cap is longer.
            min_sample_seconds: least duration of a sample (default: `MIN_SAMPLE_SECONDS`).
            reference: whether other latencies are scaled by this one, which then has to be known more precisely.

        Returns:
            The samples, and the device's last state, with the reasons of all throttling meanwhile; None where nothing
            can be read.
        """
        share = self.precision.share / (ANCHOR_FACTOR if reference else 1)
        precision = Precision(share, factor * self.precision.cap_seconds)
        for retry in range(MAX_RETRIES + 1):
            states: list[DeviceState | None] = []
            sampled = sample_until(
                runs, self.clock, min_sample_seconds or MIN_SAMPLE_SECONDS[self.device.type], precision, checked,
                between=lambda states=states: self._look(states),  # type: ignore[misc]
                warmup_seconds=WARMUP_SECONDS.get(self.device.type), alive=sign_of_life,
            )  # fmt: skip
            throttled_by = {reason for state in states if state is not None for reason in state.throttled_by}
            if not throttled_by:
                self.rest_helps = True
                break
            if retry == MAX_RETRIES:
                # At the first reading after all rests it still throttles where somebody holds the clocks down for good.
                self.rest_helps = states[0] is not None and not states[0].throttled
            if retry == MAX_RETRIES or not self.rest_helps:
                break
            self.rest(REST_SECONDS * (retry + 1))
        last = states[-1]
        return sampled, None if last is None else replace(last, throttled_by=tuple(throttled_by))

    def _look(self, states: list[DeviceState | None]) -> None:
        states.append(self.state(self.device))
        sign_of_life()

    def _weight_bytes(self, network: nn.Module, module: nn.Module) -> int:
        # Counted on the network too, as a frozen module hides its own. Of a folded norm's vectors only a bias is left.
        size = getattr(torch, self.config.dtype).itemsize
        norms = sum(m.num_features for m in network.modules() if isinstance(m, nn.BatchNorm2d))
        counted = int(size) * (sum(p.numel() for p in network.parameters()) - norms)
        return max(counted, sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers())))

    @torch.inference_mode()
    def _workspace_bytes(self, module: nn.Module, images: Tensor) -> int:
        if isinstance(module, InRuntime):
            return module.workspace_bytes()
        return peak_memory_bytes(lambda: module(images), self.device)

    def forwards(self, module: nn.Module, inputs: Sequence[Tensor]) -> list[Callable[[], object]]:
        """A forward pass on each of the inputs."""
        return [(captured_forward if self.device.type == "cuda" else _forward)(module, x) for x in inputs]


def in_turn(forwards: list[Callable[[], object]]) -> Callable[[], None]:
    """A function that makes the next of these forward passes at each call."""
    endless = itertools.cycle(forwards)

    def run() -> None:
        next(endless)()

    return run


def _forward(module: nn.Module, x: Tensor) -> Callable[[], object]:
    if isinstance(module, InRuntime):
        return module.bound(x)

    def forward() -> object:
        with torch.inference_mode():
            return module(x)

    return forward


def captured_forward(module: nn.Module, x: Tensor) -> Callable[[], object]:
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


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Context in which torch uses a fixed number of CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
