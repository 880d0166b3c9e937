from __future__ import annotations

import io
from dataclasses import replace

import pandas as pd
import pytest
from rich.console import Console

from nas.display.front_table import front_table
from nas.lab.invented import FakeEvaluator
from nas.search.evaluation import Outcome
from nas.search.loop import Event
from nas.search.progress import LiveProgress, scored
from search_spaces import load_space
from studies import CandidateState


def test_the_time_to_get_ready_is_shown_where_it_is_worth_saying() -> None:
    fake, arch = FakeEvaluator(), load_space("small").anchor()
    latency = fake.measure(arch)
    outcome = Outcome(CandidateState.COMPLETE, fake.cost(arch), 1.0, latency=latency, proxy=fake.train(arch))
    event = Event(arch, outcome, 1, 2, 0.5, 1, 0.3, None)
    assert scored(event).endswith("ms")
    slow = replace(outcome, latency=replace(latency, ready_seconds=3.21))
    assert scored(replace(event, outcome=slow)).endswith("ms  ready in 3.2 s")


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_shows_it_above_the_live_line(width: int) -> None:
    fake, arch = FakeEvaluator(), load_space("small").anchor()
    latency = replace(fake.measure(arch), ready_seconds=3.21)
    outcome = Outcome(CandidateState.COMPLETE, fake.cost(arch), 1.0, latency=latency, proxy=fake.train(arch))
    shown = io.StringIO()
    with LiveProgress(Console(file=shown, force_terminal=True, width=width)) as live:
        live.begin(0, 2)
        live.candidate(Event(arch, outcome, 1, 2, 0.5, 1, 0.3, None))
    assert f"{arch}: ready in 3.2 s" in shown.getvalue().replace("\n", "").replace("\r", "")


def test_a_terminal_says_why_a_candidate_failed_and_what_is_done_at_the_end() -> None:
    fake, arch = FakeEvaluator(), load_space("small").anchor()
    shown = io.StringIO()
    failed = Outcome(CandidateState.FAILED, fake.cost(arch), 1.0, reason="out of memory")
    over = Outcome(CandidateState.OVER_LIMIT, fake.cost(arch), 1.0, reason="params +20% over the limit, macs +3% over")
    with LiveProgress(Console(file=shown, force_terminal=True, width=160)) as live:
        live.begin(0, 2)
        live.candidate(Event(arch, failed, 0, 2, 0.0, 0, 0.0, None))
        assert f"{arch}: failed: out of memory" in shown.getvalue()
        live.candidate(Event(arch, over, 0, 2, 0.0, 0, 0.0, None))
        assert live.bar.tasks[0].description.startswith("params +20% over  best")
        live.note("measuring the front again")
        assert live.bar.tasks[0].description == "measuring the front again"


def test_a_front_without_a_profile_is_shown_without_efficiencies() -> None:
    row = dict(
        number=3, accuracy=0.5, latency_ms=1.25, computational_efficiency=None, params=1e4, macs=1e6, summary="a"
    )
    shown = io.StringIO()
    Console(file=shown, width=120).print(front_table(pd.DataFrame([row]), "front"))
    assert "1.2500" in shown.getvalue()
    assert "nan" not in shown.getvalue()
