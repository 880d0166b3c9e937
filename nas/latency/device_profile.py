"""The profile of a device: its measured limits in a dtype. Efficiencies are shares of them.

A profile is measured once per device, versions, dtype and thread count, and kept in the study database
(`studies.Profile`). Datasheets are not asked: they name rates that no kernel reaches. The yardsticks' latencies are
part of a profile: all that is timed later is corrected to the day when they were measured (`nas.latency.yardsticks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

import torch
from torch import nn

from kernels.ceilings import PRODUCT_SIDE, CeilingRun, ceiling_runs, rate
from kernels.device_info import DeviceInfo
from nas.config import LatencyConfig, installed_runtime
from nas.errors import CandidateFailed, UsageError, memory_may_run_out
from nas.latency.onnx_graph import onnx_graph
from nas.latency.roofline import Machine
from nas.latency.runtimes import OnnxRuntime
from nas.latency.yardsticks import Timed, Yardsticks
from nas.locks import device_lock
from nas.recorded import device_info
from nas.reporting import Note
from studies import Profile, Store

# Time cap of the sampling; that of the yardsticks' references is `ANCHOR_FACTOR` times as long.
SECONDS = 2.0
# Name of the run that is ONNX Runtime's.
RUNTIME_PRODUCT = "runtime_product_macs"


@dataclass(frozen=True)
class DeviceProfile:
    """The limits of a device, measured once; `studies.Profile` is its row in the database.

    Args:
        copy_bytes_per_s: bytes per second of a large copy, read and written together.
        macs_per_s: multiply-accumulates per second of a large square product, in what is fastest at it.
        launch_seconds: time of the smallest operation launched from Python.
        graph_launch_seconds: time of one such operation in a CUDA graph of many; None on a CPU.
        network_yardstick_ms, product_yardstick_ms: latencies of the two yardsticks (`nas.latency.yardsticks`).
        interval_share: width of the widest of the medians' 95 % confidence intervals, over the median.
        throttled: whether the GPU throttled; None where nothing tells.
    """

    copy_bytes_per_s: float
    macs_per_s: float
    launch_seconds: float
    graph_launch_seconds: float | None = None
    network_yardstick_ms: float = 1.0
    product_yardstick_ms: float = 1.0
    interval_share: float = 0.0
    throttled: bool | None = None


def measure_profile(config: LatencyConfig) -> DeviceProfile:
    """Measure copy bandwidth, matrix rate and launch overhead, in turns with each other and the yardsticks.

    The matrix rate is that of torch or of ONNX Runtime, whichever is faster: on a CPU with AVX-512 that torch's library
    of products does not use, ONNX Runtime reaches more than twice torch's.

    The precision is the default one, however quickly the user's networks are to be measured, as all later measurements
    depend on it.

    Args:
        config: the deployment; only its device, dtype and threads matter.

    Raises:
        UsageError: memory runs out.
    """
    config = replace(config, precision=None, seconds=SECONDS)
    try:
        with memory_may_run_out():
            yardsticks = Yardsticks(config)
            runs = ceiling_runs(torch.device(config.device), getattr(torch, config.dtype))
            if config.device == "cpu" and config.dtype == "float32" and installed_runtime("onnxruntime"):
                runs[RUNTIME_PRODUCT] = _runtime_product(config.threads)
            latencies = yardsticks.time([Timed([each.run], each.macs) for each in runs.values()])
    except CandidateFailed as error:
        raise UsageError(f"--device {config.device}: its limits cannot be measured ({error})") from error
    rates = {name: rate(name, runs[name], of.median_ms / 1e3) for name, of in zip(runs, latencies, strict=True)}
    macs_per_s = max(rates["product_macs"], rates.get(RUNTIME_PRODUCT, 0.0))
    network_ms, product_ms = yardsticks.references_ms
    throttled = latencies[0].throttled
    return DeviceProfile(
        rates["copy_bytes"], macs_per_s, rates["launch_seconds"], rates.get("graph_launch_seconds"),
        network_ms, product_ms, max(yardsticks.interval_share, *(each.interval_share for each in latencies)),
        None if throttled is None else bool(throttled or yardsticks.throttled),
    )  # fmt: skip


def _runtime_product(threads: int) -> CeilingRun:
    """The square product of `ceiling_runs` in ONNX Runtime."""
    side = PRODUCT_SIDE["cpu"]
    graph = onnx_graph(nn.Linear(side, side, bias=False), (side, side)).SerializeToString()
    return CeilingRun(OnnxRuntime(graph, threads).bound([torch.randn(side, side).numpy()]), side**3, side**3)


def store_profile(
    store: Store, info: DeviceInfo, dtype: str, thread_count: int, measured: DeviceProfile, again: bool = False
) -> Profile:
    """Store a profile, unless another process was faster, and return the stored one.

    With `again` it takes the place of the older one. That changes the scale: what the block latency table holds in the
    older profile's scale is deleted.
    """
    profile = Profile(dtype=dtype, threads=thread_count, measured_at=datetime.now(UTC), **asdict(measured))
    return store.devices.add_profile(asdict(info), profile, replace=again)


def find_or_measure_profile(
    store: Store, config: LatencyConfig, again: bool = False, waiting: Note = lambda line: None
) -> Profile:
    """The stored profile of a deployment's device, dtype and threads, measured now if there is none.

    Args:
        again: whether it is measured in any case, see `store_profile`.
        waiting: function that takes a line on the process that must be waited for, see `nas.locks`.

    Raises:
        UsageError: memory runs out.
    """
    device = torch.device(config.device)
    info = DeviceInfo.of(device)

    def known() -> Profile | None:
        return None if again else store.devices.find_profile(asdict(info), config.dtype, config.threads)

    if (found := known()) is not None:
        return found
    with device_lock(device).measuring(waiting):
        # Somebody else may have measured it while we waited.
        if (found := known()) is not None:
            return found
        return store_profile(store, info, config.dtype, config.threads, measure_profile(config), again)


def references_ms(profile: Profile | DeviceProfile) -> tuple[float, float]:
    """The yardsticks' latencies, network and product."""
    return profile.network_yardstick_ms, profile.product_yardstick_ms


def machine(profile: Profile | DeviceProfile) -> Machine:
    """The limits that efficiencies are shares of."""
    return Machine(profile.macs_per_s, profile.copy_bytes_per_s)


def profile_lines(profiles: Sequence[Profile]) -> list[str]:
    """Profiles in words, two lines each."""
    found = []
    for profile in profiles:
        device = profile.device
        launch = f"launch {1e6 * profile.launch_seconds:.2f} us"
        if profile.graph_launch_seconds is not None:
            launch += f", in a CUDA graph {1e6 * profile.graph_launch_seconds:.2f} us"
        threads = f", {profile.threads} thread(s)" if device.kind == "cpu" else ""
        measured = f"measured {profile.measured_at:%Y-%m-%d %H:%M} UTC to {profile.interval_share:.1%}"
        if profile.throttled:
            measured += ", while the GPU throttled"
        found += [
            str(device_info(device)),
            f"  {profile.dtype}{threads}: copy {profile.copy_bytes_per_s / 1e9:,.1f} GB/s (read and written), matrix "
            f"product {2 * profile.macs_per_s / 1e9:,.1f} GFLOP/s, {launch}; {measured}",
        ]
    return found
