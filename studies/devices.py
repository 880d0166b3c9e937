"""Devices, and what was measured of them for all studies of a database: their profiles and latencies of blocks."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Engine, Select, delete, select

from studies.reconnecting import repeatable
from studies.sql import device_row, transaction, upsert
from studies.tables import BlockLatency, Device, Profile


class Devices:
    """The devices of a database. A device is given by the fields of `tables.Device`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def id_of(self, device: dict[str, str]) -> int:
        """The id of a device, which is written if it is new."""
        with transaction(self.engine) as session:
            return device_row(session, device).device_id

    def profiles(self) -> list[Profile]:
        """All profiles, in the order of their devices."""
        with transaction(self.engine) as session:
            return list(session.scalars(select(Profile).order_by(Profile.device_id, Profile.dtype, Profile.threads)))

    @repeatable
    def find_profile(self, device: dict[str, str], dtype: str, threads: int) -> Profile | None:
        """The profile of a device in one dtype and number of threads."""
        with transaction(self.engine) as session:
            return session.scalar(_profile(device, dtype, threads))

    @repeatable
    def add_profile(self, device: dict[str, str], profile: Profile, replace: bool = False) -> Profile:
        """Write a device's profile unless there is one, and return the one that is stored.

        With `replace`, it takes the place of the older one, and the latencies of blocks that were corrected by the
        older one are deleted.
        """
        with transaction(self.engine) as session:
            profile.device_id = device_row(session, device).device_id
            if replace:
                session.execute(delete(BlockLatency).where(
                    BlockLatency.device_id == profile.device_id, BlockLatency.dtype == profile.dtype,
                    BlockLatency.threads == profile.threads,
                ))  # fmt: skip
            upsert(session, Profile, [profile], replace)
            return session.scalars(_profile(device, profile.dtype, profile.threads)).one()

    @repeatable
    def block_latencies(
        self, device: dict[str, str], engine: str, dtype: str, batch_size: int, threads: int, kernels: str = ""
    ) -> dict[str, BlockLatency]:
        """Latencies of all blocks that were measured by themselves in one deployment, by their `shape_id`."""
        query = (
            select(BlockLatency)
            .join(Device, Device.device_id == BlockLatency.device_id)
            .filter_by(**device)
            .where(
                BlockLatency.engine == engine, BlockLatency.dtype == dtype, BlockLatency.batch_size == batch_size,
                BlockLatency.threads == threads, BlockLatency.kernels == kernels,
            )
        )  # fmt: skip
        with transaction(self.engine) as session:
            return {row.shape_id: row for row in session.scalars(query)}

    @repeatable
    def add_block_latencies(self, device: dict[str, str], rows: Sequence[BlockLatency]) -> None:
        """Write latencies of blocks in the place of any older ones, all or nothing."""
        with transaction(self.engine) as session:
            device_id = device_row(session, device).device_id
            for row in rows:
                row.device_id = device_id
            upsert(session, BlockLatency, rows)


def _profile(device: dict[str, str], dtype: str, threads: int) -> Select[Profile]:
    query = select(Profile).join(Profile.device).filter_by(**device)
    return query.where(Profile.dtype == dtype, Profile.threads == threads)
