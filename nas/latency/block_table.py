"""The block latency table: latencies of parts measured alone, kept in the study database, and their sums."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median

from kernels.device_info import DeviceInfo
from nas.config import LatencyConfig
from nas.latency import device_profile
from nas.latency.parts import CALL, CALL_ID, Part, arch_parts, network_shape, shape_id
from nas.latency.roofline import Machine
from nas.latency.values import ShapeLatency
from search_spaces import ArchSpec
from studies import BlockLatency, Profile, Store


@dataclass(frozen=True)
class Sum:
    """The sum of the latencies of a network's parts.

    Args:
        parts: the network's parts, in order.
        part_ms: the latency of each part, t_i of `nas.latency.block_meter`; None where it was not measured.
        call_ms: the cost of a call besides what it runs, c; None if it was not measured.
    """

    parts: tuple[Part, ...]
    part_ms: tuple[float | None, ...]
    call_ms: float | None

    @property
    def missing(self) -> tuple[Part, ...]:
        """Parts that were not measured, one of each shape."""
        lacking = {p.shape_id: p for p, ms in zip(self.parts, self.part_ms, strict=True) if ms is None}
        return tuple(lacking.values())

    @property
    def total_ms(self) -> float | None:
        """The network's latency by its parts; None where one is missing."""
        known = [ms for ms in self.part_ms if ms is not None]
        return None if self.call_ms is None or len(known) < len(self.parts) else self.call_ms + sum(known)


class BlockTable:
    """The block latency table of one deployment in a study database.

    Args:
        store: the database.
        device: the device that the latencies were measured on.
        config: the deployment, whose resolution and classes do not matter, as they are part of the rows' shapes.

    Attributes:
        rows: the table's rows, by `shape_id`.
        profile: the device's profile; None before it was measured.
    """

    def __init__(self, store: Store, device: DeviceInfo, config: LatencyConfig) -> None:
        self.store, self.device, self.config = store, device, config
        self.kernels = _kernels(config)
        self.rows: dict[str, BlockLatency] = {}
        self.profile: Profile | None = None
        self.load()

    def load(self) -> None:
        """Read the rows again, as other processes write some, too."""
        config, device = self.config, asdict(self.device)
        self.profile = self.store.devices.find_profile(device, config.dtype, config.threads)
        self.rows = self.store.devices.block_latencies(
            device, config.engine_label, config.dtype, config.batch_size, config.threads, self.kernels
        )

    @property
    def known(self) -> dict[str, float]:
        """The latencies in ms, by `shape_id`."""
        return {key: row.median_ms for key, row in self.rows.items()}

    def median_ms(self, shape: str) -> float | None:
        """The latency of a shape; None where it was not measured."""
        row = self.rows.get(shape_id(shape))
        return None if row is None else row.median_ms

    @property
    def references_ms(self) -> tuple[float, float]:
        """The yardsticks' latencies; the profile must have been measured."""
        assert self.profile is not None
        return device_profile.references_ms(self.profile)

    @property
    def machine(self) -> Machine:
        """The limits that efficiencies are shares of; the profile must have been measured."""
        assert self.profile is not None
        return device_profile.machine(self.profile)

    def add(self, latencies: Sequence[ShapeLatency]) -> None:
        """Store latencies, each in the place of an older one of its shape."""
        config = self.config
        rows = [
            BlockLatency(
                engine=config.engine_label, dtype=config.dtype, batch_size=config.batch_size, threads=config.threads,
                kernels=self.kernels, shape_id=shape_id(each.shape), shape=each.shape, **asdict(each.latency),
            )
            for each in latencies
        ]  # fmt: skip
        if rows:
            self.store.devices.add_block_latencies(asdict(self.device), rows)
            self.load()

    def anchor_ms(self, anchor: ArchSpec, measure: Callable[[Sequence[float]], ShapeLatency]) -> float:
        """The anchor's latency, measured only where the table lacks it, so that all studies of a database compare.

        Args:
            measure: function from the yardsticks' references to the anchor's measured latency.
        """
        shape = network_shape(str(anchor), self.config)
        if self.median_ms(shape) is None:
            self.add([replace(measure(self.references_ms), shape=shape)])
        return self.rows[shape_id(shape)].median_ms

    def add_up(self, parts: Sequence[Part]) -> Sum:
        """The sum of the latencies of a network's parts."""
        return Sum(tuple(parts), tuple(self.median_ms(part.shape) for part in parts), self.median_ms(CALL))

    def doubtful(self, parts: Sequence[Part]) -> list[BlockLatency]:
        """The doubtful rows among those of some parts and of a call."""
        return self.doubtful_rows([CALL_ID, *(part.shape_id for part in parts)])

    def doubtful_rows(self, ids: Iterable[str]) -> list[BlockLatency]:
        """The rows with these ids that ended at the time cap or were measured on a throttling GPU."""
        rows = [self.rows[key] for key in dict.fromkeys(ids) if key in self.rows]
        return [row for row in rows if row.capped or row.throttled]

    def lacks(self, parts: Sequence[Part]) -> bool:
        """Whether a part, or what a call costs, is not in the table."""
        return self.add_up(parts).total_ms is None

    def add_up_arch(self, arch: ArchSpec) -> Sum:
        """The sum of the latencies of an architecture's parts."""
        return self.add_up(arch_parts(arch, self.config))


def _kernels(config: LatencyConfig) -> str:
    """A digest of the sources of the kernels that ran; empty for engines that use none of ours."""
    if config.engine != "fused":
        return ""
    from kernels.tune import sources_digest

    return sources_digest()


def sum_errors(
    table: BlockTable, archs: Sequence[ArchSpec], latencies_ms: Sequence[float], anchor_ms: float,
    anchor_in_table_ms: float | None,
) -> list[float]:  # fmt: skip
    """Errors of the sums of parts against the networks' own latencies, as shares of these; one for each known sum.

    A study's latencies are corrected to the day when its anchor was measured, the table's to that of its yardsticks.
    The anchor is in the table too, so that the two scales can be compared.

    Args:
        latencies_ms: the networks' own latencies.
        anchor_ms: the anchor's latency in the study.
        anchor_in_table_ms: the anchor's latency in the table; without it there are no errors.
    """
    if anchor_in_table_ms is None:
        return []
    scale = anchor_ms / anchor_in_table_ms
    found = []
    for arch, latency_ms in zip(archs, latencies_ms, strict=True):
        total_ms = table.add_up_arch(arch).total_ms
        if total_ms is not None:
            found.append(total_ms * scale / latency_ms - 1)
    return found


def sum_errors_line(errors: Sequence[float]) -> str:
    """A line with the median and the greatest size of the errors."""
    sizes = [abs(error) for error in errors]
    return (
        f"parts measured alone add up to the networks' latencies within {median(sizes):.1%} "
        f"(median of {len(sizes)}; at most {max(sizes):.1%})"
    )
