"""Formulas on invented rows in a real database; the real meter on the smallest networks."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from kernels.benchmark_machine import COPY_BYTES, PRODUCT_SIDE
from kernels.timing import DeviceInfo
from nas.analysis import timm_model
from nas.block_table import GROUP, REPEATS, SHARED, BlockMeter, BlockTable, Figure, network_shape, on_device
from nas.config import LatencyConfig
from nas.latency import threads
from nas.parts import CALL, COPY, PRODUCT, YARDSTICKS, Part, arch_parts, layers, shape_id
from search_spaces import ArchSpec, StageSpec
from studies import Store
from tests.conftest import make_tiny_space

CPU = DeviceInfo("cpu", "invented", "none", "none", "none")
GPU = replace(CPU, kind="cuda")
EAGER = LatencyConfig(device="cpu", engine="eager", resolution=16)
# Stem, a block, two equal ones, head.
STAGES = (StageSpec(8, 3, 1, 1, 1, 1), StageSpec(16, 3, 8, 2, 3, 2))
ARCH = ArchSpec(8, STAGES, "relu", 16)
PARTS = arch_parts(ARCH, EAGER)


def figure(shape: str, median_ms: float) -> Figure:
    return Figure(shape, median_ms, 0.9 * median_ms, 1.2 * median_ms, 10, 0.01, False)


def figures(call_ms: float, *part_ms: float) -> list[Figure]:
    """Rows of the different parts of `PARTS`, in order."""
    shapes = dict.fromkeys(part.shape for part in PARTS)
    return [figure(CALL, call_ms), *(figure(shape, ms) for shape, ms in zip(shapes, part_ms, strict=False))]


@pytest.fixture
def store(sqlite_url: str) -> Iterator[Store]:
    made = Store.open(sqlite_url, create=True)
    assert made is not None
    yield made
    made.close()


# -- What parts add up to --------------------------------------------------------------------------------------------


def test_the_example_has_a_block_twice() -> None:
    assert len(PARTS) == 6
    assert len({part.shape_id for part in PARTS}) == 5


def test_on_a_cpu_a_call_is_counted_once_and_stays_in_the_parts(store: Store) -> None:
    """Each part was called four times over: a quarter of its call is its time."""
    assert REPEATS == 4
    table = BlockTable(store, CPU, EAGER)
    table.add(figures(0.5, 4.0, 8.0, 12.0, 16.0, 2.0))
    added = table.add_up(PARTS)
    assert added.part_ms == pytest.approx((1.0, 2.0, 3.0, 4.0, 4.0, 0.5))
    assert added.call_ms == 0.5
    assert added.total_ms == pytest.approx(0.5 + 14.5)
    assert added.missing == ()
    assert not table.lacks(PARTS)
    assert table.add_up_arch(ARCH) == added


def test_on_a_gpu_a_launch_is_taken_off_each_part_and_added_once(store: Store) -> None:
    config = replace(EAGER, device="cuda")
    table = BlockTable(store, GPU, config)
    table.add(figures(0.5, 4.5, 8.5, 12.5, 16.5, 0.3))
    added = table.add_up(PARTS)
    # The last is less than a launch: noise, and no part takes less than nothing.
    assert added.part_ms == pytest.approx((1.0, 2.0, 3.0, 4.0, 4.0, 0.0))
    assert added.total_ms == pytest.approx(0.5 + 14.0)


def test_what_is_missing_is_told_once_a_shape(store: Store) -> None:
    table = BlockTable(store, CPU, EAGER)
    assert table.lacks(PARTS)
    assert table.add_up(PARTS).call_ms is None
    assert [part.block.name for part in table.add_up(PARTS).missing] == [
        "stem", "stage1.0", "stage2.0", "stage2.2", "head",
    ]  # fmt: skip
    table.add(figures(0.5, 4.0, 8.0, 12.0))
    added = table.add_up(PARTS)
    assert added.part_ms == (1.0, 2.0, 3.0, None, None, None)
    assert added.total_ms is None
    assert table.lacks(PARTS)
    assert {part.shape_id for part in added.missing} == {PARTS[3].shape_id, PARTS[5].shape_id}


def test_without_what_a_call_costs_nothing_adds_up(store: Store) -> None:
    table = BlockTable(store, CPU, EAGER)
    table.add(figures(0.5, 4.0, 8.0, 12.0, 16.0, 2.0)[1:])
    assert table.add_up(PARTS).missing == ()
    assert table.add_up(PARTS).total_ms is None
    assert table.lacks(PARTS)


def test_rows_are_those_of_one_deployment(store: Store) -> None:
    BlockTable(store, CPU, EAGER).add(figures(0.5, 4.0, 8.0, 12.0, 16.0, 2.0))
    assert not BlockTable(store, CPU, EAGER).lacks(PARTS)
    for device, config in (
        (GPU, EAGER), (CPU, replace(EAGER, engine="torchscript")), (CPU, replace(EAGER, dtype="bfloat16")),
        (CPU, replace(EAGER, batch_size=2)), (CPU, replace(EAGER, threads=2)),
    ):  # fmt: skip
        assert BlockTable(store, device, config).rows == {}
    # The resolution is part of the shapes.
    other = BlockTable(store, CPU, replace(EAGER, resolution=32))
    assert len(other.rows) == 6
    assert {part.block.name for part in other.add_up_arch(ARCH).missing} >= {"stem", "stage1.0"}


def test_a_row_measured_again_takes_the_place_of_the_older(store: Store) -> None:
    table = BlockTable(store, CPU, EAGER)
    table.add([figure(PRODUCT, 1.0)])
    table.add([figure(PRODUCT, 2.0)])
    assert table.median_ms(PRODUCT) == 2.0
    assert len(table.rows) == 1
    table.add([])
    assert len(table.rows) == 1


# -- Yardsticks and limits -------------------------------------------------------------------------------------------


def test_references_are_there_when_both_yardsticks_are(store: Store) -> None:
    table = BlockTable(store, CPU, EAGER)
    assert table.references_ms is None
    table.add([figure(YARDSTICKS[1], 4.0)])
    assert table.references_ms is None
    table.add([figure(YARDSTICKS[0], 2.0)])
    assert table.references_ms == [2.0, 4.0]


def test_yardsticks_and_limits_serve_all_engines_and_nothing_else_does(store: Store) -> None:
    script = BlockTable(store, CPU, replace(EAGER, engine="torchscript"))
    script.add([figure(shape, 2.0) for shape in SHARED] + figures(0.5, 4.0))
    for engine in ("eager", "compile", "fused"):
        table = BlockTable(store, CPU, replace(EAGER, engine=engine))
        assert set(table.rows) == {shape_id(shape) for shape in SHARED}, engine
        assert table.references_ms == [2.0, 2.0]
        assert table.machine == script.machine
    assert set(script.rows) == {shape_id(shape) for shape in (*SHARED, CALL, PARTS[0].shape)}


@pytest.mark.parametrize(("device", "kind"), [(CPU, "cpu"), (GPU, "cuda")])
def test_the_devices_limits_are_in_the_tables_units(store: Store, device: DeviceInfo, kind: str) -> None:
    table = BlockTable(store, device, replace(EAGER, device=kind))
    with pytest.raises(KeyError):
        _ = table.machine
    table.add([figure(PRODUCT, 2.0), figure(COPY, 8.0)])
    assert table.machine.macs_per_s == pytest.approx(PRODUCT_SIDE[kind] ** 3 / 0.002)
    # Read and written.
    assert table.machine.bytes_per_s == pytest.approx(2 * COPY_BYTES[kind] / 0.008)


# -- Correction by the yardsticks ------------------------------------------------------------------------------------

TINY = LatencyConfig(device="cpu", engine="eager", resolution=16, seconds=0.02)


@pytest.fixture(scope="module")
def meter() -> BlockMeter:
    """Of yardsticks that took 2 and 4 ms when they were first measured."""
    return BlockMeter(TINY, references_ms=[2.0, 4.0])


@pytest.mark.parametrize(
    ("share", "expected"), [(1.0, (8.0, 8.0)), (0.0, (1.0, 2.0)), (0.25, (2.75, 3.5)), (3.0, (8.0, 8.0))]
)
def test_what_computes_is_corrected_by_the_product_and_the_rest_by_the_network(
    meter: BlockMeter, share: float, expected: tuple[float, float]
) -> None:
    """In the first round the network yardstick took four times its reference, in the second twice; the product half.

    What is timed took 4 ms each time; the product yardstick 2 ms, so twice its operations are what it has if it
    computes all of the time.
    """
    own = np.array([0.004, 0.004])
    yardsticks = np.array([[0.008, 0.002], [0.004, 0.002]])
    macs = int(2 * share * meter.yardstick_side**3)
    assert meter._corrected_ms(own, yardsticks, macs).tolist() == pytest.approx(list(expected))


def test_the_yardsticks_own_latencies_are_their_references(meter: BlockMeter) -> None:
    yardsticks = np.array([[0.007, 0.003], [0.005, 0.006]])
    assert meter._corrected_ms(yardsticks[:, 0], yardsticks, 0).tolist() == pytest.approx([2.0, 2.0])
    product = meter._corrected_ms(yardsticks[:, 1], yardsticks, meter.yardstick_side**3)
    assert product.tolist() == pytest.approx([4.0, 4.0])


# -- Measuring -------------------------------------------------------------------------------------------------------


def measured(found: list[Figure]) -> set[str]:
    assert len({each.shape for each in found}) == len(found)
    for each in found:
        assert each.median_ms > 0 or each.shape == CALL
        assert each.p20_ms <= each.median_ms <= each.p80_ms
    return {each.shape for each in found}


def shapes(parts: Collection[Part]) -> set[str]:
    return {part.shape for part in parts}


def test_what_is_missing_is_measured_and_no_more(store: Store) -> None:
    """The smallest network, then nothing, then one that shares all but its head with it."""
    arch = make_tiny_space().smallest()
    device = on_device(TINY)
    table = BlockTable(store, device, TINY)
    before = torch.get_num_threads()
    meter = BlockMeter(TINY, table.references_ms)
    assert len(meter.references_ms) == 2
    assert all(ms > 0 for ms in meter.references_ms)
    found = meter.measure_archs([arch], table.rows.keys(), [arch])
    assert measured(found) == {*SHARED, CALL, network_shape(str(arch), TINY)} | shapes(arch_parts(arch, TINY))
    table.add(found)
    assert table.references_ms == pytest.approx(list(meter.references_ms))
    total_ms = table.add_up_arch(arch).total_ms
    assert total_ms is not None
    assert total_ms > 0
    assert table.machine.macs_per_s > 0
    assert meter.measure_archs([arch], table.rows.keys(), [arch]) == []

    # Another process finds the yardsticks in the table, and does not measure them.
    again = BlockMeter(TINY, BlockTable(store, device, TINY).references_ms)
    assert again.references_ms == pytest.approx(meter.references_ms)
    other = replace(arch, head_width=32)
    found = again.measure_archs([arch, other, other], table.rows.keys())
    assert measured(found) == {arch_parts(other, TINY)[-1].shape}
    assert torch.get_num_threads() == before


def known_basics() -> set[str]:
    return {shape_id(shape) for shape in (*SHARED, CALL)}


def test_layers_are_measured_once_a_shape(meter: BlockMeter) -> None:
    """A convolution and a classifier; what is known already is left out."""
    cut = layers(make_tiny_space().smallest().build(10), TINY)
    some = [cut[0], cut[-1], cut[0]]
    assert measured(meter.measure_layers(some, known_basics())) == shapes([cut[0][0], cut[-1][0]])
    assert meter.measure_layers(some, known_basics() | {part.shape_id for part, _ in some}) == []


def test_any_network_is_measured_under_its_name(meter: BlockMeter) -> None:
    config = replace(TINY, resolution=32)
    network = BlockMeter(config, meter.references_ms).measure_network(
        "test_efficientnet", timm_model("test_efficientnet", 10), 10**6, known_basics()
    )
    assert measured(network) == {network_shape("test_efficientnet", config)}


def test_only_a_group_of_parts_is_in_memory_at_a_time(meter: BlockMeter, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    sizes: list[int] = []

    def time_group(group: list[int]) -> list[int]:
        assert made == list(range(sum(sizes) + len(group)))
        sizes.append(len(group))
        return group

    monkeypatch.setattr(meter, "_time_group", time_group)
    count = 2 * GROUP + 1
    makers = [lambda number=number: made.append(number) or number for number in range(count)]
    assert meter._time(makers) == list(range(count))  # type: ignore[arg-type]
    assert sizes == [GROUP, GROUP, 1]


def test_what_a_call_costs_is_what_repeating_does_not(meter: BlockMeter, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block takes 3 ms a call, four of it 9 ms: 2 ms each, and 1 ms beside."""
    known = known_basics() - {shape_id(CALL)}
    calls: list[int] = []

    def time(makers: list) -> list[Figure]:  # type: ignore[type-arg]
        one, many = (make() for make in makers)
        calls.append(many.macs // one.macs)
        return [figure(one.shape, 3.0), figure(many.shape, many_ms)]

    monkeypatch.setattr(meter, "_time", time)
    many_ms = 9.0
    with threads(1):
        (found,) = meter._basics(known)
        assert (found.shape, found.median_ms) == (CALL, pytest.approx(1.0))
        # Noise makes no call cheaper than nothing.
        many_ms = 20.0
        assert meter._basics(known)[0].median_ms == 0.0
    assert calls == [REPEATS, REPEATS]
