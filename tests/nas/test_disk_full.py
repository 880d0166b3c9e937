"""Searches and what they leave where a disk is full: files can grow so far and no further."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nas.config import LatencyConfig, SearchConfig
from nas.lab.invented import FakeEvaluator
from nas.latency import engines
from nas.latency.engines import Engine, ready
from nas.search.loop import Event, Silent, run
from studies import StorageError, Store
from studies.display import write_note
from tests.conftest import Room, make_tiny_space


class Counting(Silent):
    """Progress that keeps how many candidates it was told of."""

    told = 0

    def candidate(self, event: Event) -> None:
        self.told = event.complete


@pytest.mark.usefixtures("databases_made_anew")
@pytest.mark.parametrize("kib", [230, 370, 440, 510, 580, 720])
def test_a_search_whose_disk_fills_keeps_what_was_finished_and_goes_on(sqlite_url: str, room: Room, kib: int) -> None:
    config = SearchConfig(
        budget=8, storage=sqlite_url, space=make_tiny_space(), latency=LatencyConfig(device="cpu", engine="eager")
    )
    progress = Counting()
    with pytest.raises(StorageError, match="disk") as caught, room(kib):
        run(config, FakeEvaluator(), progress)
    assert "\n" not in str(caught.value)
    store = Store.open(sqlite_url, create=False)
    kept = {} if store is None else {summary.name: summary.complete for summary in store.summaries()}
    if store is not None:
        store.close()
    assert kept.get(config.study, 0) >= progress.told
    assert run(config, FakeEvaluator()).complete == 8


def test_notes_that_find_no_room_are_no_bug(sqlite_url: str, room: Room) -> None:
    store = Store.open(sqlite_url, create=True)
    assert store is not None
    study_id = store.optuna_storage.create_new_study([], "some")
    with pytest.raises(StorageError, match="disk"), room(0):
        write_note(store.optuna_storage, study_id, None, "words")
    store.close()


def test_a_network_that_finds_no_room_to_be_compiled_has_not_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_(model: nn.Module, example: Tensor, config: LatencyConfig) -> nn.Module:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "/tmp/cache")
        except OSError:
            raise RuntimeError("the backend raised") from None
        return model

    monkeypatch.setitem(engines.ENGINES, "inductor", Engine(compile_, ("cpu",), refuses=lambda error: True))
    with pytest.raises(OSError, match="No space left on device"):
        ready(nn.Identity(), replace(LatencyConfig(device="cpu"), engine="inductor"), torch.zeros(1))


def test_data_that_find_no_room_in_the_cache_are_used_all_the_same(tmp_path: Path, room: Room) -> None:
    from nas.training.data import _read_cache, _write_cache

    path = tmp_path / "cache" / "digits.pt"
    with pytest.warns(UserWarning, match="not cached"), room(4):
        _write_cache(path, {"images": torch.zeros(50_000)})
    assert list(path.parent.iterdir()) == []
    assert _read_cache(path) is None
