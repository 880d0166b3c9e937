"""An evaluator that invents its results, for tests of the search and for the overhead lab."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from kernels.device_info import DeviceInfo
from nas.config import LatencyConfig
from nas.errors import CandidateFailed
from nas.latency.device_profile import DeviceProfile
from nas.latency.parts import CALL, arch_parts, network_shape, shape_id
from nas.latency.values import Latency, Measurement, ShapeLatency
from nas.search.evaluation import OneByOne
from nas.training.curves import CurvePoint
from nas.training.proxy import ProxyResult
from search_spaces import ArchSpec, Cost, cost, load_space


class FakeEvaluator(OneByOne):
    """Evaluator that scores by formulas: accuracy saturates in MACs, latency grows with them and with depth.

    As in a real landscape, some choices are better than their MACs tell, so that a sampler has something to learn.

    Args:
        build: whether every network is built, too, once to be timed and once to be trained, as a real evaluator does.
    """

    device = DeviceInfo("cpu", "invented", "none", "none", "none")
    data_fingerprint = "invented"
    notes: tuple[str, ...] = ()

    def __init__(self, build: bool = False) -> None:
        self.build = build

    def anchor(self, references_ms: Sequence[float]) -> ShapeLatency:
        shape = network_shape(str(load_space("small").anchor()), LatencyConfig(device="cpu"))
        return ShapeLatency(shape, Latency(1.0, 1.0, 1.0, 10, 0.01))

    def start(self, anchor_ms: float) -> None:
        pass

    def cost(self, arch: ArchSpec) -> Cost:
        return cost(arch, resolution=32, num_classes=10)

    def measure(self, arch: ArchSpec) -> Measurement:
        if self.build:
            arch.build(num_classes=10)
        median_ms = 0.05 * len(arch.blocks) + self.cost(arch).macs / 2e7 * (1.3 if arch.activation == "gelu" else 1.0)
        latency = Latency(median_ms, 0.9 * median_ms, 1.2 * median_ms, 100)
        return Measurement(latency, median_ms, 1.0, weight_bytes=4 * self.cost(arch).params, workspace_bytes=0)

    def train_one(self, arch: ArchSpec) -> ProxyResult:
        if self.build:
            arch.build(num_classes=10)
        if arch.stages[0].kernel_size == 7 and arch.stages[0].group_width == 16:
            raise CandidateFailed("the loss diverged (invented)")
        preference = {"silu": 0.03, "hard_swish": 0.02, "gelu": 0.03, "relu": 0.0}[arch.activation]
        preference += sum(0.01 for stage in arch.stages if stage.kernel_size == 5)
        preference += sum(0.01 for stage in arch.stages if stage.group_width > 1)
        accuracy = 0.9 * (1 - math.exp(-math.sqrt(self.cost(arch).macs / 4e6))) * (0.9 + preference)
        curve = tuple(CurvePoint(10 * step, 2.0 / step, accuracy * step / 20, 0.3 * step) for step in range(1, 21))
        return ProxyResult(accuracy, 1 - accuracy, curve, 0.0, 1_000_000)

    def measure_together(self, archs: Sequence[ArchSpec]) -> list[Measurement]:
        return [self.measure(arch) for arch in archs]

    def measure_blocks(
        self, archs: Sequence[ArchSpec], known: Mapping[str, float], references_ms: Sequence[float]
    ) -> list[ShapeLatency]:
        config = LatencyConfig(device="cpu")
        shapes = {
            CALL: 0.01,
            network_shape(str(load_space("small").anchor()), config): 1.0,
        }
        # In some engines a part's shape says that it runs within a network, in others it does not.
        configs = [config, replace(config, engine="eager")]
        shapes |= {part.shape: 0.015 for arch in archs for each in configs for part in arch_parts(arch, each)}
        return [
            ShapeLatency(shape, Latency(median_ms, median_ms, median_ms, 10, 0.01))
            for shape, median_ms in shapes.items()
            if shape_id(shape) not in known
        ]

    def profile(self) -> DeviceProfile:
        return DeviceProfile(copy_bytes_per_s=2e10, macs_per_s=4e10, launch_seconds=4e-6)

    def determinism(self) -> str | None:
        return None

    def close(self) -> None:
        pass
