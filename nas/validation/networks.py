"""Networks to train and time for a comparison: a study's own, and timm's at the resolution that suits them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from nas.config import MAX_RESOLUTION, LatencyConfig
from nas.errors import CandidateFailed, memory_may_run_out, message_line
from nas.latency.parts import layer_parts
from nas.latency.timm_networks import timm_model
from nas.validation.contenders import ContenderKind
from search_spaces import ArchSpec
from search_spaces.arch import strided

# Width of the image whose feature map shows the stride of a timm model.
PROBE_PIXELS = 224
# Exceptions of a network that is not ours where it does not run.
FOREIGN_ERRORS = (RuntimeError, ValueError, AssertionError, TypeError)


@dataclass(frozen=True)
class NetworkSpec:
    """A network to train and time; fields that `Contender` has as well mean the same there.

    Args:
        arch: the architecture of one of our networks; None for a timm model.
        params, macs: parameters of the deployed network, and its MACs for one image.
    """

    name: str
    kind: ContenderKind
    trial: int | None
    arch: ArchSpec | None
    engine: str
    resolution: int
    params: int
    macs: int

    @property
    def key(self) -> tuple[str, int]:
        """Name and resolution, by which trainings and latencies belong together."""
        return self.name, self.resolution

    @property
    def summary(self) -> str:
        return self.name if self.arch is None else str(self.arch)

    @property
    def ours(self) -> bool:
        """Whether it is a ConvFirst network."""
        return self.arch is not None

    def build(self, classes: int) -> nn.Module:
        """The network with new random weights."""
        return timm_model(self.name, classes) if self.arch is None else self.arch.build(classes)

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """Context that turns errors of a network that is not ours into a CandidateFailed; errors of ours are bugs."""
        try:
            with memory_may_run_out():
                yield
        except FOREIGN_ERRORS as error:
            if self.arch is not None:
                raise
            raise CandidateFailed(message_line(error)) from error


def timm_network(name: str, engine: str, map_size: int, classes: int) -> NetworkSpec:
    """A timm model at the resolution that suits it, with its parameters and MACs counted.

    Args:
        map_size: width of the final feature map, see `suited_resolution`.

    Raises:
        CandidateFailed: the model does not run at that resolution.
    """
    spec = NetworkSpec(name, ContenderKind.TIMM, None, None, engine, 0, 0, 0)
    with spec.failing():
        model = spec.build(classes)
        resolution = suited_resolution(total_stride(model), map_size)
        # Counting needs no GPU, wherever the network will run.
        config = LatencyConfig(device="cpu", engine="eager", resolution=resolution, num_classes=classes)
        try:
            macs = sum(part.block.macs for part, _ in layer_parts(model, config))
        except FOREIGN_ERRORS as error:
            reason = f"does not run on images of {resolution}x{resolution} ({message_line(error)})"
            raise CandidateFailed(reason) from error
        params = sum(weights.numel() for weights in model.parameters())
        return replace(spec, resolution=resolution, params=params, macs=macs)


# -- The resolution that suits a network -----------------------------------------------------------------------------


def suited_resolution(total_stride: int, map_size: int) -> int:
    """Resolution in pixels at which a network's final feature map is (map_size, map_size).

    It is at least 8 and at most `MAX_RESOLUTION`. A network of total stride 32 that is shown 32 pixels sees a final
    map of one: it starves. So all networks that are not ours get one final map, by default that of the study's
    networks: 32 pixels and stride 8 make 4x4, hence stride 32 gets 128 pixels, stride 16 64; 224 pixels and stride 32
    make 7x7, hence stride 32 gets 224.
    """
    return min(max(8, map_size * total_stride), MAX_RESOLUTION)


def own_map_size(anchor: ArchSpec, resolution: int) -> int:
    """Width in pixels of the final feature map of a study's networks."""
    return strided(resolution, anchor.total_stride)


def default_map_size(own: int, kind: str) -> int:
    """Width in pixels of the final feature map of networks that are not ours.

    It is the map of the study's own networks; on a CPU half of it, rounded up, which trains in a quarter of the time.
    So beside 32 pixels and stride 8, stride 32 is shown 64 pixels on a CPU: its map is 2x2 and not a single pixel.

    Args:
        own: width of the map of the study's networks.
        kind: kind of the device, "cpu" or "cuda".
    """
    return own if kind == "cuda" else (own + 1) // 2


def total_stride(model: nn.Module) -> int:
    """Total stride of a timm model, from its `feature_info` or else from a forward pass.

    Raises:
        CandidateFailed: the features are not a map.
    """
    info: Any = getattr(model, "feature_info", None)
    if info:
        return int(info[-1]["reduction"])
    with torch.inference_mode():
        features: Any = model.eval().forward_features(torch.zeros(1, 3, PROBE_PIXELS, PROBE_PIXELS))  # type: ignore[operator]
    if features.ndim != 4:
        raise CandidateFailed("its total stride is unknown: its features are not a map")
    # (1, C, H, W) or (1, H, W, C).
    return round(PROBE_PIXELS / int(features.shape[2]))
