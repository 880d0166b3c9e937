"""Devices, their profiles and the latencies of blocks, on SQLite and PostgreSQL alike."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy.exc import IntegrityError

from studies import Store
from tests.studies.rows import DEVICE, OTHER_DEVICE, counts, make_block, make_profile


def test_a_device_has_one_profile_per_dtype_and_threads(store: Store) -> None:
    assert store.devices.find_profile(DEVICE, "float32", 1) is None
    assert counts(store)["convfirst_devices"] == 0
    first = store.devices.add_profile(DEVICE, make_profile(graph_launch_seconds=1e-7))
    assert first.device.name == "a CPU"
    store.devices.add_profile(DEVICE, make_profile(dtype="float16"))
    # If two processes measure it at once, the first one's counts, unless it is measured anew.
    assert store.devices.add_profile(DEVICE, make_profile(macs_per_s=3e15)).macs_per_s == first.macs_per_s
    # The latencies that the older one corrected go with it: no other device's, threads' or dtype's.
    store.devices.add_block_latencies(
        DEVICE, [make_block("a"), make_block("a", dtype="float16"), make_block("a", threads=2)]
    )
    store.devices.add_block_latencies(OTHER_DEVICE, [make_block("a")])
    again = store.devices.add_profile(DEVICE, make_profile(macs_per_s=5e15), replace=True)
    assert counts(store)["convfirst_block_latencies"] == 3
    assert store.devices.block_latencies(DEVICE, engine="eager", dtype="float32", batch_size=1, threads=1) == {}
    assert again.profile_id == first.profile_id
    assert again.measured_at > first.measured_at
    assert (again.macs_per_s, again.graph_launch_seconds) == (5e15, None)
    found = store.devices.find_profile(DEVICE, "float32", 1)
    assert found is not None
    assert found.macs_per_s == 5e15
    assert store.devices.find_profile(OTHER_DEVICE, "float32", 1) is None
    assert [(row.device.name, row.dtype) for row in store.devices.profiles()] == [
        ("a CPU", "float16"),
        ("a CPU", "float32"),
    ]
    assert store.devices.id_of(DEVICE) == found.device_id
    assert store.devices.id_of(OTHER_DEVICE) != found.device_id


def test_latencies_of_blocks_are_those_of_one_version_of_the_kernels(store: Store) -> None:
    fused = dict(engine="fused", dtype="float16", batch_size=1, threads=1)
    for kernels, median_ms in (("old", 2.0), ("new", 1.0)):
        store.devices.add_block_latencies(
            DEVICE, [make_block("a", median_ms, kernels=kernels, throttled=True, **fused)]
        )
    for kernels, expected in (("old", [2.0]), ("new", [1.0]), ("", [])):
        found = store.devices.block_latencies(DEVICE, **fused, kernels=kernels)  # type: ignore[arg-type]
        assert [row.median_ms for row in found.values()] == expected
        assert all(row.throttled for row in found.values())


def test_latencies_of_blocks_are_kept_per_deployment(store: Store) -> None:
    here = dict(engine="eager", dtype="float32", batch_size=1, threads=1)
    assert store.devices.block_latencies(DEVICE, **here) == {}  # type: ignore[arg-type]
    assert counts(store)["convfirst_devices"] == 0
    store.devices.add_block_latencies(
        DEVICE, [make_block("b", 2.0), make_block("a", 1.0), make_block("a", engine="fused")]
    )
    store.devices.add_block_latencies(DEVICE, [make_block("b", 3.0, capped=True), make_block("c", 4.0)])
    store.devices.add_block_latencies(OTHER_DEVICE, [make_block("a", 9.0)])
    with pytest.raises(IntegrityError):
        store.devices.add_block_latencies(DEVICE, [make_block("a", 7.0), make_block("d", shape=None)])
    found = store.devices.block_latencies(DEVICE, **here)  # type: ignore[arg-type]
    assert {name: row.median_ms for name, row in found.items()} == {"a": 1.0, "b": 3.0, "c": 4.0}
    assert found["b"].capped is True
    assert counts(store)["convfirst_block_latencies"] == 5


def test_processes_may_write_the_same_measurements_at_once(any_url: str, store: Store) -> None:
    """They write in opposite orders. If they locked rows in those orders, PostgreSQL would stop one for a deadlock."""
    names = [f"block{i}" for i in range(20)]
    barrier = threading.Barrier(4)
    errors: list[BaseException] = []

    def write(order: int) -> None:
        try:
            mine = Store.open(any_url, create=True)
            assert mine is not None
            barrier.wait()
            for turn in range(5):
                device = DEVICE | dict(driver=str(turn))
                mine.devices.add_profile(device, make_profile())
                mine.devices.add_block_latencies(device, [make_block(name) for name in names[::order]])
            mine.close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(order,)) for order in (1, -1, 1, -1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    found = counts(store)
    assert (found["convfirst_devices"], found["convfirst_profiles"]) == (5, 5)
    assert found["convfirst_block_latencies"] == 100
