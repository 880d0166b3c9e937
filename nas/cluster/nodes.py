"""The nodes of a cluster, as Ray describes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# The resource that nodes offer on which latencies are measured: one for each device.
LATENCY = "latency"


@dataclass(frozen=True)
class Node:
    """A node that is alive.

    Args:
        address: its IP address.
        cpus, gpus: number of those that it offers.
        latencies: number of latencies that it measures at once.
        memory_bytes: memory that it offers to tasks.
    """

    id: str
    host: str
    address: str
    cpus: float
    gpus: float
    latencies: int
    memory_bytes: int

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Node:
        """The node of a row of `ray.nodes()`."""
        offered = row["Resources"]
        return cls(
            row["NodeID"], row["NodeManagerHostname"], row["NodeManagerAddress"], offered.get("CPU", 0.0),
            offered.get("GPU", 0.0), int(offered.get(LATENCY, 0.0)), int(offered.get("memory", 0)),
        )  # fmt: skip

    def __str__(self) -> str:
        return f"node {self.host} ({self.address}, {self.id[:8]})"


def alive(rows: list[dict[str, Any]]) -> list[Node]:
    """The nodes that are alive, of those in `ray.nodes()`, in an order that stays."""
    return sorted((Node.of(row) for row in rows if row["Alive"]), key=lambda node: (node.address, node.id))
