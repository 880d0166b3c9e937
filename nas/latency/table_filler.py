"""Measurement of what the block latency table lacks of a network, while nobody else uses the device."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from nas.latency.block_meter import BlockMeter
from nas.latency.block_table import BlockTable
from nas.latency.values import ShapeLatency
from nas.locks import device_lock
from nas.reporting import Note

# Function from a meter, and the latencies in ms of what needs no measuring by `shape_id`, to measured latencies.
Measure = Callable[[BlockMeter, Mapping[str, float]], Sequence[ShapeLatency]]


class TableFiller:
    """Filler of the tables of one device with the latencies of one network.

    Args:
        title: the network's name in messages.
        device: torch's name of the device.
        note: function that receives a line about what is measured.
        again: whether what is in a table already is measured, too.
    """

    def __init__(self, title: str, device: str, note: Note, again: bool) -> None:
        self.title, self.note, self.again = title, note, again
        self.lock, self.waiting = device_lock(torch.device(device)), note

    def fill(self, table: BlockTable, ids: Collection[str], measure: Measure, what: str) -> None:
        """Make a table hold the latencies of all shapes with these ids.

        Args:
            ids: the shapes' `shape_id`s.
            measure: function that measures those shapes that are not known.
            what: the words for the shapes in messages.

        Raises:
            CandidateFailed: the engine cannot compile one of them, or memory runs out.
        """

        def known() -> dict[str, float]:
            return {key: ms for key, ms in table.known.items() if not (self.again and key in ids)}

        if known().keys() >= set(ids):
            return
        with self.lock.measuring(self.waiting):
            # Another process may have measured them while we waited.
            table.load()
            if not known().keys() >= set(ids):
                self.note(f"measuring {self.title}: {what}")
                table.add(measure(BlockMeter(table.config, table.references_ms), known()))
