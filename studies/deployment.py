"""A deployment: what a latency was measured on and how, and the columns that say so in every table and view."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True)
class Deployment:
    """What latencies must share to be compared. The fields are the columns of that name.

    Args:
        device_id: id of the row of `convfirst_devices`, which names device and software versions.
        resolution: pixels of the square images.
        threads: CPU threads.
    """

    device_id: int
    engine: str
    dtype: str
    batch_size: int
    resolution: int
    threads: int

    @classmethod
    def columns(cls) -> list[str]:
        """Names of the columns that tell one deployment from another."""
        return [field.name for field in fields(cls)]

    @classmethod
    def of(cls, row: Any) -> Deployment:
        """The deployment that a row has, of a table (by attribute) or of a view (by column)."""
        return cls(*(getattr(row, name) for name in cls.columns()))

    def as_columns(self) -> dict[str, Any]:
        """Column -> value."""
        return asdict(self)

    def rows_of(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The rows of a view that were measured in this deployment."""
        for column, value in self.as_columns().items():
            frame = frame[frame[column] == value]
        return frame
