"""Launches that bind a network's latency: at small sizes a GPU takes longer to begin a kernel than to compute it."""

from __future__ import annotations

from collections.abc import Sequence

from nas.config import LatencyConfig
from nas.latency.parts import arch_parts
from nas.latency.roofline import Block, Layer, Machine
from search_spaces import ArchSpec

# Largest batch that is proposed.
LARGEST_BATCH = 4096
# Where launches take a smaller share of the measured latency, something else binds it.
LEAST_SHARE = 0.1


def launch_count(parts: Sequence[tuple[Block, bool]]) -> int:
    """The least number of kernels that a network launches: one for each fused part, else one for each layer.

    Args:
        parts: the network's blocks, each with whether it runs as one kernel.
    """
    return sum(1 if fused else len(block.layers) for block, fused in parts)


def work_seconds(parts: Sequence[tuple[Block, bool]], machine: Machine, factor: float = 1) -> float:
    """The sum of the parts' ideal times max(F / peak, B / bandwidth), see `nas.latency.roofline.ideal_seconds`.

    Args:
        factor: factor by which the batch is larger than that of the blocks; weights are moved once.
    """

    def kernel(macs: int, moved_bytes: int, weight_bytes: int) -> float:
        grown_bytes = weight_bytes + factor * (moved_bytes - weight_bytes)
        return max(factor * macs / machine.macs_per_s, grown_bytes / machine.bytes_per_s)

    def of_layer(layer: Layer) -> float:
        return kernel(layer.macs, layer.moved_bytes, layer.weight_bytes)

    def of_block(block: Block) -> float:
        return kernel(block.macs, block.fused_bytes, sum(layer.weight_bytes for layer in block.layers))

    return sum(of_block(block) if fused else sum(of_layer(layer) for layer in block.layers) for block, fused in parts)


def launches_line(
    whose: str, parts: Sequence[tuple[Block, bool]], machine: Machine, launch_seconds: float | None, batch: int,
    latency_ms: float,
) -> str | None:  # fmt: skip
    """A line that says that launches bind a latency, and which batch shows more; None where they do not.

    They do where they take longer than the operations and bytes at the device's limits would. The batch is the smallest
    power of two for which these take longer.

    Args:
        whose: the network, as in "the anchor's".
        launch_seconds: time of a launch in a CUDA graph; None on a CPU.
        latency_ms: the measured latency of a batch.
    """
    count = launch_count(parts)
    if launch_seconds is None or not count:
        return None
    seconds, work = count * launch_seconds, work_seconds(parts, machine)
    if seconds <= work or seconds < LEAST_SHARE * latency_ms / 1e3:
        return None
    powers = (1 << exponent for exponent in range(LARGEST_BATCH.bit_length()))
    better = next(
        (each for each in powers if each > batch and work_seconds(parts, machine, each / batch) > seconds), None
    )
    advice = f"--latency-batch {better} shows more of them" if better else f"so they do up to batch {LARGEST_BATCH}"
    return (
        f"launches bind {whose} latency at batch {batch}: at least {count} kernels take {1e6 * seconds:.1f} of "
        f"{1e3 * latency_ms:.1f} us to launch, and their operations and bytes {1e6 * work:.2g} us at the device's "
        f"limits; {advice}"
    )


def arch_launches_line(
    whose: str, arch: ArchSpec, config: LatencyConfig, machine: Machine, launch_seconds: float | None, latency_ms: float
) -> str | None:
    """`launches_line` of an architecture in a deployment."""
    if launch_seconds is None:
        return None
    parts = [(part.block, part.fused) for part in arch_parts(arch, config)]
    return launches_line(whose, parts, machine, launch_seconds, config.batch_size, latency_ms)
