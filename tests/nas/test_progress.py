from __future__ import annotations

import io
from dataclasses import replace

import pandas as pd
import pytest
from rich.console import Console

from nas.display.front_table import front_table
from nas.lab.invented import FakeEvaluator
from nas.recorded import Hypervolumes
from nas.search.evaluation import Outcome
from nas.search.loop import Event, SearchResult, Shares
from nas.search.progress import LiveProgress, PlainProgress, hypervolume_words, scored, shares_line
from search_spaces import load_space
from studies import CandidateState


def test_the_time_to_get_ready_is_shown_where_it_is_worth_saying() -> None:
    fake, arch = FakeEvaluator(), load_space("small").anchor()
    latency = fake.measure(arch)
    outcome = Outcome(CandidateState.COMPLETE, fake.cost(arch), 1.0, latency=latency, proxy=fake.train_one(arch))
    event = Event(arch, outcome, 1, 2, 0.5, 1, 0.3, None)
    assert scored(event).endswith("ms")
    slow = replace(outcome, latency=replace(latency, ready_seconds=3.21))
    assert scored(replace(event, outcome=slow)).endswith("ms  ready in 3.2 s")


def test_a_line_shows_how_many_workers_train_and_how_fast() -> None:
    fake, arch = FakeEvaluator(), load_space("small").anchor()
    outcome = Outcome(CandidateState.FAILED, fake.cost(arch), 1.0, reason="out of memory")
    event = Event(arch, outcome, 1, 2, 0.5, 1, 0.3, None, workers=4, busy=3)
    shown = io.StringIO()
    PlainProgress(Console(file=shown, width=300)).candidate(event)
    assert "busy" not in shown.getvalue()
    PlainProgress(Console(file=shown, width=300)).candidate(replace(event, per_minute=12.34, seconds_left=83.0))
    assert "0:01:23 left  3/4 busy, 12.3 a minute  [" in shown.getvalue()
    latency = fake.measure(arch)
    complete = Outcome(CandidateState.COMPLETE, fake.cost(arch), 1.0, latency=latency, proxy=fake.train_one(arch))
    event = replace(event, outcome=complete, complete=200, budget=200, per_minute=12.34, seconds_left=83.0)
    for width, there, missing in (
        (80, ("best 0.500",), ("front", "hypervolume")),
        (110, ("best 0.500", "hypervolume as searched 0.3000"), ("front",)),
        (150, ("front 1  hypervolume as searched 0.3000",), ()),
    ):  # fmt: skip
        shown = io.StringIO()
        with LiveProgress(Console(file=shown, force_terminal=True, width=width)) as live:
            live.begin(0, 200)
            live.candidate(event)
            words = live.bar.tasks[0].description
        assert words.endswith("3/4 busy, 12.3 a minute  0:01:23 left")
        assert all(each in words for each in there)
        assert not any(each in words for each in missing)
        # Nothing is cut off.
        assert "0:01:23 left" in shown.getvalue()


@pytest.mark.parametrize(("workers", "busy"), [(1, None), (4, "4 workers were busy for 75% of the training")])
def test_the_last_line_says_how_busy_the_workers_were(workers: int, busy: str | None) -> None:
    shares = Shares(training=60.0, latency=30.0, total=120.0, workers=workers, worked=180.0)
    line = shares_line(SearchResult(1, 0, "budget met", pd.DataFrame(), Hypervolumes(0.5, None), shares))
    assert line.startswith("0:02:00 in all: training 0:01:00 (50%), latency 0:00:30 (25%), all else 0:00:30 (25%)")
    assert line.partition("; ")[2] == (busy or "")
    both = shares_line(
        SearchResult(1, 0, "budget met", pd.DataFrame(), Hypervolumes(0.5, None), replace(shares, both=20.0))
    )
    assert "all else 0:00:50 (42%), where 0:00:20 went to both" in both


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_shows_it_above_the_live_line(width: int) -> None:
    fake, arch = FakeEvaluator(), load_space("small").anchor()
    latency = replace(fake.measure(arch), ready_seconds=3.21)
    outcome = Outcome(CandidateState.COMPLETE, fake.cost(arch), 1.0, latency=latency, proxy=fake.train_one(arch))
    shown = io.StringIO()
    with LiveProgress(Console(file=shown, force_terminal=True, width=width)) as live:
        live.begin(0, 2)
        live.candidate(Event(arch, outcome, 1, 2, 0.5, 1, 0.3, None))
    assert f"{arch}: ready in 3.2 s" in shown.getvalue().replace("\n", "").replace("\r", "")


def test_a_terminal_says_why_a_candidate_failed_and_what_is_done_at_the_end() -> None:
    fake, arch = FakeEvaluator(), load_space("small").anchor()
    shown = io.StringIO()
    failed = Outcome(CandidateState.FAILED, fake.cost(arch), 1.0, reason="out of memory")
    over = Outcome(
        CandidateState.OVER_LIMIT, fake.cost(arch), 1.0, reason="parameters 1,200, limit 1,000; MACs 3, limit 2"
    )
    with LiveProgress(Console(file=shown, force_terminal=True, width=160)) as live:
        live.begin(0, 2)
        live.candidate(Event(arch, failed, 0, 2, 0.0, 0, 0.0, None))
        assert f"{arch}: failed: out of memory" in shown.getvalue()
        live.candidate(Event(arch, over, 0, 2, 0.0, 0, 0.0, None))
        assert live.bar.tasks[0].description.startswith("parameters 1,200, limit 1,000  best")
        live.note("measuring the front again")
        assert live.bar.tasks[0].description == "measuring the front again"


def test_a_front_without_a_profile_is_shown_without_efficiencies() -> None:
    row = dict(
        number=3,
        accuracy=0.5,
        latency_ms=1.25,
        computational_efficiency=None,
        params=1e4,
        macs=1e6,
        summary="a",
        confirmed=0,
        training_steps=None,
        training_batch_size=None,
        test_accuracy=None,
    )
    shown = io.StringIO()
    Console(file=shown, width=120).print(front_table(pd.DataFrame([row]), "front"))
    assert "1.2500" in shown.getvalue()
    assert "nan" not in shown.getvalue()


def test_confirmed_accuracies_are_shown_with_their_intervals() -> None:
    row = dict(
        number=3, accuracy=0.5, latency_ms=1.25, computational_efficiency=0.5, params=1e4, macs=1e6, summary="a",
        confirmed=1, accuracy_low=0.48, accuracy_high=0.521, accuracy_trainings=2, searched_accuracy=0.55,
        training_steps=200, training_batch_size=32, test_accuracy=0.4711,
    )  # fmt: skip
    shown = io.StringIO()
    Console(file=shown, width=80).print(front_table(pd.DataFrame([row]), "front"))
    assert "means of 2 other trainings of 200 steps of 32 images, with 95 % intervals" in " ".join(
        shown.getvalue().split()
    )
    assert "0.480-0.521" in shown.getvalue()
    assert "0.471" in shown.getvalue()
    assert "0.55" not in shown.getvalue()


def test_hypervolumes_have_two_names() -> None:
    assert hypervolume_words(Hypervolumes(0.62, None)) == "hypervolume as searched 0.6200"
    words = "hypervolume as searched 0.6200, as confirmed 0.5900 (optimism +0.0300)"
    assert hypervolume_words(Hypervolumes(0.62, 0.59)) == words
