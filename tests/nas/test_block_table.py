"""Formulas on invented rows in a real database; the real meter on the smallest networks."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial

import pytest
import torch

from kernels.device_info import DeviceInfo
from nas.config import LatencyConfig
from nas.latency.block_meter import GROUP, REPEATS, BlockMeter, _Made
from nas.latency.block_table import BlockTable
from nas.latency.device_profile import DeviceProfile, store_profile
from nas.latency.meter import cpu_threads
from nas.latency.parts import CALL, Part, arch_parts, layer_parts, network_shape, shape_id
from nas.latency.timm_networks import timm_model
from nas.latency.values import Latency, ShapeLatency
from nas.latency.yardsticks import Timed
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


def invent(shape: str, median_ms: float, **changes: bool) -> ShapeLatency:
    return ShapeLatency(shape, Latency(median_ms, 0.9 * median_ms, 1.2 * median_ms, 10, 0.01, **changes))


def invent_all(call_ms: float, *part_ms: float) -> list[ShapeLatency]:
    """Latencies of a call and of the different parts of `PARTS`, in order."""
    shapes = dict.fromkeys(part.shape for part in PARTS)
    return [invent(CALL, call_ms), *(invent(shape, ms) for shape, ms in zip(shapes, part_ms, strict=False))]


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


def test_a_call_is_counted_once(store: Store) -> None:
    table = BlockTable(store, CPU, EAGER)
    table.add(invent_all(0.5, 1.0, 2.0, 3.0, 4.0, 0.5))
    added = table.add_up(PARTS)
    assert added.part_ms == (1.0, 2.0, 3.0, 4.0, 4.0, 0.5)
    assert added.call_ms == 0.5
    assert added.total_ms == pytest.approx(0.5 + 14.5)
    assert added.missing == ()
    assert not table.lacks(PARTS)
    assert table.add_up_arch(ARCH) == added


def test_what_is_missing_is_told_once_a_shape(store: Store) -> None:
    table = BlockTable(store, CPU, EAGER)
    assert table.lacks(PARTS)
    assert table.add_up(PARTS).call_ms is None
    assert [part.block.name for part in table.add_up(PARTS).missing] == [
        "stem", "stage1.0", "stage2.0", "stage2.2", "head",
    ]  # fmt: skip
    table.add(invent_all(0.5, 1.0, 2.0, 3.0))
    added = table.add_up(PARTS)
    assert added.part_ms == (1.0, 2.0, 3.0, None, None, None)
    assert added.total_ms is None
    assert table.lacks(PARTS)
    assert {part.shape_id for part in added.missing} == {PARTS[3].shape_id, PARTS[5].shape_id}


def test_without_what_a_call_costs_nothing_adds_up(store: Store) -> None:
    table = BlockTable(store, CPU, EAGER)
    table.add(invent_all(0.5, 4.0, 8.0, 12.0, 16.0, 2.0)[1:])
    assert table.add_up(PARTS).missing == ()
    assert table.add_up(PARTS).total_ms is None
    assert table.lacks(PARTS)


def test_rows_are_those_of_one_deployment(store: Store) -> None:
    BlockTable(store, CPU, EAGER).add(invent_all(0.5, 4.0, 8.0, 12.0, 16.0, 2.0))
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
    table.add([invent(CALL, 1.0)])
    table.add([invent(CALL, 2.0)])
    assert table.median_ms(CALL) == 2.0
    assert len(table.rows) == 1
    table.add([])
    assert len(table.rows) == 1


def test_rows_that_the_cap_or_a_throttling_gpu_ended_are_doubtful(store: Store) -> None:
    table = BlockTable(store, CPU, EAGER)
    table.add(invent_all(0.5, 1.0, 2.0, 3.0, 4.0, 0.5))
    assert table.doubtful(PARTS) == []
    # The one that the network has twice, and the head.
    table.add([invent(PARTS[3].shape, 4.0, capped=True), invent(PARTS[5].shape, 4.0, throttled=True)])
    assert {row.shape for row in table.doubtful(PARTS)} == {PARTS[3].shape, PARTS[5].shape}
    assert len(table.doubtful(PARTS)) == 2
    assert table.doubtful(PARTS[:3]) == []


def test_fused_rows_are_those_of_one_version_of_the_kernels(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(EAGER, engine="fused")
    table = BlockTable(store, GPU, config)
    table.add([invent(CALL, 1.0)])
    assert BlockTable(store, GPU, config).median_ms(CALL) == 1.0
    monkeypatch.setattr("kernels.tune.sources_digest", lambda: "other")
    assert BlockTable(store, GPU, config).median_ms(CALL) is None
    # Of other engines none of our kernels' business.
    assert BlockTable(store, GPU, EAGER).kernels == ""


def test_the_devices_ceilings_are_those_of_its_profile(store: Store) -> None:
    assert BlockTable(store, CPU, EAGER).profile is None
    store_profile(store, CPU, "float32", 1, DeviceProfile(2e10, 4e10, 1e-6, None, 2.0, 4.0))
    for config in (EAGER, replace(EAGER, engine="inductor", batch_size=8)):
        table = BlockTable(store, CPU, config)
        assert (table.machine.bytes_per_s, table.machine.macs_per_s) == (2e10, 4e10)
        assert table.references_ms == (2.0, 4.0)
    assert BlockTable(store, CPU, replace(EAGER, threads=2)).profile is None


# -- Measuring -------------------------------------------------------------------------------------------------------

TINY = LatencyConfig(device="cpu", engine="eager", resolution=16, seconds=0.02)


@pytest.fixture(scope="module")
def meter() -> BlockMeter:
    """Of yardsticks that took 2 and 4 ms when they were first measured."""
    return BlockMeter(TINY, references_ms=[2.0, 4.0])


def measured(found: list[ShapeLatency]) -> set[str]:
    assert len({each.shape for each in found}) == len(found)
    for each in found:
        assert each.latency.median_ms > 0 or each.shape == CALL
        assert each.latency.p20_ms <= each.latency.median_ms <= each.latency.p80_ms
    return {each.shape for each in found}


def shapes(parts: Collection[Part]) -> set[str]:
    return {part.shape for part in parts}


def test_what_is_missing_is_measured_and_no_more(store: Store, meter: BlockMeter) -> None:
    """The smallest network, then nothing, then one that shares all but its head with it."""
    arch = make_tiny_space().smallest()
    table = BlockTable(store, DeviceInfo.of(torch.device(TINY.device)), TINY)
    before = torch.get_num_threads()
    found = meter.measure_archs([arch], table.known, [arch])
    assert measured(found) == {CALL, network_shape(str(arch), TINY)} | shapes(arch_parts(arch, TINY))
    table.add(found)
    total_ms = table.add_up_arch(arch).total_ms
    assert total_ms is not None
    assert total_ms > 0
    assert meter.measure_archs([arch], table.known, [arch]) == []
    other = replace(arch, head_width=32)
    found = meter.measure_archs([arch, other, other], table.known)
    assert measured(found) == {arch_parts(other, TINY)[-1].shape}
    assert torch.get_num_threads() == before


A_CALL = {shape_id(CALL): 0.01}


def test_layers_are_measured_once_a_shape(meter: BlockMeter) -> None:
    """A convolution and a classifier; what is known already is left out."""
    cut = layer_parts(make_tiny_space().smallest().build(10), TINY)
    some = [cut[0], cut[-1], cut[0]]
    assert measured(meter.measure_layers(some, A_CALL)) == shapes([cut[0][0], cut[-1][0]])
    assert meter.measure_layers(some, {**A_CALL, **{part.shape_id: 1.0 for part, _ in some}}) == []


def test_any_network_is_measured_under_its_name(meter: BlockMeter) -> None:
    config = replace(TINY, resolution=32)
    network = BlockMeter(config, meter.yardsticks.references_ms).measure_network(
        "test_efficientnet", timm_model("test_efficientnet", 10), 10**6
    )
    assert measured([network]) == {network_shape("test_efficientnet", config)}


class Invented:
    """Yardsticks that time nothing: calls of so many MACs take so long.

    Attributes:
        sizes: of the groups that were timed.
    """

    def __init__(self, ms_of: Mapping[int, float] | None = None) -> None:
        self.ms_of = ms_of
        self.sizes: list[int] = []

    def time(self, group: list[Timed], reference: bool = False) -> list[Latency]:
        self.sizes.append(len(group))
        times = [self.ms_of[each.macs] if self.ms_of else 1.0 for each in group]
        return [Latency(ms, 0.5 * ms, 2 * ms, 10, 0.01, capped=True) for ms in times]


@pytest.fixture
def invented(meter: BlockMeter, monkeypatch: pytest.MonkeyPatch) -> Invented:
    yardsticks = Invented()
    monkeypatch.setattr(meter, "yardsticks", yardsticks)
    return yardsticks


def test_only_a_group_of_parts_is_in_memory_at_a_time(meter: BlockMeter, invented: Invented) -> None:
    made: list[int] = []

    def make(number: int) -> _Made:
        assert number < sum(invented.sizes) + GROUP
        made.append(number)
        return _Made(str(number), Timed([]))

    count = 2 * GROUP + 1
    found = meter._time([partial(make, number) for number in range(count)], 0.0)
    assert [each.shape for each in found] == [str(number) for number in range(count)]
    assert invented.sizes == [GROUP, GROUP, 1]


def test_of_a_call_each_run_has_its_share_and_a_launch_is_taken_off_where_there_is_one(
    meter: BlockMeter, invented: Invented
) -> None:
    invented.ms_of = {1: 9.0}
    timed = Timed([], 1)
    timings = meter._time(
        [partial(_Made, "a", timed), partial(_Made, "b", timed, 4), partial(_Made, "c", timed, 4, True)], 1.0
    )
    once, four, launched = (each.latency for each in timings)
    assert (once.median_ms, four.median_ms, launched.median_ms) == (9.0, 2.25, 2.0)
    assert (launched.p20_ms, launched.p80_ms, launched.capped) == (0.875, 4.25, True)
    # Noise makes no part faster than nothing.
    (nothing,) = meter._time([partial(_Made, "c", timed, 4, True)], 20.0)
    assert nothing.latency.median_ms == 0.0


def test_what_a_call_costs_is_what_repeating_does_not(meter: BlockMeter, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block takes 3 ms a call, four of it 9 ms: 2 ms each, and 1 ms beside."""
    repeats, many_ms = REPEATS["cpu"], 9.0
    assert repeats == 4
    asked: list[int] = []

    class Calls:
        def __init__(self) -> None:
            self.meter = meter.yardsticks.meter

        def time(self, group: list[Timed], reference: bool = False) -> list[Latency]:
            one, many = group
            asked.append(many.macs // one.macs)
            return [Latency(ms, ms, ms, 10, 0.01) for ms in (3.0, many_ms)]

    calls = Calls()
    monkeypatch.setattr(meter, "yardsticks", calls)
    with cpu_threads(1):
        (found,) = meter._call({})
        assert (found.shape, found.latency.median_ms) == (CALL, pytest.approx(1.0))
        # Noise makes no call cheaper than nothing.
        many_ms = 20.0
        assert meter._call({})[0].latency.median_ms == 0.0
        assert meter._call(A_CALL) == []
    assert asked == [repeats, repeats]
