"""A deployment: the device and settings of a latency measurement, and their columns in every table and view."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True)
class Deployment:
    """Conditions that latencies must share to be compared. Each field is the column of that name.

    Args:
        device_id: id of the row of `convfirst_devices`, which names the device and the software versions.
        batch_size: images in a batch.
        resolution: width and height of the images, in pixels.
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
        """The deployment of a row of a table, which has the columns as attributes."""
        return cls(*(getattr(row, name) for name in cls.columns()))

    @classmethod
    def of_view(cls, row: pd.Series) -> Deployment:
        """The deployment of a row of a view. (As an attribute, `dtype` would be the Series' own.)"""
        return cls(*(row[name] for name in cls.columns()))

    @property
    def key(self) -> str:
        """The deployment as one text, as the view `convfirst_evaluations` writes it, too."""
        return " ".join(str(value) for value in asdict(self).values())

    def as_columns(self) -> dict[str, Any]:
        """The value of each column."""
        return asdict(self)

    def rows_of(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The rows of a view that were measured in this deployment."""
        for column, value in self.as_columns().items():
            frame = frame[frame[column] == value]
        return frame
