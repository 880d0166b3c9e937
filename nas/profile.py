"""What a device can do in a dtype, measured: the figures that efficiencies are shares of.

Measured once per device, versions, dtype and thread count, kept in the study database. No datasheet has a say: those
name rates that no kernel reaches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime

import torch

from kernels.benchmark_machine import MachineLimits, measure_limits
from kernels.timing import DeviceInfo
from nas.latency import threads
from nas.locks import device_lock
from studies import Profile, Store

# Of sampling, for all limits together.
SECONDS = 2.0


def measure(device: torch.device, dtype: str, thread_count: int) -> MachineLimits:
    """Copy bandwidth, matrix rate and launch overhead, while nobody trains or measures on the device."""
    with device_lock(device).measuring(), threads(thread_count):
        return measure_limits(device, getattr(torch, dtype), detailed=False, seconds=SECONDS)


def store_profile(store: Store, info: DeviceInfo, dtype: str, thread_count: int, limits: MachineLimits) -> Profile:
    profile = Profile(
        dtype=dtype, threads=thread_count, copy_bytes_per_s=limits.copy_bytes, macs_per_s=limits.product_macs,
        launch_seconds=limits.launch_seconds, graph_launch_seconds=limits.graph_launch_seconds,
        measured_at=datetime.now(UTC),
    )  # fmt: skip
    return store.add_profile(asdict(info), profile)


def find_or_measure(store: Store, device: torch.device, dtype: str, thread_count: int, again: bool = False) -> Profile:
    """The profile of a device here, measured now if the database has none, or `again` asks for it."""
    info = DeviceInfo.of(device)
    known = None if again else store.find_profile(asdict(info), dtype, thread_count)
    return known or store_profile(store, info, dtype, thread_count, measure(device, dtype, thread_count))


def lines(profiles: Sequence[Profile]) -> list[str]:
    """For a person, two lines a profile."""
    found = []
    for profile in profiles:
        device = profile.device
        launch = f"launch {1e6 * profile.launch_seconds:.2f} us"
        if profile.graph_launch_seconds is not None:
            launch += f", in a CUDA graph {1e6 * profile.graph_launch_seconds:.2f} us"
        threads_ = f", {profile.threads} thread(s)" if device.kind == "cpu" else ""
        measured_at = f"{profile.measured_at:%Y-%m-%d %H:%M} UTC"
        found += [
            f"{device.name} ({device.driver}; torch {device.torch}, triton {device.triton})",
            f"  {profile.dtype}{threads_}: copy {profile.copy_bytes_per_s / 1e9:,.1f} GB/s (read and written), matrix "
            f"product {2 * profile.macs_per_s / 1e9:,.1f} GFLOP/s, {launch}; measured {measured_at}",
        ]
    return found
