"""`device`: what a device can do."""

from __future__ import annotations

import typer

from nas.cli.console import note, reported, say
from nas.cli.opening import writable_store
from nas.cli.options import Again, Storage, given, takes
from nas.config import DEFAULT_STORAGE, LatencyConfig


@takes(LatencyConfig, "device", "dtype", "threads")
def device(
    context: typer.Context,
    storage: Storage = DEFAULT_STORAGE,
    again: Again = False,
) -> None:
    """Measure a device's limits once and print them: bandwidth, matrix rate and launch overhead."""
    with reported(storage):
        from nas.latency.device_profile import find_or_measure_profile, profile_lines
        from nas.latency.devices import check_device

        # Any engine will do: none runs.
        config = LatencyConfig(**{**given(LatencyConfig, context), "engine": "eager"})
        check_device(config, note)
        with writable_store(storage) as store:
            find_or_measure_profile(store, config, again, note)
            for line in profile_lines(store.devices.profiles()):
                say(line)
